//! Shards: one thread each, with one io_uring that carries sockets and disk.
//!
//! A shard runs the pure machines (NBD sessions, groups) and performs their effects; it decides nothing itself. A
//! group and everything of it lives on one shard, so the data path has no locks. It sleeps when there is nothing to do.

mod clock;
mod closing;
mod command;
mod connection;
mod datapath;
mod drill;
mod holes;
mod memory;
mod meters;
mod mirror_io;
mod output;
mod requests;
mod sealing;
mod secured;
mod stalled;
mod syncs;
mod tls;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use block::{Monotonic, VolumeId, VolumeIndex, WallTime};
use bytes::Bytes;
use engine::CommandId;
use replicator::Wake;
use slab::Slab;
use store::{Buffer, BufferPool, Completion, File, Operation, Ring, Token, Waker};
use tokio::sync::{mpsc, oneshot};

use crate::group::{CleanState, Group};

pub use clock::{monotonic, wall};
pub use command::{
    DrillStart, GroupKey, GroupSnapshot, GroupStart, HostConnection, MirroredStart, RedoFiles, ShardCommand,
    ShardHandle, ShardNews, Verb, VerbResult, VolumeFiles,
};
pub use tls::{Progress, TlsError, TlsSession};

use connection::{Connection, ConnectionId};
use datapath::{Ended, Pending};
use drill::DrillBuffers;
use memory::RequestMemory;
use meters::VolumeMeters;
use mirror_io::Link;
use requests::Requests;
use sealing::{Sealing, TURN_BYTES};
use syncs::Syncs;

/// Submissions that one system call takes to the kernel.
const RING_ENTRIES: u32 = 1024;
/// The longest write of raw zeros at once: a step's length.
const ZEROS_BYTES: usize = 1 << 20;
/// Rounds of sealing and effects in one turn; a command needs two or three.
const ROUNDS_MAX: usize = 8;
/// A shard that was idle for so long gives resting memory back to the system.
const IDLE_TRIM: Duration = Duration::from_secs(2);
/// Once its groups are drained a shard waits so long for hosts to read their last replies.
const LAST_REPLIES: Duration = Duration::from_secs(3);
/// A shard without work and timers wakes up this often, to notice a clock that was wrong.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// One volume of a group on this shard.
struct ServedVolume {
    files: VolumeFiles,
    meters: VolumeMeters,
    /// Of its home, if that is in the page cache.
    syncs: Syncs<Ended>,
}

/// What hosts may hold of a shard.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// Memory of requests on their way.
    pub receive_bytes: usize,
    /// How long one may hold some that others wait for, without moving bytes.
    pub stall: Duration,
}

/// A group on this shard.
struct Served {
    group: Group,
    volumes: Vec<ServedVolume>,
    redo: Option<RedoFiles>,
    /// Of a drill of this group, by volume.
    scratch: Vec<File>,
    /// This group is the copy of that group's drill.
    drill_of: Option<GroupKey>,
    links: BTreeMap<u64, Link>,
    connections: BTreeSet<ConnectionId>,
    timer: Option<Monotonic>,
    /// Storage operations on their way.
    outstanding: usize,
    removing: Option<oneshot::Sender<()>>,
}

/// A drain that waits for its groups.
struct Draining {
    done: oneshot::Sender<Vec<(GroupKey, Option<CleanState>)>>,
    /// From when on no host is waited for, once the groups are drained.
    replies_until: Option<Monotonic>,
}

/// Sessions that have something for their group; rung from tokio's threads.
#[derive(Clone)]
struct Bell {
    rung: Arc<Mutex<BTreeSet<GroupKey>>>,
    waker: Waker,
}

impl Bell {
    fn wake_for(&self, key: GroupKey) -> Wake {
        let bell = self.clone();
        Arc::new(move || {
            bell.rung.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
            bell.waker.wake();
        })
    }

