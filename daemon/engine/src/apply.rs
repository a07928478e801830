//! A cut of the write journal as disjoint operations on the target's home files.
//!
//! Guarantees: the operations touch no byte twice, so all of them can run at once, in any order; after them each
//! byte has the content that the records would give it one after the other. Records that a void of the same cut
//! names do nothing.

use std::collections::{BTreeMap, BTreeSet};

use block::{ByteRange, Sequence, VolumeIndex};
use journal::{Record, RecordKind};

use crate::runs::Runs;

/// One operation on one volume's home. Its range is as aligned as the records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplyStep {
    /// The volume in its group.
    pub volume: VolumeIndex,
    /// Where at home.
    pub range: ByteRange,
    /// What goes there.
    pub source: Source,
}

/// Where an operation's content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The bytes of a record's payload from `offset` on, as long as the range.
    Payload {
        /// The record's place in the slice that was planned.
        record: usize,
        /// The first byte in its payload.
        offset: usize,
    },
    /// Written zeros.
    Zeros,
    /// ZERO_RANGE, or written zeros where the device has none.
    ZeroRange,
}

/// The operations that leave what these records leave, ascending by volume and offset.
///
/// Resizes, bad blocks and markers change no content and are the caller's business. The records must have passed
/// [`Record::check`], which decoding does.
pub fn plan(records: &[Record]) -> Vec<ApplyStep> {
    let voided: BTreeSet<Sequence> = records
        .iter()
        .filter(|record| record.kind == RecordKind::Void)
        .map(|record| record.sequence)
        .collect();
    let mut covered: BTreeMap<VolumeIndex, Runs> = BTreeMap::new();
    let mut steps = Vec::new();
    // From the last record on: each fills only what no later one does.
    for (index, record) in records.iter().enumerate().rev() {
        let source: fn(usize, usize) -> Source = match record.kind {
            RecordKind::Write | RecordKind::Copy => |record, offset| Source::Payload { record, offset },
            RecordKind::Zero => |_, _| Source::Zeros,
            // A copied zero block says nothing of how the primary holds it; unwritten extents would cost later.
            RecordKind::CopyZero => |_, _| Source::Zeros,
            RecordKind::Trim => |_, _| Source::ZeroRange,
            RecordKind::Resize | RecordKind::Void | RecordKind::Bad | RecordKind::Marker => continue,
        };
        if voided.contains(&record.sequence) {
            continue;
        }
        let covered = covered.entry(record.volume).or_default();
        let bytes = record.range.offset()..record.range.end();
        for gap in covered.gaps(bytes.clone()) {
            let Some(range) = ByteRange::between(gap.start, gap.end) else {
                continue;
            };
            let offset = usize::try_from(gap.start - bytes.start).unwrap_or(usize::MAX);
            steps.push(ApplyStep { volume: record.volume, range, source: source(index, offset) });
        }
        covered.insert(bytes);
    }
    steps.sort_unstable_by_key(|step| (step.volume, step.range));
    steps
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    const UNIT: u64 = 4096;
    const UNITS: u64 = 24;

    /// Two volumes, one byte a unit.
    type Image = [[u8; 24]; 2];

    fn units(range: ByteRange) -> std::ops::Range<usize> {
        usize::try_from(range.offset() / UNIT).unwrap()..usize::try_from(range.end() / UNIT).unwrap()
    }

    fn execute_in_order(records: &[Record], image: &mut Image) {
        let voided = |record: &Record| {
            records.iter().any(|other| other.kind == RecordKind::Void && other.sequence == record.sequence)
        };
        for record in records.iter().filter(|record| !voided(record)) {
            let home = &mut image[usize::from(record.volume.0)];
            match record.kind {
                RecordKind::Write | RecordKind::Copy => {
                    for (to, from) in home[units(record.range)].iter_mut().zip(record.payload.chunks(4096)) {
                        *to = from[0];
                    }
                }
                RecordKind::Zero | RecordKind::Trim | RecordKind::CopyZero => {
                    home[units(record.range)].fill(0)
                }
                RecordKind::Resize | RecordKind::Void | RecordKind::Bad | RecordKind::Marker => {}
            }
        }
    }

    fn execute_plan(records: &[Record], steps: &[ApplyStep], image: &mut Image) {
        for step in steps {
            let home = &mut image[usize::from(step.volume.0)][units(step.range)];
            match step.source {
                Source::Payload { record, offset } => {
                    let length = usize::try_from(step.range.length()).unwrap();
                    let payload = &records[record].payload[offset..offset + length];
                    for (to, from) in home.iter_mut().zip(payload.chunks(4096)) {
                        *to = from[0];
                    }
                }
                Source::Zeros | Source::ZeroRange => home.fill(0),
            }
        }
    }

    fn record(sequence: u64, volume: u16, kind: RecordKind, offset: u64, count: u64) -> Record {
        let whole = ByteRange::new(offset * UNIT, count.min(UNITS - offset) * UNIT).unwrap();
        let mut payload = Vec::new();
        if kind.has_payload() {
            for unit in 0..whole.length() / UNIT {
                payload.extend(vec![u8::try_from((sequence * 24 + unit) % 255 + 1).unwrap(); 4096]);
            }
        }
        let range = match kind {
            RecordKind::Resize => ByteRange::new(0, whole.end()).unwrap(),
            RecordKind::Void | RecordKind::Marker => ByteRange::default(),
            RecordKind::Write
            | RecordKind::Copy
            | RecordKind::Zero
            | RecordKind::Trim
            | RecordKind::CopyZero
            | RecordKind::Bad => whole,
        };
        let record = Record {
            sequence: Sequence(sequence),
            volume: VolumeIndex(volume),
            kind,
            range,
            payload: Bytes::from(payload),
        };
        assert_eq!(record.check(), Ok(()));
        record
    }

    fn kinds() -> impl Strategy<Value = RecordKind> {
        use RecordKind::{Bad, Copy, CopyZero, Marker, Resize, Trim, Void, Write, Zero};
        prop_oneof![
            4 => prop::sample::select(vec![Write, Write, Copy, Zero, Trim, CopyZero]),
            1 => prop::sample::select(vec![Void, Void, Bad, Resize, Marker]),
        ]
    }

    proptest! {
        #[test]
        fn a_plan_leaves_what_the_records_leave(
            entries in prop::collection::vec((kinds(), 0_u16..2, 0..UNITS, 1_u64..10, 0_u64..20), 0..30),
        ) {
            let records: Vec<Record> = (1_u64..)
                .zip(entries)
                .map(|(sequence, (kind, volume, offset, count, back))| {
                    // A void names an earlier record.
                    let sequence = if kind == RecordKind::Void { sequence.saturating_sub(back) } else { sequence };
                    record(sequence, volume, kind, offset, count)
                })
                .collect();
            let steps = plan(&records);
            for pair in steps.windows(2) {
                prop_assert!(pair[0].volume != pair[1].volume || pair[0].range.end() <= pair[1].range.offset());
            }
            prop_assert!(steps.iter().all(|step| step.range.is_unit_aligned() && !step.range.is_empty()));
            let (mut serial, mut planned) = ([[0xEE; 24]; 2], [[0xEE; 24]; 2]);
            execute_in_order(&records, &mut serial);
            execute_plan(&records, &steps, &mut planned);
            prop_assert_eq!(serial, planned);
        }
    }
}
