//! Which bytes of a committed image are not at home yet, and where in the redo log they stand.
//!
//! Home overlaid by this index is the image after the last cut that was inserted. It guarantees: each byte has the
//! content of the newest inserted cut that changed it and was not removed; a cut is removed when it is at home, oldest
//! first, or put back if home may have lost it. Memory is proportional to the changes inserted.

use std::collections::BTreeMap;

use block::{ByteRange, VolumeIndex};
use journal::{Change, ChangeContent, Placement};

/// A cut, by the order in which cuts were committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CutNumber(pub u64);

/// Where a byte of redo stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedoPlace {
    /// The segment's number: what a reader keeps from being released.
    pub segment: u64,
    /// The segment's file.
    pub file: u32,
    /// The byte in the file.
    pub offset: u64,
}

/// What a piece of the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceContent {
    /// What home has.
    Home,
    /// Zeros.
    Zeros,
    /// Redo, from this byte on.
    Redo(RedoPlace),
}

/// A piece of a range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the volume.
    pub range: ByteRange,
    /// What is there.
    pub content: PieceContent,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    end: u64,
    cut: CutNumber,
    /// Where the entry's first byte stands; `None` for zeros.
    place: Option<RedoPlace>,
}

impl Entry {
    /// The same content without its first bytes.
    fn behind(self, bytes: u64) -> Self {
        let place = self.place.map(|place| RedoPlace { offset: place.offset + bytes, ..place });
        Self { place, ..self }
    }
}

/// The index of one group. Entries of a volume do not overlap; the key is their first byte.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    volumes: BTreeMap<VolumeIndex, BTreeMap<u64, Entry>>,
}

impl Overlay {
    /// Notes what a committed cut changes. Where a newer cut is known already, that one stays.
    pub fn insert(&mut self, cut: CutNumber, placement: &Placement, changes: &[Change]) {
        for change in changes {
            let place = match change.content {
                ChangeContent::Payload { offset } => Some(RedoPlace {
                    segment: placement.segment_number,
                    file: placement.file_index,
                    offset: placement.offset + offset,
                }),
                ChangeContent::Zeros => None,
            };
            let entries = self.volumes.entry(change.volume).or_default();
            insert_entry(entries, change.range.offset(), Entry { end: change.range.end(), cut, place });
        }
    }

    /// Forgets a cut: it is at home. `changes` are those it was inserted with.
    pub fn remove(&mut self, cut: CutNumber, changes: &[Change]) {
        for change in changes {
            let Some(entries) = self.volumes.get_mut(&change.volume) else {
                continue;
            };
            let (start, end) = (change.range.offset(), change.range.end());
            split_at(entries, start);
            split_at(entries, end);
            let gone: Vec<u64> = entries
                .range(start..end)
                .filter(|(_, entry)| entry.cut == cut)
                .map(|(start, _)| *start)
                .collect();
            for start in gone {
                entries.remove(&start);
            }
        }
    }

    /// The pieces that a range of the image is made of, in ascending order.
    pub fn pieces(&self, volume: VolumeIndex, range: ByteRange) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut at = range.offset();
        let mut push = |start: u64, end: u64, content| {
            let piece = ByteRange::between(start, end).filter(|range| !range.is_empty());
            pieces.extend(piece.map(|range| Piece { range, content }));
        };
        if let Some(entries) = self.volumes.get(&volume) {
            let before = entries.range(..at).next_back().filter(|(_, entry)| entry.end > at);
            for (start, entry) in before.into_iter().chain(entries.range(at..range.end())) {
                push(at, *start, PieceContent::Home);
                let first = at.max(*start);
                let entry = entry.behind(first - start);
                let end = entry.end.min(range.end());
                push(first, end, entry.place.map_or(PieceContent::Zeros, PieceContent::Redo));
                at = end;
            }
        }
        push(at, range.end(), PieceContent::Home);
        pieces
    }

    /// True if home alone is the image.
    pub fn is_empty(&self) -> bool {
        self.volumes.values().all(BTreeMap::is_empty)
    }
}

/// Cuts the entry that holds `at` in two.
fn split_at(entries: &mut BTreeMap<u64, Entry>, at: u64) {
    let Some((start, entry)) = entries.range_mut(..at).next_back() else {
        return;
    };
    if entry.end > at {
        let behind = entry.behind(at - start);
        entry.end = at;
        entries.insert(at, behind);
    }
}

/// Puts an entry in wherever no newer one is.
fn insert_entry(entries: &mut BTreeMap<u64, Entry>, start: u64, entry: Entry) {
    if entry.end <= start {
        return;
    }
    split_at(entries, start);
    split_at(entries, entry.end);
    let known: Vec<(u64, Entry)> =
        entries.range(start..entry.end).map(|(start, entry)| (*start, *entry)).collect();
    let mut at = start;
    for (known_start, known) in known {
        if known.cut > entry.cut {
            put(entries, at, known_start, start, entry);
            at = known.end;
        } else {
            entries.remove(&known_start);
        }
    }
    put(entries, at, entry.end, start, entry);
}

