//! Connections through TLS: what is received is opened before it is parsed, what is sent is sealed after it is gathered.
//!
//! A receive buffer holds ciphertext until the session has taken all of it, and plaintext from then on; what does not
//! fit in it waits in the session, and nothing more is received before it is used.

use bytes::{Bytes, BytesMut};
use store::{Buffer, Operation, Payload};

use super::Shard;
use super::connection::{Arriving, Connection, ConnectionId, Intake};
use super::datapath::Pending;
use super::requests::HostPayload;
use super::sealing::{self, TURN_BYTES};
use super::stalled::PROGRESS_BYTES;

/// Bytes of replies sealed for one send, also by a turn that has used up its budget: each turn serves one connection.
const SEALED_BYTES_MAX: usize = 256 << 10;
const SEALED_BYTES_MIN: usize = 64 << 10;
/// What opening leaves of a turn's budget, for the commands that came earlier.
const BUDGET_LEFT: usize = TURN_BYTES / 2;

impl Connection {
    /// Moves plaintext that waits in the session to the input buffer, which is used up; false if there is none.
    pub(super) fn refill(&mut self) -> bool {
        let (Some(tls), Some(input)) = (&mut self.tls, &mut self.input) else {
            return false;
        };
        self.unparsed = 0..tls.read(input);
        !self.unparsed.is_empty()
    }
}

impl Shard {
    /// Opens what connections through TLS received, in its order, within the turn's budget.
    pub(super) fn open_received(&mut self) {
        while self.budget > BUDGET_LEFT
            && let Some((id, buffer, count)) = self.opening.pop_front()
        {
            self.budget = sealing::less(self.budget, count);
            self.received_sealed(id, buffer, count);
        }
    }

    fn received_sealed(&mut self, id: ConnectionId, buffer: Buffer, count: usize) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        if connection.closed {
            return self.received_some(id, false);
        }
        let Some(tls) = &mut connection.tls else { return };
        let progress = tls.received(buffer.get(..count).unwrap_or_default());
        connection.input = Some(buffer);
        connection.unparsed = 0..0;
        match progress {
            Ok(progress) => {
                connection.intake = if progress.closed { Intake::Ended } else { Intake::Paused };
                // Also to answer the session itself, and to end a connection that its host has ended.
                self.flushing.insert(id);
                self.received_some(id, true);
            }
            Err(error) => {
                tracing::debug!(%error, "a host's connection is dropped");
                connection.intake = Intake::Ended;
                self.close(id);
            }
        }
    }

    /// Fills a payload with plaintext that is here; true if it is whole, and on its way.
    pub(super) fn fill_arriving(&mut self, id: ConnectionId) -> bool {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(id.0) else {
            return false;
        };
        let (Some(tls), Some(arriving)) = (&mut connection.tls, &mut connection.arriving) else {
            return false;
        };
        let Some(buffer) = &mut arriving.buffer else {
            return false;
        };
        let filled = arriving.filled;
        arriving.filled += tls.read(buffer.get_mut(filled..).unwrap_or_default());
        if arriving.filled / PROGRESS_BYTES > filled / PROGRESS_BYTES {
            arriving.since = now;
        }
        let whole = connection.arriving.take_if(|arriving| arriving.filled == arriving.length);
        match whole {
            Some(Arriving { cookie, command, reserved, buffer: Some(payload), .. }) => {
                self.submit_command(id, cookie, command, HostPayload::Whole(payload), reserved);
                true
            }
            Some(Arriving { buffer: None, .. }) | None => false,
        }
    }

    /// Sends what has gathered, and what the session has to say by itself.
    pub(super) fn send_sealed(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let over = connection.is_over();
        if !connection.output.is_sending() {
            connection.sending_since = self.now;
        }
        let most = self.budget.clamp(SEALED_BYTES_MIN, SEALED_BYTES_MAX);
        let Some(tls) = &mut connection.tls else { return };
        let mut sealed = BytesMut::new();
        let outcome = if let Some(pieces) = connection.output.begin_send(most) {
            let length: usize = pieces.iter().map(Bytes::len).sum();
            self.budget = sealing::less(self.budget, length);
            tls.seal(&pieces, &mut sealed)
        } else if !connection.output.is_sending() {
            let outcome =
                if over && !tls.has_ended() { tls.close(&mut sealed) } else { tls.take_output(&mut sealed) };
            if !sealed.is_empty() {
                connection.output.begin_other();
            }
            outcome
        } else {
            return;
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a host's connection is dropped");
            if connection.output.is_sending() {
                let charged = connection.output.end_send(Vec::new());
                let owner = connection.owner;
                self.release_memory(owner, Some(id), charged);
            }
            return self.close(id);
        }
        if sealed.is_empty() {
            if over {
                self.close(id);
            }
            return;
        }
        let socket = connection.socket.clone();
        let data = Payload::Many(vec![Bytes::from(sealed)]);
        self.submit(Pending::Send { id }, Operation::Send { socket, data });
    }
}
