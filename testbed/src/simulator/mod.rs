//! The deterministic simulator: the production group machine of two sites on virtual disks, network and clocks.
//!
//! One seed is one run: no thread, no real time, every choice from one generator. A run draws a plan (sizes, budgets,
//! a random subset of operations and faults), lets hosts write while faults happen, then heals everything and waits
//! until both sites are equal. The oracle and the checks know nothing of the production code but its sequences and
//! formats.
//!
//! Fault model per zone (what may happen without any promise being broken):
//! - every file: see `disk`; a kill keeps completed writes and loses the process, of the writes in flight any sectors
//!   may land; a power loss also loses unflushed sectors;
//! - home of a volume: writes, reads and syncs fail; a failed read fails once;
//! - redo segments: writes, syncs and reads fail, but for the reads of a start;
//! - spill file: writes, syncs and reads fail, what is read is damaged, all of it is slow;
//! - intent file, checkpoint: writes fail and tear; reads of them do not fail;
//! - group state and clean file: written atomically; a failed write of the state may have landed;
//! - network: delay, cut, flapping, a damaged cut; control and data overtake each other;
//! - clocks: constant offset between the monotonic clocks, skew and jumps of the wall clocks.
#![allow(clippy::indexing_slicing, reason = "a test tool: an index out of bounds is a failed run")]

mod boot;
mod check;
mod disk;
mod drill;
mod fault;
#[cfg(test)]
mod growing;
mod host;
mod leases;
mod network;
mod oracle;
mod orphans;
mod perform;
mod plan;
mod pressure;
mod rewind;
#[cfg(test)]
mod rewinding;
#[cfg(test)]
mod scripted;
mod site;
#[cfg(test)]
mod switching;
mod verifying;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::World;

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Names everything that happened.
    pub hash: u64,
    /// What went wrong.
    pub failure: Option<String>,
    /// The last lines of the trace, if it was asked for.
    pub trace: Vec<String>,
    /// What the run did, for a summary.
    pub statistics: Statistics,
}

/// Counts of one run or of many.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Events processed.
    pub events: u64,
    /// Host commands answered.
    pub commands: u64,
    /// Cuts sent.
    pub cuts: u64,
    /// Starts of a site after the first.
    pub boots: u64,
    /// Promotions.
    pub promotions: u64,
    /// Promotions to a point of the retention window.
    pub rewinds: u64,
    /// Drills begun.
    pub drills: u64,
    /// Roles that a planned switch moved.
    pub switches: u64,
    /// Searches for orphaned writes that came to an end.
    pub searches: u64,
    /// Cuts of resync passes.
    pub staged: u64,
    /// Images that were checked against the oracle.
    pub images: u64,
    /// Verifies that found and repaired what was planted.
    pub verified: u64,
    /// Volumes that grew at their primary.
    pub grown: u64,
    /// Segments written to spill files.
    pub spilled: u64,
    /// Starts that went on with a clean stop's journal.
    pub continued: u64,
    /// Looks at a target whose lease was valid.
    pub leased: u64,
    /// Failovers that said they lose nothing.
    pub lossless: u64,
}

impl Statistics {
    /// Adds the counts of another run.
    pub const fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.commands += other.commands;
        self.cuts += other.cuts;
        self.boots += other.boots;
        self.promotions += other.promotions;
        self.rewinds += other.rewinds;
        self.drills += other.drills;
        self.switches += other.switches;
        self.searches += other.searches;
        self.staged += other.staged;
        self.images += other.images;
        self.verified += other.verified;
        self.grown += other.grown;
        self.spilled += other.spilled;
        self.continued += other.continued;
        self.leased += other.leased;
        self.lossless += other.lossless;
    }
}

/// Runs one seed.
pub fn run(seed: u64, trace_lines: usize) -> Outcome {
    let mut world = World::new(seed, trace_lines);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    if ended.is_err() {
        world.failure.get_or_insert_with(|| "the production code panicked".to_owned());
    }
    Outcome {
        hash: world.hash,
        failure: world.failure.take(),
        trace: world.trace.take().map(Vec::from).unwrap_or_default(),
        statistics: world.statistics,
    }
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
