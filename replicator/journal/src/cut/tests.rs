use block::{ByteRange, Epoch, Incarnation, SiteId, VolumeIndex};
use bytes::BytesMut;
use proptest::prelude::*;

use super::*;
use crate::{RecordKind, fuzz};

const KINDS: [RecordKind; 9] = [
    RecordKind::Write,
    RecordKind::Copy,
    RecordKind::Zero,
    RecordKind::Trim,
    RecordKind::CopyZero,
    RecordKind::Resize,
    RecordKind::Void,
    RecordKind::Bad,
    RecordKind::Marker,
];

fn record(sequence: u64, kind: RecordKind, page: u64, pages: u64) -> Record {
    let range = match kind {
        RecordKind::Void | RecordKind::Marker => ByteRange::new(0, 0),
        RecordKind::Resize => ByteRange::new(0, page * 512),
        RecordKind::Zero | RecordKind::Trim => ByteRange::new(page * 512, pages * 512),
        RecordKind::Write | RecordKind::Copy | RecordKind::CopyZero | RecordKind::Bad => {
            ByteRange::new(page * 4096, pages * 4096)
        }
    };
    let length = if kind.has_payload() { pages * 4096 } else { 0 };
    let fill = u8::try_from(sequence % 251).unwrap();
    Record {
        sequence: Sequence(sequence),
        volume: VolumeIndex(2),
        kind,
        range: range.unwrap(),
        payload: Bytes::from(vec![fill; usize::try_from(length).unwrap()]),
    }
}

fn meta() -> CutMeta {
    let lineage =
        Lineage { epoch: Epoch(5), origin: SiteId::from_bytes([0x11; 16]), incarnation: Incarnation(3) };
    CutMeta {
        mirror: MirrorId::from_bytes([0x22; 16]),
        lineage,
        first: Sequence(101),
        last: Sequence(120),
        previous: Tip { position: lineage.at(Sequence(100)), chain: ChainHash([0x33; 32]) },
        pass: 0,
        time: WallTime(1_700_000_000_000_000_000),
        echo: WallTime(1_699_999_999_000_000_000),
        commit: true,
        initial: false,
    }
}

fn whole(encoded: &EncodedCut) -> Bytes {
    let mut bytes = BytesMut::from(encoded.head.as_ref());
    for payload in &encoded.payloads {
        bytes.extend_from_slice(payload);
    }
    assert_eq!(wide(bytes.len()), encoded.total_bytes);
    bytes.freeze()
}

