//! NBD listeners in settings: an address, and whether hosts may or must use TLS there.

use std::fmt;
use std::str::FromStr;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::NbdAddress;
use super::address::AddressError;

/// Whether hosts use TLS on a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NbdTls {
    /// Plain text only.
    #[default]
    Off,
    /// As the host asks for.
    Optional,
    /// TLS only.
    Required,
}

/// An NBD listener: `ADDR`, then without TLS, or `ADDR,tls=MODE`; in TOML also
/// `{ address = "ADDR", tls = "MODE" }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdListener {
    /// Where hosts connect.
    pub address: NbdAddress,
    /// Whether they use TLS.
    pub tls: NbdTls,
}

/// Why a listener was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenerError {
    /// The address is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The mode is none.
    #[error(
        "TLS mode '{0}' is not understood: write off, optional or required, as in 0.0.0.0:10809,tls=required"
    )]
    Mode(String),
}

/// The longer form in TOML.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    address: NbdAddress,
    #[serde(default)]
    tls: NbdTls,
}

impl Serialize for NbdListener {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.tls {
            NbdTls::Off => self.address.serialize(serializer),
            NbdTls::Optional | NbdTls::Required => {
                Table { address: self.address.clone(), tls: self.tls }.serialize(serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for NbdListener {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Forms)
    }
}

/// Reads either form. By hand, as an untagged enum would not say what is wrong with the address.
struct Forms;

impl<'de> Visitor<'de> for Forms {
    type Value = NbdListener;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an address, or { address = \"ADDR\", tls = \"off|optional|required\" }")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<NbdListener, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<NbdListener, A::Error> {
        let Table { address, tls } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(NbdListener { address, tls })
    }
}

impl FromStr for NbdListener {
    type Err = ListenerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((address, mode)) = text.rsplit_once(",tls=") else {
            // A mode that is spelled otherwise must not become part of a socket's path, served in clear text.
            if let Some((_, mode)) = text.split_once(',') {
                return Err(ListenerError::Mode(mode.to_owned()));
            }
            return Ok(Self { address: text.parse()?, tls: NbdTls::Off });
        };
        let tls = match mode {
            "off" => NbdTls::Off,
            "optional" => NbdTls::Optional,
            "required" => NbdTls::Required,
            other => return Err(ListenerError::Mode(other.to_owned())),
        };
        Ok(Self { address: address.parse()?, tls })
    }
}

impl fmt::Display for NbdListener {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct File {
        listen: Vec<NbdListener>,
    }

    #[test]
    fn a_listener_is_an_address_or_a_table_in_toml_and_reads_back_the_same() {
        let text = "listen = ['127.0.0.1:1,tls=off', { address = 'unix:/n', tls = 'optional' }, { address = '[::1]:2' }]";
        let file: File = toml::from_str(text).unwrap();
        let modes: Vec<_> = file.listen.iter().map(|listener| listener.tls).collect();
        assert_eq!(modes, [NbdTls::Off, NbdTls::Optional, NbdTls::Off]);
        assert_eq!(toml::from_str::<File>(&toml::to_string(&file).unwrap()).unwrap(), file);
        for bad in ["'nowhere'", "{ address = '1.1.1.1:1', tsl = 'off' }", "{ tls = 'off' }", "7"] {
            assert!(toml::from_str::<File>(&format!("listen = [{bad}]")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_text_in_toml_means_what_the_flag_means() {
        let file: File = toml::from_str("listen = ['unix:/n,tls=required']").unwrap();
        assert_eq!(file.listen, ["unix:/n,tls=required".parse().unwrap()]);
        assert_eq!(file.listen[0].tls, NbdTls::Required);
    }

    #[test]
    fn a_flag_may_end_with_the_mode() {
        let listener = |text: &str| text.parse::<NbdListener>();
        assert_eq!(listener("127.0.0.1:1").unwrap().tls, NbdTls::Off);
        assert_eq!(listener("unix:/a,b,tls=required").unwrap().tls, NbdTls::Required);
        assert_eq!(listener("unix:/a,b,tls=required").unwrap().address, NbdAddress::Unix("/a,b".into()));
        assert!(matches!(listener("127.0.0.1:1,tls=yes"), Err(ListenerError::Mode(_))));
        assert!(matches!(listener("here,tls=off"), Err(ListenerError::Address(_))));
    }
}
