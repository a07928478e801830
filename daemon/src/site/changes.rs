//! Changes of a volume that exists: its size.
//!
//! What is durable comes first (file, header, catalogue), then the shard learns of it, then hosts. A crash in between
//! leaves a volume of the old size with a file that is larger, which the next resize uses.

use std::sync::Arc;

use block::VolumeName;
use control::{Cache, ProblemKind, VolumeResize, VolumeView};
use store::File;

use super::Site;
use super::files;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::VolumeRecord;
use crate::shard::ShardCommand;

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
        if let Some((mirror, _)) = self.catalogue().mirror_of(old.id) {
            let detail = format!(
                "volume '{name}' is in mirror '{}' and keeps its size: stop and delete the mirror first",
                mirror.name
            );
            return Err(problem(ProblemKind::Conflict, detail));
        }
        let key = self.group_of_volume(old.id).ok_or_else(|| {
            let detail = format!("volume '{name}' is not served: 'farshore volume show {name}' says why");
            problem(ProblemKind::Unavailable, detail)
        })?;
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
}
