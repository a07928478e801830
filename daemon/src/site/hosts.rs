//! NBD listeners: connections are accepted and greeted here, then their sockets move to the shard of their volume.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use store::Socket;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::Site;
use super::greeting::{Greeted, Protection, greet};
use super::greetings::{Greetings, Origin};
use crate::settings::{NbdAddress, NbdTls};
use crate::shard::{HostConnection, ShardCommand};

/// A handshake that takes longer is ended: clients need a few round trips.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes of a listener at the same time; established connections do not count.
const HANDSHAKES_MAX: usize = 256;
/// A host that is silent for so long is asked whether it is still there; after twice as long it is given up.
const HOST_SILENCE: Duration = Duration::from_secs(30);
/// Bytes that the kernel queues for a host on this machine.
const UNIX_SEND_BYTES: usize = 1 << 20;
/// After a failed accept (out of descriptors) the listener rests.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    pub(super) async fn serve(self, site: Arc<Site>) {
        let greetings = Greetings::new(HANDSHAKES_MAX);
        loop {
            let (site, protection) = (Arc::clone(&site), self.protection.clone());
            match &self.socket {
                Listening::Tcp(listener) => match listener.accept().await {
                    Ok((stream, address)) => {
                        let greeting = welcome(site, stream, protection, into_tcp);
                        greetings.spawn(Origin::of(address.ip()), greeting);
                    }
                    Err(error) => rest(&error).await,
                },
                Listening::Unix(listener, _) => match listener.accept().await {
                    Ok((stream, _)) => {
                        greetings.spawn(Origin::Local, welcome(site, stream, protection, into_unix));
                    }
                    Err(error) => rest(&error).await,
                },
            }
        }
    }
}

async fn rest(error: &io::Error) {
    tracing::warn!(%error, "a host's connection cannot be accepted");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

fn into_tcp(stream: TcpStream) -> io::Result<OwnedFd> {
    // Replies are gathered before they are sent; waiting for more in the kernel would only delay them.
    stream.set_nodelay(true)?;
    // A host that lost its power answers nothing: without these its connection would stay for ever.
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, HOST_SILENCE)?;
    sockopt::set_tcp_keepintvl(&stream, HOST_SILENCE / 4)?;
    sockopt::set_tcp_keepcnt(&stream, 4)?;
    let silence = u32::try_from(HOST_SILENCE.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&stream, 2 * silence)?;
    Ok(stream.into_std()?.into())
}

fn into_unix(stream: UnixStream) -> io::Result<OwnedFd> {
    // A longer queue of replies lets a large read be sent in one go; the system's bound on it is fine as well.
    let _ = sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BYTES);
    Ok(stream.into_std()?.into())
}

/// Greets a host and gives its connection to the shard.
async fn welcome<S>(
    site: Arc<Site>,
    mut stream: S,
    protection: Protection,
    into_descriptor: fn(S) -> io::Result<OwnedFd>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(greeted) = limited(greet(&mut stream, &site, &protection)).await else {
        return;
    };
    match into_descriptor(stream) {
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
