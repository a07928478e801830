//! The effects of a group on its home files, and the ends of the operations.

use block::{ByteRange, DATA_UNIT_BYTES, HostCommand, HostError, HostResult, Lba, VolumeIndex};
use bytes::Bytes;
use engine::{CommandId, StepId};
use store::{Buffer, Completion, File, Operation, Payload, Returned};

use super::connection::ConnectionId;
use super::mirror_io::IoTarget;
use super::requests::HostPayload;
use super::sealing::{Job, Then};
use super::{GroupKey, Shard, ShardNews};
use crate::group::{Effect, IoId, Loudness};

const UNIT: usize = 4096;
/// errno of an operation that a file system does not know.
const EOPNOTSUPP: i32 = 95;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const EFBIG: i32 = 27;
/// Extents told in one answer; clients ask on from where it ends.
pub(super) const EXTENTS_MAX: usize = 4096;

/// A write step whose partial units are being read.
pub(super) struct Merge {
    key: GroupKey,
    volume: VolumeIndex,
    step: StepId,
    device: ByteRange,
    wanted: ByteRange,
    /// The whole device range, with the host's bytes in place.
    buffer: Option<Buffer>,
    /// Units that are still to be read, by offset.
    reads: Vec<u64>,
}

/// What a submitted operation is for.
pub(super) enum Pending {
    Receive {
        id: ConnectionId,
        asked: usize,
    },
    /// A piece of the payload that the connection has arriving.
    ReceivePayload {
        id: ConnectionId,
        asked: usize,
    },
    Send {
        id: ConnectionId,
    },
    Read {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
        command: CommandId,
        device: ByteRange,
        wanted: ByteRange,
    },
    Merge(Box<Merge>),
    Write {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
    },
    ZeroRange {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
        command: CommandId,
        device: ByteRange,
    },
    /// Zeros written where ZERO_RANGE is not known.
    ZeroWritten {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
    },
    Flush {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
    },
    Inquiry {
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
        command: CommandId,
    },
    Io {
        key: GroupKey,
        io: IoId,
        target: IoTarget,
    },
    /// One of these that makes something durable on a home in the page cache.
    Sync {
        key: GroupKey,
        volume: VolumeIndex,
        number: u64,
        of: Box<Self>,
    },
}

/// The end of an operation, and what it was for.
pub(super) struct Ended {
    pending: Box<Pending>,
    result: std::io::Result<usize>,
    returned: Returned,
}

impl Shard {
    pub(super) fn perform(&mut self, key: GroupKey, effect: Effect) {
        match effect {
            Effect::Read { volume, step, command, device, wanted } => {
                self.read(Pending::Read { key, volume, step, command, device, wanted }, key, volume, device);
            }
            Effect::Prepare { volume, step, command, device, wanted, read_head, read_tail } => {
                self.prepare(key, volume, step, command, device, wanted, read_head, read_tail);
            }
            Effect::Write { volume, step, device, data, durable } => {
                let data = match data {
                    Some(data) => Payload::One(self.aligned(data)),
                    None => self.zeros(device.length()),
                };
                self.write(Pending::Write { key, volume, step }, key, volume, device.offset(), data, durable);
            }
            Effect::ZeroRange { volume, step, command, device } => {
                let pending = Pending::ZeroRange { key, volume, step, command, device };
                self.on_home(key, volume, pending, |file| Operation::ZeroRange {
                    file,
                    offset: device.offset(),
                    length: device.length(),
                });
            }
            Effect::Flush { volume, step } => {
                self.flush_home(key, volume, Pending::Flush { key, volume, step });
            }
            Effect::Inquire { volume, step, command } => self.inquire(key, volume, step, command),
            Effect::Granted { command } => self.granted(command),
            Effect::Reply { command, result, .. } => self.answer(command, result),
            Effect::Io { io, request } => self.perform_io(key, io, request),
            Effect::Dial => self.tell(ShardNews::Dial(key)),
            Effect::Send { session, frame } => self.send_frame(key, session, frame),
            Effect::SendCut { session, chunks } => self.send_cut(key, session, chunks),
            Effect::CloseSession { session, reason } => self.close_session(key, session, &reason),
            Effect::Present => self.tell(ShardNews::Presented(key)),
            Effect::Unlock => self.tell(ShardNews::Unlock(key)),
            Effect::Withdraw { reason } => {
                self.tell(ShardNews::Withdrawn(key, reason));
                self.end_connections(key);
            }
            Effect::DrillDone { request, result } => self.drill_done(request, result),
            Effect::DrillEnded { reason } => self.drill_ended(key, reason),
            Effect::Log { loudness, text } => self.log(key, loudness, &text),
        }
    }

