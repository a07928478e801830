//! Opening: the catalogue's file and the volumes' headers are brought to agree.
//!
//! The catalogue is right, but for what only a header knows, as it is written first: a later state of a group is taken over,
//! for its epoch may have been seen by others, and so is a later revision of a volume, for hosts may have been refused or
//! have written by it. An older header changes nothing. A header that knows a volume or a settled mirror that the catalogue lacks shows
//! that the catalogue is an old copy; that is refused, as acting on it could undo a fencing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use block::{SiteId, VolumeId, VolumeName};
use uuid::Uuid;

use super::error::CatalogueError;
use super::fuse::Fuse;
use super::header::{FILE_NAME as HEADER_NAME, Header, Life};
use super::pool::{Found, Pools, remove_folder, scan};
use super::store::{Change, Content, Store};
use super::{Catalogue, DirectoryLock, FILE_NAME, MirrorRecord, Notice, State, VolumeRecord};

impl Catalogue {
    /// Opens the catalogue of the locked directory, or makes an empty one with a new site identity if there is neither a
    /// catalogue nor a volume. Headers that are behind are written anew; what unfinished creates and deletes left is
    /// in [`Self::take_leftovers`].
    ///
    /// # Errors
    /// The catalogue is damaged, missing beside volumes, or older than they are (each says how to rebuild); a pool holds
    /// volumes of another site; or the file system fails.
    pub fn open(
        lock: DirectoryLock,
        pools: BTreeMap<VolumeName, PathBuf>,
    ) -> Result<(Self, Vec<Notice>), CatalogueError> {
        Self::open_with(lock, pools, Fuse::default())
    }

    pub(super) fn open_with(
        lock: DirectoryLock,
        pools: Pools,
        fuse: Fuse,
    ) -> Result<(Self, Vec<Notice>), CatalogueError> {
        let file = lock.directory().join(FILE_NAME);
        let found = scan(&pools)?;
        let (store, content) = if file.exists() { Store::open(&file)? } else { create(&file, &found)? };
        check(&content, &found, &file)?;
        let catalogue = Self {
            store,
            pools,
            state: Mutex::new(State { content, reserved: BTreeMap::new(), leftovers: Vec::new() }),
            fuse,
            _lock: lock,
        };
        let notices = catalogue.reconcile(&found)?;
        if catalogue.store.was_unclean() || !notices.is_empty() {
            // A death may have come between a change of keys and the scrub behind it, or a later key been taken over. Without
            // room for a second file old rows stay until the next scrub.
            let _ = catalogue.scrub();
        }
        Ok((catalogue, notices))
    }

    /// Makes catalogue and headers agree.
    fn reconcile(&self, found: &BTreeMap<VolumeId, Found>) -> Result<Vec<Notice>, CatalogueError> {
        let mut state = self.state();
        let mut notices = Vec::new();
        for ahead in states_ahead(&state.content, found) {
            self.apply(&[Change::Mirror(&ahead)])?;
            notices.push(Notice::HeaderAhead { mirror: ahead.name.clone(), epoch: ahead.group.epoch });
            state.content.mirrors.insert(ahead.id, ahead);
        }
        for ahead in volumes_ahead(&state.content, found) {
            self.apply(&[Change::Volume(&ahead)])?;
            notices.push(Notice::VolumeAhead { volume: ahead.name.clone() });
            state.content.volumes.insert(ahead.id, ahead);
        }
        for volume in state.content.volumes.values() {
            notices.extend(self.mend(&state.content, volume, found.get(&volume.id)));
        }
        for (id, found) in found {
            if !state.content.volumes.contains_key(id) {
                notices.push(clear(found, &mut state.leftovers)?);
            }
        }
        Ok(notices)
    }

    /// Writes the volume's header anew if it does not say what the catalogue says.
    fn mend(&self, content: &Content, volume: &VolumeRecord, found: Option<&Found>) -> Option<Notice> {
        let Some(folder) = self.folder(volume) else {
            return Some(Notice::PoolMissing { volume: volume.name.clone(), pool: volume.pool.clone() });
        };
        let Some(found) = found.filter(|found| found.folder == folder) else {
            return Some(Notice::FolderMissing { volume: volume.name.clone(), folder });
        };
        let part = content
            .mirror_of(volume.id)
            .and_then(|(mirror, index)| content.part(mirror, usize::from(index.0), true));
        let wanted = Header { site: content.site, life: Life::Live, volume: volume.clone(), mirror: part };
        if found.header.as_ref().is_ok_and(|header| *header == wanted) {
            if found.old_key {
                // A death came before the second slot was written. What cannot be written now is tried again then.
                let _ = self.write_header(content, volume, Life::Live, wanted.mirror);
            }
            return None;
        }
        let volume_name = volume.name.clone();
        let written = self.write_header(content, volume, Life::Live, wanted.mirror.clone());
        if written.is_ok() && Header::has_old_key(&folder) {
            let _ = self.write_header(content, volume, Life::Live, wanted.mirror);
        }
        Some(match written {
            Ok(()) => Notice::HeaderRestored { volume: volume_name },
            Err(error) => Notice::HeaderNotWritten { volume: volume_name, reason: error.to_string() },
        })
    }
}

