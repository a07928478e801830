//! The primary's journal: sequences, ring, dirty maps, intent maps, and the cuts made of them.
//!
//! Guarantees (docs/protocols/replication.md): a home write is issued only when its regions' intent bits are
//! durable and its record is in the ring or its blocks are in the dirty map; a cut ends at n only when every write
//! up to n has ended at home; nothing here waits for the partner, and memory is bounded by the ring's budget.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use block::{
    BlockCount, ByteCount, ByteRange, HostError, Lba, Monotonic, Position, Sequence, VolumeIndex, WallTime,
};
use bytes::Bytes;
use engine::StepId;
use engine::dirty_map::DirtyMap;
use engine::intent_map::{IntentMap, PageWritten};
use engine::region_tracker::RegionTracker;
use engine::volume::Content;
use journal::{CutMeta, EncodedCut, Record, RecordKind, Ring};
use protocol::{CompareRange, GroupState, RpoTracker, SenderChain};

use super::effect::{Effect, IoRequest, Loudness, Outbox, Purpose, SessionId};
use super::growth::{Sizes, has_blocks};
use super::rate::ByteLimit;
use super::resync::{Compare, Copying};
use super::spill::Spill;
use super::sync::Sync;
use super::verify::Verify;
use super::{CleanState, MirrorSettings};

/// Cuts that may be on the way; more would only sit in the target's queue.
const OUTSTANDING_CUTS_MAX: usize = 64;
/// Blocks that could not be read are tried again after so long; the wait doubles up to the last.
const BAD_WAIT_FIRST: Duration = Duration::from_secs(30);
const BAD_WAIT_LAST: Duration = Duration::from_secs(3600);
/// Stamps of the target's clock that are remembered.
const ECHOES_MAX: usize = 64;
/// An idle group sends an empty cut this often, so that the target can bound the age of its image.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Why a link does not carry cuts although it is up, or what keeps it down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// No session; the next attempt is due at the given time.
    Down { retry_at: Monotonic, attempt: u32 },
    /// An attempt is under way.
    Dialing { attempt: u32 },
    /// The hello is sent.
    Greeting { session: SessionId },
    /// The partner answered.
    Up { session: SessionId },
    /// An operator must act; the text says why and what to do.
    Halted {
        reason: String,
        /// What `start` is for.
        start: HaltedStart,
    },
    /// An operator stopped mirroring.
    Stopped,
}

/// What an operator's `start` does with a halted link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HaltedStart {
    /// It tries again.
    Retries,
    /// It allows the partner's image to be overwritten.
    Overwrites,
    /// Both sides were promoted in this epoch: `start --primary local` makes this side the primary of the next one.
    Settles,
}

/// Whether cuts may flow on an open session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Cuts flow.
    Open,
    /// The partner was a primary itself: its regions are being compared first.
    Comparing,
    /// It holds writes of its own: an operator's `start` must allow them to be overwritten.
    Approval,
}

/// A run of cuts that ends in one atomic commit, or the initial copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    /// Its number; 0 is the initial copy, whose cuts are applied at once.
    pub(super) id: u64,
    /// The end of its commit cut, once that is sent.
    pub(super) commit: Option<Sequence>,
}

impl Pass {
    pub(super) const fn is_initial(&self) -> bool {
        self.id == 0
    }
}

/// One volume's maps.
pub(super) struct PrimaryVolume {
    pub(super) size: ByteCount,
    pub(super) intent: IntentMap,
    pub(super) tracker: RegionTracker,
    /// Blocks that the journal does not hold and that this pass must still copy.
    pub(super) current: DirtyMap,
    /// Blocks that this pass has only staged at the target.
    pub(super) next: DirtyMap,
    /// Blocks that could not be read: the target keeps its old content of them. The next pass tries again.
    pub(super) bad: DirtyMap,
    /// Blocks that hosts wrote since this side was promoted, until the partner has taken its first commit. `None` if they
    /// are not known.
    pub(super) own: Option<DirtyMap>,
    /// A flush failed: another one may show other content again, so no intent bit clears before a restart.
    pub(super) poisoned: bool,
}

