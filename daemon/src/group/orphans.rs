//! Orphaned writes: what a fenced side holds and its new primary never had, block by block.
//!
//! Guarantees: every block whose content here is not in the image that the new primary took over is listed; an *exact*
//! entry is a block that was written here after the fork. An entry that is not exact is one of a block that the new
//! primary has overwritten since, so that what it took over cannot be compared any more. Nothing is changed here.

use std::collections::{BTreeMap, VecDeque};

use block::{
    BlockCount, ByteRange, DATA_UNIT_BYTES, Lba, Monotonic, Position, Sequence, VolumeIndex, WallTime,
};
use bytes::Bytes;
use engine::dirty_map::DirtyMap;
use journal::RecordKind;
use protocol::{HashRequest, Message, OrphanReply};

use super::effect::{Effect, IoFailure, IoRequest, Outbox, Purpose, SessionId};
use super::growth::has_blocks;
use super::primary::{Primary, PrimaryVolume};
use super::rewind::inside;
use super::roles::StateChange;
use super::{Group, Machine, VerbRefused};

/// Bytes that one question covers; its answer is 33 bytes a block.
const QUESTION_BYTES: u64 = 1 << 20;
/// Questions on the way; bounds the reads at both sides.
const QUESTIONS_MAX: usize = 8;
/// Entries of a report; beyond it the search ends, with what to do instead.
const EXTENTS_MAX: usize = 1 << 18;
/// Blocks whose time of writing is remembered; those beyond are listed without one.
const TIMES_MAX: usize = 1 << 18;

/// A run of blocks that this side holds and the new primary never had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrphanExtent {
    /// Which volume.
    pub volume: VolumeIndex,
    /// Whole blocks.
    pub range: ByteRange,
    /// When its host was told of it, or at most some 10 ms before; unknown after a restart.
    pub written: Option<WallTime>,
    /// It is an orphan; else it may be one, and the new primary has overwritten it since.
    pub exact: bool,
}

/// How far a search is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrphanProgress {
    /// None was ordered.
    Idle,
    /// It is under way.
    Searching,
    /// The orphans, by volume and offset.
    Found(Vec<OrphanExtent>),
    /// It could not be ended, for this reason.
    Failed(String),
}

/// What a primary that is being fenced knows of its own writes; gone with the process.
#[derive(Debug, Default)]
struct Memory {
    /// Everything that the fork may lack, by volume.
    blocks: Vec<DirtyMap>,
    /// Blocks that hosts wrote after the fork, and when.
    written: BTreeMap<(VolumeIndex, Lba), Option<WallTime>>,
}

#[derive(Debug)]
struct Asked {
    volume: VolumeIndex,
    range: ByteRange,
    home: Option<Result<Bytes, IoFailure>>,
    reply: Option<OrphanReply>,
}

#[derive(Debug)]
struct Search {
    session: SessionId,
    queue: VecDeque<(VolumeIndex, ByteRange)>,
    asked: BTreeMap<u64, Asked>,
    last: u64,
    found: BTreeMap<(VolumeIndex, Lba), (Option<WallTime>, bool)>,
}

/// What a mirror knows of orphans.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    memory: Option<Memory>,
    search: Option<Search>,
    outcome: Option<Result<Vec<OrphanExtent>, String>>,
}

impl Orphans {
    /// A primary is fenced by `change`: its own writes are remembered as long as the process lives.
    pub(super) fn remember(
        &mut self,
        primary: &Primary,
        change: &StateChange,
        now: Monotonic,
        wall: WallTime,
    ) {
        self.memory =
            change.fork_above(primary.start.epoch).and_then(|fork| Memory::of(primary, &fork, now, wall));
    }
}

