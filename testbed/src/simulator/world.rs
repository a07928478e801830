//! The event loop.

use std::collections::{BTreeMap, VecDeque};

use block::{IopsLimit, MirrorId, Monotonic, SiteId, VolumeId, WallTime};
use daemon::group::{Group, GroupVolume, MirrorSettings, Retention, SessionId};
use protocol::Message;

use super::fault::Errors;
use super::network::{Network, Side, Stream};
use super::oracle::Oracle;
use super::plan::{MILLISECOND, Plan, SECOND};
use super::site::{Site, Stopping};
use super::verifying::Planted;
use super::{Statistics, oracle, wide};
use crate::harness::Random;

/// A healed world must be equal after so long.
const CONVERGENCE_MAX: u64 = 400 * SECOND;
const EVENTS_MAX: u64 = 3_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Io { site: usize, key: u64 },
    Deliver { session: u64, to: usize, stream: Stream },
    Closed { session: u64, side: usize },
    Dial { site: usize, process: u64 },
    Timer { site: usize, process: u64, at: u64 },
    Host,
    Fault,
    Boot { site: usize },
    LinkUp,
    DiskFast { site: usize },
    SpillFast { site: usize },
    StopPrimary,
    Check,
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) random: Random,
    pub(super) now: u64,
    pub(super) events: BTreeMap<(u64, u64), Event>,
    order: u64,
    pub(super) sites: [Site; 2],
    pub(super) network: Network,
    pub(super) oracle: Oracle,
    pub(super) errors: Errors,
    pub(super) healing: bool,
    pub(super) keys: u64,
    pub(super) commands: u64,
    /// Blocks that a primary said it cannot read.
    pub(super) bad: std::collections::BTreeSet<usize>,
    /// What was corrupted on purpose.
    pub(super) planted: Planted,
    /// Hosts write until then although everything is healed.
    pub(super) load_again_until: u64,
    /// The most blocks of each volume that a primary has shown to hosts.
    pub(super) shown: Vec<u64>,
    pub(super) hash: u64,
    pub(super) trace: Option<VecDeque<String>>,
    trace_lines: usize,
    pub(super) failure: Option<String>,
    pub(super) statistics: Statistics,
}

pub(super) const MIRROR: MirrorId = MirrorId::from_bytes([0x4d; 16]);

pub(super) fn site_id(site: usize) -> SiteId {
    SiteId::from_bytes([if site == 0 { 0x0a } else { 0x0b }; 16])
}

pub(super) fn volume_id(volume: usize) -> VolumeId {
    VolumeId::from_bytes([u8::try_from(volume).unwrap_or(0) + 1; 16])
}

