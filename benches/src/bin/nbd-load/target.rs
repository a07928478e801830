//! Where an export is: the two forms of the NBD URI that are of use here.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

const PORT: u16 = 10_809;
const NAME_BYTES_MAX: usize = 4096;

/// An address and the name of an export there.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: Address,
    pub(crate) export: String,
}

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    /// Host and port, as the resolver takes them.
    Tcp(String),
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(!text.contains('%'), "escapes in a URI are not supported");
        let (address, export) = if let Some(rest) = text.strip_prefix("nbd+unix:///") {
            let (export, query) = rest.split_once('?').context("'?socket=PATH' is missing")?;
            let socket = query.strip_prefix("socket=").context("'socket=PATH' is missing")?;
            (Address::Unix(PathBuf::from(socket)), export)
        } else if let Some(rest) = text.strip_prefix("nbd://") {
            let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
            let port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            (Address::Tcp(if port { host.to_owned() } else { format!("{host}:{PORT}") }), export)
        } else {
            bail!("it must start with nbd+unix:/// or nbd://");
        };
        ensure!(export.len() <= NAME_BYTES_MAX, "the export's name is longer than {NAME_BYTES_MAX} bytes");
        Ok(Self { address, export: export.to_owned() })
    }
}

impl Display for Target {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(formatter, "nbd+unix:///{}?socket={}", self.export, path.display()),
            Address::Tcp(host) => write!(formatter, "nbd://{host}/{}", self.export),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, Target};

    #[test]
    fn both_forms_are_read_and_printed_alike() {
        let unix = "nbd+unix:///disk?socket=/run/nbd.sock";
        let target: Target = unix.parse().unwrap();
        assert_eq!(
            (target.export.as_str(), &target.address),
            ("disk", &Address::Unix("/run/nbd.sock".into()))
        );
        assert_eq!(target.to_string(), unix);
        let target: Target = "nbd://[::1]:4000/a".parse().unwrap();
        assert_eq!(target.to_string(), "nbd://[::1]:4000/a");
        let target: Target = "nbd://localhost".parse().unwrap();
        assert_eq!(target.to_string(), "nbd://localhost:10809/");
    }

    #[test]
    fn other_forms_are_refused() {
        for wrong in
            ["", "disk", "nbds://host/disk", "nbd+unix:///disk", "nbd+unix:///a?path=b", "nbd://h/a%20b"]
        {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