impl Memory {
    /// `None` while something would have to be compared first.
    fn of(primary: &Primary, fork: &Position, now: Monotonic, wall: WallTime) -> Option<Self> {
        if !primary.compare.is_done() {
            return None;
        }
        let map = |volume: &PrimaryVolume| {
            let mut blocks = volume.current.clone();
            blocks.union(&volume.next);
            blocks.union(&volume.bad);
            blocks
        };
        let mut memory = Self { blocks: primary.volumes.iter().map(map).collect(), written: BTreeMap::new() };
        for (volume, range) in primary.copying.ranges() {
            memory.note(volume, range);
        }
        let after = if fork.same_lineage(&primary.start) { fork.sequence } else { Sequence(0) };
        for (volume, blocks) in
            (0_u16..).map(VolumeIndex).zip(primary.spill.stored_blocks(primary.volumes.len()))
        {
            if let Some(known) = memory.blocks.get_mut(usize::from(volume.0)) {
                known.union(&blocks);
            }
        }
        let held = primary.spill.held_records().filter(|record| record.sequence > after);
        for record in primary.ring.records(after, primary.last).chain(held) {
            if has_blocks(record) {
                memory.note(record.volume, record.range);
            }
            let at = primary.rpo.acknowledged_at(record.sequence);
            let at = at.map(|at| WallTime(wall.0.saturating_sub(now.0.saturating_sub(at.0))));
            match record.kind {
                RecordKind::Write | RecordKind::Zero | RecordKind::Trim => {
                    memory.note_written(record.volume, record.range, at);
                }
                RecordKind::Copy
                | RecordKind::CopyZero
                | RecordKind::Resize
                | RecordKind::Void
                | RecordKind::Bad
                | RecordKind::Marker => {}
            }
        }
        Some(memory)
    }

    fn note(&mut self, volume: VolumeIndex, range: ByteRange) {
        if let Some(blocks) = self.blocks.get_mut(usize::from(volume.0)) {
            blocks.set(range);
        }
    }

    fn note_written(&mut self, volume: VolumeIndex, range: ByteRange, at: Option<WallTime>) {
        for index in 0..range.block_count().0 {
            if self.written.len() >= TIMES_MAX {
                return;
            }
            self.written.insert((volume, Lba(range.first_block().0 + index)), at);
        }
    }

    fn pieces(&self) -> VecDeque<(VolumeIndex, ByteRange)> {
        let mut pieces = VecDeque::new();
        for (volume, blocks) in (0_u16..).map(VolumeIndex).zip(&self.blocks) {
            let mut from = Lba(0);
            while let Some((first, count)) =
                blocks.next_run(from, BlockCount(QUESTION_BYTES / DATA_UNIT_BYTES))
            {
                from = Lba(first.0.saturating_add(count.0));
                pieces.extend(ByteRange::of_blocks(first, count).map(|range| (volume, range)));
            }
        }
        pieces
    }
}

fn cut(volume: VolumeIndex, range: ByteRange) -> impl Iterator<Item = (VolumeIndex, ByteRange)> {
    let mut offset = range.offset();
    std::iter::from_fn(move || {
        let end = range.end().min(offset.saturating_add(QUESTION_BYTES));
        let piece = ByteRange::between(offset, end).filter(|piece| !piece.is_empty())?;
        offset = end;
        Some((volume, piece))
    })
}

impl Search {
    fn ask(&mut self, out: &mut Outbox) {
        while self.asked.len() < QUESTIONS_MAX
            && let Some((volume, range)) = self.queue.pop_front()
        {
            self.last += 1;
            let id = self.last;
            self.asked.insert(id, Asked { volume, range, home: None, reply: None });
            let question = Message::OrphanRequest(HashRequest { id, volume, range });
            out.push(Effect::Send { session: self.session, frame: question.encode() });
            out.io(Purpose::OrphanHome { id }, IoRequest::HomeRead { volume, range });
        }
    }

    fn answered(&mut self, id: u64, memory: Option<&Memory>, answer: impl FnOnce(&mut Asked)) {
        let Some(asked) = self.asked.get_mut(&id) else { return };
        answer(asked);
        if asked.home.is_some()
            && asked.reply.is_some()
            && let Some(asked) = self.asked.remove(&id)
        {
            self.compare(&asked, memory);
        }
    }

