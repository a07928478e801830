//! Pinned certificates: which partner may hold which key.
//!
//! A pin is the exact DER of a partner's certificate. Names, validity dates and issuers in it mean nothing here:
//! an operator carried the certificate over by hand, and that is the trust.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::server::ParsedCertificate;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{PemObject, SectionKind};
use tokio::sync::watch;

/// Far above any real certificate; bounds what a pasted file may cost.
const PEM_BYTES_MAX: usize = 64 << 10;

/// The SHA-256 of a certificate's DER, as `openssl x509 -fingerprint -sha256` prints it but without colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate in DER.
    pub(crate) fn of(der: &[u8]) -> Self {
        let mut bytes = [0; 32];
        let digest = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256
            .tls13()
            .map(|suite| suite.common.hash_provider.hash(der));
        let digest = digest.as_ref().map_or(&[][..], AsRef::as_ref);
        assert_eq!(digest.len(), bytes.len(), "the suite's hash is SHA-256");
        bytes.copy_from_slice(digest);
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Why a text is not a certificate that can be pinned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Nothing between BEGIN and END lines.
    #[error(
        "this is not a PEM certificate (no '-----BEGIN CERTIFICATE-----' block): give the output of `farshore certificate show` at the partner"
    )]
    NotPem,
    /// A damaged PEM block.
    #[error("the PEM text is damaged ({0}): copy the file again from the partner")]
    Damaged(String),
    /// A PEM block that is something else.
    #[error(
        "this is a {0}, not a certificate: give the output of `farshore certificate show` at the partner"
    )]
    WrongKind(&'static str),
    /// More than one certificate.
    #[error("the PEM text holds {0} certificates, a partner has exactly one: give that one alone")]
    Several(usize),
    /// The DER is no certificate.
    #[error("the PEM block is not an X.509 certificate that TLS can use: {0}")]
    NotX509(String),
    /// Longer than any certificate.
    #[error("the text is {0} bytes long, a certificate has at most {PEM_BYTES_MAX}")]
    TooLong(usize),
}

/// A partner's certificate, known to be X.509.
#[derive(Clone, PartialEq, Eq)]
pub struct PinnedCertificate {
    der: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

impl PinnedCertificate {
    /// Reads exactly one certificate from PEM text.
    ///
    /// # Errors
    /// [`CertificateError`] says what else was found.
    pub fn from_pem(text: &str) -> Result<Self, CertificateError> {
        if text.len() > PEM_BYTES_MAX {
            return Err(CertificateError::TooLong(text.len()));
        }
        let mut certificates = Vec::new();
        for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text.as_bytes()) {
            let (kind, der) = section.map_err(|error| CertificateError::Damaged(error.to_string()))?;
            let key = matches!(
                kind,
                SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey
            );
            if key {
                return Err(CertificateError::WrongKind("private key (keep it secret)"));
            }
            if kind != SectionKind::Certificate {
                return Err(CertificateError::WrongKind("PEM block of another kind"));
            }
            certificates.push(der);
        }
        let count = certificates.len();
        match certificates.pop() {
            Some(der) if count == 1 => Self::from_der(der.into()),
            Some(_) => Err(CertificateError::Several(count)),
            None => Err(CertificateError::NotPem),
        }
    }

    /// Checks that the DER is an X.509 certificate.
    pub(crate) fn from_der(der: CertificateDer<'static>) -> Result<Self, CertificateError> {
        ParsedCertificate::try_from(&der).map_err(|error| CertificateError::NotX509(error.to_string()))?;
        let fingerprint = Fingerprint::of(&der);
        Ok(Self { der, fingerprint })
    }

    /// The certificate's fingerprint.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The certificate itself.
    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Whether the peer presented exactly this certificate.
    pub(crate) fn is(&self, presented: &CertificateDer<'_>) -> bool {
        self.der.as_ref() == presented.as_ref()
    }
}

impl fmt::Debug for PinnedCertificate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("PinnedCertificate").field(&self.fingerprint).finish()
    }
}

/// Why a pin was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// An incoming certificate must name one partner.
    #[error(
        "certificate {fingerprint} already belongs to partner '{partner}': each partner needs a certificate of its own"
    )]
    Taken {
        /// The partner that has it.
        partner: String,
        /// The certificate.
        fingerprint: Fingerprint,
    },
}

