//! Where the requests of one connection go.

/// A sequence of block-aligned offsets.
pub(crate) struct Offsets {
    block_bytes: u64,
    blocks: u64,
    order: Order,
}

enum Order {
    /// The state of SplitMix64 (Steele, Lea, Flood 2014): cheap, and good enough to spread offsets.
    Random(u64),
    Around(u64),
    /// From the one block to before the other.
    Once(u64, u64),
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
    pub(crate) fn around(block_bytes: u64, blocks: u64, first: u64) -> Self {
        assert!(first < blocks);
        Self { block_bytes, blocks, order: Order::Around(first) }
    }

    /// The `nth` of `parts` equal parts of an export, once.
    pub(crate) fn once(block_bytes: u64, blocks: u64, nth: u64, parts: u64) -> Self {
        let bound = |part| blocks / parts * part + (blocks % parts).min(part);
        Self { block_bytes, blocks, order: Order::Once(bound(nth), bound(nth + 1)) }
    }

    /// The next offset in bytes; none at the end, if there is one.
    pub(crate) fn next(&mut self) -> Option<u64> {
        let block = match &mut self.order {
            Order::Random(state) => split_mix(state) % self.blocks,
            Order::Around(next) => {
                let block = *next;
                *next = (block + 1) % self.blocks;
                block
            }
            Order::Once(next, end) => {
                let block = *next;
                if block == *end {
                    return None;
                }
                *next += 1;
                block
            }
        };
        Some(block * self.block_bytes)
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
        let mut offsets = Offsets::around(512, 3, 1);
        assert_eq!([512, 1024, 0, 512].map(Some), [(); 4].map(|()| offsets.next()));
    }

    #[test]
    fn parts_cover_an_export_once() {
        for (blocks, parts) in [(10, 4), (3, 5), (8, 1), (0, 2)] {
            let of_part = |nth| {
                let mut offsets = Offsets::once(512, blocks, nth, parts);
                std::iter::from_fn(move || offsets.next())
            };
            let all: Vec<u64> = (0..parts).flat_map(of_part).collect();
            assert_eq!(all, (0..blocks).map(|block| block * 512).collect::<Vec<_>>());
        }
    }

    #[test]
    fn random_offsets_reach_every_block_and_no_other() {
        let mut offsets = Offsets::random(4096, 16, 7);
        let mut seen = [0_u32; 16];
        for _ in 0..1600 {
            let offset = offsets.next().unwrap();
            assert_eq!(offset % 4096, 0);
            seen[usize::try_from(offset / 4096).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (50..=160).contains(count)), "{seen:?}");
    }
}
