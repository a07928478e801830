//! A group: the volumes of one consistency group, or a lone volume, with its mirror; sans-IO.
//!
//! The shard drives it with `handle`-style calls (`submit`, `written`, `io_done`, `message`, ...) and takes effects
//! from [`Group::poll_effect`] until `None`, then the next deadline from [`Group::poll_timeout`]. The simulator drives
//! the very same machine on virtual disks, network and clock. Payloads here are ciphertext; there is no key.
//!
//! Roles and their rules: docs/protocols/replication.md.

mod apply;
mod drill;
mod effect;
mod growth;
mod image;
mod kept;
mod link;
mod orphans;
mod overload;
mod primary;
mod rate;
mod resync;
mod rewind;
mod roles;
mod secondary;
mod spill;
mod switch;
mod verify;
mod view;
mod window;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use block::{
    ByteCount, ByteRange, HostCommand, HostError, HostResult, IopsLimit, MirrorId, Monotonic, Position,
    SiteId, Tip, VolumeId, VolumeIndex, WallTime,
};
use bytes::Bytes;
use engine::dirty_map::DirtyMap;
use engine::intent_map::IntentMap;
use engine::overlay::CutNumber;
use engine::volume::{Content, Volume, VolumeConfig};
use engine::{CommandId, StepId};
use journal::{Checkpoint, Recovered, RedoLog, RingBudget};
use protocol::{GroupState, Hello, HelloVerdict, Message, Refusal, RefusalCode, Refuse};

pub use control::{Overload, Side};
pub use drill::{DrillBegun, DrillIo, DrillSnapshot};
pub use effect::{Effect, IoFailure, IoId, IoRequest, Loudness, SessionId};
pub use kept::KeptJournal;
pub use orphans::{OrphanExtent, OrphanProgress};
pub use overload::{LOWERED_MAX, MirrorPolicy, Pressure, Writes};
pub use switch::SwitchProgress;
pub use verify::{VerifyProgress, VerifyReport};
pub use view::{LossReport, MirrorSnapshot, VolumeSnapshot};
pub use window::{Point, Retention, RewindTo, WindowSnapshot};

use apply::ApplyItem;
use effect::{Outbox, Purpose};
use link::LinkNews;
use orphans::Orphans;
use overload::Watch;
use primary::Primary;
use roles::{StateChange, Transition};
use secondary::{Secondary, TargetNews};
use switch::PlannedSwitch;

/// One volume of a group.
#[derive(Clone, Debug)]
pub struct GroupVolume {
    /// Its identity.
    pub id: VolumeId,
    /// Its size.
    pub size: ByteCount,
    /// Its limit over all connections.
    pub limit: IopsLimit,
}

/// What a mirror is made of; the same on both sides but for the limits.
#[derive(Clone, Debug)]
pub struct MirrorSettings {
    /// Which mirror.
    pub mirror: MirrorId,
    /// This site.
    pub site: SiteId,
    /// In index order.
    pub volumes: Vec<GroupVolume>,
    /// Bounds of the primary's RAM ring.
    pub ring: RingBudget,
    /// Bytes of the spill file, whole pages; 0 if there is none.
    pub spill_bytes: u64,
    /// A cut is closed when so much payload waits,
    pub cut_bytes: u64,
    /// or when its first record is so old.
    pub cut_interval: Duration,
    /// Bytes of one intent region.
    pub region_bytes: u64,
    /// Above so many set regions a volume's coldest intent bits clear.
    pub intent_budget_regions: u64,
    /// A restarted primary opens its exports without having heard its partner after so long.
    pub start_grace: Duration,
    /// How long a target keeps committed cuts out of its volumes.
    pub retention: Retention,
    /// What an operator may change.
    pub policy: MirrorPolicy,
}

/// What a clean stop left behind.
#[derive(Clone, Debug, Default)]
pub struct CleanState {
    /// Blocks that the target may lack, one map a volume.
    pub dirty: Vec<DirtyMap>,
    /// The target's committed tip as last acknowledged.
    pub committed: Option<Position>,
    /// The records that are in order still; without it they are in the dirty maps.
    pub journal: Option<KeptJournal>,
}

/// Cuts that a restart found in the redo log.
#[derive(Debug)]
struct RecoveredCuts {
    durable: Tip,
    staged: Option<(u64, Tip)>,
    staged_cuts: Vec<ApplyItem>,
    committed_cuts: Vec<ApplyItem>,
    committed_cuts_newest: Option<Point>,
    /// The last one is a commit that no initial copy makes: the image is whole.
    completes: bool,
}

