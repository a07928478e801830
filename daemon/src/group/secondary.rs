//! The target: sessions, the redo log, acknowledgements, hashes of the image.
//!
//! Guarantees: a cut is acknowledged only when it is on stable media; the durable tip never goes back; the staged cuts
//! of a pass become part of the image only by their commit; an older session's cuts are dropped. What is committed is
//! applied by `apply`.

use std::collections::{BTreeMap, VecDeque};

use block::{ByteCount, DATA_UNIT_BYTES, Monotonic, Position, Tip, WallTime};
use bytes::Bytes;
use engine::overlay::{CutNumber, Overlay};
use journal::{Checkpoint, Cut, Placement, Record, RecordKind, RedoFull, RedoLog};
use protocol::{
    Ack, Arrival, CompareRange, GroupState, HashReply, HashRequest, Hello, LeaseHolder, Message,
    ReceiverChain, Refusal, RefusalCode, Welcome,
};

use super::MirrorSettings;
use super::apply::{ApplyItem, Applying};
use super::drill::Drill;
use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose, SessionId};
use super::growth::{Room, issue_sizes};
use super::image::{ImageReads, Reader};
use super::verify::Verifying;
use super::window::{ApplyRate, Begun, Hold, Point, Waiting};

/// Received cuts that wait for the redo log; the transport stops reading beyond.
const INCOMING_CUTS_MAX: usize = 64;
/// Hash requests being read.
const HASHES_MAX: usize = 8;

/// A cut between its arrival and its acknowledgement.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: Bytes,
    pub(super) cut: Cut,
    pub(super) placement: Option<Placement>,
}

