//! The consumer's end of a session: events in, frames and cuts out, nothing that blocks.
//!
//! All queues are bounded. Control frames and cuts wait in separate queues, so a consumer that takes no cuts for a
//! while (its redo is full) still sees control frames. When the queues are full the peer is held back by QUIC's
//! flow control.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use crate::settings::TransportSettings;

/// Control frames that wait in each direction: hellos, acks and heartbeats are a few a cut.
pub(crate) const CONTROL_QUEUE_FRAMES: usize = 256;
/// Bytes of control frames that wait to be sent; compares and hashes make large frames.
const CONTROL_QUEUE_BYTES_MAX: u64 = 8 << 20;
/// Received cuts that wait for the consumer. Their space is the caller's budget; four keep its fsync busy.
pub(crate) const CUT_EVENTS: usize = 4;
/// Cuts that wait to be sent; the bound that matters is the one in bytes.
pub(crate) const CUT_QUEUE: usize = 1024;
/// A reason travels in one QUIC frame and ends in a log line.
const REASON_BYTES_MAX: usize = 256;

/// Rings when the session has an event or room to send again; called from other threads, must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// A session, unique in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl SessionId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "session {}", self.0)
    }
}

/// What a session tells its consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// A control frame.
    Control(Bytes),
    /// A cut, whole, in the caller's buffer; only on the accepting side.
    Cut(Bytes),
    /// The session has ended. Always the last event, exactly once; what was sent and not confirmed by the peer's
    /// control frames may or may not have arrived.
    Closed {
        /// Why.
        reason: CloseReason,
    },
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// This side closed it.
    #[error("closed here: {0}")]
    Local(String),
    /// The partner's daemon closed it.
    #[error("closed by the partner: {reason}")]
    Peer {
        /// The application's code; see docs/protocols/transport.md.
        code: u64,
        /// The partner's words.
        reason: String,
    },
    /// No packet within the idle timeout: link cut, partner dead or restarted.
    #[error("the link is lost: no packet from the partner within the idle timeout")]
    LinkLost,
    /// The partner's pin was removed or replaced here.
    #[error("the partner's certificate is no longer pinned here")]
    Unpinned,
    /// The partner sent what the protocol does not allow.
    #[error("the partner broke the protocol: {0}")]
    Violation(String),
    /// QUIC gave up.
    #[error("transport error: {0}")]
    Transport(String),
}

/// Why a send was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full: try again after the next wake.
    #[error("the session's send queue is full")]
    Full,
    /// Longer than the settings allow; the session goes on.
    #[error("longer than the transport's settings allow")]
    TooLong,
    /// Of no length: the empty frame belongs to the transport.
    #[error("empty")]
    Empty,
    /// Cuts go from the dialing to the accepting side only.
    #[error("only the side that dialed sends cuts")]
    WrongSide,
    /// The session has ended; [`SessionEvent::Closed`] says why.
    #[error("the session has ended")]
    Closed,
}

/// A refused send, with what was to be sent.
#[derive(Debug, thiserror::Error)]
#[error("{refusal}")]
pub struct Refused<T> {
    /// Why.
    pub refusal: Refusal,
    /// Handed back untouched.
    pub item: T,
}

/// State that handle and driver share.
pub(crate) struct Shared {
    wake: Mutex<Option<Wake>>,
    closed: Mutex<Option<CloseReason>>,
    ended: AtomicBool,
    queued_control_bytes: AtomicU64,
    queued_cut_bytes: AtomicU64,
}

impl Shared {
    /// Rings the consumer.
    pub(crate) fn wake(&self) {
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(wake) = wake {
            wake();
        }
    }

    fn control_bytes(&self) -> &AtomicU64 {
        &self.queued_control_bytes
    }

    fn cut_bytes(&self) -> &AtomicU64 {
        &self.queued_cut_bytes
    }

    /// Leaves the last event.
    fn close(&self, reason: CloseReason) {
        let earlier = self.closed.lock().unwrap_or_else(PoisonError::into_inner).replace(reason);
        assert!(earlier.is_none(), "a session ends once");
        self.ended.store(true, Ordering::Release);
        self.wake();
    }
}

/// The duty to end the session: the consumer hears of the end even if the driver is dropped with its runtime.
pub(crate) struct End(Option<Arc<Shared>>);

impl End {
    /// Leaves the last event. All event senders must be gone before, so that it is the last.
    pub(crate) fn close(mut self, reason: CloseReason) {
        if let Some(shared) = self.0.take() {
            shared.close(reason);
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.close(CloseReason::Local("replication was shut down".to_owned()));
        }
    }
}

/// Something that counts as queued from its acceptance until it is dropped.
pub(crate) struct Queued<T> {
    pub(crate) item: T,
    bytes: u64,
    shared: Arc<Shared>,
    counter: fn(&Shared) -> &AtomicU64,
}

