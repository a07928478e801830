//! The primary's second tier: what the ring has no room for goes to segments of the spill file, in order, and comes
//! back as the ring empties (docs/protocols/replication.md, section 5).
//!
//! Guarantees: ring, spill and what folded follow each other without a gap in the sequences; memory of ring and spill
//! together stays within the ring's budget; nothing here waits for the file, and a file that is full, slow or broken
//! only makes later records fold. Only records that ended at home are written, so none of them is ever voided.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use block::{Monotonic, Sequence, WallTime};
use bytes::Bytes;
use engine::dirty_map::DirtyMap;
use journal::{
    CUT_PAYLOAD_BYTES_MAX, RECORDS_MAX, Record, RingBudget, RingFull, SpillFault, SpillSegment, SpillSpace,
};

use super::MirrorSettings;
use super::effect::{IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::growth::has_blocks;
use super::kept::Keeping;
use super::primary::{Gate, Primary};

/// Segments being written; a disk that takes no more in time makes later records fold.
const WRITES_MAX: usize = 8;
/// Segments read ahead of the ring.
const READS_MAX: usize = 4;
/// Records that fill a segment, however few bytes they have.
const SEGMENT_RECORDS: usize = 1024;
/// After a failed write the file is left alone for so long.
const BROKEN_WAIT: Duration = Duration::from_secs(30);

/// Where a segment's records are.
#[derive(Debug)]
pub(super) enum Place {
    /// In memory, on their way to the file.
    Writing(Vec<Record>),
    /// In memory only: the write failed.
    Unwritten(Vec<Record>),
    /// In the file only.
    Stored,
    /// In the file, being read.
    Loading,
    /// In memory, read back; their place in the file is free again.
    Loaded(Vec<Record>),
}

/// A segment that the ring does not hold yet.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) key: u64,
    pub(super) segment: SpillSegment,
    pub(super) place: Place,
}

/// Which blocks the segments in the file change: a superset, exact when the spill is empty. Records in two
/// generations, so that what was sent long ago does not stay in it.
#[derive(Debug, Default)]
struct SpilledBlocks {
    older: Vec<DirtyMap>,
    older_through: Sequence,
    newer: Vec<DirtyMap>,
    newer_through: Sequence,
}

impl SpilledBlocks {
    fn add(&mut self, record: &Record) {
        let index = usize::from(record.volume.0);
        if self.newer.len() <= index {
            self.newer.resize_with(index + 1, DirtyMap::default);
        }
        if let Some(map) = self.newer.get_mut(index).filter(|_| has_blocks(record)) {
            map.set(record.range);
        }
        self.newer_through = self.newer_through.max(record.sequence);
    }

    /// Everything up to `through` left the spill.
    fn passed(&mut self, through: Sequence) {
        if through >= self.newer_through {
            *self = Self { older_through: through, newer_through: through, ..Self::default() };
        } else if through >= self.older_through {
            self.older = std::mem::take(&mut self.newer);
            self.older_through = self.newer_through;
        }
    }

    fn maps(&self) -> impl Iterator<Item = (usize, &DirtyMap)> {
        self.older.iter().enumerate().chain(self.newer.iter().enumerate())
    }
}

/// Memory and records of one part of the journal.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    bytes: u64,
    records: usize,
}

impl Held {
    fn of(records: &[Record]) -> Self {
        Self { bytes: records.iter().map(Record::payload_bytes).sum(), records: records.len() }
    }

    fn of_segment(segment: &SpillSegment) -> Self {
        let records = usize::try_from(segment.record_count).unwrap_or(usize::MAX);
        Self { bytes: segment.payload_bytes, records }
    }

    const fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.records += other.records;
    }

    fn subtract(&mut self, other: Self) {
        assert!(other.bytes <= self.bytes && other.records <= self.records, "every record is counted once");
        self.bytes -= other.bytes;
        self.records -= other.records;
    }

    const fn plus(mut self, other: Self) -> Self {
        self.add(other);
        self
    }

    /// True if it is within a part of the budget.
    fn fits(self, budget: RingBudget, part: u64) -> bool {
        let records = u64::try_from(self.records).unwrap_or(u64::MAX);
        let records_max = u64::try_from(budget.records_max).unwrap_or(u64::MAX);
        self.bytes <= budget.bytes_max / part && records <= records_max.div_ceil(part)
    }
}

