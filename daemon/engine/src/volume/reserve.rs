//! Long commands of a limited volume pay before they get their memory.
//!
//! A command of many tokens waits long, on a small volume for minutes, and its payload would hold memory of all hosts
//! meanwhile. So its caller reserves it: it takes its turn for tokens, first come, first served, and only when it has
//! them are its memory taken and its payload received.

use block::{HostCommand, HostError, IopsLimit, Monotonic};

use super::{Effect, Volume};
use crate::{CommandId, qos};

impl Volume {
    /// True if a command is to be reserved: it is one of many tokens, which may have to wait for them.
    pub fn wants_reservation(&self, command: &HostCommand) -> bool {
        let holds_memory = match command {
            HostCommand::Read { .. } | HostCommand::Write { .. } => true,
            HostCommand::Flush
            | HostCommand::Trim { .. }
            | HostCommand::WriteZeroes { .. }
            | HostCommand::Cache { .. }
            | HostCommand::Status { .. } => false,
        };
        holds_memory && self.limit != IopsLimit::Unlimited && qos::cost(command) > 1
    }

    /// Queues a command for its tokens; [`Effect::Granted`] says when it has them, or when it is to be refused, which
    /// [`Self::submit_granted`] does.
    ///
    /// # Panics
    /// If `id` is reserved already.
    pub fn reserve(&mut self, now: Monotonic, id: CommandId, command: HostCommand) {
        let new = self.reserved.insert(id);
        assert!(new, "{id:?} is reserved already");
        if self.check(&command).is_err() {
            self.effects.push_back(Effect::Granted { command: id });
            return;
        }
        self.queue.push_back((id, command));
        self.turn(now);
        if self.queue.back().is_some_and(|(last, _)| *last == id) {
            self.throttled += 1;
        }
    }

    /// Takes a command whose reservation was granted: as `submit`, but that it has paid. One that meets a hold of the
    /// writes waits behind it for tokens once more, as does one whose volume was offline and began anew meanwhile.
    pub fn submit_granted(&mut self, now: Monotonic, id: CommandId, command: HostCommand) {
        if !self.reserved.remove(&id) {
            return self.submit(now, id, command);
        }
        if let Err(error) = self.check(&command) {
            self.reply(id, Err(error));
        } else if !self.hold_back(now, id, command) {
            self.launch(id, command);
            self.turn(now);
        }
    }

