//! The shard's ring: operations in, completions out, one system call a turn.
//!
//! Guarantees: every submitted operation gives exactly one [`Completion`], unless the ring is dropped first; memory
//! comes back with it and not before; a dropped ring cancels what is in the kernel and waits for it (not for its
//! workers, which end what they have and touch nothing of the ring's). Nothing is submitted to the kernel before the
//! next [`Ring::wait`].

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::time::Duration;

use rustix::io::Errno;

use crate::progress::Next;
use crate::sys::flight::{Handle, Job};
use crate::sys::kernel::{Kernel, Wait};
use crate::worker::Worker;
use crate::{Completion, Operation, Token, Waker};

/// The longest wait while steps are still queued because the kernel had no room for them.
const RETRY_WAIT: Duration = Duration::from_millis(1);
/// The token of the waker's own flight; callers may use it too, as it is never reported for that flight.
const WAKER_TOKEN: Token = Token(u64::MAX);

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel refused: too old, io_uring switched off, a seccomp filter, or a limit.
    #[error(
        "io_uring is not available ({0}): allow it in sysctl kernel.io_uring_disabled and in the seccomp filter"
    )]
    Unavailable(#[source] io::Error),
    /// The kernel's io_uring lacks what a ring needs.
    #[error("the kernel is too old: io_uring needs Linux 5.11, and 6.1 to be fast")]
    KernelTooOld,
    /// The waker could not be made.
    #[error("no eventfd for the waker: {0}")]
    Waker(#[source] io::Error),
}

/// An io_uring for the thread that made it.
pub struct Ring {
    kernel: Kernel,
    /// What goes to the kernel with the next wait, in order; bounded by the operations in flight.
    queued: VecDeque<Step>,
    /// Operations that ended without a trip to the kernel.
    ended: Vec<Completion>,
    /// Scratch space for one round of results.
    results: Vec<(Handle, i32)>,
    /// By their file, so that one file's slow device holds up no other; see [`rest`](Self::rest).
    workers: BTreeMap<usize, Worker>,
    /// Operations that workers have.
    working: usize,
    waker: Waker,
    woken: bool,
    /// The kernel takes submissions from one thread only.
    _one_thread: PhantomData<*const ()>,
}

enum Step {
    Start(Handle),
    Cancel(Handle),
}

impl Ring {
    /// A ring with a waker of its own; `entries` is the number of submissions that one system call takes.
    ///
    /// # Errors
    ///
    /// If the kernel offers no suitable io_uring.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        Self::with_waker(entries, Waker::new().map_err(RingError::Waker)?)
    }

    /// A ring for a waker that was made before. To be called on the thread that will use the ring.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_waker(entries: u32, waker: Waker) -> Result<Self, RingError> {
        let mut kernel = Kernel::new(entries).map_err(RingError::Unavailable)?;
        if !kernel.is_recent() {
            return Err(RingError::KernelTooOld);
        }
        let job = Job::Wake { waker: waker.clone(), count: Box::default() };
        let waking = kernel.insert(WAKER_TOKEN, job);
        Ok(Self {
            kernel,
            queued: VecDeque::from([Step::Start(waking)]),
            ended: Vec::new(),
            results: Vec::new(),
            workers: BTreeMap::new(),
            working: 0,
            waker,
            woken: false,
            _one_thread: PhantomData,
        })
    }

    /// A handle that ends this ring's waits.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Operations submitted whose completion was not handed out yet.
    pub fn in_flight(&self) -> usize {
        self.kernel.len() - 1 + self.ended.len() + self.working
    }

    /// Queues an operation; the next [`wait`](Self::wait) starts it. It never fails and has no bound of its own: the
    /// caller's budgets of buffers and connections bound it.
    ///
    /// # Panics
    ///
    /// If the operation breaks a rule of its kind: a range outside its buffer or file offsets, an empty receive, a
    /// second send or receive on one socket.
    pub fn submit(&mut self, token: Token, operation: Operation) {
        operation.admit();
        if operation.length() == Some(0) {
            let returned = operation.into_returned();
            self.ended.push(Completion { token, result: Ok(0), returned });
            return;
        }
        match &operation {
            Operation::Survey { file, .. } => self.hand_over(file.key(), token, operation),
            Operation::Write { file, durable: false, .. } if !file.is_direct() => {
                self.hand_over(file.key(), token, operation);
            }
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Fdatasync { .. }
            | Operation::ZeroRange { .. }
            | Operation::Prefetch { .. }
            | Operation::Receive { .. }
            | Operation::Send { .. } => {
                let handle = self.kernel.insert(token, Job::Operate(operation));
                self.queued.push_back(Step::Start(handle));
            }
        }
    }

    /// Gives up the receives and sends of a token; disk operations always run to their end. Each still completes,
    /// with ECANCELED, or with its own result if that came first. To end a connection's operations,
    /// [`Socket::shutdown`](crate::Socket::shutdown) is enough.
    pub fn cancel(&mut self, token: Token) {
        for handle in self.kernel.of_token(token) {
            let Some(flight) = self.kernel.flight(handle) else {
                continue;
            };
            if flight.is_cancellable() {
                flight.progress.cancelled = true;
                self.queued.push_back(Step::Cancel(handle));
            }
        }
    }

    /// Starts what is queued, waits until something completes, the waker is used or the time is over (`None`: no
    /// limit, zero: poll), and appends all completions to `out`. True if the waker was used.
    ///
    /// May return early with nothing, as after a signal or a short transfer: callers loop.
    ///
    /// # Errors
    ///
    /// If the ring itself is broken; there is no way on but to drop it.
    pub fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) -> io::Result<bool> {
        let before = out.len();
        self.start_queued()?;
        out.append(&mut self.ended);
        let timeout = if self.queued.is_empty() {
            timeout
        } else {
            Some(timeout.map_or(RETRY_WAIT, |timeout| timeout.min(RETRY_WAIT)))
        };
        let wait = match timeout {
            _ if out.len() > before => Wait::Poll,
            Some(Duration::ZERO) => Wait::Poll,
            Some(timeout) => Wait::AtMost(timeout),
            None => Wait::Completion,
        };
        self.kernel.enter(wait)?;
        let mut results = mem::take(&mut self.results);
        self.kernel.reap(&mut results);
        for (handle, result) in results.drain(..) {
            self.settle(handle, result);
        }
        self.results = results;
        self.collect_work();
        out.append(&mut self.ended);
        Ok(mem::take(&mut self.woken))
    }

    /// Ends the threads that have nothing to do; they come back when they are needed.
    pub fn rest(&mut self) {
        self.workers.retain(|_, worker| worker.in_flight() > 0);
    }

    fn hand_over(&mut self, key: usize, token: Token, operation: Operation) {
        self.working += 1;
        let worker = self.workers.entry(key).or_insert_with(|| Worker::new(self.waker.clone()));
        worker.submit(token, operation);
    }

    fn collect_work(&mut self) {
        if self.working == 0 {
            return;
        }
        let before = self.ended.len();
        for worker in self.workers.values_mut() {
            worker.collect(&mut self.ended);
        }
        self.working -= self.ended.len() - before;
    }

    /// Moves the queued steps to the kernel, as many as it takes.
    fn start_queued(&mut self) -> io::Result<()> {
        while let Some(step) = self.queued.pop_front() {
            if self.start(&step) {
                continue;
            }
            self.kernel.enter(Wait::Poll)?;
            if !self.start(&step) {
                self.queued.push_front(step);
                break;
            }
        }
        Ok(())
    }

    /// Moves one step to the kernel; false if the submission queue is full.
    fn start(&mut self, step: &Step) -> bool {
        match *step {
            Step::Cancel(handle) => {
                // What ended, or was not started, needs no cancellation.
                let in_kernel = self.kernel.flight(handle).is_some_and(|flight| flight.is_in_kernel());
                !in_kernel || self.kernel.push_cancellation(handle)
            }
            Step::Start(handle) => {
                if self.kernel.flight(handle).is_some_and(|flight| flight.progress.cancelled) {
                    self.end(handle, Err(Errno::CANCELED.into()));
                    return true;
                }
                self.kernel.push(handle)
            }
        }
    }

    /// Takes in the kernel's result for one flight.
    fn settle(&mut self, handle: Handle, result: i32) {
        let Some(flight) = self.kernel.flight(handle) else {
            return;
        };
        match flight.advance(result) {
            Some(Next::Done(result)) => self.end(handle, result),
            Some(Next::Again) => self.queued.push_back(Step::Start(handle)),
            None => {
                self.waker.acknowledge();
                self.woken = true;
                self.queued.push_back(Step::Start(handle));
            }
        }
    }

    /// Ends an operation.
    fn end(&mut self, handle: Handle, result: io::Result<usize>) {
        let Some(flight) = self.kernel.remove(handle) else {
            return;
        };
        let token = flight.token();
        if let Job::Operate(operation) = flight.into_job() {
            let returned = operation.into_returned();
            self.ended.push(Completion { token, result, returned });
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Ring({} in flight)", self.in_flight())
    }
}