impl PrimaryVolume {
    /// True if an intent bit covers every block that could not be read: a commit leaves it different at the target,
    /// and a diverged partner forgets after it where it differed.
    fn bad_is_noted(&mut self) -> bool {
        let mut noted = true;
        let mut from = Lba(0);
        while let Some((first, count)) = self.bad.next_run(from, BlockCount(u64::MAX)) {
            from = Lba(first.0.saturating_add(count.0));
            noted &= ByteRange::of_blocks(first, count).is_none_or(|range| self.intent.request(range));
        }
        noted
    }
}

struct WaitingWrite {
    volume: VolumeIndex,
    step: StepId,
    range: ByteRange,
    content: Content,
    data: Option<Bytes>,
}

/// A home write that took a sequence and has not ended.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    volume: VolumeIndex,
    range: ByteRange,
}

pub(super) struct Primary {
    pub(super) start: Position,
    pub(super) last: Sequence,
    in_flight: BTreeMap<Sequence, InFlight>,
    steps: BTreeMap<(VolumeIndex, StepId), Sequence>,
    waiting: VecDeque<WaitingWrite>,
    /// False until the incarnation is durable.
    pub(super) admission_open: bool,
    pub(super) ring: Ring,
    /// What follows the ring, in order.
    pub(super) spill: Spill,
    /// Set while every record folds: the first sequence that did. What the ring holds before it is still sent.
    pub(super) folded_from: Option<Sequence>,
    /// The last sequence of a copy or of a folded record: a commit must cover it.
    pub(super) commit_floor: Sequence,
    pub(super) volumes: Vec<PrimaryVolume>,
    pub(super) rpo: RpoTracker,
    pub(super) chain: Option<SenderChain>,
    pub(super) link: Link,
    pub(super) gate: Gate,
    pub(super) pass: Option<Pass>,
    pub(super) compare: Compare,
    pub(super) copying: Copying,
    pub(super) verify: Verify,
    pub(super) sizes: Sizes,
    pub(super) sync: Sync,
    pub(super) cut_due: Option<Monotonic>,
    /// The bytes of cuts.
    pub(super) bandwidth: ByteLimit,
    /// The bytes that copies and comparisons read.
    pub(super) copy_rate: ByteLimit,
    last_cut: Monotonic,
    /// Stamps of the target's clock, with the last sequence assigned when each was heard.
    echoes: VecDeque<(Sequence, WallTime)>,
    /// When the hello of the present session was sent.
    pub(super) greeted_at: Monotonic,
    /// The last cut that the target committed, with the primary's stamp in it.
    pub(super) recovery_point: Option<(Position, WallTime)>,
    cut_times: VecDeque<(Sequence, WallTime)>,
    pub(super) orphaned: ByteCount,
    /// Where a diverged partner holds writes that this epoch's rewind discarded.
    pub(super) rewound: Vec<CompareRange>,
    pub(super) trouble: Option<String>,
    /// What a clean stop knew the target to hold: a tip below it means that the target lost data.
    pub(super) known_tip: Option<Position>,
    last_clear: Monotonic,
    last_pass: Monotonic,
    bad_wait: Duration,
}

