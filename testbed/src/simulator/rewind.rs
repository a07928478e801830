//! Rewinds: an operator fails over to a point of the retention window, and what the window promises.

use block::{Position, Sequence, WallTime};
use daemon::group::RewindTo;
use protocol::Role;

use super::plan::{Fault, SECOND};
use super::world::World;
use super::{oracle, wide};

impl World {
    /// An operator goes back to some point, in the window or not.
    pub(super) fn order_rewind(&mut self) {
        let Some(site) = self.site_in(Role::Secondary).filter(|site| !self.is_stopping(*site)) else {
            return;
        };
        let Some(snapshot) = self.enter(site).and_then(|group| group.mirror_snapshot()) else { return };
        let back = u64::try_from(self.plan.retention.window.as_nanos()).unwrap_or(SECOND);
        let at = if self.random.chance(500) {
            let time = self.wall(site).0 - self.random.below(back + back / 4 + SECOND / 100);
            RewindTo::Time(WallTime(time))
        } else {
            let tip = snapshot.position.sequence.0;
            let oldest = snapshot.window.and_then(|window| window.oldest);
            let first = oldest.map_or(0, |(position, _)| position.sequence.0).min(tip);
            RewindTo::Sequence(Sequence(first + self.random.below(tip - first + 2)))
        };
        let report = self.enter(site).map(|group| group.loss(at.into()));
        let Some(Ok(report)) = report else {
            self.tell(|| format!("a rewind of site {site} to {at:?} is refused: {report:?}"));
            return self.check_refusal(site, at);
        };
        self.check_choice(site, at, &report.recovery_point);
        let dies = self.random.chance(500);
        self.part_sites(site, dies);
        if self.may_both_promote(site) {
            return self.pump(site);
        }
        let done = self.enter(site).is_some_and(|group| group.failover(Some(at)).is_ok());
        self.tell(|| format!("an operator orders a rewind of site {site} to {at:?}: {done}, {report:?}"));
        if done {
            self.statistics.promotions += 1;
            self.statistics.rewinds += 1;
            self.sites[site].failover = Some((self.now, report.lost_at_most));
            self.sites[site].rewind = Some(report.recovery_point);
            self.sites[site].forced_epoch = self.sites[site].state.epoch.0 + 1;
        }
        self.pump(site);
    }

    /// The chosen point is at or before what was asked for.
    fn check_choice(&mut self, site: usize, at: RewindTo, point: &Position) {
        match at {
            RewindTo::Sequence(sequence) if point.sequence > sequence => {
                self.fail(format!("site {site} would go to {point} instead of {sequence}"));
            }
            RewindTo::Sequence(_) => {}
            RewindTo::Time(time) => {
                // A jump of the clock moves the times; after a restart they are known to within the link's delay.
                let exact = !self.plan.faults.contains(&Fault::JumpClock) && self.sites[site].process == 1;
                let newest = self.oracle.newest_in(oracle::key(point), point.sequence.0);
                let newest = newest.filter(|_| exact).map_or(0, |at| at + self.sites[site].wall_offset);
                if newest > time.0 {
                    self.fail(format!(
                        "site {site} would go to {point}, which holds a write issued {} ns after {}",
                        newest - time.0,
                        time.0
                    ));
                }
            }
        }
    }

    /// Only what lies outside the window is refused.
    fn check_refusal(&mut self, site: usize, at: RewindTo) {
        let stamp = self.wall(site);
        let Some(snapshot) = self.enter(site).and_then(|group| group.mirror_snapshot()) else { return };
        let (Some((oldest, seen)), RewindTo::Time(time)) =
            (snapshot.window.and_then(|window| window.oldest), at)
        else {
            return;
        };
        if time >= seen && time <= stamp {
            self.fail(format!(
                "site {site} refuses {} although {oldest} of {} is in its window",
                time.0, seen.0
            ));
        }
    }

    /// A primary begins an epoch at its fork: only an ordered rewind leaves out what was acknowledged. True if it did.
    pub(super) fn check_fork(&mut self, site: usize, fork: &Position) -> bool {
        let rewind = self.sites[site].rewind.take();
        let Some(acked) = self.sites[site].acked_tip.filter(|acked| fork.order(acked).is_lt()) else {
            return false;
        };
        if rewind != Some(*fork) {
            self.fail(format!(
                "site {site} begins an epoch at {fork} although it acknowledged {acked} (rewind: {rewind:?})"
            ));
            return false;
        }
        self.sites[site].acked_tip = Some(*fork);
        self.oracle.rewound.insert(self.sites[site].state.epoch.0);
        true
    }

    /// The oldest point of the window is what it claims to be: home and the cuts up to it.
    pub(super) fn check_window(&mut self, site: usize) {
        let snapshot = self.enter(site).and_then(|group| group.mirror_snapshot());
        let Some((point, _)) = snapshot.and_then(|snapshot| snapshot.window?.oldest) else { return };
        if !self.has_image(site, &point) || self.was_planted() {
            return;
        }
        let image = self.exposed_at(site, &self.sites[site].files, Some(&point));
        self.statistics.images += 1;
        self.note(wide(image.hashes.len()));
        let (lineage, sequence) = (oracle::key(&point), point.sequence.0);
        self.compare_image(site, lineage, sequence, &image.hashes, "the window's oldest point");
    }
}
