//! The applier: committed cuts go home in order, then redo is released.
//!
//! Several cuts are merged into one set of disjoint writes, so they run in parallel. `applied` moves when the writes
//! ended; redo is released only after every home file touched was flushed and a checkpoint is durable. A failed write
//! keeps its cuts in redo and is tried again; after a failed flush all that it should have covered is written again.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use block::{ByteRange, Monotonic, Tip, VolumeIndex};
use bytes::Bytes;
use engine::apply::{ApplyStep, Source, plan};
use journal::{Placement, Record};

use super::MirrorSettings;
use super::effect::{IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::growth::issue_sizes;
use super::secondary::Secondary;

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
    pub(super) placement: Placement,
    pub(super) tip: Tip,
    /// `None` if they must be read back from redo.
    pub(super) records: Option<Vec<Record>>,
    /// Its records are at home already (initial copy).
    pub(super) done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    Reading,
    Writing,
    Flushing,
    Checkpointing,
}

/// The applier's state.
#[derive(Debug)]
pub(super) struct Applying {
    stage: Stage,
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
}

impl Applying {
    /// An applier behind which everything up to `applied` is at home.
    pub(super) const fn new(applied: Tip) -> Self {
        Self {
            stage: Stage::Idle,
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
        }
    }

    /// No request is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }

    /// Home does not show a committed state right now.
    pub(super) fn is_writing(&self) -> bool {
        matches!(self.stage, Stage::Reading | Stage::Writing) || !self.current.is_empty()
    }

    /// Everything applied is flushed and released.
    pub(super) fn is_clean(&self) -> bool {
        self.is_idle() && self.unflushed.is_empty() && self.current.is_empty()
    }

    /// A replay of what is not released would change nothing at home.
    pub(super) fn holds_only_headers(&self) -> bool {
        self.is_idle() && self.current.is_empty() && self.unflushed.iter().all(|item| item.done)
    }

    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        if !self.is_idle() {
            return None;
        }
        let flush = self.unflushed_since.map(|since| since + FLUSH_INTERVAL);
        self.paused_until.or(flush)
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
    /// Starts whatever the applier can do next.
    pub(super) fn apply_more(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) {
        while self.applying.is_idle() {
            if self.applying.paused_until.is_some_and(|until| now < until) {
                return;
            }
            self.applying.paused_until = None;
            let started = self.retry_current(out)
                || self.flush_if_due(now, settings, out)
                || self.read_back(out)
                || self.write_next(now, out);
            if !started {
                return;
            }
        }
    }

    /// Cuts whose writes failed are written again.
    fn retry_current(&mut self, out: &mut Outbox) -> bool {
        if self.applying.current.is_empty() {
            return false;
        }
        self.write_current(out);
        true
    }

