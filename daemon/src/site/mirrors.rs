//! Mirrors: creating both sides, deleting them, failing over.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use block::IopsLimit;
use block::{Epoch, MirrorId, VolumeName};
use control::{
    Cache, Iops, LinkFailure, MirrorCreate, MirrorMode, Overload, ProblemKind, Rate, TlsRule,
    VolumeAccessChange,
};
use journal::{Checkpoint, Recovered, RedoConfig};
use protocol::{CreateMirror, GroupState, Message, MirrorVolume, RefusalCode, Role};
use store::File;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::partners::refusal;
use super::volumes::problem;
use super::{Site, files, group_record};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, VolumeRecord};
use crate::group::{CleanState, LossReport, OpenedMirror, RewindTo};
use crate::shard::{GroupKey, GroupSnapshot, MirroredStart, RedoFiles, ShardCommand, Verb, VolumeFiles};

/// A promotion applies what is committed first; a long redo log takes its time.
const FAILOVER_LIMIT: Duration = Duration::from_secs(300);
pub(super) const POLL: Duration = Duration::from_millis(10);

/// The new files of a mirror on one side.
struct MirrorFiles {
    folder: PathBuf,
    intents: Vec<File>,
    redo: RedoFiles,
    opened: OpenedMirror,
}

impl Site {
    fn redo_config(&self) -> Result<RedoConfig, OperationError> {
        RedoConfig::new(self.settings.redo_segments.get(), self.settings.redo_segment.0).map_err(|error| {
            problem(ProblemKind::Internal, format!("the settings' redo log is not possible: {error}"))
        })
    }

    /// Makes the files of a mirror; nothing is left of a failed attempt.
    fn make_mirror_files(
        &self,
        mirror: MirrorId,
        volumes: &[VolumeRecord],
        state: &GroupState,
    ) -> Result<MirrorFiles, OperationError> {
        let folder = files::mirror_folder(&self.settings.data_dir, mirror);
        let made = self.try_mirror_files(&folder, mirror, volumes, state);
        if made.is_err()
            && let Err(error) = files::remove_mirror_folder(&folder)
        {
            tracing::warn!(%error, "what a failed mirror left cannot be removed");
        }
        let (intents, redo, opened) = made?;
        Ok(MirrorFiles { folder, intents, redo, opened })
    }

    fn try_mirror_files(
        &self,
        folder: &std::path::Path,
        mirror: MirrorId,
        volumes: &[VolumeRecord],
        state: &GroupState,
    ) -> Result<(Vec<File>, RedoFiles, OpenedMirror), OperationError> {
        let mut maps = Vec::new();
        let mut intents = Vec::new();
        for volume in volumes {
            let region = self.settings.intent_region;
            let (map, file) = files::create_intent(&self.folder(volume)?, volume.id, volume.size, region)?;
            maps.push(map);
            intents.push(file);
        }
        let made: (RedoFiles, Recovered, Checkpoint) =
            files::create_redo(folder, mirror, self.redo_config()?, state)?;
        let (mut redo, recovered, checkpoint) = made;
        redo.spill = files::open_spill(folder, self.settings.spill)?;
        files::sync_folder(folder)?;
        Ok((intents, redo, files::opened(maps, None, recovered, checkpoint)))
    }

