//! Operations and faults, and the calm after them.

use protocol::Role;

use super::plan::{Fault, MILLISECOND, SECOND};
use super::site::{Answer, Operation, Stopping};
use super::world::{Event, World};

/// Which requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zone {
    HomeWrite,
    HomeRead,
    HomeSync,
    Redo,
    RedoRead,
    Intent,
    State,
    Cut,
    Spill,
    SpillRead,
    /// What is read from the spill file is not what was written.
    SpillRot,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    site: usize,
    zone: Zone,
    permille: u32,
    until: u64,
}

/// The spans in which requests fail.
#[derive(Debug, Default)]
pub(super) struct Errors(Vec<Window>);

impl Errors {
    pub(super) fn rate(&self, site: usize, zone: Zone, now: u64) -> u32 {
        let found = self
            .0
            .iter()
            .rev()
            .find(|window| window.site == site && window.zone == zone && window.until > now);
        found.map_or(0, |window| window.permille)
    }
}

impl World {
    /// Whether a request fails.
    pub(super) fn fails(&mut self, site: usize, operation: &Operation) -> bool {
        let homes = self.plan.volume_blocks.len();
        let spill = self.spill_file();
        let zone = match operation {
            Operation::Write { file, .. } | Operation::Sync { file, .. } if *file == spill => Zone::Spill,
            Operation::Read { file, .. } if *file == spill => Zone::SpillRead,
            Operation::Write { file, .. } if *file < homes => Zone::HomeWrite,
            Operation::Write { file, .. } if *file < 2 * homes => Zone::Intent,
            Operation::Sync { file, .. } if *file < homes => Zone::HomeSync,
            Operation::Write { .. } | Operation::Sync { .. } => Zone::Redo,
            Operation::Read { file, .. } if *file < homes => Zone::HomeRead,
            Operation::Persist(_) | Operation::Grow { .. } => Zone::State,
            Operation::Read { .. } => Zone::RedoRead,
            Operation::Nothing => return false,
        };
        let rate = self.errors.rate(site, zone, self.now);
        rate > 0 && self.random.chance(rate)
    }

    /// The byte of what is read that comes back changed, if one does.
    pub(super) fn rots(&mut self, site: usize, operation: &Operation) -> Option<usize> {
        let Operation::Read { file, length, .. } = operation else { return None };
        let rate = self.errors.rate(site, Zone::SpillRot, self.now);
        let rots = *file == self.spill_file() && rate > 0 && self.random.chance(rate);
        rots.then(|| super::size(self.random.below(*length)))
    }

    fn errors(&mut self, zone: Zone, permille: u32) {
        let site = if zone == Zone::Cut { 0 } else { self.random.index(2) };
        let until = self.now + self.random.below(SECOND);
        self.tell(|| format!("site {site}: {zone:?} fails at {permille} permille for a while"));
        self.errors.0.push(Window { site, zone, permille, until });
    }

    pub(super) fn fault_turn(&mut self) {
        if self.healing || self.now > self.plan.load_end || self.plan.faults.is_empty() {
            return;
        }
        let wait = self.random.below(2 * self.plan.fault_interval) + MILLISECOND;
        self.after(wait, Event::Fault);
        let fault = self.plan.faults[self.random.index(self.plan.faults.len())];
        self.apply_fault(fault);
    }