    fn log(&self, key: GroupKey, loudness: Loudness, text: &str) {
        let names = self.groups.get(&key).map(|served| {
            let names: Vec<&str> = served.volumes.iter().map(|volume| volume.files.name.as_str()).collect();
            names.join(",")
        });
        let volumes = names.unwrap_or_default();
        match loudness {
            Loudness::Info => tracing::info!(volumes, "{text}"),
            Loudness::Warn => tracing::warn!(volumes, "{text}"),
            Loudness::Error => tracing::error!(volumes, "{text}"),
        }
    }

    /// Raw zeros, as many as wanted: the same piece of memory again and again.
    pub(super) fn zeros(&self, length: u64) -> Payload {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length <= self.zeros.len() {
            return Payload::One(self.zeros.slice(..length));
        }
        let whole = std::iter::repeat_n(self.zeros.clone(), length / self.zeros.len());
        Payload::Many(whole.chain([self.zeros.slice(..length % self.zeros.len())]).collect())
    }

    fn home(&self, key: GroupKey, volume: VolumeIndex) -> Option<File> {
        let served = self.groups.get(&key)?;
        Some(served.volumes.get(usize::from(volume.0))?.files.home.clone())
    }

    pub(super) fn on_home(
        &mut self,
        key: GroupKey,
        volume: VolumeIndex,
        pending: Pending,
        operation: impl FnOnce(File) -> Operation,
    ) {
        let Some(file) = self.home(key, volume) else {
            return;
        };
        self.count(key, 1);
        match self.groups.get(&key).and_then(|served| served.drill_of) {
            Some(parent) => self.on_drill(parent, volume, pending, operation(file)),
            None => self.submit(pending, operation(file)),
        }
    }

    /// Counts a group's operations on their way.
    pub(super) fn count(&mut self, key: GroupKey, change: isize) {
        if let Some(served) = self.groups.get_mut(&key) {
            served.outstanding = served.outstanding.saturating_add_signed(change);
        }
    }

    pub(super) fn read(&mut self, pending: Pending, key: GroupKey, volume: VolumeIndex, range: ByteRange) {
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
        let buffer = self.pool.take_over(length);
        self.on_home(key, volume, pending, |file| Operation::Read {
            file,
            offset: range.offset(),
            buffer,
            range: 0..length,
        });
    }

    pub(super) fn write(
        &mut self,
        pending: Pending,
        key: GroupKey,
        volume: VolumeIndex,
        offset: u64,
        data: Payload,
        durable: bool,
    ) {
        let pending = if durable { self.sync(key, volume, pending) } else { pending };
        self.on_home(key, volume, pending, |file| Operation::Write { file, offset, data, durable });
    }

    pub(super) fn flush_home(&mut self, key: GroupKey, volume: VolumeIndex, pending: Pending) {
        let pending = self.sync(key, volume, pending);
        self.on_home(key, volume, pending, |file| Operation::Fdatasync { file });
    }

    /// Counts a sync of a home in the page cache among those that run beside it.
    fn sync(&mut self, key: GroupKey, volume: VolumeIndex, pending: Pending) -> Pending {
        let served = self.groups.get_mut(&key);
        match served.and_then(|served| served.volumes.get_mut(usize::from(volume.0))) {
            Some(home) if !home.files.home.is_direct() => {
                Pending::Sync { key, volume, number: home.syncs.begin(), of: Box::new(pending) }
            }
            Some(_) | None => pending,
        }
    }

    /// A sync ended: it and others are told of as far as they are known to have ended well.
    fn sync_ended(&mut self, key: GroupKey, volume: VolumeIndex, number: u64, ended: Ended) {
        let served = self.groups.get_mut(&key);
        let Some(home) = served.and_then(|served| served.volumes.get_mut(usize::from(volume.0))) else {
            return;
        };
        for (ended, believed) in home.syncs.end(number, ended.result.is_ok(), ended) {
            let Ended { pending, result, returned } = ended;
            let lost = std::io::Error::from_raw_os_error(EIO);
            self.settle(*pending, if believed { result } else { result.and(Err(lost)) }, returned);
        }
    }

