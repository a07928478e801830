//! The cut: a batch of records that commits atomically (docs/formats/journal.md, "Cut").
//!
//! A cut that decodes is verified whole: header checksum, chain hash, every payload's checksum, bounds,
//! alignment, order. The encoding is canonical: encoding what was decoded gives the same bytes.

use block::{ChainHash, DATA_UNIT_BYTES, MirrorId, Sequence, Tip, WallTime};
use bytes::Bytes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{LineageLayout, TipLayout, is_zero};
use crate::record::{RECORD_HEADER_BYTES, RecordHeader};
use crate::{CUT_BYTES_MAX, CUT_HEADER_BYTES, CutError, Lineage, RECORDS_MAX, Record, RecordFault};

const MAGIC: [u8; 8] = *b"FSCUT\r\n\x1a";
const VERSION: u16 = 1;
const COMMIT: u16 = 1;
const INITIAL: u16 = 2;
const HEADER_ONLY: u16 = 4;
/// Header and table of the largest cut, padded.
pub(crate) const HEAD_BYTES_MAX: u64 = 49 * DATA_UNIT_BYTES;
const _: () = assert!(head_length(RECORDS_MAX) == 49 * 4096);

/// What a cut says of itself beside its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutMeta {
    /// The mirror whose cut it is.
    pub mirror: MirrorId,
    /// The lineage of its sequences.
    pub lineage: Lineage,
    /// The first sequence covered, at least 1. In the previous tip's lineage it follows the tip.
    pub first: Sequence,
    /// The last sequence covered; `first - 1` for a heartbeat, which covers none and has no records.
    pub last: Sequence,
    /// The cut that this one follows.
    pub previous: Tip,
    /// The resync pass; 0 is none.
    pub pass: u64,
    /// The primary's clock when the cut was closed.
    pub time: WallTime,
    /// The target's own latest clock stamp as the primary heard it; 0 is none.
    pub echo: WallTime,
    /// Commits itself and all staged cuts before it. Without it the cut is only staged, and has a pass.
    pub commit: bool,
    /// Part of the initial copy: applied straight to home. Implies `commit`.
    pub initial: bool,
}

/// An encoded cut: `head` and then `payloads` are the bytes of wire and redo log.
#[derive(Clone, Debug)]
pub struct EncodedCut {
    /// The cut's own tip, to be the next one's `previous`.
    pub tip: Tip,
    /// Header and record table, padded to a multiple of 4096 bytes.
    pub head: Bytes,
    /// The payloads in record order, shared with the records; each a multiple of 4096 bytes.
    pub payloads: Vec<Bytes>,
    /// Bytes of head and payloads.
    pub total_bytes: u64,
}

/// A decoded, verified cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What it says of itself.
    pub meta: CutMeta,
    /// Its own tip.
    pub tip: Tip,
    /// Its records; payloads are slices of the input, or empty if `header_only`.
    pub records: Vec<Record>,
    /// The cut was stored without payloads: it is applied at home already and cannot be applied from here.
    pub header_only: bool,
}

/// The length of a cut, from its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutSize {
    /// Header, record table and padding.
    pub head_bytes: u64,
    /// All payloads that follow; 0 for a cut stored without them.
    pub payload_bytes: u64,
}

