//! Drills: a writable copy of a mirror's target, exported as `NAME@drill`.
//!
//! The copy's own blocks are in sparse files of the mirror's folder, `drill/VOLUME-ID`; they are removed when the drill
//! ends, and at a start of the daemon, which no drill survives.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::{DrillView, ProblemKind, RecoveryPoint, Timestamp};
use store::File;
use tokio::sync::oneshot;

use super::mirrors::internal;
use super::volumes::problem;
use super::{Site, files, lock};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, VolumeRecord};
use crate::group::{DrillBegun, DrillSnapshot, RewindTo};
use crate::shard::{DrillStart, GroupKey, ShardCommand, Verb, VolumeFiles};

const FOLDER: &str = "drill";
const POLL: Duration = Duration::from_millis(10);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A drill's copy, until nothing is left of it.
#[derive(Debug)]
pub(super) struct DrillCopy {
    group: GroupKey,
    exports: Vec<String>,
    folder: PathBuf,
}

/// A volume's export while a drill runs.
fn export_name(volume: &VolumeRecord) -> String {
    format!("{}@drill", volume.name)
}

impl Site {
    fn scratch_folder(&self, mirror: &MirrorRecord) -> PathBuf {
        files::mirror_folder(&self.settings.data_dir, mirror.id).join(FOLDER)
    }

    /// Begins a drill and exports its copy.
    pub(super) async fn start_drill(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        key: GroupKey,
        at: Option<RewindTo>,
    ) -> Result<(), OperationError> {
        if lock(&self.drills).contains_key(&key) {
            let detail = format!(
                "mirror '{}' has a drill already: stop it with 'farshore mirror drill stop {}' first",
                mirror.name, mirror.name
            );
            return Err(problem(ProblemKind::Conflict, detail));
        }
        let volumes = self.mirror_volumes(mirror)?;
        let drill = self.new_drill_group(key);
        let exports = volumes.iter().map(export_name).collect();
        let copy = DrillCopy { group: drill, exports, folder: self.scratch_folder(mirror) };
        lock(&self.drills).insert(key, copy);
        let begun = self.begin_drill(mirror, key, drill, at, &volumes).await;
        if begun.is_err() {
            self.forget_drill(key);
        }
        begun
    }

    async fn begin_drill(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        key: GroupKey,
        drill: GroupKey,
        at: Option<RewindTo>,
        volumes: &[VolumeRecord],
    ) -> Result<(), OperationError> {
        let folder = self.scratch_folder(mirror);
        let members = volumes.to_vec();
        let made = tokio::task::spawn_blocking(move || make_scratch(&folder, &members));
        let scratch = made.await.map_err(internal)??;
        let mut volume_files = Vec::new();
        for (volume, home) in volumes.iter().zip(scratch) {
            let cipher = Some(self.unlock(volume)?);
            let name = export_name(volume);
            self.exports().insert_as(&name, volume, None, "the drill begins");
            volume_files.push(VolumeFiles { id: volume.id, name, home, intent: None, cipher });
        }
        let start = DrillStart {
            drill,
            files: volume_files,
            volumes: volumes.iter().map(|volume| self.group_volume(volume)).collect(),
            at,
            scratch_bytes_max: self.settings.drill_scratch.0,
        };
        let (done, started) = oneshot::channel();
        self.shard_of(key).send(ShardCommand::StartDrill { key, start: Box::new(start), done });
        let started = started
            .await
            .map_err(|_| problem(ProblemKind::Internal, "the mirror's shard does not answer"))?;
        let begun = started.map_err(|refused| {
            let detail = format!("a drill of mirror '{}' cannot begin: {refused}", mirror.name);
            problem(ProblemKind::Refused, detail)
        })?;
        self.export_drill(key, drill, volumes, &begun);
        Ok(())
    }