impl Primary {
    /// A primary whose incarnation is not yet durable. `clean` holds the dirty maps of a clean stop; without it every
    /// region of the intent maps is compared.
    pub(super) fn new(
        settings: &MirrorSettings,
        state: &GroupState,
        intents: Vec<IntentMap>,
        mut clean: Option<CleanState>,
        now: Monotonic,
    ) -> Self {
        let journal = clean.as_mut().and_then(|clean| clean.journal.take());
        assert_eq!(intents.len(), settings.volumes.len(), "one intent map a volume");
        let mut compare = Compare::default();
        let mut dirty = clean.as_ref().map(|clean| clean.dirty.clone()).unwrap_or_default().into_iter();
        let mut volumes = Vec::with_capacity(intents.len());
        for (index, (intent, volume)) in intents.into_iter().zip(&settings.volumes).enumerate() {
            let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            if clean.is_none() {
                compare.add_regions(index, &intent, volume.size, settings.region_bytes);
            }
            let current = dirty.next().unwrap_or_default();
            volumes.push(PrimaryVolume {
                size: volume.size,
                tracker: inherited_regions(&intent, &current, volume.size, settings, now),
                intent,
                current,
                next: DirtyMap::default(),
                bad: DirtyMap::default(),
                own: None,
                poisoned: false,
            });
        }
        let mut primary = Self {
            start: state.start_position(),
            last: Sequence(0),
            in_flight: BTreeMap::new(),
            steps: BTreeMap::new(),
            waiting: VecDeque::new(),
            admission_open: false,
            ring: Ring::new(settings.ring),
            spill: Spill::new(settings.spill_bytes),
            folded_from: None,
            commit_floor: Sequence(0),
            volumes,
            rpo: RpoTracker::default(),
            chain: None,
            link: if state.stopped { Link::Stopped } else { Link::Down { retry_at: now, attempt: 0 } },
            gate: Gate::Open,
            pass: None,
            compare,
            copying: Copying::default(),
            verify: Verify::default(),
            sizes: Sizes::default(),
            sync: Sync::new(state.leased, now),
            cut_due: None,
            bandwidth: ByteLimit::new(settings.policy.bandwidth, now),
            copy_rate: ByteLimit::new(settings.policy.resync_rate, now),
            last_cut: now,
            echoes: VecDeque::new(),
            greeted_at: now,
            recovery_point: None,
            cut_times: VecDeque::new(),
            orphaned: ByteCount(0),
            rewound: Vec::new(),
            trouble: None,
            known_tip: clean.and_then(|clean| clean.committed),
            last_clear: now,
            last_pass: now,
            bad_wait: BAD_WAIT_FIRST,
        };
        if let Some(journal) = journal {
            let goes_on = primary.continue_from(journal);
            assert!(goes_on, "the caller checked the journal");
        }
        primary
    }

    /// The position of the last assigned sequence.
    pub(super) const fn position(&self) -> Position {
        self.start.at(self.last)
    }

    /// The session on which the partner answered.
    pub(super) const fn session(&self) -> Option<SessionId> {
        match &self.link {
            Link::Up { session } => Some(*session),
            Link::Down { .. }
            | Link::Dialing { .. }
            | Link::Greeting { .. }
            | Link::Halted { .. }
            | Link::Stopped => None,
        }
    }

