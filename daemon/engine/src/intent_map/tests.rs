//! The intent map against crashes at every page write.

use block::HostError;
use proptest::prelude::*;

use super::*;

const REGION: u64 = 4096;
/// Three pages, the last one short.
const REGIONS: u64 = 2 * PAGE_REGIONS + 77;
const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

fn region(number: u64) -> ByteRange {
    regions(number, 1)
}

fn regions(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * REGION, count * REGION).unwrap()
}

fn new() -> IntentMap {
    IntentMap::new(VOLUME, ByteCount(REGIONS * REGION - 1), ByteCount(REGION))
}

fn index(position: u64) -> usize {
    usize::try_from(position).unwrap()
}

/// The map's file: written pages are durable when the write ends.
#[derive(Clone)]
struct File(Vec<u8>);

impl File {
    fn of(map: &IntentMap) -> Self {
        Self(vec![0; index(map.file_bytes().0)])
    }

    /// Writes the 512-byte sectors of a page whose bit is set in `sectors`.
    fn write(&mut self, write: &PageWrite, sectors: u8) {
        for sector in (0..8).filter(|sector| sectors >> sector & 1 == 1) {
            let from = sector * 512..sector * 512 + 512;
            let at = index(write.file_offset) + sector * 512;
            self.0[at..at + 512].copy_from_slice(&write.bytes[from]);
        }
    }

    fn slots(&self) -> Vec<SlotPair> {
        let slot = |bytes: &[u8]| Some(Bytes::copy_from_slice(bytes));
        self.0.chunks(8192).map(|pair| [slot(&pair[..4096]), slot(&pair[4096..])]).collect()
    }

    fn load(&self) -> (IntentMap, Vec<u64>) {
        IntentMap::load(VOLUME, ByteCount(REGIONS * REGION - 1), ByteCount(REGION), self.slots())
    }
}

/// Does every write that is due.
fn settle(map: &mut IntentMap, file: &mut File) -> usize {
    let mut writes = 0;
    while let Some(write) = map.poll_write() {
        file.write(&write, 0xFF);
        assert_eq!(map.written(write.page, write.generation, Ok(())), PageWritten::Durable);
        writes += 1;
    }
    assert!(map.is_settled());
    writes
}

#[test]
fn a_new_map_is_written_once_and_loads_clear() {
    let mut map = new();
    let mut file = File::of(&map);
    assert_eq!(file.load().1, [0, 1, 2], "never written counts as set");
    assert_eq!(settle(&mut map, &mut file), 3);
    let (loaded, unreadable) = file.load();
    assert!(unreadable.is_empty() && loaded.count() == 0 && loaded.is_settled());
}

#[test]
fn a_map_that_grows_keeps_its_bits_and_has_the_new_regions_clear_also_after_a_load() {
    let small = ByteCount(PAGE_REGIONS * REGION - 3 * REGION);
    let mut map = IntentMap::new(VOLUME, small, ByteCount(REGION));
    let mut file = File(vec![0; index(new().file_bytes().0)]);
    settle(&mut map, &mut file);
    map.request(region(5));
    let write = map.poll_write().unwrap();
    // It grows while a page is in flight, into the page's last regions and two pages more.
    map.grow(ByteCount(REGIONS * REGION - 1));
    file.write(&write, 0xFF);
    map.written(write.page, write.generation, Ok(()));
    assert_eq!(file.load().1, [1, 2], "a page that was never written counts as set");
    settle(&mut map, &mut file);
    assert!(!map.request(region(REGIONS - 1)) && !map.request(region(PAGE_REGIONS - 1)));
    settle(&mut map, &mut file);
    let set = [5, PAGE_REGIONS - 1, REGIONS - 1];
    assert!(map.set_regions().eq(set));
    let (loaded, unreadable) = file.load();
    assert!(unreadable.is_empty() && loaded.set_regions().eq(set));
    map.grow(small);
    assert!(map.is_durable(region(REGIONS - 1)), "a map does not shrink");
}