/// The records behind the ring.
#[derive(Debug, Default)]
pub(super) struct Spill {
    pub(super) space: SpillSpace,
    /// In order; what follows is the tail.
    pub(super) queue: VecDeque<Queued>,
    pub(super) tail: VecDeque<Record>,
    /// The first sequence that neither ring nor queue covers, while the tail holds something.
    pub(super) tail_from: Sequence,
    /// Memory of the tail alone.
    tail_held: Held,
    /// Segments that are being written, wanted or not.
    writing: usize,
    /// Memory of the tail, and of segments that are written or could not be.
    behind: Held,
    /// Memory of segments that are read or were.
    coming: Held,
    blocks: SpilledBlocks,
    /// When the segments were sealed that the ring took back.
    times: VecDeque<(Sequence, WallTime)>,
    /// Writes that nobody waits for; their place is not taken again before they ended.
    abandoned: BTreeMap<u64, u64>,
    keys: u64,
    broken_until: Option<Monotonic>,
    /// What a stopping primary does to keep its journal.
    pub(super) keeping: Keeping,
}

impl Spill {
    pub(super) fn new(capacity: u64) -> Self {
        Self { space: SpillSpace::new(capacity), ..Self::default() }
    }

    /// True if records wait behind the ring.
    pub(super) fn is_pending(&self) -> bool {
        !self.queue.is_empty() || !self.tail.is_empty()
    }

    /// The first sequence behind the ring, if some are.
    pub(super) fn first(&self) -> Option<Sequence> {
        let tail = (!self.tail.is_empty()).then_some(self.tail_from);
        self.queue.front().map(|queued| queued.segment.first).or(tail)
    }

    /// Payload bytes in memory.
    pub(super) const fn held_bytes(&self) -> u64 {
        self.behind.bytes + self.coming.bytes
    }

    /// The records behind the ring that are in memory.
    pub(super) fn held_records(&self) -> impl Iterator<Item = &Record> {
        let queued = self.queue.iter().flat_map(|queued| match &queued.place {
            Place::Writing(records) | Place::Unwritten(records) | Place::Loaded(records) => {
                records.as_slice()
            }
            Place::Stored | Place::Loading => &[],
        });
        queued.chain(&self.tail)
    }

    /// Payload bytes behind the ring, in memory and in the file.
    pub(super) fn backlog_bytes(&self) -> u64 {
        let queued: u64 = self.queue.iter().map(|queued| queued.segment.payload_bytes).sum();
        queued + self.tail.iter().map(Record::payload_bytes).sum::<u64>()
    }

    /// Replaces a record that is not written yet, as [`journal::Ring::void`] does.
    pub(super) fn void(&mut self, sequence: Sequence) {
        let index = self.tail.partition_point(|record| record.sequence < sequence);
        if let Some(record) = self.tail.get_mut(index).filter(|record| record.sequence == sequence) {
            let void = Record::void(sequence, record.volume);
            let bytes = std::mem::replace(record, void).payload_bytes();
            self.behind.subtract(Held { bytes, records: 0 });
            self.tail_held.subtract(Held { bytes, records: 0 });
        }
    }

    /// When what a cut that ends at `through` says was sealed, if it comes from the spill.
    pub(super) fn time_for(&self, through: Sequence) -> Option<WallTime> {
        self.times.iter().find(|(last, _)| *last >= through).map(|(_, time)| *time)
    }

    /// A cut that ends at `through` was sent.
    pub(super) fn sent(&mut self, through: Sequence) {
        // One behind is kept: the cut may be sent again.
        while self.times.get(1).is_some_and(|(last, _)| *last < through) {
            self.times.pop_front();
        }
    }

