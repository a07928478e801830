//! Mirrors: create, start, failover and view.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use block::{Position, VolumeName};
use serde::{Deserialize, Serialize};

use crate::{DrillView, PressureView, Rate, RecoveryTarget, Timestamp, VerifyView, WindowView};

/// Gives an enum its words, the same in JSON, on the command line and in tables.
macro_rules! words {
    ($name:ident, $($variant:ident = $word:literal),+ $(,)?) => {
        impl $name {
            /// Every value, in the order of its declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The value's word.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.pad(self.as_str())
            }
        }
    };
}

/// When a host's write is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorMode {
    /// When it is home; the partner follows.
    #[default]
    Async,
    /// When it is also durable at the partner.
    Sync,
}

words!(MirrorMode, Async = "async", Sync = "sync");

/// What gives way when the partner of a synchronous mirror is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkFailure {
    /// The mode: writes are answered without the partner until it is back.
    #[default]
    Degrade,
    /// The hosts' writes: they wait, and are refused when that takes too long.
    Stop,
}

words!(LinkFailure, Degrade = "degrade", Stop = "stop");

/// What gives way when the partner cannot keep up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overload {
    /// The recovery point: writes fold into the dirty map and hosts notice nothing.
    #[default]
    Bitmap,
    /// The hosts' limits, by at most 10 %.
    Pace,
    /// The hosts' writes: they wait, and are refused when that takes too long.
    Stop,
}

words!(Overload, Bitmap = "bitmap", Pace = "pace", Stop = "stop");

/// Which end of the mirror a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Hosts write here.
    Primary,
    /// The replica.
    Secondary,
}

words!(Role, Primary = "primary", Secondary = "secondary");

/// A mirror's state, in the words of SVC operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorState {
    /// Stopped before the initial copy ended.
    InconsistentStopped,
    /// The initial copy runs.
    InconsistentCopying,
    /// Stopped; the target holds a consistent image.
    ConsistentStopped,
    /// The target follows write by write.
    ConsistentSynchronized,
    /// A resync runs; the target holds its old consistent image until it commits.
    ConsistentCopying,
    /// The target was presented to hosts; the mirror rests.
    Idling,
    /// As `idling`, and the partner cannot be reached.
    IdlingDisconnected,
    /// The partner cannot be reached and the initial copy has not ended.
    InconsistentDisconnected,
    /// The partner cannot be reached; the target holds a consistent image.
    ConsistentDisconnected,
}

words!(
    MirrorState,
    InconsistentStopped = "inconsistent_stopped",
    InconsistentCopying = "inconsistent_copying",
    ConsistentStopped = "consistent_stopped",
    ConsistentSynchronized = "consistent_synchronized",
    ConsistentCopying = "consistent_copying",
    Idling = "idling",
    IdlingDisconnected = "idling_disconnected",
    InconsistentDisconnected = "inconsistent_disconnected",
    ConsistentDisconnected = "consistent_disconnected",
);

/// Why a word is no state of a mirror.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is no state of a mirror: use one of {}", states())]
pub struct UnknownState {
    word: String,
}

fn states() -> String {
    let words: Vec<_> = MirrorState::ALL.iter().map(|state| state.as_str()).collect();
    words.join(", ")
}

impl FromStr for MirrorState {
    type Err = UnknownState;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.iter().find(|state| state.as_str() == word);
        known.copied().ok_or_else(|| UnknownState { word: word.to_owned() })
    }
}

/// Where the writes stand that the target has not durably committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalTier {
    /// In memory, in order.
    Ring,
    /// In segments on disk, in order.
    Spill,
    /// As a map of changed blocks, without order.
    DirtyMap,
}

words!(JournalTier, Ring = "ring", Spill = "spill", DirtyMap = "dirty-map");

/// One end of the mirror as an operator names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The site that is asked.
    Local,
    /// Its partner.
    Partner,
}

words!(Side, Local = "local", Partner = "partner");

