//! A UDP relay: the link between two sites, which a test can cut, slow down and make lose or reorder packets.
//!
//! Every sender gets an upstream socket of its own, so that answers find their way back.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use super::Random;

/// More senders than this at one relay are a defect of the test.
const SENDERS_MAX: usize = 256;
const DATAGRAM_BYTES_MAX: usize = 65_536;
/// How often sleeping threads look at the stop flag and at due packets.
const TICK: Duration = Duration::from_millis(2);
/// How long a packet is held back to let later ones pass it.
const REORDER_DELAY: Duration = Duration::from_millis(4);
/// What may wait at a socket: a window's worth of packets, or a relay that is not scheduled for a moment loses some.
const SOCKET_BYTES: usize = 8 << 20;

/// What the link does to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelaySettings {
    /// Nothing passes.
    pub cut: bool,
    /// Of 1,000 packets this many are lost.
    pub drop_permille: u32,
    /// Of 1,000 packets this many are passed by later ones.
    pub reorder_permille: u32,
    /// Added to the way in each direction.
    pub delay: Duration,
}

/// A running relay; it ends when dropped.
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    settings: Mutex<RelaySettings>,
    stop: AtomicBool,
    passed: AtomicU64,
    held: Mutex<Held>,
}

/// Packets that wait for their time, and the source of chance.
struct Held {
    random: Random,
    packets: BTreeMap<(Instant, u64), Packet>,
    next: u64,
}

struct Packet {
    socket: Arc<UdpSocket>,
    /// `None` for a connected socket.
    to: Option<SocketAddr>,
    bytes: Vec<u8>,
}

impl Relay {
    /// Relays what arrives at a free loopback port to `target` and back.
    ///
    /// # Errors
    /// If no socket can be bound.
    pub fn start(target: SocketAddr, seed: u64) -> io::Result<Self> {
        Self::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), target, seed)
    }

    /// Relays what arrives at `listen` to `target` and back.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn listen(listen: SocketAddr, target: SocketAddr, seed: u64) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind(listen)?);
        deepen(&socket);
        socket.set_read_timeout(Some(TICK))?;
        let address = socket.local_addr()?;
        let shared = Arc::new(Shared {
            settings: Mutex::default(),
            stop: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            held: Mutex::new(Held { random: Random::new(seed), packets: BTreeMap::new(), next: 0 }),
        });
        let inner = Arc::clone(&shared);
        let thread = thread::spawn(move || inner.forward(&socket, target));
        Ok(Self { shared, address, thread: Some(thread) })
    }

    /// Where to send to.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many packets have passed.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }

    /// Changes what the link does from now on.
    pub fn set(&self, settings: RelaySettings) {
        *self.shared.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Lets nothing pass.
    pub fn cut(&self) {
        self.set(RelaySettings { cut: true, ..RelaySettings::default() });
    }

    /// Lets everything pass at once.
    pub fn heal(&self) {
        self.set(RelaySettings::default());
    }
}