    fn compare(&mut self, asked: &Asked, memory: Option<&Memory>) {
        let unit = usize::try_from(DATA_UNIT_BYTES).unwrap_or(usize::MAX);
        let home = asked.home.as_ref().and_then(|home| home.as_ref().ok());
        let mut ours = home.map(|data| data.chunks(unit).map(|block| *blake3::hash(block).as_bytes()));
        for (index, block) in (0_usize..).zip(0..asked.range.block_count().0) {
            let block = (asked.volume, Lba(asked.range.first_block().0 + block));
            let hash = ours.as_mut().and_then(Iterator::next);
            let theirs = asked.reply.as_ref().and_then(|reply| reply.blocks.get(index));
            if hash.is_some() && hash == theirs.map(|(hash, _)| *hash) {
                continue;
            }
            let written = memory.and_then(|memory| memory.written.get(&block));
            // What cannot be read on either side may differ.
            let untouched = hash.is_some() && theirs.is_some_and(|(_, changed)| !changed);
            self.found.insert(block, (written.copied().flatten(), untouched || written.is_some()));
        }
    }

    fn is_done(&self) -> bool {
        self.queue.is_empty() && self.asked.is_empty()
    }

    /// Neighbours that say the same become one entry.
    fn report(&self) -> Vec<OrphanExtent> {
        let mut extents: Vec<OrphanExtent> = Vec::new();
        for ((volume, block), (written, exact)) in &self.found {
            let Some(range) = ByteRange::of_blocks(*block, BlockCount(1)) else { continue };
            let next = OrphanExtent { volume: *volume, range, written: *written, exact: *exact };
            match extents.last_mut().filter(|last| {
                (last.volume, last.written, last.exact) == (next.volume, next.written, next.exact)
                    && last.range.end() == range.offset()
            }) {
                Some(last) => {
                    last.range = ByteRange::between(last.range.offset(), range.end()).unwrap_or(last.range);
                }
                None => extents.push(next),
            }
        }
        extents
    }
}

impl PrimaryVolume {
    /// True if hosts may have written the block here since this epoch began.
    fn has_changed(&self, block: ByteRange) -> bool {
        match &self.own {
            Some(own) => own.contains(block.first_block()),
            // After a restart only the regions are known.
            None => self.intent.is_durable(block),
        }
    }
}

impl Group {
    /// `mirror orphans`: compares what this fenced side wrote with its new primary; [`Group::orphan_progress`] tells the
    /// outcome.
    ///
    /// # Errors
    /// If this side is not fenced, or its new primary is away.
    pub fn search_orphans(&mut self) -> Result<(), VerbRefused> {
        let Some(mirror) = &mut self.mirror else {
            return Err(VerbRefused("the volume has no mirror".to_owned()));
        };
        let Machine::Secondary(secondary) = &mirror.machine else {
            return Err(VerbRefused(
                "this side is not fenced: run 'farshore mirror orphans' at the old primary".to_owned(),
            ));
        };
        if !mirror.state.diverged {
            return Err(VerbRefused("this side holds no writes of its own: there are no orphans".to_owned()));
        }
        let Some(session) = secondary.session() else {
            return Err(VerbRefused(
                "the new primary is away, and only a comparison with it tells the orphans: wait until it is connected"
                    .to_owned(),
            ));
        };
        if mirror.orphans.search.is_some() {
            return Ok(());
        }
        let listed = || {
            let pieces = secondary.compare.iter().flat_map(|listed| cut(listed.volume, listed.range));
            pieces.collect()
        };
        let queue = mirror.orphans.memory.as_ref().map_or_else(listed, Memory::pieces);
        mirror.orphans.outcome = None;
        mirror.orphans.search =
            Some(Search { session, queue, asked: BTreeMap::new(), last: 0, found: BTreeMap::new() });
        Ok(())
    }

    /// How far the search of [`Group::search_orphans`] is.
    pub fn orphan_progress(&self) -> OrphanProgress {
        let Some(orphans) = self.mirror.as_ref().map(|mirror| &mirror.orphans) else {
            return OrphanProgress::Idle;
        };
        match (&orphans.search, &orphans.outcome) {
            (Some(_), _) => OrphanProgress::Searching,
            (None, None) => OrphanProgress::Idle,
            (None, Some(Ok(found))) => OrphanProgress::Found(found.clone()),
            (None, Some(Err(reason))) => OrphanProgress::Failed(reason.clone()),
        }
    }

