//! The retention window: the last committed cuts stay in redo for a while, so that a failover can go back to any of
//! them without undo I/O (docs/protocols/replication.md, "Retention window").
//!
//! Guarantees: home never holds a part of a cut that ends behind the checkpoint's durable limit, so after any crash it
//! is known which cuts can still be left out; the window gives way, and nothing else, when redo grows beyond what the
//! space or the time for a failover allows. The points of the window are ends of committed cuts, never the middle of a
//! resync.

use std::time::Duration;

use block::{Monotonic, Position, Sequence, Tip, WallTime};
use engine::overlay::CutNumber;
use journal::Cursor;

use super::apply::ApplyItem;
use super::secondary::Secondary;
use super::{MirrorSettings, VerbRefused};

/// The limit is raised for so long ahead: that many fewer writes of the checkpoint, and that much less window.
const LIMIT_STEP: Duration = Duration::from_secs(1);
/// Cuts and changes that may wait: bounds the memory of queue and overlay to about 64 MiB.
const CHANGES_MAX: u64 = 1 << 19;
/// The apply rate before one was measured, bytes a second.
const RATE_FIRST: u64 = 64 << 20;
/// What was measured counts half after so long.
const RATE_SPAN: Duration = Duration::from_secs(10);

/// How long committed cuts are kept back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// A cut is applied when it is so old; zero applies at once.
    pub window: Duration,
    /// What waits must be applied within this time at a failover.
    pub failover_within: Duration,
}

/// A point to which a failover can go: the end of a committed cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Where.
    pub tip: Tip,
    /// By this side's own clock: everything that hosts were told before is in it.
    pub echo: WallTime,
    /// By this side's own clock: nothing in it was written later. 0 is not known yet.
    pub seen: WallTime,
}

/// Where a rewind goes: the last point at or before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RewindTo {
    /// By this side's clock.
    Time(WallTime),
    /// In the tip's epoch and incarnation.
    Sequence(Sequence),
}

/// The true window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSnapshot {
    /// The oldest point that a failover can go to, and this side's clock then.
    pub oldest: Option<(Position, WallTime)>,
    /// How far back that is.
    pub span: Duration,
    /// Bytes that wait to be applied.
    pub waiting_bytes: u64,
}

/// What the applier may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// Apply whatever is committed.
    #[default]
    Nothing,
    /// Keep the window.
    Window,
    /// A promotion: apply up to this cut and nothing behind it.
    Until(CutNumber),
}

/// The last cut that may have reached home.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Begun {
    pub(super) number: CutNumber,
    /// Where it ends in redo.
    pub(super) end: Cursor,
    /// `None` if home at its end is no point: inside a resync, or nothing is known.
    pub(super) point: Option<Point>,
}

/// Sizes of what waits to be applied.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waiting {
    bytes: u64,
    changes: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, item: &ApplyItem) {
        self.bytes += item.placement.length;
        self.changes += Self::weight(item);
    }

    pub(super) fn subtract(&mut self, item: &ApplyItem) {
        self.bytes = self.bytes.saturating_sub(item.placement.length);
        self.changes = self.changes.saturating_sub(Self::weight(item));
    }

    fn weight(item: &ApplyItem) -> u64 {
        1 + u64::try_from(item.changes.len()).unwrap_or(u64::MAX)
    }
}

/// Bytes applied in the time that applying them took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ApplyRate {
    bytes: u64,
    nanoseconds: u64,
}

impl ApplyRate {
    pub(super) fn measured(&mut self, bytes: u64, took: Duration) {
        self.bytes += bytes;
        self.nanoseconds += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if u128::from(self.nanoseconds) > RATE_SPAN.as_nanos() {
            self.bytes /= 2;
            self.nanoseconds /= 2;
        }
    }

    fn bytes_within(self, time: Duration) -> u64 {
        let rate = if self.bytes == 0 || self.nanoseconds == 0 {
            u128::from(RATE_FIRST)
        } else {
            u128::from(self.bytes) * 1_000_000_000 / u128::from(self.nanoseconds)
        };
        u64::try_from(rate.saturating_mul(time.as_millis()) / 1000).unwrap_or(u64::MAX)
    }
}

