//! Resync at the primary: which blocks differ (compare), how they travel (copy), and when a pass begins.
//!
//! A block that the journal does not hold is in a dirty map. A pass copies the dirty blocks: each is read under its
//! range lock, takes a sequence and joins the ring like a write. The target stages the pass's cuts; the last one
//! commits them all. A block that folds meanwhile joins the pass again.

use std::collections::{BTreeMap, VecDeque};

use block::{BlockCount, ByteCount, ByteRange, DATA_UNIT_BYTES, Lba, Monotonic, Sequence, VolumeIndex};
use bytes::Bytes;
use engine::StepId;
use engine::intent_map::IntentMap;
use journal::{Record, RecordKind};
use protocol::{CompareRange, HashReply, HashRequest, Message};

use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::primary::{Gate, Pass, Primary};

/// Bytes that one hash request covers; its reply is 32 bytes a block.
const COMPARE_BYTES: u64 = 1 << 20;
/// Hash requests on the way; bounds the target's reads and the primary's memory.
const COMPARES_MAX: usize = 8;
/// Blocks that one copy reads under its lock: 256 KiB keeps a host's wait below a millisecond.
const COPY_BLOCKS: u64 = 64;
/// Copies being read or waiting for their lock.
const COPIES_MAX: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Region {
    volume: VolumeIndex,
    range: ByteRange,
    /// The partner wrote here while it was a primary: a difference may be a write that this side never had.
    orphan: bool,
}

#[derive(Debug)]
struct Asked {
    region: Region,
    hashes: Option<Vec<[u8; 32]>>,
    home: Option<Result<Bytes, IoFailure>>,
}

/// Regions whose content at the target's durable tip is compared by hash.
#[derive(Debug, Default)]
pub(super) struct Compare {
    queue: VecDeque<Region>,
    asked: BTreeMap<u64, Asked>,
    last: u64,
}

impl Compare {
    pub(super) fn add_regions(
        &mut self,
        volume: VolumeIndex,
        intent: &IntentMap,
        size: ByteCount,
        region_bytes: u64,
    ) {
        for region in intent.set_regions() {
            let start = region.saturating_mul(region_bytes);
            let end = start.saturating_add(region_bytes).min(size.0);
            if let Some(range) = ByteRange::between(start, end) {
                self.add(volume, range, false);
            }
        }
    }

    /// What the partner lists takes the place of what it listed before.
    pub(super) fn add_partner_ranges(&mut self, ranges: &[CompareRange]) {
        self.queue.retain(|region| !region.orphan);
        for entry in ranges {
            self.add(entry.volume, entry.range, true);
        }
    }

    pub(super) fn add(&mut self, volume: VolumeIndex, range: ByteRange, orphan: bool) {
        let mut offset = range.offset();
        while offset < range.end() {
            let end = range.end().min(offset.saturating_add(COMPARE_BYTES));
            if let Some(range) = ByteRange::between(offset, end) {
                self.queue.push_back(Region { volume, range, orphan });
            }
            offset = end;
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.asked.is_empty()
    }

    pub(super) fn remaining_bytes(&self) -> u64 {
        let asked = self.asked.values().map(|asked| asked.region.range.length());
        self.queue.iter().map(|region| region.range.length()).chain(asked).sum()
    }

    /// The session ended: what was asked is asked again in the next one.
    pub(super) fn session_lost(&mut self) {
        for (_, asked) in std::mem::take(&mut self.asked) {
            self.queue.push_back(asked.region);
        }
    }

    fn may_ask(&self) -> bool {
        self.asked.len() < COMPARES_MAX && !self.queue.is_empty()
    }

    fn ask(&mut self) -> Option<(u64, Region)> {
        let region = self.queue.pop_front()?;
        self.last += 1;
        self.asked.insert(self.last, Asked { region, hashes: None, home: None });
        Some((self.last, region))
    }

    fn answered(&mut self, request: u64, answer: impl FnOnce(&mut Asked)) -> Option<Asked> {
        let asked = self.asked.get_mut(&request)?;
        answer(asked);
        let complete = asked.hashes.is_some() && asked.home.is_some();
        if complete { self.asked.remove(&request) } else { None }
    }
}

/// Copies under way.
#[derive(Debug, Default)]
pub(super) struct Copying {
    active: BTreeMap<(VolumeIndex, u64), ActiveCopy>,
    cursor: Lba,
    /// After a read error blocks are read one by one until so many succeeded.
    careful: u64,
}

#[derive(Clone, Copy, Debug)]
struct ActiveCopy {
    range: ByteRange,
    step: Option<StepId>,
}

impl Copying {
    pub(super) fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    fn overlaps(&self, volume: VolumeIndex, range: ByteRange) -> bool {
        self.ranges().any(|(of, active)| of == volume && active.overlaps(range))
    }

