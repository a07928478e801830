//! Tenants: whose domain keys wrap the keys of volumes, and whether they are locked.
//!
//! A volume's tenant stands in its wrapped-key record, authenticated by the wraps. A tenant's row holds the domain key for new
//! wraps; what wrapped a volume's key stands in the volume's record, so that the row is not needed to open it. After a
//! rebuild the rows are made from the records: names are lost, and all but the default tenant are locked, as they may have
//! been. docs/formats/catalogue.md, docs/formats/keys.md.

use std::collections::BTreeMap;

use block::{TenantId, VolumeId, VolumeName};
use crypto::{KeyRecord, RecordError, RootKind, WrappedDomainKey};
use serde::{Deserialize, Serialize};

use super::change::{exists, unknown};
use super::error::{CatalogueError, file_error};
use super::header::{FILE_NAME, Life};
use super::record::hexadecimal;
use super::store::{Change, Content};
use super::{Catalogue, VolumeRecord};

/// The most tenants of a site.
pub const TENANTS_MAX: usize = 4096;

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its identity, the same at both sites of a mirror.
    pub id: TenantId,
    /// Its name, unique on the site.
    pub name: VolumeName,
    /// True while its volumes are not to be opened.
    pub locked: bool,
    /// Its newest domain key; none before it has a volume.
    pub domain: Option<DomainRecord>,
}

/// A domain key as it was wrapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRecord {
    /// Counts the tenant's domain keys, from 1.
    pub version: u32,
    /// The kind of root that wrapped it, by the scheme of its address.
    pub root: String,
    /// What the root made.
    #[serde(with = "hexadecimal")]
    pub wrapped: Vec<u8>,
}

impl From<&WrappedDomainKey> for DomainRecord {
    fn from(domain: &WrappedDomainKey) -> Self {
        Self {
            version: domain.version,
            root: domain.root.name().to_owned(),
            wrapped: domain.bytes().to_vec(),
        }
    }
}

impl TenantRecord {
    /// The tenant of volumes that were created without one.
    pub fn of_default() -> Self {
        Self::named(TenantId::default(), "default")
    }

    fn named(id: TenantId, name: &str) -> Self {
        // Both names that are made here are allowed.
        let name = name.parse().unwrap_or_else(|_| unreachable!("'{name}' is a name"));
        Self { id, name, locked: false, domain: None }
    }

    /// A tenant of which only a volume's record is known: the partner's, or one found by a rebuild.
    pub fn of_record(record: &KeyRecord) -> Self {
        let id = record.domain().tenant;
        let tenant = if id == TenantId::default() {
            Self::of_default()
        } else {
            let digits = id.0.simple().to_string();
            Self::named(id, &format!("tenant-{}", digits.get(..12).unwrap_or(&digits)))
        };
        Self { domain: Some(record.domain().into()), ..tenant }
    }

    /// Its newest domain key as it was wrapped.
    ///
    /// # Errors
    /// The row holds what no daemon writes.
    pub fn wrapped_domain(&self) -> Result<Option<WrappedDomainKey>, RecordError> {
        let Some(domain) = &self.domain else { return Ok(None) };
        let root = RootKind::ALL.into_iter().find(|kind| kind.name() == domain.root);
        let root = root.ok_or(RecordError::Field("root of trust"))?;
        WrappedDomainKey::new(self.id, root, domain.version, domain.wrapped.clone()).map(Some)
    }
}

impl VolumeRecord {
    /// Its wrapped-key record; none if its key was wrapped before there were tenants, or the record is not understood.
    pub fn key_record(&self) -> Option<KeyRecord> {
        KeyRecord::decode(&self.wrapped_key).ok()
    }

    /// Whose it is.
    pub fn tenant(&self) -> TenantId {
        self.key_record().map_or(TenantId::default(), |record| record.domain().tenant)
    }
}

impl Content {
    /// The tenants of the volumes' records, for a rebuild.
    pub(super) fn tenants_of_volumes(&self) -> BTreeMap<TenantId, TenantRecord> {
        let mut tenants: BTreeMap<TenantId, TenantRecord> = BTreeMap::new();
        for record in self.volumes.values().filter_map(VolumeRecord::key_record) {
            let found = TenantRecord::of_record(&record);
            let locked = found.id != TenantId::default();
            let version = |tenant: &TenantRecord| tenant.domain.as_ref().map_or(0, |domain| domain.version);
            let known = tenants.entry(found.id).or_insert_with(|| found.clone());
            if version(&found) > version(known) {
                known.domain.clone_from(&found.domain);
            }
            known.locked = locked;
        }
        tenants
    }
}

impl Catalogue {
    /// All tenants, by name; the default one is always there.
    pub fn tenants(&self) -> Vec<TenantRecord> {
        let mut tenants = self.state().content.tenants.clone();
        tenants.entry(TenantId::default()).or_insert_with(TenantRecord::of_default);
        let mut tenants: Vec<_> = tenants.into_values().collect();
        tenants.sort_by(|one, other| one.name.cmp(&other.name));
        tenants
    }

