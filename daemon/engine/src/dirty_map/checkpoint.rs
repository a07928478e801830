//! The dirty map on disk: what a clean shutdown keeps of it (docs/formats/dirty-map.md).
//!
//! Layout, little-endian: a 64-byte header, the runs of wholly dirty chunks (first, end), the partly dirty
//! chunks (number, 512 bytes of bits, lowest first). The checksum covers everything but itself.

use block::{ByteCount, VolumeId};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CHUNK_BLOCKS, CHUNK_WORDS, DirtyMap};
use crate::bits::Bits;

const MAGIC: [u8; 8] = *b"FSHDIRTY";
const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C of the whole checkpoint with this field zero.
    checksum: U32,
    volume: [u8; 16],
    runs: U64,
    chunks: U64,
    /// Dirty blocks in all.
    blocks: U64,
    reserved: [u8; 8],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RunEntry {
    first: U64,
    end: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ChunkEntry {
    chunk: U64,
    words: [U64; CHUNK_WORDS],
}

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(size_of::<RunEntry>() == 16);
const _: () = assert!(size_of::<ChunkEntry>() == 520);

/// Why a checkpoint of a dirty map was refused. The map is then unknown; the intent map covers its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// It is not a checkpoint of a dirty map.
    #[error("not a dirty map")]
    Magic,
    /// A version that this program does not know.
    #[error("dirty map version {0} is not known")]
    Version(u32),
    /// Cut short, too long or damaged.
    #[error("the dirty map is damaged")]
    Damaged,
    /// It belongs to another volume.
    #[error("the dirty map belongs to volume {0}")]
    Volume(VolumeId),
    /// Its content cannot be: out of order, beyond the volume's end, or miscounted.
    #[error("the dirty map's content is not valid")]
    Content,
}

impl DirtyMap {
    /// The map as bytes that name their volume.
    pub fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let count = |length: usize| U64::new(u64::try_from(length).unwrap_or(u64::MAX));
        let mut header = Header {
            magic: MAGIC,
            version: U32::new(VERSION),
            checksum: U32::ZERO,
            volume: volume.to_bytes(),
            runs: count(self.full.len()),
            chunks: count(self.partial.len()),
            blocks: U64::new(self.count),
            reserved: [0; 8],
        };
        let mut body = Vec::new();
        for run in self.full.iter() {
            let (first, end) = (U64::new(run.start), U64::new(run.end));
            body.extend_from_slice(RunEntry { first, end }.as_bytes());
        }
        for (chunk, bits) in &self.partial {
            let mut words = [U64::ZERO; CHUNK_WORDS];
            for (to, from) in words.iter_mut().zip(bits.words()) {
                *to = U64::new(from);
            }
            let chunk = U64::new(*chunk);
            body.extend_from_slice(ChunkEntry { chunk, words }.as_bytes());
        }
        header.checksum = U32::new(crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), &body));
        let mut bytes = header.as_bytes().to_vec();
        bytes.append(&mut body);
        bytes
    }

    /// The map in a checkpoint of `volume`, whose size is `size`.
    ///
    /// # Errors
    /// Refuses what is damaged, of another version or volume, or beyond `size`.
    pub fn decode(bytes: &[u8], volume: VolumeId, size: ByteCount) -> Result<Self, CheckpointError> {
        let (header, body) = Header::ref_from_prefix(bytes).map_err(|_| CheckpointError::Damaged)?;
        header.check(body, volume)?;
        let count = |field: U64| usize::try_from(field.get()).map_err(|_| CheckpointError::Damaged);
        let (runs, body) = <[RunEntry]>::ref_from_prefix_with_elems(body, count(header.runs)?)
            .map_err(|_| CheckpointError::Damaged)?;
        let chunks = <[ChunkEntry]>::ref_from_bytes_with_elems(body, count(header.chunks)?)
            .map_err(|_| CheckpointError::Damaged)?;
        let map = Self::from_entries(runs, chunks, size).ok_or(CheckpointError::Content)?;
        if map.count == header.blocks.get() { Ok(map) } else { Err(CheckpointError::Content) }
    }

    /// `None` unless the entries are what `encode` makes: ascending, disjoint, each in its shortest form.
    fn from_entries(runs: &[RunEntry], chunks: &[ChunkEntry], size: ByteCount) -> Option<Self> {
        let size_blocks = size.0.div_ceil(block::DATA_UNIT_BYTES);
        let mut map = Self::default();
        let mut free_from = 0;
        for run in runs {
            let (first, end) = (run.first.get(), run.end.get());
            let apart = first > free_from || (first == 0 && free_from == 0);
            if !apart || first >= end || end > size_blocks / CHUNK_BLOCKS {
                return None;
            }
            map.count += CHUNK_BLOCKS * map.full.insert(first..end);
            free_from = end;
        }
        for entry in chunks {
            let chunk = entry.chunk.get();
            let bits = Bits::<CHUNK_WORDS>::from_words(entry.words.iter().map(|word| word.get()));
            let count = bits.count();
            let ascending = map.partial.last_key_value().is_none_or(|(last, _)| *last < chunk);
            let start = chunk.checked_mul(CHUNK_BLOCKS).filter(|start| *start < size_blocks)?;
            let inside = bits.next_set(size_blocks - start).is_none();
            let form = count > 0 && count < CHUNK_BLOCKS && !map.full.contains(chunk);
            if !ascending || !inside || !form {
                return None;
            }
            map.count += count;
            map.partial.insert(chunk, Box::new(bits));
        }
        Some(map)
    }
}

