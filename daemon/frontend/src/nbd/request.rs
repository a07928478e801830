//! One request of the transmission phase: checked against the export, or refused.

use block::{ByteRange, HostCommand, HostError};

use super::layout::{RequestHeader, command, command_flag as flag};
use super::{PAYLOAD_BYTES_MAX, ReplyStyle};

/// Why a request was refused before it reached the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A request type that is not served.
    #[error("the command is not supported")]
    UnknownCommand,
    /// A flag that is not defined for the command, or was not negotiated.
    #[error("a flag of the command is not supported")]
    UnknownFlag,
    /// A flush with an offset or a length.
    #[error("a flush takes neither offset nor length")]
    FlushRange,
    /// A command that changes content, on a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// A read or trim that reaches beyond the export's end.
    #[error("the request reaches beyond the end of the export")]
    ReadBeyondEnd,
    /// A write that reaches beyond the export's end.
    #[error("the write reaches beyond the end of the export")]
    WriteBeyondEnd,
    /// A read or write of more than [`PAYLOAD_BYTES_MAX`].
    #[error("the payload is longer than 64 MiB")]
    PayloadTooLong,
}

impl Refusal {
    /// The kind of error that the host is answered.
    pub const fn error(self) -> HostError {
        match self {
            Self::UnknownCommand
            | Self::UnknownFlag
            | Self::FlushRange
            | Self::ReadBeyondEnd
            | Self::PayloadTooLong => HostError::Invalid,
            Self::ReadOnly => HostError::ReadOnly,
            Self::WriteBeyondEnd => HostError::NoSpace,
        }
    }
}

/// What the requests of a connection are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) reply_style: ReplyStyle,
}

/// What a request that was not refused asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Run(HostCommand),
    /// A request for zero bytes: there is nothing to do.
    Nothing,
    Disconnect,
}

/// The bytes of payload behind a request, whether or not it is served.
pub(super) fn payload_bytes(header: &RequestHeader) -> u32 {
    match header.kind.get() {
        command::WRITE => header.length.get(),
        _ => 0,
    }
}

pub(super) fn check(header: &RequestHeader, limits: &Limits) -> Result<Action, Refusal> {
    let kind = header.kind.get();
    let allowed = match kind {
        command::DISCONNECT => return Ok(Action::Disconnect),
        command::READ => match limits.reply_style {
            ReplyStyle::Simple => 0,
            ReplyStyle::Structured => flag::DF,
        },
        command::WRITE | command::FLUSH | command::TRIM => 0,
        command::WRITE_ZEROES => flag::NO_HOLE,
        _ => return Err(Refusal::UnknownCommand),
    };
    let flags = header.flags.get();
    // Existing clients set FUA on commands that write nothing, and the specification has it accepted on all.
    if flags & !(allowed | flag::FUA) != 0 {
        return Err(Refusal::UnknownFlag);
    }
    let fua = flags & flag::FUA != 0;
    let (offset, length) = (header.offset.get(), header.length.get());
    if kind == command::FLUSH {
        let bare = offset == 0 && length == 0;
        return if bare { Ok(Action::Run(HostCommand::Flush)) } else { Err(Refusal::FlushRange) };
    }
    if limits.read_only && kind != command::READ {
        return Err(Refusal::ReadOnly);
    }
    let range = match ByteRange::new(offset, u64::from(length)) {
        Some(range) if range.end() <= limits.size => range,
        Some(_) | None => {
            return Err(match kind {
                command::READ | command::TRIM => Refusal::ReadBeyondEnd,
                _ => Refusal::WriteBeyondEnd,
            });
        }
    };
    if length == 0 {
        return Ok(Action::Nothing);
    }
    if length > PAYLOAD_BYTES_MAX && matches!(kind, command::READ | command::WRITE) {
        return Err(Refusal::PayloadTooLong);
    }
    Ok(Action::Run(match kind {
        command::READ => HostCommand::Read { range },
        command::WRITE => HostCommand::Write { range, fua },
        command::TRIM => HostCommand::Trim { range, fua },
        _ => HostCommand::WriteZeroes { range, fua, no_hole: flags & flag::NO_HOLE != 0, fast: false },
    }))
}