    fn flush_if_due(&mut self, now: Monotonic, _settings: &MirrorSettings, out: &mut Outbox) -> bool {
        let applying = &mut self.applying;
        let Some(since) = applying.unflushed_since else {
            return false;
        };
        let due = now.since(since) >= FLUSH_INTERVAL || applying.unflushed_bytes >= FLUSH_BYTES;
        let hurried = applying.hurry && self.queue.is_empty();
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
            self.write_checkpoint(out);
        }
        true
    }

    fn read_back(&mut self, out: &mut Outbox) -> bool {
        let Some(next) = self.queue.front().filter(|item| item.records.is_none() && !item.done) else {
            return false;
        };
        let placement = &next.placement;
        self.applying.stage = Stage::Reading;
        out.io(
            Purpose::ApplyRead,
            IoRequest::RedoRead {
                file: placement.file_index,
                offset: placement.offset,
                length: placement.length,
            },
        );
        true
    }

    /// A cut was read back from redo.
    pub(super) fn apply_read(&mut self, data: Result<Bytes, IoFailure>, now: Monotonic, out: &mut Outbox) {
        self.applying.stage = Stage::Idle;
        let decoded = data
            .map_err(|failure| failure.to_string())
            .and_then(|bytes| journal::decode(&bytes).map_err(|error| error.to_string()));
        let Some(front) = self.queue.front_mut() else {
            return;
        };
        match decoded {
            Ok(cut) if cut.tip == front.tip => front.records = Some(cut.records),
            Ok(_) => self.fault("redo holds another cut than the one that was written", now, out),
            Err(error) => self.fault(&format!("a cut cannot be read back from redo: {error}"), now, out),
        }
    }

    fn write_next(&mut self, now: Monotonic, out: &mut Outbox) -> bool {
        let mut bytes = 0;
        while let Some(item) = self.queue.front() {
            if (item.records.is_none() && !item.done)
                || (bytes > 0 && bytes + item.placement.length > MERGE_BYTES_MAX)
            {
                break;
            }
            bytes += item.placement.length;
            self.applying.current.extend(self.queue.pop_front());
        }
        if self.applying.current.is_empty() {
            return false;
        }
        self.applying.unflushed_since.get_or_insert(now);
        self.write_current(out);
        true
    }

    fn write_current(&mut self, out: &mut Outbox) {
        let records: Vec<Record> = self
            .applying
            .current
            .iter()
            .filter(|item| !item.done)
            .flat_map(|item| item.records.iter().flatten().cloned())
            .collect();
        let steps = plan(&records);
        self.applying.touched.extend(steps.iter().map(|step| step.volume));
        self.applying.stage = Stage::Writing;
        self.applying.failed = false;
        self.applying.outstanding =
            issue(&steps, &records, Purpose::Apply, out) + issue_sizes(&records, Purpose::Apply, out);
        if self.applying.outstanding == 0 {
            self.writes_ended();
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
        self.writes_ended();
    }

    fn writes_ended(&mut self) {
        let applying = &mut self.applying;
        applying.stage = Stage::Idle;
        applying.degraded = false;
        for item in applying.current.drain(..) {
            applying.applied = item.tip;
            applying.unflushed_bytes += item.placement.length;
            applying.unflushed.push_back(ApplyItem { records: None, ..item });
        }
    }

    /// A flush of the applier was answered.
    pub(super) fn apply_flushed(&mut self, ok: bool, now: Monotonic, out: &mut Outbox) {
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
        self.write_checkpoint(out);
    }

    fn write_checkpoint(&mut self, out: &mut Outbox) {
        let end = self.applying.unflushed.back().map(|item| item.placement.end());
        let scan_start = end.unwrap_or(self.checkpoint.scan_start);
        let checkpoint = self.checkpoint.next(self.applying.applied, scan_start);
        self.applying.stage = Stage::Checkpointing;
        out.io(
            Purpose::Checkpoint,
            IoRequest::CheckpointWrite { slot: checkpoint.slot(), page: checkpoint.encode() },
        );
        self.next_checkpoint = Some(checkpoint);
    }

    /// The checkpoint is durable: redo up to it is released.
    pub(super) fn checkpointed(&mut self, ok: bool, now: Monotonic, out: &mut Outbox) {
        self.applying.stage = Stage::Idle;
        // A failed write may have torn its slot: the next attempt takes the same one, and the other stays good.
        let Some(next) = self.next_checkpoint.take() else {
            return;
        };
        if !ok {
            return self.fault("the redo checkpoint could not be written: redo is kept", now, out);
        }
        self.checkpoint = next;
        if let Some(last) = self.applying.unflushed.back() {
            self.log.release(&last.placement);
        }
        self.applying.unflushed.clear();
        self.applying.unflushed_bytes = 0;
        self.applying.unflushed_since = None;
        self.applying.hurry = false;
    }

    /// A flush failed, so any write since the last checkpoint may be lost: all of them are made again from redo.
    pub(super) fn replay(&mut self) {
        for item in std::mem::take(&mut self.applying.unflushed).into_iter().rev() {
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

    /// Drops payloads that wait too long in memory; they are read back from redo.
    pub(super) fn limit_memory(&mut self) {
        let mut bytes = 0;
        for item in &mut self.queue {
            bytes += item.placement.length;
            if bytes > MEMORY_BYTES_MAX {
                item.records = None;
            }
        }
    }
}
