//! Host connections: receive, parse, hand commands to the group, send replies.
//!
//! A small write's payload is copied once, from the receive buffer to its own aligned buffer; the rest of a larger one
//! is received straight into it. A connection that has too much on its way is not read from: that is the back-pressure.

use std::ops::Bound;

use block::{ByteRange, Extent, HostCommand, Monotonic, VolumeId, VolumeIndex};
use bytes::{Bytes, BytesMut};
use control::Peer;
use engine::{CommandId, qos};
use frontend::nbd::{Cookie, Event, ReplyStyle, Transmission};
use store::{Buffer, Operation, Payload, Socket};
use tokio::sync::OwnedSemaphorePermit;

use super::command::HostConnection;
use super::datapath::Pending;
use super::memory::{Owner, charge};
use super::output::Output;
use super::requests::{HostPayload, Parts, Request};
use super::stalled::PROGRESS_BYTES;
use super::tls::TlsSession;
use super::{GroupKey, Shard, holes};

/// Bytes received at once.
const RECEIVE_BYTES: usize = 64 << 10;
/// Bytes received at once behind a large write: what follows is most likely the next one, whose payload should not
/// be copied from here to its own buffer.
const RECEIVE_BYTES_BULKY: usize = 512;
/// A write this large is worth a receive of its own.
const BULKY_BYTES: usize = 16 << 10;
/// Commands of one connection on their way; clients keep far fewer.
const COMMANDS_MAX: usize = 512;

/// A connection on this shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ConnectionId(pub(super) usize);

/// A write whose payload is still arriving.
pub(super) struct Arriving {
    pub(super) cookie: Cookie,
    pub(super) command: HostCommand,
    /// It is in its volume's books already.
    pub(super) reserved: Option<CommandId>,
    /// `None` while the kernel has it.
    pub(super) buffer: Option<Buffer>,
    pub(super) length: usize,
    pub(super) filled: usize,
    /// When the last piece of it was there.
    pub(super) since: Monotonic,
}

/// A command that waits for its memory.
#[derive(Clone, Copy)]
pub(super) struct Waiting {
    cookie: Cookie,
    command: HostCommand,
    /// It has to have its tokens first.
    reserved: Option<CommandId>,
    granted: bool,
}

pub(super) enum Intake {
    /// Nothing is being received: commands or memory are awaited.
    Paused,
    /// A receive is on its way.
    Receiving,
    /// No more is read.
    Ended,
}

/// One host connection.
pub(super) struct Connection {
    pub(super) key: GroupKey,
    pub(super) volume: VolumeIndex,
    pub(super) socket: Socket,
    /// Its TLS, if it is not in clear text.
    pub(super) tls: Option<Box<TlsSession>>,
    transmission: Transmission,
    pub(super) intake: Intake,
    /// The receive buffer while it is not with the kernel, and which part of it is not parsed.
    pub(super) input: Option<Buffer>,
    pub(super) unparsed: std::ops::Range<usize>,
    pub(super) arriving: Option<Arriving>,
    /// The last request was a large write.
    bulky: bool,
    /// The last receive got all that there was.
    quiet: bool,
    pub(super) waiting: Option<Waiting>,
    commands: usize,
    /// Whose memory its commands take.
    pub(super) owner: Owner,
    /// Bytes of its commands on their way, with those of replies that are not sent.
    pub(super) bytes: usize,
    pub(super) output: Output,
    /// When the send on its way began.
    pub(super) sending_since: Monotonic,
    /// Closes as soon as its commands are answered.
    pub(super) ending: bool,
    pub(super) closed: bool,
    /// Its host, and whether it was let in to read only.
    pub(super) peer: Peer,
    pub(super) read_only: bool,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// True if it wants no more, and everything is answered and sent.
    pub(super) fn is_over(&self) -> bool {
        let ended = self.ending || matches!(self.intake, Intake::Ended);
        ended && self.commands == 0 && self.waiting.is_none() && self.output.is_flushed()
    }

    /// True if nothing is left to be sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.output.is_flushed()
    }

    /// The command that waits for nothing but memory.
    pub(super) fn wants_memory(&self) -> Option<HostCommand> {
        let waiting = self.waiting.as_ref()?;
        (waiting.granted || waiting.reserved.is_none()).then_some(waiting.command)
    }

    /// Its host, if that is known.
    pub(super) fn host(&self) -> Option<&str> {
        self.peer.identity.as_ref().map(control::HostIdentity::as_str)
    }
}

