//! What a group asks for is done on the virtual disks, network and hosts.

use block::{ByteRange, HostCommand, HostError, HostResult, VolumeIndex};
use bytes::{Bytes, BytesMut};
use daemon::group::{Effect, IoFailure, IoId, IoRequest, Loudness, SessionId};
use engine::{CommandId, StepId};
use journal::RecordKind;
use protocol::{Message, Role};

use super::disk::Content;
use super::fault::Zone;
use super::network::Stream;
use super::oracle::LineageKey;
use super::plan::MILLISECOND;
use super::site::{Answer, Operation, Pending, Step, Stopping};
use super::world::{Event, World};
use super::{host, oracle, size, wide};

impl World {
    pub(super) fn perform(&mut self, site: usize, effect: Effect) {
        match effect {
            Effect::Read { volume, step, device, .. } => {
                let answer = Answer::Read { volume, step };
                self.read(site, usize::from(volume.0), device, answer);
            }
            Effect::Prepare { volume, step, command, device, wanted, read_head, read_tail } => {
                self.sites[site].prepared.insert((volume, step), command);
                self.tell(|| {
                    format!("site {site} prepares {command:?} {step:?} of volume {}: {wanted}", volume.0)
                });
                let answer = Answer::Prepare { volume, step, command, device, wanted };
                if read_head || read_tail {
                    self.read(site, usize::from(volume.0), device, answer);
                } else {
                    self.start(site, Operation::Nothing, answer);
                }
            }
            Effect::Write { volume, step, device, data, durable } => {
                let content = data.map_or_else(|| Content::Zeros(size(device.length())), Content::Data);
                self.host_write(site, volume, step, device, content, durable, false);
            }
            Effect::ZeroRange { volume, step, device, .. } => {
                let content = Content::Zeros(size(device.length()));
                self.host_write(site, volume, step, device, content, false, true);
            }
            Effect::Flush { volume, step } => {
                let file = usize::from(volume.0);
                let mark = self.sites[site].files[file].mark();
                self.start(site, Operation::Sync { file, mark }, Answer::Flush { volume, step, mark });
            }
            Effect::Inquire { volume, step, .. } => {
                self.start(site, Operation::Nothing, Answer::Inquiry { volume, step });
            }
            Effect::Granted { .. } => unreachable!("hosts of the simulator reserve nothing"),
            Effect::Reply { volume, command, result } => self.reply(site, volume, command, result),
            Effect::Io { io, request } => self.request(site, io, request),
            Effect::Dial => {
                let delay = self.network_delay();
                let process = self.sites[site].process;
                self.after(delay, Event::Dial { site, process });
            }
            Effect::Send { session, frame } => self.send_control(site, session, frame),
            Effect::SendCut { session, chunks } => self.send_cut(site, session, &chunks),
            Effect::CloseSession { session, reason } => self.close(site, session, &reason),
            Effect::DrillDone { request, result } => self.drill_done(site, request, result),
            Effect::DrillEnded { reason } => self.drill_ended(site, &reason),
            Effect::Present => {
                self.tell(|| format!("site {site} presents its volumes"));
                self.sites[site].presented = true;
            }
            Effect::Unlock => self.start(site, Operation::Nothing, Answer::Unlock),
            Effect::Withdraw { reason } => {
                self.tell(|| format!("site {site} withdraws: {reason}"));
                self.sites[site].presented = false;
            }
            Effect::Log { loudness, text } => {
                self.note(wide(text.len()));
                let prefix = match loudness {
                    Loudness::Info => "info",
                    Loudness::Warn => "warn",
                    Loudness::Error => "error",
                };
                self.tell(|| format!("site {site} {prefix}: {text}"));
            }
        }
    }

    pub(super) fn start(&mut self, site: usize, operation: Operation, answer: Answer) {
        self.keys += 1;
        let key = self.keys;
        let usual = match &operation {
            Operation::Sync { .. } | Operation::Persist(_) | Operation::Grow { .. } => 400_000,
            Operation::Write { .. } | Operation::Read { .. } => 80_000,
            Operation::Nothing => 5_000,
        };
        let tail = if self.random.chance(20) { 10 } else { 1 };
        let slowness = match operation.file() {
            Some(file) if file == self.spill_file() => self.sites[site].spill_slowness,
            Some(_) | None => 1,
        };
        let delay = (5_000 + self.random.below(2 * usual)) * tail * self.sites[site].slowness * slowness;
        self.sites[site].pending.insert(key, Pending { operation, answer });
        self.after(delay, Event::Io { site, key });
    }