impl RecoveredCuts {
    fn new(recovered: &Recovered) -> Self {
        let points = window::recovered_points(&recovered.cuts);
        let items =
            (1_u64..).zip(recovered.cuts.iter().zip(&points)).map(|(number, (cut, point))| ApplyItem {
                number: CutNumber(number),
                placement: cut.placement.clone(),
                tip: cut.tip,
                records: None,
                done: cut.header_only,
                changes: cut.changes.clone(),
                sizes: cut.sizes.clone(),
                point: *point,
                due: Monotonic(0),
            });
        let mut items: Vec<ApplyItem> = items.collect();
        let committed = recovered.cuts.iter().rposition(|cut| cut.meta.commit).map_or(0, |index| index + 1);
        let staged_cuts = items.split_off(committed);
        let committed = recovered.cuts.get(..committed).unwrap_or_default();
        let echo = committed.iter().map(|cut| cut.meta.echo).max().unwrap_or_default();
        let last = committed.last().map(|last| last.tip);
        Self {
            durable: recovered.durable_tip,
            staged: recovered.staged_tip,
            staged_cuts,
            completes: committed.last().is_some_and(|cut| !cut.meta.initial),
            committed_cuts_newest: last.map(|tip| {
                let seen = points.iter().flatten().find(|point| point.tip == tip).map(|point| point.seen);
                Point { tip, echo, seen: seen.unwrap_or_default() }
            }),
            committed_cuts: items,
        }
    }
}

/// The durable things of a mirror, as read at its start.
pub struct OpenedMirror {
    /// The intent maps, one a volume.
    pub intents: Vec<IntentMap>,
    /// Present after a clean stop of a primary; its file must be gone, durably, before the first host write.
    pub clean: Option<CleanState>,
    /// The redo log; every segment file was synced before it was scanned. A primary's holds no cut: what
    /// [`Recovered::void`] gives was written durably.
    pub redo: Recovered,
    /// The checkpoint that the scan began from.
    pub checkpoint: Checkpoint,
}

/// Why a verb was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct VerbRefused(pub String);

enum Machine {
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
    Changing(Box<Transition>),
}

struct Mirror {
    settings: MirrorSettings,
    /// As it is on stable media.
    state: GroupState,
    machine: Machine,
    /// The intent maps and the redo log while the role does not use them.
    intents: Vec<IntentMap>,
    redo: Option<(RedoLog, Checkpoint)>,
    changes: VecDeque<StateChange>,
    changing: Option<GroupState>,
    retry_change_at: Option<Monotonic>,
    /// A restarted primary waits for its partner until then.
    grace_until: Option<Monotonic>,
    planned: PlannedSwitch,
    watch: Watch,
    orphans: Orphans,
}

struct VolumeSlot {
    volume: Volume,
    config: VolumeConfig,
}

/// The machine.
pub struct Group {
    volumes: Vec<VolumeSlot>,
    mirror: Option<Mirror>,
    /// Hosts are served.
    presented: bool,
    withdrawn_because: String,
    sealed: BTreeMap<(VolumeIndex, StepId), Bytes>,
    out: Outbox,
    now: Monotonic,
    wall: WallTime,
    /// The wall clock as long as this process runs, but never slower than the monotonic one: ages are told by it.
    stamp: WallTime,
}

impl Group {
    /// A lone volume, or several, without a mirror: hosts are served at once.
    pub fn alone(volumes: &[GroupVolume], now: Monotonic) -> Self {
        let slot = |volume: &GroupVolume| {
            let config = VolumeConfig { size: volume.size, limit: volume.limit, mirrored: false };
            VolumeSlot { volume: Volume::new(config, now), config }
        };
        Self {
            volumes: volumes.iter().map(slot).collect(),
            mirror: None,
            presented: true,
            withdrawn_because: String::new(),
            sealed: BTreeMap::new(),
            out: Outbox::default(),
            now,
            wall: WallTime(0),
            stamp: WallTime(0),
        }
    }

    /// A mirrored group after a start of the daemon, in the role that its durable state tells.
    pub fn open(settings: MirrorSettings, state: GroupState, opened: OpenedMirror, now: Monotonic) -> Self {
        let mut group = Self::alone(&settings.volumes, now);
        let grace = now + settings.start_grace;
        let reason = "the mirror starts: it has not heard its partner yet".to_owned();
        group.presented = false;
        group.withdrawn_because = reason;
        group.attach_machine(settings, state, opened, Some(grace), now);
        group
    }

    /// Makes a group of lone volumes the primary of a new mirror, while hosts go on.
    ///
    /// # Panics
    /// If the group is mirrored already, or `state` is not a primary's.
    pub fn attach(
        &mut self,
        settings: MirrorSettings,
        state: GroupState,
        mut opened: OpenedMirror,
        now: Monotonic,
    ) {
        assert!(self.mirror.is_none(), "a group has one mirror");
        assert!(state.role == protocol::Role::Primary, "hosts write here");
        let mut dirty = Vec::new();
        for (volume, intent) in settings.volumes.iter().zip(&mut opened.intents) {
            intent.set_all();
            let mut all = DirtyMap::default();
            all.set_all(volume.size);
            dirty.push(all);
        }
        opened.clean = Some(CleanState { dirty, committed: None, journal: None });
        self.attach_machine(settings, state, opened, None, now);
    }

