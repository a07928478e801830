//! The settings file's keys, as TOML.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use block::{IopsLimit, VolumeName};
use control::Iops;
use serde::{Deserialize, Serialize};

use super::{ConsoleAddress, NbdListener, Settings};

/// Declares the file's struct, every key optional, and how one lies over another.
macro_rules! settings_file {
    ($($(#[$doc:meta])* $key:ident: $type:ty,)+) => {
        /// A settings file. A key that is not given has its default; unknown keys are refused.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct SettingsFile {
            $($(#[$doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $key: Option<$type>,)+
        }

        impl SettingsFile {
            /// These settings with those of `over` in place of them where it has any.
            pub fn overridden_by(self, over: Self) -> Self {
                Self {
                    $($key: over.$key.or(self.$key),)+
                }
            }
        }
    };
}

settings_file! {
    /// The site's name, for people. No default with `--config`; with `--dev DIR` it is DIR's name.
    site: VolumeName,
    /// Where catalogue, certificate and journals are. Default `/var/lib/farshore`; with `--dev DIR` it is DIR.
    data_dir: PathBuf,
    /// The control API's socket. Default `/run/farshore/control.sock`; with `--dev DIR` `DIR/control.sock`.
    control_socket: PathBuf,
    /// Where hosts connect, at most 16: `IP:PORT` or `unix:PATH`, or `{ address = "ADDR", tls = "MODE" }` with the mode
    /// `off`, `optional` or `required`. Default `["127.0.0.1:10809"]`.
    nbd_listen: Vec<NbdListener>,
    /// Allow NBD without TLS (`off` or `optional`) on addresses that are not loopback. Default false.
    nbd_allow_plain: bool,
    /// The certificate that hosts see over TLS, with its chain (PEM). Default: one that the site makes, in `tls` in
    /// `data_dir`.
    nbd_certificate_file: PathBuf,
    /// The key of `nbd_certificate_file` (PEM); given if and only if that is.
    nbd_key_file: PathBuf,
    /// The CAs that sign hosts' certificates (PEM). Default: none; hosts are then not asked for a certificate.
    nbd_client_ca_file: PathBuf,
    /// The most established connections of hosts, 1 to 16384. Default 1024.
    nbd_connections_max: NonZeroU32,
    /// How long a host may hold memory that other hosts wait for without moving bytes, 1 to 86400. Default 30.
    nbd_stall_seconds: u64,
    /// Where partners connect (UDP): `IP:PORT`. Default `127.0.0.1:10820`.
    replication_listen: SocketAddr,
    /// Where the console and `/metrics` are: `IP:PORT` or `off`. Default `127.0.0.1:10880`.
    console_listen: ConsoleAddress,
    /// The file of the root key of the `file` provider, shared by the two sites of a mirror. Default `kek` in `data_dir`. With
    /// another provider it still opens what it wrapped, until every tenant's keys were rotated.
    kek_file: PathBuf,
    /// Where the root key is that wraps tenants' keys, shared by the two sites of a mirror: `file:PATH`, which sets
    /// `kek_file`, or `pkcs11:token=LABEL;object=LABEL?module-path=PATH&pin-source=file:PATH`. Default: `kek_file`.
    key_provider: String,
    /// The number of shard threads, 1 to 256. Default: one a core.
    shards: NonZeroUsize,
    /// The commands a second that a shard can serve; `volume create` warns of a limit above it. Default 60000.
    shard_iops_estimate: NonZeroU32,
    /// The smallest volume. Default 500 GiB; with `--dev` 1 MiB.
    minimum_size_bytes: u64,
    /// The IOPS per TiB of the classes that can be mirrored. Default `[500, 1500, 3000]`.
    mirrored_iops_per_tib: Vec<NonZeroU32>,
    /// The budget of a mirror's ring, at least four cuts. Default 64 MiB.
    ring_bytes: u64,
    /// The size of a mirror's spill file: what the ring has no room for, in order, before the dirty map; a multiple of
    /// 4096 from 64 MiB, or 0 for none. Default 8 GiB; with `--dev` 256 MiB.
    spill_bytes: u64,
    /// The budget of received payloads of a shard. Default 256 MiB.
    receive_pool_bytes: u64,
    /// The longest time between two cuts, 1 to 1000. Default 50.
    cut_interval_milliseconds: u64,
    /// The payload that closes a cut early, 64 KiB to 16 MiB. Default 1 MiB.
    cut_bytes: u64,
    /// The size of a redo segment, at least four cuts. Default 256 MiB; with `--dev` 32 MiB.
    redo_segment_bytes: u64,
    /// The number of redo segments of a mirror; a resync must fit in them. Default 64; with `--dev` 16.
    redo_segments: NonZeroU32,
    /// The bytes behind a bit of the intent map, a power of two from 1 MiB. Default 1 MiB.
    intent_region_bytes: u64,
    /// The bytes to compare after a crash at which the intent map starts to clear. Default 256 GiB.
    intent_budget_bytes: u64,
    /// How long a restarted primary waits for its partner before it opens its exports. Default 30.
    start_grace_seconds: u64,
    /// How long a target keeps committed writes out of its volumes, so that a failover can go back, 0 to 604800.
    /// Default 0.
    retention_window_seconds: u64,
    /// The redo that a target keeps can be applied within this time at a failover, 1 to 86400. Default 30.
    failover_apply_seconds: NonZeroU32,
    /// The scratch space of a drill, at least 1 MiB. Default 10 GiB; with `--dev` 256 MiB.
    drill_scratch_bytes: u64,
    /// How long hosts' writes wait under `--overload stop` before they are refused, 0 to 300. Default 10.
    overload_hold_seconds: u64,
    /// The RPO budget of a mirror created without one. Default 900.
    rpo_seconds: NonZeroU32,
    /// The pools, as name = folder. Default: `default`, the folder `pool` in `data_dir`.
    pools: BTreeMap<VolumeName, PathBuf>,
    /// Storage classes beside or in place of the built-in ones, as name = IOPS per TiB or `"unlimited"`.
    classes: BTreeMap<VolumeName, Iops>,
}

impl SettingsFile {
    /// What `--config` starts from.
    pub(super) fn production() -> Self {
        Self { control_socket: Some("/run/farshore/control.sock".into()), ..Self::default() }
    }

    /// What `--dev` starts from: everything under `directory`, and small limits.
    pub(super) fn development(directory: &Path) -> Self {
        let name = directory.file_name().and_then(|name| name.to_str());
        let site = name.and_then(|name| name.parse().ok()).or_else(|| "dev".parse().ok());
        Self {
            site,
            data_dir: Some(directory.to_owned()),
            minimum_size_bytes: Some(1 << 20),
            spill_bytes: Some(256 << 20),
            redo_segment_bytes: Some(32 << 20),
            redo_segments: NonZeroU32::new(16),
            drill_scratch_bytes: Some(256 << 20),
            ..Self::default()
        }
    }
}

fn seconds(duration: std::time::Duration) -> Option<NonZeroU32> {
    u32::try_from(duration.as_secs()).ok().and_then(NonZeroU32::new)
}

impl From<&Settings> for SettingsFile {
    fn from(settings: &Settings) -> Self {
        let milliseconds = u64::try_from(settings.cut_interval.as_millis()).unwrap_or(u64::MAX);
        let classes = settings.classes.iter().filter_map(|class| {
            let limit = class.iops_per_tib.map_or(IopsLimit::Unlimited, IopsLimit::PerSecond);
            Some((class.name.parse().ok()?, Iops(limit)))
        });
        Self {
            site: Some(settings.site.clone()),
            data_dir: Some(settings.data_dir.clone()),
            control_socket: Some(settings.control_socket.clone()),
            nbd_listen: Some(settings.nbd_listen.clone()),
            nbd_allow_plain: Some(settings.nbd_allow_plain),
            nbd_certificate_file: settings.nbd_certificate.clone().map(|files| files.certificate),
            nbd_key_file: settings.nbd_certificate.clone().map(|files| files.key),
            nbd_client_ca_file: settings.nbd_client_ca.clone(),
            nbd_connections_max: Some(settings.nbd_connections_max),
            nbd_stall_seconds: Some(settings.nbd_stall.as_secs()),
            replication_listen: Some(settings.replication_listen),
            console_listen: Some(settings.console_listen),
            kek_file: Some(settings.kek_file.clone()),
            key_provider: Some(settings.key_provider.to_string()),
            shards: Some(settings.shards),
            shard_iops_estimate: Some(settings.shard_iops_estimate),
            minimum_size_bytes: Some(settings.minimum_size.0),
            mirrored_iops_per_tib: Some(settings.mirrored_iops_per_tib.clone()),
            ring_bytes: Some(settings.ring.0),
            spill_bytes: Some(settings.spill.0),
            receive_pool_bytes: Some(settings.receive_pool.0),
            cut_interval_milliseconds: Some(milliseconds),
            cut_bytes: Some(settings.cut.0),
            redo_segment_bytes: Some(settings.redo_segment.0),
            redo_segments: Some(settings.redo_segments),
            intent_region_bytes: Some(settings.intent_region.0),
            intent_budget_bytes: Some(settings.intent_budget.0),
            start_grace_seconds: Some(settings.start_grace.as_secs()),
            retention_window_seconds: Some(settings.retention.window.as_secs()),
            failover_apply_seconds: seconds(settings.retention.failover_within),
            drill_scratch_bytes: Some(settings.drill_scratch.0),
            overload_hold_seconds: Some(settings.overload_hold.as_secs()),
            rpo_seconds: Some(settings.rpo_seconds),
            pools: Some(settings.pools.clone()),
            classes: Some(classes.collect()),
        }
    }
}
