//! Fuzzes the decoders of outside bytes for some seconds each: `fuzz --seconds N --seed S [--target NAME]`.
//!
//! A panic prints the seed, saves the input and ends the run; `--input FILE --target NAME` tries a saved input again.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what it prints is its product")]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use testbed::fuzzing::{TARGETS, current_input, fuzz};

#[derive(Parser)]
struct Arguments {
    /// Seconds for each target.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// The seed that repeats a run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
    /// Only this saved input.
    #[arg(long, requires = "target")]
    input: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let chosen = |name: &str| arguments.target.as_ref().is_none_or(|target| target == name);
    let mut found = false;
    for target in TARGETS.iter().filter(|target| chosen(target.name)) {
        found = true;
        if let Some(path) = &arguments.input {
            (target.entry)(&std::fs::read(path).with_context(|| path.display().to_string())?);
            println!("{:<20} accepts {}", target.name, path.display());
            continue;
        }
        report_panics(target.name, arguments.seed);
        let tried = fuzz(target, arguments.seed, Duration::from_secs(arguments.seconds), u64::MAX);
        println!("{:<20} {tried} inputs from seed {}", target.name, arguments.seed);
    }
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    ensure!(found, "no such target; there are {}", names.join(", "));
    Ok(())
}

/// Before the panic ends the process, saves the input and tells how to repeat it.
fn report_panics(target: &'static str, seed: u64) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        let path = std::env::temp_dir().join(format!("fuzz-{target}-{seed}.bin"));
        let saved = std::fs::write(&path, current_input());
        eprintln!("target {target}, seed {seed}: input in {} ({saved:?})", path.display());
        eprintln!("repeat: fuzz --target {target} --input {}", path.display());
    }));
}
