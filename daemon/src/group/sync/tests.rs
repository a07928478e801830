//! The primary's part of synchronous mirroring, without disks and without a partner.

use block::{ByteCount, ByteRange, ChainHash, IopsLimit, MirrorId, SiteId, Tip, VolumeId, WallTime};
use engine::intent_map::IntentMap;
use engine::volume::Content;
use journal::RingBudget;
use protocol::{Ack, SenderChain};

use super::super::effect::{IoRequest, Purpose};
use super::super::{CleanState, GroupVolume, Overload, Retention};
use super::*;

const PAGE: u64 = 4096;
const VOLUME: VolumeIndex = VolumeIndex(0);
const SESSION: SessionId = SessionId(1);
const SIZE: ByteCount = ByteCount(1 << 20);

fn at(milliseconds: u64) -> Monotonic {
    Monotonic(milliseconds * 1_000_000)
}

struct World {
    settings: MirrorSettings,
    state: GroupState,
    primary: Primary,
    out: Outbox,
    steps: u64,
}

impl World {
    fn new(on_link_failure: LinkFailure, leased: bool) -> Self {
        let limit = IopsLimit::Unlimited;
        let settings = MirrorSettings {
            mirror: MirrorId::from_bytes([2; 16]),
            site: SiteId::from_bytes([1; 16]),
            volumes: vec![GroupVolume { id: VolumeId::from_bytes([3; 16]), size: SIZE, limit }],
            ring: RingBudget { bytes_max: 32 * PAGE, records_max: 64 },
            spill_bytes: 0,
            cut_bytes: 4 * PAGE,
            cut_interval: Duration::from_millis(50),
            region_bytes: 1 << 16,
            intent_budget_regions: 100,
            start_grace: Duration::ZERO,
            retention: Retention::default(),
            policy: MirrorPolicy {
                rpo_budget: Duration::from_secs(900),
                overload: Overload::Bitmap,
                hold: Duration::from_secs(2),
                hold_bytes: 0,
                bandwidth: None,
                resync_rate: None,
                mode: MirrorMode::Sync,
                on_link_failure,
            },
        };
        let state =
            GroupState { consistent: true, leased, ..GroupState::new_primary(SiteId::from_bytes([1; 16])) };
        let intent = IntentMap::new(settings.volumes[0].id, SIZE, ByteCount(settings.region_bytes));
        let clean = CleanState::default().usable(&settings, &state);
        let mut primary = Primary::new(&settings, &state, vec![intent], Some(clean), at(0));
        primary.admission_open = true;
        let tip = Tip { position: state.start_position(), chain: ChainHash([9; 32]) };
        primary.chain = Some(SenderChain::new(tip));
        Self { settings, state, primary, out: Outbox::default(), steps: 0 }
    }

    fn up(&mut self) {
        self.primary.link = Link::Up { session: SESSION };
        self.primary.sync.welcomed();
    }

    fn down(&mut self, now: u64) {
        self.primary.session_closed(SESSION, "cut", at(now), &mut self.out);
    }

    /// One turn; what is to be stored of leases is stored at once.
    fn turn(&mut self, now: u64) -> (usize, usize) {
        let stored = self.primary.sync_step(&self.settings, &self.state, false, at(now), &mut self.out);
        if let Some(leased) = stored {
            self.state.leased = leased;
        }
        self.primary.send_cuts(&self.settings, at(now), WallTime(now), &mut self.out);
        let (answered, refused) = self.primary.sync_answers(at(now));
        (answered.len(), refused.len())
    }

    /// A host's write takes its sequence and ends at home. True if its answer waits.
    fn write(&mut self, now: u64) -> bool {
        self.steps += 1;
        let step = StepId(self.steps);
        let range = ByteRange::new(self.steps % 200 * PAGE, PAGE).unwrap();
        let data = bytes::Bytes::from(vec![1; 4096]);
        self.primary.admit(VOLUME, step, range, Content::Sealed, Some(data));
        let mut admitted = self.primary.poll_admitted(at(now), &mut self.out);
        for (io, request) in self.requests() {
            assert!(matches!(request, IoRequest::IntentWrite { .. }));
            let Some(Purpose::Intent { volume, page, generation }) = self.out.answered(io) else { panic!() };
            assert!(self.primary.intent_written(volume, page, generation, true).is_empty());
            admitted.extend(self.primary.poll_admitted(at(now), &mut self.out));
        }
        assert_eq!(admitted, [(VOLUME, step)]);
        let waits = self.primary.waits_for_target(VOLUME, step, false, at(now));
        self.primary.ended(VOLUME, step, true, at(now), &mut self.out);
        waits
    }

