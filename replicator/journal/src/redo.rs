//! The target's redo log: which cut stands where in a ring of preallocated segment files.
//!
//! Pure accounting: the caller writes and syncs. A cut never spans segments. A segment opened after the log was
//! cut back, or after a recovery, has a new number and names where its predecessor ended, so what stands behind
//! that end is void without being erased (docs/formats/journal.md, "Redo log").

use std::collections::VecDeque;

use block::{MirrorId, Tip};
use bytes::Bytes;

use crate::{PAGE_BYTES, SegmentHeader};

/// The most segment files: bounds a recovery's reads and memory.
const FILE_COUNT_MAX: u32 = 65_536;
/// The longest segment file.
const SEGMENT_BYTES_MAX: u64 = 1 << 32;

/// The shape of a redo log on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedoConfig {
    file_count: u32,
    segment_bytes: u64,
}

/// Why a shape was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a redo log needs 2 to 65536 files of 8 KiB to 4 GiB, a multiple of 4 KiB; not {file_count} of {segment_bytes} bytes"
)]
pub struct RedoConfigError {
    file_count: u32,
    segment_bytes: u64,
}

/// A place in the log: segments order by number, then by offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// The segment's number.
    pub segment_number: u64,
    /// The byte in the segment's file.
    pub offset: u64,
}

impl Cursor {
    /// Where a new log starts, before any segment.
    pub const START: Self = Self { segment_number: 0, offset: 0 };
    /// Behind everything.
    pub const END: Self = Self { segment_number: u64::MAX, offset: u64::MAX };
}

/// Where a cut goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The segment's number.
    pub segment_number: u64,
    /// The segment's file.
    pub file_index: u32,
    /// The cut's first byte in the file; a multiple of 4096.
    pub offset: u64,
    /// The cut's length.
    pub length: u64,
    /// The page to write at offset 0 of the file, before or with the cut and under the same sync.
    pub opens_segment: Option<Bytes>,
}

impl Placement {
    /// Where the log continues after the cut: a checkpoint's scan start once the cut is applied.
    pub const fn end(&self) -> Cursor {
        Cursor { segment_number: self.segment_number, offset: self.offset + self.length }
    }

    const fn start(&self) -> Cursor {
        Cursor { segment_number: self.segment_number, offset: self.offset }
    }
}

/// Why a cut has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedoFull {
    /// Every file is in use: release redo first.
    #[error("the redo log is full")]
    Full,
    /// The cut is longer than a segment: no release helps.
    #[error("the cut is longer than a redo segment")]
    CutTooLong,
}

/// A segment that holds unreleased cuts, or is open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) file_index: u32,
    /// Where the log ended before the segment was opened.
    pub(crate) previous_end: Cursor,
    /// Where its last cut ends.
    pub(crate) end: u64,
}

/// The accounting of one redo log.
#[derive(Clone, Debug)]
pub struct RedoLog {
    config: RedoConfig,
    mirror: MirrorId,
    /// In use, oldest first.
    segments: VecDeque<Segment>,
    /// Files not in use, next to be taken first.
    free: VecDeque<u32>,
    /// Where the last cut ends.
    end: Cursor,
    /// The last segment takes more cuts. False in a log without segments.
    open: bool,
    next_number: u64,
}

impl RedoConfig {
    /// A log of `file_count` files of `segment_bytes` each.
    ///
    /// A segment shorter than [`crate::SEGMENT_BYTES_MIN`] refuses long cuts; settings should not allow it.
    ///
    /// # Errors
    /// If either number is out of bounds.
    pub const fn new(file_count: u32, segment_bytes: u64) -> Result<Self, RedoConfigError> {
        let allowed = file_count >= 2
            && file_count <= FILE_COUNT_MAX
            && segment_bytes >= 2 * PAGE_BYTES
            && segment_bytes <= SEGMENT_BYTES_MAX
            && segment_bytes.is_multiple_of(PAGE_BYTES);
        if allowed {
            Ok(Self { file_count, segment_bytes })
        } else {
            Err(RedoConfigError { file_count, segment_bytes })
        }
    }

    /// The number of segment files.
    pub const fn file_count(&self) -> u32 {
        self.file_count
    }

    /// Bytes of each segment file.
    pub const fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Bytes of cuts that a segment takes.
    const fn room(&self) -> u64 {
        self.segment_bytes - PAGE_BYTES
    }
}

impl RedoLog {
    /// An empty log on new files: goes with [`crate::Checkpoint::first`].
    pub fn new(config: RedoConfig, mirror: MirrorId) -> Self {
        Self::resume(config, mirror, VecDeque::new(), Cursor::START, 1)
    }

    /// A log that holds `segments` and ends at `end`; its next cut opens segment `next_number`.
    pub(crate) fn resume(
        config: RedoConfig,
        mirror: MirrorId,
        segments: VecDeque<Segment>,
        end: Cursor,
        next_number: u64,
    ) -> Self {
        assert!(next_number > end.segment_number, "segment numbers rise");
        let in_use = |file| segments.iter().any(|segment| segment.file_index == file);
        let free = (0..config.file_count).filter(|file| !in_use(*file)).collect();
        Self { config, mirror, free, segments, end, open: false, next_number }
    }

