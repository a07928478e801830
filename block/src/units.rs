//! Checked quantities: bytes, byte ranges and data units.
//!
//! A range never wraps: `offset + length` always fits in 64 bits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes in one XTS data unit, the unit of encryption, of the dirty map and of device I/O.
pub const DATA_UNIT_BYTES: u64 = 4096;
/// Bytes in one sector, the unit of the zero rule and of torn writes.
pub const SECTOR_BYTES: u64 = 512;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

/// A number of 4096-byte blocks (data units).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(pub u64);

/// The index of a 4096-byte block (data unit) in a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

/// A half-open range of bytes, `offset..offset + length`, that does not wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

/// Why a size such as `10GiB` was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("size '{0}' is not understood: write a whole number with B, KiB, MiB, GiB or TiB, as in 10GiB")]
pub struct SizeError(String);

impl BlockCount {
    /// The same amount in bytes; saturates at 2^64-1.
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.0.saturating_mul(DATA_UNIT_BYTES))
    }
}

impl Lba {
    /// The block that holds the byte at `offset`.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / DATA_UNIT_BYTES)
    }

    /// The byte offset of the block's first byte; saturates at 2^64-1.
    pub const fn byte_offset(self) -> u64 {
        self.0.saturating_mul(DATA_UNIT_BYTES)
    }
}

impl ByteRange {
    /// The range `offset..offset + length`, or `None` if its end does not fit in 64 bits.
    pub const fn new(offset: u64, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(_) => Some(Self { offset, length }),
            None => None,
        }
    }

    /// The range between two offsets, or `None` if `end < start`.
    pub const fn between(start: u64, end: u64) -> Option<Self> {
        match end.checked_sub(start) {
            Some(length) => Some(Self { offset: start, length }),
            None => None,
        }
    }

    /// The bytes of `count` blocks from `first` on, or `None` if the end does not fit in 64 bits.
    pub const fn of_blocks(first: Lba, count: BlockCount) -> Option<Self> {
        match (first.0.checked_mul(DATA_UNIT_BYTES), count.0.checked_mul(DATA_UNIT_BYTES)) {
            (Some(offset), Some(length)) => Self::new(offset, length),
            _ => None,
        }
    }

    /// First byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// First byte after the range.
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    /// True if the range has no byte.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// True if both ends lie on data-unit borders.
    pub const fn is_unit_aligned(self) -> bool {
        self.offset.is_multiple_of(DATA_UNIT_BYTES) && self.length.is_multiple_of(DATA_UNIT_BYTES)
    }

    /// The smallest data-unit aligned range that holds this one (its end saturates at the last whole unit).
    pub const fn unit_outward(self) -> Self {
        let start = self.offset - self.offset % DATA_UNIT_BYTES;
        let end = match self.end().checked_next_multiple_of(DATA_UNIT_BYTES) {
            Some(end) => end,
            None => u64::MAX - u64::MAX % DATA_UNIT_BYTES,
        };
        Self { offset: start, length: end.saturating_sub(start) }
    }

    /// The largest data-unit aligned range inside this one; empty if there is none.
    pub const fn unit_inward(self) -> Self {
        let end = self.end() - self.end() % DATA_UNIT_BYTES;
        match self.offset.checked_next_multiple_of(DATA_UNIT_BYTES) {
            Some(start) if start < end => Self { offset: start, length: end - start },
            _ => Self { offset: self.offset - self.offset % DATA_UNIT_BYTES, length: 0 },
        }
    }

    /// True if the two ranges share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end() && self.length > 0 && other.length > 0
    }

    /// True if every byte of `other` is in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The shared bytes of two ranges, or `None` if they share none.
    pub fn intersection(self, other: Self) -> Option<Self> {
        if !self.overlaps(other) {
            return None;
        }
        Self::between(self.offset.max(other.offset), self.end().min(other.end()))
    }

    /// The first block touched.
    pub const fn first_block(self) -> Lba {
        Lba::containing(self.offset)
    }

    /// One past the last block touched; equal to `first_block` for an empty range on a unit border.
    pub const fn end_block(self) -> Lba {
        Lba(self.end().div_ceil(DATA_UNIT_BYTES))
    }

    /// The number of blocks touched.
    pub const fn block_count(self) -> BlockCount {
        BlockCount(self.end_block().0.saturating_sub(self.first_block().0))
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}+{}", self.offset, self.length)
    }
}

const SUFFIXES: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

impl FromStr for ByteCount {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || SizeError(text.to_owned());
        let (digits, shift) = SUFFIXES
            .iter()
            .find_map(|(suffix, shift)| text.strip_suffix(suffix).map(|digits| (digits, *shift)))
            .unwrap_or((text, 0));
        let number: u64 = digits.trim().parse().map_err(|_| refuse())?;
        number.checked_mul(1_u64 << shift).map(ByteCount).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SUFFIXES.iter().find(|(_, shift)| {
            let unit = 1_u64 << shift;
            self.0 >= unit && self.0.is_multiple_of(unit)
        });
        match exact {
            Some((suffix, shift)) => write!(formatter, "{}{suffix}", self.0 >> shift),
            None => write!(formatter, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_and_written_the_same() {
        for text in ["10GiB", "1TiB", "512B", "3KiB", "0B"] {
            assert_eq!(text.parse::<ByteCount>().unwrap().to_string(), text);
        }
        assert_eq!("4096".parse::<ByteCount>().unwrap(), ByteCount(4096));
        for text in ["", "GiB", "-1GiB", "1.5GiB", "99999999999TiB", "10GB"] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn rounding_keeps_containment(offset in 0_u64..1 << 40, length in 0_u64..1 << 30) {
            let range = ByteRange::new(offset, length).unwrap();
            let outward = range.unit_outward();
            prop_assert!(outward.is_unit_aligned() && outward.contains(range));
            let inward = range.unit_inward();
            prop_assert!(inward.is_unit_aligned());
            prop_assert!(inward.is_empty() || range.contains(inward));
            prop_assert_eq!(range.block_count().bytes().0, if length == 0 && offset % 4096 != 0 { 4096 } else { outward.length() });
        }
    }

    #[test]
    fn a_range_that_wraps_is_refused() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(u64::MAX, 0).is_some());
    }
}
