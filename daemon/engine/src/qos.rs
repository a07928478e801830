//! The IOPS limit of a volume: a token bucket on an injected clock.
//!
//! Guarantees: over any span the tokens taken stay at or below limit x span + one burst (plus what one command
//! larger than half the burst borrows and pays back before the next); under saturating load none is lost as long
//! as the caller comes back within half of [`BURST`] of the time it was told. The release time comes from the bucket, so a
//! late timer does not lower the rate. What a command costs is in docs/ARCHITECTURE.md, "QoS".
//!
//! The bucket is `governor`'s GCRA. A token is made of cells, and the bucket's clock ticks faster than
//! nanoseconds, so that the burst is the same time at every limit (a bucket of whole tokens would lose every
//! timer delay below 50 IOPS) and rounding stays below 1/100 % up to 150,000 IOPS.

use std::num::NonZeroU32;
use std::ops::Add;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{HostCommand, IopsLimit, Monotonic};
use governor::clock::{Clock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};
use governor::{Quota, RateLimiter};

use crate::STEP_BYTES_MAX;

/// What may be taken at once beyond one token, as time at the limit.
///
/// It must cover a late timer (2 ms) and a few long turns of a busy shard, or rate is lost; over 10 s it adds at
/// most 0.2 % to the limit.
pub const BURST: Duration = Duration::from_millis(20);

/// Bytes of a read or write that one token pays for.
const TOKEN_BYTES: u64 = 256 << 10;
/// Cells in one token, and ticks of the bucket's clock in one nanosecond. Being equal, the ticks in which one
/// cell returns are the nanoseconds in which one token returns. 16 lets the clock run 36 years.
const SCALE: u32 = 16;
const NANOSECONDS_PER_SECOND: u32 = 1_000_000_000;

/// The number of tokens that a command costs, charged once, before it is split.
pub fn cost(command: &HostCommand) -> u32 {
    let by_length = |length: u64| u32::try_from(length.div_ceil(TOKEN_BYTES).max(1)).unwrap_or(u32::MAX);
    match command {
        HostCommand::Read { range } | HostCommand::Write { range, .. } => by_length(range.length()),
        HostCommand::Trim { .. } => 1,
        HostCommand::WriteZeroes { range, .. } if range.length() >= STEP_BYTES_MAX => 1,
        HostCommand::WriteZeroes { range, .. } => by_length(range.length()),
        HostCommand::Cache { .. } | HostCommand::Status { .. } => 1,
        HostCommand::Flush => 0,
    }
}

/// Holds one volume to its limit.
#[derive(Default)]
pub struct Limiter {
    bucket: Option<Bucket>,
}

impl Limiter {
    /// A limiter with a full bucket.
    pub fn new(limit: IopsLimit, now: Monotonic) -> Self {
        let bucket = match limit {
            IopsLimit::Unlimited => None,
            IopsLimit::PerSecond(limit) => Some(Bucket::new(limit, now)),
        };
        Self { bucket }
    }

    /// Takes `cost` tokens, or none and says when to come back.
    ///
    /// A cost of more than half the burst is granted when that much is there; the rest is a debt that later calls
    /// wait for. So every cost is served, and a late timer costs a large command nothing either.
    ///
    /// # Errors
    /// The earliest time at which the same call can succeed, if nothing else is taken meanwhile.
    pub fn try_take(&mut self, now: Monotonic, cost: u32) -> Result<(), Monotonic> {
        match &self.bucket {
            Some(bucket) => bucket.try_take(now, cost),
            None => Ok(()),
        }
    }

    /// Takes tokens without asking, right after a granted [`Self::try_take`] at the same time: later calls wait for them.
    pub fn owe(&mut self, cost: u32) {
        if let Some(bucket) = &self.bucket {
            bucket.level.lower(u64::from(cost) * u64::from(SCALE), bucket.cell_ticks);
        }
    }

    /// Changes the limit. The tokens in the bucket, or the debt, stay as they are.
    pub fn set_limit(&mut self, limit: IopsLimit, now: Monotonic) {
        let before = self.bucket.take();
        *self = Self::new(limit, now);
        if let (Some(before), Some(bucket)) = (before, &self.bucket) {
            let content = before.content(now);
            let missing = i64::from(bucket.burst_cells.get()) - content;
            bucket.level.lower(u64::try_from(missing).unwrap_or(0), bucket.cell_ticks);
        }
    }
}

/// A bucket of cells for one limit.
struct Bucket {
    limiter: RateLimiter<NotKeyed, Level, TickClock, NoOpMiddleware<Ticks>>,
    clock: TickClock,
    level: Level,
    start: Ticks,
    burst_cells: NonZeroU32,
    cell_ticks: u64,
}

