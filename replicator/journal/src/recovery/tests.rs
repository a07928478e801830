use std::convert::Infallible;

use block::{Epoch, Incarnation, Sequence, SiteId, VolumeIndex, WallTime};
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::{Lineage, Record, RecordKind, RedoFull, encode};

const SECTOR: usize = 512;
const FILES: u32 = 4;
const SEGMENT: u64 = 16 * PAGE_BYTES;

fn at(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// Segment files with a volatile cache: unsynced sectors survive a crash or not, each by itself.
#[derive(Clone)]
struct Media {
    files: Vec<Vec<u8>>,
    pending: Vec<(u32, u64, Bytes)>,
}

impl Media {
    fn new() -> Self {
        let files = (0..FILES).map(|_| vec![0; at(SEGMENT)]).collect();
        Self { files, pending: Vec::new() }
    }

    fn store(&mut self, file: u32, offset: u64, bytes: &[u8]) {
        self.files[at(u64::from(file))][at(offset)..][..bytes.len()].copy_from_slice(bytes);
    }

    fn sync(&mut self) {
        for (file, offset, bytes) in std::mem::take(&mut self.pending) {
            self.store(file, offset, &bytes);
        }
    }

    /// Loses power: each pending sector is kept as `survives` draws.
    fn crash(&mut self, survives: &mut dyn FnMut() -> bool) {
        for (file, offset, bytes) in std::mem::take(&mut self.pending) {
            for (sector, content) in (0..).zip(bytes.chunks(SECTOR)) {
                if survives() {
                    self.store(file, offset + sector * 512, content);
                }
            }
        }
    }

    fn recover(&self, checkpoint: &Checkpoint) -> Recovered {
        let mut read = |file: u32, offset: u64, length: u64| {
            Ok::<_, Infallible>(Bytes::copy_from_slice(
                &self.files[at(u64::from(file))][at(offset)..][..at(length)],
            ))
        };
        recover(checkpoint.config, checkpoint.mirror, checkpoint, &mut read).unwrap()
    }
}

/// A target that appends cuts; `live` is what a recovery must find, in order, as far as it was synced.
#[derive(Clone)]
struct Target {
    media: Media,
    log: RedoLog,
    checkpoint: Checkpoint,
    tip: Tip,
    live: Vec<Live>,
    /// Every cut that may be found: appended after the last reset.
    appended: BTreeMap<[u8; 32], Tip>,
    time: u64,
}

#[derive(Clone, Debug)]
struct Live {
    placement: Placement,
    tip: Tip,
    commit: bool,
    synced: bool,
}

fn lineage() -> Lineage {
    Lineage { epoch: Epoch(1), origin: SiteId::from_bytes([1; 16]), incarnation: Incarnation(1) }
}

impl Target {
    fn new() -> Self {
        let config = RedoConfig::new(FILES, SEGMENT).unwrap();
        let mirror = MirrorId::from_bytes([5; 16]);
        let tip = Tip { position: lineage().at(Sequence(0)), ..Tip::default() };
        Self {
            media: Media::new(),
            log: RedoLog::new(config, mirror),
            checkpoint: Checkpoint::first(mirror, config, tip),
            tip,
            live: Vec::new(),
            appended: BTreeMap::new(),
            time: 0,
        }
    }

    fn cut(&mut self, pages: u64, commit: bool) -> (Tip, Bytes) {
        self.time += 1;
        let first = self.tip.position.sequence.next();
        let record = Record {
            sequence: first,
            volume: VolumeIndex(0),
            kind: RecordKind::Write,
            range: block::ByteRange::new(self.time * 4096, pages * 4096).unwrap(),
            payload: vec![u8::try_from(self.time % 256).unwrap(); at(pages * 4096)].into(),
        };
        let meta = CutMeta {
            mirror: self.checkpoint.mirror,
            lineage: lineage(),
            first,
            last: if pages == 0 { self.tip.position.sequence } else { first },
            previous: self.tip,
            pass: 9,
            time: WallTime(self.time),
            echo: WallTime(0),
            commit,
            initial: false,
        };
        let encoded = encode(&meta, (pages > 0).then_some(&record));
        let bytes = [&[encoded.head], encoded.payloads.as_slice()].concat().concat();
        (encoded.tip, bytes.into())
    }

    fn append(&mut self, pages: u64, commit: bool) -> Result<(), RedoFull> {
        let (tip, bytes) = self.cut(pages, commit);
        let placement = self.log.append(&self.tip, &tip, u64::try_from(bytes.len()).unwrap())?;
        let file = placement.file_index;
        if let Some(page) = &placement.opens_segment {
            self.media.pending.push((file, 0, page.clone()));
        }
        self.media.pending.push((file, placement.offset, bytes));
        self.appended.insert(tip.chain.0, tip);
        self.live.push(Live { placement, tip, commit, synced: false });
        self.tip = tip;
        Ok(())
    }

    fn sync(&mut self) {
        self.media.sync();
        self.live.iter_mut().for_each(|cut| cut.synced = true);
    }

    /// Voids all but the first `keep` live cuts.
    fn void(&mut self, keep: usize) {
        let kept = keep.checked_sub(1).and_then(|last| self.live.get(last)).cloned();
        if let Some(first) = self.live.get(keep) {
            match &kept {
                Some(kept) if self.time.is_multiple_of(2) => self.log.truncate_after(&kept.placement),
                Some(_) | None => self.log.void_tail(&first.placement),
            }
            self.tip = kept.map_or(self.checkpoint.applied, |kept| kept.tip);
            self.live.truncate(keep);
        }
    }

    fn advance(&mut self, through: usize) {
        let Live { placement, tip, .. } = self.live[through].clone();
        self.checkpoint = self.checkpoint.next(tip, placement.end());
        self.log.release(&placement);
        self.live.drain(..=through);
    }

    /// Checks what a recovery finds, and goes on from it.
    fn restart(&mut self) {
        let recovered = self.media.recover(&self.checkpoint);
        let synced = self.live.iter().take_while(|cut| cut.synced).count();
        let found: Vec<_> = recovered.cuts.iter().map(|cut| cut.tip).collect();
        let wanted: Vec<_> = self.live[..synced].iter().map(|cut| cut.tip).collect();
        assert_eq!(found.get(..synced), Some(wanted.as_slice()), "the synced prefix is found");
        let mut tip = self.checkpoint.applied;
        for cut in &recovered.cuts {
            assert!(self.appended.contains_key(&cut.tip.chain.0), "only appended cuts are found");
            assert_eq!(cut.meta.previous, tip, "in one chain");
            tip = cut.tip;
        }
        let durable = recovered.cuts.iter().rfind(|cut| cut.meta.commit).map(|cut| cut.tip);
        assert_eq!(recovered.durable_tip, durable.unwrap_or(self.checkpoint.applied));
        assert_eq!(recovered.staged_tip, (recovered.durable_tip != tip).then_some((9, tip)));
        self.tip = tip;
        let live = |cut: RecoveredCut| Live {
            placement: cut.placement,
            tip: cut.tip,
            commit: cut.meta.commit,
            synced: true,
        };
        self.live = recovered.cuts.into_iter().map(live).collect();
        self.log = recovered.log;
    }

    fn committed(&self) -> usize {
        self.live.iter().rposition(|cut| cut.commit).map_or(0, |last| last + 1)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append { pages: u64, commit: bool },
    Sync,
    Advance(Index),
    Abort,
    Fail(u64),
    Reset,
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..9_u64, prop::bool::weighted(0.7)).prop_map(|(pages, commit)| Step::Append { pages, commit }),
        6 => Just(Step::Sync),
        4 => any::<Index>().prop_map(Step::Advance),
        2 => Just(Step::Abort),
        1 => any::<u64>().prop_map(Step::Fail),
        1 => Just(Step::Reset),
        4 => any::<u64>().prop_map(Step::Crash),
    ]
}

