//! Ring and spill against the naive model of one ordered list.

use std::num::NonZeroU32;

use block::{ByteCount, ByteRange, ChainHash, IopsLimit, MirrorId, SiteId, Tip, VolumeId, VolumeIndex};
use engine::intent_map::IntentMap;
use journal::RecordKind;
use proptest::prelude::*;
use protocol::{GroupState, SenderChain};

use super::super::effect::{Effect, IoId};
use super::super::{CleanState, GroupVolume, MirrorPolicy, Overload};
use super::*;

const PAGE: u64 = 4096;
const VOLUME: ByteCount = ByteCount(1 << 20);

fn settings(spill_bytes: u64) -> MirrorSettings {
    let volume = GroupVolume {
        id: VolumeId::from_bytes([3; 16]),
        size: VOLUME,
        limit: IopsLimit::PerSecond(NonZeroU32::MIN),
    };
    MirrorSettings {
        mirror: MirrorId::from_bytes([2; 16]),
        site: SiteId::from_bytes([1; 16]),
        volumes: vec![volume],
        ring: RingBudget { bytes_max: 32 * PAGE, records_max: 64 },
        spill_bytes,
        cut_bytes: 4 * PAGE,
        cut_interval: Duration::from_millis(1),
        region_bytes: 1 << 16,
        intent_budget_regions: 100,
        start_grace: Duration::ZERO,
        retention: crate::group::Retention::default(),
        policy: MirrorPolicy {
            rpo_budget: Duration::from_secs(900),
            overload: Overload::Bitmap,
            hold: Duration::ZERO,
            hold_bytes: 0,
            bandwidth: None,
            resync_rate: None,
            mode: crate::group::MirrorMode::Async,
            on_link_failure: crate::group::LinkFailure::Degrade,
        },
    }
}

fn new_primary(settings: &MirrorSettings, clean: CleanState) -> Primary {
    let state = GroupState::new_primary(settings.site);
    let intent = IntentMap::new(settings.volumes[0].id, VOLUME, ByteCount(settings.region_bytes));
    let clean = clean.usable(settings, &state);
    let mut primary = Primary::new(settings, &state, vec![intent], Some(clean), Monotonic(0));
    primary.admission_open = true;
    if primary.chain.is_none() {
        let tip = Tip { position: state.start_position(), chain: ChainHash([9; 32]) };
        primary.chain = Some(SenderChain::new(tip));
    }
    primary
}

fn write(sequence: u64, pages: u64) -> Record {
    let byte = u8::try_from(sequence % 251).unwrap();
    Record {
        sequence: Sequence(sequence),
        volume: VolumeIndex(0),
        kind: if pages == 0 { RecordKind::Trim } else { RecordKind::Write },
        range: ByteRange::new(sequence % 200 * PAGE, pages.max(1) * PAGE).unwrap(),
        payload: Bytes::from(vec![byte; usize::try_from(pages * PAGE).unwrap()]),
    }
}

/// A primary, its spill file, and the list that its journal should be.
struct World {
    settings: MirrorSettings,
    primary: Primary,
    out: Outbox,
    file: Vec<u8>,
    asked: Vec<(IoId, IoRequest)>,
    now: Monotonic,
    /// Every record that was assigned and not acknowledged, in order.
    model: VecDeque<Record>,
    acked: u64,
}

impl World {
    fn new(spill_bytes: u64) -> Self {
        let settings = settings(spill_bytes);
        let primary = new_primary(&settings, CleanState::default());
        Self {
            primary,
            out: Outbox::default(),
            file: vec![0; usize::try_from(spill_bytes).unwrap()],
            asked: Vec::new(),
            now: Monotonic(0),
            model: VecDeque::new(),
            acked: 0,
            settings,
        }
    }

    fn push(&mut self, pages: u64) {
        let sequence = self.primary.take_sequence(self.now);
        let record = write(sequence.0, pages);
        let folded = self.primary.folded_from.is_some();
        if folded || self.primary.journal(record.clone()).is_err() {
            self.primary.volume(VolumeIndex(0)).current.set(record.range);
            self.primary.folded_from.get_or_insert(sequence);
        }
        self.model.push_back(record);
        self.turn();
    }

    fn turn(&mut self) {
        self.primary.spill_turn(&self.settings, self.now, WallTime(self.now.0 + 1), &mut self.out);
        self.collect();
        self.check();
    }

    fn collect(&mut self) {
        while let Some(effect) = self.out.pop() {
            if let Effect::Io { io, request } = effect {
                self.asked.push((io, request));
            }
        }
    }

