//! What operators see of a group.

use std::time::Duration;

use block::{ByteCount, Monotonic, Position, Sequence, VolumeIndex, WallTime};
use engine::StepId;
use protocol::{JournalTier, MirrorState, Role};

use super::drill::DrillSnapshot;
use super::primary::{Gate, Link, Primary};
use super::secondary::Secondary;
use super::window::{Point, WindowSnapshot};
use super::{Group, Machine, Pressure, SyncSnapshot};

/// What a forced failover loses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossReport {
    /// The last write that survives.
    pub recovery_point: Position,
    /// This side's own clock when the recovery point's cut came: nothing in it was written later.
    pub time: Option<WallTime>,
    /// At most so much time of acknowledged writes is lost; `None` if it is not known.
    pub lost_at_most: Option<Duration>,
    /// Nothing is lost that a host was told of: synchronous mirroring is in force.
    pub zero: bool,
}

impl LossReport {
    /// The report of a side whose lease is valid.
    pub(super) const fn without_loss(self) -> Self {
        Self { lost_at_most: Some(Duration::ZERO), zero: true, ..self }
    }

    /// The bound by this side's own clock: the last cut echoed a stamp of it, and all that is lost came after.
    pub(super) fn new(tip: Position, point: Option<Point>, wall: WallTime) -> Self {
        Self {
            recovery_point: tip,
            time: point.map(|point| point.seen),
            lost_at_most: point
                .filter(|point| point.echo.0 > 0)
                .map(|point| Duration::from_nanos(wall.0.saturating_sub(point.echo.0))),
            zero: false,
        }
    }
}

/// A mirror as `mirror show` tells it.
#[derive(Clone, Debug)]
pub struct MirrorSnapshot {
    /// Primary or secondary.
    pub role: Role,
    /// The state's name is `state.name()`.
    pub state: MirrorState,
    /// Why it is in that state, if there is something to say.
    pub reason: Option<String>,
    /// Every write travels in order.
    pub synchronized: bool,
    /// A session with the partner is open.
    pub connected: bool,
    /// The last assigned sequence at the primary; the durable tip at the secondary.
    pub position: Position,
    /// The last position that the target durably holds, and this side's clock then.
    pub recovery_point: Option<(Position, Option<WallTime>)>,
    /// `None` if it cannot be told.
    pub rpo: Option<Duration>,
    /// The RPO is an upper bound.
    pub rpo_is_bound: bool,
    /// Bytes that the target lacks.
    pub backlog: ByteCount,
    /// Where they are.
    pub tier: JournalTier,
    /// What a copy or resync must still move, while one runs or waits.
    pub resync_remaining: Option<ByteCount>,
    /// Bytes of the partner's own that wait for an operator, or of this fenced side.
    pub orphaned: ByteCount,
    /// Bytes that could not be read here: the target keeps its old content of them until a later resync.
    pub bad: ByteCount,
    /// An operator's `start` is awaited.
    pub needs_start: bool,
    /// Payload bytes held in memory for the mirror.
    pub memory: ByteCount,
    /// The retention window of a secondary with an image.
    pub window: Option<WindowSnapshot>,
    /// The drill at a secondary.
    pub drill: Option<DrillSnapshot>,
    /// Bytes of the spill file in use.
    pub spilled: ByteCount,
    /// How far behind the target is, and what is done about it.
    pub pressure: Pressure,
    /// A volume is growing.
    pub growing: bool,
    /// Why the last growth ended without its size.
    pub growth_failure: Option<String>,
    /// Whether synchronous mirroring is in force; `None` if it is not wanted.
    pub sync: Option<SyncSnapshot>,
}

/// A volume's counters as the group knows them.
#[derive(Clone, Copy, Debug)]
pub struct VolumeSnapshot {
    /// Commands that had to wait for the IOPS limit.
    pub throttled: u64,
    /// Commands started and not ended.
    pub in_flight: usize,
    /// Writes are refused since a flush failed.
    pub poisoned: bool,
}