impl<T> Queued<T> {
    /// Counts `bytes` if they fit under `bytes_max`; one item of any size fits into an empty queue.
    fn admit(
        item: T,
        bytes: u64,
        bytes_max: u64,
        shared: &Arc<Shared>,
        counter: fn(&Shared) -> &AtomicU64,
    ) -> Result<Self, T> {
        let fits = |queued: u64| {
            let sum = queued.checked_add(bytes)?;
            (queued == 0 || sum <= bytes_max).then_some(sum)
        };
        match counter(shared).fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) {
            Ok(_) => Ok(Self { item, bytes, shared: Arc::clone(shared), counter }),
            Err(_) => Err(item),
        }
    }
}

impl<T> Drop for Queued<T> {
    fn drop(&mut self) {
        let before = (self.counter)(&self.shared).fetch_sub(self.bytes, Ordering::AcqRel);
        assert!(before >= self.bytes, "what leaves the queue was counted when it came");
    }
}

/// The driver's ends of a session's queues.
pub(crate) struct DriverPorts {
    pub(crate) shared: Arc<Shared>,
    pub(crate) control_events: mpsc::Sender<Bytes>,
    pub(crate) cut_events: mpsc::Sender<Bytes>,
    pub(crate) control: mpsc::Receiver<Queued<Bytes>>,
    pub(crate) cuts: mpsc::Receiver<Queued<Vec<Bytes>>>,
    pub(crate) close: watch::Receiver<Option<String>>,
    /// Last, so that it drops after the event senders.
    pub(crate) end: End,
}

/// A live session. Dropping it closes the session.
pub struct SessionHandle {
    session: SessionId,
    partner: String,
    remote: SocketAddr,
    dialed: bool,
    control_bytes_max: usize,
    cut_bytes_max: u64,
    queued_cut_bytes_max: u64,
    shared: Arc<Shared>,
    control_events: mpsc::Receiver<Bytes>,
    cut_events: mpsc::Receiver<Bytes>,
    control: mpsc::Sender<Queued<Bytes>>,
    cuts: mpsc::Sender<Queued<Vec<Bytes>>>,
    close: watch::Sender<Option<String>>,
}

impl SessionHandle {
    /// A handle and the driver's ends of its queues.
    pub(crate) fn pair(
        partner: String,
        remote: SocketAddr,
        dialed: bool,
        settings: &TransportSettings,
    ) -> (Self, DriverPorts) {
        let shared = Arc::new(Shared {
            wake: Mutex::new(None),
            closed: Mutex::new(None),
            ended: AtomicBool::new(false),
            queued_control_bytes: AtomicU64::new(0),
            queued_cut_bytes: AtomicU64::new(0),
        });
        let (control_event_sender, control_events) = mpsc::channel(CONTROL_QUEUE_FRAMES);
        let (cut_event_sender, cut_events) = mpsc::channel(CUT_EVENTS);
        let (control, control_receiver) = mpsc::channel(CONTROL_QUEUE_FRAMES);
        let (cuts, cut_receiver) = mpsc::channel(CUT_QUEUE);
        let (close, close_receiver) = watch::channel(None);
        let ports = DriverPorts {
            shared: Arc::clone(&shared),
            control_events: control_event_sender,
            cut_events: cut_event_sender,
            control: control_receiver,
            cuts: cut_receiver,
            close: close_receiver,
            end: End(Some(Arc::clone(&shared))),
        };
        let handle = Self {
            session: SessionId::next(),
            partner,
            remote,
            dialed,
            control_bytes_max: usize::try_from(settings.control_frame_bytes_max).unwrap_or(usize::MAX),
            cut_bytes_max: settings.cut_bytes_max.into(),
            queued_cut_bytes_max: settings.queued_cut_bytes_max.into(),
            shared,
            control_events,
            cut_events,
            control,
            cuts,
            close,
        };
        (handle, ports)
    }

    /// The session's number.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The partner at the other end, by its pinned certificate.
    pub fn partner(&self) -> &str {
        &self.partner
    }

    /// The other end's address when the session began.
    pub fn remote_address(&self) -> SocketAddr {
        self.remote
    }

