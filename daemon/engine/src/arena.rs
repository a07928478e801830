//! Values by numbers that are never used twice: as fast as an index, and a late number meets no later value.

/// Bits of a number that say where its value is; the others count.
const PLACE_BITS: u32 = 24;

/// A set of values, each with a number of its own. Numbers rise in the order of insertion.
#[derive(Debug)]
pub struct Arena<T> {
    slots: Vec<Option<(u64, T)>>,
    free: Vec<usize>,
    count: u64,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), count: 0 }
    }
}

impl<T> Arena<T> {
    /// Adds a value; returns its number.
    ///
    /// # Panics
    /// If there are 2^24 values: callers bound what they begin.
    pub fn insert(&mut self, value: T) -> u64 {
        let place = self.free.pop().unwrap_or(self.slots.len());
        let low = u64::try_from(place).unwrap_or(u64::MAX);
        assert!(low < 1 << PLACE_BITS, "too many values at once");
        let number = self.count << PLACE_BITS | low;
        self.count += 1;
        let filled = Some((number, value));
        match self.slots.get_mut(place) {
            Some(slot) => *slot = filled,
            None => self.slots.push(filled),
        }
        number
    }

    /// The value of a number.
    pub fn find(&self, number: u64) -> Option<&T> {
        let slot = self.slots.get(place(number))?;
        slot.as_ref().filter(|(known, _)| *known == number).map(|(_, value)| value)
    }

    /// The value of a number, to change it.
    pub fn find_mut(&mut self, number: u64) -> Option<&mut T> {
        let slot = self.slots.get_mut(place(number))?;
        slot.as_mut().filter(|(known, _)| *known == number).map(|(_, value)| value)
    }

    /// Takes a value out; its number means nothing from then on.
    pub fn remove(&mut self, number: u64) -> Option<T> {
        let slot = self.slots.get_mut(place(number))?;
        let (_, value) = slot.take_if(|(known, _)| *known == number)?;
        self.free.push(place(number));
        Some(value)
    }

    /// The values with their numbers, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.slots.iter().flatten().map(|(number, value)| (*number, value))
    }

    #[cfg(test)]
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, value)| value)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.values().count()
    }
}

fn place(number: u64) -> usize {
    usize::try_from(number & ((1 << PLACE_BITS) - 1)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_arena_is_a_map_with_rising_keys(actions in prop::collection::vec(any::<Option<prop::sample::Index>>(), 1..200)) {
            let mut arena = Arena::default();
            let mut model = BTreeMap::new();
            let mut gone = Vec::new();
            for (value, action) in (0_u32..).zip(actions) {
                match action {
                    Some(pick) if !model.is_empty() => {
                        let number = *model.keys().nth(pick.index(model.len())).unwrap();
                        prop_assert_eq!(arena.remove(number), model.remove(&number));
                        gone.push(number);
                    }
                    _ => {
                        let number = arena.insert(value);
                        prop_assert!(model.keys().chain(&gone).all(|known| *known < number));
                        model.insert(number, value);
                    }
                }
                prop_assert_eq!(arena.len(), model.len());
                prop_assert!(model.iter().all(|(number, value)| arena.find(*number) == Some(value)));
                prop_assert!(gone.iter().all(|number| arena.find(*number).is_none() && arena.find_mut(*number).is_none()));
            }
        }
    }
}
