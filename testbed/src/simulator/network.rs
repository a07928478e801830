//! Virtual sessions as QUIC gives them: each side has two ordered, reliable streams, control and data, whose mutual
//! order is arbitrary; a session can be cut at any moment, and its two sides learn of it at different times.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

/// Which stream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Control,
    Data,
}

#[derive(Debug, Default)]
struct Direction {
    queues: [VecDeque<Bytes>; 2],
    last: [u64; 2],
}

/// One side of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side {
    pub(super) site: usize,
    /// The process of that site to which the session belongs.
    pub(super) process: u64,
    pub(super) open: bool,
}

/// A session; side 0 dialed.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) sides: [Side; 2],
    /// By the receiving side.
    directions: [Direction; 2],
    /// Nothing is delivered any more.
    pub(super) severed: bool,
    pub(super) greeted: bool,
}

/// All sessions and the link between the sites.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) sessions: BTreeMap<u64, Session>,
    last: u64,
    pub(super) up: bool,
    /// The shortest and the longest one-way delay in nanoseconds.
    pub(super) delay: (u64, u64),
}

impl Network {
    pub(super) const fn new() -> Self {
        Self { sessions: BTreeMap::new(), last: 0, up: true, delay: (50_000, 500_000) }
    }

    pub(super) fn open(&mut self, dialer: Side, acceptor: Side) -> u64 {
        self.last += 1;
        let session = Session {
            sides: [dialer, acceptor],
            directions: [Direction::default(), Direction::default()],
            severed: false,
            greeted: false,
        };
        self.sessions.insert(self.last, session);
        self.last
    }

    /// Queues a frame; gives the time at which one frame of that stream is to be delivered.
    pub(super) fn send(
        &mut self,
        session: u64,
        to: usize,
        stream: Stream,
        frame: Bytes,
        at: u64,
    ) -> Option<u64> {
        let session = self.sessions.get_mut(&session).filter(|session| !session.severed)?;
        let direction = &mut session.directions[to];
        let index = index(stream);
        direction.queues[index].push_back(frame);
        direction.last[index] = direction.last[index].max(at) + 1;
        Some(direction.last[index])
    }

    pub(super) fn receive(&mut self, session: u64, to: usize, stream: Stream) -> Option<Bytes> {
        let session = self.sessions.get_mut(&session)?;
        session.directions[to].queues[index(stream)].pop_front()
    }

    /// The side of `session` that `site` holds, if its process still is `process`.
    pub(super) fn side_of(&self, session: u64, site: usize, process: u64) -> Option<usize> {
        let session = self.sessions.get(&session)?;
        session.sides.iter().position(|side| side.site == site && side.process == process && side.open)
    }
}

const fn index(stream: Stream) -> usize {
    match stream {
        Stream::Control => 0,
        Stream::Data => 1,
    }
}
