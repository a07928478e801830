//! What happens when the target falls behind: alerts, and what the mirror's policy does to hosts.
//!
//! Guarantees: an alert is told once when its part of the RPO budget is used up, and is over when the RPO is well below
//! it; under `bitmap` nothing here touches a host; under `pace` the limits are lowered by at most [`LOWERED_MAX`]
//! percent and come back by themselves; under `stop` no write begins while the RPO is, or may be, beyond the budget.
//! What hosts see of it is in docs/OPERATING.md, "When the partner falls behind".
//!
//! Nothing of this is durable and nothing needs to be: a held write is not answered, and after a restart an RPO that
//! is not known counts as beyond the budget until the partner has told what it holds.

use std::collections::VecDeque;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use block::{IopsLimit, Monotonic, VolumeIndex, WallTime};
use control::{LinkFailure, MirrorMode, Overload};

use super::effect::{Loudness, Outbox};
use super::primary::{Link, Primary};
use super::secondary::Secondary;
use super::{Group, Machine, Mirror, VerbRefused, VolumeSlot};

/// The parts of the budget, in percent, at which an alert is raised.
const ALERTS: [u8; 3] = [50, 80, 100];
/// An alert is over when the RPO is below so many percent of its part.
const HYSTERESIS: u64 = 90;
/// The most by which a limit is lowered, in percent.
pub const LOWERED_MAX: u8 = 10;
/// Where a limit begins to be lowered: percent of the RPO budget, or of the spill file (without one, of the ring). It is lowered fully at 100.
const PACE_FROM: u64 = 50;
/// Looks at the RPO are at most so far apart while something happens; a look walks all buckets of the RPO.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(5);
/// The rate of a volume without a limit is the highest of so many seconds with load,
const RATE_SAMPLES_MAX: usize = 60;
/// and known once there were so many: one alone may be cut short.
const RATE_SAMPLES_MIN: usize = 5;
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// What an operator may change of a mirror while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorPolicy {
    /// The RPO's objective.
    pub rpo_budget: Duration,
    /// What gives way when the target falls behind.
    pub overload: Overload,
    /// Under `stop`: how long writes wait before they are refused,
    pub hold: Duration,
    /// and how much payload of a volume may wait.
    pub hold_bytes: u64,
    /// The most bytes of cuts a second.
    pub bandwidth: Option<NonZeroU64>,
    /// The most bytes a second that copies and comparisons read.
    pub resync_rate: Option<NonZeroU64>,
    /// When a host's write is answered.
    pub mode: MirrorMode,
    /// What gives way when the partner of a synchronous mirror is away.
    pub on_link_failure: LinkFailure,
}

/// What hosts' writes meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writes {
    /// They are served.
    #[default]
    Served,
    /// They wait: the RPO budget is used up.
    Held,
    /// They are refused: it has been for too long.
    Refused,
}

/// How far behind the target is, and what is done about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// The highest part of the budget, in percent, for which an alert stands; 0 if none.
    pub alert: u8,
    /// The percentage by which limits are lowered.
    pub lowered: u8,
    /// What hosts' writes meet.
    pub writes: Writes,
}

/// The rate that a volume without a limit had before it was paced.
#[derive(Debug, Default)]
struct MeasuredRate {
    window: Option<(Monotonic, u64)>,
    samples: VecDeque<u32>,
    /// Fixed while it is paced: a rate measured then would be a lowered one.
    base: Option<NonZeroU32>,
}

impl MeasuredRate {
    fn sample(&mut self, now: Monotonic, tokens: u64) {
        let (since, before) = *self.window.get_or_insert((now, tokens));
        let passed = now.since(since);
        if passed < RATE_WINDOW {
            return;
        }
        self.window = Some((now, tokens));
        let rate = u128::from(tokens.saturating_sub(before)) * 1_000_000_000 / passed.as_nanos().max(1);
        if rate > 0 {
            if self.samples.len() >= RATE_SAMPLES_MAX {
                self.samples.pop_front();
            }
            self.samples.push_back(u32::try_from(rate).unwrap_or(u32::MAX));
        }
    }

    /// The rate to lower, once it is known.
    fn fix(&mut self) -> Option<NonZeroU32> {
        if self.base.is_none() && self.samples.len() >= RATE_SAMPLES_MIN {
            self.base = self.samples.iter().max().copied().and_then(NonZeroU32::new);
        }
        self.base
    }
}

/// The state of the looks.
#[derive(Debug, Default)]
pub(super) struct Watch {
    pressure: Pressure,
    looked_at: Option<Monotonic>,
    /// The next look that no event must bring about.
    look_at: Option<Monotonic>,
    refuses_at: Option<Monotonic>,
    rates: Vec<MeasuredRate>,
}

