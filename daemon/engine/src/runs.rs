//! A set of numbers kept as runs: disjoint half-open ranges that do not touch each other.

use std::collections::BTreeMap;
use std::ops::Range;

/// The set; memory is proportional to the number of runs, not of members.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs(BTreeMap<u64, u64>);

impl Runs {
    /// Adds a range; returns how many of its members are new.
    pub(crate) fn insert(&mut self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let (mut start, mut end, mut known) = (range.start, range.end, 0);
        // Swallow every run that overlaps or touches the new one, from the last on.
        while let Some((&run_start, &run_end)) = self.0.range(..=end).next_back() {
            if run_end < start {
                break;
            }
            self.0.remove(&run_start);
            known += run_end - run_start;
            start = start.min(run_start);
            end = end.max(run_end);
        }
        self.0.insert(start, end);
        end - start - known
    }

    /// Removes a range; returns how many members it held.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> u64 {
        let mut removed = 0;
        while let Some((&run_start, &run_end)) = self.0.range(..range.end).next_back() {
            if run_end <= range.start || range.is_empty() {
                break;
            }
            self.0.remove(&run_start);
            if run_start < range.start {
                self.0.insert(run_start, range.start);
            }
            if range.end < run_end {
                self.0.insert(range.end, run_end);
            }
            removed += run_end.min(range.end) - run_start.max(range.start);
        }
        removed
    }

    /// The first run that ends after `from`: the one that holds it, or else the next one.
    pub(crate) fn next(&self, from: u64) -> Option<Range<u64>> {
        let before = self.0.range(..=from).next_back();
        before
            .filter(|(_, end)| **end > from)
            .or_else(|| self.0.range(from..).next())
            .map(|(start, end)| *start..*end)
    }

    /// True if the number is a member.
    pub(crate) fn contains(&self, number: u64) -> bool {
        self.next(number).is_some_and(|run| run.start <= number)
    }

    /// The parts of a range that are not in the set, in ascending order.
    pub(crate) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let run = self.next(at).unwrap_or(range.end..range.end);
            if at < run.start {
                gaps.push(at..run.start.min(range.end));
            }
            at = run.end.max(run.start.min(range.end));
        }
        gaps
    }

    /// The runs in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// The number of runs.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_behave_like_a_set(ops in prop::collection::vec((any::<bool>(), 0_u64..40, 0_u64..40), 1..40)) {
            let mut runs = Runs::default();
            let mut model = BTreeSet::new();
            for (insert, a, b) in ops {
                let range = a.min(b)..a.max(b);
                let gaps: Vec<u64> = runs.gaps(range.clone()).into_iter().flatten().collect();
                let missing: Vec<u64> = range.clone().filter(|n| !model.contains(n)).collect();
                prop_assert_eq!(&gaps, &missing);
                if insert {
                    prop_assert_eq!(runs.insert(range.clone()), missing.len() as u64);
                    model.extend(range);
                } else {
                    prop_assert_eq!(runs.remove(range.clone()), range.end - range.start - missing.len() as u64);
                    model.retain(|n| !range.contains(n));
                }
                let all: Vec<Range<u64>> = runs.iter().collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert!(all.into_iter().flatten().eq(model.iter().copied()));
                prop_assert_eq!(runs.contains(a), model.contains(&a));
            }
        }
    }
}
