//! Synchronous mirroring at the primary: a host's write is answered when the target has received it too.
//!
//! Guarantees (docs/protocols/replication.md, "Synchronous mirroring"): while the target may hold a lease no write is
//! answered that it has not received; a lease is given only when everything answered before was received, and after the
//! durable state says so; under the policy `degrade` no answer waits longer than [`LEASE_PATIENCE`], [`LEASE`] and
//! [`LEASE_MARGIN`] together for the partner's sake.

use std::collections::BTreeMap;
use std::time::Duration;

use block::{HostError, Monotonic, Sequence, VolumeIndex};
use control::{LinkFailure, MirrorMode};
use engine::StepId;
use protocol::{GroupState, LEASE, LEASE_MARGIN, LEASE_PATIENCE, LeaseGiver, Message};

use super::effect::{Effect, Loudness, Outbox, SessionId};
use super::primary::{Gate, Link, Primary};
use super::roles::StateChange;
use super::{Group, Machine, MirrorPolicy, MirrorSettings};

/// Answers wait no longer than this for the target to catch up before synchronous mirroring is in force.
const JOIN_MAX: Duration = Duration::from_secs(2);
/// The next attempt comes so much later.
const JOIN_PAUSE: Duration = Duration::from_secs(5);
/// It is not tried while more than this part of the ring waits for the target.
const JOIN_RING_PART: u64 = 4;

/// How it stands between the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Writes are answered when they are home. Nothing is tried before the given time.
    Apart { next_try: Option<Monotonic> },
    /// Answers wait; what was answered before, up to a sequence, is not all received.
    Joining { through: Sequence, give_up: Monotonic },
    /// It is being stored that leases are given.
    Storing { give_up: Monotonic },
    /// In force.
    Together { since: Monotonic },
    /// There is no session, and answers wait: until the last lease has run out, then for as long as the policy says.
    Parting { until: Option<Monotonic> },
}

/// A home write that has ended well and is not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    volume: VolumeIndex,
    step: StepId,
    trimmed: bool,
    since: Monotonic,
}

/// Whether synchronous mirroring is in force, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncSnapshot {
    /// At the primary: writes are answered when the partner has them. At the secondary: a failover now loses nothing.
    pub in_force: bool,
    /// What it waits for, or how long the lease is valid.
    pub text: String,
}

/// The primary's part.
#[derive(Debug)]
pub(super) struct Sync {
    standing: Standing,
    giver: LeaseGiver,
    /// Writes of this incarnation, by sequence.
    held: BTreeMap<Sequence, Held>,
    /// Writes of an incarnation that has ended: no cut tells of them.
    stranded: Vec<Held>,
    /// Why writes that wait are not answered with success, if they are not.
    refusing: Option<HostError>,
    refuse_at: Option<Monotonic>,
    /// A write waits for its sequence because the ring is crowded.
    paused: bool,
}

impl Default for Sync {
    fn default() -> Self {
        Self {
            standing: Standing::Apart { next_try: None },
            giver: LeaseGiver::default(),
            held: BTreeMap::new(),
            stranded: Vec::new(),
            refusing: None,
            refuse_at: None,
            paused: false,
        }
    }
}

impl Sync {
    /// A primary that begins; `leased` says that its partner may hold a lease of an earlier time.
    pub(super) fn new(leased: bool, now: Monotonic) -> Self {
        if !leased {
            return Self::default();
        }
        let giver = LeaseGiver::after_restart(now);
        Self { standing: Standing::Parting { until: giver.held_until() }, giver, ..Self::default() }
    }

    /// No write is answered before the target has received it.
    pub(super) const fn holds(&self) -> bool {
        match self.standing {
            Standing::Apart { .. } => false,
            Standing::Joining { .. }
            | Standing::Storing { .. }
            | Standing::Together { .. }
            | Standing::Parting { .. } => true,
        }
    }

    /// Writes are refused.
    pub(super) const fn refuses(&self) -> bool {
        self.refusing.is_some()
    }

    /// A write waits for room in the ring.
    pub(super) const fn pause(&mut self) {
        self.paused = true;
    }

    /// The target answered a hello: before that it dropped its lease.
    pub(super) const fn welcomed(&mut self) {
        self.giver.returned();
    }

    /// The sequences of the incarnation have ended.
    pub(super) fn strand(&mut self) {
        self.stranded.extend(std::mem::take(&mut self.held).into_values());
    }