impl Header {
    fn check(&self, body: &[u8], volume: VolumeId) -> Result<(), CheckpointError> {
        if self.magic != MAGIC {
            return Err(CheckpointError::Magic);
        }
        let unsummed = Self {
            checksum: U32::ZERO,
            ..Self::read_from_bytes(self.as_bytes()).map_err(|_| CheckpointError::Damaged)?
        };
        let checksum = crc32c::crc32c_append(crc32c::crc32c(unsummed.as_bytes()), body);
        if checksum != self.checksum.get() {
            return Err(CheckpointError::Damaged);
        }
        if self.version.get() != VERSION {
            return Err(CheckpointError::Version(self.version.get()));
        }
        if self.volume != volume.to_bytes() {
            return Err(CheckpointError::Volume(VolumeId::from_bytes(self.volume)));
        }
        if self.reserved != [0; 8] {
            return Err(CheckpointError::Content);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use block::ByteRange;
    use proptest::prelude::*;

    use super::*;

    const SIZE: ByteCount = ByteCount(1 << 30);

    fn sample() -> Vec<u8> {
        let mut map = DirtyMap::default();
        map.set(ByteRange::new(5 << 20, 100 << 20).unwrap());
        map.set(ByteRange::new(500 << 20, 1).unwrap());
        map.encode(VolumeId::from_bytes([1; 16]))
    }

    fn decode(bytes: &[u8]) -> Result<DirtyMap, CheckpointError> {
        DirtyMap::decode(bytes, VolumeId::from_bytes([1; 16]), SIZE)
    }

    #[test]
    fn every_damaged_bit_and_length_is_refused() {
        let good = sample();
        assert!(decode(&good).is_ok());
        for length in 0..good.len() {
            assert!(decode(&good[..length]).is_err(), "{length}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_volume_or_a_smaller_one_is_refused() {
        let (good, other) = (sample(), VolumeId::from_bytes([2; 16]));
        let owner = VolumeId::from_bytes([1; 16]);
        assert_eq!(DirtyMap::decode(&good, other, SIZE), Err(CheckpointError::Volume(owner)));
        let small = ByteCount(400 << 20);
        assert_eq!(DirtyMap::decode(&good, owner, small), Err(CheckpointError::Content));
    }

    proptest! {
        #[test]
        fn whatever_passes_is_what_encode_makes(
            runs in prop::collection::vec((0_u64..70, 0_u64..70), 0..3),
            chunks in prop::collection::vec((0_u64..70, prop_oneof![Just(0), Just(u64::MAX), any::<u64>()]), 0..3),
        ) {
            let runs: Vec<RunEntry> = runs.into_iter().map(|(first, end)| RunEntry { first: U64::new(first), end: U64::new(end) }).collect();
            let chunks: Vec<ChunkEntry> = chunks.into_iter().map(|(chunk, word)| ChunkEntry { chunk: U64::new(chunk), words: [U64::new(word); CHUNK_WORDS] }).collect();
            if let Some(map) = DirtyMap::from_entries(&runs, &chunks, SIZE) {
                let encoded = map.encode(VolumeId::from_bytes([1; 16]));
                prop_assert_eq!(decode(&encoded), Ok(map));
                let body = [runs.as_bytes(), chunks.as_bytes()].concat();
                prop_assert_eq!(&encoded[size_of::<Header>()..], &body[..]);
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
