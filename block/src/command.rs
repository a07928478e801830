//! What a host asks of a volume, and what it is answered, whatever the wire protocol.

use crate::ByteRange;

/// A host's command. Payloads travel beside it, keyed by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostCommand {
    /// Read the bytes of `range`.
    Read {
        /// The bytes wanted.
        range: ByteRange,
    },
    /// Write the payload to `range`.
    Write {
        /// Where the payload goes; its length is the payload's.
        range: ByteRange,
        /// Answer only when the data is on stable media (forced unit access).
        fua: bool,
    },
    /// Make every write that was answered before durable.
    Flush,
    /// The host no longer needs the bytes; they may keep their content or read as zeros.
    Trim {
        /// The bytes given up.
        range: ByteRange,
        /// Answer only when the effect is on stable media.
        fua: bool,
    },
    /// The bytes read as zeros afterwards.
    WriteZeroes {
        /// The bytes to zero.
        range: ByteRange,
        /// Answer only when the effect is on stable media.
        fua: bool,
        /// Keep the space allocated (always true of thick volumes).
        no_hole: bool,
        /// Fail with [`HostError::NotSupported`], and change nothing, where it would be no faster than a write.
        fast: bool,
    },
    /// The bytes will be read soon.
    Cache {
        /// The bytes to bring closer.
        range: ByteRange,
    },
    /// Tell which parts of `range` are known to read as zeros.
    Status {
        /// The bytes asked about.
        range: ByteRange,
        /// One extent is enough.
        one: bool,
    },
}

/// A run of bytes with one allocation status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number of bytes; never 0.
    pub length: u64,
    /// True if they are known to read as zeros.
    pub zero: bool,
}

impl HostCommand {
    /// The bytes that the command concerns; `None` for a flush.
    pub const fn range(&self) -> Option<ByteRange> {
        match self {
            Self::Read { range } | Self::Cache { range } => Some(*range),
            Self::Write { range, .. } | Self::Trim { range, .. } => Some(*range),
            Self::WriteZeroes { range, .. } | Self::Status { range, .. } => Some(*range),
            Self::Flush => None,
        }
    }

    /// True if the command may change the volume's content.
    pub const fn changes_content(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }
}

/// Why a host's command was refused or failed. Front ends map it to their own codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HostError {
    /// The export is read-only.
    #[error("the export is read-only")]
    ReadOnly,
    /// The device failed, or the volume is poisoned after a failed flush.
    #[error("the device failed")]
    Io,
    /// A read, trim or other request is malformed or reaches beyond the volume's end.
    #[error("the request is invalid")]
    Invalid,
    /// A write reaches beyond the volume's end, or the device has no space.
    #[error("no space")]
    NoSpace,
    /// The command or a flag of it is not supported here.
    #[error("not supported")]
    NotSupported,
    /// The volume goes offline: shutdown, fencing or a role change. The host should reconnect.
    #[error("the volume is going offline")]
    Shutdown,
}

/// The outcome of a host's command.
pub type HostResult = Result<(), HostError>;