/// Body of `POST /v1/mirrors`, sent to the primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorCreate {
    /// The mirror's name, the same at both sites.
    pub name: VolumeName,
    /// The partner that gets the replica.
    pub partner: VolumeName,
    /// The volumes, in the order of their index in the group.
    pub volumes: Vec<VolumeName>,
    /// The mode.
    #[serde(default)]
    pub mode: MirrorMode,
    /// What gives way when the partner of a synchronous mirror is away.
    #[serde(default)]
    pub on_link_failure: LinkFailure,
    /// The RPO budget in seconds; none for the site's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_seconds: Option<NonZeroU32>,
    /// The policy on overload.
    #[serde(default)]
    pub overload: Overload,
    /// The most that is sent.
    #[serde(default)]
    pub bandwidth: Rate,
    /// The most that copies and comparisons read.
    #[serde(default)]
    pub resync_rate: Rate,
}

/// Body of `POST /v1/mirrors/NAME/start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorStart {
    /// Which side's writes are kept where both have some; none if there is nothing to choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<Side>,
}

/// Body of `POST /v1/mirrors/NAME/failover`, sent to the secondary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// The operator accepts that writes after the recovery point are lost; refused if not.
    #[serde(default)]
    pub accept_loss: bool,
    /// Go back to the last recovery point at or before this one; none for the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<RecoveryTarget>,
}

/// What a failover cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverResult {
    /// The point whose image hosts now see.
    pub recovery_point: RecoveryPoint,
    /// The age of the oldest write that may be lost; never below the true loss.
    pub seconds_lost: f64,
    /// True if `seconds_lost` is an upper bound, not exact.
    pub seconds_lost_bound: bool,
    /// True if nothing is lost that a host was told of: synchronous mirroring was in force.
    #[serde(default)]
    pub zero_loss: bool,
}

/// Body of `POST /v1/mirrors/NAME/orphans`, sent to the old primary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrphansRequest {
    /// Write what was found, decrypted, into this new or empty directory of the daemon's machine: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
}

/// A run of blocks that the old primary wrote and the new one's image lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrphanView {
    /// The volume.
    pub volume: VolumeName,
    /// Where it begins, in bytes; a multiple of 4096.
    pub offset_bytes: u64,
    /// Its length; a multiple of 4096.
    pub length_bytes: u64,
    /// When its host was told of it, or a few milliseconds before; null after a restart of the old primary.
    pub written: Option<Timestamp>,
    /// False if the new primary has overwritten it since, and it may have been equal before.
    pub exact: bool,
}

/// What the old primary wrote and the new one never had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrphansView {
    /// By volume and offset.
    pub extents: Vec<OrphanView>,
    /// Bytes of those that are exact.
    pub exact_bytes: u64,
    /// Bytes of the others.
    pub possible_bytes: u64,
    /// Where they were exported to.
    pub exported: Option<String>,
}

/// A point in the write order at which the target is crash-consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// Epoch, origin, incarnation and sequence.
    #[serde(flatten)]
    pub position: Position,
    /// The target's clock when the point's cut was received; seen from the primary, the primary's when it was closed.
    pub time: Timestamp,
}

/// How far a copy or resync is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResyncView {
    /// Bytes still to be copied.
    pub remaining_bytes: u64,
    /// When it ends at the present rate, in seconds; null while the rate is unknown.
    pub eta_seconds: Option<f64>,
}

/// What a mirror holds in memory and in its spill file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorMemory {
    /// Bytes in the ring, with those that the transport still holds.
    pub ring_bytes: u64,
    /// The ring's budget.
    pub ring_bytes_max: u64,
    /// Bytes of the dirty and intent maps.
    pub map_bytes: u64,
    /// Bytes of the spill file in use.
    #[serde(default)]
    pub spill_bytes: u64,
    /// The size of the spill file.
    #[serde(default)]
    pub spill_bytes_max: u64,
}

/// Whether synchronous mirroring is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncView {
    /// At the primary: writes are answered only when the partner has received them. At the secondary: a failover now
    /// loses nothing.
    pub in_force: bool,
    /// The same in words, or what it waits for.
    pub text: String,
}

