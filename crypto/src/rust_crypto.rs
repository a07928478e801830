//! The `rustcrypto` engine: XTS over whole requests, in safe code on the wide backends of `aes`.
//!
//! A request is handed to the cipher's backend as one closure, so that the tweak arithmetic and the XORs are
//! compiled with the backend's CPU features. What runs inside the closure is therefore `#[inline(always)]`: a
//! function that is not loses these features. The one exception is [`cipher_batch`], for the opposite reason.
//!
//! A batch is what the backend takes at once: 64 blocks of 16 bytes with VAES on AVX-512, 30 with VAES on AVX2,
//! 8 with AES-NI.

use aes::cipher::consts::U16;
use aes::cipher::{
    Array, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
    BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit, ParBlocks, ParBlocksSizeUser,
};
use aes::{Aes256, Aes256Enc, Block};

use crate::DataKey;
use crate::zero;

/// Bytes in one AES block.
const BLOCK_BYTES: usize = 16;
/// Blocks in the longest data unit, 4096 bytes.
const UNIT_BLOCKS_MAX: usize = 256;
/// Data units whose first tweaks are made in one call of the tweak cipher.
const UNITS_PER_CALL: usize = 64;
/// Tweaks made at a time.
const GROUP: usize = 32;

/// A data key expanded for use. `aes` zeroes it on drop.
pub(crate) struct RustCrypto {
    data: Aes256,
    tweak: Aes256Enc,
}

impl RustCrypto {
    pub(crate) fn new(key: &DataKey) -> Self {
        let (data, tweak) = key.halves();
        Self { data: Aes256::new(&Array(*data)), tweak: Aes256Enc::new(&Array(*tweak)) }
    }

    /// Encrypts `data` in place. `unit_bytes` is the length of a data unit, `first_unit` the first one's number.
    pub(crate) fn encrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        self.for_each_call(unit_bytes, first_unit, data, |call| self.data.encrypt_with_backend(call));
    }

    /// Decrypts `data` in place, by the zero rule: an all-zero sector stays zero.
    pub(crate) fn decrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        self.for_each_call(unit_bytes, first_unit, data, |call| self.data.decrypt_with_backend(call));
    }

    /// Cuts `data` into calls of at most [`UNITS_PER_CALL`] units and makes the first tweak of each unit.
    fn for_each_call(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8], run: impl Fn(Call<'_>)) {
        let unit_blocks = unit_bytes / BLOCK_BYTES;
        assert!(unit_bytes.is_multiple_of(BLOCK_BYTES) && (1..=UNIT_BLOCKS_MAX).contains(&unit_blocks));
        assert!(data.len().is_multiple_of(unit_bytes));
        let mut unit_number = first_unit;
        let mut first_tweaks = [Block::default(); UNITS_PER_CALL];
        let mut scratch = [Block::default(); UNIT_BLOCKS_MAX];
        let (tweaks, _) = scratch.split_at_mut(unit_blocks.next_multiple_of(GROUP));
        for data in data.chunks_mut(unit_bytes * UNITS_PER_CALL) {
            let (first_tweaks, _) = first_tweaks.split_at_mut(data.len() / unit_bytes);
            for tweak in first_tweaks.iter_mut() {
                *tweak = Array(unit_number.to_le_bytes());
                unit_number = unit_number.wrapping_add(1);
            }
            self.tweak.encrypt_blocks(first_tweaks);
            run(Call { unit_bytes, data, first_tweaks, tweaks });
        }
    }
}

/// The work of one backend call.
struct Call<'a> {
    unit_bytes: usize,
    /// Whole data units.
    data: &'a mut [u8],
    /// The first tweak of each.
    first_tweaks: &'a [Block],
    /// Room for the tweaks of one unit's blocks, in whole groups.
    tweaks: &'a mut [Block],
}

impl BlockSizeUser for Call<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Call<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        let units = self.data.chunks_exact_mut(self.unit_bytes);
        for (unit, first_tweak) in units.zip(self.first_tweaks) {
            make_tweaks(first_tweak, self.tweaks);
            transform_unit(&Encrypt(backend), self.tweaks, unit);
        }
    }
}

