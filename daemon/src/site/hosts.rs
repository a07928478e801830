//! NBD listeners: connections are accepted and greeted here, then their sockets move to the shard of their volume.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::sockopt;
use store::Socket;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::Site;
use super::descriptors::{self, HOSTS_LEAVE};
use super::greeting::{Greeted, Protection, greet};
use super::greetings::{Greetings, Origin};
use crate::settings::{NbdAddress, NbdTls};
use crate::shard::{HostConnection, ShardCommand};

/// A handshake that takes longer is ended: clients need a few round trips.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes of a site at the same time; established connections do not count.
pub(super) const HANDSHAKES_MAX: usize = 256;
/// A host that is silent for so long is asked whether it is still there; after twice as long it is given up.
const HOST_SILENCE: Duration = Duration::from_secs(30);
/// Bytes that the kernel queues for a host on this machine.
const UNIX_SEND_BYTES: usize = 1 << 20;
/// After a failed accept the listener rests.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Refused connections are told of at most this often.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(60);

/// A bound listener.
pub(super) struct HostListener {
    socket: Listening,
    protection: Protection,
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl HostListener {
    /// Binds; a Unix socket of a daemon that is gone is replaced.
    pub(super) async fn bind(address: &NbdAddress, protection: Protection) -> io::Result<Self> {
        assert!(protection.config.is_some() || protection.tls == NbdTls::Off, "TLS has a certificate");
        let socket = match address {
            NbdAddress::Tcp(address) => Listening::Tcp(TcpListener::bind(address).await?),
            NbdAddress::Unix(path) => {
                if UnixStream::connect(path).await.is_ok() {
                    return Err(io::Error::from(io::ErrorKind::AddrInUse));
                }
                match std::fs::symlink_metadata(path) {
                    Ok(found) if std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
                        std::fs::remove_file(path)?;
                    }
                    Ok(_) => return Err(io::Error::from(io::ErrorKind::AlreadyExists)),
                    Err(_) => {}
                }
                Listening::Unix(UnixListener::bind(path)?, path.clone())
            }
        };
        Ok(Self { socket, protection })
    }

