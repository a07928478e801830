//! What a ring can be asked to do, and what comes back.

use std::io;
use std::ops::Range;

use block::Extent;

use crate::{Buffer, File, Payload, Socket};

/// The caller's name for an operation; the ring only hands it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// One thing for the kernel to do. Operations run in any order, side by side: where order matters, submit the
/// second after the first completed.
#[derive(Debug)]
pub enum Operation {
    /// Fills `buffer[range]` from `offset`. Completes in full (result: the range's length) or fails; a file that
    /// ends earlier is [`UnexpectedEof`](io::ErrorKind::UnexpectedEof). O_DIRECT wants offset, range start and
    /// range length in multiples of the device's logical block; 4096 always serves.
    Read {
        /// Where from.
        file: File,
        /// First byte in the file.
        offset: u64,
        /// Where to; comes back in the completion.
        buffer: Buffer,
        /// The part of the buffer to fill.
        range: Range<usize>,
    },
    /// Writes `data` at `offset`. Completes in full (result: the payload's length) or fails; a failed write may
    /// have changed any part of the range. Alignment as for reads, for each piece.
    Write {
        /// Where to.
        file: File,
        /// First byte in the file.
        offset: u64,
        /// What; comes back in the completion.
        data: Payload,
        /// Complete only when the data is on stable media (RWF_DSYNC).
        durable: bool,
    },
    /// Makes the writes that completed before this was submitted durable (fdatasync). Says nothing of others.
    Fdatasync {
        /// The file.
        file: File,
    },
    /// Makes a range read as zeros and keeps its space allocated (fallocate ZERO_RANGE; PUNCH_HOLE and a new
    /// allocation where a file system knows only these, as tmpfs does). Not durable by itself. A file system
    /// that can do neither fails it with EOPNOTSUPP, with the range unchanged: write zeros instead.
    ZeroRange {
        /// The file.
        file: File,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Asks for the range to be read into the page cache (fadvise WILLNEED); does not wait for it.
    Prefetch {
        /// The file.
        file: File,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Finds which parts of the range are known to read as zeros. Gives [`Returned::Extents`]: they start at
    /// `offset`, alternate, and cover the range unless there are more than `extents_max`, which is at least 1.
    Survey {
        /// The file.
        file: File,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// The most extents wanted.
        extents_max: usize,
    },
    /// Receives into `buffer[range]`, which is not empty. Result: the bytes received, 0 if the peer closed.
    /// At most one receive may be in flight per socket.
    Receive {
        /// The connection.
        socket: Socket,
        /// Where to; comes back in the completion.
        buffer: Buffer,
        /// The part of the buffer to fill.
        range: Range<usize>,
        /// Complete only when the range is full, or with less if the peer closed. Otherwise whatever is there
        /// completes it.
        fill: bool,
        /// Nothing is likely there yet: wait for the socket before the first attempt, which saves that one (Linux
        /// 6.1 on). Makes no other difference.
        quiet: bool,
    },
    /// Sends the whole payload (result: its length) or fails; after a failure an unknown part was sent, so the
    /// stream is of no more use. At most one send may be in flight per socket: two would interleave.
    Send {
        /// The connection.
        socket: Socket,
        /// What; comes back in the completion.
        data: Payload,
    },
}

/// The end of an operation.
#[derive(Debug)]
#[must_use]
pub struct Completion {
    /// The token that the operation was submitted with.
    pub token: Token,
    /// Bytes transferred (0 for operations that transfer none), or the error, with the kernel's errno.
    pub result: io::Result<usize>,
    /// The memory that the operation had borrowed.
    pub returned: Returned,
}

/// Memory that a completed operation gives back.
#[derive(Debug)]
pub enum Returned {
    /// The operation had none.
    Nothing,
    /// The buffer of a read or receive.
    Buffer(Buffer),
    /// The payload of a write or send.
    Payload(Payload),
    /// What a survey found.
    Extents(Vec<Extent>),
}

impl Returned {
    /// The buffer, if there is one.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Buffer(buffer) => Some(buffer),
            Self::Nothing | Self::Payload(_) | Self::Extents(_) => None,
        }
    }

    /// The payload, if there is one.
    pub fn into_payload(self) -> Option<Payload> {
        match self {
            Self::Payload(payload) => Some(payload),
            Self::Nothing | Self::Buffer(_) | Self::Extents(_) => None,
        }
    }
}

impl Operation {
    /// Asserts what the caller must guarantee, and claims the socket's direction.
    pub(crate) fn admit(&self) {
        match self {
            Self::Read { offset, buffer, range, .. } => {
                assert_within(range, buffer);
                assert_offsets(*offset, u64::try_from(range.len()).unwrap_or(u64::MAX));
            }
            Self::Receive { socket, buffer, range, .. } => {
                assert_within(range, buffer);
                assert!(!range.is_empty(), "an empty receive would look like a closed peer");
                assert!(socket.claim_receive(), "two receives on one socket");
            }
            Self::Send { socket, .. } => assert!(socket.claim_send(), "two sends on one socket"),
            Self::Write { offset, data, .. } => {
                assert_offsets(*offset, u64::try_from(data.length()).unwrap_or(u64::MAX));
            }
            Self::ZeroRange { offset, length, .. }
            | Self::Prefetch { offset, length, .. }
            | Self::Survey { offset, length, .. } => assert_offsets(*offset, *length),
            Self::Fdatasync { .. } => {}
        }
    }

    /// True if it may be given up: a stream's receive or send. Disk operations always run to their end.
    pub(crate) fn is_cancellable(&self) -> bool {
        match self {
            Self::Receive { .. } | Self::Send { .. } => true,
            Self::Read { .. }
            | Self::Write { .. }
            | Self::Fdatasync { .. }
            | Self::ZeroRange { .. }
            | Self::Prefetch { .. }
            | Self::Survey { .. } => false,
        }
    }

    /// Bytes to transfer; `None` if the operation transfers none.
    pub(crate) fn length(&self) -> Option<usize> {
        match self {
            Self::Read { range, .. } | Self::Receive { range, .. } => Some(range.len()),
            Self::Write { data, .. } | Self::Send { data, .. } => Some(data.length()),
            Self::Fdatasync { .. } | Self::ZeroRange { .. } | Self::Prefetch { .. } | Self::Survey { .. } => {
                None
            }
        }
    }

    /// Releases the socket's direction and gives the memory back.
    pub(crate) fn into_returned(self) -> Returned {
        match self {
            Self::Read { buffer, .. } => Returned::Buffer(buffer),
            Self::Write { data, .. } => Returned::Payload(data),
            Self::Fdatasync { .. } | Self::ZeroRange { .. } | Self::Prefetch { .. } | Self::Survey { .. } => {
                Returned::Nothing
            }
            Self::Receive { socket, buffer, .. } => {
                socket.release_receive();
                Returned::Buffer(buffer)
            }
            Self::Send { socket, data } => {
                socket.release_send();
                Returned::Payload(data)
            }
        }
    }
}

fn assert_within(range: &Range<usize>, buffer: &Buffer) {
    assert!(
        range.start <= range.end && range.end <= buffer.len(),
        "{range:?} of a buffer of {} bytes",
        buffer.len()
    );
}

/// Files end below 2^63; and the offset 2^64-1 would mean the file's position to the kernel.
fn assert_offsets(offset: u64, length: u64) {
    let end = offset.checked_add(length);
    assert!(end.is_some_and(|end| i64::try_from(end).is_ok()), "{length} bytes at {offset} of a file");
}