    fn apply_fault(&mut self, fault: Fault) {
        let boot_after = MILLISECOND * (1 + self.random.below([20, 500, 4000][self.random.clone().index(3)]));
        let (primary, secondary) = (self.site_in(Role::Primary), self.site_in(Role::Secondary));
        match fault {
            Fault::KillPrimary => self.crash(primary.unwrap_or(0), false, boot_after),
            Fault::KillSecondary => self.crash(secondary.unwrap_or(1), false, boot_after),
            Fault::PowerPrimary => self.crash(primary.unwrap_or(0), true, boot_after),
            Fault::PowerSecondary => self.crash(secondary.unwrap_or(1), true, boot_after),
            Fault::CleanStop => {
                let site = self.random.index(2);
                self.begin_stop(site);
            }
            Fault::CutLink => self.cut_link(boot_after),
            Fault::FlapLink => self.cut_link(MILLISECOND),
            Fault::SlowLink => {
                let longest = MILLISECOND * [1, 30, 300][self.random.index(3)];
                self.network.delay = (self.random.below(longest / 2), longest);
            }
            Fault::SlowDisk => {
                let site = self.random.index(2);
                self.sites[site].slowness = [10, 60][self.random.index(2)];
                let lasts = self.random.below(2 * SECOND);
                self.after(lasts, Event::DiskFast { site });
            }
            Fault::JumpClock => {
                let site = self.random.index(2);
                let step = self.random.below(100 * SECOND);
                let forward = self.random.chance(500);
                let known = &mut self.sites[site];
                known.wall_offset = if forward { known.wall_offset + step } else { known.wall_offset - step };
                known.wall_offset_max = known.wall_offset_max.max(known.wall_offset);
            }
            Fault::StopMirror => self.verb("stop", |group| group.stop().is_ok()),
            Fault::StartMirror => self.order_start(),
            Fault::Failover => self.order_failover(false),
            Fault::FailoverDead => self.order_failover(true),
            Fault::Rewind => self.order_rewind(),
            Fault::Drill => self.order_drill(),
            Fault::Switch => self.verb("switch", |group| group.switch().is_ok()),
            Fault::Orphans => self.order_orphans(),
            Fault::HomeErrors => self.errors(Zone::HomeWrite, 30),
            Fault::ReadErrors => {
                self.errors(Zone::HomeRead, 100);
                self.errors(Zone::RedoRead, 100);
            }
            Fault::HomeSyncErrors => self.errors(Zone::HomeSync, 100),
            Fault::RedoErrors => self.errors(Zone::Redo, 60),
            Fault::IntentErrors => self.errors(Zone::Intent, 200),
            Fault::StateErrors => self.errors(Zone::State, 400),
            Fault::DamageCuts => self.errors(Zone::Cut, 60),
            Fault::SpillErrors => {
                let zone = [Zone::Spill, Zone::SpillRead, Zone::SpillRot][self.random.index(3)];
                let rate = [100, 1000][self.random.index(2)];
                self.errors(zone, rate);
            }
            Fault::StopInOutage => {
                let outage =
                    MILLISECOND * (1 + self.random.below([50, 500, 3000][self.random.clone().index(3)]));
                self.cut_link(outage + boot_after);
                self.after(outage, Event::StopPrimary);
            }
            Fault::SlowSpill => self.slow_spill(),
            Fault::SetPolicy => self.order_policy(),
            Fault::Verify => self.order_verify(),
            Fault::Grow => self.order_growth(),
        }
    }

    fn slow_spill(&mut self) {
        let site = self.random.index(2);
        self.sites[site].spill_slowness = [10, 1000][self.random.index(2)];
        let lasts = self.random.below(3 * SECOND);
        self.after(lasts, Event::SpillFast { site });
    }

    fn cut_link(&mut self, lasts: u64) {
        if !self.network.up {
            return;
        }
        self.tell(|| format!("the link is cut for {} ms", lasts / MILLISECOND));
        self.network.up = false;
        let noticed = MILLISECOND * [1, 50, 2000][self.random.index(3)];
        self.sever_sessions(noticed);
        self.after(lasts, Event::LinkUp);
    }

    /// The running site that is in a role; of two primaries the one of the higher epoch.
    pub(super) fn site_in(&self, role: Role) -> Option<usize> {
        let fits = (0..2).filter(|site| self.sites[*site].is_up() && self.sites[*site].state.role == role);
        fits.max_by_key(|site| self.sites[*site].state.epoch)
    }

    fn verb(&mut self, name: &str, order: impl FnOnce(&mut daemon::group::Group) -> bool) {
        let Some(site) = self.site_in(Role::Primary).filter(|site| !self.is_stopping(*site)) else { return };
        let done = self.enter(site).is_some_and(order);
        self.tell(|| format!("an operator orders {name} at site {site}: {done}"));
        self.pump(site);
    }

    fn order_growth(&mut self) {
        if self.random.chance(100) {
            return self.verb("to give a growth up", |group| {
                group.give_up_growth();
                true
            });
        }
        let Some(site) = self.site_in(Role::Primary) else { return };
        let volume = self.random.index(self.plan.volume_blocks.len());
        let size = self.sites[site].sizes[volume];
        let most = self.plan.volume_blocks[volume];
        if size < most {
            let blocks = size + 1 + self.random.below(most - size);
            let index = block::VolumeIndex(u16::try_from(volume).unwrap_or(0));
            self.verb("growth", |group| group.grow(index, block::BlockCount(blocks).bytes()).is_ok());
        }
    }

