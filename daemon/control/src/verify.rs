//! Verify: whether the target's image is what it should be.

use std::fmt;

use block::VolumeName;
use serde::{Deserialize, Serialize};

use crate::{Side, Timestamp};

/// Body of `POST /v1/mirrors/NAME/verify`, sent to the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorVerify {
    /// Whose blocks overwrite the other side's where they differ; none to look only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair_from: Option<Side>,
}

/// Whether a verify goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyState {
    /// It does; it waits while the sides are not connected or a resync runs.
    Running,
    /// Everything was compared, and repaired if that was asked for.
    Ended,
    /// It ended early; the reason is told.
    GivenUp,
}

impl fmt::Display for VerifyState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Running => "running",
            Self::Ended => "ended",
            Self::GivenUp => "given_up",
        })
    }
}

/// A part of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// The volume.
    pub volume: VolumeName,
    /// Its first byte.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// What a verify has found; part of a mirror's view at the primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyView {
    /// Whether it goes on.
    pub state: VerifyState,
    /// Why it was given up.
    pub reason: Option<String>,
    /// Whose blocks overwrite the other side's.
    pub repair_from: Option<Side>,
    /// All bytes of the mirror.
    pub total_bytes: u64,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// Bytes that differ, or differed before they were repaired.
    pub differing_bytes: u64,
    /// Bytes of them that were overwritten.
    pub repaired_bytes: u64,
    /// Bytes that could not be read on one of the sides.
    pub unreadable_bytes: u64,
    /// Bytes that hosts wrote each time they were compared.
    pub busy_bytes: u64,
    /// When it began.
    pub began: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// Where the sides differ, or differed: the first thousand extents.
    pub extents: Vec<Extent>,
}

impl VerifyView {
    /// True if it ended, nothing differs any more, and everything could be read.
    pub fn is_clean(&self) -> bool {
        self.state == VerifyState::Ended
            && self.repaired_bytes >= self.differing_bytes
            && self.unreadable_bytes == 0
    }
}
