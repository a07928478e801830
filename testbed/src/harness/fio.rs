//! fio with its `nbd` engine.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Background, Export};

/// A job, one connection for each of its copies.
pub struct Fio {
    options: Vec<String>,
    timeout: Duration,
}

/// fio's own report.
#[derive(Debug)]
pub struct FioReport(Value);

impl Fio {
    /// A job on a volume; `numjobs`, `iodepth`, `rw` and the rest are options.
    pub fn new(export: &Export) -> Self {
        let uri = export.uri();
        let mut options = vec![
            "--name=job",
            "--ioengine=nbd",
            "--group_reporting",
            "--output-format=json",
            "--verify_state_save=0",
        ];
        options.push("--exitall_on_error=1");
        let mut options: Vec<_> = options.into_iter().map(str::to_owned).collect();
        options.push(format!("--uri={uri}"));
        Self { options, timeout: Duration::from_secs(120) }
    }

    /// Random writes of all lengths to the part from `offset` on, as long again, each read back and compared; until it is
    /// ended, or a minute is over.
    pub fn verifying(export: &Export, offset: &str) -> Self {
        Self::new(export)
            .option("rw", "randwrite")
            .option("bsrange", "512-64k")
            .option("offset", offset)
            .option("size", offset)
            .option("iodepth", 8)
            .option("verify", "crc32c")
            .option("verify_backlog", 64)
            .option("verify_fatal", 1)
            .option("serialize_overlap", 1)
            .time_based(0, 60)
    }

    /// Adds `--name=value`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.options.push(format!("--{name}={value}"));
        self
    }

    /// Runs for a time, after a warm-up that is not measured.
    #[must_use]
    pub fn time_based(self, warm_up_seconds: u64, seconds: u64) -> Self {
        self.option("time_based", 1)
            .option("ramp_time", format_args!("{warm_up_seconds}s"))
            .option("runtime", format_args!("{seconds}s"))
    }

    /// Starts it.
    ///
    /// # Errors
    /// If fio cannot be started.
    pub fn start(&self) -> Result<Background> {
        let mut command = Command::new("fio");
        command.args(&self.options);
        Background::start(command)
    }

    /// Runs it to its end, which must be free of errors.
    ///
    /// # Errors
    /// If it is not.
    pub fn run(&self) -> Result<FioReport> {
        FioReport::parse(&self.start()?.finish(self.timeout)?.success()?)
    }
}

impl FioReport {
    /// Reads the report of a run that has ended.
    ///
    /// # Errors
    /// If it is none, or counts errors.
    pub fn parse(printed: &str) -> Result<Self> {
        // fio prints notes before the report.
        let begin = printed.find('{').with_context(|| format!("no report from fio: {printed}"))?;
        let report = printed.get(begin..).unwrap_or_default();
        let value: Value = serde_json::from_str(report).context("fio's report")?;
        let error = value.pointer("/jobs/0/error").and_then(Value::as_u64);
        ensure!(error == Some(0), "fio ended with error {error:?}: {printed}");
        Ok(Self(value))
    }

    /// Operations a second, `direction` being `read` or `write`.
    pub fn iops(&self, direction: &str) -> f64 {
        self.field(direction, "iops").and_then(Value::as_f64).unwrap_or(0.0)
    }

    /// Operations that ended.
    pub fn operations(&self, direction: &str) -> u64 {
        self.field(direction, "total_ios").and_then(Value::as_u64).unwrap_or(0)
    }

    /// The 99th percentile of the completion latency in microseconds.
    pub fn p99_us(&self, direction: &str) -> f64 {
        let percentile = self.field(direction, "clat_ns/percentile/99.000000");
        percentile.and_then(Value::as_f64).unwrap_or(0.0) / 1000.0
    }

    fn field(&self, direction: &str, path: &str) -> Option<&Value> {
        self.0.pointer(&format!("/jobs/0/{direction}/{path}"))
    }
}
