//! The file `clean` of a mirror: what a primary that stopped in order knows that its target may lack.
//!
//! Format (little-endian): magic `FSCLEAN2`, mirror [16], epoch u64, incarnation u64, 1 byte: a committed position
//! follows (epoch u64, origin [16], incarnation u64, sequence u64) or zeros, u32 number of volumes, for each a u32
//! length and a dirty map checkpoint; u32 length of the spill's index ([`SpillIndex`]), 0 without one; with one, for
//! each volume a u32 length and a map of the blocks that the spill changes; crc32c of all before, u32. `FSCLEAN1` ends
//! behind the dirty maps. It counts for exactly one start: the next one removes
//! it, durably, before its first host write.

use std::fs;
use std::path::Path;

use block::{ByteCount, Epoch, Incarnation, MirrorId, Position, Sequence, SiteId, VolumeId};
use engine::dirty_map::DirtyMap;
use journal::SpillIndex;
use protocol::GroupState;

use super::files::{FilesError, remove_if_there, sync_folder, write_durably};
use crate::group::{CleanState, KeptJournal};

const MAGIC: [u8; 8] = *b"FSCLEAN2";
const MAGIC_1: [u8; 8] = *b"FSCLEAN1";
const FILE: &str = "clean";

/// Writes the file.
pub(super) fn write(
    folder: &Path,
    mirror: MirrorId,
    state: &GroupState,
    volumes: &[(VolumeId, ByteCount)],
    clean: &CleanState,
) -> Result<(), FilesError> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&mirror.to_bytes());
    out.extend_from_slice(&state.epoch.0.to_le_bytes());
    out.extend_from_slice(&state.incarnation.0.to_le_bytes());
    out.push(u8::from(clean.committed.is_some()));
    let position = clean.committed.unwrap_or_default();
    out.extend_from_slice(&position.epoch.0.to_le_bytes());
    out.extend_from_slice(&position.origin.to_bytes());
    out.extend_from_slice(&position.incarnation.0.to_le_bytes());
    out.extend_from_slice(&position.sequence.0.to_le_bytes());
    out.extend_from_slice(&u32::try_from(volumes.len()).unwrap_or(u32::MAX).to_le_bytes());
    write_maps(&mut out, volumes, &clean.dirty);
    let index = clean.journal.as_ref().map(|kept| kept.index.encode()).unwrap_or_default();
    write_part(&mut out, &index);
    if let Some(kept) = &clean.journal {
        write_maps(&mut out, volumes, &kept.blocks);
    }
    let checksum = crc32c::crc32c(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    write_durably(&folder.join(FILE), &out)
}

fn write_maps(out: &mut Vec<u8>, volumes: &[(VolumeId, ByteCount)], maps: &[DirtyMap]) {
    for ((id, _), map) in volumes.iter().zip(maps) {
        write_part(out, &map.encode(*id));
    }
}

fn write_part(out: &mut Vec<u8>, part: &[u8]) {
    out.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(part);
}

/// Reads the file and removes it; `None` if there is none or it does not belong to this state.
pub(super) fn take(
    folder: &Path,
    mirror: MirrorId,
    state: &GroupState,
    volumes: &[(VolumeId, ByteCount)],
) -> Result<Option<CleanState>, FilesError> {
    let path = folder.join(FILE);
    let Ok(bytes) = fs::read(&path) else {
        return Ok(None);
    };
    remove_if_there(&path)?;
    sync_folder(folder)?;
    let clean = parse(&bytes, mirror, state, volumes);
    if clean.is_none() {
        tracing::warn!(file = %path.display(), "the record of the last clean stop is damaged or of another start: regions are compared instead");
    }
    Ok(clean)
}

fn parse(
    bytes: &[u8],
    mirror: MirrorId,
    state: &GroupState,
    volumes: &[(VolumeId, ByteCount)],
) -> Option<CleanState> {
    let (body, checksum) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let mut rest = body;
    let magic = take_array::<8>(&mut rest)?;
    let mine = (magic == MAGIC || magic == MAGIC_1)
        && take_array::<16>(&mut rest)? == mirror.to_bytes()
        && take_u64(&mut rest)? == state.epoch.0
        && take_u64(&mut rest)? == state.incarnation.0;
    if !mine {
        return None;
    }
    let has_position = take_array::<1>(&mut rest)? == [1];
    let position = Position {
        epoch: Epoch(take_u64(&mut rest)?),
        origin: SiteId::from_bytes(take_array(&mut rest)?),
        incarnation: Incarnation(take_u64(&mut rest)?),
        sequence: Sequence(take_u64(&mut rest)?),
    };
    let count = take_u32(&mut rest)?;
    if count != volumes.len() {
        return None;
    }
    let dirty = take_maps(&mut rest, volumes)?;
    let journal = if magic == MAGIC { take_journal(&mut rest, volumes)? } else { None };
    let committed = has_position.then_some(position);
    rest.is_empty().then_some(CleanState { dirty, committed, journal })
}

