//! Host commands on their way, by a number that is never used twice.

use block::{Extent, HostCommand, Monotonic, VolumeIndex};
use bytes::Bytes;
use engine::{Arena, CommandId};
use frontend::nbd::Cookie;
use store::Buffer;

use super::GroupKey;
use super::connection::{Connection, ConnectionId};
use super::memory::Owner;

/// A write command's bytes.
pub(super) enum HostPayload {
    /// No payload: reads, flushes, trims, zeroes; or it was taken.
    Nothing,
    /// All of it, in memory that nobody else sees.
    Whole(Buffer),
}

/// A host's command on its way.
pub(super) struct Request {
    pub(super) connection: Option<ConnectionId>,
    /// Whose memory it takes, and how much.
    pub(super) owner: Owner,
    pub(super) charged: usize,
    pub(super) key: GroupKey,
    pub(super) volume: VolumeIndex,
    pub(super) cookie: Cookie,
    pub(super) command: HostCommand,
    pub(super) payload: HostPayload,
    /// A read's bytes as its steps end.
    pub(super) parts: Parts,
    /// The answer to a status command.
    pub(super) extents: Vec<Extent>,
    pub(super) started: Monotonic,
}

impl Request {
    /// A command that has neither memory nor payload yet.
    pub(super) fn new(
        id: ConnectionId,
        connection: &Connection,
        cookie: Cookie,
        command: HostCommand,
        started: Monotonic,
    ) -> Self {
        Self {
            connection: Some(id),
            owner: connection.owner,
            charged: 0,
            key: connection.key,
            volume: connection.volume,
            cookie,
            command,
            payload: HostPayload::Nothing,
            parts: Parts::default(),
            extents: Vec::new(),
            started,
        }
    }
}

/// Pieces of a read, each with its offset. Most reads have one, which needs no allocation.
#[derive(Default)]
pub(super) struct Parts {
    first: Option<(u64, Bytes)>,
    others: Vec<(u64, Bytes)>,
}

impl Parts {
    pub(super) fn push(&mut self, offset: u64, data: Bytes) {
        if self.first.is_none() {
            self.first = Some((offset, data));
        } else {
            self.others.push((offset, data));
        }
    }

    /// The pieces as they came.
    pub(super) fn iter(&self) -> impl Iterator<Item = &(u64, Bytes)> {
        self.first.iter().chain(&self.others)
    }

    /// The pieces in ascending order.
    pub(super) fn into_ordered(mut self) -> impl Iterator<Item = (u64, Bytes)> {
        if let (Some(first), false) = (&mut self.first, self.others.is_empty()) {
            self.others.sort_by_key(|(offset, _)| *offset);
            if let Some(lowest) = self.others.first_mut().filter(|other| other.0 < first.0) {
                std::mem::swap(first, lowest);
                self.others.sort_by_key(|(offset, _)| *offset);
            }
        }
        self.first.into_iter().chain(self.others)
    }
}

/// All requests of a shard.
#[derive(Default)]
pub(super) struct Requests(Arena<Request>);

impl Requests {
    pub(super) fn insert(&mut self, request: Request) -> CommandId {
        CommandId(self.0.insert(request))
    }

    pub(super) fn find(&self, id: CommandId) -> Option<&Request> {
        self.0.find(id.0)
    }

    pub(super) fn find_mut(&mut self, id: CommandId) -> Option<&mut Request> {
        self.0.find_mut(id.0)
    }

    pub(super) fn remove(&mut self, id: CommandId) -> Option<Request> {
        self.0.remove(id.0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (CommandId, &Request)> {
        self.0.iter().map(|(number, request)| (CommandId(number), request))
    }
}

#[cfg(test)]
mod tests {
    use block::ByteRange;

    use super::super::memory::RequestMemory;
    use super::*;

    fn request(offset: u64) -> Request {
        let range = ByteRange::new(offset, 1).unwrap();
        Request {
            connection: None,
            owner: RequestMemory::new(0).join((GroupKey(0), VolumeIndex(0))),
            charged: 0,
            key: GroupKey(0),
            volume: VolumeIndex(0),
            cookie: Cookie::default(),
            command: HostCommand::Read { range },
            payload: HostPayload::Nothing,
            parts: Parts::default(),
            extents: Vec::new(),
            started: Monotonic(0),
        }
    }

    #[test]
    fn a_late_answer_does_not_meet_the_next_request_in_its_place() {
        let mut requests = Requests::default();
        let old = requests.insert(request(1));
        assert!(requests.remove(old).is_some());
        let new = requests.insert(request(2));
        assert_eq!(old.0 % (1 << 24), new.0 % (1 << 24), "the same place");
        assert!(requests.find(old).is_none() && requests.remove(old).is_none());
        assert!(requests.find_mut(new).is_some_and(|request| request.command.range().unwrap().offset() == 2));
    }

    #[test]
    fn parts_come_in_order_however_they_ended() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut parts = Parts::default();
            order.iter().for_each(|offset| parts.push(*offset, Bytes::new()));
            let offsets: Vec<u64> = parts.into_ordered().map(|(offset, _)| offset).collect();
            assert_eq!(offsets, [0, 1, 2]);
        }
    }
}
