//! From an address, or an incoming packet, to a session between two partners that know each other.
//!
//! TLS authenticates both sides. A dialer cannot tell from TLS alone that its own certificate was accepted (TLS 1.3
//! ends earlier on its side), so the session stands only when both have sent the empty control frame.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, Incoming, RecvStream, SendStream, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;

use crate::driver::{CONTROL_PRIORITY, DataSide, Driver, close_reason, code};
use crate::endpoint::Core;
use crate::frames::{self, FrameError};
use crate::pins::{Fingerprint, PinnedCertificate};
use crate::session::{CloseReason, SessionHandle, clean_reason};
use crate::settings::DATA_STREAMS;
use crate::verify::{PinVerifier, client_tls, server_tls};

/// quinn wants a name to connect to; it is neither sent nor checked.
const SERVER_NAME: &str = "farshore";
/// QUIC puts TLS alert n at 0x100 + n (RFC 9001 section 4.8).
const TLS_ALERT_BASE: u64 = 0x100;

/// Why a dial gave no session.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no pin.
    #[error("partner '{partner}' has no pinned certificate here: run `farshore partner add` first")]
    UnknownPartner {
        /// Whom to dial.
        partner: String,
    },
    /// The address cannot be resolved, or there is no route to it.
    #[error("partner '{partner}' at {address} is unreachable: {source}")]
    Unreachable {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// The resolver's or kernel's answer.
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error(
        "partner '{partner}' at {address} did not answer within {milliseconds} ms: check that its daemon runs and that UDP passes"
    )]
    Timeout {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// The setting `connect_timeout`.
        milliseconds: u128,
    },
    /// Whoever answered holds another certificate than the pinned one.
    #[error(
        "the daemon at {address} presented certificate {presented}, but {pinned} is pinned for partner '{partner}': if its certificate was replaced, run `farshore partner add` with the new one"
    )]
    CertificateRefusedByUs {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// What was presented.
        presented: Fingerprint,
        /// What was expected.
        pinned: Fingerprint,
    },
    /// The partner does not know our certificate.
    #[error("partner '{partner}' at {address} refused this site's certificate {ours}: {reason}")]
    CertificateRefusedByThem {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// Our certificate; `farshore partner add` is needed with it at the partner.
        ours: Fingerprint,
        /// The partner's words.
        reason: String,
    },
    /// The partner closed the session before it stood.
    #[error("partner '{partner}' at {address} gave no session: {reason}")]
    Closed {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// Why.
        reason: CloseReason,
    },
    /// Whoever answered speaks something else, or QUIC failed.
    #[error("no common protocol with partner '{partner}' at {address}: {reason}")]
    Protocol {
        /// Whom to dial.
        partner: String,
        /// Where.
        address: String,
        /// What happened.
        reason: String,
    },
}

/// A session that a partner opened.
#[derive(Debug)]
pub struct IncomingSession {
    /// The partner, by its pinned certificate.
    pub partner: String,
    /// Where it dialed from.
    pub remote: SocketAddr,
    /// The dialer's first control frame, which tells what the session is for. It is not repeated as an event.
    pub hello: Bytes,
    /// The session.
    pub handle: SessionHandle,
}

/// One attempt to reach a partner; turns causes into [`DialError`]s.
pub(crate) struct Dial<'a> {
    pub(crate) core: &'a Core,
    pub(crate) partner: &'a str,
    pub(crate) address: &'a str,
}

