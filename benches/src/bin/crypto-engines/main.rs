//! The XTS engines, OpenSSL's XTS and CRC-32C side by side: `benches/crypto`.
//!
//! The candidates take turns, and the median of the rounds counts. What is measured is CPU time, which is what
//! `openssl speed` measures too: on a shared machine the clock on the wall tells little.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command")]

mod openssl;

use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;

use aes::Aes256;
use aes::cipher::KeyInit;
use anyhow::{Context, Result, ensure};
use block::Lba;
use clap::Parser;
use crypto::{DataKey, Engine, VolumeCipher};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use xts_mode::{Xts128, get_tweak_default};

/// Bytes in one data unit.
pub(crate) const UNIT_BYTES: usize = 4096;
const FIRST_UNIT: Lba = Lba(1_000_003);
/// CPU time of one measurement; shorter ones see the clock's granularity and the CPU's change of pace.
const MEASUREMENT_NS: u64 = 200_000_000;

/// How far behind OpenSSL an engine may fall in `--check`, as a ratio. The margins are wide: measured ratios are
/// 0.98 and more for `aws-lc`, 0.65 and more for `rustcrypto`, less a fifth on a busy machine. What they are for is
/// code that lost its vector instructions, which costs a factor of two and more.
const FLOORS: &[(&str, f64)] = &[("aws-lc", 0.75), ("rustcrypto", 0.45)];

#[derive(Parser)]
#[command(
    about = "Measures the XTS engines, OpenSSL and CRC-32C side by side, in GB per second of CPU time."
)]
struct Arguments {
    /// How often each candidate is measured; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of a request.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..=65536))]
    request_kib: u32,
    /// Also write the XTS figures there: a list of {engine, unit_bytes, direction, gb_per_s}.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail if an engine falls behind OpenSSL by more than its margin.
    #[arg(long)]
    check: bool,
}

/// Which way, in `--json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    Encrypt,
    Decrypt,
}

/// One line of `--json`.
#[derive(Serialize)]
struct Figure {
    engine: &'static str,
    unit_bytes: usize,
    direction: Direction,
    gb_per_s: f64,
}

/// What is measured: how, and the figures so far in GB/s.
struct Candidate {
    engine: &'static str,
    /// Of an XTS engine.
    direction: Option<Direction>,
    measure: Box<dyn FnMut() -> Result<f64>>,
    rounds: Vec<f64>,
}

impl Candidate {
    fn new(
        engine: &'static str,
        direction: Option<Direction>,
        measure: impl FnMut() -> Result<f64> + 'static,
    ) -> Self {
        Self { engine, direction, measure: Box::new(measure), rounds: Vec::new() }
    }

    /// A candidate that works on a buffer of `length` bytes again and again. The content is never zero, so the zero
    /// rule takes its usual path.
    fn in_place(
        engine: &'static str,
        direction: Option<Direction>,
        length: usize,
        mut work: impl FnMut(&mut [u8]) + 'static,
    ) -> Self {
        let mut buffer = vec![0x5a; length];
        Self::new(engine, direction, move || gigabytes_per_second(&mut buffer, &mut work))
    }

    fn median(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort_by(f64::total_cmp);
        rounds.get(rounds.len() / 2).copied().unwrap_or_default()
    }
}

fn gigabytes_per_second(buffer: &mut [u8], work: &mut impl FnMut(&mut [u8])) -> Result<f64> {
    let begin = cpu_ns()?;
    let mut bytes = 0;
    loop {
        for _ in 0..16 {
            work(black_box(buffer));
            bytes += buffer.len();
        }
        let elapsed = cpu_ns()? - begin;
        if elapsed >= MEASUREMENT_NS {
            // Bytes per nanosecond are gigabytes per second.
            return Ok(f64::from(u32::try_from(bytes / 1024)?) * 1024.0 / f64::from(u32::try_from(elapsed)?));
        }
    }
}

/// CPU time of this thread.
fn cpu_ns() -> Result<u64> {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Ok(u64::try_from(time.tv_sec)? * 1_000_000_000 + u64::try_from(time.tv_nsec)?)
}