    /// The target acknowledges records that the ring holds.
    fn acknowledge(&mut self, count: usize) {
        let limit = self.primary.cut_limit();
        let through = self.model.iter().take_while(|record| record.sequence <= limit).take(count).last();
        let Some(through) = through.map(|record| record.sequence) else { return };
        let held: Vec<Record> = self.primary.ring.records(Sequence(self.acked), through).cloned().collect();
        let wanted: Vec<Record> =
            self.model.iter().take_while(|record| record.sequence <= through).cloned().collect();
        assert_eq!(held, wanted, "what is sent is the list's front");
        self.primary.ring.release(through);
        self.model.drain(..wanted.len());
        self.acked = through.0;
        self.turn();
    }

    fn answer(&mut self, index: usize, fails: bool, damaged: bool) {
        if self.asked.is_empty() {
            return;
        }
        let (io, request) = self.asked.swap_remove(index % self.asked.len());
        let failure = fails.then_some(IoFailure { operation: "io", errno: 5 });
        let purpose = self.out.answered(io).unwrap();
        let at = |offset: u64, length: u64| {
            usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap()
        };
        match (purpose, request) {
            (Purpose::SpillWrite { key }, IoRequest::SpillWrite { offset, data }) => {
                let data = data.concat();
                let range = at(offset, u64::try_from(data.len()).unwrap());
                if !fails {
                    self.file[range].copy_from_slice(&data);
                }
                self.primary.spill_written(key, failure, self.now, &mut self.out);
            }
            (Purpose::SpillRead { key }, IoRequest::SpillRead { offset, length }) => {
                let mut data = self.file[at(offset, length)].to_vec();
                data[77] ^= u8::from(damaged);
                let result = failure.map_or(Ok(Bytes::from(data)), Err);
                self.primary.spill_read(key, result, &self.settings, &mut self.out);
            }
            (purpose, _) => panic!("{purpose:?}"),
        }
        self.turn();
    }

    /// Every record is in the ring, behind it, or in the dirty map; and memory is bounded.
    fn check(&mut self) {
        let budget = self.settings.ring;
        assert!(self.primary.ring.bytes() + self.primary.spill.held_bytes() <= budget.bytes_max);
        let limit = self.primary.cut_limit();
        let folded = self.primary.folded_from;
        for record in &self.model {
            let sequence = record.sequence;
            if folded.is_some_and(|first| sequence >= first) {
                let map = &self.primary.volumes[0].current;
                assert!(map.contains(record.range.first_block()), "{sequence} folded");
            } else if sequence <= limit {
                let found: Vec<&Record> =
                    self.primary.ring.records(Sequence(sequence.0 - 1), sequence).collect();
                assert_eq!(found, [record], "{sequence} is in the ring");
            } else {
                assert!(self.primary.spill.is_pending(), "{sequence} lies behind the ring");
            }
        }
        if folded.is_none() {
            let backlog: u64 = self.model.iter().map(Record::payload_bytes).sum();
            assert_eq!(self.primary.ring.bytes() + self.primary.spill.backlog_bytes(), backlog);
        }
    }

