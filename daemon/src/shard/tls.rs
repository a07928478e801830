//! The server's end of a TLS connection (1.2 or 1.3), sans-IO: ciphertext in, plaintext out, and back.
//!
//! The handshake is driven on tokio, then the session moves to the shard with its socket. The caller gives whatever it
//! received to [`TlsSession::received`], takes the plaintext with [`TlsSession::read`] before it receives more, and
//! sends what [`TlsSession::seal`] and [`TlsSession::take_output`] append to its buffer, in that order. So the session
//! holds at most the plaintext of one receive and one partial record.
//!
//! It knows nothing of NBD. Its records are as large as TLS allows, 16 KiB, and may hold several pieces.

use std::fmt;
use std::io::{IoSlice, Read, Write};
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use rustls::pki_types::CertificateDer;
use rustls::{ServerConfig, ServerConnection};

/// Plaintext is taken out of the engine in steps of a record.
const RECORD_BYTES: usize = 16 << 10;
/// A buffer that grew beyond this is given back when it is empty.
const KEPT_BYTES_MAX: usize = 128 << 10;

/// A TLS session with a host.
pub struct TlsSession {
    connection: ServerConnection,
    /// Plaintext that was not read yet.
    plain: BytesMut,
    /// The host has ended its side.
    closed: bool,
    /// This side has ended.
    ended: bool,
}

/// What a receive led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of plaintext that wait to be read.
    pub readable: usize,
    /// True if something is to be sent: see [`TlsSession::take_output`].
    pub wants_send: bool,
    /// The host has ended its side in order; what it sent after that is ignored.
    pub closed: bool,
}

/// Why a session ends. The connection is of no use any more, but for an alert that [`TlsSession::take_output`] has.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// What was received is no TLS, was changed on its way, or what the host wants is not offered.
    #[error("TLS: {0}")]
    Protocol(#[from] rustls::Error),
    /// The session cannot seal any more: it is closed, or its keys have sealed as much as they may (TLS 1.2 only,
    /// where keys cannot be renewed).
    #[error("TLS: the session can send no more")]
    Exhausted,
    /// The engine's buffers failed.
    #[error("TLS: {0}")]
    Engine(std::io::Error),
}

impl TlsSession {
    /// The server's end of a new connection; the host speaks first.
    ///
    /// # Errors
    /// If the configuration cannot be used.
    pub fn accept(config: Arc<ServerConfig>) -> Result<Self, TlsError> {
        let mut connection = ServerConnection::new(config)?;
        // What is sealed goes to the caller's buffer at once, and that is what bounds it.
        connection.set_buffer_limit(None);
        Ok(Self { connection, plain: BytesMut::new(), closed: false, ended: false })
    }

