//! Pieces that several formats share: lineage and tip on disk, and the sealed 4096-byte page.

use block::{ChainHash, DATA_UNIT_BYTES, Epoch, Incarnation, Position, Sequence, SiteId, Tip};
use bytes::Bytes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::PageError;

/// Bytes of a segment header or checkpoint page, and the alignment of everything in the redo log.
pub const PAGE_BYTES: u64 = DATA_UNIT_BYTES;
pub(crate) const PAGE_LENGTH: usize = 4096;
const _: () = assert!(PAGE_LENGTH == 4096 && PAGE_BYTES == 4096);

/// A run of gap-free sequences: everything of a position but the sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// The epoch of the writes.
    pub epoch: Epoch,
    /// The site that was primary in that epoch.
    pub origin: SiteId,
    /// The primary's incarnation.
    pub incarnation: Incarnation,
}

impl Lineage {
    /// The position of `sequence` in this lineage.
    pub const fn at(self, sequence: Sequence) -> Position {
        Position { epoch: self.epoch, origin: self.origin, incarnation: self.incarnation, sequence }
    }
}

impl From<Position> for Lineage {
    fn from(position: Position) -> Self {
        Self { epoch: position.epoch, origin: position.origin, incarnation: position.incarnation }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct LineageLayout {
    epoch: U64,
    origin: [u8; 16],
    incarnation: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct TipLayout {
    lineage: LineageLayout,
    sequence: U64,
    chain: [u8; 32],
}

const _: () = assert!(size_of::<LineageLayout>() == 32);
const _: () = assert!(size_of::<TipLayout>() == 72);

impl From<Lineage> for LineageLayout {
    fn from(lineage: Lineage) -> Self {
        Self {
            epoch: U64::new(lineage.epoch.0),
            origin: lineage.origin.to_bytes(),
            incarnation: U64::new(lineage.incarnation.0),
        }
    }
}

impl From<LineageLayout> for Lineage {
    fn from(layout: LineageLayout) -> Self {
        Self {
            epoch: Epoch(layout.epoch.get()),
            origin: SiteId::from_bytes(layout.origin),
            incarnation: Incarnation(layout.incarnation.get()),
        }
    }
}

impl From<Tip> for TipLayout {
    fn from(tip: Tip) -> Self {
        Self {
            lineage: Lineage::from(tip.position).into(),
            sequence: U64::new(tip.position.sequence.0),
            chain: tip.chain.0,
        }
    }
}

impl From<TipLayout> for Tip {
    fn from(layout: TipLayout) -> Self {
        Self {
            position: Lineage::from(layout.lineage).at(Sequence(layout.sequence.get())),
            chain: ChainHash(layout.chain),
        }
    }
}

/// The first 16 bytes of every sealed page. The checksum is the CRC-32C of the page with this field zero.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PagePrefix {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    checksum: U32,
}

const _: () = assert!(size_of::<PagePrefix>() == 16);

/// Builds a page: prefix, `body`, zeros, checksum.
pub(crate) fn seal_page(magic: [u8; 8], version: u16, body: &[u8]) -> Bytes {
    let mut prefix =
        PagePrefix { magic, version: U16::new(version), reserved: U16::ZERO, checksum: U32::ZERO };
    let mut page = Vec::with_capacity(PAGE_LENGTH);
    page.extend_from_slice(prefix.as_bytes());
    page.extend_from_slice(body);
    assert!(page.len() <= PAGE_LENGTH, "the body fits the page");
    page.resize(PAGE_LENGTH, 0);
    prefix.checksum = U32::new(crc32c::crc32c(&page));
    let written = prefix.write_to_prefix(&mut page);
    assert!(written.is_ok(), "a page is longer than its prefix");
    page.into()
}

/// Verifies a page and gives its body, whose unused rest is zero.
pub(crate) fn open_page<Body>(magic: [u8; 8], version: u16, page: &[u8]) -> Result<Body, PageError>
where
    Body: FromBytes + KnownLayout + Immutable + Unaligned + Copy,
{
    if page.len() != PAGE_LENGTH {
        return Err(PageError::Length(page.len()));
    }
    let (prefix, rest) = PagePrefix::read_from_prefix(page).map_err(|_| PageError::Length(page.len()))?;
    if prefix.magic != magic {
        return Err(PageError::Magic);
    }
    let blank = PagePrefix { checksum: U32::ZERO, ..prefix };
    if crc32c::crc32c_append(crc32c::crc32c(blank.as_bytes()), rest) != prefix.checksum.get() {
        return Err(PageError::Checksum);
    }
    if prefix.version.get() != version {
        return Err(PageError::Version(prefix.version.get()));
    }
    let (body, padding) = Body::read_from_prefix(rest).map_err(|_| PageError::Length(page.len()))?;
    if prefix.reserved != U16::ZERO || !is_zero(padding) {
        return Err(PageError::Reserved);
    }
    Ok(body)
}

/// True if every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
