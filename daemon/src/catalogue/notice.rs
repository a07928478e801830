//! What the catalogue mended or could not mend: worth a log line, no reason to stop.

use std::path::PathBuf;

use block::VolumeName;

/// Something odd that was handled; one sentence each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A volume's folder is not there: the volume is offline.
    #[error("volume '{volume}' is offline: its folder '{}' is missing; is its pool mounted?", .folder.display())]
    FolderMissing {
        /// The volume.
        volume: VolumeName,
        /// Where it should be.
        folder: PathBuf,
    },
    /// A volume's pool is not in the settings: the volume is offline.
    #[error("volume '{volume}' is offline: its pool '{pool}' is not in the settings")]
    PoolMissing {
        /// The volume.
        volume: VolumeName,
        /// The pool.
        pool: VolumeName,
    },
    /// A header did not say what the catalogue says, and was written anew.
    #[error("the header of volume '{volume}' was behind or damaged and is restored from the catalogue")]
    HeaderRestored {
        /// The volume.
        volume: VolumeName,
    },
    /// A header could not be written; the catalogue is right, a rebuild from headers would be behind.
    #[error("the header of volume '{volume}' cannot be written: {reason}")]
    HeaderNotWritten {
        /// The volume.
        volume: VolumeName,
        /// Why.
        reason: String,
    },
    /// A header knew a later state of its mirror than the catalogue, which took it over.
    #[error(
        "mirror '{mirror}' continues at epoch {epoch}, as its volumes' headers say; the catalogue was behind"
    )]
    HeaderAhead {
        /// The mirror.
        mirror: VolumeName,
        /// The epoch taken over.
        epoch: u64,
    },
    /// A header knew a later size or access of its volume than the catalogue, which took them over.
    #[error("volume '{volume}' has the size and access that its header says; the catalogue was behind")]
    VolumeAhead {
        /// The volume.
        volume: VolumeName,
    },
    /// The remains of an unfinished create or delete were removed.
    #[error("'{}' was left by an unfinished create or delete and is removed", .folder.display())]
    LeftoverRemoved {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder that looks like a volume's, but is in no catalogue and has no readable header, is left alone.
    #[error("'{}' is no volume that the catalogue knows, and its header cannot be read ({reason}): it is left alone", .folder.display())]
    Unreadable {
        /// The folder.
        folder: PathBuf,
        /// Why its header cannot be read.
        reason: String,
    },
}
