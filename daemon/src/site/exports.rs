//! What hosts can open: the handshake's view of the volumes.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use block::{ByteCount, VolumeId};
use frontend::nbd::{ExportDirectory, ExportInfo, ExportRefusal};

use crate::shard::GroupKey;

#[derive(Clone, Debug)]
struct Export {
    volume: VolumeId,
    size: ByteCount,
    group: Option<GroupKey>,
    presented: Result<(), String>,
}

/// All exports, by name.
#[derive(Debug, Default)]
pub(super) struct Exports {
    exports: RwLock<BTreeMap<String, Export>>,
}

impl Exports {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Export>> {
        self.exports.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an export that is not presented yet, or one that cannot be.
    pub(super) fn insert(
        &self,
        name: &str,
        volume: VolumeId,
        size: ByteCount,
        group: Option<GroupKey>,
        reason: &str,
    ) {
        let export = Export { volume, size, group, presented: Err(reason.to_owned()) };
        self.write().insert(name.to_owned(), export);
    }

    pub(super) fn remove(&self, name: &str) {
        self.write().remove(name);
    }

    /// A group's volumes are presented, or not, for a reason.
    pub(super) fn present(&self, group: GroupKey, presented: &Result<(), String>) {
        for export in self.write().values_mut().filter(|export| export.group == Some(group)) {
            export.presented.clone_from(presented);
        }
    }

    /// The group behind an export.
    pub(super) fn group(&self, name: &str) -> Option<GroupKey> {
        self.read().get(name)?.group
    }
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        let exports = self.read();
        let export = exports.get(name).ok_or(ExportRefusal::Unknown)?;
        if let Err(reason) = &export.presented {
            return Err(ExportRefusal::NotPresented {
                reason: format!("export '{name}' is not available: {reason}"),
            });
        }
        Ok(ExportInfo { volume: export.volume, size: export.size, read_only: false, description: None })
    }
}