    /// Takes a search as far as it can go.
    pub(super) fn orphans_turn(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        let Some(search) = &mut mirror.orphans.search else { return };
        let session = match &mirror.machine {
            Machine::Secondary(secondary) => secondary.session().filter(|_| mirror.state.diverged),
            Machine::Primary(_) | Machine::Changing(_) => None,
        };
        let outcome = if session != Some(search.session) {
            Err("the session with the new primary ended, or this side is being overwritten".to_owned())
        } else if search.found.len() > EXTENTS_MAX {
            Err(format!("more than {EXTENTS_MAX} blocks differ: copy the volumes of this side as a whole"))
        } else if search.is_done() {
            Ok(search.report())
        } else {
            return search.ask(&mut self.out);
        };
        mirror.orphans.search = None;
        mirror.orphans.outcome = Some(outcome);
        self.out.forget(|purpose| matches!(purpose, Purpose::OrphanHome { .. }));
    }

    /// Handles a message of a search. False if it is none.
    pub(super) fn orphan_message(&mut self, session: SessionId, message: &Message) -> bool {
        let Some(mirror) = &mut self.mirror else { return false };
        match (message, &mut mirror.machine) {
            (Message::OrphanRequest(request), Machine::Primary(primary))
                if primary.session() == Some(session) =>
            {
                let HashRequest { id, volume, range } = *request;
                // A rewind may have left less of the volume here: what is not there cannot be equal.
                let of = primary.volumes.get(usize::from(volume.0));
                let here = of.map(|of| inside(range, of.size.0)).filter(|_| range.length() <= QUESTION_BYTES);
                match here {
                    Some(range) if range.is_empty() => {
                        let frame = Message::OrphanReply(OrphanReply { id, blocks: Vec::new() }).encode();
                        self.out.push(Effect::Send { session, frame });
                    }
                    Some(range) => {
                        let purpose = Purpose::OrphanRead { session, id, volume, range };
                        self.out.io(purpose, IoRequest::HomeRead { volume, range });
                    }
                    None => {}
                }
                true
            }
            (Message::OrphanReply(reply), Machine::Secondary(secondary)) if secondary.is_session(session) => {
                let orphans = &mut mirror.orphans;
                if let Some(search) = &mut orphans.search {
                    let reply = reply.clone();
                    search.answered(reply.id, orphans.memory.as_ref(), |asked| asked.reply = Some(reply));
                }
                true
            }
            (_, Machine::Primary(_) | Machine::Secondary(_) | Machine::Changing(_)) => false,
        }
    }

    /// The home of a fenced side was read for a search.
    pub(super) fn orphan_home(&mut self, id: u64, home: Result<Bytes, IoFailure>) {
        let Some(mirror) = &mut self.mirror else { return };
        let orphans = &mut mirror.orphans;
        if let Some(search) = &mut orphans.search {
            search.answered(id, orphans.memory.as_ref(), |asked| asked.home = Some(home));
        }
    }

