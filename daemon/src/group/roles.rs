//! Role changes: starting, fencing, promoting, stopping; and the durable state that comes before each.
//!
//! A change of the group's state is on stable media before it is acted on. Hosts are withdrawn *before* a fence is
//! made durable and presented *after* a promotion is: in between nobody writes.

use block::{ByteRange, Epoch, HostError, Monotonic, Position, Tip, VolumeIndex};
use engine::StepId;
use engine::dirty_map::DirtyMap;
use engine::intent_map::IntentMap;
use engine::volume::Volume;
use journal::{Checkpoint, RedoLog};
use protocol::{CompareRange, GroupState, Hello, Refuse, Role};

use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::primary::{Gate, HaltedStart, Link, Primary};
use super::rewind::Target;
use super::secondary::Secondary;
use super::switch::whole_volumes;
use super::view::LossReport;
use super::window::RewindTo;
use super::{CleanState, Group, Machine, Mirror, MirrorSettings, RecoveredCuts, VerbRefused};

/// After a failed attempt to make the state durable the next one waits so long.
const PERSIST_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);
/// Ranges that a diverged side lists; beyond it neighbours are merged into a superset.
pub(super) const COMPARE_RANGES_MAX: usize = 4096;

/// A change of the durable state; applied to whatever is durable when its turn comes.
#[derive(Clone, Debug)]
pub(super) enum StateChange {
    /// A primary starts: its incarnation rises.
    Incarnation,
    /// A flush failed: the incarnation rises, and what it wrote is compared.
    NewIncarnation,
    /// The target's image is complete and of this lineage.
    Complete,
    /// A hello told of a higher epoch.
    Adopt(Box<GroupState>),
    /// A refusal told of a higher epoch.
    Fence(Box<Refuse>),
    /// This side becomes the primary from this position on.
    Promote(Position),
    /// An operator chose this primary in a fork: it begins the next epoch after this position.
    Settle(Position),
    /// This side gives its role up at this tip.
    Relinquish(Tip),
    /// An operator stopped or started mirroring.
    Stopped(bool),
    /// An operator allowed the partner's blocks to be overwritten.
    Approve,
    /// The partner may hold a lease from now on, or holds none any more.
    Lease(bool),
}

impl StateChange {
    /// Where the lineage that this change brings left that of `epoch`.
    pub(super) fn fork_above(&self, epoch: Epoch) -> Option<Position> {
        match self {
            Self::Adopt(state) => state.forks.iter().find(|fork| fork.epoch > epoch).map(|fork| fork.at),
            Self::Fence(refuse) if refuse.epoch == epoch.next() => Some(refuse.fork),
            Self::Fence(_)
            | Self::Incarnation
            | Self::NewIncarnation
            | Self::Complete
            | Self::Promote(_)
            | Self::Settle(_)
            | Self::Relinquish(_)
            | Self::Stopped(_)
            | Self::Approve
            | Self::Lease(_) => None,
        }
    }
}