    /// True until the handshake has ended.
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// The host's own certificate, verified; none if it has shown none.
    pub fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        self.connection.peer_certificates()?.first()
    }

    /// Takes received bytes, all of them, cut anywhere.
    ///
    /// # Errors
    /// [`TlsError`] if they are not what this session expects; nothing of them becomes plaintext then.
    pub fn received(&mut self, mut ciphertext: &[u8]) -> Result<Progress, TlsError> {
        while !ciphertext.is_empty() && !self.closed {
            let taken = self.connection.read_tls(&mut ciphertext).map_err(TlsError::Engine)?;
            let state = self.connection.process_new_packets()?;
            self.closed = state.peer_has_closed();
            self.drain(state.plaintext_bytes_to_read())?;
            if taken == 0 && !self.closed {
                // An engine that was emptied takes more; one that does not must not be asked for ever.
                return Err(TlsError::Engine(std::io::ErrorKind::StorageFull.into()));
            }
        }
        Ok(Progress {
            readable: self.plain.len(),
            wants_send: self.connection.wants_write(),
            closed: self.closed,
        })
    }

    /// Moves the next plaintext to the start of `out`; returns how much it was.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.plain.len());
        if let (Some(target), Some(source)) = (out.get_mut(..count), self.plain.get(..count)) {
            target.copy_from_slice(source);
        }
        self.plain.advance(count);
        if self.plain.is_empty() && self.plain.capacity() > KEPT_BYTES_MAX {
            self.plain = BytesMut::new();
        }
        count
    }

    /// Bytes of plaintext that wait to be read.
    pub fn readable(&self) -> usize {
        self.plain.len()
    }

    /// Appends the records of these pieces to `out`, behind whatever else the session has to send.
    ///
    /// # Errors
    /// [`TlsError::Exhausted`] if the session cannot send all of them; then nothing of `out` may be sent.
    ///
    /// # Panics
    /// If the handshake has not ended.
    pub fn seal(&mut self, pieces: &[Bytes], out: &mut BytesMut) -> Result<(), TlsError> {
        assert!(!self.is_handshaking(), "plaintext is sent after the handshake");
        if self.ended {
            return Err(TlsError::Exhausted);
        }
        let length: usize = pieces.iter().map(Bytes::len).sum();
        let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let taken = self.connection.writer().write_vectored(&slices).map_err(TlsError::Engine)?;
        let start = out.len();
        self.take_output(out)?;
        // Worn-out keys make the engine drop what it takes; records are never shorter than what is in them.
        let sealed = out.len().saturating_sub(start);
        if taken != length || sealed < length {
            self.ended = true;
            return Err(TlsError::Exhausted);
        }
        Ok(())
    }

    /// Appends what the session has to send by itself to `out`: handshake messages, alerts, renewed keys.
    ///
    /// # Errors
    /// [`TlsError::Engine`]; not seen to happen.
    pub fn take_output(&mut self, out: &mut BytesMut) -> Result<(), TlsError> {
        let mut out = out.writer();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut out).map_err(TlsError::Engine)?;
        }
        Ok(())
    }

    /// True after [`Self::close`], or when no more can be sealed.
    pub const fn has_ended(&self) -> bool {
        self.ended
    }

    /// Ends this side in order and appends the alert that says so to `out`.
    ///
    /// # Errors
    /// As [`Self::take_output`].
    pub fn close(&mut self, out: &mut BytesMut) -> Result<(), TlsError> {
        self.ended = true;
        self.connection.send_close_notify();
        self.take_output(out)
    }

    fn drain(&mut self, length: usize) -> Result<(), TlsError> {
        let mut left = length;
        while left > 0 {
            let start = self.plain.len();
            self.plain.resize(start + left.min(RECORD_BYTES), 0);
            let target = self.plain.get_mut(start..).unwrap_or_default();
            let count = self.connection.reader().read(target).map_err(TlsError::Engine)?;
            self.plain.truncate(start + count);
            if count == 0 {
                return Ok(());
            }
            left -= count;
        }
        Ok(())
    }
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TlsSession")
            .field("readable", &self.plain.len())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion, version};

    use super::*;

    /// A host and a session, joined in memory.
    struct Pair {
        host: ClientConnection,
        session: TlsSession,
        /// How many bytes at most go over at once.
        fragment: usize,
    }

    fn pair(version: &'static SupportedProtocolVersion, fragment: usize) -> Pair {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["site".to_owned()]).unwrap().self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS12, &version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("site").unwrap();
        Pair {
            host: ClientConnection::new(Arc::new(client), name).unwrap(),
            session: TlsSession::accept(Arc::new(server)).unwrap(),
            fragment,
        }
    }

    impl Pair {
        /// Lets everything that either side has to send arrive.
        fn settle(&mut self) -> Result<Progress, TlsError> {
            loop {
                let mut up = Vec::new();
                while self.host.wants_write() {
                    self.host.write_tls(&mut up).unwrap();
                }
                for piece in up.chunks(self.fragment) {
                    self.session.received(piece)?;
                }
                let mut down = BytesMut::new();
                self.session.take_output(&mut down)?;
                self.deliver(&down);
                if !self.host.wants_write() {
                    return self.session.received(&[]);
                }
            }
        }

        fn deliver(&mut self, sealed: &[u8]) {
            for mut piece in sealed.chunks(self.fragment) {
                while !piece.is_empty() {
                    self.host.read_tls(&mut piece).unwrap();
                    self.host.process_new_packets().unwrap();
                }
            }
        }

        fn host_reads(&mut self, length: usize) -> Vec<u8> {
            let mut read = vec![0; length];
            self.host.reader().read_exact(&mut read).unwrap();
            read
        }
    }

    fn greeted(version: &'static SupportedProtocolVersion, fragment: usize) -> Pair {
        let mut pair = pair(version, fragment);
        while pair.session.is_handshaking() || pair.host.is_handshaking() {
            pair.settle().unwrap();
        }
        pair
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|place| u8::try_from(place % 251).unwrap()).collect()
    }

    #[test]
    fn plaintext_arrives_whole_in_both_directions_wherever_it_is_cut() {
        for version in [&version::TLS12, &version::TLS13] {
            for fragment in [1, 7, 4096, 1 << 20] {
                let mut pair = greeted(version, fragment);
                assert_eq!(pair.host.protocol_version(), Some(version.version));
                let sent = pattern(100_000);
                let mut read = Vec::new();
                for part in sent.chunks(30_000) {
                    pair.host.writer().write_all(part).unwrap();
                    let progress = pair.settle().unwrap();
                    assert_eq!((progress.readable, progress.closed), (part.len(), false));
                    let mut out = [0; 1000];
                    while pair.session.readable() > 0 {
                        let count = pair.session.read(&mut out);
                        read.extend_from_slice(&out[..count]);
                    }
                }
                assert_eq!(read, sent);
                let pieces = [&sent[..5], &sent[5..5], &sent[5..16_000]].map(Bytes::copy_from_slice);
                let mut sealed = BytesMut::new();
                pair.session.seal(&pieces, &mut sealed).unwrap();
                pair.deliver(&sealed);
                assert_eq!(pair.host_reads(16_000), sent[..16_000]);
            }
        }
    }

    #[test]
    fn small_pieces_share_large_records() {
        let mut pair = greeted(&version::TLS13, 1 << 20);
        let pieces: Vec<_> = (0..512).map(|_| Bytes::from(vec![7; 128])).collect();
        let mut sealed = BytesMut::new();
        pair.session.seal(&pieces, &mut sealed).unwrap();
        let records = sealed.len() - 512 * 128;
        assert!(records <= 4 * 32, "four records of 16 KiB, not 512: {records} bytes beside the plaintext");
    }

    #[test]
    fn an_ordered_end_is_told_and_what_follows_it_is_ignored() {
        let mut pair = greeted(&version::TLS13, 3);
        pair.host.writer().write_all(b"last").unwrap();
        pair.host.send_close_notify();
        let progress = pair.settle().unwrap();
        assert_eq!(progress, Progress { readable: 4, wants_send: false, closed: true });
        assert_eq!(pair.session.received(b"garbage").unwrap(), progress);
        let mut out = BytesMut::new();
        pair.session.close(&mut out).unwrap();
        pair.deliver(&out);
        assert!(pair.host.process_new_packets().unwrap().peer_has_closed());
        assert!(matches!(pair.session.seal(&[Bytes::from_static(b"x")], &mut out), Err(TlsError::Exhausted)));
    }

    #[test]
    fn garbage_and_changed_records_are_errors_with_an_alert_and_no_plaintext() {
        let mut fresh = pair(&version::TLS13, 1);
        assert!(fresh.session.received(b"GET / HTTP/1.1\r\n\r\n").is_err());
        let mut pair = greeted(&version::TLS13, 1 << 20);
        pair.host.writer().write_all(b"secret").unwrap();
        let mut record = Vec::new();
        pair.host.write_tls(&mut record).unwrap();
        *record.last_mut().unwrap() ^= 1;
        assert!(matches!(pair.session.received(&record), Err(TlsError::Protocol(_))));
        assert_eq!(pair.session.readable(), 0);
        let mut alert = BytesMut::new();
        pair.session.take_output(&mut alert).unwrap();
        assert!(!alert.is_empty());
    }

    #[test]
    fn nothing_of_the_session_shows_in_its_debug_text() {
        let mut pair = greeted(&version::TLS13, 1 << 20);
        pair.host.writer().write_all(b"secret").unwrap();
        pair.settle().unwrap();
        assert_eq!(format!("{:?}", pair.session), "TlsSession { readable: 6, closed: false, .. }");
    }
}