    fn take(&self) -> BTreeSet<GroupKey> {
        std::mem::take(&mut *self.rung.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The thread's state.
struct Shard {
    ring: Ring,
    pool: BufferPool,
    pending: Slab<Pending>,
    groups: BTreeMap<GroupKey, Served>,
    connections: Slab<Connection>,
    requests: Requests,
    memory: RequestMemory,
    limits: HostLimits,
    /// Requests whose connection is gone.
    forgotten: Vec<CommandId>,
    /// Groups whose effects must be polled.
    touched: BTreeSet<GroupKey>,
    timers: BTreeSet<(Monotonic, GroupKey)>,
    /// Connections with replies to send.
    flushing: BTreeSet<ConnectionId>,
    /// When those whose memory others wait for are looked at next.
    stall_check_at: Option<Monotonic>,
    /// What connections through TLS received, and that is not opened yet, with its length.
    opening: VecDeque<(ConnectionId, Buffer, usize)>,
    /// The connection whose replies were sealed last.
    sealed_last: ConnectionId,
    /// Bytes that this turn may still seal and open.
    budget: usize,
    sealing: Sealing,
    zeros: Bytes,
    drill_buffers: DrillBuffers,
    bell: Bell,
    commands: Receiver<ShardCommand>,
    news: mpsc::UnboundedSender<(usize, ShardNews)>,
    index: usize,
    draining: Option<Draining>,
    stopping: bool,
    /// The clocks at the beginning of this turn.
    now: Monotonic,
    wall: WallTime,
}

/// Starts shard `index`; its news carry the index.
///
/// # Errors
/// If the kernel offers no io_uring or no thread.
pub fn start(
    index: usize,
    limits: HostLimits,
    news: mpsc::UnboundedSender<(usize, ShardNews)>,
) -> io::Result<(ShardHandle, JoinHandle<()>)> {
    let waker = Waker::new()?;
    let (handle, commands) = ShardHandle::pair(waker.clone());
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("shard-{index}")).spawn(move || {
        match Ring::with_waker(RING_ENTRIES, waker.clone()) {
            Ok(ring) => {
                let _ = ready.send(None);
                Shard::new(index, ring, waker, limits, commands, news).run();
            }
            Err(error) => {
                let _ = ready.send(Some(io::Error::other(error)));
            }
        }
    })?;
    match started.recv() {
        Ok(None) => Ok((handle, thread)),
        Ok(Some(error)) => Err(error),
        Err(_) => Err(io::Error::other("the shard's thread ended at once")),
    }
}

impl Shard {
    fn new(
        index: usize,
        ring: Ring,
        waker: Waker,
        limits: HostLimits,
        commands: Receiver<ShardCommand>,
        news: mpsc::UnboundedSender<(usize, ShardNews)>,
    ) -> Self {
        let pool = BufferPool::new(limits.receive_bytes);
        let mut zeros = pool.take_over(ZEROS_BYTES);
        zeros.fill(0);
        Self {
            ring,
            pool,
            pending: Slab::new(),
            groups: BTreeMap::new(),
            connections: Slab::new(),
            requests: Requests::default(),
            memory: RequestMemory::new(limits.receive_bytes),
            limits,
            forgotten: Vec::new(),
            touched: BTreeSet::new(),
            timers: BTreeSet::new(),
            flushing: BTreeSet::new(),
            stall_check_at: None,
            opening: VecDeque::new(),
            sealed_last: ConnectionId(0),
            budget: TURN_BYTES,
            sealing: Sealing::default(),
            zeros: zeros.freeze(),
            drill_buffers: DrillBuffers::new(),
            bell: Bell { rung: Arc::default(), waker },
            commands,
            news,
            index,
            draining: None,
            stopping: false,
            now: monotonic(),
            wall: wall(),
        }
    }

    /// Turns until it is told to stop.
    fn run(mut self) {
        let mut completions: Vec<Completion> = Vec::with_capacity(256);
        // When the shard last had something to do, until its resting memory was given back.
        let mut busy_at = Some(self.now);
        while !self.stopping {
            let rest = if busy_at.is_some() { IDLE_TRIM } else { SLEEP_MAX };
            let timeout = self.timeout().min(rest);
            match self.ring.wait(Some(timeout), &mut completions) {
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(shard = self.index, %error, "io_uring failed: the shard stops");
                    return;
                }
            }
            self.read_clocks();
            if !completions.is_empty() {
                busy_at = Some(self.now);
            } else if busy_at.take_if(|at| self.now.since(*at) >= IDLE_TRIM).is_some() {
                self.pool.trim();
                self.ring.rest();
            }
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            self.take_commands();
            for key in self.bell.take() {
                self.pump_links(key);
            }
            self.fire_timers();
            self.open_received();
            self.work();
            if !self.forgotten.is_empty() {
                self.drop_forgotten();
            }
            self.feed_starved();
            self.end_stalled();
            self.send_replies();
            self.finish_draining();
        }
    }

    /// Seals and opens, and performs the effects of the groups that something happened to, until neither leads to more
    /// of the other: what a write's payload or a read's data leads to reaches the kernel with one system call.
    fn work(&mut self) {
        for _ in 0..ROUNDS_MAX {
            self.work_sealing();
            self.turn_groups();
            if self.touched.is_empty() && (self.sealing.is_empty() || self.budget == 0) {
                return;
            }
        }
    }

    fn timeout(&self) -> Duration {
        let fed = !self.memory.has_news();
        let idle = self.sealing.is_empty() && self.opening.is_empty() && fed;
        if !idle || !self.touched.is_empty() || !self.flushing.is_empty() {
            return Duration::ZERO;
        }
        let timer = self.timers.first().map(|(at, _)| *at);
        let replies = self.draining.as_ref().and_then(|draining| draining.replies_until);
        let next = [timer, self.stall_check_at, replies].into_iter().flatten().min();
        next.map_or(SLEEP_MAX, |at| at.since(monotonic()).min(SLEEP_MAX))
    }

    /// The clocks are read once a turn: everything in it happens at that time.
    fn read_clocks(&mut self) {
        self.now = monotonic();
        self.wall = wall();
        self.budget = TURN_BYTES;
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.command(command);
        }
    }

