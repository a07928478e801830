//! A drill: a writable copy of the target at a recovery point, while the mirror goes on.
//!
//! The copy is a block device of whole data units. A block has what the drill wrote, else the image at the point: home
//! overlaid by the redo up to the point. Guarantees (docs/protocols/replication.md, "Drill"): before a later cut changes a
//! block at home, the block's old content is in scratch; nothing of the drill is written anywhere but to scratch; redo is
//! received as if there were no drill, which ends when scratch or redo runs short. It does not outlive the process.

use std::collections::{BTreeMap, VecDeque};

use block::{
    BlockCount, ByteCount, ByteRange, DATA_UNIT_BYTES, HostError, Lba, Position, VolumeIndex, WallTime,
};
use bytes::Bytes;
use engine::dirty_map::DirtyMap;
use engine::overlay::{CutNumber, Overlay, PieceContent};

use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::growth::raise;
use super::image::{ImagePiece, Reader, Source};
use super::secondary::Secondary;
use super::window::{Point, RewindTo};
use super::{Group, Machine, Mirror, VerbRefused};

/// Blocks that one copy preserves.
const COPY_BLOCKS_MAX: u64 = 256;

/// Names a request to a drill's copy; the caller's number, never used twice at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrillIo(pub u64);

/// A drill as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrillSnapshot {
    /// The point that the copy is of.
    pub position: Position,
    /// This side's clock at it, if it is known.
    pub time: Option<WallTime>,
    /// Bytes of scratch in use, and the most.
    pub scratch_bytes: u64,
    /// See above.
    pub scratch_bytes_max: u64,
}

/// A drill that has begun.
#[derive(Clone, Debug)]
pub struct DrillBegun {
    /// What operators see of it.
    pub snapshot: DrillSnapshot,
    /// The sizes of the volumes at its point, in index order.
    pub sizes: Vec<ByteCount>,
}

/// What the drill knows of a volume.
#[derive(Clone, Debug, Default)]
struct Blocks {
    /// The drill's own, or preserved: the image is not asked for them any more.
    held: DirtyMap,
    /// Of these, the ones that are zeros and take no scratch.
    zeros: DirtyMap,
    /// On their way to scratch because a host writes them.
    hosting: DirtyMap,
    /// On their way to scratch because a later cut changes them.
    copying: DirtyMap,
    /// Those that scratch has space for: it is not given back.
    allocated: DirtyMap,
}

/// A write to scratch under way.
#[derive(Clone, Copy, Debug)]
struct Writing {
    volume: VolumeIndex,
    range: ByteRange,
    /// `None` for a copy.
    host: Option<DrillIo>,
}

/// A host's write that waits for copies of its blocks.
#[derive(Clone, Debug)]
struct Waiting {
    request: DrillIo,
    volume: VolumeIndex,
    range: ByteRange,
    /// `None` for zeros.
    data: Option<Bytes>,
}

#[derive(Debug)]
pub(super) struct Drill {
    pub(super) through: CutNumber,
    position: Position,
    time: Option<WallTime>,
    /// What of the image at the point is not at home yet.
    pub(super) base: Overlay,
    blocks: Vec<Blocks>,
    scratch_blocks_max: u64,
    writing: BTreeMap<u64, Writing>,
    waiting: VecDeque<Waiting>,
    /// Later cuts may go home when no read of the drill up to this one is under way.
    barrier: Option<u64>,
}

impl Drill {
    fn snapshot(&self) -> DrillSnapshot {
        DrillSnapshot {
            position: self.position,
            time: self.time,
            scratch_bytes: self.scratch_blocks() * DATA_UNIT_BYTES,
            scratch_bytes_max: self.scratch_blocks_max * DATA_UNIT_BYTES,
        }
    }

    /// Blocks in scratch or on their way there.
    fn scratch_blocks(&self) -> u64 {
        self.blocks.iter().map(|blocks| blocks.allocated.count().0).sum()
    }