fn one_of_each() -> Vec<Record> {
    (101..).zip(KINDS).map(|(sequence, kind)| record(sequence, kind, sequence, 2)).collect()
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let one = (0..3_u64, 0..KINDS.len(), 0..1_u64 << 40, 1..4_u64);
    prop::collection::vec(one, 0..90).prop_map(|choices| {
        let mut sequence = 101;
        let mut records = Vec::new();
        for (step, kind, page, pages) in choices {
            sequence = (sequence + step).min(120);
            records.push(record(sequence, KINDS[kind], page, pages));
        }
        records
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_is_encoded_is_decoded(records in records(), commit: bool, pass in 1..u64::MAX) {
        let meta = CutMeta { commit, pass, ..meta() };
        let encoded = encode(&meta, &records);
        let bytes = whole(&encoded);
        let size = peek(&bytes).unwrap();
        prop_assert_eq!(size.total_bytes(), encoded.total_bytes);
        prop_assert_eq!(size.head_bytes, wide(encoded.head.len()));
        let cut = decode(&bytes).unwrap();
        prop_assert_eq!(cut.meta, meta);
        prop_assert_eq!(cut.tip, encoded.tip);
        prop_assert_eq!(&cut.records, &records);
        fuzz::decode_cut(&bytes);
    }

    #[test]
    fn no_damage_goes_unnoticed(records in records(), place: prop::sample::Index, bit in 0..8_u32, cut_to: prop::sample::Index) {
        let bytes = whole(&encode(&meta(), &records));
        let mut damaged = bytes.to_vec();
        damaged[place.index(bytes.len())] ^= 1 << bit;
        prop_assert!(decode(&damaged.into()).is_err());
        prop_assert!(decode(&bytes.slice(..cut_to.index(bytes.len()))).is_err());
        let longer = [bytes.as_ref(), &[0; 4096]].concat();
        prop_assert!(decode(&longer.into()).is_err());
    }

    #[test]
    fn noise_does_not_panic(mut noise in prop::collection::vec(any::<u8>(), 0..600), plausible: bool) {
        if plausible && noise.len() >= 12 {
            noise[..12].copy_from_slice(&[MAGIC.as_slice(), &[1, 0, 1, 0]].concat());
        }
        fuzz::decode_cut(&noise);
        fuzz::checkpoint(&noise);
        fuzz::segment_header(&noise);
    }
}

/// Damage behind the checksums: a header or record field changed, both checksums made to fit.
fn forged(bytes: &Bytes, change: impl FnOnce(&mut [u8])) -> Result<Cut, CutError> {
    let mut forged = bytes.to_vec();
    change(&mut forged);
    let (mut header, rest) = CutHeader::read_from_prefix(forged.as_slice()).unwrap();
    let count = usize::try_from(header.record_count.get()).unwrap();
    let table = &rest[..(count * RECORD_HEADER_BYTES).min(rest.len())];
    header.chain = header.chain_over(table);
    header.header_crc = header.checksum_over(table);
    header.write_to_prefix(&mut forged).unwrap();
    decode(&forged.into())
}

#[test]
fn forged_fields_are_refused() {
    let bytes = whole(&encode(&meta(), &one_of_each()));
    assert!(forged(&bytes, |_| ()).is_ok());
    let fault = |fault| Err(CutError::Record { index: 0, fault });
    let set = |place: usize, value: u8| forged(&bytes, |forged| forged[place] = value);
    assert_eq!(set(0, 0), Err(CutError::Magic));
    assert_eq!(set(8, 2), Err(CutError::Version(2)));
    assert_eq!(set(10, 9), Err(CutError::Flags(9)));
    assert_eq!(
        set(10, COMMIT.to_le_bytes()[0] | 4),
        Err(CutError::Flags(5)),
        "only initial cuts lack payloads"
    );
    assert_eq!(set(10, 2), Err(CutError::Flags(2)), "an initial cut commits");
    assert_eq!(set(10, 0), Err(CutError::Pass));
    assert_eq!(set(13, 0x11), Err(CutError::Bounds), "too many records");
    assert_eq!(set(17, 0x20), Err(CutError::Bounds), "head longer than its table");
    assert_eq!(set(20, 1), Err(CutError::Reserved));
    assert_eq!(set(24, 1), Err(CutError::Bounds));
    assert_eq!(set(80, 100), Err(CutError::Sequences), "does not follow the previous tip");
    assert_eq!(set(88, 99), Err(CutError::Sequences));
    assert_eq!(set(255, 1), Err(CutError::Reserved));
    assert_eq!(set(4095, 1), Err(CutError::Reserved), "padding");
    let first = CUT_HEADER_BYTES;
    assert_eq!(set(first, 121), fault(RecordFault::Sequence(Sequence(121))));
    assert_eq!(set(first + 8, 1), fault(RecordFault::Range));
    assert!(set(first + 15, 0xff).is_ok(), "far away is legal");
    assert_eq!(set(first + 23, 0xff), fault(RecordFault::Payload));
    let wrap = forged(&bytes, |forged| forged[first + 9..first + 24].fill(0xff));
    assert_eq!(wrap, fault(RecordFault::Range));
    assert_eq!(set(first + 26, 0), fault(RecordFault::Kind(0)));
    assert_eq!(set(first + 26, 10), fault(RecordFault::Kind(10)));
    assert_eq!(set(first + 26, 3), fault(RecordFault::Payload), "zeros have no payload");
    assert_eq!(set(first + 27, 1), fault(RecordFault::Reserved));
    assert_eq!(set(first + 28, 0), fault(RecordFault::PayloadChecksum));
    assert_eq!(set(first + 33, 0x40), Err(CutError::Bounds), "payloads do not add up");
    assert_eq!(set(first + 47, 1), fault(RecordFault::Reserved));
    let third = set(first + 2 * 48 + 28, 1);
    let fault = RecordFault::Payload;
    assert_eq!(third, Err(CutError::Record { index: 2, fault }), "a checksum of nothing");
    let second = set(first + 48, 100);
    let fault = RecordFault::Sequence(Sequence(100));
    assert_eq!(second, Err(CutError::Record { index: 1, fault }));
}

#[test]
fn payloads_are_shared_not_copied() {
    let records = one_of_each();
    let encoded = encode(&meta(), &records);
    assert_eq!(encoded.payloads[0].as_ptr(), records[0].payload.as_ptr());
    let bytes = whole(&encoded);
    let cut = decode(&bytes).unwrap();
    assert!(bytes.as_ptr_range().contains(&cut.records[1].payload.as_ptr()));
}

#[test]
fn an_initial_cut_is_kept_without_payloads_under_the_same_tip() {
    let meta = CutMeta { initial: true, ..meta() };
    let encoded = encode(&meta, &one_of_each());
    let bytes = whole(&encoded);
    let head = header_only(&bytes).unwrap();
    assert_eq!(header_only(&encoded.head).unwrap(), head);
    assert_eq!(peek(&head).unwrap(), CutSize { head_bytes: 4096, payload_bytes: 0 });
    let cut = decode(&head).unwrap();
    assert!(cut.header_only && cut.tip == encoded.tip && cut.meta == meta);
    assert!(cut.records.iter().all(|record| record.payload.is_empty()));
    assert!(!decode(&bytes).unwrap().header_only);
    fuzz::decode_cut(&bytes);
    fuzz::decode_cut(&head);
    let ordinary = encode(&self::meta(), &one_of_each());
    assert_eq!(header_only(&ordinary.head), Err(CutError::Flags(COMMIT)));
}

#[test]
fn a_heartbeat_moves_the_tip_but_not_the_sequence() {
    let meta = CutMeta { last: Sequence(100), ..meta() };
    let encoded = encode(&meta, []);
    assert_eq!(encoded.total_bytes, 4096);
    assert_eq!(encoded.tip.position, meta.previous.position);
    assert_ne!(encoded.tip.chain, meta.previous.chain);
    assert_eq!(decode(&encoded.head).unwrap().tip, encoded.tip);
}

#[test]
fn a_new_lineage_may_follow_any_tip() {
    let lineage = Lineage { incarnation: Incarnation(4), ..meta().lineage };
    let meta = CutMeta { lineage, first: Sequence(1), ..meta() };
    assert_eq!(meta.check(), Ok(()));
    assert_eq!(CutMeta { first: Sequence(0), ..meta }.check(), Err(CutError::Sequences));
}

#[test]
fn the_largest_cut_is_decoded() {
    let records: Vec<_> = (0..RECORDS_MAX).map(|_| record(101, RecordKind::Trim, 1, 1)).collect();
    let encoded = encode(&meta(), &records);
    assert_eq!(wide(encoded.head.len()), HEAD_BYTES_MAX);
    assert_eq!(decode(&encoded.head).unwrap().records.len(), RECORDS_MAX);
}

/// Changes only together with the format's version.
#[test]
fn the_encoding_is_pinned() {
    let encoded = encode(&meta(), &one_of_each());
    let hash = blake3::hash(&whole(&encoded)).to_hex();
    assert_eq!(hash.as_str(), "382c7cbe0338eb28ebdb5ee5740c86a42db8a0d2aa4525ac1634baf542956d46");
    let chain = blake3::Hash::from_bytes(encoded.tip.chain.0).to_hex();
    assert_eq!(chain.as_str(), "03f7e3afb236acf5e7646ed1740fac4e15fc071703f82edcb79b9f88779df684");
}