impl World {
    pub(super) fn new(seed: u64, trace_lines: usize) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::new(&mut random);
        let sites = [Self::new_site(&plan, 0), Self::new_site(&plan, 1)];
        let shown = plan.first_blocks.clone();
        Self {
            plan,
            random,
            now: SECOND,
            events: BTreeMap::new(),
            order: 0,
            sites,
            network: Network::new(),
            oracle: Oracle::default(),
            errors: Errors::default(),
            healing: false,
            keys: 0,
            commands: 0,
            bad: std::collections::BTreeSet::new(),
            planted: Planted::default(),
            load_again_until: 0,
            shown,
            hash: seed,
            trace: (trace_lines > 0).then(VecDeque::new),
            trace_lines,
            failure: None,
            statistics: Statistics::default(),
        }
    }

    pub(super) fn note(&mut self, value: u64) {
        self.hash = (self.hash.rotate_left(11) ^ value).wrapping_mul(0x2545_f491_4f6c_dd1d);
    }

    pub(super) fn tell(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            if trace.len() >= self.trace_lines {
                trace.pop_front();
            }
            trace.push_back(format!(
                "{:>14.6} {}",
                std::time::Duration::from_nanos(now).as_secs_f64(),
                text()
            ));
        }
    }

    pub(super) fn fail(&mut self, text: String) {
        self.tell(|| format!("FAILURE {text}"));
        self.failure.get_or_insert(text);
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.order += 1;
        self.events.insert((self.now + delay, self.order), event);
    }

    pub(super) fn limit(&self) -> IopsLimit {
        let limit = self.plan.iops.and_then(std::num::NonZeroU32::new);
        limit.map_or(IopsLimit::Unlimited, IopsLimit::PerSecond)
    }

    pub(super) fn settings(&self, site: usize) -> MirrorSettings {
        let limit = self.limit();
        let volumes = self.sites[site].sizes.iter().enumerate().map(|(index, blocks)| GroupVolume {
            id: volume_id(index),
            size: block::BlockCount(*blocks).bytes(),
            limit,
        });
        MirrorSettings {
            mirror: MIRROR,
            site: site_id(site),
            volumes: volumes.collect(),
            ring: self.plan.ring,
            spill_bytes: self.plan.spill_bytes,
            cut_bytes: self.plan.cut_bytes,
            cut_interval: self.plan.cut_interval,
            region_bytes: self.plan.region_bytes,
            intent_budget_regions: self.plan.intent_budget_regions,
            start_grace: self.plan.start_grace,
            // An operator changes the setting between two starts now and then.
            retention: if self.sites[site].process % 5 == 4 {
                Retention::default()
            } else {
                self.plan.retention
            },
            policy: self.sites[site].policy,
        }
    }

    pub(super) fn monotonic(&self, site: usize) -> Monotonic {
        Monotonic(self.now + self.sites[site].monotonic_offset)
    }

    pub(super) fn wall(&self, site: usize) -> WallTime {
        WallTime(self.now + self.sites[site].wall_offset)
    }

    /// The group of a running site, its clocks told.
    pub(super) fn enter(&mut self, site: usize) -> Option<&mut Group> {
        let (now, wall) = (self.monotonic(site), self.wall(site));
        let group = self.sites[site].group.as_mut()?;
        group.set_clocks(now, wall);
        Some(group)
    }

    pub(super) fn run(&mut self) {
        self.create();
        self.after(0, Event::Host);
        self.after(self.plan.fault_interval, Event::Fault);
        self.after(MILLISECOND, Event::Check);
        while self.failure.is_none() {
            let Some(((at, _), event)) = self.events.pop_first() else { break };
            self.now = at;
            self.statistics.events += 1;
            if self.statistics.events > EVENTS_MAX {
                self.fail("too many events".to_owned());
            }
            if !self.healing && self.now >= self.plan.load_end + SECOND {
                self.heal();
            }
            if self.healing && event == Event::Check && self.is_converged() && self.is_verified() {
                self.check_final();
                return;
            }
            if self.healing && self.now > self.plan.load_end + CONVERGENCE_MAX {
                let states = self.describe();
                self.fail(format!("not equal after {} s of calm: {states}", CONVERGENCE_MAX / SECOND));
            }
            self.handle(event);
        }
    }

    pub(super) fn handle(&mut self, event: Event) {
        self.note(self.now);
        match event {
            Event::Io { site, key } => self.complete(site, key),
            Event::Deliver { session, to, stream } => self.deliver(session, to, stream),
            Event::Closed { session, side } => self.closed(session, side),
            Event::Dial { site, process } => self.dial(site, process),
            Event::Timer { site, process, at } => self.timer(site, process, at),
            Event::Host => self.host_turn(),
            Event::Fault => self.fault_turn(),
            Event::Boot { site } => self.boot(site),
            Event::LinkUp => {
                self.tell(|| "the link is up".to_owned());
                self.network.up = true;
            }
            Event::DiskFast { site } => self.sites[site].slowness = 1,
            Event::SpillFast { site } => self.sites[site].spill_slowness = 1,
            Event::StopPrimary => {
                if let Some(site) = self.site_in(protocol::Role::Primary).filter(|_| !self.healing) {
                    self.begin_stop(site);
                }
            }
            Event::Check => self.periodic_check(),
        }
    }

    fn timer(&mut self, site: usize, process: u64, at: u64) {
        if self.sites[site].process != process || self.sites[site].timer_at != Some(at) {
            return;
        }
        self.sites[site].timer_at = None;
        if let Some(group) = self.enter(site) {
            group.handle_time();
            self.pump_after_timer(site);
        }
    }

    /// Performs what the group of `site` asks for, then sets its timer.
    pub(super) fn pump(&mut self, site: usize) {
        self.sites[site].spins = 0;
        self.pump_after_timer(site);
    }

    fn pump_after_timer(&mut self, site: usize) {
        while let Some(effect) = self.sites[site].group.as_mut().and_then(Group::poll_effect) {
            self.perform(site, effect);
            if self.failure.is_some() {
                return;
            }
        }
        self.note_lineage(site);
        self.check_pressure(site);
        self.stop_when_drained(site);
        let deadline = self.sites[site].group.as_ref().and_then(Group::poll_timeout);
        let Some(deadline) = deadline.filter(|deadline| deadline.0 < u64::MAX) else { return };
        let deadline = deadline.0.saturating_sub(self.sites[site].monotonic_offset);
        if deadline <= self.now {
            self.sites[site].spins += 1;
            if self.sites[site].spins > 3 {
                let states = self.describe();
                self.fail(format!(
                    "site {site} spins: its deadline has passed and nothing is done about it: {states}"
                ));
            }
        }
        let at = deadline.max(self.now + 1000);
        if self.sites[site].timer_at.is_none_or(|known| at < known || known <= self.now) {
            self.sites[site].timer_at = Some(at);
            let process = self.sites[site].process;
            self.after(at - self.now, Event::Timer { site, process, at });
        }
    }

    /// Notes that a site is the primary of a lineage that it was not the primary of before.
    pub(super) fn note_lineage(&mut self, site: usize) {
        let Some(state) = self.sites[site].group.as_ref().and_then(Group::mirror_state) else { return };
        let lineage = (state.epoch.0, state.incarnation.0);
        let serves = state.role == protocol::Role::Primary && state.incarnation.0 > 0;
        if !serves || self.sites[site].lineage == Some(lineage) || self.sites[site].state != *state {
            return;
        }
        let fork = state.fork();
        // A restarted process shows its old incarnation until the new one is durable.
        if self.oracle.knows(lineage) {
            return;
        }
        self.sites[site].lineage = Some(lineage);
        // A new primary has full buckets.
        self.sites[site].owed = Default::default();
        let base = self.home_hashes(site);
        if let Some((ordered_at, loss)) = self.sites[site].failover.take() {
            self.check_promotion(site, &fork, ordered_at, loss, &base);
        } else if !self.oracle.knows_epoch(lineage.0)
            && lineage.0 > 1
            && self.sites[site].forced_epoch < lineage.0
        {
            self.check_switch(site, &fork, &base);
        }
        let rewound = self.check_fork(site, &fork);
        if !self.oracle.knows_epoch(lineage.0) {
            let sizes = self.sites[site].sizes.clone();
            if rewound {
                // To before a growth, perhaps: hosts see what there was then.
                self.shown.clone_from(&sizes);
            }
            self.check_sizes(site, &sizes, "promotion");
            (0..sizes.len()).for_each(|volume| self.resized(site, volume));
            // What the new epoch does not contain is lost, or an orphan.
            self.oracle.acked.iter_mut().for_each(std::collections::VecDeque::clear);
            self.oracle.history.iter_mut().for_each(Vec::clear);
        }
        self.tell(|| format!("site {site} begins lineage {lineage:?}"));
        if let Err(text) = self.oracle.begin(lineage, site, base) {
            self.fail(text);
        }
    }

    pub(super) fn home_hashes(&self, site: usize) -> Vec<u64> {
        let volumes = self.plan.volume_blocks.len();
        let homes = self.sites[site].files.iter().take(volumes);
        homes.flat_map(|file| file.current().chunks_exact(4096).map(oracle::hash)).collect()
    }

    /// The number of a volume's first block among all blocks.
    pub(super) fn first_block(&self, volume: usize) -> usize {
        super::size(self.plan.volume_blocks.iter().take(volume).sum::<u64>())
    }

    // ---- network ----

    fn dial(&mut self, site: usize, process: u64) {
        if self.sites[site].process != process || !self.sites[site].is_up() {
            return;
        }
        let other = 1 - site;
        if self.network.up && self.sites[other].is_up() && self.sites[other].stopping == Stopping::No {
            let side = |site: usize, process| Side { site, process, open: true };
            let session = self.network.open(side(site, process), side(other, self.sites[other].process));
            self.tell(|| format!("session {session} opens: site {site} dialed"));
            if let Some(group) = self.enter(site) {
                group.dialed(SessionId(session));
            }
        } else if let Some(group) = self.enter(site) {
            group.dial_failed("the partner cannot be reached");
        }
        self.pump(site);
    }

    pub(super) fn network_delay(&mut self) -> u64 {
        let (shortest, longest) = self.network.delay;
        shortest + self.random.below(longest - shortest + 1)
    }

    fn deliver(&mut self, session: u64, to: usize, stream: Stream) {
        let Some(known) = self.network.sessions.get_mut(&session) else { return };
        let side = known.sides[to];
        if known.severed || !side.open || self.sites[side.site].process != side.process {
            return;
        }
        let crowded = self.sites[side.site].group.as_ref().is_some_and(Group::is_crowded);
        if stream == Stream::Data && crowded {
            return self.after(MILLISECOND, Event::Deliver { session, to, stream });
        }
        let greeting = to == 1 && stream == Stream::Control && !known.greeted;
        if greeting {
            known.greeted = true;
        }
        let Some(frame) = self.network.receive(session, to, stream) else { return };
        self.note(wide(frame.len()));
        let id = SessionId(session);
        if stream == Stream::Data {
            let frame = self.maybe_damage(frame);
            if let Some(group) = self.enter(side.site) {
                group.cut(id, frame);
            }
            return self.pump(side.site);
        }
        let message = match Message::decode(&frame) {
            Ok(message) => message,
            Err(error) => return self.fail(format!("a control frame does not decode: {error}")),
        };
        self.tell(|| format!("site {} hears on {session}: {message:?}", side.site));
        let told = if let Message::Hello(hello) = &message {
            hello.position.epoch.0
        } else if let Message::Refuse(refuse) = &message {
            refuse.epoch.0
        } else {
            0
        };
        let heard = &mut self.sites[side.site].heard_epoch;
        *heard = told.max(*heard);
        let Some(group) = self.enter(side.site) else { return };
        if let (Message::Hello(hello), true) = (&message, greeting) {
            group.greeted(id, hello.clone());
        } else {
            group.message(id, message);
        }
        self.pump(side.site);
    }

    fn closed(&mut self, session: u64, side: usize) {
        let Some(known) = self.network.sessions.get_mut(&session) else { return };
        let Side { site, process, open } = known.sides[side];
        known.sides[side].open = false;
        if !open || self.sites[site].process != process {
            return;
        }
        self.tell(|| format!("site {site} hears that session {session} closed"));
        if let Some(group) = self.enter(site) {
            group.session_closed(SessionId(session), "the connection was lost");
            self.pump(site);
        }
    }

    /// Both sides of every session will notice, each at its time; nothing more is delivered.
    pub(super) fn sever_sessions(&mut self, noticed_within: u64) {
        let open: Vec<u64> = self
            .network
            .sessions
            .iter()
            .filter(|(_, session)| !session.severed && session.sides.iter().any(|side| side.open))
            .map(|(id, _)| *id)
            .collect();
        for session in open {
            if let Some(known) = self.network.sessions.get_mut(&session) {
                known.severed = true;
            }
            for side in 0..2 {
                let delay = self.random.below(noticed_within);
                self.after(delay, Event::Closed { session, side });
            }
        }
    }
}