    fn bytes(&self) -> u64 {
        self.active.values().map(|copy| copy.range.length()).sum()
    }

    /// The lock of a planned copy was asked for as `step`.
    pub(super) fn locking(&mut self, volume: VolumeIndex, range: ByteRange, step: StepId) {
        if let Some(copy) = self.active.get_mut(&(volume, range.offset())) {
            copy.step = Some(step);
        }
    }

    /// Gives up every copy; the steps' locks are the caller's to release.
    pub(super) fn abandon(&mut self) -> Vec<(VolumeIndex, StepId)> {
        let active = std::mem::take(&mut self.active);
        active.into_iter().filter_map(|((volume, _), copy)| Some((volume, copy.step?))).collect()
    }

    /// Every range that is being copied: dirty, although its bits are already off.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (VolumeIndex, ByteRange)> {
        self.active.iter().map(|((volume, _), copy)| (*volume, copy.range))
    }
}

impl Primary {
    /// Asks for hashes and reads home, as far as the window allows.
    pub(super) fn compare_more(&mut self, now: Monotonic, out: &mut Outbox) {
        let Some(session) = self.session() else { return };
        while self.compare.may_ask() && self.copy_rate.admits(now) {
            let Some((request, region)) = self.compare.ask() else { return };
            self.copy_rate.spent(region.range.length());
            let frame =
                Message::HashRequest(HashRequest { id: request, volume: region.volume, range: region.range });
            out.push(Effect::Send { session, frame: frame.encode() });
            if region.range.offset() >= self.volume(region.volume).size.0 {
                // A partner that was fenced has more of the volume: here it would be zeros.
                let zeros = usize::try_from(region.range.length()).unwrap_or_default();
                self.compare_home(request, Ok(Bytes::from(vec![0; zeros])));
                continue;
            }
            out.io(
                Purpose::CompareRead { request },
                IoRequest::HomeRead { volume: region.volume, range: region.range },
            );
        }
    }

    pub(super) fn compare_home(&mut self, request: u64, home: Result<Bytes, IoFailure>) {
        if let Some(asked) = self.compare.answered(request, |asked| asked.home = Some(home)) {
            self.compared(&asked);
        }
    }

    pub(super) fn compare_hashes(&mut self, reply: HashReply) {
        if let Some(asked) = self.compare.answered(reply.id, |asked| asked.hashes = Some(reply.hashes)) {
            self.compared(&asked);
        }
    }

    fn compared(&mut self, asked: &Asked) {
        let Region { volume, range, orphan } = asked.region;
        let mut differing = 0;
        let home = asked.home.as_ref().and_then(|home| home.as_ref().ok());
        let hashes = asked.hashes.as_deref().unwrap_or_default();
        for index in 0..range.block_count().0 {
            let hash = usize::try_from(index).ok().and_then(|index| hashes.get(index));
            let ours =
                home.and_then(|home| block_of(home, index)).map(|block| *blake3::hash(block).as_bytes());
            // What cannot be read on either side counts as different.
            if ours.is_some() && ours.as_ref() == hash {
                continue;
            }
            differing += 1;
            let first = Lba(range.first_block().0 + index);
            let of = self.volume(volume);
            if let Some(block) = ByteRange::of_blocks(first, BlockCount(1))
                && block.end() <= of.size.0
            {
                of.current.set(block);
            }
        }
        if orphan {
            self.orphaned = ByteCount(self.orphaned.0 + differing * DATA_UNIT_BYTES);
        }
    }

    /// Begins a pass if dirty blocks wait for one and everything before them was sent.
    pub(super) fn start_pass_if_needed(&mut self, out: &mut Outbox) {
        // The spilled prefix is sent first.
        if self.pass.is_some() || self.gate != Gate::Open || !self.has_dirty() || self.spill.is_pending() {
            return;
        }
        if self.folded_from.is_some_and(|first| self.sent_through().next() < first) {
            return;
        }
        self.start_pass(false, out);
    }

    /// Begins a pass; from now on records join the ring again.
    pub(super) fn start_pass(&mut self, initial: bool, out: &mut Outbox) {
        assert!(self.pass.is_none(), "one pass at a time");
        // Copies join the ring at once, so nothing may lie behind it.
        self.fold_spill();
        for volume in &mut self.volumes {
            let staged = volume.next.take();
            volume.current.union(&staged);
            let bad = volume.bad.take();
            volume.current.union(&bad);
        }
        self.folded_from = None;
        self.copying.cursor = Lba(0);
        // A pass is named by the sequence that follows: later passes of this incarnation have later names.
        let id = if initial { 0 } else { self.last.0 + 1 };
        self.pass = Some(Pass { id, commit: None });
        let kind = if initial { "the initial copy" } else { "a resync" };
        let bytes: u64 = self.volumes.iter().map(|volume| volume.current.count().bytes().0).sum();
        out.log(
            Loudness::Info,
            format!(
                "{kind} begins: {bytes} bytes to copy, {} bytes to compare",
                self.compare.remaining_bytes()
            ),
        );
    }

