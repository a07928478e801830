//! Where the requests of one connection go.

/// A sequence of block-aligned offsets, with no end.
pub(crate) struct Offsets {
    block_bytes: u64,
    blocks: u64,
    order: Order,
}

enum Order {
    /// The state of SplitMix64 (Steele, Lea, Flood 2014): cheap, and good enough to spread offsets.
    Random(u64),
    Sequential(u64),
}

impl Offsets {
    /// Uniformly random blocks of an export of `blocks` blocks.
    ///
    /// # Panics
    /// Without any block.
    pub(crate) fn random(block_bytes: u64, blocks: u64, seed: u64) -> Self {
        assert!(blocks > 0);
        Self { block_bytes, blocks, order: Order::Random(seed) }
    }

    /// One block after the other from `first`, around the end.
    ///
    /// # Panics
    /// When `first` is no block of the export.
    pub(crate) fn sequential(block_bytes: u64, blocks: u64, first: u64) -> Self {
        assert!(first < blocks);
        Self { block_bytes, blocks, order: Order::Sequential(first) }
    }

    /// The next offset in bytes.
    pub(crate) fn next(&mut self) -> u64 {
        let block = match &mut self.order {
            Order::Random(state) => split_mix(state) % self.blocks,
            Order::Sequential(next) => {
                let block = *next;
                *next = (block + 1) % self.blocks;
                block
            }
        };
        block * self.block_bytes
    }
}

const fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Bytes that no server can take for a hole.
pub(crate) fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let words = std::iter::repeat_with(|| split_mix(&mut seed).to_le_bytes());
    words.flatten().take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::Offsets;

    #[test]
    fn sequential_offsets_go_around_the_end() {
        let mut offsets = Offsets::sequential(512, 3, 1);
        assert_eq!([512, 1024, 0, 512], [(); 4].map(|()| offsets.next()));
    }

    #[test]
    fn random_offsets_reach_every_block_and_no_other() {
        let mut offsets = Offsets::random(4096, 16, 7);
        let mut seen = [0_u32; 16];
        for _ in 0..1600 {
            let offset = offsets.next();
            assert_eq!(offset % 4096, 0);
            seen[usize::try_from(offset / 4096).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (50..=160).contains(count)), "{seen:?}");
    }
}