    /// The same bytes at an address that direct I/O takes.
    pub(super) fn aligned(&self, data: Bytes) -> Bytes {
        if data.as_ptr().align_offset(UNIT) == 0 {
            return data;
        }
        let mut buffer = self.pool.take_over(data.len());
        buffer.copy_from_slice(&data);
        buffer.freeze()
    }

    /// Builds the plaintext of a write step, reading the units that it keeps parts of.
    #[expect(clippy::too_many_arguments, reason = "the fields of one effect")]
    fn prepare(
        &mut self,
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
        command: CommandId,
        device: ByteRange,
        wanted: ByteRange,
        read_head: bool,
        read_tail: bool,
    ) {
        let Some(buffer) = self.step_buffer(command, device, wanted) else {
            return self.with_group(key, |served, _| served.group.prepared(volume, step, Err(HostError::Io)));
        };
        let tail = device.end().saturating_sub(DATA_UNIT_BYTES);
        let mut reads = Vec::new();
        if read_tail {
            reads.push(tail);
        }
        if read_head {
            reads.push(device.offset());
        }
        self.merge_more(Box::new(Merge { key, volume, step, device, wanted, buffer: Some(buffer), reads }));
    }

    /// The buffer of a step's device range, with the host's bytes of `wanted` in place.
    fn step_buffer(&mut self, command: CommandId, device: ByteRange, wanted: ByteRange) -> Option<Buffer> {
        let request = self.requests.find_mut(command)?;
        let length = usize::try_from(device.length()).ok()?;
        let range = request.command.range()?;
        if let HostPayload::Whole(payload) = &request.payload
            && wanted == device
            && payload.len() == length
        {
            // The whole command in one aligned step: its buffer is sealed in place.
            let HostPayload::Whole(payload) = std::mem::replace(&mut request.payload, HostPayload::Nothing)
            else {
                return None;
            };
            return Some(payload);
        }
        let mut buffer = self.pool.take_over(length);
        let start = usize::try_from(wanted.offset() - device.offset()).ok()?;
        let count = usize::try_from(wanted.length()).ok()?;
        let target = buffer.get_mut(start..start + count)?;
        match &request.payload {
            HostPayload::Whole(payload) => {
                let from = usize::try_from(wanted.offset() - range.offset()).ok()?;
                target.copy_from_slice(payload.get(from..from + count)?);
            }
            HostPayload::Nothing => target.fill(0),
        }
        Some(buffer)
    }

    /// Reads the next partial unit, or seals when there is none.
    fn merge_more(&mut self, mut merge: Box<Merge>) {
        let (key, volume) = (merge.key, merge.volume);
        match merge.reads.last().copied() {
            Some(offset) => {
                let unit = ByteRange::new(offset, DATA_UNIT_BYTES).unwrap_or_default();
                self.read(Pending::Merge(merge), key, volume, unit);
            }
            None => {
                let first = merge.device.first_block();
                if let Some(buffer) = merge.buffer.take() {
                    self.seal(key, volume, first, buffer, Then::Prepared { step: merge.step });
                }
            }
        }
    }

    /// A partial unit was read: what the host does not change of it goes into the step's buffer.
    fn merged(&mut self, mut merge: Box<Merge>, unit: Result<Buffer, HostError>) {
        let (key, volume, step) = (merge.key, merge.volume, merge.step);
        let cipher = self.cipher(key, volume);
        let (Ok(mut unit), Some(cipher), Some(offset)) = (unit, cipher, merge.reads.pop()) else {
            return self.with_group(key, |served, _| served.group.prepared(volume, step, Err(HostError::Io)));
        };
        cipher.open(Lba::containing(offset), &mut unit);
        let base = usize::try_from(offset - merge.device.offset()).unwrap_or(usize::MAX);
        for (index, byte) in unit.iter().enumerate() {
            let at = offset + u64::try_from(index).unwrap_or(u64::MAX);
            let kept = at < merge.wanted.offset() || at >= merge.wanted.end();
            let target = merge.buffer.as_mut().and_then(|buffer| buffer.get_mut(base + index));
            if kept && let Some(target) = target {
                *target = *byte;
            }
        }
        self.merge_more(merge);
    }

    fn cipher(&self, key: GroupKey, volume: VolumeIndex) -> Option<std::sync::Arc<crypto::VolumeCipher>> {
        self.groups.get(&key)?.volumes.get(usize::from(volume.0))?.files.cipher.clone()
    }