impl Dial<'_> {
    /// Dials within the connect timeout.
    pub(crate) async fn run(&self) -> Result<SessionHandle, DialError> {
        let limit = self.core.settings.connect_timeout;
        timeout(limit, self.attempt()).await.unwrap_or_else(|_| {
            Err(DialError::Timeout {
                partner: self.partner.to_owned(),
                address: self.address.to_owned(),
                milliseconds: limit.as_millis(),
            })
        })
    }

    async fn attempt(&self) -> Result<SessionHandle, DialError> {
        let Some(pin) = self.core.pins.find(self.partner) else {
            return Err(DialError::UnknownPartner { partner: self.partner.to_owned() });
        };
        let remote = self.resolve().await.map_err(|source| DialError::Unreachable {
            partner: self.partner.to_owned(),
            address: self.address.to_owned(),
            source,
        })?;
        let verifier = PinVerifier::partner(self.partner, pin.clone(), self.core.provider.clone());
        let tls = client_tls(&self.core.identity, verifier.clone(), self.core.provider.clone())
            .map_err(|error| self.protocol(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(std::sync::Arc::new(tls));
        config.transport_config(self.core.dial_transport.clone());
        let connecting = self
            .core
            .quinn
            .connect_with(config, remote, SERVER_NAME)
            .map_err(|error| self.protocol(error.to_string()))?;
        let connection = connecting.await.map_err(|error| self.failed(error, remote, &verifier, &pin))?;
        let streams = open_session(&connection).await;
        let (control_send, control_receive, data) =
            streams.map_err(|error| self.failed(error, remote, &verifier, &pin))?;
        let (handle, ports) = SessionHandle::pair(self.partner.to_owned(), remote, true, &self.core.settings);
        let driver = Driver {
            connection,
            control_send,
            control_receive,
            data: DataSide::Send(data),
            ports,
            settings: self.core.settings.clone(),
            pins: self.core.pins.clone(),
            partner: self.partner.to_owned(),
            fingerprint: pin.fingerprint(),
            shutdown: self.core.shutdown.subscribe(),
        };
        tokio::spawn(driver.run());
        tracing::info!(partner = self.partner, %remote, "replication session open (dialed)");
        Ok(handle)
    }

    /// The first of the name's addresses that this host has a route to. No packet is sent for that.
    async fn resolve(&self) -> io::Result<SocketAddr> {
        let ipv4_only = self.core.local.is_ipv4();
        let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for remote in tokio::net::lookup_host(self.address).await? {
            if ipv4_only && remote.is_ipv6() {
                error = io::Error::new(
                    io::ErrorKind::AddrNotAvailable,
                    "it is an IPv6 address, and replication listens on an IPv4 address here",
                );
                continue;
            }
            let any = if remote.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let probe = UdpSocket::bind(SocketAddr::new(any, 0));
            match probe.and_then(|socket| socket.connect(remote)) {
                Ok(()) if remote.port() != 0 => return Ok(remote),
                Ok(()) => error = io::Error::new(io::ErrorKind::InvalidInput, "port 0"),
                Err(source) => error = source,
            }
        }
        Err(error)
    }

    fn protocol(&self, reason: String) -> DialError {
        DialError::Protocol {
            partner: self.partner.to_owned(),
            address: self.address.to_owned(),
            reason: clean_reason(reason.as_bytes()),
        }
    }

    fn failed(
        &self,
        error: ConnectionError,
        remote: SocketAddr,
        verifier: &PinVerifier,
        pin: &PinnedCertificate,
    ) -> DialError {
        let (partner, address) = (self.partner.to_owned(), self.address.to_owned());
        if let Some(refusal) = verifier.refusal() {
            self.core.refusals.warn(remote, refusal);
            let (presented, pinned) = (refusal.presented, pin.fingerprint());
            return DialError::CertificateRefusedByUs { partner, address, presented, pinned };
        }
        match error {
            ConnectionError::ConnectionClosed(close) => {
                let code = u64::from(close.error_code);
                let reason = clean_reason(&close.reason);
                if is_certificate_alert(code) {
                    let (ours, reason) = (self.core.identity.fingerprint(), unwrap_refusal(&reason));
                    return DialError::CertificateRefusedByThem { partner, address, ours, reason };
                }
                self.protocol(close.to_string())
            }
            ConnectionError::TimedOut => DialError::Timeout {
                partner,
                address,
                milliseconds: self.core.settings.idle_timeout.as_millis(),
            },
            ConnectionError::ApplicationClosed(_)
            | ConnectionError::Reset
            | ConnectionError::LocallyClosed => {
                DialError::Closed { partner, address, reason: close_reason(error) }
            }
            ConnectionError::VersionMismatch
            | ConnectionError::TransportError(_)
            | ConnectionError::CidsExhausted => self.protocol(error.to_string()),
        }
    }
}

/// Whether a close code is one of the alerts about our certificate (RFC 8446 section 6.2): bad_certificate to
/// certificate_unknown, unknown_ca, access_denied, decrypt_error, certificate_required.
fn is_certificate_alert(code: u64) -> bool {
    matches!(code.checked_sub(TLS_ALERT_BASE), Some(42..=46 | 48 | 49 | 51 | 116))
}

/// The partner's sentence without the shell that rustls puts around it.
fn unwrap_refusal(reason: &str) -> String {
    let inner = reason.split_once("OtherError(").and_then(|(_, rest)| rest.strip_suffix("))"));
    inner.unwrap_or(reason).to_owned()
}

/// The dialer's part of the opening: all streams, the empty frame out and in.
async fn open_session(
    connection: &Connection,
) -> Result<(SendStream, RecvStream, Vec<SendStream>), ConnectionError> {
    let (mut control_send, mut control_receive) = connection.open_bi().await?;
    // Fails only for a stream that is gone, which the next write reports.
    let _ = control_send.set_priority(CONTROL_PRIORITY);
    let mut data = Vec::with_capacity(DATA_STREAMS.into());
    for _ in 0..DATA_STREAMS {
        // Nothing is sent before the stream's first cut.
        data.push(connection.open_uni().await?);
    }
    let opened = frames::write_ready(&mut control_send).await.is_ok()
        && frames::read(&mut control_receive, 0).await.is_ok();
    if opened {
        return Ok((control_send, control_receive, data));
    }
    // The connection's own end says more than its stream's; the dial's timeout bounds the wait.
    Err(connection.closed().await)
}

/// Why an incoming connection came to nothing; told to the peer and logged.
enum AcceptError {
    Connection(ConnectionError),
    /// The dialer ended the opening between two frames, as one does that does not want the session any more.
    GivenUp,
    Refused {
        code: u32,
        reason: &'static str,
    },
}

/// Takes an incoming connection up to its first control frame and hands it to the daemon.
pub(crate) async fn accept(core: &Core, incoming: Incoming) {
    let remote = incoming.remote_address();
    let verifier = PinVerifier::any_partner(core.pins.clone(), core.provider.clone());
    let tls = match server_tls(&core.identity, verifier.clone(), core.provider.clone()) {
        Ok(tls) => tls,
        Err(error) => {
            tracing::error!(%remote, "cannot accept a replication connection: {error}");
            return incoming.refuse();
        }
    };
    let mut config = core.server.clone();
    config.crypto = std::sync::Arc::new(tls);
    let connecting = match incoming.accept_with(std::sync::Arc::new(config)) {
        Ok(connecting) => connecting,
        Err(error) => return tracing::debug!(%remote, "replication connection not accepted: {error}"),
    };
    let limit = core.settings.connect_timeout;
    let connection = match timeout(limit, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            match verifier.refusal() {
                Some(refusal) => core.refusals.warn(remote, refusal),
                None => tracing::debug!(%remote, "replication handshake failed: {error}"),
            }
            return;
        }
        Err(_) => return tracing::debug!(%remote, "replication handshake did not end in time"),
    };
    let outcome = timeout(limit, greet(core, &connection)).await;
    match outcome
        .unwrap_or(Err(AcceptError::Refused { code: code::VIOLATION, reason: "no first frame in time" }))
    {
        Ok(()) => {}
        Err(AcceptError::Connection(error)) => {
            tracing::debug!(%remote, "replication connection lost before its first frame: {error}");
        }
        Err(AcceptError::GivenUp) => {
            tracing::debug!(%remote, "the partner gave the opening of a replication session up");
            connection.close(VarInt::from_u32(code::VIOLATION), b"the control stream ended");
        }
        Err(AcceptError::Refused { code, reason }) => {
            tracing::warn!(%remote, "replication session refused: {reason}");
            connection.close(VarInt::from_u32(code), reason.as_bytes());
        }
    }
}