    fn attach_machine(
        &mut self,
        settings: MirrorSettings,
        state: GroupState,
        opened: OpenedMirror,
        grace_until: Option<Monotonic>,
        now: Monotonic,
    ) {
        rewind::check_empty(&state, &opened);
        let rewound = rewind::rewound_ranges(&opened, &settings);
        let OpenedMirror { intents, clean, redo, checkpoint } = opened;
        let restarted = grace_until.is_some();
        for slot in &mut self.volumes {
            slot.config.mirrored = true;
            slot.volume.set_mirrored(true);
        }
        let primary = state.role == protocol::Role::Primary;
        let recovered = RecoveredCuts::new(&redo);
        let mut mirror = Mirror {
            machine: Machine::Changing(Box::new(Transition::Opening)),
            intents: Vec::new(),
            redo: None,
            changes: VecDeque::new(),
            changing: None,
            retry_change_at: None,
            grace_until: grace_until.filter(|_| primary),
            planned: PlannedSwitch::default(),
            watch: Watch::default(),
            orphans: Orphans::default(),
            settings,
            state,
        };
        if primary {
            mirror.redo = Some((redo.log, checkpoint));
            let clean = clean.map(|clean| clean.usable(&mirror.settings, &mirror.state));
            let mut primary = Primary::new(&mirror.settings, &mirror.state, intents, clean, now);
            if restarted {
                primary.rpo.lose_through(primary.last);
                primary.rewound = rewound;
            }
            // One that continues a clean stop's journal is in the same incarnation still.
            if !primary.admission_open {
                mirror.changes.push_back(StateChange::Incarnation);
            }
            mirror.machine = Machine::Primary(Box::new(primary));
        } else {
            let completes = recovered.completes;
            let room = growth::Room::of(&mirror.settings);
            let mut secondary = Secondary::new(redo.log, checkpoint, recovered, room);
            secondary.compare = roles::compare_ranges(&intents, &mirror.settings);
            // A commit of the new lineage made it whole, though the note of that is missing.
            if secondary.tip().position.epoch == mirror.state.epoch {
                mirror.state.diverged = false;
            }
            // So did its first commit end what this side gave up.
            if mirror.state.relinquished.is_some_and(|tip| tip.position != secondary.tip().position) {
                mirror.state.relinquished = None;
            }
            if mirror.state.diverged && mirror.state.relinquished.is_some() {
                secondary.compare = switch::whole_volumes(&mirror.settings);
            }
            mirror.state.consistent |= completes;
            mirror.machine = Machine::Secondary(Box::new(secondary));
            mirror.intents = intents;
            self.withdrawn_because = roles::secondary_reason(&mirror.state);
        }
        self.mirror = Some(mirror);
    }

    /// Takes the mirror away: the volumes serve hosts on their own.
    pub fn detach(&mut self, now: Monotonic) {
        let stamp = self.stamp;
        let Some(mut mirror) = self.mirror.take() else {
            return;
        };
        self.out.forget(kept::is_of_the_spill);
        mirror.planned.end_offer("the mirror was deleted", &mut self.out);
        match &mut mirror.machine {
            Machine::Primary(primary) => {
                primary.close(primary::Link::Stopped, "the mirror was deleted", &mut self.out);
                let mut locks = primary.copying.abandon();
                locks.extend(primary.verify.abandon("the mirror was deleted", stamp));
                self.out.forget(|purpose| {
                    matches!(purpose, Purpose::CopyRead { .. } | Purpose::VerifyRead { .. })
                });
                for (volume, step) in primary.abandon_waiting() {
                    self.admitted(volume, step, now);
                }
                self.release_locks(&locks);
            }
            Machine::Secondary(secondary) => secondary.halt("the mirror was deleted", &mut self.out),
            Machine::Changing(_) => {}
        }
        for slot in &mut self.volumes {
            slot.config.mirrored = false;
            slot.volume.set_mirrored(false);
        }
        self.relieve(now);
        self.present(now);
    }

    /// Tells the clocks; call before every other call of a turn.
    pub const fn set_clocks(&mut self, now: Monotonic, wall: WallTime) {
        let passed = now.0.saturating_sub(self.now.0);
        let stamp = self.stamp.0.saturating_add(passed);
        self.stamp = if wall.0 > stamp { wall } else { WallTime(stamp) };
        self.now = now;
        self.wall = wall;
    }

    /// True while hosts are served.
    pub const fn is_presented(&self) -> bool {
        self.presented
    }

