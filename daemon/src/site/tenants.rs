//! Tenants: making and deleting them, and locking them, which takes their volumes offline and wipes their keys.
//!
//! A lock is durable before it is acted on, and holds over restarts. It reaches the partners of this site's primaries; what
//! could not be told is a warning, as each site's lock stands for itself. docs/SECURITY.md.

use std::sync::Arc;
use std::time::Duration;

use block::{Epoch, TenantId, VolumeName};
use control::{ProblemKind, Role, TenantCreate, TenantView};
use protocol::{Message, RefusalCode, SetKeys, TenantLock};
use uuid::Uuid;

use super::mirrors::internal;
use super::partners::refusal;
use super::volumes::problem;
use super::{Site, lock};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, TenantRecord, VolumeRecord};
use crate::shard::{ShardCommand, Verb};

/// Volumes that are locked because their keys cannot be had are tried again after so long.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// A partner is told of a lock for at most so long.
const TELL_LIMIT: Duration = Duration::from_secs(10);

type Refused = (RefusalCode, String);

impl Site {
    pub(super) fn known_tenant(&self, name: &VolumeName) -> Result<TenantRecord, OperationError> {
        self.catalogue().tenant(name).ok_or_else(|| {
            let detail = format!("tenant '{name}' does not exist: see 'farshore tenant list'");
            problem(ProblemKind::NotFound, detail)
        })
    }

    pub(super) fn tenant_view(&self, tenant: &TenantRecord) -> TenantView {
        let volumes = self.catalogue().volumes_of(tenant.id);
        let newest = tenant.domain.as_ref().map(|domain| domain.version);
        let is_behind = |volume: &&VolumeRecord| {
            volume.key_record().map_or(0, |record| record.domain().version) < newest.unwrap_or(0)
        };
        TenantView {
            name: tenant.name.clone(),
            id: tenant.id,
            locked: tenant.locked,
            key_version: newest,
            root: tenant.domain.as_ref().map(|domain| domain.root.clone()),
            volumes_behind: volumes.iter().filter(is_behind).map(|volume| volume.name.clone()).collect(),
            volumes: volumes.into_iter().map(|volume| volume.name).collect(),
            warning: None,
        }
    }

    /// Makes a tenant with its first domain key. The caller holds `changes`.
    pub(super) fn make_tenant(&self, create: &TenantCreate) -> Result<TenantRecord, OperationError> {
        let name = &create.name;
        let id = create.id.unwrap_or_else(|| TenantId(Uuid::new_v4()));
        if self.catalogue().tenant(name).is_some() || self.catalogue().tenant_by_id(id).is_some() {
            let detail = format!(
                "tenant '{name}', or one of that identity, exists already: see 'farshore tenant list'"
            );
            return Err(problem(ProblemKind::Conflict, detail));
        }
        let tenant = TenantRecord { id, name: name.clone(), locked: false, domain: None };
        self.next_domain(&tenant)?;
        self.known_tenant(name)
    }

    /// Deletes a tenant without volumes. The caller holds `changes`.
    pub(super) fn remove_tenant(&self, name: &VolumeName) -> Result<(), OperationError> {
        self.known_tenant(name)?;
        self.catalogue().delete_tenant(name).map_err(|error| problem(error.kind(), error.to_string()))?;
        self.catalogue().scrub().map_err(|error| {
            let detail = format!("tenant '{name}' is deleted, but its key is not destroyed yet: {error}");
            problem(ProblemKind::Internal, detail)
        })
    }

