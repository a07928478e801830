//! Measures one session on loopback: MB/s and CPU for cuts of 1 MiB, optionally over an emulated link.
//!
//! `cargo run --release -p farshore-replicator --example throughput -- [bbr|cubic|new-reno] [MTU] [ONE-WAY-MS] [LOSS-PER-10000] [RATE-MB-PER-S]`
//!
//! The emulated link is a relay in this process (delay, random loss, a rate with a queue of 10 ms that drops what
//! is over); it costs CPU of its own, so its figures compare settings with each other only.
#![allow(clippy::print_stdout)]

use std::collections::VecDeque;
use std::error::Error;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use replicator::{
    BudgetedBuffers, CUT_HEADER_BYTES, Congestion, CutIntake, Endpoint, PinStore, Refusal, SessionEvent,
    SessionHandle, SiteIdentity, TransportSettings,
};

const CUT_BYTES: usize = 1 << 20;
const SECONDS: u64 = 8;
/// The start of the run, left out of the figure: the congestion window opens.
const WARM_UP: Duration = Duration::from_secs(2);

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: u64| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let congestion = match arguments.first().map(String::as_str) {
        None | Some("bbr") => Congestion::Bbr,
        Some("cubic") => Congestion::Cubic,
        Some("new-reno") => Congestion::NewReno,
        Some(other) => return Err(format!("no congestion controller is called '{other}'").into()),
    };
    let settings = TransportSettings {
        congestion,
        udp_payload_bytes_max: u16::try_from(number(1, 6550)?)?,
        ..TransportSettings::default()
    };
    let link = Link { delay: Duration::from_millis(number(2, 0)?), loss: number(3, 0)?, rate: number(4, 0)? };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (east, mut west) = runtime.block_on(open(&settings, link))?;
    let receiver = std::thread::spawn(move || {
        let ready = bell(&west);
        let (mut bytes, mut cpu, mut start) = (0_u64, cpu_ticks(), Instant::now());
        let mut warm = false;
        while start.elapsed() < Duration::from_secs(SECONDS) {
            if !warm && start.elapsed() > WARM_UP {
                (warm, bytes, cpu, start) = (true, 0, cpu_ticks(), Instant::now());
            }
            match west.try_next() {
                Some(SessionEvent::Cut(cut)) => bytes += u64::try_from(cut.len()).unwrap_or(0),
                Some(SessionEvent::Control(_)) => {}
                Some(SessionEvent::Closed { reason }) => return Err(reason.to_string()),
                None => wait(&ready),
            }
        }
        Ok((bytes, start.elapsed(), cpu_ticks().saturating_sub(cpu)))
    });
    let ready = bell(&east);
    let cut = cut();
    while !receiver.is_finished() {
        match east.try_send_cut(vec![cut.slice(..4096), cut.slice(4096..)]) {
            Ok(()) => {}
            Err(refused) if refused.refusal == Refusal::Full => wait(&ready),
            Err(refused) => return Err(refused.refusal.into()),
        }
    }
    let (bytes, time, ticks) = receiver.join().map_err(|_| "the receiver panicked")??;
    let milliseconds = u64::try_from(time.as_millis())?;
    println!(
        "{congestion:?}, UDP payload <= {}, {link:?}: {} MB/s, CPU {} % of one core (both ends)",
        settings.udp_payload_bytes_max,
        bytes / 1000 / milliseconds,
        ticks * 1000 / milliseconds,
    );
    Ok(())
}

async fn open(settings: &TransportSettings, link: Link) -> Result<(SessionHandle, SessionHandle), Failure> {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let (one, two) = (SiteIdentity::generate("east")?, SiteIdentity::generate("west")?);
    let bind = |own: &SiteIdentity, name: &str, other: &SiteIdentity| -> Result<_, Failure> {
        let pins = PinStore::new();
        pins.insert(name, other.certificate().clone())?;
        let intake = CutIntake::new(Arc::new(BudgetedBuffers::new(32 << 20)), measure);
        Ok(Endpoint::bind(loopback, own, pins, intake, settings.clone())?)
    };
    let (east, _) = bind(&one, "west", &two)?;
    let (west, mut incoming) = bind(&two, "east", &one)?;
    let west_address = west.local_address();
    let target = if link == Link::default() { west_address } else { relay(west_address, link)? };
    let dialed = east.dial("west", &target.to_string()).await?;
    dialed.try_send_control(Bytes::from_static(b"hello"))?;
    let accepted = incoming.recv().await.ok_or("no session came in")?;
    // The endpoints live as long as the process.
    std::mem::forget((east, west));
    Ok((dialed, accepted.handle))
}

