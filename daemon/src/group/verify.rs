//! Verify at the primary: is the target's image what this side's order of writes says?
//!
//! Guarantees (docs/protocols/replication.md, "Verify"): a block is compared only between images of one point of the
//! write order, so that no write makes a false alarm; a difference counts when a second comparison finds it as well;
//! nothing is overwritten but by an operator's `--repair-from`, and never a write of a host's that came meanwhile.
//! Hosts wait for none of this longer than for a copy's read.

mod repair;
mod report;
mod target;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use block::{
    BlockCount, ByteCount, ByteRange, DATA_UNIT_BYTES, Lba, Monotonic, Sequence, VolumeIndex, WallTime,
};
use bytes::Bytes;
use control::Side;
use engine::StepId;
use engine::dirty_map::DirtyMap;
use protocol::{Held, Message, VERIFY_BLOCKS_MAX, VerifyReply, VerifyRequest};

use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::primary::{Gate, Primary};
use super::roles::StateChange;
use super::{Group, Machine, Mirror, VerbRefused};

pub use report::{VerifyProgress, VerifyReport};
pub(super) use target::Verifying;

use repair::Repairs;

/// Ranges that are read here at once: each keeps writes of its range waiting.
const READS_MAX: usize = 4;
/// Ranges that were read and wait for the target.
const ASKED_MAX: usize = 64;
/// Blocks to be compared again; beyond it no new range begins.
const AGAIN_MAX: usize = 256;
/// A block that was written or could not be read each of so many times is given up.
const TRIES_MAX: u32 = 10;
/// The wait before a block that was written meanwhile is compared again; doubles, up to 16 times.
const AGAIN_WAIT: Duration = Duration::from_millis(20);

type Hash = [u8; 32];

/// Blocks to be compared.
#[derive(Clone, Copy, Debug)]
struct Piece {
    volume: VolumeIndex,
    range: ByteRange,
    tries: u32,
    /// It differed the last time.
    differed: bool,
    due: Monotonic,
}

/// A piece under way.
#[derive(Debug)]
struct Asked {
    piece: Piece,
    /// Its range lock, until it was read here.
    step: Option<StepId>,
    /// The last sequence when it was locked: this side's image is that of this point.
    at: Sequence,
    ours: Vec<Hash>,
    /// Blocks written since, with the first sequence; those that the journal did not hold count as written.
    written: BTreeMap<Lba, Sequence>,
    /// The session ended meanwhile: only its lock is still to be released.
    void: bool,
}

impl Asked {
    fn wrote(&mut self, volume: VolumeIndex, range: ByteRange, sequence: Sequence) {
        let ours = self.piece.range;
        if self.piece.volume != volume || !ours.overlaps(range) {
            return;
        }
        let first = range.first_block().max(ours.first_block());
        let end = range.end_block().min(ours.end_block());
        for block in first.0..end.0 {
            self.written.entry(Lba(block)).or_insert(sequence);
        }
    }
}

/// A verify under way.
#[derive(Debug)]
struct Job {
    repair_from: Option<Side>,
    /// The volumes' sizes when it began: what grows meanwhile is compared by the next one.
    sizes: Vec<ByteCount>,
    /// The next range: volume and byte.
    cursor: (usize, u64),
    again: VecDeque<Piece>,
    asked: BTreeMap<u64, Asked>,
    repairs: Repairs,
    /// A timer is wanted for a piece that is not due yet.
    wakes_at: Option<Monotonic>,
    /// The repair was given to a pass, whose end is awaited.
    passes: bool,
}

/// The primary's verify: one at a time, and what the last one found.
#[derive(Debug, Default)]
pub(super) struct Verify {
    job: Option<Job>,
    last: u64,
    report: Option<VerifyReport>,
}

impl Verify {
    pub(super) fn report(&self) -> Option<&VerifyReport> {
        self.report.as_ref()
    }

    pub(super) fn poll_timeout(&self) -> Option<Monotonic> {
        self.job.as_ref().and_then(|job| job.wakes_at)
    }

