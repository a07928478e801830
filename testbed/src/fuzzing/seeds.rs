//! Valid inputs of each target, and the repair of their checksums.

use block::{
    ByteCount, ByteRange, ChainHash, Epoch, Incarnation, MirrorId, Position, Sequence, SiteId, Tip, VolumeId,
    VolumeIndex, WallTime,
};
use bytes::Bytes;
use journal::{
    CUT_HEADER_BYTES, Checkpoint, Cursor, CutMeta, Lineage, Record, RecordKind, RedoConfig, SegmentHeader,
    SpillIndex, SpillSegment,
};
use protocol::{Message, PROTOCOL_VERSION};

/// A client's half of some handshakes; the first byte chooses the TLS mode and cuts the others into pieces.
pub(super) fn handshake() -> Vec<Vec<u8>> {
    let go = [&string(b"disk")[..], &0_u16.to_be_bytes()].concat();
    let go_with_block_size = [&string(b"frozen")[..], &[0, 1, 0, 3]].concat();
    let select = context_option(b"disk", &[b"base:allocation", b"x-y:z"]);
    vec![
        [&client_flags(0, 3)[..], &option(7, &go)].concat(),
        [
            &client_flags(0, 1)[..],
            &option(8, &[]),
            &option(3, &[]),
            &option(6, &go_with_block_size),
            &option(7, &go_with_block_size),
        ]
        .concat(),
        [
            &client_flags(1, 3)[..],
            &option(11, &[]),
            &option(9, &context_option(b"disk", &[b"base:"])),
            &option(10, &select),
            &option(7, &go),
            &extended_request(7, 8, 0, 1 << 20),
        ]
        .concat(),
        [
            &client_flags(2, 3)[..],
            &option(6, &go),
            &option(5, &[]),
            &option(8, &[]),
            &option(10, &select),
            &option(2, &[]),
        ]
        .concat(),
        [&client_flags(0, 0)[..], &option(1, b"disk")].concat(),
    ]
}

/// The byte for TLS and the pieces, then the client's flags.
fn client_flags(tls: u8, flags: u32) -> Vec<u8> {
    [&[tls << 6 | 5][..], &flags.to_be_bytes()].concat()
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &string(data)].concat()
}

/// Data of the options on metadata contexts.
pub(super) fn meta_contexts() -> Vec<Vec<u8>> {
    vec![
        context_option(b"disk", &[]),
        context_option(b"disk", &[b"base:allocation"]),
        context_option(b"huge", &[b"base:", b"qemu:dirty-bitmap:x", b"base:allocation"]),
    ]
}

fn context_option(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).unwrap_or(0);
    let queries: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    [&string(name)[..], &count.to_be_bytes(), &queries].concat()
}

fn string(text: &[u8]) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap_or(0);
    [&length.to_be_bytes()[..], text].concat()
}

/// A client's half of some transmissions; the first byte chooses export, framing and pieces.
pub(super) fn transmission() -> Vec<Vec<u8>> {
    let payload = [0x5a; 1024];
    let streams = [
        [&request(0, 0, 0, 4096)[..], &request(0, 4, 8192, 65536)].concat(),
        [&request(1, 1, 4096, 1024)[..], &payload, &request(3, 0, 0, 0), &request(2, 0, 0, 0)].concat(),
        [&request(4, 0, 0, 1 << 20)[..], &request(6, 0x12, 512, 1 << 20), &request(5, 1, 0, 4096)].concat(),
        [&request(1, 0, u64::MAX - 10, 16)[..], &payload[..16], &request(7, 8, 0, 1 << 20)].concat(),
        [
            &extended_request(0, 4, 0, 4096)[..],
            &extended_request(1, 0x20, 4096, 1024),
            &payload,
            &extended_request(7, 0x20, 0, 12),
            &status_payload(1 << 20, &[1]),
            &extended_request(6, 0x10, 0, 1 << 40),
        ]
        .concat(),
    ];
    let choices = [0b1_0000, 0b1_1010, 0b11_0010, 0b111_1011, 0b1_0110];
    choices.iter().zip(streams).map(|(choice, stream)| [&[*choice][..], &stream].concat()).collect()
}

fn request(command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    [&request_start(0x2560_9513, command, flags, offset)[..], &length.to_be_bytes()].concat()
}

fn extended_request(command: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
    [&request_start(0x21e4_1c71, command, flags, offset)[..], &length.to_be_bytes()].concat()
}

