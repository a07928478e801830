//! Record, cut and segment formats; ring and redo accounting; recovery scan.
//!
//! A *cut* is a batch of records that commits atomically at the target; the same bytes travel on the wire and
//! stand in the target's redo log. The crate encodes and verifies cuts, keeps the primary's RAM [`Ring`] of
//! records, seals what overflows it into [`SpillSegment`]s, places cuts in the target's [`RedoLog`] and finds them again after a crash ([`recover`]).
//!
//! It is pure: it says which bytes belong where, and the caller reads, writes and syncs them. It knows neither
//! keys nor plaintext: payloads are ciphertext. The formats are specified in docs/formats/journal.md.

mod change;
mod checkpoint;
mod cut;
mod error;
pub mod fuzz;
mod layout;
mod record;
mod recovery;
mod redo;
mod ring;
mod segment;
mod spill;

pub use change::{Change, ChangeContent, changes, sizes, without_voided};
pub use checkpoint::Checkpoint;
pub use cut::{Cut, CutMeta, CutSize, EncodedCut, decode, encode, header_only, peek};
pub use error::{CutError, PageError, RecordFault};
pub use layout::{Lineage, PAGE_BYTES};
pub use record::{Record, RecordKind};
pub use recovery::{Recovered, RecoveredCut, RecoveryError, RecoveryStop, recover};
pub use redo::{Cursor, Placement, RedoConfig, RedoConfigError, RedoFull, RedoLog};
pub use ring::{Ring, RingBudget, RingFull};
pub use segment::SegmentHeader;
pub use spill::{SpillFault, SpillIndex, SpillIndexError, SpillSegment, SpillSpace};

/// Bytes of a cut's header; what [`peek`] wants.
pub const CUT_HEADER_BYTES: usize = 256;
/// The most bytes of a whole cut, head and payloads: what a receiver must be ready to buffer.
pub const CUT_BYTES_MAX: u64 = 8 << 20;
/// The most records in a cut: bounds the head to 49 pages and the target's work per commit.
pub const RECORDS_MAX: usize = 4096;
/// The most payload bytes that fit into a cut whatever its number of records.
pub const CUT_PAYLOAD_BYTES_MAX: u64 = CUT_BYTES_MAX - cut::HEAD_BYTES_MAX;
/// The smallest segment that takes every cut; settings should not allow less.
pub const SEGMENT_BYTES_MIN: u64 = CUT_BYTES_MAX + PAGE_BYTES;