impl Received {
    const fn is_initial(&self) -> bool {
        self.cut.meta.initial
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BatchStage {
    /// Initial copy: the records are on their way to home.
    Applying,
    /// Initial copy: home is being flushed.
    Flushing,
    /// The redo log is being written.
    Writing,
    /// The redo log is being synced.
    Syncing,
    /// The first complete image is being noted in the group's state.
    Completing,
}

/// Cuts that become durable together.
#[derive(Debug)]
struct Batch {
    cuts: Vec<Received>,
    stage: BatchStage,
    outstanding: usize,
    failed: bool,
}

/// A greeting that waits until everything older has ended.
struct Greeting {
    session: SessionId,
    hello: Hello,
}

struct Hashing {
    session: SessionId,
    request: HashRequest,
}

pub(super) struct Secondary {
    session: Option<SessionId>,
    lineage: Position,
    greeting: Option<Greeting>,
    /// Everything accepted, durable or not.
    accepted: ReceiverChain,
    /// Everything on stable media.
    pub(super) durable: ReceiverChain,
    pub(super) log: RedoLog,
    pub(super) checkpoint: Checkpoint,
    pub(super) next_checkpoint: Option<Checkpoint>,
    incoming: VecDeque<Received>,
    batch: Option<Batch>,
    /// Durable cuts of the pass in progress.
    staged: Vec<ApplyItem>,
    /// Committed cuts that are not applied.
    pub(super) queue: VecDeque<ApplyItem>,
    pub(super) applying: Applying,
    last_number: CutNumber,
    pub(super) hold: Hold,
    pub(super) begun: Begun,
    pub(super) waiting: Waiting,
    pub(super) rate: ApplyRate,
    /// The recovered cuts have their times.
    pub(super) settled: bool,
    /// What is committed and not at home.
    pub(super) overlay: Overlay,
    pub(super) images: ImageReads,
    pub(super) drill: Option<Drill>,
    pub(super) last_drill_write: u64,
    pub(super) room: Room,
    hashes: VecDeque<Hashing>,
    hashing: BTreeMap<u64, Hashing>,
    last_hash: u64,
    pub(super) verifying: Verifying,
    /// The newest committed cut; `None` if it was released before a restart.
    pub(super) newest: Option<Point>,
    /// Where this side, once a primary, may differ from its new primary.
    pub(super) compare: Vec<CompareRange>,
    pub(super) orphaned: Option<(ByteCount, bool)>,
    pub(super) trouble: Option<String>,
    /// While it is valid this side has everything that hosts were told of.
    pub(super) lease: LeaseHolder,
    halted: bool,
}

/// What the group must do after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetNews {
    /// Nothing beyond what was queued.
    Nothing,
    /// The image is complete and of the primary's lineage: make that durable, then call `completed`.
    Complete,
}

impl Secondary {
    /// A target that continues from its recovered redo log.
    pub(super) fn new(
        log: RedoLog,
        checkpoint: Checkpoint,
        mut recovered: super::RecoveredCuts,
        mut room: Room,
    ) -> Self {
        let chain = ReceiverChain::new(recovered.durable, recovered.staged);
        let (mut waiting, mut overlay, mut begun) =
            (Waiting::default(), Overlay::default(), Begun::default());
        for item in recovered.committed_cuts.iter_mut().chain(&mut recovered.staged_cuts) {
            item.changes.splice(0..0, room.changes_behind(&item.sizes));
        }
        for item in &recovered.committed_cuts {
            room.committed(&item.sizes);
            waiting.add(item);
            overlay.insert(item.number, &item.placement, &item.changes);
            if item.placement.end() <= checkpoint.limit {
                // The last start of this daemon may have written it home.
                begun = Begun { number: item.number, end: item.placement.end(), point: item.point };
            }
        }
        let last_number =
            recovered.committed_cuts.iter().chain(&recovered.staged_cuts).map(|item| item.number).max();
        Self {
            session: None,
            lineage: Position::default(),
            greeting: None,
            accepted: chain,
            durable: chain,
            log,
            applying: Applying::new(checkpoint.applied),
            last_number: last_number.unwrap_or_default(),
            hold: Hold::default(),
            begun,
            waiting,
            rate: ApplyRate::default(),
            settled: false,
            overlay,
            images: ImageReads::default(),
            drill: None,
            last_drill_write: 0,
            checkpoint,
            room,
            next_checkpoint: None,
            incoming: VecDeque::new(),
            batch: None,
            staged: recovered.staged_cuts,
            queue: recovered.committed_cuts.into(),
            hashes: VecDeque::new(),
            hashing: BTreeMap::new(),
            last_hash: 0,
            verifying: Verifying::default(),
            newest: recovered.committed_cuts_newest,
            compare: Vec::new(),
            orphaned: None,
            trouble: None,
            lease: LeaseHolder::default(),
            halted: false,
        }
    }

    pub(super) fn is_session(&self, session: SessionId) -> bool {
        self.session == Some(session)
    }

    pub(super) const fn session(&self) -> Option<SessionId> {
        self.session
    }

    pub(super) const fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// Nothing is on its way to the redo log.
    pub(super) fn is_quiet(&self) -> bool {
        self.batch.is_none() && self.incoming.is_empty()
    }

    /// True while the transport should hold back further cuts.
    pub(super) fn is_crowded(&self) -> bool {
        self.incoming.len() >= INCOMING_CUTS_MAX
    }

    /// A hello that was accepted: older sessions end at once, the answer follows when nothing of theirs is left.
    pub(super) fn greet(&mut self, session: SessionId, hello: Hello, out: &mut Outbox) {
        self.lease.give_back();
        self.end_session("a newer session replaced it", out);
        if let Some(older) = self.greeting.replace(Greeting { session, hello }) {
            out.push(Effect::CloseSession {
                session: older.session,
                reason: "a newer session replaced it".into(),
            });
        }
    }

    /// Ends the session; what it sent and is not on its way to the disk is dropped.
    pub(super) fn end_session(&mut self, reason: &str, out: &mut Outbox) {
        if let Some(session) = self.session.take() {
            out.push(Effect::CloseSession { session, reason: reason.to_owned() });
        }
        self.lease.session_ended();
        self.drop_incoming();
    }