    /// The process stops: what waits ends with `Shutdown`, and what comes.
    pub(super) const fn stop(&mut self) {
        if self.holds() {
            self.refusing = Some(HostError::Shutdown);
        }
    }

    /// Everything that waits, for whoever ends it.
    pub(super) fn abandon(&mut self) -> Vec<Held> {
        self.strand();
        std::mem::take(&mut self.stranded)
    }

    /// Until when the target is waited for without a word of it.
    fn deadline(&self, since: Monotonic) -> Monotonic {
        self.giver.held_until().unwrap_or(since + LEASE + LEASE_MARGIN)
    }

    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        match self.standing {
            Standing::Apart { next_try } => next_try,
            Standing::Joining { give_up, .. } | Standing::Storing { give_up } => Some(give_up),
            Standing::Together { since } => Some(self.deadline(since)),
            Standing::Parting { until } => until.or(self.refuse_at),
        }
    }

    fn come_apart(&mut self, next_try: Option<Monotonic>) {
        self.standing = Standing::Apart { next_try };
        self.giver.returned();
        self.serve();
    }

    fn part(&mut self, now: Monotonic) {
        self.standing = Standing::Parting { until: Some(self.giver.held_until().unwrap_or(now)) };
    }

    /// Nothing is refused for the policy's sake any more.
    fn serve(&mut self) {
        self.refuse_at = None;
        self.refusing = self.refusing.filter(|error| *error == HostError::Shutdown);
    }

    fn snapshot(&self, mode: MirrorMode) -> Option<SyncSnapshot> {
        let (in_force, text) = match self.standing {
            Standing::Apart { .. } if mode == MirrorMode::Async => return None,
            Standing::Apart { .. } => (false, "not in force: the partner does not follow write by write"),
            Standing::Joining { .. } | Standing::Storing { .. } => (false, "not yet in force: it begins"),
            Standing::Together { .. } => (true, "in force"),
            Standing::Parting { .. } if self.refuses() => (
                false,
                "hosts' writes are refused: the partner is away and the policy on link failure is stop",
            ),
            Standing::Parting { .. } => (false, "hosts' writes wait for the partner, which is away"),
        };
        Some(SyncSnapshot { in_force, text: text.to_owned() })
    }
}

impl Primary {
    /// Everything up to here is in the target's redo log, on stable media.
    fn received_through(&self) -> Sequence {
        let committed = self.chain.as_ref().map(|chain| chain.committed().position);
        let ours = committed.filter(|position| position.same_lineage(&self.start));
        ours.map_or(Sequence(0), |position| position.sequence)
    }

    /// The target has, or is being sent, every write in order, and nothing else is to be done.
    fn follows(&self) -> bool {
        let here = self.chain.as_ref().is_some_and(|chain| chain.last().position.same_lineage(&self.start));
        self.session().is_some()
            && self.gate == Gate::Open
            && here
            && self.pass.is_none()
            && self.folded_from.is_none()
            && !self.spill.is_pending()
            && !self.has_dirty()
            && self.compare.is_done()
            && self.copying.is_idle()
            && self.volumes.iter().all(|volume| volume.bad.is_empty() && !volume.poisoned)
    }

    /// A home write has ended well. True if its answer must wait.
    pub(super) fn waits_for_target(
        &mut self,
        volume: VolumeIndex,
        step: StepId,
        trimmed: bool,
        now: Monotonic,
    ) -> bool {
        if !self.sync.holds() {
            return false;
        }
        let held = Held { volume, step, trimmed, since: now };
        match self.sequence_of(volume, step) {
            Some(sequence) if sequence <= self.received_through() => return false,
            Some(sequence) => {
                self.sync.held.insert(sequence, held);
            }
            None => self.sync.stranded.push(held),
        }
        true
    }