    /// The tenant of that name.
    pub fn tenant(&self, name: &VolumeName) -> Option<TenantRecord> {
        self.tenants().into_iter().find(|tenant| tenant.name == *name)
    }

    /// The tenant of that identity.
    pub fn tenant_by_id(&self, id: TenantId) -> Option<TenantRecord> {
        let known = self.state().content.tenants.get(&id).cloned();
        known.or_else(|| (id == TenantId::default()).then(TenantRecord::of_default))
    }

    /// The volumes of a tenant, by name.
    pub fn volumes_of(&self, tenant: TenantId) -> Vec<VolumeRecord> {
        self.volumes().into_iter().filter(|volume| volume.tenant() == tenant).collect()
    }

    /// Adds a tenant, or replaces the one of its identity.
    ///
    /// # Errors
    /// Another tenant has the name, there are too many, or the catalogue cannot be written.
    pub fn store_tenant(&self, tenant: TenantRecord) -> Result<(), CatalogueError> {
        let mut state = self.state();
        let default = TenantRecord::of_default();
        let taken = state
            .content
            .tenants
            .values()
            .chain([&default])
            .any(|other| other.name == tenant.name && other.id != tenant.id);
        if taken {
            return Err(exists("tenant", tenant.name));
        }
        if state.content.tenants.len() >= TENANTS_MAX && !state.content.tenants.contains_key(&tenant.id) {
            return Err(CatalogueError::TooManyTenants { most: TENANTS_MAX });
        }
        self.apply(&[Change::Tenant(&tenant)])?;
        state.content.tenants.insert(tenant.id, tenant);
        Ok(())
    }

    /// Deletes a tenant that has no volumes. What of its key is left in the file goes with [`Self::scrub`].
    ///
    /// # Errors
    /// It does not exist, is the default one or has volumes, or the catalogue cannot be written.
    pub fn delete_tenant(&self, name: &VolumeName) -> Result<(), CatalogueError> {
        let mut state = self.state();
        let tenant = state.content.tenants.values().find(|tenant| tenant.name == *name).cloned();
        let tenant = tenant.ok_or_else(|| unknown("tenant", name))?;
        let volumes = state.content.volumes.values().chain(state.reserved.values());
        let count = volumes.filter(|volume| volume.tenant() == tenant.id).count();
        if count > 0 || tenant.id == TenantId::default() {
            return Err(CatalogueError::TenantInUse { tenant: tenant.name, volumes: count });
        }
        self.apply(&[Change::NoTenant(tenant.id)])?;
        state.content.tenants.remove(&tenant.id);
        Ok(())
    }

    /// Replaces a volume's wrapped key, in catalogue and header, and destroys the old wrap: the header's older slot is
    /// written too, and the catalogue's file anew. From the first step on both wraps open the same key, so a crash at any
    /// step leaves a volume that opens; what a crash left of the old wrap goes at the next start.
    ///
    /// # Errors
    /// As [`Self::change_volume`], then the old wrap stands. Or the old wrap cannot be destroyed: then the new one stands
    /// beside it.
    pub fn replace_key(&self, id: VolumeId, wrapped_key: Vec<u8>) -> Result<VolumeRecord, CatalogueError> {
        self.change_volume(id, |volume| volume.wrapped_key = wrapped_key)?;
        let state = self.state();
        // Looked up again: something else of it may have changed meanwhile, and an old header must not follow a new one.
        let volume = state.content.volumes.get(&id).cloned();
        let volume = volume.ok_or_else(|| CatalogueError::unknown_volume(id))?;
        let mirror = state.content.mirror_of(volume.id);
        let part = mirror.and_then(|(mirror, index)| state.content.part(mirror, usize::from(index.0), true));
        self.write_header(&state.content, &volume, Life::Live, part)?;
        drop(state);
        self.scrub()?;
        Ok(volume)
    }

    /// Destroys the wrapped key of a volume that was deleted and whose folder is not removed yet: in both slots of the header
    /// and in what was its place in the catalogue's file.
    ///
    /// # Errors
    /// Header or catalogue cannot be written. The header is overwritten again before the folder is removed.
    ///
    /// # Panics
    /// If the volume exists.
    pub fn destroy_key(&self, volume: &VolumeRecord) -> Result<(), CatalogueError> {
        let state = self.state();
        let nobody = !state.content.volumes.contains_key(&volume.id);
        assert!(nobody, "only the key of a deleted volume is destroyed");
        let erased = VolumeRecord { wrapped_key: vec![0; volume.wrapped_key.len()], ..volume.clone() };
        if self.folder(volume).is_some_and(|folder| folder.join(FILE_NAME).exists()) {
            for _slot in 0..2 {
                self.write_header(&state.content, &erased, Life::Deleting, None)?;
            }
        }
        drop(state);
        self.scrub()
    }

    /// Writes the catalogue's file anew and overwrites the old one, where rows that were replaced may still stand.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scrub(&self) -> Result<(), CatalogueError> {
        let state = self.state();
        self.fuse.step().map_err(file_error("scrubbing", std::path::Path::new(super::FILE_NAME)))?;
        self.store.scrub(&state.content, &self.fuse)
    }
}
