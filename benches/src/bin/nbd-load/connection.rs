//! One connection in the transmission phase: requests out, simple replies in, without waiting for either.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;

use crate::meter::Meter;
use crate::offsets::Offsets;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// Writes gathered into one system call: more than a socket's buffer takes of 4 KiB payloads.
const GATHER_MAX: usize = 64;

/// What each request of a connection is.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) writes: bool,
    pub(crate) block_bytes: u32,
}

/// A connection and the requests it has in flight.
pub(crate) struct Connection {
    socket: OwnedFd,
    /// Which of the command line's targets this is a connection to.
    pub(crate) target: usize,
    shape: Shape,
    offsets: Offsets,
    /// When the request of each cookie was made; none if the cookie is free.
    started: Vec<Option<Instant>>,
    free: Vec<u64>,
    /// Requests that are not sent yet, and how much of the first one is, payload included.
    outgoing: VecDeque<[u8; REQUEST_BYTES]>,
    sent_bytes: usize,
    incoming: Incoming,
    last_completion: Option<Instant>,
    pub(crate) completions: u64,
}

/// How far the next reply has arrived.
enum Incoming {
    Header { bytes: [u8; REPLY_BYTES], arrived: usize },
    Payload { cookie: u64, missing: usize },
}

const NO_HEADER: Incoming = Incoming::Header { bytes: [0; REPLY_BYTES], arrived: 0 };

impl Connection {
    /// A connection over a socket that does not block, with `queue_depth` cookies.
    pub(crate) fn new(
        socket: OwnedFd,
        target: usize,
        shape: Shape,
        offsets: Offsets,
        queue_depth: u16,
    ) -> Self {
        Self {
            socket,
            target,
            shape,
            offsets,
            started: vec![None; usize::from(queue_depth)],
            free: (0..u64::from(queue_depth)).rev().collect(),
            outgoing: VecDeque::with_capacity(usize::from(queue_depth)),
            sent_bytes: 0,
            incoming: NO_HEADER,
            last_completion: None,
            completions: 0,
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.started.len() - self.free.len()
    }

    /// Makes a request of each free cookie, as long as there are offsets.
    pub(crate) fn fill(&mut self, now: Instant) {
        let kind = if self.shape.writes { COMMAND_WRITE } else { COMMAND_READ };
        while let Some(cookie) = self.free.last().copied() {
            let Some(offset) = self.offsets.next() else { break };
            self.free.pop();
            let slot = usize::try_from(cookie).ok().and_then(|index| self.started.get_mut(index));
            *slot.expect("each cookie has a slot") = Some(now);
            self.outgoing.push_back(request(kind, cookie, offset, self.shape.block_bytes));
        }
    }

    /// Sends what the socket takes; true if nothing is left.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn send(&mut self, payload: &[u8]) -> Result<bool> {
        let payload_bytes = if self.shape.writes { payload.len() } else { 0 };
        while !self.outgoing.is_empty() {
            match self.send_once(payload) {
                Ok(bytes) => self.sent_bytes += bytes,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("the server is gone"),
            }
            let whole = self.sent_bytes / (REQUEST_BYTES + payload_bytes);
            self.outgoing.drain(..whole);
            self.sent_bytes %= REQUEST_BYTES + payload_bytes;
        }
        Ok(true)
    }

    fn send_once(&self, payload: &[u8]) -> Result<usize, Errno> {
        if self.shape.writes {
            let messages = self.outgoing.iter().take(GATHER_MAX);
            let mut slices: Vec<_> =
                messages.flat_map(|message| [IoSlice::new(message), IoSlice::new(payload)]).collect();
            let mut slices = slices.as_mut_slice();
            IoSlice::advance_slices(&mut slices, self.sent_bytes);
            return rustix::io::writev(&self.socket, slices);
        }
        let (front, back) = self.outgoing.as_slices();
        let mut slices = [IoSlice::new(front.as_flattened()), IoSlice::new(back.as_flattened())];
        let mut slices = slices.as_mut_slice();
        IoSlice::advance_slices(&mut slices, self.sent_bytes);
        rustix::io::writev(&self.socket, slices)
    }

