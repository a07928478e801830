//! The states that operators see; the names are those of IBM SVC's remote copy.

use std::fmt;

/// A mirror's state as `mirror show` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MirrorState {
    /// The target has never been complete and nothing is being copied.
    InconsistentStopped,
    /// The initial copy runs.
    InconsistentCopying,
    /// The target holds a consistent image; mirroring is stopped.
    ConsistentStopped,
    /// Every write travels in order; the target is a prefix of the primary.
    ConsistentSynchronized,
    /// A resync runs; the target exposes the image it had before.
    ConsistentCopying,
    /// Both sides are apart after a promotion and the partner has been heard.
    Idling,
    /// A primary that cannot reach its partner.
    IdlingDisconnected,
    /// A secondary without a complete image that does not hear its primary.
    InconsistentDisconnected,
    /// A secondary with a consistent image that does not hear its primary.
    ConsistentDisconnected,
}

/// The lowest tier in use: where the newest record is that the target lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JournalTier {
    /// Ordered records in memory.
    Ring,
    /// Ordered records in segment files.
    Spill,
    /// A bitmap of changed blocks.
    DirtyMap,
}

impl MirrorState {
    /// Every state, in the order of the documentation.
    pub const ALL: [Self; 9] = [
        Self::InconsistentStopped,
        Self::InconsistentCopying,
        Self::ConsistentStopped,
        Self::ConsistentSynchronized,
        Self::ConsistentCopying,
        Self::Idling,
        Self::IdlingDisconnected,
        Self::InconsistentDisconnected,
        Self::ConsistentDisconnected,
    ];

    /// The name that scripts rely on.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InconsistentStopped => "inconsistent_stopped",
            Self::InconsistentCopying => "inconsistent_copying",
            Self::ConsistentStopped => "consistent_stopped",
            Self::ConsistentSynchronized => "consistent_synchronized",
            Self::ConsistentCopying => "consistent_copying",
            Self::Idling => "idling",
            Self::IdlingDisconnected => "idling_disconnected",
            Self::InconsistentDisconnected => "inconsistent_disconnected",
            Self::ConsistentDisconnected => "consistent_disconnected",
        }
    }
}

impl JournalTier {
    /// The name that scripts rely on.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Spill => "spill",
            Self::DirtyMap => "dirty-map",
        }
    }
}

impl fmt::Display for MirrorState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