/// What a look sees.
struct Sight {
    /// `None` if it is not known.
    rpo: Option<Duration>,
    /// A lower bound of the RPO that is not known, as far as this process knows.
    rpo_at_least: Duration,
    /// Percent of the journal's memory in use; 100 when it does not hold everything.
    fill: u64,
    /// The policy applies: a primary that is meant to mirror and has a target with an image.
    applies: bool,
}

impl Watch {
    pub(super) const fn pressure(&self) -> Pressure {
        self.pressure
    }

    pub(super) const fn poll_timeout(&self) -> Option<Monotonic> {
        self.look_at
    }

    /// What was done to the volumes is not in force any more; a look follows at once.
    pub(super) fn volumes_replaced(&mut self) {
        self.pressure.lowered = 0;
        self.pressure.writes = Writes::Served;
        self.refuses_at = None;
        self.look_again();
    }

    pub(super) fn look_again(&mut self) {
        self.looked_at = None;
    }

    /// True if a look is due; else one is promised, since something has happened.
    fn is_due(&mut self, now: Monotonic, budget: Duration) -> bool {
        let Some(looked_at) = self.looked_at else {
            return true;
        };
        if now <= looked_at {
            return false;
        }
        let next = looked_at + (budget / 100).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL_MAX);
        let due = now >= next || self.look_at.is_some_and(|at| now >= at);
        if !due {
            self.look_at = Some(self.look_at.map_or(next, |at| at.min(next)));
        }
        due
    }

    /// Raises and ends alerts.
    fn alert(&mut self, percent: u64, rpo: Duration, policy: &MirrorPolicy, out: &mut Outbox) {
        let before = self.pressure.alert;
        let now = alert_at(percent, before);
        self.pressure.alert = now;
        let (rpo, budget) = (rpo.as_secs_f64(), policy.rpo_budget.as_secs_f64());
        if now > before {
            let loudness = if now >= 100 { Loudness::Error } else { Loudness::Warn };
            let text =
                format!("RPO alert: {now} % of the budget of {budget} s are used up, the RPO is {rpo:.3} s");
            out.log(loudness, text);
        } else if now < before {
            let text = format!("the RPO is {rpo:.3} s: the alert at {before} % of the budget is over");
            out.log(Loudness::Info, text);
        }
    }

    /// When the RPO, if it goes on to rise, reaches the next part of the budget at which something happens.
    fn next_look(&self, now: Monotonic, rpo: Duration, policy: &MirrorPolicy) -> Option<Monotonic> {
        let percent = percent_of(rpo, policy.rpo_budget);
        let alert = ALERTS.iter().map(|part| u64::from(*part)).find(|part| *part > percent);
        let pace = (policy.overload == Overload::Pace && percent < 100)
            .then(|| PACE_FROM.max(percent + 1).next_multiple_of(pace_step()));
        let part = [alert, pace].into_iter().flatten().min()?;
        let reached = policy.rpo_budget.saturating_mul(u32::try_from(part).unwrap_or(100)) / 100;
        Some(now + reached.saturating_sub(rpo) + Duration::from_micros(1))
    }
}

const fn pace_step() -> u64 {
    (100 - PACE_FROM) / 10
}

