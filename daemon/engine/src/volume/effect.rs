//! What a volume asks its shard to do.

use block::{ByteRange, HostResult};

use crate::{CommandId, StepId};

/// What a write step puts home; a mirrored volume's record says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The ciphertext that the step's `Prepare` made.
    Sealed,
    /// Raw zero sectors, written.
    Zeros,
    /// Zeros by ZERO_RANGE.
    Trimmed,
}

/// One operation for the shard. Device ranges are whole data units and at most [`crate::STEP_BYTES_MAX`] long, those
/// of ZERO_RANGE [`crate::ZERO_STEP_BYTES_MAX`].
///
/// Each effect with a `step` is answered by one call of [`super::Volume`], named with it, in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Read `device`, open it, deliver the bytes of `wanted` to the host; then `read_done`.
    Read {
        /// The step to report.
        step: StepId,
        /// The command whose bytes these are.
        command: CommandId,
        /// The units to read.
        device: ByteRange,
        /// The bytes to deliver, inside `device`.
        wanted: ByteRange,
    },
    /// Make the ciphertext of `device`; then `prepared`.
    ///
    /// The bytes of `wanted` come from the command's payload, or are zeros for a write of zeroes; the rest of
    /// the first and last unit comes from home, read and opened.
    Prepare {
        /// The step to report.
        step: StepId,
        /// The command whose payload it is.
        command: CommandId,
        /// The units to seal.
        device: ByteRange,
        /// The bytes that the command changes, inside `device`.
        wanted: ByteRange,
        /// The first unit must be read: it is not wholly wanted.
        read_head: bool,
        /// The last unit is another one than the first, and must be read as well.
        read_tail: bool,
    },
    /// Mirrored volumes: make the intent bits durable, assign a sequence; then `admitted` or `admit_failed`.
    Admit {
        /// The step to report.
        step: StepId,
        /// The step's command.
        command: CommandId,
        /// The units of the record.
        device: ByteRange,
        /// What the record says.
        content: Content,
    },
    /// Write home: `Sealed` or `Zeros`; then `written`.
    Write {
        /// The step to report.
        step: StepId,
        /// The step's command.
        command: CommandId,
        /// The units to write.
        device: ByteRange,
        /// What to write.
        content: Content,
        /// Report only when the data is on stable media.
        durable: bool,
    },
    /// ZERO_RANGE home (where the device has none: write zeros); then `zeroed`.
    ZeroRange {
        /// The step to report.
        step: StepId,
        /// The step's command.
        command: CommandId,
        /// The units to zero.
        device: ByteRange,
    },
    /// Make everything that ended before durable (fdatasync); then `flushed`.
    Flush {
        /// The step to report.
        step: StepId,
        /// The step's command.
        command: CommandId,
    },
    /// Do what a CACHE or STATUS command asks for; then `inquired`.
    Inquire {
        /// The step to report.
        step: StepId,
        /// The step's command.
        command: CommandId,
    },
    /// No write is in flight on `device`, and none starts before `copy_done`.
    CopyReady {
        /// What `begin_copy` returned.
        step: StepId,
        /// The units to copy.
        device: ByteRange,
    },
    /// A reserved command's turn has come: take its memory and receive its payload; then `submit_granted`.
    Granted {
        /// The command.
        command: CommandId,
    },
    /// Answer the host. The volume knows the command no longer.
    Reply {
        /// The command.
        command: CommandId,
        /// Its outcome: the first error of its steps.
        result: HostResult,
    },
}