/// Makes the queue of arrived packets long; beyond the system's limit only for root, else as long as allowed.
fn deepen(socket: &UdpSocket) {
    if set_socket_recv_buffer_size_force(socket, SOCKET_BYTES).is_err() {
        let _ = set_socket_recv_buffer_size(socket, SOCKET_BYTES);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The listening thread: packets of the senders, and delayed packets of both directions.
    fn forward(self: &Arc<Self>, socket: &Arc<UdpSocket>, target: SocketAddr) {
        let mut upstreams: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
        let mut bytes = vec![0; DATAGRAM_BYTES_MAX];
        while !self.stopped() {
            let received = socket.recv_from(&mut bytes);
            self.release();
            let Ok((length, sender)) = received else { continue };
            if !upstreams.contains_key(&sender) {
                assert!(upstreams.len() < SENDERS_MAX, "at most {SENDERS_MAX} senders");
                let Ok(upstream) = self.upstream(socket, sender, target) else {
                    continue;
                };
                upstreams.insert(sender, upstream);
            }
            if let (Some(upstream), Some(packet)) = (upstreams.get(&sender), bytes.get(..length)) {
                self.pass(upstream, None, packet);
            }
        }
    }

    /// The socket for one sender, and the thread that brings the answers back.
    fn upstream(
        self: &Arc<Self>,
        socket: &Arc<UdpSocket>,
        sender: SocketAddr,
        target: SocketAddr,
    ) -> io::Result<Arc<UdpSocket>> {
        let upstream = Arc::new(UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?);
        upstream.connect(target)?;
        deepen(&upstream);
        upstream.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (shared, answers, back) = (Arc::clone(self), Arc::clone(&upstream), Arc::clone(socket));
        thread::spawn(move || {
            let mut bytes = vec![0; DATAGRAM_BYTES_MAX];
            while !shared.stopped() {
                // Errors are refusals of a target that is down: the next packet may find it up.
                if let Ok(length) = answers.recv(&mut bytes)
                    && let Some(packet) = bytes.get(..length)
                {
                    shared.pass(&back, Some(sender), packet);
                }
            }
        });
        Ok(upstream)
    }

    fn pass(&self, socket: &Arc<UdpSocket>, to: Option<SocketAddr>, bytes: &[u8]) {
        let settings = *self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.cut || held.random.chance(settings.drop_permille) {
            return;
        }
        let mut delay = settings.delay;
        if held.random.chance(settings.reorder_permille) {
            delay += REORDER_DELAY;
        }
        if delay.is_zero() {
            drop(held);
            self.send(socket, to, bytes);
            return;
        }
        held.next += 1;
        let key = (Instant::now() + delay, held.next);
        let packet = Packet { socket: Arc::clone(socket), to, bytes: bytes.to_vec() };
        held.packets.insert(key, packet);
    }

    /// Sends the packets whose time has come.
    fn release(&self) {
        let now = Instant::now();
        let due = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            let later = held.packets.split_off(&(now, u64::MAX));
            std::mem::replace(&mut held.packets, later)
        };
        for packet in due.into_values() {
            self.send(&packet.socket, packet.to, &packet.bytes);
        }
    }

    fn send(&self, socket: &UdpSocket, to: Option<SocketAddr>, bytes: &[u8]) {
        // Counted before, so that whoever has a packet finds it counted. One that cannot be sent is a lost one.
        self.passed.fetch_add(1, Ordering::Relaxed);
        let sent = to.map_or_else(|| socket.send(bytes), |to| socket.send_to(bytes, to));
        if sent.is_err() {
            self.passed.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    }

    #[test]
    fn packets_and_answers_pass_until_the_link_is_cut() {
        let (server, client) = (socket(), socket());
        let relay = Relay::start(server.local_addr().unwrap(), 1).unwrap();
        let mut bytes = [0; 16];
        client.send_to(b"ask", relay.address()).unwrap();
        let (length, from) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"ask");
        server.send_to(b"answer", from).unwrap();
        assert_eq!(client.recv(&mut bytes).unwrap(), 6);

        relay.cut();
        client.send_to(b"lost", relay.address()).unwrap();
        server.recv_from(&mut bytes).unwrap_err();

        relay.set(RelaySettings { delay: Duration::from_millis(30), ..RelaySettings::default() });
        let begin = Instant::now();
        client.send_to(b"late", relay.address()).unwrap();
        let (length, _) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"late");
        assert!(begin.elapsed() >= Duration::from_millis(30));
        assert_eq!(relay.passed(), 3);
    }

    #[test]
    fn a_bad_link_loses_and_reorders() {
        let (server, client) = (socket(), socket());
        let relay = Relay::start(server.local_addr().unwrap(), 2).unwrap();
        relay.set(RelaySettings { drop_permille: 300, reorder_permille: 300, ..RelaySettings::default() });
        for number in 0..100_u8 {
            client.send_to(&[number], relay.address()).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        let mut numbers = Vec::new();
        let mut bytes = [0; 16];
        while server.recv_from(&mut bytes).is_ok() {
            numbers.push(bytes[0]);
        }
        assert!((40..95).contains(&numbers.len()), "{}", numbers.len());
        assert!(!numbers.is_sorted());
    }
}