    /// Locks a tenant here: when this returns its volumes have no connections and their keys are wiped.
    pub(super) async fn lock_tenant(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<TenantRecord, OperationError> {
        let tenant = self.set_lock(name, true).await?;
        for volume in self.catalogue().volumes_of(tenant.id) {
            let Some(reason) = self.lock_of(&volume) else { continue };
            // Before the shard is told: no connection is handed over behind that.
            self.exports().lock(volume.id);
            let Some(key) = self.group_of_volume(volume.id) else {
                lock(&self.troubles).insert(volume.id, reason);
                continue;
            };
            for key in [Some(key), self.drill_of(key)].into_iter().flatten() {
                self.shard_of(key).send(ShardCommand::Lock { key, reason: reason.clone() });
                // The answer comes behind the lock.
                self.snapshot(key).await?;
            }
            if self.drill_of(key).is_some() {
                // Its copy has no keys any more; one is begun anew when the tenant is unlocked.
                self.verb(key, Verb::StopDrill).await?;
            }
        }
        Ok(tenant)
    }

    /// Unlocks a tenant here, and opens its volumes; one that cannot be opened is reported, and tried again if its key is to
    /// blame.
    pub(super) async fn unlock_tenant(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<TenantRecord, OperationError> {
        let tenant = self.set_lock(name, false).await?;
        for volume in self.catalogue().volumes_of(tenant.id) {
            if let Err(error) = self.open_again(&volume).await {
                tracing::warn!(volume = %volume.name, %error, "a volume stays offline");
                lock(&self.troubles).insert(volume.id, error.detail);
            }
        }
        Ok(tenant)
    }

    async fn set_lock(
        self: &Arc<Self>,
        name: &VolumeName,
        locked: bool,
    ) -> Result<TenantRecord, OperationError> {
        let tenant = TenantRecord { locked, ..self.known_tenant(name)? };
        let (site, stored) = (Arc::clone(self), tenant.clone());
        tokio::task::spawn_blocking(move || site.catalogue().store_tenant(stored))
            .await
            .map_err(internal)??;
        Ok(tenant)
    }

    /// Opens a volume that was locked: gives its group the keys, or makes the group.
    async fn open_again(self: &Arc<Self>, volume: &VolumeRecord) -> Result<(), OperationError> {
        let Some(key) = self.group_of_volume(volume.id) else {
            let (site, volume) = (Arc::clone(self), volume.clone());
            return tokio::task::spawn_blocking(move || site.open_offline(&volume))
                .await
                .map_err(internal)?;
        };
        let mirror = self.catalogue().mirror_of(volume.id).map(|(mirror, _)| mirror);
        let secondary = mirror.as_ref().is_some_and(|mirror| mirror.group.role == Role::Secondary);
        // A secondary has no keys before its promotion, but for a drill, which is begun again.
        if !secondary {
            let members = match &mirror {
                Some(mirror) => self.mirror_volumes(mirror)?,
                None => vec![volume.clone()],
            };
            let ciphers = members.iter().map(|member| self.unlock(member)).collect::<Result<_, _>>()?;
            self.shard_of(key).send(ShardCommand::Unlock { key, ciphers });
            self.snapshot(key).await?;
        }
        lock(&self.troubles).remove(&volume.id);
        self.exports().unlock(volume.id);
        Ok(())
    }

    /// Opens a volume, or the mirror that it is in, which has no group yet.
    fn open_offline(&self, volume: &VolumeRecord) -> Result<(), OperationError> {
        let opened = match self.catalogue().mirror_of(volume.id) {
            Some((mirror, _)) => self.open_mirror(&mirror).map(|()| mirror.volumes),
            None => self.open_lone(volume).map(|()| vec![volume.id]),
        };
        for id in opened? {
            lock(&self.troubles).remove(&id);
        }
        Ok(())
    }

    /// Tries again and again to open the volumes that are locked because their keys could not be had.
    pub(super) async fn retry_locked(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RETRY_PAUSE).await;
            for volume in self.waiting_for_keys() {
                let _changing = self.changes.lock().await;
                // Another volume of the same mirror may have brought it, or an operator.
                if self.group_of_volume(volume.id).is_some() {
                    continue;
                }
                let (site, tried) = (Arc::clone(&self), volume.clone());
                match tokio::task::spawn_blocking(move || site.open_offline(&tried)).await {
                    Ok(Ok(())) => tracing::info!(volume = %volume.name, "the volume is unlocked"),
                    Ok(Err(error)) => self.note_trouble(&volume, &error),
                    Err(error) => tracing::error!(volume = %volume.name, %error, "opening a volume ended"),
                }
            }
        }
    }

    fn note_trouble(&self, volume: &VolumeRecord, error: &OperationError) {
        let before = lock(&self.troubles).insert(volume.id, error.detail.clone());
        if before.as_ref() != Some(&error.detail) {
            tracing::warn!(volume = %volume.name, %error, "a volume stays offline");
        }
    }

    fn waiting_for_keys(&self) -> Vec<VolumeRecord> {
        let troubles = lock(&self.troubles).clone();
        let waits = |volume: &VolumeRecord| {
            let locked = troubles.get(&volume.id).is_some_and(|trouble| trouble.contains("is locked"));
            locked && self.lock_of(volume).is_none()
        };
        self.catalogue().volumes().into_iter().filter(waits).collect()
    }

