//! Why the catalogue refuses or fails.

use std::io;
use std::path::{Path, PathBuf};

use block::{MirrorId, SiteId, VolumeId, VolumeName};
use control::ProblemKind;

/// A refusal or failure of the catalogue; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Another daemon has the data directory.
    #[error("data directory '{}' is in use by another daemon{}: stop that one first, or give this one its own directory", .directory.display(), holder(.process.as_deref()))]
    InUse {
        /// The directory.
        directory: PathBuf,
        /// The process that holds it, if it could be read.
        process: Option<String>,
    },
    /// The catalogue file cannot be read.
    #[error("catalogue '{}' is damaged ({reason}): run farshored --rebuild-catalogue with the same settings, which restores it from the volumes' headers", .file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There are volumes, but no catalogue.
    #[error("catalogue '{}' is missing, yet '{}' holds a volume: run farshored --rebuild-catalogue with the same settings, or point pools elsewhere", .file.display(), .header.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// A header that shows that there should be one.
        header: PathBuf,
    },
    /// The volumes' headers know what the catalogue does not.
    #[error("catalogue '{}' does not know {what} of header '{}': it is older than its volumes; run farshored --rebuild-catalogue, or move that folder out of the pool", .file.display(), .header.display())]
    Stale {
        /// The file.
        file: PathBuf,
        /// The header that knows more.
        header: PathBuf,
        /// What it knows.
        what: String,
    },
    /// The catalogue file is written by a newer version.
    #[error("catalogue '{}' has format {found}, this daemon knows format {known}: start the version that wrote it", .file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A header belongs to another site.
    #[error("header '{}' belongs to site {found}, not to {expected}: a pool belongs to one data directory only; move that folder away", .header.display())]
    OtherSite {
        /// The header.
        header: PathBuf,
        /// Whose it is.
        found: SiteId,
        /// Whose it should be.
        expected: SiteId,
    },
    /// Two folders claim the same.
    #[error("'{}' and '{}' hold the same volume or name ({what}): move one of them out of the pool", .first.display(), .second.display())]
    Duplicate {
        /// What both claim.
        what: String,
        /// One folder.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// No header was found.
    #[error("no volume's header is in the pools ({pools}): there is nothing to rebuild the catalogue from; check the pools in the settings, or delete '{}' to start empty", .file.display())]
    NothingToRebuild {
        /// The pools' folders.
        pools: String,
        /// The catalogue file.
        file: PathBuf,
    },
    /// Some of a mirror's volumes have no readable header.
    #[error(
        "mirror '{mirror}' has {expected} volumes and headers of {found} were found: give every pool in the settings, then rebuild again"
    )]
    MirrorIncomplete {
        /// The mirror.
        mirror: VolumeName,
        /// How many it has.
        expected: u16,
        /// How many were found.
        found: usize,
    },
    /// The name or identity is taken.
    #[error("{what} '{name}' exists already: choose another name")]
    Exists {
        /// Volume, partner or mirror.
        what: &'static str,
        /// The name.
        name: VolumeName,
    },
    /// There is none of that name.
    #[error("{what} '{name}' does not exist: list the {what}s for the names that do")]
    Unknown {
        /// Volume, partner or mirror.
        what: &'static str,
        /// The name or identity.
        name: String,
    },
    /// A mirror needs it.
    #[error("{what} '{name}' is part of mirror '{mirror}': delete the mirror first")]
    InMirror {
        /// Volume or partner.
        what: &'static str,
        /// Its name.
        name: VolumeName,
        /// The mirror.
        mirror: VolumeName,
    },
    /// The settings have no such pool.
    #[error("pool '{0}' is not in the settings: add it there or use another")]
    UnknownPool(VolumeName),
    /// A value is longer than a header can hold, or a mirror has no or too many volumes.
    #[error("{what} of '{name}' has {actual} {unit}, allowed are {least} to {most}: shorten it")]
    Bound {
        /// The value.
        what: &'static str,
        /// Whose.
        name: VolumeName,
        /// Its size.
        actual: usize,
        /// Of what.
        unit: &'static str,
        /// The least allowed.
        least: usize,
        /// The most allowed.
        most: usize,
    },
    /// An epoch or incarnation would fall.
    #[error(
        "mirror '{mirror}' is at epoch {epoch}, incarnation {incarnation}, and neither may fall: the change is refused"
    )]
    Falls {
        /// The mirror.
        mirror: VolumeName,
        /// Its epoch.
        epoch: u64,
        /// Its incarnation.
        incarnation: u64,
    },
    /// A tenant with volumes, or the default one, cannot be deleted.
    #[error(
        "tenant '{tenant}' has {volumes} volumes, and the default one always stays: delete the volumes first"
    )]
    TenantInUse {
        /// The tenant.
        tenant: VolumeName,
        /// How many it has.
        volumes: usize,
    },
    /// There are too many tenants.
    #[error("the site has {most} tenants, which is the most: delete one first")]
    TooManyTenants {
        /// The most.
        most: usize,
    },
    /// The file system failed.
    #[error("{operation} '{}' failed: {source}", .path.display())]
    File {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The catalogue's store failed.
    #[error("catalogue '{}' cannot be written: {source}", .file.display())]
    Store {
        /// The file.
        file: PathBuf,
        /// The failure.
        source: Box<redb::Error>,
    },
}

fn holder(process: Option<&str>) -> String {
    process.map_or_else(String::new, |process| format!(" (process {process})"))
}

impl CatalogueError {
    /// How the control API reports it.
    pub const fn kind(&self) -> ProblemKind {
        match self {
            Self::Exists { .. } | Self::InMirror { .. } | Self::TenantInUse { .. } => ProblemKind::Conflict,
            Self::Unknown { .. } => ProblemKind::NotFound,
            Self::UnknownPool(_) | Self::Bound { .. } => ProblemKind::Invalid,
            Self::Falls { .. } | Self::TooManyTenants { .. } => ProblemKind::Refused,
            Self::InUse { .. }
            | Self::Damaged { .. }
            | Self::Missing { .. }
            | Self::Stale { .. }
            | Self::Format { .. }
            | Self::OtherSite { .. }
            | Self::Duplicate { .. }
            | Self::NothingToRebuild { .. }
            | Self::MirrorIncomplete { .. }
            | Self::File { .. }
            | Self::Store { .. } => ProblemKind::Internal,
        }
    }

    pub(super) fn unknown_volume(id: VolumeId) -> Self {
        Self::Unknown { what: "volume", name: id.to_string() }
    }

    pub(super) fn unknown_mirror(id: MirrorId) -> Self {
        Self::Unknown { what: "mirror", name: id.to_string() }
    }
}

/// Turns an [`io::Error`] into a [`CatalogueError`] that names operation and path.
pub(super) fn file_error(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> CatalogueError {
    move |source| CatalogueError::File { operation, path: path.to_owned(), source }
}