    fn fire_timers(&mut self) {
        let now = self.now;
        while let Some((at, key)) = self.timers.first().copied() {
            if at > now {
                return;
            }
            self.timers.pop_first();
            if let Some(served) = self.groups.get_mut(&key) {
                served.timer = None;
                served.group.set_clocks(now, self.wall);
                served.group.handle_time();
                self.touched.insert(key);
            }
        }
    }

    /// Performs the effects of every group that something happened to.
    fn turn_groups(&mut self) {
        // A turn may touch further groups, or the same one again: those wait for the next round.
        for key in std::mem::take(&mut self.touched) {
            self.turn_group(key);
        }
    }

    fn turn_group(&mut self, key: GroupKey) {
        self.pump_links(key);
        let now = self.now;
        if let Some(served) = self.groups.get_mut(&key) {
            served.group.set_clocks(now, self.wall);
        }
        while let Some(effect) = self.groups.get_mut(&key).and_then(|served| served.group.poll_effect()) {
            self.perform(key, effect);
        }
        let Some(served) = self.groups.get_mut(&key) else {
            return;
        };
        let next = served.group.poll_timeout();
        if next != served.timer {
            if let Some(old) = served.timer {
                self.timers.remove(&(old, key));
            }
            served.timer = next;
            self.timers.extend(next.map(|at| (at, key)));
        }
        self.finish_removal(key);
    }

    fn finish_removal(&mut self, key: GroupKey) {
        let Some(served) = self.groups.get(&key) else {
            return;
        };
        if served.removing.is_none() {
            return;
        }
        if !served.group.is_drained() || served.outstanding > 0 || !served.connections.is_empty() {
            return;
        }
        if let Some(mut served) = self.groups.remove(&key) {
            if let Some(timer) = served.timer {
                self.timers.remove(&(timer, key));
            }
            if let Some(done) = served.removing.take() {
                let _ = done.send(());
            }
        }
    }

    fn submit(&mut self, pending: Pending, operation: Operation) {
        let token = self.pending.insert(pending);
        self.ring.submit(Token(u64::try_from(token).unwrap_or(u64::MAX)), operation);
    }

    fn tell(&self, news: ShardNews) {
        // The receiver outlives the shards; a daemon that is gone needs no news.
        let _ = self.news.send((self.index, news));
    }

