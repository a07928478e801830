//! Volumes: opening them at a start, creating and deleting them.

use std::path::Path;
use std::sync::Arc;

use block::{ByteCount, IopsLimit, TenantId, VolumeId, VolumeName};
use control::{Cache, Iops, ProblemKind, VolumeAccess, VolumeCreate};
use crypto::VolumeCipher;
use protocol::{GroupState, Role};
use store::File;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::files::{self, FilesError};
use super::{Site, clean, lock};
use crate::api::OperationError;
use crate::catalogue::{CatalogueError, MirrorRecord, TenantRecord, VolumeRecord};
use crate::group::{GroupVolume, MirrorSettings};
use crate::shard::{GroupStart, MirroredStart, ShardCommand, VolumeFiles};

/// A volume's size is in whole data units.
const SIZE_UNIT: u64 = block::DATA_UNIT_BYTES;

pub(super) fn problem(kind: ProblemKind, detail: impl Into<String>) -> OperationError {
    OperationError::new(kind, detail)
}

impl From<CatalogueError> for OperationError {
    fn from(error: CatalogueError) -> Self {
        Self::new(ProblemKind::Refused, error.to_string())
    }
}

impl From<FilesError> for OperationError {
    fn from(error: FilesError) -> Self {
        Self::new(ProblemKind::Refused, error.to_string())
    }
}

impl Site {
    /// Opens every volume and mirror of the catalogue and gives them to the shards. What cannot be opened is reported
    /// and stays offline; the rest is served.
    pub(super) fn open_groups(&self) {
        for mirror in self.catalogue().mirrors() {
            if let Err(error) = self.open_mirror(&mirror) {
                tracing::error!(mirror = %mirror.name, %error, "a mirror stays offline");
                for id in &mirror.volumes {
                    self.volume_in_trouble(*id, &error.detail);
                }
            }
        }
        for volume in self.catalogue().volumes() {
            if self.catalogue().mirror_of(volume.id).is_none()
                && let Err(error) = self.open_lone(&volume)
            {
                tracing::error!(volume = %volume.name, %error, "a volume stays offline");
                self.volume_in_trouble(volume.id, &error.detail);
            }
        }
    }

    fn volume_in_trouble(&self, id: VolumeId, reason: &str) {
        lock(&self.troubles).insert(id, reason.to_owned());
        if let Some(volume) = self.catalogue().volume_by_id(id) {
            // Paths and key files are for operators, who find them in the log and with `volume show`.
            self.exports().insert(&volume, None, "it is offline; the site's operator can tell why");
        }
    }

    pub(super) fn open_lone(&self, volume: &VolumeRecord) -> Result<(), OperationError> {
        let home = self.open_home(volume)?;
        let cipher = self.unlock(volume)?;
        self.add_lone(volume, home, cipher);
        Ok(())
    }

    pub(super) fn open_home(&self, volume: &VolumeRecord) -> Result<File, OperationError> {
        let folder = self.folder(volume)?;
        Ok(files::open_home(&folder, volume.size, volume.cache == Cache::None)?)
    }

    pub(super) fn folder(&self, volume: &VolumeRecord) -> Result<std::path::PathBuf, OperationError> {
        self.catalogue().folder(volume).ok_or_else(|| {
            let (name, pool) = (&volume.name, &volume.pool);
            problem(
                ProblemKind::Unavailable,
                format!("volume '{name}' is in pool '{pool}', which the settings lack"),
            )
        })
    }

    pub(super) fn limit(&self, volume: &VolumeRecord) -> IopsLimit {
        let class = self.settings.class(&volume.class);
        let by_class = class.map_or(IopsLimit::Unlimited, |class| class.limit(volume.size));
        volume.iops.map_or(by_class, |Iops(limit)| limit)
    }

    pub(super) fn group_volume(&self, volume: &VolumeRecord) -> GroupVolume {
        GroupVolume { id: volume.id, size: volume.size, limit: self.limit(volume) }
    }

    pub(super) fn add_lone(&self, volume: &VolumeRecord, home: File, cipher: Arc<VolumeCipher>) {
        let key = self.new_group(vec![volume.id], None);
        self.exports().insert(volume, Some(key), "the volume is being opened");
        let name = volume.name.to_string();
        let files = vec![VolumeFiles { id: volume.id, name, home, intent: None, cipher: Some(cipher) }];
        let start = GroupStart::Alone(vec![self.group_volume(volume)]);
        self.shard_of(key).send(ShardCommand::Add { key, files, start });
    }

