//! NBD listeners: connections are accepted and greeted here, then their sockets move to the shard of their volume.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use frontend::nbd::{Handshake, HandshakeOutput, Negotiated, TlsMode};
use rustix::net::sockopt;
use store::Socket;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::Site;
use crate::settings::NbdAddress;
use crate::shard::ShardCommand;

/// A handshake that takes longer is ended: clients need a few round trips.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes at the same time; established connections do not count.
const HANDSHAKES_MAX: usize = 256;
/// A host that is silent for so long is asked whether it is still there; after twice as long it is given up.
const HOST_SILENCE: Duration = Duration::from_secs(30);
/// After a failed accept (out of descriptors) the listener rests.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound listener.
pub(super) enum HostListener {
    Tcp(TcpListener),
    Unix(UnixListener, std::path::PathBuf),
}

impl HostListener {
    /// Binds; a Unix socket of a daemon that is gone is replaced.
    pub(super) async fn bind(address: &NbdAddress) -> io::Result<Self> {
        match address {
            NbdAddress::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
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
                Ok(Self::Unix(UnixListener::bind(path)?, path.clone()))
            }
        }
    }

    /// Where hosts connect, as an NBD URI without an export name.
    pub(super) fn uri(&self) -> String {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "nbd://".to_owned(), |address| format!("nbd://{address}")),
            Self::Unix(_, path) => format!("nbd+unix:///?socket={}", path.display()),
        }
    }

    /// Accepts for ever.
    pub(super) async fn serve(self, site: Arc<Site>) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else {
                return;
            };
            let site = Arc::clone(&site);
            match &self {
                Self::Tcp(listener) => match listener.accept().await {
                    Ok((stream, _)) => spawn_greeting(site, stream, permit, into_tcp),
                    Err(error) => rest(&error).await,
                },
                Self::Unix(listener, _) => match listener.accept().await {
                    Ok((stream, _)) => spawn_greeting(site, stream, permit, into_unix),
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
    Ok(stream.into_std()?.into())
}

fn spawn_greeting<S>(
    site: Arc<Site>,
    mut stream: S,
    permit: tokio::sync::OwnedSemaphorePermit,
    into_descriptor: fn(S) -> io::Result<OwnedFd>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let greeted = limited(greet(&mut stream, &site)).await;
        drop(permit);
        let Some((negotiated, early)) = greeted else {
            return;
        };
        match into_descriptor(stream) {
            Ok(descriptor) => hand_over(&site, descriptor, negotiated, early),
            Err(error) => tracing::debug!(%error, "a host's connection was lost after its handshake"),
        }
    });
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

/// Runs the handshake; gives what was agreed on and the bytes received behind it.
async fn greet<S>(stream: &mut S, site: &Site) -> io::Result<Option<(Negotiated, Bytes)>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut handshake = Handshake::new(TlsMode::Off);
    let mut input = Vec::new();
    loop {
        while let Some(output) = handshake.poll_output() {
            match output {
                HandshakeOutput::Send(bytes) => stream.write_all(&bytes).await?,
                HandshakeOutput::StartTls => return Err(io::ErrorKind::Unsupported.into()),
                HandshakeOutput::Established(negotiated) => return Ok(Some((negotiated, input.into()))),
                HandshakeOutput::Close(reason) => {
                    tracing::debug!(%reason, "a host's handshake ended");
                    stream.shutdown().await?;
                    return Ok(None);
                }
            }
        }
        if !input.is_empty() {
            let consumed = handshake.handle_input(&input, site.exports());
            input.drain(..consumed);
            if consumed > 0 {
                continue;
            }
        }
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(None);
        }
    }
}

fn hand_over(site: &Site, descriptor: OwnedFd, negotiated: Negotiated, early: Bytes) {
    let Some(key) = site.exports().group(&negotiated.name) else {
        return;
    };
    let volume = negotiated.volume;
    let socket = Socket::from(descriptor);
    site.shard_of(key).send(ShardCommand::Connect { key, volume, socket, negotiated, early });
}
