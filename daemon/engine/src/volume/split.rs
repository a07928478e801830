//! How a command becomes steps: lazily, in ascending order, disjoint in data units.

use block::{ByteRange, DATA_UNIT_BYTES, HostCommand};

use crate::locks::LockKind;
use crate::{STEP_BYTES_MAX, ZERO_STEP_BYTES_MAX};

/// The work of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Deliver these bytes.
    Read(ByteRange),
    /// Seal and write these bytes, merged into their units.
    Seal(ByteRange),
    /// Write zero sectors over these units.
    Zeros(ByteRange),
    /// ZERO_RANGE these units.
    ZeroRange(ByteRange),
    /// Keep writes away from these units.
    Copy(ByteRange),
    /// Make what ended durable.
    Flush,
    /// Tell something about the range, or prepare for it: no content moves.
    Inquiry,
}

impl Task {
    /// The units that the step touches and the lock that it needs; `None` if it touches none.
    pub(super) fn lock(self) -> Option<(ByteRange, LockKind)> {
        match self {
            Self::Read(wanted) => Some((wanted.unit_outward(), LockKind::Read)),
            Self::Seal(wanted) if wanted.is_unit_aligned() => Some((wanted, LockKind::Exclusive)),
            Self::Seal(wanted) => Some((wanted.unit_outward(), LockKind::ExclusivePartial)),
            Self::Zeros(device) | Self::ZeroRange(device) | Self::Copy(device) => {
                Some((device, LockKind::Exclusive))
            }
            Self::Flush | Self::Inquiry => None,
        }
    }

    /// True if the step changes the home image.
    pub(super) const fn changes_content(self) -> bool {
        matches!(self, Self::Seal(_) | Self::Zeros(_) | Self::ZeroRange(_))
    }
}

/// The steps of one command that are still to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splitter {
    kind: Kind,
    at: u64,
    end: u64,
    /// What begins when all else has ended: the partial units of a fast zeroing. Where the file system cannot zero ranges
    /// that fails with nothing changed.
    late: [ByteRange; 2],
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Seal,
    Inquiry,
    ZeroRange,
    /// Zeros on whole units, sealed zeros on partial ones.
    ZeroesWritten,
    /// ZERO_RANGE on whole units, sealed zeros on partial ones.
    ZeroesRange,
}

impl Splitter {
    pub(super) fn new(command: &HostCommand) -> Self {
        let large = |range: &ByteRange| range.length() >= STEP_BYTES_MAX;
        let (kind, range) = match command {
            HostCommand::Read { range } => (Kind::Read, *range),
            HostCommand::Write { range, .. } => (Kind::Seal, *range),
            HostCommand::Trim { range, .. } if large(range) => (Kind::ZeroRange, range.unit_inward()),
            HostCommand::Trim { .. } | HostCommand::Flush => (Kind::ZeroRange, ByteRange::default()),
            HostCommand::Cache { range } | HostCommand::Status { range, .. } => (Kind::Inquiry, *range),
            HostCommand::WriteZeroes { range, fast: true, .. } if large(range) => {
                return Self::fast_zeroes(*range);
            }
            HostCommand::WriteZeroes { range, .. } if large(range) => (Kind::ZeroesRange, *range),
            HostCommand::WriteZeroes { range, .. } => (Kind::ZeroesWritten, *range),
        };
        Self { kind, at: range.offset(), end: range.end(), late: [ByteRange::default(); 2] }
    }

    fn fast_zeroes(range: ByteRange) -> Self {
        let units = range.unit_inward();
        let part = |start, end| ByteRange::between(start, end).unwrap_or_default();
        let late = [part(range.offset(), units.offset()), part(units.end(), range.end())];
        Self { kind: Kind::ZeroRange, at: units.offset(), end: units.end(), late }
    }

    /// True if no step is to come.
    pub(super) fn is_done(&self) -> bool {
        self.at >= self.end && self.late.iter().all(|part| part.is_empty())
    }

    /// True if the next step begins only when the others have ended.
    pub(super) fn awaits_others(&self) -> bool {
        self.at >= self.end && !self.is_done()
    }

    /// True if a step of the command may use ZERO_RANGE, which no write makes durable.
    pub(super) fn zeroes_ranges(&self) -> bool {
        match self.kind {
            Kind::ZeroRange | Kind::ZeroesRange => !self.is_done(),
            Kind::Read | Kind::Seal | Kind::Inquiry | Kind::ZeroesWritten => false,
        }
    }