/// A role change under way.
pub(super) enum Transition {
    /// The machine is being built.
    Opening,
    /// An old primary becomes a secondary.
    Fencing { stage: FenceStage },
    /// A secondary becomes the primary.
    Promoting { secondary: Box<Secondary>, stage: PromoteStage, target: Target },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FenceStage {
    Persisting,
    Draining,
    Flushing { outstanding: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PromoteStage {
    /// What was on its way to the redo log ends.
    Quieting,
    /// What is committed goes home, as far as the new epoch takes it over.
    Applying,
    /// The blocks of discarded cuts are entered in the intent maps.
    Marking,
    /// The epoch is being raised: from then on the cuts behind the fork are void.
    Persisting,
    /// The redo log is emptied, so that it can never be replayed over the hosts' writes.
    Emptying { asked: bool },
}

impl Transition {
    pub(super) fn secondary(&mut self) -> Option<&mut Secondary> {
        match self {
            Self::Promoting { secondary, .. } => Some(secondary),
            Self::Opening | Self::Fencing { .. } => None,
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        match self {
            Self::Promoting { secondary, stage: PromoteStage::Applying, .. } => secondary.poll_timeout(),
            Self::Promoting { .. } => None,
            Self::Opening | Self::Fencing { .. } => None,
        }
    }
}

/// What hosts of a secondary are told.
pub(super) fn secondary_reason(state: &GroupState) -> String {
    if state.diverged {
        format!(
            "this side is fenced: the partner was promoted in epoch {}; hosts must use the partner",
            state.epoch.0
        )
    } else if state.relinquished.is_some() {
        "this side gave its role to the partner: hosts must use the partner".to_owned()
    } else {
        "this side is the secondary of a mirror: hosts must use the primary".to_owned()
    }
}

/// Where a diverged side may differ: its intent regions, merged into a superset if they are many.
pub(super) fn compare_ranges(intents: &[IntentMap], settings: &MirrorSettings) -> Vec<CompareRange> {
    let mut ranges: Vec<CompareRange> = Vec::new();
    for (index, (intent, volume)) in intents.iter().zip(&settings.volumes).enumerate() {
        let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
        for region in intent.set_regions() {
            let start = region.saturating_mul(settings.region_bytes);
            let end = start.saturating_add(settings.region_bytes).min(volume.size.0);
            let crowded = ranges.len() >= COMPARE_RANGES_MAX;
            match ranges
                .last_mut()
                .filter(|last| last.volume == index && (last.range.end() == start || crowded))
            {
                Some(last) => last.range = ByteRange::between(last.range.offset(), end).unwrap_or(last.range),
                None => ranges.extend(
                    ByteRange::between(start, end).map(|range| CompareRange { volume: index, range }),
                ),
            }
        }
    }
    ranges
}

impl Mirror {
    /// A change of the durable state waits or is on its way that ends this role.
    pub(super) fn is_changing(&self) -> bool {
        self.changes.iter().any(|change| match change {
            StateChange::Adopt(_)
            | StateChange::Fence(_)
            | StateChange::Promote(_)
            | StateChange::Settle(_)
            | StateChange::Relinquish(_) => true,
            StateChange::Incarnation
            | StateChange::NewIncarnation
            | StateChange::Complete
            | StateChange::Stopped(_)
            | StateChange::Approve
            | StateChange::Lease(_) => false,
        })
    }

    /// Notes that the image is complete, once.
    pub(super) fn note_complete(&mut self) {
        if !self.changes.iter().any(|change| matches!(change, StateChange::Complete)) {
            self.changes.push_back(StateChange::Complete);
        }
    }

    /// What does not fit in a hello, if something does not.
    pub(super) fn mismatch(&self, hello: &Hello) -> Option<String> {
        if hello.volumes.len() != self.settings.volumes.len() {
            return Some(format!(
                "the mirror has {} volumes here and {} there",
                self.settings.volumes.len(),
                hello.volumes.len()
            ));
        }
        // A target may be larger than its primary, and makes room where it is smaller.
        let other = self.settings.volumes.iter().zip(&hello.volumes).find(|(ours, (id, _))| ours.id != *id);
        other.map(|(ours, (id, _))| format!("volume {} is here where {id} is there", ours.id))
    }

    /// Writes the next state, if one waits and none is being written.
    pub(super) fn next_change(&mut self, now: Monotonic, out: &mut Outbox) {
        if self.changing.is_some() || self.retry_change_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_change_at = None;
        let Some(change) = self.changes.front() else {
            return;
        };
        let next = self.changed(change);
        out.io(Purpose::PersistState, IoRequest::Persist(Box::new(next.clone())));
        self.changing = Some(next);
    }

    fn changed(&self, change: &StateChange) -> GroupState {
        let state = self.state.clone();
        match change {
            StateChange::Incarnation | StateChange::NewIncarnation => {
                GroupState { incarnation: state.incarnation.next(), ..state }
            }
            StateChange::Complete => GroupState {
                consistent: true,
                diverged: false,
                overwrite_approved: false,
                relinquished: None,
                ..state
            },
            StateChange::Adopt(adopted) => (**adopted).clone(),
            StateChange::Fence(refuse) => state.fenced(refuse.epoch, refuse.origin, refuse.fork),
            StateChange::Promote(tip) | StateChange::Settle(tip) => state.promoted(self.settings.site, *tip),
            StateChange::Relinquish(tip) => state.relinquishing(*tip),
            StateChange::Stopped(stopped) => GroupState { stopped: *stopped, ..state },
            StateChange::Approve => GroupState { overwrite_approved: true, stopped: false, ..state },
            StateChange::Lease(leased) => GroupState { leased: *leased, ..state },
        }
    }

    /// A flush failed at home: nothing more is admitted until a new incarnation is durable.
    pub(super) fn end_incarnation(&mut self, volume: VolumeIndex, now: Monotonic, out: &mut Outbox) {
        if let Machine::Primary(primary) = &mut self.machine {
            // At once: home may have lost what the records before promise, and a copy would carry the loss.
            primary.close(
                Link::Down { retry_at: now, attempt: 0 },
                "a flush failed: a new incarnation begins",
                out,
            );
            primary.admission_open = false;
            primary.volumes.iter_mut().for_each(|volume| volume.tracker.flush_failed());
            primary.volume(volume).poisoned = true;
            self.changes.push_back(StateChange::NewIncarnation);
        }
    }
}

impl Primary {
    /// The writes that wait for their intent bits; they get no sequence.
    pub(super) fn abandon_waiting(&mut self) -> Vec<(VolumeIndex, StepId)> {
        self.take_waiting()
    }

    /// The incarnation is durable: sequences begin at 1.
    fn incarnated(&mut self, state: &GroupState) {
        self.start = state.start_position();
        self.admission_open = true;
    }
}

impl Group {
    /// Hosts are served from now on.
    pub(super) fn present(&mut self, now: Monotonic) {
        if self.presented {
            return;
        }
        for slot in &mut self.volumes {
            slot.volume = Volume::new(slot.config, now);
        }
        // Steps are numbered anew: nothing of the volumes before may be taken for theirs.
        self.sealed.clear();
        self.presented = true;
        self.withdrawn_because.clear();
        if let Some(mirror) = &mut self.mirror {
            mirror.watch.volumes_replaced();
        }
        self.out.push(Effect::Present);
    }

    /// Hosts are no longer served: what has not begun is refused.
    pub(super) fn withdraw(&mut self, reason: String) {
        let now = self.now;
        self.withdrawn_because.clone_from(&reason);
        if !self.presented {
            return;
        }
        self.presented = false;
        for slot in &mut self.volumes {
            slot.volume.set_offline(now);
        }
        self.out.push(Effect::Withdraw { reason });
    }

    /// The partner answered and is of no higher epoch.
    pub(super) fn partner_heard(&mut self) {
        let now = self.now;
        if let Some(mirror) = &mut self.mirror {
            mirror.grace_until = None;
            // The RPO of a restarted primary is known from now on.
            mirror.watch.look_again();
        }
        self.present(now);
    }

    /// A restarted primary has waited long enough.
    pub(super) fn end_grace(&mut self) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        if mirror.grace_until.is_some_and(|until| now >= until) {
            mirror.grace_until = None;
            if matches!(mirror.machine, Machine::Primary(_)) {
                self.out.log(
                    Loudness::Warn,
                    "the partner was not heard within the grace time: the exports open; if it was promoted \
                     meanwhile, both sides accept writes now"
                        .to_owned(),
                );
                self.present(now);
            }
        }
    }

    /// A higher epoch was heard: stop serving at once, make it durable, then become the secondary.
    pub(super) fn fence(&mut self, change: StateChange) {
        let Some(mirror) = &mut self.mirror else { return };
        mirror.grace_until = None;
        mirror.planned.overtaken();
        if let Machine::Primary(primary) = &mirror.machine {
            mirror.orphans.remember(primary, &change, self.now, self.stamp);
        }
        mirror.changes.push_back(change);
        let opening = Machine::Changing(Box::new(Transition::Opening));
        match std::mem::replace(&mut mirror.machine, opening) {
            Machine::Primary(mut primary) => {
                primary.close(Link::Stopped, "fenced by a higher epoch", &mut self.out);
                let waiting = primary.abandon_waiting();
                let held = primary.sync.abandon();
                let mut copies = primary.copying.abandon();
                copies.extend(primary.verify.abandon("this side was fenced", self.stamp));
                // Their pages in flight are answered while the role changes.
                mirror.intents = primary.volumes.into_iter().map(|volume| volume.intent).collect();
                let stage = FenceStage::Persisting;
                mirror.machine = Machine::Changing(Box::new(Transition::Fencing { stage }));
                forget_primary(&mut self.out);
                self.fail_steps(waiting, copies);
                // The partner may have been promoted without them: no host may hear that they are safe.
                self.refuse_held(held, HostError::Shutdown);
                self.out.log(Loudness::Warn, "a higher epoch was heard: this side is fenced".to_owned());
                self.withdraw(
                    "this side is fenced: the partner was promoted; hosts must use the partner".to_owned(),
                );
            }
            other @ (Machine::Secondary(_) | Machine::Changing(_)) => mirror.machine = other,
        }
    }

    pub(super) fn fail_steps(
        &mut self,
        waiting: Vec<(VolumeIndex, StepId)>,
        copies: Vec<(VolumeIndex, StepId)>,
    ) {
        let now = self.now;
        for (volume, step) in waiting {
            self.sealed.remove(&(volume, step));
            if let Some(slot) = self.slot(volume) {
                slot.volume.admit_failed(now, step, HostError::Shutdown);
            }
        }
        for (volume, step) in copies {
            if let Some(slot) = self.slot(volume) {
                slot.volume.copy_done(now, step);
            }
        }
    }

    /// The group's state was written, or not.
    pub(super) fn state_persisted(&mut self, failure: Option<IoFailure>) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let Some(next) = mirror.changing.take() else {
            return;
        };
        if let Some(failure) = failure {
            mirror.retry_change_at = Some(now + PERSIST_PAUSE);
            self.out.log(
                Loudness::Error,
                format!("the mirror's state could not be stored: {failure}; trying again"),
            );
            return;
        }
        mirror.state = next;
        if let Some(change) = mirror.changes.pop_front() {
            self.look_at_rpo();
            self.changed(change);
        }
    }

    fn changed(&mut self, change: StateChange) {
        let (now, stamp) = (self.now, self.stamp);
        let Some(mirror) = &mut self.mirror else { return };
        // Whether there is an RPO, and what it is, may be another now.
        mirror.watch.look_again();
        match (change, &mut mirror.machine) {
            (StateChange::Incarnation, Machine::Primary(primary)) => {
                primary.incarnated(&mirror.state);
                self.admit_waiting(now);
            }
            (StateChange::NewIncarnation | StateChange::Settle(_), Machine::Primary(primary)) => {
                primary.reincarnate(&mirror.settings, now, &mut self.out);
                primary.incarnated(&mirror.state);
                self.admit_waiting(now);
            }
            (StateChange::Complete, Machine::Secondary(secondary)) => {
                secondary.compare.clear();
                secondary.orphaned = None;
                secondary.batch_counts(&mirror.settings, now, stamp, &mut self.out);
                mirror.intents.iter_mut().for_each(clear_all);
                self.withdrawn_because = secondary_reason(&mirror.state);
            }
            (StateChange::Adopt(_) | StateChange::Fence(_), Machine::Changing(change)) => {
                if let Transition::Fencing { stage } = &mut **change {
                    *stage = FenceStage::Draining;
                }
                self.withdrawn_because = secondary_reason(&mirror.state);
            }
            (StateChange::Adopt(_) | StateChange::Fence(_), Machine::Secondary(secondary)) => {
                if mirror.state.diverged && mirror.state.relinquished.is_some() {
                    secondary.compare = whole_volumes(&mirror.settings);
                }
                self.withdrawn_because = secondary_reason(&mirror.state);
            }
            (StateChange::Relinquish(_), Machine::Primary(_)) => self.relinquished(),
            (StateChange::Promote(_), Machine::Changing(change)) => {
                if let Transition::Promoting { stage, .. } = &mut **change {
                    *stage = PromoteStage::Emptying { asked: false };
                }
            }
            (StateChange::Stopped(true), Machine::Primary(primary)) => {
                primary.close(Link::Stopped, "an operator stopped the mirror", &mut self.out);
                let locks = primary.verify.abandon("an operator stopped the mirror", stamp);
                self.release_locks(&locks);
            }
            (StateChange::Stopped(false), Machine::Primary(primary)) => primary.redial(now),
            (StateChange::Approve, Machine::Primary(primary)) => {
                primary.approve(&mut self.out);
                primary.redial(now);
            }
            (
                StateChange::Incarnation
                | StateChange::NewIncarnation
                | StateChange::Complete
                | StateChange::Adopt(_)
                | StateChange::Fence(_)
                | StateChange::Promote(_)
                | StateChange::Settle(_)
                | StateChange::Relinquish(_)
                | StateChange::Stopped(_)
                | StateChange::Approve
                | StateChange::Lease(_),
                Machine::Primary(_) | Machine::Secondary(_) | Machine::Changing(_),
            ) => {}
        }
    }

    pub(super) fn admit_waiting(&mut self, now: Monotonic) {
        let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror else {
            return;
        };
        for (volume, step) in primary.poll_admitted(now, &mut self.out) {
            self.admitted(volume, step, now);
        }
    }

    /// Takes a role change as far as it can go.
    pub(super) fn transition_turn(&mut self) {
        let drained = self.volumes.iter().all(|slot| slot.volume.in_flight() == 0);
        let volumes = self.volumes.len();
        let Some(mirror) = &mut self.mirror else { return };
        let Machine::Changing(change) = &mut mirror.machine else {
            return;
        };
        match &mut **change {
            Transition::Fencing { stage }
                if *stage == FenceStage::Draining && drained && !mirror.planned.is_marking() =>
            {
                *stage = FenceStage::Flushing { outstanding: volumes };
                for index in 0..volumes {
                    let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
                    self.out.io(Purpose::Transition, IoRequest::HomeFlush { volume });
                }
            }
            Transition::Promoting { .. } => self.promotion_turn(),
            Transition::Fencing { .. } | Transition::Opening => {}
        }
    }

    /// Takes a promotion as far as it can go.
    fn promotion_turn(&mut self) {
        let (now, stamp) = (self.now, self.stamp);
        let Some(mirror) = &mut self.mirror else { return };
        let paused = mirror.retry_change_at.is_some_and(|at| now < at);
        let opening = Machine::Changing(Box::new(Transition::Opening));
        let mut machine = std::mem::replace(&mut mirror.machine, opening);
        if let Machine::Changing(change) = &mut machine
            && let Transition::Promoting { secondary, stage, target } = &mut **change
        {
            if *stage == PromoteStage::Quieting {
                if secondary.batch_completes(&mirror.state).is_some() {
                    secondary.batch_counts(&mirror.settings, now, stamp, &mut self.out);
                }
                if secondary.is_quiet() {
                    secondary.void_staged();
                    *stage = PromoteStage::Applying;
                }
            }
            if *stage == PromoteStage::Applying
                && target.is_reached(secondary, &mirror.settings, now, &mut self.out)
            {
                *stage = PromoteStage::Marking;
            }
            if *stage == PromoteStage::Marking && !paused && mirror.mark_discarded(target) {
                *stage = PromoteStage::Persisting;
                mirror.changes.push_back(StateChange::Promote(target.fork(secondary).position));
            }
            if *stage == (PromoteStage::Emptying { asked: false }) && !paused {
                *stage = PromoteStage::Emptying { asked: true };
                let page = secondary.checkpoint.next(target.fork(secondary), secondary.log.reset());
                let page = if target.discards(secondary) { page.discarding() } else { page };
                let request = IoRequest::CheckpointWrite { slot: page.slot(), page: page.encode() };
                secondary.next_checkpoint = Some(page);
                self.out.io(Purpose::Transition, request);
            }
        }
        mirror.machine = machine;
        self.write_stored_intents();
    }

    /// A request of a role change was answered.
    pub(super) fn transition_done(&mut self, failure: Option<IoFailure>) {
        let Some(mirror) = &mut self.mirror else { return };
        let Machine::Changing(change) = &mut mirror.machine else {
            return;
        };
        match &mut **change {
            Transition::Fencing { stage: FenceStage::Flushing { outstanding } } => {
                if let Some(failure) = failure {
                    // What is on the device is what will be compared; nothing of it is trusted.
                    self.out.log(Loudness::Error, format!("flushing a fenced volume: {failure}"));
                }
                *outstanding = outstanding.saturating_sub(1);
                if *outstanding == 0 {
                    mirror.become_secondary(&mut self.out);
                }
            }
            Transition::Promoting {
                secondary,
                stage: stage @ PromoteStage::Emptying { asked: true },
                ..
            } => {
                let next = secondary.next_checkpoint.take();
                if let (None, Some(next)) = (&failure, next) {
                    secondary.checkpoint = next;
                    self.promoted();
                } else {
                    self.out
                        .log(Loudness::Error, "the redo log could not be emptied; trying again".to_owned());
                    *stage = PromoteStage::Emptying { asked: false };
                    mirror.retry_change_at = Some(self.now + PERSIST_PAUSE);
                }
            }
            Transition::Fencing { .. } | Transition::Promoting { .. } | Transition::Opening => {}
        }
    }

    fn promoted(&mut self) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let opening = Machine::Changing(Box::new(Transition::Opening));
        let Machine::Changing(change) = std::mem::replace(&mut mirror.machine, opening) else {
            return;
        };
        let Transition::Promoting { secondary, target, .. } = *change else {
            return;
        };
        let intents = std::mem::take(&mut mirror.intents);
        self.out.forget(|purpose| matches!(purpose, Purpose::ImageRead { .. } | Purpose::DrillWrite { .. }));
        let (clean, rewound) = target.into_discarded();
        let mut primary = Primary::new(&mirror.settings, &mirror.state, intents, Some(clean), now);
        primary.rewound = rewound;
        primary.admission_open = true;
        primary.volumes.iter_mut().for_each(|volume| volume.own = Some(DirtyMap::default()));
        let Secondary { log, checkpoint, .. } = *secondary;
        mirror.redo = Some((log, checkpoint));
        mirror.machine = Machine::Primary(Box::new(primary));
        self.out.log(
            Loudness::Info,
            format!(
                "this side was promoted: it is the primary of epoch {} from position {} on",
                mirror.state.epoch.0,
                mirror.state.fork()
            ),
        );
        self.present(now);
    }

    /// Pages of intent maps that no primary uses are written here.
    pub(super) fn write_stored_intents(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        for (index, intent) in mirror.intents.iter_mut().enumerate() {
            let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            while let Some(write) = intent.poll_write() {
                self.out.io(
                    Purpose::Intent { volume, page: write.page, generation: write.generation },
                    IoRequest::IntentWrite { volume, offset: write.file_offset, page: write.bytes },
                );
            }
        }
    }

    /// `mirror stop`: nothing more is sent; changes are remembered.
    ///
    /// # Errors
    /// If this side is not the primary.
    pub fn stop(&mut self) -> Result<(), VerbRefused> {
        let mirror = self.mirror_in_role("stop")?;
        if mirror.planned.is_running() {
            return Err(VerbRefused("a switch is under way: look at 'farshore mirror show'".to_owned()));
        }
        if !mirror.state.stopped {
            mirror.changes.push_back(StateChange::Stopped(true));
        }
        Ok(())
    }

    /// An operator chose this side in a fork. Its epoch rises, so that the partner hears of it, fences itself and keeps
    /// what it wrote until another `start`; what either side wrote since the fork is compared.
    fn settle_fork(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        if let Machine::Primary(primary) = &mut mirror.machine {
            // Nothing is said to the partner and no sequence taken before the new epoch is durable.
            primary.close(Link::Stopped, "the fork is being settled", &mut self.out);
            primary.admission_open = false;
            mirror.changes.push_back(StateChange::Settle(primary.position()));
            let text = "an operator chose this side in the fork: it begins the next epoch".to_owned();
            self.out.log(Loudness::Warn, text);
        }
    }

    /// `mirror start`: mirroring goes on; what waits for an operator is allowed. With `local`, a restarted primary
    /// opens its exports without waiting for its partner, and a fork is settled in favour of this side.
    ///
    /// # Errors
    /// If this side is not the primary, or a fork is to be settled and no side was chosen.
    pub fn start(&mut self, local: bool) -> Result<(), VerbRefused> {
        let now = self.now;
        let mirror = self.mirror_in_role("start")?;
        let Machine::Primary(primary) = &mirror.machine else {
            return Ok(());
        };
        let halted = match &primary.link {
            Link::Halted { start: HaltedStart::Settles, reason } if !local => {
                return Err(VerbRefused(reason.clone()));
            }
            Link::Halted { start, .. } => Some(*start),
            Link::Down { .. }
            | Link::Dialing { .. }
            | Link::Greeting { .. }
            | Link::Up { .. }
            | Link::Stopped => None,
        };
        if halted == Some(HaltedStart::Settles) {
            self.settle_fork();
        } else if primary.gate != Gate::Open || halted == Some(HaltedStart::Overwrites) {
            mirror.changes.push_back(StateChange::Approve);
        } else if mirror.state.stopped || halted.is_some() {
            mirror.changes.push_back(StateChange::Stopped(false));
        }
        if local && !self.presented {
            self.out.log(
                Loudness::Warn,
                "an operator opened the exports without the partner's answer".to_owned(),
            );
            if let Some(mirror) = &mut self.mirror {
                mirror.grace_until = None;
            }
            self.present(now);
        }
        Ok(())
    }

    pub(super) fn mirror_in_role(&mut self, verb: &str) -> Result<&mut Mirror, VerbRefused> {
        let Some(mirror) = &mut self.mirror else {
            return Err(VerbRefused("the volume has no mirror".to_owned()));
        };
        match &mirror.machine {
            Machine::Primary(_) => Ok(mirror),
            Machine::Secondary(_) => Err(VerbRefused(format!(
                "this side is the secondary: run 'farshore mirror {verb}' at the primary, or 'farshore mirror failover' here"
            ))),
            Machine::Changing(_) => Err(VerbRefused(
                "the mirror is changing its role: wait a moment and look at 'farshore mirror show'"
                    .to_owned(),
            )),
        }
    }

    /// What a forced failover would lose, as this side knows it; with `at`, one to that point of the retention window.
    ///
    /// # Errors
    /// If this side is no secondary with a consistent image, or the point lies outside the window.
    pub fn loss(&self, at: Option<RewindTo>) -> Result<LossReport, VerbRefused> {
        self.promotion_target(at).map(|(_, report)| report)
    }

    fn promotion_target(&self, at: Option<RewindTo>) -> Result<(Target, LossReport), VerbRefused> {
        let Some(mirror) = &self.mirror else {
            return Err(VerbRefused("the volume has no mirror".to_owned()));
        };
        let secondary = match &mirror.machine {
            Machine::Secondary(secondary) => secondary,
            Machine::Primary(_) => {
                return Err(VerbRefused("this side is the primary already: nothing to fail over".to_owned()));
            }
            Machine::Changing(_) => {
                return Err(VerbRefused("the mirror is changing its role already".to_owned()));
            }
        };
        if !mirror.state.consistent {
            return Err(VerbRefused(
                "this side never had a complete image: failover would serve a mix; let the initial copy end first".to_owned(),
            ));
        }
        if mirror.state.diverged {
            return Err(VerbRefused(format!(
                "this side is fenced since epoch {}: the partner is the primary; run 'farshore mirror start' there to bring this side up to date first",
                mirror.state.epoch.0
            )));
        }
        let (target, report) = Target::choose(secondary, at, self.stamp)?;
        // Whatever hosts were told of is here: no primary told them of anything else while the lease is valid.
        let zero = at.is_none() && secondary.lease.remaining(self.now).is_some();
        Ok((target, if zero { report.without_loss() } else { report }))
    }

    /// `mirror failover`: this side becomes the primary of a new epoch; with `at`, from that point on.
    ///
    /// # Errors
    /// As [`Group::loss`].
    pub fn failover(&mut self, at: Option<RewindTo>) -> Result<LossReport, VerbRefused> {
        let (target, report) = self.promotion_target(at)?;
        let Some(mirror) = &mut self.mirror else {
            return Ok(report);
        };
        if mirror.is_changing() {
            return Err(VerbRefused("the mirror is changing its role already".to_owned()));
        }
        if let Some(reason) = mirror.cannot_take_back() {
            return Err(VerbRefused(reason));
        }
        self.begin_promotion(target, "this side is being promoted");
        Ok(report)
    }

    /// A secondary begins to become the primary.
    pub(super) fn begin_promotion(&mut self, target: Target, reason: &str) {
        let Some(mirror) = &mut self.mirror else { return };
        let opening = Machine::Changing(Box::new(Transition::Opening));
        match std::mem::replace(&mut mirror.machine, opening) {
            Machine::Secondary(mut secondary) => {
                secondary.halt(reason, &mut self.out);
                target.hold(&mut secondary);
                let stage = PromoteStage::Quieting;
                mirror.machine =
                    Machine::Changing(Box::new(Transition::Promoting { secondary, stage, target }));
            }
            other @ (Machine::Primary(_) | Machine::Changing(_)) => mirror.machine = other,
        }
    }

    /// Stops serving hosts for a clean stop of the daemon; `stopped_cleanly` says when nothing is in flight.
    pub fn drain(&mut self) {
        self.give_up_switch("farshored is stopping", true);
        self.withdraw("farshored is stopping".to_owned());
        if let Some(mirror) = &mut self.mirror {
            mirror.planned.end_offer("farshored is stopping", &mut self.out);
        }
        match self.mirror.as_mut().map(|mirror| &mut mirror.machine) {
            Some(Machine::Primary(primary)) => {
                primary.close(Link::Stopped, "the primary is stopping", &mut self.out);
                primary.sync.stop();
                primary.keep_journal();
            }
            Some(Machine::Secondary(secondary)) => secondary.halt("the secondary is stopping", &mut self.out),
            Some(Machine::Changing(_)) | None => {}
        }
    }

    /// True if no host command and no copy is in flight, and a stopping primary has put its journal away.
    pub fn is_drained(&self) -> bool {
        !self.is_keeping() && self.volumes.iter().all(|slot| slot.volume.in_flight() == 0)
    }

    /// What the next start needs to know of a drained primary; `None` if it must compare instead.
    pub fn clean_state(&mut self) -> Option<CleanState> {
        if !self.is_drained() || self.volumes.iter().any(|slot| slot.volume.is_poisoned()) {
            return None;
        }
        match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), .. }) => primary.clean_state(),
            Some(_) | None => None,
        }
    }
}