    fn drop_incoming(&mut self) {
        self.incoming.clear();
        self.hashes.clear();
        self.verifying.clear();
        if self.batch.is_none() {
            self.accepted = self.durable;
        }
    }

    pub(super) fn session_closed(&mut self, session: SessionId, reason: &str, out: &mut Outbox) {
        if self.greeting.as_ref().is_some_and(|greeting| greeting.session == session) {
            self.greeting = None;
        }
        if self.is_session(session) {
            self.session = None;
            self.lease.session_ended();
            self.trouble = Some(reason.to_owned());
            self.drop_incoming();
            out.log(Loudness::Info, format!("the session with the primary ended: {reason}"));
        }
    }

    /// Refuses a greeting that waits and every later one: a role change has begun.
    pub(super) fn halt(&mut self, reason: &str, out: &mut Outbox) {
        self.halted = true;
        self.end_drill(Loudness::Warn, reason, out);
        self.end_session(reason, out);
        if let Some(greeting) = self.greeting.take() {
            out.push(Effect::CloseSession { session: greeting.session, reason: reason.to_owned() });
        }
    }

    fn welcome_if_quiet(&mut self, state: &GroupState, wall: WallTime, out: &mut Outbox) {
        if self.batch.is_some() || self.halted {
            return;
        }
        let Some(Greeting { session, hello }) = self.greeting.take() else {
            return;
        };
        let sizes: Vec<ByteCount> = hello.volumes.iter().map(|(_, size)| *size).collect();
        match self.room_for(&sizes, out) {
            Some(Ok(())) => {}
            Some(Err(text)) => {
                let refusal = Refusal { code: RefusalCode::NoSpace, text };
                return super::refuse(session, state, refusal, out);
            }
            None => {
                self.greeting = Some(Greeting { session, hello });
                return;
            }
        }
        self.accepted = self.durable;
        self.session = Some(session);
        self.lineage = hello.position;
        self.trouble = None;
        let age = self.newest.map(|point| wall.0.saturating_sub(point.echo.0).div_ceil(1_000_000));
        let welcome = Welcome {
            tip: self.durable.durable(),
            staged: self.durable.staged(),
            consistent: state.consistent,
            diverged: state.diverged,
            relinquished: state.relinquished.is_some_and(|tip| tip.position == self.tip().position),
            age_bound_ms: age,
            compare: if state.diverged { self.compare.clone() } else { Vec::new() },
            clock: wall,
            sizes: self.room.recorded().to_vec(),
        };
        out.push(Effect::Send { session, frame: Message::Welcome(welcome).encode() });
        out.log(
            Loudness::Info,
            format!(
                "the primary opened a session; the image here is at position {}",
                self.durable.durable().position
            ),
        );
    }

    pub(super) fn message(&mut self, session: SessionId, message: Message, now: Monotonic, out: &mut Outbox) {
        match message {
            Message::LeaseOffer => self.lease.offered(now),
            Message::LeaseGrant { asked } => self.lease.granted(asked, now),
            Message::AbortPass { pass } => self.abort_pass(pass, out),
            Message::HashRequest(request) => self.hashes.push_back(Hashing { session, request }),
            Message::VerifyRequest(request) => self.verify_asked(request, out),
            Message::Orphans { bytes, waiting } => self.orphaned = Some((bytes, waiting)),
            Message::Grow { volume, size } => self.wish_for_room(session, volume, size),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Refuse(_)
            | Message::Ack(_)
            | Message::PassRefused { .. }
            | Message::HashReply(_)
            | Message::VerifyReply(_)
            | Message::OrphanRequest(_)
            | Message::OrphanReply(_)
            | Message::SwitchAsk
            | Message::SwitchReady { .. }
            | Message::Relinquish { .. }
            | Message::LeaseAsk { .. }
            | Message::CreateMirror(_)
            | Message::Created { .. }
            | Message::DeleteMirror { .. }
            | Message::Deleted
            | Message::SetAccess(_)
            | Message::AccessSet
            | Message::Grown { .. }
            | Message::SetKeys(_)
            | Message::KeysSet
            | Message::Ping
            | Message::Pong { .. } => self.end_session("a message out of place", out),
        }
    }

