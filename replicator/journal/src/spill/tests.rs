use block::{ByteRange, Epoch, Incarnation, SiteId, VolumeIndex};
use proptest::prelude::*;

use super::*;
use crate::RecordKind;

const MIRROR: MirrorId = MirrorId::from_bytes([7; 16]);

fn lineage() -> Lineage {
    Lineage { epoch: Epoch(2), origin: SiteId::from_bytes([1; 16]), incarnation: Incarnation(5) }
}

fn records() -> Vec<Record> {
    let range = |page: u64| ByteRange::new(page * 4096, 4096).unwrap();
    vec![
        Record {
            sequence: Sequence(11),
            volume: VolumeIndex(0),
            kind: RecordKind::Write,
            range: range(3),
            payload: Bytes::from(vec![0xa5; 4096]),
        },
        Record {
            sequence: Sequence(12),
            volume: VolumeIndex(1),
            kind: RecordKind::Trim,
            range: range(9),
            payload: Bytes::new(),
        },
        Record::void(Sequence(13), VolumeIndex(0)),
    ]
}

fn sealed() -> (SpillSegment, Bytes) {
    let ends = (Sequence(11), Sequence(14));
    let (segment, cut) = SpillSegment::seal(MIRROR, lineage(), ends, WallTime(99), &records());
    let chunks: Vec<Bytes> = std::iter::once(cut.head).chain(cut.payloads).collect();
    (segment.at(8192), Bytes::from(chunks.concat()))
}

fn index() -> SpillIndex {
    let (segment, _) = sealed();
    let tip = |sequence: u64| Tip {
        position: lineage().at(Sequence(sequence)),
        chain: ChainHash([u8::try_from(sequence).unwrap(); 32]),
    };
    let second = SpillSegment { offset: 0, length: 4096, first: Sequence(15), last: Sequence(20), ..segment };
    SpillIndex {
        lineage: lineage(),
        capacity: 1 << 20,
        last: Sequence(30),
        folded_from: Some(Sequence(21)),
        commit_floor: Sequence(30),
        committed: tip(10),
        sent: vec![tip(12), tip(12), tip(14)],
        segments: vec![segment, second],
    }
}

#[test]
fn a_segment_is_read_as_written() {
    let (segment, bytes) = sealed();
    assert_eq!(segment.length, u64::try_from(bytes.len()).unwrap());
    assert_eq!((segment.payload_bytes, segment.record_count), (4096, 3));
    assert_eq!(segment.open(MIRROR, lineage(), &bytes), Ok(records()));
}

#[test]
fn every_truncation_of_a_segment_is_noticed() {
    let (segment, bytes) = sealed();
    for length in 0..bytes.len() {
        assert!(segment.open(MIRROR, lineage(), &bytes.slice(..length)).is_err(), "length {length}");
        let mut torn = bytes[..length].to_vec();
        torn.resize(bytes.len(), 0);
        let whole = torn == bytes;
        assert_eq!(segment.open(MIRROR, lineage(), &torn.into()).is_ok(), whole, "torn at {length}");
    }
}

#[test]
fn every_flipped_bit_of_a_segment_is_noticed() {
    let (segment, bytes) = sealed();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(segment.open(MIRROR, lineage(), &damaged.into()).is_err(), "bit {bit}");
    }
}

#[test]
fn a_whole_segment_in_the_place_of_another_is_refused() {
    let (segment, _) = sealed();
    let mut others = records();
    others[0].payload = Bytes::from(vec![0x5a; 4096]);
    let ends = (Sequence(11), Sequence(14));
    for (mirror, of, time, content) in [
        (MirrorId::from_bytes([8; 16]), lineage(), WallTime(99), records()),
        (MIRROR, Lineage { incarnation: Incarnation(4), ..lineage() }, WallTime(99), records()),
        (MIRROR, lineage(), WallTime(98), records()),
        (MIRROR, lineage(), WallTime(99), others),
    ] {
        let (_, cut) = SpillSegment::seal(mirror, of, ends, time, &content);
        let chunks: Vec<Bytes> = std::iter::once(cut.head).chain(cut.payloads).collect();
        let read = segment.open(MIRROR, lineage(), &Bytes::from(chunks.concat()));
        assert_eq!(read, Err(SpillFault::Other));
    }
}