fn request_start(magic: u32, command: u16, flags: u16, offset: u64) -> Vec<u8> {
    let cookie = 0x1122_3344_5566_7788_u64;
    [
        &magic.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
    ]
    .concat()
}

/// Payloads of status requests.
pub(super) fn status_payloads() -> Vec<Vec<u8>> {
    [&[1_u32][..], &[], &[1, 1], &[2]].map(|contexts| status_payload(1 << 16, contexts)).into()
}

fn status_payload(length: u64, contexts: &[u32]) -> Vec<u8> {
    let contexts: Vec<u8> = contexts.iter().flat_map(|context| context.to_be_bytes()).collect();
    [&length.to_be_bytes()[..], &contexts].concat()
}

/// Bytes that choose what a client does; any are good, and long ones do much.
pub(super) fn sessions() -> Vec<Vec<u8>> {
    (0..8)
        .map(|seed| {
            let mut random = crate::harness::Random::new(seed);
            (0..400).map(|_| random.next().to_le_bytes()[0]).collect()
        })
        .collect()
}

const MIRROR: MirrorId = MirrorId::from_bytes([2; 16]);

fn lineage() -> Lineage {
    Lineage { epoch: Epoch(3), origin: SiteId::from_bytes([7; 16]), incarnation: Incarnation(2) }
}

fn tip() -> Tip {
    Tip { position: lineage().at(Sequence(99)), chain: ChainHash([9; 32]) }
}

fn record(sequence: u64, kind: RecordKind, range: Option<ByteRange>) -> Record {
    let range = range.unwrap_or_default();
    let bytes = if kind.has_payload() { range.length() } else { 0 };
    Record {
        sequence: Sequence(sequence),
        volume: VolumeIndex(0),
        kind,
        range,
        payload: Bytes::from(vec![0xa5; usize::try_from(bytes).unwrap_or(0)]),
    }
}

/// Cuts of every kind.
pub(super) fn cuts() -> Vec<Vec<u8>> {
    let ordinary = CutMeta {
        mirror: MIRROR,
        lineage: lineage(),
        first: Sequence(100),
        last: Sequence(107),
        previous: tip(),
        pass: 0,
        time: WallTime(1),
        echo: WallTime(2),
        commit: true,
        initial: false,
    };
    let staged = CutMeta { pass: 4, commit: false, ..ordinary };
    let initial = CutMeta { initial: true, ..ordinary };
    let heartbeat = CutMeta { last: Sequence(99), ..ordinary };
    let unit = ByteRange::new(4096, 4096);
    let records = [
        record(100, RecordKind::Write, unit),
        record(101, RecordKind::Copy, ByteRange::new(8192, 8192)),
        record(102, RecordKind::Zero, ByteRange::new(512, 1024)),
        record(103, RecordKind::Trim, ByteRange::new(0, 1 << 20)),
        record(104, RecordKind::CopyZero, unit),
        record(105, RecordKind::Bad, unit),
        record(106, RecordKind::Resize, ByteRange::new(0, 1 << 30)),
        record(107, RecordKind::Marker, None),
        Record::void(Sequence(107), VolumeIndex(0)),
    ];
    let copies = [record(101, RecordKind::Copy, unit), record(102, RecordKind::CopyZero, unit)];
    let mut all = vec![
        encode_cut(&ordinary, &records),
        encode_cut(&staged, &copies),
        encode_cut(&initial, &copies),
        encode_cut(&heartbeat, &[]),
    ];
    let header_only = journal::header_only(&Bytes::from(encode_cut(&initial, &copies)));
    all.extend(header_only.map(|bytes| bytes.to_vec()));
    all
}

fn encode_cut(meta: &CutMeta, records: &[Record]) -> Vec<u8> {
    let encoded = journal::encode(meta, records);
    let mut bytes = encoded.head.to_vec();
    encoded.payloads.iter().for_each(|payload| bytes.extend_from_slice(payload));
    bytes
}

// Places in a cut (docs/formats/journal.md, "Cut" and "Record").
const CUT_FLAGS_AT: usize = 10;
const CUT_HEADER_ONLY: u8 = 4;
const CUT_RECORD_COUNT_AT: usize = 12;
const CUT_CHAIN_AT: usize = 192;
const CUT_CHECKSUM_AT: usize = 224;
const RECORD_BYTES: usize = 48;

