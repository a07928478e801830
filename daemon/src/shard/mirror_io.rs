//! A group's mirror: its storage requests and its sessions.

use std::collections::VecDeque;
use std::io;

use block::{ByteCount, ByteRange, VolumeIndex};
use bytes::Bytes;
use protocol::{Hello, Message};
use replicator::{Refusal, SessionEvent, SessionHandle};
use store::{File, Operation, Payload, Returned};

use super::datapath::Pending;
use super::{GroupKey, Shard, ShardNews};
use crate::group::{IoFailure, IoId, IoRequest, SessionId};

/// errno of an operation that a file system does not know.
const EOPNOTSUPP: i32 = 95;
/// Frames or cuts that may wait for a session that is slow to take them; the group's own windows are far below.
const OUTGOING_MAX: usize = 1024;

/// What a request's completion means.
#[derive(Clone, Copy, Debug)]
pub(super) enum IoTarget {
    /// The bytes read are the answer.
    Read { operation: &'static str },
    /// Done or failed.
    Done { operation: &'static str },
    /// ZERO_RANGE that may have to be written instead.
    Zero { volume: VolumeIndex, range: ByteRange },
}

enum Outgoing {
    Frame(Bytes),
    Cut(Vec<Bytes>),
}

/// A session of a group.
pub(super) struct Link {
    handle: SessionHandle,
    outgoing: VecDeque<Outgoing>,
    closing: bool,
}

impl Shard {
    pub(super) fn perform_io(&mut self, key: GroupKey, io: IoId, request: IoRequest) {
        match request {
            IoRequest::HomeRead { volume, range } => {
                let target = IoTarget::Read { operation: "reading a volume" };
                self.read(Pending::Io { key, io, target }, key, volume, range);
            }
            IoRequest::HomeWrite { volume, offset, data } => {
                let target = IoTarget::Done { operation: "writing a volume" };
                let data = Payload::One(self.aligned(data));
                self.write(Pending::Io { key, io, target }, key, volume, offset, data, false);
            }
            IoRequest::HomeZero { volume, range, trim } => self.zero_home(key, io, volume, range, trim),
            IoRequest::HomeFlush { volume } => {
                let target = IoTarget::Done { operation: "flushing a volume" };
                self.flush_home(key, volume, Pending::Io { key, io, target });
            }
            IoRequest::IntentWrite { volume, offset, page } => {
                let served = self.groups.get(&key);
                let file =
                    served.and_then(|served| served.volumes.get(usize::from(volume.0))?.files.intent.clone());
                self.write_file(key, io, file, "writing an intent map", offset, page, true);
            }
            IoRequest::RedoWrite { file, offset, data } => {
                let file = self.segment(key, file);
                self.write_file(key, io, file, "writing redo", offset, data, false);
            }
            IoRequest::RedoSync { file } => match self.segment(key, file) {
                Some(file) => {
                    let target = IoTarget::Done { operation: "flushing redo" };
                    self.count(key, 1);
                    self.submit(Pending::Io { key, io, target }, Operation::Fdatasync { file });
                }
                None => self.no_file(key, io, "flushing redo"),
            },
            IoRequest::RedoRead { file, offset, length } => {
                let file = self.segment(key, file);
                self.read_file(key, io, file, "reading redo", offset, length);
            }
            IoRequest::ScratchRead { volume, range } => {
                let file = self.scratch(key, volume);
                self.read_file(key, io, file, "reading a drill's scratch", range.offset(), range.length());
            }
            IoRequest::ScratchWrite { volume, offset, data } => {
                let file = self.scratch(key, volume);
                self.write_file(key, io, file, "writing a drill's scratch", offset, data, false);
            }
            IoRequest::CheckpointWrite { slot, page } => {
                let file =
                    self.groups.get(&key).and_then(|served| Some(served.redo.as_ref()?.checkpoint.clone()));
                let offset = slot * u64::try_from(page.len()).unwrap_or(0);
                self.write_file(key, io, file, "writing the redo checkpoint", offset, page, true);
            }
            IoRequest::SpillWrite { offset, data } => self.write_spill(key, io, offset, data),
            IoRequest::SpillRead { offset, length } => {
                let file = self.spill_file(key);
                self.read_file(key, io, file, "reading the spill file", offset, length);
            }
            IoRequest::SpillSync => match self.spill_file(key) {
                Some(file) => {
                    let target = IoTarget::Done { operation: "flushing the spill file" };
                    self.count(key, 1);
                    self.submit(Pending::Io { key, io, target }, Operation::Fdatasync { file });
                }
                None => self.no_file(key, io, "flushing the spill file"),
            },
            IoRequest::Grow { volume, size } => self.grow(key, io, volume, size, false),
            IoRequest::Resize { volume, size } => self.grow(key, io, volume, size, true),
            IoRequest::Persist(state) => self.tell(ShardNews::Persist { key, io, state }),
        }
    }

    /// Files grow, and sizes are stored, on threads that may wait.
    fn grow(&mut self, key: GroupKey, io: IoId, volume: VolumeIndex, size: ByteCount, stored: bool) {
        let served = self.groups.get(&key).and_then(|served| served.volumes.get(usize::from(volume.0)));
        match served.map(|served| served.files.id) {
            Some(volume) => self.tell(ShardNews::Grow { key, io, volume, size, stored }),
            None => self.no_file(key, io, "growing a volume"),
        }
    }

    fn segment(&self, key: GroupKey, file: u32) -> Option<File> {
        let redo = self.groups.get(&key)?.redo.as_ref()?;
        redo.segments.get(usize::try_from(file).ok()?).cloned()
    }

    fn spill_file(&self, key: GroupKey) -> Option<File> {
        self.groups.get(&key)?.redo.as_ref()?.spill.clone()
    }

    /// The pieces of a segment are written from where they are.
    fn write_spill(&mut self, key: GroupKey, io: IoId, offset: u64, data: Vec<Bytes>) {
        let operation = "writing the spill file";
        let Some(file) = self.spill_file(key) else {
            return self.no_file(key, io, operation);
        };
        let data = Payload::Many(data.into_iter().map(|piece| self.aligned(piece)).collect());
        self.count(key, 1);
        let pending = Pending::Io { key, io, target: IoTarget::Done { operation } };
        self.submit(pending, Operation::Write { file, offset, data, durable: false });
    }

    fn no_file(&mut self, key: GroupKey, io: IoId, operation: &'static str) {
        let failure = IoFailure { operation, errno: 0 };
        self.with_group(key, |served, _| served.group.io_done(io, Err(failure)));
    }

    #[expect(clippy::too_many_arguments, reason = "one write and whom to tell")]
    fn write_file(
        &mut self,
        key: GroupKey,
        io: IoId,
        file: Option<File>,
        operation: &'static str,
        offset: u64,
        data: Bytes,
        durable: bool,
    ) {
        let Some(file) = file else {
            return self.no_file(key, io, operation);
        };
        let data = Payload::One(self.aligned(data));
        self.count(key, 1);
        let pending = Pending::Io { key, io, target: IoTarget::Done { operation } };
        self.submit(pending, Operation::Write { file, offset, data, durable });
    }

    fn read_file(
        &mut self,
        key: GroupKey,
        io: IoId,
        file: Option<File>,
        operation: &'static str,
        offset: u64,
        length: u64,
    ) {
        let (Some(file), Ok(length)) = (file, usize::try_from(length)) else {
            return self.no_file(key, io, operation);
        };
        let buffer = self.pool.take_over(length);
        self.count(key, 1);
        let pending = Pending::Io { key, io, target: IoTarget::Read { operation } };
        self.submit(pending, Operation::Read { file, offset, buffer, range: 0..length });
    }

    fn zero_home(&mut self, key: GroupKey, io: IoId, volume: VolumeIndex, range: ByteRange, trim: bool) {
        if trim {
            let target = IoTarget::Zero { volume, range };
            let (offset, length) = (range.offset(), range.length());
            return self.on_home(key, volume, Pending::Io { key, io, target }, |file| Operation::ZeroRange {
                file,
                offset,
                length,
            });
        }
        let zeros = self.zeros(range.length());
        let target = IoTarget::Done { operation: "writing zeros to a volume" };
        self.write(Pending::Io { key, io, target }, key, volume, range.offset(), zeros, false);
    }

    pub(super) fn io_complete(
        &mut self,
        key: GroupKey,
        io: IoId,
        target: IoTarget,
        result: io::Result<usize>,
        returned: Returned,
    ) {
        let errno = result.as_ref().err().map(|error| error.raw_os_error().unwrap_or(0));
        let answer = match (target, errno) {
            (IoTarget::Read { .. }, None) => {
                Ok(returned.into_buffer().map(store::Buffer::freeze).unwrap_or_default())
            }
            (IoTarget::Done { .. } | IoTarget::Zero { .. }, None) => Ok(Bytes::new()),
            (IoTarget::Zero { volume, range }, Some(EOPNOTSUPP)) => {
                return self.zero_home(key, io, volume, range, false);
            }
            (IoTarget::Read { operation } | IoTarget::Done { operation }, Some(errno)) => {
                Err(IoFailure { operation, errno })
            }
            (IoTarget::Zero { .. }, Some(errno)) => Err(IoFailure { operation: "zeroing a volume", errno }),
        };
        self.with_group(key, |served, _| served.group.io_done(io, answer));
    }

    pub(super) fn dialed(&mut self, key: GroupKey, session: Result<SessionHandle, String>) {
        match session {
            Ok(handle) => {
                let session = SessionId(handle.session().0);
                self.link(key, handle);
                self.with_group(key, |served, _| served.group.dialed(session));
            }
            Err(reason) => self.with_group(key, |served, _| served.group.dial_failed(&reason)),
        }
    }

    pub(super) fn greeted(&mut self, key: GroupKey, handle: SessionHandle, hello: Hello) {
        let session = SessionId(handle.session().0);
        self.link(key, handle);
        self.with_group(key, |served, _| served.group.greeted(session, hello));
    }

    fn link(&mut self, key: GroupKey, handle: SessionHandle) {
        let wake = self.bell.wake_for(key);
        if let Some(served) = self.groups.get_mut(&key) {
            let session = handle.session().0;
            let link = Link { handle, outgoing: VecDeque::new(), closing: false };
            let link = served.links.entry(session).or_insert(link);
            link.handle.set_wake(wake);
        }
    }

    pub(super) fn send_frame(&mut self, key: GroupKey, session: SessionId, frame: Bytes) {
        self.queue(key, session, Outgoing::Frame(frame));
    }

    pub(super) fn send_cut(&mut self, key: GroupKey, session: SessionId, chunks: Vec<Bytes>) {
        self.queue(key, session, Outgoing::Cut(chunks));
    }

    fn queue(&mut self, key: GroupKey, session: SessionId, item: Outgoing) {
        let Some(link) = self.groups.get_mut(&key).and_then(|served| served.links.get_mut(&session.0)) else {
            return;
        };
        if link.outgoing.len() >= OUTGOING_MAX {
            link.handle.close("the session does not take what is sent");
            return;
        }
        link.outgoing.push_back(item);
        link.push_out();
    }

    pub(super) fn close_session(&mut self, key: GroupKey, session: SessionId, reason: &str) {
        if let Some(link) = self.groups.get_mut(&key).and_then(|served| served.links.get_mut(&session.0)) {
            link.push_out();
            link.closing = true;
            link.handle.close(reason);
        }
    }

    /// Takes what the sessions of a group have for it, and gives them what waits.
    pub(super) fn pump_links(&mut self, key: GroupKey) {
        let Some(served) = self.groups.get_mut(&key) else {
            return;
        };
        let (now, wall) = (self.now, self.wall);
        let mut ended = Vec::new();
        let mut heard = false;
        for (session, link) in &mut served.links {
            link.push_out();
            let id = SessionId(*session);
            loop {
                let crowded = served.group.is_crowded();
                let next = if crowded { link.handle.try_next_control() } else { link.handle.try_next() };
                let Some(event) = next else { break };
                heard = true;
                served.group.set_clocks(now, wall);
                match event {
                    SessionEvent::Control(_) | SessionEvent::Cut(_) if link.closing => {}
                    SessionEvent::Control(frame) => match Message::decode(&frame) {
                        Ok(message) => served.group.message(id, message),
                        Err(error) => {
                            tracing::warn!(%error, "the partner sent a message that makes no sense");
                            link.closing = true;
                            link.handle.close(&error.to_string());
                            served.group.session_closed(id, &error.to_string());
                        }
                    },
                    SessionEvent::Cut(bytes) => served.group.cut(id, bytes),
                    SessionEvent::Closed { reason } => {
                        if !link.closing {
                            served.group.session_closed(id, &reason.to_string());
                        }
                        ended.push(*session);
                    }
                }
            }
        }
        for session in ended {
            served.links.remove(&session);
        }
        if heard {
            self.touched.insert(key);
        }
    }
}

impl Link {
    /// Gives the session as much as it takes, in order.
    fn push_out(&mut self) {
        while let Some(item) = self.outgoing.pop_front() {
            let refused = match item {
                Outgoing::Frame(frame) => self
                    .handle
                    .try_send_control(frame)
                    .err()
                    .map(|refused| (refused.refusal, Outgoing::Frame(refused.item))),
                Outgoing::Cut(chunks) => self
                    .handle
                    .try_send_cut(chunks)
                    .err()
                    .map(|refused| (refused.refusal, Outgoing::Cut(refused.item))),
            };
            match refused {
                None => {}
                Some((Refusal::Full, item)) => {
                    self.outgoing.push_front(item);
                    return;
                }
                Some((Refusal::Closed, _)) => return self.outgoing.clear(),
                Some((refusal @ (Refusal::TooLong | Refusal::Empty | Refusal::WrongSide), _)) => {
                    tracing::error!(%refusal, "a session refused what was to be sent");
                    self.outgoing.clear();
                    return self.handle.close(&refusal.to_string());
                }
            }
        }
    }
}