    /// No home write that took a sequence is on its way.
    pub(super) fn nothing_in_flight(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// True while the cuts of a pass are only staged.
    pub(super) fn is_staging(&self) -> bool {
        self.pass.is_some_and(|pass| pass.commit.is_none() && !pass.is_initial())
    }

    pub(super) fn volume(&mut self, index: VolumeIndex) -> &mut PrimaryVolume {
        let found = self.volumes.get_mut(usize::from(index.0));
        #[expect(clippy::panic, reason = "volume indices are made by this module")]
        found.unwrap_or_else(|| panic!("volume index {} of the group", index.0))
    }

    /// A prepared host write asks for its sequence. Answers now or later with [`Primary::poll_admitted`].
    pub(super) fn admit(
        &mut self,
        volume: VolumeIndex,
        step: StepId,
        range: ByteRange,
        content: Content,
        data: Option<Bytes>,
    ) {
        self.volume(volume).intent.request(range);
        self.waiting.push_back(WaitingWrite { volume, step, range, content, data });
    }

    /// The writes whose intent is durable now: each has its sequence and its record.
    pub(super) fn poll_admitted(&mut self, now: Monotonic, out: &mut Outbox) -> Vec<(VolumeIndex, StepId)> {
        self.write_intent(out);
        if !self.admission_open || self.waiting.is_empty() || self.sync.refuses() {
            return Vec::new();
        }
        let mut admitted = Vec::new();
        let mut still_waiting = VecDeque::with_capacity(self.waiting.len());
        for write in std::mem::take(&mut self.waiting) {
            // Asked anew each time: a bit may have cleared while the write waited for another.
            let durable = self.volume(write.volume).intent.request(write.range);
            if durable && self.has_room_for(&write) {
                admitted.push((write.volume, write.step));
                self.assign(write, now, out);
            } else {
                still_waiting.push_back(write);
            }
        }
        self.waiting = still_waiting;
        admitted
    }

    /// A write that must be received before it is answered does not fold: it waits for room in the ring.
    fn has_room_for(&mut self, write: &WaitingWrite) -> bool {
        let bytes = write.data.as_ref().map_or(0, |data| u64::try_from(data.len()).unwrap_or(u64::MAX));
        let crowded = self.sync.holds() && self.is_crowded_by(bytes);
        if crowded {
            self.sync.pause();
        }
        !crowded
    }

    /// Writes every intent page that has wanted bits and none in flight.
    pub(super) fn write_intent(&mut self, out: &mut Outbox) {
        for (index, volume) in self.volumes.iter_mut().enumerate() {
            let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            while let Some(write) = volume.intent.poll_write() {
                out.io(
                    Purpose::Intent { volume: index, page: write.page, generation: write.generation },
                    IoRequest::IntentWrite { volume: index, offset: write.file_offset, page: write.bytes },
                );
            }
        }
    }

    /// An intent page was written, or not: then the writes that wait for it fail.
    pub(super) fn intent_written(
        &mut self,
        volume: VolumeIndex,
        page: u64,
        generation: u64,
        ok: bool,
    ) -> Vec<StepId> {
        let result = if ok { Ok(()) } else { Err(HostError::Io) };
        let PageWritten::Failed { range } = self.volume(volume).intent.written(page, generation, result)
        else {
            return Vec::new();
        };
        let (failed, waiting): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|write| write.volume == volume && write.range.overlaps(range));
        self.waiting = waiting;
        failed.into_iter().map(|write| write.step).collect()
    }

    fn assign(&mut self, write: WaitingWrite, now: Monotonic, out: &mut Outbox) {
        let sequence = self.take_sequence(now);
        self.in_flight.insert(sequence, InFlight { volume: write.volume, range: write.range });
        self.steps.insert((write.volume, write.step), sequence);
        self.verify.wrote(write.volume, write.range, sequence);
        let volume = self.volume(write.volume);
        volume.tracker.began(write.range, sequence);
        if let Some(own) = &mut volume.own {
            own.set(write.range);
        }
        volume.bad.clear(write.range);
        let kind = match write.content {
            Content::Sealed => RecordKind::Write,
            Content::Zeros => RecordKind::Zero,
            Content::Trimmed => RecordKind::Trim,
        };
        let payload = write.data.unwrap_or_default();
        self.record(Record { sequence, volume: write.volume, kind, range: write.range, payload }, out);
    }

    pub(super) fn take_sequence(&mut self, now: Monotonic) -> Sequence {
        self.last = self.last.next();
        self.rpo.assigned(self.last, now);
        self.last
    }

    fn record(&mut self, record: Record, out: &mut Outbox) {
        let (sequence, volume, range) = (record.sequence, record.volume, record.range);
        if self.folded_from.is_none() && self.journal(record).is_ok() {
            return;
        }
        self.volume(volume).current.set(range);
        self.commit_floor = sequence;
        if !self.is_staging()
            && self.folded_from.is_none()
            && self.pass.is_none_or(|pass| pass.commit.is_some())
        {
            self.folded_from = Some(sequence);
            out.log(
                Loudness::Info,
                format!(
                    "the journal is full: from sequence {sequence} on, changed blocks are kept in the dirty map"
                ),
            );
        }
    }