    fn requests(&mut self) -> Vec<(super::super::IoId, IoRequest)> {
        let mut requests = Vec::new();
        let mut others = Vec::new();
        while let Some(effect) = self.out.pop() {
            if let Effect::Io { io, request } = effect {
                requests.push((io, request));
            } else {
                others.push(effect);
            }
        }
        others.into_iter().for_each(|effect| self.out.push(effect));
        requests
    }

    /// The target acknowledges all that was sent.
    fn receive(&mut self, now: u64) {
        let tip = self.primary.chain.as_ref().unwrap().last();
        let ack = Ack { tip, staged: false, applied: Sequence(0), clock: WallTime(1) };
        self.primary.message(SESSION, Message::Ack(ack), &self.settings, &self.state, at(now), &mut self.out);
    }

    /// The control messages that were sent, and the sessions that were closed.
    fn said(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        while let Some(effect) = self.out.pop() {
            if let Effect::Send { frame, .. } = &effect {
                said.push(format!("{:?}", Message::decode(frame).unwrap()));
            } else if let Effect::CloseSession { .. } = &effect {
                said.push("closed".to_owned());
            } else if let Effect::Log { loudness: loudness @ (Loudness::Warn | Loudness::Error), .. } =
                &effect
            {
                said.push(format!("{loudness:?}"));
            }
        }
        said
    }

    fn together(on_link_failure: LinkFailure) -> Self {
        let mut world = Self::new(on_link_failure, false);
        world.up();
        assert!(!world.write(0), "it is answered at home before it is in force");
        assert_eq!(world.turn(0), (0, 0));
        assert!(world.primary.sync.holds() && !world.state.leased, "that write is not received");
        world.receive(1);
        world.turn(1);
        assert!(world.state.leased);
        assert_eq!(world.said(), [] as [&str; 0], "nothing is offered before it is stored");
        world.turn(2);
        assert_eq!(world.said(), ["LeaseOffer"]);
        world
    }

    fn ask(&mut self, now: u64) -> bool {
        self.primary.lease_asked(SESSION, at(77), at(now), &mut self.out);
        self.said().iter().any(|said| said.starts_with("LeaseGrant"))
    }
}

#[test]
fn an_answer_waits_for_the_target_and_the_record_for_nothing() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.ask(10));
    assert!(world.write(20));
    let sent = world.primary.chain.as_ref().unwrap().outstanding();
    assert_eq!(world.turn(20), (0, 0));
    assert_eq!(world.primary.chain.as_ref().unwrap().outstanding(), sent + 1, "it is sent at once");
    assert_eq!(world.primary.rpo.rpo(at(25)), Duration::ZERO, "no host was told of it");
    world.receive(30);
    assert_eq!(world.turn(30), (1, 0));
    assert_eq!(world.primary.rpo.rpo(at(35)), Duration::ZERO);
}

#[test]
fn a_cut_does_not_wait_for_the_home_write() {
    let mut world = World::together(LinkFailure::Degrade);
    world.steps += 1;
    let (step, range) = (StepId(world.steps), ByteRange::new(PAGE, PAGE).unwrap());
    world.primary.admit(VOLUME, step, range, Content::Zeros, None);
    assert_eq!(world.primary.poll_admitted(at(20), &mut world.out).len(), 1, "its region is hot");
    world.turn(20);
    world.receive(30);
    // The target was faster than the device: the answer waits for nothing any more.
    assert!(!world.primary.waits_for_target(VOLUME, step, false, at(40)));
}

#[test]
fn a_lost_partner_is_waited_for_until_its_lease_is_over() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.ask(1000));
    assert!(world.write(1100));
    world.turn(1100);
    world.down(1200);
    assert_eq!(world.turn(1200), (0, 0));
    assert_eq!(world.primary.sync.poll_timeout(), Some(at(6000)));
    assert_eq!(world.turn(5999), (0, 0));
    assert!(world.write(5999));
    assert_eq!(world.turn(6000), (2, 0));
    assert_eq!(world.said(), ["Warn"]);
    assert!(!world.write(6001));
}

#[test]
fn a_silent_partner_is_left_when_its_lease_is_over() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.ask(1000));
    assert!(world.write(1500));
    world.turn(1500);
    // It asks, but receives nothing.
    assert!(world.ask(2400));
    assert!(!world.ask(2600), "a host waits for too long");
    assert_eq!(world.turn(7399), (0, 0));
    assert_eq!(world.turn(7400), (0, 0));
    assert_eq!(world.said(), ["closed"]);
    assert_eq!(world.turn(7401), (1, 0));
    assert_eq!(world.said(), ["Warn"]);
}

