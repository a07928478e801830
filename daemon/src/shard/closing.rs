//! The ends of host connections: one that failed, those of a group, those that lost their access.

use block::VolumeId;
use control::VolumeAccess;

use super::connection::{ConnectionId, Intake};
use super::memory::charge;
use super::{GroupKey, Shard};

impl Shard {
    /// Closes a connection: commands that have not begun are dropped, the others end without a reply.
    pub(super) fn close(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        if !connection.closed {
            connection.closed = true;
            let _ = connection.socket.shutdown();
            let key = connection.key;
            connection.waiting = None;
            let unsent = connection.output.abandon();
            // What the kernel has comes back first.
            let arriving = connection.arriving.take_if(|arriving| arriving.buffer.is_some());
            let arriving = arriving.map_or(0, |arriving| charge(&arriving.command));
            let owner = connection.owner;
            self.release_memory(owner, Some(id), unsent + arriving);
            self.memory.give_up(owner, id);
            self.forget_requests(id);
            if let Some(served) = self.groups.get_mut(&key) {
                served.connections.remove(&id);
                self.touched.insert(key);
            }
        }
        let Some(connection) = self.connections.get(id.0) else {
            return;
        };
        if !connection.output.is_sending() && !matches!(connection.intake, Intake::Receiving) {
            let owner = connection.owner;
            self.connections.remove(id.0);
            self.memory.leave(owner);
            self.flushing.remove(&id);
        }
    }

    /// Ends a group's connections once their commands are answered: no more is read from them.
    pub(super) fn end_connections(&mut self, key: GroupKey) {
        let ids: Vec<ConnectionId> = self
            .groups
            .get(&key)
            .map(|served| served.connections.iter().copied().collect())
            .unwrap_or_default();
        for id in ids {
            if let Some(connection) = self.connections.get_mut(id.0) {
                connection.ending = true;
                self.flushing.insert(id);
            }
        }
    }

    /// Closes the connections to a volume whose hosts may not have them any more.
    pub(super) fn apply_access(&mut self, key: GroupKey, volume: VolumeId, access: &VolumeAccess) {
        let (Some(index), Some(served)) = (self.volume_index(key, volume), self.groups.get(&key)) else {
            return;
        };
        let lost = |id: &&ConnectionId| {
            self.connections.get(id.0).is_some_and(|connection| {
                connection.volume == index && !access.permits(&connection.peer, connection.read_only)
            })
        };
        let lost: Vec<ConnectionId> = served.connections.iter().filter(lost).copied().collect();
        if !lost.is_empty() {
            tracing::info!(count = lost.len(), "host connections are closed: their access was taken back");
        }
        for id in lost {
            self.close(id);
        }
    }

    /// Closes a group's connections at once.
    pub(super) fn close_connections(&mut self, key: GroupKey, reason: &str) {
        let ids: Vec<ConnectionId> = self
            .groups
            .get(&key)
            .map(|served| served.connections.iter().copied().collect())
            .unwrap_or_default();
        if !ids.is_empty() {
            tracing::info!(count = ids.len(), reason, "host connections are closed");
        }
        for id in ids {
            self.close(id);
        }
    }
}