impl Shard {
    pub(super) fn connect(&mut self, key: GroupKey, volume: VolumeId, connection: HostConnection) {
        let HostConnection { socket, tls, peer, negotiated, early, place } = connection;
        let index = self.volume_index(key, volume);
        let served = self.groups.get_mut(&key).filter(|served| served.group.is_presented());
        let (Some(index), Some(served)) = (index, served) else {
            // The export went away between the handshake and now; the client sees the connection close.
            let _ = socket.shutdown();
            return;
        };
        let mut input = self.pool.take_over(RECEIVE_BYTES.max(early.len()));
        let parsed = early.len();
        if let Some(start) = input.get_mut(..parsed) {
            start.copy_from_slice(&early);
        }
        let id = ConnectionId(self.connections.insert(Connection {
            key,
            volume: index,
            socket,
            tls,
            transmission: Transmission::new(&negotiated),
            intake: Intake::Paused,
            input: Some(input),
            unparsed: 0..parsed,
            arriving: None,
            bulky: false,
            quiet: true,
            waiting: None,
            commands: 0,
            owner: self.memory.join((key, index)),
            bytes: 0,
            output: Output::default(),
            sending_since: self.now,
            ending: false,
            closed: false,
            peer,
            read_only: negotiated.read_only,
            _place: place,
        }));
        served.connections.insert(id);
        self.parse(id);
    }