    /// Takes what has arrived, as much as `buffer` holds, and tells the meter what has completed.
    ///
    /// # Errors
    /// When the connection is broken or the server does not speak the protocol.
    pub(crate) fn receive(&mut self, buffer: &mut [u8], meter: &mut Meter) -> Result<()> {
        let arrived = match rustix::io::read(&self.socket, &mut *buffer) {
            Ok(0) => bail!("the server has closed a connection with {} requests in flight", self.in_flight()),
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error).context("the server is gone"),
        };
        let now = Instant::now();
        let (mut bytes, _) = buffer.split_at(arrived);
        while !bytes.is_empty() {
            bytes = match self.incoming {
                Incoming::Header { .. } => self.take_header(bytes, now, meter)?,
                Incoming::Payload { cookie, missing } => {
                    let (_, rest) = bytes.split_at(missing.min(bytes.len()));
                    let missing = missing - (bytes.len() - rest.len());
                    self.incoming = Incoming::Payload { cookie, missing };
                    if missing == 0 {
                        self.complete(cookie, 0, now, meter)?;
                    }
                    rest
                }
            };
        }
        Ok(())
    }

    /// Takes a part of a header or a whole one; returns the bytes behind it.
    fn take_header<'a>(&mut self, from: &'a [u8], now: Instant, meter: &mut Meter) -> Result<&'a [u8]> {
        let Incoming::Header { bytes, arrived } = &mut self.incoming else { return Ok(from) };
        let (_, room) = bytes.split_at_mut(*arrived);
        let (part, rest) = from.split_at(room.len().min(from.len()));
        for (place, byte) in room.iter_mut().zip(part) {
            *place = *byte;
        }
        *arrived += part.len();
        if *arrived < REPLY_BYTES {
            return Ok(rest);
        }
        let header = u128::from_be_bytes(*bytes);
        let magic = u32::try_from(header >> 96)?;
        let errno = u32::try_from((header >> 64) & u128::from(u32::MAX))?;
        let cookie = u64::try_from(header & u128::from(u64::MAX))?;
        ensure!(magic == REPLY_MAGIC, "the server sent {magic:#x} where a reply begins");
        if errno == 0 && !self.shape.writes {
            let missing = usize::try_from(self.shape.block_bytes)?;
            self.incoming = Incoming::Payload { cookie, missing };
        } else {
            self.complete(cookie, errno, now, meter)?;
        }
        Ok(rest)
    }

    fn complete(&mut self, cookie: u64, errno: u32, now: Instant, meter: &mut Meter) -> Result<()> {
        let slot = usize::try_from(cookie).ok().and_then(|index| self.started.get_mut(index));
        let started = slot.and_then(Option::take).context("the server replied to a request nobody made")?;
        self.free.push(cookie);
        self.incoming = NO_HEADER;
        if errno != 0 {
            meter.refuse(errno);
        } else if meter.complete(started, self.last_completion, now) {
            self.completions += 1;
        }
        self.last_completion = Some(now);
        Ok(())
    }

    /// Says good-bye, if the socket takes it at once.
    pub(crate) fn disconnect(self) {
        let _sent = rustix::io::write(&self.socket, &request(COMMAND_DISCONNECT, 0, 0, 0));
    }
}

fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let fields = [
        &REQUEST_MAGIC.to_be_bytes()[..],
        &[0, 0],
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (place, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *place = *byte;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::{Connection, Offsets, REQUEST_BYTES, Shape};
    use crate::meter::Meter;

    fn pair(writes: bool, block_bytes: u32, depth: u16) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let offsets = Offsets::around(u64::from(block_bytes), 100, 0);
        (Connection::new(ours.into(), 0, Shape { writes, block_bytes }, offsets, depth), theirs)
    }

    fn reply(cookie: u64, errno: u32) -> Vec<u8> {
        [&[0x67, 0x44, 0x66, 0x98], &errno.to_be_bytes()[..], &cookie.to_be_bytes()].concat()
    }

    #[test]
    fn replies_may_arrive_in_any_pieces() {
        let (mut connection, mut server) = pair(false, 20, 3);
        let mut meter = Meter::new(false);
        meter.start();
        connection.fill(Instant::now());
        assert!(connection.send(&[]).unwrap());
        let mut requests = [0; 3 * REQUEST_BYTES];
        server.read_exact(&mut requests).unwrap();
        assert_eq!(requests[REQUEST_BYTES..][..28], super::request(0, 1, 20, 20));
        let answer = [reply(2, 0), vec![9; 20], reply(0, 28), reply(1, 0), vec![9; 20]].concat();
        let mut buffer = [0; 64];
        for (index, piece) in answer.chunks(7).enumerate() {
            server.write_all(piece).unwrap();
            connection.receive(&mut buffer, &mut meter).unwrap();
            assert!(connection.in_flight() > 0 || index == answer.chunks(7).count() - 1);
        }
        assert_eq!((connection.in_flight(), connection.completions), (0, 2));
        assert_eq!((meter.errors, meter.first_errno), (1, Some(28)));
    }

    #[test]
    fn a_full_socket_loses_no_byte_of_a_write() {
        let (mut connection, mut server) = pair(true, 100_000, 8);
        let payload: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        connection.fill(Instant::now());
        let mut expected = Vec::new();
        for cookie in 0..8 {
            expected.extend(super::request(1, cookie, cookie * 100_000, 100_000));
            expected.extend(&payload);
        }
        let mut received: Vec<u8> = Vec::new();
        let mut chunk = vec![0; 50_001];
        while received.len() < expected.len() {
            connection.send(&payload).unwrap();
            let count = server.read(&mut chunk).unwrap();
            received.extend(&chunk[..count]);
        }
        assert!(received == expected);
        assert!(connection.send(&payload).unwrap());
    }

    #[test]
    fn unknown_cookies_wrong_magic_and_the_end_are_errors() {
        for answer in [reply(7, 0), vec![1; 16], Vec::new()] {
            let (mut connection, mut server) = pair(true, 512, 1);
            connection.fill(Instant::now());
            server.write_all(&answer).unwrap();
            drop(server);
            assert!(connection.receive(&mut [0; 64], &mut Meter::new(false)).is_err(), "{answer:?}");
        }
    }
}