fn percent_of(rpo: Duration, budget: Duration) -> u64 {
    u64::try_from(rpo.as_nanos() * 100 / budget.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// The alert that stands at `percent` of the budget, after `before`.
fn alert_at(percent: u64, before: u8) -> u8 {
    let stands = |part: &u8| {
        let from = if *part > before { 100 } else { HYSTERESIS };
        percent.saturating_mul(100) >= u64::from(*part) * from
    };
    ALERTS.into_iter().rev().find(stands).unwrap_or(0)
}

/// By how many percent limits are lowered when so many percent of the budget or of the ring are used up.
fn lowered_at(percent: u64) -> u8 {
    let steps = percent.min(100).saturating_sub(PACE_FROM) / pace_step();
    u8::try_from(steps).unwrap_or(LOWERED_MAX).min(LOWERED_MAX)
}

fn lowered(limit: NonZeroU32, percent: u8) -> IopsLimit {
    let rest = u64::from(limit.get()) * u64::from(100 - percent.min(LOWERED_MAX));
    let rest = u32::try_from(rest.div_ceil(100)).unwrap_or(u32::MAX);
    IopsLimit::PerSecond(NonZeroU32::new(rest).unwrap_or(NonZeroU32::MIN))
}

impl Primary {
    fn sight(&self, consistent: bool, now: Monotonic) -> Sight {
        let rpo = self.rpo.rpo(now);
        let budget = self.ring.budget();
        let full = |used: u64, most: u64| used.saturating_mul(100) / most.max(1);
        let records = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let ring = full(self.ring.bytes(), budget.bytes_max)
            .max(full(records(self.ring.record_count()), records(budget.records_max)));
        // What must not fill up is the last tier that keeps the order.
        let spill = self.spill.space.capacity();
        let fill = if spill > 0 { full(self.spill.space.used_bytes(), spill) } else { ring };
        let folded = self.has_dirty() || self.folded_from.is_some();
        Sight {
            rpo: (consistent && !self.rpo.is_unknown()).then_some(rpo),
            rpo_at_least: rpo,
            fill: if folded { 100 } else { fill },
            applies: consistent && self.link != Link::Stopped,
        }
    }
}

impl Secondary {
    fn sight(&self, consistent: bool, stamp: WallTime) -> Sight {
        let echo = self.newest.map(|point| point.echo).filter(|echo| echo.0 > 0 && consistent);
        let rpo = echo.map(|echo| Duration::from_nanos(stamp.0.saturating_sub(echo.0)));
        Sight { rpo, rpo_at_least: Duration::ZERO, fill: 0, applies: false }
    }
}

impl Mirror {
    fn sight(&self, now: Monotonic, stamp: WallTime) -> Sight {
        match &self.machine {
            Machine::Primary(primary) => primary.sight(self.state.consistent, now),
            Machine::Secondary(secondary) => secondary.sight(self.state.consistent, stamp),
            Machine::Changing(_) => {
                Sight { rpo: None, rpo_at_least: Duration::ZERO, fill: 0, applies: false }
            }
        }
    }
}

impl Group {
    /// Looks whether the target has fallen behind, if a look is due.
    pub(super) fn watch(&mut self) {
        let (now, stamp) = (self.now, self.stamp);
        let Some(mirror) = &mut self.mirror else { return };
        let policy = mirror.settings.policy;
        if !mirror.watch.is_due(now, policy.rpo_budget) {
            return;
        }
        let sight = mirror.sight(now, stamp);
        let watch = &mut mirror.watch;
        watch.looked_at = Some(now);
        watch.look_at = None;
        if let Some(rpo) = sight.rpo {
            watch.alert(percent_of(rpo, policy.rpo_budget), rpo, &policy, &mut self.out);
        }
        watch.pace(&sight, &policy, &mut self.volumes, now);
        watch.stop(&sight, &policy, &mut self.volumes, now, &mut self.out);
        let rpo = sight.rpo.unwrap_or(sight.rpo_at_least);
        let rising = if rpo > Duration::ZERO { watch.next_look(now, rpo, &policy) } else { None };
        let refuses = watch.refuses_at.filter(|at| *at > now);
        watch.look_at = [rising, refuses].into_iter().flatten().min();
    }

    /// The RPO, or whether the policy applies, may have changed at once rather than with time: it is looked at in this turn.
    pub(super) fn look_at_rpo(&mut self) {
        if let Some(mirror) = &mut self.mirror {
            mirror.watch.look_again();
        }
    }

    /// Changes what the mirror's operator wants of it, at once.
    ///
    /// # Errors
    /// If the group has no mirror.
    pub fn set_policy(&mut self, policy: MirrorPolicy) -> Result<(), VerbRefused> {
        let now = self.now;
        let mirror =
            self.mirror.as_mut().ok_or_else(|| VerbRefused("the volume has no mirror".to_owned()))?;
        mirror.settings.policy = policy;
        mirror.watch.look_again();
        if let Machine::Primary(primary) = &mut mirror.machine {
            primary.bandwidth.set(policy.bandwidth, now);
            primary.copy_rate.set(policy.resync_rate, now);
        }
        Ok(())
    }

    /// How far behind the target is; `None` without a mirror.
    pub fn pressure(&self) -> Option<Pressure> {
        self.mirror.as_ref().map(|mirror| mirror.watch.pressure())
    }

    /// Gives hosts back what the policy of a mirror that ends has taken.
    pub(super) fn relieve(&mut self, now: Monotonic) {
        for slot in &mut self.volumes {
            slot.volume.set_limit(now, slot.config.limit);
            slot.volume.release_writes(now);
        }
    }

    /// The limit in force of a volume, for the simulator and for views.
    pub fn limit_in_force(&self, volume: VolumeIndex) -> Option<IopsLimit> {
        self.volumes.get(usize::from(volume.0)).map(|slot| slot.volume.limit())
    }
}

impl Watch {
    /// Lowers and raises the limits.
    fn pace(&mut self, sight: &Sight, policy: &MirrorPolicy, volumes: &mut [VolumeSlot], now: Monotonic) {
        let used = sight.rpo.map_or(0, |rpo| percent_of(rpo, policy.rpo_budget));
        let paces = policy.overload == Overload::Pace && sight.applies;
        let percent = if paces { lowered_at(used.max(sight.fill)) } else { 0 };
        self.pressure.lowered = percent;
        self.rates.resize_with(volumes.len(), MeasuredRate::default);
        for (slot, rate) in volumes.iter_mut().zip(&mut self.rates) {
            if percent == 0 {
                rate.base = None;
            }
            if rate.base.is_none() {
                rate.sample(now, slot.volume.tokens());
            }
            let base = match slot.config.limit {
                IopsLimit::PerSecond(limit) => Some(limit),
                IopsLimit::Unlimited if percent > 0 => rate.fix(),
                IopsLimit::Unlimited => None,
            };
            let wanted = match base {
                Some(limit) if percent > 0 => lowered(limit, percent),
                Some(_) | None => slot.config.limit,
            };
            if slot.volume.limit() != wanted {
                slot.volume.set_limit(now, wanted);
            }
        }
    }

    /// Holds and releases the writes.
    fn stop(
        &mut self,
        sight: &Sight,
        policy: &MirrorPolicy,
        volumes: &mut [VolumeSlot],
        now: Monotonic,
        out: &mut Outbox,
    ) {
        let before = self.pressure.writes;
        let used = sight.rpo.map(|rpo| percent_of(rpo, policy.rpo_budget));
        // What is not known may be beyond the budget. Once held, writes go on when the RPO is well below it.
        let limit = if before == Writes::Served { 100 } else { HYSTERESIS };
        let beyond = used.is_none_or(|used| used >= limit);
        if policy.overload != Overload::Stop || !sight.applies || !beyond {
            if before != Writes::Served {
                volumes.iter_mut().for_each(|slot| slot.volume.release_writes(now));
                self.pressure.writes = Writes::Served;
                self.refuses_at = None;
                out.log(Loudness::Info, "the policy 'stop' holds hosts' writes no longer".to_owned());
            }
            return;
        }
        if before == Writes::Served {
            volumes.iter_mut().for_each(|slot| slot.volume.hold_writes(now, policy.hold, policy.hold_bytes));
            self.refuses_at = Some(now + policy.hold);
            self.pressure.writes = Writes::Held;
            let why = match sight.rpo {
                Some(rpo) => format!("the RPO of {:.3} s has used up its budget", rpo.as_secs_f64()),
                None => "after a restart the RPO is not known before the partner answers".to_owned(),
            };
            let patience = policy.hold.as_secs_f64();
            let text = format!(
                "{why}: by the policy 'stop' hosts' writes wait now and are refused after {patience} s, until the \
                 partner has caught up"
            );
            out.log(Loudness::Error, text);
        }
        if self.pressure.writes == Writes::Held && self.refuses_at.is_some_and(|at| now >= at) {
            self.pressure.writes = Writes::Refused;
            let text = "hosts' writes are refused until the partner has caught up (policy 'stop'); 'farshore mirror \
                        set NAME --overload bitmap' lets them go on without it";
            out.log(Loudness::Error, text.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_stands_from_its_part_of_the_budget_until_well_below_it() {
        let mut alert = 0;
        let mut seen = Vec::new();
        for percent in [0, 49, 50, 46, 45, 44, 79, 80, 73, 71, 200, 91, 89, 44, 0, 100] {
            alert = alert_at(percent, alert);
            seen.push(alert);
        }
        assert_eq!(seen, [0, 0, 50, 50, 50, 0, 50, 80, 80, 50, 100, 100, 80, 0, 0, 100]);
    }

    #[test]
    fn a_limit_is_lowered_by_ten_percent_at_most() {
        assert_eq!((lowered_at(0), lowered_at(50), lowered_at(55), lowered_at(99)), (0, 0, 1, 9));
        assert_eq!((lowered_at(100), lowered_at(u64::MAX)), (10, 10));
        for limit in [1, 7, 750, 10_000, u32::MAX] {
            let IopsLimit::PerSecond(least) = lowered(NonZeroU32::new(limit).unwrap(), 10) else { panic!() };
            assert!(u64::from(least.get()) * 10 >= u64::from(limit) * 9, "{limit}: {least}");
        }
    }

    #[test]
    fn the_rate_of_an_unlimited_volume_is_the_highest_of_its_loaded_seconds() {
        let mut rate = MeasuredRate::default();
        let mut tokens = 0;
        for (second, load) in [0, 500, 0, 1000, 800, 900].into_iter().enumerate() {
            tokens += load;
            rate.sample(Monotonic(u64::try_from(second).unwrap() * 1_000_000_000), tokens);
        }
        assert_eq!(rate.fix(), None, "four seconds with load are too few");
        rate.sample(Monotonic(6_000_000_000), tokens + 10);
        assert_eq!(rate.fix().map(NonZeroU32::get), Some(1000));
        rate.sample(Monotonic(7_000_000_000), tokens + 5000);
        assert_eq!(rate.fix().map(NonZeroU32::get), Some(1000), "fixed while it is paced");
    }
}