    /// Takes synchronous mirroring as far as it can go. Gives what is to be stored of leases, if something is;
    /// `storing` says that something is being stored already.
    fn sync_step(
        &mut self,
        settings: &MirrorSettings,
        state: &GroupState,
        storing: bool,
        now: Monotonic,
        out: &mut Outbox,
    ) -> Option<bool> {
        let policy = settings.policy;
        let wanted = policy.mode == MirrorMode::Sync && state.consistent && !state.stopped;
        let leased = state.leased && !storing;
        match self.sync.standing {
            Standing::Apart { .. } if !wanted => {
                return (leased && policy.mode == MirrorMode::Async).then_some(false);
            }
            Standing::Apart { next_try } => self.step_apart(next_try, &policy, now),
            Standing::Joining { .. } | Standing::Storing { .. }
                if !wanted || !self.follows() || !self.sync.stranded.is_empty() =>
            {
                self.sync.come_apart(None);
            }
            Standing::Joining { give_up, .. } | Standing::Storing { give_up } if now >= give_up => {
                self.sync.come_apart(Some(now + JOIN_PAUSE));
            }
            Standing::Joining { through, give_up } => {
                if self.received_through() >= through && leased {
                    self.come_together(now, out);
                } else if self.received_through() >= through && !storing {
                    self.sync.standing = Standing::Storing { give_up };
                    return Some(true);
                }
            }
            Standing::Storing { .. } if leased => self.come_together(now, out),
            Standing::Storing { .. } => {}
            Standing::Together { since } => self.step_together(since, wanted, now, out),
            Standing::Parting { until } => self.step_parting(until, wanted, &policy, now, out),
        }
        None
    }

    fn step_apart(&mut self, next_try: Option<Monotonic>, policy: &MirrorPolicy, now: Monotonic) {
        let next_try = next_try.filter(|at| now < *at);
        self.sync.standing = Standing::Apart { next_try };
        if self.session().is_none() {
            if policy.on_link_failure == LinkFailure::Stop && self.link != Link::Stopped {
                self.sync.part(now);
            }
            return;
        }
        let small = self.ring.bytes() <= self.ring.budget().bytes_max / JOIN_RING_PART;
        if next_try.is_none() && small && self.admission_open && self.follows() {
            self.sync.standing = Standing::Joining { through: self.last, give_up: now + JOIN_MAX };
        }
    }

    fn come_together(&mut self, now: Monotonic, out: &mut Outbox) {
        let Some(session) = self.session() else { return };
        assert!(self.sync.stranded.is_empty(), "what no cut tells of cannot be received");
        self.sync.standing = Standing::Together { since: now };
        self.sync.serve();
        out.push(Effect::Send { session, frame: Message::LeaseOffer.encode() });
        out.log(Loudness::Info, "synchronous mirroring is in force".to_owned());
    }

    fn step_together(&mut self, since: Monotonic, wanted: bool, now: Monotonic, out: &mut Outbox) {
        let overdue = now >= self.sync.deadline(since);
        if self.session().is_none() {
            return self.sync.part(now);
        }
        if wanted && !overdue && self.follows() {
            return;
        }
        if self.sync.giver.held_until().is_none() && !overdue {
            out.log(Loudness::Info, "synchronous mirroring is left".to_owned());
            return self.sync.come_apart(None);
        }
        let reason = if overdue {
            "the partner does not receive what it is sent"
        } else {
            "synchronous mirroring is left: the partner is asked to give its lease back"
        };
        self.close(Link::Down { retry_at: now, attempt: 0 }, reason, out);
        self.sync.part(now);
    }

    fn step_parting(
        &mut self,
        until: Option<Monotonic>,
        wanted: bool,
        policy: &MirrorPolicy,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        if self.session().is_some() {
            if wanted && self.follows() && self.sync.stranded.is_empty() {
                self.sync.serve();
                self.sync.standing = Standing::Joining { through: self.last, give_up: now + JOIN_MAX };
                return;
            }
            out.log(Loudness::Info, "synchronous mirroring is left: it returns by itself".to_owned());
            return self.sync.come_apart(None);
        }
        if until.is_some_and(|until| now < until) {
            return;
        }
        self.sync.standing = Standing::Parting { until: None };
        self.sync.giver.returned();
        if !wanted {
            return self.sync.come_apart(None);
        }
        if policy.on_link_failure == LinkFailure::Degrade {
            let text = "the partner is away: mirroring is asynchronous until it is back";
            out.log(Loudness::Warn, text.to_owned());
            return self.sync.come_apart(None);
        }
        if self.sync.refuses() {
            return;
        }
        let refuse_at = *self.sync.refuse_at.get_or_insert(now + policy.hold);
        if now >= refuse_at {
            self.sync.refusing = Some(HostError::Io);
            self.sync.refuse_at = None;
            let text = "the partner is away: by the policy 'stop' on link failure hosts' writes are refused until it is \
                        back; 'farshore mirror set NAME --on-link-failure degrade' lets them go on without it";
            out.log(Loudness::Error, text.to_owned());
        }
    }

