//! Fuzzing of every decoder of outside bytes, on stable Rust: valid inputs, changed again and again by a seeded
//! generator, so that a seed repeats a run.
//!
//! Checksums would stop nearly every changed input at the door; so half of the inputs get their checksums repaired
//! and reach the checks behind. What a decoder promises (no panic, and what it accepts encodes to the same bytes) is
//! asserted by the entry points in the crates themselves.

mod mutation;
mod seeds;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use mutation::mutate;

use crate::harness::Random;

/// The longest input that a mutation makes.
pub const INPUT_BYTES_MAX: usize = 64 << 10;

/// Something that takes outside bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Takes any bytes and must not panic.
    pub entry: fn(&[u8]),
    /// Valid inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Makes the checksums of a changed input right again.
    pub repair: fn(&mut [u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "nbd-handshake",
        entry: frontend::nbd::fuzz::handshake,
        seeds: seeds::handshake,
        repair: keep,
    },
    Target {
        name: "nbd-transmission",
        entry: frontend::nbd::fuzz::transmission,
        seeds: seeds::transmission,
        repair: keep,
    },
    Target {
        name: "nbd-meta-contexts",
        entry: frontend::nbd::fuzz::meta_contexts,
        seeds: seeds::meta_contexts,
        repair: keep,
    },
    Target {
        name: "nbd-status-payload",
        entry: frontend::nbd::fuzz::status_payload,
        seeds: seeds::status_payloads,
        repair: keep,
    },
    Target { name: "nbd-session", entry: frontend::nbd::fuzz::session, seeds: seeds::sessions, repair: keep },
    Target {
        name: "journal-cut",
        entry: journal::fuzz::decode_cut,
        seeds: seeds::cuts,
        repair: seeds::repair_cut,
    },
    Target {
        name: "journal-checkpoint",
        entry: journal::fuzz::checkpoint,
        seeds: seeds::checkpoints,
        repair: seeds::repair_page,
    },
    Target {
        name: "journal-segment",
        entry: journal::fuzz::segment_header,
        seeds: seeds::segment_headers,
        repair: seeds::repair_page,
    },
    Target {
        name: "journal-spill-index",
        entry: journal::fuzz::spill_index,
        seeds: seeds::spill_indexes,
        repair: seeds::repair_tail,
    },
    Target { name: "key-record", entry: daemon::fuzz::key_record, seeds: seeds::key_records, repair: keep },
    Target {
        name: "audit-log",
        entry: daemon::fuzz::audit_log,
        seeds: seeds::audit_logs,
        repair: seeds::repair_audit_line,
    },
    Target { name: "protocol-message", entry: protocol::fuzz::message, seeds: seeds::messages, repair: keep },
];

const fn keep(_input: &mut [u8]) {}

/// The input that is being tried, for whoever reports a panic.
static CURRENT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// The input that was being tried last.
pub fn current_input() -> Vec<u8> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Tries inputs until the time is over or `inputs_max` were tried; how many were.
pub fn fuzz(target: &Target, seed: u64, duration: Duration, inputs_max: u64) -> u64 {
    let begin = Instant::now();
    let mut random = Random::new(seed);
    let mut corpus = (target.seeds)();
    corpus.push(Vec::new());
    for input in &corpus {
        try_input(target, input);
    }
    let mut tried = u64::try_from(corpus.len()).unwrap_or(u64::MAX);
    while tried < inputs_max && begin.elapsed() < duration {
        let mut input = corpus.get(random.index(corpus.len())).cloned().unwrap_or_default();
        for _ in 0..=random.below(4) {
            let other = corpus.get(random.index(corpus.len())).map_or(&[][..], Vec::as_slice);
            mutate(&mut input, other, &mut random);
        }
        if random.chance(500) {
            (target.repair)(&mut input);
        }
        try_input(target, &input);
        tried += 1;
    }
    tried
}

fn try_input(target: &Target, input: &[u8]) {
    {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        current.clear();
        current.extend_from_slice(input);
    }
    (target.entry)(input);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_accepted_and_a_short_run_finds_nothing() {
        for target in TARGETS {
            assert!(!(target.seeds)().is_empty(), "{}", target.name);
            fuzz(target, 1, Duration::from_secs(60), 2_000);
        }
    }

    #[test]
    fn repaired_seeds_are_unchanged() {
        for target in TARGETS {
            for seed in (target.seeds)() {
                let mut repaired = seed.clone();
                (target.repair)(&mut repaired);
                assert_eq!(repaired, seed, "{}", target.name);
            }
        }
    }

    /// A decoder with a planted defect: it trusts the length in its second byte.
    fn defective(input: &[u8]) {
        if input.first() == Some(&b'F') && input.len() > 2 {
            let length = usize::from(input[1]);
            assert!(length == 0 || input.get(2..2 + length).is_some(), "planted");
        }
    }

    #[test]
    fn a_planted_defect_is_found() {
        let target =
            Target { name: "planted", entry: defective, seeds: || vec![b"F\x04abcd".to_vec()], repair: keep };
        let found = std::panic::catch_unwind(|| fuzz(&target, 7, Duration::from_secs(60), 100_000));
        assert!(found.is_err(), "100,000 inputs do not find the defect");
    }

    #[test]
    fn a_seed_gives_the_same_inputs() {
        let run = |seed| {
            let mut random = Random::new(seed);
            let mut input = b"some bytes to change".to_vec();
            (0..200).for_each(|_| mutate(&mut input, b"other", &mut random));
            input
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }
}
