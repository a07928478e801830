//! What the rest of the daemon asks of a shard, and what a shard asks of the rest.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use block::{ByteCount, IopsLimit, VolumeId};
use bytes::Bytes;
use control::{Peer, Side, VolumeAccess};
use crypto::VolumeCipher;
use frontend::nbd::Negotiated;
use protocol::{GroupState, Hello};
use replicator::SessionHandle;
use store::{File, Socket, Waker};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::tls::TlsSession;
use crate::group::{
    CleanState, DrillBegun, GroupVolume, IoFailure, IoId, LossReport, MirrorPolicy, MirrorSettings,
    MirrorSnapshot, OpenedMirror, OrphanProgress, RewindTo, SwitchProgress, VerbRefused, VerifyReport,
    VolumeSnapshot,
};

/// Commands that may wait for a shard; more is a daemon that does not keep up, and the sender waits.
const COMMANDS_MAX: usize = 4096;

/// A group on a shard; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupKey(pub u64);

/// The files and keys of a volume.
pub struct VolumeFiles {
    /// Its identity.
    pub id: VolumeId,
    /// Its name, for metrics.
    pub name: String,
    /// Its home.
    pub home: File,
    /// Its intent map, if it is mirrored.
    pub intent: Option<File>,
    /// `None` while its key is not unwrapped: a secondary's.
    pub cipher: Option<Arc<VolumeCipher>>,
}

/// A host's connection, as its handshake leaves it.
pub struct HostConnection {
    /// The socket.
    pub socket: Socket,
    /// TLS over it; none in clear text. All its plaintext was read.
    pub tls: Option<Box<TlsSession>>,
    /// Its host.
    pub peer: Peer,
    /// What was agreed on.
    pub negotiated: Negotiated,
    /// Bytes received behind the handshake, as plaintext.
    pub early: Bytes,
    /// Its place among the connections that a site may have; free again when the connection is gone.
    pub place: OwnedSemaphorePermit,
}

/// The files of a mirror's redo log and spill.
#[derive(Clone)]
pub struct RedoFiles {
    /// Segment files in the order of their index.
    pub segments: Vec<File>,
    /// The two checkpoint slots.
    pub checkpoint: File,
    /// The spill file, if there is one.
    pub spill: Option<File>,
}

/// What a new group starts as.
pub enum GroupStart {
    /// Volumes without a mirror.
    Alone(Vec<GroupVolume>),
    /// A mirrored group.
    Mirrored(Box<MirroredStart>),
}

/// A mirrored group's start.
pub struct MirroredStart {
    /// Its settings.
    pub settings: MirrorSettings,
    /// Its durable state.
    pub state: GroupState,
    /// What was read from its files.
    pub opened: OpenedMirror,
    /// Its redo log's files.
    pub redo: RedoFiles,
}

/// A drill and the group that serves its copy.
pub struct DrillStart {
    /// The copy's group.
    pub drill: GroupKey,
    /// The copy's volumes, in index order: home is the scratch file.
    pub files: Vec<VolumeFiles>,
    /// The same; their sizes become those at the drill's point.
    pub volumes: Vec<GroupVolume>,
    /// See [`crate::group::Group::start_drill`].
    pub at: Option<RewindTo>,
    /// See there.
    pub scratch_bytes_max: u64,
}

/// What an operator may do with a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Stop mirroring.
    Stop,
    /// Go on; with `local` a restarted primary opens without its partner.
    Start {
        /// See [`crate::group::Group::start`].
        local: bool,
    },
    /// Say what a failover to this point would lose.
    Loss {
        /// See [`crate::group::Group::loss`].
        at: Option<RewindTo>,
    },
    /// End the drill.
    StopDrill,
    /// Promote this side.
    Failover {
        /// See [`crate::group::Group::failover`].
        at: Option<RewindTo>,
    },
    /// Compare the target's image with this side's.
    Verify {
        /// See [`crate::group::Group::verify`].
        repair_from: Option<Side>,
    },
    /// Give the role to the partner.
    Switch,
    /// Do from now on what an operator wants of the mirror.
    Policy(MirrorPolicy),
    /// Find the writes that the new primary never had.
    Orphans,
    /// Let a volume grow.
    Grow {
        /// Which volume.
        volume: block::VolumeIndex,
        /// Its new size.
        size: ByteCount,
    },
    /// Give a growth up that takes too long.
    GiveUpGrowth,
}

/// A group as operators see it.
pub struct GroupSnapshot {
    /// Hosts are served; else why not.
    pub presented: Result<(), String>,
    /// In index order.
    pub volumes: Vec<VolumeSnapshot>,
    /// Open connections, by volume index.
    pub connections: Vec<usize>,
    /// The mirror.
    pub mirror: Option<MirrorSnapshot>,
    /// Its durable state.
    pub state: Option<GroupState>,
    /// What its verify has found.
    pub verify: Option<VerifyReport>,
    /// How far the last switch that was ordered here is.
    pub switch: SwitchProgress,
}

/// The outcome of a verb.
pub type VerbResult = Result<Option<LossReport>, VerbRefused>;