/// The journal, if there is one; the outer `None` refuses the file.
fn take_journal(rest: &mut &[u8], volumes: &[(VolumeId, ByteCount)]) -> Option<Option<KeptJournal>> {
    let index = take_part(rest)?;
    if index.is_empty() {
        return Some(None);
    }
    let index = SpillIndex::decode(index).ok()?;
    Some(Some(KeptJournal { index, blocks: take_maps(rest, volumes)? }))
}

fn take_maps(rest: &mut &[u8], volumes: &[(VolumeId, ByteCount)]) -> Option<Vec<DirtyMap>> {
    volumes.iter().map(|(id, size)| DirtyMap::decode(take_part(rest)?, *id, *size).ok()).collect()
}

fn take_part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take_u32(rest)?;
    let (part, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(part)
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*head)
}

fn take_u64(rest: &mut &[u8]) -> Option<u64> {
    take_array(rest).map(u64::from_le_bytes)
}

fn take_u32(rest: &mut &[u8]) -> Option<usize> {
    usize::try_from(take_array(rest).map(u32::from_le_bytes)?).ok()
}

#[cfg(test)]
mod tests {
    use block::{ByteRange, Tip};

    use super::*;

    fn mirror() -> MirrorId {
        MirrorId::from_bytes([2; 16])
    }

    fn state() -> GroupState {
        GroupState::new_primary(SiteId::from_bytes([1; 16]))
    }

    fn volumes() -> [(VolumeId, ByteCount); 1] {
        [(VolumeId::from_bytes([3; 16]), ByteCount(1 << 20))]
    }

    fn clean() -> CleanState {
        let mut dirty = DirtyMap::default();
        dirty.set(ByteRange::new(8192, 4096).unwrap());
        CleanState { dirty: vec![dirty], committed: Some(state().start_position()), journal: None }
    }

    fn with_journal() -> CleanState {
        let start = state().start_position();
        let tip = |sequence: u64| Tip { position: start.at(Sequence(sequence)), ..Tip::default() };
        let lineage = start.into();
        let ends = (Sequence(4), Sequence(9));
        let (segment, _) = journal::SpillSegment::seal(mirror(), lineage, ends, block::WallTime(5), &[]);
        let index = SpillIndex {
            lineage,
            capacity: 1 << 20,
            last: Sequence(9),
            folded_from: None,
            commit_floor: Sequence(0),
            committed: tip(3),
            sent: vec![tip(6)],
            segments: vec![segment.at(4096)],
        };
        let mut blocks = DirtyMap::default();
        blocks.set(ByteRange::new(40_960, 8192).unwrap());
        CleanState { journal: Some(KeptJournal { index, blocks: vec![blocks] }), ..clean() }
    }

    #[test]
    fn a_clean_stop_is_read_once_and_only_by_its_own_state() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), mirror(), &state(), &volumes(), &clean()).unwrap();
        let other = GroupState { incarnation: Incarnation(9), ..state() };
        assert!(take(folder.path(), mirror(), &other, &volumes()).unwrap().is_none());
        assert!(take(folder.path(), mirror(), &state(), &volumes()).unwrap().is_none(), "it was removed");
        write(folder.path(), mirror(), &state(), &volumes(), &clean()).unwrap();
        let read = take(folder.path(), mirror(), &state(), &volumes()).unwrap().unwrap();
        assert_eq!(read.committed, clean().committed);
        assert_eq!(read.dirty.first().unwrap().count().0, 1);
        assert!(read.journal.is_none());
    }

    #[test]
    fn the_journal_of_a_clean_stop_is_read_as_written() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), mirror(), &state(), &volumes(), &with_journal()).unwrap();
        let read = take(folder.path(), mirror(), &state(), &volumes()).unwrap().unwrap();
        let (read, written) = (read.journal.unwrap(), with_journal().journal.unwrap());
        assert_eq!(read.index, written.index);
        assert_eq!(read.blocks, written.blocks);
    }

    #[test]
    fn every_truncation_and_flipped_bit_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), mirror(), &state(), &volumes(), &with_journal()).unwrap();
        let bytes = fs::read(folder.path().join(FILE)).unwrap();
        assert!(parse(&bytes, mirror(), &state(), &volumes()).is_some());
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length], mirror(), &state(), &volumes()).is_none(), "length {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&damaged, mirror(), &state(), &volumes()).is_none(), "bit {bit}");
        }
    }

    /// Written by the version before: magic `FSCLEAN1`, and nothing behind the dirty maps.
    const GOLDEN_1: &str = include_str!("clean-1.hex");

    #[test]
    fn a_file_of_format_1_is_read() {
        let bytes: Vec<u8> = GOLDEN_1
            .split_whitespace()
            .collect::<String>()
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        let read = parse(&bytes, mirror(), &state(), &volumes()).unwrap();
        assert_eq!((read.dirty, read.committed), (clean().dirty, clean().committed));
        assert!(read.journal.is_none());
    }
}
