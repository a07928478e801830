//! Limits in bytes a second: a mirror's bandwidth, and the I/O of its copies.
//!
//! The bucket is that of the IOPS limit (`engine::qos`), with one token for 4096 bytes: what is sent may exceed the
//! limit by one burst and one item, and is paid back before the next.

use std::num::NonZeroU64;

use block::{DATA_UNIT_BYTES, IopsLimit, Monotonic};
use engine::qos::Limiter;

/// A limit; none lets everything pass.
#[derive(Default)]
pub(super) struct ByteLimit {
    rate: Option<NonZeroU64>,
    limiter: Limiter,
    ready_at: Option<Monotonic>,
}

impl ByteLimit {
    pub(super) fn new(rate: Option<NonZeroU64>, now: Monotonic) -> Self {
        Self { rate, limiter: Limiter::new(tokens(rate), now), ready_at: None }
    }

    /// Changes the limit; what is owed stays owed.
    pub(super) fn set(&mut self, rate: Option<NonZeroU64>, now: Monotonic) {
        if rate != self.rate {
            self.rate = rate;
            self.limiter.set_limit(tokens(rate), now);
            self.ready_at = None;
        }
    }

    /// Forgets that something waits: whoever does says so again.
    pub(super) const fn begin_turn(&mut self) {
        self.ready_at = None;
    }

    /// True if an item may go now; then [`Self::spent`] tells its length. Else `poll_timeout` says when to ask again.
    pub(super) fn admits(&mut self, now: Monotonic) -> bool {
        match self.limiter.try_take(now, 1) {
            Ok(()) => true,
            Err(ready) => {
                self.ready_at = Some(ready);
                false
            }
        }
    }

    /// The item that was just admitted has this length.
    pub(super) fn spent(&mut self, bytes: u64) {
        let tokens = u32::try_from(bytes.div_ceil(DATA_UNIT_BYTES)).unwrap_or(u32::MAX);
        self.limiter.owe(tokens.saturating_sub(1));
    }

    /// When an item that was refused may go.
    pub(super) const fn poll_timeout(&self) -> Option<Monotonic> {
        self.ready_at
    }
}

fn tokens(rate: Option<NonZeroU64>) -> IopsLimit {
    rate.map_or(IopsLimit::Unlimited, |rate| {
        let tokens = u32::try_from(rate.get() / DATA_UNIT_BYTES).unwrap_or(u32::MAX);
        IopsLimit::PerSecond(std::num::NonZeroU32::new(tokens).unwrap_or(std::num::NonZeroU32::MIN))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_of_any_length_keep_the_rate() {
        for (rate, length) in [(1 << 20, 4096), (1 << 20, 1 << 20), (50_000_000, 1_060_864), (4096, 8192)] {
            let mut limit = ByteLimit::new(NonZeroU64::new(rate), Monotonic(0));
            let (mut now, mut sent) = (Monotonic(0), 0_u64);
            let seconds = 200_u64;
            while now.0 < seconds * 1_000_000_000 {
                limit.begin_turn();
                if limit.admits(now) {
                    limit.spent(length);
                    sent += length;
                } else {
                    now = limit.poll_timeout().unwrap();
                }
            }
            let wanted = rate * seconds;
            assert!(sent <= wanted + wanted / 100 + length, "{rate}, {length}: {sent} of {wanted}");
            assert!(sent + length >= wanted - wanted / 100, "{rate}, {length}: {sent} of {wanted}");
        }
    }

    #[test]
    fn no_limit_admits_everything() {
        let mut limit = ByteLimit::default();
        for _ in 0..10_000 {
            assert!(limit.admits(Monotonic(5)));
            limit.spent(1 << 30);
        }
        assert_eq!(limit.poll_timeout(), None);
    }
}