    fn push(&mut self, record: Record) {
        if self.tail.is_empty() {
            self.tail_from = self.queue.back().map_or(record.sequence, |last| last.segment.last.next());
        }
        let held = Held::of(std::slice::from_ref(&record));
        self.behind.add(held);
        self.tail_held.add(held);
        self.tail.push_back(record);
    }

    /// The records at the tail's front that make a segment, if they are enough: up to `limit`, which ended at home.
    fn full_segment(&mut self, limit: Sequence, wanted: Held) -> Option<Vec<Record>> {
        if self.tail_held.bytes < wanted.bytes && self.tail_held.records < wanted.records {
            return None;
        }
        let mut held = Held::default();
        for record in self.tail.iter().take_while(|record| record.sequence <= limit) {
            let next = held.plus(Held::of(std::slice::from_ref(record)));
            if held.records > 0 && (next.bytes > CUT_PAYLOAD_BYTES_MAX || next.records > RECORDS_MAX) {
                break;
            }
            held = next;
            if held.bytes >= wanted.bytes || held.records >= wanted.records {
                self.tail_held.subtract(held);
                return Some(self.tail.drain(..held.records).collect());
            }
        }
        None
    }

    /// Puts records that are in memory into a segment at the queue's end and begins to write it. False if the file has
    /// no room: they stay in memory.
    pub(super) fn write(
        &mut self,
        settings: &MirrorSettings,
        sealed: (SpillSegment, journal::EncodedCut),
        records: Vec<Record>,
        out: &mut Outbox,
    ) -> bool {
        let (segment, cut) = sealed;
        self.keys += 1;
        let key = self.keys;
        let offset = self.space.take(segment.length);
        let place = match offset {
            Some(_) => Place::Writing(records),
            None => Place::Unwritten(records),
        };
        let segment = segment.at(offset.unwrap_or_default());
        self.queue.push_back(Queued { key, segment, place });
        if let Some(offset) = offset {
            assert!(settings.spill_bytes >= offset + segment.length, "a segment lies in the file");
            let data = std::iter::once(cut.head).chain(cut.payloads).collect();
            self.writing += 1;
            out.io(Purpose::SpillWrite { key }, IoRequest::SpillWrite { offset, data });
        }
        offset.is_some()
    }

    /// Writes on their way.
    pub(super) const fn writes(&self) -> usize {
        self.writing
    }

    /// The tail's first record leaves it.
    fn pop_tail(&mut self) -> Option<Record> {
        let record = self.tail.pop_front()?;
        let held = Held::of(std::slice::from_ref(&record));
        self.behind.subtract(held);
        self.tail_held.subtract(held);
        self.tail_from = record.sequence.next();
        Some(record)
    }

    /// A segment's write ended.
    fn written(&mut self, key: u64, ok: bool) {
        assert!(self.writing > 0, "a write ends once");
        self.writing -= 1;
        if let Some(offset) = self.abandoned.remove(&key) {
            return self.space.free(offset);
        }
        let Some(queued) = self.queue.iter_mut().rev().find(|queued| queued.key == key) else {
            return;
        };
        let Place::Writing(records) = std::mem::replace(&mut queued.place, Place::Stored) else {
            return;
        };
        if ok {
            self.behind.subtract(Held::of(&records));
            records.iter().for_each(|record| self.blocks.add(record));
        } else {
            queued.place = Place::Unwritten(records);
            self.space.free(queued.segment.offset);
        }
    }

    /// A segment that the ring takes back now: its records.
    fn leave(&mut self) -> Vec<Record> {
        let Some(Queued { segment, place, .. }) = self.queue.pop_front() else {
            return Vec::new();
        };
        self.times.push_back((segment.last, segment.time));
        self.blocks.passed(segment.last);
        match place {
            Place::Loaded(records) => {
                self.coming.subtract(Held::of(&records));
                records
            }
            Place::Unwritten(records) | Place::Writing(records) => {
                self.behind.subtract(Held::of(&records));
                records
            }
            Place::Stored | Place::Loading => {
                self.space.free(segment.offset);
                Vec::new()
            }
        }
    }