/// The points of recovered committed cuts: of each, its own echo or an older, higher one; and as its time the next
/// later stamp that a later cut echoes, for the primary heard that one only after it had closed this cut's writes.
pub(super) fn recovered_points(cuts: &[journal::RecoveredCut]) -> Vec<Option<Point>> {
    let mut echo = WallTime(0);
    let mut points: Vec<Option<Point>> = cuts
        .iter()
        .map(|cut| {
            echo = echo.max(cut.meta.echo);
            let is_point = cut.meta.commit && !cut.meta.initial;
            is_point.then_some(Point { tip: cut.tip, echo, seen: WallTime(0) })
        })
        .collect();
    let (mut seen, mut newest) = (WallTime(0), echo);
    for point in points.iter_mut().rev().flatten() {
        if point.echo < newest {
            seen = newest;
            newest = point.echo;
        }
        point.seen = seen;
    }
    points
}

impl Secondary {
    /// Gives recovered cuts their times, now that the clocks are known.
    pub(super) fn settle(&mut self, settings: &MirrorSettings, now: Monotonic, stamp: WallTime) {
        if self.settled {
            return;
        }
        self.settled = true;
        let window = settings.retention.window;
        let mut due = now;
        // From the newest on: the cuts of a resync go home with the one that commits them.
        for item in self.queue.iter_mut().rev() {
            if let Some(point) = &mut item.point {
                if point.seen.0 == 0 {
                    point.seen = stamp;
                }
                let age = Duration::from_nanos(stamp.0.saturating_sub(point.seen.0));
                due = now + window.saturating_sub(age);
            }
            item.due = due;
        }
        if let Some(point) = &mut self.begun.point
            && point.seen.0 == 0
        {
            point.seen = stamp;
        }
        if let Some(point) = &mut self.newest
            && point.seen.0 == 0
        {
            point.seen = stamp;
        }
    }

    /// The bytes of redo that may wait.
    fn budget(&self, settings: &MirrorSettings) -> u64 {
        // The other half is for a resync, and for what arrives while the window gives way.
        let space = self.log.capacity_bytes() / 2;
        space.min(self.rate.bytes_within(settings.retention.failover_within))
    }

    /// How many cuts at the front of the queue may be applied now, as far as `bytes_max` goes (one at least).
    pub(super) fn ready(&self, settings: &MirrorSettings, now: Monotonic, bytes_max: u64) -> usize {
        let excess = self.waiting.bytes.saturating_sub(self.budget(settings));
        let excess_changes = self.waiting.changes.saturating_sub(CHANGES_MAX);
        let mut before = Waiting::default();
        let mut ready = 0;
        for item in &self.queue {
            let may = match self.hold {
                Hold::Until(last) => item.number <= last,
                Hold::Nothing | Hold::Window => {
                    let waits =
                        self.is_held_by_drill(item.number) || (self.hold == Hold::Window && item.due > now);
                    !waits
                        || self.applying.hurry
                        || item.number <= self.begun.number
                        || before.bytes < excess
                        || before.changes < excess_changes
                }
            };
            if !may || (ready > 0 && before.bytes + item.placement.length > bytes_max) {
                break;
            }
            before.add(item);
            ready += 1;
        }
        ready
    }

    /// The limit that the next checkpoint needs before the front of the queue may be written home; `None` if the
    /// present one allows it.
    pub(super) fn wanted_limit(&self, settings: &MirrorSettings, now: Monotonic) -> Option<Cursor> {
        let limit = self.checkpoint.limit;
        if self.is_unlimited() {
            return Some(self.limit_ahead(settings, now));
        }
        let front = self.queue.front()?;
        let beyond = front.placement.end() > limit;
        match self.hold {
            Hold::Nothing => beyond.then_some(Cursor::END),
            Hold::Until(last) => {
                let through = self.queue.iter().take_while(|item| item.number <= last).last();
                beyond.then(|| through.map_or(Cursor::END, |item| item.placement.end()))
            }
            Hold::Window => beyond.then(|| self.limit_ahead(settings, now)),
        }
    }

    /// The limit says nothing although a window is to be kept: a crash now would leave none, so it is written at once.
    pub(super) fn is_unlimited(&self) -> bool {
        self.hold == Hold::Window && self.checkpoint.limit == Cursor::END
    }

