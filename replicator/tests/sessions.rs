//! Two endpoints on loopback: what a session promises, and how it is refused, held back and lost.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use replicator::{
    BudgetedBuffers, CUT_HEADER_BYTES, CloseReason, CutIntake, DialError, Endpoint, IncomingSession,
    PinStore, PinnedCertificate, Refusal, SessionEvent, SessionHandle, SiteIdentity, TransportSettings,
};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(10);

struct Site {
    endpoint: Endpoint,
    incoming: mpsc::Receiver<IncomingSession>,
    identity: SiteIdentity,
    pins: PinStore,
    buffers: Arc<BudgetedBuffers>,
}

fn measure(header: &[u8; CUT_HEADER_BYTES]) -> Result<usize, String> {
    let length = u64::from_le_bytes(header[..8].try_into().unwrap());
    if header[8] != 0xc7 {
        return Err("no cut header".to_owned());
    }
    usize::try_from(length).map_err(|error| error.to_string())
}

/// A cut of `length` bytes whose content depends on `seed`.
fn cut(length: usize, seed: u8) -> Bytes {
    let mut bytes: Vec<u8> = (0_u8..251).cycle().map(|byte| byte ^ seed).take(length).collect();
    bytes[..8].copy_from_slice(&u64::try_from(length).unwrap().to_le_bytes());
    bytes[8] = 0xc7;
    bytes.into()
}

impl Site {
    fn new(name: &str, settings: &TransportSettings) -> Self {
        let identity = SiteIdentity::generate(name).unwrap();
        let pins = PinStore::new();
        let buffers = Arc::new(BudgetedBuffers::new(settings.cut_bytes_max));
        let intake = CutIntake::new(buffers.clone(), measure);
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let (endpoint, incoming) =
            Endpoint::bind(address, &identity, pins.clone(), intake, settings.clone()).unwrap();
        Self { endpoint, incoming, identity, pins, buffers }
    }

    fn pin(&self, name: &str, other: &SiteIdentity) {
        let certificate = PinnedCertificate::from_pem(other.certificate_pem()).unwrap();
        self.pins.insert(name, certificate).unwrap();
    }

    fn address(&self) -> String {
        self.endpoint.local_address().to_string()
    }
}

fn sites(settings: &TransportSettings) -> (Site, Site) {
    let (east, west) = (Site::new("east", settings), Site::new("west", settings));
    east.pin("west", &west.identity);
    west.pin("east", &east.identity);
    (east, west)
}

/// The next event, woken by the session's own callback.
async fn event(handle: &mut SessionHandle) -> SessionEvent {
    let notify = Arc::new(Notify::new());
    let ring = notify.clone();
    handle.set_wake(Arc::new(move || ring.notify_one()));
    let wait = async {
        loop {
            notify.notified().await;
            if let Some(event) = handle.try_next() {
                return event;
            }
        }
    };
    timeout(LONG, wait).await.expect("an event within 10 s")
}

async fn closed(handle: &mut SessionHandle) -> CloseReason {
    loop {
        if let SessionEvent::Closed { reason } = event(handle).await {
            assert_eq!(handle.try_next(), None, "the end is the last event");
            return reason;
        }
    }
}

async fn session(east: &Site, west: &mut Site) -> (SessionHandle, SessionHandle) {
    let dialed = east.endpoint.dial("west", &west.address()).await.unwrap();
    dialed.try_send_control(Bytes::from_static(b"hello")).unwrap();
    let accepted = timeout(LONG, west.incoming.recv()).await.unwrap().unwrap();
    assert_eq!(accepted.partner, "east");
    assert_eq!(accepted.remote, east.endpoint.local_address());
    assert_eq!(accepted.hello, "hello");
    (dialed, accepted.handle)
}

