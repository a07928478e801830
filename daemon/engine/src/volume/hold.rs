//! Writes that may not begin for a while: they wait, and are refused when that takes too long.
//!
//! Guarantees: while writes are held no command that changes content begins; each is answered at the latest when the
//! hold's patience ends, and those that come later at once; reads and flushes are served as ever. Payloads that wait
//! are bounded, since they are memory of all hosts.

use std::collections::VecDeque;
use std::time::Duration;

use block::{HostCommand, HostError, Monotonic};

use super::Volume;
use crate::CommandId;

/// A hold in force.
pub(super) struct Hold {
    /// From then on writes are refused.
    until: Monotonic,
    waiting: VecDeque<(CommandId, HostCommand)>,
    bytes: u64,
    bytes_max: u64,
}

impl Hold {
    fn takes(&self, now: Monotonic, command: &HostCommand) -> bool {
        now < self.until && self.bytes.saturating_add(payload(command)) <= self.bytes_max
    }

    fn push(&mut self, id: CommandId, command: HostCommand) {
        self.bytes = self.bytes.saturating_add(payload(&command));
        self.waiting.push_back((id, command));
    }
}

const fn payload(command: &HostCommand) -> u64 {
    match command {
        HostCommand::Write { range, .. } => range.length(),
        HostCommand::Read { .. }
        | HostCommand::Flush
        | HostCommand::Trim { .. }
        | HostCommand::WriteZeroes { .. }
        | HostCommand::Cache { .. }
        | HostCommand::Status { .. } => 0,
    }
}

impl Volume {
    /// From now on commands that change content and have not begun wait, with at most `bytes_max` of payload; after
    /// `patience` they are refused with [`HostError::Io`], and later ones at once. A hold in force stays as it is.
    pub fn hold_writes(&mut self, now: Monotonic, patience: Duration, bytes_max: u64) {
        if self.hold.is_some() {
            return;
        }
        self.hold = Some(Hold { until: now + patience, waiting: VecDeque::new(), bytes: 0, bytes_max });
        let reserved = &self.reserved;
        let (held, stay): (VecDeque<_>, VecDeque<_>) = self
            .queue
            .drain(..)
            .partition(|(id, command)| command.changes_content() && !reserved.contains(id));
        self.queue = stay;
        for (id, command) in held {
            self.hold_back(now, id, command);
        }
        self.turn(now);
    }

    /// Writes may begin again: those that wait do.
    pub fn release_writes(&mut self, now: Monotonic) {
        if let Some(hold) = self.hold.take() {
            self.queue.extend(hold.waiting);
            self.turn(now);
        }
    }

    /// Keeps a command from beginning, or refuses it; false if it may begin.
    pub(super) fn hold_back(&mut self, now: Monotonic, id: CommandId, command: HostCommand) -> bool {
        let Some(hold) = self.hold.as_mut().filter(|_| command.changes_content()) else {
            return false;
        };
        if hold.takes(now, &command) {
            hold.push(id, command);
        } else {
            self.reply(id, Err(HostError::Io));
        }
        true
    }

    /// Refuses what waited too long.
    pub(super) fn expire_hold(&mut self, now: Monotonic) {
        if self.hold.as_ref().is_some_and(|hold| now >= hold.until) {
            self.refuse_held(HostError::Io);
        }
    }

    /// Refuses all that waits; the hold stays.
    pub(super) fn refuse_held(&mut self, error: HostError) {
        let Some(hold) = &mut self.hold else { return };
        hold.bytes = 0;
        for (id, _) in std::mem::take(&mut hold.waiting) {
            self.reply(id, Err(error));
        }
    }

    /// Drops a command that waits; nobody wants its reply.
    pub(super) fn forget_held(&mut self, id: CommandId) {
        let Some(hold) = &mut self.hold else { return };
        hold.waiting.retain(|(held, _)| *held != id);
        hold.bytes = hold.waiting.iter().map(|(_, command)| payload(command)).sum();
    }

    /// When writes that wait are refused.
    pub(super) fn hold_expires_at(&self) -> Option<Monotonic> {
        self.hold.as_ref().filter(|hold| !hold.waiting.is_empty()).map(|hold| hold.until)
    }

