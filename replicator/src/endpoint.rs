//! The site's UDP socket: dials partners, accepts theirs.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, ServerConfig, TokioRuntime, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::cuts::CutIntake;
use crate::driver::{LINGER, code};
use crate::handshake::{Dial, DialError, IncomingSession, accept};
use crate::identity::SiteIdentity;
use crate::pins::PinStore;
use crate::session::{SessionHandle, clean_reason};
use crate::settings::{SettingsError, TransportSettings};
use crate::verify::{PinVerifier, RefusalLog, server_tls};

/// Accepted sessions at a time; a mirror needs one, a second while an old one still times out.
const SESSIONS_MAX: usize = 1024;
/// Handshakes at a time: each costs a signature and some KiB before its peer has proved anything.
const HANDSHAKES_MAX: usize = 64;
/// From this many on, an address must first prove that it receives our packets (QUIC retry), so that forged
/// sources cannot fill the places.
const HANDSHAKES_UNVALIDATED_MAX: usize = 16;
/// Sessions that wait for the daemon to take them; more wait inside their handshake.
const INCOMING_QUEUE: usize = 16;
/// Bytes that quinn keeps for connections not yet accepted, each and in all; a first flight is some KiB.
const INCOMING_BUFFER_BYTES: u64 = 64 << 10;
const INCOMING_BUFFER_BYTES_TOTAL: u64 = 4 << 20;
/// A closing endpoint waits this long for its sessions: each lingers at most twice.
const CLOSE_LINGER: Duration = Duration::from_secs(3);

/// Why the endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A setting cannot work.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The socket could not be bound.
    #[error("cannot listen for replication on {address}/udp: {source}")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// TLS does not take the identity.
    #[error("cannot set up TLS for replication: {0}")]
    Tls(String),
}

/// What dials and accepts share.
pub(crate) struct Core {
    pub(crate) quinn: quinn::Endpoint,
    pub(crate) local: SocketAddr,
    pub(crate) identity: SiteIdentity,
    pub(crate) pins: PinStore,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) settings: TransportSettings,
    pub(crate) server: ServerConfig,
    pub(crate) dial_transport: Arc<TransportConfig>,
    pub(crate) intake: CutIntake,
    pub(crate) refusals: RefusalLog,
    pub(crate) sessions: Arc<Semaphore>,
    pub(crate) incoming: mpsc::Sender<IncomingSession>,
    /// The reason for which the endpoint closes; sessions subscribe.
    pub(crate) shutdown: watch::Sender<Option<String>>,
}

/// A bound endpoint. Dropping it closes all its sessions without waiting; [`close`](Self::close) waits.
pub struct Endpoint {
    core: Arc<Core>,
    accepting: JoinHandle<()>,
}

impl Endpoint {
    /// Binds a UDP socket and begins to accept; sessions of partners come out of the receiver. Needs a tokio runtime.
    ///
    /// A receiver that is not drained holds further partners up in their handshake, which then ends by timeout.
    ///
    /// # Errors
    /// [`BindError`] for settings that do not fit together, a socket that cannot be bound, an unusable identity.
    pub fn bind(
        address: SocketAddr,
        identity: &SiteIdentity,
        pins: PinStore,
        intake: CutIntake,
        settings: TransportSettings,
    ) -> Result<(Self, mpsc::Receiver<IncomingSession>), BindError> {
        settings.check()?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = PinVerifier::any_partner(pins.clone(), provider.clone());
        let tls = server_tls(identity, verifier, provider.clone())
            .map_err(|error| BindError::Tls(error.to_string()))?;
        let mut server = ServerConfig::with_crypto(Arc::new(tls));
        server
            .transport_config(settings.transport(true))
            .max_incoming(HANDSHAKES_MAX)
            .incoming_buffer_size(INCOMING_BUFFER_BYTES)
            .incoming_buffer_size_total(INCOMING_BUFFER_BYTES_TOTAL);
        let mut config = EndpointConfig::default();
        let payload = config.max_udp_payload_size(settings.udp_payload_bytes_max);
        payload.map_err(|error| BindError::Tls(error.to_string()))?;
        let socket_error = |source| BindError::Socket { address, source };
        let socket = bind_socket(address, settings.udp_buffer_bytes).map_err(socket_error)?;
        let quinn = quinn::Endpoint::new(config, Some(server.clone()), socket, Arc::new(TokioRuntime))
            .map_err(socket_error)?;
        let local = quinn.local_addr().map_err(socket_error)?;
        let (incoming, sessions) = mpsc::channel(INCOMING_QUEUE);
        let core = Arc::new(Core {
            quinn,
            local,
            identity: identity.clone(),
            pins,
            provider,
            dial_transport: settings.transport(false),
            settings,
            server,
            intake,
            refusals: RefusalLog::default(),
            sessions: Arc::new(Semaphore::new(SESSIONS_MAX)),
            incoming,
            shutdown: watch::Sender::new(None),
        });
        let accepting = tokio::spawn(accept_all(core.clone()));
        Ok((Self { core, accepting }, sessions))
    }

