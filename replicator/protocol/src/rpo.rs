//! RPO: the age of the oldest acknowledged write that the target does not durably hold.
//!
//! RPO(t) = t - t_ack(oldest host-acknowledged write that is not in a target-durable committed cut); 0 if there is
//! none. Memory is bounded: runs of sequences share one bucket that keeps its oldest acknowledgement, so what is
//! reported is never below the true value.

use std::collections::VecDeque;
use std::time::Duration;

use block::{Monotonic, Sequence};

/// Sequences that one bucket takes before a new one is opened.
const BUCKET_SEQUENCES: u64 = 64;
/// A bucket older than this takes no new sequence, so that one bucket never blurs more than this much time.
const BUCKET_SPAN: Duration = Duration::from_millis(10);
/// Above this many buckets neighbours are merged: 4096 x 40 bytes.
const BUCKETS_MAX: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    first: Sequence,
    last: Sequence,
    opened: Monotonic,
    oldest_ack: Option<Monotonic>,
}

/// Measures RPO at the primary, by its monotonic clock.
#[derive(Debug, Default)]
pub struct RpoTracker {
    buckets: VecDeque<Bucket>,
    /// Acknowledged writes of an earlier incarnation that the target may lack: the bound on their age.
    inherited: Option<Monotonic>,
    /// How old they are is not known.
    unknown: bool,
    /// The target has all of them when it has this.
    lost_through: Sequence,
}

impl RpoTracker {
    /// Notes that a write took `sequence`. Sequences must come in increasing order.
    ///
    /// # Panics
    /// If they do not.
    pub fn assigned(&mut self, sequence: Sequence, now: Monotonic) {
        if let Some(bucket) = self.buckets.back_mut() {
            assert!(bucket.last < sequence, "sequences are assigned in order");
            let full =
                sequence.0 - bucket.first.0 >= BUCKET_SEQUENCES || now.since(bucket.opened) > BUCKET_SPAN;
            if !full {
                bucket.last = sequence;
                return;
            }
        }
        if self.buckets.len() >= BUCKETS_MAX {
            self.merge_neighbours();
        }
        self.buckets.push_back(Bucket { first: sequence, last: sequence, opened: now, oldest_ack: None });
    }

    /// Notes that the host was told of the success of the write with `sequence`.
    pub fn acknowledged(&mut self, sequence: Sequence, now: Monotonic) {
        let index = self.buckets.partition_point(|bucket| bucket.last < sequence);
        if let Some(bucket) = self.buckets.get_mut(index)
            && bucket.first <= sequence
        {
            bucket.oldest_ack.get_or_insert(now);
        }
    }

    /// A time at or before which the host was told of the write with `sequence`, close to it, while it is not committed.
    pub fn acknowledged_at(&self, sequence: Sequence) -> Option<Monotonic> {
        let index = self.buckets.partition_point(|bucket| bucket.last < sequence);
        self.buckets.get(index).filter(|bucket| bucket.first <= sequence)?.oldest_ack
    }

    /// Notes that the target durably committed everything up to `through`.
    pub fn committed(&mut self, through: Sequence) {
        if through >= self.lost_through {
            self.inherited = None;
            self.unknown = false;
        }
        while let Some(bucket) = self.buckets.front_mut() {
            if bucket.last > through {
                // A partly committed bucket keeps its oldest acknowledgement: late, never early.
                bucket.first = bucket.first.max(through.next());
                return;
            }
            self.buckets.pop_front();
        }
    }

    /// Notes that writes of an earlier incarnation, acknowledged at or after `oldest`, may not be at the target.
    pub const fn inherit(&mut self, oldest: Monotonic) {
        self.inherited = Some(oldest);
        self.unknown = false;
    }

    /// Notes that writes of an earlier incarnation may not be at the target, and nothing is known of their age.
    pub const fn lose(&mut self) {
        self.unknown = true;
    }

    /// As [`Self::lose`], of writes of this incarnation up to `last`: a restart continues it. Only when the target has
    /// all of them the bound on their age ends.
    pub const fn lose_through(&mut self, last: Sequence) {
        self.unknown = true;
        self.lost_through = last;
    }

    /// True while [`Self::rpo`] says nothing about the writes of an earlier incarnation.
    pub const fn is_unknown(&self) -> bool {
        self.unknown
    }

    /// True while what is reported is only an upper bound.
    pub const fn is_bound(&self) -> bool {
        self.inherited.is_some()
    }

    /// The RPO at `now`.
    pub fn rpo(&self, now: Monotonic) -> Duration {
        let oldest = self.buckets.iter().filter_map(|bucket| bucket.oldest_ack).min();
        let oldest = match (oldest, self.inherited) {
            (Some(ours), Some(inherited)) => Some(ours.min(inherited)),
            (ours, inherited) => ours.or(inherited),
        };
        oldest.map_or(Duration::ZERO, |oldest| now.since(oldest))
    }