/// A mirror as `mirror show` tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MirrorView {
    /// Its name.
    pub name: VolumeName,
    /// Its mode.
    pub mode: MirrorMode,
    /// Which end this site is.
    pub role: Role,
    /// Its state.
    pub state: MirrorState,
    /// Why the state is not the wished one, as a sentence.
    pub state_reason: Option<String>,
    /// True if the target has every block but for the backlog.
    pub synchronized: bool,
    /// True while a session with the partner is open.
    pub connected: bool,
    /// True if it waits for an operator's `mirror start`.
    pub needs_start: bool,
    /// The fencing number.
    pub epoch: u64,
    /// The last write: assigned at the primary, received at the secondary.
    pub position: Position,
    /// The point that a failover would give now; null until the initial copy has ended.
    pub recovery_point: Option<RecoveryPoint>,
    /// The age of the oldest answered write that is not durably committed at the target; null until the initial
    /// copy has ended.
    pub rpo_seconds: Option<f64>,
    /// True if `rpo_seconds` is an upper bound, not exact.
    pub rpo_bound: bool,
    /// The objective for `rpo_seconds`.
    pub rpo_budget_seconds: u32,
    /// Bytes of writes that are not durably committed at the target.
    pub backlog_bytes: u64,
    /// Where they stand.
    pub journal_tier: JournalTier,
    /// The running copy, if any.
    pub resync: Option<ResyncView>,
    /// Bytes that this site, once primary, wrote and the present primary's image lacks.
    pub orphaned_bytes: u64,
    /// What gives way when the partner of a synchronous mirror is away.
    #[serde(default)]
    pub on_link_failure: LinkFailure,
    /// Whether synchronous mirroring is in force at this moment; null where it is not wanted. At a secondary it is null
    /// unless a failover now is known to lose nothing.
    #[serde(default)]
    pub sync: Option<SyncView>,
    /// The policy on overload.
    pub overload: Overload,
    /// What the RPO alert and that policy do now: `rpo_alert_percent`, `limit_lowered_percent`, `host_writes`.
    #[serde(flatten)]
    pub pressure: PressureView,
    /// The most that this site sends, in bytes a second.
    #[serde(default)]
    pub bandwidth: Rate,
    /// The most that copies and comparisons read here, in bytes a second.
    #[serde(default)]
    pub resync_rate: Rate,
    /// The verify that runs, or the last one since the daemon started; null if there was none, or this is not the
    /// primary.
    #[serde(default)]
    pub verify: Option<VerifyView>,
    /// What it holds in memory.
    pub memory: MirrorMemory,
    /// The retention window; null at a primary, and without an image.
    #[serde(default)]
    pub window: Option<WindowView>,
    /// The drill that runs at this site.
    #[serde(default)]
    pub drill: Option<DrillView>,
    /// The volumes, in the order of their index.
    pub volumes: Vec<VolumeName>,
    /// The partner.
    pub partner: VolumeName,
}

impl MirrorView {
    /// True if the target has everything that hosts wrote here, and a session would carry the next write.
    pub fn is_caught_up(&self) -> bool {
        self.synchronized && self.connected && self.backlog_bytes == 0 && self.rpo_seconds == Some(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<T: Copy + Serialize + fmt::Display>(all: &[T]) {
        for value in all {
            assert_eq!(serde_json::to_string(value).unwrap(), format!("\"{value}\""));
        }
    }

    #[test]
    fn words_are_the_same_in_json_and_in_tables() {
        words(MirrorMode::ALL);
        words(LinkFailure::ALL);
        words(Overload::ALL);
        words(Role::ALL);
        words(MirrorState::ALL);
        words(JournalTier::ALL);
        words(Side::ALL);
        for state in MirrorState::ALL {
            assert_eq!(state.as_str().parse::<MirrorState>().unwrap(), *state);
        }
        assert!("copying".parse::<MirrorState>().is_err());
    }

    #[test]
    fn a_recovery_point_is_one_flat_object() {
        let point = RecoveryPoint { position: Position::default(), time: Timestamp::default() };
        let json = serde_json::to_value(point).unwrap();
        let mut keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["epoch", "incarnation", "origin", "sequence", "time"]);
        assert_eq!(serde_json::from_value::<RecoveryPoint>(json).unwrap(), point);
    }

    #[test]
    fn an_rpo_budget_of_zero_is_refused() {
        let text = r#"{"name":"m","partner":"p","volumes":["a"],"rpo_seconds":0}"#;
        assert!(serde_json::from_str::<MirrorCreate>(text).is_err());
        let text = r#"{"name":"m","partner":"p","volumes":["a"]}"#;
        let create: MirrorCreate = serde_json::from_str(text).unwrap();
        assert_eq!(create.rpo_seconds, None);
    }
}
