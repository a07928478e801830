//! The ring shared with the kernel, and the custody of what is lent to it.
//!
//! A [`Flight`] owns every descriptor and all memory that its submission names. From [`Kernel::push`] until the
//! completion it is *in the kernel*: nobody can reach its memory, and it is not dropped (if it must be, it is
//! leaked). That makes every function here safe to call.

use std::io;
use std::mem;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use slab::Slab;

use crate::Token;
use crate::sys::flight::{Flight, Handle, Job, Vectors};

/// `IORING_ENTER_GETEVENTS` and `IORING_ENTER_EXT_ARG` of the kernel's interface.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
/// Slice lists kept for reuse.
const SPARE_VECTORS_MAX: usize = 256;
/// The handle of cancellations, whose completions mean nothing.
const CANCELLATION: u64 = u64::MAX;
/// How long to wait for a completion when the kernel has no room for submissions.
const CROWDED_WAIT: Duration = Duration::from_millis(1);
/// How often, and how long each time, a dropped ring waits in vain for its cancelled operations before it leaks
/// their memory.
const DROP_WAITS_MAX: u32 = 20;
const DROP_WAIT: Duration = Duration::from_millis(500);

/// How long [`Kernel::enter`] waits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// Not at all.
    Poll,
    /// Until something completes.
    Completion,
    /// Until something completes or the time is over.
    AtMost(Duration),
}

/// The ring and all flights, those that wait to be pushed included.
pub(crate) struct Kernel {
    uring: IoUring,
    flights: Slab<Flight>,
    spare: Vec<Vectors>,
    in_kernel: usize,
    generation: u32,
}

impl Kernel {
    /// A ring for `entries` submissions at a time, for this thread alone.
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        Ok(Self::of(build(entries)?))
    }

    fn of(uring: IoUring) -> Self {
        Self { uring, flights: Slab::new(), spare: Vec::new(), in_kernel: 0, generation: 0 }
    }

    /// True if waits can have a timeout and no completion is ever lost (Linux 5.11).
    pub(crate) fn is_recent(&self) -> bool {
        let parameters = self.uring.params();
        parameters.is_feature_ext_arg() && parameters.is_feature_nodrop()
    }

    /// Takes a job into custody.
    pub(crate) fn insert(&mut self, token: Token, job: Job) -> Handle {
        self.generation = self.generation.wrapping_add(1) & (u32::MAX >> 1);
        let place = self.flights.vacant_entry();
        let handle = Handle::new(self.generation, place.key());
        place.insert(Flight::new(handle, token, job));
        handle
    }

    /// The flight, unless it is over.
    pub(crate) fn flight(&mut self, handle: Handle) -> Option<&mut Flight> {
        self.flights.get_mut(handle.key()).filter(|flight| flight.handle == handle)
    }

    /// The flights of a token.
    pub(crate) fn of_token(&self, token: Token) -> Vec<Handle> {
        let flights = self.flights.iter().map(|(_, flight)| flight);
        flights.filter(|flight| flight.token() == token).map(|flight| flight.handle).collect()
    }

    /// Number of flights in custody.
    pub(crate) fn len(&self) -> usize {
        self.flights.len()
    }

    /// Ends a flight that is not in the kernel.
    pub(crate) fn remove(&mut self, handle: Handle) -> Option<Flight> {
        let in_kernel = self.flight(handle)?.in_kernel;
        assert!(!in_kernel, "the flight is lent to the kernel");
        let mut flight = self.flights.try_remove(handle.key())?;
        if let Some(vectors) = flight.vectors.take().filter(|_| self.spare.len() < SPARE_VECTORS_MAX) {
            self.spare.push(vectors);
        }
        Some(flight)
    }

    /// Puts the flight's next trip into the submission queue; false if that is full.
    pub(crate) fn push(&mut self, handle: Handle) -> bool {
        if self.uring.submission().is_full() {
            return false;
        }
        let flight = self.flights.get_mut(handle.key()).filter(|flight| flight.handle == handle);
        let flight = flight.expect("only flights in custody are pushed");
        assert!(!flight.in_kernel, "one trip at a time");
        // POLL_FIRST (Linux 5.19) is older than SINGLE_ISSUER (6.0).
        let poll_first = self.uring.params().is_setup_single_issuer();
        let entry = flight.entry(&mut self.spare, poll_first).user_data(handle.0);
        // SAFETY: all that the entry names is owned by the flight, at addresses that do not change when the flight
        // moves; `in_kernel` keeps it from being used or dropped until the completion is reaped.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        assert!(pushed.is_ok(), "there was room");
        flight.in_kernel = true;
        self.in_kernel += 1;
        true
    }

    /// Puts the cancellation of a flight into the submission queue; false if that is full.
    pub(crate) fn push_cancellation(&mut self, handle: Handle) -> bool {
        let entry = opcode::AsyncCancel::new(handle.0).build().user_data(CANCELLATION);
        // SAFETY: the entry names no memory.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.is_ok()
    }

    /// Submits what is queued and waits. Returns early on a signal or when the kernel is crowded.
    pub(crate) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let queue = self.uring.submission();
        let queued = u32::try_from(queue.len()).unwrap_or(u32::MAX);
        // With TASKRUN_FLAG the kernel says when a poll would find work; without a need it costs no system call.
        let idle = queued == 0 && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        if matches!(wait, Wait::Poll) && idle && self.uring.params().is_setup_single_issuer() {
            return Ok(());
        }
        match self.enter_once(queued, wait) {
            // No memory for requests, or too many completions not yet reaped: what is queued goes another time.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                excused(self.enter_once(0, Wait::AtMost(CROWDED_WAIT)))
            }
            outcome => excused(outcome),
        }
    }

    fn enter_once(&mut self, queued: u32, wait: Wait) -> io::Result<()> {
        let timespec;
        let mut arguments = SubmitArgs::new();
        let wanted = match wait {
            Wait::Poll => 0,
            Wait::Completion => 1,
            Wait::AtMost(duration) => {
                timespec = Timespec::from(duration);
                arguments = arguments.timespec(&timespec);
                1
            }
        };
        let flags = ENTER_GETEVENTS | ENTER_EXT_ARG;
        // SAFETY: `arguments` is what EXT_ARG wants and lives, as does `timespec`, until the call returns.
        unsafe { self.uring.submitter().enter(queued, wanted, flags, Some(&arguments)) }?;
        Ok(())
    }

    /// Moves completions to `results`, at most one queue full: each flight's result, out of the kernel again.
    pub(crate) fn reap(&mut self, results: &mut Vec<(Handle, i32)>) {
        for completion in self.uring.completion() {
            let handle = Handle(completion.user_data());
            if handle.0 == CANCELLATION {
                continue;
            }
            assert!(!cqueue::more(completion.flags()), "no operation here completes twice");
            let flight = self.flights.get_mut(handle.key()).filter(|flight| flight.handle == handle);
            let flight = flight.expect("the kernel completes what it was given");
            assert!(mem::replace(&mut flight.in_kernel, false), "one completion a trip");
            self.in_kernel -= 1;
            results.push((handle, completion.result()));
        }
    }

    /// Cancels everything in the kernel and waits for it; false if some of it does not end.
    fn recall(&mut self) -> bool {
        let flights = self.flights.iter().map(|(_, flight)| flight);
        let mut pending: Vec<Handle> =
            flights.filter(|flight| flight.in_kernel).map(|flight| flight.handle).collect();
        let mut results = Vec::new();
        // Each turn either takes something out of the kernel or counts as barren.
        let mut barren = 0;
        while barren < DROP_WAITS_MAX {
            while pending.last().is_some_and(|handle| self.push_cancellation(*handle)) {
                pending.pop();
            }
            if self.in_kernel == 0 {
                return true;
            }
            if self.enter(Wait::AtMost(DROP_WAIT)).is_err() {
                return false;
            }
            self.reap(&mut results);
            barren += u32::from(results.is_empty());
            results.clear();
        }
        self.in_kernel == 0
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if !self.recall() {
            // The kernel may still write to this memory: it must never be used for anything else.
            mem::forget(mem::take(&mut self.flights));
        }
    }
}

