//! What a verify has found.

use block::{BlockCount, ByteCount, ByteRange, Lba, VolumeIndex, WallTime};
use control::Side;
use engine::dirty_map::DirtyMap;

/// Extents that a report lists; the bytes are counted all the same.
const EXTENTS_MAX: usize = 1000;

/// Whether a verify goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerifyProgress {
    /// It does.
    Running,
    /// Everything was compared, and repaired if that was asked for.
    Ended,
    /// It ended early, for this reason.
    GivenUp(String),
}

/// The report of a verify.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// Whether it goes on.
    pub progress: VerifyProgress,
    /// Whose blocks overwrite the other's where they differ; none if it only looks.
    pub repair_from: Option<Side>,
    /// All bytes of the mirror.
    pub total: ByteCount,
    /// Bytes that were compared.
    pub compared: ByteCount,
    /// Bytes that could not be read on one of the sides.
    pub unreadable: ByteCount,
    /// Bytes that were written each time they were compared.
    pub busy: ByteCount,
    /// Bytes that differed and were overwritten.
    pub repaired: ByteCount,
    /// When it began and ended.
    pub began: WallTime,
    /// See `began`.
    pub ended: Option<WallTime>,
    pub(super) differing: Vec<DirtyMap>,
}

impl VerifyReport {
    pub(super) fn begun(
        repair_from: Option<Side>,
        total: ByteCount,
        volumes: usize,
        began: WallTime,
    ) -> Self {
        Self {
            progress: VerifyProgress::Running,
            repair_from,
            total,
            compared: ByteCount(0),
            unreadable: ByteCount(0),
            busy: ByteCount(0),
            repaired: ByteCount(0),
            began,
            ended: None,
            differing: vec![DirtyMap::default(); volumes],
        }
    }

    pub(super) fn add(&mut self, volume: VolumeIndex, range: ByteRange) {
        if let Some(map) = self.differing.get_mut(usize::from(volume.0)) {
            map.set(range);
        }
    }

    pub(super) fn end(&mut self, progress: VerifyProgress, ended: WallTime) {
        self.progress = progress;
        self.ended = Some(ended);
    }

    /// Bytes that differ, or differed.
    pub fn differing_bytes(&self) -> ByteCount {
        ByteCount(self.differing.iter().map(|map| map.count().bytes().0).sum())
    }

    /// Where the sides differ, or differed: the first `EXTENTS_MAX` extents.
    pub fn extents(&self) -> Vec<(VolumeIndex, ByteRange)> {
        let mut extents = Vec::new();
        for (index, map) in self.differing.iter().enumerate() {
            let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            let mut from = Lba(0);
            while let Some((first, count)) = map.next_run(from, BlockCount(u64::MAX)) {
                if extents.len() >= EXTENTS_MAX {
                    return extents;
                }
                from = Lba(first.0.saturating_add(count.0));
                extents.extend(ByteRange::of_blocks(first, count).map(|range| (volume, range)));
            }
        }
        extents
    }

    /// Nothing differs any more, and everything could be compared.
    pub fn is_clean(&self) -> bool {
        self.repaired >= self.differing_bytes() && self.unreadable.0 == 0
    }

    /// The report in one sentence.
    pub fn sentence(&self) -> String {
        let mut text = format!(
            "verify: {} of {} bytes compared, {} differ",
            self.compared.0,
            self.total.0,
            self.differing_bytes().0
        );
        for (bytes, what) in [
            (self.repaired, "were overwritten"),
            (self.unreadable, "could not be read"),
            (self.busy, "were written too often to be compared"),
        ] {
            if bytes.0 > 0 {
                text.push_str(&format!(", {} {what}", bytes.0));
            }
        }
        text
    }
}