    pub(super) fn begin_turn(&mut self) {
        if let Some(job) = &mut self.job {
            job.wakes_at = None;
        }
    }

    /// A host's write took its sequence.
    pub(super) fn wrote(&mut self, volume: VolumeIndex, range: ByteRange, sequence: Sequence) {
        if let Some(job) = &mut self.job {
            job.asked.values_mut().for_each(|asked| asked.wrote(volume, range, sequence));
            job.repairs.wrote(volume, range);
        }
    }

    /// The session ended: what was asked is asked again in the next one.
    pub(super) fn session_lost(&mut self) {
        let Some(job) = &mut self.job else { return };
        for asked in job.asked.values_mut().filter(|asked| !asked.void) {
            job.again.push_back(asked.piece);
            asked.void = true;
        }
        job.asked.retain(|_, asked| asked.step.is_some());
        job.repairs.session_lost();
    }

    /// Gives the verify up; the steps' locks are the caller's to release.
    pub(super) fn abandon(&mut self, reason: &str, wall: WallTime) -> Vec<(VolumeIndex, StepId)> {
        let Some(job) = self.job.take() else { return Vec::new() };
        if let Some(report) = &mut self.report {
            report.end(VerifyProgress::GivenUp(reason.to_owned()), wall);
        }
        let locked = job.asked.into_values().filter_map(|asked| Some((asked.piece.volume, asked.step?)));
        locked.collect()
    }

    /// The lock of a planned piece was asked for as `step`.
    pub(super) fn locking(&mut self, request: u64, step: StepId) {
        let asked = self.job.as_mut().and_then(|job| job.asked.get_mut(&request));
        if let Some(asked) = asked {
            asked.step = Some(step);
        }
    }

    fn holder(&mut self, volume: VolumeIndex, step: StepId) -> Option<(u64, &mut Asked)> {
        let asked = &mut self.job.as_mut()?.asked;
        let found =
            asked.iter_mut().find(|(_, asked)| asked.piece.volume == volume && asked.step == Some(step));
        found.map(|(request, asked)| (*request, asked))
    }
}

impl Job {
    /// One that has read nothing yet.
    fn new(repair_from: Option<Side>, sizes: Vec<ByteCount>) -> Self {
        Self {
            repair_from,
            sizes,
            cursor: (0, 0),
            again: VecDeque::new(),
            asked: BTreeMap::new(),
            repairs: Repairs::default(),
            wakes_at: None,
            passes: false,
        }
    }

    /// The next piece that is due, if any; the caller takes it with [`Self::take`].
    fn peek(&self, now: Monotonic) -> Option<Piece> {
        if let Some(piece) = self.again.iter().find(|piece| piece.due <= now) {
            return Some(*piece);
        }
        let (index, offset) = self.cursor;
        let size = self.sizes.get(index).filter(|_| self.again.len() < AGAIN_MAX)?;
        let end = size.0.min(offset + VERIFY_BLOCKS_MAX * DATA_UNIT_BYTES);
        let range = ByteRange::between(offset, end)?;
        let volume = VolumeIndex(u16::try_from(index).ok()?);
        Some(Piece { volume, range, tries: 0, differed: false, due: Monotonic(0) })
    }

    fn take(&mut self, now: Monotonic) {
        if let Some(place) = self.again.iter().position(|piece| piece.due <= now) {
            self.again.remove(place);
            return;
        }
        let (index, offset) = self.cursor;
        let size = self.sizes.get(index).map_or(0, |size| size.0);
        let end = size.min(offset + VERIFY_BLOCKS_MAX * DATA_UNIT_BYTES);
        self.cursor = if end >= size { (index + 1, 0) } else { (index, end) };
    }

    fn has_compared(&self) -> bool {
        self.cursor.0 >= self.sizes.len() && self.again.is_empty() && self.asked.is_empty()
    }
}