/// The set of partners and their certificates: shared by all clones, changed while endpoints use it.
///
/// A removed or replaced pin refuses new connections at once and ends the live sessions that rest on it.
#[derive(Clone, Debug, Default)]
pub struct PinStore(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    pins: RwLock<BTreeMap<String, PinnedCertificate>>,
    changes: watch::Sender<u64>,
}

impl PinStore {
    /// An empty set: nobody is let in, nobody can be dialed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pins `certificate` for `partner`, in place of an earlier one.
    ///
    /// # Errors
    /// [`PinError::Taken`] if another partner has the same certificate.
    pub fn insert(&self, partner: &str, certificate: PinnedCertificate) -> Result<(), PinError> {
        let mut pins = self.0.pins.write().unwrap_or_else(PoisonError::into_inner);
        let taken = pins.iter().find(|(name, pin)| **pin == certificate && name.as_str() != partner);
        if let Some((name, pin)) = taken {
            return Err(PinError::Taken { partner: name.clone(), fingerprint: pin.fingerprint });
        }
        pins.insert(partner.to_owned(), certificate);
        drop(pins);
        self.0.changes.send_modify(|count| *count = count.wrapping_add(1));
        Ok(())
    }

    /// Forgets `partner`; false if it was not there.
    pub fn remove(&self, partner: &str) -> bool {
        let mut pins = self.0.pins.write().unwrap_or_else(PoisonError::into_inner);
        let found = pins.remove(partner).is_some();
        drop(pins);
        self.0.changes.send_modify(|count| *count = count.wrapping_add(1));
        found
    }

    /// The certificate pinned for `partner`.
    pub fn find(&self, partner: &str) -> Option<PinnedCertificate> {
        self.0.pins.read().unwrap_or_else(PoisonError::into_inner).get(partner).cloned()
    }

    /// The partner that holds exactly this certificate.
    pub(crate) fn owner_of(&self, presented: &CertificateDer<'_>) -> Option<(String, Fingerprint)> {
        let pins = self.0.pins.read().unwrap_or_else(PoisonError::into_inner);
        let (name, pin) = pins.iter().find(|(_, pin)| pin.is(presented))?;
        Some((name.clone(), pin.fingerprint))
    }

    /// Returns when `partner` is no longer pinned to `fingerprint`.
    pub(crate) async fn until_unpinned(&self, partner: &str, fingerprint: Fingerprint) {
        let mut changes = self.0.changes.subscribe();
        while self.find(partner).is_some_and(|pin| pin.fingerprint == fingerprint) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SiteIdentity;

    fn certificate(name: &str) -> String {
        SiteIdentity::generate(name).unwrap().certificate_pem().to_owned()
    }

    #[test]
    fn texts_that_are_no_single_certificate_are_refused_by_kind() {
        let (one, two) = (certificate("a"), certificate("b"));
        assert!(PinnedCertificate::from_pem(&one).is_ok());
        assert_eq!(PinnedCertificate::from_pem("hello"), Err(CertificateError::NotPem));
        assert_eq!(PinnedCertificate::from_pem(""), Err(CertificateError::NotPem));
        assert_eq!(PinnedCertificate::from_pem(&format!("{one}{two}")), Err(CertificateError::Several(2)));
        let junk = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
        assert!(matches!(PinnedCertificate::from_pem(junk), Err(CertificateError::NotX509(_))));
        let key = "-----BEGIN PRIVATE KEY-----\naGVsbG8=\n-----END PRIVATE KEY-----\n";
        assert!(matches!(PinnedCertificate::from_pem(key), Err(CertificateError::WrongKind(_))));
        let torn = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n";
        assert!(matches!(PinnedCertificate::from_pem(torn), Err(CertificateError::Damaged(_))), "{torn}");
        let long = "x".repeat(PEM_BYTES_MAX + 1);
        assert!(matches!(PinnedCertificate::from_pem(&long), Err(CertificateError::TooLong(_))));
    }

    #[test]
    fn one_certificate_names_one_partner() {
        let store = PinStore::new();
        let pin = PinnedCertificate::from_pem(&certificate("a")).unwrap();
        store.insert("west", pin.clone()).unwrap();
        store.insert("west", pin.clone()).unwrap();
        let refused = store.insert("north", pin.clone());
        assert!(matches!(refused, Err(PinError::Taken { partner, .. }) if partner == "west"));
        assert!(store.remove("west"));
        assert!(!store.remove("west"));
        store.insert("north", pin).unwrap();
    }

    #[test]
    fn the_fingerprint_is_the_sha256_of_the_der() {
        let text = Fingerprint::of(b"abc").to_string();
        assert_eq!(text, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