/// Puts in the part of an entry, which begins at `origin`, from `start` to `end`.
fn put(entries: &mut BTreeMap<u64, Entry>, start: u64, end: u64, origin: u64, entry: Entry) {
    if start < end {
        entries.insert(start, Entry { end, ..entry.behind(start - origin) });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECTOR: u64 = 512;
    const SECTORS: u64 = 48;

    /// For each sector the cuts that changed it, oldest first: number, and where its content stands (0 for zeros).
    type Model = Vec<Vec<(u64, u64)>>;

    #[derive(Clone, Debug)]
    struct TestCut {
        placement: Placement,
        changes: Vec<Change>,
    }

    fn cut(number: u64, entries: &[(bool, u64, u64)]) -> TestCut {
        let placement = Placement {
            segment_number: number,
            file_index: 1,
            offset: number << 20,
            length: 4096,
            opens_segment: None,
        };
        let mut offset = 4096;
        let changes = entries.iter().map(|(zeros, first, count)| {
            let count = (*count).min(SECTORS - first);
            let range = ByteRange::new(first * SECTOR, count * SECTOR).unwrap();
            let content = if *zeros { ChangeContent::Zeros } else { ChangeContent::Payload { offset } };
            offset += range.length().next_multiple_of(4096);
            Change { volume: VolumeIndex(u16::from(*first % 2 == 0)), range, content }
        });
        TestCut { changes: changes.collect(), placement }
    }

    fn sectors(range: ByteRange) -> std::ops::Range<u64> {
        range.offset() / SECTOR..range.end() / SECTOR
    }

    fn model_insert(models: &mut [Model; 2], number: u64, cut: &TestCut) {
        for change in &cut.changes {
            for sector in sectors(change.range) {
                let place = match change.content {
                    ChangeContent::Payload { offset } => {
                        cut.placement.offset + offset + sector * SECTOR - change.range.offset()
                    }
                    ChangeContent::Zeros => 0,
                };
                let model = &mut models[usize::from(change.volume.0)][usize::try_from(sector).unwrap()];
                model.retain(|(known, _)| *known != number);
                model.push((number, place));
                model.sort_by_key(|(known, _)| *known);
            }
        }
    }

    fn check(overlay: &Overlay, models: &[Model; 2], range: ByteRange) {
        for volume in [VolumeIndex(0), VolumeIndex(1)] {
            let mut at = range.offset();
            for piece in overlay.pieces(volume, range) {
                assert_eq!(piece.range.offset(), at, "pieces follow one another");
                at = piece.range.end();
                for sector in sectors(piece.range) {
                    let newest = models[usize::from(volume.0)][usize::try_from(sector).unwrap()].last();
                    let inside = sector * SECTOR - piece.range.offset();
                    let found = match piece.content {
                        PieceContent::Home => None,
                        PieceContent::Zeros => Some(0),
                        PieceContent::Redo(place) => Some(place.offset + inside),
                    };
                    assert_eq!(found, newest.map(|(_, place)| *place), "sector {sector}");
                }
            }
            assert_eq!(at, range.end(), "the whole range is said");
        }
    }

    proptest! {
        #[test]
        fn an_overlay_names_the_newest_content_of_every_sector(
            cuts in prop::collection::vec(prop::collection::vec((any::<bool>(), 0..SECTORS, 1_u64..20), 0..6), 1..14),
            steps in prop::collection::vec((0_u8..4, 0..SECTORS, 0..SECTORS), 1..40),
        ) {
            let (mut overlay, mut models) = (Overlay::default(), [(); 2].map(|()| vec![Vec::new(); 48]));
            let cuts: Vec<TestCut> = (1_u64..).zip(&cuts).map(|(number, entries)| cut(number, entries)).collect();
            // Cuts up to `applied` are removed; those up to `inserted` were put in.
            let (mut applied, mut inserted) = (0, 0);
            for (step, a, b) in steps {
                match step {
                    0 | 1 if inserted < cuts.len() => {
                        inserted += 1;
                        let number = u64::try_from(inserted).unwrap();
                        let cut = &cuts[inserted - 1];
                        overlay.insert(CutNumber(number), &cut.placement, &cut.changes);
                        model_insert(&mut models, number, cut);
                    }
                    2 if applied < inserted => {
                        applied += 1;
                        let number = u64::try_from(applied).unwrap();
                        overlay.remove(CutNumber(number), &cuts[applied - 1].changes);
                        // What an older cut left was removed before.
                        models.iter_mut().flatten().for_each(|known| known.retain(|(of, _)| *of > number));
                    }
                    3 if applied > 0 => {
                        // A flush failed: what was applied since is put back, oldest first.
                        let back = usize::try_from(a).unwrap().min(applied);
                        for (number, cut) in (1_u64..).zip(&cuts).take(applied).skip(applied - back) {
                            overlay.insert(CutNumber(number), &cut.placement, &cut.changes);
                            model_insert(&mut models, number, cut);
                        }
                        applied -= back;
                    }
                    _ => {}
                }
                let range = ByteRange::between(a.min(b) * SECTOR, (a.max(b) + 1) * SECTOR).unwrap();
                check(&overlay, &models, range);
            }
            for (number, cut) in (1_u64..).zip(&cuts).take(inserted).skip(applied) {
                overlay.remove(CutNumber(number), &cut.changes);
            }
            prop_assert!(overlay.is_empty());
        }
    }

    #[test]
    fn an_empty_overlay_is_home() {
        let range = ByteRange::new(4096, 8192).unwrap();
        let pieces = Overlay::default().pieces(VolumeIndex(3), range);
        assert_eq!(pieces, [Piece { range, content: PieceContent::Home }]);
    }
}