    /// `mirror create` at the primary: the partner first, then this side.
    pub(super) async fn make_mirror(
        self: &Arc<Self>,
        create: MirrorCreate,
    ) -> Result<MirrorRecord, OperationError> {
        let name = &create.name;
        let partner = self.catalogue().partner(&create.partner).ok_or_else(|| {
            let detail = format!(
                "partner '{}' is not known: add it with 'farshore partner add' first",
                create.partner
            );
            problem(ProblemKind::NotFound, detail)
        })?;
        if self.catalogue().mirror(name).is_some() {
            let detail = format!("mirror '{name}' exists already: choose another name or delete it first");
            return Err(problem(ProblemKind::Conflict, detail));
        }
        let volumes = self.check_mirror_volumes(&create)?;
        self.check_room(name, &volumes).await?;
        let site = self.catalogue().site();
        let mirror = MirrorRecord {
            id: MirrorId(Uuid::new_v4()),
            name: name.clone(),
            partner: create.partner.clone(),
            mode: create.mode,
            on_link_failure: create.on_link_failure,
            rpo_seconds: create.rpo_seconds.unwrap_or(self.settings.rpo_seconds),
            overload: create.overload,
            bandwidth: create.bandwidth,
            resync_rate: create.resync_rate,
            volumes: volumes.iter().map(|volume| volume.id).collect(),
            group: group_record(&GroupState::new_primary(site)),
            revision: 0,
            rebuilt: false,
        };
        let request = CreateMirror {
            mirror: mirror.id,
            name: name.to_string(),
            origin: site,
            rpo_seconds: u64::from(mirror.rpo_seconds.get()),
            key_fingerprint: tokio::task::block_in_place(|| self.keys.fingerprint())?,
            volumes: volumes.iter().map(to_mirror_volume).collect(),
        };
        let made = match self.ask_to_create(&partner, request).await {
            Ok(()) => self.make_primary(&mirror, volumes).await,
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            // A refusal left nothing; a lost answer may have.
            if let Err(trouble) = self.ask_to_delete(&partner, mirror.id, Epoch(1)).await {
                tracing::warn!(error = %trouble, "the partner may keep the secondary of a mirror that was not made");
            }
            return Err(error);
        }
        Ok(mirror)
    }

    fn check_mirror_volumes(&self, create: &MirrorCreate) -> Result<Vec<VolumeRecord>, OperationError> {
        let mut volumes = Vec::new();
        for volume_name in &create.volumes {
            let volume = self.catalogue().volume(volume_name).ok_or_else(|| {
                problem(
                    ProblemKind::NotFound,
                    format!("volume '{volume_name}' does not exist: create it first"),
                )
            })?;
            if let Some((mirror, _)) = self.catalogue().mirror_of(volume.id) {
                let detail = format!("volume '{volume_name}' is in mirror '{}' already", mirror.name);
                return Err(problem(ProblemKind::Conflict, detail));
            }
            let class = self.settings.class(&volume.class);
            if !class.is_some_and(|class| self.settings.may_mirror(class)) {
                let detail = format!(
                    "volume '{volume_name}' of class '{}' cannot be mirrored: only classes of {} IOPS per TiB can",
                    volume.class,
                    join(&self.settings.mirrored_iops_per_tib)
                );
                return Err(problem(ProblemKind::Refused, detail));
            }
            volumes.push(volume);
        }
        self.check_tenants(&create.name, &volumes)?;
        Ok(volumes)
    }

    /// A mirror's volumes go offline together, so they are of one tenant; one that is locked gives no keys.
    fn check_tenants(&self, name: &VolumeName, volumes: &[VolumeRecord]) -> Result<(), OperationError> {
        let tenant = volumes.first().map(VolumeRecord::tenant);
        if volumes.iter().any(|volume| Some(volume.tenant()) != tenant) {
            let detail = format!(
                "mirror '{name}' cannot be made: its volumes are of several tenants; make a mirror for each tenant"
            );
            return Err(problem(ProblemKind::Refused, detail));
        }
        match volumes.iter().find_map(|volume| self.lock_of(volume)) {
            Some(reason) => {
                Err(problem(ProblemKind::Refused, format!("mirror '{name}' cannot be made: {reason}")))
            }
            None => Ok(()),
        }
    }