    /// A home write has ended. Returns true if it succeeded.
    pub(super) fn ended(
        &mut self,
        volume: VolumeIndex,
        step: StepId,
        ok: bool,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        let Some(sequence) = self.steps.remove(&(volume, step)) else {
            return;
        };
        let Some(write) = self.in_flight.remove(&sequence) else {
            return;
        };
        self.volume(write.volume).tracker.ended(write.range, now);
        if ok {
            // Otherwise it is not answered yet, or the target has it.
            if !self.sync.holds() {
                self.rpo.acknowledged(sequence, now);
            }
            return;
        }
        // The home content is unknown now: the target drops the record, and the blocks travel as a copy.
        self.ring.void(sequence);
        self.spill.void(sequence);
        self.volume(write.volume).current.set(write.range);
        self.commit_floor = self.commit_floor.max(sequence);
        out.log(
            Loudness::Error,
            format!("a write failed at home: sequence {sequence} is void, its blocks are copied"),
        );
    }

    /// The sequence of a home write that has not ended.
    pub(super) fn sequence_of(&self, volume: VolumeIndex, step: StepId) -> Option<Sequence> {
        self.steps.get(&(volume, step)).copied()
    }

    /// The last sequence with every one before it ended at home.
    pub(super) fn ended_through(&self) -> Sequence {
        self.in_flight.keys().next().map_or(self.last, |first| Sequence(first.0 - 1))
    }

    /// The last sequence of this lineage that was sent in a cut.
    pub(super) fn sent_through(&self) -> Sequence {
        let last = self.chain.as_ref().map(|chain| chain.last().position);
        last.filter(|last| last.same_lineage(&self.start)).map_or(Sequence(0), |last| last.sequence)
    }

    pub(super) fn cut_limit(&self) -> Sequence {
        let ends = [self.folded_from, self.spill.first()].into_iter().flatten();
        // What must be received before it is answered is sent beside its home write.
        let through = if self.sync.holds() { self.last } else { self.ended_through() };
        ends.map(|first| Sequence(first.0 - 1)).fold(through, Sequence::min)
    }

    /// True if nothing is left to compare or copy and a cut through `through` covers all copies and folded records.
    fn commit_ready(&mut self, through: Sequence) -> bool {
        self.folded_from.is_none()
            && self.compare.is_done()
            && self.copying.is_idle()
            && through >= self.commit_floor
            && !self.owes_sizes()
            && self.volumes.iter().all(|volume| volume.current.is_empty())
            && self.volumes.iter_mut().all(PrimaryVolume::bad_is_noted)
    }

    /// Sends the cuts that are due.
    pub(super) fn send_cuts(
        &mut self,
        settings: &MirrorSettings,
        now: Monotonic,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        let Some(session) = self.session() else { return };
        if self.gate != Gate::Open {
            return;
        }
        // A pass begins only when no lease is held any more.
        if !self.sync.holds() {
            self.start_pass_if_needed(out);
            self.retry_bad(now, out);
        }
        self.push_sizes(now);
        while self.may_send() {
            let (after, limit) = (self.sent_through(), self.cut_limit());
            let through =
                if limit > after { self.ring.last_through(after, limit, settings.cut_bytes) } else { after };
            let commits_pass =
                self.pass.is_some_and(|pass| pass.commit.is_none()) && self.commit_ready(through);
            let full = through < limit;
            if limit > after && !full && self.cut_due.is_none() {
                self.cut_due = Some(now + settings.cut_interval);
            }
            let due = self.sync.holds() || self.cut_due.is_some_and(|due| now >= due);
            let heartbeat = self.pass.is_none() && now.since(self.last_cut) >= HEARTBEAT;
            let wanted = full || (due && limit > after) || commits_pass || (heartbeat && limit <= after);
            if !wanted || !self.bandwidth.admits(now) {
                return;
            }
            self.send_cut(settings, session, after, through, commits_pass, now, wall, out);
            if !self.sync.holds() {
                self.start_pass_if_needed(out);
            }
        }
    }

    /// Blocks that could not be read are tried again, ever more rarely.
    fn retry_bad(&mut self, now: Monotonic, out: &mut Outbox) {
        if self.pass.is_some() || self.folded_from.is_some() || self.spill.is_pending() {
            self.last_pass = now;
        } else if self.volumes.iter().all(|volume| volume.bad.is_empty()) {
            self.bad_wait = BAD_WAIT_FIRST;
        } else if now.since(self.last_pass) >= self.bad_wait {
            self.last_pass = now;
            self.bad_wait = (self.bad_wait * 2).min(BAD_WAIT_LAST);
            self.start_pass(false, out);
        }
    }