    /// Drops the segments from `index` on, and the tail; gives every record that is in memory.
    fn drop_from(&mut self, index: usize) -> Vec<Record> {
        let mut dropped = Vec::new();
        for Queued { key, segment, place } in self.queue.split_off(index) {
            match place {
                Place::Writing(records) => {
                    self.behind.subtract(Held::of(&records));
                    self.abandoned.insert(key, segment.offset);
                    dropped.extend(records);
                }
                Place::Unwritten(records) => {
                    self.behind.subtract(Held::of(&records));
                    dropped.extend(records);
                }
                Place::Loaded(records) => {
                    self.coming.subtract(Held::of(&records));
                    dropped.extend(records);
                }
                Place::Loading => {
                    self.coming.subtract(Held::of_segment(&segment));
                    self.space.free(segment.offset);
                }
                Place::Stored => self.space.free(segment.offset),
            }
        }
        let tail: Vec<Record> = self.tail.drain(..).collect();
        self.behind.subtract(Held::of(&tail));
        self.tail_held = Held::default();
        dropped.extend(tail);
        dropped
    }

    /// A superset of the blocks that the file's segments change, by volume.
    pub(super) fn stored_blocks(&self, volumes: usize) -> Vec<DirtyMap> {
        let mut merged: Vec<DirtyMap> = (0..volumes).map(|_| DirtyMap::default()).collect();
        for (index, map) in self.blocks.maps() {
            if let Some(known) = merged.get_mut(index) {
                known.union(map);
            }
        }
        merged
    }

    /// What a clean stop left in the file.
    pub(super) fn restore(&mut self, space: SpillSpace, segments: &[SpillSegment], blocks: Vec<DirtyMap>) {
        self.space = space;
        for segment in segments {
            self.keys += 1;
            self.queue.push_back(Queued { key: self.keys, segment: *segment, place: Place::Stored });
        }
        let newer_through = segments.last().map_or(Sequence(0), |last| last.last);
        self.blocks = SpilledBlocks { newer: blocks, newer_through, ..SpilledBlocks::default() };
    }

    /// Takes back what a stopping primary put together anew: memory is counted again.
    pub(super) fn requeue(&mut self) -> (VecDeque<Queued>, VecDeque<Record>) {
        self.behind = Held::default();
        self.coming = Held::default();
        self.tail_held = Held::default();
        (std::mem::take(&mut self.queue), std::mem::take(&mut self.tail))
    }

    /// Counts records that are in memory behind the ring.
    pub(super) fn count(&mut self, records: &[Record]) {
        self.behind.add(Held::of(records));
    }
}

impl Primary {
    /// Puts a record behind all that the journal holds.
    ///
    /// # Errors
    /// If there is no room in memory: the caller folds it.
    pub(super) fn journal(&mut self, record: Record) -> Result<(), RingFull> {
        let budget = self.ring.budget();
        let added = Held::of(std::slice::from_ref(&record));
        let ring = self.ring_held();
        let pending = self.spill.is_pending();
        let crowded = !self.ring.is_empty() && !ring.plus(added).fits(budget, 2);
        let spills = pending || (crowded && self.may_spill());
        if !spills {
            return self.ring.push(record);
        }
        let behind = self.spill.behind.plus(added);
        let all = behind.plus(self.spill.coming).plus(ring);
        if !behind.fits(budget, 2) || !all.fits(budget, 1) {
            return Err(RingFull);
        }
        self.spill.push(record);
        Ok(())
    }

    /// The ring should take no more before the target has received some of it.
    pub(super) fn is_crowded_by(&self, bytes: u64) -> bool {
        let added = Held { bytes, records: 1 };
        !self.ring.is_empty() && !self.ring_held().plus(added).fits(self.ring.budget(), 2)
    }

    fn ring_held(&self) -> Held {
        Held { bytes: self.ring.bytes(), records: self.ring.record_count() }
    }

