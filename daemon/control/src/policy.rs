//! What may be changed of a mirror while it runs, and what its policies do at the moment.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{LinkFailure, MirrorMode, Overload};

/// Body of `POST /v1/mirrors/NAME/set`: what is to change of a mirror, on the site that is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSet {
    /// When a host's write is answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<MirrorMode>,
    /// What gives way when the partner of a synchronous mirror is away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_link_failure: Option<LinkFailure>,
    /// The RPO budget in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_seconds: Option<NonZeroU32>,
    /// The policy on overload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overload: Option<Overload>,
    /// The most that is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Rate>,
    /// The most that copies and comparisons read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_rate: Option<Rate>,
}

/// A limit in bytes a second, or none. In JSON the number, or the word `unlimited`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RateText", into = "RateText")]
pub struct Rate(pub Option<NonZeroU64>);

/// Why a rate was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no rate: give 4096B/s to 1TB/s, as in 50MB/s or 8MiB/s, or unlimited")]
pub struct RateError(String);

/// How [`Rate`] stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RateText {
    Number(u64),
    Word(String),
}

/// Units of rates, the larger ones first.
const UNITS: [(&str, u64); 9] = [
    ("TB/s", 1_000_000_000_000),
    ("GiB/s", 1 << 30),
    ("GB/s", 1_000_000_000),
    ("MiB/s", 1 << 20),
    ("MB/s", 1_000_000),
    ("KiB/s", 1 << 10),
    ("kB/s", 1000),
    ("B/s", 1),
    ("", 1),
];

impl Rate {
    /// The lowest: one block a second.
    pub const LEAST: u64 = 4096;
    /// The highest; beyond it a limit says nothing.
    pub const MOST: u64 = 1_000_000_000_000;

    fn checked(bytes: u64) -> Option<Self> {
        (Self::LEAST..=Self::MOST).contains(&bytes).then(|| Self(NonZeroU64::new(bytes)))
    }
}

impl TryFrom<RateText> for Rate {
    type Error = RateError;

    fn try_from(text: RateText) -> Result<Self, Self::Error> {
        match text {
            RateText::Number(number) => Self::checked(number).ok_or_else(|| RateError(number.to_string())),
            RateText::Word(word) if word == "unlimited" => Ok(Self(None)),
            RateText::Word(word) => Err(RateError(word)),
        }
    }
}

impl From<Rate> for RateText {
    fn from(rate: Rate) -> Self {
        rate.0.map_or_else(|| Self::Word("unlimited".to_owned()), |rate| Self::Number(rate.get()))
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let bytes = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)));
        let bytes = bytes.and_then(|(number, bytes)| number.parse::<u64>().ok()?.checked_mul(*bytes));
        bytes.and_then(Self::checked).ok_or_else(|| RateError(text.to_owned()))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(rate) = self.0 else {
            return formatter.pad("unlimited");
        };
        let fits = UNITS.iter().find(|(_, bytes)| rate.get().is_multiple_of(*bytes));
        let (unit, bytes) = fits.copied().unwrap_or(("B/s", 1));
        formatter.pad(&format!("{}{unit}", rate.get() / bytes))
    }
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
    fn a_rate_is_a_number_with_a_unit_or_unlimited() {
        for (text, bytes, shown) in [
            ("50MB/s", 50_000_000, "50MB/s"),
            ("8MiB/s", 8 << 20, "8MiB/s"),
            ("4096", 4096, "4KiB/s"),
            ("1500000B/s", 1_500_000, "1500kB/s"),
            ("1TB/s", Rate::MOST, "1TB/s"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.0.unwrap().get(), rate.to_string().as_str()), (bytes, shown));
            assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
            assert_eq!(serde_json::from_str::<Rate>(&bytes.to_string()).unwrap(), rate);
            assert_eq!(serde_json::to_string(&rate).unwrap(), bytes.to_string());
        }
        assert_eq!("unlimited".parse::<Rate>().unwrap(), Rate(None));
        assert_eq!(serde_json::to_string(&Rate(None)).unwrap(), "\"unlimited\"");
        for bad in
            ["", "0", "4095B/s", "2TB/s", "50MB", "fast", "-1MB/s", "1.5MB/s", "99999999999999999999GB/s"]
        {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Rate>("0").is_err());
        assert!(serde_json::from_str::<Rate>("\"50MB/s\"").is_err());
    }

    #[test]
    fn a_change_names_only_what_it_changes() {
        let set: MirrorSet = serde_json::from_str(r#"{"overload":"stop"}"#).unwrap();
        assert_eq!(set, MirrorSet { overload: Some(Overload::Stop), ..MirrorSet::default() });
        let set: MirrorSet = serde_json::from_str(r#"{"mode":"sync"}"#).unwrap();
        assert_eq!(set, MirrorSet { mode: Some(MirrorMode::Sync), ..MirrorSet::default() });
        assert!(serde_json::from_str::<MirrorSet>(r#"{"partner":"az2"}"#).is_err());
    }
}
