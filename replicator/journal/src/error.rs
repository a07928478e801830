//! Why bytes from the wire or the disk were refused.

use block::Sequence;

/// What is wrong with one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// The kind is none that this version knows.
    #[error("unknown kind {0}")]
    Kind(u8),
    /// The range wraps, is empty, is not aligned as its kind demands, or should be absent.
    #[error("the range does not suit the kind")]
    Range,
    /// There is a payload where the kind has none, or it is not as long as the range.
    #[error("the payload's length does not suit the kind")]
    Payload,
    /// The payload's CRC-32C differs.
    #[error("the payload's checksum differs")]
    PayloadChecksum,
    /// The sequence lies outside the cut or below its predecessor's.
    #[error("sequence {0} is out of order")]
    Sequence(Sequence),
    /// A reserved field is not zero.
    #[error("a reserved field is not zero")]
    Reserved,
}

/// Why a cut was refused. Nothing of a refused cut may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// Not a cut at all: zeros, noise or a foreign format.
    #[error("not a cut: the magic differs")]
    Magic,
    /// A cut of a version that this build does not read.
    #[error("cut version {0} is not supported")]
    Version(u16),
    /// Unknown flags, or flags that contradict each other.
    #[error("the cut's flags {0:#06x} are not allowed")]
    Flags(u16),
    /// A reserved field or padding is not zero.
    #[error("a reserved field of the cut is not zero")]
    Reserved,
    /// More records or bytes than any cut may have, or sizes that contradict each other.
    #[error("the cut's sizes are out of bounds")]
    Bounds,
    /// The input is not exactly as long as the header says.
    #[error("the cut has {found} bytes instead of {wanted}")]
    Length {
        /// The length that the header gives.
        wanted: u64,
        /// The length of the input.
        found: u64,
    },
    /// The header's and record table's CRC-32C differs.
    #[error("the header's checksum differs")]
    HeaderChecksum,
    /// The chain hash is not that of the header and the record table.
    #[error("the chain hash differs")]
    Chain,
    /// First, last and previous position do not fit together.
    #[error("the cut's sequences do not follow the previous tip")]
    Sequences,
    /// A staged cut that belongs to no resync pass.
    #[error("a staged cut without a pass")]
    Pass,
    /// A record is bad.
    #[error("record {index}: {fault}")]
    Record {
        /// The record's place in the table, from 0.
        index: usize,
        /// What is wrong with it.
        fault: RecordFault,
    },
}

/// Why a segment header or checkpoint page was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The input is not one page.
    #[error("the page has {0} bytes")]
    Length(usize),
    /// Another format, or never written.
    #[error("the page's magic differs")]
    Magic,
    /// A version that this build does not read.
    #[error("page version {0} is not supported")]
    Version(u16),
    /// The checksum differs: torn or damaged.
    #[error("the page's checksum differs")]
    Checksum,
    /// A reserved field is not zero.
    #[error("a reserved field of the page is not zero")]
    Reserved,
    /// The fields contradict each other or the place where the page was found.
    #[error("the page's fields contradict each other")]
    Fields,
}
