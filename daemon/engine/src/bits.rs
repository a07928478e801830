//! A bitmap of fixed size; bit `n` is bit `n % 64` of word `n / 64`.

use std::ops::Range;

/// `WORDS` times 64 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bits<const WORDS: usize>([u64; WORDS]);

impl<const WORDS: usize> Bits<WORDS> {
    /// No bit set.
    pub(crate) const EMPTY: Self = Self([0; WORDS]);
    /// Every bit set.
    pub(crate) const FULL: Self = Self([u64::MAX; WORDS]);

    /// The bitmap with these words, from the lowest bits on; missing words are 0, words too many are ignored.
    pub(crate) fn from_words(words: impl IntoIterator<Item = u64>) -> Self {
        let mut bits = Self::EMPTY;
        for (to, from) in bits.0.iter_mut().zip(words) {
            *to = from;
        }
        bits
    }

    /// The words, from the lowest bits on.
    pub(crate) fn words(&self) -> impl Iterator<Item = u64> {
        self.0.iter().copied()
    }

    /// Sets a range; returns how many bits of it were clear.
    pub(crate) fn set(&mut self, range: Range<u64>) -> u64 {
        self.change(range, |word, mask| word | mask)
    }

    /// Clears a range; returns how many bits of it were set.
    pub(crate) fn clear(&mut self, range: Range<u64>) -> u64 {
        self.change(range, |word, mask| word & !mask)
    }

    /// True if the bit is set.
    pub(crate) fn contains(&self, bit: u64) -> bool {
        self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// True if every bit of the range is set.
    pub(crate) fn contains_all(&self, range: Range<u64>) -> bool {
        masks(range).all(|(word, mask)| self.word(word) & mask == mask)
    }

    /// The number of set bits.
    pub(crate) fn count(&self) -> u64 {
        self.words().map(|word| u64::from(word.count_ones())).sum()
    }

    /// True if no bit is set.
    pub(crate) fn is_empty(&self) -> bool {
        self.words().all(|word| word == 0)
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: u64) -> Option<u64> {
        self.find(from, |word| word)
    }

    /// The first clear bit at or after `from`.
    pub(crate) fn next_clear(&self, from: u64) -> Option<u64> {
        self.find(from, |word| !word)
    }

    /// Sets every bit that is set in `other`.
    pub(crate) fn union(&mut self, other: &Self) {
        for (to, from) in self.0.iter_mut().zip(other.0) {
            *to |= from;
        }
    }

    /// Clears every bit that is set in `other`.
    pub(crate) fn subtract(&mut self, other: &Self) {
        for (to, from) in self.0.iter_mut().zip(other.0) {
            *to &= !from;
        }
    }

    /// Clears every bit that is clear in `other`.
    pub(crate) fn intersect(&mut self, other: &Self) {
        for (to, from) in self.0.iter_mut().zip(other.0) {
            *to &= from;
        }
    }

    fn word(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.0.get(index).copied().unwrap_or(0)
    }

    fn change(&mut self, range: Range<u64>, operation: impl Fn(u64, u64) -> u64) -> u64 {
        let mut changed = 0;
        for (index, mask) in masks(range) {
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            let Some(word) = self.0.get_mut(index) else {
                break;
            };
            let after = operation(*word, mask);
            changed += u64::from((*word ^ after).count_ones());
            *word = after;
        }
        changed
    }

    fn find(&self, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let skip = usize::try_from(from / 64).unwrap_or(usize::MAX);
        let mut mask = u64::MAX << (from % 64);
        for (base, word) in (0_u64..).step_by(64).zip(self.words()).skip(skip) {
            let candidates = view(word) & mask;
            if candidates != 0 {
                return Some(base + u64::from(candidates.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }
}

/// The words that a range of bits touches, each with the mask of its touched bits.
fn masks(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let words = if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) };
    words.map(move |word| {
        let low = range.start.saturating_sub(word * 64);
        let high = (range.end - word * 64).min(64);
        (word, (u64::MAX >> (64 - (high - low))) << low)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_behave_like_a_set(ops in prop::collection::vec((any::<bool>(), 0_u64..=256, 0_u64..=256), 1..20)) {
            let mut bits = Bits::<4>::EMPTY;
            let mut model = BTreeSet::new();
            for (set, a, b) in ops {
                let range = a.min(b)..a.max(b);
                let changed = if set {
                    let changed = bits.set(range.clone());
                    range.clone().filter(|bit| model.insert(*bit)).count() as u64 == changed
                } else {
                    let changed = bits.clear(range.clone());
                    range.clone().filter(|bit| model.remove(bit)).count() as u64 == changed
                };
                prop_assert!(changed);
                prop_assert_eq!(bits.count(), model.len() as u64);
                prop_assert_eq!(bits.next_set(a), model.range(a..).next().copied());
                prop_assert_eq!(bits.next_clear(a), (a..256).find(|bit| !model.contains(bit)));
                prop_assert_eq!(bits.contains_all(range.clone()), range.clone().all(|bit| model.contains(&bit)));
                prop_assert_eq!(bits.contains(a), model.contains(&a));
                prop_assert_eq!(bits.is_empty(), model.is_empty());
            }
        }
    }
}