impl Mirror {
    /// A page of an intent map could not be written: a promotion that needs it waits a moment.
    pub(super) fn retry_marking_later(&mut self, now: Monotonic, out: &mut Outbox) {
        let marking = matches!(&self.machine, Machine::Changing(change)
            if matches!(**change, Transition::Promoting { stage: PromoteStage::Marking, .. }));
        if marking {
            self.retry_change_at = Some(now + PERSIST_PAUSE);
            out.log(Loudness::Error, "an intent map could not be written; trying again".to_owned());
        }
    }

    pub(super) fn become_secondary(&mut self, out: &mut Outbox) {
        let Some((log, checkpoint)) = self.redo.take() else {
            return;
        };
        let (log, checkpoint): (RedoLog, Checkpoint) = (log, checkpoint);
        let empty = RecoveredCuts {
            durable: checkpoint.applied,
            staged: None,
            staged_cuts: Vec::new(),
            committed_cuts: Vec::new(),
            committed_cuts_newest: None,
            completes: false,
        };
        let room = super::growth::Room::of(&self.settings);
        let mut secondary = Secondary::new(log, checkpoint, empty, room);
        secondary.compare = compare_ranges(&self.intents, &self.settings);
        self.machine = Machine::Secondary(Box::new(secondary));
        assert_eq!(self.state.role, Role::Secondary, "the fence is durable");
        out.log(Loudness::Info, format!("this side is the secondary of epoch {}", self.state.epoch.0));
    }
}

