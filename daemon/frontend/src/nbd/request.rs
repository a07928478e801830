//! One request of the transmission phase: checked against the export, or refused.

use block::{ByteRange, HostCommand, HostError};

use super::layout::{
    ExtendedRequestHeader, RequestHeader, StatusPayload, command, command_flag as flag, context,
};
use super::{Cookie, PAYLOAD_BYTES_MAX, ReplyStyle, errno};

/// The payload of a status request that is served: a length and the one context that there is.
const STATUS_PAYLOAD_BYTES: u64 = 12;
const _: () = assert!(size_of::<StatusPayload>() == 12);

/// Why a request was refused before it reached the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A request type that is not served.
    #[error("the command is not supported")]
    UnknownCommand,
    /// A flag that is not defined for the command, or was not negotiated.
    #[error("a flag of the command is not supported")]
    UnknownFlag,
    /// A payload with a command that takes none.
    #[error("the command takes no payload")]
    UnexpectedPayload,
    /// A flush with an offset or a length.
    #[error("a flush takes neither offset nor length")]
    FlushRange,
    /// A status request, but the client did not select `base:allocation` for this export.
    #[error("no metadata context was selected for this export")]
    NoContext,
    /// A status request for zero bytes: its reply could not have an extent.
    #[error("the status of zero bytes cannot be told")]
    EmptyStatus,
    /// The payload of a status request is not a length and the context's identity, once.
    #[error("the payload does not name the selected context once")]
    StatusPayload,
    /// A command that changes content, on a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// A request that changes nothing, or a trim, that reaches beyond the export's end.
    #[error("the request reaches beyond the end of the export")]
    ReadBeyondEnd,
    /// A write that reaches beyond the export's end.
    #[error("the write reaches beyond the end of the export")]
    WriteBeyondEnd,
    /// A read or write of more than [`PAYLOAD_BYTES_MAX`].
    #[error("the payload is longer than 64 MiB")]
    PayloadTooLong,
    /// A read of more than [`PAYLOAD_BYTES_MAX`] that must not be fragmented.
    #[error("more than 64 MiB cannot be read without fragmentation")]
    UnfragmentedTooLong,
}

impl Refusal {
    /// The NBD error number that the host is answered.
    pub const fn errno(self) -> u32 {
        match self {
            Self::UnknownCommand
            | Self::UnknownFlag
            | Self::UnexpectedPayload
            | Self::FlushRange
            | Self::NoContext
            | Self::EmptyStatus
            | Self::StatusPayload
            | Self::ReadBeyondEnd
            | Self::PayloadTooLong => errno(HostError::Invalid),
            Self::ReadOnly => errno(HostError::ReadOnly),
            Self::WriteBeyondEnd => errno(HostError::NoSpace),
            // EOVERFLOW is for this alone, and no volume can answer it.
            Self::UnfragmentedTooLong => 75,
        }
    }
}

/// What the requests of a connection are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) reply_style: ReplyStyle,
    pub(super) base_allocation: bool,
}

/// A request header of either size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) name: u64,
    pub(super) offset: u64,
    /// Of the payload or of the range, which are the same where there is a range.
    pub(super) length: u64,
    /// True if `length` bytes of payload follow.
    has_payload: bool,
}

/// What a request that was not refused asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Run(HostCommand),
    /// The payload of a status request has to be read.
    ReadStatusPayload,
    /// A request for zero bytes: there is nothing to do.
    Nothing,
    Disconnect,
}

impl Request {
    pub(super) fn compact(header: &RequestHeader) -> Self {
        let kind = header.kind.get();
        Self {
            flags: header.flags.get(),
            kind,
            name: header.cookie.get(),
            offset: header.offset.get(),
            length: header.length.get().into(),
            has_payload: kind == command::WRITE,
        }
    }

    /// A write has its payload even where the client forgot to flag it: that is what such clients send.
    pub(super) fn extended(header: &ExtendedRequestHeader) -> Self {
        let (kind, flags) = (header.kind.get(), header.flags.get());
        Self {
            flags,
            kind,
            name: header.cookie.get(),
            offset: header.offset.get(),
            length: header.length.get(),
            has_payload: kind == command::WRITE || flags & flag::PAYLOAD_LEN != 0,
        }
    }

    /// The bytes of payload behind the request, whether or not it is served.
    pub(super) const fn payload_bytes(&self) -> u64 {
        if self.has_payload { self.length } else { 0 }
    }

