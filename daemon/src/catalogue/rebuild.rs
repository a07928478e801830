//! Rebuilding the catalogue from the volumes' headers.
//!
//! A mirror exists if at least one header has it settled; its latest state, by epoch, then incarnation, then revision,
//! wins. It is marked as rebuilt, which counts as an unclean start. Partners come back with their mirrors; a partner
//! without one is to be added again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use block::{MirrorId, VolumeId, VolumeName};

use super::error::{CatalogueError, file_error};
use super::header::{FILE_NAME as HEADER_NAME, Header, Life, MirrorPart};
use super::pool::{Found, scan};
use super::store::{Content, Store};
use super::{Catalogue, DirectoryLock, FILE_NAME, MirrorRecord, Notice};

/// How many old catalogues are kept; one damaged later than that is replaced without a copy.
const KEPT_MAX: u32 = 100;

/// A volume's header and its folder.
type Live<'a> = BTreeMap<VolumeId, (&'a Header, &'a Path)>;

impl Catalogue {
    /// Makes the catalogue anew from the headers in the pools, keeps the old file as `catalogue.redb.old-N`, and opens
    /// it. Headers that cannot be read are reported as notices; folders of unfinished creates and deletes are leftovers.
    ///
    /// # Errors
    /// There is no header; headers are of several sites, claim the same name, or are not all of a mirror's; or the file
    /// system fails. The old file then stays as it is.
    pub fn rebuild(
        lock: DirectoryLock,
        pools: BTreeMap<VolumeName, PathBuf>,
    ) -> Result<(Self, Vec<Notice>), CatalogueError> {
        let file = lock.directory().join(FILE_NAME);
        let found = scan(&pools)?;
        let content = content(&found)?.ok_or_else(|| {
            let pools: Vec<_> = pools.values().map(|pool| pool.display().to_string()).collect();
            CatalogueError::NothingToRebuild { pools: pools.join(", "), file: file.clone() }
        })?;
        keep_old(&file)?;
        // It replaces the old one whole, so there is a catalogue at every moment.
        drop(Store::create(&file, &content)?);
        Self::open(lock, pools)
    }
}

/// Gives the old catalogue a second name that is free.
fn keep_old(file: &Path) -> Result<(), CatalogueError> {
    if !file.exists() {
        return Ok(());
    }
    let names = (1..=KEPT_MAX).map(|number| file.with_extension(format!("redb.old-{number}")));
    let mut free = names.filter(|name| !name.exists());
    let Some(kept) = free.next() else {
        return Ok(());
    };
    std::fs::hard_link(file, &kept).map_err(file_error("keeping", file))
}

/// What the headers say; none if there is none.
fn content(found: &BTreeMap<VolumeId, Found>) -> Result<Option<Content>, CatalogueError> {
    let mut live: Live<'_> = BTreeMap::new();
    for (id, found) in found {
        if let Ok(header) = &found.header
            && header.life == Life::Live
        {
            live.insert(*id, (header, &found.folder));
        }
    }
    let Some((first, _)) = live.values().next() else {
        return Ok(None);
    };
    let mut content = Content { site: first.site, ..Content::default() };
    let mut names: BTreeMap<&VolumeName, &Path> = BTreeMap::new();
    for (id, (header, folder)) in &live {
        if header.site != content.site {
            return Err(CatalogueError::OtherSite {
                header: folder.join(HEADER_NAME),
                found: header.site,
                expected: content.site,
            });
        }
        if let Some(other) = names.insert(&header.volume.name, folder) {
            return Err(CatalogueError::Duplicate {
                what: header.volume.name.to_string(),
                first: other.to_owned(),
                second: (*folder).to_owned(),
            });
        }
        content.volumes.insert(*id, header.volume.clone());
    }
    for parts in members(&live).into_values() {
        if parts.iter().any(|(_, part)| part.settled) {
            add_mirror(&mut content, &parts)?;
        }
    }
    content.tenants = content.tenants_of_volumes();
    Ok(Some(content))
}

/// The headers of each mirror.
fn members<'a>(live: &Live<'a>) -> BTreeMap<MirrorId, Vec<(VolumeId, &'a MirrorPart)>> {
    let mut members: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (id, (header, _)) in live {
        if let Some(part) = &header.mirror {
            members.entry(part.mirror.id).or_default().push((*id, part));
        }
    }
    members
}

/// Adds the mirror that these headers are of, and its partner.
fn add_mirror(content: &mut Content, parts: &[(VolumeId, &MirrorPart)]) -> Result<(), CatalogueError> {
    let Some((_, latest)) = parts.iter().max_by_key(|(_, part)| part.mirror.order()) else {
        return Ok(());
    };
    let by_index: BTreeMap<u16, VolumeId> = parts.iter().map(|(id, part)| (part.index.0, *id)).collect();
    let complete = by_index.keys().copied().eq(0..latest.volume_count);
    if !complete || by_index.len() != parts.len() {
        return Err(CatalogueError::MirrorIncomplete {
            mirror: latest.mirror.name.clone(),
            expected: latest.volume_count,
            found: parts.len(),
        });
    }
    let mirror =
        MirrorRecord { volumes: by_index.into_values().collect(), rebuilt: true, ..latest.mirror.clone() };
    content.partners.insert(latest.partner.name.clone(), latest.partner.clone());
    content.mirrors.insert(mirror.id, mirror);
    Ok(())
}