    fn command(&mut self, command: ShardCommand) {
        match command {
            ShardCommand::Add { key, files, start } => self.add(key, files, start),
            ShardCommand::Remove { key, done } => self.remove(key, done),
            ShardCommand::Attach { key, intents, start } => self.attach(key, intents, *start),
            ShardCommand::Detach { key } => self.with_group(key, |served, now| {
                served.group.detach(now);
                served.redo = None;
                served.volumes.iter_mut().for_each(|volume| volume.files.intent = None);
            }),
            ShardCommand::Unlock { key, ciphers } => self.with_group(key, |served, _| {
                for (volume, cipher) in served.volumes.iter_mut().zip(ciphers) {
                    volume.files.cipher = Some(cipher);
                }
            }),
            ShardCommand::Unlocked { key, result } => {
                self.with_group(key, |served, _| served.group.unlocked(result));
            }
            ShardCommand::Connect { key, volume, connection } => self.connect(key, volume, *connection),
            ShardCommand::Access { key, volume, access } => self.apply_access(key, volume, &access),
            ShardCommand::Resize { key, volume, size, limit } => {
                if let Some(index) = self.volume_index(key, volume) {
                    self.with_group(key, |served, _| served.group.resize(index, size, limit));
                }
            }
            ShardCommand::Dialed { key, session } => self.dialed(key, session),
            ShardCommand::Greeted { key, session, hello } => self.greeted(key, session, hello),
            ShardCommand::Persisted { key, io, result } => {
                self.with_group(key, |served, _| served.group.io_done(io, result.map(|()| Bytes::new())));
            }
            ShardCommand::StartDrill { key, start, done } => self.start_drill(key, *start, done),
            ShardCommand::Verb { key, verb, done } => self.verb(key, verb, done),
            ShardCommand::Snapshot { key, done } => self.snapshot(key, done),
            ShardCommand::OrphanProgress { key, done } => self.with_group(key, |served, _| {
                let _ = done.send(served.group.orphan_progress());
            }),
            ShardCommand::Drain { done } => self.drain(done),
            ShardCommand::Stop => self.stopping = true,
        }
    }

    /// Calls a group with the clocks set, and has its effects performed.
    fn with_group(&mut self, key: GroupKey, call: impl FnOnce(&mut Served, Monotonic)) {
        let now = self.now;
        if let Some(served) = self.groups.get_mut(&key) {
            served.group.set_clocks(now, self.wall);
            call(served, now);
            self.touched.insert(key);
        }
    }

    fn add(&mut self, key: GroupKey, files: Vec<VolumeFiles>, start: GroupStart) {
        let now = self.now;
        let (group, redo) = match start {
            GroupStart::Alone(volumes) => (Group::alone(&volumes, now), None),
            GroupStart::Mirrored(start) => {
                let MirroredStart { settings, state, opened, redo } = *start;
                (Group::open(settings, state, opened, now), Some(redo))
            }
        };
        if group.is_presented() {
            self.tell(ShardNews::Presented(key));
        } else {
            self.tell(ShardNews::Withdrawn(key, group.withdrawn_because().to_owned()));
        }
        let volumes = files
            .into_iter()
            .map(|files| {
                let meters = VolumeMeters::new(&files.name);
                ServedVolume { files, meters, syncs: Syncs::default() }
            })
            .collect();
        let served = Served {
            group,
            volumes,
            redo,
            scratch: Vec::new(),
            drill_of: None,
            links: BTreeMap::new(),
            connections: BTreeSet::new(),
            timer: None,
            outstanding: 0,
            removing: None,
        };
        let replaced = self.groups.insert(key, served);
        assert!(replaced.is_none(), "a group key is used once");
        self.touched.insert(key);
    }

    fn attach(&mut self, key: GroupKey, intents: Vec<store::File>, start: MirroredStart) {
        self.with_group(key, |served, now| {
            for (volume, intent) in served.volumes.iter_mut().zip(intents) {
                volume.files.intent = Some(intent);
            }
            served.redo = Some(start.redo);
            served.group.attach(start.settings, start.state, start.opened, now);
        });
    }