    /// Takes space in scratch for a range; false if there is not enough.
    fn allocate(&mut self, volume: VolumeIndex, range: ByteRange) -> bool {
        let (used, most) = (self.scratch_blocks(), self.scratch_blocks_max);
        let Some(blocks) = self.blocks(volume) else {
            return false;
        };
        let new = parts(&blocks.allocated, range).into_iter().filter(|(_, known)| !known);
        let new: u64 = new.map(|(part, _)| part.block_count().0).sum();
        if used + new > most {
            return false;
        }
        blocks.allocated.set(range);
        true
    }

    fn blocks(&mut self, volume: VolumeIndex) -> Option<&mut Blocks> {
        self.blocks.get_mut(usize::from(volume.0))
    }

    /// What a range of the copy is made of.
    fn pieces(&self, volume: VolumeIndex, range: ByteRange) -> Vec<ImagePiece> {
        let mut pieces = Vec::new();
        let Some(blocks) = self.blocks.get(usize::from(volume.0)) else {
            return pieces;
        };
        for (part, held) in parts(&blocks.held, range) {
            if !held {
                pieces.extend(self.base.pieces(volume, part).into_iter().map(ImagePiece::from));
                continue;
            }
            for (part, zeros) in parts(&blocks.zeros, part) {
                let source = if zeros { Source::Zeros } else { Source::Scratch };
                pieces.push(ImagePiece { range: part, source });
            }
        }
        pieces
    }
}

/// Cuts a range of whole blocks where a map begins or ends to hold it.
fn parts(map: &DirtyMap, range: ByteRange) -> Vec<(ByteRange, bool)> {
    let mut parts = Vec::new();
    let mut at = range.offset();
    while at < range.end() {
        let run = map.next_run(Lba::containing(at), BlockCount(u64::MAX));
        let run = run.and_then(|(first, count)| ByteRange::of_blocks(first, count));
        let (start, end) = run.map_or((range.end(), range.end()), |run| (run.offset(), run.end()));
        let mut push = |from: u64, to: u64, held| {
            let part = ByteRange::between(from, to.min(range.end())).filter(|part| !part.is_empty());
            parts.extend(part.map(|part| (part, held)));
        };
        push(at, start.max(at), false);
        push(start.max(at).min(range.end()), end, true);
        at = end.max(start).max(at + DATA_UNIT_BYTES);
    }
    parts
}

impl Secondary {
    /// Begins a drill at a point of the window, or at the tip. `sizes` are those at home.
    fn start_drill(
        &mut self,
        mut sizes: Vec<ByteCount>,
        at: Option<RewindTo>,
        scratch_bytes_max: u64,
        stamp: WallTime,
    ) -> Result<DrillBegun, VerbRefused> {
        let chosen = at.map(|at| self.point_at(at, stamp)).transpose()?;
        let (through, point) = match chosen {
            Some((through, point)) => (through, Some(point)),
            None => {
                let newest = self.queue.back().map_or(self.begun.number, |item| item.number);
                (newest, self.newest.filter(|newest| newest.tip == self.tip()))
            }
        };
        let mut base = Overlay::default();
        let waiting = self.applying.under_way().chain(&self.queue);
        for item in waiting.filter(|item| item.number <= through) {
            base.insert(item.number, &item.placement, &item.changes);
            raise(&mut sizes, &item.sizes);
        }
        let drill = Drill {
            through,
            position: point.map_or_else(|| self.tip().position, |point: Point| point.tip.position),
            time: point.map(|point| point.seen),
            base,
            blocks: vec![Blocks::default(); sizes.len()],
            scratch_blocks_max: scratch_bytes_max / DATA_UNIT_BYTES,
            writing: BTreeMap::new(),
            waiting: VecDeque::new(),
            barrier: None,
        };
        let snapshot = drill.snapshot();
        self.drill = Some(drill);
        Ok(DrillBegun { snapshot, sizes })
    }

    /// The drill is over: what it has not answered fails, and its scratch can go.
    pub(super) fn end_drill(&mut self, loudness: Loudness, reason: &str, out: &mut Outbox) {
        let Some(drill) = self.drill.take() else {
            return;
        };
        let mut unanswered = self.forget_drill_reads();
        unanswered.extend(drill.waiting.iter().map(|waiting| waiting.request));
        unanswered.extend(drill.writing.values().filter_map(|writing| writing.host));
        for request in unanswered {
            out.push(Effect::DrillDone { request, result: Err(HostError::Io) });
        }
        self.applying.unguard();
        out.log(loudness, format!("the drill ended: {reason}"));
        out.push(Effect::DrillEnded { reason: reason.to_owned() });
    }