    pub(super) fn mirror_settings(&self, mirror: &MirrorRecord, volumes: &[VolumeRecord]) -> MirrorSettings {
        let settings = &self.settings;
        MirrorSettings {
            mirror: mirror.id,
            site: self.catalogue().site(),
            volumes: volumes.iter().map(|volume| self.group_volume(volume)).collect(),
            ring: journal::RingBudget {
                bytes_max: settings.ring.0,
                // A record without payload costs about as much memory as its header; 64 Ki of them stay below 8 MiB.
                records_max: 1 << 16,
            },
            spill_bytes: settings.spill.0,
            cut_bytes: settings.cut.0,
            cut_interval: settings.cut_interval,
            region_bytes: settings.intent_region.0,
            intent_budget_regions: settings.intent_budget.0 / settings.intent_region.0,
            start_grace: settings.start_grace,
            retention: settings.retention,
            policy: self.mirror_policy(mirror),
        }
    }

    pub(super) fn mirror_volumes(&self, mirror: &MirrorRecord) -> Result<Vec<VolumeRecord>, OperationError> {
        mirror
            .volumes
            .iter()
            .map(|id| {
                self.catalogue().volume_by_id(*id).ok_or_else(|| {
                    let detail =
                        format!("mirror '{}' names volume {id}, which the catalogue lacks", mirror.name);
                    problem(ProblemKind::Internal, detail)
                })
            })
            .collect()
    }

    pub(super) fn open_mirror(&self, mirror: &MirrorRecord) -> Result<(), OperationError> {
        let state = GroupState::decode(&mirror.group.state)
            .map_err(|error| problem(ProblemKind::Internal, format!("mirror '{}': {error}", mirror.name)))?;
        let volumes = self.mirror_volumes(mirror)?;
        let region = self.settings.intent_region;
        // Before anything is touched: what is refused for want of a key is tried again.
        let unlocked = |volume| match state.role {
            Role::Primary => self.unlock(volume).map(Some),
            Role::Secondary => Ok(None),
        };
        let ciphers = volumes.iter().map(unlocked).collect::<Result<Vec<_>, _>>()?;
        let mut volume_files = Vec::new();
        let mut intents = Vec::new();
        for (volume, cipher) in volumes.iter().zip(ciphers) {
            let folder = self.folder(volume)?;
            let (map, intent) = files::open_intent(&folder, volume.id, volume.size, region)?;
            intents.push(map);
            let home = self.open_home(volume)?;
            let name = volume.name.to_string();
            volume_files.push(VolumeFiles { id: volume.id, name, home, intent: Some(intent), cipher });
        }
        self.clear_scratch(mirror);
        let folder = files::mirror_folder(&self.settings.data_dir, mirror.id);
        let (mut redo, mut recovered, mut checkpoint) = files::open_redo(&folder, mirror.id)?;
        if state.role == Role::Primary {
            checkpoint = files::empty_redo(&folder, &mut recovered, checkpoint)?;
        }
        redo.spill = files::open_spill(&folder, self.settings.spill).unwrap_or_else(|error| {
            tracing::warn!(%error, mirror = %mirror.name, "the mirror goes on without its spill file");
            None
        });
        let clean = clean::take(&folder, mirror.id, &state, &self.sizes(mirror))?.filter(|_| !mirror.rebuilt);
        let opened = files::opened(intents, clean, recovered, checkpoint);
        let mut settings = self.mirror_settings(mirror, &volumes);
        if redo.spill.is_none() {
            settings.spill_bytes = 0;
        }
        let start = MirroredStart { settings, state, opened, redo };
        self.add_mirrored(mirror, &volumes, volume_files, start);
        Ok(())
    }

    pub(super) fn add_mirrored(
        &self,
        mirror: &MirrorRecord,
        volumes: &[VolumeRecord],
        files: Vec<VolumeFiles>,
        start: MirroredStart,
    ) {
        let ids = volumes.iter().map(|volume| volume.id).collect();
        let key = self.new_group(ids, Some(mirror.id));
        for volume in volumes {
            let reason = "the mirror is being opened";
            self.exports().insert(volume, Some(key), reason);
        }
        let start = GroupStart::Mirrored(Box::new(start));
        self.shard_of(key).send(ShardCommand::Add { key, files, start });
    }

    /// Checks what a new volume asks for.
    fn check_volume(&self, create: &VolumeCreate) -> Result<(), OperationError> {
        let name = &create.name;
        if self.settings.class(&create.class).is_none() {
            let classes: Vec<_> = self.settings.classes.iter().map(|class| class.name.as_str()).collect();
            let detail = format!(
                "volume '{name}' cannot be made: there is no storage class '{}'; use one of {}",
                create.class,
                classes.join(", ")
            );
            return Err(problem(ProblemKind::Invalid, detail));
        }
        self.check_size(name, create.size_bytes)
    }

    /// Who may open the new volume, from its first moment on.
    fn first_access(&self, create: &VolumeCreate) -> Result<VolumeAccess, OperationError> {
        let refuse = |kind, reason: &dyn std::fmt::Display| {
            problem(kind, format!("volume '{}' cannot be made: {reason}", create.name))
        };
        if let Some(reason) = self.unreachable_by(&create.access) {
            return Err(refuse(ProblemKind::Refused, &reason));
        }
        let access = VolumeAccess::default().changed(&create.access);
        access.map_err(|error| refuse(ProblemKind::Invalid, &error))
    }

