//! The NBD server, fixed newstyle: docs/protocols/nbd.md says what is served and how.
//!
//! A connection is two machines, one after the other, and neither does I/O:
//!
//! 1. [`Handshake`] answers options until the client has chosen an export ([`HandshakeOutput::Established`]).
//!    It is fed from where connections are accepted; deadline, connection cap and TLS itself are the caller's.
//! 2. [`Transmission`] turns requests into [`block::HostCommand`]s, in the shard that owns the volume. Write
//!    payloads never pass through it: it says where one begins, and the caller takes it into its own buffer.
//!    [`ReplyStyle`] encodes the answers; read data travels beside the head.
//!
//! The specification is `doc/proto.md` of NetworkBlockDevice/nbd, with its branch `extension-ext-header` for extended
//! headers; all integers are big-endian.

mod export;
pub mod fuzz;
mod handshake;
mod layout;
mod option_reply;
mod option_request;
mod reply;
mod request;
#[cfg(test)]
mod tests;
mod transmission;

pub use export::{ExportDirectory, ExportInfo, ExportRefusal, Negotiated};
pub use handshake::{CloseReason, Handshake, HandshakeOutput, TlsMode};
pub use option_request::OptionFault;
pub use reply::{Cookie, ERROR_REPLY_BYTES_MAX, REPLY_HEAD_BYTES_MAX, ReplyStyle, STATUS_EXTENTS_MAX, errno};
pub use request::Refusal;
pub use transmission::{BrokenReason, Event, Parsed, Transmission};

/// The longest payload that the block-size information advertises: what every client is told to keep to.
pub const PAYLOAD_BYTES_ADVERTISED: u32 = 32 << 20;
/// The longest payload that is served: some clients send up to 64 MiB whatever was advertised.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
/// The longest option data that is kept; longer data is consumed and answered with an error.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// The longest string of the protocol: export names, descriptions, error texts.
pub const STRING_BYTES_MAX: usize = 4096;
/// The most options of one handshake: bounds what a client that never chooses an export can ask for.
pub const OPTIONS_MAX: u32 = 16_384;
