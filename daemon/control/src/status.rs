//! The site as a whole.

use block::{SiteId, VolumeName};
use serde::{Deserialize, Serialize};

/// How many objects a site has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Volumes, replicas included.
    pub volumes: u64,
    /// Partners.
    pub partners: u64,
    /// Mirrors, in either role.
    pub mirrors: u64,
    /// Open connections of hosts.
    pub connections: u64,
}

/// Answer of `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// The daemon's version.
    pub version: String,
    /// The site's identity.
    pub site: SiteId,
    /// The site's name, from the settings.
    pub site_name: VolumeName,
    /// Time since the daemon's start.
    pub uptime_seconds: f64,
    /// What encrypts, and by which CPU features.
    pub encryption_engine: String,
    /// Where hosts connect, without an export's name.
    pub nbd_uris: Vec<String>,
    /// Where partners connect (UDP).
    pub replication_address: String,
    /// Where the console and `/metrics` are; null if switched off.
    pub console_address: Option<String>,
    /// How many objects there are.
    pub counts: Counts,
    /// What a person should look at, one sentence each.
    pub warnings: Vec<String>,
}
