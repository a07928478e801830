//! The command line.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use crate::target::Target;

/// The largest payload that NBD clients send and servers accept.
const BLOCK_BYTES_MAX: u32 = 64 << 20;

/// Puts load on NBD servers and reports IOPS, latency and the server's CPU time per I/O
#[derive(Parser)]
#[command(name = "nbd-load", version)]
pub(crate) struct Arguments {
    /// An export: `nbd+unix:///NAME?socket=PATH` or `nbd://HOST[:PORT]/NAME`; may be given several times
    #[arg(long = "uri", value_name = "URI", required = true)]
    pub(crate) targets: Vec<Target>,
    /// Connections to each export
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) connections: u32,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) queue_depth: u16,
    /// The length of a request, as in 4k or 64m
    #[arg(long, default_value = "4k", value_parser = block)]
    pub(crate) block: u32,
    /// What to send; idle: one read a connection, then nothing
    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    pub(crate) pattern: Pattern,
    /// How long to measure
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// How long to run before that
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=3600))]
    warmup_seconds: u32,
    /// Report the gaps between the completions of each connection; only with a queue depth of 1
    #[arg(long)]
    spacing: bool,
    /// Go over each export once, however long it takes; only with the patterns read and write
    #[arg(long)]
    once: bool,
    /// The server's process, to report its CPU time per I/O
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// Where the random offsets start
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print one line of JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

impl Arguments {
    /// The length of the measurement.
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds))
    }

    /// The length of the run before the measurement.
    pub(crate) fn warmup(&self) -> Duration {
        Duration::from_secs(u64::from(self.warmup_seconds))
    }

    /// Whether to end when each block had its request.
    ///
    /// # Errors
    /// When it is asked for with a pattern that does not go from block to block.
    pub(crate) fn once(&self) -> Result<bool> {
        let in_order = matches!(self.pattern, Pattern::Read | Pattern::Write);
        ensure!(!self.once || in_order, "--once needs --pattern read or write");
        Ok(self.once)
    }

    /// Whether to measure gaps.
    ///
    /// # Errors
    /// When it is asked for with more than one request in flight: completions of a batch have no spacing.
    pub(crate) fn spacing(&self) -> Result<bool> {
        ensure!(!self.spacing || self.queue_depth == 1, "--spacing needs --queue-depth 1");
        Ok(self.spacing)
    }
}

/// What a connection sends.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    Randread,
    Randwrite,
    Read,
    Write,
    Idle,
}

impl Pattern {
    pub(crate) const fn writes(self) -> bool {
        match self {
            Self::Randwrite | Self::Write => true,
            Self::Randread | Self::Read | Self::Idle => false,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::Idle => "idle",
        }
    }
}

fn block(text: &str) -> Result<u32> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix(['m', 'M']).map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    let number: u32 = digits.parse().context("a length is a number, with k or m behind it or not")?;
    let bytes = number.checked_mul(unit).context("too long")?;
    ensure!((1..=BLOCK_BYTES_MAX).contains(&bytes), "from 1 byte to 64m");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::block;

    #[test]
    fn lengths_are_read_with_and_without_a_unit() {
        assert_eq!(block("4k").unwrap(), 4096);
        assert_eq!(block("64M").unwrap(), 64 << 20);
        assert_eq!(block("513").unwrap(), 513);
        for wrong in ["", "k", "0", "65m", "4g", "4294967295m"] {
            assert!(block(wrong).is_err(), "{wrong}");
        }
    }
}