    fn read_drill(&mut self, request: DrillIo, volume: VolumeIndex, range: ByteRange, out: &mut Outbox) {
        match &self.drill {
            Some(drill) => {
                let pieces = drill.pieces(volume, range);
                self.read_pieces(Reader::Drill(request), volume, range, pieces, out);
            }
            None => out.push(Effect::DrillDone { request, result: Err(HostError::Shutdown) }),
        }
    }

    /// Writes `data`, or zeros, to the copy.
    fn write_drill(
        &mut self,
        request: DrillIo,
        volume: VolumeIndex,
        range: ByteRange,
        data: Option<Bytes>,
        out: &mut Outbox,
    ) {
        let Some(drill) = &mut self.drill else {
            return out.push(Effect::DrillDone { request, result: Err(HostError::Shutdown) });
        };
        let Some(blocks) = drill.blocks(volume) else {
            return out.push(Effect::DrillDone { request, result: Err(HostError::Io) });
        };
        if parts(&blocks.copying, range).iter().any(|(_, copying)| *copying) {
            return drill.waiting.push_back(Waiting { request, volume, range, data });
        }
        let Some(data) = data else {
            blocks.held.set(range);
            blocks.zeros.set(range);
            return out.push(Effect::DrillDone { request, result: Ok(Bytes::new()) });
        };
        blocks.hosting.set(range);
        if !drill.allocate(volume, range) {
            out.push(Effect::DrillDone { request, result: Err(HostError::NoSpace) });
            return self.end_drill(Loudness::Error, "its scratch space is full", out);
        }
        self.write_scratch(Writing { volume, range, host: Some(request) }, data, out);
    }

    fn write_scratch(&mut self, writing: Writing, data: Bytes, out: &mut Outbox) {
        self.last_drill_write += 1;
        let write = self.last_drill_write;
        let (volume, offset) = (writing.volume, writing.range.offset());
        if let Some(drill) = &mut self.drill {
            drill.writing.insert(write, writing);
        }
        out.io(Purpose::DrillWrite { write }, IoRequest::ScratchWrite { volume, offset, data });
    }

    /// A write to scratch was answered.
    pub(super) fn drill_written(&mut self, write: u64, result: Result<Bytes, IoFailure>, out: &mut Outbox) {
        let Some(drill) = &mut self.drill else { return };
        let Some(Writing { volume, range, host }) = drill.writing.remove(&write) else {
            return;
        };
        if let Err(failure) = result {
            if let Some(request) = host {
                out.push(Effect::DrillDone { request, result: Err(HostError::Io) });
            }
            return self.end_drill(Loudness::Error, &format!("its scratch space failed: {failure}"), out);
        }
        if let Some(blocks) = drill.blocks(volume) {
            let way = if host.is_some() { &mut blocks.hosting } else { &mut blocks.copying };
            way.clear(range);
            blocks.held.set(range);
            blocks.zeros.clear(range);
        }
        match host {
            Some(request) => out.push(Effect::DrillDone { request, result: Ok(Bytes::new()) }),
            None => self.retry_drill_writes(out),
        }
        self.applying.unguard();
    }

    fn retry_drill_writes(&mut self, out: &mut Outbox) {
        let waiting = self.drill.as_mut().map(|drill| std::mem::take(&mut drill.waiting));
        for write in waiting.into_iter().flatten() {
            self.write_drill(write.request, write.volume, write.range, write.data, out);
        }
    }