#[test]
fn wanted_bits_of_a_page_go_out_in_one_write() {
    let mut map = new();
    let mut file = File::of(&map);
    settle(&mut map, &mut file);
    assert!(!map.request(region(5)) && !map.request(region(77)));
    let first = map.poll_write().unwrap();
    assert!(!map.request(region(5)), "wanted and in flight");
    assert!(!map.request(regions(9, 3)));
    assert_eq!(map.poll_write(), None, "one write in flight a page");
    file.write(&first, 0xFF);
    map.written(first.page, first.generation, Ok(()));
    assert!(map.request(region(5)) && map.is_durable(region(77)) && !map.is_durable(region(9)));
    assert_eq!(settle(&mut map, &mut file), 1);
    assert!(map.set_regions().eq([5, 9, 10, 11, 77]) && map.count() == 5);
    assert!(file.load().0.set_regions().eq([5, 9, 10, 11, 77]));
}

#[test]
fn a_failed_write_fails_the_waiters_and_keeps_what_was_durable() {
    let mut map = new();
    let mut file = File::of(&map);
    map.request(region(PAGE_REGIONS));
    settle(&mut map, &mut file);
    map.request(region(PAGE_REGIONS + 3));
    let write = map.poll_write().unwrap();
    file.write(&write, 0x0F);
    let failed = map.written(write.page, write.generation, Err(HostError::Io));
    assert_eq!(failed, PageWritten::Failed { range: regions(PAGE_REGIONS, PAGE_REGIONS) });
    assert!(!map.is_durable(region(PAGE_REGIONS + 3)));
    assert!(file.load().0.is_durable(region(PAGE_REGIONS)));
    assert_eq!(map.poll_write(), None, "a broken device is not hammered");
    assert!(!map.request(region(PAGE_REGIONS + 3)));
    let again = map.poll_write().unwrap();
    assert_eq!(again.file_offset, write.file_offset, "never over the slot that holds");
    map.written(again.page, again.generation, Err(HostError::Io));
    assert!(!map.request(region(PAGE_REGIONS + 3)));
    settle(&mut map, &mut file);
    assert!(file.load().0.set_regions().eq([PAGE_REGIONS, PAGE_REGIONS + 3]));
}

#[test]
fn clearing_is_lazy_in_the_file_and_at_once_in_memory() {
    let mut map = new();
    let mut file = File::of(&map);
    map.set_all();
    settle(&mut map, &mut file);
    assert_eq!((map.count(), file.load().0.count()), (REGIONS, REGIONS));
    map.clear_region(7);
    assert!(!map.is_durable(region(7)) && map.count() == REGIONS - 1);
    assert!(file.load().0.is_durable(region(7)));
    let write = map.poll_write().unwrap();
    map.clear_region(8);
    assert!(!map.request(region(7)), "the write in flight has it off");
    file.write(&write, 0xFF);
    map.written(write.page, write.generation, Ok(()));
    assert!(!map.is_durable(regions(7, 1)) && !map.is_durable(region(8)));
    settle(&mut map, &mut file);
    assert!(file.load().0.is_durable(region(7)) && !file.load().0.is_durable(region(8)));
}

#[test]
fn an_unreadable_slot_makes_its_page_count_as_set_and_heals() {
    let mut map = new();
    let mut file = File::of(&map);
    map.request(region(1));
    settle(&mut map, &mut file);
    let mut slots = file.slots();
    slots[0] = [None, slots[0][1].clone()];
    slots[1] = [Some(Bytes::from(vec![3; 4096])), None];
    slots.truncate(2);
    let (mut map, unreadable) =
        IntentMap::load(VOLUME, ByteCount(REGIONS * REGION), ByteCount(REGION), slots);
    assert_eq!((unreadable, map.count()), (vec![0, 1, 2], REGIONS));
    settle(&mut map, &mut file);
    let (loaded, unreadable) = file.load();
    assert!(unreadable.is_empty() && loaded.count() == REGIONS);
}

