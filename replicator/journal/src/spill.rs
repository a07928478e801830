//! The primary's spill: ordered records in a preallocated file, between the RAM ring and the dirty map
//! (docs/formats/journal.md, "Spill").
//!
//! Pure accounting: [`SpillSpace`] says where a segment goes, [`SpillSegment`] what must be found there. A segment
//! is a cut of its own that no other follows; what names it, with its hash, is held in memory, and at a clean stop in
//! the [`SpillIndex`]. So nothing in the file counts by itself, and after an unclean start nothing of it does.

mod index;

use std::collections::VecDeque;

use block::{ChainHash, MirrorId, Sequence, Tip, WallTime};
use bytes::Bytes;

use crate::{CutError, CutMeta, EncodedCut, Lineage, PAGE_BYTES, Record, decode, encode};

pub use index::{SpillIndex, SpillIndexError};

/// A run of records in the spill file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpillSegment {
    /// Its first byte in the file; a multiple of 4096.
    pub offset: u64,
    /// Its length; a multiple of 4096.
    pub length: u64,
    /// The first sequence that it covers.
    pub first: Sequence,
    /// The last sequence that it covers.
    pub last: Sequence,
    /// When it was sealed, by the primary's clock.
    pub time: WallTime,
    /// Payload bytes of its records.
    pub payload_bytes: u64,
    /// How many records it holds.
    pub record_count: u32,
    /// The hash that names its content.
    pub chain: ChainHash,
}

/// Why a segment that was read back is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpillFault {
    /// It is torn, damaged, or was never written.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// It is whole, and not the one that was wanted.
    #[error("another segment stands in its place")]
    Other,
}

impl SpillSegment {
    /// Encodes `records`, which are all that take a sequence in `first..=last`, as a segment to be written at `offset`.
    ///
    /// # Panics
    /// As [`encode`]: if they break the format's rules.
    pub fn seal(
        mirror: MirrorId,
        lineage: Lineage,
        (first, last): (Sequence, Sequence),
        time: WallTime,
        records: &[Record],
    ) -> (Self, EncodedCut) {
        let encoded = encode(&meta(mirror, lineage, first, last, time), records);
        let segment = Self {
            offset: 0,
            length: encoded.total_bytes,
            first,
            last,
            time,
            payload_bytes: records.iter().map(Record::payload_bytes).sum(),
            record_count: u32::try_from(records.len()).unwrap_or(u32::MAX),
            chain: encoded.tip.chain,
        };
        (segment, encoded)
    }

    /// The same segment at its place.
    #[must_use]
    pub const fn at(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// Verifies what was read from the segment's place, and gives its records; their payloads are slices of `bytes`.
    ///
    /// # Errors
    /// If a bit of it differs from what was sealed.
    pub fn open(&self, mirror: MirrorId, lineage: Lineage, bytes: &Bytes) -> Result<Vec<Record>, SpillFault> {
        let cut = decode(bytes)?;
        let wanted = meta(mirror, lineage, self.first, self.last, self.time);
        if cut.meta != wanted || cut.tip.chain != self.chain {
            return Err(SpillFault::Other);
        }
        Ok(cut.records)
    }
}

/// What a segment says of itself: a committed cut without a past.
fn meta(mirror: MirrorId, lineage: Lineage, first: Sequence, last: Sequence, time: WallTime) -> CutMeta {
    CutMeta {
        mirror,
        lineage,
        first,
        last,
        previous: Tip {
            position: lineage.at(Sequence(first.0.saturating_sub(1))),
            chain: ChainHash::default(),
        },
        pass: 0,
        time,
        echo: WallTime(0),
        commit: true,
        initial: false,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    offset: u64,
    length: u64,
    free: bool,
}

impl Extent {
    const fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Which parts of the spill file are in use. Extents are taken in a circle; one that is freed out of turn is taken
/// again when all before it, or all behind it, are free.
#[derive(Clone, Debug, Default)]
pub struct SpillSpace {
    capacity: u64,
    /// In the order in which they were taken: ascending offsets, that start over at most once.
    extents: VecDeque<Extent>,
    used: u64,
}

impl SpillSpace {
    /// An empty file of `capacity` bytes, rounded down to whole pages; 0 takes nothing.
    pub const fn new(capacity: u64) -> Self {
        Self { capacity: capacity - capacity % PAGE_BYTES, extents: VecDeque::new(), used: 0 }
    }

    /// A file that holds `segments`; `None` if they overlap or lie outside.
    pub fn restore<'a>(capacity: u64, segments: impl IntoIterator<Item = &'a SpillSegment>) -> Option<Self> {
        let extent =
            |segment: &SpillSegment| Extent { offset: segment.offset, length: segment.length, free: false };
        let mut extents: Vec<Extent> = segments.into_iter().map(extent).collect();
        extents.sort_by_key(|extent| extent.offset);
        let mut end = 0;
        for extent in &extents {
            let next = extent.offset.checked_add(extent.length)?;
            if extent.offset < end || extent.length == 0 || next > capacity {
                return None;
            }
            end = next;
        }
        let used = extents.iter().map(|extent| extent.length).sum();
        Some(Self { extents: extents.into(), used, ..Self::new(capacity) })
    }

    /// Bytes of the file.
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Takes `length` bytes and gives their offset; `None` if no gap is so long.
    ///
    /// # Panics
    /// If `length` is not a positive number of whole pages.
    pub fn take(&mut self, length: u64) -> Option<u64> {
        assert!(length > 0 && length.is_multiple_of(PAGE_BYTES), "segments are whole pages");
        let offset = match (self.extents.front(), self.extents.back()) {
            (Some(front), Some(back)) => {
                let started_over = back.offset < front.offset;
                let behind = if started_over { front.offset } else { self.capacity } - back.end();
                if behind >= length {
                    back.end()
                } else if !started_over && front.offset >= length {
                    0
                } else {
                    return None;
                }
            }
            (None, _) | (_, None) if self.capacity >= length => 0,
            (None, _) | (_, None) => return None,
        };
        self.extents.push_back(Extent { offset, length, free: false });
        self.used += length;
        Some(offset)
    }

    /// Gives the extent at `offset` back.
    ///
    /// # Panics
    /// If none is in use there.
    pub fn free(&mut self, offset: u64) {
        let found = self.extents.iter_mut().find(|extent| extent.offset == offset && !extent.free);
        assert!(found.is_some(), "what is freed was taken");
        if let Some(extent) = found {
            extent.free = true;
            self.used -= extent.length;
        }
        while self.extents.pop_front_if(|extent| extent.free).is_some() {}
        while self.extents.pop_back_if(|extent| extent.free).is_some() {}
    }

    /// Bytes in use.
    pub const fn used_bytes(&self) -> u64 {
        self.used
    }
}

#[cfg(test)]
mod tests;
