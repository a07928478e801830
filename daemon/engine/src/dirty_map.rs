//! Which 4096-byte blocks of a volume the write journal no longer holds.
//!
//! Exact: a block is in the map or it is not. Long runs cost a few bytes, scattered blocks at most one bit for
//! each block of their 16 MiB chunk, so that "everything is dirty" is tiny and nothing exceeds 1/32768 of the
//! volume's size by much. The checkpoint that a clean shutdown writes is specified in
//! docs/formats/dirty-map.md.

mod checkpoint;

use std::collections::BTreeMap;
use std::ops::Range;

use block::{BlockCount, ByteCount, ByteRange, Lba};

pub use self::checkpoint::CheckpointError;
use crate::bits::Bits;
use crate::runs::Runs;

/// Words in a chunk's bitmap.
const CHUNK_WORDS: usize = 64;
/// Blocks in a chunk, 16 MiB of the volume: a bitmap of 512 bytes.
const CHUNK_BLOCKS: u64 = 4096;

type Chunk = Box<Bits<CHUNK_WORDS>>;

/// The dirty blocks of one volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyMap {
    /// Chunks, by number, of which every block is dirty.
    full: Runs,
    /// Chunks of which some blocks are dirty and some are not.
    partial: BTreeMap<u64, Chunk>,
    count: u64,
}

impl DirtyMap {
    /// Makes every block that the range touches dirty.
    pub fn set(&mut self, range: ByteRange) {
        if !range.is_empty() {
            self.set_blocks(range.first_block().0..range.end_block().0);
        }
    }

    /// Makes every block of a volume of this size dirty.
    pub fn set_all(&mut self, size: ByteCount) {
        self.set_blocks(0..size.0.div_ceil(block::DATA_UNIT_BYTES));
    }

    /// Makes every block that lies wholly in the range clean.
    pub fn clear(&mut self, range: ByteRange) {
        let range = range.unit_inward();
        if !range.is_empty() {
            self.clear_blocks(range.first_block().0..range.end_block().0);
        }
    }

    /// True if the block is dirty.
    pub fn contains(&self, block: Lba) -> bool {
        let (chunk, bit) = (block.0 / CHUNK_BLOCKS, block.0 % CHUNK_BLOCKS);
        let in_partial = self.partial.get(&chunk).is_some_and(|bits| bits.contains(bit));
        in_partial || self.full.contains(chunk)
    }

    /// The first dirty blocks at or after `from`: where they start, and how many follow each other, up to `max`.
    ///
    /// It does not start over at the volume's beginning.
    pub fn next_run(&self, from: Lba, max: BlockCount) -> Option<(Lba, BlockCount)> {
        let first = self.next_dirty(from.0)?;
        let limit = first.saturating_add(max.0);
        let mut end = first;
        while end < limit
            && let Some(further) = self.run_end(end)
        {
            end = further;
        }
        Some((Lba(first), BlockCount(end.min(limit) - first)))
    }

    /// The number of dirty blocks.
    pub const fn count(&self) -> BlockCount {
        BlockCount(self.count)
    }

    /// True if no block is dirty.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Makes every block dirty that is dirty in `other`.
    pub fn union(&mut self, other: &Self) {
        for run in other.full.iter() {
            self.set_full(run);
        }
        for (&chunk, bits) in &other.partial {
            self.change_chunk(chunk, |known| known.union(bits));
        }
    }

    /// The map, leaving an empty one.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    fn set_blocks(&mut self, blocks: Range<u64>) {
        let parts = Parts::of(blocks);
        self.set_full(parts.whole);
        for (chunk, bits) in parts.edges.into_iter().flatten() {
            self.change_chunk(chunk, |known| {
                known.set(bits);
            });
        }
    }

    fn clear_blocks(&mut self, blocks: Range<u64>) {
        let parts = Parts::of(blocks);
        self.count -= CHUNK_BLOCKS * self.full.remove(parts.whole.clone());
        self.drop_partial(parts.whole);
        for (chunk, bits) in parts.edges.into_iter().flatten() {
            self.change_chunk(chunk, |known| {
                known.clear(bits);
            });
        }
    }

    fn set_full(&mut self, chunks: Range<u64>) {
        self.drop_partial(chunks.clone());
        self.count += CHUNK_BLOCKS * self.full.insert(chunks);
    }

    fn drop_partial(&mut self, chunks: Range<u64>) {
        if chunks.is_empty() {
            return;
        }
        let mut rest = self.partial.split_off(&chunks.start);
        let mut after = rest.split_off(&chunks.end);
        self.partial.append(&mut after);
        self.count -= rest.values().map(|bits| bits.count()).sum::<u64>();
    }

    /// Changes one chunk's blocks and stores it in the form that suits it.
    fn change_chunk(&mut self, chunk: u64, change: impl FnOnce(&mut Bits<CHUNK_WORDS>)) {
        let mut bits = match self.partial.remove(&chunk) {
            Some(bits) => bits,
            None if self.full.remove(chunk..chunk + 1) == 1 => Box::new(Bits::FULL),
            None => Box::new(Bits::EMPTY),
        };
        self.count -= bits.count();
        change(&mut bits);
        let count = bits.count();
        self.count += count;
        if count == CHUNK_BLOCKS {
            self.full.insert(chunk..chunk + 1);
        } else if count > 0 {
            self.partial.insert(chunk, bits);
        }
    }

    fn next_dirty(&self, from: u64) -> Option<u64> {
        let chunk = from / CHUNK_BLOCKS;
        let in_full = self.full.next(chunk).map(|run| from.max(run.start * CHUNK_BLOCKS));
        // A partial chunk has a dirty block, but the first may have it before `from`.
        let in_partial = self.partial.range(chunk..).take(2).find_map(|(&chunk, bits)| {
            let start = chunk * CHUNK_BLOCKS;
            bits.next_set(from.saturating_sub(start)).map(|bit| start + bit)
        });
        match (in_full, in_partial) {
            (Some(full), Some(partial)) => Some(full.min(partial)),
            (full, partial) => full.or(partial),
        }
    }

    /// Where the run of dirty blocks that holds `block` ends, as far as one chunk or one run of chunks tells.
    fn run_end(&self, block: u64) -> Option<u64> {
        let (chunk, bit) = (block / CHUNK_BLOCKS, block % CHUNK_BLOCKS);
        if let Some(bits) = self.partial.get(&chunk) {
            let end = bits.next_clear(bit).unwrap_or(CHUNK_BLOCKS);
            return (end > bit).then(|| chunk * CHUNK_BLOCKS + end);
        }
        let run = self.full.next(chunk)?;
        (run.start <= chunk).then(|| run.end * CHUNK_BLOCKS)
    }
}