    /// The window has room for a cut.
    fn may_send(&self) -> bool {
        self.chain.as_ref().is_some_and(|chain| chain.outstanding() < OUTSTANDING_CUTS_MAX)
    }

    #[expect(clippy::too_many_arguments, reason = "one caller; the cut's two ends and the clock readings")]
    fn send_cut(
        &mut self,
        settings: &MirrorSettings,
        session: SessionId,
        after: Sequence,
        through: Sequence,
        commits_pass: bool,
        now: Monotonic,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        let encoded = self.encode_cut(settings, after, through, commits_pass, wall);
        let staged = self.is_staging() && !commits_pass;
        if let Some(chain) = &mut self.chain {
            chain.sent(encoded.tip, !staged);
        }
        if commits_pass && let Some(pass) = &mut self.pass {
            pass.commit = Some(through);
        }
        while self.echoes.get(1).is_some_and(|(heard, _)| *heard <= through) {
            self.echoes.pop_front();
        }
        let time = self.spill.time_for(through).unwrap_or(wall);
        self.spill.sent(through);
        self.cut_times.push_back((through, time));
        if self.cut_times.len() > 4 * OUTSTANDING_CUTS_MAX {
            self.cut_times.pop_front();
        }
        self.last_cut = now;
        self.cut_due = None;
        let chunks: Vec<Bytes> = std::iter::once(encoded.head).chain(encoded.payloads).collect();
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        self.bandwidth.spent(u64::try_from(bytes).unwrap_or(u64::MAX));
        out.push(Effect::SendCut { session, chunks });
    }

    fn encode_cut(
        &self,
        settings: &MirrorSettings,
        after: Sequence,
        through: Sequence,
        commits_pass: bool,
        wall: WallTime,
    ) -> EncodedCut {
        let previous = self.chain.as_ref().map(SenderChain::last).unwrap_or_default();
        let initial =
            self.pass.is_some_and(|pass| pass.is_initial() && pass.commit.is_none()) && !commits_pass;
        let staging = self.is_staging();
        let meta = CutMeta {
            mirror: settings.mirror,
            lineage: self.start.into(),
            first: after.next(),
            last: through,
            previous,
            pass: self.pass.filter(|_| staging).map_or(0, |pass| pass.id),
            time: self.spill.time_for(through).unwrap_or(wall),
            echo: self.echo_for(through),
            commit: commits_pass || !staging,
            initial,
        };
        let records: Vec<Record> = self.ring.records(after, through).cloned().collect();
        journal::encode(&meta, &records)
    }

    /// Notes a stamp of the target's clock: whatever takes a sequence from now on is acknowledged after it.
    pub(super) fn hear_clock(&mut self, clock: WallTime) {
        match self.echoes.back_mut() {
            Some((_, newest)) if *newest >= clock => {}
            Some((sequence, newest)) if *sequence == self.last => *newest = clock,
            Some(_) | None => {
                // An older stamp in its place is a looser bound, never a wrong one.
                if self.echoes.len() >= ECHOES_MAX {
                    self.echoes.pop_back();
                }
                self.echoes.push_back((self.last, clock));
            }
        }
    }

    /// The newest stamp heard.
    pub(super) fn newest_echo(&self) -> WallTime {
        self.echoes.back().map_or(WallTime(0), |(_, clock)| *clock)
    }

    /// The newest stamp that was heard before any write behind `through` took its sequence: so all that a target
    /// with a cut that ends there can lack was acknowledged after that stamp.
    fn echo_for(&self, through: Sequence) -> WallTime {
        let fits = self.echoes.iter().rev().find(|(heard, _)| *heard <= through);
        fits.map_or(WallTime(0), |(_, clock)| *clock)
    }