    /// Whose the new volume is.
    fn tenant_for(&self, create: &VolumeCreate) -> Result<TenantRecord, OperationError> {
        let tenant = match &create.tenant {
            Some(tenant) => self.known_tenant(tenant)?,
            None => {
                self.catalogue().tenant_by_id(TenantId::default()).unwrap_or_else(TenantRecord::of_default)
            }
        };
        if tenant.locked {
            let (name, tenant) = (&create.name, &tenant.name);
            let detail = format!(
                "volume '{name}' cannot be made: its tenant '{tenant}' is locked; run 'farshore tenant unlock {tenant}' first"
            );
            return Err(problem(ProblemKind::Refused, detail));
        }
        Ok(tenant)
    }

    pub(super) fn check_size(&self, name: &VolumeName, size: ByteCount) -> Result<(), OperationError> {
        if !size.0.is_multiple_of(SIZE_UNIT) || size < self.settings.minimum_size {
            let detail = format!(
                "volume '{name}' cannot have a size of {size}: use a multiple of 4096 bytes, at least {}",
                self.settings.minimum_size
            );
            return Err(problem(ProblemKind::Invalid, detail));
        }
        if i64::try_from(size.0).is_err() {
            let detail = format!("volume '{name}' cannot have a size of {size}: no file is that large");
            return Err(problem(ProblemKind::Invalid, detail));
        }
        Ok(())
    }

    /// What is worth saying of a volume's limit: that its shard is not expected to reach it.
    pub(super) fn limit_warning(&self, volume: &VolumeRecord) -> Option<String> {
        let IopsLimit::PerSecond(limit) = self.limit(volume) else {
            return None;
        };
        let estimate = self.settings.shard_iops_estimate;
        (limit > estimate).then(|| {
            format!(
                "volume '{}' may do {limit} IOPS, a shard of this site is expected to serve {estimate}: the limit may \
                 not be reached (setting shard_iops_estimate)",
                volume.name
            )
        })
    }

    /// Makes a volume: reserves its name, allocates all its space, then lets it exist.
    pub(super) fn make_volume(&self, create: &VolumeCreate) -> Result<VolumeRecord, OperationError> {
        self.check_volume(create)?;
        let access = self.first_access(create)?;
        let tenant = self.tenant_for(create)?;
        let id = VolumeId(Uuid::new_v4());
        let (key, wrapped_key) = self.new_key(&tenant, id).map_err(|error| {
            let detail = format!("volume '{}' cannot be made: no key for it: {}", create.name, error.detail);
            problem(error.kind, detail)
        })?;
        let pool = self.settings.pools.keys().next().cloned();
        let pool = pool.ok_or_else(|| problem(ProblemKind::Unavailable, "the settings name no pool"))?;
        let record = VolumeRecord {
            id,
            name: create.name.clone(),
            size: create.size_bytes,
            class: create.class.clone(),
            iops: create.iops,
            cache: create.cache,
            access,
            wrapped_key,
            pool,
            revision: 0,
        };
        let home = self.allocate_volume(&record)?;
        self.add_lone(&record, home, Arc::new(VolumeCipher::new(&key)));
        Ok(record)
    }

    /// Reserves, allocates and commits a volume; nothing is left of a failed attempt.
    pub(super) fn allocate_volume(&self, record: &VolumeRecord) -> Result<File, OperationError> {
        let folder =
            self.catalogue().reserve_volume(record.clone()).map_err(|error| self.conflict(record, error))?;
        let made = make_home(&folder, record.size, record.cache == Cache::None)
            .map_err(|error| {
                let detail = format!("volume '{}' cannot be made: {error}", record.name);
                problem(ProblemKind::Refused, detail)
            })
            .and_then(|home| Ok(self.catalogue().commit_volume(record.id).map(|()| home)?));
        if made.is_err()
            && let Err(error) = self.catalogue().discard_volume(record.id)
        {
            tracing::warn!(%error, "what a failed create left is removed at the next start");
        }
        made
    }

    fn conflict(&self, record: &VolumeRecord, error: CatalogueError) -> OperationError {
        let taken = self.catalogue().volume(&record.name).is_some();
        problem(if taken { ProblemKind::Conflict } else { ProblemKind::Refused }, error.to_string())
    }

    /// Ends a group on its shard and waits until nothing of it is left there.
    pub(super) async fn end_group(&self, key: crate::shard::GroupKey) -> Result<(), OperationError> {
        let (done, gone) = oneshot::channel();
        self.shard_of(key).send(ShardCommand::Remove { key, done });
        gone.await.map_err(|_| problem(ProblemKind::Internal, "the volume's shard does not answer"))?;
        self.forget_group(key);
        Ok(())
    }
}

fn make_home(folder: &Path, size: ByteCount, direct: bool) -> Result<File, store::FileError> {
    File::create_thick(&folder.join(files::DATA_FILE), size.0, direct)
}
