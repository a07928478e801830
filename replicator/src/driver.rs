//! Runs one session: moves frames and cuts between its queues and its QUIC streams until the first cause to end.

use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt, WriteError};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::cuts::{CutIntake, IntakeError};
use crate::frames::{self, FrameError};
use crate::pins::{Fingerprint, PinStore};
use crate::session::{CloseReason, DriverPorts, Queued, Shared, clean_reason};
use crate::settings::{DATA_STREAMS, TransportSettings};

/// The application's close codes on the wire (docs/protocols/transport.md).
pub(crate) mod code {
    /// The consumer closed the session, or the daemon is going down.
    pub(crate) const CLOSED: u32 = 0;
    /// The peer broke this protocol.
    pub(crate) const VIOLATION: u32 = 1;
    /// The peer's certificate was unpinned.
    pub(crate) const UNPINNED: u32 = 2;
    /// No room or no consumer for another session.
    pub(crate) const BUSY: u32 = 3;
}

/// How long an end waits for the last control frames to leave, and then for the streams to be gone.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// How long a broken stream waits for the peer's reason: the peer may linger twice before it gives one.
const EXPLANATION: Duration = Duration::from_secs(3);
/// How often a closing session looks whether its streams are gone: about a local round trip.
const STREAMS_GONE_POLL: Duration = Duration::from_millis(2);
/// Acks overtake cuts in the peer's send queue.
pub(crate) const CONTROL_PRIORITY: i32 = 1;

/// What carries a session's cuts: cut n, from 0, goes whole on stream n modulo [`DATA_STREAMS`].
pub(crate) enum DataSide {
    /// The dialer's streams, all of them.
    Send(Vec<SendStream>),
    /// The acceptor's intake; a stream appears with its first cut.
    Receive(CutIntake, Vec<RecvStream>),
}

/// A session whose peer is known and whose control stream stands.
pub(crate) struct Driver {
    pub(crate) connection: Connection,
    pub(crate) control_send: SendStream,
    pub(crate) control_receive: RecvStream,
    pub(crate) data: DataSide,
    pub(crate) ports: DriverPorts,
    pub(crate) settings: TransportSettings,
    pub(crate) pins: PinStore,
    pub(crate) partner: String,
    pub(crate) fingerprint: Fingerprint,
    /// Set to a reason when the endpoint closes, which waits until all of these receivers are dropped.
    pub(crate) shutdown: watch::Receiver<Option<String>>,
}

/// The two who can ask for the end: the consumer and the endpoint.
#[derive(Clone)]
struct Closing {
    session: watch::Receiver<Option<String>>,
    endpoint: watch::Receiver<Option<String>>,
}

impl Closing {
    /// Returns when one of them does.
    async fn requested(mut self) -> String {
        let session = async {
            match self.session.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or_default(),
                Err(_) => "the session was dropped".to_owned(),
            }
        };
        let endpoint = async {
            match self.endpoint.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or_default(),
                Err(_) => "the endpoint was dropped".to_owned(),
            }
        };
        tokio::select! {
            reason = session => reason,
            reason = endpoint => reason,
        }
    }

    /// The end is wanted, and the peer did not take the last control frames in time.
    async fn stalled(self) -> CloseReason {
        let reason = self.requested().await;
        sleep(LINGER).await;
        CloseReason::Local(reason)
    }
}