impl BlockCipherDecClosure for Call<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        let units = self.data.chunks_exact_mut(self.unit_bytes);
        for (unit, first_tweak) in units.zip(self.first_tweaks) {
            let zero_sectors = zero::zero_sectors(unit);
            make_tweaks(first_tweak, self.tweaks);
            transform_unit(&Decrypt(backend), self.tweaks, unit);
            if zero_sectors != 0 {
                zero::clear_sectors(unit, zero_sectors);
            }
        }
    }
}

/// One direction of a backend, over one batch in place.
trait Direction: ParBlocksSizeUser<BlockSize = U16> {
    fn apply(&self, batch: &mut ParBlocks<Self>);
}

struct Encrypt<'a, B>(&'a B);
struct Decrypt<'a, B>(&'a B);

impl<B: BlockSizeUser> BlockSizeUser for Encrypt<'_, B> {
    type BlockSize = B::BlockSize;
}

impl<B: ParBlocksSizeUser> ParBlocksSizeUser for Encrypt<'_, B> {
    type ParBlocksSize = B::ParBlocksSize;
}

impl<B: BlockCipherEncBackend<BlockSize = U16>> Direction for Encrypt<'_, B> {
    #[inline(always)]
    fn apply(&self, batch: &mut ParBlocks<Self>) {
        self.0.encrypt_par_blocks_inplace(batch);
    }
}

impl<B: BlockSizeUser> BlockSizeUser for Decrypt<'_, B> {
    type BlockSize = B::BlockSize;
}

impl<B: ParBlocksSizeUser> ParBlocksSizeUser for Decrypt<'_, B> {
    type ParBlocksSize = B::ParBlocksSize;
}

impl<B: BlockCipherDecBackend<BlockSize = U16>> Direction for Decrypt<'_, B> {
    #[inline(always)]
    fn apply(&self, batch: &mut ParBlocks<Self>) {
        self.0.decrypt_par_blocks_inplace(batch);
    }
}

/// XTS over one data unit, given the tweak of each of its blocks and perhaps more.
#[inline(always)]
fn transform_unit<D: Direction>(direction: &D, tweaks: &[Block], unit: &mut [u8]) {
    let (blocks, _) = Block::slice_as_chunks_mut(unit);
    let (tweaks, _) = tweaks.split_at(blocks.len());
    let (batches, tail) = ParBlocks::<D>::slice_as_chunks_mut(blocks);
    let (batch_tweaks, tail_tweaks) = ParBlocks::<D>::slice_as_chunks(tweaks);
    for (batch, tweaks) in batches.iter_mut().zip(batch_tweaks) {
        xor(batch, tweaks);
        cipher_batch(direction, batch);
        xor(batch, tweaks);
    }
    if !tail.is_empty() {
        // The rest of this batch is ciphered for nothing, which costs less than its blocks one by one.
        let mut batch = ParBlocks::<D>::default();
        batch.iter_mut().zip(tail.iter()).for_each(|(slot, block)| *slot = *block);
        xor(&mut batch, tail_tweaks);
        cipher_batch(direction, &mut batch);
        xor(&mut batch, tail_tweaks);
        tail.iter_mut().zip(batch).for_each(|(block, slot)| *block = slot);
    }
}

/// The cipher over one batch, apart from the code around it: inlined between the XORs the compiler orders the
/// rounds block after block, waits for each of them, and loses a quarter of the speed.
#[inline(never)]
fn cipher_batch<D: Direction>(direction: &D, batch: &mut ParBlocks<D>) {
    direction.apply(batch);
}

/// XORs each block with its tweak, as bytes: 64-bit stores before the cipher's wider loads would stall these.
#[inline(always)]
fn xor(blocks: &mut [Block], tweaks: &[Block]) {
    let tweaks = Block::slice_as_flattened(tweaks);
    for (byte, tweak) in Block::slice_as_flattened_mut(blocks).iter_mut().zip(tweaks) {
        *byte ^= tweak;
    }
}

/// The tweaks of a unit's blocks: `first` times x^0, x^1, x^2 and so on.
#[inline(always)]
fn make_tweaks(first: &Block, tweaks: &mut [Block]) {
    let mut group = TweakGroup::starting_with(first);
    let (places, _) = tweaks.as_chunks_mut();
    for places in places {
        group.store(places);
        group.advance();
    }
}

/// Consecutive tweaks, low and high words apart, so that one vector operation takes several of them. Arithmetic
/// on `u128` would not be vectorised.
struct TweakGroup {
    low: [u64; GROUP],
    high: [u64; GROUP],
}