    /// Voids the staged cuts of `pass`; it comes before the session's first cut.
    fn abort_pass(&mut self, pass: u64, out: &mut Outbox) {
        let staging = self.durable.staged().is_some_and(|(ours, _)| ours == pass);
        if !staging || self.batch.is_some() || !self.incoming.is_empty() {
            return;
        }
        self.void_staged();
        out.log(Loudness::Info, format!("resync pass {pass} was given up; its staged cuts are void"));
    }

    /// Forgets the staged cuts and gives their room back.
    pub(super) fn void_staged(&mut self) {
        if let Some(first) = self.staged.first() {
            self.log.void_tail(&first.placement);
        }
        self.staged.clear();
        self.durable.abort_pass();
        self.accepted = self.durable;
    }

    /// A cut arrived on `session`.
    pub(super) fn receive(
        &mut self,
        session: SessionId,
        bytes: Bytes,
        settings: &MirrorSettings,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        if !self.is_session(session) {
            return;
        }
        let cut = match journal::decode(&bytes) {
            Ok(cut) if cut.meta.mirror == settings.mirror && !cut.header_only => cut,
            Ok(_) => return self.end_session("the cut belongs to another mirror", out),
            Err(error) => {
                out.log(
                    Loudness::Error,
                    format!("a received cut is damaged: {error}; the primary sends it again"),
                );
                return self.end_session(&format!("a cut is damaged: {error}"), out);
            }
        };
        if let Some(text) = self.records_beyond(&cut) {
            out.log(Loudness::Error, text.clone());
            return self.end_session(&text, out);
        }
        let arrival = arrival(&cut);
        if self.durable.is_repeat(&arrival) && self.is_quiet() {
            return self.acknowledge(wall, out);
        }
        if self.is_quiet() && self.durable.staged().is_some() && arrival.previous == self.durable.durable() {
            // The primary gave the pass up: its notice travels on another stream and may come later.
            self.void_staged();
        }
        match self.accepted.accept(&arrival, &self.lineage) {
            Ok(()) => self.incoming.push_back(Received { bytes, cut, placement: None }),
            Err(error) => {
                out.log(Loudness::Warn, format!("a cut is refused: {error}"));
                self.end_session(&error.to_string(), out);
            }
        }
    }

    fn acknowledge(&self, wall: WallTime, out: &mut Outbox) {
        let Some(session) = self.session else { return };
        let ack = Ack {
            tip: self.durable.last(),
            staged: self.durable.staged().is_some(),
            applied: self.applying.applied.position.sequence,
            clock: wall,
        };
        out.push(Effect::Send { session, frame: Message::Ack(ack).encode() });
    }

    /// Moves everything on that can move; call after every event.
    pub(super) fn turn(
        &mut self,
        settings: &MirrorSettings,
        state: &GroupState,
        now: Monotonic,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        self.settle(settings, now, wall);
        let keeps = settings.retention.window > std::time::Duration::ZERO;
        self.hold = if keeps && state.consistent && !state.diverged { Hold::Window } else { Hold::Nothing };
        self.welcome_if_quiet(state, wall, out);
        self.grant_wishes(out);
        self.ask_for_lease(now, out);
        self.start_batch(state, out);
        self.apply_more(settings, now, out);
        self.hash_more(out);
        self.verify_more(out);
    }

    fn ask_for_lease(&mut self, now: Monotonic, out: &mut Outbox) {
        if let Some(session) = self.session
            && let Some(asked) = self.lease.poll_ask(now)
        {
            out.push(Effect::Send { session, frame: Message::LeaseAsk { asked }.encode() });
        }
    }