    /// Uses what was received, then asks for more.
    pub(super) fn parse(&mut self, id: ConnectionId) {
        loop {
            let Some(connection) = self.connections.get_mut(id.0) else {
                return;
            };
            if connection.closed || connection.waiting.is_some() {
                break;
            }
            if connection.arriving.is_some() {
                // In clear text the kernel receives the rest of a payload; through TLS some of it may be here.
                if self.fill_arriving(id) {
                    continue;
                }
                break;
            }
            if connection.ending || connection.output.is_clogged() {
                return;
            }
            if connection.commands >= COMMANDS_MAX {
                return;
            }
            let Some(input) = &connection.input else { return };
            let unparsed = input.get(connection.unparsed.clone()).unwrap_or_default();
            let parsed = connection.transmission.parse(unparsed);
            connection.unparsed.start += parsed.consumed;
            match parsed.event {
                Event::NeedMore if connection.refill() => {}
                Event::NeedMore => break,
                Event::Request { cookie, command } => {
                    connection.bulky = false;
                    self.begin_command(id, cookie, command);
                }
                Event::WritePayload { cookie, command, length } => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    connection.bulky = length >= BULKY_BYTES;
                    self.begin_command(id, cookie, command);
                }
                Event::Served { cookie } => {
                    let style = connection.transmission.reply_style();
                    style.put_success(connection.output.heads(), cookie);
                    self.flushing.insert(id);
                }
                Event::Refused { cookie, refusal } => {
                    let style = connection.transmission.reply_style();
                    style.put_refusal(connection.output.heads(), cookie, refusal);
                    self.flushing.insert(id);
                }
                Event::Disconnect => {
                    connection.intake = Intake::Ended;
                    self.flushing.insert(id);
                    return;
                }
                Event::Broken(reason) => {
                    tracing::debug!(%reason, "a host's connection is dropped");
                    self.close(id);
                    return;
                }
            }
        }
        self.receive_more(id);
    }

    /// Goes on with a parsed command: it waits for its tokens, if it is a long one of a limited volume, and its memory.
    fn begin_command(&mut self, id: ConnectionId, cookie: Cookie, command: HostCommand) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let (key, volume) = (connection.key, connection.volume);
        connection.waiting = Some(Waiting { cookie, command, reserved: None, granted: false });
        let served = self.groups.get_mut(&key).filter(|_| qos::cost(&command) > 1);
        let Some(served) = served.filter(|served| served.group.wants_reservation(volume, &command)) else {
            return self.take_memory(id);
        };
        connection.commands += 1;
        let number = self.requests.insert(Request::new(id, connection, cookie, command, self.now));
        connection.waiting = Some(Waiting { cookie, command, reserved: Some(number), granted: false });
        served.group.set_clocks(self.now, self.wall);
        served.group.reserve(volume, number, command);
        self.touched.insert(key);
    }

    /// A reserved command has its tokens.
    pub(super) fn granted(&mut self, number: CommandId) {
        let id = self.requests.find(number).and_then(|request| request.connection);
        let Some((id, connection)) = id.and_then(|id| Some((id, self.connections.get_mut(id.0)?))) else {
            return;
        };
        let Some(waiting) = connection.waiting.as_mut().filter(|waiting| waiting.reserved == Some(number))
        else {
            return;
        };
        waiting.granted = true;
        self.take_memory(id);
        self.parse(id);
    }

    /// A waiting command has its memory: a write gets its buffer and what was received of its payload already.
    pub(super) fn has_memory(&mut self, id: ConnectionId) {
        let since = self.now;
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let Some(Waiting { cookie, command, reserved, .. }) = connection.waiting.take() else {
            return;
        };
        let HostCommand::Write { range, .. } = command else {
            return self.submit_command(id, cookie, command, HostPayload::Nothing, reserved);
        };
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
        let mut buffer = self.pool.take_over(length);
        let available = connection.unparsed.len().min(length);
        let start = connection.unparsed.start;
        let received = connection.input.as_ref().and_then(|input| input.get(start..start + available));
        if let (Some(received), Some(target)) = (received, buffer.get_mut(..available)) {
            target.copy_from_slice(received);
        }
        connection.unparsed.start += available;
        if available == length {
            self.submit_command(id, cookie, command, HostPayload::Whole(buffer), reserved);
        } else {
            let buffer = Some(buffer);
            connection.arriving =
                Some(Arriving { cookie, command, reserved, buffer, length, filled: available, since });
        }
    }

    fn receive_more(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let unwanted = connection.closed || connection.ending || connection.waiting.is_some();
        if !matches!(connection.intake, Intake::Paused) || unwanted {
            return;
        }
        let socket = connection.socket.clone();
        let clear = connection.tls.is_none();
        let (pending, buffer, range, fill, quiet) = match &mut connection.arriving {
            Some(arriving) if clear => {
                let Some(buffer) = arriving.buffer.take() else {
                    return;
                };
                let range = arriving.filled..arriving.length.min(arriving.filled + PROGRESS_BYTES);
                (Pending::ReceivePayload { id, asked: range.len() }, buffer, range, true, false)
            }
            Some(_) | None => {
                let Some(input) = connection.input.take() else {
                    return;
                };
                assert!(connection.unparsed.is_empty(), "a parser that needs more has used everything");
                let most = if connection.bulky && clear { RECEIVE_BYTES_BULKY } else { input.len() };
                let range = 0..most.min(input.len());
                (Pending::Receive { id, asked: range.len() }, input, range, false, connection.quiet)
            }
        };
        connection.intake = Intake::Receiving;
        self.submit(pending, Operation::Receive { socket, buffer, range, fill, quiet });
    }

    /// A receive ended: `count` bytes of the `asked` ones came, or it failed.
    pub(super) fn received(&mut self, id: ConnectionId, buffer: Buffer, asked: usize, count: Option<usize>) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let some = count.is_some_and(|count| count > 0);
        connection.quiet = count.is_some_and(|count| count < asked);
        if connection.tls.is_some() && some && !connection.closed {
            return self.opening.push_back((id, buffer, count.unwrap_or(0)));
        }
        connection.input = Some(buffer);
        connection.unparsed = 0..count.unwrap_or(0);
        self.received_some(id, some);
    }

    /// A piece of a payload, of `length` bytes, is there, or cannot be had any more.
    pub(super) fn received_payload(&mut self, id: ConnectionId, buffer: Buffer, length: Option<usize>) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let length = length.filter(|_| !connection.closed);
        if let Some(arriving) = &mut connection.arriving {
            arriving.filled += length.unwrap_or(0);
            arriving.since = now;
            arriving.buffer = Some(buffer);
        }
        let ended = |arriving: &mut Arriving| length.is_none() || arriving.filled == arriving.length;
        if let Some(Arriving { cookie, command, reserved, buffer, .. }) = connection.arriving.take_if(ended) {
            let owner = connection.owner;
            match buffer.filter(|_| length.is_some()) {
                Some(payload) => {
                    self.submit_command(id, cookie, command, HostPayload::Whole(payload), reserved);
                }
                None => self.release_memory(owner, Some(id), charge(&command)),
            }
        }
        self.received_some(id, length.is_some());
    }

    pub(super) fn received_some(&mut self, id: ConnectionId, some: bool) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        if connection.closed || !some {
            connection.intake = Intake::Ended;
            return self.close(id);
        }
        if matches!(connection.intake, Intake::Receiving) {
            connection.intake = Intake::Paused;
        }
        self.parse(id);
    }

    /// Hands a command to its group, which knows a reserved one already.
    pub(super) fn submit_command(
        &mut self,
        id: ConnectionId,
        cookie: Cookie,
        command: HostCommand,
        payload: HostPayload,
        reserved: Option<CommandId>,
    ) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let (key, volume) = (connection.key, connection.volume);
        let number = reserved.unwrap_or_else(|| {
            connection.commands += 1;
            self.requests.insert(Request::new(id, connection, cookie, command, self.now))
        });
        if let Some(request) = self.requests.find_mut(number) {
            request.payload = payload;
            request.charged = charge(&command);
        }
        if let Some(served) = self.groups.get_mut(&key) {
            served.group.set_clocks(self.now, self.wall);
            match reserved {
                Some(_) => served.group.submit_granted(volume, number, command),
                None => served.group.submit(volume, number, command),
            }
            self.touched.insert(key);
        }
    }

    /// Appends the answer to a command; `parts` are a read's bytes.
    /// A read's bytes stay charged until they are sent; all others are released here.
    pub(super) fn reply(&mut self, request: &Request, result: block::HostResult, parts: Parts) {
        let keeps = result.is_ok()
            && matches!(request.command, HostCommand::Read { .. } | HostCommand::Status { .. });
        let connection = request.connection.and_then(|id| self.connections.get(id.0));
        let open = connection.is_some_and(|connection| !connection.closed);
        if !keeps || !open {
            self.release_memory(request.owner, request.connection, request.charged);
        }
        let Some(id) = request.connection.filter(|_| open) else {
            return;
        };
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        connection.commands = connection.commands.saturating_sub(1);
        let style = connection.transmission.reply_style();
        let output = &mut connection.output;
        match (result, request.command) {
            (Err(error), _) => style.put_error(output.heads(), request.cookie, error, &error.to_string()),
            (Ok(()), HostCommand::Read { range }) => {
                let hidden = put_read(output, style, request.cookie, range, parts);
                self.release_memory(request.owner, Some(id), hidden);
            }
            (Ok(()), HostCommand::Status { range, .. }) => {
                let unknown = [Extent { length: range.length(), zero: false }];
                let known = if request.extents.is_empty() { &unknown[..] } else { &request.extents[..] };
                let mut told = BytesMut::new();
                style.put_status(&mut told, request.cookie, known);
                let unused = request.charged.saturating_sub(told.len());
                output.push_data(told.freeze());
                self.release_memory(request.owner, Some(id), unused);
            }
            (
                Ok(()),
                HostCommand::Write { .. }
                | HostCommand::Flush
                | HostCommand::Trim { .. }
                | HostCommand::WriteZeroes { .. }
                | HostCommand::Cache { .. },
            ) => style.put_success(output.heads(), request.cookie),
        }
        self.flushing.insert(id);
    }

    /// Sends what has gathered, one send a connection. Of those through TLS, which have to be sealed, some wait for the
    /// next turn when the budget of this one is used up; the one that was served last comes last.
    pub(super) fn send_replies(&mut self) {
        let flushing = std::mem::take(&mut self.flushing);
        let last = self.sealed_last;
        let after = (Bound::Excluded(last), Bound::Unbounded);
        let mut sealed = false;
        for id in flushing.range(after).chain(flushing.range(..=last)).copied() {
            if self.connections.get(id.0).is_some_and(|connection| connection.tls.is_some()) {
                if sealed && self.budget == 0 {
                    self.flushing.insert(id);
                    continue;
                }
                sealed = true;
                self.sealed_last = id;
            }
            self.send_gathered(id);
            // A connection that was paused by too many commands goes on.
            let connection = self.connections.get(id.0);
            if connection.is_some_and(|connection| connection.waiting.is_some()) {
                self.take_memory(id);
            }
            let idle = self.connections.get(id.0).is_some_and(|connection| {
                matches!(connection.intake, Intake::Paused) && connection.commands < COMMANDS_MAX
            });
            if idle {
                self.parse(id);
            }
        }
    }

    fn send_gathered(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        if connection.closed {
            return;
        }
        if connection.tls.is_some() {
            return self.send_sealed(id);
        }
        if let Some(pieces) = connection.output.begin_send(PROGRESS_BYTES) {
            connection.sending_since = self.now;
            let socket = connection.socket.clone();
            return self
                .submit(Pending::Send { id }, Operation::Send { socket, data: Payload::Many(pieces) });
        }
        if connection.is_over() {
            self.close(id);
        }
    }

    pub(super) fn sent(&mut self, id: ConnectionId, ok: bool, pieces: Vec<Bytes>) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let sent = connection.output.end_send(pieces);
        let over = !ok || connection.closed;
        let owner = connection.owner;
        self.release_memory(owner, Some(id), sent);
        if over {
            return self.close(id);
        }
        self.flushing.insert(id);
    }
}

/// Appends the answer to a read; returns how many of its bytes are not sent, being zeros.
fn put_read(output: &mut Output, style: ReplyStyle, cookie: Cookie, range: ByteRange, parts: Parts) -> usize {
    if !style.may_fragment(cookie) || !holes::has_zeros(&parts) {
        style.put_read_head(output.heads(), cookie, range);
        parts.into_ordered().for_each(|(_, data)| output.push_data(data));
        return 0;
    }
    let mut hidden = 0;
    for (piece, content) in holes::cut(range, parts) {
        let last = piece.end() == range.end();
        if let Some(data) = content {
            style.put_read_data_head(output.heads(), cookie, piece, last);
            output.push_data(data);
        } else {
            style.put_read_hole(output.heads(), cookie, piece, last);
            hidden += usize::try_from(piece.length()).unwrap_or(usize::MAX);
        }
    }
    hidden
}
