//! Syncs of a file in the page cache that run side by side.
//!
//! The kernel tells of data that it could not write back once for each open file: to the sync that asks first. One that
//! runs beside it may have covered that very data, and ends well. So a sync that ended well is believed when those that
//! were running at its end have ended too, and none of them failed; one that began later cannot have taken its report.

use std::collections::BTreeSet;

/// The syncs of one file; `T` is what is to be told of one.
#[derive(Debug)]
pub(super) struct Syncs<T> {
    last: u64,
    running: BTreeSet<u64>,
    held: Vec<Held<T>>,
}

#[derive(Debug)]
struct Held<T> {
    awaited: BTreeSet<u64>,
    believed: bool,
    told: T,
}

impl<T> Default for Syncs<T> {
    fn default() -> Self {
        Self { last: 0, running: BTreeSet::new(), held: Vec::new() }
    }
}

impl<T> Syncs<T> {
    /// A sync begins; its number.
    pub(super) fn begin(&mut self) -> u64 {
        self.last += 1;
        self.running.insert(self.last);
        self.last
    }

    /// A sync ended, well or not. Gives what can be told now, each with whether it ended well after all; failures first.
    pub(super) fn end(&mut self, number: u64, well: bool, told: T) -> Vec<(T, bool)> {
        let ran = self.running.remove(&number);
        assert!(ran, "a sync ends once");
        let mut known = Vec::new();
        for held in &mut self.held {
            held.believed &= well || !held.awaited.contains(&number);
            held.awaited.remove(&number);
        }
        if well && !self.running.is_empty() {
            self.held.push(Held { awaited: self.running.clone(), believed: true, told });
        } else {
            known.push((told, well));
        }
        let ended = self.held.extract_if(.., |held| !held.believed || held.awaited.is_empty());
        known.extend(ended.map(|held| (held.told, held.believed)));
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_sync_is_told_at_once() {
        let mut syncs = Syncs::default();
        for well in [true, false] {
            let number = syncs.begin();
            assert_eq!(syncs.end(number, well, 'a'), [('a', well)]);
        }
    }

    #[test]
    fn what_ended_well_beside_one_that_fails_has_failed() {
        let mut syncs = Syncs::default();
        let (flush, write, other) = (syncs.begin(), syncs.begin(), syncs.begin());
        assert_eq!(syncs.end(write, true, 'w'), []);
        let later = syncs.begin();
        assert_eq!(syncs.end(flush, false, 'f'), [('f', false), ('w', false)]);
        // These had not ended when the report was taken.
        assert_eq!(syncs.end(later, true, 'l'), []);
        assert_eq!(syncs.end(other, true, 'o'), [('o', true), ('l', true)]);
    }

    #[test]
    fn a_sync_waits_for_those_that_ran_at_its_end_and_no_later_ones() {
        let mut syncs = Syncs::default();
        let (first, second) = (syncs.begin(), syncs.begin());
        assert_eq!(syncs.end(first, true, '1'), []);
        let third = syncs.begin();
        assert_eq!(syncs.end(second, true, '2'), [('1', true)]);
        assert_eq!(syncs.end(third, true, '3'), [('3', true), ('2', true)]);
    }
}