    /// Exports the copy, in the sizes that its volumes had at its point; unless the drill has ended meanwhile.
    fn export_drill(&self, key: GroupKey, drill: GroupKey, volumes: &[VolumeRecord], begun: &DrillBegun) {
        let drills = lock(&self.drills);
        if drills.get(&key).is_none_or(|copy| copy.group != drill) {
            return;
        }
        for (volume, size) in volumes.iter().zip(&begun.sizes) {
            self.exports().present_copy(&export_name(volume), drill, *size);
        }
    }

    /// Ends a drill; returns when its scratch space is free.
    pub(super) async fn stop_drill(
        &self,
        mirror: &MirrorRecord,
        key: GroupKey,
    ) -> Result<(), OperationError> {
        if !lock(&self.drills).contains_key(&key) {
            let detail = format!(
                "mirror '{}' has no drill: start one with 'farshore mirror drill start {}'",
                mirror.name, mirror.name
            );
            return Err(problem(ProblemKind::Refused, detail));
        }
        self.verb(key, Verb::StopDrill).await?;
        let gone = async {
            while lock(&self.drills).contains_key(&key) {
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(STOP_LIMIT, gone).await.map_err(|_| {
            let detail =
                format!("the drill of mirror '{}' is still ending: look at the daemon's log", mirror.name);
            problem(ProblemKind::Unavailable, detail)
        })
    }

    /// A drill is over, for whatever reason: its exports and its scratch space go.
    pub(super) async fn drill_ended(self: Arc<Self>, key: GroupKey) {
        let drill = lock(&self.drills).get(&key).map(|copy| copy.group);
        let Some(drill) = drill else { return };
        if let Err(error) = self.end_group(drill).await {
            tracing::error!(%error, "the copy of a drill cannot be taken away");
        }
        self.forget_drill(key);
    }

    fn forget_drill(&self, key: GroupKey) {
        let mut drills = lock(&self.drills);
        if let Some(copy) = drills.get(&key) {
            copy.exports.iter().for_each(|export| self.exports().remove(export));
            self.forget_group(copy.group);
            remove_scratch(&copy.folder);
        }
        drills.remove(&key);
    }

    /// The group of the copy of a mirrored group's drill.
    pub(super) fn drill_of(&self, key: GroupKey) -> Option<GroupKey> {
        lock(&self.drills).get(&key).map(|copy| copy.group)
    }

    /// What a start of the daemon finds of a drill.
    pub(super) fn clear_scratch(&self, mirror: &MirrorRecord) {
        remove_scratch(&self.scratch_folder(mirror));
    }

    pub(super) fn drill_view(&self, mirror: &MirrorRecord, drill: DrillSnapshot) -> DrillView {
        let volumes = self.mirror_volumes(mirror).unwrap_or_default();
        DrillView {
            recovery_point: RecoveryPoint {
                position: drill.position,
                time: Timestamp(drill.time.unwrap_or_default()),
            },
            exports: volumes.iter().map(export_name).collect(),
            scratch_bytes: drill.scratch_bytes,
            scratch_bytes_max: drill.scratch_bytes_max,
        }
    }
}

/// Makes a sparse file for each volume; what an older drill left is removed.
fn make_scratch(folder: &Path, volumes: &[VolumeRecord]) -> Result<Vec<File>, OperationError> {
    remove_scratch(folder);
    let failed = |error: std::io::Error| {
        let detail = format!("the drill's scratch space in {} cannot be made: {error}", folder.display());
        problem(ProblemKind::Unavailable, detail)
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    volumes
        .iter()
        .map(|volume| {
            let path = folder.join(volume.id.to_string());
            let file = std::fs::File::create_new(&path).map_err(failed)?;
            file.set_len(volume.size.0).map_err(failed)?;
            Ok(File::open(&path, true).map_err(files::FilesError::from)?)
        })
        .collect()
}

fn remove_scratch(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "a drill's scratch space cannot be removed");
        }
        Ok(()) | Err(_) => {}
    }
}