impl Group {
    /// The volumes' counters, in index order.
    pub fn volume_snapshots(&self) -> Vec<VolumeSnapshot> {
        self.volumes
            .iter()
            .map(|slot| VolumeSnapshot {
                throttled: slot.volume.throttled(),
                in_flight: slot.volume.in_flight(),
                poisoned: slot.volume.is_poisoned(),
            })
            .collect()
    }

    /// The mirror's state; `None` without a mirror.
    pub fn mirror_snapshot(&self) -> Option<MirrorSnapshot> {
        let mirror = self.mirror.as_ref()?;
        let consistent = mirror.state.consistent;
        let snapshot = match &mirror.machine {
            Machine::Primary(primary) => primary.snapshot(consistent, self.now),
            Machine::Secondary(secondary) => {
                secondary.snapshot(consistent, mirror.state.diverged, self.stamp)
            }
            Machine::Changing(_) => MirrorSnapshot {
                role: mirror.state.role,
                state: if consistent {
                    MirrorState::ConsistentStopped
                } else {
                    MirrorState::InconsistentStopped
                },
                reason: Some("the role is changing".to_owned()),
                synchronized: false,
                connected: false,
                position: mirror.state.start_position(),
                recovery_point: None,
                rpo: None,
                rpo_is_bound: true,
                backlog: ByteCount(0),
                tier: JournalTier::Ring,
                resync_remaining: None,
                orphaned: ByteCount(0),
                bad: ByteCount(0),
                needs_start: false,
                memory: ByteCount(0),
                window: None,
                drill: None,
                spilled: ByteCount(0),
                pressure: Pressure::default(),
                growing: false,
                growth_failure: None,
                sync: None,
            },
        };
        let sync = self.sync_snapshot();
        let reason = mirror.offered_reason().or(snapshot.reason);
        Some(MirrorSnapshot { reason, pressure: mirror.watch.pressure(), sync, ..snapshot })
    }

    /// The sequence of a host's write that is on its way home.
    pub fn sequence_of(&self, volume: VolumeIndex, step: StepId) -> Option<Sequence> {
        match &self.mirror.as_ref()?.machine {
            Machine::Primary(primary) => primary.sequence_of(volume, step),
            Machine::Secondary(_) | Machine::Changing(_) => None,
        }
    }

    /// The durable state of the mirror.
    pub fn mirror_state(&self) -> Option<&protocol::GroupState> {
        self.mirror.as_ref().map(|mirror| &mirror.state)
    }
}

impl Primary {
    fn state(&self, consistent: bool) -> MirrorState {
        let pick = |if_consistent, otherwise| if consistent { if_consistent } else { otherwise };
        match &self.link {
            Link::Stopped | Link::Halted { .. } => {
                pick(MirrorState::ConsistentStopped, MirrorState::InconsistentStopped)
            }
            Link::Down { .. } | Link::Dialing { .. } | Link::Greeting { .. } => {
                pick(MirrorState::IdlingDisconnected, MirrorState::InconsistentDisconnected)
            }
            Link::Up { .. } if self.gate != Gate::Open => MirrorState::Idling,
            Link::Up { .. } if self.pass.is_some_and(|pass| pass.is_initial()) => {
                MirrorState::InconsistentCopying
            }
            Link::Up { .. } if self.pass.is_some() || self.has_dirty() || self.folded_from.is_some() => {
                MirrorState::ConsistentCopying
            }
            Link::Up { .. } => MirrorState::ConsistentSynchronized,
        }
    }