    /// Where hosts connect, as an NBD URI without an export name; with TLS where it is offered.
    pub(super) fn uri(&self) -> String {
        let scheme = match self.protection.tls {
            NbdTls::Off => "nbd",
            NbdTls::Optional | NbdTls::Required => "nbds",
        };
        match &self.socket {
            Listening::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| format!("{scheme}://"), |address| format!("{scheme}://{address}")),
            Listening::Unix(_, path) => format!("{scheme}+unix:///?socket={}", path.display()),
        }
    }

    /// Accepts for ever: a connection that waits to be accepted would wait behind those that say nothing.
    pub(super) async fn serve(self, site: Arc<Site>, greetings: Arc<Greetings>) {
        let mut complaint = Complaint::default();
        loop {
            let (site, protection) = (Arc::clone(&site), self.protection.clone());
            let outcome = match &self.socket {
                Listening::Tcp(listener) => match listener.accept().await {
                    Ok((stream, address)) => {
                        let placed = place(stream, &greetings, &mut complaint).await;
                        placed.map(|stream| {
                            let greeting = welcome(site, stream, protection);
                            greetings.spawn(Origin::of(address.ip()), greeting);
                        })
                    }
                    Err(error) => Err(error),
                },
                Listening::Unix(listener, _) => match listener.accept().await {
                    Ok((stream, _)) => {
                        let placed = place(stream, &greetings, &mut complaint).await;
                        placed.map(|stream| greetings.spawn(Origin::Local, welcome(site, stream, protection)))
                    }
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = outcome {
                complaint.say(&error);
                // Not even what hosts leave free is: others have it, and an idle handshake is the first to give way.
                let short = error.raw_os_error() == Some(Errno::MFILE.raw_os_error());
                if !short || !greetings.drop_oldest().await {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// What is said of connections that are not accepted, once in a while.
#[derive(Default)]
struct Complaint {
    said: Option<Instant>,
    unsaid: u64,
}

impl Complaint {
    fn say(&mut self, error: &io::Error) {
        if self.said.is_some_and(|said| said.elapsed() < COMPLAINT_PAUSE) {
            self.unsaid += 1;
            return;
        }
        tracing::warn!(%error, unsaid = self.unsaid, "hosts' connections cannot be accepted, or only in place of others' handshakes");
        *self = Self { said: Some(Instant::now()), unsaid: 0 };
    }
}

/// Sees that a new connection leaves enough descriptors free: where it does not, idle handshakes give way to it.
///
/// # Errors
/// No handshake is left that could; the connection is closed.
async fn place<S: HostStream>(
    mut stream: S,
    greetings: &Greetings,
    complaint: &mut Complaint,
) -> io::Result<S> {
    while !descriptors::leaves_free(&stream, HOSTS_LEAVE) {
        let short = io::Error::from(Errno::MFILE);
        if !greetings.drop_oldest().await {
            return Err(short);
        }
        complaint.say(&short);
        // The same connection under the number that has just become free.
        let descriptor = fcntl_dupfd_cloexec(&stream, 0)?;
        drop(stream);
        stream = S::from_descriptor(descriptor)?;
    }
    Ok(stream)
}

/// A connection of either kind.
trait HostStream: AsyncRead + AsyncWrite + AsFd + Unpin + Send + Sized + 'static {
    /// A connection that tokio does not know yet.
    fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self>;

    /// The connection as the shard wants it.
    fn into_descriptor(self) -> io::Result<OwnedFd>;
}

impl HostStream for TcpStream {
    fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Self::from_std(descriptor.into())
    }

    fn into_descriptor(self) -> io::Result<OwnedFd> {
        // Replies are gathered before they are sent; waiting for more in the kernel would only delay them.
        self.set_nodelay(true)?;
        // A host that lost its power answers nothing: without these its connection would stay for ever.
        sockopt::set_socket_keepalive(&self, true)?;
        sockopt::set_tcp_keepidle(&self, HOST_SILENCE)?;
        sockopt::set_tcp_keepintvl(&self, HOST_SILENCE / 4)?;
        sockopt::set_tcp_keepcnt(&self, 4)?;
        let silence = u32::try_from(HOST_SILENCE.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&self, 2 * silence)?;
        Ok(self.into_std()?.into())
    }
}

impl HostStream for UnixStream {
    fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Self::from_std(descriptor.into())
    }

    fn into_descriptor(self) -> io::Result<OwnedFd> {
        // A longer queue of replies lets a large read be sent in one go; the system's bound on it is fine as well.
        let _ = sockopt::set_socket_send_buffer_size(&self, UNIX_SEND_BYTES);
        Ok(self.into_std()?.into())
    }
}

/// Greets a host and gives its connection to the shard.
async fn welcome<S: HostStream>(site: Arc<Site>, mut stream: S, protection: Protection) {
    let Some(greeted) = limited(greet(&mut stream, &site, &protection)).await else {
        return;
    };
    match stream.into_descriptor() {
        Ok(descriptor) => hand_over(&site, descriptor, greeted),
        Err(error) => tracing::debug!(%error, "a host's connection was lost after its handshake"),
    }
}

async fn limited<T>(greeting: impl Future<Output = io::Result<Option<T>>>) -> Option<T> {
    match tokio::time::timeout(HANDSHAKE_LIMIT, greeting).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a host's handshake ended");
            None
        }
        Err(_) => {
            tracing::debug!("a host's handshake took too long");
            None
        }
    }
}

/// Whoever comes last when there is room for one finds none here: its connection closes.
fn hand_over(site: &Site, descriptor: OwnedFd, greeted: Greeted) {
    let Greeted { negotiated, peer, tls, early } = greeted;
    let Ok(place) = Arc::clone(&site.connections).try_acquire_owned() else {
        return;
    };
    let (name, read_only, volume) = (negotiated.name.clone(), negotiated.read_only, negotiated.volume);
    site.exports().hand_over(&name, &peer.clone(), read_only, |key| {
        let socket = Socket::from(descriptor);
        let connection = HostConnection { socket, tls, peer, negotiated, early, place };
        site.shard_of(key).send(ShardCommand::Connect { key, volume, connection: Box::new(connection) });
    });
}

impl Site {
    /// Why no further host is served, if none is.
    pub(super) fn full(&self) -> Option<String> {
        (self.connections.available_permits() == 0).then(|| {
            let most = self.settings.nbd_connections_max;
            format!("this site has its most connections, {most}; close some, or raise nbd_connections_max")
        })
    }
}
