//! TLS for pinned peers: 1.3 only, both sides present a certificate, exact match, no resumption, no early data.
//!
//! Resumption is off because a resumed handshake shows no certificate: it would let a removed partner back in.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::identity::SiteIdentity;
use crate::pins::{Fingerprint, PinStore, PinnedCertificate};

/// Names the protocol and its version: peers of another version end in the handshake.
pub(crate) const ALPN: &[u8] = b"farshore-mirror/1";
/// One line per peer and certificate in this time: a partner that is not added yet dials every few seconds.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Peers remembered for that; past it the oldest memory goes, so a scan cannot grow the map.
const REFUSALS_REMEMBERED_MAX: usize = 256;

/// A certificate that we did not accept.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct CertificateRefusal {
    pub(crate) presented: Fingerprint,
    /// The pinned one, when the peer had to be one certain partner.
    pub(crate) expected: Option<(String, Fingerprint)>,
}

impl fmt::Display for CertificateRefusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let presented = self.presented;
        match &self.expected {
            Some((partner, pinned)) => write!(
                formatter,
                "certificate {presented} is not the one pinned for partner '{partner}' ({pinned}); if its certificate was replaced, run `farshore partner add` with the new one"
            ),
            None => write!(
                formatter,
                "certificate {presented} is not pinned for any partner here; run `farshore partner add` with it first"
            ),
        }
    }
}

/// rustls tells the peer the `Debug` form, and the peer's operator should read the sentence.
impl fmt::Debug for CertificateRefusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl std::error::Error for CertificateRefusal {}

/// Logs refusals, once per address, certificate and minute.
#[derive(Debug, Default)]
pub(crate) struct RefusalLog(Mutex<BTreeMap<(IpAddr, Fingerprint), Instant>>);

impl RefusalLog {
    pub(crate) fn warn(&self, remote: SocketAddr, refusal: &CertificateRefusal) {
        if self.is_due(remote.ip(), refusal.presented, Instant::now()) {
            tracing::warn!(%remote, "replication peer refused: {refusal}");
        }
    }

    fn is_due(&self, address: IpAddr, presented: Fingerprint, now: Instant) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = logged.get(&(address, presented));
        if last.is_some_and(|last| now.saturating_duration_since(*last) < REFUSAL_LOG_INTERVAL) {
            return false;
        }
        if logged.len() >= REFUSALS_REMEMBERED_MAX
            && let Some(oldest) = logged.iter().min_by_key(|(_, time)| **time).map(|(key, _)| *key)
        {
            logged.remove(&oldest);
        }
        logged.insert((address, presented), now);
        true
    }
}

/// Which certificates a verifier accepts.
#[derive(Debug)]
enum Accepted {
    Partner(String, PinnedCertificate),
    AnyPartner(PinStore),
}

/// The verifier of one connection, for either side; keeps the refusal for the error that its caller gives.
#[derive(Debug)]
pub(crate) struct PinVerifier {
    accepted: Accepted,
    provider: Arc<CryptoProvider>,
    refusal: OnceLock<CertificateRefusal>,
}

impl PinVerifier {
    /// For a dial: the peer must be this partner.
    pub(crate) fn partner(name: &str, pin: PinnedCertificate, provider: Arc<CryptoProvider>) -> Arc<Self> {
        let accepted = Accepted::Partner(name.to_owned(), pin);
        Arc::new(Self { accepted, provider, refusal: OnceLock::new() })
    }

    /// For an incoming connection: any partner.
    pub(crate) fn any_partner(pins: PinStore, provider: Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self { accepted: Accepted::AnyPartner(pins), provider, refusal: OnceLock::new() })
    }

    /// The certificate that was refused, if one was.
    pub(crate) fn refusal(&self) -> Option<&CertificateRefusal> {
        self.refusal.get()
    }

    fn check(&self, presented: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let expected = match &self.accepted {
            Accepted::Partner(_, pin) if pin.is(presented) => return Ok(()),
            Accepted::Partner(name, pin) => Some((name.clone(), pin.fingerprint())),
            Accepted::AnyPartner(pins) if pins.owner_of(presented).is_some() => return Ok(()),
            Accepted::AnyPartner(_) => None,
        };
        let refusal = CertificateRefusal { presented: Fingerprint::of(presented), expected };
        let refusal = self.refusal.get_or_init(|| refusal).clone();
        Err(CertificateError::Other(OtherError(Arc::new(refusal))).into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// QUIC has no TLS 1.2; rustls asks for the method all the same.
fn refuse_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for PinVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// A TLS configuration could not be made: a defect of ours or of the crypto provider.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    #[error(transparent)]
    Suite(#[from] NoInitialCipherSuite),
}

/// The dialing side's TLS.
pub(crate) fn client_tls(
    identity: &SiteIdentity,
    verifier: Arc<PinVerifier>,
    provider: Arc<CryptoProvider>,
) -> Result<QuicClientConfig, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(QuicClientConfig::try_from(config)?)
}

/// The accepting side's TLS.
pub(crate) fn server_tls(
    identity: &SiteIdentity,
    verifier: Arc<PinVerifier>,
    provider: Arc<CryptoProvider>,
) -> Result<QuicServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(QuicServerConfig::try_from(config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_logged_once_a_minute_and_remembered_within_bounds() {
        let log = RefusalLog::default();
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let address = IpAddr::from([127, 0, 0, 1]);
        let (one, two) = (Fingerprint::of(b"1"), Fingerprint::of(b"2"));
        assert!(log.is_due(address, one, now));
        assert!(!log.is_due(address, one, now + Duration::from_secs(59)));
        assert!(log.is_due(address, two, now));
        assert!(log.is_due(address, one, now + minute));
        for count in 0..2 * u32::try_from(REFUSALS_REMEMBERED_MAX).unwrap() {
            assert!(log.is_due(IpAddr::from(count.to_be_bytes()), one, now + 2 * minute));
        }
        assert_eq!(log.0.lock().unwrap().len(), REFUSALS_REMEMBERED_MAX);
    }
}
