//! What a cut changes at home, without its payloads: where each content stands in the cut.
//!
//! It guarantees: the changes of a cut, taken in order, leave what its records leave. Records that a void of the same
//! cut names are not among them, nor those that change no content.

use std::collections::BTreeSet;

use block::{ByteCount, ByteRange, Sequence, VolumeIndex};

use crate::cut::head_length;
use crate::{Record, RecordKind};

/// One change of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which volume of the group.
    pub volume: VolumeIndex,
    /// Where at home.
    pub range: ByteRange,
    /// What goes there.
    pub content: ChangeContent,
}

/// Where the content of a change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeContent {
    /// In the cut, from this byte of it on; a multiple of 4096.
    Payload {
        /// Bytes from the cut's beginning.
        offset: u64,
    },
    /// Nowhere: it is zeros.
    Zeros,
}

fn voided(records: &[Record]) -> BTreeSet<Sequence> {
    records.iter().filter(|record| record.kind == RecordKind::Void).map(|record| record.sequence).collect()
}

/// The records of one cut but for those that it voids. Cuts are merged only after this: in another incarnation the same
/// sequence is another write.
pub fn without_voided(records: &[Record]) -> impl Iterator<Item = &Record> {
    let voided = voided(records);
    records.iter().filter(move |record| !voided.contains(&record.sequence))
}

/// The changes of a cut with these records, in their order.
pub fn changes(records: &[Record]) -> Vec<Change> {
    let voided = voided(records);
    let mut offset = u64::try_from(head_length(records.len())).unwrap_or(u64::MAX);
    let mut changes = Vec::with_capacity(records.len());
    for record in records {
        let payload = offset;
        offset = offset.saturating_add(record.payload_bytes());
        let content = match record.kind {
            RecordKind::Write | RecordKind::Copy => ChangeContent::Payload { offset: payload },
            RecordKind::Zero | RecordKind::Trim | RecordKind::CopyZero => ChangeContent::Zeros,
            RecordKind::Resize | RecordKind::Void | RecordKind::Bad | RecordKind::Marker => continue,
        };
        if !voided.contains(&record.sequence) {
            changes.push(Change { volume: record.volume, range: record.range, content });
        }
    }
    changes
}

/// The sizes that a cut records, in order.
pub fn sizes(records: &[Record]) -> Vec<(VolumeIndex, ByteCount)> {
    let resizes = without_voided(records).filter(|record| record.kind == RecordKind::Resize);
    resizes.map(|record| (record.volume, ByteCount(record.range.end()))).collect()
}

#[cfg(test)]
mod tests {
    use block::{MirrorId, Tip, WallTime};
    use bytes::Bytes;

    use super::*;
    use crate::{CutMeta, Lineage, encode};

    fn record(sequence: u64, kind: RecordKind, first: u64, pages: u64) -> Record {
        let range = ByteRange::new(first * 4096, pages * 4096).unwrap();
        let fill = u8::try_from(sequence).unwrap();
        let length = if kind.has_payload() { usize::try_from(range.length()).unwrap() } else { 0 };
        let payload = Bytes::from(vec![fill; length]);
        Record { sequence: Sequence(sequence), volume: VolumeIndex(0), kind, range, payload }
    }

    #[test]
    fn a_void_concerns_its_own_cut_only() {
        let older = [record(7, RecordKind::Zero, 3, 1)];
        let newer = [record(7, RecordKind::Write, 9, 1), Record::void(Sequence(7), VolumeIndex(0))];
        let merged: Vec<&Record> = without_voided(&older).chain(without_voided(&newer)).collect();
        assert_eq!(merged, [&older[0]]);
    }

    #[test]
    fn a_size_is_no_change_and_is_told_beside_them() {
        let resize = |sequence, volume| Record {
            sequence: Sequence(sequence),
            volume: VolumeIndex(volume),
            kind: RecordKind::Resize,
            range: ByteRange::new(0, sequence * 4096).unwrap(),
            payload: Bytes::new(),
        };
        let records = [
            resize(3, 1),
            record(4, RecordKind::Zero, 0, 1),
            resize(5, 0),
            resize(6, 1),
            Record::void(Sequence(6), VolumeIndex(1)),
        ];
        assert_eq!(changes(&records).len(), 1);
        let told = [(VolumeIndex(1), ByteCount(3 * 4096)), (VolumeIndex(0), ByteCount(5 * 4096))];
        assert_eq!(sizes(&records), told);
    }

    #[test]
    fn a_change_says_where_in_the_encoded_cut_its_payload_stands() {
        let mut records = vec![
            record(1, RecordKind::Write, 0, 2),
            record(2, RecordKind::Zero, 1, 1),
            record(3, RecordKind::Write, 9, 1),
            Record::void(Sequence(3), VolumeIndex(0)),
        ];
        // Enough of them that the head takes several pages.
        records.extend((4..200).map(|sequence| record(sequence, RecordKind::Copy, 100 + sequence, 1)));
        let meta = CutMeta {
            mirror: MirrorId::from_bytes([1; 16]),
            lineage: Lineage::default(),
            first: Sequence(1),
            last: Sequence(199),
            previous: Tip::default(),
            commit: true,
            initial: false,
            pass: 0,
            time: WallTime(0),
            echo: WallTime(0),
        };
        let cut = encode(&meta, &records);
        let bytes = [&[cut.head][..], &cut.payloads].concat().concat();
        let changes = changes(&records);
        assert_eq!(changes.len(), records.len() - 2);
        assert_eq!(changes[1].content, ChangeContent::Zeros);
        for (change, record) in changes.iter().filter_map(|change| {
            let record = records.iter().find(|record| record.range == change.range)?;
            Some((change, record))
        }) {
            if let ChangeContent::Payload { offset } = change.content {
                let start = usize::try_from(offset).unwrap();
                assert!(bytes[start..start + record.payload.len()] == record.payload[..], "{change:?}");
            }
        }
    }
}