    /// The order behind the ring is worth keeping: what is sent next continues what the target has.
    fn may_spill(&self) -> bool {
        self.spill.space.capacity() > 0
            && self.spill.broken_until.is_none()
            && self.pass.is_none()
            && self.gate == Gate::Open
            && self.chain.as_ref().is_some_and(|chain| chain.committed().position.same_lineage(&self.start))
    }

    /// Moves records between ring, memory and file as far as it can go.
    pub(super) fn spill_turn(
        &mut self,
        settings: &MirrorSettings,
        now: Monotonic,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        if self.spill.broken_until.is_some_and(|until| now >= until) {
            self.spill.broken_until = None;
        }
        if !self.spill.is_pending() || self.spill.keeping != Keeping::No {
            return;
        }
        self.refill();
        self.read_ahead(out);
        self.spill_more(settings, wall, out);
    }

    /// The ring takes what follows it and is in memory, up to half of its budget.
    fn refill(&mut self) {
        let known = self.stored_through();
        while let Some(front) = self.spill.queue.front() {
            let ready = match front.place {
                // Counted when it was asked for.
                Place::Loaded(_) => true,
                Place::Unwritten(_) => self.ring_takes(Held::of_segment(&front.segment)),
                // Sent before a restart, and acknowledged after it.
                Place::Stored => front.segment.last <= known,
                Place::Writing(_) | Place::Loading => false,
            };
            if !ready {
                return;
            }
            for record in self.spill.leave() {
                self.refill_one(record, known);
            }
        }
        while let Some(front) = self.spill.tail.front() {
            if !self.ring_takes(Held::of(std::slice::from_ref(front))) {
                return;
            }
            if let Some(record) = self.spill.pop_tail() {
                self.refill_one(record, known);
            }
        }
    }

    /// The last sequence of this lineage that the target acknowledged.
    fn stored_through(&self) -> Sequence {
        let stored = self.chain.as_ref().map(|chain| chain.stored().position);
        stored.filter(|tip| tip.same_lineage(&self.start)).map_or(Sequence(0), |tip| tip.sequence)
    }

    fn refill_one(&mut self, record: Record, known: Sequence) {
        if record.sequence <= known {
            return;
        }
        let pushed = self.ring.push(record);
        assert_eq!(pushed, Ok(()), "the ring's budget covers what lies behind it in memory");
    }

    fn ring_takes(&self, more: Held) -> bool {
        let taken = self.ring_held().plus(self.spill.coming).plus(more);
        self.ring.is_empty() || taken.fits(self.ring.budget(), 2)
    }

    /// Asks for the segments that the ring will take next.
    fn read_ahead(&mut self, out: &mut Outbox) {
        let (ring, budget) = (self.ring_held(), self.ring.budget());
        let spill = &mut self.spill;
        let mut ahead = 0;
        for queued in &mut spill.queue {
            match queued.place {
                Place::Loading | Place::Loaded(_) => ahead += 1,
                Place::Unwritten(_) => {}
                Place::Writing(_) => return,
                Place::Stored => {
                    let held = Held::of_segment(&queued.segment);
                    let taken = ring.plus(spill.coming);
                    let room = taken.plus(held).fits(budget, 2) || taken.records == 0;
                    if ahead >= READS_MAX || !room {
                        return;
                    }
                    ahead += 1;
                    spill.coming.add(held);
                    queued.place = Place::Loading;
                    let SpillSegment { offset, length, .. } = queued.segment;
                    out.io(Purpose::SpillRead { key: queued.key }, IoRequest::SpillRead { offset, length });
                }
            }
        }
    }

