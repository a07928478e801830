//! Is there room for a mirror? Asked at both sites before anything is made, so that a refusal names what is missing.
//!
//! A side needs the redo log, which is its journal as a target and the reserve that a resync is staged in, at both sites,
//! since either may be the target one day; the spill file; the intent maps; and at the secondary the volumes. Allocation itself may
//! still fail later, and is then undone.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{ByteCount, VolumeId, VolumeName};
use control::ProblemKind;
use engine::intent_map::IntentMap;
use protocol::{CreateMirror, RefusalCode};

use super::Site;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::VolumeRecord;

/// The header, the checkpoint and the file system's own blocks of a file, generously.
const PER_FILE: u64 = 64 << 10;

/// What a sentence lists; a refusal that goes to the partner is bounded.
const PARTS_SHOWN: usize = 4;

/// Space that is wanted in a folder, and what for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Need {
    folder: PathBuf,
    bytes: u64,
    what: String,
}

/// Needs on one file system.
#[derive(Debug)]
struct Sum {
    free: u64,
    needed: u64,
    folder: PathBuf,
    parts: Vec<String>,
}

impl Site {
    /// What a mirror of these volumes needs here, by the folder of each volume's pool; `replicas` if the volumes are to
    /// be made as well.
    fn needs_of_mirror(
        &self,
        volumes: &[(String, VolumeId, ByteCount, PathBuf)],
        replicas: bool,
    ) -> Vec<Need> {
        let settings = &self.settings;
        let segments = u64::from(settings.redo_segments.get());
        let redo = segments.saturating_mul(settings.redo_segment.0.saturating_add(PER_FILE));
        let mut needs = vec![Need {
            folder: settings.data_dir.clone(),
            bytes: redo,
            what: "the redo log, in which a resync must fit (redo_segments, redo_segment_bytes)".to_owned(),
        }];
        if settings.spill.0 > 0 {
            needs.push(Need {
                folder: settings.data_dir.clone(),
                bytes: settings.spill.0.saturating_add(PER_FILE),
                what: "the spill file (spill_bytes)".to_owned(),
            });
        }
        for (name, id, size, pool) in volumes {
            let map = IntentMap::new(*id, *size, settings.intent_region).file_bytes().0;
            let replica = if replicas { size.0.saturating_add(PER_FILE) } else { 0 };
            let what = if replicas { "the replica and the intent map" } else { "the intent map" };
            needs.push(Need {
                folder: pool.clone(),
                bytes: map.saturating_add(replica).saturating_add(PER_FILE),
                what: format!("{what} of volume '{name}'"),
            });
        }
        needs
    }

    /// Refuses a mirror for which this side has no room; the partner asks itself the same.
    pub(super) async fn check_room(
        self: &Arc<Self>,
        name: &VolumeName,
        volumes: &[VolumeRecord],
    ) -> Result<(), OperationError> {
        let places: Result<Vec<_>, OperationError> = volumes
            .iter()
            .map(|volume| Ok((volume.name.to_string(), volume.id, volume.size, self.folder(volume)?)))
            .collect();
        let needs = self.needs_of_mirror(&places?, false);
        let lacking = tokio::task::spawn_blocking(move || missing(&needs)).await;
        match lacking.map_err(internal)?.map_err(internal)? {
            None => Ok(()),
            Some(missing) => {
                let detail =
                    format!("mirror '{name}' cannot be made, site '{}' has no room: {missing}", self.name());
                Err(problem(ProblemKind::Refused, detail))
            }
        }
    }

    /// Refuses the secondary of a mirror for which there is no room here.
    pub(super) fn check_replica_room(&self, create: &CreateMirror) -> Result<(), (RefusalCode, String)> {
        let here = self.name();
        let no_space = |text: String| (RefusalCode::NoSpace, format!("site '{here}' has no room: {text}"));
        let pool = self.settings.pools.values().next().cloned();
        let pool = pool.ok_or_else(|| no_space("the settings name no pool".to_owned()))?;
        let places: Vec<_> = create
            .volumes
            .iter()
            .map(|volume| (volume.name.clone(), volume.id, volume.size, pool.clone()))
            .collect();
        let lacking = missing(&self.needs_of_mirror(&places, true));
        match lacking.map_err(|error| no_space(error.to_string()))? {
            None => Ok(()),
            Some(missing) => Err(no_space(missing)),
        }
    }
}

/// Says, in one sentence, what is missing where, if something is.
///
/// # Errors
/// A file system cannot be asked.
fn missing(needs: &[Need]) -> io::Result<Option<String>> {
    let mut sums: BTreeMap<u64, Sum> = BTreeMap::new();
    for need in needs {
        let folder = existing(&need.folder);
        let device = std::fs::metadata(folder)?.dev();
        let sum = match sums.get_mut(&device) {
            Some(sum) => sum,
            None => {
                let state = rustix::fs::statvfs(folder)?;
                let free = state.f_bavail.saturating_mul(state.f_frsize);
                let sum = Sum { free, needed: 0, folder: need.folder.clone(), parts: Vec::new() };
                sums.entry(device).or_insert(sum)
            }
        };
        sum.needed = sum.needed.saturating_add(need.bytes);
        sum.parts.push(format!("{} for {}", need.bytes, need.what));
    }
    Ok(sums.values().find(|sum| sum.needed > sum.free).map(Sum::sentence))
}

impl Sum {
    fn sentence(&self) -> String {
        let mut parts = self.parts.iter().take(PARTS_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = self.parts.len().saturating_sub(PARTS_SHOWN);
        if more > 0 {
            parts.push_str(&format!(", and {more} more"));
        }
        format!(
            "{} bytes are missing on the file system of {}: {} are free and {} are needed ({}); give it more space, or \
             delete what is not needed",
            self.needed.saturating_sub(self.free),
            self.folder.display(),
            self.free,
            self.needed,
            parts
        )
    }
}

/// The nearest folder that is there: what is made below it lies on its file system.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(folder: &Path, bytes: u64) -> Need {
        Need { folder: folder.to_owned(), bytes, what: "a test".to_owned() }
    }

    #[test]
    fn needs_of_one_file_system_are_added_and_what_is_missing_is_told_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let state = rustix::fs::statvfs(folder.path()).unwrap();
        let free = state.f_bavail * state.f_frsize;
        let below = folder.path().join("not/there/yet");
        assert_eq!(missing(&[need(folder.path(), 4096), need(&below, 4096)]).unwrap(), None);
        let sentence = missing(&[need(folder.path(), free), need(&below, 1 << 40)]).unwrap().unwrap();
        assert!(
            sentence.contains("bytes are missing") && sentence.contains("1099511627776 for a test"),
            "{sentence}"
        );
        assert!(!sentence.contains('\n'));
    }
}