    /// The target lost what was staged: its blocks are dirty again.
    pub(super) fn abort_pass(&mut self) {
        self.pass = None;
        for volume in &mut self.volumes {
            let staged = volume.next.take();
            volume.current.union(&staged);
        }
    }

    /// Chooses the next ranges to copy; the caller asks for their locks.
    pub(super) fn plan_copies(&mut self, now: Monotonic) -> Vec<(VolumeIndex, ByteRange)> {
        let mut planned = Vec::new();
        let copies = self.session().is_some()
            && self.gate == Gate::Open
            && self.pass.is_some_and(|pass| pass.commit.is_none());
        if !copies {
            return planned;
        }
        let room = self.ring.budget().bytes_max / 2;
        // A small ring takes small copies, so that some always fit.
        let blocks = (room / 4 / DATA_UNIT_BYTES).clamp(1, COPY_BLOCKS);
        while self.copying.active.len() < COPIES_MAX {
            let taken = self.ring.bytes() + self.copying.bytes();
            let crowded = self.ring.record_count() >= self.ring.budget().records_max / 2;
            if taken + blocks * DATA_UNIT_BYTES > room || crowded {
                break;
            }
            let cursor = self.copying.cursor;
            let Some((volume, range)) = self.next_dirty_run(blocks) else {
                break;
            };
            // Dirty again while it is being copied: once more, after that.
            if self.copying.overlaps(volume, range) {
                break;
            }
            if !self.copy_rate.admits(now) {
                self.copying.cursor = cursor;
                break;
            }
            self.copy_rate.spent(range.length());
            self.volume(volume).current.clear(range);
            self.copying.active.insert((volume, range.offset()), ActiveCopy { range, step: None });
            planned.push((volume, range));
        }
        planned
    }

    fn next_dirty_run(&mut self, blocks_max: u64) -> Option<(VolumeIndex, ByteRange)> {
        let blocks = if self.copying.careful > 0 { 1 } else { blocks_max };
        for start in [self.copying.cursor, Lba(0)] {
            for (index, volume) in self.volumes.iter().enumerate() {
                if let Some((first, count)) = volume.current.next_run(start, BlockCount(blocks)) {
                    self.copying.cursor = Lba(first.0 + count.0);
                    let range = ByteRange::of_blocks(first, count)?;
                    return Some((VolumeIndex(u16::try_from(index).ok()?), range));
                }
            }
        }
        None
    }

    /// The lock of a planned copy is held: read its blocks.
    pub(super) fn copy_locked(&self, volume: VolumeIndex, range: ByteRange, out: &mut Outbox) {
        out.io(Purpose::CopyRead { volume, range }, IoRequest::HomeRead { volume, range });
    }

    /// The blocks of a copy were read under their lock: they take a sequence and join the ring. Returns the step whose
    /// lock the caller must release now.
    pub(super) fn copy_read(
        &mut self,
        volume: VolumeIndex,
        range: ByteRange,
        home: Result<Bytes, IoFailure>,
        now: Monotonic,
        out: &mut Outbox,
    ) -> Option<StepId> {
        let copy = self.copying.active.remove(&(volume, range.offset()))?;
        let single = range.block_count().0 == 1;
        let (kind, payload) = match home {
            Ok(data) if data.iter().all(|byte| *byte == 0) => (RecordKind::CopyZero, Bytes::new()),
            Ok(data) => (RecordKind::Copy, data),
            Err(_) if !single => {
                self.copying.careful = 2 * COPY_BLOCKS;
                self.volume(volume).current.set(range);
                return copy.step;
            }
            Err(failure) => {
                out.log(
                    Loudness::Error,
                    format!("block at byte {} cannot be read: {failure}", range.offset()),
                );
                (RecordKind::Bad, Bytes::new())
            }
        };
        self.copying.careful = self.copying.careful.saturating_sub(1);
        let sequence = Sequence(self.last.0 + 1);
        if self.ring.push(Record { sequence, volume, kind, range, payload }).is_err() {
            self.volume(volume).current.set(range);
            return copy.step;
        }
        if kind == RecordKind::Bad {
            self.volume(volume).bad.set(range);
        }
        let taken = self.take_sequence(now);
        assert_eq!(taken, sequence, "sequences are assigned one by one");
        self.volume(volume).tracker.adopt(range, sequence, now);
        self.commit_floor = sequence;
        copy.step
    }
}

fn block_of(data: &Bytes, index: u64) -> Option<&[u8]> {
    let start = usize::try_from(index * DATA_UNIT_BYTES).ok()?;
    data.get(start..start + usize::try_from(DATA_UNIT_BYTES).ok()?)
}