    /// Writes full segments of the tail.
    fn spill_more(&mut self, settings: &MirrorSettings, wall: WallTime, out: &mut Outbox) {
        let limit = self.ended_through();
        let budget = self.ring.budget();
        let wanted = Held {
            bytes: settings.cut_bytes.min(budget.bytes_max / 8).max(1),
            records: SEGMENT_RECORDS.min(budget.records_max / 8).max(1),
        };
        while self.spill.broken_until.is_none() && self.spill.writes() < WRITES_MAX {
            // Without room the tail stays as it is: the ring may take it before there is some.
            let lowest = wanted.bytes.next_multiple_of(journal::PAGE_BYTES) + journal::PAGE_BYTES;
            let capacity = self.spill.space.capacity();
            // A clean stop puts the memory there too.
            let reserve = budget.bytes_max.min(capacity / 4);
            if capacity < self.spill.space.used_bytes() + lowest + reserve {
                return;
            }
            let Some(records) = self.spill.full_segment(limit, wanted) else {
                return;
            };
            let last = records.last().map_or(self.spill.tail_from, |record| record.sequence);
            let ends = (self.spill.tail_from, last);
            self.spill.tail_from = last.next();
            let sealed = SpillSegment::seal(settings.mirror, self.start.into(), ends, wall, &records);
            if !self.spill.write(settings, sealed, records, out) {
                return;
            }
        }
    }

    /// A segment was written, or not.
    pub(super) fn spill_written(
        &mut self,
        key: u64,
        failure: Option<IoFailure>,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        self.spill.written(key, failure.is_none());
        if let Some(failure) = failure {
            if self.spill.broken_until.is_none() {
                out.log(
                    Loudness::Warn,
                    format!(
                        "the spill file cannot be written: {failure}; what the ring has no room for is kept in the dirty map meanwhile"
                    ),
                );
            }
            self.spill.broken_until = Some(now + BROKEN_WAIT);
        }
    }

    /// A segment was read, or not.
    pub(super) fn spill_read(
        &mut self,
        key: u64,
        result: Result<Bytes, IoFailure>,
        settings: &MirrorSettings,
        out: &mut Outbox,
    ) {
        let lineage = self.start.into();
        let Some(index) = self.spill.queue.iter().position(|queued| queued.key == key) else {
            return;
        };
        let Some(queued) = self.spill.queue.get_mut(index) else {
            return;
        };
        if !matches!(queued.place, Place::Loading) {
            return;
        }
        let opened = match result {
            Ok(bytes) => queued
                .segment
                .open(settings.mirror, lineage, &bytes)
                .map_err(|fault: SpillFault| fault.to_string()),
            Err(failure) => Err(failure.to_string()),
        };
        match opened {
            Ok(records) => {
                queued.place = Place::Loaded(records);
                self.spill.space.free(queued.segment.offset);
            }
            Err(reason) => self.spill_lost(index, &reason, out),
        }
    }

    /// A segment cannot be read: it and all that follows folds. What lies before it is still sent in order.
    fn spill_lost(&mut self, index: usize, reason: &str, out: &mut Outbox) {
        let Some(first) = self.spill.queue.get(index).map(|queued| queued.segment.first) else {
            return;
        };
        out.log(
            Loudness::Warn,
            format!(
                "the spill file cannot be read ({reason}): from sequence {first} on, changed blocks are kept in the dirty map"
            ),
        );
        self.fold_spill_from(index);
        self.folded_from = Some(first);
    }

    /// Everything that the spill holds joins the dirty map.
    pub(super) fn fold_spill(&mut self) {
        self.fold_spill_from(0);
        self.spill.blocks = SpilledBlocks::default();
        self.spill.times.clear();
    }

    fn fold_spill_from(&mut self, index: usize) {
        if !self.spill.is_pending() {
            return;
        }
        self.sizes.forget_sent();
        let maps = self.spill.stored_blocks(self.volumes.len());
        for (volume, map) in self.volumes.iter_mut().zip(&maps) {
            volume.current.union(map);
        }
        let last = self.spill.queue.back().map(|queued| queued.segment.last);
        self.commit_floor = self.commit_floor.max(last.unwrap_or_default());
        for record in self.spill.drop_from(index) {
            self.commit_floor = self.commit_floor.max(record.sequence);
            if has_blocks(&record) {
                self.volume(record.volume).current.set(record.range);
            }
        }
    }
}

#[cfg(test)]
mod tests;
