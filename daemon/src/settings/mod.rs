//! Settings: what the daemon is told by its file and its flags, checked as a whole before anything starts.
//!
//! `--config FILE` reads a TOML file (the keys are [`SettingsFile`]'s), `--dev DIR` needs none and keeps everything under
//! DIR. Flags override the file. Unknown keys are refused; a refusal names key, value and what to do. Secrets come by
//! file, never by value.

mod address;
mod arguments;
mod file;
mod listener;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::{ByteCount, DATA_UNIT_BYTES, IopsLimit, StorageClass, VolumeName};
use clap::Parser;
use control::Iops;
use keystore::{KeystoreError, ProviderUri};

pub use address::{ConsoleAddress, NbdAddress};
pub use arguments::Action;
pub use file::SettingsFile;
pub use listener::{NbdListener, NbdTls};

use arguments::Arguments;

use crate::group::Retention;

/// The longest path of a Unix socket, in bytes: what `sockaddr_un` holds, less its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
const MIB: u64 = 1 << 20;
const REDO_SEGMENTS_DEFAULT: NonZeroU32 = NonZeroU32::new(64).unwrap();
const CONNECTIONS_DEFAULT: NonZeroU32 = NonZeroU32::new(1024).unwrap();
/// A shard's measured rate is not known at a start; this is below what the reference machine serves.
const SHARD_IOPS_DEFAULT: NonZeroU32 = NonZeroU32::new(60_000).unwrap();
const FAILOVER_APPLY_SECONDS_DEFAULT: NonZeroU32 = NonZeroU32::new(30).unwrap();
const RPO_SECONDS_DEFAULT: NonZeroU32 = NonZeroU32::new(900).unwrap();

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate's file, with its chain.
    pub certificate: PathBuf,
    /// The key's file.
    pub key: PathBuf,
}

/// All settings, checked; see [`SettingsFile`] for what each means and its default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What is to be done.
    pub action: Action,
    /// The site's name.
    pub site: VolumeName,
    /// Where the site's own files are.
    pub data_dir: PathBuf,
    /// The pools and their folders.
    pub pools: BTreeMap<VolumeName, PathBuf>,
    /// The control API's socket.
    pub control_socket: PathBuf,
    /// Where hosts connect.
    pub nbd_listen: Vec<NbdListener>,
    /// Whether hosts may connect over a network in plain text.
    pub nbd_allow_plain: bool,
    /// What hosts see over TLS; none if the site makes its own.
    pub nbd_certificate: Option<CertificateFiles>,
    /// The CAs that sign hosts' certificates.
    pub nbd_client_ca: Option<PathBuf>,
    /// The most established connections of hosts.
    pub nbd_connections_max: NonZeroU32,
    /// How long a host may hold memory that others wait for without moving bytes.
    pub nbd_stall: Duration,
    /// Where partners connect (UDP).
    pub replication_listen: SocketAddr,
    /// Where the console and `/metrics` are.
    pub console_listen: ConsoleAddress,
    /// The file of the `file` provider's root key.
    pub kek_file: PathBuf,
    /// Where the root key is.
    pub key_provider: ProviderUri,
    /// The number of shard threads.
    pub shards: NonZeroUsize,
    /// The commands a second that a shard can serve.
    pub shard_iops_estimate: NonZeroU32,
    /// The storage classes.
    pub classes: Vec<StorageClass>,
    /// The smallest volume.
    pub minimum_size: ByteCount,
    /// The IOPS per TiB of the classes that can be mirrored.
    pub mirrored_iops_per_tib: Vec<NonZeroU32>,
    /// The budget of a mirror's ring.
    pub ring: ByteCount,
    /// The size of a mirror's spill file; 0 for none.
    pub spill: ByteCount,
    /// The budget of received payloads of a shard.
    pub receive_pool: ByteCount,
    /// The longest time between two cuts.
    pub cut_interval: Duration,
    /// The payload that closes a cut early.
    pub cut: ByteCount,
    /// The size of a redo segment.
    pub redo_segment: ByteCount,
    /// The number of redo segments of a mirror.
    pub redo_segments: NonZeroU32,
    /// The bytes behind a bit of the intent map.
    pub intent_region: ByteCount,
    /// The bytes to compare after a crash at which the intent map starts to clear.
    pub intent_budget: ByteCount,
    /// How long a restarted primary waits for its partner before it opens its exports.
    pub start_grace: Duration,
    /// How long a target keeps committed writes out of its volumes.
    pub retention: Retention,
    /// The scratch space of a drill.
    pub drill_scratch: ByteCount,
    /// How long hosts' writes wait under `--overload stop` before they are refused.
    pub overload_hold: Duration,
    /// The RPO budget of a mirror created without one.
    pub rpo_seconds: NonZeroU32,
}

