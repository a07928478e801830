//! The lease of a synchronous mirror: while its target holds one, the primary answers no write that the target lacks.
//!
//! Guarantee: whenever [`LeaseHolder::remaining`] gives something, [`LeaseGiver::held_until`] of the primary lies ahead,
//! whatever the clocks say, as long as their rates differ by less than [`LEASE_MARGIN`] in [`LEASE`]. Both clocks are
//! monotonic ones that go on while the machine sleeps. Rules: docs/protocols/replication.md, "Synchronous mirroring".

use std::time::Duration;

use block::Monotonic;

/// How long a lease is valid, from before it was asked for, by the target's clock.
pub const LEASE: Duration = Duration::from_secs(4);
/// The primary takes a lease for valid so much longer after it gave it, by its own clock.
pub const LEASE_MARGIN: Duration = Duration::from_secs(1);
/// No lease is given while a host waits longer than this for the target to receive its write.
pub const LEASE_PATIENCE: Duration = Duration::from_secs(1);
/// A target asks this often: three asks may be lost.
const RENEWAL: Duration = Duration::from_secs(1);

/// The target's side. It is lost with the process, on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeaseHolder {
    until: Option<Monotonic>,
    ask_at: Option<Monotonic>,
}

impl LeaseHolder {
    /// The primary offers leases on the present session.
    pub const fn offered(&mut self, now: Monotonic) {
        self.ask_at = Some(now);
    }

    /// The stamp of an ask, if one is due.
    pub fn poll_ask(&mut self, now: Monotonic) -> Option<Monotonic> {
        if self.ask_at.is_none_or(|at| now < at) {
            return None;
        }
        self.ask_at = Some(now + RENEWAL);
        Some(now)
    }

    /// When the next ask is due.
    pub const fn poll_timeout(&self) -> Option<Monotonic> {
        self.ask_at
    }

    /// The primary answered an ask of the present session.
    pub fn granted(&mut self, asked: Monotonic, now: Monotonic) {
        // A stamp from the future is none that this side made.
        if asked <= now {
            self.until = self.until.max(Some(asked + LEASE));
        }
    }

    /// The session is over; the lease is not.
    pub const fn session_ended(&mut self) {
        self.ask_at = None;
    }

    /// A new session begins: the primary is about to be told that there is no lease.
    pub const fn give_back(&mut self) {
        *self = Self { until: None, ask_at: None };
    }

    /// How long the lease is still valid; `None` if it is not.
    pub fn remaining(&self, now: Monotonic) -> Option<Duration> {
        self.until.filter(|until| now < *until).map(|until| until.since(now))
    }
}

/// The primary's side.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeaseGiver {
    until: Option<Monotonic>,
}

impl LeaseGiver {
    /// A primary that starts, and may have given a lease before.
    pub fn after_restart(now: Monotonic) -> Self {
        let mut giver = Self::default();
        giver.gave(now);
        giver
    }

    /// A lease is given now.
    pub fn gave(&mut self, now: Monotonic) {
        self.until = self.until.max(Some(now + LEASE + LEASE_MARGIN));
    }

    /// The target said that it holds none.
    pub const fn returned(&mut self) {
        self.until = None;
    }

    /// Until when a lease may be held; `None` if there is none.
    pub const fn held_until(&self) -> Option<Monotonic> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: u64) -> Monotonic {
        Monotonic(milliseconds * 1_000_000)
    }

    #[test]
    fn a_lease_counts_from_before_it_was_asked_for_and_survives_its_session() {
        let mut holder = LeaseHolder::default();
        assert_eq!(holder.poll_ask(at(0)), None, "nothing was offered");
        holder.offered(at(100));
        assert_eq!(holder.poll_ask(at(100)), Some(at(100)));
        assert_eq!(holder.poll_ask(at(1099)), None);
        assert_eq!((holder.remaining(at(200)), holder.poll_timeout()), (None, Some(at(1100))));
        holder.granted(at(100), at(600));
        assert_eq!(holder.remaining(at(600)), Some(Duration::from_millis(3500)));
        // An older grant that comes late shortens nothing, one from the future gives nothing.
        holder.granted(at(50), at(700));
        holder.granted(at(9000), at(700));
        holder.session_ended();
        assert_eq!((holder.poll_timeout(), holder.remaining(at(4099)).is_some()), (None, true));
        assert_eq!(holder.remaining(at(4100)), None);
    }

    #[test]
    fn a_new_session_ends_the_lease() {
        let mut holder = LeaseHolder::default();
        holder.granted(at(100), at(100));
        holder.give_back();
        assert_eq!(holder.remaining(at(101)), None);
        let mut giver = LeaseGiver::after_restart(at(50));
        assert_eq!(giver.held_until(), Some(at(5050)));
        giver.gave(at(40));
        assert_eq!(giver.held_until(), Some(at(5050)), "never earlier");
        giver.returned();
        assert_eq!(giver.held_until(), None);
    }

    proptest! {
        /// Two clocks whose rates differ by up to a tenth, any delays: while the holder's lease is valid the giver knows.
        #[test]
        fn the_giver_never_takes_a_valid_lease_for_over(
            rate in 900_u64..1100,
            steps in prop::collection::vec((0_u64..3000, 0_u64..2000, 0_u64..2000), 1..20),
        ) {
            let theirs = |time: u64| at(time * rate / 1000 + 77);
            let (mut holder, mut giver) = (LeaseHolder::default(), LeaseGiver::default());
            let mut time = 0;
            for (wait, there, back) in steps {
                time += wait;
                let asked = theirs(time);
                giver.gave(at(time + there));
                holder.granted(asked, theirs(time + there + back));
                for later in (0..8000).step_by(50) {
                    let moment = time + there + back + later;
                    if holder.remaining(theirs(moment)).is_some() {
                        prop_assert!(giver.held_until().is_some_and(|until| at(moment) < until));
                    }
                }
            }
        }
    }
}
