//! What is printed at the end, for people and as JSON.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use serde::Serialize;

use crate::arguments::Arguments;
use crate::histogram::Histogram;
use crate::meter::Measured;

/// The figures of a run. Times are in microseconds.
#[derive(Serialize)]
pub(crate) struct Report {
    pattern: &'static str,
    block_bytes: u32,
    connections: u32,
    queue_depth: u16,
    seconds: f64,
    ios: u64,
    iops: f64,
    bytes_per_second: f64,
    pub(crate) errors: u64,
    first_errno: Option<u32>,
    latency_us: Distribution,
    /// The gaps between completions of a connection, if they were asked for.
    spacing_us: Option<Distribution>,
    server_cpu_us_per_io: Option<f64>,
    /// How busy this process was: near 100 the client is the limit.
    client_cpu_percent: f64,
    targets: Vec<Share>,
}

#[derive(Serialize)]
struct Distribution {
    mean: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// What one export contributed.
#[derive(Serialize)]
struct Share {
    uri: String,
    iops: f64,
}

impl Report {
    pub(crate) fn new(arguments: &Arguments, measured: &Measured) -> Self {
        let seconds = measured.elapsed.as_secs_f64();
        let ios: u64 = measured.completions.iter().sum();
        let iops = approximate(ios) / seconds;
        let shares = arguments.targets.iter().zip(&measured.completions);
        Self {
            pattern: arguments.pattern.name(),
            block_bytes: arguments.block,
            connections: arguments.connections,
            queue_depth: arguments.queue_depth,
            seconds,
            ios,
            iops,
            bytes_per_second: iops * f64::from(arguments.block),
            errors: measured.meter.errors,
            first_errno: measured.meter.first_errno,
            latency_us: Distribution::of(&measured.meter.latency),
            spacing_us: measured.meter.gaps.as_ref().map(Distribution::of),
            server_cpu_us_per_io: measured.server_cpu.map(|cpu| microseconds(cpu) / approximate(ios.max(1))),
            client_cpu_percent: 100.0 * measured.client_cpu.as_secs_f64() / seconds,
            targets: shares
                .map(|(target, ios)| Share { uri: target.to_string(), iops: approximate(*ios) / seconds })
                .collect(),
        }
    }
}

impl Distribution {
    fn of(histogram: &Histogram) -> Self {
        Self {
            mean: microseconds(histogram.mean()),
            p50: microseconds(histogram.quantile(500)),
            p99: microseconds(histogram.quantile(990)),
            p999: microseconds(histogram.quantile(999)),
            max: microseconds(histogram.max()),
        }
    }
}

impl Display for Report {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "IOPS         {:.0} ({:.1} MB/s)", self.iops, self.bytes_per_second / 1e6)?;
        writeln!(out, "latency us   {}", self.latency_us)?;
        if let Some(spacing) = &self.spacing_us {
            writeln!(out, "spacing us   {spacing}")?;
        }
        if let Some(cpu) = self.server_cpu_us_per_io {
            writeln!(out, "server CPU   {cpu:.2} us per I/O")?;
        }
        writeln!(out, "client CPU   {:.0} %", self.client_cpu_percent)?;
        if self.targets.len() > 1 {
            let least = self.targets.iter().map(|share| share.iops).fold(f64::INFINITY, f64::min);
            let most = self.targets.iter().map(|share| share.iops).fold(0.0, f64::max);
            writeln!(out, "per export   {least:.0} to {most:.0} IOPS")?;
        }
        if let Some(errno) = self.first_errno {
            writeln!(out, "errors       {}, the first with errno {errno}", self.errors)?;
        }
        Ok(())
    }
}

impl Display for Distribution {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Self { mean, p50, p99, p999, max } = self;
        write!(out, "mean {mean:.1}, p50 {p50:.1}, p99 {p99:.1}, p99.9 {p999:.1}, max {max:.1}")
    }
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[expect(clippy::cast_precision_loss, reason = "a count of I/Os is far below 2^53")]
fn approximate(count: u64) -> f64 {
    count as f64
}
