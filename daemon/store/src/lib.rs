//! io_uring, O_DIRECT and aligned buffers: knows offsets and buffers, not volumes.
//!
//! A shard thread owns one [`Ring`]. It hands the ring [`Operation`]s, each with a [`Token`] of its own choice,
//! and gets each back as one [`Completion`] with the memory that it lent. Memory that the kernel may touch is
//! owned by the ring until then, so no caller can free or change it too early.
//!
//! - [`BufferPool`] hands out page-aligned [`Buffer`]s within a budget; a refusal is back-pressure.
//! - [`File`] is a data file or block device; [`Socket`] a connected stream.
//! - [`Waker`] ends a wait from another thread.
//!
//! The crate decides nothing: it orders no operations, retries no errors and knows no volumes. `unsafe` lives in
//! the private module `sys` only.

mod file;
mod operation;
mod payload;
mod pool;
mod progress;
mod ring;
mod socket;
mod sys;
mod waker;
mod worker;

pub use file::{File, FileError};
pub use operation::{Completion, Operation, Returned, Token};
pub use payload::Payload;
pub use pool::{BUFFER_BYTES_MAX, Buffer, BufferPool};
pub use ring::{Ring, RingError};
pub use socket::Socket;
pub use waker::Waker;
