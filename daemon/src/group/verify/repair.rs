//! Repair of what a verify found, as the operator said.
//!
//! From this side: the blocks go dirty and travel in a pass, as those of a resync do. From the partner: its block is
//! fetched and written here as a host's write would be, with range lock, intent bit, sequence and record, so the order
//! stays whole; a block that a host wrote after it was fetched is left alone, since the host's write repaired both sides.

use std::collections::BTreeMap;

use block::{BlockCount, ByteRange, DATA_UNIT_BYTES, HostCommand, HostError, Lba, VolumeIndex};
use bytes::Bytes;
use engine::{CommandId, StepId};
use protocol::{Held, Message, VerifyReply, VerifyRequest};

use super::super::effect::{Effect, Outbox};
use super::super::primary::Primary;
use super::super::{Group, Machine, Mirror};

/// Blocks that are fetched or written at once.
const REPAIRS_MAX: usize = 8;

/// A block on its way from the partner.
#[derive(Debug)]
struct Fetched {
    volume: VolumeIndex,
    block: Lba,
    content: Option<Bytes>,
    /// A host has written it since: what was fetched is old.
    stale: bool,
    /// Its range lock is held: nobody writes it any more.
    prepared: bool,
}

/// Blocks on their way from the partner, by request and by the command that writes them.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    begun: bool,
    waiting: Vec<(VolumeIndex, Lba)>,
    fetching: BTreeMap<u64, Fetched>,
    writing: BTreeMap<CommandId, Fetched>,
}

impl Repairs {
    pub(super) fn wrote(&mut self, volume: VolumeIndex, range: ByteRange) {
        let under_way = self.fetching.values_mut().chain(self.writing.values_mut());
        for fetched in under_way.filter(|fetched| fetched.volume == volume && !fetched.prepared) {
            fetched.stale |= (range.first_block()..range.end_block()).contains(&fetched.block);
        }
    }

    pub(super) fn session_lost(&mut self) {
        for (_, fetched) in std::mem::take(&mut self.fetching) {
            self.waiting.push((fetched.volume, fetched.block));
        }
    }

    fn is_done(&self) -> bool {
        self.begun && self.waiting.is_empty() && self.fetching.is_empty() && self.writing.is_empty()
    }
}

/// More requests than a process can make.
const REQUESTS_MAX: u64 = 1 << 40;

/// The command that writes the block of a request. Hosts' commands have numbers far below.
const fn command_of(request: u64) -> CommandId {
    CommandId(u64::MAX - request)
}

impl Primary {
    /// Gives what differs to a pass; true once that has ended.
    pub(super) fn repair_by_pass(&mut self) -> bool {
        let Some(job) = &mut self.verify.job else { return true };
        let Some(report) = &mut self.verify.report else { return true };
        if !job.passes {
            job.passes = true;
            for (volume, map) in self.volumes.iter_mut().zip(&report.differing) {
                volume.current.union(map);
                let mut from = Lba(0);
                while let Some((first, count)) = map.next_run(from, BlockCount(u64::MAX)) {
                    from = Lba(first.0.saturating_add(count.0));
                    if let Some(run) = ByteRange::of_blocks(first, count) {
                        // A crash before the pass ends makes it compare these regions.
                        volume.intent.request(run);
                    }
                }
            }
        }
        let done = !self.has_dirty() && self.pass.is_none();
        if let Some(report) = self.verify.report.as_mut().filter(|_| done) {
            report.repaired = report.differing_bytes();
        }
        done
    }

    /// True once every differing block was fetched and written, or left to a host's own write.
    pub(super) fn repair_is_done(&mut self) -> bool {
        let Some(job) = &mut self.verify.job else { return true };
        if !job.repairs.begun {
            job.repairs.begun = true;
            for (index, map) in
                self.verify.report.iter().flat_map(|report| report.differing.iter().enumerate())
            {
                let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
                let mut from = Lba(0);
                while let Some((first, count)) = map.next_run(from, BlockCount(u64::MAX)) {
                    from = Lba(first.0.saturating_add(count.0));
                    job.repairs.waiting.extend((first.0..from.0).map(|block| (volume, Lba(block))));
                }
            }
        }
        job.repairs.is_done()
    }