    /// Why hosts are not served.
    pub fn withdrawn_because(&self) -> &str {
        &self.withdrawn_because
    }

    fn slot(&mut self, index: VolumeIndex) -> Option<&mut VolumeSlot> {
        self.volumes.get_mut(usize::from(index.0))
    }

    /// A host's command.
    pub fn submit(&mut self, volume: VolumeIndex, id: CommandId, command: HostCommand) {
        let (now, presented) = (self.now, self.presented);
        match self.slot(volume) {
            Some(slot) if presented => slot.volume.submit(now, id, command),
            Some(_) | None => {
                self.out.push(Effect::Reply { volume, command: id, result: Err(HostError::Shutdown) })
            }
        }
    }

    /// True if a host's command is to be reserved: it waits for its tokens before its memory is taken.
    pub fn wants_reservation(&self, volume: VolumeIndex, command: &HostCommand) -> bool {
        let slot = self.volumes.get(usize::from(volume.0)).filter(|_| self.presented);
        slot.is_some_and(|slot| slot.volume.wants_reservation(command))
    }

    /// Queues a host's command for its tokens: `Granted` says when its turn has come.
    pub fn reserve(&mut self, volume: VolumeIndex, id: CommandId, command: HostCommand) {
        let now = self.now;
        if let Some(slot) = self.slot(volume) {
            slot.volume.reserve(now, id, command);
        }
    }

    /// A host's command whose turn has come, with its payload.
    pub fn submit_granted(&mut self, volume: VolumeIndex, id: CommandId, command: HostCommand) {
        let (now, presented) = (self.now, self.presented);
        match self.slot(volume) {
            Some(slot) if presented => slot.volume.submit_granted(now, id, command),
            Some(_) | None => {
                self.out.push(Effect::Reply { volume, command: id, result: Err(HostError::Shutdown) })
            }
        }
    }

    /// The connection of a command is gone. Returns true if the command goes on without a reply.
    pub fn forget(&mut self, volume: VolumeIndex, id: CommandId) -> bool {
        let now = self.now;
        self.slot(volume).is_some_and(|slot| slot.volume.forget(now, id))
    }

    /// True if the command has begun and not ended.
    pub fn is_running(&self, volume: VolumeIndex, id: CommandId) -> bool {
        self.volumes.get(usize::from(volume.0)).is_some_and(|slot| slot.volume.is_running(id))
    }

    /// A `Read` ended.
    pub fn read_done(&mut self, volume: VolumeIndex, step: StepId, result: HostResult) {
        let now = self.now;
        if let Some(slot) = self.slot(volume) {
            slot.volume.read_done(now, step, result);
        }
    }

    /// A `Prepare` ended: the ciphertext of its device range.
    pub fn prepared(&mut self, volume: VolumeIndex, step: StepId, result: Result<Bytes, HostError>) {
        let now = self.now;
        let result = result.map(|sealed| {
            self.sealed.insert((volume, step), sealed);
        });
        if let Some(slot) = self.slot(volume) {
            slot.volume.prepared(now, step, result);
            if slot.volume.is_poisoned() {
                self.sealed.remove(&(volume, step));
            }
        }
    }

    /// A `Write` or `ZeroRange` ended.
    pub fn written(&mut self, volume: VolumeIndex, step: StepId, result: HostResult, trimmed: bool) {
        let now = self.now;
        self.sealed.remove(&(volume, step));
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror {
            primary.ended(volume, step, result.is_ok(), now, &mut self.out);
        }
        let Some(slot) = self.slot(volume) else { return };
        let poisoned = slot.volume.is_poisoned();
        if trimmed {
            slot.volume.zeroed(now, step, result);
        } else {
            slot.volume.written(now, step, result);
        }
        self.check_poison(volume, poisoned);
    }

    /// A host's `Flush` ended.
    pub fn flushed(&mut self, volume: VolumeIndex, step: StepId, result: HostResult) {
        let now = self.now;
        let Some(slot) = self.slot(volume) else { return };
        let poisoned = slot.volume.is_poisoned();
        slot.volume.flushed(now, step, result);
        self.check_poison(volume, poisoned);
    }

    /// An `Inquire` ended.
    pub fn inquired(&mut self, volume: VolumeIndex, step: StepId, result: HostResult) {
        let now = self.now;
        if let Some(slot) = self.slot(volume) {
            slot.volume.inquired(now, step, result);
        }
    }

