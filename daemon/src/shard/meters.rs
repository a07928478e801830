//! A volume's metrics; the names are listed in docs/OPERATING.md.

use std::time::Duration;

use block::{HostCommand, HostResult};
use metrics::{Counter, Histogram, counter, histogram};

/// The counters and histograms of one volume.
pub(super) struct VolumeMeters {
    reads: Counter,
    read_bytes: Counter,
    read_seconds: Histogram,
    writes: Counter,
    write_bytes: Counter,
    write_seconds: Histogram,
    flushes: Counter,
    flush_seconds: Histogram,
    trims: Counter,
    zeroes: Counter,
    errors: Counter,
    throttled: Counter,
}

impl VolumeMeters {
    pub(super) fn new(volume: &str) -> Self {
        let label = || [("volume", volume.to_owned())];
        Self {
            reads: counter!("farshore_volume_reads_total", &label()),
            read_bytes: counter!("farshore_volume_read_bytes_total", &label()),
            read_seconds: histogram!("farshore_volume_read_seconds", &label()),
            writes: counter!("farshore_volume_writes_total", &label()),
            write_bytes: counter!("farshore_volume_write_bytes_total", &label()),
            write_seconds: histogram!("farshore_volume_write_seconds", &label()),
            flushes: counter!("farshore_volume_flushes_total", &label()),
            flush_seconds: histogram!("farshore_volume_flush_seconds", &label()),
            trims: counter!("farshore_volume_trims_total", &label()),
            zeroes: counter!("farshore_volume_write_zeroes_total", &label()),
            errors: counter!("farshore_volume_errors_total", &label()),
            throttled: counter!("farshore_volume_throttled_total", &label()),
        }
    }

    /// A command was answered.
    pub(super) fn answered(&self, command: &HostCommand, result: HostResult, took: Duration) {
        if result.is_err() {
            self.errors.increment(1);
        }
        let seconds = took.as_secs_f64();
        match command {
            HostCommand::Read { range } => {
                self.reads.increment(1);
                self.read_bytes.increment(range.length());
                self.read_seconds.record(seconds);
            }
            HostCommand::Write { range, .. } => {
                self.writes.increment(1);
                self.write_bytes.increment(range.length());
                self.write_seconds.record(seconds);
            }
            HostCommand::Flush => {
                self.flushes.increment(1);
                self.flush_seconds.record(seconds);
            }
            HostCommand::Trim { .. } => self.trims.increment(1),
            HostCommand::WriteZeroes { .. } => self.zeroes.increment(1),
            HostCommand::Cache { .. } | HostCommand::Status { .. } => {}
        }
    }

    /// The engine's own count of commands that had to wait for the limit.
    pub(super) fn throttled(&self, total: u64) {
        self.throttled.absolute(total);
    }
}