    /// The address that the socket is bound to.
    pub fn local_address(&self) -> SocketAddr {
        self.core.local
    }

    /// Opens a session with `partner` at `address` (`HOST:PORT`, resolved anew at each dial). The caller must send
    /// its first control frame within the partner's connect timeout.
    ///
    /// # Errors
    /// [`DialError`], within the setting `connect_timeout`.
    pub async fn dial(&self, partner: &str, address: &str) -> Result<SessionHandle, DialError> {
        Dial { core: &self.core, partner, address }.run().await
    }

    /// Closes every session, as [`SessionHandle::close`] does, and then the socket. Takes at most four seconds, and
    /// a few milliseconds if the partners answer.
    pub async fn close(self, reason: &str) {
        self.begin_close(reason);
        // Partners that do not answer notice by their idle timeout.
        let _ = tokio::time::timeout(CLOSE_LINGER, self.core.shutdown.closed()).await;
        self.core.quinn.close(VarInt::from_u32(code::CLOSED), clean_reason(reason.as_bytes()).as_bytes());
        let _ = tokio::time::timeout(LINGER, self.core.quinn.wait_idle()).await;
    }

    fn begin_close(&self, reason: &str) {
        self.accepting.abort();
        self.core.quinn.set_server_config(None);
        let reason = clean_reason(reason.as_bytes());
        self.core.shutdown.send_if_modified(|shutdown| {
            let first = shutdown.is_none();
            if first {
                *shutdown = Some(reason);
            }
            first
        });
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Endpoint").field("local", &self.core.local).finish_non_exhaustive()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.begin_close("the endpoint was closed");
    }
}

/// Takes incoming connections until the endpoint closes.
async fn accept_all(core: Arc<Core>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while let Some(incoming) = core.quinn.accept().await {
        let busy = HANDSHAKES_MAX - handshakes.available_permits();
        if busy >= HANDSHAKES_UNVALIDATED_MAX && !incoming.remote_address_validated() && incoming.may_retry()
        {
            // It may retry: quinn then has no reason to refuse.
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let core = core.clone();
        tokio::spawn(async move {
            accept(&core, incoming).await;
            drop(permit);
        });
    }
}

/// Binds the socket and asks for large buffers; the kernel caps them, which costs speed only.
fn bind_socket(address: SocketAddr, buffer_bytes: u32) -> io::Result<UdpSocket> {
    use rustix::net::sockopt;
    let socket = UdpSocket::bind(address)?;
    let wanted = usize::try_from(buffer_bytes).unwrap_or(usize::MAX);
    let _ = sockopt::set_socket_recv_buffer_size(&socket, wanted);
    let _ = sockopt::set_socket_send_buffer_size(&socket, wanted);
    // The kernel reports twice what it granted, its own bookkeeping included.
    let granted = sockopt::socket_recv_buffer_size(&socket).unwrap_or(0) / 2;
    if granted < wanted {
        tracing::info!(
            granted,
            wanted,
            "UDP receive buffer smaller than wanted: raise net.core.rmem_max and net.core.wmem_max for more replication throughput"
        );
    }
    Ok(socket)
}
