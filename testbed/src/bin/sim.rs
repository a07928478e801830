//! The deterministic simulator's command line: `sim --seed N [--verbose]`, `sim --seeds FROM..TO [--twice]`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use testbed::simulator::{Statistics, run};

/// Runs seeds of the simulator.
#[derive(Parser)]
struct Arguments {
    /// One seed; a failure prints the end of its trace.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Seeds FROM..TO, without TO.
    #[arg(long, required_unless_present = "seed")]
    seeds: Option<String>,
    /// With --seed: prints the trace of a good run too.
    #[arg(long)]
    verbose: bool,
    /// Lines of trace to print.
    #[arg(long, default_value_t = 200)]
    trace_lines: usize,
    /// Runs each seed twice and compares what happened.
    #[arg(long)]
    twice: bool,
    /// Goes on after a failure.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let range = match (&arguments.seed, &arguments.seeds) {
        (Some(seed), _) => *seed..seed.saturating_add(1),
        (None, Some(text)) => parse(text)?,
        (None, None) => 0..0,
    };
    let mut out = std::io::stdout().lock();
    if arguments.seed.is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let (mut passed, mut failed) = (0_u64, 0_u64);
    let mut total = Statistics::default();
    let started = Instant::now();
    let lines = if arguments.seed.is_some() { arguments.trace_lines } else { 0 };
    let count = range.end.saturating_sub(range.start);
    for seed in range {
        let outcome = run(seed, lines);
        total.add(&outcome.statistics);
        let mut failure = outcome.failure;
        if arguments.twice && run(seed, 0).hash != outcome.hash {
            failure.get_or_insert_with(|| "two runs of the seed differ".to_owned());
        }
        if arguments.seed.is_some() && (arguments.verbose || failure.is_some()) {
            for line in &outcome.trace {
                writeln!(out, "{line}")?;
            }
        }
        match failure {
            None => passed += 1,
            Some(text) => {
                failed += 1;
                writeln!(out, "seed {seed} FAILED: {text}")?;
                if !arguments.keep_going {
                    break;
                }
            }
        }
        if count > 1000 && (passed + failed).is_multiple_of(1000) {
            writeln!(
                out,
                "{} of {count} seeds, {failed} failed, {:.0} s",
                passed + failed,
                started.elapsed().as_secs_f64()
            )?;
        }
    }
    writeln!(out, "{total:?}")?;
    writeln!(out, "{passed} passed, {failed} failed")?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn parse(text: &str) -> anyhow::Result<std::ops::Range<u64>> {
    let (from, to) =
        text.split_once("..").ok_or_else(|| anyhow::anyhow!("--seeds wants FROM..TO, not '{text}'"))?;
    Ok(from.parse()?..to.parse()?)
}
