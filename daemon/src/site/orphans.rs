//! Orphaned writes as operators ask for them, and their export: the only place where a volume's plaintext goes to a file.
//!
//! An export has one file for each extent, `VOLUME/OFFSET`, with as many bytes as the extent is long. Files are readable
//! by the daemon's user only. What was exported counts only if this side was not overwritten meanwhile.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::Lba;
use control::{OrphanView, OrphansRequest, OrphansView, ProblemKind, Timestamp};
use tokio::sync::oneshot;

use super::mirrors::{POLL, internal};
use super::volumes::problem;
use super::{Site, files};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, VolumeRecord};
use crate::group::{OrphanExtent, OrphanProgress};
use crate::shard::{GroupKey, ShardCommand, Verb};

/// Bytes decrypted at once.
const PIECE_BYTES: u64 = 1 << 20;

impl Site {
    /// Compares this old primary with the new one and lists, or also exports, what only this side has.
    pub(super) async fn find_orphans(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        key: GroupKey,
        request: OrphansRequest,
    ) -> Result<OrphansView, OperationError> {
        let name = &mirror.name;
        let folder = request.export.as_deref().map(|path| export_folder(name.as_str(), path)).transpose()?;
        let refused = |detail: String| problem(ProblemKind::Refused, format!("mirror '{name}': {detail}"));
        self.verb(key, Verb::Orphans).await.map_err(|error| refused(error.detail))?;
        let found = loop {
            match self.orphan_progress(key).await? {
                OrphanProgress::Found(found) => break found,
                OrphanProgress::Failed(reason) => return Err(refused(format!("{reason}; try again"))),
                OrphanProgress::Idle => return Err(refused("the search ended; try again".to_owned())),
                OrphanProgress::Searching => tokio::time::sleep(POLL).await,
            }
        };
        let volumes = self.mirror_volumes(mirror)?;
        let view = view(&found, &volumes, request.export.as_deref())?;
        if let Some(folder) = folder {
            let site = Arc::clone(self);
            let exported = tokio::task::spawn_blocking(move || site.export(&folder, &volumes, &found));
            exported.await.map_err(internal)??;
            let state = self.snapshot(key).await?.state;
            if !state.is_some_and(|state| state.diverged) {
                return Err(refused(
                    "this side was overwritten while it was exported: what was written does not count"
                        .to_owned(),
                ));
            }
        }
        Ok(view)
    }

    async fn orphan_progress(&self, key: GroupKey) -> Result<OrphanProgress, OperationError> {
        let (done, progress) = oneshot::channel();
        self.shard_of(key).send(ShardCommand::OrphanProgress { key, done });
        progress.await.map_err(|_| problem(ProblemKind::Internal, "the mirror's shard does not answer"))
    }

    fn export(
        &self,
        folder: &Path,
        volumes: &[VolumeRecord],
        found: &[OrphanExtent],
    ) -> Result<(), OperationError> {
        make_folder(folder).map_err(|error| failed("make", folder, &error))?;
        for (index, volume) in volumes.iter().enumerate() {
            let extents = found.iter().filter(|extent| usize::from(extent.volume.0) == index);
            let extents: Vec<OrphanExtent> = extents.copied().collect();
            if !extents.is_empty() {
                self.export_volume(&folder.join(volume.name.as_str()), volume, &extents)?;
            }
        }
        files::sync_folder(folder).map_err(OperationError::from)
    }

    fn export_volume(
        &self,
        folder: &Path,
        volume: &VolumeRecord,
        extents: &[OrphanExtent],
    ) -> Result<(), OperationError> {
        let cipher = self.unlock(volume)?;
        let home = self.folder(volume)?.join(files::DATA_FILE);
        let data = fs::File::open(&home).map_err(|error| failed("open", &home, &error))?;
        make_folder(folder).map_err(|error| failed("make", folder, &error))?;
        for extent in extents {
            let path = folder.join(extent.range.offset().to_string());
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(&path).map_err(|error| failed("create", &path, &error))?;
            let mut offset = extent.range.offset();
            while offset < extent.range.end() {
                let length = PIECE_BYTES.min(extent.range.end() - offset);
                let mut piece = vec![0; usize::try_from(length).map_err(internal)?];
                data.read_exact_at(&mut piece, offset).map_err(|error| failed("read", &home, &error))?;
                cipher.open(Lba(offset / block::DATA_UNIT_BYTES), &mut piece);
                file.write_all(&piece).map_err(|error| failed("write", &path, &error))?;
                offset += length;
            }
            file.sync_all().map_err(|error| failed("sync", &path, &error))?;
        }
        files::sync_folder(folder).map_err(OperationError::from)
    }
}

/// The folder that an export goes to; it must not hold anything yet.
fn export_folder(mirror: &str, path: &str) -> Result<PathBuf, OperationError> {
    let folder = PathBuf::from(path);
    let refuse = |what: &str| {
        let detail = format!("the orphans of mirror '{mirror}' cannot be exported to '{path}': {what}");
        Err(problem(ProblemKind::Invalid, detail))
    };
    if !folder.is_absolute() {
        return refuse("give an absolute path");
    }
    match fs::read_dir(&folder) {
        Ok(mut entries) => match entries.next() {
            Some(_) => refuse("it is not empty; name a new directory"),
            None => Ok(folder),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(folder),
        Err(error) => refuse(&error.to_string()),
    }
}

fn make_folder(folder: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(folder)
}

fn failed(verb: &str, path: &Path, error: &std::io::Error) -> OperationError {
    let detail = format!("the export stopped: cannot {verb} {}: {error}", path.display());
    problem(ProblemKind::Unavailable, detail)
}

fn view(
    found: &[OrphanExtent],
    volumes: &[VolumeRecord],
    exported: Option<&str>,
) -> Result<OrphansView, OperationError> {
    let extents: Result<Vec<OrphanView>, OperationError> = found
        .iter()
        .map(|extent| {
            let volume = volumes.get(usize::from(extent.volume.0));
            let volume =
                volume.ok_or_else(|| internal("an orphan lies in a volume that the mirror lacks"))?;
            Ok(OrphanView {
                volume: volume.name.clone(),
                offset_bytes: extent.range.offset(),
                length_bytes: extent.range.length(),
                written: extent.written.map(Timestamp),
                exact: extent.exact,
            })
        })
        .collect();
    let bytes = |exact: bool| {
        found.iter().filter(|extent| extent.exact == exact).map(|extent| extent.range.length()).sum()
    };
    Ok(OrphansView {
        extents: extents?,
        exact_bytes: bytes(true),
        possible_bytes: bytes(false),
        exported: exported.map(str::to_owned),
    })
}
