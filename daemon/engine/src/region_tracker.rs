//! When the bits of the intent map may clear: what happened in each set region since this incarnation began.
//!
//! A region is clearable only if no write is in flight there, every write there is durable at the target, and a
//! flush that was submitted after its last home write ended, and after the incarnation began, succeeded. A
//! region inherited from an older incarnation must first be verified: compared equal, or its differing blocks
//! committed at the target. Regions clear only above a budget, the coldest first, never by idle time.
//!
//! It lives in memory and belongs to one incarnation; a failed flush ends that, and nothing clears until a new
//! tracker inherits the map's regions.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use block::{ByteCount, ByteRange, Monotonic, Sequence};

use crate::intent_map::region_numbers;

/// How many idle regions one call of [`RegionTracker::clearable`] looks at: bounds a turn while the target lags.
const SCAN_MAX: usize = 4096;

/// What is known of the set regions of one volume.
#[derive(Debug)]
pub struct RegionTracker {
    region_bytes: u64,
    started_at: Monotonic,
    /// When the latest flush that succeeded was submitted.
    flushed_at: Option<Monotonic>,
    /// A flush failed.
    ended: bool,
    regions: BTreeMap<u64, Region>,
    /// Verified regions without a write in flight, by the end of their last one.
    idle: BTreeSet<(Monotonic, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    in_flight: u32,
    last_sequence: Sequence,
    /// The end of the last home write, or the incarnation's start.
    last_end: Monotonic,
    verified: bool,
}

impl RegionTracker {
    /// The tracker of an incarnation that began at `started_at` with these regions' bits set.
    pub fn new(
        region_bytes: ByteCount,
        started_at: Monotonic,
        inherited: impl IntoIterator<Item = u64>,
    ) -> Self {
        let region =
            Region { in_flight: 0, last_sequence: Sequence(0), last_end: started_at, verified: false };
        Self {
            region_bytes: region_bytes.0,
            started_at,
            flushed_at: None,
            ended: false,
            regions: inherited.into_iter().map(|number| (number, region)).collect(),
            idle: BTreeSet::new(),
        }
    }

    /// A write took its sequence; its home write follows, or [`Self::ended`] without one.
    pub fn began(&mut self, range: ByteRange, sequence: Sequence) {
        for number in self.numbers(range) {
            let region = self.regions.entry(number).or_insert(Region {
                in_flight: 0,
                last_sequence: sequence,
                last_end: self.started_at,
                verified: true,
            });
            self.idle.remove(&(region.last_end, number));
            region.in_flight += 1;
            region.last_sequence = region.last_sequence.max(sequence);
        }
    }

    /// The home write of a range that began ended, well or not.
    ///
    /// # Panics
    /// If none is in flight there.
    pub fn ended(&mut self, range: ByteRange, now: Monotonic) {
        for number in self.numbers(range) {
            let region = self.regions.get_mut(&number).expect("a write began here");
            assert!(region.in_flight > 0, "a write in region {number} ended twice");
            region.in_flight -= 1;
            region.last_end = region.last_end.max(now);
            self.rest(number);
        }
    }

    /// A flush that was submitted at `submitted_at` succeeded.
    pub fn flushed(&mut self, submitted_at: Monotonic) {
        self.flushed_at = self.flushed_at.max(Some(submitted_at));
    }

    /// A flush failed: the incarnation is over, and no bit clears any more.
    pub const fn flush_failed(&mut self) {
        self.ended = true;
    }

    /// Every inherited region was compared; what differs commits at the target with `sequence` at the latest.
    pub fn verified_all(&mut self, sequence: Sequence) {
        let unverified: Vec<u64> =
            self.regions.iter().filter(|(_, region)| !region.verified).map(|(number, _)| *number).collect();
        for number in unverified {
            if let Some(region) = self.regions.get_mut(&number) {
                region.verified = true;
                region.last_sequence = region.last_sequence.max(sequence);
            }
            self.rest(number);
        }
    }

    /// Regions whose bits were set without a write, as when one failed before its home write. They clear as if
    /// a write of `sequence` had ended now.
    pub fn adopt(&mut self, range: ByteRange, sequence: Sequence, now: Monotonic) {
        self.began(range, sequence);
        self.ended(range, now);
    }

    /// The regions to clear now, coldest first, so that no more than `budget_regions` stay set if the rule
    /// allows. Clear each bit in the map first, then call [`Self::cleared`].
    pub fn clearable(&self, target_durable: Sequence, budget_regions: u64) -> Vec<u64> {
        let budget = usize::try_from(budget_regions).unwrap_or(usize::MAX);
        let excess = self.regions.len().saturating_sub(budget);
        let Some(flushed_at) = self.flushed_at.filter(|_| !self.ended && excess > 0) else {
            return Vec::new();
        };
        self.idle
            .iter()
            // Equal times do not tell which came first.
            .take_while(|(last_end, _)| *last_end < flushed_at)
            .take(SCAN_MAX)
            .map(|(_, number)| *number)
            .filter(|number| self.sequence_of(*number) <= Some(target_durable))
            .take(excess)
            .collect()
    }