    /// Finds the place of the cut `tip` of `total_bytes` whose predecessor is `previous`, the last cut of the log.
    ///
    /// The caller writes the segment's page, if there is one, and the cut, and syncs the file; only then the cut
    /// is durable. Cuts may be appended before earlier ones are synced, but none is acked before they are.
    ///
    /// # Errors
    /// If there is no room; the log is unchanged.
    ///
    /// # Panics
    /// If `total_bytes` is no multiple of 4096, or 0: no cut has such a length.
    pub fn append(&mut self, previous: &Tip, tip: &Tip, total_bytes: u64) -> Result<Placement, RedoFull> {
        assert!(total_bytes > 0 && total_bytes.is_multiple_of(PAGE_BYTES), "cuts are whole pages");
        if total_bytes > self.config.room() {
            return Err(RedoFull::CutTooLong);
        }
        let opens_segment =
            if total_bytes > self.open_room() { Some(self.open_segment(previous, tip)?) } else { None };
        let offset = self.end.offset;
        self.end.offset += total_bytes;
        let segment = self.segments.back_mut();
        let file_index = segment.as_ref().map(|segment| segment.file_index);
        assert!(file_index.is_some(), "an open log has a segment");
        if let Some(segment) = segment {
            segment.end = self.end.offset;
        }
        Ok(Placement {
            segment_number: self.end.segment_number,
            file_index: file_index.unwrap_or_default(),
            offset,
            length: total_bytes,
            opens_segment,
        })
    }

    fn open_segment(&mut self, starts_after: &Tip, first: &Tip) -> Result<Bytes, RedoFull> {
        let file_index = self.free.pop_front().ok_or(RedoFull::Full)?;
        let header = SegmentHeader {
            mirror: self.mirror,
            number: self.next_number,
            file_index,
            segment_bytes: self.config.segment_bytes,
            previous_end: self.end,
            starts_after: *starts_after,
            first_chain: first.chain,
        };
        self.segments.push_back(Segment {
            number: self.next_number,
            file_index,
            previous_end: self.end,
            end: PAGE_BYTES,
        });
        self.end = Cursor { segment_number: self.next_number, offset: PAGE_BYTES };
        self.next_number += 1;
        self.open = true;
        Ok(header.encode())
    }

    /// Frees every segment whose cuts all lie at or before `through`, but the open one.
    ///
    /// Before the call a checkpoint whose scan start is at or behind `through`'s end must be durable: the freed
    /// files are overwritten.
    ///
    /// # Panics
    /// If `through` lies behind the log's end.
    pub fn release(&mut self, through: &Placement) {
        let through = through.end();
        assert!(through <= self.end, "what is released was appended");
        while let Some(front) = self.segments.front() {
            let last = front.number == self.end.segment_number;
            let end = Cursor { segment_number: front.number, offset: front.end };
            if end > through || (last && self.open) {
                break;
            }
            self.free.push_back(front.file_index);
            self.segments.pop_front();
        }
    }

    /// Voids every cut after `kept`: an aborted resync pass. None of their writes may be in flight: their files may
    /// be taken next.
    ///
    /// Until the next segment's page is durable a crash may bring voided cuts back.
    ///
    /// # Panics
    /// If `kept` lies behind the log's end, or before what was released.
    pub fn truncate_after(&mut self, kept: &Placement) {
        self.cut_back(kept.end());
    }

    /// Voids the cut at `failed`, whose write or sync failed, and every cut after it. None of their writes may be
    /// in flight: their files may be taken next. The next cut opens a new segment. Until its page is durable a crash may bring voided cuts back.
    ///
    /// # Panics
    /// If `failed` is not in the log.
    pub fn void_tail(&mut self, failed: &Placement) {
        self.cut_back(failed.start());
    }

    fn cut_back(&mut self, to: Cursor) {
        assert!(to <= self.end, "what is voided was appended");
        if to == self.end {
            return;
        }
        self.open = false;
        while let Some(last) = self.segments.back_mut() {
            let keeps_cuts = last.number == to.segment_number && to.offset > PAGE_BYTES;
            if last.number < to.segment_number {
                return;
            }
            if keeps_cuts {
                last.end = to.offset;
                self.end = to;
                return;
            }
            self.end = last.previous_end;
            self.free.push_back(last.file_index);
            self.segments.pop_back();
        }
        let voided_whole_segment = to.offset == PAGE_BYTES && self.end < to;
        assert!(self.end == to || voided_whole_segment, "nothing released is voided");
    }

    /// Voids the whole log: a rewind or promotion. Gives the scan start of the checkpoint that makes it so; only
    /// when that is durable the old cuts cannot come back, and only then the log may be appended to.
    pub fn reset(&mut self) -> Cursor {
        self.free.extend(self.segments.iter().map(|segment| segment.file_index));
        self.segments.clear();
        self.open = false;
        // A number of its own that no segment gets: everything older lies before it.
        self.end = Cursor { segment_number: self.next_number, offset: 0 };
        self.next_number += 1;
        self.end
    }

    /// Where the last cut ends.
    pub const fn end(&self) -> Cursor {
        self.end
    }

    /// The shape.
    pub const fn config(&self) -> RedoConfig {
        self.config
    }

    /// Bytes of cuts that can still be appended; as a cut never spans segments, a cut may be refused earlier.
    pub fn free_bytes(&self) -> u64 {
        let files = u64::try_from(self.free.len()).unwrap_or(u64::MAX);
        files * self.config.room() + self.open_room()
    }

    /// Bytes that cannot be appended: unreleased cuts, and room lost at the ends of segments.
    pub fn used_bytes(&self) -> u64 {
        self.capacity_bytes() - self.free_bytes()
    }

    /// Bytes of cuts that an empty log takes.
    pub fn capacity_bytes(&self) -> u64 {
        u64::from(self.config.file_count) * self.config.room()
    }

    const fn open_room(&self) -> u64 {
        if self.open { self.config.segment_bytes - self.end.offset } else { 0 }
    }
}

#[cfg(test)]
mod tests;