/// What only a primary asked for is not wanted any more.
pub(super) fn forget_primary(out: &mut Outbox) {
    out.forget(|purpose| match purpose {
        Purpose::CopyRead { .. }
        | Purpose::CompareRead { .. }
        | Purpose::VerifyRead { .. }
        | Purpose::ClearFlush { .. }
        | Purpose::OrphanRead { .. }
        | Purpose::SpillWrite { .. }
        | Purpose::SpillRead { .. }
        | Purpose::SpillSync
        | Purpose::SwitchFlush { .. } => true,
        Purpose::Intent { .. }
        | Purpose::ImageRead { .. }
        | Purpose::DrillWrite { .. }
        | Purpose::InitialApply
        | Purpose::InitialFlush
        | Purpose::Apply
        | Purpose::ApplyFlush
        | Purpose::ApplyRead { .. }
        | Purpose::RedoWrite
        | Purpose::RedoSync
        | Purpose::Checkpoint
        | Purpose::PersistState
        | Purpose::Transition
        | Purpose::Grow { .. }
        | Purpose::Show { .. }
        | Purpose::OrphanHome { .. }
        | Purpose::SwitchMark => false,
    });
}

fn clear_all(intent: &mut IntentMap) {
    let regions: Vec<u64> = intent.set_regions().collect();
    regions.into_iter().for_each(|region| intent.clear_region(region));
}
