//! What happens between a host command and device operations.
//!
//! Guarantees, for one volume: commands are charged to its IOPS limit and split into steps ([`volume`]);
//! overlapping writes are serialised ([`locks`]); blocks that the write journal no longer holds, and regions
//! that may differ from the target, are kept ([`dirty_map`], [`intent_map`], [`region_tracker`]); a cut of the
//! write journal becomes disjoint device operations ([`apply`]), and what is committed but not yet at home is
//! found in the redo log ([`overlay`]).
//!
//! The crate is pure: it holds no payload, key, file or clock. Time comes in as an argument, device operations
//! go out as values, and the caller reports how they ended.

pub mod apply;
mod arena;
mod bits;
pub mod dirty_map;
pub mod intent_map;
pub mod locks;
pub mod overlay;
pub mod qos;
pub mod region_tracker;
mod runs;
pub mod volume;

pub use arena::Arena;

/// A host command in flight; the caller's number, never used twice at once on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// A step of a command, or a copy read of a resync; numbered by the volume, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub u64);

/// The longest range of one step, and the length from which a trim or a write of zeroes becomes ZERO_RANGE.
///
/// Shorter trims are not worth it: unwritten extents make later writes dearer, and ZERO_RANGE disturbs the
/// I/O next to it.
pub const STEP_BYTES_MAX: u64 = 1 << 20;

/// The longest range of one ZERO_RANGE step. It moves no data, and each waits for the file's I/O in flight: a trim of
/// 1 TiB in steps of 1 MiB would outlast a client's patience, and a much longer step would hold up its neighbours.
pub const ZERO_STEP_BYTES_MAX: u64 = 64 << 20;
