//! The catalogue: which volumes, partners and mirrors this site has, and each mirror's epoch, role and lineage.
//!
//! Guarantees: a change is durable when its call returns, wholly or not at all; a group's epoch and incarnation never
//! fall; a volume's older copy never overrides a later change of it; and the catalogue can be rebuilt from the volumes'
//! headers, which every change writes *before* the catalogue's own transaction. The state of a consistency group is opaque
//! bytes here. Formats and the order of writes are docs/formats/catalogue.md's. Calls block on the disk; they belong on a
//! thread that may.

mod change;
mod error;
mod fuse;
mod header;
mod lock;
mod notice;
mod open;
mod pool;
mod rebuild;
mod record;
mod seal;
mod store;
mod tenant;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{MirrorId, SiteId, VolumeId, VolumeIndex, VolumeName};

pub use error::CatalogueError;
pub use header::FILE_NAME as HEADER_FILE;
pub use lock::DirectoryLock;
pub use notice::Notice;
pub use pool::remove_folder;
pub use record::{
    CLASS_BYTES_MAX, GROUP_STATE_BYTES_MAX, GroupRecord, MirrorRecord, PartnerRecord, VolumeRecord,
    WRAPPED_KEY_BYTES_MAX,
};
pub use tenant::{DomainRecord, TENANTS_MAX, TenantRecord};

use fuse::Fuse;
use pool::Pools;
use store::{Content, Store};

/// The most volumes in a mirror.
pub const MIRROR_VOLUMES_MAX: usize = 256;
/// The catalogue's file in the data directory.
const FILE_NAME: &str = "catalogue.redb";

/// The open catalogue; one a data directory.
#[derive(Debug)]
pub struct Catalogue {
    store: Store,
    pools: Pools,
    state: Mutex<State>,
    fuse: Fuse,
    _lock: DirectoryLock,
}

#[derive(Debug)]
struct State {
    content: Content,
    /// Volumes that are being created: names and identities taken, not yet in the catalogue.
    reserved: BTreeMap<VolumeId, VolumeRecord>,
    /// Folders of unfinished creates and deletes, found at the start.
    leftovers: Vec<PathBuf>,
}

impl Catalogue {
    /// This site's identity, made with the catalogue and kept by a rebuild.
    pub fn site(&self) -> SiteId {
        self.state().content.site
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Vec<VolumeRecord> {
        let mut volumes: Vec<_> = self.state().content.volumes.values().cloned().collect();
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        volumes
    }

    /// The volume of that name.
    pub fn volume(&self, name: &VolumeName) -> Option<VolumeRecord> {
        let state = self.state();
        state.content.volumes.values().find(|volume| volume.name == *name).cloned()
    }

    /// The volume of that identity.
    pub fn volume_by_id(&self, id: VolumeId) -> Option<VolumeRecord> {
        self.state().content.volumes.get(&id).cloned()
    }

    /// The folder of the volume's files; none if its pool is not in the settings.
    pub fn folder(&self, volume: &VolumeRecord) -> Option<PathBuf> {
        let pool = self.pools.get(&volume.pool)?;
        Some(pool.join(volume.id.to_string()))
    }

    /// The mirror that the volume is part of, and its index there.
    pub fn mirror_of(&self, volume: VolumeId) -> Option<(MirrorRecord, VolumeIndex)> {
        self.state().content.mirror_of(volume).map(|(mirror, index)| (mirror.clone(), index))
    }

    /// All partners, by name.
    pub fn partners(&self) -> Vec<PartnerRecord> {
        self.state().content.partners.values().cloned().collect()
    }

    /// The partner of that name.
    pub fn partner(&self, name: &VolumeName) -> Option<PartnerRecord> {
        self.state().content.partners.get(name).cloned()
    }

    /// All mirrors, by name.
    pub fn mirrors(&self) -> Vec<MirrorRecord> {
        let mut mirrors: Vec<_> = self.state().content.mirrors.values().cloned().collect();
        mirrors.sort_by(|one, other| one.name.cmp(&other.name));
        mirrors
    }

    /// The mirror of that name.
    pub fn mirror(&self, name: &VolumeName) -> Option<MirrorRecord> {
        let state = self.state();
        state.content.mirrors.values().find(|mirror| mirror.name == *name).cloned()
    }

    /// The mirror of that identity.
    pub fn mirror_by_id(&self, id: MirrorId) -> Option<MirrorRecord> {
        self.state().content.mirrors.get(&id).cloned()
    }

    /// The folders that unfinished creates and deletes left before this start, once; to be removed with [`remove_folder`].
    pub fn take_leftovers(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.state().leftovers)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Memory changes only after the store has, so a panic between cannot leave it wrong.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn mirror_of(&self, volume: VolumeId) -> Option<(&MirrorRecord, VolumeIndex)> {
        self.mirrors.values().find_map(|mirror| {
            let place = mirror.volumes.iter().position(|member| *member == volume)?;
            Some((mirror, VolumeIndex(u16::try_from(place).ok()?)))
        })
    }
}
