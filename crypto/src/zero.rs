//! The zero rule: an all-zero 512-byte sector of ciphertext is zero plaintext.
//!
//! So a preallocated, never-written volume reads as zeros. XTS makes such a sector by itself with probability
//! 2^-4096.

/// Bytes in one sector, the unit of the zero rule.
const SECTOR_BYTES: usize = 512;
const _: () = assert!(block::SECTOR_BYTES == 512);

/// Which sectors of `unit` are all zero: bit n for sector n. At most 64 sectors.
#[inline(always)]
pub(crate) fn zero_sectors(unit: &[u8]) -> u64 {
    let mut mask = 0;
    for (sector, bit) in unit.chunks_exact(SECTOR_BYTES).zip(0_u32..) {
        // Ciphertext starts with a zero word once in 2^64 sectors: the full look is for zero sectors only.
        let starts_zero = sector.first_chunk() == Some(&[0; 8]);
        if starts_zero && sector.iter().all(|byte| *byte == 0) {
            mask |= 1 << bit;
        }
    }
    mask
}

/// Makes the sectors of `mask` zero.
pub(crate) fn clear_sectors(unit: &mut [u8], mask: u64) {
    for (sector, bit) in unit.chunks_exact_mut(SECTOR_BYTES).zip(0_u32..) {
        if mask >> bit & 1 == 1 {
            sector.fill(0);
        }
    }
}
