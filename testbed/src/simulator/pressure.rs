//! Policies on overload: operators change them, and what they may and must do to hosts is checked.

use std::num::NonZeroU64;
use std::time::Duration;

use block::{IopsLimit, VolumeIndex};

use daemon::group::{LOWERED_MAX, LinkFailure, MirrorMode, MirrorPolicy, Overload, Writes};
use protocol::{MirrorState, Role};

use super::plan::SECOND;
use super::site::Outstanding;
use super::world::World;
use crate::harness::Random;

/// An alert and a stop may come so much after the RPO has passed its mark: a look and a timer.
fn slack(policy: &MirrorPolicy) -> Duration {
    (policy.rpo_budget / 100).clamp(Duration::from_millis(5), Duration::from_secs(1))
        + Duration::from_millis(2)
}

fn rate(random: &mut Random) -> Option<NonZeroU64> {
    NonZeroU64::new([0, 0, 300_000, 4 << 20][random.index(4)])
}

pub(super) fn draw(random: &mut Random) -> MirrorPolicy {
    MirrorPolicy {
        rpo_budget: Duration::from_millis([100, 1000, 900_000][random.index(3)]),
        overload: [Overload::Bitmap, Overload::Bitmap, Overload::Pace, Overload::Stop][random.index(4)],
        hold: Duration::from_millis([0, 50, 2000][random.index(3)]),
        hold_bytes: [4096, 1 << 20][random.index(2)],
        bandwidth: rate(random),
        resync_rate: rate(random),
        mode: [MirrorMode::Async, MirrorMode::Sync][random.index(2)],
        on_link_failure: [LinkFailure::Degrade, LinkFailure::Degrade, LinkFailure::Stop][random.index(3)],
    }
}

/// What a site has sent or copied beyond its rate: a bucket of the model's own.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Owed {
    bytes: u64,
    at: u64,
}

impl Owed {
    /// An item goes. False if it goes before the ones before it are paid for, but for a burst and for `late` bytes that
    /// were paid for and had to wait.
    fn spend(&mut self, rate: NonZeroU64, now: u64, bytes: u64, late: u64) -> bool {
        let passed = u128::from(now - self.at.min(now)) * u128::from(rate.get()) / u128::from(SECOND);
        let owed = self.bytes.saturating_sub(u64::try_from(passed).unwrap_or(u64::MAX));
        *self = Self { bytes: owed + bytes, at: now };
        // 20 ms, a token, and the rounding of both.
        owed <= rate.get() / 50 + 4 * 4096 + late
    }
}

impl World {
    /// A site sends a cut or reads to copy or compare: not above the rate that its operator gave it.
    pub(super) fn check_rate(&mut self, site: usize, copy: bool, bytes: u64) {
        let policy = self.sites[site].policy;
        let rate = if copy { policy.resync_rate } else { policy.bandwidth };
        let now = self.now;
        // Copies are paid for before they have their locks: 16 of them and 4 of a verify, 64 blocks each.
        let late = if copy { 20 * 64 * 4096 } else { 0 };
        if let Some(rate) = rate
            && !self.sites[site].owed[usize::from(copy)].spend(rate, now, bytes, late)
        {
            let what = if copy { "copies" } else { "sends" };
            self.fail(format!("site {site} {what} more than {rate} bytes a second"));
        }
    }

    /// An operator changes a site's policy.
    pub(super) fn order_policy(&mut self) {
        let site = self.random.index(2);
        let policy = draw(&mut self.random);
        self.tell(|| format!("an operator orders {policy:?} at site {site}"));
        self.sites[site].policy = policy;
        self.sites[site].owed = [Owed::default(); 2];
        if self.enter(site).is_some_and(|group| group.set_policy(policy).is_ok()) {
            self.pump(site);
        }
    }

    /// After each turn: hosts are touched as the policy says, and not otherwise.
    pub(super) fn check_pressure(&mut self, site: usize) {
        let policy = self.sites[site].policy;
        let Some(group) = self.sites[site].group.as_ref() else {
            self.sites[site].held_since = None;
            return;
        };
        let Some(pressure) = group.pressure() else { return };
        let floor = self.plan.iops.map(|limit| u64::from(limit) * u64::from(100 - LOWERED_MAX));
        let limits = (0..self.plan.volume_blocks.len())
            .filter_map(|volume| group.limit_in_force(VolumeIndex(u16::try_from(volume).unwrap_or(0))));
        let too_low = limits.into_iter().any(|limit| match limit {
            IopsLimit::PerSecond(limit) => floor.is_some_and(|floor| u64::from(limit.get()) * 100 < floor),
            IopsLimit::Unlimited => false,
        });
        let allowed = (policy.overload == Overload::Stop || pressure.writes == Writes::Served)
            && (policy.overload == Overload::Pace || pressure.lowered == 0)
            && pressure.lowered <= LOWERED_MAX
            && !too_low;
        let now = self.now;
        let held = &mut self.sites[site].held_since;
        *held = (pressure.writes != Writes::Served).then(|| held.unwrap_or(now));
        if !allowed {
            self.fail(format!("site {site} has {policy:?} and does {pressure:?} to its hosts"));
        }
    }

    /// A host was told that its command is done.
    pub(super) fn check_not_held(&mut self, site: usize, known: &Outstanding) {
        let pressure = self.sites[site].group.as_ref().and_then(daemon::group::Group::pressure);
        let held = pressure.is_some_and(|pressure| pressure.writes != Writes::Served);
        if held && self.sites[site].held_since.is_some_and(|since| known.submitted > since) {
            self.fail(format!("site {site} answered {:?} while writes are held", known.command));
        }
    }

    /// Now and then: alerts and stops stand where the RPO says so.
    pub(super) fn check_alert(&mut self, site: usize) {
        let policy = self.sites[site].policy;
        let Some(snapshot) = self.enter(site).and_then(|group| group.mirror_snapshot()) else { return };
        // A target's RPO follows its calendar clock, which jumps without anything happening.
        let rpo = snapshot.rpo.filter(|_| snapshot.role == Role::Primary);
        let Some(rpo) = rpo.and_then(|rpo| rpo.checked_sub(slack(&policy))) else { return };
        let used = rpo.as_nanos() * 100 / policy.rpo_budget.as_nanos();
        if u128::from(snapshot.pressure.alert)
            < [100, 80, 50].into_iter().find(|part| used >= *part).unwrap_or(0)
        {
            self.fail(format!("site {site}: no alert though the RPO is {rpo:?} of {policy:?}: {snapshot:?}"));
        }
        let stopped_by_operator = snapshot.state == MirrorState::ConsistentStopped;
        let must_hold = policy.overload == Overload::Stop && !stopped_by_operator && used >= 100;
        if must_hold && snapshot.pressure.writes == Writes::Served {
            self.fail(format!("site {site}: writes go on though the RPO is {rpo:?} of {policy:?}"));
        }
    }
}
