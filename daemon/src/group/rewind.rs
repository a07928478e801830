//! Promotion to a point of the retention window, and what becomes of the cuts behind it.
//!
//! Guarantees (docs/protocols/replication.md, "Promotion"): until the raised epoch is durable nothing is discarded;
//! before the first host write the blocks of every discarded cut are in the intent map, so that the old side gets them
//! back however often this side crashes; no discarded cut is ever replayed.

use block::{BlockCount, ByteRange, Lba, Monotonic, Tip, VolumeIndex, WallTime};
use engine::dirty_map::DirtyMap;
use engine::overlay::CutNumber;
use protocol::{CompareRange, GroupState};

use super::effect::Outbox;
use super::roles::{COMPARE_RANGES_MAX, compare_ranges};
use super::secondary::Secondary;
use super::window::{Hold, RewindTo};
use super::{CleanState, LossReport, Mirror, MirrorSettings, OpenedMirror, VerbRefused};

/// Up to where a promotion goes.
#[derive(Debug)]
pub(super) struct Target {
    through: CutNumber,
    /// The point of a rewind; `None` for all that is committed.
    tip: Option<Tip>,
    /// Blocks that discarded cuts changed, one map a volume.
    discarded: Vec<DirtyMap>,
}

impl Target {
    /// All that is committed.
    pub(super) const fn everything() -> Self {
        Self { through: CutNumber(u64::MAX), tip: None, discarded: Vec::new() }
    }

    /// Chooses the target, and says what it loses.
    pub(super) fn choose(
        secondary: &Secondary,
        at: Option<RewindTo>,
        stamp: WallTime,
    ) -> Result<(Self, LossReport), VerbRefused> {
        let Some(at) = at else {
            let report = LossReport::new(secondary.tip().position, secondary.newest, stamp);
            return Ok((Self::everything(), report));
        };
        let (through, point) = secondary.point_at(at, stamp)?;
        let report = LossReport::new(point.tip.position, Some(point), stamp);
        Ok((Self { through, tip: Some(point.tip), discarded: Vec::new() }, report))
    }

    /// Where the new epoch forks off.
    pub(super) fn fork(&self, secondary: &Secondary) -> Tip {
        self.tip.unwrap_or_else(|| secondary.tip())
    }

    /// Holds the applier to the target.
    pub(super) fn hold(&self, secondary: &mut Secondary) {
        secondary.hold = Hold::Until(self.through);
    }

    /// True when home is the image of the target, on stable media; then what is discarded is known.
    pub(super) fn is_reached(
        &mut self,
        secondary: &mut Secondary,
        settings: &MirrorSettings,
        now: Monotonic,
        out: &mut Outbox,
    ) -> bool {
        secondary.applying.hurry = true;
        secondary.apply_more(settings, now, out);
        let waits = secondary.queue.front().is_some_and(|front| front.number <= self.through);
        if waits || !secondary.applying.is_clean() {
            return false;
        }
        self.discarded = vec![DirtyMap::default(); settings.volumes.len()];
        let volumes: Vec<_> = settings.volumes.iter().map(|volume| volume.size.0).collect();
        for change in secondary.queue.iter().flat_map(|item| &item.changes) {
            let index = usize::from(change.volume.0);
            if let (Some(map), Some(size)) = (self.discarded.get_mut(index), volumes.get(index)) {
                // What a discarded resize made room for is not there any more: the old side zeroes it.
                map.set(inside(change.range, *size));
            }
        }
        true
    }

    /// True if committed cuts are discarded.
    pub(super) fn discards(&self, secondary: &Secondary) -> bool {
        !secondary.queue.is_empty()
    }

    /// What the new primary must still copy, and compare as writes of the old side.
    pub(super) fn into_discarded(self) -> (CleanState, Vec<CompareRange>) {
        let ranges = dirty_ranges(&self.discarded);
        (CleanState { dirty: self.discarded, ..CleanState::default() }, ranges)
    }
}

