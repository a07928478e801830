//! A job, what it lends the kernel, and how one trip of it is told the kernel.

use std::mem;
use std::os::fd::AsRawFd;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue};
use rustix::fs::FallocateFlags;

use crate::progress::{Next, Progress, ZeroStep};
use crate::{Buffer, Operation, Payload, Token, Waker};

/// The most slices in one transfer (UIO_MAXIOV); what is beyond them goes with the next trip.
const SLICES_MAX: usize = 1024;
/// The most bytes in one transfer; the kernel's own bound is 2 GiB less a page.
const TRANSFER_BYTES_MAX: usize = 1 << 30;

/// `IORING_RECVSEND_POLL_FIRST` of the kernel's interface.
const POLL_FIRST: u16 = 1 << 0;

/// Names a flight: its place, and a generation that tells it from later ones in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle(pub(super) u64);

/// What a flight does.
#[derive(Debug)]
pub(crate) enum Job {
    /// A caller's operation.
    Operate(Operation),
    /// Waits for the waker and takes its count.
    Wake {
        /// The waker.
        waker: Waker,
        /// Where the kernel puts the count.
        count: Box<[u8; 8]>,
    },
}

/// A job with everything that it lends the kernel.
pub(crate) struct Flight {
    job: Job,
    token: Token,
    pub(crate) progress: Progress,
    pub(super) vectors: Option<Vectors>,
    /// True from the push to the completion.
    pub(super) in_kernel: bool,
    pub(super) handle: Handle,
}

/// A list of slices at an address that stays, as long as it is not changed.
pub(super) struct Vectors {
    header: Box<libc::msghdr>,
    slices: Vec<libc::iovec>,
}

impl Handle {
    /// The handle of the flight at `key`.
    pub(super) fn new(generation: u32, key: usize) -> Self {
        let key = u32::try_from(key).expect("fewer than 2^32 operations");
        Self(u64::from(generation) << 32 | u64::from(key))
    }

    /// The flight's place.
    pub(super) fn key(self) -> usize {
        usize::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(usize::MAX)
    }
}

impl Flight {
    /// A flight that was not in the kernel yet.
    pub(super) fn new(handle: Handle, token: Token, job: Job) -> Self {
        Self { job, token, progress: Progress::default(), vectors: None, in_kernel: false, handle }
    }

    /// The job, when all is over.
    pub(crate) fn into_job(self) -> Job {
        assert!(!self.in_kernel, "the job is lent to the kernel");
        self.job
    }

    /// True if the caller may give it up.
    pub(crate) fn is_cancellable(&self) -> bool {
        matches!(&self.job, Job::Operate(operation) if operation.is_cancellable())
    }

    /// True while the kernel works on it.
    pub(crate) fn is_in_kernel(&self) -> bool {
        self.in_kernel
    }

    /// The caller's name for it.
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    /// Takes in a result of the kernel for the caller's operation.
    pub(crate) fn advance(&mut self, result: i32) -> Option<Next> {
        assert!(!self.in_kernel, "the job is lent to the kernel");
        match &self.job {
            Job::Operate(operation) => Some(self.progress.advance(operation, result)),
            Job::Wake { .. } => None,
        }
    }

