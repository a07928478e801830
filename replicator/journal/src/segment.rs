//! The header page of a redo segment (docs/formats/journal.md, "Segment").

use block::{ChainHash, MirrorId, Tip};
use bytes::Bytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{TipLayout, open_page, seal_page};
use crate::{Cursor, PAGE_BYTES, PageError};

const MAGIC: [u8; 8] = *b"FSSEGMNT";
const VERSION: u16 = 1;

/// Says which part of the redo log a segment file holds.
///
/// Its predecessor's end is the authority on where the log left the segment before: whatever that segment holds
/// behind it is void. So a log that was cut back needs no erasing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The mirror that the log belongs to.
    pub mirror: MirrorId,
    /// The segment's number; later segments have higher ones, and none is used twice.
    pub number: u64,
    /// The file that holds the segment.
    pub file_index: u32,
    /// Bytes of every segment file, this page included.
    pub segment_bytes: u64,
    /// Where the log ended when the segment was opened.
    pub previous_end: Cursor,
    /// The last cut before the segment's first.
    pub starts_after: Tip,
    /// The first cut's hash: a cut that an earlier lap left in its place is not taken for it, even if it follows
    /// the same tip.
    pub first_chain: ChainHash,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SegmentBody {
    mirror: [u8; 16],
    number: U64,
    file_index: U32,
    reserved: U32,
    segment_bytes: U64,
    previous_number: U64,
    previous_offset: U64,
    starts_after: TipLayout,
    first_chain: [u8; 32],
}

const _: () = assert!(size_of::<SegmentBody>() == 160);

impl SegmentHeader {
    /// The page as it stands at offset 0 of the segment's file.
    pub fn encode(&self) -> Bytes {
        let body = SegmentBody {
            mirror: self.mirror.to_bytes(),
            number: U64::new(self.number),
            file_index: U32::new(self.file_index),
            reserved: U32::ZERO,
            segment_bytes: U64::new(self.segment_bytes),
            previous_number: U64::new(self.previous_end.segment_number),
            previous_offset: U64::new(self.previous_end.offset),
            starts_after: self.starts_after.into(),
            first_chain: self.first_chain.0,
        };
        seal_page(MAGIC, VERSION, body.as_bytes())
    }

    /// Verifies and reads a page.
    ///
    /// # Errors
    /// If the page is torn, damaged, of another format, or contradicts itself.
    pub fn decode(page: &[u8]) -> Result<Self, PageError> {
        let body: SegmentBody = open_page(MAGIC, VERSION, page)?;
        if body.reserved != U32::ZERO {
            return Err(PageError::Reserved);
        }
        let header = Self {
            mirror: MirrorId::from_bytes(body.mirror),
            number: body.number.get(),
            file_index: body.file_index.get(),
            segment_bytes: body.segment_bytes.get(),
            previous_end: Cursor {
                segment_number: body.previous_number.get(),
                offset: body.previous_offset.get(),
            },
            starts_after: body.starts_after.into(),
            first_chain: ChainHash(body.first_chain),
        };
        let aligned = header.segment_bytes.is_multiple_of(PAGE_BYTES)
            && header.previous_end.offset.is_multiple_of(PAGE_BYTES);
        // The predecessor's number is lower, so a walk from segment to predecessor ends.
        if !aligned
            || header.previous_end.segment_number >= header.number
            || header.previous_end.offset > header.segment_bytes
        {
            return Err(PageError::Fields);
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SegmentHeader {
        SegmentHeader {
            mirror: MirrorId::from_bytes([1; 16]),
            number: 9,
            file_index: 2,
            segment_bytes: 1 << 20,
            previous_end: Cursor { segment_number: 7, offset: 12_288 },
            starts_after: Tip::default(),
            first_chain: ChainHash([3; 32]),
        }
    }

    #[test]
    fn a_page_is_read_as_written_and_every_flipped_bit_is_noticed() {
        let page = header().encode();
        assert_eq!(SegmentHeader::decode(&page), Ok(header()));
        for bit in (0..page.len() * 8).step_by(7) {
            let mut damaged = page.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_predecessor_that_is_not_older_is_refused() {
        let cursor = Cursor { segment_number: 9, offset: 12_288 };
        let looped = SegmentHeader { previous_end: cursor, ..header() };
        assert_eq!(SegmentHeader::decode(&looped.encode()), Err(PageError::Fields));
    }

    /// Changes only together with the page's version.
    #[test]
    fn the_encoding_is_pinned() {
        let hash = blake3::hash(&header().encode()).to_hex();
        assert_eq!(hash.as_str(), "77f58eff4c4e6cf684c32e05e5afb85c9409d3a372ad89354261a58919151e6b");
    }
}
