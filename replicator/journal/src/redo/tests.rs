use proptest::prelude::*;

use super::*;

const SEGMENT: u64 = 5 * PAGE_BYTES;

#[derive(Clone, Debug)]
enum Step {
    Append(u64),
    Release(prop::sample::Index),
    Truncate(prop::sample::Index),
    Void(prop::sample::Index),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        10 => (1..6_u64).prop_map(Step::Append),
        3 => any::<prop::sample::Index>().prop_map(Step::Release),
        1 => any::<prop::sample::Index>().prop_map(Step::Truncate),
        1 => any::<prop::sample::Index>().prop_map(Step::Void),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..120)
}

/// The naive model: every segment in use with its cuts, released or not.
#[derive(Default)]
struct Model {
    segments: Vec<(u64, u32, Vec<Placement>)>,
    /// Not released, oldest first.
    cuts: Vec<Placement>,
    open: bool,
    numbers: Vec<u64>,
}

impl Model {
    fn appended(&mut self, placement: &Placement) {
        if let Some(page) = &placement.opens_segment {
            let header = SegmentHeader::decode(page).unwrap();
            assert_eq!((header.number, header.file_index), (placement.segment_number, placement.file_index));
            assert!(self.numbers.iter().all(|number| *number < header.number), "numbers rise");
            assert!(self.segments.iter().all(|segment| segment.1 != header.file_index), "the file was free");
            if let Some(cut) = self.segments.last().and_then(|segment| segment.2.last()) {
                assert_eq!(header.previous_end, cut.end());
            }
            self.numbers.push(header.number);
            self.segments.push((header.number, header.file_index, Vec::new()));
            self.open = true;
        }
        let segment = self.segments.last_mut().unwrap();
        let offset = segment.2.last().map_or(PAGE_BYTES, |cut| cut.end().offset);
        assert_eq!(placement.offset, offset, "cuts follow each other");
        assert!(placement.end().offset <= SEGMENT);
        segment.2.push(placement.clone());
        self.cuts.push(placement.clone());
    }

    fn release(&mut self, through: &Placement) {
        self.cuts.retain(|cut| cut.start() > through.start());
        let (open, newest) = (self.open, self.segments.last().map(|segment| segment.0));
        let cuts = &self.cuts;
        self.segments.retain(|segment| {
            (open && Some(segment.0) == newest) || cuts.iter().any(|cut| cut.segment_number == segment.0)
        });
    }

    fn void_from(&mut self, first: &Cursor) {
        if self.cuts.iter().any(|cut| cut.start() >= *first) {
            self.open = false;
        }
        self.cuts.retain(|cut| cut.start() < *first);
        for segment in &mut self.segments {
            segment.2.retain(|cut| cut.start() < *first);
        }
        self.segments.retain(|segment| !segment.2.is_empty());
    }

    fn free_bytes(&self, file_count: u64) -> u64 {
        let used = u64::try_from(self.segments.len()).unwrap();
        let last = self.segments.last().and_then(|segment| segment.2.last());
        let rest = if self.open { SEGMENT - last.unwrap().end().offset } else { 0 };
        (file_count - used) * (SEGMENT - PAGE_BYTES) + rest
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn space_is_accounted_as_in_a_naive_model(steps in steps(), file_count in 2..6_u32) {
        let mut log = RedoLog::new(RedoConfig::new(file_count, SEGMENT).unwrap(), MirrorId::default());
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Append(pages) => {
                    let room = model.free_bytes(u64::from(file_count));
                    match log.append(&Tip::default(), &Tip::default(), pages * PAGE_BYTES) {
                        Ok(placement) => model.appended(&placement),
                        Err(RedoFull::CutTooLong) => prop_assert!(pages > 4),
                        Err(RedoFull::Full) => prop_assert!(room < SEGMENT - PAGE_BYTES),
                    }
                }
                Step::Release(_) | Step::Truncate(_) | Step::Void(_) if model.cuts.is_empty() => {}
                Step::Release(index) => {
                    let through = index.get(&model.cuts).clone();
                    log.release(&through);
                    model.release(&through);
                }
                Step::Truncate(index) => {
                    let kept = index.get(&model.cuts).clone();
                    log.truncate_after(&kept);
                    model.void_from(&kept.end());
                }
                Step::Void(index) => {
                    let failed = index.get(&model.cuts).clone();
                    log.void_tail(&failed);
                    model.void_from(&failed.start());
                }
                Step::Reset => {
                    let scan_start = log.reset();
                    prop_assert!(model.numbers.iter().all(|number| *number < scan_start.segment_number));
                    model = Model { numbers: model.numbers, ..Model::default() };
                }
            }
            prop_assert_eq!(log.free_bytes(), model.free_bytes(u64::from(file_count)));
            prop_assert_eq!(log.used_bytes() + log.free_bytes(), log.capacity_bytes());
            if let Some(cut) = model.cuts.last() {
                prop_assert_eq!(log.end(), cut.end());
            }
        }
    }
}

#[test]
fn shapes_out_of_bounds_are_refused() {
    for (files, bytes) in [(1, SEGMENT), (2, 4096), (2, 9000), (70_000, SEGMENT), (2, 1 << 33)] {
        assert!(RedoConfig::new(files, bytes).is_err(), "{files} {bytes}");
    }
}
