//! Changes. The order is: headers (durable), then the catalogue's transaction, then memory.
//!
//! Creating and deleting mark the headers on both sides of the transaction, so that a crash leaves headers that say
//! themselves whether the catalogue may not know them: `Creating` or `Deleting` for a volume, not settled for a mirror.

use std::path::PathBuf;

use block::{MirrorId, VolumeId, VolumeName};
use control::{ACCESS_HOSTS_BYTES_MAX, CERTIFICATE_BYTES_MAX};

use super::error::{CatalogueError, file_error};
use super::header::{FILE_NAME, Header, Life, MirrorPart};
use super::pool::{make_folder, remove_folder};
use super::record::{CLASS_BYTES_MAX, GROUP_STATE_BYTES_MAX, WRAPPED_KEY_BYTES_MAX};
use super::store::{Change, Content};
use super::{
    Catalogue, GroupRecord, MIRROR_VOLUMES_MAX, MirrorRecord, Notice, PartnerRecord, State, VolumeRecord,
};

impl Catalogue {
    /// Begins the creation of a volume: takes name and identity, makes its folder and header. The caller then makes the
    /// data files and calls [`Self::commit_volume`] or [`Self::discard_volume`]; after a crash the next start discards.
    ///
    /// Returns the folder. `revision` of the record is set here.
    ///
    /// # Errors
    /// Name or identity is taken, the pool is unknown, a value is too long, or the file system fails.
    pub fn reserve_volume(&self, volume: VolumeRecord) -> Result<PathBuf, CatalogueError> {
        let mut state = self.state();
        let volume = VolumeRecord { revision: 1, ..volume };
        let folder = self.folder(&volume).ok_or_else(|| CatalogueError::UnknownPool(volume.pool.clone()))?;
        bound("class", &volume.name, volume.class.len(), 1, CLASS_BYTES_MAX)?;
        bound("wrapped key", &volume.name, volume.wrapped_key.len(), 1, WRAPPED_KEY_BYTES_MAX)?;
        bound("list of hosts", &volume.name, volume.access.hosts_bytes(), 0, ACCESS_HOSTS_BYTES_MAX)?;
        let mut others = state.content.volumes.values().chain(state.reserved.values());
        if others.any(|other| other.name == volume.name || other.id == volume.id) {
            return Err(exists("volume", volume.name));
        }
        self.fuse.step().map_err(file_error("making volume folder", &folder))?;
        make_folder(&folder)?;
        let written = self.write_header(&state.content, &volume, Life::Creating, None);
        if let Err(error) = written {
            // Best effort: the next start removes what stays.
            if !self.fuse.blows() {
                let _ = remove_folder(&folder);
            }
            return Err(error);
        }
        state.reserved.insert(volume.id, volume);
        Ok(folder)
    }

    /// Ends the creation of a reserved volume: from here on it exists.
    ///
    /// # Errors
    /// The volume is not reserved, or catalogue or header cannot be written; then it stays reserved.
    pub fn commit_volume(&self, id: VolumeId) -> Result<(), CatalogueError> {
        let mut state = self.state();
        let volume = state.reserved.get(&id).cloned().ok_or_else(|| CatalogueError::unknown_volume(id))?;
        self.apply(&[Change::Volume(&volume)])?;
        if let Err(error) = self.write_header(&state.content, &volume, Life::Live, None) {
            // With a header that says `Creating` a rebuild would lose it, so it must not exist.
            self.apply(&[Change::NoVolume(id)])?;
            return Err(error);
        }
        state.reserved.remove(&id);
        state.content.volumes.insert(id, volume);
        Ok(())
    }

    /// Gives a reserved volume up and removes its folder.
    ///
    /// # Errors
    /// The volume is not reserved, or a file cannot be removed; the next start tries again.
    pub fn discard_volume(&self, id: VolumeId) -> Result<(), CatalogueError> {
        // Without the lock: what is left of a large file may take its time.
        let volume = self.state().reserved.remove(&id).ok_or_else(|| CatalogueError::unknown_volume(id))?;
        match self.folder(&volume) {
            Some(folder) => remove_folder(&folder),
            None => Ok(()),
        }
    }