/// The end of the time and a signal are no errors of a wait.
fn excused(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => Ok(()),
        other => other,
    }
}

/// The ring with the most flags that the kernel knows.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut last = io::ErrorKind::Unsupported.into();
    for tier in [Tier::OneThread, Tier::Cooperative, Tier::Plain] {
        match build_tier(tier, entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            other => return other,
        }
    }
    Err(last)
}

/// What a kernel knows.
#[derive(Clone, Copy, Debug)]
enum Tier {
    /// Linux 6.1: completions are worked off in the ring's thread when it asks for them, so in batches.
    OneThread,
    /// Linux 5.19: completions do not interrupt the thread.
    Cooperative,
    /// Older.
    Plain,
}

fn build_tier(tier: Tier, entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_cqsize(entries.saturating_mul(4));
    match tier {
        Tier::OneThread => {
            builder.setup_submit_all().setup_taskrun_flag().setup_single_issuer().setup_defer_taskrun()
        }
        Tier::Cooperative => builder.setup_submit_all().setup_taskrun_flag().setup_coop_taskrun(),
        Tier::Plain => &mut builder,
    };
    builder.build(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Waker;

    #[test]
    fn every_tier_completes_by_waiting_and_by_polling() {
        for tier in [Tier::OneThread, Tier::Cooperative, Tier::Plain] {
            let uring = build_tier(tier, 4).unwrap();
            let mut kernel = Kernel::of(uring);
            let waker = Waker::new().unwrap();
            let job = Job::Wake { waker: waker.clone(), count: Box::default() };
            let handle = kernel.insert(Token(0), job);
            for wait in [Wait::Completion, Wait::Poll, Wait::AtMost(Duration::from_secs(9))] {
                assert!(kernel.push(handle));
                kernel.enter(Wait::Poll).unwrap();
                waker.wake();
                waker.acknowledge();
                kernel.enter(wait).unwrap();
                let mut results = Vec::new();
                kernel.reap(&mut results);
                assert_eq!(results, [(handle, 8)], "{tier:?} {wait:?}");
            }
        }
    }

    #[test]
    fn an_old_handle_does_not_reach_the_next_flight_in_its_place() {
        let mut kernel = Kernel::new(4).unwrap();
        let job = || Job::Wake { waker: Waker::new().unwrap(), count: Box::default() };
        let old = kernel.insert(Token(1), job());
        assert!(kernel.remove(old).is_some());
        let new = kernel.insert(Token(2), job());
        assert_eq!(old.key(), new.key());
        assert!(kernel.flight(old).is_none());
        assert!(kernel.remove(old).is_none());
        assert_eq!(kernel.of_token(Token(2)), [new]);
    }
}
