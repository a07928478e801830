//! The primary's RAM ring: the ordered records that the target does not hold durably yet.
//!
//! Bounded by payload bytes and by records. A record that does not fit is refused, and the caller folds it, and
//! every later one until the ring has caught up, into its dirty map; so sequences may have gaps here.

use std::collections::VecDeque;
use std::mem;

use block::Sequence;

use crate::{CUT_PAYLOAD_BYTES_MAX, RECORDS_MAX, Record};

/// The bounds of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingBudget {
    /// The most payload bytes held.
    pub bytes_max: u64,
    /// The most records held.
    pub records_max: usize,
}

/// The record does not fit into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring is full")]
pub struct RingFull;

/// Records in the order of their sequences.
#[derive(Clone, Debug)]
pub struct Ring {
    budget: RingBudget,
    records: VecDeque<Record>,
    bytes: u64,
}

impl Ring {
    /// An empty ring.
    pub const fn new(budget: RingBudget) -> Self {
        Self { budget, records: VecDeque::new(), bytes: 0 }
    }

    /// Appends a record.
    ///
    /// # Errors
    /// [`RingFull`] if a bound would be passed; the ring is unchanged.
    ///
    /// # Panics
    /// If its sequence is not above the last one's, or the record breaks the format ([`Record::check`]).
    pub fn push(&mut self, record: Record) -> Result<(), RingFull> {
        assert_eq!(record.check(), Ok(()), "the record suits the format");
        let last = self.records.back().map(|last| last.sequence);
        assert!(last < Some(record.sequence), "sequences rise");
        let bytes = self.bytes + record.payload_bytes();
        if bytes > self.budget.bytes_max || self.records.len() >= self.budget.records_max {
            return Err(RingFull);
        }
        self.bytes = bytes;
        self.records.push_back(record);
        Ok(())
    }

    /// Replaces the record at `sequence` by one that makes the target drop it, and gives the record back: its
    /// blocks are the caller's to track. `None` if the ring does not hold it.
    pub fn void(&mut self, sequence: Sequence) -> Option<Record> {
        let index = self.index_after(sequence).checked_sub(1)?;
        let record = self.records.get_mut(index).filter(|record| record.sequence == sequence)?;
        let void = Record::void(sequence, record.volume);
        let replaced = mem::replace(record, void);
        self.subtract(replaced.payload_bytes());
        Some(replaced)
    }

    /// The end of a cut that begins after `after` and reaches to `limit` at most: `limit` if all records up to
    /// there fit into `bytes_max` of payload and [`RECORDS_MAX`] records, else the last record that does. One
    /// record always fits.
    pub fn last_through(&self, after: Sequence, limit: Sequence, bytes_max: u64) -> Sequence {
        let bytes_max = bytes_max.min(CUT_PAYLOAD_BYTES_MAX);
        let mut bytes = 0;
        let mut last = None;
        for (index, record) in self.records(after, limit).enumerate() {
            bytes += record.payload_bytes();
            if let Some(last) = last
                && (bytes > bytes_max || index >= RECORDS_MAX)
            {
                return last;
            }
            last = Some(record.sequence);
        }
        limit
    }

    /// The records after `after` up to and with `through`.
    pub fn records(&self, after: Sequence, through: Sequence) -> impl Iterator<Item = &Record> {
        let end = self.index_after(through);
        self.records.range(self.index_after(after).min(end)..end)
    }

    /// Drops all records up to and with `through`.
    pub fn release(&mut self, through: Sequence) {
        while let Some(record) = self.records.pop_front_if(|record| record.sequence <= through) {
            self.subtract(record.payload_bytes());
        }
    }

    /// Empties the ring and gives its records back, in order.
    pub fn clear(&mut self) -> VecDeque<Record> {
        self.bytes = 0;
        mem::take(&mut self.records)
    }

    /// The bounds.
    pub const fn budget(&self) -> RingBudget {
        self.budget
    }

    /// Payload bytes held.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Records held.
    pub fn record_count(&self) -> usize {
        self.records.len()
    }

    /// True if no record is held.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The oldest record's sequence.
    pub fn first_sequence(&self) -> Option<Sequence> {
        self.records.front().map(|record| record.sequence)
    }

    fn index_after(&self, sequence: Sequence) -> usize {
        self.records.partition_point(|record| record.sequence <= sequence)
    }