    /// Changes a volume's size, access or wrapped key, as its next revision; returns the new record.
    ///
    /// # Errors
    /// The volume does not exist, the list of hosts is too long, or its header or the catalogue cannot be written: then
    /// the old record stands, as a still later revision if the header takes that; if not, a restart may bring up the new.
    ///
    /// # Panics
    /// If anything else in the record has changed.
    pub fn change_volume(
        &self,
        id: VolumeId,
        change: impl FnOnce(&mut VolumeRecord),
    ) -> Result<VolumeRecord, CatalogueError> {
        let mut state = self.state();
        let old = state.content.volumes.get(&id).cloned();
        let old = old.ok_or_else(|| CatalogueError::unknown_volume(id))?;
        let mut new = VolumeRecord { revision: old.revision.saturating_add(1), ..old.clone() };
        change(&mut new);
        let (size, access, wrapped_key, revision) =
            (new.size, new.access.clone(), new.wrapped_key.clone(), new.revision);
        let allowed = VolumeRecord { size, access, wrapped_key, revision, ..old.clone() };
        assert!(new == allowed, "only size, access and wrapped key change");
        bound("wrapped key", &new.name, new.wrapped_key.len(), 1, WRAPPED_KEY_BYTES_MAX)?;
        bound("list of hosts", &new.name, new.access.hosts_bytes(), 0, ACCESS_HOSTS_BYTES_MAX)?;
        let mirror = state.content.mirror_of(new.id);
        let part = mirror.and_then(|(mirror, index)| state.content.part(mirror, usize::from(index.0), true));
        let written = self.write_header(&state.content, &new, Life::Live, part.clone());
        let outcome = written.and_then(|()| self.apply(&[Change::Volume(&new)]));
        let stands = if outcome.is_ok() {
            new.clone()
        } else {
            // Header or catalogue may hold what was refused. A later revision keeps it from coming up at the next start.
            let stands = VolumeRecord { revision: revision.saturating_add(1), ..old };
            if !self.fuse.is_blown() {
                let _ = self.write_header(&state.content, &stands, Life::Live, part);
            }
            stands
        };
        state.content.volumes.insert(stands.id, stands);
        outcome.map(|()| new)
    }

    /// Deletes a volume. The caller has closed its files, and removes the folder returned with [`remove_folder`], without
    /// haste; if that does not come about, the next start has it among its leftovers.
    ///
    /// # Errors
    /// It does not exist or is mirrored, or its header or the catalogue cannot be written.
    pub fn delete_volume(&self, id: VolumeId) -> Result<Option<PathBuf>, CatalogueError> {
        let mut state = self.state();
        let volume = state.content.volumes.get(&id).ok_or_else(|| CatalogueError::unknown_volume(id))?;
        if let Some((mirror, _)) = state.content.mirror_of(id) {
            return Err(CatalogueError::InMirror {
                what: "volume",
                name: volume.name.clone(),
                mirror: mirror.name.clone(),
            });
        }
        let folder = self.folder(volume).filter(|folder| folder.exists());
        if folder.is_some() {
            self.write_header(&state.content, volume, Life::Deleting, None)?;
        }
        self.apply(&[Change::NoVolume(id)])?;
        state.content.volumes.remove(&id);
        Ok(folder)
    }

    /// Adds a partner.
    ///
    /// # Errors
    /// The name is taken, the certificate too long, or the catalogue cannot be written.
    pub fn add_partner(&self, partner: PartnerRecord) -> Result<(), CatalogueError> {
        let mut state = self.state();
        bound("certificate", &partner.name, partner.certificate.len(), 1, CERTIFICATE_BYTES_MAX)?;
        if state.content.partners.contains_key(&partner.name) {
            return Err(exists("partner", partner.name));
        }
        self.apply(&[Change::Partner(&partner)])?;
        state.content.partners.insert(partner.name.clone(), partner);
        Ok(())
    }

    /// Removes a partner that no mirror has.
    ///
    /// # Errors
    /// It does not exist or a mirror has it, or the catalogue cannot be written.
    pub fn remove_partner(&self, name: &VolumeName) -> Result<(), CatalogueError> {
        let mut state = self.state();
        if !state.content.partners.contains_key(name) {
            return Err(unknown("partner", name));
        }
        if let Some(mirror) = state.content.mirrors.values().find(|mirror| mirror.partner == *name) {
            return Err(CatalogueError::InMirror {
                what: "partner",
                name: name.clone(),
                mirror: mirror.name.clone(),
            });
        }
        self.apply(&[Change::NoPartner(name)])?;
        state.content.partners.remove(name);
        Ok(())
    }

    /// Creates a mirror of existing volumes; `revision` and `rebuilt` of the record are set here.
    ///
    /// # Errors
    /// Name or identity is taken, a volume or the partner is unknown or a volume mirrored already, a value is too long,
    /// or headers or the catalogue cannot be written: then there is no mirror.
    pub fn create_mirror(&self, mirror: MirrorRecord) -> Result<(), CatalogueError> {
        let mut state = self.state();
        let mirror = MirrorRecord { revision: 1, rebuilt: false, ..mirror };
        check_new(&state, &mirror)?;
        let with = |settled| self.write_mirror_headers(&state.content, &mirror, settled);
        let outcome = with(false).and_then(|()| self.apply(&[Change::Mirror(&mirror)]));
        let outcome = outcome.and_then(|()| {
            let settled = with(true);
            if settled.is_err() {
                self.apply(&[Change::NoMirror(mirror.id)])?;
            }
            settled
        });
        if outcome.is_err() {
            // Best effort: the next start restores what is not.
            let _ = self.write_member_headers(&state.content, &mirror.volumes);
            return outcome;
        }
        state.content.mirrors.insert(mirror.id, mirror);
        Ok(())
    }

