//! What a group asks of its surroundings, and the tickets by which the answers come back.

use std::collections::{BTreeMap, VecDeque};

use block::{ByteCount, ByteRange, HostError, HostResult, Monotonic, VolumeIndex};
use bytes::Bytes;
use engine::{CommandId, StepId};
use protocol::GroupState;

use super::drill::DrillIo;

/// Names one request of a group; its answer carries it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// Names one session with the partner; unique in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A request to storage. Each is answered exactly once with its [`IoId`].
#[derive(Clone, Debug)]
pub enum IoRequest {
    /// Read ciphertext from a volume's home; answered with the bytes.
    HomeRead {
        /// Which volume.
        volume: VolumeIndex,
        /// Unit-aligned.
        range: ByteRange,
    },
    /// Write ciphertext to a volume's home.
    HomeWrite {
        /// Which volume.
        volume: VolumeIndex,
        /// Unit-aligned byte offset.
        offset: u64,
        /// Whole data units.
        data: Bytes,
    },
    /// Make a range of a volume's home read as zeros.
    HomeZero {
        /// Which volume.
        volume: VolumeIndex,
        /// Unit-aligned.
        range: ByteRange,
        /// By ZERO_RANGE rather than by written zeros.
        trim: bool,
    },
    /// Bring a volume's completed writes to stable media.
    HomeFlush {
        /// Which volume.
        volume: VolumeIndex,
    },
    /// Write a page of a volume's intent map durably.
    IntentWrite {
        /// Which volume.
        volume: VolumeIndex,
        /// Byte offset in the intent file.
        offset: u64,
        /// One page.
        page: Bytes,
    },
    /// Write to a redo segment file.
    RedoWrite {
        /// Which file of the log.
        file: u32,
        /// Byte offset, 4096-aligned.
        offset: u64,
        /// Whole pages.
        data: Bytes,
    },
    /// Bring a redo segment file's completed writes to stable media.
    RedoSync {
        /// Which file of the log.
        file: u32,
    },
    /// Read from a redo segment file; answered with the bytes.
    RedoRead {
        /// Which file of the log.
        file: u32,
        /// Byte offset, 4096-aligned.
        offset: u64,
        /// Bytes, whole pages.
        length: u64,
    },
    /// Write a checkpoint page durably.
    CheckpointWrite {
        /// 0 or 1.
        slot: u64,
        /// One page.
        page: Bytes,
    },
    /// Read from a drill's scratch space for a volume; answered with the bytes.
    ScratchRead {
        /// Which volume.
        volume: VolumeIndex,
        /// Unit-aligned.
        range: ByteRange,
    },
    /// Write to a drill's scratch space for a volume.
    ScratchWrite {
        /// Which volume.
        volume: VolumeIndex,
        /// Unit-aligned byte offset.
        offset: u64,
        /// Whole data units.
        data: Bytes,
    },
    /// Write a segment to the spill file.
    SpillWrite {
        /// Byte offset, 4096-aligned.
        offset: u64,
        /// Whole pages, in order.
        data: Vec<Bytes>,
    },
    /// Read a segment of the spill file; answered with the bytes.
    SpillRead {
        /// Byte offset, 4096-aligned.
        offset: u64,
        /// Bytes, whole pages.
        length: u64,
    },
    /// Bring the spill file's completed writes to stable media.
    SpillSync,
    /// Make a volume's files large enough for this size, durably; its size stays. Where they are it is done.
    Grow {
        /// Which volume.
        volume: VolumeIndex,
        /// The room wanted.
        size: ByteCount,
    },
    /// Make files and size of a volume this large, durably in catalogue and header, then call [`super::Group::resize`];
    /// then answer. A volume that is as large already stays as it is.
    Resize {
        /// Which volume.
        volume: VolumeIndex,
        /// Its size from now on.
        size: ByteCount,
    },
    /// Make the group's state durable in catalogue and headers.
    Persist(Box<GroupState>),
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation} failed with errno {errno}")]
pub struct IoFailure {
    /// What was tried.
    pub operation: &'static str,
    /// The operating system's error number, 0 if there is none.
    pub errno: i32,
}

/// How loud a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loudness {
    /// A state change.
    Info,
    /// Odd but handled.
    Warn,
    /// A person must look.
    Error,
}

