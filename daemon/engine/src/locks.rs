//! Which steps may run at once: range locks over one volume's data units.
//!
//! Guarantees: two granted exclusive locks never overlap; among overlapping exclusive locks the order of
//! granting is the order of asking (so home order = sequence order, and nobody starves); a read waits only for
//! the sub-unit writes in flight on its units when it asks, and nothing waits for a read.

use std::collections::BTreeMap;

use block::ByteRange;

use crate::StepId;

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// A host's read.
    Read,
    /// A write of whole units, zeros, or a copy read of a resync.
    Exclusive,
    /// A write that reads, changes and writes back partial units.
    ExclusivePartial,
}

/// The answer to a request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// The lock is held.
    Granted,
    /// A later `release` will name it.
    Queued,
}

/// The locks of one volume, held and waited for.
#[derive(Debug, Default)]
pub struct RangeLocks {
    entries: BTreeMap<StepId, Entry>,
    /// The end of each exclusive entry, held or queued, by its offset.
    exclusive: BTreeMap<(u64, StepId), u64>,
    /// No exclusive entry is longer: bounds how far below an offset an overlap can start.
    length_max: u64,
}

#[derive(Debug)]
struct Entry {
    range: ByteRange,
    kind: LockKind,
    /// Entries that must go before this one is granted.
    blockers: usize,
    /// Entries that wait for this one, in the order in which they asked.
    waiters: Vec<StepId>,
}

impl RangeLocks {
    /// Asks for a lock on the units that `range` touches.
    ///
    /// # Panics
    /// If the range is empty or `step` already has an entry.
    pub fn acquire(&mut self, step: StepId, range: ByteRange, kind: LockKind) -> Acquired {
        assert!(!range.is_empty(), "a lock covers at least one byte");
        let range = range.unit_outward();
        let blockers = self.blockers(range, kind);
        if kind == LockKind::Read && blockers.is_empty() {
            // Nothing ever waits for a read, so one that has its lock needs no entry.
            return Acquired::Granted;
        }
        for blocker in &blockers {
            if let Some(entry) = self.entries.get_mut(blocker) {
                entry.waiters.push(step);
            }
        }
        let acquired = if blockers.is_empty() { Acquired::Granted } else { Acquired::Queued };
        if kind != LockKind::Read {
            self.length_max = self.length_max.max(range.length());
            self.exclusive.insert((range.offset(), step), range.end());
        }
        let entry = Entry { range, kind, blockers: blockers.len(), waiters: Vec::new() };
        let before = self.entries.insert(step, entry);
        assert!(before.is_none(), "step {step:?} asks for a second lock");
        acquired
    }

    /// Gives a lock up, held or queued; returns the locks that are granted by it, in the order of asking.
    ///
    /// # Panics
    /// If `step` did not ask for a lock other than a read's.
    pub fn release(&mut self, step: StepId, kind: LockKind) -> Vec<StepId> {
        let Some(entry) = self.entries.remove(&step) else {
            assert!(kind == LockKind::Read, "{step:?} asked for no lock");
            return Vec::new();
        };
        assert!(entry.kind == kind, "{step:?} asked for another lock");
        if entry.kind != LockKind::Read {
            self.exclusive.remove(&(entry.range.offset(), step));
        }
        if self.exclusive.is_empty() {
            self.length_max = 0;
        }
        let mut granted = entry.waiters;
        // A waiter that gave up while queued has no entry any more.
        granted.retain(|waiter| {
            self.entries.get_mut(waiter).is_some_and(|entry| {
                entry.blockers -= 1;
                entry.blockers == 0
            })
        });
        granted
    }

