//! A connected stream socket, TCP or Unix.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::Shutdown;

/// A connection; a cheap handle. It closes when the last handle is gone, the ring's own ones included.
///
/// Blocking or not makes no difference to the ring. Options such as TCP_NODELAY are the caller's to set before.
#[derive(Clone, Debug)]
pub struct Socket {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    descriptor: OwnedFd,
    /// True while a ring has a receive in flight.
    receiving: AtomicBool,
    /// True while a ring has a send in flight.
    sending: AtomicBool,
}

impl Socket {
    /// Ends both directions: an operation in flight completes soon (a receive with 0, a send with EPIPE), and the
    /// peer sees the end of the stream.
    ///
    /// # Errors
    ///
    /// What shutdown(2) says; ENOTCONN if the peer was faster, which a caller that closes may ignore.
    pub fn shutdown(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.shared.descriptor, Shutdown::Both)?)
    }

    /// True if the caller now owns the receiving direction.
    pub(crate) fn claim_receive(&self) -> bool {
        !self.shared.receiving.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn release_receive(&self) {
        self.shared.receiving.store(false, Ordering::Release);
    }

    /// True if the caller now owns the sending direction.
    pub(crate) fn claim_send(&self) -> bool {
        !self.shared.sending.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn release_send(&self) {
        self.shared.sending.store(false, Ordering::Release);
    }
}

impl From<OwnedFd> for Socket {
    fn from(descriptor: OwnedFd) -> Self {
        let shared =
            Shared { descriptor, receiving: AtomicBool::new(false), sending: AtomicBool::new(false) };
        Self { shared: Arc::new(shared) }
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::from(OwnedFd::from(stream))
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::from(OwnedFd::from(stream))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.descriptor.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.descriptor.as_raw_fd()
    }
}
