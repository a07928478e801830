//! The applier: committed cuts go home in order, then redo is released.
//!
//! Several cuts are merged into one set of disjoint writes, so they run in parallel. `applied` moves when the writes
//! ended; redo is released only after every home file touched was flushed and a checkpoint is durable. Nothing is
//! written home before a durable checkpoint's limit allows it, so `window` can say what home may hold. A failed write
//! keeps its cuts in redo and is tried again; after a failed flush all that it should have covered is written again.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use block::{ByteCount, ByteRange, Monotonic, Tip, VolumeIndex};
use bytes::Bytes;
use engine::apply::{ApplyStep, Source, plan};
use engine::overlay::CutNumber;
use journal::{Change, Checkpoint, Cursor, Placement, Record};

use super::MirrorSettings;
use super::effect::{IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::growth::issue_sizes;
use super::secondary::Secondary;
use super::window::{Begun, Hold, Point};

/// Bytes of cuts merged into one set of writes.
const MERGE_BYTES_MAX: u64 = 4 << 20;
/// Payload that waits in memory to be applied; beyond it cuts are read back from redo.
const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Home is flushed when so much was applied since the last flush,
const FLUSH_BYTES: u64 = 32 << 20;
/// or when so long has passed.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// After a failed write or flush the applier waits so long.
const FAULT_PAUSE: Duration = Duration::from_secs(1);

/// A durable cut that is not yet applied and flushed.
#[derive(Clone, Debug)]
pub(super) struct ApplyItem {
    /// Its place in the order of cuts.
    pub(super) number: CutNumber,
    pub(super) placement: Placement,
    pub(super) tip: Tip,
    /// `None` if they must be read back from redo.
    pub(super) records: Option<Vec<Record>>,
    /// Its records are at home already (initial copy).
    pub(super) done: bool,
    /// What it changes at home.
    pub(super) changes: Vec<Change>,
    /// The sizes that it records.
    pub(super) sizes: Vec<(VolumeIndex, ByteCount)>,
    /// If it commits: a point of the retention window.
    pub(super) point: Option<Point>,
    /// When the retention window lets it go home.
    pub(super) due: Monotonic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// The checkpoint is written for its limit only.
    Raising,
    Reading,
    /// A drill keeps what the next writes change.
    Guarding,
    Writing,
    Flushing,
    Checkpointing,
}

/// The applier's state.
#[derive(Debug)]
pub(super) struct Applying {
    stage: Stage,
    /// When reading or writing the cuts under way began.
    started: Option<Monotonic>,
    outstanding: usize,
    failed: bool,
    /// The cuts being written.
    current: Vec<ApplyItem>,
    /// The end of what is at home, flushed or not.
    pub(super) applied: Tip,
    /// At home, but perhaps not on stable media; their records stay in redo.
    unflushed: VecDeque<ApplyItem>,
    unflushed_bytes: u64,
    unflushed_since: Option<Monotonic>,
    touched: BTreeSet<VolumeIndex>,
    /// Flush and release as soon as possible.
    pub(super) hurry: bool,
    paused_until: Option<Monotonic>,
    pub(super) degraded: bool,
    /// How often cuts that home had shown were queued again.
    pub(super) replays: u64,
}

impl Applying {
    /// An applier behind which everything up to `applied` is at home.
    pub(super) const fn new(applied: Tip) -> Self {
        Self {
            stage: Stage::Idle,
            started: None,
            outstanding: 0,
            failed: false,
            current: Vec::new(),
            applied,
            unflushed: VecDeque::new(),
            unflushed_bytes: 0,
            unflushed_since: None,
            touched: BTreeSet::new(),
            hurry: false,
            paused_until: None,
            degraded: false,
            replays: 0,
        }
    }

    /// No request is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }

    /// Everything applied is flushed and released.
    pub(super) fn is_clean(&self) -> bool {
        self.is_idle() && self.unflushed.is_empty() && self.current.is_empty()
    }

    /// A replay of what is not released would change nothing at home.
    pub(super) fn holds_only_headers(&self) -> bool {
        self.is_idle() && self.current.is_empty() && self.unflushed.iter().all(|item| item.done)
    }

    /// The cuts on their way home.
    pub(super) fn under_way(&self) -> impl Iterator<Item = &ApplyItem> {
        self.current.iter()
    }

    /// Something that a drill waited for has ended: the writes may be tried again.
    pub(super) fn unguard(&mut self) {
        if self.stage == Stage::Guarding {
            self.stage = Stage::Idle;
        }
    }

    fn flush_at(&self) -> Option<Monotonic> {
        self.unflushed_since.map(|since| since + FLUSH_INTERVAL)
    }
}

/// Issues the writes of a plan; returns how many.
pub(super) fn issue(steps: &[ApplyStep], records: &[Record], purpose: Purpose, out: &mut Outbox) -> usize {
    for step in steps {
        let (volume, range) = (step.volume, step.range);
        let request = match &step.source {
            Source::Payload { record, offset } => {
                let payload = records.get(*record).map(|record| slice(&record.payload, *offset, range));
                IoRequest::HomeWrite { volume, offset: range.offset(), data: payload.unwrap_or_default() }
            }
            Source::Zeros => IoRequest::HomeZero { volume, range, trim: false },
            Source::ZeroRange => IoRequest::HomeZero { volume, range, trim: true },
        };
        out.io(purpose, request);
    }
    steps.len()
}

fn slice(payload: &Bytes, start: usize, range: ByteRange) -> Bytes {
    let end = start.saturating_add(usize::try_from(range.length()).unwrap_or(usize::MAX));
    assert!(end <= payload.len(), "a plan stays inside its payloads");
    payload.slice(start..end)
}

impl Secondary {
    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        if !self.applying.is_idle() {
            return None;
        }
        self.applying
            .paused_until
            .or_else(|| [self.applying.flush_at(), self.poll_window()].into_iter().flatten().min())
    }

    /// Starts whatever the applier can do next.
    pub(super) fn apply_more(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) {
        while self.applying.is_idle() {
            if self.applying.paused_until.is_some_and(|until| now < until) {
                return;
            }
            self.applying.paused_until = None;
            let started = self.retry_current(now, out)
                || self.flush_if_due(now, settings, out)
                || self.apply_ready(settings, now, out);
            if !started {
                return;
            }
        }
    }

    /// Cuts whose writes failed are written again.
    fn retry_current(&mut self, now: Monotonic, out: &mut Outbox) -> bool {
        if self.applying.current.is_empty() {
            return false;
        }
        self.write_current(now, out);
        true
    }

    fn flush_if_due(&mut self, now: Monotonic, settings: &MirrorSettings, out: &mut Outbox) -> bool {
        let Some(since) = self.applying.unflushed_since else {
            return false;
        };
        let hurried = self.applying.hurry && self.ready(settings, now, 1) == 0;
        let applying = &mut self.applying;
        let due = now.since(since) >= FLUSH_INTERVAL || applying.unflushed_bytes >= FLUSH_BYTES;
        if !due && !hurried {
            return false;
        }
        applying.stage = Stage::Flushing;
        applying.failed = false;
        applying.outstanding = applying.touched.len();
        for volume in std::mem::take(&mut applying.touched) {
            out.io(Purpose::ApplyFlush, IoRequest::HomeFlush { volume });
        }
        if applying.outstanding == 0 {
            self.write_checkpoint(settings, now, out);
        }
        true
    }

    /// Takes the next cuts that may go home: the limit first, then what is not in memory, then the writes.
    fn apply_ready(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) -> bool {
        let ready = self.ready(settings, now, MERGE_BYTES_MAX);
        if ready == 0 && !self.is_unlimited() {
            return false;
        }
        if let Some(limit) = self.wanted_limit(settings, now) {
            let checkpoint = self.checkpoint.next(self.checkpoint.applied, self.checkpoint.scan_start);
            self.applying.stage = Stage::Raising;
            self.store_checkpoint(checkpoint.with_limit(limit), out);
            return true;
        }
        let limit = self.checkpoint.limit;
        let allowed = self.queue.iter().take(ready).take_while(|item| item.placement.end() <= limit).count();
        if !self.read_back(allowed, now, out) {
            self.write_next(allowed, now, out);
        }
        true
    }

    /// Reads cuts that are not in memory, if the first of all is not.
    fn read_back(&mut self, count: usize, now: Monotonic, out: &mut Outbox) -> bool {
        let lacks = |item: &&ApplyItem| item.records.is_none() && !item.done;
        if self.queue.front().as_ref().is_none_or(|front| !lacks(front)) {
            return false;
        }
        self.applying.stage = Stage::Reading;
        self.applying.failed = false;
        self.applying.outstanding = 0;
        self.applying.started = Some(now);
        for item in self.queue.iter().take(count).filter(lacks) {
            self.applying.outstanding += 1;
            let placement = &item.placement;
            out.io(
                Purpose::ApplyRead { number: item.number },
                IoRequest::RedoRead {
                    file: placement.file_index,
                    offset: placement.offset,
                    length: placement.length,
                },
            );
        }
        true
    }

    /// A cut was read back from redo.
    pub(super) fn apply_read(
        &mut self,
        number: CutNumber,
        data: Result<Bytes, IoFailure>,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        self.applying.outstanding = self.applying.outstanding.saturating_sub(1);
        if self.applying.outstanding == 0 {
            self.applying.stage = Stage::Idle;
        }
        let decoded = data
            .map_err(|failure| failure.to_string())
            .and_then(|bytes| journal::decode(&bytes).map_err(|error| error.to_string()));
        let Some(item) = self.queue.iter_mut().find(|item| item.number == number) else {
            return;
        };
        match decoded {
            Ok(cut) if cut.tip == item.tip => item.records = Some(cut.records),
            Ok(_) => self.fault("redo holds another cut than the one that was written", now, out),
            Err(error) => self.fault(&format!("a cut cannot be read back from redo: {error}"), now, out),
        }
    }

    fn write_next(&mut self, count: usize, now: Monotonic, out: &mut Outbox) {
        for _ in 0..count {
            if self.queue.front().is_none_or(|item| item.records.is_none() && !item.done) {
                break;
            }
            if let Some(item) = self.queue.pop_front() {
                self.waiting.subtract(&item);
                self.applying.current.push(item);
            }
        }
        self.applying.unflushed_since.get_or_insert(now);
        self.applying.started.get_or_insert(now);
        self.write_current(now, out);
    }

    fn write_current(&mut self, now: Monotonic, out: &mut Outbox) {
        if let Some(last) = self.applying.current.last() {
            let begun = Begun { number: last.number, end: last.placement.end(), point: last.point };
            // What is written again after a failed flush was begun before, and perhaps more.
            if begun.number >= self.begun.number {
                self.begun = begun;
            }
        }
        // Only behind that: a rewind must not choose a point before what waits for the drill here.
        self.applying.stage = Stage::Guarding;
        if !self.guard_home(out) {
            return;
        }
        let records: Vec<Record> = self
            .applying
            .current
            .iter()
            .filter(|item| !item.done)
            .flat_map(|item| journal::without_voided(item.records.as_deref().unwrap_or_default()).cloned())
            .collect();
        let records = self.room.with_zeros(records);
        let steps = plan(&records);
        self.applying.touched.extend(steps.iter().map(|step| step.volume));
        self.applying.stage = Stage::Writing;
        self.applying.failed = false;
        self.applying.outstanding =
            issue(&steps, &records, Purpose::Apply, out) + issue_sizes(&records, Purpose::Apply, out);
        if self.applying.outstanding == 0 {
            self.writes_ended(now);
        }
    }

    /// A write of the applier was answered.
    pub(super) fn apply_written(&mut self, ok: bool, now: Monotonic, out: &mut Outbox) {
        self.applying.outstanding = self.applying.outstanding.saturating_sub(1);
        self.applying.failed |= !ok;
        if self.applying.outstanding > 0 {
            return;
        }
        if self.applying.failed {
            self.applying.stage = Stage::Idle;
            return self.fault("a cut could not be applied: it stays in redo and is tried again", now, out);
        }
        self.writes_ended(now);
    }

    fn writes_ended(&mut self, now: Monotonic) {
        let applying = &mut self.applying;
        applying.stage = Stage::Idle;
        applying.degraded = false;
        let bytes = applying.current.iter().map(|item| item.placement.length).sum();
        if let Some(started) = applying.started.take() {
            self.rate.measured(bytes, now.since(started));
        }
        for item in applying.current.drain(..) {
            self.overlay.remove(item.number, &item.changes);
            if let Some(drill) = &mut self.drill {
                drill.base.remove(item.number, &item.changes);
            }
            applying.applied = item.tip;
            applying.unflushed_bytes += item.placement.length;
            applying.unflushed.push_back(ApplyItem { records: None, ..item });
        }
    }

    /// A flush of the applier was answered.
    pub(super) fn apply_flushed(
        &mut self,
        ok: bool,
        settings: &MirrorSettings,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        self.applying.outstanding = self.applying.outstanding.saturating_sub(1);
        self.applying.failed |= !ok;
        if self.applying.outstanding > 0 {
            return;
        }
        if self.applying.failed {
            self.applying.stage = Stage::Idle;
            self.replay();
            return self.fault("flushing the target's volumes failed: redo is applied again", now, out);
        }
        self.write_checkpoint(settings, now, out);
    }

    fn write_checkpoint(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) {
        let end = self.applying.unflushed.back().map(|item| item.placement.end());
        let scan_start = end.unwrap_or(self.checkpoint.scan_start);
        let mut checkpoint = self.checkpoint.next(self.applying.applied, scan_start);
        if self.hold == Hold::Window {
            // It is written anyway: so it says how far the next second goes.
            let known = self.checkpoint.limit != Cursor::END;
            let ahead = self.limit_ahead(settings, now);
            checkpoint = checkpoint.with_limit(if known { ahead.max(checkpoint.limit) } else { ahead });
        }
        self.applying.stage = Stage::Checkpointing;
        self.store_checkpoint(checkpoint, out);
    }

    fn store_checkpoint(&mut self, checkpoint: Checkpoint, out: &mut Outbox) {
        out.io(
            Purpose::Checkpoint,
            IoRequest::CheckpointWrite { slot: checkpoint.slot(), page: checkpoint.encode() },
        );
        self.next_checkpoint = Some(checkpoint);
    }

    /// The checkpoint is durable: redo up to it is released.
    pub(super) fn checkpointed(&mut self, ok: bool, now: Monotonic, out: &mut Outbox) {
        let raising = self.applying.stage == Stage::Raising;
        self.applying.stage = Stage::Idle;
        // A failed write may have torn its slot: the next attempt takes the same one, and the other stays good.
        let Some(next) = self.next_checkpoint.take() else {
            return;
        };
        if !ok {
            return self.fault("the redo checkpoint could not be written: redo is kept", now, out);
        }
        self.checkpoint = next;
        if raising {
            return;
        }
        if let Some(last) = self.applying.unflushed.back() {
            self.release(last.placement.clone());
        }
        self.applying.unflushed.clear();
        self.applying.unflushed_bytes = 0;
        self.applying.unflushed_since = None;
        self.applying.hurry = false;
    }

    /// A flush failed, so any write since the last checkpoint may be lost: all of them are made again from redo.
    pub(super) fn replay(&mut self) {
        self.applying.replays += 1;
        for item in std::mem::take(&mut self.applying.unflushed).into_iter().rev() {
            // Home may have lost it, so reads take it from redo again; what is newer there stays.
            self.overlay.insert(item.number, &item.placement, &item.changes);
            if let Some(drill) = self.drill.as_mut().filter(|drill| item.number <= drill.through) {
                drill.base.insert(item.number, &item.placement, &item.changes);
            }
            self.waiting.add(&item);
            self.queue.push_front(item);
        }
        self.applying.unflushed_bytes = 0;
        self.applying.unflushed_since = None;
    }

    fn fault(&mut self, text: &str, now: Monotonic, out: &mut Outbox) {
        if !self.applying.degraded {
            out.log(Loudness::Error, text.to_owned());
        }
        self.applying.degraded = true;
        self.applying.paused_until = Some(now + FAULT_PAUSE);
        self.trouble = Some(text.to_owned());
    }

    /// Payload that waits in memory.
    pub(super) fn memory(&self) -> ByteCount {
        let held = self.queue.iter().filter(|item| item.records.is_some());
        ByteCount(held.map(|item| item.placement.length).sum())
    }

    /// Drops payloads that wait too long in memory; they are read back from redo.
    pub(super) fn limit_memory(&mut self) {
        if self.hold == Hold::Window {
            // They wait long; all of them are read back when their time comes.
            return;
        }
        let mut bytes = 0;
        for item in &mut self.queue {
            bytes += item.placement.length;
            if bytes > MEMORY_BYTES_MAX {
                item.records = None;
            }
        }
    }
}