/// A folder that the catalogue does not know is a leftover if its header says so, and goes if it is empty.
fn clear(found: &Found, leftovers: &mut Vec<PathBuf>) -> Result<Notice, CatalogueError> {
    let folder = found.folder.clone();
    let reason = match &found.header {
        Ok(header) => {
            assert!(header.life != Life::Live, "a live volume that the catalogue lacks was refused before");
            leftovers.push(folder.clone());
            return Ok(Notice::LeftoverRemoved { folder });
        }
        // Whatever is in a folder without a whole header is not ours to judge; an empty one is a create's beginning,
        // and a torn first header stands alone.
        Err(error) => error.to_string(),
    };
    if holds_only_a_header(&folder) {
        remove_folder(&folder)?;
        return Ok(Notice::LeftoverRemoved { folder });
    }
    Ok(Notice::Unreadable { folder, reason })
}

/// A new catalogue, if there is no volume.
fn create(file: &Path, found: &BTreeMap<VolumeId, Found>) -> Result<(Store, Content), CatalogueError> {
    let is_volume = |found: &&Found| match &found.header {
        Ok(header) => header.life == Life::Live,
        Err(_) => !holds_only_a_header(&found.folder),
    };
    if let Some(found) = found.values().find(is_volume) {
        return Err(CatalogueError::Missing {
            file: file.to_owned(),
            header: found.folder.join(HEADER_NAME),
        });
    }
    let content = Content { site: SiteId(Uuid::new_v4()), ..Content::default() };
    let store = Store::create(file, &content)?;
    Ok((store, content))
}

/// True if the folder holds no data: it is empty, or has the header alone.
fn holds_only_a_header(folder: &Path) -> bool {
    let Ok(mut entries) = folder.read_dir() else {
        return false;
    };
    entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == HEADER_NAME))
}

/// Refuses headers of other sites and a catalogue that is older than the headers.
fn check(content: &Content, found: &BTreeMap<VolumeId, Found>, file: &Path) -> Result<(), CatalogueError> {
    for (id, found) in found {
        let Ok(header) = &found.header else { continue };
        let known = content.volumes.contains_key(id);
        if header.life != Life::Live && !known {
            continue;
        }
        let path = found.folder.join(HEADER_NAME);
        if header.site != content.site {
            return Err(CatalogueError::OtherSite {
                header: path,
                found: header.site,
                expected: content.site,
            });
        }
        let stale = |what| CatalogueError::Stale { file: file.to_owned(), header: path.clone(), what };
        if !known {
            return Err(stale(format!("volume '{}'", header.volume.name)));
        }
        if let Some(part) = header.mirror.as_ref().filter(|part| part.settled)
            && !content.mirrors.contains_key(&part.mirror.id)
        {
            return Err(stale(format!("mirror '{}'", part.mirror.name)));
        }
    }
    Ok(())
}

/// The volumes of which a live header has a later revision, as it says. A name never changes.
fn volumes_ahead(content: &Content, found: &BTreeMap<VolumeId, Found>) -> Vec<VolumeRecord> {
    let ahead = |known: &VolumeRecord| {
        let header = found.get(&known.id)?.header.as_ref().ok()?;
        let is_later = header.life == Life::Live
            && header.volume.name == known.name
            && header.volume.revision > known.revision;
        is_later.then(|| VolumeRecord { pool: known.pool.clone(), ..header.volume.clone() })
    };
    content.volumes.values().filter_map(ahead).collect()
}

/// The mirrors of which a header knows a later state, with that state.
fn states_ahead(content: &Content, found: &BTreeMap<VolumeId, Found>) -> Vec<MirrorRecord> {
    let headers = found.values().filter_map(|found| found.header.as_ref().ok());
    let parts: Vec<_> = headers.filter_map(|header| header.mirror.as_ref()).collect();
    let ahead = |known: &MirrorRecord| {
        let latest =
            parts.iter().filter(|part| part.mirror.id == known.id).max_by_key(|part| part.mirror.order())?;
        (latest.mirror.order() > known.order())
            .then(|| MirrorRecord { volumes: known.volumes.clone(), ..latest.mirror.clone() })
    };
    content.mirrors.values().filter_map(ahead).collect()
}
