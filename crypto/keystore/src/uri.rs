//! Addresses of key providers: `file:PATH` and `pkcs11:` with the attributes of RFC 7512 that are needed here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crypto::RootKind;

use crate::KeystoreError;

const ADVICE: &str =
    "write file:/PATH, or pkcs11:token=LABEL;object=LABEL?module-path=/PATH&pin-source=file:/PATH";

/// Where the root key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProviderUri {
    /// In this file.
    File(PathBuf),
    /// In a token.
    Pkcs11(Pkcs11Uri),
}

/// A key in a PKCS#11 token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pkcs11Uri {
    /// The token's label.
    pub token: String,
    /// The key's label.
    pub object: String,
    /// The module: a shared library.
    pub module: PathBuf,
    /// The file that holds the user PIN; never the PIN itself.
    pub pin_file: PathBuf,
}

impl ProviderUri {
    /// What kind of provider is there.
    pub const fn kind(&self) -> RootKind {
        match self {
            Self::File(_) => RootKind::File,
            Self::Pkcs11(_) => RootKind::Pkcs11,
        }
    }
}

impl FromStr for ProviderUri {
    type Err = KeystoreError;

    fn from_str(uri: &str) -> Result<Self, KeystoreError> {
        let refused = |advice| KeystoreError::Uri { uri: uri.to_owned(), advice };
        if let Some(path) = uri.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(refused(ADVICE)) } else { Ok(Self::File(path.into())) };
        }
        let rest = uri.strip_prefix("pkcs11:").ok_or_else(|| refused(ADVICE))?;
        let (path, query) = rest.split_once('?').ok_or_else(|| refused(ADVICE))?;
        let mut fields: [Option<String>; 4] = [None, None, None, None];
        for attribute in path.split(';').chain(query.split('&')) {
            let (name, value) = attribute.split_once('=').ok_or_else(|| refused(ADVICE))?;
            let place = match name {
                "token" => 0,
                "object" => 1,
                "module-path" => 2,
                "pin-source" => 3,
                "pin-value" => {
                    return Err(refused(
                        "a PIN does not belong into settings: put it into a file, pin-source=file:/PATH",
                    ));
                }
                _ => return Err(refused(ADVICE)),
            };
            let value = decoded(value).filter(|value| !value.is_empty()).ok_or_else(|| refused(ADVICE))?;
            match fields.get_mut(place) {
                Some(field @ None) => *field = Some(value),
                Some(Some(_)) | None => return Err(refused("each attribute may be given once")),
            }
        }
        let [Some(token), Some(object), Some(module), Some(pin)] = fields else {
            return Err(refused(ADVICE));
        };
        let pin = pin.strip_prefix("file:").unwrap_or(&pin);
        Ok(Self::Pkcs11(Pkcs11Uri { token, object, module: module.into(), pin_file: pin.into() }))
    }
}

impl fmt::Display for ProviderUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "file:{}", path.display()),
            Self::Pkcs11(uri) => uri.fmt(formatter),
        }
    }
}

impl fmt::Display for Pkcs11Uri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |path: &Path| encoded(&path.to_string_lossy());
        write!(
            formatter,
            "pkcs11:token={};object={}?module-path={}&pin-source=file:{}",
            encoded(&self.token),
            encoded(&self.object),
            path(&self.module),
            path(&self.pin_file)
        )
    }
}

/// Percent-encoding of what has a meaning in the URI.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte);
        if plain { encoded.push(char::from(byte)) } else { encoded.push_str(&format!("%{byte:02X}")) }
    }
    encoded
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written() {
        for uri in [
            "file:/etc/farshore/kek",
            "pkcs11:token=far%20shore;object=root?module-path=/usr/lib/libsofthsm2.so&pin-source=file:/run/pin",
        ] {
            assert_eq!(uri.parse::<ProviderUri>().unwrap().to_string(), uri);
        }
        let other = "pkcs11:object=r;token=t?pin-source=/p&module-path=/m".parse::<ProviderUri>().unwrap();
        assert_eq!(other.to_string(), "pkcs11:token=t;object=r?module-path=/m&pin-source=file:/p");
    }

    #[test]
    fn other_addresses_are_refused_with_advice() {
        for uri in [
            "",
            "kek",
            "file:",
            "kmip:host",
            "pkcs11:token=t",
            "pkcs11:token=t;object=o?module-path=/m",
            "pkcs11:token=t;token=u;object=o?module-path=/m&pin-source=/p",
            "pkcs11:token=%;object=o?module-path=/m&pin-source=/p",
            "pkcs11:token=;object=o?module-path=/m&pin-source=/p",
            "pkcs11:token=t;object=o;slot-id=1?module-path=/m&pin-source=/p",
        ] {
            let refusal = uri.parse::<ProviderUri>().unwrap_err().to_string();
            assert!(refusal.contains("is not understood"), "{refusal}");
        }
        let refusal = "pkcs11:token=t;object=o?module-path=/m&pin-value=1234".parse::<ProviderUri>();
        assert!(refusal.unwrap_err().to_string().contains("does not belong into settings"));
    }
}
