//! Tenants and keys: whose volumes are whose, and what wraps their keys.

use block::{TenantId, VolumeName};
use serde::{Deserialize, Serialize};

/// Body of `POST /v1/tenants`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantCreate {
    /// The name; unique on the site.
    pub name: VolumeName,
    /// The identity, where the other site has the tenant already. A new one if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<TenantId>,
}

/// A tenant as `tenant show` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantView {
    /// Its name.
    pub name: VolumeName,
    /// Its identity, the same at both sites of a mirror.
    pub id: TenantId,
    /// True while its volumes are offline because an operator locked it.
    pub locked: bool,
    /// Which of its domain keys is the newest, from 1; none before it has one.
    pub key_version: Option<u32>,
    /// The kind of root of trust that wraps that key.
    pub root: Option<String>,
    /// Its volumes.
    pub volumes: Vec<VolumeName>,
    /// Those of them whose keys an older domain key wraps: rotate the tenant's key again.
    pub volumes_behind: Vec<VolumeName>,
    /// What a lock or unlock could not do, as sentences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// What became of the keys of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeKeyView {
    /// The volume.
    pub volume: VolumeName,
    /// Which of its key-encryption keys wraps its data key now, from 1; 0 for a wrap from before there were tenants.
    pub key_version: u32,
    /// Which of the tenant's domain keys wraps that.
    pub domain_version: u32,
    /// The kind of root of trust that wraps the domain key.
    pub root: String,
    /// Why it was not rotated, as a sentence; the old keys stand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// The outcome of `key rotate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationView {
    /// The volumes' keys as they are now.
    pub volumes: Vec<VolumeKeyView>,
}

/// The outcome of `key provider test`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProviderView {
    /// The provider's address, without secrets.
    pub provider: String,
    /// A public name of its root key.
    pub fingerprint: String,
    /// How long wrapping and unwrapping a key took, in seconds.
    pub seconds: f64,
    /// Places of expanded keys that could not be locked in memory or left out of core dumps.
    pub unguarded: u64,
}

/// Body of `POST /v1/audit/verify`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditVerify {
    /// A hash that was kept elsewhere and must be in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
}

/// An audit log that is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditView {
    /// The log's file.
    pub file: String,
    /// Its lines.
    pub lines: u64,
    /// The hash of the last one: kept elsewhere, it shows later that no line up to it was cut off.
    pub head: String,
}
