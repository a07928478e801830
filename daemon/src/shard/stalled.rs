//! Hosts that hold memory of requests and move no bytes, while others wait for that memory.
//!
//! A payload that arrives, and replies that are not read, hold memory as long as their host pleases. That is nobody's
//! business until memory runs out. From then on a host has to move [`PROGRESS_BYTES`], or what is left of its payload or
//! its replies, within the stall time; otherwise its connection is closed, the longest stalled first, no more of them
//! than whoever waits needs, and one at a time for those who wait for their volume's share. Payloads are received, and replies sent, in pieces of that length, so that the end of each
//! is seen.

use std::time::Duration;

use block::Monotonic;

use super::Shard;
use super::connection::{Connection, ConnectionId};

/// What a host must move within the stall time.
pub(super) const PROGRESS_BYTES: usize = 2 << 20;
/// How often the waiting connections have the others looked at.
const CHECK_PAUSE: Duration = Duration::from_secs(1);

impl Connection {
    /// Since when its host has been to move the next piece, if it is its host's turn and it holds memory.
    fn awaited_since(&self) -> Option<Monotonic> {
        if self.closed || self.bytes == 0 {
            return None;
        }
        let payload = self.arriving.as_ref().map(|arriving| arriving.since);
        let replies = self.output.is_sending().then_some(self.sending_since);
        payload.into_iter().chain(replies).min()
    }
}

impl Shard {
    /// Closes stalled connections as far as others need their memory.
    pub(super) fn end_stalled(&mut self) {
        if self.memory.is_enough() {
            self.stall_check_at = None;
            return;
        }
        let now = self.now;
        if now < *self.stall_check_at.get_or_insert(now + CHECK_PAUSE) {
            return;
        }
        self.stall_check_at = Some(now + CHECK_PAUSE);
        let stall = self.limits.stall;
        let awaited = self.connections.iter().filter_map(|(place, connection)| {
            let since = connection.awaited_since().filter(|since| now.since(*since) >= stall)?;
            Some((since, ConnectionId(place), connection.bytes))
        });
        let mut stalled: Vec<_> = awaited.collect();
        stalled.sort_unstable();
        let mut missing = self.missing_bytes();
        let mut full = self.memory.full_volumes();
        for (since, id, held) in stalled {
            let owner = self.connections.get(id.0).map(|connection| connection.owner);
            if missing == 0 && !owner.is_some_and(|owner| full.remove(&owner)) {
                continue;
            }
            missing = missing.saturating_sub(held);
            self.tell_stalled(id, now.since(since), held);
            self.close(id);
        }
    }

    fn tell_stalled(&self, id: ConnectionId, time: Duration, held: usize) {
        let Some(connection) = self.connections.get(id.0) else {
            return;
        };
        let volume = self.groups.get(&connection.key).and_then(|served| {
            served.volumes.get(usize::from(connection.volume.0)).map(|volume| volume.files.name.as_str())
        });
        let host = connection.host();
        tracing::warn!(
            volume = volume.unwrap_or_default(),
            host = host.unwrap_or_default(),
            bytes = held,
            seconds = time.as_secs(),
            "a host is disconnected: it moves no bytes, and others wait for the memory that it holds"
        );
    }
}
