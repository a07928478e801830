//! A checksum beside the catalogue's file, so that damage is seen before the store reads it.
//!
//! The store checks its pages, but takes some damage for a bug of its own and ends the process. So the whole file is
//! summed up whenever it comes to rest, and compared before it is opened. While the file changes the seal says so; a
//! crash then leaves the judgement to the store, whose transactions survive crashes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"FARSHSUM";
const CHANGING: u32 = 1;
const AT_REST: u32 = 2;
/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// The seal as it stands on disk: one sector, written in place.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Mark {
    magic: [u8; 8],
    state: U32,
    sum: U32,
    length: U64,
    checksum: U32,
    reserved: [u8; 4],
}

const _: () = assert!(size_of::<Mark>() == 32);

/// What the seal says of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is as it was left.
    Whole,
    /// It is not.
    Damaged,
    /// It was being changed, or the seal itself is missing or damaged.
    Unknown,
}

/// The seal of one file.
#[derive(Debug)]
pub(super) struct Seal {
    path: PathBuf,
    sealed: PathBuf,
}

impl Seal {
    /// The seal of the file `sealed`.
    pub(super) fn of(sealed: &Path) -> Self {
        Self { path: sealed.with_extension("sum"), sealed: sealed.to_owned() }
    }

    /// Compares the file with its seal.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn verdict(&self) -> io::Result<Verdict> {
        let mut mark = Mark::new_zeroed();
        let read = File::open(&self.path).and_then(|file| file.read_exact_at(mark.as_mut_bytes(), 0));
        if read.is_err() || mark.magic != MAGIC || mark.checksum.get() != mark.own_checksum() {
            return Ok(Verdict::Unknown);
        }
        if mark.state.get() != AT_REST {
            return Ok(Verdict::Unknown);
        }
        let same = self.sum()? == (mark.length.get(), mark.sum.get());
        Ok(if same { Verdict::Whole } else { Verdict::Damaged })
    }

    /// Says, durably, that the file is about to change.
    ///
    /// # Errors
    /// The seal cannot be written.
    pub(super) fn open(&self) -> io::Result<()> {
        self.write(CHANGING, (0, 0))
    }

    /// Sums the file up, which is at rest now.
    ///
    /// # Errors
    /// The file cannot be read or the seal not written.
    pub(super) fn close(&self) -> io::Result<()> {
        self.write(AT_REST, self.sum()?)
    }

    fn write(&self, state: u32, (length, sum): (u64, u32)) -> io::Result<()> {
        let mut mark = Mark {
            magic: MAGIC,
            state: U32::new(state),
            sum: U32::new(sum),
            length: U64::new(length),
            checksum: U32::ZERO,
            reserved: [0; 4],
        };
        mark.checksum = U32::new(mark.own_checksum());
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&self.path)?;
        file.write_all_at(mark.as_bytes(), 0)?;
        file.sync_data()
    }

    /// Length and CRC-32C of the file.
    fn sum(&self) -> io::Result<(u64, u32)> {
        let mut file = File::open(&self.sealed)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let (mut length, mut sum) = (0_u64, 0);
        loop {
            let count = file.read(&mut chunk)?;
            let Some(read) = chunk.get(..count).filter(|read| !read.is_empty()) else {
                return Ok((length, sum));
            };
            sum = crc32c::crc32c_append(sum, read);
            length = length.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}

impl Mark {
    /// CRC-32C of the mark with the checksum field zero.
    fn own_checksum(&self) -> u32 {
        let bare = Self { checksum: U32::ZERO, ..self.clone() };
        crc32c::crc32c(bare.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_at_rest_can_be_judged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let seal = Seal::of(&path);
        assert_eq!(seal.verdict().unwrap(), Verdict::Unknown);
        seal.close().unwrap();
        assert_eq!(seal.verdict().unwrap(), Verdict::Whole);
        for damaged in [vec![7; 99_999], vec![7; 100_001], vec![0; 100_000], vec![]] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(seal.verdict().unwrap(), Verdict::Damaged);
        }
        seal.open().unwrap();
        assert_eq!(seal.verdict().unwrap(), Verdict::Unknown);
        seal.close().unwrap();
        let mut mark = std::fs::read(folder.path().join("file.sum")).unwrap();
        mark[13] ^= 1;
        std::fs::write(folder.path().join("file.sum"), mark).unwrap();
        assert_eq!(seal.verdict().unwrap(), Verdict::Unknown);
    }
}
