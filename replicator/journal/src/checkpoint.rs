//! The redo log's checkpoint: from where a recovery scans (docs/formats/journal.md, "Checkpoint").

use block::{MirrorId, Tip};
use bytes::Bytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{TipLayout, is_zero, open_page, seal_page};
use crate::{Cursor, PAGE_BYTES, PageError, RedoConfig};

const MAGIC: [u8; 8] = *b"FSCHKPNT";

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

const _: () = assert!(size_of::<CheckpointBody>() == 128);

impl Checkpoint {
    /// The checkpoint of a new, empty log. At creation it is written to its slot, and its [`Self::next`] to the
    /// other, before the first append: so a log in use never has an empty slot.
    pub const fn first(mirror: MirrorId, config: RedoConfig, applied: Tip) -> Self {
        Self { mirror, generation: 0, config, applied, scan_start: Cursor::START }
    }

    /// The checkpoint after this one: `applied` is durable at home and the log continues at `scan_start`.
    #[must_use]
    pub const fn next(&self, applied: Tip, scan_start: Cursor) -> Self {
        Self { generation: self.generation + 1, applied, scan_start, ..*self }
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
        seal_page(MAGIC, body.as_bytes())
    }

    /// Verifies and reads a page.
    ///
    /// # Errors
    /// If the page is torn, damaged, of another format, or contradicts itself.
    pub fn decode(page: &[u8]) -> Result<Self, PageError> {
        let body: CheckpointBody = open_page(MAGIC, page)?;
        if body.reserved != U32::ZERO {
            return Err(PageError::Reserved);
        }
        let config = RedoConfig::new(body.file_count.get(), body.segment_bytes.get());
        let checkpoint = Self {
            mirror: MirrorId::from_bytes(body.mirror),
            generation: body.generation.get(),
            config: config.map_err(|_| PageError::Fields)?,
            applied: body.applied.into(),
            scan_start: Cursor { segment_number: body.scan_number.get(), offset: body.scan_offset.get() },
        };
        let offset = checkpoint.scan_start.offset;
        if !offset.is_multiple_of(PAGE_BYTES)
            || offset > checkpoint.config.segment_bytes()
            // A segment's header page is no place for a cut; offset 0 is the end of a log without segments.
            || offset == PAGE_BYTES
            || checkpoint.generation == u64::MAX
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

    /// Changes only together with the page's version.
    #[test]
    fn the_encoding_is_pinned() {
        let hash = blake3::hash(&pages().1.encode()).to_hex();
        assert_eq!(hash.as_str(), "e51671daae9eb8e62308bd240136754120e62711c43cfe94aa13469989dcb818");
    }
}
