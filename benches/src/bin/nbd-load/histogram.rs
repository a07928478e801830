//! Durations in logarithmic buckets: any quantile to within 1/128 of its value, in constant memory.

use std::time::Duration;

const BITS: u32 = 7;
/// Buckets for each power of two; shorter durations (in nanoseconds) have a bucket each.
const BUCKETS_PER_OCTAVE: u64 = 1 << BITS;
const OCTAVES: usize = 64 - 7 + 1;

/// The distribution of durations.
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: vec![0; OCTAVES << BITS], count: 0, sum_ns: 0, max_ns: 0 }
    }

    pub(crate) fn record(&mut self, duration: Duration) {
        let value = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get_mut(bucket_of(value)) {
            *bucket += 1;
        }
        self.count += 1;
        self.sum_ns += u128::from(value);
        self.max_ns = self.max_ns.max(value);
    }

    /// The longest of the shortest `permille` of a thousand; zero if there are none.
    pub(crate) fn quantile(&self, permille: u64) -> Duration {
        let rank = self.count.saturating_mul(permille).div_ceil(1000).max(1);
        let mut below = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            below += bucket;
            if below >= rank {
                return Duration::from_nanos(upper_bound(index).min(self.max_ns));
            }
        }
        self.max()
    }

    pub(crate) const fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns)
    }

    /// The mean; zero if there are none.
    pub(crate) fn mean(&self) -> Duration {
        let mean = self.sum_ns.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }
}

fn bucket_of(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(BITS + 1);
    let index = u64::from(shift) * BUCKETS_PER_OCTAVE + (value >> shift);
    usize::try_from(index).unwrap_or(usize::MAX)
}

/// The longest duration of a bucket.
fn upper_bound(index: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    if index < BUCKETS_PER_OCTAVE {
        return index;
    }
    let shift = index / BUCKETS_PER_OCTAVE - 1;
    let first = u128::from(index - shift * BUCKETS_PER_OCTAVE) << shift;
    u64::try_from(first + (1 << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Histogram, OCTAVES, bucket_of, upper_bound};
    use crate::offsets::noise;

    #[test]
    fn each_value_lies_in_a_narrow_bucket() {
        let powers = (0..64).map(|shift| 1_u64 << shift);
        for value in powers.flat_map(|power| [power - 1, power, power + power / 3]).chain([u64::MAX]) {
            let bucket = bucket_of(value);
            assert!(bucket < OCTAVES * 128, "{value}");
            let bound = upper_bound(bucket);
            assert!(bound >= value && bound - value <= value / 128, "{value} in {bucket} to {bound}");
            assert!(bucket == 0 || upper_bound(bucket - 1) < value, "{value}");
        }
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_list() {
        let mut values: Vec<u64> = noise(8 * 5000, 3)
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()) >> 40)
            .collect();
        let mut histogram = Histogram::new();
        values.iter().for_each(|value| histogram.record(Duration::from_nanos(*value)));
        values.sort_unstable();
        for permille in [1, 500, 990, 999, 1000] {
            let exact = values[5 * permille - 1];
            let found = histogram.quantile(u64::try_from(permille).unwrap()).as_nanos();
            let found = u64::try_from(found).unwrap();
            assert!(found >= exact && found - exact <= exact / 128, "{permille}: {found} for {exact}");
        }
        assert_eq!(histogram.max(), Duration::from_nanos(*values.last().unwrap()));
    }

    #[test]
    fn nothing_recorded_is_zero() {
        let histogram = Histogram::new();
        assert_eq!((histogram.quantile(990), histogram.mean()), (Duration::ZERO, Duration::ZERO));
    }
}
