//! The redo log's checkpoint: from where a recovery scans (docs/formats/journal.md, "Checkpoint").

use block::{MirrorId, Tip};
use bytes::Bytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{TipLayout, is_zero, open_page, seal_page};
use crate::{Cursor, PAGE_BYTES, PageError, RedoConfig};

const MAGIC: [u8; 8] = *b"FSCHKPNT";
const VERSION: u16 = 2;
/// The version before the home limit: nothing is known of how far home was written.
const VERSION_1: u16 = 1;
const DISCARDED: u32 = 1;

/// What is applied, and where the log continues behind it.
///
/// It lives in two page slots that are written in turn; a checkpoint counts once its slot is synced. Redo is
/// released only after the checkpoint that passes it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The mirror that the log belongs to.
    pub mirror: MirrorId,
    /// Rises by one with each checkpoint; chooses the slot.
    pub generation: u64,
    /// The shape of the log on disk.
    pub config: RedoConfig,
    /// The last cut whose effects are durable at home.
    pub applied: Tip,
    /// Where the log continues after `applied`; nothing of an earlier segment is wanted any more.
    pub scan_start: Cursor,
    /// No cut that ends behind it was ever written to home; [`Cursor::END`] says that any may have been.
    pub limit: Cursor,
    /// A rewind discarded committed cuts when this log was emptied.
    pub discarded: bool,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CheckpointBody {
    mirror: [u8; 16],
    generation: U64,
    segment_bytes: U64,
    file_count: U32,
    reserved: U32,
    scan_number: U64,
    scan_offset: U64,
    applied: TipLayout,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CheckpointBody2 {
    first: CheckpointBody,
    limit_number: U64,
    limit_offset: U64,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<CheckpointBody>() == 128);
const _: () = assert!(size_of::<CheckpointBody2>() == 152);

impl Checkpoint {
    /// The checkpoint of a new, empty log. At creation it is written to its slot, and its [`Self::next`] to the
    /// other, before the first append: so a log in use never has an empty slot.
    pub const fn first(mirror: MirrorId, config: RedoConfig, applied: Tip) -> Self {
        let (scan_start, limit) = (Cursor::START, Cursor::END);
        Self { mirror, generation: 0, config, applied, scan_start, limit, discarded: false }
    }

    /// The checkpoint after this one: `applied` is durable at home and the log continues at `scan_start`.
    #[must_use]
    pub fn next(&self, applied: Tip, scan_start: Cursor) -> Self {
        let limit = self.limit.max(scan_start);
        Self { generation: self.generation + 1, applied, scan_start, limit, discarded: false, ..*self }
    }

    /// The same with another home limit, which is never before the scan start.
    #[must_use]
    pub fn with_limit(self, limit: Cursor) -> Self {
        Self { limit: limit.max(self.scan_start), ..self }
    }

    /// The same, noting that committed cuts were discarded.
    #[must_use]
    pub const fn discarding(self) -> Self {
        Self { discarded: true, ..self }
    }

    /// The slot that this checkpoint is written to: 0 or 1.
    pub const fn slot(&self) -> u64 {
        self.generation % 2
    }

    /// The page.
    pub fn encode(&self) -> Bytes {
        let body = CheckpointBody {
            mirror: self.mirror.to_bytes(),
            generation: U64::new(self.generation),
            segment_bytes: U64::new(self.config.segment_bytes()),
            file_count: U32::new(self.config.file_count()),
            reserved: U32::ZERO,
            scan_number: U64::new(self.scan_start.segment_number),
            scan_offset: U64::new(self.scan_start.offset),
            applied: self.applied.into(),
        };
        let body = CheckpointBody2 {
            first: body,
            limit_number: U64::new(self.limit.segment_number),
            limit_offset: U64::new(self.limit.offset),
            flags: U32::new(if self.discarded { DISCARDED } else { 0 }),
            reserved: U32::ZERO,
        };
        seal_page(MAGIC, VERSION, body.as_bytes())
    }

    /// Verifies and reads a page.
    ///
    /// # Errors
    /// If the page is torn, damaged, of another format, or contradicts itself.
    pub fn decode(page: &[u8]) -> Result<Self, PageError> {
        let unlimited = |first| CheckpointBody2 {
            first,
            limit_number: U64::new(u64::MAX),
            limit_offset: U64::new(u64::MAX),
            flags: U32::ZERO,
            reserved: U32::ZERO,
        };
        let whole: CheckpointBody2 = match open_page(MAGIC, VERSION, page) {
            Err(PageError::Version(VERSION_1)) => open_page(MAGIC, VERSION_1, page).map(unlimited)?,
            read => read?,
        };
        let body = whole.first;
        if body.reserved != U32::ZERO || whole.reserved != U32::ZERO || whole.flags.get() & !DISCARDED != 0 {
            return Err(PageError::Reserved);
        }
        let config = RedoConfig::new(body.file_count.get(), body.segment_bytes.get());
        let checkpoint = Self {
            mirror: MirrorId::from_bytes(body.mirror),
            generation: body.generation.get(),
            config: config.map_err(|_| PageError::Fields)?,
            applied: body.applied.into(),
            scan_start: Cursor { segment_number: body.scan_number.get(), offset: body.scan_offset.get() },
            limit: Cursor { segment_number: whole.limit_number.get(), offset: whole.limit_offset.get() },
            discarded: whole.flags.get() & DISCARDED != 0,
        };
        let offset = checkpoint.scan_start.offset;
        if !offset.is_multiple_of(PAGE_BYTES)
            || offset > checkpoint.config.segment_bytes()
            // A segment's header page is no place for a cut; offset 0 is the end of a log without segments.
            || offset == PAGE_BYTES
            || checkpoint.generation == u64::MAX
            || checkpoint.limit < checkpoint.scan_start
        {
            return Err(PageError::Fields);
        }
        Ok(checkpoint)
    }

    /// The newer of the checkpoints in the two slots; a torn or damaged slot leaves the other one. `None` if both
    /// are zeros: no log was ever made here.
    ///
    /// # Errors
    /// The fault of slot 0, if neither slot holds a checkpoint.
    pub fn newest(slot_0: &[u8], slot_1: &[u8]) -> Result<Option<Self>, PageError> {
        if is_zero(slot_0) && is_zero(slot_1) {
            return Ok(None);
        }
        let read = |page: &[u8], slot: u64| {
            let checkpoint = Self::decode(page)?;
            // A page in the wrong slot was misdirected and proves nothing.
            if checkpoint.slot() == slot { Ok(checkpoint) } else { Err(PageError::Fields) }
        };
        match (read(slot_0, 0), read(slot_1, 1)) {
            (Ok(even), Ok(odd)) if even.generation < odd.generation => Ok(Some(odd)),
            (Ok(even), _) => Ok(Some(even)),
            (Err(_), Ok(odd)) => Ok(Some(odd)),
            (Err(fault), Err(_)) => Err(fault),
        }
    }
}

#[cfg(test)]
mod tests {
    use block::{ChainHash, Tip};

    use super::*;

    fn pages() -> (Checkpoint, Checkpoint) {
        let config = RedoConfig::new(4, 1 << 16).unwrap();
        let first = Checkpoint::first(MirrorId::from_bytes([7; 16]), config, Tip::default());
        let tip = Tip { chain: ChainHash([9; 32]), ..Tip::default() };
        let cursor = Cursor { segment_number: 3, offset: 8192 };
        (first, first.next(tip, cursor))
    }

    #[test]
    fn newest_survives_a_torn_slot_and_reports_two() {
        let (first, second) = pages();
        let (even, odd) = (first.encode(), second.encode());
        assert_eq!(Checkpoint::newest(&even, &odd).unwrap(), Some(second));
        for sectors in 1..8 {
            let mut torn = first.next(second.applied, Cursor::START).encode().to_vec();
            torn[512 * sectors..].fill(0xa5);
            assert_eq!(Checkpoint::newest(&even, &torn).unwrap(), Some(first));
            assert!(Checkpoint::newest(&torn, &torn).is_err());
        }
        assert_eq!(Checkpoint::newest(&[0; 4096], &[0; 4096]).unwrap(), None);
        assert_eq!(Checkpoint::newest(&[0; 4096], &odd).unwrap(), Some(second));
        assert!(Checkpoint::newest(&odd, &[0; 4096]).is_err(), "wrong slot");
        assert!(Checkpoint::newest(&[], &[1]).is_err());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let page = pages().1.encode();
        for bit in (0..page.len() * 8).step_by(7) {
            let mut damaged = page.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Checkpoint::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    /// A page as version 1 wrote it.
    fn version_1(checkpoint: &Checkpoint) -> Vec<u8> {
        let mut page = checkpoint.encode().to_vec();
        page[8] = 1;
        page[144..168].fill(0);
        page[12..16].fill(0);
        let checksum = crc32c::crc32c(&page);
        page[12..16].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    #[test]
    fn a_page_of_version_1_is_read_and_says_nothing_of_home() {
        let (_, second) = pages();
        let limited = second.with_limit(Cursor { segment_number: 3, offset: 16_384 }).discarding();
        assert_eq!(Checkpoint::decode(&limited.encode()).unwrap(), limited);
        let page = version_1(&limited);
        // What version 1 wrote, byte for byte.
        let golden = blake3::hash(&page).to_hex();
        assert_eq!(golden.as_str(), "e51671daae9eb8e62308bd240136754120e62711c43cfe94aa13469989dcb818");
        let read = Checkpoint::decode(&page).unwrap();
        assert_eq!(read, Checkpoint { limit: Cursor::END, discarded: false, ..limited });
    }

    #[test]
    fn the_limit_never_lies_before_the_scan_start() {
        let (first, _) = pages();
        let tip = Tip::default();
        let cursor = |segment_number| Cursor { segment_number, offset: 8192 };
        let limited = first.with_limit(cursor(2));
        assert_eq!(limited.next(tip, cursor(1)).limit, cursor(2));
        assert_eq!(limited.next(tip, cursor(3)).limit, cursor(3));
        let wrong = Checkpoint { scan_start: cursor(3), ..limited };
        assert!(Checkpoint::decode(&wrong.encode()).is_err());
    }

    /// Changes only together with the page's version.
    #[test]
    fn the_encoding_is_pinned() {
        let hash = blake3::hash(&pages().1.encode()).to_hex();
        assert_eq!(hash.as_str(), "2d19f983037a15579c39c5bff9c1f6d890591735084dabfb66404490adb14fdd");
    }
}