/// Makes chain hash and header checksum of a changed cut right.
pub(super) fn repair_cut(input: &mut [u8]) {
    let Some(count) = number_at(input, CUT_RECORD_COUNT_AT) else {
        return;
    };
    let Some(end) = count.checked_mul(RECORD_BYTES).and_then(|bytes| bytes.checked_add(CUT_HEADER_BYTES))
    else {
        return;
    };
    let Some(table) = input.get_mut(..end) else { return };
    let mut blank = table.to_vec();
    fill(&mut blank, CUT_CHAIN_AT, &[0; 32]);
    fill(&mut blank, CUT_CHECKSUM_AT, &[0; 4]);
    if let Some(flags) = blank.get_mut(CUT_FLAGS_AT) {
        *flags &= !CUT_HEADER_ONLY;
    }
    fill(table, CUT_CHAIN_AT, blake3::hash(&blank).as_bytes());
    fill(table, CUT_CHECKSUM_AT, &[0; 4]);
    let checksum = crc32c::crc32c(table);
    fill(table, CUT_CHECKSUM_AT, &checksum.to_le_bytes());
}

fn number_at(input: &[u8], at: usize) -> Option<usize> {
    let bytes = input.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

fn fill(bytes: &mut [u8], at: usize, with: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + with.len()) {
        place.copy_from_slice(with);
    }
}

// Place in a sealed page (docs/formats/journal.md).
const PAGE_CHECKSUM_AT: usize = 12;

/// Makes the checksum of a changed page right.
pub(super) fn repair_page(input: &mut [u8]) {
    fill(input, PAGE_CHECKSUM_AT, &[0; 4]);
    let checksum = crc32c::crc32c(input);
    fill(input, PAGE_CHECKSUM_AT, &checksum.to_le_bytes());
}

/// Checkpoint pages.
pub(super) fn checkpoints() -> Vec<Vec<u8>> {
    let Ok(config) = RedoConfig::new(4, 64 << 20) else {
        return Vec::new();
    };
    let first = Checkpoint::first(MIRROR, config, tip());
    let cursor = Cursor { segment_number: 3, offset: 8192 };
    vec![first.encode().to_vec(), first.next(tip(), cursor).encode().to_vec()]
}

/// Segment headers.
pub(super) fn segment_headers() -> Vec<Vec<u8>> {
    let header = SegmentHeader {
        mirror: MIRROR,
        number: 5,
        file_index: 1,
        segment_bytes: 64 << 20,
        previous_end: Cursor { segment_number: 4, offset: 4096 },
        starts_after: tip(),
        first_chain: ChainHash([6; 32]),
    };
    vec![header.encode().to_vec()]
}

/// Makes the checksum at the end right.
pub(super) fn repair_tail(input: &mut [u8]) {
    if let Some((body, checksum)) = input.split_last_chunk_mut::<4>() {
        *checksum = crc32c::crc32c(body).to_le_bytes();
    }
}

/// Indexes of a spill file.
pub(super) fn spill_indexes() -> Vec<Vec<u8>> {
    let committed = tip();
    let at = committed.position.sequence;
    let lineage = Lineage::from(committed.position);
    let ends = (at.next(), at.next().next());
    let (segment, _) = SpillSegment::seal(MIRROR, lineage, ends, WallTime(5), &[]);
    let index = SpillIndex {
        lineage,
        capacity: 1 << 20,
        last: ends.1.next(),
        folded_from: Some(ends.1.next()),
        commit_floor: at,
        committed,
        sent: vec![committed],
        segments: vec![segment.at(8192)],
    };
    vec![index.encode()]
}