impl Driver {
    /// Runs the session to its end.
    pub(crate) async fn run(self) {
        let Self { connection, mut control_send, mut control_receive, mut data, ports, settings, .. } = self;
        let DriverPorts { shared, control_events, cut_events, control, cuts, close, end } = ports;
        let closing = Closing { session: close, endpoint: self.shutdown };
        let frame_bytes_max = settings.control_frame_bytes_max;
        let cut_bytes_max = usize::try_from(settings.cut_bytes_max).unwrap_or(usize::MAX);
        let move_cuts = async {
            match &mut data {
                DataSide::Send(streams) => send_cuts(&connection, streams, cuts, &shared).await,
                DataSide::Receive(intake, streams) => {
                    receive_cuts(&connection, intake, streams, cut_bytes_max, cut_events, &shared).await
                }
            }
        };
        let reason = tokio::select! {
            reason = receive_control(
                &connection, &mut control_receive, frame_bytes_max, control_events, &shared) => reason,
            reason = send_control(&connection, &mut control_send, control, closing.clone()) => reason,
            reason = move_cuts => reason,
            reason = closing.stalled() => reason,
            reason = connection_lost(&connection) => reason,
            () = self.pins.until_unpinned(&self.partner, self.fingerprint) => CloseReason::Unpinned,
        };
        tracing::info!(
            partner = %self.partner, remote = %connection.remote_address(), "replication session ended: {reason}");
        let mut sending = vec![&mut control_send];
        match &mut data {
            DataSide::Send(streams) => sending.extend(streams),
            DataSide::Receive(..) => {}
        }
        close_connection(&connection, sending, &reason).await;
        // The streams keep the connection's buffers alive: they go before the consumer hears of the end.
        drop((control_send, control_receive, data, connection));
        end.close(reason);
    }
}

/// Ends the connection so that the peer hears the reason.
///
/// Resetting the streams drops their unsent bytes at once, which closing alone does after it has drained. And it
/// must come first: quinn-proto 0.11.19 puts a close frame behind congestion control while a stream has something
/// to send, and once closed it no longer reads the acknowledgements that would let it through (quinn issue 2785).
async fn close_connection(connection: &Connection, mut streams: Vec<&mut SendStream>, reason: &CloseReason) {
    let (code, text) = close_frame(reason);
    let code = VarInt::from_u32(code);
    for stream in &mut streams {
        // A stream that is gone already needs no reset.
        let _ = stream.reset(code);
    }
    let acknowledged = async {
        // A stream forgets its priority when the peer has acknowledged its reset.
        while connection.close_reason().is_none() && streams.iter().any(|stream| stream.priority().is_ok()) {
            sleep(STREAMS_GONE_POLL).await;
        }
    };
    // A peer that does not answer is told without being waited for, and else notices by its idle timeout.
    let _ = timeout(LINGER, acknowledged).await;
    connection.close(code, text.as_bytes());
}

/// What the peer is told.
fn close_frame(reason: &CloseReason) -> (u32, String) {
    match reason {
        CloseReason::Local(text) => (code::CLOSED, text.clone()),
        CloseReason::Violation(text) => (code::VIOLATION, clean_reason(text.as_bytes())),
        CloseReason::Unpinned => (code::UNPINNED, "your certificate is no longer pinned here".to_owned()),
        // The connection has ended already; nobody reads this.
        CloseReason::Peer { .. } | CloseReason::LinkLost | CloseReason::Transport(_) => {
            (code::CLOSED, String::new())
        }
    }
}

/// Why a connection ended, in a session's words.
pub(crate) fn close_reason(error: ConnectionError) -> CloseReason {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            CloseReason::Peer { code: close.error_code.into(), reason: clean_reason(&close.reason) }
        }
        ConnectionError::TimedOut | ConnectionError::Reset => CloseReason::LinkLost,
        ConnectionError::LocallyClosed => CloseReason::Local("the endpoint was closed".to_owned()),
        ConnectionError::ConnectionClosed(_)
        | ConnectionError::TransportError(_)
        | ConnectionError::VersionMismatch
        | ConnectionError::CidsExhausted => {
            CloseReason::Transport(clean_reason(error.to_string().as_bytes()))
        }
    }
}

/// A stream ended oddly: the peer's reason for closing, if it comes, explains it; else it is a violation.
async fn explained(connection: &Connection, otherwise: &str) -> CloseReason {
    match timeout(EXPLANATION, connection.closed()).await {
        Ok(error) => close_reason(error),
        Err(_) => CloseReason::Violation(otherwise.to_owned()),
    }
}

/// The connection ended. The control stream's reader, which first delivers what has arrived, normally says so
/// itself; this is for when it is held up by its consumer.
async fn connection_lost(connection: &Connection) -> CloseReason {
    let error = connection.closed().await;
    sleep(LINGER).await;
    close_reason(error)
}

