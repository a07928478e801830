//! The pools' folders: what lies in them, and how a volume's folder comes and goes.
//!
//! A volume's folder is named by its identity. It is removed header last, so that a half-removed one still says what
//! it was.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use block::{VolumeId, VolumeName};
use uuid::Uuid;

use super::error::{CatalogueError, file_error};
use super::header::{FILE_NAME, HEADER_BYTES, Header, HeaderError};
use super::store::sync_folder_of;

/// The pools by name.
pub(super) type Pools = BTreeMap<VolumeName, PathBuf>;

/// A volume's folder and what its header says.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) folder: PathBuf,
    pub(super) header: Result<Header, HeaderError>,
    /// The header's older slot has another wrapped key, which is to be destroyed.
    pub(super) old_key: bool,
}

/// All volumes' folders in the pools. A pool whose folder is missing has none.
///
/// # Errors
/// A pool cannot be read, or two folders belong to the same volume.
pub(super) fn scan(pools: &Pools) -> Result<BTreeMap<VolumeId, Found>, CatalogueError> {
    let mut all: BTreeMap<VolumeId, Found> = BTreeMap::new();
    for (pool, directory) in pools {
        let failed = file_error("reading pool", directory);
        let entries = match directory.read_dir() {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let folder = entry.map_err(&failed)?.path();
            let Some(id) = volume_of(&folder) else { continue };
            let header = Header::read(&folder, pool).and_then(|header| {
                if header.volume.id == id { Ok(header) } else { Err(HeaderError::Field("volume")) }
            });
            if let Some(other) = all.get(&id) {
                return Err(CatalogueError::Duplicate {
                    what: id.to_string(),
                    first: other.folder.clone(),
                    second: folder,
                });
            }
            let old_key = Header::has_old_key(&folder);
            all.insert(id, Found { folder, header, old_key });
        }
    }
    Ok(all)
}

/// The volume whose folder it is; none if the name is not an identity as we write it.
fn volume_of(folder: &Path) -> Option<VolumeId> {
    let name = folder.file_name()?.to_str()?;
    let id = VolumeId(Uuid::try_parse(name).ok()?);
    (folder.is_dir() && id.to_string() == name).then_some(id)
}

/// Overwrites a header, which holds a wrapped key, durably; that it is gone already is no error.
fn overwrite(header: &Path) -> io::Result<()> {
    let file = match File::options().write(true).open(header) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(0).min(HEADER_BYTES);
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; length], 0)?;
    file.sync_all()
}

/// Makes the volume's folder, mode 0700, and its name durable.
///
/// # Errors
/// It exists, or cannot be made.
pub(super) fn make_folder(folder: &Path) -> Result<(), CatalogueError> {
    let made = DirBuilder::new().mode(0o700).create(folder);
    made.map_err(file_error("making volume folder", folder))?;
    sync_folder_of(folder)
}

/// Removes the folder of a volume that is in no catalogue, with all that is in it; that it is gone already is no error.
/// Large files are best shortened first, as their removal takes its time.
///
/// # Errors
/// A file in it cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<(), CatalogueError> {
    let entries = match folder.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(file_error("reading volume folder", folder)(error)),
    };
    for entry in entries {
        let path = entry.map_err(file_error("reading volume folder", folder))?.path();
        if path.file_name().is_some_and(|name| name != FILE_NAME) {
            std::fs::remove_file(&path).map_err(file_error("removing", &path))?;
        }
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(file_error("syncing folder", folder))?;
    let header = folder.join(FILE_NAME);
    overwrite(&header).map_err(file_error("overwriting", &header))?;
    match std::fs::remove_file(&header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(file_error("removing", &header)(error)),
    }
    std::fs::remove_dir(folder).map_err(file_error("removing volume folder", folder))?;
    sync_folder_of(folder)
}