    /// Where a part from `at` on ends whose units fit in one step.
    fn step_end(&self) -> u64 {
        let first_unit = self.at - self.at % DATA_UNIT_BYTES;
        let most = match self.kind {
            Kind::Read | Kind::Seal | Kind::ZeroesWritten => STEP_BYTES_MAX,
            Kind::ZeroRange | Kind::ZeroesRange => ZERO_STEP_BYTES_MAX,
            Kind::Inquiry => u64::MAX,
        };
        first_unit.saturating_add(most).min(self.end)
    }

    /// The same, but ending with the last whole unit, or at the next unit border if `at` is inside one.
    fn zeroes_end(&self) -> u64 {
        let next_unit = (self.at / DATA_UNIT_BYTES + 1).saturating_mul(DATA_UNIT_BYTES);
        if !self.at.is_multiple_of(DATA_UNIT_BYTES) || next_unit > self.end {
            return next_unit.min(self.end);
        }
        let end = self.step_end();
        end - end % DATA_UNIT_BYTES
    }
}

impl Iterator for Splitter {
    type Item = Task;

    fn next(&mut self) -> Option<Task> {
        if self.at >= self.end {
            let late = self.late.iter_mut().find(|part| !part.is_empty())?;
            return Some(Task::Seal(std::mem::take(late)));
        }
        let end = match self.kind {
            Kind::Read | Kind::Seal | Kind::ZeroRange | Kind::Inquiry => self.step_end(),
            Kind::ZeroesWritten | Kind::ZeroesRange => self.zeroes_end(),
        };
        let part = ByteRange::between(self.at, end).filter(|part| !part.is_empty())?;
        self.at = end;
        Some(match self.kind {
            Kind::Read => Task::Read(part),
            Kind::Inquiry => Task::Inquiry,
            Kind::Seal => Task::Seal(part),
            Kind::ZeroRange => Task::ZeroRange(part),
            Kind::ZeroesWritten | Kind::ZeroesRange if !part.is_unit_aligned() => Task::Seal(part),
            Kind::ZeroesWritten => Task::Zeros(part),
            Kind::ZeroesRange => Task::ZeroRange(part),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn commands() -> impl Strategy<Value = HostCommand> {
        let lengths = prop_oneof![
            0_u64..10_000,
            (1_u64 << 20) - 5000..(1 << 20) + 5000,
            0_u64..4 << 20,
            (64_u64 << 20) - 5000..(130 << 20)
        ];
        (0_u64..3 << 20, lengths, 0..4).prop_map(|(offset, length, kind)| {
            let range = ByteRange::new(offset, length).unwrap();
            match kind {
                0 => HostCommand::Read { range },
                1 => HostCommand::Write { range, fua: false },
                2 => HostCommand::Trim { range, fua: false },
                _ => HostCommand::WriteZeroes { range, fua: false, no_hole: true, fast: false },
            }
        })
    }

    proptest! {
        #[test]
        fn steps_cover_the_command_in_disjoint_units(command in commands()) {
            let range = command.range().unwrap();
            let expected = match command {
                HostCommand::Trim { .. } if range.length() < STEP_BYTES_MAX => ByteRange::default(),
                HostCommand::Trim { .. } => range.unit_inward(),
                HostCommand::Read { .. }
                | HostCommand::Write { .. }
                | HostCommand::Flush
                | HostCommand::Cache { .. }
                | HostCommand::Status { .. }
                | HostCommand::WriteZeroes { .. } => range,
            };
            let (mut at, mut unit_end) = (expected.offset(), 0);
            for task in Splitter::new(&command) {
                let part = match task {
                    Task::Read(part) | Task::Seal(part) | Task::Zeros(part) | Task::ZeroRange(part) => part,
                    Task::Copy(_) | Task::Flush | Task::Inquiry => unreachable!(),
                };
                prop_assert_eq!(part.offset(), at);
                at = part.end();
                let (device, _) = task.lock().unwrap();
                prop_assert!(device.is_unit_aligned() && device.contains(part));
                let zeroes = matches!(task, Task::ZeroRange(_));
                let most = if zeroes { ZERO_STEP_BYTES_MAX } else { STEP_BYTES_MAX };
                prop_assert!(device.length() <= most && device.offset() >= unit_end);
                unit_end = device.end();
                if let HostCommand::WriteZeroes { .. } = command {
                    let whole = part.is_unit_aligned();
                    let ranged = range.length() >= STEP_BYTES_MAX;
                    let wanted = [Task::Seal(part), Task::Zeros(part), Task::ZeroRange(part)];
                    prop_assert_eq!(task, wanted[if whole { 1 + usize::from(ranged) } else { 0 }]);
                }
            }
            prop_assert_eq!(at, expected.end());
        }
    }
}