    /// A region's bit is off; the tracker forgets it.
    ///
    /// # Panics
    /// If a write is in flight there or the region is not verified.
    pub fn cleared(&mut self, number: u64) {
        if let Some(region) = self.regions.remove(&number) {
            assert!(region.in_flight == 0 && region.verified, "region {number} must stay set");
            self.idle.remove(&(region.last_end, number));
        }
    }

    /// The number of set regions.
    pub fn count(&self) -> usize {
        self.regions.len()
    }

    fn numbers(&self, range: ByteRange) -> Range<u64> {
        region_numbers(range, self.region_bytes)
    }

    fn sequence_of(&self, number: u64) -> Option<Sequence> {
        self.regions.get(&number).map(|region| region.last_sequence)
    }

    /// Files a region among the idle ones if it is.
    fn rest(&mut self, number: u64) {
        if let Some(region) = self.regions.get(&number)
            && region.in_flight == 0
            && region.verified
        {
            self.idle.insert((region.last_end, number));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REGION: u64 = 1 << 20;

    fn region(number: u64) -> ByteRange {
        ByteRange::new(number * REGION + 4096, 4096).unwrap()
    }

    fn tracker(inherited: &[u64]) -> RegionTracker {
        RegionTracker::new(ByteCount(REGION), Monotonic(100), inherited.iter().copied())
    }

    #[test]
    fn each_condition_alone_keeps_the_bit() {
        let mut tracker = tracker(&[]);
        tracker.flushed(Monotonic(300));
        tracker.began(region(1), Sequence(5));
        assert!(tracker.clearable(Sequence(9), 0).is_empty(), "in flight");
        tracker.ended(region(1), Monotonic(200));
        assert_eq!(tracker.clearable(Sequence(9), 0), [1]);
        assert!(tracker.clearable(Sequence(9), 1).is_empty(), "within the budget");
        assert!(tracker.clearable(Sequence(4), 0).is_empty(), "not durable at the target");
        tracker.began(region(1), Sequence(6));
        tracker.ended(region(1), Monotonic(300));
        assert!(tracker.clearable(Sequence(9), 0).is_empty(), "flushed no later than written");
        tracker.flushed(Monotonic(301));
        tracker.flushed(Monotonic(1));
        assert_eq!(tracker.clearable(Sequence(6), 0), [1]);
        tracker.flush_failed();
        assert!(tracker.clearable(Sequence(9), 0).is_empty(), "the incarnation ended");
    }

    #[test]
    fn inherited_regions_wait_for_verification_and_a_flush_of_this_incarnation() {
        let mut tracker = tracker(&[3, 4]);
        tracker.flushed(Monotonic(200));
        tracker.began(region(4), Sequence(1));
        tracker.ended(region(4), Monotonic(150));
        assert!(tracker.clearable(Sequence(10), 0).is_empty());
        tracker.verified_all(Sequence(8));
        assert!(tracker.clearable(Sequence(7), 0).is_empty());
        assert_eq!(tracker.clearable(Sequence(8), 0), [3, 4]);
        assert_eq!(tracker.clearable(Sequence(8), 1), [3], "the coldest first");
        tracker.cleared(3);
        assert_eq!(tracker.count(), 1);
    }

    proptest! {
        /// Against a log of everything that happened.
        #[test]
        fn clearable_follows_the_rule(ops in prop::collection::vec((0_u8..5, 0_u64..6), 1..80), budget in 0_u64..3) {
            let mut tracker = tracker(&[0, 1]);
            let (mut open, mut writes) = (Vec::new(), Vec::new());
            let (mut flushed, mut verified, mut durable) = (None, false, Sequence(0));
            let mut cleared = BTreeSet::new();
            for (op, number) in ops {
                let now = Monotonic(101 + writes.len() as u64 + open.len() as u64);
                match op {
                    0 | 1 => {
                        let sequence = Sequence(writes.len() as u64 + open.len() as u64 + 1);
                        tracker.began(region(number), sequence);
                        open.push((number, sequence));
                    }
                    2 if !open.is_empty() => {
                        let (number, sequence) = open.remove(usize::try_from(number).unwrap() % open.len());
                        tracker.ended(region(number), now);
                        writes.push((number, sequence, now));
                    }
                    3 => {
                        tracker.flushed(now);
                        flushed = Some(now);
                    }
                    _ => {
                        durable = Sequence(durable.0 + number);
                        if number == 5 && !verified {
                            tracker.verified_all(Sequence(0));
                            verified = true;
                        }
                    }
                }
                let clearable = tracker.clearable(durable, budget);
                let set = tracker.count() as u64;
                prop_assert!(clearable.len() as u64 <= set.saturating_sub(budget));
                for number in clearable {
                    prop_assert!(open.iter().all(|(other, _)| *other != number));
                    let mine: Vec<_> = writes.iter().filter(|write| write.0 == number).collect();
                    prop_assert!(mine.iter().all(|write| write.1 <= durable && Some(write.2) < flushed));
                    prop_assert!(number > 1 || verified || cleared.contains(&number));
                    tracker.cleared(number);
                    cleared.insert(number);
                }
            }
        }
    }
}