/// A range of blocks, as whole chunks and the parts of chunks at its ends.
struct Parts {
    whole: Range<u64>,
    edges: [Option<(u64, Range<u64>)>; 2],
}

impl Parts {
    fn of(blocks: Range<u64>) -> Self {
        let (first, last) = (blocks.start / CHUNK_BLOCKS, blocks.end / CHUNK_BLOCKS);
        let (head, tail) = (blocks.start % CHUNK_BLOCKS, blocks.end % CHUNK_BLOCKS);
        if first == last {
            let edge = (head < tail).then_some((first, head..tail));
            return Self { whole: 0..0, edges: [edge, None] };
        }
        Self {
            whole: blocks.start.div_ceil(CHUNK_BLOCKS)..last,
            edges: [(head > 0).then_some((first, head..CHUNK_BLOCKS)), (tail > 0).then_some((last, 0..tail))],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use block::{DATA_UNIT_BYTES, VolumeId};
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 5 * CHUNK_BLOCKS + 100;
    const SIZE: ByteCount = ByteCount(BLOCKS * DATA_UNIT_BYTES);

    fn bytes(first: u64, count: u64) -> ByteRange {
        ByteRange::of_blocks(Lba(first), BlockCount(count)).unwrap()
    }

    /// Positions near the borders of chunks, where the mistakes are.
    fn position() -> impl Strategy<Value = u64> {
        (0_u64..=5, 0_u64..=6).prop_map(|(chunk, delta)| (chunk * CHUNK_BLOCKS + delta).saturating_sub(3))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn the_map_behaves_like_a_set(ops in prop::collection::vec((0..4, position(), position(), 1_u64..9000), 1..12)) {
            let (mut map, mut model) = (DirtyMap::default(), BTreeSet::new());
            let mut other = DirtyMap::default();
            for (op, a, b, max) in ops {
                let (first, end) = (a.min(b), a.max(b));
                let range = bytes(first, end - first);
                match op {
                    0 | 1 => {
                        map.set(range);
                        model.extend(first..end);
                    }
                    2 => {
                        map.clear(range);
                        model.retain(|block| !(first..end).contains(block));
                    }
                    _ => {
                        other.set(range);
                        map.union(&other);
                        let mut at = Lba(0);
                        while let Some((start, count)) = other.next_run(at, BlockCount(u64::MAX)) {
                            at = Lba(start.0 + count.0);
                            model.extend(start.0..at.0);
                        }
                    }
                }
                prop_assert_eq!(map.count().0, model.len() as u64);
                prop_assert_eq!(map.is_empty(), model.is_empty());
                prop_assert_eq!(map.contains(Lba(a)), model.contains(&a));
                let expected = model.range(a..).next().map(|start| {
                    let count = (*start..).take_while(|block| model.contains(block)).take(usize::try_from(max).unwrap()).count();
                    (Lba(*start), BlockCount(count as u64))
                });
                prop_assert_eq!(map.next_run(Lba(a), BlockCount(max)), expected);
            }
            let volume = VolumeId::from_bytes([7; 16]);
            prop_assert_eq!(DirtyMap::decode(&map.encode(volume), volume, SIZE), Ok(map.clone()));
            let taken = map.take();
            prop_assert!(map.is_empty() && taken.count().0 == model.len() as u64);
        }
    }

    #[test]
    fn partial_blocks_are_set_outward_and_cleared_inward() {
        let mut map = DirtyMap::default();
        map.set(ByteRange::new(4095, 2).unwrap());
        assert_eq!(map.count(), BlockCount(2));
        map.clear(ByteRange::new(1, 8190).unwrap());
        assert_eq!(map.count(), BlockCount(2));
        map.clear(ByteRange::new(0, 8191).unwrap());
        assert_eq!(map.next_run(Lba(0), BlockCount(9)), Some((Lba(1), BlockCount(1))));
    }

    #[test]
    fn a_wholly_dirty_volume_is_tiny() {
        let mut map = DirtyMap::default();
        map.set_all(ByteCount(16 << 40));
        assert_eq!(map.count(), BlockCount(1 << 32));
        assert!(map.encode(VolumeId::default()).len() < 100);
        map.clear(bytes(12_345, 1));
        let run = map.next_run(Lba(0), BlockCount(u64::MAX));
        assert_eq!(run, Some((Lba(0), BlockCount(12_345))));
    }
}