    /// The stamp of the cut that ended at `sequence`.
    pub(super) fn cut_time(&mut self, sequence: Sequence) -> Option<WallTime> {
        while let Some((end, time)) = self.cut_times.front().copied() {
            if end > sequence {
                return None;
            }
            self.cut_times.pop_front();
            let superseded = self.cut_times.front().is_some_and(|(next, _)| *next <= sequence);
            if !superseded {
                return Some(time);
            }
        }
        None
    }

    /// Bytes that the target lacks: the ring's payloads and the dirty blocks.
    pub(super) fn backlog(&self) -> ByteCount {
        let dirty: u64 = self
            .volumes
            .iter()
            .map(|volume| volume.current.count().bytes().0 + volume.next.count().bytes().0)
            .sum();
        let ordered = self.ring.bytes().saturating_add(self.spill.backlog_bytes());
        ByteCount(ordered.saturating_add(dirty).saturating_add(self.compare.remaining_bytes()))
    }

    /// True if some block is only in a dirty map.
    pub(super) fn has_dirty(&self) -> bool {
        self.volumes.iter().any(|volume| !volume.current.is_empty() || !volume.next.is_empty())
    }

    /// Every record leaves the ring for the dirty map: at a clean stop, or when its incarnation ends.
    pub(super) fn fold_ring(&mut self) {
        self.fold_spill();
        self.sizes.forget_sent();
        for record in self.ring.clear() {
            if has_blocks(&record) {
                self.volume(record.volume).current.set(record.range);
            }
        }
        let writes: Vec<InFlight> = self.in_flight.values().copied().collect();
        for write in writes {
            self.volume(write.volume).current.set(write.range);
        }
        for volume in &mut self.volumes {
            let next = volume.next.take();
            volume.current.union(&next);
            let bad = volume.bad.take();
            volume.current.union(&bad);
        }
    }

