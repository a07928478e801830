//! The shared vocabulary of Farshore: identities, checked units, host commands, positions, time.
//!
//! Every other crate speaks in these types. The crate is pure: it owns no clock, file, socket or thread.
//! Words have the meaning that docs/GLOSSARY.md gives them.

mod class;
mod command;
mod identity;
mod position;
mod time;
mod units;

pub use class::{IopsLimit, StorageClass, TIB};
pub use command::{Extent, HostCommand, HostError, HostResult};
pub use identity::{MirrorId, NameError, SiteId, TenantId, VolumeId, VolumeIndex, VolumeName};
pub use position::{ChainHash, Epoch, Incarnation, Position, Sequence, Tip};
pub use time::{Monotonic, WallTime};
pub use units::{BlockCount, ByteCount, ByteRange, DATA_UNIT_BYTES, Lba, SECTOR_BYTES, SizeError};