/// The acceptor's part of the opening.
async fn greet(core: &Core, connection: &Connection) -> Result<(), AcceptError> {
    let remote = connection.remote_address();
    let refused = |code, reason| AcceptError::Refused { code, reason };
    // The pin may have gone since TLS looked.
    let (partner, fingerprint) = peer_certificate(connection)
        .and_then(|certificate| core.pins.owner_of(&certificate))
        .ok_or_else(|| refused(code::UNPINNED, "your certificate is no longer pinned here"))?;
    let permit = core
        .sessions
        .clone()
        .try_acquire_owned()
        .map_err(|_| refused(code::BUSY, "too many replication sessions"))?;
    let place = core
        .incoming
        .clone()
        .reserve_owned()
        .await
        .map_err(|_| refused(code::BUSY, "replication is shutting down"))?;
    let (mut control_send, mut control_receive) =
        connection.accept_bi().await.map_err(AcceptError::Connection)?;
    // Fails only for a stream that is gone, which the next write reports.
    let _ = control_send.set_priority(CONTROL_PRIORITY);
    read_frame(connection, &mut control_receive, 0).await?;
    frames::write_ready(&mut control_send)
        .await
        .map_err(|_| refused(code::VIOLATION, "the control stream was refused"))?;
    let hello = read_frame(connection, &mut control_receive, core.settings.control_frame_bytes_max).await?;
    let (handle, ports) = SessionHandle::pair(partner.clone(), remote, false, &core.settings);
    let driver = Driver {
        connection: connection.clone(),
        control_send,
        control_receive,
        data: DataSide::Receive(core.intake.clone(), Vec::new()),
        ports,
        settings: core.settings.clone(),
        pins: core.pins.clone(),
        partner: partner.clone(),
        fingerprint,
        shutdown: core.shutdown.subscribe(),
    };
    tokio::spawn(async move {
        driver.run().await;
        drop(permit);
    });
    tracing::info!(partner, %remote, "replication session open (accepted)");
    place.send(IncomingSession { partner, remote, hello, handle });
    Ok(())
}

async fn read_frame(
    connection: &Connection,
    stream: &mut RecvStream,
    bytes_max: u32,
) -> Result<Bytes, AcceptError> {
    match frames::read(stream, bytes_max).await {
        Ok(frame) => Ok(frame),
        Err(FrameError::Connection) => Err(AcceptError::Connection(connection.closed().await)),
        Err(FrameError::Finished) => Err(AcceptError::GivenUp),
        Err(FrameError::Torn) => {
            Err(AcceptError::Refused { code: code::VIOLATION, reason: "the control stream ended" })
        }
        Err(FrameError::Length { .. }) => {
            Err(AcceptError::Refused { code: code::VIOLATION, reason: "a control frame has a bad length" })
        }
    }
}

/// The certificate that the peer proved to hold.
fn peer_certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.into_iter().next()
}