/// What the surroundings must do, in order.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Read `device` from home, open it, give the host the bytes of `wanted`; answer with `read_done`.
    Read {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
        /// The host's command.
        command: CommandId,
        /// Unit-aligned.
        device: ByteRange,
        /// Within `device`.
        wanted: ByteRange,
    },
    /// Build the ciphertext of `device` from the host's bytes in `wanted` (zeros for WRITE_ZEROES), reading the
    /// partial units at the ends; answer with `prepared`.
    Prepare {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
        /// The host's command.
        command: CommandId,
        /// Unit-aligned.
        device: ByteRange,
        /// Within `device`.
        wanted: ByteRange,
        /// The first unit is partly kept.
        read_head: bool,
        /// The last unit is partly kept.
        read_tail: bool,
    },
    /// Write to home; answer with `written`.
    Write {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
        /// Unit-aligned.
        device: ByteRange,
        /// Ciphertext, or `None` for raw zeros.
        data: Option<Bytes>,
        /// Answer only when the data is on stable media.
        durable: bool,
    },
    /// ZERO_RANGE at home; answer with `written`.
    ZeroRange {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
        /// The host's command.
        command: CommandId,
        /// Unit-aligned.
        device: ByteRange,
    },
    /// fdatasync of home for a host; answer with `flushed`.
    Flush {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
    },
    /// Do what a CACHE or STATUS command asks for; answer with `inquired`.
    Inquire {
        /// Which volume.
        volume: VolumeIndex,
        /// Answered with it.
        step: StepId,
        /// The host's command.
        command: CommandId,
    },
    /// A reserved command's turn has come: take its memory and receive its payload; then `submit_granted`.
    Granted {
        /// The host's command.
        command: CommandId,
    },
    /// Answer the host.
    Reply {
        /// Which volume.
        volume: VolumeIndex,
        /// The host's command.
        command: CommandId,
        /// Its outcome.
        result: HostResult,
    },
    /// A request of the mirror; answer with `io_done`.
    Io {
        /// Answered with it.
        io: IoId,
        /// What to do.
        request: IoRequest,
    },
    /// Open a session to the partner; answer with `dialed` or `dial_failed`.
    Dial,
    /// Send a control frame.
    Send {
        /// On this session.
        session: SessionId,
        /// The frame.
        frame: Bytes,
    },
    /// Send a cut.
    SendCut {
        /// On this session.
        session: SessionId,
        /// Head and payloads, in order.
        chunks: Vec<Bytes>,
    },
    /// Close a session; no more is heard of it.
    CloseSession {
        /// Which.
        session: SessionId,
        /// Told to the peer.
        reason: String,
    },
    /// Hosts may open the volumes.
    Present,
    /// Open the volumes' keys; answer with `unlocked`.
    Unlock,
    /// Hosts must leave and may not come back; the reason is told to those who try.
    Withdraw {
        /// Why.
        reason: String,
    },
    /// A request to a drill's copy was done.
    DrillDone {
        /// Which.
        request: DrillIo,
        /// A read's bytes, or why it failed.
        result: Result<Bytes, HostError>,
    },
    /// The drill is over: its hosts must leave, its scratch space can go.
    DrillEnded {
        /// Why.
        reason: String,
    },
    /// A line for the log.
    Log {
        /// How loud.
        loudness: Loudness,
        /// One line.
        text: String,
    },
}

/// What an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A page of an intent map.
    Intent { volume: VolumeIndex, page: u64, generation: u64 },
    /// The blocks of a copy, read under its lock.
    CopyRead { volume: VolumeIndex, range: ByteRange },
    /// A region read at the primary to compare it.
    CompareRead { request: u64 },
    /// A range read at the primary under its lock, to verify it.
    VerifyRead { request: u64 },
    /// A flush that lets intent bits clear.
    ClearFlush { volume: VolumeIndex, submitted_at: Monotonic },
    /// A part of a read of the target's image.
    ImageRead { read: u64, part: u32 },
    /// A write of a cut of the initial copy to home.
    InitialApply,
    /// A flush of home during the initial copy.
    InitialFlush,
    /// A write of a received cut to home.
    Apply,
    /// A flush of home after applying.
    ApplyFlush,
    /// A cut's bytes read back from redo.
    ApplyRead { number: engine::overlay::CutNumber },
    /// A write to a drill's scratch space.
    DrillWrite { write: u64 },
    /// Cuts written to redo.
    RedoWrite,
    /// Redo made durable.
    RedoSync,
    /// The checkpoint page.
    Checkpoint,
    /// A segment of the spill, written.
    SpillWrite { key: u64 },
    /// A segment of the spill, read.
    SpillRead { key: u64 },
    /// The spill made durable.
    SpillSync,
    /// Room for a volume that grows.
    Grow { volume: VolumeIndex, size: ByteCount },
    /// The new size of a primary's volume.
    Show { volume: VolumeIndex, size: ByteCount },
    /// The group's state.
    PersistState,
    /// A step of a role change.
    Transition,
    /// A flush of home before the role is given up.
    SwitchFlush { volume: VolumeIndex },
    /// The checkpoint that names the tip at which the role is given up.
    SwitchMark,
    /// A range of a fenced side's home, read to find orphans.
    OrphanHome { id: u64 },
    /// The same range of the new primary's home.
    OrphanRead { session: SessionId, id: u64, volume: VolumeIndex, range: ByteRange },
}

/// Effects in order, and the purpose of every unanswered request.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    effects: VecDeque<Effect>,
    pending: BTreeMap<IoId, Purpose>,
    last: u64,
}

impl Outbox {
    pub(super) fn push(&mut self, effect: Effect) {
        self.effects.push_back(effect);
    }

    pub(super) fn io(&mut self, purpose: Purpose, request: IoRequest) -> IoId {
        self.last += 1;
        let io = IoId(self.last);
        self.pending.insert(io, purpose);
        self.effects.push_back(Effect::Io { io, request });
        io
    }

    pub(super) fn log(&mut self, loudness: Loudness, text: String) {
        self.push(Effect::Log { loudness, text });
    }

    pub(super) fn pop(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    pub(super) fn answered(&mut self, io: IoId) -> Option<Purpose> {
        self.pending.remove(&io)
    }

    /// The answers of these requests are not wanted any more: whoever asked is gone.
    pub(super) fn forget(&mut self, unwanted: impl Fn(&Purpose) -> bool) {
        self.pending.retain(|_, purpose| !unwanted(purpose));
    }

    pub(super) fn waits_for(&self, wanted: impl Fn(&Purpose) -> bool) -> bool {
        self.pending.values().any(wanted)
    }
}