    /// Sets the callback that rings after each event and each time a cut left the send queue.
    ///
    /// It rings once at once, so that nothing that came before is missed.
    pub fn set_wake(&self, wake: Wake) {
        *self.shared.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&wake));
        wake();
    }

    /// The next event: control frames first, then cuts, then the end. None: wait for the wake.
    pub fn try_next(&mut self) -> Option<SessionEvent> {
        self.try_next_control_or(Self::next_cut)
    }

    /// The next event but for cuts, which stay queued: for a consumer that cannot take cuts now. The end of the
    /// session overtakes them, since no ack for them would reach the peer; a later [`try_next`](Self::try_next)
    /// then gives None.
    pub fn try_next_control(&mut self) -> Option<SessionEvent> {
        self.try_next_control_or(|_| None)
    }

    fn next_cut(&mut self) -> Option<SessionEvent> {
        self.cut_events.try_recv().ok().map(SessionEvent::Cut)
    }

    fn try_next_control_or(&mut self, more: fn(&mut Self) -> Option<SessionEvent>) -> Option<SessionEvent> {
        // Read before the queues: what was queued before the end was set is then seen before the end.
        let ended = self.shared.ended.load(Ordering::Acquire);
        if let Ok(frame) = self.control_events.try_recv() {
            return Some(SessionEvent::Control(frame));
        }
        if let Some(event) = more(self) {
            return Some(event);
        }
        if !ended {
            return None;
        }
        let reason = self.shared.closed.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        // Nothing follows the end.
        while self.cut_events.try_recv().is_ok() {}
        Some(SessionEvent::Closed { reason })
    }

    /// Queues a control frame.
    ///
    /// # Errors
    /// [`Refused`] hands the frame back.
    pub fn try_send_control(&self, frame: Bytes) -> Result<(), Refused<Bytes>> {
        let bytes = match frame.len() {
            0 => {
                return Err(Refused { refusal: Refusal::Empty, item: frame });
            }
            length if length > self.control_bytes_max => {
                return Err(Refused { refusal: Refusal::TooLong, item: frame });
            }
            length => u64::try_from(length).unwrap_or(u64::MAX),
        };
        let queued =
            Queued::admit(frame, bytes, CONTROL_QUEUE_BYTES_MAX, &self.shared, Shared::control_bytes)
                .map_err(|item| Refused { refusal: Refusal::Full, item })?;
        self.control.try_send(queued).map_err(refused)
    }

    /// Queues a cut: its chunks in order, header first. They are handed to QUIC as they are, without a copy, and
    /// are released when the peer has acknowledged them or the session has ended.
    ///
    /// # Errors
    /// [`Refused`] hands the chunks back.
    pub fn try_send_cut(&self, chunks: Vec<Bytes>) -> Result<(), Refused<Vec<Bytes>>> {
        let bytes: u64 = chunks.iter().map(|chunk| u64::try_from(chunk.len()).unwrap_or(u64::MAX)).sum();
        let refusal = match bytes {
            _ if !self.dialed => Some(Refusal::WrongSide),
            0 => Some(Refusal::Empty),
            bytes if bytes > self.cut_bytes_max => Some(Refusal::TooLong),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return Err(Refused { refusal, item: chunks });
        }
        let queued = Queued::admit(chunks, bytes, self.queued_cut_bytes_max, &self.shared, Shared::cut_bytes)
            .map_err(|item| Refused { refusal: Refusal::Full, item })?;
        self.cuts.try_send(queued).map_err(refused)
    }

    /// Bytes of cuts accepted by [`try_send_cut`](Self::try_send_cut) that QUIC has not taken over yet. Beyond
    /// them QUIC holds at most the setting `send_window_bytes` until the peer acknowledges.
    pub fn queued_bytes(&self) -> u64 {
        self.shared.queued_cut_bytes.load(Ordering::Acquire)
    }

    /// Ends the session: control frames queued so far are still sent if the peer takes them within a second, cuts
    /// are dropped. The peer is told `reason` (cut to 256 bytes). [`SessionEvent::Closed`] follows.
    pub fn close(&self, reason: &str) {
        let reason = clean_reason(reason.as_bytes());
        self.close.send_if_modified(|close| {
            let first = close.is_none();
            if first {
                *close = Some(reason);
            }
            first
        });
    }
}

impl fmt::Debug for SessionHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SessionHandle")
            .field("session", &self.session)
            .field("partner", &self.partner)
            .field("remote", &self.remote)
            .field("dialed", &self.dialed)
            .finish_non_exhaustive()
    }
}

/// Hands back what a full or closed queue did not take.
fn refused<T: Default>(error: TrySendError<Queued<T>>) -> Refused<T> {
    let (refusal, mut queued) = match error {
        TrySendError::Full(queued) => (Refusal::Full, queued),
        TrySendError::Closed(queued) => (Refusal::Closed, queued),
    };
    Refused { refusal, item: std::mem::take(&mut queued.item) }
}