    async fn make_primary(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        volumes: Vec<VolumeRecord>,
    ) -> Result<(), OperationError> {
        let keys: Vec<GroupKey> =
            volumes.iter().filter_map(|volume| self.group_of_volume(volume.id)).collect();
        if keys.len() != volumes.len() {
            let detail = format!("mirror '{}' cannot be made: one of its volumes is offline", mirror.name);
            return Err(problem(ProblemKind::Unavailable, detail));
        }
        let state = GroupState::new_primary(self.catalogue().site());
        let site = Arc::clone(self);
        let (record, group_state, members) = (mirror.clone(), state.clone(), volumes.clone());
        let made = tokio::task::spawn_blocking(move || {
            let made = site.make_mirror_files(record.id, &members, &group_state)?;
            if let Err(error) = site.catalogue().create_mirror(record) {
                let _ = files::remove_mirror_folder(&made.folder);
                return Err(OperationError::from(error));
            }
            Ok(made)
        });
        let MirrorFiles { intents, redo, opened, .. } = made.await.map_err(internal)??;
        let settings = self.mirror_settings(mirror, &volumes);
        let start = MirroredStart { settings, state, opened, redo };
        match keys.as_slice() {
            [key] => {
                self.set_mirror(*key, Some(mirror.id));
                self.shard_of(*key).send(ShardCommand::Attach { key: *key, intents, start: Box::new(start) });
                Ok(())
            }
            _ => {
                let joined = self.join_volumes(mirror, &volumes, &keys, intents, start).await;
                if joined.is_err() {
                    self.remove_mirror(mirror, false)?;
                }
                joined
            }
        }
    }

    /// Several lone volumes become one group: their hosts reconnect.
    async fn join_volumes(
        &self,
        mirror: &MirrorRecord,
        volumes: &[VolumeRecord],
        keys: &[GroupKey],
        intents: Vec<File>,
        mut start: MirroredStart,
    ) -> Result<(), OperationError> {
        let mut dirty = Vec::new();
        let mut volume_files = Vec::new();
        for ((volume, intent), map) in volumes.iter().zip(intents).zip(&mut start.opened.intents) {
            map.set_all();
            let mut all = engine::dirty_map::DirtyMap::default();
            all.set_all(volume.size);
            dirty.push(all);
            volume_files.push(VolumeFiles {
                id: volume.id,
                name: volume.name.to_string(),
                home: self.open_home(volume)?,
                intent: Some(intent),
                cipher: Some(self.unlock(volume)?),
            });
        }
        start.opened.clean = Some(CleanState { dirty, committed: None, journal: None });
        for key in keys {
            self.end_group(*key).await?;
        }
        self.add_mirrored(mirror, volumes, volume_files, start);
        Ok(())
    }

    /// A partner asks this side to hold a secondary.
    pub(super) async fn create_secondary(
        self: &Arc<Self>,
        partner: &VolumeName,
        create: CreateMirror,
    ) -> Message {
        let _changing = self.changes.lock().await;
        let site = Arc::clone(self);
        let partner = partner.clone();
        let made = tokio::task::spawn_blocking(move || site.make_secondary(&partner, &create)).await;
        match made {
            Ok(Ok(())) => Message::Created { site: self.catalogue().site() },
            Ok(Err((code, text))) => refusal(code, text),
            Err(error) => refusal(RefusalCode::Busy, error.to_string()),
        }
    }