    /// The submission for what is left of the job. All that it names is owned by the flight, at addresses that stay
    /// when the flight moves. `poll_first`: the kernel knows [`POLL_FIRST`].
    pub(super) fn entry(&mut self, spare: &mut Vec<Vectors>, poll_first: bool) -> squeue::Entry {
        let done = self.progress.done;
        match &mut self.job {
            Job::Wake { waker, count } => {
                let length = transfer_length(count.len());
                opcode::Read::new(Fd(waker.as_raw_fd()), count.as_mut_ptr(), length).build()
            }
            Job::Operate(operation) => match operation {
                Operation::Read { file, offset, buffer, range } => {
                    let (address, length) = rest_of(buffer, range.start + done, range.end);
                    let read = opcode::Read::new(Fd(file.as_raw_fd()), address, length);
                    read.offset(advanced(*offset, done)).build()
                }
                Operation::Receive { socket, buffer, range, fill, quiet } => {
                    let (address, length) = rest_of(buffer, range.start + done, range.end);
                    let flags = if *fill { libc::MSG_WAITALL } else { 0 };
                    let receive = opcode::Recv::new(Fd(socket.as_raw_fd()), address, length);
                    let priority = if *quiet && poll_first { POLL_FIRST } else { 0 };
                    receive.flags(flags).ioprio(priority).build()
                }
                Operation::Write { file, offset, data, durable } => {
                    let lent = lend(data, done, &mut self.vectors, spare);
                    write(Fd(file.as_raw_fd()), advanced(*offset, done), lent, *durable)
                }
                Operation::Send { socket, data } => {
                    let lent = lend(data, done, &mut self.vectors, spare);
                    send(Fd(socket.as_raw_fd()), lent)
                }
                Operation::Fdatasync { file } => {
                    let fsync = opcode::Fsync::new(Fd(file.as_raw_fd()));
                    fsync.flags(FsyncFlags::DATASYNC).build()
                }
                Operation::Prefetch { file, offset, length } => {
                    // The ring's field has 32 bits, and 0 would mean all of the file; it is advice.
                    let length = i64::from(u32::try_from(*length).unwrap_or(u32::MAX));
                    let advise =
                        opcode::Fadvise::new(Fd(file.as_raw_fd()), length, libc::POSIX_FADV_WILLNEED);
                    advise.offset(*offset).build()
                }
                // A worker does these.
                Operation::Survey { .. } => opcode::Nop::new().build(),
                Operation::ZeroRange { file, offset, length } => {
                    let mode = zero_mode(self.progress.zero_step).bits().cast_signed();
                    let fallocate = opcode::Fallocate::new(Fd(file.as_raw_fd()), *length);
                    fallocate.offset(*offset).mode(mode).build()
                }
            },
        }
    }
}

impl Vectors {
    fn empty() -> Self {
        Self {
            // SAFETY: all zeros is a valid message header: null pointers with zero lengths.
            header: Box::new(unsafe { mem::zeroed() }),
            slices: Vec::new(),
        }
    }
}

/// What a payload's transfer names.
enum Lent<'a> {
    Slice(*const u8, u32),
    Vectors(&'a Vectors),
}

/// Prepares the transfer of what comes after the first `done` bytes.
fn lend<'a>(
    data: &Payload,
    done: usize,
    vectors: &'a mut Option<Vectors>,
    spare: &mut Vec<Vectors>,
) -> Lent<'a> {
    let mut rest = data.rest(done);
    let first = rest.next().unwrap_or(&[]);
    if rest.next().is_none() {
        return Lent::Slice(first.as_ptr(), transfer_length(first.len()));
    }
    let vectors = vectors.get_or_insert_with(|| spare.pop().unwrap_or_else(Vectors::empty));
    let slices = data
        .rest(done)
        .take(SLICES_MAX)
        .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() });
    vectors.slices.clear();
    vectors.slices.extend(slices);
    vectors.header.msg_iov = vectors.slices.as_mut_ptr();
    vectors.header.msg_iovlen = vectors.slices.len();
    Lent::Vectors(vectors)
}

/// The address and length of `buffer[start..end]`.
fn rest_of(buffer: &mut Buffer, start: usize, end: usize) -> (*mut u8, u32) {
    let rest = buffer.get_mut(start..end).unwrap_or(&mut []);
    (rest.as_mut_ptr(), transfer_length(rest.len()))
}

fn write(descriptor: Fd, offset: u64, lent: Lent<'_>, durable: bool) -> squeue::Entry {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    match lent {
        Lent::Slice(address, length) => {
            let write = opcode::Write::new(descriptor, address, length);
            write.offset(offset).rw_flags(flags).build()
        }
        Lent::Vectors(vectors) => {
            let count = transfer_length(vectors.slices.len());
            let write = opcode::Writev::new(descriptor, vectors.slices.as_ptr(), count);
            write.offset(offset).rw_flags(flags).build()
        }
    }
}

fn send(descriptor: Fd, lent: Lent<'_>) -> squeue::Entry {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    match lent {
        Lent::Slice(address, length) => opcode::Send::new(descriptor, address, length).flags(flags).build(),
        Lent::Vectors(vectors) => {
            let send = opcode::SendMsg::new(descriptor, &raw const *vectors.header);
            send.flags(flags.cast_unsigned()).build()
        }
    }
}

fn transfer_length(length: usize) -> u32 {
    u32::try_from(length.min(TRANSFER_BYTES_MAX)).unwrap_or(0)
}

fn advanced(offset: u64, done: usize) -> u64 {
    offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX))
}

fn zero_mode(step: ZeroStep) -> FallocateFlags {
    match step {
        ZeroStep::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        ZeroStep::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        ZeroStep::Allocate => FallocateFlags::KEEP_SIZE,
    }
}
