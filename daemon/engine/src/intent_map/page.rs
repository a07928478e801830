//! One page of the intent map's file: a header of 64 bytes and the bits (docs/formats/intent-map.md).

use block::VolumeId;
use bytes::Bytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bits::Bits;

/// Bytes of a page: what a device writes at once, and what a bit costs to set.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Regions that one page stands for.
pub(super) const PAGE_REGIONS: u64 = 64 * 504;

const PAGE_WORDS: usize = 504;
const MAGIC: [u8; 8] = *b"FSHINTNT";
const VERSION: u32 = 1;

/// The bits of one page; bit `n` is bit `n % 8` of byte `n / 8` behind the header.
pub(super) type RegionBits = Bits<PAGE_WORDS>;

/// What a page must say of itself to be taken for this map's.
pub(super) struct PageIdentity {
    pub(super) volume: VolumeId,
    pub(super) page: u64,
    pub(super) region_bytes: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PageImage {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C of the page with this field zero.
    checksum: U32,
    volume: [u8; 16],
    page: U64,
    generation: U64,
    region_bytes: U64,
    reserved: [u8; 8],
    words: [U64; PAGE_WORDS],
}

const _: () = assert!(size_of::<PageImage>() == 4096);

impl PageIdentity {
    /// The page as it is written.
    pub(super) fn encode(&self, generation: u64, bits: &RegionBits) -> Bytes {
        let mut words = [U64::ZERO; PAGE_WORDS];
        for (to, from) in words.iter_mut().zip(bits.words()) {
            *to = U64::new(from);
        }
        let mut image = PageImage {
            magic: MAGIC,
            version: U32::new(VERSION),
            checksum: U32::ZERO,
            volume: self.volume.to_bytes(),
            page: U64::new(self.page),
            generation: U64::new(generation),
            region_bytes: U64::new(self.region_bytes),
            reserved: [0; 8],
            words,
        };
        image.checksum = U32::new(crc32c::crc32c(image.as_bytes()));
        Bytes::copy_from_slice(image.as_bytes())
    }

    /// The generation and bits of a slot; `None` unless it is a whole page of this map with bits for no more
    /// than `regions` regions.
    pub(super) fn decode(&self, slot: &[u8], regions: u64) -> Option<(u64, RegionBits)> {
        let mut image = PageImage::read_from_bytes(slot).ok()?;
        let checksum = std::mem::take(&mut image.checksum);
        let ours = image.magic == MAGIC
            && image.version.get() == VERSION
            && crc32c::crc32c(image.as_bytes()) == checksum.get()
            && image.volume == self.volume.to_bytes()
            && image.page.get() == self.page
            && image.region_bytes.get() == self.region_bytes
            && image.reserved == [0; 8];
        let bits = RegionBits::from_words(image.words.iter().map(|word| word.get()));
        (ours && bits.next_set(regions).is_none()).then(|| (image.generation.get(), bits))
    }
}