    fn remove(&mut self, key: GroupKey, done: oneshot::Sender<()>) {
        self.with_group(key, |served, _| {
            served.group.drain();
            served.removing = Some(done);
        });
        self.close_connections(key, "the volume was deleted");
    }

    fn verb(&mut self, key: GroupKey, verb: Verb, done: oneshot::Sender<command::VerbResult>) {
        self.with_group(key, |served, _| {
            let result = match verb {
                Verb::Stop => served.group.stop().map(|()| None),
                Verb::Start { local } => served.group.start(local).map(|()| None),
                Verb::StopDrill => served.group.stop_drill().map(|()| None),
                Verb::Loss { at } => served.group.loss(at).map(Some),
                Verb::Failover { at } => served.group.failover(at).map(Some),
                Verb::Verify { repair_from } => served.group.verify(repair_from).map(|()| None),
                Verb::Switch => served.group.switch().map(|()| None),
                Verb::Policy(policy) => served.group.set_policy(policy).map(|()| None),
                Verb::Orphans => served.group.search_orphans().map(|()| None),
                Verb::Grow { volume, size } => served.group.grow(volume, size).map(|()| None),
                Verb::GiveUpGrowth => {
                    served.group.give_up_growth();
                    Ok(None)
                }
            };
            let _ = done.send(result);
        });
    }

    fn snapshot(&mut self, key: GroupKey, done: oneshot::Sender<GroupSnapshot>) {
        let mut connections = BTreeMap::<VolumeIndex, usize>::new();
        let Some(served) = self.groups.get_mut(&key) else {
            return;
        };
        for id in &served.connections {
            if let Some(connection) = self.connections.get(id.0) {
                *connections.entry(connection.volume).or_default() += 1;
            }
        }
        served.group.set_clocks(self.now, self.wall);
        let volumes = served.group.volume_snapshots();
        for (slot, counters) in served.volumes.iter().zip(&volumes) {
            slot.meters.throttled(counters.throttled);
        }
        let presented = match served.group.is_presented() {
            true => Ok(()),
            false => Err(served.group.withdrawn_because().to_owned()),
        };
        let count = |index: usize| {
            let index = u16::try_from(index).ok().map(VolumeIndex);
            index.and_then(|index| connections.get(&index).copied()).unwrap_or(0)
        };
        let _ = done.send(GroupSnapshot {
            presented,
            connections: (0..volumes.len()).map(count).collect(),
            volumes,
            mirror: served.group.mirror_snapshot(),
            state: served.group.mirror_state().cloned(),
            verify: served.group.verify_report().cloned(),
            switch: served.group.switch_progress(),
        });
    }

    fn drain(&mut self, done: oneshot::Sender<Vec<(GroupKey, Option<CleanState>)>>) {
        let now = self.now;
        for (key, served) in &mut self.groups {
            served.group.set_clocks(now, self.wall);
            served.group.drain();
            self.touched.insert(*key);
        }
        self.draining = Some(Draining { done, replies_until: None });
        self.turn_groups();
    }

    /// Tells of the groups when they are drained, and hosts have their last replies, if they take them.
    fn finish_draining(&mut self) {
        let Some(draining) = &mut self.draining else {
            return;
        };
        let drained = self.groups.values().all(|served| served.group.is_drained() && served.outstanding == 0);
        if !drained {
            return;
        }
        let until = *draining.replies_until.get_or_insert(self.now + LAST_REPLIES);
        let flushed = self.connections.iter().all(|(_, connection)| connection.is_flushed());
        if self.now < until && (!self.flushing.is_empty() || !flushed) {
            return;
        }
        if let Some(Draining { done, .. }) = self.draining.take() {
            let states = self.groups.iter_mut().map(|(key, served)| (*key, served.group.clean_state()));
            let _ = done.send(states.collect());
        }
    }

    fn volume_index(&self, key: GroupKey, id: VolumeId) -> Option<VolumeIndex> {
        let served = self.groups.get(&key)?;
        let place = served.volumes.iter().position(|volume| volume.files.id == id)?;
        u16::try_from(place).ok().map(VolumeIndex)
    }
}
