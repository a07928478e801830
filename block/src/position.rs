//! Positions in the write order of a consistency group.
//!
//! A position is (epoch, origin, incarnation, sequence). Positions order by (epoch, incarnation, sequence);
//! the origin only detects forks: two sites that both promoted have the same epoch and different origins.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::SiteId;

/// The fencing number of a mirror; raised by each promotion, durable before its first use, never lowered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Counts the unclean starts and failed flushes of a primary; per group, never lowered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

/// The number of a write in its group; starts at 1 and is gap-free within one (epoch, incarnation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sequence(pub u64);

/// A point in the write order of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The epoch in which the write was made.
    pub epoch: Epoch,
    /// The site that was primary in that epoch.
    pub origin: SiteId,
    /// The primary's incarnation.
    pub incarnation: Incarnation,
    /// The write's number.
    pub sequence: Sequence,
}

/// The BLAKE3 hash that names a cut and, through its predecessor's, everything before it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChainHash(pub [u8; 32]);

/// The end of a chain of cuts: which position it reached and the hash that names its content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tip {
    /// The last write in the chain.
    pub position: Position,
    /// The last cut's hash.
    pub chain: ChainHash,
}

impl Epoch {
    /// The epoch after this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Incarnation {
    /// The incarnation after this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Sequence {
    /// The sequence after this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Position {
    /// How the positions order: by epoch, incarnation and sequence. The origin does not count.
    pub fn order(&self, other: &Self) -> Ordering {
        let key = |position: &Self| (position.epoch, position.incarnation, position.sequence);
        key(self).cmp(&key(other))
    }

    /// True if both lie in one run of gap-free sequences: same epoch, origin and incarnation.
    pub fn same_lineage(&self, other: &Self) -> bool {
        self.epoch == other.epoch && self.origin == other.origin && self.incarnation == other.incarnation
    }

    /// The same lineage at another sequence.
    pub const fn at(self, sequence: Sequence) -> Self {
        Self { sequence, ..self }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}/{}", self.epoch.0, self.incarnation.0, self.sequence.0)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.iter().take(6) {
            write!(formatter, "{byte:02x}")?;
        }
        Ok(())
    }
}