impl Primary {
    /// The target follows write by write: there are images of one point to compare.
    fn may_verify(&self) -> bool {
        self.session().is_some()
            && self.admission_open
            && self.gate == Gate::Open
            && self.pass.is_none()
            && self.compare.is_done()
            && !self.has_dirty()
            && self.folded_from.is_none()
    }

    /// `mirror verify`.
    pub(super) fn start_verify(
        &mut self,
        repair_from: Option<Side>,
        wall: WallTime,
    ) -> Result<(), VerbRefused> {
        if self.verify.job.is_some() {
            let text = "a verify runs already: 'farshore mirror show' tells how far it is";
            return Err(VerbRefused(text.to_owned()));
        }
        if self.volumes.iter().any(|volume| volume.poisoned) {
            let text = "a flush failed here, and what is on the device is not known: restart farshored first";
            return Err(VerbRefused(text.to_owned()));
        }
        let sizes: Vec<ByteCount> = self.volumes.iter().map(|volume| volume.size).collect();
        let total = sizes.iter().map(|size| size.0).sum();
        self.verify.report =
            Some(VerifyReport::begun(repair_from, ByteCount(total), self.volumes.len(), wall));
        self.verify.job = Some(Job::new(repair_from, sizes));
        Ok(())
    }

    /// Chooses the next ranges to read; the caller asks for their locks.
    pub(super) fn plan_verify(&mut self, now: Monotonic) -> Vec<(u64, VolumeIndex, ByteRange)> {
        let mut planned = Vec::new();
        if !self.may_verify() {
            return planned;
        }
        let Some(job) = &mut self.verify.job else { return planned };
        loop {
            let reading = job.asked.values().filter(|asked| asked.step.is_some()).count() + planned.len();
            if reading >= READS_MAX || job.asked.len() >= ASKED_MAX {
                return planned;
            }
            let Some(piece) = job.peek(now) else {
                job.wakes_at = job.again.iter().map(|piece| piece.due).filter(|due| *due > now).min();
                return planned;
            };
            if !self.copy_rate.admits(now) {
                return planned;
            }
            self.copy_rate.spent(piece.range.length());
            job.take(now);
            self.verify.last += 1;
            let asked = Asked {
                piece,
                step: None,
                at: Sequence(0),
                ours: Vec::new(),
                written: BTreeMap::new(),
                void: false,
            };
            job.asked.insert(self.verify.last, asked);
            planned.push((self.verify.last, piece.volume, piece.range));
        }
    }

    /// A lock is held that may be a verify's: then its range is read, and this is true.
    pub(super) fn verify_locked(&mut self, volume: VolumeIndex, step: StepId, out: &mut Outbox) -> bool {
        let at = self.last;
        let Some((request, asked)) = self.verify.holder(volume, step) else { return false };
        let range = asked.piece.range;
        asked.at = at;
        // What the journal does not hold is different at the target, and known to be.
        let mut unknown = DirtyMap::default();
        if let Some(maps) = self.volumes.get(usize::from(volume.0)) {
            for map in [&maps.current, &maps.next, &maps.bad] {
                mark(&mut unknown, map, range);
            }
        }
        for (of, copied) in self.copying.ranges() {
            if of == volume {
                unknown.set(copied);
            }
        }
        let mut from = range.first_block();
        while let Some((first, count)) = unknown.next_run(from, BlockCount(u64::MAX)) {
            from = Lba(first.0.saturating_add(count.0));
            if let (Some(run), Some((_, asked))) =
                (ByteRange::of_blocks(first, count), self.verify.holder(volume, step))
            {
                asked.wrote(volume, run, at);
            }
        }
        out.io(Purpose::VerifyRead { request }, IoRequest::HomeRead { volume, range });
        true
    }