#[test]
fn an_index_is_read_as_written_and_every_damage_is_noticed() {
    let bytes = index().encode();
    assert_eq!(SpillIndex::decode(&bytes), Ok(index()));
    let empty = SpillIndex {
        folded_from: None,
        last: Sequence(10),
        commit_floor: Sequence(4),
        sent: Vec::new(),
        segments: Vec::new(),
        ..index()
    };
    assert_eq!(SpillIndex::decode(&empty.encode()), Ok(empty));
    for length in 0..bytes.len() {
        assert!(SpillIndex::decode(&bytes[..length]).is_err(), "length {length}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(SpillIndex::decode(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn an_index_with_a_gap_or_an_overlap_is_refused() {
    let good = index();
    assert_eq!(good.check(), Ok(()));
    let mut gap = good.clone();
    gap.segments[1].first = Sequence(16);
    let mut overlap = good.clone();
    overlap.segments[1].offset = 8192;
    let mut outside = good.clone();
    outside.segments[1].offset = 1 << 20;
    let short = SpillIndex { folded_from: None, ..good.clone() };
    let unsent = SpillIndex { sent: vec![good.committed, Tip::default()], ..good.clone() };
    for wrong in [gap, overlap, outside, short, unsent] {
        assert_eq!(wrong.check(), Err(SpillIndexError::Fields), "{wrong:?}");
    }
}

/// Changes only together with the magic.
#[test]
fn the_encoding_is_pinned() {
    let hash = blake3::hash(&index().encode()).to_hex();
    assert_eq!(hash.as_str(), "a201713137257b22b9808ef0302a7373899d1f94ac8f4a10ae945cd25d6b717d");
}

#[derive(Clone, Debug)]
enum Step {
    Take(u64),
    Free(usize),
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1..7_u64).prop_map(Step::Take),
        5 => (0..8_usize).prop_map(Step::Free),
        1 => Just(Step::Restore),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    /// Against the naive model of a list of extents: nothing overlaps, nothing is lost, an empty file takes all.
    #[test]
    fn space_is_never_given_twice_and_comes_back(steps in steps()) {
        let capacity = 16 * PAGE_BYTES;
        let mut space = SpillSpace::new(capacity + 5);
        let mut model: Vec<(u64, u64)> = Vec::new();
        for step in steps {
            match step {
                Step::Take(pages) => {
                    let length = pages * PAGE_BYTES;
                    let taken = space.take(length);
                    prop_assert!(taken.is_some() || !model.is_empty(), "an empty file has room");
                    if let Some(offset) = taken {
                        prop_assert!(offset + length <= capacity);
                        prop_assert!(model.iter().all(|(start, size)| offset + length <= *start || start + size <= offset));
                        model.push((offset, length));
                    }
                }
                Step::Free(index) if !model.is_empty() => {
                    let (offset, _) = model.swap_remove(index % model.len());
                    space.free(offset);
                }
                Step::Free(_) => {}
                Step::Restore => {
                    let segment = |(offset, length): &(u64, u64)| SpillSegment { offset: *offset, length: *length, ..sealed().0 };
                    let segments: Vec<SpillSegment> = model.iter().map(segment).collect();
                    let restored = SpillSpace::restore(capacity, &segments);
                    prop_assert!(restored.is_some());
                    space = restored.unwrap();
                }
            }
            prop_assert_eq!(space.used_bytes(), model.iter().map(|(_, length)| length).sum::<u64>());
        }
    }

    /// In order of their sequences, as the primary uses it, at most one segment's length is lost at the end.
    #[test]
    fn a_queue_fills_the_file(lengths in prop::collection::vec(1..4_u64, 1..200)) {
        let mut space = SpillSpace::new(32 * PAGE_BYTES);
        let mut queue = VecDeque::new();
        for pages in lengths {
            match space.take(pages * PAGE_BYTES) {
                Some(offset) => queue.push_back(offset),
                None => {
                    prop_assert!(space.used_bytes() > (32 - 6) * PAGE_BYTES);
                    let oldest = queue.pop_front();
                    prop_assert!(oldest.is_some());
                    space.free(oldest.unwrap());
                }
            }
        }
    }

    #[test]
    fn a_file_of_no_bytes_takes_nothing(pages in 1..5_u64) {
        prop_assert_eq!(SpillSpace::new(0).take(pages * PAGE_BYTES), None);
    }
}