    pub(super) fn order_start(&mut self) {
        if let Some(site) = self.site_in(Role::Primary) {
            self.sites[site].start_given = self.sites[site].state.epoch.0;
        }
        let local = self.random.chance(200);
        self.verb("start", |group| group.start(local).is_ok());
    }

    /// At a fenced side: which of its writes did the new primary never have?
    fn order_orphans(&mut self) {
        for site in 0..2 {
            let ordered = self.enter(site).is_some_and(|group| group.search_orphans().is_ok());
            self.sites[site].searching |= ordered;
            self.pump(site);
        }
    }

    fn order_failover(&mut self, primary_dies: bool) {
        let Some(site) = self.site_in(Role::Secondary).filter(|site| !self.is_stopping(*site)) else {
            return;
        };
        let Some(report) = self.enter(site).and_then(|group| group.loss(None).ok()) else { return };
        self.part_sites(site, primary_dies);
        if self.may_both_promote(site) {
            return self.pump(site);
        }
        let done = self.enter(site).is_some_and(|group| group.failover(None).is_ok());
        self.tell(|| format!("an operator orders failover at site {site}: {done}, {report:?}"));
        if done {
            self.statistics.promotions += 1;
            self.statistics.lossless += u64::from(report.zero);
            self.sites[site].forced_epoch = self.sites[site].state.epoch.0 + 1;
            self.sites[site].failover = Some((self.now, report.lost_at_most));
        }
        self.pump(site);
    }

    /// The primary dies, or the link to it.
    pub(super) fn part_sites(&mut self, secondary: usize, primary_dies: bool) {
        if primary_dies {
            let boot_after = SECOND * self.random.below(6) + MILLISECOND;
            let power = self.random.chance(500);
            self.crash(1 - secondary, power, boot_after);
        } else {
            let lasts = self.random.below(3 * SECOND);
            self.cut_link(lasts);
        }
    }

    /// The partner may be promoting itself into the same epoch: an operator who forces a failover now makes a fork, which
    /// is not this model's.
    pub(super) fn may_both_promote(&self, site: usize) -> bool {
        let (ours, other) = (&self.sites[site], &self.sites[1 - site]);
        let snapshot = other.group.as_ref().and_then(daemon::group::Group::mirror_snapshot);
        let changing =
            snapshot.and_then(|mirror| mirror.reason).is_some_and(|reason| reason.contains("changing"));
        let begun = other.state.role == Role::Primary && other.state.epoch > ours.state.epoch;
        let storing = other.pending.values().any(|pending| {
            let persists =
                matches!(&pending.operation, Operation::Persist(state) if state.epoch > ours.state.epoch);
            persists || matches!(pending.answer, Answer::Unlock)
        });
        begun || storing || (changing && other.state.role == Role::Secondary)
    }

    /// The faults end; what is down starts again.
    pub(super) fn heal(&mut self) {
        self.tell(|| "everything is healed".to_owned());
        self.healing = true;
        self.errors = Errors::default();
        self.network.up = true;
        self.network.delay = (50_000, 500_000);
        for site in 0..2 {
            self.sites[site].slowness = 1;
            self.sites[site].spill_slowness = 1;
            // A failed flush leaves a volume that only a restart heals.
            if self.needs_restart(site) {
                self.crash(site, false, MILLISECOND);
            }
            if !self.sites[site].is_up() {
                self.after(MILLISECOND, Event::Boot { site });
            }
        }
    }

    fn needs_restart(&self, site: usize) -> bool {
        let Some(group) = self.sites[site].group.as_ref() else { return false };
        let poisoned = group.volume_snapshots().iter().any(|volume| volume.poisoned);
        let stuck = group
            .mirror_snapshot()
            .and_then(|mirror| mirror.reason)
            .is_some_and(|reason| reason.contains("restart farshored"));
        self.sites[site].stopping == Stopping::No && (poisoned || stuck)
    }

    /// What an operator does in the calm: gives the starts that are asked for, restarts what asks for it.
    pub(super) fn operate(&mut self) {
        for site in 0..2 {
            if self.needs_restart(site) {
                self.crash(site, false, MILLISECOND);
                continue;
            }
            let snapshot = self.sites[site].group.as_ref().and_then(daemon::group::Group::mirror_snapshot);
            let asks = snapshot.is_some_and(|mirror| mirror.role == Role::Primary && mirror.needs_start);
            if asks && self.random.chance(200) {
                self.order_orphans();
            }
            if asks && self.site_in(Role::Primary) == Some(site) && self.random.chance(100) {
                self.order_start();
            }
        }
    }
}