    /// A range was read under its lock. Returns the lock that the caller must release now.
    pub(super) fn verify_read(
        &mut self,
        request: u64,
        home: Result<Bytes, IoFailure>,
        now: Monotonic,
        out: &mut Outbox,
    ) -> Option<(VolumeIndex, StepId)> {
        let session = self.session();
        let start = self.start;
        let job = self.verify.job.as_mut()?;
        let asked = job.asked.get_mut(&request)?;
        let piece = asked.piece;
        let lock = asked.step.take().map(|step| (piece.volume, step));
        match (home, session) {
            _ if asked.void => {
                job.asked.remove(&request);
            }
            (Ok(data), Some(session)) => {
                asked.ours = hashes(&data);
                let (id, volume, range, at) = (request, piece.volume, piece.range, start.at(asked.at));
                let message = VerifyRequest { id, volume, range, at, content: false };
                let frame = Message::VerifyRequest(message).encode();
                out.push(Effect::Send { session, frame });
            }
            (Ok(_), None) => {
                job.asked.remove(&request);
                job.again.push_back(piece);
            }
            (Err(_), _) => {
                job.asked.remove(&request);
                self.unreadable(piece, now);
            }
        }
        lock
    }

    /// The target's answer to what [`Self::verify_read`] asked.
    pub(super) fn verify_answered(&mut self, reply: VerifyReply, now: Monotonic, out: &mut Outbox) {
        let start = self.start;
        let Some(job) = &mut self.verify.job else { return };
        let Some(asked) = job.asked.remove(&reply.id).filter(|asked| !asked.void && asked.step.is_none())
        else {
            return self.repair_answered(reply, out);
        };
        let through = reply.through;
        if !through.same_lineage(&start) || through.sequence < asked.at {
            job.again.push_back(asked.piece);
            return;
        }
        match &reply.held {
            Held::Hashes(theirs) if theirs.len() == asked.ours.len() => {
                self.judge(&asked, theirs, through.sequence, now, out);
            }
            Held::Hashes(_) | Held::Content(_) | Held::Unreadable => self.unreadable(asked.piece, now),
        }
    }

    fn judge(&mut self, asked: &Asked, theirs: &[Hash], through: Sequence, now: Monotonic, out: &mut Outbox) {
        let Piece { volume, range, tries, differed, .. } = asked.piece;
        for (block, (ours, theirs)) in (range.first_block().0..).zip(asked.ours.iter().zip(theirs)) {
            let Some(single) = ByteRange::of_blocks(Lba(block), BlockCount(1)) else { continue };
            let again = Piece { volume, range: single, tries: tries + 1, differed, due: now };
            if asked.written.get(&Lba(block)).is_some_and(|written| *written <= through) {
                let wait = AGAIN_WAIT.saturating_mul(1 << tries.min(4));
                self.compare_again(Piece { due: now + wait, ..again }, |report| &mut report.busy);
            } else if ours == theirs {
                self.count(|report| &mut report.compared);
            } else if !differed {
                self.compare_again(Piece { differed: true, ..again }, |report| &mut report.busy);
            } else {
                self.count(|report| &mut report.compared);
                self.differs(volume, single, out);
            }
        }
    }

    fn count(&mut self, of: impl Fn(&mut VerifyReport) -> &mut ByteCount) {
        if let Some(report) = &mut self.verify.report {
            let count = of(report);
            count.0 = count.0.saturating_add(DATA_UNIT_BYTES);
        }
    }

    /// Compares a block once more, or gives it up and counts it as `lost`.
    fn compare_again(&mut self, piece: Piece, lost: impl Fn(&mut VerifyReport) -> &mut ByteCount) {
        if piece.tries >= TRIES_MAX {
            self.count(lost);
        } else if let Some(job) = &mut self.verify.job {
            job.again.push_back(piece);
        }
    }

    /// A piece could not be read on one of the sides: block by block, and once more.
    fn unreadable(&mut self, piece: Piece, now: Monotonic) {
        for block in piece.range.first_block().0..piece.range.end_block().0 {
            if let Some(range) = ByteRange::of_blocks(Lba(block), BlockCount(1)) {
                let wait = AGAIN_WAIT.saturating_mul(1 << piece.tries.min(4));
                let again = Piece { range, tries: piece.tries + 1, due: now + wait, ..piece };
                self.compare_again(again, |report| &mut report.unreadable);
            }
        }
    }

