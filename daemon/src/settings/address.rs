//! Addresses in settings: NBD listeners and the console.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why an address was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address '{text}' is not understood: write {forms}")]
pub struct AddressError {
    text: String,
    forms: &'static str,
}

/// Where hosts connect: an IP address and port, or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NbdAddress {
    /// A TCP listener.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Where the console is: an IP address and port, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConsoleAddress {
    /// A TCP listener.
    Tcp(SocketAddr),
    /// No console and no `/metrics`.
    Off,
}

impl FromStr for NbdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || AddressError {
            text: text.to_owned(),
            forms: "IP:PORT or unix:PATH, as in 127.0.0.1:10809, [::1]:10809 or unix:/run/farshore/nbd.sock",
        };
        match text.strip_prefix("unix:") {
            Some("") => Err(refused()),
            Some(path) => Ok(Self::Unix(super::absolute(path.as_ref()))),
            None => text.parse().map(Self::Tcp).map_err(|_| refused()),
        }
    }
}

impl FromStr for ConsoleAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::Tcp).map_err(|_| AddressError {
            text: text.to_owned(),
            forms: "IP:PORT, as in 127.0.0.1:10880, or off",
        })
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(formatter),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for ConsoleAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(formatter),
            Self::Off => formatter.write_str("off"),
        }
    }
}

macro_rules! as_text {
    ($($name:ident),+) => {$(
        impl TryFrom<String> for $name {
            type Error = AddressError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(address: $name) -> Self {
                address.to_string()
            }
        }
    )+};
}

as_text!(NbdAddress, ConsoleAddress);
