//! A site: its files, its durable state and its process.

use std::collections::BTreeMap;

use block::{ByteRange, HostCommand, Position, VolumeIndex};
use bytes::Bytes;
use daemon::group::{CleanState, Group, IoId, MirrorPolicy};
use engine::{CommandId, StepId};
use protocol::GroupState;

use super::disk::{Content, VirtualFile};
use super::drill::DrillModel;
use super::oracle::LineageKey;
use super::pressure::Owed;

/// A request to a virtual file.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Write {
        file: usize,
        offset: u64,
        content: Content,
        durable: bool,
    },
    Sync {
        file: usize,
        mark: u64,
    },
    /// The first half is read when the request starts, the rest when it ends.
    Read {
        file: usize,
        offset: u64,
        length: u64,
        first: Bytes,
    },
    Persist(Box<GroupState>),
    /// Room for a volume of so many blocks; its size too if it is to be stored.
    Grow {
        volume: usize,
        blocks: u64,
        stored: bool,
    },
    Nothing,
}

impl Operation {
    /// The file that it is about.
    pub(super) const fn file(&self) -> Option<usize> {
        match self {
            Self::Write { file, .. } | Self::Sync { file, .. } | Self::Read { file, .. } => Some(*file),
            Self::Persist(_) | Self::Grow { .. } | Self::Nothing => None,
        }
    }
}

/// Who is answered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Io(IoId),
    Read { volume: VolumeIndex, step: StepId },
    Prepare { volume: VolumeIndex, step: StepId, command: CommandId, device: ByteRange, wanted: ByteRange },
    Write { volume: VolumeIndex, step: StepId, trimmed: bool },
    Flush { volume: VolumeIndex, step: StepId, mark: u64 },
    Inquiry { volume: VolumeIndex, step: StepId },
    Unlock,
}

/// An unanswered request.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) operation: Operation,
    pub(super) answer: Answer,
}

/// A host's command that is not answered.
#[derive(Clone, Debug)]
pub(super) struct Outstanding {
    pub(super) command: HostCommand,
    pub(super) submitted: u64,
    pub(super) writes: Vec<(LineageKey, u64, ByteRange)>,
    /// When its last home write ended.
    pub(super) home_ended: Option<u64>,
}

/// A home write that has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) lineage: LineageKey,
    pub(super) sequence: u64,
    pub(super) range: ByteRange,
}

/// What a stopping process still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopping {
    No,
    Draining { give_up_at: u64 },
}

pub(super) struct Site {
    pub(super) files: Vec<VirtualFile>,
    /// As it stands on stable media.
    pub(super) state: GroupState,
    pub(super) clean: Option<CleanState>,
    /// Blocks of the volumes, durably, and how many their files have.
    pub(super) sizes: Vec<u64>,
    pub(super) rooms: Vec<u64>,
    pub(super) group: Option<Group>,
    /// Counts the processes.
    pub(super) process: u64,
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) commands: BTreeMap<(VolumeIndex, CommandId), Outstanding>,
    pub(super) steps: BTreeMap<(VolumeIndex, StepId), Step>,
    /// Which command a step was prepared for.
    pub(super) prepared: BTreeMap<(VolumeIndex, StepId), CommandId>,
    /// Hosts may connect.
    pub(super) presented: bool,
    pub(super) stopping: Stopping,
    pub(super) timer_at: Option<u64>,
    pub(super) spins: u32,
    pub(super) boot_due: bool,
    pub(super) monotonic_offset: u64,
    pub(super) wall_offset: u64,
    pub(super) wall_offset_max: u64,
    /// How many times slower than usual its disk is.
    pub(super) slowness: u64,
    /// How many times slower still its spill file is.
    pub(super) spill_slowness: u64,
    /// As a target: the last position that it acknowledged as committed.
    pub(super) acked_tip: Option<Position>,
    pub(super) lineage: Option<LineageKey>,
    /// As a primary: the lineage and the last sequence of the newest cut that it sent.
    pub(super) sent: Option<(LineageKey, u64)>,
    /// What an operator wants of the mirror here.
    pub(super) policy: MirrorPolicy,
    /// Since when hosts' writes are held or refused.
    pub(super) held_since: Option<u64>,
    /// Bytes sent and bytes copied beyond the rates of its process.
    pub(super) owed: [Owed; 2],
    /// The highest epoch that its process was told of.
    pub(super) heard_epoch: u64,
    /// An operator's start allowed overwriting the partner's writes in this epoch.
    pub(super) start_given: u64,
    /// A forced failover waits for its fork: when it was ordered and which loss was reported.
    pub(super) failover: Option<(u64, Option<std::time::Duration>)>,
    /// A rewind was ordered, and to which point: its target may hold less than it acknowledged.
    pub(super) rewind: Option<Position>,
    pub(super) drill: Option<DrillModel>,
    /// A search for orphans was ordered, and its outcome is not checked.
    pub(super) searching: bool,
    /// The newest epoch that a forced failover here may have begun.
    pub(super) forced_epoch: u64,
}

impl Site {
    pub(super) const fn is_up(&self) -> bool {
        self.group.is_some()
    }
}