    /// Ends the wait of a reservation that would be refused now, or answers a command that waits.
    pub(super) fn refuse(&mut self, id: CommandId, error: HostError) {
        if self.reserved.contains(&id) {
            self.effects.push_back(Effect::Granted { command: id });
        } else {
            self.reply(id, Err(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use block::{ByteCount, ByteRange, HostResult};

    use super::super::VolumeConfig;
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const MIB: u64 = 1 << 20;

    fn volume() -> Volume {
        let limit = IopsLimit::PerSecond(NonZeroU32::new(4).unwrap());
        Volume::new(VolumeConfig { size: ByteCount(64 * MIB), limit, mirrored: false }, Monotonic(0))
    }

    fn write(length: u64) -> HostCommand {
        HostCommand::Write { range: ByteRange::new(0, length).unwrap(), fua: false }
    }

    /// Ids whose turn has come, and replies.
    fn effects(volume: &mut Volume) -> (Vec<u64>, Vec<(u64, HostResult)>) {
        let (mut granted, mut replies) = (Vec::new(), Vec::new());
        while let Some(effect) = volume.poll_effect() {
            if let Effect::Granted { command } = effect {
                granted.push(command.0);
            } else if let Effect::Reply { command, result } = effect {
                replies.push((command.0, result));
            }
        }
        (granted, replies)
    }

    #[test]
    fn only_long_commands_of_a_limited_volume_are_reserved() {
        let mut volume = volume();
        assert!(volume.wants_reservation(&write(MIB)));
        assert!(!volume.wants_reservation(&write(256 << 10)), "one token");
        assert!(!volume.wants_reservation(&HostCommand::Trim {
            range: ByteRange::new(0, 8 * MIB).unwrap(),
            fua: false
        }));
        volume.set_limit(Monotonic(0), IopsLimit::Unlimited);
        assert!(!volume.wants_reservation(&write(MIB)));
    }

    #[test]
    fn reservations_and_commands_have_their_turns_in_one_line() {
        let mut volume = volume();
        // 16 tokens at 4 a second: the next has its turn after four seconds.
        volume.reserve(Monotonic(0), CommandId(1), write(4 * MIB));
        volume.reserve(Monotonic(0), CommandId(2), write(MIB));
        volume.submit(Monotonic(0), CommandId(3), write(4096));
        assert_eq!(effects(&mut volume), (vec![1], vec![]));
        assert_eq!((volume.in_flight(), volume.queued()), (0, 2), "granted, but not begun");
        volume.submit_granted(Monotonic(1), CommandId(1), write(4 * MIB));
        assert_eq!(volume.in_flight(), 1);
        let turn = volume.poll_timeout().unwrap();
        assert!((3 * SECOND..=4 * SECOND).contains(&turn.0), "{turn:?}");
        volume.handle_time(Monotonic(turn.0 - 1));
        assert_eq!(effects(&mut volume).0, vec![] as Vec<u64>);
        volume.handle_time(turn);
        assert_eq!(effects(&mut volume).0, [2]);
        volume.handle_time(Monotonic(turn.0 + SECOND));
        assert_eq!(
            (volume.in_flight(), volume.queued()),
            (2, 0),
            "the short one was behind it, and has begun"
        );
        assert_eq!(volume.tokens(), 16 + 4 + 1, "each is charged once");
    }

    #[test]
    fn what_would_be_refused_has_its_turn_at_once_and_is_refused_then() {
        let mut volume = volume();
        volume.reserve(Monotonic(0), CommandId(1), write(4 * MIB));
        volume.reserve(Monotonic(0), CommandId(2), write(4 * MIB));
        assert_eq!(effects(&mut volume).0, [1]);
        volume.set_offline(Monotonic(1));
        assert_eq!(effects(&mut volume), (vec![2], vec![]), "its payload is on its way");
        for id in [1, 2] {
            volume.submit_granted(Monotonic(2), CommandId(id), write(4 * MIB));
        }
        let refused = |id| (id, Err(HostError::Shutdown));
        assert_eq!(effects(&mut volume), (vec![], vec![refused(1), refused(2)]));
        volume.reserve(Monotonic(3), CommandId(3), write(4 * MIB));
        assert_eq!(effects(&mut volume), (vec![3], vec![]));
    }

    #[test]
    fn a_reservation_is_forgotten_with_its_host() {
        let mut volume = volume();
        volume.reserve(Monotonic(0), CommandId(1), write(4 * MIB));
        volume.reserve(Monotonic(0), CommandId(2), write(4 * MIB));
        assert!(!volume.forget(Monotonic(1), CommandId(1)) && !volume.forget(Monotonic(1), CommandId(2)));
        assert_eq!((volume.queued(), volume.reserved.len()), (0, 0));
        volume.handle_time(Monotonic(60 * SECOND));
        assert_eq!(effects(&mut volume).0, [1], "what was granted before");
    }

    #[test]
    fn a_hold_meets_a_reserved_write_when_it_is_submitted() {
        let mut volume = volume();
        volume.reserve(Monotonic(0), CommandId(1), write(MIB));
        volume.hold_writes(Monotonic(1), Duration::from_secs(5), 8 * MIB);
        assert_eq!(effects(&mut volume).0, [1]);
        volume.submit_granted(Monotonic(2), CommandId(1), write(MIB));
        assert_eq!((volume.held(), volume.in_flight()), (1, 0));
        volume.release_writes(Monotonic(4 * SECOND));
        assert_eq!((volume.held(), volume.in_flight()), (0, 1));
    }
}