impl CutSize {
    /// Bytes of the whole cut: at most [`CUT_BYTES_MAX`].
    pub const fn total_bytes(self) -> u64 {
        self.head_bytes + self.payload_bytes
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CutHeader {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    record_count: U32,
    head_bytes: U32,
    reserved: U32,
    payload_bytes: U64,
    mirror: [u8; 16],
    lineage: LineageLayout,
    first: U64,
    last: U64,
    previous: TipLayout,
    pass: U64,
    time: U64,
    echo: U64,
    chain: [u8; 32],
    header_crc: U32,
    reserved_tail: [u8; 28],
}

const _: () = assert!(size_of::<CutHeader>() == CUT_HEADER_BYTES);

pub(crate) const fn head_length(record_count: usize) -> usize {
    (CUT_HEADER_BYTES + record_count * RECORD_HEADER_BYTES).next_multiple_of(4096)
}

impl CutMeta {
    fn flags(&self) -> u16 {
        (if self.commit { COMMIT } else { 0 }) | (if self.initial { INITIAL } else { 0 })
    }

    /// Whether the fields suit each other.
    ///
    /// # Errors
    /// Says which do not.
    pub fn check(&self) -> Result<(), CutError> {
        if self.initial && !self.commit {
            return Err(CutError::Flags(self.flags()));
        }
        if !self.commit && self.pass == 0 {
            return Err(CutError::Pass);
        }
        let before = self.first.0.checked_sub(1).ok_or(CutError::Sequences)?;
        let gap = self.lineage == Lineage::from(self.previous.position)
            && before != self.previous.position.sequence.0;
        if gap || self.last.0 < before {
            return Err(CutError::Sequences);
        }
        Ok(())
    }

    fn tip(&self, chain: ChainHash) -> Tip {
        Tip { position: self.lineage.at(self.last), chain }
    }

    /// A record at `sequence` may follow one at `before` in this cut.
    fn admits(&self, sequence: Sequence, before: Sequence) -> Result<(), RecordFault> {
        if (self.first..=self.last).contains(&sequence) && before <= sequence {
            Ok(())
        } else {
            Err(RecordFault::Sequence(sequence))
        }
    }
}

impl CutHeader {
    fn new(meta: &CutMeta, record_count: usize, payload_bytes: u64) -> Self {
        let narrow = |number: usize| U32::new(u32::try_from(number).unwrap_or(u32::MAX));
        Self {
            magic: MAGIC,
            version: U16::new(VERSION),
            flags: U16::new(meta.flags()),
            record_count: narrow(record_count),
            head_bytes: narrow(head_length(record_count)),
            reserved: U32::ZERO,
            payload_bytes: U64::new(payload_bytes),
            mirror: meta.mirror.to_bytes(),
            lineage: meta.lineage.into(),
            first: U64::new(meta.first.0),
            last: U64::new(meta.last.0),
            previous: meta.previous.into(),
            pass: U64::new(meta.pass),
            time: U64::new(meta.time.0),
            echo: U64::new(meta.echo.0),
            chain: [0; 32],
            header_crc: U32::ZERO,
            reserved_tail: [0; 28],
        }
    }

    /// The header at the start of `bytes`, with sizes within bounds; its checksum is not verified yet.
    fn read(bytes: &[u8]) -> Result<Self, CutError> {
        let (header, _) = Self::read_from_prefix(bytes)
            .map_err(|_| CutError::Length { wanted: 256, found: wide(bytes.len()) })?;
        if header.magic != MAGIC {
            return Err(CutError::Magic);
        }
        if header.version.get() != VERSION {
            return Err(CutError::Version(header.version.get()));
        }
        let flags = header.flags.get();
        let known = flags & !(COMMIT | INITIAL | HEADER_ONLY) == 0;
        if !known || (header.is_header_only() && flags & INITIAL == 0) {
            return Err(CutError::Flags(flags));
        }
        if header.reserved != U32::ZERO || !is_zero(&header.reserved_tail) {
            return Err(CutError::Reserved);
        }
        let head = wide(head_length(header.records()?));
        let payload = header.payload_bytes.get();
        if u64::from(header.head_bytes.get()) != head
            || payload > CUT_BYTES_MAX - head
            || !payload.is_multiple_of(DATA_UNIT_BYTES)
        {
            return Err(CutError::Bounds);
        }
        Ok(header)
    }

    fn records(&self) -> Result<usize, CutError> {
        usize::try_from(self.record_count.get())
            .ok()
            .filter(|count| *count <= RECORDS_MAX)
            .ok_or(CutError::Bounds)
    }

    fn is_header_only(&self) -> bool {
        self.flags.get() & HEADER_ONLY != 0
    }

    fn size(&self) -> CutSize {
        CutSize {
            head_bytes: u64::from(self.head_bytes.get()),
            payload_bytes: if self.is_header_only() { 0 } else { self.payload_bytes.get() },
        }
    }

    /// BLAKE3 over the header, without chain, checksum and `HEADER_ONLY`, and the record table.
    fn chain_over(&self, table: &[u8]) -> [u8; 32] {
        let blank = Self {
            flags: U16::new(self.flags.get() & !HEADER_ONLY),
            chain: [0; 32],
            header_crc: U32::ZERO,
            ..*self
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(blank.as_bytes()).update(table);
        hasher.finalize().into()
    }

    /// CRC-32C over the header, without the checksum, and the record table.
    fn checksum_over(&self, table: &[u8]) -> U32 {
        let blank = Self { header_crc: U32::ZERO, ..*self };
        U32::new(crc32c::crc32c_append(crc32c::crc32c(blank.as_bytes()), table))
    }

    fn meta(&self) -> CutMeta {
        CutMeta {
            mirror: MirrorId::from_bytes(self.mirror),
            lineage: self.lineage.into(),
            first: Sequence(self.first.get()),
            last: Sequence(self.last.get()),
            previous: self.previous.into(),
            pass: self.pass.get(),
            time: WallTime(self.time.get()),
            echo: WallTime(self.echo.get()),
            commit: self.flags.get() & COMMIT != 0,
            initial: self.flags.get() & INITIAL != 0,
        }
    }
}

fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// Encodes a cut. Payloads are shared, not copied.
///
/// # Panics
/// If meta or records break the format's rules ([`CutMeta::check`], [`Record::check`], sequences within
/// `first..=last` and not decreasing, at most [`RECORDS_MAX`] records and [`CUT_BYTES_MAX`] bytes): the caller
/// made them.
pub fn encode<'a>(meta: &CutMeta, records: impl IntoIterator<Item = &'a Record>) -> EncodedCut {
    assert_eq!(meta.check(), Ok(()), "the cut's meta suits the format");
    let mut table = Vec::new();
    let mut payloads = Vec::new();
    let mut before = Sequence(0);
    let mut record_count = 0;
    let mut payload_bytes = 0;
    for record in records {
        assert_eq!(record.check(), Ok(()), "the record suits the format");
        assert_eq!(meta.admits(record.sequence, before), Ok(()), "records in order");
        before = record.sequence;
        record_count += 1;
        table.extend_from_slice(RecordHeader::new(record).as_bytes());
        if !record.payload.is_empty() {
            payload_bytes += record.payload_bytes();
            payloads.push(record.payload.clone());
        }
    }
    assert!(record_count <= RECORDS_MAX, "the caller bounds a cut's records");
    let total_bytes = wide(head_length(record_count)) + payload_bytes;
    assert!(total_bytes <= CUT_BYTES_MAX, "the caller bounds a cut's bytes");
    let mut header = CutHeader::new(meta, record_count, payload_bytes);
    header.chain = header.chain_over(&table);
    header.header_crc = header.checksum_over(&table);
    EncodedCut {
        tip: meta.tip(ChainHash(header.chain)),
        head: assemble_head(&header, &table),
        payloads,
        total_bytes,
    }
}

fn assemble_head(header: &CutHeader, table: &[u8]) -> Bytes {
    let unpadded = CUT_HEADER_BYTES + table.len();
    let padded = unpadded.next_multiple_of(4096);
    let mut head = Vec::with_capacity(padded);
    head.extend_from_slice(header.as_bytes());
    head.extend_from_slice(table);
    head.resize(padded, 0);
    head.into()
}

/// Reads a cut's length from its first [`CUT_HEADER_BYTES`] bytes. The checksum covers the table too and is not
/// verified here: until [`decode`] accepts the whole, the answer bounds a read and proves nothing.
///
/// # Errors
/// If it is no header of a cut, or its sizes are out of bounds.
pub fn peek(header: &[u8]) -> Result<CutSize, CutError> {
    Ok(CutHeader::read(header)?.size())
}

/// Splits `head` into the verified header and the record table.
fn open_head(head: &[u8]) -> Result<(CutHeader, &[RecordHeader]), CutError> {
    let header = CutHeader::read(head)?;
    let length = CutError::Length { wanted: header.size().head_bytes, found: wide(head.len()) };
    let after = head.get(CUT_HEADER_BYTES..).ok_or(length)?;
    let (table, padding) =
        <[RecordHeader]>::ref_from_prefix_with_elems(after, header.records()?).map_err(|_| length)?;
    if header.checksum_over(table.as_bytes()) != header.header_crc {
        return Err(CutError::HeaderChecksum);
    }
    if header.chain_over(table.as_bytes()) != header.chain {
        return Err(CutError::Chain);
    }
    if !is_zero(padding) {
        return Err(CutError::Reserved);
    }
    Ok((header, table))
}

/// Decodes and verifies a whole cut. Payloads are slices of `bytes`.
///
/// It does not know what the cut should follow: the caller compares `meta.mirror` and `meta.previous`.
///
/// # Errors
/// If anything about it is wrong; then nothing of it may be used.
pub fn decode(bytes: &Bytes) -> Result<Cut, CutError> {
    let size = peek(bytes)?;
    let found = wide(bytes.len());
    let length = CutError::Length { wanted: size.total_bytes(), found };
    if found != size.total_bytes() {
        return Err(length);
    }
    let head_length = usize::try_from(size.head_bytes).map_err(|_| length)?;
    let mut payloads = bytes.clone();
    let head = payloads.split_to(head_length);
    let (header, table) = open_head(&head)?;
    let meta = header.meta();
    meta.check()?;
    let total: u64 = table.iter().map(RecordHeader::payload_bytes).sum();
    if total != header.payload_bytes.get() {
        return Err(CutError::Bounds);
    }
    let header_only = header.is_header_only();
    let mut before = Sequence(0);
    let mut records = Vec::with_capacity(table.len());
    for (index, entry) in table.iter().enumerate() {
        let source = if header_only { None } else { Some(&mut payloads) };
        let record = entry
            .open(source)
            .and_then(|record| meta.admits(record.sequence, before).map(|()| record))
            .map_err(|fault| CutError::Record { index, fault })?;
        before = record.sequence;
        records.push(record);
    }
    Ok(Cut { tip: meta.tip(ChainHash(header.chain)), meta, records, header_only })
}

/// The head of an `INITIAL` cut as it stands in the redo log: without payloads, which are at home already.
/// `cut` is the whole cut or just its head. The tip stays the same.
///
/// # Errors
/// If the head is bad or the cut is not an initial one.
pub fn header_only(cut: &Bytes) -> Result<Bytes, CutError> {
    let size = peek(cut)?;
    let length = CutError::Length { wanted: size.head_bytes, found: wide(cut.len()) };
    let head_length = usize::try_from(size.head_bytes).map_err(|_| length)?;
    let (mut header, table) = open_head(cut.get(..head_length).ok_or(length)?)?;
    let flags = header.flags.get();
    if flags & INITIAL == 0 {
        return Err(CutError::Flags(flags));
    }
    header.flags = U16::new(flags | HEADER_ONLY);
    header.header_crc = header.checksum_over(table.as_bytes());
    Ok(assemble_head(&header, table.as_bytes()))
}

#[cfg(test)]
mod tests;