    /// A second comparison differs as well.
    fn differs(&mut self, volume: VolumeIndex, range: ByteRange, out: &mut Outbox) {
        let Some(report) = &mut self.verify.report else { return };
        let first = report.differing_bytes().0 == 0;
        report.add(volume, range);
        if first {
            let text = format!(
                "verify: the partner's image differs from this side's, first seen at byte {} of volume {}",
                range.offset(),
                volume.0
            );
            out.log(Loudness::Error, text);
        }
    }

    /// Takes the verify to its end, once everything is compared.
    pub(super) fn end_verify(&mut self, wall: WallTime, out: &mut Outbox) {
        let Some(job) = self.verify.job.as_ref().filter(|job| job.has_compared()) else { return };
        let done = match job.repair_from {
            None => true,
            Some(Side::Local) => self.repair_by_pass(),
            Some(Side::Partner) => self.repair_is_done(),
        };
        if !done {
            return;
        }
        self.verify.job = None;
        if let Some(report) = &mut self.verify.report {
            report.end(VerifyProgress::Ended, wall);
            let loudness = if report.is_clean() { Loudness::Info } else { Loudness::Error };
            out.log(loudness, report.sentence());
        }
    }
}

impl Group {
    /// `mirror verify`: compares the target's image with this side's; with `repair_from` what differs is overwritten.
    ///
    /// # Errors
    /// If this side is not the primary, its mirror is stopped or has no image, or a verify runs.
    pub fn verify(&mut self, repair_from: Option<Side>) -> Result<(), VerbRefused> {
        let stamp = self.stamp;
        let mirror = self.mirror_in_role("verify")?;
        let stops = mirror.changes.iter().any(|change| matches!(change, StateChange::Stopped(true)));
        if mirror.state.stopped || stops {
            let text = "the mirror is stopped: 'farshore mirror start' first, so that there is one order to compare in";
            return Err(VerbRefused(text.to_owned()));
        }
        if !mirror.state.consistent {
            let text = "the initial copy has not ended: there is no image to compare with yet";
            return Err(VerbRefused(text.to_owned()));
        }
        match &mut mirror.machine {
            Machine::Primary(primary) => primary.start_verify(repair_from, stamp),
            Machine::Secondary(_) | Machine::Changing(_) => Ok(()),
        }
    }

    /// What the verify that runs, or the last one of this process, has found; none if there was none.
    pub fn verify_report(&self) -> Option<&VerifyReport> {
        match &self.mirror.as_ref()?.machine {
            Machine::Primary(primary) => primary.verify.report(),
            Machine::Secondary(_) | Machine::Changing(_) => None,
        }
    }

    /// One turn of the verify.
    pub(super) fn verify_turn(&mut self) {
        let (now, stamp) = (self.now, self.stamp);
        let Some(Mirror { machine: Machine::Primary(primary), planned, .. }) = &mut self.mirror else {
            return;
        };
        if primary.verify.job.is_none() {
            return;
        }
        if primary.volumes.iter().any(|volume| volume.poisoned) {
            let reason = "a flush failed: what is on the device is not known";
            let locks = primary.verify.abandon(reason, stamp);
            return self.release_locks(&locks);
        }
        primary.verify.begin_turn();
        // A switch waits until nothing is in flight: it must not wait for this.
        if planned.is_running() {
            return;
        }
        let planned = primary.plan_verify(now);
        let writes = primary.plan_repairs(&mut self.out);
        primary.end_verify(stamp, &mut self.out);
        for (request, volume, range) in planned {
            let step = self.slot(volume).map(|slot| slot.volume.begin_copy(now, range));
            if let (Some(step), Some(Mirror { machine: Machine::Primary(primary), .. })) =
                (step, &mut self.mirror)
            {
                primary.verify.locking(request, step);
            }
        }
        for (volume, command, range) in writes {
            self.write_repair(volume, command, range);
        }
    }

