//! Changes of a volume that exists: its size.
//!
//! What is durable comes first (file, header, catalogue), then the shard learns of it, then hosts. A crash in between
//! leaves a volume of the old size with a file that is larger, which the next resize uses.

use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, VolumeId, VolumeIndex, VolumeName};
use control::{Cache, ProblemKind, Role, VolumeResize, VolumeView};
use store::File;

use super::Site;
use super::files;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, VolumeRecord};
use crate::group::{IoFailure, IoId};
use crate::shard::{GroupKey, ShardCommand, Verb};

/// A partner may have to allocate much; beyond this it is taken for away.
const GROWTH_LIMIT: Duration = Duration::from_secs(60);
const GROWTH_POLL: Duration = Duration::from_millis(10);

impl Site {
    /// Makes a volume larger; the caller holds `changes`.
    pub(super) async fn resize_volume(
        self: &Arc<Self>,
        name: &VolumeName,
        resize: VolumeResize,
    ) -> Result<VolumeView, OperationError> {
        let old = self.known_volume(name)?;
        let size = resize.size_bytes;
        self.check_size(name, size)?;
        if size < old.size {
            let detail = format!(
                "volume '{name}' has {} and is not made smaller: its end would be lost; make a smaller volume and copy",
                old.size
            );
            return Err(problem(ProblemKind::Refused, detail));
        }
        let key = self.group_of_volume(old.id).ok_or_else(|| {
            let detail = format!("volume '{name}' is not served: 'farshore volume show {name}' says why");
            problem(ProblemKind::Unavailable, detail)
        })?;
        if let Some((mirror, index)) = self.catalogue().mirror_of(old.id) {
            return self.grow_mirrored(&mirror, key, index, &old, size).await;
        }
        let site = Arc::clone(self);
        let grown = tokio::task::spawn_blocking(move || site.grow_volume(&VolumeRecord { size, ..old }));
        let new = grown.await.map_err(internal)??;
        let (volume, limit) = (new.id, self.limit(&new));
        self.shard_of(key).send(ShardCommand::Resize { key, volume, size, limit });
        self.exports().update(&new);
        let view = self.volume_view(&new).await;
        Ok(VolumeView { warning: self.limit_warning(&new), ..view })
    }

    /// Gives the volume's file the new size, then records it.
    fn grow_volume(&self, new: &VolumeRecord) -> Result<VolumeRecord, OperationError> {
        let path = self.folder(new)?.join(files::DATA_FILE);
        let grown = File::open(&path, new.cache == Cache::None).and_then(|file| file.grow(&path, new.size.0));
        grown.map_err(|error| {
            let detail = format!("volume '{}' keeps its size: {error}", new.name);
            problem(ProblemKind::Refused, detail)
        })?;
        Ok(self.catalogue().change_volume(new.id, |volume| volume.size = new.size)?)
    }

    /// A mirrored volume grows at the partner first, then here.
    async fn grow_mirrored(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        key: GroupKey,
        index: VolumeIndex,
        old: &VolumeRecord,
        size: ByteCount,
    ) -> Result<VolumeView, OperationError> {
        let name = &old.name;
        let stays = |kind, reason: &str| problem(kind, format!("volume '{name}' keeps its size: {reason}"));
        if mirror.group.role == Role::Secondary {
            let reason = format!(
                "it is the replica of mirror '{}', which follows its primary; resize it at partner '{}'",
                mirror.name, mirror.partner
            );
            return Err(stays(ProblemKind::Conflict, &reason));
        }
        if size > old.size {
            let begun = self.verb(key, Verb::Grow { volume: index, size }).await;
            begun.map_err(|refused| stays(ProblemKind::Unavailable, &refused.detail))?;
            let failure = self.growth_ended(key).await?;
            let new = self.known_volume(name)?;
            if new.size < size {
                let reason = failure.unwrap_or_else(|| "its mirror changed its role meanwhile".to_owned());
                return Err(stays(ProblemKind::Unavailable, &reason));
            }
        }
        let new = self.known_volume(name)?;
        let view = self.volume_view(&new).await;
        Ok(VolumeView { warning: self.limit_warning(&new), ..view })
    }

    /// Waits until no volume of a mirror grows; says why it did not, if it is known.
    async fn growth_ended(&self, key: GroupKey) -> Result<Option<String>, OperationError> {
        let deadline = tokio::time::Instant::now() + GROWTH_LIMIT;
        loop {
            match self.snapshot(key).await?.mirror {
                Some(mirror) if mirror.growing => {}
                ended => return Ok(ended.and_then(|mirror| mirror.growth_failure)),
            }
            if tokio::time::Instant::now() > deadline {
                self.verb(key, Verb::GiveUpGrowth).await?;
            }
            tokio::time::sleep(GROWTH_POLL).await;
        }
    }

    /// Gives a volume of a mirror room, and the size if it is to be `stored`.
    pub(super) fn grow_member(&self, key: GroupKey, io: IoId, id: VolumeId, size: ByteCount, stored: bool) {
        let result = self.try_grow_member(key, id, size, stored).map_err(|error| {
            tracing::error!(%error, "a volume of a mirror cannot grow");
            IoFailure { operation: "growing a volume (that site's log says why)", errno: 0 }
        });
        self.shard_of(key).send(ShardCommand::Persisted { key, io, result });
    }

    fn try_grow_member(
        &self,
        key: GroupKey,
        id: VolumeId,
        size: ByteCount,
        stored: bool,
    ) -> Result<(), OperationError> {
        let volume = self.catalogue().volume_by_id(id);
        let volume = volume.ok_or_else(|| problem(ProblemKind::NotFound, "the volume is gone"))?;
        let folder = self.folder(&volume)?;
        files::grow(&folder, &volume, size, self.settings.intent_region)?;
        if stored && volume.size < size {
            let new = self.catalogue().change_volume(id, |volume| volume.size = size.max(volume.size))?;
            self.exports().update(&new);
            let limit = self.limit(&new);
            self.shard_of(key).send(ShardCommand::Resize { key, volume: id, size: new.size, limit });
        }
        Ok(())
    }
}
