//! What is measured while requests complete.

use std::time::{Duration, Instant};

use crate::histogram::Histogram;

/// Counts completions once it is started, until it is stopped.
pub(crate) struct Meter {
    running: bool,
    pub(crate) latency: Histogram,
    pub(crate) gaps: Option<Histogram>,
    /// Requests that the server answered with an error, from the first request on.
    pub(crate) errors: u64,
    pub(crate) first_errno: Option<u32>,
}

impl Meter {
    /// A meter that is not started; `spacing` says whether it measures gaps.
    pub(crate) fn new(spacing: bool) -> Self {
        let gaps = spacing.then(Histogram::new);
        Self { running: false, latency: Histogram::new(), gaps, errors: 0, first_errno: None }
    }

    pub(crate) const fn start(&mut self) {
        self.running = true;
    }

    pub(crate) const fn stop(&mut self) {
        self.running = false;
    }

    /// Counts a request that was served; true if the meter runs.
    pub(crate) fn complete(&mut self, started: Instant, previous: Option<Instant>, now: Instant) -> bool {
        if self.running {
            self.latency.record(now - started);
            if let (Some(gaps), Some(previous)) = (&mut self.gaps, previous) {
                gaps.record(now - previous);
            }
        }
        self.running
    }

    /// Counts a request that the server refused.
    pub(crate) const fn refuse(&mut self, errno: u32) {
        self.errors += 1;
        if self.first_errno.is_none() {
            self.first_errno = Some(errno);
        }
    }
}

/// What a whole run measured.
pub(crate) struct Measured {
    pub(crate) elapsed: Duration,
    /// Completions of each target, in the order given.
    pub(crate) completions: Vec<u64>,
    pub(crate) meter: Meter,
    /// The CPU time of the server's process, if it was named.
    pub(crate) server_cpu: Option<Duration>,
    /// The CPU time of this process.
    pub(crate) client_cpu: Duration,
}