    /// The target asks for a lease.
    pub(super) fn lease_asked(
        &mut self,
        session: SessionId,
        asked: Monotonic,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        let in_force = matches!(self.sync.standing, Standing::Together { .. });
        let oldest = self.sync.held.values().map(|held| held.since).min();
        let stuck = oldest.is_some_and(|since| now.since(since) > LEASE_PATIENCE);
        if in_force && !stuck && self.follows() && self.session() == Some(session) {
            self.sync.giver.gave(now);
            out.push(Effect::Send { session, frame: Message::LeaseGrant { asked }.encode() });
        }
    }

    /// The writes that may be answered now, and those that are refused.
    fn sync_answers(&mut self, now: Monotonic) -> (Vec<Held>, Vec<Held>) {
        if !self.sync.holds() {
            for sequence in self.sync.held.keys() {
                self.rpo.acknowledged(*sequence, now);
            }
            return (self.sync.abandon(), Vec::new());
        }
        if self.sync.held.is_empty() && self.sync.stranded.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let later = self.sync.held.split_off(&self.received_through().next());
        let received = std::mem::replace(&mut self.sync.held, later);
        let refused = if self.sync.refuses() { self.sync.abandon() } else { Vec::new() };
        (received.into_values().collect(), refused)
    }
}

impl Group {
    /// One turn of synchronous mirroring.
    pub(super) fn sync_turn(&mut self) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let Machine::Primary(primary) = &mut mirror.machine else { return };
        let storing = mirror.changes.iter().any(|change| matches!(change, StateChange::Lease(_)));
        let stored = primary.sync_step(&mirror.settings, &mirror.state, storing, now, &mut self.out);
        if let Some(leased) = stored {
            mirror.changes.push_back(StateChange::Lease(leased));
        }
        let (answered, refused) = primary.sync_answers(now);
        let paused = std::mem::take(&mut primary.sync.paused);
        let error = primary.sync.refusing;
        let waiting = if error.is_some() { primary.take_waiting() } else { Vec::new() };
        for held in answered {
            self.answer_written(held.volume, held.step, Ok(()), held.trimmed);
        }
        let error = error.unwrap_or(HostError::Shutdown);
        self.refuse_held(refused, error);
        for (volume, step) in waiting {
            self.sealed.remove(&(volume, step));
            if let Some(slot) = self.slot(volume) {
                slot.volume.admit_failed(now, step, error);
            }
        }
        if paused {
            self.admit_waiting(now);
        }
    }

    /// Ends writes that are home, but may not be answered with success.
    pub(super) fn refuse_held(&mut self, held: Vec<Held>, error: HostError) {
        let now = self.now;
        for write in held {
            if let Some(slot) = self.slot(write.volume) {
                slot.volume.refuse_written(now, write.step, error);
            }
        }
    }

    /// Answers writes that are home and wait for nobody any more.
    pub(super) fn answer_held(&mut self, held: Vec<Held>) {
        for write in held {
            self.answer_written(write.volume, write.step, Ok(()), write.trimmed);
        }
    }

    /// Whether synchronous mirroring is in force; `None` if it is not wanted.
    pub(super) fn sync_snapshot(&self) -> Option<SyncSnapshot> {
        let mirror = self.mirror.as_ref()?;
        match &mirror.machine {
            Machine::Primary(primary) => primary.sync.snapshot(mirror.settings.policy.mode),
            Machine::Secondary(_) => self.lease_remaining().map(|remaining| SyncSnapshot {
                in_force: true,
                text: format!("a failover now loses nothing (for {:.1} s more)", remaining.as_secs_f64()),
            }),
            Machine::Changing(_) => None,
        }
    }

    /// How long this side, a secondary, may still say that a failover loses nothing; `None` if it may not.
    pub fn lease_remaining(&self) -> Option<Duration> {
        match self.mirror.as_ref().map(|mirror| &mirror.machine) {
            Some(Machine::Secondary(secondary)) => secondary.lease.remaining(self.now),
            Some(Machine::Primary(_) | Machine::Changing(_)) | None => None,
        }
    }
}

#[cfg(test)]
mod tests;