    /// The number of locks held or waited for, without reads that hold theirs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if `len` is 0.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn blockers(&self, range: ByteRange, kind: LockKind) -> Vec<StepId> {
        let lowest = range.offset().saturating_sub(self.length_max);
        self.exclusive
            .range((lowest, StepId(0))..(range.end(), StepId(0)))
            .filter(|(_, end)| **end > range.offset())
            .map(|((_, step), _)| *step)
            .filter(|step| self.blocks(*step, kind))
            .collect()
    }

    fn blocks(&self, holder: StepId, kind: LockKind) -> bool {
        match kind {
            LockKind::Read => self
                .entries
                .get(&holder)
                .is_some_and(|entry| entry.kind == LockKind::ExclusivePartial && entry.blockers == 0),
            LockKind::Exclusive | LockKind::ExclusivePartial => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rules, written down as plainly as possible: a list in the order of asking.
    #[derive(Default)]
    struct Model(Vec<(StepId, ByteRange, LockKind, Vec<StepId>)>);

    impl Model {
        fn granted(&self, step: StepId) -> bool {
            self.0.iter().any(|(id, _, _, waits_for)| {
                *id == step && !self.0.iter().any(|(other, ..)| waits_for.contains(other))
            })
        }

        fn acquire(&mut self, step: StepId, range: ByteRange, kind: LockKind) -> bool {
            let units = range.unit_outward();
            let overlapping = self.0.iter().filter(|(_, other, ..)| other.overlaps(units));
            let waits_for = overlapping
                .filter(|(id, _, other, _)| match kind {
                    LockKind::Read => *other == LockKind::ExclusivePartial && self.granted(*id),
                    LockKind::Exclusive | LockKind::ExclusivePartial => *other != LockKind::Read,
                })
                .map(|(id, ..)| *id)
                .collect();
            self.0.push((step, units, kind, waits_for));
            self.granted(step)
        }

        fn release(&mut self, step: StepId) -> Vec<StepId> {
            let waiting: Vec<StepId> =
                self.0.iter().map(|entry| entry.0).filter(|id| !self.granted(*id)).collect();
            self.0.retain(|entry| entry.0 != step);
            waiting.into_iter().filter(|id| self.granted(*id)).collect()
        }
    }

    fn kinds() -> impl Strategy<Value = LockKind> {
        prop_oneof![Just(LockKind::Read), Just(LockKind::Exclusive), Just(LockKind::ExclusivePartial)]
    }

    proptest! {
        #[test]
        fn locks_follow_the_naive_model(
            ops in prop::collection::vec((0_u64..100_000, 1_u64..30_000, kinds(), any::<bool>(), any::<prop::sample::Index>()), 1..60),
        ) {
            let (mut locks, mut model) = (RangeLocks::default(), Model::default());
            for (number, (offset, length, kind, ask, pick)) in (0_u64..).zip(ops) {
                if ask || model.0.is_empty() {
                    let range = ByteRange::new(offset, length).unwrap();
                    let granted = locks.acquire(StepId(number), range, kind) == Acquired::Granted;
                    prop_assert_eq!(granted, model.acquire(StepId(number), range, kind));
                } else {
                    let (step, _, kind, _) = model.0[pick.index(model.0.len())];
                    prop_assert_eq!(locks.release(step, kind), model.release(step));
                }
                let held: Vec<_> = model.0.iter().filter(|entry| entry.2 != LockKind::Read && model.granted(entry.0)).collect();
                for (index, one) in held.iter().enumerate() {
                    prop_assert!(held[index + 1..].iter().all(|other| !one.1.overlaps(other.1)));
                }
            }
            while let Some(entry) = model.0.first() {
                let (step, kind) = (entry.0, entry.2);
                prop_assert!(model.granted(step), "the oldest is always granted");
                prop_assert_eq!(locks.release(step, kind), model.release(step));
            }
            prop_assert!(locks.is_empty());
        }
    }

    #[test]
    fn a_read_passes_whole_unit_writes_and_waits_for_partial_ones() {
        let mut locks = RangeLocks::default();
        let at = |offset, length| ByteRange::new(offset, length).unwrap();
        assert_eq!(locks.acquire(StepId(1), at(0, 8192), LockKind::Exclusive), Acquired::Granted);
        assert_eq!(locks.acquire(StepId(2), at(0, 512), LockKind::Read), Acquired::Granted);
        assert_eq!(locks.acquire(StepId(3), at(8200, 10), LockKind::ExclusivePartial), Acquired::Granted);
        assert_eq!(locks.acquire(StepId(4), at(12_000, 10), LockKind::Read), Acquired::Queued);
        assert_eq!(locks.acquire(StepId(5), at(0, 16_384), LockKind::ExclusivePartial), Acquired::Queued);
        assert_eq!(locks.acquire(StepId(6), at(0, 1), LockKind::Read), Acquired::Granted);
        assert_eq!(locks.release(StepId(3), LockKind::ExclusivePartial), [StepId(4)]);
        assert_eq!(locks.release(StepId(1), LockKind::Exclusive), [StepId(5)]);
    }
}
