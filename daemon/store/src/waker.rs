//! Ends a ring's wait from another thread.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Wakes the ring that it was made for; a cheap handle for any thread.
///
/// What a thread published before [`wake`](Self::wake) is visible to the ring's thread when the wait reports it.
#[derive(Clone, Debug)]
pub struct Waker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    eventfd: OwnedFd,
    /// True from a wake until the ring took note: further wakes need no system call.
    pending: AtomicBool,
}

impl Waker {
    /// A waker for a ring to be made with [`Ring::with_waker`](crate::Ring::with_waker), so that it can be handed
    /// out before the ring's thread runs.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub fn new() -> io::Result<Self> {
        // Not nonblocking: the ring reads it, and that read has to wait.
        let shared = Shared { eventfd: eventfd(0, EventfdFlags::CLOEXEC)?, pending: AtomicBool::new(false) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes the ring's current or next wait return and say so. Calls until then count as one.
    pub fn wake(&self) {
        if !self.shared.pending.swap(true, Ordering::AcqRel) {
            // The only error would be a full counter, and then the ring wakes anyway.
            let _ = rustix::io::write(&self.shared.eventfd, &1_u64.to_ne_bytes());
        }
    }

    /// The ring took note; later wakes count anew. Reads the flag as well, so that the wakers' writes to memory
    /// before their wake are visible after it.
    pub(crate) fn acknowledge(&self) {
        self.shared.pending.swap(false, Ordering::AcqRel);
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.eventfd.as_raw_fd()
    }
}