/// Sends although the queue may be full for a moment.
async fn send_cut(handle: &SessionHandle, mut chunks: Vec<Bytes>) {
    let deadline = Instant::now() + LONG;
    while let Err(refused) = handle.try_send_cut(chunks) {
        assert_eq!(refused.refusal, Refusal::Full);
        assert!(Instant::now() < deadline, "the queue stays full");
        chunks = refused.item;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn control_frames_pass_both_ways_in_order() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    for number in 0_u32..100 {
        let frame = Bytes::from(vec![7; usize::try_from(number).unwrap() * 997 + 1]);
        dialed.try_send_control(frame.clone()).unwrap();
        accepted.try_send_control(frame).unwrap();
    }
    for number in 0..100 {
        for handle in [&mut dialed, &mut accepted] {
            let SessionEvent::Control(frame) = event(handle).await else { panic!("not a frame") };
            assert_eq!(frame, vec![7; number * 997 + 1]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cuts_arrive_whole_aligned_and_in_order() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (dialed, mut accepted) = session(&east, &mut west).await;
    let length = |number: u8| match number % 4 {
        0 => CUT_HEADER_BYTES + usize::from(number),
        1 => 4096 * (1 + usize::from(number)),
        2 => (1 << 20) + usize::from(number),
        _ => 70_000 + 313 * usize::from(number),
    };
    let sender = async {
        for number in 0..100 {
            let whole = cut(length(number), number);
            // Chunks as the journal makes them, one of them empty.
            let middle = whole.len() / 2;
            let chunks = vec![
                whole.slice(..256),
                Bytes::new(),
                whole.slice(256..middle.max(256)),
                whole.slice(middle.max(256)..),
            ];
            send_cut(&dialed, chunks).await;
        }
    };
    let receiver = async {
        for number in 0..100 {
            let SessionEvent::Cut(bytes) = event(&mut accepted).await else { panic!("not a cut") };
            assert_eq!(bytes.as_ptr().align_offset(4096), 0);
            assert!(bytes == cut(length(number), number), "cut {number}");
        }
    };
    tokio::join!(sender, receiver);
    assert_eq!(dialed.queued_bytes(), 0);
    assert_eq!(accepted.try_send_cut(vec![cut(256, 0)]).unwrap_err().refusal, Refusal::WrongSide);
}

#[tokio::test]
async fn the_dialer_refuses_a_certificate_that_is_not_the_pinned_one() {
    let (east, west) = sites(&TransportSettings::default());
    let other = SiteIdentity::generate("west").unwrap();
    east.pin("west", &other);
    // A pin of another partner does not help: the dialed one is meant.
    east.pin("north", &west.identity);
    let error = east.endpoint.dial("west", &west.address()).await.unwrap_err();
    let DialError::CertificateRefusedByUs { presented, pinned, .. } = &error else { panic!("{error}") };
    assert_eq!((*presented, *pinned), (west.identity.fingerprint(), other.fingerprint()));
    let text = error.to_string();
    assert!(text.contains("farshore partner add") && text.contains(&presented.to_string()), "{text}");
}

#[tokio::test]
async fn the_acceptor_refuses_an_unknown_certificate_and_tells_why() {
    let (east, mut west) = sites(&TransportSettings::default());
    west.pins.remove("east");
    let error = east.endpoint.dial("west", &west.address()).await.unwrap_err();
    let DialError::CertificateRefusedByThem { ours, reason, .. } = &error else { panic!("{error}") };
    assert_eq!(*ours, east.identity.fingerprint());
    assert!(reason.contains("farshore partner add") && reason.contains(&ours.to_string()), "{reason}");
    assert!(west.incoming.try_recv().is_err());
}

#[tokio::test]
async fn a_removed_partner_loses_its_session_and_is_refused_from_then_on() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    west.pins.remove("east");
    assert_eq!(closed(&mut accepted).await, CloseReason::Unpinned);
    let reason = closed(&mut dialed).await;
    assert!(matches!(reason, CloseReason::Peer { code: 2, .. }), "{reason}");
    let error = east.endpoint.dial("west", &west.address()).await.unwrap_err();
    assert!(matches!(error, DialError::CertificateRefusedByThem { .. }), "{error}");
    // And it is back as soon as it is pinned again.
    west.pin("east", &east.identity);
    session(&east, &mut west).await;
    let error = east.endpoint.dial("nobody", &west.address()).await.unwrap_err();
    assert!(matches!(error, DialError::UnknownPartner { .. }), "{error}");
}

#[tokio::test]
async fn a_dial_that_nobody_answers_ends_in_bounded_time() {
    let settings = TransportSettings { connect_timeout: Duration::from_millis(400), ..Default::default() };
    let (east, _west) = sites(&settings);
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let dead = silent.local_addr().unwrap().to_string();
    let start = Instant::now();
    let error = east.endpoint.dial("west", &dead).await.unwrap_err();
    assert!(matches!(error, DialError::Timeout { .. }), "{error}");
    drop(silent);
    let error = east.endpoint.dial("west", &dead).await.unwrap_err();
    assert!(matches!(error, DialError::Timeout { .. } | DialError::Unreachable { .. }), "{error}");
    for address in ["[::1]:9", "127.0.0.1:0", "no port"] {
        let error = east.endpoint.dial("west", address).await.unwrap_err();
        assert!(matches!(error, DialError::Unreachable { .. }), "{address}: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_killed_peer_is_noticed_within_the_idle_timeout() {
    let settings = TransportSettings {
        idle_timeout: Duration::from_millis(600),
        keep_alive_interval: Duration::from_millis(100),
        ..Default::default()
    };
    let here = tokio::runtime::Runtime::new().unwrap();
    let there = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let east = here.block_on(async { Site::new("east", &settings) });
    let mut west = there.block_on(async { Site::new("west", &settings) });
    east.pin("west", &west.identity);
    west.pin("east", &east.identity);
    let dialed = async { east.endpoint.dial("west", &west.address()).await.unwrap() };
    let mut dialed = here.block_on(dialed);
    dialed.try_send_control(Bytes::from_static(b"hello")).unwrap();
    let mut accepted = there.block_on(west.incoming.recv()).unwrap().handle;
    // Keep-alives hold the silent session for longer than the idle timeout.
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(dialed.try_next(), None);
    there.shutdown_background();
    let live = Arc::new(AtomicUsize::new(0));
    for _ in 0..10 {
        dialed.try_send_cut(vec![Counted::chunk(cut(1 << 20, 0), &live)]).unwrap();
    }
    let start = Instant::now();
    assert_eq!(here.block_on(closed(&mut dialed)), CloseReason::LinkLost);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!((live.load(Ordering::SeqCst), dialed.queued_bytes()), (0, 0), "a cut link keeps no memory");
    // A consumer hears of the end even when its own runtime is gone.
    assert!(matches!(here.block_on(closed(&mut accepted)), CloseReason::Local(_)));
}

/// A payload that counts itself while it lives.
struct Counted(Bytes, Arc<AtomicUsize>);

impl Counted {
    fn chunk(bytes: Bytes, live: &Arc<AtomicUsize>) -> Bytes {
        live.fetch_add(1, Ordering::SeqCst);
        Bytes::from_owner(Self(bytes, live.clone()))
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Windows so small that a stalled receiver shows at once: 1 MiB queued, 2 MiB in flight, 512 KiB of buffers.
fn narrow() -> TransportSettings {
    TransportSettings {
        receive_window_bytes: 4 << 20,
        send_window_bytes: 4 << 20,
        queued_cut_bytes_max: 1 << 20,
        cut_bytes_max: 512 << 10,
        ..Default::default()
    }
}

/// Sends 128 KiB cuts until the session takes no more for 300 ms; how many it took.
async fn fill(handle: &SessionHandle, live: &Arc<AtomicUsize>) -> usize {
    let (mut sent, mut refused_since) = (0, Instant::now());
    while refused_since.elapsed() < Duration::from_millis(300) {
        let seed = u8::try_from(sent % 256).unwrap();
        match handle.try_send_cut(vec![Counted::chunk(cut(128 << 10, seed), live)]) {
            Ok(()) => (sent, refused_since) = (sent + 1, Instant::now()),
            Err(refused) => assert_eq!(refused.refusal, Refusal::Full),
        }
        assert!(sent < 1000, "a receiver that takes nothing must stop the sender");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    sent
}

#[tokio::test]
async fn a_receiver_that_does_not_drain_bounds_the_sender() {
    let (east, mut west) = sites(&narrow());
    let (dialed, mut accepted) = session(&east, &mut west).await;
    let live = Arc::new(AtomicUsize::new(0));
    let sent = fill(&dialed, &live).await;
    // Queue 8, one in QUIC's hands, windows 16, buffers 4, each rounded up by one.
    assert!((8..=32).contains(&sent), "{sent}");
    assert!((dialed.queued_bytes()..=1 << 20).contains(&(1 << 20)));
    assert_eq!(west.buffers.available_bytes(), 0);
    // Control frames pass beside the stalled cuts.
    dialed.try_send_control(Bytes::from_static(b"ping")).unwrap();
    let deadline = Instant::now() + LONG;
    let frame = loop {
        if let Some(event) = accepted.try_next_control() {
            break event;
        }
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    assert_eq!(frame, SessionEvent::Control(Bytes::from_static(b"ping")));
    for number in 0..sent {
        let SessionEvent::Cut(bytes) = event(&mut accepted).await else { panic!("not a cut") };
        assert!(bytes == cut(128 << 10, u8::try_from(number % 256).unwrap()), "cut {number}");
    }
    assert_eq!(dialed.queued_bytes(), 0);
    let deadline = Instant::now() + LONG;
    while live.load(Ordering::SeqCst) > 0 {
        assert!(Instant::now() < deadline, "acknowledged cuts are released");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_closed_session_releases_all_cuts_at_once() {
    let (east, mut west) = sites(&narrow());
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    let live = Arc::new(AtomicUsize::new(0));
    fill(&dialed, &live).await;
    assert!(live.load(Ordering::SeqCst) >= 8);
    dialed.close("overflow");
    assert_eq!(closed(&mut dialed).await, CloseReason::Local("overflow".to_owned()));
    assert_eq!(dialed.queued_bytes(), 0);
    assert_eq!(live.load(Ordering::SeqCst), 0);
    let refused = dialed.try_send_control(Bytes::from_static(b"late")).unwrap_err();
    assert_eq!(refused.refusal, Refusal::Closed);
    let expected = CloseReason::Peer { code: 0, reason: "overflow".to_owned() };
    assert_eq!(closed(&mut accepted).await, expected);
    drop(accepted);
    let deadline = Instant::now() + LONG;
    while west.buffers.available_bytes() < 512 << 10 {
        assert!(Instant::now() < deadline, "a dropped session returns its buffers");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn frames_queued_before_a_close_arrive_and_so_does_the_reason() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    for number in 0..50 {
        accepted.try_send_control(Bytes::from(vec![number; 3000])).unwrap();
    }
    accepted.close("size differs\nby one block");
    for number in 0..50 {
        assert_eq!(event(&mut dialed).await, SessionEvent::Control(Bytes::from(vec![number; 3000])));
    }
    let expected = CloseReason::Peer { code: 0, reason: "size differs by one block".to_owned() };
    assert_eq!(closed(&mut dialed).await, expected);
    let expected = CloseReason::Local("size differs by one block".to_owned());
    assert_eq!(closed(&mut accepted).await, expected);
}

#[tokio::test]
async fn a_dropped_handle_closes_the_session() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (dialed, mut accepted) = session(&east, &mut west).await;
    drop(dialed);
    assert!(matches!(closed(&mut accepted).await, CloseReason::Peer { code: 0, .. }));
}

#[tokio::test]
async fn a_closed_endpoint_ends_its_sessions() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    west.endpoint.close("going down").await;
    let expected = CloseReason::Peer { code: 0, reason: "going down".to_owned() };
    assert_eq!(closed(&mut dialed).await, expected);
    assert!(matches!(closed(&mut accepted).await, CloseReason::Local(_)));
}

#[tokio::test]
async fn a_control_frame_over_the_limit_closes_the_session_with_a_reason() {
    let (east, mut west) = (
        Site::new("east", &TransportSettings::default()),
        Site::new("west", &TransportSettings { control_frame_bytes_max: 1000, ..Default::default() }),
    );
    east.pin("west", &west.identity);
    west.pin("east", &east.identity);
    let (mut dialed, mut accepted) = session(&east, &mut west).await;
    dialed.try_send_control(Bytes::from(vec![1; 1000])).unwrap();
    dialed.try_send_control(Bytes::from(vec![1; 1001])).unwrap();
    assert_eq!(event(&mut accepted).await, SessionEvent::Control(Bytes::from(vec![1; 1000])));
    assert!(matches!(closed(&mut accepted).await, CloseReason::Violation(text) if text.contains("1001")));
    let reason = closed(&mut dialed).await;
    assert!(matches!(&reason, CloseReason::Peer { code: 1, reason } if reason.contains("1001")), "{reason}");
}

#[tokio::test]
async fn bytes_that_are_no_cut_close_the_session_with_a_reason() {
    let (east, mut west) = (
        Site::new("east", &TransportSettings::default()),
        Site::new("west", &TransportSettings { cut_bytes_max: 5000, ..Default::default() }),
    );
    east.pin("west", &west.identity);
    west.pin("east", &east.identity);
    for (bad, word) in [(Bytes::from(vec![0; 300]), "no cut header"), (cut(5001, 0), "5001")] {
        let (mut dialed, mut accepted) = session(&east, &mut west).await;
        send_cut(&dialed, vec![cut(5000, 1)]).await;
        send_cut(&dialed, vec![bad]).await;
        assert_eq!(event(&mut accepted).await, SessionEvent::Cut(cut(5000, 1)));
        assert!(matches!(closed(&mut accepted).await, CloseReason::Violation(text) if text.contains(word)));
        let reason = closed(&mut dialed).await;
        assert!(matches!(reason, CloseReason::Peer { code: 1, .. }), "{reason}");
    }
}

#[tokio::test]
async fn a_dialer_without_a_first_frame_is_dropped() {
    let settings = TransportSettings { connect_timeout: Duration::from_millis(300), ..Default::default() };
    let (east, mut west) = sites(&settings);
    let mut dialed = east.endpoint.dial("west", &west.address()).await.unwrap();
    let reason = closed(&mut dialed).await;
    assert!(matches!(&reason, CloseReason::Peer { code: 1, reason } if reason.contains("first frame")));
    assert!(west.incoming.try_recv().is_err());
}

#[tokio::test]
async fn garbage_datagrams_do_no_harm() {
    let (east, mut west) = sites(&TransportSettings::default());
    let (dialed, mut accepted) = session(&east, &mut west).await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut noise = 0x9e37_79b9_u32;
    for round in 0_usize..2000 {
        let mut datagram: Vec<u8> = Vec::with_capacity(1300);
        for _ in 0..round % 1300 {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            datagram.push(noise.to_be_bytes()[0]);
        }
        // Half of them look like QUIC version 1 Initial packets.
        if round % 2 == 0 && datagram.len() > 32 {
            datagram[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
        }
        socket.send_to(&datagram, west.endpoint.local_address()).unwrap();
        if round % 50 == 0 {
            tokio::task::yield_now().await;
        }
    }
    send_cut(&dialed, vec![cut(100_000, 3)]).await;
    assert_eq!(event(&mut accepted).await, SessionEvent::Cut(cut(100_000, 3)));
    session(&east, &mut west).await;
}
