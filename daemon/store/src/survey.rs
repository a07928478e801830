//! Which parts of a file are known to read as zeros: its holes and unwritten extents.
//!
//! io_uring has no lseek, and looking extents up may read the file system's metadata from disk; so a thread of the
//! ring's own does it, started when it is first needed. A data write that was completed before a survey was submitted
//! is seen by it: file systems convert an unwritten extent before they report the write, and count dirty pages as
//! data.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use block::Extent;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::{Completion, File, Returned, Token, Waker};

/// One request.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) token: Token,
    pub(crate) file: File,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) extents_max: usize,
}

/// The ring's side of its survey thread.
pub(crate) struct Surveyor {
    waker: Waker,
    /// `None` until the thread is needed; it ends when this is dropped.
    requests: Option<Sender<Survey>>,
    answers: Arc<Mutex<Vec<Completion>>>,
    in_flight: usize,
}

impl Surveyor {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { waker, requests: None, answers: Arc::default(), in_flight: 0 }
    }

    /// Surveys whose completion was not collected yet.
    pub(crate) const fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn submit(&mut self, survey: Survey) {
        self.in_flight += 1;
        if self.requests.is_none() {
            self.requests = self.start().ok();
        }
        let refused = match &self.requests {
            Some(requests) => requests.send(survey).err().map(|error| error.0),
            None => Some(survey),
        };
        if let Some(survey) = refused {
            // Without a thread nothing is known of the file, and that is always a true answer.
            publish(&self.answers, &self.waker, survey.token, Ok(vec![data(survey.length)]));
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

    fn start(&self) -> io::Result<Sender<Survey>> {
        let (sender, receiver) = channel();
        let (waker, answers) = (self.waker.clone(), Arc::clone(&self.answers));
        thread::Builder::new().name("survey".to_owned()).spawn(move || serve(&receiver, &answers, &waker))?;
        Ok(sender)
    }
}

fn serve(requests: &Receiver<Survey>, answers: &Mutex<Vec<Completion>>, waker: &Waker) {
    for survey in requests {
        publish(answers, waker, survey.token, extents(&survey));
    }
}

fn publish(answers: &Mutex<Vec<Completion>>, waker: &Waker, token: Token, found: io::Result<Vec<Extent>>) {
    let (result, returned) = match found {
        Ok(extents) => (Ok(0), Returned::Extents(extents)),
        Err(error) => (Err(error), Returned::Nothing),
    };
    answers.lock().unwrap_or_else(PoisonError::into_inner).push(Completion { token, result, returned });
    waker.wake();
}

const fn data(length: u64) -> Extent {
    Extent { length, zero: false }
}

/// The extents of a range, in order.
fn extents(survey: &Survey) -> io::Result<Vec<Extent>> {
    let end = survey.offset + survey.length;
    let mut at = survey.offset;
    let mut found = Vec::new();
    while at < end && found.len() < survey.extents_max {
        let data_at = match seek(&survey.file, SeekFrom::Data(at)) {
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
        let hole_at = match seek(&survey.file, SeekFrom::Hole(at)) {
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
    use crate::{Operation, Payload, Ring};

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
}
