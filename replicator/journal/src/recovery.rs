//! Finds the cuts of a redo log after a restart (docs/formats/journal.md, "Recovery").
//!
//! It guarantees: no cut is reported that was not appended after the checkpoint's scan start, the reported cuts
//! form one chain from the checkpoint's applied tip, and every cut that was synced and not voided is among them.

use std::collections::BTreeMap;

use block::{ByteCount, ChainHash, MirrorId, Tip, VolumeIndex};
use bytes::Bytes;

use crate::redo::Segment;
use crate::{
    CUT_HEADER_BYTES, Change, Checkpoint, Cursor, CutError, CutMeta, PAGE_BYTES, Placement, RedoConfig,
    RedoLog, SegmentHeader, changes, decode, peek, sizes,
};

/// A cut found in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredCut {
    /// Where it stands.
    pub placement: Placement,
    /// What it says of itself.
    pub meta: CutMeta,
    /// Its tip.
    pub tip: Tip,
    /// It stands there without payloads, and is applied at home already.
    pub header_only: bool,
    /// What it changes at home; nothing if it is there already.
    pub changes: Vec<Change>,
    /// The sizes that it records; none if it is there already.
    pub sizes: Vec<(VolumeIndex, ByteCount)>,
}

/// Why the scan went no further. All but `ScanStartLost` occur after ordinary crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryStop {
    /// Nothing that looks like a cut follows.
    End,
    /// What follows is a torn or damaged cut.
    BadCut(CutError),
    /// What follows is a cut of an earlier lap or an aborted pass, or another mirror's.
    Unchained,
    /// A segment does not start where its predecessor's cuts ended.
    SegmentUnchained,
    /// There are later segments, but none descends from the scan start: either all of them were voided, or the
    /// newest checkpoint was lost and its predecessor's redo is overwritten.
    ScanStartLost,
}

/// A recovered log.
#[derive(Debug)]
pub struct Recovered {
    /// Ready for the next append, which opens a new segment.
    pub log: RedoLog,
    /// The last cut that commits; the checkpoint's applied tip if there is none. A cut found here may never have
    /// been synced: sync every segment file before the tip is told to anyone.
    pub durable_tip: Tip,
    /// The pass and tip of the last cut, if it is staged.
    pub staged_tip: Option<(u64, Tip)>,
    /// All cuts after the checkpoint's applied tip, in order.
    pub cuts: Vec<RecoveredCut>,
    /// Why there are no more.
    pub stopped_at: RecoveryStop,
}

impl Recovered {
    /// Voids every cut that was found: a primary's log holds none, unless a crash came between the promotion of a
    /// rewind and the emptying of its log. Gives the checkpoint that must be durable before anything else is done.
    pub fn void(&mut self, checkpoint: &Checkpoint) -> Option<Checkpoint> {
        if self.cuts.is_empty() {
            return None;
        }
        self.cuts.clear();
        self.durable_tip = checkpoint.applied;
        self.staged_tip = None;
        Some(checkpoint.next(checkpoint.applied, self.log.reset()).discarding())
    }
}

/// Why there was no recovery.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError<E> {
    /// A segment file could not be read.
    #[error("a redo segment could not be read")]
    Read(#[source] E),
    /// The reader gave another number of bytes than it was asked for.
    #[error("a read of {wanted} bytes of a redo segment gave {found}")]
    ShortRead {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes given.
        found: usize,
    },
    /// The checkpoint is another mirror's.
    #[error("the redo log belongs to another mirror")]
    Mirror,
    /// The checkpoint describes other files than the caller's.
    #[error("the redo log was made with {0:?}")]
    Config(RedoConfig),
}

/// A part of the log within one segment.
#[derive(Clone, Copy)]
struct Leg {
    number: u64,
    file_index: u32,
    previous_end: Cursor,
    /// The tip that its first cut follows, and that cut's hash; `None` for the segment in which the scan starts.
    first: Option<(Tip, ChainHash)>,
    from: u64,
    /// Where the log left the segment; `None` for the last one.
    until: Option<u64>,
}

type Headers = BTreeMap<u64, SegmentHeader>;