    /// When the next cut, heartbeat or dial is due.
    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        match &self.link {
            Link::Down { retry_at, .. } => self.admission_open.then_some(*retry_at),
            Link::Up { .. } => {
                let cut = if self.gate == Gate::Open && self.may_send() { self.cut_timeout() } else { None };
                [cut, self.copy_rate.poll_timeout(), self.verify.poll_timeout()].into_iter().flatten().min()
            }
            Link::Dialing { .. } | Link::Greeting { .. } | Link::Halted { .. } | Link::Stopped => None,
        }
    }

    /// When a cut may go that waits for its time or for the bandwidth.
    fn cut_timeout(&self) -> Option<Monotonic> {
        // A heartbeat is due only while nothing waits for a cut; what was refused for the bandwidth is due already.
        let due = self.cut_due.or_else(|| self.pass.is_none().then(|| self.last_cut + HEARTBEAT));
        self.bandwidth.poll_timeout().or(due)
    }

    /// Above the budget the coldest intent bits clear: first a flush of home, then the rule of the tracker.
    pub(super) fn clear_intent(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) {
        if now.since(self.last_clear) < Duration::from_secs(1) || self.pass.is_some() {
            return;
        }
        self.last_clear = now;
        for index in 0..self.volumes.len() {
            let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            let volume = self.volume(index);
            let over = !volume.poisoned && volume.intent.count() > settings.intent_budget_regions;
            let asked = out.waits_for(
                |purpose| matches!(purpose, Purpose::ClearFlush { volume, .. } if *volume == index),
            );
            if over && !asked {
                let purpose = Purpose::ClearFlush { volume: index, submitted_at: now };
                out.io(purpose, IoRequest::HomeFlush { volume: index });
            }
        }
    }

    /// A flush that [`Primary::clear_intent`] asked for succeeded.
    pub(super) fn clear_flushed(
        &mut self,
        settings: &MirrorSettings,
        index: VolumeIndex,
        submitted_at: Monotonic,
    ) {
        let durable = self.chain.as_ref().map(|chain| chain.committed().position);
        let durable =
            durable.filter(|tip| tip.same_lineage(&self.start)).map_or(Sequence(0), |tip| tip.sequence);
        let idle = self.pass.is_none() && self.compare.is_done();
        let volume = self.volume(index);
        volume.tracker.flushed(submitted_at);
        if !idle {
            return;
        }
        for region in volume.tracker.clearable(durable, settings.intent_budget_regions) {
            let bytes = settings.region_bytes;
            let range = ByteRange::new(region.saturating_mul(bytes), bytes).unwrap_or_default();
            let maps = [&volume.current, &volume.next, &volume.bad];
            if !maps.into_iter().any(|map| touches(map, range)) {
                volume.intent.clear_region(region);
                volume.tracker.cleared(region);
            }
        }
    }

    /// The writes that wait for their intent bits.
    pub(super) fn take_waiting(&mut self) -> Vec<(VolumeIndex, StepId)> {
        self.waiting.drain(..).map(|write| (write.volume, write.step)).collect()
    }

    /// Tries the partner now.
    pub(super) fn redial(&mut self, now: Monotonic) {
        if matches!(self.link, Link::Stopped | Link::Halted { .. } | Link::Down { .. }) {
            self.link = Link::Down { retry_at: now, attempt: 0 };
        }
    }

    /// The incarnation ends: the journal's records fold, and every intent region is compared with the target.
    pub(super) fn reincarnate(&mut self, settings: &MirrorSettings, now: Monotonic, out: &mut Outbox) {
        self.close(Link::Down { retry_at: now, attempt: 0 }, "a new incarnation begins", out);
        self.fold_ring();
        self.sync.strand();
        self.pass = None;
        self.chain = None;
        self.folded_from = None;
        self.commit_floor = Sequence(0);
        self.in_flight.clear();
        self.steps.clear();
        self.last = Sequence(0);
        self.cut_times.clear();
        let newest = self.newest_echo();
        self.echoes.clear();
        self.hear_clock(newest);
        let unknown = self.rpo.is_unknown();
        let oldest = now.0.saturating_sub(u64::try_from(self.rpo.rpo(now).as_nanos()).unwrap_or(u64::MAX));
        self.rpo = RpoTracker::default();
        self.rpo.inherit(Monotonic(oldest));
        if unknown {
            self.rpo.lose();
        }
        for (index, volume) in self.volumes.iter_mut().enumerate() {
            let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            volume.tracker = inherited_regions(&volume.intent, &volume.current, volume.size, settings, now);
            if volume.poisoned {
                volume.tracker.flush_failed();
            }
            self.compare.add_regions(index, &volume.intent, volume.size, settings.region_bytes);
        }
    }

    /// Everything that the target may lack, as block maps; `None` while something would have to be compared.
    pub(super) fn clean_state(&mut self) -> Option<CleanState> {
        if !self.compare.is_done() {
            return None;
        }
        let journal = self.kept_journal();
        if journal.is_none() {
            self.fold_ring();
        }
        let copies: Vec<_> = self.copying.ranges().collect();
        for (volume, range) in copies {
            self.volume(volume).current.set(range);
        }
        let committed = self.chain.as_ref().map(|chain| chain.committed().position).or(self.known_tip);
        for volume in &mut self.volumes {
            let bad = volume.bad.take();
            volume.current.union(&bad);
        }
        let dirty = self.volumes.iter().map(|volume| volume.current.clone()).collect();
        Some(CleanState { dirty, committed, journal })
    }
}

/// The tracker of a new incarnation: it inherits every region whose bit is set, or will be.
fn inherited_regions(
    intent: &IntentMap,
    dirty: &DirtyMap,
    size: ByteCount,
    settings: &MirrorSettings,
    now: Monotonic,
) -> RegionTracker {
    let region_bytes = ByteCount(settings.region_bytes);
    if dirty.count().bytes() >= size {
        return RegionTracker::new(region_bytes, now, 0..size.0.div_ceil(settings.region_bytes));
    }
    RegionTracker::new(region_bytes, now, intent.set_regions())
}

/// True if a block of `range` is in the map.
fn touches(map: &DirtyMap, range: ByteRange) -> bool {
    map.next_run(range.first_block(), BlockCount(1))
        .is_some_and(|(first, _): (Lba, _)| first < range.end_block())
}