    /// Stores a group's new state; when this returns it may be acted on. A header that cannot be written is no reason to
    /// refuse: a group must be able to fence itself though one of its disks is broken.
    ///
    /// # Errors
    /// The mirror does not exist, epoch or incarnation would fall, the state is too long, or the catalogue cannot be
    /// written: then the old state stands, though a crash now may bring up the new one.
    pub fn update_group(&self, id: MirrorId, group: GroupRecord) -> Result<Vec<Notice>, CatalogueError> {
        let mut state = self.state();
        let old = state.content.mirrors.get(&id).ok_or_else(|| CatalogueError::unknown_mirror(id))?;
        bound("group state", &old.name, group.state.len(), 0, GROUP_STATE_BYTES_MAX)?;
        if group.epoch < old.group.epoch || group.incarnation < old.group.incarnation {
            return Err(CatalogueError::Falls {
                mirror: old.name.clone(),
                epoch: old.group.epoch,
                incarnation: old.group.incarnation,
            });
        }
        let rises = group.epoch > old.group.epoch || group.incarnation > old.group.incarnation;
        let new = MirrorRecord {
            rebuilt: old.rebuilt && !rises,
            revision: old.revision.saturating_add(1),
            group,
            ..old.clone()
        };
        let notices = self.write_group_headers(&state.content, &new);
        self.apply(&[Change::Mirror(&new)])?;
        state.content.mirrors.insert(id, new);
        Ok(notices)
    }

    /// Changes what an operator wants of a mirror: its RPO budget and its policies. Identity, volumes and state of the
    /// group stay as they are here, whatever `wanted` says. A header that cannot be written is no reason to refuse: it may
    /// be on the very disk for whose sake a policy is changed.
    ///
    /// # Errors
    /// The mirror does not exist, or the catalogue cannot be written: then nothing changes, though a crash now may bring
    /// up the change.
    pub fn update_policy(
        &self,
        wanted: &MirrorRecord,
    ) -> Result<(MirrorRecord, Vec<Notice>), CatalogueError> {
        let mut state = self.state();
        let old = state.content.mirrors.get(&wanted.id);
        let old = old.ok_or_else(|| CatalogueError::unknown_mirror(wanted.id))?;
        let new = MirrorRecord {
            mode: wanted.mode,
            on_link_failure: wanted.on_link_failure,
            rpo_seconds: wanted.rpo_seconds,
            overload: wanted.overload,
            bandwidth: wanted.bandwidth,
            resync_rate: wanted.resync_rate,
            revision: old.revision.saturating_add(1),
            ..old.clone()
        };
        let notices = self.write_group_headers(&state.content, &new);
        self.apply(&[Change::Mirror(&new)])?;
        state.content.mirrors.insert(new.id, new.clone());
        Ok((new, notices))
    }

    /// Deletes a mirror; its volumes stay.
    ///
    /// # Errors
    /// It does not exist, or headers or the catalogue cannot be written.
    pub fn delete_mirror(&self, id: MirrorId) -> Result<Vec<Notice>, CatalogueError> {
        let mut state = self.state();
        let mirror = state.content.mirrors.get(&id).cloned();
        let mirror = mirror.ok_or_else(|| CatalogueError::unknown_mirror(id))?;
        if let Err(error) = self.write_mirror_headers(&state.content, &mirror, false) {
            let _ = self.write_mirror_headers(&state.content, &mirror, true);
            return Err(error);
        }
        self.apply(&[Change::NoMirror(id)])?;
        state.content.mirrors.remove(&id);
        Ok(self.write_member_headers(&state.content, &mirror.volumes))
    }