/// A reason fit for a frame and a log line: valid UTF-8 without control characters, at most 256 bytes.
pub(crate) fn clean_reason(bytes: &[u8]) -> String {
    let mut text: String =
        String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.truncate(text.floor_char_boundary(REASON_BYTES_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(dialed: bool) -> (SessionHandle, DriverPorts) {
        let settings = TransportSettings { queued_cut_bytes_max: 1000, ..Default::default() };
        SessionHandle::pair("west".to_owned(), SocketAddr::from(([127, 0, 0, 1], 1)), dialed, &settings)
    }

    fn cut(bytes: usize) -> Vec<Bytes> {
        vec![Bytes::from(vec![1; bytes])]
    }

    #[test]
    fn queued_bytes_count_until_the_driver_drops_the_cut_and_full_hands_back() {
        let (handle, mut ports) = pair(true);
        handle.try_send_cut(cut(700)).unwrap();
        let refused = handle.try_send_cut(cut(301)).unwrap_err();
        assert_eq!((refused.refusal, refused.item.len()), (Refusal::Full, 1));
        handle.try_send_cut(cut(300)).unwrap();
        assert_eq!(handle.queued_bytes(), 1000);
        drop(ports.cuts.try_recv().unwrap());
        assert_eq!(handle.queued_bytes(), 300);
        drop(ports);
        assert_eq!(handle.queued_bytes(), 0);
        assert_eq!(handle.try_send_cut(cut(10)).unwrap_err().refusal, Refusal::Closed);
        assert_eq!(handle.queued_bytes(), 0);
        handle.try_send_control(Bytes::from_static(b"x")).unwrap_err();
    }

    #[test]
    fn a_cut_larger_than_the_budget_passes_alone() {
        let (handle, _ports) = pair(true);
        handle.try_send_cut(cut(5000)).unwrap();
        assert_eq!(handle.try_send_cut(cut(1)).unwrap_err().refusal, Refusal::Full);
    }

    #[test]
    fn sends_that_can_never_work_are_refused_by_kind() {
        let (handle, _ports) = pair(false);
        assert_eq!(handle.try_send_cut(cut(1)).unwrap_err().refusal, Refusal::WrongSide);
        assert_eq!(handle.try_send_control(Bytes::new()).unwrap_err().refusal, Refusal::Empty);
        let long = Bytes::from(vec![0; (1 << 20) + 1]);
        assert_eq!(handle.try_send_control(long).unwrap_err().refusal, Refusal::TooLong);
        let (handle, _ports) = pair(true);
        assert_eq!(handle.try_send_cut(cut((8 << 20) + 1)).unwrap_err().refusal, Refusal::TooLong);
    }

    #[test]
    fn control_frames_are_bounded_in_number_and_bytes() {
        let (handle, _ports) = pair(true);
        let small = Bytes::from_static(b"x");
        let sent = (0..1000).take_while(|_| handle.try_send_control(small.clone()).is_ok()).count();
        assert_eq!(sent, CONTROL_QUEUE_FRAMES);
        let (handle, _ports) = pair(true);
        let large = Bytes::from(vec![0; 1 << 20]);
        assert_eq!((0..1000).take_while(|_| handle.try_send_control(large.clone()).is_ok()).count(), 8);
    }

    #[test]
    fn the_end_comes_last_and_once() {
        let (mut handle, ports) = pair(false);
        ports.cut_events.try_send(Bytes::from_static(b"cut")).unwrap();
        ports.control_events.try_send(Bytes::from_static(b"frame")).unwrap();
        let DriverPorts { end, control_events, cut_events, .. } = ports;
        drop((control_events, cut_events));
        end.close(CloseReason::LinkLost);
        assert_eq!(handle.try_next(), Some(SessionEvent::Control(Bytes::from_static(b"frame"))));
        assert_eq!(handle.try_next(), Some(SessionEvent::Cut(Bytes::from_static(b"cut"))));
        assert_eq!(handle.try_next(), Some(SessionEvent::Closed { reason: CloseReason::LinkLost }));
        assert_eq!(handle.try_next(), None);
        assert_eq!(handle.try_next_control(), None);
    }

    #[test]
    fn the_end_overtakes_cuts_that_the_consumer_cannot_take() {
        let (mut handle, ports) = pair(false);
        ports.cut_events.try_send(Bytes::from_static(b"cut")).unwrap();
        assert_eq!(handle.try_next_control(), None);
        drop(ports);
        assert!(matches!(handle.try_next_control(), Some(SessionEvent::Closed { .. })));
        assert_eq!(handle.try_next(), None);
    }

    #[test]
    fn reasons_are_cut_at_a_character_and_cleaned() {
        assert_eq!(clean_reason(b"a\nb\xff"), "a b\u{fffd}");
        assert_eq!(clean_reason("ä".repeat(200).as_bytes()).len(), 256);
        assert_eq!(clean_reason(format!("x{}", "ä".repeat(200)).as_bytes()).len(), 255);
    }
}