    /// The home of the new primary was read for a search at its fenced partner.
    pub(super) fn orphan_read(
        &mut self,
        session: SessionId,
        id: u64,
        volume: VolumeIndex,
        range: ByteRange,
        home: &Result<Bytes, IoFailure>,
    ) {
        let Some(mirror) = &mut self.mirror else { return };
        let Machine::Primary(primary) = &mut mirror.machine else { return };
        if primary.session() != Some(session) {
            return;
        }
        let of = primary.volume(volume);
        let unit = usize::try_from(DATA_UNIT_BYTES).unwrap_or(usize::MAX);
        let first = range.first_block().0;
        let blocks = home.as_ref().map_or_else(
            |_| Vec::new(),
            |data| {
                let hashes = data.chunks(unit).map(|block| *blake3::hash(block).as_bytes());
                let told = (first..).zip(hashes).map(|(block, hash)| {
                    // A write that was issued before the read ended is noted by now.
                    let range = ByteRange::of_blocks(Lba(block), BlockCount(1));
                    (hash, range.is_none_or(|range| of.has_changed(range)))
                });
                told.collect()
            },
        );
        let frame = Message::OrphanReply(OrphanReply { id, blocks }).encode();
        self.out.push(Effect::Send { session, frame });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: usize = 24;
    const VOLUME: VolumeIndex = VolumeIndex(0);

    fn home(contents: &[u8]) -> Bytes {
        contents.iter().flat_map(|content| [*content; 4096]).collect::<Vec<u8>>().into()
    }

    fn search() -> Search {
        Search {
            session: SessionId(1),
            queue: VecDeque::new(),
            asked: BTreeMap::new(),
            last: 0,
            found: BTreeMap::new(),
        }
    }

    proptest! {
        /// Against a model that knows the fork's image: nothing is missing, and what is exact is true.
        #[test]
        fn every_orphan_is_listed_and_exact_ones_are_orphans(
            fork in prop::collection::vec(0_u8..3, BLOCKS),
            written_here in prop::collection::vec(prop::option::of(0_u8..3), BLOCKS),
            written_there in prop::collection::vec(prop::option::of(0_u8..3), BLOCKS),
            remembers in any::<bool>(),
        ) {
            let image = |written: &[Option<u8>]| -> Vec<u8> {
                fork.iter().zip(written).map(|(fork, written)| written.unwrap_or(*fork)).collect()
            };
            let (ours, theirs) = (image(&written_here), image(&written_there));
            let mut memory = Memory { blocks: vec![DirtyMap::default()], written: BTreeMap::new() };
            for (block, _) in (0..).zip(&written_here).filter(|(_, written)| written.is_some()) {
                memory.note_written(VOLUME, ByteRange::of_blocks(Lba(block), BlockCount(1)).unwrap(), None);
            }
            let hashes = home(&theirs).chunks(4096).map(|block| *blake3::hash(block).as_bytes()).collect::<Vec<_>>();
            let changed = written_there.iter().map(Option::is_some);
            let mut search = search();
            let asked = Asked {
                volume: VOLUME,
                range: ByteRange::of_blocks(Lba(0), BlockCount(24)).unwrap(),
                home: Some(Ok(home(&ours))),
                reply: Some(OrphanReply { id: 1, blocks: hashes.into_iter().zip(changed).collect() }),
            };
            search.compare(&asked, remembers.then_some(&memory));
            let mut listed = [None; BLOCKS];
            for extent in search.report() {
                for block in extent.range.first_block().0..extent.range.end_block().0 {
                    listed[usize::try_from(block).unwrap()] = Some(extent.exact);
                }
            }
            for block in 0..BLOCKS {
                let orphan = ours[block] != fork[block] && ours[block] != theirs[block];
                prop_assert!(!orphan || listed[block].is_some(), "block {block} is missing");
                let exact = listed[block] == Some(true);
                prop_assert!(!exact || written_here[block].is_some(), "block {block} was not written here");
                let known = remembers || written_there[block].is_none();
                prop_assert!(!(orphan && known) || exact, "block {block} is known to be an orphan");
                prop_assert!(listed[block].is_none() || ours[block] != theirs[block], "block {block} is equal");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_listed_and_not_certain() {
        let mut search = search();
        let range = ByteRange::of_blocks(Lba(3), BlockCount(2)).unwrap();
        let failure = IoFailure { operation: "reading a volume", errno: 5 };
        let reply = Some(OrphanReply { id: 1, blocks: vec![([1; 32], false); 2] });
        search.compare(&Asked { volume: VOLUME, range, home: Some(Err(failure)), reply }, None);
        let unread = Some(OrphanReply { id: 2, blocks: Vec::new() });
        let next = ByteRange::of_blocks(Lba(5), BlockCount(1)).unwrap();
        search
            .compare(&Asked { volume: VOLUME, range: next, home: Some(Ok(home(&[1]))), reply: unread }, None);
        let whole = ByteRange::of_blocks(Lba(3), BlockCount(3)).unwrap();
        assert_eq!(
            search.report(),
            [OrphanExtent { volume: VOLUME, range: whole, written: None, exact: false }]
        );
    }

    #[test]
    fn long_ranges_are_asked_for_piece_by_piece() {
        let range = ByteRange::new(4096, 2 * QUESTION_BYTES).unwrap();
        let pieces: Vec<ByteRange> = cut(VOLUME, range).map(|(_, piece)| piece).collect();
        assert_eq!(pieces.iter().map(|piece| piece.length()).sum::<u64>(), range.length());
        assert!(pieces.iter().all(|piece| piece.length() <= QUESTION_BYTES));
        assert_eq!(pieces.first().map(|piece| piece.offset()), Some(4096));
    }
}