    /// True if the cuts under way may go home: every block that a later cut changes is in scratch, and no read of the
    /// drill still looks for it at home. Else starts what is missing.
    pub(super) fn guard_home(&mut self, out: &mut Outbox) -> bool {
        let Some(drill) = &self.drill else { return true };
        let through = drill.through;
        let later = self.applying.under_way().filter(|item| item.number > through);
        let changes: Vec<(VolumeIndex, ByteRange)> = later
            .flat_map(|item| &item.changes)
            .map(|change| (change.volume, change.range.unit_outward()))
            .collect();
        if changes.is_empty() {
            return true;
        }
        let mut complete = true;
        for (volume, range) in changes {
            let held = self.drill.as_ref().and_then(|drill| drill.blocks.get(usize::from(volume.0)));
            let missing = held.map(|blocks| parts(&blocks.held, range)).unwrap_or_default();
            for (part, _) in missing.into_iter().filter(|(_, held)| !held) {
                complete = false;
                self.preserve(volume, part, out);
                if self.drill.is_none() {
                    return true;
                }
            }
        }
        let last = self.images_last();
        let Some(drill) = &mut self.drill else { return true };
        if !complete {
            drill.barrier = None;
            return false;
        }
        let barrier = *drill.barrier.get_or_insert(last);
        if self.drill_reads_until(barrier) {
            return false;
        }
        if let Some(drill) = &mut self.drill {
            drill.barrier = None;
        }
        true
    }

    /// Copies the blocks of a range to scratch that are not on their way there.
    fn preserve(&mut self, volume: VolumeIndex, range: ByteRange, out: &mut Outbox) {
        let Some(blocks) = self.drill.as_mut().and_then(|drill| drill.blocks(volume)) else {
            return;
        };
        let mut on_their_way = blocks.hosting.clone();
        on_their_way.union(&blocks.copying);
        let free = parts(&on_their_way, range).into_iter().filter(|(_, busy)| !busy);
        let mut copies = Vec::new();
        for (part, _) in free {
            let mut at = part.offset();
            while at < part.end() {
                let end = part.end().min(at + COPY_BLOCKS_MAX * DATA_UNIT_BYTES);
                copies.extend(ByteRange::between(at, end));
                at = end;
            }
        }
        for copy in copies {
            let Some(drill) = &mut self.drill else { return };
            if !drill.allocate(volume, copy) {
                return self.end_drill(
                    Loudness::Error,
                    "its scratch space cannot take what the mirror overwrites",
                    out,
                );
            }
            if let Some(blocks) = drill.blocks(volume) {
                blocks.copying.set(copy);
            }
            let pieces = drill.base.pieces(volume, copy).into_iter().map(ImagePiece::from).collect();
            self.read_pieces(Reader::Preserve { volume, range: copy }, volume, copy, pieces, out);
        }
    }

    /// The old content of blocks was read.
    pub(super) fn preserve_read(
        &mut self,
        volume: VolumeIndex,
        range: ByteRange,
        data: Result<Bytes, IoFailure>,
        out: &mut Outbox,
    ) {
        if self.drill.is_none() {
            return;
        }
        match data {
            Ok(data) if data.iter().all(|byte| *byte == 0) => {
                if let Some(blocks) = self.drill.as_mut().and_then(|drill| drill.blocks(volume)) {
                    blocks.copying.clear(range);
                    blocks.held.set(range);
                    blocks.zeros.set(range);
                }
                self.retry_drill_writes(out);
                self.applying.unguard();
            }
            Ok(data) => self.write_scratch(Writing { volume, range, host: None }, data, out),
            Err(failure) => {
                let reason =
                    format!("a block that the mirror overwrites could not be kept for it: {failure}");
                self.end_drill(Loudness::Error, &reason, out);
            }
        }
    }

    /// True if the drill keeps this cut from home, as long as space lasts.
    pub(super) fn is_held_by_drill(&self, number: CutNumber) -> bool {
        self.drill.as_ref().is_some_and(|drill| number > drill.through)
    }

    pub(super) fn drill_snapshot(&self) -> Option<DrillSnapshot> {
        self.drill.as_ref().map(Drill::snapshot)
    }
}

impl From<engine::overlay::Piece> for ImagePiece {
    fn from(piece: engine::overlay::Piece) -> Self {
        let source = match piece.content {
            PieceContent::Home => Source::Home,
            PieceContent::Zeros => Source::Zeros,
            PieceContent::Redo(place) => Source::Redo(place),
        };
        Self { range: piece.range, source }
    }
}

