//! The file `clean` of a mirror: what a primary that stopped in order knows that its target may lack.
//!
//! Format (little-endian): magic `FSCLEAN1`, mirror [16], epoch u64, incarnation u64, 1 byte: a committed position
//! follows (epoch u64, origin [16], incarnation u64, sequence u64) or zeros, u32 number of volumes, for each a u32
//! length and a dirty map checkpoint; crc32c of all before, u32. It counts for exactly one start: the next one removes
//! it, durably, before its first host write.

use std::fs;
use std::path::Path;

use block::{ByteCount, Epoch, Incarnation, MirrorId, Position, Sequence, SiteId, VolumeId};
use engine::dirty_map::DirtyMap;
use protocol::GroupState;

use super::files::{FilesError, remove_if_there, sync_folder, write_durably};
use crate::group::CleanState;

const MAGIC: &[u8; 8] = b"FSCLEAN1";
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
    out.extend_from_slice(MAGIC);
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
    for ((id, _), dirty) in volumes.iter().zip(&clean.dirty) {
        let map = dirty.encode(*id);
        out.extend_from_slice(&u32::try_from(map.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&map);
    }
    let checksum = crc32c::crc32c(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    write_durably(&folder.join(FILE), &out)
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
    let mine = take_array::<8>(&mut rest)? == *MAGIC
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
    let mut dirty = Vec::new();
    for (id, size) in volumes {
        let length = take_u32(&mut rest)?;
        let (map, after) = rest.split_at_checked(length)?;
        rest = after;
        dirty.push(DirtyMap::decode(map, *id, *size).ok()?);
    }
    rest.is_empty().then_some(CleanState { dirty, committed: has_position.then_some(position) })
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
    use block::ByteRange;

    use super::*;

    #[test]
    fn a_clean_stop_is_read_once_and_only_by_its_own_state() {
        let folder = tempfile::tempdir().unwrap();
        let site = SiteId::from_bytes([1; 16]);
        let state = GroupState::new_primary(site);
        let mirror = MirrorId::from_bytes([2; 16]);
        let volumes = [(VolumeId::from_bytes([3; 16]), ByteCount(1 << 20))];
        let mut dirty = DirtyMap::default();
        dirty.set(ByteRange::new(8192, 4096).unwrap());
        let clean = CleanState { dirty: vec![dirty], committed: Some(state.start_position()) };
        write(folder.path(), mirror, &state, &volumes, &clean).unwrap();
        let other = GroupState { incarnation: Incarnation(9), ..state.clone() };
        assert!(take(folder.path(), mirror, &other, &volumes).unwrap().is_none());
        assert!(take(folder.path(), mirror, &state, &volumes).unwrap().is_none(), "it was removed");
        write(folder.path(), mirror, &state, &volumes, &clean).unwrap();
        let read = take(folder.path(), mirror, &state, &volumes).unwrap().unwrap();
        assert_eq!(read.committed, clean.committed);
        assert_eq!(read.dirty.first().unwrap().count().0, 1);
        write(folder.path(), mirror, &state, &volumes, &clean).unwrap();
        let path = folder.path().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[30] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(take(folder.path(), mirror, &state, &volumes).unwrap().is_none());
    }
}