    /// Commands that wait for writes to be released.
    pub fn held(&self) -> usize {
        self.hold.as_ref().map_or(0, |hold| hold.waiting.len())
    }
}

#[cfg(test)]
mod tests {
    use block::{ByteCount, ByteRange, IopsLimit};

    use super::super::{Effect, VolumeConfig};
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn volume() -> Volume {
        let config = VolumeConfig { size: ByteCount(1 << 20), limit: IopsLimit::Unlimited, mirrored: false };
        Volume::new(config, Monotonic(0))
    }

    fn write(length: u64) -> HostCommand {
        HostCommand::Write { range: ByteRange::new(0, length).unwrap(), fua: false }
    }

    fn replies(volume: &mut Volume) -> Vec<(u64, bool)> {
        let mut replies = Vec::new();
        while let Some(effect) = volume.poll_effect() {
            if let Effect::Reply { command, result } = effect {
                replies.push((command.0, result.is_ok()));
            }
        }
        replies
    }

    #[test]
    fn held_writes_wait_and_begin_when_they_are_released() {
        let mut volume = volume();
        volume.hold_writes(Monotonic(0), Duration::from_secs(10), 1 << 20);
        volume.submit(Monotonic(1), CommandId(1), write(4096));
        volume.submit(
            Monotonic(1),
            CommandId(2),
            HostCommand::Read { range: ByteRange::new(0, 512).unwrap() },
        );
        assert_eq!((volume.held(), volume.in_flight()), (1, 1), "a read is served beside them");
        assert_eq!(volume.poll_timeout(), Some(Monotonic(10 * SECOND)));
        volume.release_writes(Monotonic(9 * SECOND));
        assert_eq!((volume.held(), volume.in_flight()), (0, 2));
        assert_eq!(volume.poll_timeout(), None);
        assert_eq!(replies(&mut volume), []);
    }

    #[test]
    fn held_writes_are_refused_when_the_patience_ends_and_later_ones_at_once() {
        let mut volume = volume();
        volume.hold_writes(Monotonic(0), Duration::from_secs(10), 1 << 20);
        volume.submit(Monotonic(1), CommandId(1), write(4096));
        volume.handle_time(Monotonic(10 * SECOND - 1));
        assert_eq!(replies(&mut volume), []);
        volume.handle_time(Monotonic(10 * SECOND));
        assert_eq!(replies(&mut volume), [(1, false)]);
        // A second order of the same hold gives no new patience.
        volume.hold_writes(Monotonic(11 * SECOND), Duration::from_secs(10), 1 << 20);
        volume.submit(Monotonic(12 * SECOND), CommandId(2), write(4096));
        assert_eq!(replies(&mut volume), [(2, false)]);
    }

    #[test]
    fn payload_that_waits_is_bounded_and_a_gone_host_gives_its_part_back() {
        let mut volume = volume();
        volume.hold_writes(Monotonic(0), Duration::from_secs(10), 8192);
        volume.submit(Monotonic(1), CommandId(1), write(4096));
        volume.submit(Monotonic(1), CommandId(2), write(8192));
        assert_eq!(replies(&mut volume), [(2, false)], "no room for it");
        volume.forget(Monotonic(2), CommandId(1));
        volume.submit(Monotonic(3), CommandId(3), write(8192));
        assert_eq!((replies(&mut volume), volume.held()), (vec![], 1));
        volume.set_offline(Monotonic(4));
        assert_eq!(replies(&mut volume), [(3, false)]);
    }

    #[test]
    fn what_waits_for_the_limit_is_held_too() {
        let mut volume = volume();
        volume.set_limit(Monotonic(0), IopsLimit::PerSecond(std::num::NonZeroU32::MIN));
        for id in 1..=4 {
            volume.submit(Monotonic(0), CommandId(id), write(4096));
        }
        let begun = volume.in_flight();
        assert!(volume.queued() > 0);
        volume.hold_writes(Monotonic(1), Duration::from_secs(10), 1 << 20);
        assert_eq!((volume.queued(), volume.held()), (0, 4 - begun));
    }
}