fn measure(header: &[u8; CUT_HEADER_BYTES]) -> Result<usize, String> {
    let length = header.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    usize::try_from(length).map_err(|error| error.to_string())
}

fn cut() -> Bytes {
    let length = u32::try_from(CUT_BYTES).unwrap_or(u32::MAX).to_le_bytes();
    length.into_iter().chain((0..=250).cycle()).take(CUT_BYTES).collect::<Vec<u8>>().into()
}

type Bell = Arc<(Mutex<bool>, Condvar)>;

/// What a shard's eventfd would be.
fn bell(handle: &SessionHandle) -> Bell {
    let bell = Bell::default();
    let ring = bell.clone();
    handle.set_wake(Arc::new(move || {
        *ring.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        ring.1.notify_one();
    }));
    bell
}

fn wait(bell: &Bell) {
    let rung = bell.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = bell.1.wait_timeout_while(rung, Duration::from_millis(100), |rung| !*rung);
    *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
}

/// CPU time of the whole process in hundredths of a second, as /proc counts it.
fn cpu_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// What the relay does to datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Link {
    /// One way.
    delay: Duration,
    /// Of 10,000 datagrams, at random.
    loss: u64,
    /// MB/s, each way; 0 is no limit.
    rate: u64,
}

/// A UDP relay to `west`.
fn relay(west: SocketAddr, link: Link) -> Result<SocketAddr, Failure> {
    let front = UdpSocket::bind("127.0.0.1:0")?;
    let back = UdpSocket::bind("127.0.0.1:0")?;
    for socket in [&front, &back] {
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, 16 << 20)?;
    }
    back.connect(west)?;
    let address = front.local_addr()?;
    let client = Arc::new(Mutex::new(address));
    let (one, two) = (front.try_clone()?, back.try_clone()?);
    let seen = client.clone();
    let to_west = move |bytes: &[u8]| drop(back.send(bytes));
    let to_east = move |bytes: &[u8]| {
        let east = *client.lock().unwrap_or_else(PoisonError::into_inner);
        drop(front.send_to(bytes, east));
    };
    pump(one, link, move |from| *seen.lock().unwrap_or_else(PoisonError::into_inner) = from, to_west);
    pump(two, link, |_| (), to_east);
    Ok(address)
}

fn pump(
    socket: UdpSocket,
    link: Link,
    seen: impl Fn(SocketAddr) + Send + 'static,
    send: impl Fn(&[u8]) + Send + 'static,
) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(100_000);
    std::thread::spawn(move || {
        let (mut buffer, mut noise) = (vec![0; 65_536], 88_172_645_463_325_252_u64);
        let mut free_at = Instant::now();
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            seen(from);
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let bytes = buffer.get(..length).unwrap_or_default().to_vec();
            let now = Instant::now();
            let queued = free_at.saturating_duration_since(now);
            if noise % 10_000 < link.loss || queued > Duration::from_millis(10) {
                continue;
            }
            if let Some(nanoseconds) = (u64::try_from(length).unwrap_or(0) * 1000).checked_div(link.rate) {
                free_at = now + queued + Duration::from_nanos(nanoseconds);
            }
            if sender.send((free_at.max(now) + link.delay, bytes)).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        let mut due: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        loop {
            let Some(next) = due.pop_front().or_else(|| receiver.recv().ok()) else {
                return;
            };
            std::thread::sleep(next.0.saturating_duration_since(Instant::now()));
            send(&next.1);
            due.extend(receiver.try_iter());
        }
    });
}