    /// Fetches the next blocks; gives the writes of those that came.
    pub(in super::super) fn plan_repairs(
        &mut self,
        out: &mut Outbox,
    ) -> Vec<(VolumeIndex, CommandId, ByteRange)> {
        let may_fetch = self.may_verify();
        let (session, at) = (self.session(), self.position());
        let Some(job) = &mut self.verify.job else { return Vec::new() };
        let repairs = &mut job.repairs;
        while may_fetch
            && repairs.fetching.len() + repairs.writing.len() < REPAIRS_MAX
            && let (Some((volume, block)), Some(session)) = (repairs.waiting.pop(), session)
        {
            self.verify.last += 1;
            let id = self.verify.last;
            let Some(range) = ByteRange::of_blocks(block, BlockCount(1)) else { continue };
            let request = VerifyRequest { id, volume, range, at, content: true };
            out.push(Effect::Send { session, frame: Message::VerifyRequest(request).encode() });
            let fetched = Fetched { volume, block, content: None, stale: false, prepared: false };
            repairs.fetching.insert(id, fetched);
        }
        let came = repairs.fetching.extract_if(.., |_, fetched| fetched.content.is_some());
        let (old, fresh): (Vec<_>, Vec<_>) = came.partition(|(_, fetched)| fetched.stale);
        let mut writes = Vec::new();
        for (id, fetched) in fresh {
            if let Some(range) = ByteRange::of_blocks(fetched.block, BlockCount(1)) {
                writes.push((fetched.volume, command_of(id), range));
                repairs.writing.insert(command_of(id), fetched);
            }
        }
        // A host's own write has taken the place of both sides' blocks.
        for _ in old {
            self.count(|report| &mut report.repaired);
        }
        writes
    }

    /// The partner's block.
    pub(super) fn repair_answered(&mut self, reply: VerifyReply, _out: &mut Outbox) {
        let Some(job) = &mut self.verify.job else { return };
        let Some(mut fetched) = job.repairs.fetching.remove(&reply.id) else { return };
        match reply.held {
            Held::Content(content)
                if u64::try_from(content.len()).is_ok_and(|length| length == DATA_UNIT_BYTES) =>
            {
                fetched.content = Some(content);
                job.repairs.fetching.insert(reply.id, fetched);
            }
            // It stays different, and the report says so.
            Held::Content(_) | Held::Hashes(_) | Held::Unreadable => {
                self.count(|report| &mut report.unreadable);
            }
        }
    }

    /// The content of a repair's write, whose range lock is held now; an error if a host wrote the block meanwhile.
    fn repair_content(&mut self, command: CommandId) -> Result<Bytes, HostError> {
        let writing = self.verify.job.as_mut().and_then(|job| job.repairs.writing.get_mut(&command));
        let fetched = writing.filter(|fetched| !fetched.stale).ok_or(HostError::Shutdown)?;
        fetched.prepared = true;
        fetched.content.clone().ok_or(HostError::Io)
    }

    fn repair_written(&mut self, command: CommandId, ok: bool) {
        let Some(job) = &mut self.verify.job else { return };
        let Some(fetched) = job.repairs.writing.remove(&command) else { return };
        if ok || fetched.stale {
            self.count(|report| &mut report.repaired);
        }
    }
}

impl Group {
    /// True if the command is a repair's and no host's.
    pub(in super::super) const fn is_repair(command: CommandId) -> bool {
        command.0 >= command_of(REQUESTS_MAX).0
    }

    pub(in super::super) fn write_repair(
        &mut self,
        volume: VolumeIndex,
        command: CommandId,
        range: ByteRange,
    ) {
        let now = self.now;
        if let Some(slot) = self.slot(volume) {
            slot.volume.submit(now, command, HostCommand::Write { range, fua: false });
        }
    }

    /// A repair's write has its range lock.
    pub(in super::super) fn prepare_repair(&mut self, volume: VolumeIndex, step: StepId, command: CommandId) {
        let content = match &mut self.mirror {
            Some(Mirror { machine: Machine::Primary(primary), .. }) => primary.repair_content(command),
            Some(_) | None => Err(HostError::Shutdown),
        };
        self.prepared(volume, step, content);
    }

    /// A repair's write ended.
    pub(in super::super) fn repair_replied(&mut self, command: CommandId, ok: bool) {
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror {
            primary.repair_written(command, ok);
        }
    }
}
