//! One change of one volume, in memory and in a cut's record table (docs/formats/journal.md, "Record").

use block::{ByteRange, SECTOR_BYTES, Sequence, VolumeIndex};
use bytes::Bytes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::RecordFault;

/// What a record does at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKind {
    /// A host's write: the payload is the ciphertext of the range's whole data units.
    Write,
    /// Blocks read at the primary for a copy or resync; like a write.
    Copy,
    /// Zeros were written: the range's sectors are raw zeros.
    Zero,
    /// The home range was given up by ZERO_RANGE; it reads as zeros.
    Trim,
    /// A copied range that is zero at the primary.
    CopyZero,
    /// The volume's size is now the range's length (its offset is 0).
    Resize,
    /// The target drops whatever this sequence did.
    Void,
    /// Blocks that the primary cannot read: the target keeps its old content and lists them.
    Bad,
    /// No change; marks a point in the order.
    Marker,
}

impl RecordKind {
    /// True if a record of this kind carries its range's bytes.
    pub const fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::Copy)
    }

    const fn code(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::Copy => 2,
            Self::Zero => 3,
            Self::Trim => 4,
            Self::CopyZero => 5,
            Self::Resize => 6,
            Self::Void => 7,
            Self::Bad => 8,
            Self::Marker => 9,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Write,
            2 => Self::Copy,
            3 => Self::Zero,
            4 => Self::Trim,
            5 => Self::CopyZero,
            6 => Self::Resize,
            7 => Self::Void,
            8 => Self::Bad,
            9 => Self::Marker,
            _ => return None,
        })
    }

    fn allows(self, range: ByteRange) -> bool {
        let sectors =
            range.offset().is_multiple_of(SECTOR_BYTES) && range.length().is_multiple_of(SECTOR_BYTES);
        match self {
            Self::Write | Self::Copy | Self::CopyZero | Self::Bad => {
                range.is_unit_aligned() && !range.is_empty()
            }
            Self::Zero | Self::Trim => sectors && !range.is_empty(),
            Self::Resize => range.offset() == 0,
            Self::Void | Self::Marker => range == ByteRange::default(),
        }
    }
}

/// One change of one volume at one sequence.
///
/// Ranges: `Write`, `Copy`, `CopyZero` and `Bad` cover whole data units, `Zero` and `Trim` whole sectors, none of
/// them empty; `Resize` is `0..new size`; `Void` and `Marker` have the default (empty) range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The write's number in its group.
    pub sequence: Sequence,
    /// Which volume of the group.
    pub volume: VolumeIndex,
    /// What is done.
    pub kind: RecordKind,
    /// Where.
    pub range: ByteRange,
    /// Ciphertext, as long as the range, for `Write` and `Copy`; else empty.
    pub payload: Bytes,
}

impl Record {
    /// The record that makes the target drop `sequence`.
    pub fn void(sequence: Sequence, volume: VolumeIndex) -> Self {
        Self { sequence, volume, kind: RecordKind::Void, range: ByteRange::default(), payload: Bytes::new() }
    }

    /// Bytes of the payload.
    pub fn payload_bytes(&self) -> u64 {
        u64::try_from(self.payload.len()).unwrap_or(u64::MAX)
    }

    /// Whether range and payload suit the kind.
    ///
    /// # Errors
    /// Says what does not.
    pub fn check(&self) -> Result<(), RecordFault> {
        if !self.kind.allows(self.range) {
            return Err(RecordFault::Range);
        }
        let wanted = if self.kind.has_payload() { self.range.length() } else { 0 };
        if self.payload_bytes() != wanted || wanted > crate::CUT_PAYLOAD_BYTES_MAX {
            return Err(RecordFault::Payload);
        }
        Ok(())
    }
}

/// A record in the table; its payload follows the head of the cut.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RecordHeader {
    sequence: U64,
    offset: U64,
    length: U64,
    volume: U16,
    kind: u8,
    flags: u8,
    payload_crc: U32,
    payload_bytes: U32,
    reserved: [u8; 12],
}

pub(crate) const RECORD_HEADER_BYTES: usize = 48;
const _: () = assert!(size_of::<RecordHeader>() == RECORD_HEADER_BYTES);

impl RecordHeader {
    /// The header of a record that passed [`Record::check`].
    pub(crate) fn new(record: &Record) -> Self {
        let payload_bytes = u32::try_from(record.payload.len());
        assert!(payload_bytes.is_ok(), "a checked payload is shorter than a cut");
        Self {
            sequence: U64::new(record.sequence.0),
            offset: U64::new(record.range.offset()),
            length: U64::new(record.range.length()),
            volume: U16::new(record.volume.0),
            kind: record.kind.code(),
            flags: 0,
            payload_crc: U32::new(crc32c::crc32c(&record.payload)),
            payload_bytes: U32::new(payload_bytes.unwrap_or_default()),
            reserved: [0; 12],
        }
    }

    pub(crate) fn payload_bytes(&self) -> u64 {
        u64::from(self.payload_bytes.get())
    }

    /// The record, its payload taken from `payloads`: the cut's payload area from this record's payload on.
    /// `None` stands for a cut that is stored without payloads.
    pub(crate) fn open(&self, payloads: Option<&mut Bytes>) -> Result<Record, RecordFault> {
        let kind = RecordKind::from_code(self.kind).ok_or(RecordFault::Kind(self.kind))?;
        if self.flags != 0 || self.reserved != [0; 12] {
            return Err(RecordFault::Reserved);
        }
        let range = ByteRange::new(self.offset.get(), self.length.get())
            .filter(|range| kind.allows(*range))
            .ok_or(RecordFault::Range)?;
        let wanted = if kind.has_payload() { range.length() } else { 0 };
        let count = usize::try_from(self.payload_bytes.get()).map_err(|_| RecordFault::Payload)?;
        if self.payload_bytes() != wanted || (wanted == 0 && self.payload_crc != U32::ZERO) {
            return Err(RecordFault::Payload);
        }
        let payload = match payloads {
            Some(payloads) if payloads.len() >= count => payloads.split_to(count),
            Some(_) => return Err(RecordFault::Payload),
            None => Bytes::new(),
        };
        if payload.len() == count && crc32c::crc32c(&payload) != self.payload_crc.get() {
            return Err(RecordFault::PayloadChecksum);
        }
        Ok(Record {
            sequence: Sequence(self.sequence.get()),
            volume: VolumeIndex(self.volume.get()),
            kind,
            range,
            payload,
        })
    }
}