    fn seal(&mut self, key: GroupKey, volume: VolumeIndex, first: Lba, buffer: Buffer, then: Then) {
        match self.cipher(key, volume) {
            Some(cipher) => self.sealing.push(Job::new(key, volume, cipher, first, buffer, then)),
            None => self.unsealed(key, volume, then),
        }
    }

    /// Without a key nothing is served; hosts cannot get here, but the step must end.
    fn unsealed(&mut self, key: GroupKey, volume: VolumeIndex, then: Then) {
        self.with_group(key, |served, _| match then {
            Then::Deliver { step, .. } => served.group.read_done(volume, step, Err(HostError::Io)),
            Then::Prepared { step } => served.group.prepared(volume, step, Err(HostError::Io)),
        });
    }

    /// Seals and opens what the turn's budget allows.
    pub(super) fn work_sealing(&mut self) {
        for job in self.sealing.turn(&mut self.budget) {
            let (key, volume) = (job.key, job.volume);
            match job.then {
                Then::Deliver { step, command, device, wanted } => {
                    let start = usize::try_from(wanted.offset() - device.offset()).unwrap_or(usize::MAX);
                    let count = usize::try_from(wanted.length()).unwrap_or(usize::MAX);
                    let data = job.buffer.freeze().slice(start..start + count);
                    if let Some(request) = self.requests.find_mut(command) {
                        request.parts.push(wanted.offset(), data);
                    }
                    self.with_group(key, |served, _| served.group.read_done(volume, step, Ok(())));
                }
                Then::Prepared { step } => {
                    let sealed = job.buffer.freeze();
                    self.with_group(key, |served, _| served.group.prepared(volume, step, Ok(sealed)));
                }
            }
        }
    }

    fn wants_fast(&self, command: CommandId) -> bool {
        let command = self.requests.find(command).map(|request| request.command);
        matches!(command, Some(HostCommand::WriteZeroes { fast: true, .. }))
    }

    /// CACHE and STATUS.
    fn inquire(&mut self, key: GroupKey, volume: VolumeIndex, step: StepId, command: CommandId) {
        let request = self.requests.find(command).map(|request| request.command);
        let direct = self.home(key, volume).is_none_or(|file| file.is_direct());
        let pending = Pending::Inquiry { key, volume, step, command };
        match request {
            Some(HostCommand::Status { range, one }) => self.on_home(key, volume, pending, |file| {
                let extents_max = if one { 1 } else { EXTENTS_MAX };
                Operation::Survey { file, offset: range.offset(), length: range.length(), extents_max }
            }),
            Some(HostCommand::Cache { range }) if !direct => self.on_home(key, volume, pending, |file| {
                Operation::Prefetch { file, offset: range.offset(), length: range.length() }
            }),
            // Direct I/O has no cache to fill, and of a command that is gone nobody waits for the answer.
            Some(_) | None => self.with_group(key, |served, _| served.group.inquired(volume, step, Ok(()))),
        }
    }

    /// Ends a host's command.
    fn answer(&mut self, command: CommandId, result: HostResult) {
        let Some(mut request) = self.requests.remove(command) else {
            return;
        };
        let volume = usize::from(request.volume.0);
        if let Some(served) = self.groups.get(&request.key)
            && let Some(slot) = served.volumes.get(volume)
        {
            slot.meters.answered(&request.command, result, self.now.since(request.started));
        }
        let parts = std::mem::take(&mut request.parts);
        self.reply(&request, result, parts);
    }

    /// Drops what a closed connection asked for; what has begun goes on without a reply.
    pub(super) fn forget_requests(&mut self, id: ConnectionId) {
        let mine = self.requests.iter().filter(|(_, request)| request.connection == Some(id));
        let mine: Vec<CommandId> = mine.map(|(number, _)| number).collect();
        for number in mine {
            let Some(request) = self.requests.find_mut(number) else {
                continue;
            };
            request.connection = None;
            let (key, volume) = (request.key, request.volume);
            let mut runs = false;
            self.with_group(key, |served, _| runs = served.group.forget(volume, number));
            if runs {
                self.forgotten.push(number);
            } else if let Some(request) = self.requests.remove(number) {
                self.release_memory(request.owner, Some(id), request.charged);
            }
        }
    }

    /// Requests without a connection whose last step ended.
    pub(super) fn drop_forgotten(&mut self) {
        let mut ended = Vec::new();
        self.forgotten.retain(|number| {
            let runs = self.requests.find(*number).is_some_and(|request| {
                let served = self.groups.get(&request.key);
                served.is_some_and(|served| served.group.is_running(request.volume, *number))
            });
            if !runs {
                ended.push(*number);
            }
            runs
        });
        for number in ended {
            if let Some(request) = self.requests.remove(number) {
                self.release_memory(request.owner, None, request.charged);
            }
        }
    }