    fn start_batch(&mut self, state: &GroupState, out: &mut Outbox) {
        if self.batch.is_some() || self.incoming.is_empty() {
            return;
        }
        let initial = self.incoming.front().is_some_and(Received::is_initial);
        if initial && state.consistent && !state.diverged {
            // An initial copy would expose a mix; only a side without an image takes one.
            return self.end_session("the image here is consistent: it takes no initial copy", out);
        }
        if initial && !(self.queue.is_empty() && self.applying.holds_only_headers()) {
            // Redo that a restart would replay must not lie below what is written straight to home.
            self.applying.hurry = true;
            return;
        }
        let mut cuts = Vec::new();
        while let Some(next) = self.incoming.front() {
            if next.is_initial() != initial {
                break;
            }
            if let Some(received) = self.incoming.pop_front() {
                cuts.push(received);
            }
        }
        let mut batch = Batch { cuts, stage: BatchStage::Applying, outstanding: 0, failed: false };
        if initial {
            // One plan for all of them: writes that are in flight together must not overlap.
            let records: Vec<_> = batch
                .cuts
                .iter()
                .flat_map(|received| journal::without_voided(&received.cut.records).cloned())
                .collect();
            let plan = engine::apply::plan(&records);
            batch.outstanding = super::apply::issue(&plan, &records, Purpose::InitialApply, out)
                + issue_sizes(&records, Purpose::InitialApply, out);
            self.batch = Some(batch);
            self.batch_moved(out);
        } else {
            self.write_batch(batch, out);
        }
    }

    /// Appends the batch to the redo log; cuts that do not fit go back to the queue.
    fn write_batch(&mut self, mut batch: Batch, out: &mut Outbox) {
        batch.stage = BatchStage::Writing;
        let mut previous = self.durable.last();
        let mut refused = None;
        for (index, received) in batch.cuts.iter_mut().enumerate() {
            let data = if received.is_initial() {
                journal::header_only(&received.bytes).unwrap_or_else(|_| received.bytes.clone())
            } else {
                received.bytes.clone()
            };
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            match self.log.append(&previous, &received.cut.tip, length) {
                Ok(placement) => {
                    batch.outstanding += write_redo(&placement, data, out);
                    previous = received.cut.tip;
                    received.placement = Some(placement);
                }
                Err(error) => {
                    refused = Some((index, error));
                    break;
                }
            }
        }
        if let Some((index, error)) = refused {
            let rest: Vec<Received> = batch.cuts.drain(index..).collect();
            self.redo_full(error, rest, batch.cuts.is_empty(), out);
        }
        if !batch.cuts.is_empty() {
            self.batch = Some(batch);
        }
    }

    /// The log has no room. Ordinary cuts wait for the applier; a pass that cannot fit is refused.
    fn redo_full(&mut self, error: RedoFull, rest: Vec<Received>, alone: bool, out: &mut Outbox) {
        let pass = rest.first().map_or(0, |received| received.cut.meta.pass);
        let missing: u64 = rest.iter().map(|received| u64::try_from(received.bytes.len()).unwrap_or(0)).sum();
        for received in rest.into_iter().rev() {
            self.incoming.push_front(received);
        }
        self.applying.hurry = true;
        if self.queue.back().is_some_and(|item| self.is_held_by_drill(item.number)) {
            // Receiving does not wait for a drill.
            self.end_drill(Loudness::Error, "the redo log is full", out);
        }
        let released = self.queue.is_empty() && self.applying.is_clean() && !self.images.holds_release();
        let hopeless = error == RedoFull::CutTooLong || (pass != 0 && released);
        if !alone || !hopeless {
            return;
        }
        if let Some(session) = self.session {
            let frame = Message::PassRefused { pass, missing: ByteCount(missing) }.encode();
            out.push(Effect::Send { session, frame });
        }
        let text =
            format!("the redo log is too small for resync pass {pass}: at least {missing} bytes are missing");
        out.log(Loudness::Error, text.clone());
        self.end_session(&text, out);
        self.void_staged();
    }

    /// A storage request of the batch was answered.
    pub(super) fn batch_done(&mut self, ok: bool, out: &mut Outbox) {
        if let Some(batch) = &mut self.batch {
            batch.outstanding = batch.outstanding.saturating_sub(1);
            batch.failed |= !ok;
        }
        self.batch_moved(out);
    }

