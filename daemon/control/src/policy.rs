//! What may be changed of a mirror while it runs, and what its policies do at the moment.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::Overload;

/// Body of `POST /v1/mirrors/NAME/set`: what is to change of a mirror, on the site that is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSet {
    /// The RPO budget in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_seconds: Option<NonZeroU32>,
    /// The policy on overload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overload: Option<Overload>,
}

/// What hosts' writes meet at a mirror's primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostWrites {
    /// They are served.
    #[default]
    Served,
    /// They wait: the RPO budget is used up and the policy is `stop`.
    Held,
    /// They are refused: that has been so for too long.
    Refused,
}

impl HostWrites {
    /// Every value.
    pub const ALL: &'static [Self] = &[Self::Served, Self::Held, Self::Refused];

    /// The value's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Held => "held",
            Self::Refused => "refused",
        }
    }
}

impl fmt::Display for HostWrites {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

/// What the RPO alert and the policies on overload do now; part of a mirror's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureView {
    /// The part of the RPO budget, in percent, for which an alert stands: 0, 50, 80 or 100.
    pub rpo_alert_percent: u8,
    /// By how many percent the hosts' limits are lowered, by the policy `pace`.
    pub limit_lowered_percent: u8,
    /// What hosts' writes meet, by the policy `stop`.
    pub host_writes: HostWrites,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_same_in_json_and_in_tables() {
        for value in HostWrites::ALL {
            assert_eq!(serde_json::to_string(value).unwrap(), format!("\"{value}\""));
        }
    }

    #[test]
    fn a_change_names_only_what_it_changes() {
        let set: MirrorSet = serde_json::from_str(r#"{"overload":"stop"}"#).unwrap();
        assert_eq!(set, MirrorSet { overload: Some(Overload::Stop), ..MirrorSet::default() });
        assert!(serde_json::from_str::<MirrorSet>(r#"{"mode":"sync"}"#).is_err());
    }
}
