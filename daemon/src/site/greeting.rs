//! One host's handshake: NBD's options over a stream, with TLS below them from STARTTLS on.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use control::Peer;
use frontend::nbd::{CloseReason, Handshake, HandshakeOutput, Negotiated, TlsMode};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Site;
use super::certificates::host_identity;
use crate::settings::NbdTls;
use crate::shard::TlsSession;

/// Bytes received at once: options are short.
const RECEIVE_BYTES: usize = 4 << 10;

/// What a listener lets hosts use.
#[derive(Clone, Debug)]
pub(super) struct Protection {
    pub(super) tls: NbdTls,
    /// There is one if `tls` is not off.
    pub(super) config: Option<Arc<ServerConfig>>,
}

/// A handshake that led to an export.
pub(super) struct Greeted {
    pub(super) negotiated: Negotiated,
    pub(super) peer: Peer,
    pub(super) tls: Option<Box<TlsSession>>,
    /// Bytes, in clear, that the host sent behind its options.
    pub(super) early: Bytes,
}

/// Runs the handshake; none if it ended in order without an export.
///
/// # Errors
/// The connection failed, or TLS did.
pub(super) async fn greet<S>(
    stream: &mut S,
    site: &Site,
    protection: &Protection,
) -> io::Result<Option<Greeted>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut handshake = Handshake::new(mode(protection.tls));
    let mut channel = Channel { stream, tls: None, buffer: Box::new([0; RECEIVE_BYTES]) };
    let mut peer = Peer::default();
    let mut input = Vec::new();
    loop {
        while let Some(output) = handshake.poll_output() {
            match output {
                HandshakeOutput::Send(bytes) => channel.send(bytes).await?,
                HandshakeOutput::StartTls => {
                    // What came in clear behind STARTTLS may be anybody's: it must not pass for the host's words.
                    if !input.is_empty() {
                        return channel.end(&CloseReason::ClearTextAfterStartTls).await;
                    }
                    peer = channel.start_tls(protection).await?;
                    handshake.secured();
                }
                HandshakeOutput::Established(negotiated) => {
                    let (tls, early) = (channel.tls, input.into());
                    return Ok(Some(Greeted { negotiated, peer, tls, early }));
                }
                HandshakeOutput::Close(reason) => return channel.end(&reason).await,
            }
        }
        if !input.is_empty() {
            let exports = site.exports().seen_by(&peer, site.full());
            let consumed = handshake.handle_input(&input, &exports);
            input.drain(..consumed);
            if consumed > 0 {
                continue;
            }
        }
        if !channel.receive(&mut input).await? {
            return Ok(None);
        }
    }
}

const fn mode(tls: NbdTls) -> TlsMode {
    match tls {
        NbdTls::Off => TlsMode::Off,
        NbdTls::Optional => TlsMode::Optional,
        NbdTls::Required => TlsMode::Required,
    }
}

/// A stream, in clear or under TLS.
struct Channel<'stream, S> {
    stream: &'stream mut S,
    tls: Option<Box<TlsSession>>,
    buffer: Box<[u8; RECEIVE_BYTES]>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Channel<'_, S> {
    async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            return self.stream.write_all(&bytes).await;
        };
        let mut sealed = BytesMut::new();
        tls.seal(&[bytes], &mut sealed).map_err(io::Error::other)?;
        self.stream.write_all(&sealed).await
    }

    /// Appends what was received to `input`; false at the end.
    async fn receive(&mut self, input: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            // Plaintext may have come with the last message of the TLS handshake.
            if let Some(tls) = &mut self.tls
                && tls.readable() > 0
            {
                let start = input.len();
                input.resize(start + tls.readable(), 0);
                tls.read(input.get_mut(start..).unwrap_or_default());
                return Ok(true);
            }
            let count = self.stream.read(self.buffer.as_mut_slice()).await?;
            let received = self.buffer.get(..count).unwrap_or_default();
            if count == 0 {
                return Ok(false);
            }
            let Some(tls) = &mut self.tls else {
                input.extend_from_slice(received);
                return Ok(true);
            };
            let progress = tls.received(received);
            // A failure has an alert to send, success may have one too.
            let mut output = BytesMut::new();
            tls.take_output(&mut output).map_err(io::Error::other)?;
            self.stream.write_all(&output).await?;
            let progress = progress.map_err(io::Error::other)?;
            if progress.closed && progress.readable == 0 {
                return Ok(false);
            }
        }
    }

    /// Runs the TLS handshake, and tells what the host has shown in it.
    async fn start_tls(&mut self, protection: &Protection) -> io::Result<Peer> {
        let config = protection.config.clone().ok_or(io::ErrorKind::Unsupported)?;
        let mut tls = Box::new(TlsSession::accept(config).map_err(io::Error::other)?);
        while tls.is_handshaking() {
            let count = self.stream.read(self.buffer.as_mut_slice()).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let progress = tls.received(self.buffer.get(..count).unwrap_or_default());
            let mut output = BytesMut::new();
            tls.take_output(&mut output).map_err(io::Error::other)?;
            self.stream.write_all(&output).await?;
            if progress.map_err(io::Error::other)?.closed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let identity = tls.peer_certificate().and_then(host_identity);
        self.tls = Some(tls);
        Ok(Peer { secured: true, identity })
    }

    /// Ends the connection in order.
    async fn end<T>(&mut self, reason: &CloseReason) -> io::Result<Option<T>> {
        tracing::debug!(%reason, "a host's handshake ended");
        if let Some(tls) = &mut self.tls {
            let mut alert = BytesMut::new();
            tls.close(&mut alert).map_err(io::Error::other)?;
            self.stream.write_all(&alert).await?;
        }
        self.stream.shutdown().await?;
        Ok(None)
    }
}