    /// Takes the batch to its next stage once nothing of the present one is outstanding.
    fn batch_moved(&mut self, out: &mut Outbox) {
        let Some(mut batch) = self.batch.take_if(|batch| batch.outstanding == 0) else {
            return;
        };
        if batch.failed {
            return self.batch_failed(&batch, out);
        }
        match batch.stage {
            BatchStage::Applying => {
                batch.stage = BatchStage::Flushing;
                let touched = batch
                    .cuts
                    .iter()
                    .flat_map(|received| received.cut.records.iter().map(|record| record.volume));
                let touched: std::collections::BTreeSet<_> = touched.collect();
                batch.outstanding = touched.len();
                for volume in touched {
                    out.io(Purpose::InitialFlush, IoRequest::HomeFlush { volume });
                }
                let idle = batch.outstanding == 0;
                self.batch = Some(batch);
                if idle {
                    self.batch_moved(out);
                }
            }
            BatchStage::Flushing => self.write_batch(batch, out),
            BatchStage::Writing => {
                batch.stage = BatchStage::Syncing;
                let files: std::collections::BTreeSet<u32> = batch
                    .cuts
                    .iter()
                    .filter_map(|received| Some(received.placement.as_ref()?.file_index))
                    .collect();
                batch.outstanding = files.len();
                for file in files {
                    out.io(Purpose::RedoSync, IoRequest::RedoSync { file });
                }
                self.batch = Some(batch);
            }
            BatchStage::Syncing | BatchStage::Completing => {
                batch.stage = BatchStage::Completing;
                self.batch = Some(batch);
            }
        }
    }

    /// The batch is on stable media. Says whether the group's state must be noted before it is acknowledged.
    pub(super) fn batch_completes(&self, state: &GroupState) -> Option<TargetNews> {
        let batch = self
            .batch
            .as_ref()
            .filter(|batch| batch.stage == BatchStage::Completing && batch.outstanding == 0)?;
        let commits = batch.cuts.iter().any(|received| received.cut.meta.commit && !received.is_initial());
        let news = commits && (!state.consistent || state.diverged || state.relinquished.is_some());
        Some(if news { TargetNews::Complete } else { TargetNews::Nothing })
    }

    /// The batch counts: the chain moves, the primary is told, the applier gets what is committed.
    pub(super) fn batch_counts(
        &mut self,
        settings: &MirrorSettings,
        now: Monotonic,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        let Some(batch) = self.batch.take() else { return };
        let due = now + settings.retention.window;
        for received in batch.cuts {
            let Some(placement) = received.placement else {
                continue;
            };
            let meta = &received.cut.meta;
            let followed = self.durable.accept(&arrival(&received.cut), &received.cut.tip.position);
            assert_eq!(followed, Ok(()), "what was accepted follows the durable chain");
            let (commit, initial) = (meta.commit, meta.initial);
            let tip = received.cut.tip;
            let point = commit.then(|| {
                // An older stamp still bounds what is missing.
                let echo = self.newest.map_or(meta.echo, |newest| newest.echo.max(meta.echo));
                Point { tip, echo, seen: wall }
            });
            self.newest = point.or(self.newest);
            self.last_number = CutNumber(self.last_number.0 + 1);
            let sizes = journal::sizes(&received.cut.records);
            let mut changes = Vec::new();
            if !initial {
                // Nothing before a size in its cut lies behind it: a volume never becomes smaller.
                changes = self.room.changes_behind(&sizes);
                changes.extend(journal::changes(&received.cut.records));
            }
            let item = ApplyItem {
                number: self.last_number,
                placement,
                tip,
                changes,
                sizes,
                records: (self.hold != Hold::Window).then_some(received.cut.records),
                done: initial,
                point: point.filter(|_| !initial),
                due,
            };
            if initial {
                // It was written home before it came here.
                self.begun = Begun { number: item.number, end: item.placement.end(), point: None };
            }
            if commit {
                for mut staged in std::mem::take(&mut self.staged) {
                    staged.due = due;
                    self.commit_item(staged);
                }
                self.commit_item(item);
            } else {
                // A pass may be larger than memory: staged cuts are read back from redo when they commit.
                self.staged.push(ApplyItem { records: None, ..item });
            }
        }
        self.limit_memory();
        if self.session.is_none() {
            self.drop_incoming();
        }
        self.acknowledge(wall, out);
    }