    /// A host's ZERO_RANGE ended; where it is not known, zeros are written, unless the host asked to be told.
    fn zero_range_ended(
        &mut self,
        key: GroupKey,
        volume: VolumeIndex,
        step: StepId,
        command: CommandId,
        device: ByteRange,
        result: &std::io::Result<usize>,
    ) {
        let unknown = result.as_ref().is_err_and(|error| error.raw_os_error() == Some(EOPNOTSUPP));
        if unknown && !self.wants_fast(command) {
            let zeros = self.zeros(device.length());
            let pending = Pending::ZeroWritten { key, volume, step };
            return self.write(pending, key, volume, device.offset(), zeros, false);
        }
        let outcome = match result {
            Err(_) if unknown => Err(HostError::NotSupported),
            Err(error) => Err(host_error(error)),
            Ok(_) => Ok(()),
        };
        self.with_group(key, |served, _| served.group.written(volume, step, outcome, true));
    }

    pub(super) fn complete(&mut self, completion: Completion) {
        let Completion { token, result, returned } = completion;
        let index = usize::try_from(token.0).unwrap_or(usize::MAX);
        if let Some(pending) = self.pending.try_remove(index) {
            self.settle(pending, result, returned);
        }
    }

    fn settle(&mut self, pending: Pending, result: std::io::Result<usize>, returned: Returned) {
        let outcome = result.as_ref().map(|_| ()).map_err(host_error);
        match pending {
            Pending::Receive { id, asked } => {
                if let Some(buffer) = returned.into_buffer() {
                    self.received(id, buffer, asked, result.ok());
                }
            }
            Pending::ReceivePayload { id, asked } => {
                if let Some(buffer) = returned.into_buffer() {
                    // Less than asked for means that the client closed in the middle of its payload.
                    self.received_payload(id, buffer, result.ok().filter(|count| *count == asked));
                }
            }
            Pending::Sync { key, volume, number, of } => {
                self.sync_ended(key, volume, number, Ended { pending: of, result, returned });
            }
            Pending::Send { id } => {
                let pieces = returned.into_payload().map(Payload::into_pieces).unwrap_or_default();
                self.sent(id, result.is_ok(), pieces);
            }
            Pending::Read { key, volume, step, command, device, wanted } => {
                self.count(key, -1);
                match returned.into_buffer().filter(|_| outcome.is_ok()) {
                    Some(buffer) => {
                        let then = Then::Deliver { step, command, device, wanted };
                        self.seal(key, volume, device.first_block(), buffer, then);
                    }
                    None => self.with_group(key, |served, _| served.group.read_done(volume, step, outcome)),
                }
            }
            Pending::Merge(merge) => {
                self.count(merge.key, -1);
                let unit = outcome.and_then(|()| returned.into_buffer().ok_or(HostError::Io));
                self.merged(merge, unit);
            }
            Pending::Write { key, volume, step } => {
                self.count(key, -1);
                self.with_group(key, |served, _| served.group.written(volume, step, outcome, false));
            }
            Pending::ZeroRange { key, volume, step, command, device } => {
                self.count(key, -1);
                self.zero_range_ended(key, volume, step, command, device, &result);
            }
            Pending::ZeroWritten { key, volume, step } => {
                self.count(key, -1);
                self.with_group(key, |served, _| served.group.written(volume, step, outcome, true));
            }
            Pending::Flush { key, volume, step } => {
                self.count(key, -1);
                self.with_group(key, |served, _| served.group.flushed(volume, step, outcome));
            }
            Pending::Inquiry { key, volume, step, command } => {
                self.count(key, -1);
                if let (Returned::Extents(extents), Some(request)) =
                    (returned, self.requests.find_mut(command))
                {
                    request.extents = extents;
                }
                self.with_group(key, |served, _| served.group.inquired(volume, step, outcome));
            }
            Pending::Io { key, io, target } => {
                self.count(key, -1);
                self.io_complete(key, io, target, result, returned);
            }
        }
    }
}

/// What a host is told of an operating system's error.
fn host_error(error: &std::io::Error) -> HostError {
    match error.raw_os_error() {
        Some(ENOSPC | EDQUOT | EFBIG) => HostError::NoSpace,
        Some(_) | None => HostError::Io,
    }
}
