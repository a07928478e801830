//! Points of the retention window as operators write and read them.

use std::fmt;
use std::str::FromStr;

use block::Sequence;
use serde::{Deserialize, Serialize};

use crate::{RecoveryPoint, Timestamp};

/// Where a failover or a drill goes: the last recovery point at or before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RecoveryTarget {
    /// A time of the target's clock.
    Time(Timestamp),
    /// A sequence of the tip's epoch and incarnation.
    Sequence(Sequence),
}

/// Why a text names no point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no recovery point: give a time in UTC as in 2026-07-01T12:00:00Z, or a sequence as in 12345"
)]
pub struct RecoveryTargetError(String);

impl FromStr for RecoveryTarget {
    type Err = RecoveryTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            let sequence = text.parse().map(|number| Self::Sequence(Sequence(number)));
            return sequence.map_err(|_| RecoveryTargetError(text.chars().take(64).collect()));
        }
        text.parse().map(Self::Time).map_err(|_| RecoveryTargetError(text.chars().take(64).collect()))
    }
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => time.fmt(formatter),
            Self::Sequence(sequence) => sequence.0.fmt(formatter),
        }
    }
}

impl TryFrom<String> for RecoveryTarget {
    type Error = RecoveryTargetError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<RecoveryTarget> for String {
    fn from(target: RecoveryTarget) -> Self {
        target.to_string()
    }
}

/// The retention window of a secondary, as it truly is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowView {
    /// The oldest point that a failover can go to; null if there is only the newest.
    pub oldest: Option<RecoveryPoint>,
    /// How far back that is, in seconds.
    pub seconds: f64,
    /// What the settings ask for, in seconds.
    pub seconds_wanted: u64,
    /// Bytes of redo that are kept for it.
    pub bytes: u64,
}

/// Body of `POST /v1/mirrors/NAME/drill/start`, sent to the secondary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillStart {
    /// The copy is of the last recovery point at or before this one; none for the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<RecoveryTarget>,
}

/// A drill that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillView {
    /// The point that the copy is of.
    pub recovery_point: RecoveryPoint,
    /// What hosts open.
    pub exports: Vec<String>,
    /// Bytes of scratch space in use.
    pub scratch_bytes: u64,
    /// The drill ends when it needs more.
    pub scratch_bytes_max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_sequence_or_a_time_and_reads_as_it_was_written() {
        let time = "2026-07-01T12:00:00.250000000Z";
        for text in ["0", "12345", time] {
            let target: RecoveryTarget = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(serde_json::to_string(&target).unwrap(), format!("\"{text}\""));
        }
        for text in ["", "-1", "99999999999999999999", "yesterday", "2026-07-01"] {
            assert!(text.parse::<RecoveryTarget>().is_err(), "{text}");
        }
    }
}
