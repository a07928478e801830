//! Ports that are free for TCP and UDP on the loopback address.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the range from which the kernel takes ports for outgoing connections, so that none is taken meanwhile.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

static NEXT: AtomicU16 = AtomicU16::new(0);

/// A loopback address whose port nobody uses, neither for TCP nor for UDP; never the same twice in a process.
///
/// # Panics
/// If no port of the range is free.
pub fn free_port() -> SocketAddr {
    // Processes start at different places, so that tests running side by side rarely meet.
    let start = u16::try_from(std::process::id() % u32::from(COUNT / 16)).unwrap_or(0) * 16;
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (start + step) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
    unreachable!("no free port between {FIRST} and {}", FIRST + COUNT);
}