    fn merge_neighbours(&mut self) {
        let mut merged: VecDeque<Bucket> = VecDeque::with_capacity(BUCKETS_MAX);
        let mut pending: Option<Bucket> = None;
        for bucket in self.buckets.drain(..) {
            match pending.take() {
                None => pending = Some(bucket),
                Some(first) => {
                    let oldest_ack = match (first.oldest_ack, bucket.oldest_ack) {
                        (Some(a), Some(b)) => Some(a.min(b)),
                        (a, b) => a.or(b),
                    };
                    merged.push_back(Bucket {
                        first: first.first,
                        last: bucket.last,
                        opened: first.opened,
                        oldest_ack,
                    });
                }
            }
        }
        merged.extend(pending);
        self.buckets = merged;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_drained_mirror_has_rpo_zero() {
        let mut tracker = RpoTracker::default();
        tracker.assigned(Sequence(1), Monotonic(5));
        tracker.acknowledged(Sequence(1), Monotonic(10));
        assert_eq!(tracker.rpo(Monotonic(110)), Duration::from_nanos(100));
        tracker.committed(Sequence(1));
        assert_eq!(tracker.rpo(Monotonic(200)), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn reported_rpo_is_never_below_the_true_one_and_close_when_buckets_are_few(
            steps in prop::collection::vec((0_u8..3, 0_u64..4_000_000), 1..400)
        ) {
            let mut tracker = RpoTracker::default();
            let (mut now, mut last, mut committed) = (Monotonic(0), 0_u64, 0_u64);
            let mut unacked = Vec::new();
            let mut acked: BTreeMap<u64, Monotonic> = BTreeMap::new();
            for (kind, advance) in steps {
                now = now + Duration::from_nanos(advance);
                match kind {
                    0 => { last += 1; tracker.assigned(Sequence(last), now); unacked.push(last); }
                    1 => if !unacked.is_empty() {
                        let sequence = unacked.swap_remove(usize::try_from(advance).unwrap() % unacked.len());
                        tracker.acknowledged(Sequence(sequence), now);
                        acked.insert(sequence, now);
                    },
                    _ => {
                        let limit = unacked.iter().min().map_or(last, |lowest| lowest - 1);
                        committed = committed.max(limit.min(committed + advance % 70));
                        tracker.committed(Sequence(committed));
                        acked.retain(|sequence, _| *sequence > committed);
                    }
                }
                let truth = acked.values().min().map_or(Duration::ZERO, |oldest| now.since(*oldest));
                prop_assert!(tracker.rpo(now) >= truth);
                if acked.is_empty() && unacked.is_empty() { prop_assert_eq!(tracker.rpo(now), Duration::ZERO); }
            }
        }
    }

    #[test]
    fn what_a_restart_forgot_is_unknown_until_it_is_bounded_or_committed() {
        let mut tracker = RpoTracker::default();
        tracker.lose();
        assert!(tracker.is_unknown());
        tracker.inherit(Monotonic(50));
        assert!(!tracker.is_unknown() && tracker.is_bound());
        assert_eq!(tracker.rpo(Monotonic(150)), Duration::from_nanos(100));
        tracker.lose();
        tracker.committed(Sequence(3));
        assert!(!tracker.is_unknown() && !tracker.is_bound());
    }

    #[test]
    fn a_continued_incarnation_keeps_its_bound_until_all_it_lost_is_committed() {
        let mut tracker = RpoTracker::default();
        tracker.lose_through(Sequence(9));
        tracker.committed(Sequence(5));
        assert!(tracker.is_unknown());
        tracker.inherit(Monotonic(50));
        tracker.committed(Sequence(8));
        assert_eq!(tracker.rpo(Monotonic(150)), Duration::from_nanos(100));
        tracker.assigned(Sequence(10), Monotonic(160));
        tracker.acknowledged(Sequence(10), Monotonic(170));
        tracker.committed(Sequence(9));
        assert!(!tracker.is_bound());
        assert_eq!(tracker.rpo(Monotonic(180)), Duration::from_nanos(10));
    }

    #[test]
    fn memory_is_bounded_however_long_the_partner_is_away() {
        let mut tracker = RpoTracker::default();
        for sequence in 1..=1_000_000_u64 {
            tracker.assigned(Sequence(sequence), Monotonic(sequence * 1_000_000));
            tracker.acknowledged(Sequence(sequence), Monotonic(sequence * 1_000_000 + 1));
        }
        assert!(tracker.buckets.len() <= BUCKETS_MAX);
        assert_eq!(tracker.rpo(Monotonic(1_000_001)), Duration::ZERO);
        assert_eq!(tracker.rpo(Monotonic(2_000_001)), Duration::from_millis(1));
    }
}