impl Group {
    /// `mirror drill start`: a writable copy at a point of the retention window, or at the tip. Scratch is empty.
    ///
    /// # Errors
    /// If there is a drill already, this side is no secondary with a consistent image, or the point lies outside the
    /// window.
    pub fn start_drill(
        &mut self,
        at: Option<RewindTo>,
        scratch_bytes_max: u64,
    ) -> Result<DrillBegun, VerbRefused> {
        let stamp = self.stamp;
        let refused = |text: &str| Err(VerbRefused(text.to_owned()));
        let Some(mirror) = &mut self.mirror else {
            return refused("the volume has no mirror");
        };
        let consistent = mirror.state.consistent && !mirror.state.diverged;
        let changing = mirror.is_changing();
        match &mut mirror.machine {
            Machine::Primary(_) => refused("this side is the primary: run the drill at the partner"),
            Machine::Changing(_) => refused("the mirror is changing its role: wait a moment"),
            Machine::Secondary(_) if changing => refused("the mirror is changing its role: wait a moment"),
            Machine::Secondary(_) if !consistent => refused(
                "this side has no consistent image: a drill would serve a mix; wait until the copy has ended",
            ),
            Machine::Secondary(secondary) if secondary.drill.is_some() => {
                refused("a drill runs already: stop it with 'farshore mirror drill stop' first")
            }
            Machine::Secondary(secondary) => {
                let sizes = mirror.settings.volumes.iter().map(|volume| volume.size).collect();
                let begun = secondary.start_drill(sizes, at, scratch_bytes_max, stamp)?;
                let position = begun.snapshot.position;
                self.out.log(Loudness::Info, format!("a drill began: its copy is at position {position}"));
                Ok(begun)
            }
        }
    }

    /// `mirror drill stop`: the copy is gone; `DrillEnded` follows.
    ///
    /// # Errors
    /// If there is no drill.
    pub fn stop_drill(&mut self) -> Result<(), VerbRefused> {
        if let Some(Mirror { machine: Machine::Secondary(secondary), .. }) = &mut self.mirror
            && secondary.drill.is_some()
        {
            secondary.end_drill(Loudness::Info, "an operator stopped it", &mut self.out);
            return Ok(());
        }
        Err(VerbRefused("no drill runs: start one with 'farshore mirror drill start'".to_owned()))
    }

    /// Reads whole data units of the drill's copy; answered with `DrillDone`.
    pub fn read_drill(&mut self, request: DrillIo, volume: VolumeIndex, range: ByteRange) {
        self.with_drill(request, |secondary, out| secondary.read_drill(request, volume, range, out));
    }

    /// Writes whole data units to the drill's copy, or zeros without data; answered with `DrillDone`. No two writes
    /// that overlap may be under way at once.
    pub fn write_drill(
        &mut self,
        request: DrillIo,
        volume: VolumeIndex,
        range: ByteRange,
        data: Option<Bytes>,
    ) {
        self.with_drill(request, |secondary, out| secondary.write_drill(request, volume, range, data, out));
    }

    fn with_drill(&mut self, request: DrillIo, call: impl FnOnce(&mut Secondary, &mut Outbox)) {
        match &mut self.mirror {
            Some(Mirror { machine: Machine::Secondary(secondary), .. }) => call(secondary, &mut self.out),
            Some(_) | None => {
                self.out.push(Effect::DrillDone { request, result: Err(HostError::Shutdown) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_a_map_begins_and_ends() {
        let range = |first: u64, end: u64| ByteRange::between(first * 4096, end * 4096).unwrap();
        let mut map = DirtyMap::default();
        map.set(range(2, 4));
        map.set(range(6, 9));
        let expected =
            vec![(range(1, 2), false), (range(2, 4), true), (range(4, 6), false), (range(6, 7), true)];
        assert_eq!(parts(&map, range(1, 7)), expected);
        assert_eq!(parts(&map, range(3, 4)), [(range(3, 4), true)]);
        assert_eq!(parts(&map, range(9, 12)), [(range(9, 12), false)]);
    }
}