    /// A volume that became poisoned ends the incarnation: what reached its media is unknown.
    fn check_poison(&mut self, volume: VolumeIndex, was_poisoned: bool) {
        let poisoned = self.slot(volume).is_some_and(|slot| slot.volume.is_poisoned());
        if was_poisoned || !poisoned {
            return;
        }
        self.out.log(
            Loudness::Error,
            format!(
                "volume {} is poisoned: a flush failed; it refuses writes until farshored restarts",
                volume.0
            ),
        );
        self.give_up_switch("a flush failed", false);
        // Before the role is given up everything was flushed, and nothing was written since.
        if let Some(mirror) = self.mirror.as_mut().filter(|mirror| !mirror.planned.is_final()) {
            mirror.end_incarnation(volume, self.now, &mut self.out);
        }
    }

    /// A flush of home that no host asked for failed.
    fn flush_failed(&mut self, volume: VolumeIndex) {
        let now = self.now;
        let Some(slot) = self.slot(volume) else { return };
        let poisoned = slot.volume.is_poisoned();
        slot.volume.flush_failed(now);
        self.check_poison(volume, poisoned);
    }

    /// What to do next; `None` when everything is said.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        let mut turned = false;
        loop {
            if let Some(effect) = self.out.pop() {
                return Some(effect);
            }
            let next = self.volumes.iter_mut().enumerate().find_map(|(index, slot)| {
                let effect = slot.volume.poll_effect()?;
                Some((VolumeIndex(u16::try_from(index).ok()?), effect))
            });
            match next {
                Some((volume, effect)) => {
                    self.volume_effect(volume, effect);
                    turned = false;
                }
                None if turned => return None,
                None => {
                    self.turn();
                    turned = true;
                }
            }
        }
    }

    fn volume_effect(&mut self, volume: VolumeIndex, effect: engine::volume::Effect) {
        let effect = match effect {
            engine::volume::Effect::Read { step, command, device, wanted } => {
                Effect::Read { volume, step, command, device, wanted }
            }
            engine::volume::Effect::Prepare { step, command, .. } if Self::is_repair(command) => {
                return self.prepare_repair(volume, step, command);
            }
            engine::volume::Effect::Reply { command, result } if Self::is_repair(command) => {
                return self.repair_replied(command, result.is_ok());
            }
            engine::volume::Effect::Prepare { step, command, device, wanted, read_head, read_tail } => {
                Effect::Prepare { volume, step, command, device, wanted, read_head, read_tail }
            }
            engine::volume::Effect::Admit { step, device, content, .. } => {
                return self.admit(volume, step, device, content);
            }
            engine::volume::Effect::Write { step, device, content, durable, .. } => {
                let data = match content {
                    Content::Sealed => self.sealed.get(&(volume, step)).cloned(),
                    Content::Zeros | Content::Trimmed => None,
                };
                Effect::Write { volume, step, device, data, durable }
            }
            engine::volume::Effect::ZeroRange { step, command, device } => {
                Effect::ZeroRange { volume, step, command, device }
            }
            engine::volume::Effect::Flush { step, .. } => Effect::Flush { volume, step },
            engine::volume::Effect::Inquire { step, command } => Effect::Inquire { volume, step, command },
            engine::volume::Effect::CopyReady { device, step } => {
                return self.copy_ready(volume, step, device);
            }
            engine::volume::Effect::Granted { command } => Effect::Granted { command },
            engine::volume::Effect::Reply { command, result } => Effect::Reply { volume, command, result },
        };
        self.out.push(effect);
    }

    fn admit(&mut self, volume: VolumeIndex, step: StepId, device: ByteRange, content: Content) {
        let now = self.now;
        let data = self.sealed.get(&(volume, step)).cloned();
        match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), planned, .. }) if !planned.is_final() => {
                primary.admit(volume, step, device, content, data);
                for (volume, step) in primary.poll_admitted(now, &mut self.out) {
                    self.admitted(volume, step, now);
                }
            }
            // A role change has begun: the volume is withdrawn, and what has no sequence is not written.
            Some(_) => {
                self.sealed.remove(&(volume, step));
                if let Some(slot) = self.slot(volume) {
                    slot.volume.admit_failed(now, step, HostError::Shutdown);
                }
            }
            None => self.admitted(volume, step, now),
        }
    }

    fn admitted(&mut self, volume: VolumeIndex, step: StepId, now: Monotonic) {
        if let Some(slot) = self.slot(volume) {
            slot.volume.admitted(now, step);
        }
    }

    fn copy_ready(&mut self, volume: VolumeIndex, step: StepId, device: ByteRange) {
        let now = self.now;
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror {
            if !primary.verify_locked(volume, step, &mut self.out) {
                primary.copy_locked(volume, device, &mut self.out);
            }
        } else if let Some(slot) = self.slot(volume) {
            slot.volume.copy_done(now, step);
        }
    }

    /// One turn of the mirror.
    fn turn(&mut self) {
        let (now, wall, stamp) = (self.now, self.wall, self.stamp);
        self.spill_turn();
        let Some(mirror) = &mut self.mirror else { return };
        mirror.next_change(now, &mut self.out);
        let mut copies = Vec::new();
        match &mut mirror.machine {
            Machine::Primary(primary) => {
                primary.bandwidth.begin_turn();
                primary.copy_rate.begin_turn();
                primary.dial_if_due(now, &mut self.out);
                primary.compare_more(now, &mut self.out);
                primary.open_gate_if_compared(&mut self.out);
                primary.grow_more(&mut self.out);
                if !mirror.planned.has_tip() {
                    primary.send_cuts(&mirror.settings, now, wall, &mut self.out);
                    copies = primary.plan_copies(now);
                    primary.clear_intent(&mirror.settings, now, &mut self.out);
                }
                primary.write_intent(&mut self.out);
            }
            Machine::Secondary(secondary) => {
                secondary.turn(&mirror.settings, &mirror.state, now, stamp, &mut self.out);
            }
            Machine::Changing(_) => {}
        }
        for (volume, range) in copies {
            self.begin_copy(volume, range);
        }
        self.verify_turn();
        self.finish_batch();
        self.write_stored_intents();
        self.end_grace();
        self.transition_turn();
        self.switch_turn();
        self.watch();
        self.orphans_turn();
        // What the turn found worth storing is stored now: no later event may come to ask for it.
        if let Some(mirror) = &mut self.mirror {
            mirror.next_change(now, &mut self.out);
        }
    }

    /// Lets hosts write again what was being read under its lock.
    fn release_locks(&mut self, locks: &[(VolumeIndex, StepId)]) {
        let now = self.now;
        for (volume, step) in locks {
            if let Some(slot) = self.slot(*volume) {
                slot.volume.copy_done(now, *step);
            }
        }
    }

    fn begin_copy(&mut self, volume: VolumeIndex, range: ByteRange) {
        let now = self.now;
        let step = self.slot(volume).map(|slot| slot.volume.begin_copy(now, range));
        if let (Some(step), Some(Mirror { machine: Machine::Primary(primary), .. })) =
            (step, &mut self.mirror)
        {
            primary.copying.locking(volume, range, step);
        }
    }

    fn finish_batch(&mut self) {
        let (now, stamp) = (self.now, self.stamp);
        let Some(mirror) = &mut self.mirror else { return };
        let Machine::Secondary(secondary) = &mut mirror.machine else {
            return;
        };
        match secondary.batch_completes(&mirror.state) {
            Some(TargetNews::Complete) => mirror.note_complete(),
            Some(TargetNews::Nothing) => secondary.batch_counts(&mirror.settings, now, stamp, &mut self.out),
            None => {}
        }
    }

    /// When to call `handle_time` next.
    pub fn poll_timeout(&self) -> Option<Monotonic> {
        let volumes = self.volumes.iter().filter_map(|slot| slot.volume.poll_timeout());
        let mirror = self.mirror.iter().flat_map(|mirror| {
            let machine = match &mirror.machine {
                Machine::Primary(_) if mirror.planned.has_tip() => None,
                Machine::Primary(primary) => primary.poll_timeout(),
                Machine::Secondary(secondary) => secondary.poll_timeout(),
                Machine::Changing(change) => change.poll_timeout(),
            };
            let planned = mirror.planned.poll_timeout(mirror.is_changing());
            let watch = mirror.watch.poll_timeout();
            [machine, planned, watch, mirror.grace_until, mirror.retry_change_at].into_iter().flatten()
        });
        volumes.chain(mirror).min()
    }

    /// Time passed.
    pub fn handle_time(&mut self) {
        let now = self.now;
        for slot in &mut self.volumes {
            slot.volume.handle_time(now);
        }
    }

    /// A session was opened at this side's wish.
    pub fn dialed(&mut self, session: SessionId) {
        if self.offer_dialed(session) {
            return;
        }
        match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), settings, state, .. }) => {
                primary.dialed(session, settings, state, self.now, &mut self.out);
            }
            Some(_) | None => {
                self.out.push(Effect::CloseSession { session, reason: "not wanted any more".into() });
            }
        }
    }

    /// No session could be opened.
    pub fn dial_failed(&mut self, reason: &str) {
        self.offer_dial_failed(reason);
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror {
            primary.dial_failed(reason, self.now);
        }
    }

    /// The partner opened a session with this hello.
    pub fn greeted(&mut self, session: SessionId, hello: Hello) {
        let Some(mirror) = &mut self.mirror else {
            return refuse(
                session,
                &GroupState::new_secondary(SiteId::default()),
                unknown_mirror(),
                &mut self.out,
            );
        };
        if let Some(text) = mirror.mismatch(&hello) {
            let refusal = Refusal { code: RefusalCode::Mismatch, text };
            return refuse(session, &mirror.state, refusal, &mut self.out);
        }
        let busy = || Refusal { code: RefusalCode::Busy, text: "the side is changing its role".into() };
        let tip = match &mirror.machine {
            Machine::Primary(primary) => primary.position(),
            Machine::Secondary(secondary) => secondary.tip().position,
            Machine::Changing(_) => return refuse(session, &mirror.state, busy(), &mut self.out),
        };
        if mirror.is_changing() {
            return refuse(session, &mirror.state, busy(), &mut self.out);
        }
        match mirror.state.judge_hello(&hello, tip) {
            HelloVerdict::Accept => {
                if let Machine::Secondary(secondary) = &mut mirror.machine {
                    secondary.greet(session, hello, &mut self.out);
                }
            }
            HelloVerdict::Refuse(refusal) => refuse(session, &mirror.state, refusal, &mut self.out),
            HelloVerdict::Adopt(state) => {
                refuse(session, &mirror.state, busy(), &mut self.out);
                self.fence(StateChange::Adopt(state));
            }
        }
    }

    /// A control frame of an open session.
    pub fn message(&mut self, session: SessionId, message: Message) {
        let now = self.now;
        if self.switch_message(session, &message) || self.orphan_message(session, &message) {
            return;
        }
        let Some(mirror) = &mut self.mirror else { return };
        match &mut mirror.machine {
            Machine::Primary(primary) if primary.is_session(session) => {
                let news =
                    primary.message(session, message, &mirror.settings, &mirror.state, now, &mut self.out);
                self.link_news(news);
            }
            Machine::Secondary(secondary) if secondary.is_session(session) => {
                secondary.message(session, message, &mut self.out);
            }
            Machine::Primary(_) | Machine::Secondary(_) | Machine::Changing(_) => {}
        }
    }

    fn link_news(&mut self, news: LinkNews) {
        match news {
            LinkNews::Nothing => {}
            LinkNews::Heard => self.partner_heard(),
            LinkNews::Complete => self.target_complete(),
            LinkNews::HeardComplete => {
                self.target_complete();
                self.partner_heard();
            }
            LinkNews::Fenced(refuse) => self.fence(StateChange::Fence(refuse)),
        }
    }

    fn target_complete(&mut self) {
        if let Some(mirror) = &mut self.mirror {
            mirror.note_complete();
        }
    }

    /// A cut of an open session.
    pub fn cut(&mut self, session: SessionId, bytes: Bytes) {
        let stamp = self.stamp;
        if let Some(Mirror { machine: Machine::Secondary(secondary), settings, .. }) = &mut self.mirror {
            secondary.receive(session, bytes, settings, stamp, &mut self.out);
        }
    }

    /// True while the transport should hold back further cuts of this group.
    pub fn is_crowded(&self) -> bool {
        match &self.mirror {
            Some(Mirror { machine: Machine::Secondary(secondary), .. }) => secondary.is_crowded(),
            Some(_) | None => false,
        }
    }

    /// A session ended.
    pub fn session_closed(&mut self, session: SessionId, reason: &str) {
        let now = self.now;
        if self.offer_closed(session, reason) {
            return;
        }
        match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), .. }) => {
                primary.session_closed(session, reason, now, &mut self.out);
            }
            Some(Mirror { machine: Machine::Secondary(secondary), .. }) => {
                secondary.session_closed(session, reason, &mut self.out);
            }
            Some(_) | None => {}
        }
    }

    /// An [`Effect::Io`] was answered.
    pub fn io_done(&mut self, io: IoId, result: Result<Bytes, IoFailure>) {
        let Some(purpose) = self.out.answered(io) else {
            return;
        };
        match purpose {
            Purpose::Intent { volume, page, generation } => {
                self.intent_written(volume, page, generation, result.is_ok())
            }
            Purpose::PersistState => self.state_persisted(result.err()),
            Purpose::Transition => self.transition_done(result.err()),
            Purpose::Grow { volume, size } => self.grown(volume, size, result.err()),
            Purpose::Show { volume, size } => self.shown(volume, size, result.err()),
            Purpose::CopyRead { volume, range } => self.copy_read(volume, range, result),
            Purpose::VerifyRead { request } => self.verify_read(request, result),
            Purpose::SpillWrite { .. } | Purpose::SpillRead { .. } | Purpose::SpillSync => {
                self.spill_io(purpose, result)
            }
            Purpose::CompareRead { .. } | Purpose::ClearFlush { .. } => self.primary_io(purpose, result),
            Purpose::SwitchFlush { volume } => self.switch_flushed(volume, result.map(|_| ())),
            Purpose::SwitchMark => self.switch_marked(result.map(|_| ())),
            Purpose::OrphanHome { id } => self.orphan_home(id, result),
            Purpose::OrphanRead { session, id, volume, range } => {
                self.orphan_read(session, id, volume, range, &result);
            }
            Purpose::ImageRead { .. }
            | Purpose::DrillWrite { .. }
            | Purpose::InitialApply
            | Purpose::InitialFlush
            | Purpose::Apply
            | Purpose::ApplyFlush
            | Purpose::ApplyRead { .. }
            | Purpose::RedoWrite
            | Purpose::RedoSync
            | Purpose::Checkpoint => self.secondary_io(purpose, result),
        }
    }

    fn primary_io(&mut self, purpose: Purpose, result: Result<Bytes, IoFailure>) {
        if let (Purpose::ClearFlush { volume, .. }, Err(_)) = (purpose, &result) {
            return self.flush_failed(volume);
        }
        let Some(Mirror { machine: Machine::Primary(primary), settings, .. }) = &mut self.mirror else {
            return;
        };
        if let Purpose::CompareRead { request } = purpose {
            primary.compare_home(request, result);
        } else if let (Purpose::ClearFlush { volume, submitted_at }, Ok(_)) = (purpose, result) {
            primary.clear_flushed(settings, volume, submitted_at);
        }
    }

    fn copy_read(&mut self, volume: VolumeIndex, range: ByteRange, result: Result<Bytes, IoFailure>) {
        let now = self.now;
        let step = match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), .. }) => {
                primary.copy_read(volume, range, result, now, &mut self.out)
            }
            Some(_) | None => None,
        };
        if let (Some(step), Some(slot)) = (step, self.slot(volume)) {
            slot.volume.copy_done(now, step);
        }
    }

    fn secondary_io(&mut self, purpose: Purpose, result: Result<Bytes, IoFailure>) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let secondary = match &mut mirror.machine {
            Machine::Secondary(secondary) => secondary,
            Machine::Changing(change) => match change.secondary() {
                Some(secondary) => secondary,
                None => return,
            },
            Machine::Primary(_) => return,
        };
        let ok = result.is_ok();
        match purpose {
            Purpose::ImageRead { read, part } => secondary.image_part(read, part, result, &mut self.out),
            Purpose::DrillWrite { write } => secondary.drill_written(write, result, &mut self.out),
            Purpose::Apply => secondary.apply_written(ok, now, &mut self.out),
            Purpose::ApplyFlush => secondary.apply_flushed(ok, &mirror.settings, now, &mut self.out),
            Purpose::ApplyRead { number } => secondary.apply_read(number, result, now, &mut self.out),
            Purpose::Checkpoint => secondary.checkpointed(ok, now, &mut self.out),
            Purpose::InitialApply
            | Purpose::InitialFlush
            | Purpose::RedoWrite
            | Purpose::RedoSync
            | Purpose::Intent { .. }
            | Purpose::CopyRead { .. }
            | Purpose::CompareRead { .. }
            | Purpose::VerifyRead { .. }
            | Purpose::ClearFlush { .. }
            | Purpose::SpillWrite { .. }
            | Purpose::SpillRead { .. }
            | Purpose::SpillSync
            | Purpose::Grow { .. }
            | Purpose::Show { .. }
            | Purpose::PersistState
            | Purpose::Transition
            | Purpose::SwitchFlush { .. }
            | Purpose::SwitchMark
            | Purpose::OrphanHome { .. }
            | Purpose::OrphanRead { .. } => secondary.batch_done(ok, &mut self.out),
        }
    }

    fn intent_written(&mut self, volume: VolumeIndex, page: u64, generation: u64, ok: bool) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        match &mut mirror.machine {
            Machine::Primary(primary) => {
                let failed = primary.intent_written(volume, page, generation, ok);
                let admitted = primary.poll_admitted(now, &mut self.out);
                for step in failed {
                    self.sealed.remove(&(volume, step));
                    if let Some(slot) = self.slot(volume) {
                        slot.volume.admit_failed(now, step, HostError::Io);
                    }
                }
                for (volume, step) in admitted {
                    self.admitted(volume, step, now);
                }
            }
            Machine::Secondary(_) | Machine::Changing(_) => {
                if let Some(intent) = mirror.intents.get_mut(usize::from(volume.0)) {
                    let result = if ok { Ok(()) } else { Err(HostError::Io) };
                    intent.written(page, generation, result);
                }
                if !ok {
                    mirror.retry_marking_later(now, &mut self.out);
                }
            }
        }
    }
}

fn unknown_mirror() -> Refusal {
    Refusal { code: RefusalCode::UnknownMirror, text: "this mirror is not known here".into() }
}

/// Answers a hello with a refusal; the peer closes.
fn refuse(session: SessionId, state: &GroupState, refusal: Refusal, out: &mut Outbox) {
    let frame = Message::Refuse(Refuse {
        code: refusal.code,
        epoch: state.epoch,
        origin: state.origin,
        fork: state.fork(),
        text: refusal.text,
    });
    out.push(Effect::Send { session, frame: frame.encode() });
}