    /// The end of the cuts that will be applied soon.
    pub(super) fn limit_ahead(&self, settings: &MirrorSettings, now: Monotonic) -> Cursor {
        let ready = self.ready(settings, now, u64::MAX);
        let soon = now + LIMIT_STEP;
        let due = self.queue.iter().take_while(|item| item.due <= soon).count();
        let count = ready.max(due);
        let last = count.checked_sub(1).and_then(|index| self.queue.get(index));
        last.map_or(self.checkpoint.scan_start, |item| item.placement.end()).max(self.begun.end)
    }

    /// When the front of the queue becomes due, if it waits for that.
    pub(super) fn poll_window(&self) -> Option<Monotonic> {
        let waits = |item: &&ApplyItem| self.hold == Hold::Window && !self.is_held_by_drill(item.number);
        self.queue.front().filter(waits).map(|item| item.due)
    }

    /// The points that a failover can go to, oldest first.
    pub(super) fn points(&self) -> impl DoubleEndedIterator<Item = (CutNumber, Point)> {
        let begun = self.begun;
        let epoch = self.tip().position.epoch;
        let home = begun.point.map(|point| (begun.number, point));
        let waiting = self
            .queue
            .iter()
            .filter(move |item| item.number > begun.number)
            .filter_map(|item| Some((item.number, item.point?)));
        home.into_iter().chain(waiting).filter(move |(_, point)| point.tip.position.epoch == epoch)
    }

    pub(super) fn window(&self, stamp: WallTime) -> WindowSnapshot {
        let oldest = self.points().next().map(|(_, point)| (point.tip.position, point.seen));
        let span = oldest.map_or(0, |(_, seen)| stamp.0.saturating_sub(seen.0));
        WindowSnapshot { oldest, span: Duration::from_nanos(span), waiting_bytes: self.waiting.bytes }
    }

    /// The last point at or before what an operator asks for.
    pub(super) fn point_at(&self, at: RewindTo, stamp: WallTime) -> Result<(CutNumber, Point), VerbRefused> {
        let tip = self.tip().position;
        let (Some((_, oldest)), Some((_, newest))) = (self.points().next(), self.points().next_back()) else {
            return Err(VerbRefused(format!(
                "the retention window is empty: the only recovery point is the tip {tip}; fail over without --at"
            )));
        };
        // Before the clocks were told nothing is known to be old.
        let seen = |point: &Point| if point.seen.0 == 0 { stamp } else { point.seen };
        let refused = |what: String| {
            VerbRefused(format!(
                "{what} lies outside the retention window, which reaches from {} of {} to {} of {}: choose a point in it",
                oldest.tip.position,
                Calendar(oldest.seen),
                newest.tip.position,
                Calendar(newest.seen)
            ))
        };
        let found = match at {
            RewindTo::Time(time) if time > stamp => return Err(refused(format!("time {}", Calendar(time)))),
            RewindTo::Time(time) => self
                .points()
                .rfind(|(_, point)| seen(point) <= time)
                .ok_or_else(|| format!("time {}", Calendar(time))),
            RewindTo::Sequence(sequence) => {
                let wanted = tip.at(sequence);
                let fits = |point: &Point| {
                    point.tip.position.same_lineage(&tip) && point.tip.position.order(&wanted).is_le()
                };
                self.points()
                    .rfind(|(_, point)| fits(point))
                    .filter(|_| sequence <= tip.sequence)
                    .ok_or_else(|| format!("sequence {sequence}"))
            }
        };
        found.map_err(refused)
    }
}

/// A time as operators write it.
struct Calendar(WallTime);

impl std::fmt::Display for Calendar {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        control::Timestamp(self.0).fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_what_was_measured_and_forgets() {
        let mut rate = ApplyRate::default();
        assert_eq!(rate.bytes_within(Duration::from_secs(2)), 2 * RATE_FIRST);
        rate.measured(1000, Duration::from_millis(500));
        assert_eq!(rate.bytes_within(Duration::from_secs(3)), 6000);
        for _ in 0..40 {
            rate.measured(500, Duration::from_secs(1));
        }
        let now = rate.bytes_within(Duration::from_secs(1));
        assert!((500..540).contains(&now), "{now}");
    }
}