impl Mirror {
    /// Asks for the intent bits of every discarded block; true when all are durable.
    pub(super) fn mark_discarded(&mut self, target: &Target) -> bool {
        let mut durable = true;
        for (intent, map) in self.intents.iter_mut().zip(&target.discarded) {
            for range in runs(map) {
                durable &= intent.request(range);
            }
        }
        durable
    }
}

/// What a restarted primary compares as writes of its partner, because its epoch began with a rewind: all that it does
/// not know to be equal.
pub(super) fn rewound_ranges(opened: &OpenedMirror, settings: &MirrorSettings) -> Vec<CompareRange> {
    match &opened.clean {
        _ if !opened.checkpoint.discarded => Vec::new(),
        Some(clean) => dirty_ranges(&clean.dirty),
        None => compare_ranges(&opened.intents, settings),
    }
}

/// The same bytes without any of them twice: what is compared is counted.
pub(super) fn united(mut ranges: Vec<CompareRange>) -> Vec<CompareRange> {
    ranges.sort_unstable_by_key(|entry| (entry.volume, entry.range.offset()));
    let mut united: Vec<CompareRange> = Vec::with_capacity(ranges.len());
    for entry in ranges {
        let last = united.last_mut().filter(|last| last.volume == entry.volume);
        match last.filter(|last| entry.range.offset() <= last.range.end()) {
            Some(last) => {
                let end = last.range.end().max(entry.range.end());
                last.range = ByteRange::between(last.range.offset(), end).unwrap_or(last.range);
            }
            None => united.push(entry),
        }
    }
    united
}

/// A primary's redo log is empty: its starter voids what a crash between the promotion of a rewind and the emptying of
/// the log left there.
pub(super) fn check_empty(state: &GroupState, opened: &OpenedMirror) {
    let primary = state.role == protocol::Role::Primary;
    assert!(!primary || opened.redo.cuts.is_empty(), "a primary's redo log was emptied before its start");
}

fn runs(map: &DirtyMap) -> impl Iterator<Item = ByteRange> {
    let mut from = Lba(0);
    std::iter::from_fn(move || {
        let (first, count) = map.next_run(from, BlockCount(u64::MAX))?;
        from = Lba(first.0.saturating_add(count.0));
        ByteRange::of_blocks(first, count)
    })
}

/// The part of a range that lies within a size.
pub(super) fn inside(range: ByteRange, size: u64) -> ByteRange {
    ByteRange::between(range.offset().min(size), range.end().min(size)).unwrap_or_default()
}

/// The dirty blocks; merged into a superset if they are many.
fn dirty_ranges(maps: &[DirtyMap]) -> Vec<CompareRange> {
    let mut ranges: Vec<CompareRange> = Vec::new();
    for (index, map) in maps.iter().enumerate() {
        let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
        for range in runs(map) {
            let crowded = ranges.len() >= COMPARE_RANGES_MAX;
            match ranges.last_mut().filter(|last| crowded && last.volume == volume) {
                Some(last) => {
                    last.range = ByteRange::between(last.range.offset(), range.end()).unwrap_or(last.range);
                }
                None => ranges.push(CompareRange { volume, range }),
            }
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(volume: u16, start: u64, end: u64) -> CompareRange {
        let range = ByteRange::between(start * 4096, end * 4096).unwrap();
        CompareRange { volume: VolumeIndex(volume), range }
    }

    #[test]
    fn united_ranges_hold_every_byte_once() {
        let ranges = vec![range(1, 0, 4), range(0, 8, 12), range(0, 2, 9), range(0, 20, 21), range(0, 3, 4)];
        assert_eq!(united(ranges), [range(0, 2, 12), range(0, 20, 21), range(1, 0, 4)]);
    }

    #[test]
    fn dirty_blocks_become_ranges() {
        let mut maps = vec![DirtyMap::default(), DirtyMap::default()];
        maps[1].set(ByteRange::new(4096, 8192).unwrap());
        maps[1].set(ByteRange::new(40_960, 100).unwrap());
        assert_eq!(dirty_ranges(&maps), [range(1, 1, 3), range(1, 10, 11)]);
    }
}