    fn drain(&mut self) {
        for _ in 0..2000 {
            self.answer(0, false, false);
            self.acknowledge(3);
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Push(u64),
    Acknowledge(usize),
    Answer { index: usize, fails: bool, damaged: bool },
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (0..5_u64).prop_map(Step::Push),
        6 => (1..6_usize).prop_map(Step::Acknowledge),
        9 => (0..9_usize).prop_map(|index| Step::Answer { index, fails: false, damaged: false }),
        1 => (0..9_usize, 0..5_u8).prop_map(|(index, fault)| Step::Answer { index, fails: fault == 0, damaged: fault == 1 }),
        1 => Just(Step::Wait),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn ring_and_spill_are_one_ordered_list_until_they_fold(
        steps in steps(),
        spill_pages in prop_oneof![Just(0_u64), Just(16), Just(200)],
    ) {
        let mut world = World::new(spill_pages * PAGE);
        for step in steps {
            match step {
                Step::Push(pages) => world.push(pages),
                Step::Acknowledge(count) => world.acknowledge(count),
                Step::Answer { index, fails, damaged } => world.answer(index, fails, damaged),
                Step::Wait => {
                    world.now = world.now + BROKEN_WAIT;
                    world.turn();
                }
            }
        }
        world.drain();
        prop_assert!(!world.primary.spill.is_pending(), "the way back up needs no help");
        prop_assert_eq!(world.primary.spill.space.used_bytes(), 0);
        prop_assert!(world.primary.ring.is_empty());
        let end = world.primary.folded_from.map_or(world.primary.last, |first| Sequence(first.0 - 1));
        prop_assert!(world.acked >= end.0 || world.primary.last.0 == 0);
    }
}

/// Pushes more than memory holds; writes are answered as they come.
fn spilled(pages: u64) -> World {
    let mut world = World::new(200 * PAGE);
    for _ in 0..pages {
        world.push(1);
        while world.asked.iter().any(|(_, request)| matches!(request, IoRequest::SpillWrite { .. })) {
            world.answer(0, false, false);
        }
    }
    world
}

#[test]
fn a_long_outage_spills_and_then_folds() {
    let world = spilled(80);
    assert!(world.primary.spill.is_pending());
    assert_eq!(world.primary.folded_from, None);
    let mut world = spilled(400);
    let first = world.primary.folded_from.unwrap();
    assert!(first.0 > 100, "the file was used before: {first}");
    world.drain();
    assert_eq!(world.acked, first.0 - 1, "the spilled prefix is sent");
}

#[test]
fn a_disk_that_does_not_answer_only_makes_records_fold() {
    let mut world = World::new(200 * PAGE);
    for _ in 0..100 {
        world.push(1);
    }
    assert!(world.primary.folded_from.is_some());
    world.drain();
    assert_eq!(world.acked, world.primary.folded_from.unwrap().0 - 1);
}

#[test]
fn a_write_in_flight_at_home_is_not_spilled_and_can_be_voided() {
    let mut world = spilled(20);
    let sequence = world.primary.last.next();
    world.push(1);
    world.primary.spill.void(sequence);
    let kinds: Vec<RecordKind> = world.primary.spill.tail.iter().map(|record| record.kind).collect();
    assert_eq!(kinds.last(), Some(&RecordKind::Void));
}

fn stop(world: &mut World, fails: bool) -> CleanState {
    world.primary.keep_journal();
    world.asked.clear();
    for _ in 0..500 {
        world.primary.keep_turn(&world.settings, true, WallTime(1), &mut world.out);
        world.collect();
        let Some((io, request)) = world.asked.pop() else { break };
        if matches!(request, IoRequest::SpillSync) {
            let purpose = world.out.answered(io);
            assert_eq!(purpose, Some(Purpose::SpillSync));
            let failure = fails.then_some(IoFailure { operation: "sync", errno: 5 });
            world.primary.spill_synced(failure, &mut world.out);
        } else {
            world.asked.push((io, request));
            let index = world.asked.len() - 1;
            let (io, request) = world.asked.swap_remove(index);
            if let (Some(Purpose::SpillWrite { key }), IoRequest::SpillWrite { offset, data }) =
                (world.out.answered(io), request)
            {
                let data = data.concat();
                let offset = usize::try_from(offset).unwrap();
                world.file[offset..offset + data.len()].copy_from_slice(&data);
                world.primary.spill_written(key, None, world.now, &mut world.out);
            }
        }
    }
    assert!(!world.primary.spill.keeping.is_under_way());
    world.turn();
    assert!(world.asked.is_empty(), "what is put away stays there");
    world.primary.clean_state().unwrap()
}

#[test]
fn a_clean_stop_is_continued_with_every_record() {
    for pages in [3, 20, 80] {
        let mut world = spilled(pages);
        world.acknowledge(2);
        let acked =
            Tip { position: world.primary.start.at(Sequence(world.acked)), chain: ChainHash([9; 32]) };
        world.primary.chain = Some(SenderChain::new(acked));
        let clean = stop(&mut world, false);
        assert!(clean.journal.is_some() && clean.dirty[0].is_empty());
        let last = world.primary.last;
        world.primary = new_primary(&world.settings, clean);
        world.out = Outbox::default();
        world.asked.clear();
        assert_eq!((world.primary.last, world.primary.folded_from), (last, None));
        world.push(1);
        world.drain();
        assert_eq!(world.acked, last.0 + 1);
        assert!(world.primary.volumes[0].current.is_empty());
    }
}

#[test]
fn a_journal_that_cannot_be_kept_or_used_folds() {
    let covered = |world: &World, clean: &CleanState| {
        world.model.iter().all(|record| clean.dirty[0].contains(record.range.first_block()))
    };
    let mut world = spilled(80);
    let clean = stop(&mut world, true);
    assert!(clean.journal.is_none() && covered(&world, &clean), "the flush failed");
    let mut world = spilled(80);
    let clean = stop(&mut world, false);
    let state = GroupState::new_primary(world.settings.site);
    let smaller = clean.clone().usable(&settings(64 * PAGE), &state);
    assert!(smaller.journal.is_none() && covered(&world, &smaller), "the file has another size");
    let later = GroupState { incarnation: state.incarnation.next(), ..state };
    let later = clean.usable(&world.settings, &later);
    assert!(later.journal.is_none() && covered(&world, &later), "another incarnation");
}