    pub(super) fn apply(&self, changes: &[Change<'_>]) -> Result<(), CatalogueError> {
        self.fuse.step().map_err(file_error("writing", std::path::Path::new(super::FILE_NAME)))?;
        self.store.apply(changes)
    }

    pub(super) fn write_header(
        &self,
        content: &Content,
        volume: &VolumeRecord,
        life: Life,
        mirror: Option<MirrorPart>,
    ) -> Result<(), CatalogueError> {
        let folder = self.folder(volume).ok_or_else(|| CatalogueError::UnknownPool(volume.pool.clone()))?;
        let header = Header { site: content.site, life, volume: volume.clone(), mirror };
        let written = header.write(&folder, &self.fuse);
        written.map_err(file_error("writing header", &folder.join(FILE_NAME)))
    }

    /// Writes the headers of all of a mirror's volumes with it; stops at the first failure.
    fn write_mirror_headers(
        &self,
        content: &Content,
        mirror: &MirrorRecord,
        settled: bool,
    ) -> Result<(), CatalogueError> {
        for (index, volume) in content.members(&mirror.volumes).enumerate() {
            let part = content.part(mirror, index, settled);
            self.write_header(content, volume, Life::Live, part)?;
        }
        Ok(())
    }

    /// Writes a mirror's new record to its volumes' headers, as far as they can be written.
    fn write_group_headers(&self, content: &Content, mirror: &MirrorRecord) -> Vec<Notice> {
        let mut notices = Vec::new();
        for (index, volume) in content.members(&mirror.volumes).enumerate() {
            let part = content.part(mirror, index, true);
            if let Err(error) = self.write_header(content, volume, Life::Live, part) {
                notices.push(Notice::HeaderNotWritten {
                    volume: volume.name.clone(),
                    reason: error.to_string(),
                });
            }
        }
        notices
    }

    /// Writes the headers of volumes that are in no mirror.
    fn write_member_headers(&self, content: &Content, volumes: &[VolumeId]) -> Vec<Notice> {
        let mut notices = Vec::new();
        for volume in content.members(volumes) {
            if let Err(error) = self.write_header(content, volume, Life::Live, None) {
                notices.push(Notice::HeaderNotWritten {
                    volume: volume.name.clone(),
                    reason: error.to_string(),
                });
            }
        }
        notices
    }
}

impl Content {
    /// The volumes with these identities; those of a mirror all exist.
    fn members<'a>(&'a self, volumes: &'a [VolumeId]) -> impl Iterator<Item = &'a VolumeRecord> {
        volumes.iter().filter_map(|id| self.volumes.get(id))
    }

    /// What the header of the mirror's volume with this index says of the mirror.
    pub(super) fn part(&self, mirror: &MirrorRecord, index: usize, settled: bool) -> Option<MirrorPart> {
        let partner = self.partners.get(&mirror.partner)?.clone();
        Some(MirrorPart {
            settled,
            index: block::VolumeIndex(u16::try_from(index).ok()?),
            volume_count: u16::try_from(mirror.volumes.len()).ok()?,
            mirror: MirrorRecord { volumes: Vec::new(), ..mirror.clone() },
            partner,
        })
    }
}

fn check_new(state: &State, mirror: &MirrorRecord) -> Result<(), CatalogueError> {
    let content = &state.content;
    let count = mirror.volumes.len();
    if !(1..=MIRROR_VOLUMES_MAX).contains(&count) {
        return Err(CatalogueError::Bound {
            what: "list of volumes",
            name: mirror.name.clone(),
            actual: count,
            unit: "entries",
            least: 1,
            most: MIRROR_VOLUMES_MAX,
        });
    }
    bound("group state", &mirror.name, mirror.group.state.len(), 0, GROUP_STATE_BYTES_MAX)?;
    if content.mirrors.values().any(|other| other.name == mirror.name || other.id == mirror.id) {
        return Err(exists("mirror", mirror.name.clone()));
    }
    if !content.partners.contains_key(&mirror.partner) {
        return Err(unknown("partner", &mirror.partner));
    }
    for (place, id) in mirror.volumes.iter().enumerate() {
        let volume = content.volumes.get(id).ok_or_else(|| CatalogueError::unknown_volume(*id))?;
        let taken = content.mirror_of(*id).map(|(other, _)| other.name.clone());
        let twice = mirror.volumes.iter().take(place).any(|earlier| earlier == id);
        if let Some(other) = taken.or_else(|| twice.then(|| mirror.name.clone())) {
            return Err(CatalogueError::InMirror {
                what: "volume",
                name: volume.name.clone(),
                mirror: other,
            });
        }
    }
    Ok(())
}

fn bound(
    what: &'static str,
    name: &VolumeName,
    actual: usize,
    least: usize,
    most: usize,
) -> Result<(), CatalogueError> {
    if (least..=most).contains(&actual) {
        return Ok(());
    }
    Err(CatalogueError::Bound { what, name: name.clone(), actual, unit: "bytes", least, most })
}

pub(super) const fn exists(what: &'static str, name: VolumeName) -> CatalogueError {
    CatalogueError::Exists { what, name }
}

pub(super) fn unknown(what: &'static str, name: &VolumeName) -> CatalogueError {
    CatalogueError::Unknown { what, name: name.to_string() }
}