    fn commit_item(&mut self, item: ApplyItem) {
        self.room.committed(&item.sizes);
        self.waiting.add(&item);
        self.overlay.insert(item.number, &item.placement, &item.changes);
        self.queue.push_back(item);
    }

    fn batch_failed(&mut self, batch: &Batch, out: &mut Outbox) {
        let text = "writing a cut failed at the target: it is not acknowledged and is received again";
        out.log(Loudness::Error, text.to_owned());
        if let Some(first) = batch.cuts.iter().find_map(|received| received.placement.as_ref()) {
            self.log.void_tail(first);
        }
        self.trouble = Some(text.to_owned());
        self.end_session(text, out);
        self.accepted = self.durable;
    }

    fn hash_more(&mut self, out: &mut Outbox) {
        // Hashes are of the image at the durable tip: home overlaid by what is not there yet.
        while self.hashing.len() < HASHES_MAX {
            let Some(hashing) = self.hashes.pop_front() else {
                return;
            };
            self.last_hash += 1;
            let (volume, range) = (hashing.request.volume, hashing.request.range);
            self.hashing.insert(self.last_hash, hashing);
            self.read_image(Reader::Hash(self.last_hash), volume, range, out);
        }
    }

    /// A region was read to be hashed.
    pub(super) fn hash_read(&mut self, request: u64, home: Result<Bytes, IoFailure>, out: &mut Outbox) {
        let Some(hashing) = self.hashing.remove(&request) else {
            return;
        };
        if !self.is_session(hashing.session) {
            return;
        }
        let unit = usize::try_from(DATA_UNIT_BYTES).unwrap_or(usize::MAX);
        let hashes = match home {
            Ok(data) => data.chunks(unit).map(|block| *blake3::hash(block).as_bytes()).collect(),
            Err(failure) => {
                out.log(Loudness::Error, format!("a region of the target cannot be read: {failure}"));
                Vec::new()
            }
        };
        let frame = Message::HashReply(HashReply { id: hashing.request.id, hashes }).encode();
        out.push(Effect::Send { session: hashing.session, frame });
    }

    /// Says which record lies outside the room of its volume, if one does.
    fn records_beyond(&self, cut: &Cut) -> Option<String> {
        // A new size makes its own room, should that of an earlier session be forgotten.
        let beyond = |record: &&Record| {
            record.kind != RecordKind::Resize && !self.room.holds(record.volume, record.range.end())
        };
        let beyond = cut.records.iter().find(beyond)?;
        let (sequence, volume) = (beyond.sequence, beyond.volume.0);
        Some(format!("a cut is refused: sequence {sequence} lies outside volume {volume}"))
    }

    /// The image's tip.
    pub(super) const fn tip(&self) -> Tip {
        self.durable.durable()
    }
}

fn arrival(cut: &Cut) -> Arrival {
    let meta = &cut.meta;
    Arrival { tip: cut.tip, previous: meta.previous, first: meta.first, commit: meta.commit, pass: meta.pass }
}

fn write_redo(placement: &Placement, data: Bytes, out: &mut Outbox) -> usize {
    let file = placement.file_index;
    let mut writes = 1;
    if let Some(page) = &placement.opens_segment {
        out.io(Purpose::RedoWrite, IoRequest::RedoWrite { file, offset: 0, data: page.clone() });
        writes += 1;
    }
    out.io(Purpose::RedoWrite, IoRequest::RedoWrite { file, offset: placement.offset, data });
    writes
}