impl Bucket {
    fn new(limit: NonZeroU32, now: Monotonic) -> Self {
        // Rounded up: the limit is never exceeded.
        let cell_ticks = u64::from(NANOSECONDS_PER_SECOND.div_ceil(limit.get()));
        let burst_ticks = u64::try_from(BURST.as_nanos()).unwrap_or(u64::MAX) * u64::from(SCALE);
        let burst_cells = u32::try_from(burst_ticks.div_ceil(cell_ticks)).unwrap_or(u32::MAX);
        let burst_cells = NonZeroU32::MIN.saturating_add(SCALE - 1).saturating_add(burst_cells);
        let clock = TickClock::default();
        clock.set(now);
        let level = Level::default();
        let quota = Quota::with_period(Duration::from_nanos(cell_ticks))
            .expect("a cell returns in at least one tick")
            .allow_burst(burst_cells);
        Self {
            start: clock.now(),
            limiter: RateLimiter::new(quota, level.clone(), clock.clone()),
            clock,
            level,
            burst_cells,
            cell_ticks,
        }
    }

    fn try_take(&self, now: Monotonic, cost: u32) -> Result<(), Monotonic> {
        self.clock.set(now);
        let cells = u64::from(cost) * u64::from(SCALE);
        let half_burst = self.burst_cells.get() / 2;
        let at_once = cells.min(u64::from(half_burst.max(SCALE)));
        let Some(at_once) = u32::try_from(at_once).ok().and_then(NonZeroU32::new) else {
            return Ok(());
        };
        self.limiter
            .check_n(at_once)
            .expect("no more than the burst is asked for")
            .map_err(|refusal| refusal.earliest_possible().monotonic())?;
        self.level.lower(cells - u64::from(at_once.get()), self.cell_ticks);
        Ok(())
    }

    /// The cells in the bucket; negative if it is in debt.
    fn content(&self, now: Monotonic) -> i64 {
        self.clock.set(now);
        let full_at = self.start + Nanos::from(self.level.0.load(Ordering::Relaxed));
        let missing = full_at.0.saturating_sub(self.clock.now().0).div_ceil(self.cell_ticks);
        i64::from(self.burst_cells.get()).saturating_sub_unsigned(missing)
    }
}

/// The time at which the bucket is full, in ticks since its start: governor's whole state.
#[derive(Clone, Default)]
struct Level(Arc<AtomicU64>);

impl Level {
    /// Takes cells without asking.
    fn lower(&self, cells: u64, cell_ticks: u64) {
        self.0.fetch_add(cells.saturating_mul(cell_ticks), Ordering::Relaxed);
    }
}

impl StateStore for Level {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let (outcome, next) = decide(Some(Nanos::from(self.0.load(Ordering::Relaxed))))?;
        self.0.store(next.as_u64(), Ordering::Relaxed);
        Ok(outcome)
    }
}

/// A clock that the limiter's owner sets. It is shared with governor's limiter, never between threads.
#[derive(Clone, Default)]
struct TickClock(Arc<AtomicU64>);

impl TickClock {
    fn set(&self, now: Monotonic) {
        self.0.fetch_max(now.0.saturating_mul(u64::from(SCALE)), Ordering::Relaxed);
    }
}

impl Clock for TickClock {
    type Instant = Ticks;

    fn now(&self) -> Ticks {
        Ticks(self.0.load(Ordering::Relaxed))
    }
}

/// A time of the bucket's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ticks(u64);

impl Ticks {
    /// The same time, rounded up to a nanosecond.
    fn monotonic(self) -> Monotonic {
        Monotonic(self.0.div_ceil(u64::from(SCALE)))
    }
}

impl Add<Nanos> for Ticks {
    type Output = Self;

    fn add(self, ticks: Nanos) -> Self {
        Self(self.0.saturating_add(ticks.as_u64()))
    }
}

impl Reference for Ticks {
    fn duration_since(&self, earlier: Self) -> Nanos {
        Nanos::from(self.0.saturating_sub(earlier.0))
    }

    fn saturating_sub(&self, ticks: Nanos) -> Self {
        Self(self.0.saturating_sub(ticks.as_u64()))
    }
}

#[cfg(test)]
mod tests {
    use block::ByteRange;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const RATES: [u32; 7] = [1, 7, 75, 750, 2_000, 10_000, 150_000];

    fn per_second(limit: u32) -> IopsLimit {
        IopsLimit::PerSecond(NonZeroU32::new(limit).unwrap())
    }