    /// A range of a verify was read here.
    pub(super) fn verify_read(&mut self, request: u64, result: Result<Bytes, IoFailure>) {
        let now = self.now;
        let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror else { return };
        let lock = primary.verify_read(request, result, now, &mut self.out);
        if let Some((volume, step)) = lock
            && let Some(slot) = self.slot(volume)
        {
            slot.volume.copy_done(now, step);
        }
    }
}

/// The hash of each block.
fn hashes(data: &Bytes) -> Vec<Hash> {
    let unit = usize::try_from(DATA_UNIT_BYTES).unwrap_or(usize::MAX);
    data.chunks(unit).map(|block| *blake3::hash(block).as_bytes()).collect()
}

/// Adds the blocks of `range` that are in `map`.
fn mark(into: &mut DirtyMap, map: &DirtyMap, range: ByteRange) {
    let mut from = range.first_block();
    while let Some((first, count)) = map.next_run(from, range.block_count()) {
        if first >= range.end_block() {
            return;
        }
        from = Lba(first.0 + count.0);
        if let Some(run) = ByteRange::of_blocks(first, count) {
            into.set(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(blocks: &[u64]) -> Job {
        Job::new(None, blocks.iter().map(|count| BlockCount(*count).bytes()).collect())
    }

    fn blocks(first: u64, count: u64) -> ByteRange {
        ByteRange::of_blocks(Lba(first), BlockCount(count)).unwrap()
    }

    #[test]
    fn the_pieces_are_all_blocks_of_all_volumes_once() {
        let mut job = job(&[5, 64, 130]);
        let mut seen = vec![DirtyMap::default(); job.sizes.len()];
        while let Some(piece) = job.peek(Monotonic(1)) {
            job.take(Monotonic(1));
            assert!((1..=VERIFY_BLOCKS_MAX).contains(&piece.range.block_count().0));
            let map = &mut seen[usize::from(piece.volume.0)];
            let before = map.count().0;
            map.set(piece.range);
            assert_eq!(map.count().0, before + piece.range.block_count().0, "no block twice");
        }
        assert!(job.has_compared());
        assert!(seen.iter().zip(&job.sizes).all(|(map, size)| map.count().bytes() == *size));
    }

    #[test]
    fn a_piece_that_is_due_comes_before_new_ones_and_many_of_them_hold_new_ones_back() {
        let mut job = job(&[100]);
        let later = Piece {
            volume: VolumeIndex(0),
            range: blocks(9, 1),
            tries: 1,
            differed: false,
            due: Monotonic(50),
        };
        job.again.push_back(later);
        assert_eq!(job.peek(Monotonic(49)).unwrap().range, blocks(0, 64));
        assert_eq!(job.peek(Monotonic(50)).unwrap().range, blocks(9, 1));
        job.take(Monotonic(50));
        assert!(job.again.is_empty() && job.cursor == (0, 0));
        job.again.extend(std::iter::repeat_n(later, AGAIN_MAX));
        assert!(job.peek(Monotonic(49)).is_none());
    }

    #[test]
    fn the_first_write_of_a_block_counts_and_only_that_of_its_own_range() {
        let piece = Piece {
            volume: VolumeIndex(1),
            range: blocks(4, 4),
            tries: 0,
            differed: false,
            due: Monotonic(0),
        };
        let mut asked = Asked {
            piece,
            step: None,
            at: Sequence(10),
            ours: Vec::new(),
            written: BTreeMap::new(),
            void: false,
        };
        asked.wrote(VolumeIndex(0), blocks(4, 4), Sequence(11));
        asked.wrote(VolumeIndex(1), blocks(0, 4), Sequence(12));
        asked.wrote(VolumeIndex(1), blocks(3, 2), Sequence(13));
        asked.wrote(VolumeIndex(1), blocks(4, 1), Sequence(14));
        asked.wrote(VolumeIndex(1), blocks(7, 90), Sequence(15));
        assert_eq!(asked.written, BTreeMap::from([(Lba(4), Sequence(13)), (Lba(7), Sequence(15))]));
    }
}