    fn snapshot(&self, consistent: bool, now: Monotonic) -> MirrorSnapshot {
        let state = self.state(consistent);
        let reason = match (&self.link, self.gate) {
            (Link::Halted { reason, .. }, _) => Some(reason.clone()),
            (Link::Stopped, _) => Some("an operator stopped the mirror".to_owned()),
            (Link::Up { .. }, Gate::Approval) => Some(format!(
                "the partner holds up to {} bytes that this side never had: 'farshore mirror start' overwrites them",
                self.orphaned.0
            )),
            (Link::Up { .. }, Gate::Comparing) => Some("comparing with the partner's own writes".to_owned()),
            (Link::Up { .. } | Link::Down { .. } | Link::Dialing { .. } | Link::Greeting { .. }, _) => {
                self.trouble.clone()
            }
        };
        let folded = self.has_dirty() || self.folded_from.is_some() || !self.compare.is_done();
        let known = consistent && !self.rpo.is_unknown();
        let remaining: u64 = self.volumes.iter().map(|volume| volume.current.count().bytes().0).sum();
        let remaining = remaining + self.compare.remaining_bytes();
        let copying = self.pass.is_some() || folded;
        MirrorSnapshot {
            role: Role::Primary,
            state,
            reason,
            synchronized: state == MirrorState::ConsistentSynchronized,
            connected: matches!(self.link, Link::Up { .. }),
            position: self.position(),
            recovery_point: self
                .recovery_point
                .filter(|_| consistent)
                .map(|(position, time)| (position, Some(time))),
            rpo: known.then(|| self.rpo.rpo(now)),
            rpo_is_bound: self.rpo.is_bound(),
            backlog: self.backlog(),
            tier: match (folded, self.spill.is_pending()) {
                (true, _) => JournalTier::DirtyMap,
                (false, true) => JournalTier::Spill,
                (false, false) => JournalTier::Ring,
            },
            resync_remaining: copying.then_some(ByteCount(remaining)),
            orphaned: self.orphaned,
            bad: ByteCount(self.volumes.iter().map(|volume| volume.bad.count().bytes().0).sum()),
            needs_start: self.gate == Gate::Approval
                || matches!(self.link, Link::Halted { .. } | Link::Stopped),
            window: None,
            drill: None,
            memory: ByteCount(self.ring.bytes() + self.spill.held_bytes()),
            spilled: ByteCount(self.spill.space.used_bytes()),
            pressure: Pressure::default(),
            growing: self.sizes.is_growing(),
            growth_failure: self.sizes.failure(),
            sync: None,
        }
    }
}

impl Secondary {
    fn snapshot(&self, consistent: bool, diverged: bool, wall: WallTime) -> MirrorSnapshot {
        let connected = self.is_connected();
        let state = match (connected, consistent) {
            (true, true) if diverged => MirrorState::Idling,
            (true, true) if self.durable.staged().is_some() => MirrorState::ConsistentCopying,
            (true, true) => MirrorState::ConsistentSynchronized,
            (true, false) => MirrorState::InconsistentCopying,
            (false, true) => MirrorState::ConsistentDisconnected,
            (false, false) => MirrorState::InconsistentDisconnected,
        };
        let tip = self.tip().position;
        let (orphaned, waiting) = self.orphaned.unwrap_or_default();
        let reason = if diverged {
            let count = if waiting {
                format!(
                    "it differs in up to {} bytes that the new primary never had; they are kept until 'farshore mirror start' at the new primary",
                    orphaned.0
                )
            } else {
                "the new primary has not compared it yet".to_owned()
            };
            Some(format!("this side was the primary and is fenced: {count}"))
        } else {
            self.trouble.clone()
        };
        let rpo = self.newest.filter(|point| point.echo.0 > 0);
        MirrorSnapshot {
            role: Role::Secondary,
            state,
            reason,
            synchronized: state == MirrorState::ConsistentSynchronized,
            connected,
            position: tip,
            recovery_point: consistent.then(|| (tip, self.newest.map(|point| point.seen))),
            rpo: rpo
                .filter(|_| consistent)
                .map(|point| Duration::from_nanos(wall.0.saturating_sub(point.echo.0))),
            rpo_is_bound: true,
            backlog: ByteCount(0),
            tier: JournalTier::Ring,
            resync_remaining: None,
            orphaned,
            bad: ByteCount(0),
            needs_start: waiting,
            memory: self.memory(),
            window: (consistent && !diverged).then(|| self.window(wall)),
            drill: self.drill_snapshot(),
            spilled: ByteCount(0),
            pressure: Pressure::default(),
            growing: false,
            growth_failure: None,
            sync: None,
        }
    }
}