impl TweakGroup {
    /// The group that starts with `first`: its known part is doubled until the group is full.
    #[inline(always)]
    fn starting_with(first: &Block) -> Self {
        let mut group = Self { low: [0; GROUP], high: [0; GROUP] };
        if let ([low, high], []) = first.0.as_chunks() {
            group.low[0] = u64::from_le_bytes(*low);
            group.high[0] = u64::from_le_bytes(*high);
        }
        let mut known = 1;
        while known < GROUP {
            let (low, new_low) = group.low.split_at_mut(known);
            let (high, new_high) = group.high.split_at_mut(known);
            for ((low, high), (new_low, new_high)) in
                low.iter().zip(high).zip(new_low.iter_mut().zip(new_high))
            {
                [*new_low, *new_high] = multiply([*low, *high], known);
            }
            known *= 2;
        }
        group
    }

    #[inline(always)]
    fn store(&self, places: &mut [Block; GROUP]) {
        for ((place, low), high) in places.iter_mut().zip(&self.low).zip(&self.high) {
            let mut bytes = [0; BLOCK_BYTES];
            bytes[..8].copy_from_slice(&low.to_le_bytes());
            bytes[8..].copy_from_slice(&high.to_le_bytes());
            place.0 = bytes;
        }
    }

    /// The group becomes the one that follows it.
    #[inline(always)]
    fn advance(&mut self) {
        for (low, high) in self.low.iter_mut().zip(&mut self.high) {
            [*low, *high] = multiply([*low, *high], GROUP);
        }
    }
}

/// A tweak, low word first, times x^`power` in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1; `power` is 1 to 57.
#[inline(always)]
fn multiply([low, high]: [u64; 2], power: usize) -> [u64; 2] {
    let over = high >> (64 - power);
    [low << power ^ over ^ over << 1 ^ over << 2 ^ over << 7, high << power | low >> (64 - power)]
}

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use aes::cipher::array::ArraySize;
    use aes::cipher::consts::{U3, U8, U30, U64};
    use xts_mode::get_tweak_default;

    use super::*;
    use crate::oracle::{ciphers, noise, oracle};

    /// A backend with batches of `N` blocks: the sizes that this machine's own does not have.
    struct BatchesOf<N>(Aes256, PhantomData<N>);

    impl<N> BlockSizeUser for BatchesOf<N> {
        type BlockSize = U16;
    }

    impl<N: ArraySize> ParBlocksSizeUser for BatchesOf<N> {
        type ParBlocksSize = N;
    }

    impl<N: ArraySize> Direction for BatchesOf<N> {
        fn apply(&self, batch: &mut ParBlocks<Self>) {
            self.0.encrypt_blocks(batch);
        }
    }

    fn encrypt_in_batches_of<N: ArraySize>(unit_number: u64, unit: &mut [u8]) {
        let [data, tweak] = ciphers();
        let mut first_tweak = Array(u128::from(unit_number).to_le_bytes());
        tweak.encrypt_block(&mut first_tweak);
        let mut tweaks = vec![Block::default(); unit.len() / BLOCK_BYTES];
        make_tweaks(&first_tweak, &mut tweaks);
        transform_unit(&BatchesOf::<N>(data, PhantomData), &tweaks, unit);
    }

    #[test]
    fn every_size_of_batch_gives_the_same_ciphertext() {
        for unit_bytes in [512, 4096] {
            let plain = noise(unit_bytes, 5);
            let mut expected = plain.clone();
            oracle().encrypt_area(&mut expected, unit_bytes, 77, get_tweak_default);
            let encryptions: [fn(u64, &mut [u8]); 4] = [
                encrypt_in_batches_of::<U3>,
                encrypt_in_batches_of::<U8>,
                encrypt_in_batches_of::<U30>,
                encrypt_in_batches_of::<U64>,
            ];
            for encrypt in encryptions {
                let mut data = plain.clone();
                encrypt(77, &mut data);
                assert!(data == expected);
            }
        }
    }

    #[test]
    fn powers_of_x_agree_with_repeated_doubling() {
        let mut slow = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
        let start = slow;
        for power in 1..=57 {
            let carry = slow[1] >> 63;
            slow = [(slow[0] << 1) ^ (carry * 0x87), slow[1] << 1 | slow[0] >> 63];
            assert_eq!(multiply(start, power), slow, "x^{power}");
        }
    }
}