    /// Tells the partners of this site's primaries of a tenant's lock; what cannot be told is a sentence each.
    pub(super) async fn tell_lock(&self, tenant: &TenantRecord) -> Vec<String> {
        let mut untold = Vec::new();
        for mirror in self.catalogue().mirrors() {
            let ours = mirror.group.role == Role::Primary
                && self
                    .mirror_volumes(&mirror)
                    .is_ok_and(|volumes| volumes.first().is_some_and(|volume| volume.tenant() == tenant.id));
            let partner = self.catalogue().partner(&mirror.partner);
            let Some(partner) = partner.filter(|_| ours) else { continue };
            let lock = if tenant.locked { TenantLock::Lock } else { TenantLock::Unlock };
            let epoch = Epoch(mirror.group.epoch);
            let set = SetKeys { mirror: mirror.id, epoch, lock, volumes: Vec::new() };
            if let Err(error) = self.ask_to_set_keys(&partner, set, TELL_LIMIT).await {
                untold.push(format!(
                    "partner '{}' was not told of the lock of tenant '{}' ({}): do the same there",
                    partner.name, tenant.name, error.detail
                ));
            }
        }
        untold
    }

    /// The primary of a mirror gives new wraps of its volumes' keys, or says that their tenant is locked.
    pub(super) async fn take_keys(self: &Arc<Self>, partner: &VolumeName, set: SetKeys) -> Message {
        match self.try_take_keys(partner, set).await {
            Ok(()) => Message::KeysSet,
            Err((code, text)) => refusal(code, format!("site '{}': {text}", self.name())),
        }
    }

    async fn try_take_keys(self: &Arc<Self>, partner: &VolumeName, set: SetKeys) -> Result<(), Refused> {
        // A site that is changing its own keys would wait for this one, and this one for it.
        let waited = tokio::time::timeout(TELL_LIMIT / 2, self.changes.lock()).await;
        let _changing = waited.map_err(|_| (RefusalCode::Busy, "it is busy: try again".to_owned()))?;
        let mirror = self.mirror_told_of(partner, &set)?;
        let failed = |error: OperationError| (RefusalCode::Mismatch, error.detail);
        for (id, wrapped_key) in set.volumes {
            let volume = self.catalogue().volume_by_id(id).filter(|_| mirror.volumes.contains(&id));
            let volume =
                volume.ok_or_else(|| (RefusalCode::Mismatch, format!("the mirror has no volume {id}")))?;
            let site = Arc::clone(self);
            let stored = tokio::task::spawn_blocking(move || {
                site.check_wrap(&volume, &wrapped_key)?;
                site.catalogue().replace_key(id, wrapped_key)?;
                Ok::<_, OperationError>(())
            });
            stored.await.map_err(internal).map_err(failed)?.map_err(failed)?;
            self.record("key rotate", &format!("replica {id}"), partner);
        }
        let tenant = self.mirror_volumes(&mirror).map_err(failed)?.first().map(VolumeRecord::tenant);
        let tenant = tenant.and_then(|id| self.catalogue().tenant_by_id(id));
        let Some(tenant) = tenant else { return Ok(()) };
        match set.lock {
            TenantLock::Keep => {}
            TenantLock::Lock => {
                self.record("tenant lock", &tenant.name.to_string(), partner);
                self.lock_tenant(&tenant.name).await.map_err(failed)?;
            }
            TenantLock::Unlock => {
                self.record("tenant unlock", &tenant.name.to_string(), partner);
                self.unlock_tenant(&tenant.name).await.map_err(failed)?;
            }
        }
        Ok(())
    }

    fn mirror_told_of(&self, partner: &VolumeName, set: &SetKeys) -> Result<MirrorRecord, Refused> {
        let mirror = self.catalogue().mirror_by_id(set.mirror);
        let mirror =
            mirror.ok_or_else(|| (RefusalCode::UnknownMirror, "it does not know this mirror".to_owned()))?;
        if mirror.partner != *partner {
            let text = format!("mirror '{}' belongs to another partner than '{partner}'", mirror.name);
            return Err((RefusalCode::WrongPartner, text));
        }
        if set.epoch.0 < mirror.group.epoch || mirror.group.role == Role::Primary {
            let text = format!("mirror '{}' is of epoch {}", mirror.name, mirror.group.epoch);
            return Err((RefusalCode::StaleEpoch, text));
        }
        Ok(mirror)
    }
}