async fn receive_control(
    connection: &Connection,
    stream: &mut RecvStream,
    bytes_max: u32,
    events: mpsc::Sender<bytes::Bytes>,
    shared: &Shared,
) -> CloseReason {
    loop {
        match frames::read(stream, bytes_max).await {
            Ok(frame) => {
                if events.send(frame).await.is_err() {
                    return CloseReason::Local("the session was dropped".to_owned());
                }
                shared.wake();
            }
            Err(FrameError::Connection) => return close_reason(connection.closed().await),
            Err(FrameError::Finished) => return explained(connection, "it ended the control stream").await,
            Err(FrameError::Torn) => return explained(connection, "it broke off the control stream").await,
            Err(FrameError::Length { bytes, bytes_max }) => {
                let text = format!("a control frame of {bytes} bytes is outside 1 to {bytes_max}");
                return CloseReason::Violation(text);
            }
        }
    }
}

/// Sends control frames; after a request to close it sends those queued before it and waits for their receipt.
async fn send_control(
    connection: &Connection,
    stream: &mut SendStream,
    mut queue: mpsc::Receiver<Queued<bytes::Bytes>>,
    closing: Closing,
) -> CloseReason {
    let closing = closing.requested();
    tokio::pin!(closing);
    let mut reason = None;
    loop {
        let queued = tokio::select! {
            biased;
            queued = queue.recv() => queued,
            text = &mut closing, if reason.is_none() => {
                queue.close();
                reason = Some(text);
                continue;
            }
        };
        let Some(mut queued) = queued else { break };
        if let Err(error) = frames::write(stream, std::mem::take(&mut queued.item)).await {
            return write_failed(connection, error, "it refused the control stream").await;
        }
    }
    // The queue ends with its handle, which also counts as the wish to close.
    let reason = match reason {
        Some(reason) => reason,
        None => closing.await,
    };
    let _ = stream.finish();
    let _ = stream.stopped().await;
    CloseReason::Local(reason)
}

async fn send_cuts(
    connection: &Connection,
    streams: &mut [SendStream],
    mut queue: mpsc::Receiver<Queued<Vec<bytes::Bytes>>>,
    shared: &Shared,
) -> CloseReason {
    let mut turn = 0;
    while let Some(mut queued) = queue.recv().await {
        let count = streams.len();
        let Some(stream) = streams.get_mut(turn) else { break };
        if let Err(error) = stream.write_all_chunks(&mut queued.item).await {
            return write_failed(connection, error, "it refused a data stream").await;
        }
        drop(queued);
        shared.wake();
        turn = (turn + 1) % count;
    }
    // The handle is gone: the control side ends the session.
    std::future::pending().await
}

async fn write_failed(connection: &Connection, error: WriteError, otherwise: &str) -> CloseReason {
    match error {
        // The control stream's reader reports it, after what has arrived.
        WriteError::ConnectionLost(_) => std::future::pending().await,
        WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            explained(connection, otherwise).await
        }
    }
}

async fn receive_cuts(
    connection: &Connection,
    intake: &CutIntake,
    // Kept outside: dropping a stream would queue a frame ahead of the connection's close.
    streams: &mut Vec<RecvStream>,
    bytes_max: usize,
    events: mpsc::Sender<bytes::Bytes>,
    shared: &Shared,
) -> CloseReason {
    let mut turn = 0;
    loop {
        if turn == streams.len() {
            // Streams appear in the order of their numbers (RFC 9000 section 2.1).
            match connection.accept_uni().await {
                Ok(stream) => streams.push(stream),
                // The control stream's reader reports it, after what has arrived.
                Err(_) => return std::future::pending().await,
            }
        }
        let Some(stream) = streams.get_mut(turn) else { return std::future::pending().await };
        match intake.next(stream, bytes_max).await {
            Ok(cut) => {
                if events.send(cut).await.is_err() {
                    return CloseReason::Local("the session was dropped".to_owned());
                }
                shared.wake();
            }
            // As above.
            Err(IntakeError::Connection) => return std::future::pending().await,
            Err(IntakeError::Finished) => return explained(connection, "it ended a data stream").await,
            Err(IntakeError::Torn) => return explained(connection, "it broke off a data stream").await,
            Err(IntakeError::Refused(text)) => return CloseReason::Violation(clean_reason(text.as_bytes())),
        }
        turn = (turn + 1) % usize::from(DATA_STREAMS);
    }
}