/// Why the settings are refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The command line is wrong, or asks for help or the version: print it and exit as it says.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file cannot be read.
    #[error("settings file '{}' cannot be read: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The failure.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known.
    #[error("settings file '{}', line {line}: {reason}", .file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong and allowed there.
        reason: String,
    },
    /// A value is not allowed.
    #[error("setting '{key}' = {value} is not allowed: {advice}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What to do.
        advice: String,
    },
    /// A setting without a default is missing.
    #[error("setting '{key}' is missing: {advice}")]
    Absent {
        /// The key.
        key: &'static str,
        /// What to do.
        advice: &'static str,
    },
}

impl Settings {
    /// Reads the command line, program name first, and the file that it names.
    ///
    /// # Errors
    /// The command line or the file is wrong, or a value is not allowed.
    pub fn from_args<T: Into<OsString> + Clone>(
        arguments: impl IntoIterator<Item = T>,
    ) -> Result<Self, SettingsError> {
        let arguments = Arguments::try_parse_from(arguments)?;
        let base = match (&arguments.config, &arguments.dev) {
            (Some(path), _) => SettingsFile::production().overridden_by(read(path)?),
            (None, Some(directory)) => SettingsFile::development(&absolute(directory)),
            (None, None) => SettingsFile::production(),
        };
        let action = arguments.action();
        Self::checked(base.overridden_by(arguments.overrides()), action)
    }

    /// The settings in force as a settings file: read again with `--config` it gives the same.
    ///
    /// # Panics
    /// Never: what TOML cannot say, large numbers and paths that are not UTF-8, is refused when the settings are checked.
    pub fn effective(&self) -> String {
        let text = toml::to_string(&SettingsFile::from(self)).unwrap_or_default();
        assert!(!text.is_empty(), "every setting has a form in TOML: numbers are checked to fit");
        text
    }

    /// The class of that name.
    pub fn class(&self, name: &str) -> Option<&StorageClass> {
        self.classes.iter().find(|class| class.name == name)
    }

    /// True if volumes of the class can be mirrored.
    pub fn may_mirror(&self, class: &StorageClass) -> bool {
        class.iops_per_tib.is_some_and(|iops| self.mirrored_iops_per_tib.contains(&iops))
    }

    /// Fills in the defaults, and checks all.
    fn checked(file: SettingsFile, action: Action) -> Result<Self, SettingsError> {
        let site = file.site.ok_or(SettingsError::Absent {
            key: "site",
            advice: "give the site a name with site = \"NAME\" or --site NAME",
        })?;
        let data_dir = absolute(&file.data_dir.unwrap_or_else(|| PathBuf::from("/var/lib/farshore")));
        let under = |name: &str| data_dir.join(name);
        let path = |path: Option<PathBuf>, name| absolute(&path.unwrap_or_else(|| under(name)));
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let mirrored = || [500, 1500, 3000].into_iter().filter_map(NonZeroU32::new).collect();
        let bytes = |value: Option<u64>, default| ByteCount(value.unwrap_or(default));
        let (key_provider, kek_file) = provider(file.key_provider.as_deref(), file.kek_file, under("kek"))?;
        let settings = Self {
            action,
            site,
            pools: file.pools.map_or_else(|| default_pool(under("pool")), absolute_pools),
            control_socket: path(file.control_socket, "control.sock"),
            nbd_listen: file.nbd_listen.unwrap_or_else(default_listeners),
            nbd_certificate: certificate(file.nbd_certificate_file, file.nbd_key_file)?,
            nbd_client_ca: file.nbd_client_ca_file.map(|path| absolute(&path)),
            nbd_connections_max: file.nbd_connections_max.unwrap_or(CONNECTIONS_DEFAULT),
            nbd_stall: Duration::from_secs(file.nbd_stall_seconds.unwrap_or(30)),
            nbd_allow_plain: file.nbd_allow_plain.unwrap_or(false),
            replication_listen: file.replication_listen.unwrap_or_else(|| loopback(10_820)),
            console_listen: file.console_listen.unwrap_or_else(|| ConsoleAddress::Tcp(loopback(10_880))),
            kek_file,
            key_provider,
            shards: file.shards.unwrap_or(cores),
            shard_iops_estimate: file.shard_iops_estimate.unwrap_or(SHARD_IOPS_DEFAULT),
            classes: classes(file.classes.unwrap_or_default()),
            minimum_size: bytes(file.minimum_size_bytes, 500 << 30),
            mirrored_iops_per_tib: file.mirrored_iops_per_tib.unwrap_or_else(mirrored),
            ring: bytes(file.ring_bytes, 64 * MIB),
            spill: bytes(file.spill_bytes, 8 << 30),
            receive_pool: bytes(file.receive_pool_bytes, 256 * MIB),
            cut_interval: Duration::from_millis(file.cut_interval_milliseconds.unwrap_or(50)),
            cut: bytes(file.cut_bytes, MIB),
            redo_segment: bytes(file.redo_segment_bytes, 256 * MIB),
            redo_segments: file.redo_segments.unwrap_or(REDO_SEGMENTS_DEFAULT),
            intent_region: bytes(file.intent_region_bytes, MIB),
            intent_budget: bytes(file.intent_budget_bytes, 256 << 30),
            start_grace: Duration::from_secs(file.start_grace_seconds.unwrap_or(30)),
            retention: Retention {
                window: Duration::from_secs(file.retention_window_seconds.unwrap_or(0)),
                failover_within: Duration::from_secs(
                    file.failover_apply_seconds.unwrap_or(FAILOVER_APPLY_SECONDS_DEFAULT).get().into(),
                ),
            },
            drill_scratch: bytes(file.drill_scratch_bytes, 10 << 30),
            overload_hold: Duration::from_secs(file.overload_hold_seconds.unwrap_or(10)),
            rpo_seconds: file.rpo_seconds.unwrap_or(RPO_SECONDS_DEFAULT),
            data_dir,
        };
        settings.check_places()?;
        settings.check_numbers()?;
        Ok(settings)
    }