/// A coin of a fixed seed (splitmix64); some seeds keep nearly all sectors, some nearly none.
fn coin(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed;
    let bias = seed % 8;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 61 >= bias
    }
}

fn take(target: &mut Target, step: Step) {
    match step {
        Step::Append { pages, commit } => match target.append(pages, commit) {
            Ok(()) | Err(RedoFull::Full) => {}
            Err(RedoFull::CutTooLong) => panic!("cuts here fit a segment"),
        },
        Step::Sync => target.sync(),
        Step::Advance(index) => {
            target.sync();
            let committed = target.committed();
            if committed > 0 {
                target.advance(index.index(committed));
            }
        }
        Step::Abort => target.void(target.committed()),
        // A failed sync voids all that it covered, whatever of it reached the media.
        Step::Fail(seed) => {
            target.media.crash(&mut coin(seed));
            let synced = target.live.iter().take_while(|cut| cut.synced).count();
            target.void(synced);
        }
        Step::Reset => {
            target.live.clear();
            target.appended.clear();
            target.media.sync();
            let scan_start = target.log.reset();
            target.checkpoint = target.checkpoint.next(target.tip, scan_start);
        }
        Step::Crash(seed) => {
            target.media.crash(&mut coin(seed));
            target.restart();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_history_recovers(steps in prop::collection::vec(step(), 1..100)) {
        let mut target = Target::new();
        for step in steps {
            take(&mut target, step);
        }
        target.media.crash(&mut coin(3));
        target.restart();
    }
}

/// A log that went round its files several times and then holds unreleased cuts in three segments.
fn laps() -> Target {
    let mut target = Target::new();
    for pages in (0..60).map(|turn| turn % 7) {
        target.append(pages, true).unwrap();
        target.sync();
        target.advance(0);
    }
    while target.live.len() < 8 {
        let pages = 1 + u64::try_from(target.live.len()).unwrap() % 6;
        target.append(pages, target.live.len() != 5).unwrap();
    }
    target.sync();
    target
}

fn found(media: &Media, checkpoint: &Checkpoint) -> Vec<Tip> {
    media.recover(checkpoint).cuts.iter().map(|cut| cut.tip).collect()
}

#[test]
fn a_cut_torn_at_any_byte_is_not_found_and_all_before_it_are() {
    let mut target = laps();
    let mut opened = 0;
    for pages in [0, 2, 5, 3] {
        let before: Vec<_> = target.live.iter().map(|cut| cut.tip).collect();
        target.append(pages, true).unwrap();
        let pending = &target.media.pending;
        opened += pending.len() - 1;
        let total: usize = pending.iter().map(|(_, _, bytes)| bytes.len()).sum();
        let ends = (0..total).step_by(131).chain((0..total).step_by(SECTOR)).chain([total - 1]);
        // A cut's zero padding may stand on the media already: then it is whole without its last bytes.
        for end in ends.filter(|end| pages > 0 || *end < 256) {
            let mut media = target.media.clone();
            let mut left = end;
            for (file, offset, bytes) in pending {
                let kept = bytes.len().min(left);
                left -= kept;
                media.store(*file, *offset, &bytes[..kept]);
            }
            assert_eq!(found(&media, &target.checkpoint), before, "{end} of {total} bytes");
        }
        target.sync();
        assert_eq!(found(&target.media, &target.checkpoint).last(), Some(&target.tip));
    }
    assert!(opened > 0, "a segment's page was torn too");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damage_ends_the_log_where_it_is(live: Index, header: bool, place: Index, bit in 0..8_u32) {
        let mut target = laps();
        let chosen = live.index(target.live.len());
        let placement = target.live[chosen].placement.clone();
        let byte = if header {
            place.index(4096)
        } else {
            at(placement.offset) + place.index(at(placement.length))
        };
        target.media.files[at(u64::from(placement.file_index))][byte] ^= 1 << bit;
        let in_segment = |cut: &Live| cut.placement.segment_number == placement.segment_number;
        let good = if header { target.live.iter().position(in_segment).unwrap() } else { chosen };
        let tips: Vec<_> = target.live[..good].iter().map(|cut| cut.tip).collect();
        prop_assert_eq!(found(&target.media, &target.checkpoint), tips);
    }

    #[test]
    fn a_file_of_another_log_is_no_part_of_this_one(file in 0..FILES, other in 0..FILES) {
        let mut target = laps();
        let tips: Vec<_> = target.live.iter().map(|cut| cut.tip).collect();
        let copy = target.media.files[at(u64::from(other))].clone();
        target.media.files[at(u64::from(file))] = copy;
        let cuts = found(&target.media, &target.checkpoint);
        prop_assert_eq!(&cuts[..], &tips[..cuts.len()]);
    }
}

#[test]
fn an_aborted_pass_does_not_come_back_once_the_log_went_on() {
    let mut target = laps();
    target.advance(4);
    for pages in [6, 6, 6] {
        target.append(pages, false).unwrap();
    }
    target.sync();
    let kept = target.committed();
    let aborted: Vec<_> = target.live[kept..].iter().map(|cut| cut.tip).collect();
    target.void(kept);
    let revived = target.media.recover(&target.checkpoint);
    assert_eq!(revived.staged_tip, aborted.last().map(|tip| (9, *tip)), "only as staged cuts");
    assert_eq!(revived.durable_tip, target.tip);
    target.append(1, true).unwrap();
    target.sync();
    let recovered = target.media.recover(&target.checkpoint);
    assert_eq!((recovered.durable_tip, recovered.staged_tip), (target.tip, None));
    assert_eq!(recovered.cuts.len(), kept + 1);
}

#[test]
fn a_reset_log_stays_empty() {
    let mut target = laps();
    let scan_start = target.log.reset();
    let checkpoint = target.checkpoint.next(target.live[3].tip, scan_start);
    let recovered = target.media.recover(&checkpoint);
    assert_eq!((recovered.cuts, recovered.stopped_at), (Vec::new(), RecoveryStop::End));
    assert_eq!(recovered.durable_tip, target.live[3].tip);
    assert_eq!(recovered.log.free_bytes(), recovered.log.capacity_bytes());
}

#[test]
fn a_lost_scan_start_and_a_foreign_checkpoint_are_said() {
    let mut target = laps();
    let old = Checkpoint::first(target.checkpoint.mirror, target.checkpoint.config, Tip::default());
    let recovered = target.media.recover(&old);
    assert_eq!(recovered.stopped_at, RecoveryStop::ScanStartLost);
    let mut read = |_, _, length| Ok::<_, Infallible>(Bytes::from(vec![0; at(length)]));
    let config = target.checkpoint.config;
    let foreign = recover(config, MirrorId::default(), &target.checkpoint, &mut read);
    assert_eq!(foreign.err(), Some(RecoveryError::Mirror));
    let config = RedoConfig::new(FILES + 1, SEGMENT).unwrap();
    let reshaped = recover(config, target.checkpoint.mirror, &target.checkpoint, &mut read);
    assert_eq!(reshaped.err(), Some(RecoveryError::Config(target.checkpoint.config)));
    target.checkpoint.scan_start = Cursor::START;
    let mut short = |_, _, _| Ok::<_, Infallible>(Bytes::new());
    let short = recover(target.checkpoint.config, target.checkpoint.mirror, &target.checkpoint, &mut short);
    assert!(matches!(short.err(), Some(RecoveryError::ShortRead { found: 0, .. })));
}

#[test]
fn an_initial_cut_is_found_without_payloads() {
    let mut target = Target::new();
    let record = Record {
        sequence: Sequence(1),
        volume: VolumeIndex(0),
        kind: RecordKind::Copy,
        range: block::ByteRange::new(0, 4096).unwrap(),
        payload: vec![1; 4096].into(),
    };
    let meta = CutMeta {
        mirror: target.checkpoint.mirror,
        lineage: lineage(),
        first: Sequence(1),
        last: Sequence(1),
        previous: target.tip,
        pass: 0,
        time: WallTime(1),
        echo: WallTime(0),
        commit: true,
        initial: true,
    };
    let encoded = encode(&meta, [&record]);
    let head = crate::header_only(&encoded.head).unwrap();
    let placement = target.log.append(&target.tip, &encoded.tip, 4096).unwrap();
    target.media.store(placement.file_index, 0, placement.opens_segment.as_ref().unwrap());
    target.media.store(placement.file_index, placement.offset, &head);
    let recovered = target.media.recover(&target.checkpoint);
    assert!(recovered.cuts.iter().all(|cut| cut.header_only));
    assert_eq!(recovered.durable_tip, encoded.tip);
}

#[test]
fn a_voided_cut_in_a_reused_file_is_not_taken_for_the_segments_first() {
    let mut target = Target::new();
    target.append(0, true).unwrap();
    target.sync();
    target.void(0);
    let scan_start = target.log.reset();
    target.checkpoint = target.checkpoint.next(target.tip, scan_start);
    for _ in 0..FILES {
        target.append(8, true).unwrap();
        let pending = std::mem::take(&mut target.media.pending);
        // Of each new segment only its page reaches the media; one takes the place of the voided cut's.
        for (file, offset, bytes) in pending.iter().filter(|(_, offset, _)| *offset == 0) {
            target.media.store(*file, *offset, bytes);
        }
        assert_eq!(found(&target.media, &target.checkpoint), []);
        target.void(0);
    }
}