    fn read(&mut self, site: usize, file: usize, range: ByteRange, answer: Answer) {
        let half = range.length() / 2 / 512 * 512;
        let first = self.sites[site].files[file].read(range.offset(), half);
        let operation = Operation::Read { file, offset: range.offset(), length: range.length(), first };
        self.start(site, operation, answer);
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one effect")]
    fn host_write(
        &mut self,
        site: usize,
        volume: VolumeIndex,
        step: StepId,
        range: ByteRange,
        content: Content,
        durable: bool,
        trimmed: bool,
    ) {
        self.note_lineage(site);
        let file = usize::from(volume.0);
        let sequence = self.sites[site].group.as_ref().and_then(|group| group.sequence_of(volume, step));
        let (Some(sequence), Some(lineage)) = (sequence, self.sites[site].lineage) else {
            return self.fail(format!("site {site} issues a home write of {range} without a sequence"));
        };
        if range.end() > self.sites[site].sizes[file] * 4096 {
            return self.fail(format!("site {site} issues a host's write of {range} beyond its volume"));
        }
        if self.sites[site].state.role != Role::Primary {
            return self.fail(format!("site {site} issues a host's write although it is the secondary"));
        }
        if self.sites[site].heard_epoch > lineage.0 {
            return self.fail(format!("site {site} writes for hosts although it heard of a higher epoch"));
        }
        if !self.durable_intent(site, file).is_durable(range) {
            return self.fail(format!(
                "site {site} issues a home write of {range} before its intent bit is durable"
            ));
        }
        self.note(sequence.0);
        let first = self.first_block(file) + size(range.first_block().0);
        let count = size(range.block_count().0);
        self.tell(|| {
            format!("site {site} writes volume {file} {range} sequence {sequence}, blocks {first}+{count}")
        });
        if !self.oracle.takes(lineage, sequence.0) {
            return self.fail(format!("site {site} uses sequence {sequence} of lineage {lineage:?} twice"));
        }
        for block in 0..count {
            let hash = match &content {
                Content::Data(bytes) => oracle::hash(&bytes[block * 4096..(block + 1) * 4096]),
                Content::Zeros(_) => 0,
            };
            self.oracle.issued(lineage, sequence.0, first + block, hash);
            self.note_planted_write(first + block);
        }
        self.oracle.issued_at(lineage, sequence.0, self.now);
        self.sites[site].steps.insert((volume, step), Step { lineage, sequence: sequence.0, range });
        self.attribute(site, volume, step, (lineage, sequence.0, range));
        let operation = Operation::Write { file, offset: range.offset(), content, durable };
        self.start(site, operation, Answer::Write { volume, step, trimmed });
    }

    /// Notes which command a home write belongs to: the one it was prepared for, or the oldest of zeroes that waits
    /// for this range.
    fn attribute(
        &mut self,
        site: usize,
        volume: VolumeIndex,
        step: StepId,
        write: (LineageKey, u64, ByteRange),
    ) {
        let site = &mut self.sites[site];
        let prepared = site.prepared.remove(&(volume, step));
        let command = prepared.or_else(|| {
            let waits = site.commands.iter().find(|((of, _), known)| {
                let zeroes =
                    matches!(known.command, HostCommand::WriteZeroes { .. } | HostCommand::Trim { .. });
                let inside = known.command.range().is_some_and(|range| range.unit_inward().contains(write.2));
                *of == volume
                    && zeroes
                    && inside
                    && !known.writes.iter().any(|(_, _, range)| *range == write.2)
            });
            waits.map(|((_, id), _)| *id)
        });
        if let Some(known) = command.and_then(|id| site.commands.get_mut(&(volume, id))) {
            known.writes.push(write);
        }
    }

    fn request(&mut self, site: usize, io: IoId, request: IoRequest) {
        let answer = Answer::Io(io);
        match request {
            IoRequest::HomeRead { volume, range } => {
                // What a fenced partner asks for its orphans is neither copy nor comparison.
                if self.sites[site].state.role == Role::Primary && !self.sites[1 - site].searching {
                    self.check_rate(site, true, range.length());
                }
                self.check_room(site, volume, range.end());
                return self.read(site, usize::from(volume.0), range, answer);
            }
            IoRequest::RedoRead { file, offset, length } => {
                let file = self.segment_file(file);
                let range = ByteRange::new(offset, length).unwrap_or_default();
                return self.read(site, file, range, answer);
            }
            IoRequest::ScratchRead { volume, range } => {
                let file = self.scratch_file(usize::from(volume.0));
                return self.read(site, file, range, answer);
            }
            IoRequest::SpillRead { offset, length } => {
                let range = ByteRange::new(offset, length).unwrap_or_default();
                return self.read(site, self.spill_file(), range, answer);
            }
            IoRequest::SpillWrite { .. } => self.statistics.spilled += 1,
            IoRequest::HomeWrite { .. }
            | IoRequest::HomeZero { .. }
            | IoRequest::Persist(_)
            | IoRequest::Grow { .. }
            | IoRequest::Resize { .. }
            | IoRequest::HomeFlush { .. }
            | IoRequest::IntentWrite { .. }
            | IoRequest::RedoWrite { .. }
            | IoRequest::RedoSync { .. }
            | IoRequest::ScratchWrite { .. }
            | IoRequest::SpillSync
            | IoRequest::CheckpointWrite { .. } => {}
        }
        if let Some(text) = self.check_request(site, &request) {
            return self.fail(text);
        }
        self.start_request(site, request, answer);
    }

    /// What is wrong with a request that changes something.
    fn check_request(&mut self, site: usize, request: &IoRequest) -> Option<String> {
        if let IoRequest::Persist(state) = request {
            return self.persist_fault(site, state);
        }
        let (volume, end) = if let IoRequest::HomeWrite { volume, offset, data } = request {
            (*volume, offset + wide(data.len()))
        } else if let IoRequest::HomeZero { volume, range, .. } = request {
            (*volume, range.end())
        } else {
            return None;
        };
        self.check_room(site, volume, end);
        self.check_target_write(site);
        None
    }

    fn start_request(&mut self, site: usize, request: IoRequest, answer: Answer) {
        let write = |file, offset, content, durable| Operation::Write { file, offset, content, durable };
        let operation = match request {
            IoRequest::HomeRead { .. }
            | IoRequest::RedoRead { .. }
            | IoRequest::ScratchRead { .. }
            | IoRequest::SpillRead { .. } => return,
            IoRequest::ScratchWrite { volume, offset, data } => {
                write(self.scratch_file(usize::from(volume.0)), offset, Content::Data(data), false)
            }
            IoRequest::SpillWrite { offset, data } => {
                write(self.spill_file(), offset, Content::Data(Bytes::from(data.concat())), false)
            }
            IoRequest::SpillSync => self.sync(site, self.spill_file()),
            IoRequest::HomeWrite { volume, offset, data } => {
                write(usize::from(volume.0), offset, Content::Data(data), false)
            }
            IoRequest::HomeZero { volume, range, .. } => {
                write(usize::from(volume.0), range.offset(), Content::Zeros(size(range.length())), false)
            }
            IoRequest::HomeFlush { volume } => self.sync(site, usize::from(volume.0)),
            IoRequest::IntentWrite { volume, offset, page } => {
                write(self.intent_file(usize::from(volume.0)), offset, Content::Data(page), true)
            }
            IoRequest::RedoWrite { file, offset, data } => {
                write(self.segment_file(file), offset, Content::Data(data), false)
            }
            IoRequest::RedoSync { file } => self.sync(site, self.segment_file(file)),
            IoRequest::CheckpointWrite { slot, page } => {
                write(self.checkpoint_file(), slot * journal::PAGE_BYTES, Content::Data(page), true)
            }
            IoRequest::Persist(state) => Operation::Persist(state),
            IoRequest::Grow { volume, size } => growth(volume, size, false),
            IoRequest::Resize { volume, size } => growth(volume, size, true),
        };
        self.start(site, operation, answer);
    }

    fn sync(&self, site: usize, file: usize) -> Operation {
        Operation::Sync { file, mark: self.sites[site].files[file].mark() }
    }

    /// A request ends.
    pub(super) fn complete(&mut self, site: usize, key: u64) {
        let Some(Pending { operation, answer }) = self.sites[site].pending.remove(&key) else { return };
        let failed = self.fails(site, &operation);
        let rots = self.rots(site, &operation);
        self.note(key * 2 + u64::from(failed));
        let mut data = Bytes::new();
        let files = &mut self.sites[site].files;
        match operation {
            Operation::Write { file, offset, content, .. } if failed => {
                let permille = [0, 500, 1000][self.random.index(3)];
                files[file].land_partly(offset, &content, permille, &mut self.random);
            }
            Operation::Write { file, offset, content, durable: true } => {
                files[file].land_durable(offset, content)
            }
            Operation::Write { file, offset, content, durable: false } => files[file].land(offset, content),
            Operation::Sync { file, mark } if failed => files[file].fail_sync(mark, &mut self.random),
            Operation::Sync { file, mark } => files[file].sync(mark),
            Operation::Read { file, offset, length, first } => {
                let half = wide(first.len());
                let mut whole = BytesMut::from(first);
                whole.extend_from_slice(&files[file].read(offset + half, length - half));
                if let Some(byte) = rots.and_then(|at| whole.get_mut(at)) {
                    *byte ^= 0x10;
                }
                data = whole.freeze();
            }
            Operation::Persist(state) => {
                if !failed || self.random.chance(500) {
                    self.persisted(site, *state);
                }
            }
            Operation::Grow { volume, blocks, stored } => {
                if !failed {
                    self.grow(site, volume, blocks, stored);
                }
            }
            Operation::Nothing => {}
        }
        self.answer(site, answer, data, failed);
        self.pump(site);
    }

    /// A volume gets room, and a size if that is to be stored.
    fn grow(&mut self, site: usize, volume: usize, blocks: u64, stored: bool) {
        let known = &mut self.sites[site];
        known.rooms[volume] = blocks.max(known.rooms[volume]);
        if !stored || blocks <= known.sizes[volume] {
            return;
        }
        known.sizes[volume] = blocks;
        self.statistics.grown += u64::from(known.state.role == Role::Primary);
        self.resized(site, volume);
        self.tell(|| format!("site {site} stored {blocks} blocks as the size of volume {volume}"));
        let limit = self.limit();
        if let Some(group) = self.enter(site) {
            let index = VolumeIndex(u16::try_from(volume).unwrap_or(0));
            group.resize(index, block::BlockCount(blocks).bytes(), limit);
        }
    }

    fn answer(&mut self, site: usize, answer: Answer, data: Bytes, failed: bool) {
        let host: HostResult = if failed { Err(HostError::Io) } else { Ok(()) };
        match answer {
            Answer::Io(io) => {
                let result = if failed { Err(IoFailure { operation: "io", errno: 5 }) } else { Ok(data) };
                if let Some(group) = self.enter(site) {
                    group.io_done(io, result);
                }
            }
            Answer::Read { volume, step } => {
                if let Some(group) = self.enter(site) {
                    group.read_done(volume, step, host);
                }
            }
            Answer::Prepare { volume, step, command, device, wanted } => {
                let mut sealed = BytesMut::from(data);
                sealed.resize(size(device.length()), 0);
                let start = size(wanted.offset() - device.offset());
                self.payload(
                    site,
                    volume,
                    command,
                    wanted,
                    &mut sealed[start..start + size(wanted.length())],
                );
                let result = host.map(|()| sealed.freeze());
                if let Some(group) = self.enter(site) {
                    group.prepared(volume, step, result);
                }
            }
            Answer::Write { volume, step, trimmed } => {
                self.host_write_ended(site, volume, step, failed);
                if let Some(group) = self.enter(site) {
                    group.written(volume, step, host, trimmed);
                }
            }
            Answer::Inquiry { volume, step } => {
                if let Some(group) = self.enter(site) {
                    group.inquired(volume, step, Ok(()));
                }
            }
            Answer::Unlock => {
                let locked = self.random.chance(self.errors.rate(site, Zone::State, self.now));
                let result = if locked { Err("the key provider does not answer".to_owned()) } else { Ok(()) };
                if let Some(group) = self.enter(site) {
                    group.unlocked(result);
                }
            }
            Answer::Flush { volume, step, mark } => {
                if !failed && !self.sites[site].files[usize::from(volume.0)].is_stable_before(mark) {
                    self.fail("the virtual disk lied about a flush".to_owned());
                }
                if let Some(group) = self.enter(site) {
                    group.flushed(volume, step, host);
                }
            }
        }
    }

    fn payload(
        &self,
        site: usize,
        volume: VolumeIndex,
        command: CommandId,
        wanted: ByteRange,
        out: &mut [u8],
    ) {
        match self.sites[site].commands.get(&(volume, command)).map(|known| known.command) {
            Some(HostCommand::WriteZeroes { .. }) => out.fill(0),
            Some(_) | None => host::fill(command.0, wanted.offset(), out),
        }
    }

    fn host_write_ended(&mut self, site: usize, volume: VolumeIndex, step: StepId, failed: bool) {
        let Some(Step { lineage, sequence, range }) = self.sites[site].steps.remove(&(volume, step)) else {
            return;
        };
        let file = usize::from(volume.0);
        let first = self.first_block(file) + size(range.first_block().0);
        let now = self.sites[site].lineage;
        for index in 0..size(range.block_count().0) {
            let offset = range.offset() + wide(index) * 4096;
            let hash = oracle::hash(&self.sites[site].files[file].read(offset, 4096));
            if failed {
                self.oracle.failed(lineage, sequence, first + index, hash);
            }
            if let Some(now) = now.filter(|now| *now != lineage) {
                self.oracle.late(now, first + index, hash);
            }
        }
        if failed {
            self.tell(|| format!("site {site}: the home write of sequence {sequence} failed"));
        }
    }

    fn reply(&mut self, site: usize, volume: VolumeIndex, command: CommandId, result: HostResult) {
        let Some(known) = self.sites[site].commands.remove(&(volume, command)) else { return };
        self.statistics.commands += 1;
        self.note(command.0);
        if result.is_err() || !known.command.changes_content() {
            return;
        }
        self.check_not_held(site, &known);
        let at = self.now;
        for (lineage, sequence, _) in known.writes {
            self.oracle.acked[site].push_back(oracle::Acked { lineage, sequence, at });
            self.oracle.history[site].push(oracle::Acked { lineage, sequence, at });
        }
    }

    // ---- network ----

    fn send_control(&mut self, site: usize, session: SessionId, frame: Bytes) {
        let process = self.sites[site].process;
        let Some(side) = self.network.side_of(session.0, site, process) else { return };
        match Message::decode(&frame) {
            Ok(message) => self.check_sent(site, &message),
            Err(error) => return self.fail(format!("a frame that was sent does not decode: {error}")),
        }
        let at = self.now + self.network_delay();
        if let Some(at) = self.network.send(session.0, 1 - side, Stream::Control, frame, at) {
            self.after(
                at - self.now,
                Event::Deliver { session: session.0, to: 1 - side, stream: Stream::Control },
            );
        }
    }

    fn send_cut(&mut self, site: usize, session: SessionId, chunks: &[Bytes]) {
        self.note_lineage(site);
        let process = self.sites[site].process;
        let cut = Bytes::from(chunks.concat());
        let decoded = match journal::decode(&cut) {
            Ok(decoded) => decoded,
            Err(error) => return self.fail(format!("a cut that was sent does not decode: {error}")),
        };
        self.check_rate(site, false, wide(cut.len()));
        self.statistics.cuts += 1;
        self.statistics.staged += u64::from(!decoded.meta.commit);
        for record in decoded.records.iter().filter(|record| record.kind == RecordKind::Bad) {
            let first = self.first_block(usize::from(record.volume.0)) + size(record.range.first_block().0);
            self.bad.extend(first..first + size(record.range.block_count().0));
        }
        self.tell(|| {
            let meta = &decoded.meta;
            let kinds: Vec<String> = decoded
                .records
                .iter()
                .map(|record| {
                    format!("{}:{:?}@{}/{}", record.sequence, record.kind, record.volume.0, record.range)
                })
                .collect();
            format!(
                "site {site} sends on {} cut {}..={} after {} pass {} commit {} initial {} echo {}: {}",
                session.0,
                meta.first,
                meta.last,
                meta.previous.position,
                meta.pass,
                meta.commit,
                meta.initial,
                meta.echo.0,
                kinds.join(" ")
            )
        });
        let Some(side) = self.network.side_of(session.0, site, process) else { return };
        let at = self.now + self.network_delay();
        if let Some(at) = self.network.send(session.0, 1 - side, Stream::Data, cut, at) {
            self.after(
                at - self.now,
                Event::Deliver { session: session.0, to: 1 - side, stream: Stream::Data },
            );
        }
    }

    fn close(&mut self, site: usize, session: SessionId, reason: &str) {
        let process = self.sites[site].process;
        let Some(side) = self.network.side_of(session.0, site, process) else { return };
        self.tell(|| format!("site {site} closes session {}: {reason}", session.0));
        if let Some(known) = self.network.sessions.get_mut(&session.0) {
            known.sides[side].open = false;
        }
        let delay = self.network_delay() + self.random.below(MILLISECOND);
        self.after(delay, Event::Closed { session: session.0, side: 1 - side });
    }

    pub(super) fn maybe_damage(&mut self, frame: Bytes) -> Bytes {
        if self.healing || !self.random.chance(self.errors.rate(0, Zone::Cut, self.now)) || frame.is_empty() {
            return frame;
        }
        let mut damaged = BytesMut::from(&frame[..]);
        let at = self.random.index(damaged.len());
        damaged[at] ^= 1 << self.random.below(8);
        self.tell(|| "a cut is damaged on its way".to_owned());
        damaged.freeze()
    }

    pub(super) fn is_stopping(&self, site: usize) -> bool {
        self.sites[site].stopping != Stopping::No
    }
}

fn growth(volume: VolumeIndex, size: block::ByteCount, stored: bool) -> Operation {
    Operation::Grow { volume: usize::from(volume.0), blocks: size.0 / 4096, stored }
}