    fn check_places(&self) -> Result<(), SettingsError> {
        let paths = [&self.data_dir, &self.control_socket, &self.kek_file];
        let tls = self.nbd_certificate.iter().flat_map(|files| [&files.certificate, &files.key]);
        for path in paths.into_iter().chain(self.pools.values()).chain(tls).chain(&self.nbd_client_ca) {
            if path.to_str().is_none() {
                return Err(refuse("data_dir", path.display(), "a path must be UTF-8 text; choose another"));
            }
        }
        if self.pools.is_empty() {
            return Err(refuse(
                "pools",
                "{}",
                "name at least one pool, as in default = \"/var/lib/farshore/pool\"",
            ));
        }
        for path in self.pools.values() {
            let same = self.pools.values().filter(|other| *other == path).count();
            if same > 1 {
                return Err(refuse("pools", path.display(), "give each pool its own folder"));
            }
        }
        check_socket("control_socket", &self.control_socket)?;
        between("nbd_listen", u64::try_from(self.nbd_listen.len()).unwrap_or(u64::MAX), 1, 16)?;
        for listener in &self.nbd_listen {
            match &listener.address {
                NbdAddress::Unix(path) if path.as_os_str().as_bytes().contains(&b',') => {
                    let advice = "a Unix socket's path has no comma here, as ',tls=MODE' may follow it; choose another";
                    return Err(refuse("nbd_listen", &listener.address, advice));
                }
                NbdAddress::Unix(path) => check_socket("nbd_listen", path)?,
                NbdAddress::Tcp(address)
                    if address.ip().is_loopback()
                        || self.nbd_allow_plain
                        || listener.tls == NbdTls::Required => {}
                NbdAddress::Tcp(address) => {
                    let advice = "NBD without TLS would cross the network in plain text; use tls = \"required\", a \
                                  loopback address or unix:PATH, or set nbd_allow_plain = true where the network \
                                  itself is trusted";
                    return Err(refuse("nbd_listen", address, advice));
                }
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), SettingsError> {
        let milliseconds = u64::try_from(self.cut_interval.as_millis()).unwrap_or(u64::MAX);
        between("shards", u64::try_from(self.shards.get()).unwrap_or(u64::MAX), 1, 256)?;
        between("minimum_size_bytes", self.minimum_size.0, DATA_UNIT_BYTES, 1 << 50)?;
        between("cut_interval_milliseconds", milliseconds, 1, 1000)?;
        between("cut_bytes", self.cut.0, 64 << 10, 16 * MIB)?;
        // A ring must hold the cut that is on its way and the one that fills.
        between("ring_bytes", self.ring.0, self.cut.0.saturating_mul(4), 1 << 40)?;
        if self.spill.0 > 0 {
            between("spill_bytes", self.spill.0, 64 * MIB, 1 << 44)?;
        }
        between("receive_pool_bytes", self.receive_pool.0, 4 * MIB, 1 << 40)?;
        between("redo_segment_bytes", self.redo_segment.0, self.cut.0.saturating_mul(4), 16 << 30)?;
        between("intent_region_bytes", self.intent_region.0, MIB, 1 << 30)?;
        between("intent_budget_bytes", self.intent_budget.0, self.intent_region.0, 1 << 50)?;
        // All may be of one shard, whose request numbers have 24 bits.
        between("nbd_connections_max", u64::from(self.nbd_connections_max.get()), 1, 16_384)?;
        between("nbd_stall_seconds", self.nbd_stall.as_secs(), 1, 86_400)?;
        between("start_grace_seconds", self.start_grace.as_secs(), 0, 86_400)?;
        between("retention_window_seconds", self.retention.window.as_secs(), 0, 604_800)?;
        between("failover_apply_seconds", self.retention.failover_within.as_secs(), 1, 86_400)?;
        between("drill_scratch_bytes", self.drill_scratch.0, MIB, 1 << 50)?;
        between("overload_hold_seconds", self.overload_hold.as_secs(), 0, 300)?;
        between("rpo_seconds", u64::from(self.rpo_seconds.get()), 1, 86_400)?;
        between("redo_segments", u64::from(self.redo_segments.get()), 2, 65_536)?;
        if !self.intent_region.0.is_power_of_two() {
            return Err(refuse("intent_region_bytes", self.intent_region.0, "give a power of two"));
        }
        for (key, value) in [
            ("minimum_size_bytes", self.minimum_size),
            ("redo_segment_bytes", self.redo_segment),
            ("cut_bytes", self.cut),
            ("spill_bytes", self.spill),
        ] {
            if !value.0.is_multiple_of(DATA_UNIT_BYTES) {
                return Err(refuse(key, value.0, "give a multiple of 4096"));
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<SettingsFile, SettingsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| SettingsError::Read { file: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = text.get(..start).unwrap_or(&text);
        SettingsError::Parse {
            file: path.to_owned(),
            line: before.matches('\n').count().saturating_add(1),
            reason: error.message().replace('\n', " "),
        }
    })
}

/// The built-in classes with the file's over and beside them.
fn classes(own: BTreeMap<VolumeName, Iops>) -> Vec<StorageClass> {
    let mut classes = StorageClass::built_in();
    for (name, iops) in own {
        let iops_per_tib = match iops.0 {
            IopsLimit::Unlimited => None,
            IopsLimit::PerSecond(iops) => Some(iops),
        };
        match classes.iter_mut().find(|class| class.name == name.as_str()) {
            Some(class) => class.iops_per_tib = iops_per_tib,
            None => classes.push(StorageClass { name: name.into(), iops_per_tib }),
        }
    }
    classes
}

fn default_listeners() -> Vec<NbdListener> {
    vec![NbdListener { address: NbdAddress::Tcp(loopback(10_809)), tls: NbdTls::Off }]
}

fn certificate(
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<CertificateFiles>, SettingsError> {
    let missing = |key| SettingsError::Absent {
        key,
        advice: "nbd_certificate_file and nbd_key_file are given together, or neither and the site makes its own",
    };
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(missing("nbd_key_file")),
        (None, Some(_)) => Err(missing("nbd_certificate_file")),
        (Some(certificate), Some(key)) => {
            Ok(Some(CertificateFiles { certificate: absolute(&certificate), key: absolute(&key) }))
        }
    }
}

fn default_pool(folder: PathBuf) -> BTreeMap<VolumeName, PathBuf> {
    VolumeName::try_from("default".to_owned()).map(|name| (name, folder)).into_iter().collect()
}

fn absolute_pools(pools: BTreeMap<VolumeName, PathBuf>) -> BTreeMap<VolumeName, PathBuf> {
    pools.into_iter().map(|(name, path)| (name, absolute(&path))).collect()
}

/// The path from the root on, so that a later change of the working directory changes nothing.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// The key provider, and the key file beside it or in it.
fn provider(
    uri: Option<&str>,
    kek_file: Option<PathBuf>,
    default: PathBuf,
) -> Result<(ProviderUri, PathBuf), SettingsError> {
    let kek_file = kek_file.map(|path| absolute(&path));
    let Some(uri) = uri else {
        let path = kek_file.unwrap_or(default);
        return Ok((ProviderUri::File(path.clone()), path));
    };
    let parsed: ProviderUri =
        uri.parse().map_err(|error: KeystoreError| refuse("key_provider", uri, error.to_string()))?;
    Ok(match parsed {
        ProviderUri::File(path) => {
            let path = absolute(&path);
            if kek_file.is_some_and(|kek_file| kek_file != path) {
                let advice = "kek_file (or --kek) names another file; give one of the two";
                return Err(refuse("key_provider", uri, advice));
            }
            (ProviderUri::File(path.clone()), path)
        }
        ProviderUri::Pkcs11(_) => (parsed, kek_file.unwrap_or(default)),
    })
}

fn check_socket(key: &'static str, path: &Path) -> Result<(), SettingsError> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        let advice =
            format!("a Unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes; choose a shorter one");
        return Err(refuse(key, path.display(), advice));
    }
    Ok(())
}

fn between(key: &'static str, value: u64, least: u64, most: u64) -> Result<(), SettingsError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(refuse(key, value, format!("give {least} to {most}")))
}

fn refuse(key: &'static str, value: impl std::fmt::Display, advice: impl Into<String>) -> SettingsError {
    SettingsError::Value { key, value: value.to_string(), advice: advice.into() }
}

#[cfg(test)]
mod tests;