#[test]
fn a_partner_that_is_back_in_time_costs_a_pause_only() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.ask(1000));
    world.down(1200);
    assert!(world.write(1300));
    assert_eq!(world.turn(1300), (0, 0));
    world.up();
    assert_eq!(world.turn(1400), (0, 0), "it is not received yet");
    world.receive(1500);
    assert_eq!(world.turn(1500), (1, 0));
    assert_eq!(world.said(), ["LeaseOffer"]);
}

#[test]
fn a_pass_begins_only_when_the_lease_was_given_back() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.ask(1000));
    world.primary.volume(VOLUME).current.set(ByteRange::new(0, PAGE).unwrap());
    assert!(!world.ask(1001), "no lease while it is to be left");
    assert!(world.write(1001));
    world.turn(1002);
    assert_eq!(world.said(), ["closed"]);
    assert!(world.primary.pass.is_none());
    world.up();
    assert_eq!(world.turn(1100), (1, 0));
    assert!(world.primary.pass.is_some());
}

#[test]
fn without_a_lease_nothing_is_waited_for() {
    let mut world = World::together(LinkFailure::Degrade);
    assert!(world.write(10));
    world.settings.policy.mode = MirrorMode::Async;
    assert_eq!(world.turn(11), (1, 0));
    assert_eq!(world.said(), [] as [&str; 0]);
    // It is noted that none is held.
    world.turn(12);
    assert!(!world.state.leased);
}

#[test]
fn a_restart_waits_for_the_lease_of_before() {
    let mut world = World::new(LinkFailure::Degrade, true);
    assert!(world.write(100));
    assert_eq!(world.turn(4999), (0, 0));
    assert_eq!(world.turn(5000), (1, 0));
    let mut world = World::new(LinkFailure::Degrade, true);
    assert!(world.write(100));
    world.up();
    world.turn(200);
    world.receive(201);
    assert_eq!(world.turn(201), (1, 0), "a welcome says that there is none");
}

#[test]
fn under_stop_writes_are_refused_and_served_again_when_the_partner_is_back() {
    let mut world = World::together(LinkFailure::Stop);
    assert!(world.ask(1000));
    world.down(1200);
    assert!(world.write(1300));
    world.turn(1300);
    assert_eq!(world.turn(6000), (0, 0), "the lease is over, the patience is not");
    assert_eq!(world.primary.sync.poll_timeout(), Some(at(8000)));
    assert_eq!(world.turn(8000), (0, 1));
    assert_eq!(world.said(), ["Error"]);
    assert!(world.primary.sync.refuses() && world.primary.sync.poll_timeout().is_none());
    world.up();
    world.turn(9000);
    assert!(!world.primary.sync.refuses());
    world.receive(9001);
    world.turn(9001);
    assert!(world.write(9002));
    world.turn(9002);
    world.receive(9003);
    assert_eq!(world.turn(9003), (1, 0));
}

#[test]
fn under_stop_nothing_is_answered_after_a_restart_without_the_partner() {
    let mut world = World::new(LinkFailure::Stop, false);
    world.turn(0);
    assert_eq!(world.primary.sync.poll_timeout(), Some(at(0)));
    world.turn(0);
    assert!(world.write(1));
    assert_eq!(world.turn(1999), (0, 0));
    assert_eq!(world.turn(2000), (0, 1));
    // An operator's word.
    world.settings.policy.on_link_failure = LinkFailure::Degrade;
    world.turn(2001);
    assert!(!world.write(2002));
}

#[test]
fn a_write_waits_for_room_in_the_ring_rather_than_fold() {
    let mut world = World::together(LinkFailure::Degrade);
    for _ in 0..16 {
        assert!(world.write(10));
    }
    let range = ByteRange::new(0, PAGE).unwrap();
    let data = bytes::Bytes::from(vec![1; 4096]);
    world.primary.admit(VOLUME, StepId(99), range, Content::Sealed, Some(data));
    assert!(world.primary.poll_admitted(at(11), &mut world.out).is_empty());
    world.turn(11);
    world.receive(12);
    assert_eq!(world.primary.poll_admitted(at(12), &mut world.out), [(VOLUME, StepId(99))]);
    assert!(!world.primary.has_dirty());
}
