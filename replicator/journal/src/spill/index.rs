//! What a clean stop leaves of the journal: the chain of cuts, and where the records are that it lacks.

use block::{ChainHash, Sequence, Tip, WallTime};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{SpillSegment, SpillSpace};
use crate::layout::{LineageLayout, TipLayout};
use crate::{Lineage, PAGE_BYTES};

const MAGIC: [u8; 8] = *b"FSSPILL1";
/// Bounds what a damaged count can make a reader allocate; far above what any spill file holds.
const ENTRIES_MAX: u32 = 1 << 24;

/// The journal of a primary that stopped in order: good for the one start that goes on in the same incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpillIndex {
    /// The lineage of all that follows.
    pub lineage: Lineage,
    /// Bytes of the spill file.
    pub capacity: u64,
    /// The last sequence that was assigned.
    pub last: Sequence,
    /// The first sequence that folded into the dirty map, if one did: the segments end before it.
    pub folded_from: Option<Sequence>,
    /// The last sequence of a copy or of a folded record.
    pub commit_floor: Sequence,
    /// The last cut that the target acknowledged; the segments begin behind it.
    pub committed: Tip,
    /// The cuts that were sent after it, in order.
    pub sent: Vec<Tip>,
    /// The records that the target may lack, in order and without a gap.
    pub segments: Vec<SpillSegment>,
}

/// Why an index is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpillIndexError {
    /// Not an index, or one of another version.
    #[error("the magic differs")]
    Magic,
    /// Cut off or followed by something.
    #[error("the length differs")]
    Length,
    /// Damaged.
    #[error("the checksum differs")]
    Checksum,
    /// The fields contradict each other.
    #[error("the fields contradict each other")]
    Fields,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    lineage: LineageLayout,
    capacity: U64,
    last: U64,
    folded_from: U64,
    commit_floor: U64,
    committed: TipLayout,
    sent_count: U32,
    segment_count: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SegmentEntry {
    offset: U64,
    length: U64,
    first: U64,
    last: U64,
    time: U64,
    payload_bytes: U64,
    record_count: U32,
    reserved: U32,
    chain: [u8; 32],
}

const _: () = assert!(size_of::<Head>() == 152 && size_of::<SegmentEntry>() == 88);

impl SpillIndex {
    /// Whether the parts fit together: segments and cuts in order, within the file, without a gap.
    ///
    /// # Errors
    /// If they do not.
    pub fn check(&self) -> Result<(), SpillIndexError> {
        let in_lineage = |tip: &Tip| Lineage::from(tip.position) == self.lineage;
        let mut sent = self.committed;
        let rises = self.sent.iter().all(|tip| {
            let follows = tip.position.sequence >= sent.position.sequence;
            sent = *tip;
            follows && in_lineage(tip)
        });
        let mut covered = self.committed.position.sequence;
        let gapless = self.segments.iter().all(|segment| {
            let follows = segment.first == covered.next() && segment.last >= segment.first;
            covered = segment.last;
            follows && segment.offset.is_multiple_of(PAGE_BYTES) && segment.length.is_multiple_of(PAGE_BYTES)
        });
        let end = self.folded_from.map_or(self.last, |first| Sequence(first.0.saturating_sub(1)));
        let fits = in_lineage(&self.committed)
            && rises
            && gapless
            && covered == end
            && sent.position.sequence <= covered
            && end <= self.last
            && self.commit_floor <= self.last
            && SpillSpace::restore(self.capacity, &self.segments).is_some();
        if fits { Ok(()) } else { Err(SpillIndexError::Fields) }
    }

    /// The bytes.
    ///
    /// # Panics
    /// If the parts do not fit together: the caller made them.
    pub fn encode(&self) -> Vec<u8> {
        assert_eq!(self.check(), Ok(()), "the index suits the format");
        let count = |number: usize| U32::new(u32::try_from(number).unwrap_or(u32::MAX));
        let head = Head {
            magic: MAGIC,
            lineage: self.lineage.into(),
            capacity: U64::new(self.capacity),
            last: U64::new(self.last.0),
            folded_from: U64::new(self.folded_from.map_or(0, |first| first.0)),
            commit_floor: U64::new(self.commit_floor.0),
            committed: self.committed.into(),
            sent_count: count(self.sent.len()),
            segment_count: count(self.segments.len()),
        };
        let mut out = head.as_bytes().to_vec();
        for tip in &self.sent {
            out.extend_from_slice(TipLayout::from(*tip).as_bytes());
        }
        for segment in &self.segments {
            out.extend_from_slice(SegmentEntry::from(segment).as_bytes());
        }
        let checksum = crc32c::crc32c(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Verifies and reads what [`Self::encode`] gave.
    ///
    /// # Errors
    /// If anything about it is wrong; then nothing of the spill file may be used.
    pub fn decode(bytes: &[u8]) -> Result<Self, SpillIndexError> {
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(SpillIndexError::Length)?;
        let (head, rest) = Head::read_from_prefix(body).map_err(|_| SpillIndexError::Length)?;
        if head.magic != MAGIC {
            return Err(SpillIndexError::Magic);
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(SpillIndexError::Checksum);
        }
        let (sent, rest) = entries::<TipLayout>(rest, head.sent_count)?;
        let (segments, rest) = entries::<SegmentEntry>(rest, head.segment_count)?;
        if !rest.is_empty() {
            return Err(SpillIndexError::Length);
        }
        if segments.iter().any(|entry| entry.reserved != U32::ZERO) {
            return Err(SpillIndexError::Fields);
        }
        let folded_from = Sequence(head.folded_from.get());
        let index = Self {
            lineage: head.lineage.into(),
            capacity: head.capacity.get(),
            last: Sequence(head.last.get()),
            folded_from: (folded_from.0 > 0).then_some(folded_from),
            commit_floor: Sequence(head.commit_floor.get()),
            committed: head.committed.into(),
            sent: sent.iter().map(|tip| Tip::from(*tip)).collect(),
            segments: segments.iter().map(SpillSegment::from).collect(),
        };
        index.check()?;
        Ok(index)
    }
}

/// The next `count` entries, and what follows.
fn entries<Entry>(bytes: &[u8], count: U32) -> Result<(&[Entry], &[u8]), SpillIndexError>
where
    Entry: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let count = Some(count.get()).filter(|count| *count <= ENTRIES_MAX);
    let count = count.and_then(|count| usize::try_from(count).ok()).ok_or(SpillIndexError::Length)?;
    <[Entry]>::ref_from_prefix_with_elems(bytes, count).map_err(|_| SpillIndexError::Length)
}

impl From<&SpillSegment> for SegmentEntry {
    fn from(segment: &SpillSegment) -> Self {
        Self {
            offset: U64::new(segment.offset),
            length: U64::new(segment.length),
            first: U64::new(segment.first.0),
            last: U64::new(segment.last.0),
            time: U64::new(segment.time.0),
            payload_bytes: U64::new(segment.payload_bytes),
            record_count: U32::new(segment.record_count),
            reserved: U32::ZERO,
            chain: segment.chain.0,
        }
    }
}

impl From<&SegmentEntry> for SpillSegment {
    fn from(entry: &SegmentEntry) -> Self {
        Self {
            offset: entry.offset.get(),
            length: entry.length.get(),
            first: Sequence(entry.first.get()),
            last: Sequence(entry.last.get()),
            time: WallTime(entry.time.get()),
            payload_bytes: entry.payload_bytes.get(),
            record_count: entry.record_count.get(),
            chain: ChainHash(entry.chain),
        }
    }
}
