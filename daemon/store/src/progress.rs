//! How far an operation has come, and what a result of the kernel means for it.

use std::io;

use rustix::io::Errno;

use crate::Operation;

/// The progress of one operation over its trips to the kernel.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Bytes transferred so far.
    pub(crate) done: usize,
    /// The step of a [`Operation::ZeroRange`].
    pub(crate) zero_step: ZeroStep,
    /// True once the caller cancelled it: it makes no further trip.
    pub(crate) cancelled: bool,
}

/// The steps of zeroing a range; the second and third serve file systems without the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ZeroStep {
    /// Zero in one step.
    #[default]
    Zero,
    /// Give the range's space up.
    Punch,
    /// Allocate it again.
    Allocate,
}

/// What follows a result.
#[derive(Debug)]
pub(crate) enum Next {
    /// Another trip, for what is left.
    Again,
    /// The operation is complete.
    Done(io::Result<usize>),
}

impl Progress {
    /// Takes in the kernel's result for `operation`: a count or a negative errno.
    pub(crate) fn advance(&mut self, operation: &Operation, result: i32) -> Next {
        let next = match usize::try_from(result) {
            Ok(count) => self.succeed(operation, count),
            Err(_) => self.fail(operation, Errno::from_raw_os_error(result.saturating_neg())),
        };
        match next {
            Next::Again if self.cancelled => Next::Done(Err(Errno::CANCELED.into())),
            Next::Again | Next::Done(_) => next,
        }
    }

    fn succeed(&mut self, operation: &Operation, count: usize) -> Next {
        let length = operation.length().unwrap_or(0);
        assert!(count <= length - self.done, "the kernel moved more than asked");
        self.done += count;
        let complete = self.done == length;
        match operation {
            Operation::Read { .. } if count == 0 => Next::Done(Err(io::ErrorKind::UnexpectedEof.into())),
            Operation::Write { .. } | Operation::Send { .. } if count == 0 => {
                Next::Done(Err(io::ErrorKind::WriteZero.into()))
            }
            Operation::Read { .. } | Operation::Write { .. } | Operation::Send { .. } if !complete => {
                Next::Again
            }
            Operation::Receive { fill: true, .. } if !complete && count > 0 => Next::Again,
            Operation::ZeroRange { .. } if self.zero_step == ZeroStep::Punch => {
                self.zero_step = ZeroStep::Allocate;
                Next::Again
            }
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Send { .. }
            | Operation::Receive { .. }
            | Operation::Fdatasync { .. }
            | Operation::ZeroRange { .. }
            | Operation::Prefetch { .. }
            | Operation::Survey { .. } => Next::Done(Ok(self.done)),
        }
    }

    fn fail(&mut self, operation: &Operation, errno: Errno) -> Next {
        let unsupported = matches!(operation, Operation::ZeroRange { .. }) && errno == Errno::OPNOTSUPP;
        if unsupported && self.zero_step == ZeroStep::Zero {
            self.zero_step = ZeroStep::Punch;
            return Next::Again;
        }
        match errno {
            // A signal met the thread that worked on it; a cancellation may look the same.
            Errno::INTR => Next::Again,
            _ => Next::Done(Err(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, BufferPool, File, Socket};

    /// The outcomes of one operation for a series of results; `None` is another trip.
    fn outcomes(operation: &Operation, results: &[i32]) -> Vec<Option<Result<usize, io::ErrorKind>>> {
        let mut progress = Progress::default();
        let outcome = |result: &i32| match progress.advance(operation, *result) {
            Next::Again => None,
            Next::Done(result) => Some(result.map_err(|error| error.kind())),
        };
        results.iter().map(outcome).collect()
    }

    fn file() -> File {
        File::open(tempfile::NamedTempFile::new().unwrap().path(), false).unwrap()
    }

    fn buffer() -> Buffer {
        BufferPool::new(4096).try_take(100).unwrap()
    }

    #[test]
    fn short_transfers_are_continued_and_empty_ones_fail() {
        let (file, data) = (file(), buffer().freeze().into());
        let write = Operation::Write { file: file.clone(), offset: 0, data, durable: false };
        assert_eq!(outcomes(&write, &[60, -libc::EINTR, 40]), [None, None, Some(Ok(100))]);
        assert_eq!(outcomes(&write, &[60, 0]), [None, Some(Err(io::ErrorKind::WriteZero))]);
        let read = Operation::Read { file, offset: 0, buffer: buffer(), range: 10..30 };
        assert_eq!(outcomes(&read, &[19, 1]), [None, Some(Ok(20))]);
        assert_eq!(outcomes(&read, &[19, 0]), [None, Some(Err(io::ErrorKind::UnexpectedEof))]);
    }

    #[test]
    fn receives_take_what_comes_unless_they_fill() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = Socket::from(near);
        let receive = |fill| Operation::Receive {
            socket: socket.clone(),
            buffer: buffer(),
            range: 0..100,
            fill,
            quiet: false,
        };
        assert_eq!(outcomes(&receive(false), &[1]), [Some(Ok(1))]);
        assert_eq!(outcomes(&receive(true), &[1, 99]), [None, Some(Ok(100))]);
        assert_eq!(outcomes(&receive(true), &[1, 0]), [None, Some(Ok(1))]);
        assert_eq!(outcomes(&receive(true), &[0]), [Some(Ok(0))]);
    }

    #[test]
    fn zeroing_falls_back_to_a_hole_and_a_new_allocation() {
        let zero = Operation::ZeroRange { file: file(), offset: 0, length: 4096 };
        let unsupported = -libc::EOPNOTSUPP;
        assert_eq!(outcomes(&zero, &[0]), [Some(Ok(0))]);
        assert_eq!(outcomes(&zero, &[unsupported, 0, 0]), [None, None, Some(Ok(0))]);
        let refused = Some(Err(io::ErrorKind::Unsupported));
        assert_eq!(outcomes(&zero, &[unsupported, unsupported]), [None, refused]);
        let full = Some(Err(io::ErrorKind::StorageFull));
        assert_eq!(outcomes(&zero, &[unsupported, 0, -libc::ENOSPC]), [None, None, full]);
    }

    #[test]
    fn a_cancelled_operation_makes_no_further_trip() {
        let data = buffer().freeze().into();
        let write = Operation::Write { file: file(), offset: 0, data, durable: false };
        let mut progress = Progress { cancelled: true, ..Progress::default() };
        assert!(matches!(progress.advance(&write, -libc::EINTR), Next::Done(Err(_))));
    }
}
