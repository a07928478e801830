//! Changes of a volume that exists: its size, and who may open it.
//!
//! What is durable comes first (file, header, catalogue), then the shard learns of it, then hosts. A crash in between
//! leaves a volume of the old size with a file that is larger, which the next resize uses.

use std::sync::Arc;

use block::VolumeName;
use control::{Cache, ProblemKind, TlsRule, VolumeAccess, VolumeAccessChange, VolumeResize, VolumeView};
use store::File;

use super::Site;
use super::files;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::VolumeRecord;
use crate::settings::NbdTls;
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
        let new = VolumeRecord { size, ..old };
        let (site, record) = (Arc::clone(self), new.clone());
        tokio::task::spawn_blocking(move || site.grow_volume(record)).await.map_err(internal)??;
        let (volume, limit) = (new.id, self.limit(&new));
        self.shard_of(key).send(ShardCommand::Resize { key, volume, size, limit });
        self.exports().update(&new);
        let view = self.volume_view(&new).await;
        Ok(VolumeView { warning: self.limit_warning(&new), ..view })
    }

    /// Gives the volume's file the new size, then records it.
    fn grow_volume(&self, new: VolumeRecord) -> Result<(), OperationError> {
        let path = self.folder(&new)?.join(files::DATA_FILE);
        let grown = File::open(&path, new.cache == Cache::None).and_then(|file| file.grow(&path, new.size.0));
        grown.map_err(|error| {
            let detail = format!("volume '{}' keeps its size: {error}", new.name);
            problem(ProblemKind::Refused, detail)
        })?;
        Ok(self.catalogue().update_volume(new)?)
    }

    /// Changes who may open a volume; the caller holds `changes`.
    pub(super) async fn change_access(
        self: &Arc<Self>,
        name: &VolumeName,
        change: VolumeAccessChange,
    ) -> Result<VolumeAccess, OperationError> {
        let old = self.known_volume(name)?;
        let stays = |reason: &dyn std::fmt::Display| {
            format!("the access to volume '{name}' stays as it is: {reason}")
        };
        let access =
            old.access.changed(&change).map_err(|error| problem(ProblemKind::Invalid, stays(&error)))?;
        if let Some(reason) = self.unreachable_by(&change) {
            return Err(problem(ProblemKind::Refused, stays(&reason)));
        }
        if access == old.access {
            return Ok(access);
        }
        let new = VolumeRecord { access: access.clone(), ..old };
        let (site, record) = (Arc::clone(self), new.clone());
        tokio::task::spawn_blocking(move || site.catalogue().update_volume(record))
            .await
            .map_err(internal)??;
        self.exports().update(&new);
        // After the exports: a connection that the old access let in is on its shard by now.
        if let Some(key) = self.group_of_volume(new.id) {
            let (volume, access) = (new.id, access.clone());
            self.shard_of(key).send(ShardCommand::Access { key, volume, access });
        }
        Ok(access)
    }

    /// Why no host could meet what the change asks for, if the settings are to blame.
    fn unreachable_by(&self, change: &VolumeAccessChange) -> Option<&'static str> {
        let names = !change.allow.is_empty();
        let tls = self.settings.nbd_listen.iter().any(|listener| listener.tls != NbdTls::Off);
        if names && self.settings.nbd_client_ca.is_none() {
            return Some(
                "hosts are known by certificates, and no CA of theirs is set; set nbd_client_ca_file first",
            );
        }
        if (names || change.tls == Some(TlsRule::Required)) && !tls {
            return Some(
                "no NBD listener has TLS; give one tls = \"optional\" or \"required\" in nbd_listen first",
            );
        }
        None
    }
}