#[test]
fn pages_of_another_volume_place_or_region_size_are_no_pages() {
    let mut map = new();
    let mut file = File::of(&map);
    settle(&mut map, &mut file);
    let size = ByteCount(REGIONS * REGION);
    let other = IntentMap::load(VolumeId::default(), size, ByteCount(REGION), file.slots());
    assert_eq!(other.1, [0, 1, 2]);
    let larger = IntentMap::load(VOLUME, size, ByteCount(2 * REGION), file.slots());
    assert_eq!(larger.1, [0, 1]);
    let mut swapped = file.slots();
    swapped.swap(0, 1);
    assert_eq!(IntentMap::load(VOLUME, size, ByteCount(REGION), swapped).1, [0, 1]);
}

#[derive(Clone, Debug)]
enum Action {
    Request(u64, u64),
    Clear(u64),
    Poll,
    /// The oldest write in flight ends well.
    Land,
    /// The oldest write in flight fails after these sectors.
    Fail(u8),
    /// Power loss; each write in flight has written these sectors.
    Crash(u8),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let place = || (0_u64..3, 0_u64..38).prop_map(|(page, bit)| page * PAGE_REGIONS + bit * 2);
    let action = prop_oneof![
        4 => (place(), 1_u64..5).prop_map(|(first, count)| Action::Request(first, count.min(REGIONS - first))),
        1 => Just(Action::Request(PAGE_REGIONS - 2, 4)),
        3 => place().prop_map(Action::Clear),
        4 => Just(Action::Poll),
        4 => Just(Action::Land),
        1 => any::<u8>().prop_map(Action::Fail),
        2 => any::<u8>().prop_map(Action::Crash),
    ];
    prop::collection::vec(action, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn a_durable_bit_survives_every_crash(actions in actions()) {
        let mut map = new();
        let mut file = File::of(&map);
        settle(&mut map, &mut file);
        let mut in_flight: Vec<PageWrite> = Vec::new();
        for action in actions {
            match action {
                Action::Request(first, count) => {
                    let durable = map.request(regions(first, count));
                    prop_assert_eq!(durable, map.is_durable(regions(first, count)));
                }
                Action::Clear(number) => {
                    if map.is_durable(region(number)) {
                        map.clear_region(number);
                    }
                }
                Action::Poll => in_flight.extend(map.poll_write()),
                Action::Land if !in_flight.is_empty() => {
                    let write = in_flight.remove(0);
                    file.write(&write, 0xFF);
                    map.written(write.page, write.generation, Ok(()));
                }
                Action::Fail(sectors) if !in_flight.is_empty() => {
                    let write = in_flight.remove(0);
                    file.write(&write, sectors);
                    map.written(write.page, write.generation, Err(HostError::Io));
                }
                Action::Land | Action::Fail(_) => {}
                Action::Crash(sectors) => {
                    in_flight.drain(..).for_each(|write| file.write(&write, sectors));
                    map = check_after_crash(&map, &file)?;
                }
            }
            prop_assert_eq!(map.count(), map.set_regions().count() as u64);
            // Also a crash right here, with the writes in flight torn in some way, must lose nothing.
            let mut torn = file.clone();
            for (write, sectors) in in_flight.iter().zip([0b0101_0110, 0xFF, 0x01]) {
                torn.write(write, sectors);
            }
            check_after_crash(&map, &torn)?;
        }
    }
}

fn check_after_crash(map: &IntentMap, file: &File) -> Result<IntentMap, TestCaseError> {
    let (loaded, unreadable) = file.load();
    prop_assert!(unreadable.is_empty(), "one slot is always whole");
    for number in map.set_regions() {
        prop_assert!(loaded.is_durable(region(number)), "region {number} was durable");
    }
    Ok(loaded)
}