    /// The same request with the range that its payload names.
    ///
    /// # Errors
    /// If the payload names another context.
    pub(super) fn with_status_payload(self, payload: &StatusPayload) -> Result<Self, Refusal> {
        if payload.context.get() != context::BASE_ALLOCATION_ID {
            return Err(Refusal::StatusPayload);
        }
        Ok(Self {
            flags: self.flags & !flag::PAYLOAD_LEN,
            length: payload.length.get(),
            has_payload: false,
            ..self
        })
    }

    pub(super) const fn cookie(&self) -> Cookie {
        Cookie {
            name: self.name,
            offset: self.offset,
            length: self.length,
            whole: self.flags & flag::DF != 0,
            one: self.flags & flag::REQ_ONE != 0,
        }
    }

    pub(super) fn check(&self, limits: &Limits) -> Result<Action, Refusal> {
        if self.kind == command::DISCONNECT {
            return Ok(Action::Disconnect);
        }
        self.check_flags(limits.reply_style)?;
        match self.kind {
            command::FLUSH if self.offset == 0 && self.length == 0 => {
                return Ok(Action::Run(HostCommand::Flush));
            }
            command::FLUSH => return Err(Refusal::FlushRange),
            command::BLOCK_STATUS if !limits.base_allocation => return Err(Refusal::NoContext),
            command::BLOCK_STATUS if self.has_payload && self.length == STATUS_PAYLOAD_BYTES => {
                return Ok(Action::ReadStatusPayload);
            }
            command::BLOCK_STATUS if self.has_payload => return Err(Refusal::StatusPayload),
            command::WRITE | command::TRIM | command::WRITE_ZEROES if limits.read_only => {
                return Err(Refusal::ReadOnly);
            }
            _ => {}
        }
        let range = self.range(limits.size)?;
        if range.is_empty() {
            return if self.kind == command::BLOCK_STATUS {
                Err(Refusal::EmptyStatus)
            } else {
                Ok(Action::Nothing)
            };
        }
        self.command(range).map(Action::Run)
    }

    fn check_flags(&self, style: ReplyStyle) -> Result<(), Refusal> {
        let (fragment, payload) = match style {
            ReplyStyle::Simple => (0, 0),
            ReplyStyle::Structured => (flag::DF, 0),
            ReplyStyle::Extended => (flag::DF, flag::PAYLOAD_LEN),
        };
        let allowed = match self.kind {
            command::READ => fragment,
            command::WRITE => payload,
            command::BLOCK_STATUS => flag::REQ_ONE | payload,
            command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            _ => return Err(Refusal::UnknownCommand),
        };
        // Existing clients set FUA on commands that write nothing, and the specification has it accepted on all.
        let unknown = self.flags & !(allowed | flag::FUA);
        if unknown == 0 {
            Ok(())
        } else if unknown == payload {
            Err(Refusal::UnexpectedPayload)
        } else {
            Err(Refusal::UnknownFlag)
        }
    }

    fn range(&self, size: u64) -> Result<ByteRange, Refusal> {
        match ByteRange::new(self.offset, self.length) {
            Some(range) if range.end() <= size => Ok(range),
            Some(_) | None => Err(match self.kind {
                command::WRITE | command::WRITE_ZEROES => Refusal::WriteBeyondEnd,
                _ => Refusal::ReadBeyondEnd,
            }),
        }
    }

    fn command(&self, range: ByteRange) -> Result<HostCommand, Refusal> {
        let set = |bit: u16| self.flags & bit != 0;
        let fua = set(flag::FUA);
        if range.length() > u64::from(PAYLOAD_BYTES_MAX) {
            match self.kind {
                command::READ if set(flag::DF) => return Err(Refusal::UnfragmentedTooLong),
                command::READ | command::WRITE => return Err(Refusal::PayloadTooLong),
                _ => {}
            }
        }
        Ok(match self.kind {
            command::READ => HostCommand::Read { range },
            command::WRITE => HostCommand::Write { range, fua },
            command::TRIM => HostCommand::Trim { range, fua },
            command::CACHE => HostCommand::Cache { range },
            command::WRITE_ZEROES => HostCommand::WriteZeroes {
                range,
                fua,
                no_hole: set(flag::NO_HOLE),
                fast: set(flag::FAST_ZERO),
            },
            command::BLOCK_STATUS => HostCommand::Status { range, one: set(flag::REQ_ONE) },
            _ => return Err(Refusal::UnknownCommand),
        })
    }
}
