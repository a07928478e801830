//! The command line of `farshored`.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use block::VolumeName;
use clap::{ArgGroup, Parser};

use super::{ConsoleAddress, NbdListener, SettingsFile};

/// What the daemon is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To serve.
    Serve,
    /// To rebuild the catalogue from the volumes' headers, and end.
    RebuildCatalogue,
    /// To print the settings in force as TOML, and end.
    PrintSettings,
}

/// The Farshore daemon: serves encrypted volumes to hosts and mirrors them to a partner site.
#[derive(Debug, Parser)]
#[command(name = "farshored", version, group = ArgGroup::new("base").required(true).args(["config", "dev"]))]
pub(super) struct Arguments {
    /// Read the settings from this TOML file.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Keep everything under this directory, with small limits and keys made as needed.
    #[arg(long, value_name = "DIR")]
    pub(super) dev: Option<PathBuf>,
    /// The site's name.
    #[arg(long, value_name = "NAME")]
    site: Option<VolumeName>,
    /// Where hosts connect, and whether over TLS (off if not given); may be given several times.
    #[arg(long, value_name = "ADDR|unix:PATH[,tls=off|optional|required]")]
    nbd: Vec<NbdListener>,
    /// The CA (PEM) that signs the hosts' certificates.
    #[arg(long, value_name = "FILE")]
    nbd_client_ca: Option<PathBuf>,
    /// Where partners connect (UDP).
    #[arg(long, value_name = "ADDR")]
    replication: Option<SocketAddr>,
    /// Where the console and /metrics are.
    #[arg(long, value_name = "ADDR|off")]
    console: Option<ConsoleAddress>,
    /// The file of the key-encryption key, made if missing; the two sites of a mirror share it.
    #[arg(long, value_name = "FILE")]
    kek: Option<PathBuf>,
    /// The number of shard threads; one a core if not given.
    #[arg(long, value_name = "N")]
    shards: Option<NonZeroUsize>,
    /// How long a target keeps committed writes out of its volumes, so that a failover can go back.
    #[arg(long, value_name = "SECONDS")]
    retention_window_seconds: Option<u64>,
    /// Rebuild the catalogue from the volumes' headers, and end.
    #[arg(long, conflicts_with = "print_settings")]
    rebuild_catalogue: bool,
    /// Print the settings in force as TOML, and end.
    #[arg(long)]
    print_settings: bool,
}

impl Arguments {
    pub(super) const fn action(&self) -> Action {
        match (self.rebuild_catalogue, self.print_settings) {
            (true, _) => Action::RebuildCatalogue,
            (false, true) => Action::PrintSettings,
            (false, false) => Action::Serve,
        }
    }

    /// The flags as settings over those of the file.
    pub(super) fn overrides(self) -> SettingsFile {
        SettingsFile {
            site: self.site,
            nbd_listen: (!self.nbd.is_empty()).then_some(self.nbd),
            nbd_client_ca_file: self.nbd_client_ca,
            replication_listen: self.replication,
            console_listen: self.console,
            kek_file: self.kek,
            shards: self.shards,
            retention_window_seconds: self.retention_window_seconds,
            ..SettingsFile::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }
}