/// Control messages.
pub(super) fn messages() -> Vec<Vec<u8>> {
    let position: Position = tip().position;
    let volume = protocol::MirrorVolume {
        id: VolumeId::from_bytes([1; 16]),
        name: "db".into(),
        size: ByteCount(1 << 30),
        class: "standard".into(),
        iops: Some(500),
        wrapped_key: vec![5; 72],
        access: protocol::MirrorAccess {
            tls_required: true,
            read_only: false,
            hosts: vec![protocol::MirrorHost { identity: "host".into(), read_only: true }],
        },
    };
    let access = (volume.id, 7, volume.access.clone());
    let fork = protocol::Fork { epoch: Epoch(3), origin: position.origin, at: position };
    let messages = [
        Message::Hello(protocol::Hello {
            version: PROTOCOL_VERSION,
            mirror: MIRROR,
            position,
            forks: vec![fork],
            volumes: vec![(volume.id, volume.size)],
            echo: WallTime(5),
        }),
        Message::Ack(protocol::Ack { tip: tip(), staged: false, applied: Sequence(98), clock: WallTime(1) }),
        Message::HashReply(protocol::HashReply { id: 1, hashes: vec![[1; 32], [2; 32]] }),
        Message::VerifyRequest(protocol::VerifyRequest {
            id: 5,
            volume: block::VolumeIndex(3),
            range: block::ByteRange::new(4096, 8192).unwrap_or_default(),
            at: position,
            content: true,
        }),
        Message::VerifyReply(protocol::VerifyReply {
            id: 5,
            through: position,
            held: protocol::Held::Hashes(vec![[1; 32], [2; 32]]),
        }),
        Message::CreateMirror(protocol::CreateMirror {
            mirror: MIRROR,
            name: "m".into(),
            origin: position.origin,
            rpo_seconds: 900,
            key_fingerprint: "00ff".into(),
            volumes: vec![volume],
        }),
        Message::SetAccess(protocol::SetAccess { mirror: MIRROR, epoch: Epoch(3), volumes: vec![access] }),
        Message::Grow { volume: block::VolumeIndex(0), size: ByteCount(1 << 21) },
        Message::Grown { volume: block::VolumeIndex(0), size: ByteCount(1 << 21), trouble: "full".into() },
        Message::SetKeys(protocol::SetKeys {
            mirror: MIRROR,
            epoch: Epoch(3),
            lock: protocol::TenantLock::Keep,
            volumes: vec![(VolumeId::from_bytes([1; 16]), vec![6; 248])],
        }),
        Message::Ping,
        Message::LeaseAsk { asked: block::Monotonic(77) },
    ];
    messages.iter().map(|message| message.encode().to_vec()).collect()
}

/// Wrapped-key records, one of each kind of root.
pub(super) fn key_records() -> Vec<Vec<u8>> {
    let record = |root, length| {
        let tenant = block::TenantId::from_bytes([3; 16]);
        let domain = crypto::WrappedDomainKey::new(tenant, root, 2, vec![9; length]).ok()?;
        let key = crypto::DataKey::from_random(std::array::from_fn(|at| u8::from(at == 0))).ok()?;
        let random = crypto::Zeroizing::new([5; 32]);
        let volume = VolumeId::from_bytes([1; 16]);
        let above = crypto::DomainKey::from_bytes([1; 32]);
        Some(crypto::KeyRecord::wrap(&key, volume, &above, domain, 7, &random).encode())
    };
    let records = [record(crypto::RootKind::File, 56), record(crypto::RootKind::Pkcs11, 60)];
    records.into_iter().flatten().collect()
}

fn audit_entry(sequence: u64, previous: String) -> daemon::audit::Entry {
    daemon::audit::Entry {
        sequence,
        time: control::Timestamp(block::WallTime(1_700_000_000_000_000_000)),
        actor: "user 0, process 7".into(),
        action: "key rotate".into(),
        object: "volume 'db'".into(),
        outcome: daemon::audit::Outcome::Done,
        detail: String::new(),
        previous,
    }
}

/// Audit logs: one line without its end, and two lines.
pub(super) fn audit_logs() -> Vec<Vec<u8>> {
    let first = audit_entry(1, String::new()).line();
    let bare = first.strip_suffix(b"\n").unwrap_or(&first).to_vec();
    let head = daemon::audit::Entry::read(&bare).map(|(_, hash)| hash).unwrap_or_default();
    let second = audit_entry(2, head).line();
    vec![bare, [first, second].concat()]
}

/// Puts the right hash into a changed line, if it still reads as an entry.
pub(super) fn repair_audit_line(input: &mut [u8]) {
    let Some(at) = input.len().checked_sub(75) else { return };
    let Some((body, _)) = input.split_at_checked(at) else { return };
    let entry = [body, b"}"].concat();
    let Ok(entry) = serde_json::from_slice::<daemon::audit::Entry>(&entry) else { return };
    let line = entry.line();
    let line = line.strip_suffix(b"\n").unwrap_or(&line);
    if line.len() == input.len() {
        input.copy_from_slice(line);
    }
}