    fn make_secondary(
        &self,
        partner: &VolumeName,
        create: &CreateMirror,
    ) -> Result<(), (RefusalCode, String)> {
        let mismatch = |text: String| (RefusalCode::Mismatch, text);
        let here = self.name();
        let unavailable =
            |error: OperationError| (RefusalCode::Mismatch, format!("site '{here}': {}", error.detail));
        let ours = self.keys.fingerprint().map_err(unavailable)?;
        if create.key_fingerprint != ours {
            let theirs = &create.key_fingerprint;
            return Err(mismatch(format!(
                "site '{here}' has another key-encryption key ({ours}) than the primary ({theirs}): both sites of a \
                 mirror share one; give both the same key file with --kek"
            )));
        }
        let name: VolumeName =
            create.name.parse().map_err(|error: block::NameError| mismatch(error.to_string()))?;
        if self.catalogue().mirror(&name).is_some() {
            return Err((
                RefusalCode::Conflict,
                format!("site '{here}' has a mirror '{name}' already: delete it there"),
            ));
        }
        self.check_replica_room(create)?;
        let mut volumes: Vec<VolumeRecord> = Vec::new();
        let made = create.volumes.iter().try_for_each(|volume| {
            volumes.push(self.make_replica(volume)?);
            Ok(())
        });
        let made = made.and_then(|()| self.open_secondary(partner, &name, create, &volumes));
        if made.is_err() {
            for volume in &volumes {
                self.exports().remove(volume.name.as_str());
                match self.catalogue().delete_volume(volume.id) {
                    // Nobody waits for its space.
                    Ok(folder) => {
                        if let Err(error) = self.catalogue().destroy_key(volume) {
                            tracing::warn!(%error, "the key of a replica that was not made is not destroyed yet");
                        }
                        drop(folder.map(|folder| self.removals.begin(volume.name.as_str(), folder)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a replica of a mirror that was not made cannot be removed");
                    }
                }
            }
        }
        made
    }

    fn make_replica(&self, volume: &MirrorVolume) -> Result<VolumeRecord, (RefusalCode, String)> {
        let here = self.name();
        let mismatch = |text: String| (RefusalCode::Mismatch, text);
        let name: VolumeName =
            volume.name.parse().map_err(|error: block::NameError| mismatch(error.to_string()))?;
        if self.catalogue().volume(&name).is_some() {
            let text = format!(
                "site '{here}' has a volume '{name}' already: delete it there, or mirror another name"
            );
            return Err((RefusalCode::Conflict, text));
        }
        let class = self.settings.class(&volume.class);
        if !class.is_some_and(|class| self.settings.may_mirror(class)) {
            let text = format!("site '{here}' has no storage class '{}' that can be mirrored", volume.class);
            return Err(mismatch(text));
        }
        let pool = self.settings.pools.keys().next().cloned();
        let pool = pool.ok_or_else(|| mismatch(format!("site '{here}' has no pool")))?;
        let record = VolumeRecord {
            id: volume.id,
            name,
            size: volume.size,
            class: volume.class.clone(),
            iops: volume.iops.map(to_iops),
            cache: Cache::None,
            access: super::access::to_access(&volume.access).map_err(mismatch)?,
            wrapped_key: volume.wrapped_key.clone(),
            pool,
            revision: 0,
        };
        self.accept_key(&record).map_err(mismatch)?;
        let access = record.access.clone();
        let tls = access.tls_required.then_some(TlsRule::Required);
        let change = VolumeAccessChange { allow: access.hosts, tls, ..VolumeAccessChange::default() };
        if let Some(reason) = self.unreachable_by(&change) {
            tracing::warn!(volume = %record.name, "after a failover here no host could open the replica: {reason}");
        }
        self.allocate_volume(&record)
            .map_err(|error| (RefusalCode::NoSpace, format!("site '{here}': {error}")))?;
        Ok(record)
    }

    fn open_secondary(
        &self,
        partner: &VolumeName,
        name: &VolumeName,
        create: &CreateMirror,
        volumes: &[VolumeRecord],
    ) -> Result<(), (RefusalCode, String)> {
        let here = self.name();
        let failed = |error: OperationError| (RefusalCode::NoSpace, format!("site '{here}': {error}"));
        let state = GroupState::new_secondary(create.origin);
        let homes: Result<Vec<File>, _> = volumes.iter().map(|volume| self.open_home(volume)).collect();
        let homes = homes.map_err(failed)?;
        let made = self.make_mirror_files(create.mirror, volumes, &state).map_err(failed)?;
        let rpo = u32::try_from(create.rpo_seconds).ok().and_then(NonZeroU32::new);
        let mirror = MirrorRecord {
            id: create.mirror,
            name: name.clone(),
            partner: partner.clone(),
            mode: MirrorMode::Async,
            on_link_failure: LinkFailure::default(),
            rpo_seconds: rpo.unwrap_or(self.settings.rpo_seconds),
            // Policies and limits are a site's own: an operator sets them where hosts are.
            overload: Overload::default(),
            bandwidth: Rate::default(),
            resync_rate: Rate::default(),
            volumes: volumes.iter().map(|volume| volume.id).collect(),
            group: group_record(&state),
            revision: 0,
            rebuilt: false,
        };
        let stored = self.catalogue().create_mirror(mirror.clone()).map_err(OperationError::from);
        if let Err(error) = stored {
            let _ = files::remove_mirror_folder(&made.folder);
            return Err(failed(error));
        }
        let mut volume_files = Vec::new();
        for ((volume, intent), home) in volumes.iter().zip(made.intents).zip(homes) {
            let name = volume.name.to_string();
            volume_files.push(VolumeFiles { id: volume.id, name, home, intent: Some(intent), cipher: None });
        }
        let settings = self.mirror_settings(&mirror, volumes);
        let start = MirroredStart { settings, state, opened: made.opened, redo: made.redo };
        self.add_mirrored(&mirror, volumes, volume_files, start);
        Ok(())
    }

    /// A partner deleted a mirror: this side forgets it too. An incomplete replica goes with it.
    pub(super) async fn delete_for_partner(
        self: &Arc<Self>,
        partner: &VolumeName,
        mirror: MirrorId,
        epoch: Epoch,
    ) -> Message {
        let Ok(_changing) = self.changes.try_lock() else {
            return refusal(
                RefusalCode::Busy,
                format!("site '{}' is busy with another change: try again", self.name()),
            );
        };
        let Some(record) = self.catalogue().mirror_by_id(mirror).filter(|record| record.partner == *partner)
        else {
            return Message::Deleted;
        };
        if epoch.0 < record.group.epoch {
            let text =
                format!("mirror '{}' is of epoch {} here: delete it here", record.name, record.group.epoch);
            return refusal(RefusalCode::StaleEpoch, text);
        }
        match self.forget_mirror(&record).await {
            Ok(()) => Message::Deleted,
            Err(error) => refusal(RefusalCode::Busy, error.detail),
        }
    }

    /// Takes a mirror away on this side. A complete secondary becomes a volume of its own; an incomplete one is removed.
    pub(super) async fn forget_mirror(self: &Arc<Self>, mirror: &MirrorRecord) -> Result<(), OperationError> {
        let state = GroupState::decode(&mirror.group.state).map_err(internal)?;
        let key = self.group_of_mirror(mirror.id);
        let incomplete = state.role == Role::Secondary && !state.consistent;
        if key.is_none() && state.role == Role::Secondary && !incomplete {
            let detail = format!(
                "mirror '{}' is offline here, and its redo log may hold writes that are not in its volumes yet: mend it \
                 and restart farshored before it is deleted",
                mirror.name
            );
            return Err(problem(ProblemKind::Unavailable, detail));
        }
        if let Some(key) = key {
            if incomplete {
                self.end_group(key).await?;
            } else {
                if state.role == Role::Secondary && !state.diverged {
                    // What is committed goes home first.
                    self.fail_over_group(mirror, key, None).await?;
                }
                self.unlock_group(mirror, key)?;
                self.shard_of(key).send(ShardCommand::Detach { key });
                // The answer comes behind the detach: nothing of the mirror is stored any more.
                self.snapshot(key).await?;
                self.set_mirror(key, None);
            }
        }
        let site = Arc::clone(self);
        let mirror = mirror.clone();
        tokio::task::spawn_blocking(move || site.remove_mirror(&mirror, incomplete))
            .await
            .map_err(internal)?
    }

    fn remove_mirror(&self, mirror: &MirrorRecord, incomplete: bool) -> Result<(), OperationError> {
        if incomplete {
            // Before the mirror is forgotten: an incomplete replica must never be served as a volume, whatever fails next.
            for id in &mirror.volumes {
                if let Some(volume) = self.catalogue().volume_by_id(*id) {
                    let folder = self.folder(&volume)?;
                    files::set_aside(&folder, files::DATA_FILE)?;
                }
            }
        }
        for notice in self.catalogue().delete_mirror(mirror.id)? {
            tracing::warn!("{notice}");
        }
        let folder = files::mirror_folder(&self.settings.data_dir, mirror.id);
        if let Err(error) = files::remove_mirror_folder(&folder) {
            tracing::warn!(%error, "the files of a deleted mirror stay behind");
        }
        for id in &mirror.volumes {
            let Some(volume) = self.catalogue().volume_by_id(*id) else {
                continue;
            };
            if incomplete {
                self.exports().remove(volume.name.as_str());
                let folder = self.catalogue().delete_volume(*id)?;
                if let Err(error) = self.catalogue().destroy_key(&volume) {
                    tracing::warn!(%error, "the key of a replica that is given up is not destroyed yet");
                }
                drop(folder.map(|folder| self.removals.begin(volume.name.as_str(), folder)));
            } else if let Ok(folder) = self.folder(&volume) {
                let intent = folder.join(files::INTENT_FILE);
                if let Err(error) = files::remove_if_there(&intent) {
                    tracing::warn!(%error, "the intent map of a deleted mirror stays behind");
                }
            }
        }
        Ok(())
    }

    pub(super) fn unlock_group(&self, mirror: &MirrorRecord, key: GroupKey) -> Result<(), OperationError> {
        let volumes = self.mirror_volumes(mirror)?;
        let ciphers: Result<Vec<_>, _> = volumes.iter().map(|volume| self.unlock(volume)).collect();
        self.shard_of(key).send(ShardCommand::Unlock { key, ciphers: ciphers? });
        // A lock that came between looking and sending has been sent already, or is seen now.
        let locked = volumes.iter().find_map(|volume| self.lock_of(volume));
        locked.map_or(Ok(()), |reason| {
            self.shard_of(key).send(ShardCommand::Lock { key, reason: reason.clone() });
            Err(problem(ProblemKind::Unavailable, reason))
        })
    }

    /// Promotes this side: the keys are opened first, then the group, and this waits until hosts are served.
    pub(super) async fn fail_over_group(
        &self,
        mirror: &MirrorRecord,
        key: GroupKey,
        at: Option<RewindTo>,
    ) -> Result<LossReport, OperationError> {
        self.verb(key, Verb::Loss { at }).await?;
        self.unlock_group(mirror, key)?;
        let report = self.verb(key, Verb::Failover { at }).await?;
        let report = report.ok_or_else(|| problem(ProblemKind::Internal, "the failover gave no report"))?;
        let promoted = async {
            loop {
                let snapshot = self.snapshot(key).await?;
                if snapshot.presented.is_ok() {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            }
        };
        match tokio::time::timeout(FAILOVER_LIMIT, promoted).await {
            Ok(Ok(())) => Ok(report),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let detail = format!(
                    "mirror '{}' is still being promoted: look at 'farshore mirror show' and the daemon's log",
                    mirror.name
                );
                Err(problem(ProblemKind::Unavailable, detail))
            }
        }
    }

    /// Has a group do a verb.
    pub(super) async fn verb(&self, key: GroupKey, verb: Verb) -> Result<Option<LossReport>, OperationError> {
        let (done, outcome) = oneshot::channel();
        self.shard_of(key).send(ShardCommand::Verb { key, verb, done });
        let outcome = outcome
            .await
            .map_err(|_| problem(ProblemKind::Internal, "the mirror's shard does not answer"))?;
        outcome.map_err(|refused| problem(ProblemKind::Refused, refused.to_string()))
    }

    /// A group as it is now.
    pub(super) async fn snapshot(&self, key: GroupKey) -> Result<GroupSnapshot, OperationError> {
        let (done, snapshot) = oneshot::channel();
        self.shard_of(key).send(ShardCommand::Snapshot { key, done });
        snapshot.await.map_err(|_| problem(ProblemKind::Internal, "the volume's shard does not answer"))
    }
}

pub(super) fn internal(error: impl std::fmt::Display) -> OperationError {
    problem(ProblemKind::Internal, error.to_string())
}

fn to_mirror_volume(volume: &VolumeRecord) -> MirrorVolume {
    MirrorVolume {
        id: volume.id,
        name: volume.name.to_string(),
        size: volume.size,
        class: volume.class.clone(),
        iops: volume.iops.map(|Iops(limit)| match limit {
            IopsLimit::Unlimited => 0,
            IopsLimit::PerSecond(limit) => limit.get(),
        }),
        wrapped_key: volume.wrapped_key.clone(),
        access: super::access::to_mirror_access(&volume.access),
    }
}

fn to_iops(iops: u32) -> Iops {
    Iops(NonZeroU32::new(iops).map_or(IopsLimit::Unlimited, IopsLimit::PerSecond))
}

fn join(numbers: &[NonZeroU32]) -> String {
    let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    numbers.join(", ")
}