/// Scans the log from `checkpoint` on. `read` gives `length` bytes of a segment file from `offset` on, as they are
/// on the device: not from a cache that a failed sync left behind.
///
/// # Errors
/// If `read` fails, or the checkpoint does not belong to this log. Damage is no error: it ends the scan.
pub fn recover<E>(
    config: RedoConfig,
    mirror: MirrorId,
    checkpoint: &Checkpoint,
    read: &mut dyn FnMut(u32, u64, u64) -> Result<Bytes, E>,
) -> Result<Recovered, RecoveryError<E>> {
    if checkpoint.mirror != mirror {
        return Err(RecoveryError::Mirror);
    }
    if checkpoint.config != config {
        return Err(RecoveryError::Config(checkpoint.config));
    }
    let headers = read_headers(config, mirror, checkpoint.scan_start, read)?;
    let mut scan = Scan {
        segment_bytes: config.segment_bytes(),
        mirror,
        tip: checkpoint.applied,
        end: checkpoint.scan_start,
        segments: Vec::new(),
        cuts: Vec::new(),
    };
    let path = newest_path(&headers, checkpoint.scan_start);
    let mut stopped_at =
        if path.is_none() && !headers.is_empty() { RecoveryStop::ScanStartLost } else { RecoveryStop::End };
    for leg in path.into_iter().flatten() {
        if let Some(stop) = scan.leg(&leg, read)? {
            stopped_at = stop;
            break;
        }
    }
    let newest = headers.last_key_value().map_or(0, |(number, _)| *number);
    let next_number = newest.max(scan.end.segment_number) + 1;
    let commit = scan.cuts.iter().rev().find(|cut| cut.meta.commit);
    let last = scan.cuts.last().filter(|cut| !cut.meta.commit);
    Ok(Recovered {
        durable_tip: commit.map_or(checkpoint.applied, |cut| cut.tip),
        staged_tip: last.map(|cut| (cut.meta.pass, cut.tip)),
        log: RedoLog::resume(config, mirror, scan.segments.into(), scan.end, next_number),
        cuts: scan.cuts,
        stopped_at,
    })
}

fn read_exactly<E>(
    read: &mut dyn FnMut(u32, u64, u64) -> Result<Bytes, E>,
    file_index: u32,
    offset: u64,
    length: u64,
) -> Result<Bytes, RecoveryError<E>> {
    let bytes = read(file_index, offset, length).map_err(RecoveryError::Read)?;
    if usize::try_from(length) == Ok(bytes.len()) {
        Ok(bytes)
    } else {
        Err(RecoveryError::ShortRead { wanted: length, found: bytes.len() })
    }
}

/// The good segment headers that are not older than the scan start.
fn read_headers<E>(
    config: RedoConfig,
    mirror: MirrorId,
    scan_start: Cursor,
    read: &mut dyn FnMut(u32, u64, u64) -> Result<Bytes, E>,
) -> Result<Headers, RecoveryError<E>> {
    let mut headers = Headers::new();
    for file_index in 0..config.file_count() {
        let page = read_exactly(read, file_index, 0, PAGE_BYTES)?;
        let header = SegmentHeader::decode(&page).ok().filter(|header| {
            header.mirror == mirror
                && header.file_index == file_index
                && header.segment_bytes == config.segment_bytes()
                && header.number >= scan_start.segment_number
                && header.number < u64::MAX
        });
        if let Some(header) = header {
            headers.insert(header.number, header);
        }
    }
    Ok(headers)
}

/// The way from the scan start to the newest segment that descends from it. Segments beside that way are void.
fn newest_path(headers: &Headers, scan_start: Cursor) -> Option<Vec<Leg>> {
    headers.keys().rev().find_map(|newest| path_to(headers, *newest, scan_start))
}

fn path_to(headers: &Headers, newest: u64, scan_start: Cursor) -> Option<Vec<Leg>> {
    let mut path = Vec::new();
    let mut number = newest;
    let mut until = None;
    // Bounded: a header's predecessor has a lower number.
    loop {
        let header = headers.get(&number)?;
        let starts_here = number == scan_start.segment_number;
        path.push(Leg {
            number,
            file_index: header.file_index,
            previous_end: header.previous_end,
            first: (!starts_here).then_some((header.starts_after, header.first_chain)),
            from: if starts_here { scan_start.offset } else { PAGE_BYTES },
            until,
        });
        if starts_here || header.previous_end == scan_start {
            path.reverse();
            return Some(path);
        }
        if header.previous_end < scan_start {
            return None;
        }
        until = Some(header.previous_end.offset);
        number = header.previous_end.segment_number;
    }
}