    fn subtract(&mut self, bytes: u64) {
        assert!(bytes <= self.bytes, "the ring counts every payload once");
        self.bytes -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use block::{ByteRange, VolumeIndex};
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::RecordKind;

    fn write(sequence: u64, pages: usize) -> Record {
        Record {
            sequence: Sequence(sequence),
            volume: VolumeIndex(3),
            kind: if pages == 0 { RecordKind::Trim } else { RecordKind::Write },
            range: ByteRange::new(8192, u64::try_from(pages.max(1) * 4096).unwrap()).unwrap(),
            payload: Bytes::from(vec![7; pages * 4096]),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push { gap: u64, pages: usize },
        Void(u64),
        Release(u64),
        Clear,
        Cut { after: u64, limit: u64, pages: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (1..4_u64, 0..4_usize).prop_map(|(gap, pages)| Step::Push { gap, pages }),
            2 => (0..60_u64).prop_map(Step::Void),
            2 => (0..60_u64).prop_map(Step::Release),
            1 => Just(Step::Clear),
            4 => (0..60_u64, 0..60_u64, 0..8_u64)
                .prop_map(|(after, limit, pages)| Step::Cut { after, limit, pages }),
        ];
        prop::collection::vec(step, 1..80)
    }

    fn check_cut(ring: &Ring, model: &[Record], after: u64, limit: u64, bytes_max: u64) {
        let chosen: Vec<_> =
            model.iter().filter(|record| (after + 1..=limit).contains(&record.sequence.0)).collect();
        let mut bytes = 0;
        let fitting = chosen
            .iter()
            .take_while(|record| {
                bytes += record.payload.len();
                u64::try_from(bytes).unwrap() <= bytes_max
            })
            .count();
        let count = fitting.max(1).min(chosen.len());
        let expected = if count == chosen.len() { Sequence(limit) } else { chosen[count - 1].sequence };
        let through = ring.last_through(Sequence(after), Sequence(limit), bytes_max);
        assert_eq!(through, expected);
        let records: Vec<_> = ring.records(Sequence(after), through).collect();
        assert_eq!(records, chosen[..count]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn ring_is_a_bounded_sorted_list(steps in steps()) {
            let budget = RingBudget { bytes_max: 12 * 4096, records_max: 8 };
            let mut ring = Ring::new(budget);
            let mut model: Vec<Record> = Vec::new();
            let mut sequence = 0;
            for step in steps {
                match step {
                    Step::Push { gap, pages } => {
                        sequence += gap;
                        let record = write(sequence, pages);
                        let held: usize = model.iter().map(|record| record.payload.len()).sum();
                        let fits = model.len() < 8 && held + pages * 4096 <= 12 * 4096;
                        prop_assert_eq!(ring.push(record.clone()).is_ok(), fits);
                        if fits { model.push(record); }
                    }
                    Step::Void(at) => {
                        let found = model.iter_mut().find(|record| record.sequence.0 == at);
                        let replaced = found.map(|record| mem::replace(record, Record::void(Sequence(at), record.volume)));
                        prop_assert_eq!(ring.void(Sequence(at)), replaced);
                    }
                    Step::Release(through) => {
                        ring.release(Sequence(through));
                        model.retain(|record| record.sequence.0 > through);
                    }
                    Step::Clear => prop_assert_eq!(Vec::from(ring.clear()), mem::take(&mut model)),
                    Step::Cut { after, limit, pages } => check_cut(&ring, &model, after, limit, pages * 4096),
                }
                let held: usize = model.iter().map(|record| record.payload.len()).sum();
                prop_assert_eq!(ring.bytes(), u64::try_from(held).unwrap());
                prop_assert_eq!(ring.record_count(), model.len());
                prop_assert_eq!(ring.first_sequence(), model.first().map(|record| record.sequence));
            }
        }
    }

    #[test]
    fn a_cut_has_at_most_the_formats_number_of_records() {
        let mut ring = Ring::new(RingBudget { bytes_max: 0, records_max: RECORDS_MAX + 2 });
        for sequence in 1..=5000 {
            let fits = sequence <= u64::try_from(RECORDS_MAX + 2).unwrap();
            assert_eq!(ring.push(write(sequence, 0)).is_ok(), fits);
        }
        assert_eq!(ring.last_through(Sequence(0), Sequence(5000), 0), Sequence(4096));
        assert_eq!(ring.last_through(Sequence(4096), Sequence(5000), 0), Sequence(5000));
    }
}