fn candidates(length: usize) -> Result<Vec<Candidate>> {
    let mut key = [0; 64];
    key.iter_mut().zip(0..).for_each(|(byte, value)| *byte = value);
    let mut candidates = Vec::new();
    for direction in [Direction::Encrypt, Direction::Decrypt] {
        for engine in Engine::COMPILED {
            let cipher = VolumeCipher::with_engine(*engine, &DataKey::from_random(key)?);
            candidates.push(Candidate::in_place(engine.name(), Some(direction), length, move |data| {
                match direction {
                    Direction::Encrypt => cipher.seal(FIRST_UNIT, data),
                    Direction::Decrypt => cipher.open(FIRST_UNIT, data),
                }
            }));
        }
        let oracle = xts_mode_cipher(&key);
        let first = u128::from(FIRST_UNIT.0);
        candidates.push(Candidate::in_place(
            "xts-mode",
            Some(direction),
            length,
            move |data| match direction {
                Direction::Encrypt => oracle.encrypt_area(data, UNIT_BYTES, first, get_tweak_default),
                Direction::Decrypt => oracle.decrypt_area(data, UNIT_BYTES, first, get_tweak_default),
            },
        ));
        if openssl::version().is_some() {
            candidates.push(Candidate::new("openssl", Some(direction), move || openssl::measure(direction)));
        }
    }
    candidates.push(Candidate::in_place("crc32c", None, UNIT_BYTES, |data| {
        black_box(crc32c::crc32c(data));
    }));
    Ok(candidates)
}

fn xts_mode_cipher(key: &[u8; 64]) -> Xts128<Aes256> {
    let mut halves = [[0; 32]; 2];
    halves.as_flattened_mut().copy_from_slice(key);
    let [data, tweak] = halves.map(|half| Aes256::new(&half.into()));
    Xts128::new(data, tweak)
}

/// The figures as a table, with the ratio to OpenSSL in the same direction.
fn print(candidates: &[Candidate]) {
    println!("{:<12} {:<10} {:>8} {:>10}", "engine", "direction", "GB/s", "x openssl");
    for candidate in candidates {
        let direction = match candidate.direction {
            Some(Direction::Encrypt) => "encrypt",
            Some(Direction::Decrypt) => "decrypt",
            None => "checksum",
        };
        let ratio = ratio_to_openssl(candidate, candidates);
        let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!("{:<12} {direction:<10} {:>8.2} {ratio:>10}", candidate.engine, candidate.median());
    }
}

fn ratio_to_openssl(candidate: &Candidate, all: &[Candidate]) -> Option<f64> {
    let direction = candidate.direction?;
    let peer = all.iter().find(|peer| peer.engine == "openssl" && peer.direction == Some(direction))?;
    Some(candidate.median() / peer.median())
}

/// Whether every engine keeps its margin; says which does not.
fn holds_floors(candidates: &[Candidate]) -> Result<bool> {
    ensure!(openssl::version().is_some(), "--check needs the command openssl to compare with: install it");
    let mut holds = true;
    for candidate in candidates {
        let floor = FLOORS.iter().find(|(engine, _)| *engine == candidate.engine);
        let (Some((engine, floor)), Some(ratio)) = (floor, ratio_to_openssl(candidate, candidates)) else {
            continue;
        };
        if ratio < *floor {
            eprintln!("{engine} is at {ratio:.2} of OpenSSL's speed, less than {floor}");
            holds = false;
        }
    }
    Ok(holds)
}

fn figures(candidates: &[Candidate]) -> Vec<Figure> {
    let figure = |candidate: &Candidate| {
        let direction = candidate.direction?;
        let gb_per_s = (candidate.median() * 100.0).round() / 100.0;
        Some(Figure { engine: candidate.engine, unit_bytes: UNIT_BYTES, direction, gb_per_s })
    };
    candidates.iter().filter_map(figure).collect()
}

fn run(arguments: &Arguments) -> Result<bool> {
    let length = usize::try_from(arguments.request_kib)? * 1024 / UNIT_BYTES * UNIT_BYTES;
    let mut candidates = candidates(length)?;
    let peer = openssl::version().unwrap_or("no OpenSSL: its command is not installed");
    println!(
        "XTS-AES-256, units of {UNIT_BYTES} bytes, requests of {length}; {} rounds; preferred engine {}; {peer}",
        arguments.rounds,
        Engine::preferred(),
    );
    for _ in 0..arguments.rounds {
        for candidate in &mut candidates {
            let measured = (candidate.measure)()?;
            candidate.rounds.push(measured);
        }
    }
    print(&candidates);
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(&figures(&candidates))? + "\n";
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(!arguments.check || holds_floors(&candidates)?)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("crypto-engines: {error:#}");
            ExitCode::FAILURE
        }
    }
}