/// The state of a scan.
struct Scan {
    segment_bytes: u64,
    mirror: MirrorId,
    /// The last good cut.
    tip: Tip,
    /// Where it ends.
    end: Cursor,
    segments: Vec<Segment>,
    cuts: Vec<RecoveredCut>,
}

impl Scan {
    /// Scans one segment; gives the reason if the log does not go on in the next.
    fn leg<E>(
        &mut self,
        leg: &Leg,
        read: &mut dyn FnMut(u32, u64, u64) -> Result<Bytes, E>,
    ) -> Result<Option<RecoveryStop>, RecoveryError<E>> {
        if leg.first.is_some_and(|(tip, _)| tip != self.tip) {
            return Ok(Some(RecoveryStop::SegmentUnchained));
        }
        let mut offset = leg.from;
        let limit = leg.until.unwrap_or(self.segment_bytes);
        while offset < limit {
            let (cut, length) = match self.cut_at(leg.file_index, offset, limit, read)? {
                Ok(found) => found,
                Err(stop) => return Ok(Some(stop)),
            };
            let named = leg.first.filter(|_| offset == PAGE_BYTES);
            if named.is_some_and(|(_, chain)| chain != cut.tip.chain) {
                return Ok(Some(RecoveryStop::Unchained));
            }
            self.accept(leg, offset, length, cut);
            offset += length;
        }
        Ok(None)
    }

    /// The cut at `offset`, if it is whole and follows the running tip.
    fn cut_at<E>(
        &self,
        file_index: u32,
        offset: u64,
        limit: u64,
        read: &mut dyn FnMut(u32, u64, u64) -> Result<Bytes, E>,
    ) -> Result<Result<(crate::Cut, u64), RecoveryStop>, RecoveryError<E>> {
        let first_page = read_exactly(read, file_index, offset, PAGE_BYTES)?;
        let size = match peek(first_page.get(..CUT_HEADER_BYTES).unwrap_or_default()) {
            Ok(size) => size,
            Err(CutError::Magic) => return Ok(Err(RecoveryStop::End)),
            Err(error) => return Ok(Err(RecoveryStop::BadCut(error))),
        };
        let length = size.total_bytes();
        if length > limit - offset {
            return Ok(Err(RecoveryStop::BadCut(CutError::Bounds)));
        }
        let bytes =
            if length == PAGE_BYTES { first_page } else { read_exactly(read, file_index, offset, length)? };
        Ok(match decode(&bytes) {
            Err(error) => Err(RecoveryStop::BadCut(error)),
            Ok(cut) if cut.meta.mirror != self.mirror || cut.meta.previous != self.tip => {
                Err(RecoveryStop::Unchained)
            }
            Ok(cut) => Ok((cut, length)),
        })
    }

    fn accept(&mut self, leg: &Leg, offset: u64, length: u64, cut: crate::Cut) {
        let placement = Placement {
            segment_number: leg.number,
            file_index: leg.file_index,
            offset,
            length,
            opens_segment: None,
        };
        self.tip = cut.tip;
        self.end = placement.end();
        match self.segments.last_mut().filter(|segment| segment.number == leg.number) {
            Some(segment) => segment.end = self.end.offset,
            None => self.segments.push(Segment {
                number: leg.number,
                file_index: leg.file_index,
                previous_end: leg.previous_end,
                end: self.end.offset,
            }),
        }
        self.cuts.push(RecoveredCut {
            placement,
            meta: cut.meta,
            tip: cut.tip,
            header_only: cut.header_only,
            changes: if cut.header_only { Vec::new() } else { changes(&cut.records) },
            sizes: if cut.header_only { Vec::new() } else { sizes(&cut.records) },
        });
    }
}

#[cfg(test)]
mod tests;