/// A request to a shard.
pub enum ShardCommand {
    /// Serve a group.
    Add {
        /// Its key.
        key: GroupKey,
        /// Its volumes' files, in index order.
        files: Vec<VolumeFiles>,
        /// What it starts as.
        start: GroupStart,
    },
    /// Stop serving a group; answered when its last operation ended.
    Remove {
        /// Which.
        key: GroupKey,
        /// Told when it is gone.
        done: oneshot::Sender<()>,
    },
    /// Make a group the primary of a new mirror.
    Attach {
        /// Which.
        key: GroupKey,
        /// The volumes' intent files, in index order.
        intents: Vec<File>,
        /// The mirror.
        start: Box<MirroredStart>,
    },
    /// Take a group's mirror away.
    Detach {
        /// Which.
        key: GroupKey,
    },
    /// A volume's key was unwrapped.
    Unlock {
        /// Which group.
        key: GroupKey,
        /// In index order.
        ciphers: Vec<Arc<VolumeCipher>>,
    },
    /// The keys of a group's volumes are to be forgotten, and its hosts' connections closed. What needs a key fails from here
    /// on; mirroring goes on without.
    Lock {
        /// Which group.
        key: GroupKey,
        /// Why.
        reason: String,
    },
    /// The keys that a group asked for are open, behind [`Self::Unlock`], or why not.
    Unlocked {
        /// Which group.
        key: GroupKey,
        /// The outcome.
        result: Result<(), String>,
    },
    /// A host's connection after its handshake.
    Connect {
        /// Which group.
        key: GroupKey,
        /// Which volume of it.
        volume: VolumeId,
        /// The connection.
        connection: Box<HostConnection>,
    },
    /// Who may open a volume has changed: connections whose hosts lost what they have are closed.
    Access {
        /// Which group.
        key: GroupKey,
        /// Which volume of it.
        volume: VolumeId,
        /// Who may open it now.
        access: VolumeAccess,
    },
    /// A volume has grown; its file has already.
    Resize {
        /// Which group.
        key: GroupKey,
        /// Which volume of it.
        volume: VolumeId,
        /// Its size now.
        size: ByteCount,
        /// Its limit at this size.
        limit: IopsLimit,
    },
    /// The session that a group asked for.
    Dialed {
        /// Which group.
        key: GroupKey,
        /// The session, or why there is none.
        session: Result<SessionHandle, String>,
    },
    /// The partner's session, with its hello.
    Greeted {
        /// Which group.
        key: GroupKey,
        /// The session.
        session: SessionHandle,
        /// Its hello.
        hello: Hello,
    },
    /// The group's state was stored, or not.
    Persisted {
        /// Which group.
        key: GroupKey,
        /// What asked for it.
        io: IoId,
        /// The outcome.
        result: Result<(), IoFailure>,
    },
    /// A verb.
    Verb {
        /// Which group.
        key: GroupKey,
        /// What to do.
        verb: Verb,
        /// The outcome.
        done: oneshot::Sender<VerbResult>,
    },
    /// Begin a drill of a mirrored group.
    StartDrill {
        /// Which.
        key: GroupKey,
        /// The drill.
        start: Box<DrillStart>,
        /// The outcome.
        done: oneshot::Sender<Result<DrillBegun, VerbRefused>>,
    },
    /// How is a group?
    Snapshot {
        /// Which.
        key: GroupKey,
        /// The answer; dropped if the group is unknown.
        done: oneshot::Sender<GroupSnapshot>,
    },
    /// What did the search for orphans find?
    OrphanProgress {
        /// Which group.
        key: GroupKey,
        /// The answer; dropped if the group is unknown.
        done: oneshot::Sender<OrphanProgress>,
    },
    /// Stop serving hosts; answered when everything in flight ended, with each primary's clean state.
    Drain {
        /// The answer.
        done: oneshot::Sender<Vec<(GroupKey, Option<CleanState>)>>,
    },
    /// End the thread.
    Stop,
}

/// What a shard tells the daemon.
pub enum ShardNews {
    /// Open a session to the group's partner.
    Dial(GroupKey),
    /// Store the group's state, then answer with [`ShardCommand::Persisted`].
    Persist {
        /// Which group.
        key: GroupKey,
        /// To be carried back.
        io: IoId,
        /// What to store.
        state: Box<GroupState>,
    },
    /// Open the keys of the group's volumes, then answer with [`ShardCommand::Unlocked`].
    Unlock(GroupKey),
    /// Make room for a volume, then answer with [`ShardCommand::Persisted`].
    Grow {
        /// Which group.
        key: GroupKey,
        /// To be carried back.
        io: IoId,
        /// Which volume of it.
        volume: VolumeId,
        /// The room wanted.
        size: ByteCount,
        /// It is to be the volume's size: store it, and send [`ShardCommand::Resize`] before the answer.
        stored: bool,
    },
    /// Hosts may open the group's volumes.
    Presented(GroupKey),
    /// Hosts may not, for this reason.
    Withdrawn(GroupKey, String),
    /// The drill of the group is over: its copy has no hosts any more.
    DrillEnded {
        /// The mirrored group.
        key: GroupKey,
        /// Why.
        reason: String,
    },
}

/// The way to a shard.
#[derive(Clone)]
pub struct ShardHandle {
    sender: SyncSender<ShardCommand>,
    waker: Waker,
}

impl ShardHandle {
    /// A handle and the shard's end of its queue.
    pub(super) fn pair(waker: Waker) -> (Self, Receiver<ShardCommand>) {
        let (sender, receiver) = sync_channel(COMMANDS_MAX);
        (Self { sender, waker }, receiver)
    }

    /// Queues a command and wakes the shard. False if the shard has ended. Waits only while the queue is full.
    pub fn send(&self, command: ShardCommand) -> bool {
        let sent = match self.sender.try_send(command) {
            Ok(()) => true,
            Err(TrySendError::Full(command)) => {
                self.waker.wake();
                self.sender.send(command).is_ok()
            }
            Err(TrySendError::Disconnected(_)) => false,
        };
        self.waker.wake();
        sent
    }
}