    /// A cheap deterministic sequence (splitmix64).
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = *state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// The times at which a saturating load got its tokens, with timers up to `late_max` late.
    fn saturate(limiter: &mut Limiter, mut now: u64, until: u64, cost: u32, late_max: u64) -> Vec<u64> {
        let (mut grants, mut seed) = (Vec::new(), 42);
        while now < until {
            match limiter.try_take(Monotonic(now), cost) {
                Ok(()) => grants.push(now),
                Err(ready) => {
                    assert!(ready.0 > now);
                    now = ready.0 + random(&mut seed) % (late_max + 1);
                }
            }
        }
        grants
    }

    #[test]
    fn a_saturating_load_gets_its_limit_with_late_timers() {
        for rate in RATES {
            let start = 123 * SECOND;
            let mut limiter = Limiter::new(per_second(rate), Monotonic(start));
            let grants = saturate(&mut limiter, start, start + 12 * SECOND, 1, 2_000_000);
            let steady = grants.iter().filter(|at| **at >= start + 2 * SECOND).count() as u64;
            let wanted = 10 * u64::from(rate);
            assert!(steady.abs_diff(wanted) * 100 <= wanted, "{rate}: {steady} in 10 s");
            // Never above limit x time + burst, over every span that starts with a grant.
            let burst = 1 + (u64::from(rate) * 20).div_ceil(1000);
            for (index, first) in grants.iter().enumerate().step_by(grants.len().div_ceil(50)) {
                for (count, at) in (1_u64..).zip(&grants[index..]) {
                    let allowed = u64::from(rate) * (at - first) / SECOND + burst + 1;
                    assert!(count <= allowed, "{rate}: {count} tokens in {} ns", at - first);
                }
            }
        }
    }

    #[test]
    fn large_commands_keep_the_rate_at_every_limit() {
        for rate in RATES {
            let mut limiter = Limiter::new(per_second(rate), Monotonic(0));
            let cost = 128;
            let seconds = if rate < 100 { 2000 } else { 30 };
            let grants = saturate(&mut limiter, 0, seconds * SECOND, cost, 2_000_000);
            let (first, last) = (grants[0], grants[grants.len() - 1]);
            let paid = (grants.len() as u64 - 1) * u64::from(cost);
            let wanted = u64::from(rate) * (last - first) / SECOND;
            assert!(paid.abs_diff(wanted) * 100 <= wanted, "{rate}: {paid} for {wanted}");
        }
    }

    #[test]
    fn one_command_at_a_time_is_evenly_spaced() {
        for rate in RATES {
            let mut limiter = Limiter::new(per_second(rate), Monotonic(0));
            let grants = saturate(&mut limiter, 0, 4 * SECOND, 1, 0);
            let steady: Vec<u64> = grants.into_iter().filter(|at| *at > SECOND).collect();
            let period = SECOND.div_ceil(u64::from(rate));
            for pair in steady.windows(2) {
                assert!((pair[1] - pair[0]).abs_diff(period) <= 1, "{rate}");
            }
        }
    }

    #[test]
    fn changing_the_limit_gives_no_tokens_away() {
        let mut limiter = Limiter::new(per_second(1000), Monotonic(0));
        let mut taken = 0;
        for step in 0..1000 {
            let now = Monotonic(step * 1_000_000);
            while limiter.try_take(now, 1).is_ok() {
                taken += 1;
            }
            limiter.set_limit(per_second(if step % 2 == 0 { 900 } else { 1000 }), now);
        }
        assert!((900..=1000 + 21).contains(&taken), "{taken} tokens in a second");
        limiter.set_limit(IopsLimit::Unlimited, Monotonic(SECOND));
        assert!((0..10_000).all(|_| limiter.try_take(Monotonic(SECOND), 100).is_ok()));
    }

    #[test]
    fn costs_follow_length_and_kind() {
        let range = |length| ByteRange::new(4096, length).unwrap();
        let zeroes = |length| HostCommand::WriteZeroes {
            range: range(length),
            fua: false,
            no_hole: false,
            fast: false,
        };
        assert_eq!(cost(&HostCommand::Read { range: range(0) }), 1);
        assert_eq!(cost(&HostCommand::Read { range: range(256 << 10) }), 1);
        assert_eq!(cost(&HostCommand::Write { range: range((256 << 10) + 1), fua: true }), 2);
        assert_eq!(cost(&HostCommand::Write { range: range(32 << 20), fua: false }), 128);
        assert_eq!(cost(&HostCommand::Trim { range: range(1 << 40), fua: false }), 1);
        assert_eq!(cost(&zeroes((1 << 20) - 1)), 4);
        assert_eq!(cost(&zeroes(1 << 20)), 1);
        assert_eq!(cost(&HostCommand::Flush), 0);
    }
}
