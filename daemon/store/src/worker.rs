//! Operations for which io_uring is no help, on threads of the ring's own: one a file, started when it is first needed.
//!
//! - *Surveys*: which parts of a file are known to read as zeros, its holes and unwritten extents. There is no lseek in
//!   io_uring, and looking extents up may read the file system's metadata from disk. A write that was completed before a
//!   survey was submitted is seen by it: file systems convert an unwritten extent before they report the write, and
//!   count dirty pages as data.
//! - *Writes to the page cache*: most file systems take none without waiting, so io_uring hands each to a kernel thread,
//!   one at a time for a file, at several times the cost of the write itself.

use std::io::{self, IoSlice};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use block::Extent;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pwritev};

use crate::{Completion, File, Operation, Payload, Returned, Token, Waker};

/// Slices of one write call.
const SLICES_MAX: usize = 64;

/// The ring's side of one worker thread.
pub(crate) struct Worker {
    waker: Waker,
    /// `None` until the thread is needed; it ends when this is dropped.
    orders: Option<Sender<(Token, Operation)>>,
    answers: Arc<Mutex<Vec<Completion>>>,
    in_flight: usize,
}

impl Worker {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { waker, orders: None, answers: Arc::default(), in_flight: 0 }
    }

    /// Operations whose completion was not collected yet.
    pub(crate) const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands over an operation that the ring does not do itself.
    pub(crate) fn submit(&mut self, token: Token, operation: Operation) {
        self.in_flight += 1;
        if self.orders.is_none() {
            self.orders = self.start().ok();
        }
        let refused = match &self.orders {
            Some(orders) => orders.send((token, operation)).err().map(|error| error.0),
            None => Some((token, operation)),
        };
        if let Some((token, operation)) = refused {
            // No thread to be had: better to wait here than not to do it.
            publish(&self.answers, &self.waker, carry_out(token, operation));
        }
    }

    /// Moves the completions that are there to `ended`.
    pub(crate) fn collect(&mut self, ended: &mut Vec<Completion>) {
        if self.in_flight > 0 {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            self.in_flight -= answers.len();
            ended.append(&mut answers);
        }
    }

    fn start(&self) -> io::Result<Sender<(Token, Operation)>> {
        let (sender, receiver) = channel();
        let (waker, answers) = (self.waker.clone(), Arc::clone(&self.answers));
        thread::Builder::new()
            .name("file-worker".to_owned())
            .spawn(move || serve(&receiver, &answers, &waker))?;
        Ok(sender)
    }
}

fn serve(orders: &Receiver<(Token, Operation)>, answers: &Mutex<Vec<Completion>>, waker: &Waker) {
    for (token, operation) in orders {
        publish(answers, waker, carry_out(token, operation));
    }
}

fn publish(answers: &Mutex<Vec<Completion>>, waker: &Waker, completion: Completion) {
    answers.lock().unwrap_or_else(PoisonError::into_inner).push(completion);
    waker.wake();
}

fn carry_out(token: Token, operation: Operation) -> Completion {
    match operation {
        Operation::Survey { file, offset, length, extents_max } => {
            match extents(&file, offset, length, extents_max) {
                Ok(extents) => Completion { token, result: Ok(0), returned: Returned::Extents(extents) },
                Err(error) => Completion { token, result: Err(error), returned: Returned::Nothing },
            }
        }
        Operation::Write { file, offset, data, .. } => {
            let result = write(&file, offset, &data);
            Completion { token, result, returned: Returned::Payload(data) }
        }
        Operation::Read { .. }
        | Operation::Fdatasync { .. }
        | Operation::ZeroRange { .. }
        | Operation::Prefetch { .. }
        | Operation::Receive { .. }
        | Operation::Send { .. } => unreachable!("the ring does these itself"),
    }
}

fn write(file: &File, offset: u64, data: &Payload) -> io::Result<usize> {
    let mut done = 0;
    while done < data.length() {
        let slices: Vec<IoSlice<'_>> = data.rest(done).take(SLICES_MAX).map(IoSlice::new).collect();
        let at = offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
        match pwritev(file, &slices, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(done)
}

const fn data(length: u64) -> Extent {
    Extent { length, zero: false }
}

/// The extents of a range, in order.
fn extents(file: &File, offset: u64, length: u64, extents_max: usize) -> io::Result<Vec<Extent>> {
    let end = offset + length;
    let mut at = offset;
    let mut found = Vec::new();
    while at < end && found.len() < extents_max {
        let data_at = match seek(file, SeekFrom::Data(at)) {
            Ok(data_at) => data_at.clamp(at, end),
            // No data from here to the end of the file.
            Err(Errno::NXIO) => end,
            // A file system that does not know its extents.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        if data_at > at {
            found.push(Extent { length: data_at - at, zero: true });
            at = data_at;
            continue;
        }
        let hole_at = match seek(file, SeekFrom::Hole(at)) {
            Ok(hole_at) if hole_at > at => hole_at.min(end),
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(errno) => return Err(errno.into()),
        };
        found.push(data(hole_at - at));
        at = hole_at;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Ring;

    const MIB: u64 = 1 << 20;

    fn run(ring: &mut Ring, operation: Operation) -> Completion {
        ring.submit(Token(7), operation);
        let mut done = Vec::new();
        while done.is_empty() {
            ring.wait(Some(Duration::from_secs(20)), &mut done).unwrap();
        }
        done.pop().unwrap()
    }

    fn survey(
        ring: &mut Ring,
        file: &File,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Vec<(u64, bool)> {
        let operation = Operation::Survey { file: file.clone(), offset, length, extents_max };
        let Returned::Extents(extents) = run(ring, operation).returned else {
            panic!("a survey gives extents");
        };
        extents.iter().map(|extent| (extent.length, extent.zero)).collect()
    }

    #[test]
    fn written_parts_are_data_and_the_others_zero() {
        let folder = tempfile::tempdir().unwrap();
        let mut ring = Ring::new(8).unwrap();
        let file = File::create_thick(&folder.path().join("home"), 4 * MIB, false).unwrap();
        assert_eq!(
            survey(&mut ring, &file, 0, 4 * MIB, 9).iter().map(|(length, _)| length).sum::<u64>(),
            4 * MIB
        );
        let data = Payload::One(vec![1; 65_536].into());
        let write = Operation::Write { file: file.clone(), offset: MIB, data, durable: true };
        assert_eq!(run(&mut ring, write).result.unwrap(), 65_536);
        let found = survey(&mut ring, &file, 0, 4 * MIB, 9);
        // A file system that does not tell unwritten extents says one thing for all of it.
        if found.len() > 1 {
            assert_eq!(found, [(MIB, true), (65_536, false), (3 * MIB - 65_536, true)]);
            assert_eq!(survey(&mut ring, &file, MIB - 1, 10, 1), [(1, true)]);
            assert_eq!(survey(&mut ring, &file, MIB + 1, 10, 9), [(10, false)]);
        }
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn a_write_of_many_pieces_to_the_page_cache_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut ring = Ring::new(8).unwrap();
        let path = folder.path().join("home");
        let file = File::create_thick(&path, MIB, false).unwrap();
        let pieces: Vec<bytes::Bytes> = (0..200_u8).map(|number| vec![number; 100].into()).collect();
        let data = Payload::Many(pieces.clone());
        let write = Operation::Write { file, offset: 77, data, durable: false };
        let completion = run(&mut ring, write);
        assert_eq!(completion.result.unwrap(), 20_000);
        assert!(completion.returned.into_payload().is_some());
        assert_eq!(std::fs::read(&path).unwrap().get(77..20_077).unwrap(), pieces.concat());
    }
}
