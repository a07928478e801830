//! Partners: the peer sites, and this site's own certificate.

use std::fmt;
use std::str::FromStr;

use block::{SiteId, VolumeName};
use serde::{Deserialize, Serialize};

/// The longest certificate accepted, in bytes of PEM text. Every header of a mirrored volume holds a copy.
pub const CERTIFICATE_BYTES_MAX: usize = 6 << 10;
/// The longest address, in bytes: a host name of 253, a colon and a port, rounded down to a header's field.
const ADDRESS_BYTES_MAX: usize = 256;

/// Where a partner listens: `HOST:PORT`, an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort(String);

/// Why an address was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address '{0}' is not understood: write HOST:PORT, as in az2.example:10820 or [2001:db8::2]:10820")]
pub struct AddressError(String);

impl HostPort {
    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostPort {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let host_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        let good = text.len() <= ADDRESS_BYTES_MAX
            && text.rsplit_once(':').is_some_and(|(host, port)| {
                let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                let host_good = match bracketed {
                    Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
                    None => !host.is_empty() && host.bytes().all(host_allowed),
                };
                host_good && port.parse::<u16>().is_ok_and(|port| port != 0)
            });
        if good { Ok(Self(text)) } else { Err(AddressError(text.chars().take(ADDRESS_BYTES_MAX).collect())) }
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl From<HostPort> for String {
    fn from(address: HostPort) -> Self {
        address.0
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Body of `POST /v1/partners`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartnerAdd {
    /// What this site calls the partner.
    pub name: VolumeName,
    /// Where it listens for replication.
    pub address: HostPort,
    /// Its certificate as PEM, at most [`CERTIFICATE_BYTES_MAX`] long; sessions with any other are refused.
    pub certificate: String,
}

/// A partner as `partner show` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartnerView {
    /// What this site calls the partner.
    pub name: VolumeName,
    /// Where it listens for replication.
    pub address: HostPort,
    /// SHA-256 of its certificate (DER), in lower-case hexadecimal digits.
    pub fingerprint: String,
    /// True while a session with it is open.
    pub connected: bool,
    /// What went wrong last, as a sentence; none after a session has opened.
    pub last_error: Option<String>,
}

/// Answer of `GET /v1/certificate`: what the partner's operator needs for `partner add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// This site's identity.
    pub site: SiteId,
    /// SHA-256 of the certificate (DER), in lower-case hexadecimal digits.
    pub fingerprint: String,
    /// The certificate as PEM.
    pub certificate: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:10820", "az2.example:1", "[::1]:65535"] {
            assert!(good.parse::<HostPort>().is_ok(), "{good}");
        }
        for bad in ["", "host", "host:", ":1", "host:0", "host:65536", "::1:1", "[host]:1", "a b:1", "a/b:1"]
        {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }
}
