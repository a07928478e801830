//! Which regions of a mirrored volume may differ from the target: one durable bit each.
//!
//! Guarantees: a region that [`IntentMap::is_durable`] reports is set after any later [`IntentMap::load`], until
//! it is cleared, whatever crash or torn write (at 512 bytes) comes between; a page of the file that cannot be
//! read counts as all set. All wanted bits of a page go out in one write (group commit), one write in flight a
//! page.
//!
//! The file is an array of pages of 4096 bytes, two slots each, written in turn: page `n` has its slots at
//! `(2n) * 4096` and `(2n + 1) * 4096`. The newest valid slot counts. A slot whose write failed is written again,
//! so the other stays what it was. The format is specified in docs/formats/intent-map.md; when a bit may clear
//! is the business of [`crate::region_tracker`].

mod page;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::Range;

use block::{ByteCount, ByteRange, DATA_UNIT_BYTES, HostResult, VolumeId};
use bytes::Bytes;

use self::page::{PAGE_BYTES, PAGE_REGIONS, PageIdentity, RegionBits};

/// The two slots of one page as they were read; `None` for one that the device could not read.
pub type SlotPair = [Option<Bytes>; 2];

/// How far the generation jumps when a slot could not be read: beyond whatever that slot may hold, should it
/// become readable again.
const GENERATION_LEAP: u64 = 1 << 40;

/// The intent map of one volume.
#[derive(Debug)]
pub struct IntentMap {
    volume: VolumeId,
    region_bytes: u64,
    regions: u64,
    pages: Vec<Page>,
    /// Pages with a wanted bit that is not in a write in flight.
    wanting: BTreeSet<u64>,
    /// Pages whose file content has bits that were cleared since, or was never written.
    stale: BTreeSet<u64>,
    count: u64,
}

#[derive(Debug)]
struct Page {
    /// Bits that are on, here and in the newest durable slot.
    durable: RegionBits,
    /// Bits that are asked for and not durable yet.
    wanted: RegionBits,
    /// The generation of the newest durable slot, or of the write that failed after it.
    generation: u64,
    /// Which slot the next write goes to.
    next_slot: u64,
    in_flight: Option<Box<InFlight>>,
}

#[derive(Debug)]
struct InFlight {
    generation: u64,
    bits: RegionBits,
}

/// One page to write, and to make durable, before [`IntentMap::written`] is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// The page's number.
    pub page: u64,
    /// Where in the file.
    pub file_offset: u64,
    /// 4096 bytes.
    pub bytes: Bytes,
    /// Names this write.
    pub generation: u64,
}

/// What the end of a page write means for those that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageWritten {
    /// The bits of the write are durable; [`IntentMap::request`] again what waits. (A region that was durable
    /// before may have been cleared meanwhile.)
    Durable,
    /// Every write that waits for a bit in these bytes of the volume fails; nothing of it is wanted any more.
    Failed {
        /// The bytes that the page stands for.
        range: ByteRange,
    },
}

impl IntentMap {
    /// The map of a new volume: no bit set. Its pages are due to be written once, as an unwritten page would
    /// count as all set.
    ///
    /// # Panics
    /// If the region size is not a power of two of at least one data unit.
    pub fn new(volume: VolumeId, size: ByteCount, region_bytes: ByteCount) -> Self {
        let valid = region_bytes.0.is_power_of_two() && region_bytes.0 >= DATA_UNIT_BYTES;
        assert!(valid, "a region of {region_bytes} is not allowed");
        let regions = size.0.div_ceil(region_bytes.0);
        let page_count = regions.div_ceil(PAGE_REGIONS);
        Self {
            volume,
            region_bytes: region_bytes.0,
            regions,
            pages: (0..page_count).map(|_| Page::empty()).collect(),
            wanting: BTreeSet::new(),
            stale: (0..page_count).collect(),
            count: 0,
        }
    }

    /// The map as it stands in its file, and the numbers of the pages that were not readable and count as set.
    ///
    /// `slots` are the file's pages in order; missing ones count as unreadable.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn load(
        volume: VolumeId,
        size: ByteCount,
        region_bytes: ByteCount,
        slots: impl IntoIterator<Item = SlotPair>,
    ) -> (Self, Vec<u64>) {
        let mut map = Self::new(volume, size, region_bytes);
        let mut unreadable = Vec::new();
        let mut slots = slots.into_iter();
        for number in 0..map.page_count() {
            let identity = map.identity(number);
            let slots = slots.next().unwrap_or_default();
            let (page, readable) = Page::load(&identity, slots, map.page_regions(number));
            if readable {
                map.stale.remove(&number);
            } else {
                unreadable.push(number);
            }
            map.count += page.durable.count();
            if let Some(known) = map.page_mut(number) {
                *known = page;
            }
        }
        (map, unreadable)
    }

    /// The volume has grown: its new regions are clear. New pages are due to be written once, into a file that has grown
    /// as well.
    pub fn grow(&mut self, size: ByteCount) {
        let pages = self.page_count();
        self.regions = self.regions.max(size.0.div_ceil(self.region_bytes));
        let added = pages..self.page_count();
        self.pages.extend(added.clone().map(|_| Page::empty()));
        self.stale.extend(added);
    }

    /// Asks for the bits of every region that the range touches.
    ///
    /// Returns true if they are durable already: the home write may go. Otherwise they are wanted; the caller
    /// asks again after each [`PageWritten::Durable`], or gives up on a [`PageWritten::Failed`] that touches its
    /// range.
    ///
    /// # Panics
    /// If the range reaches beyond the volume's last region.
    pub fn request(&mut self, range: ByteRange) -> bool {
        let regions = self.regions_of(range);
        let mut durable = true;
        for (number, bits) in page_parts(regions) {
            let Some(page) = self.page_mut(number) else {
                continue;
            };
            if page.durable.contains_all(bits.clone()) {
                continue;
            }
            durable = false;
            page.want(bits);
            if page.wants_more() {
                self.wanting.insert(number);
            }
        }
        durable
    }

    /// True if the bit of every region that the range touches is durable.
    ///
    /// # Panics
    /// As [`Self::request`].
    pub fn is_durable(&self, range: ByteRange) -> bool {
        page_parts(self.regions_of(range))
            .all(|(number, bits)| self.page(number).is_some_and(|page| page.durable.contains_all(bits)))
    }

    /// The next page to write: pages with wanted bits first, then those with cleared ones.
    pub fn poll_write(&mut self) -> Option<PageWrite> {
        let idle = |number: &&u64| self.page(**number).is_some_and(|page| page.in_flight.is_none());
        let number = *self.wanting.iter().find(idle).or_else(|| self.stale.iter().find(idle))?;
        self.wanting.remove(&number);
        self.stale.remove(&number);
        let identity = self.identity(number);
        let page = self.page_mut(number)?;
        let mut bits = page.durable.clone();
        bits.union(&page.wanted);
        page.generation += 1;
        let generation = page.generation;
        let write = PageWrite {
            page: number,
            file_offset: (number * 2 + page.next_slot) * PAGE_BYTES,
            bytes: identity.encode(generation, &bits),
            generation,
        };
        page.in_flight = Some(Box::new(InFlight { generation, bits }));
        Some(write)
    }

    /// A page write ended; `Ok` means that it is durable. A failed one is repeated only when a bit of its page
    /// is asked for or cleared.
    ///
    /// # Panics
    /// If that write is not in flight.
    pub fn written(&mut self, number: u64, generation: u64, result: HostResult) -> PageWritten {
        let range = self.page_range(number);
        let page = self.page_mut(number).expect("a page of this map");
        let write = page.in_flight.take().expect("a write in flight");
        assert!(write.generation == generation, "another write of the page is in flight");
        if result.is_err() {
            // The slot's content is unknown, so it is the one to write next. The other slot still has every
            // durable bit, and so has this write, should it have landed: nothing needs to be written now.
            page.wanted = RegionBits::EMPTY;
            self.wanting.remove(&number);
            return PageWritten::Failed { range };
        }
        page.next_slot = 1 - page.next_slot;
        // Bits that were cleared meanwhile stay off; only wanted ones turn durable.
        let before = page.durable.count();
        let mut landed = page.wanted.clone();
        landed.intersect(&write.bits);
        page.wanted.subtract(&landed);
        page.durable.union(&landed);
        let added = page.durable.count() - before;
        let more = !page.wanted.is_empty();
        self.count += added;
        if more {
            self.wanting.insert(number);
        }
        PageWritten::Durable
    }

    /// The regions whose bit is set and durable, in ascending order.
    pub fn set_regions(&self) -> impl Iterator<Item = u64> {
        (0_u64..).zip(&self.pages).flat_map(|(number, page)| {
            let start = number * PAGE_REGIONS;
            std::iter::successors(page.durable.next_set(0), |bit| page.durable.next_set(bit + 1))
                .map(move |bit| start + bit)
        })
    }

    /// Asks for every bit.
    pub fn set_all(&mut self) {
        let all = ByteRange::new(0, self.regions.saturating_mul(self.region_bytes));
        self.request(all.unwrap_or_default());
    }

    /// Clears a region's bit: at once in memory, later in the file.
    ///
    /// # Panics
    /// If the region is not the map's, or its bit is wanted: then a write waits for it.
    pub fn clear_region(&mut self, region: u64) {
        assert!(region < self.regions, "region {region} is not of this volume");
        let (number, bit) = (region / PAGE_REGIONS, region % PAGE_REGIONS);
        let page = self.page_mut(number).expect("a page of this map");
        assert!(!page.wanted.contains(bit), "region {region} is wanted");
        let cleared = page.durable.clear(bit..bit + 1);
        self.count -= cleared;
        if cleared > 0 {
            self.stale.insert(number);
        }
    }

    /// How many regions' bits are set and durable.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// True if no page is due to be written and none is in flight.
    pub fn is_settled(&self) -> bool {
        let idle = self.pages.iter().all(|page| page.in_flight.is_none());
        idle && self.wanting.is_empty() && self.stale.is_empty()
    }

    /// The file's length.
    pub fn file_bytes(&self) -> ByteCount {
        ByteCount(self.page_count() * 2 * PAGE_BYTES)
    }

    /// The regions that a range touches.
    ///
    /// # Panics
    /// If the range reaches beyond the volume's last region.
    pub fn regions_of(&self, range: ByteRange) -> Range<u64> {
        let regions = region_numbers(range, self.region_bytes);
        assert!(regions.end <= self.regions, "range {range} is not of this volume");
        regions
    }

    fn identity(&self, page: u64) -> PageIdentity {
        PageIdentity { volume: self.volume, page, region_bytes: self.region_bytes }
    }

    fn page_count(&self) -> u64 {
        self.regions.div_ceil(PAGE_REGIONS)
    }

    /// How many regions a page stands for.
    fn page_regions(&self, number: u64) -> u64 {
        (self.regions - number * PAGE_REGIONS).min(PAGE_REGIONS)
    }

    /// The bytes of the volume that a page stands for; the last region may end beyond the volume.
    fn page_range(&self, number: u64) -> ByteRange {
        let start = (number * PAGE_REGIONS).saturating_mul(self.region_bytes);
        let length = self.page_regions(number).saturating_mul(self.region_bytes);
        ByteRange::new(start, length.min(u64::MAX - start)).unwrap_or_default()
    }

    fn page(&self, number: u64) -> Option<&Page> {
        self.pages.get(usize::try_from(number).ok()?)
    }

    fn page_mut(&mut self, number: u64) -> Option<&mut Page> {
        self.pages.get_mut(usize::try_from(number).ok()?)
    }
}

impl Page {
    const fn empty() -> Self {
        Self {
            durable: RegionBits::EMPTY,
            wanted: RegionBits::EMPTY,
            generation: 0,
            next_slot: 0,
            in_flight: None,
        }
    }

    /// The page that its slots say; or, with `false`, the one that stands for slots that do not say it.
    fn load(identity: &PageIdentity, slots: SlotPair, regions: u64) -> (Self, bool) {
        // A slot that exists and cannot be read may be the newer one; one that is torn never became durable.
        let lost = slots.iter().any(Option::is_none);
        let decode = |slot: Option<Bytes>| slot.and_then(|bytes| identity.decode(&bytes, regions));
        let [first, second] = slots.map(decode);
        let newest = match (first, second) {
            (Some(first), Some(second)) if second.0 > first.0 => Some((second, 0)),
            (Some(first), _) => Some((first, 1)),
            (None, Some(second)) => Some((second, 0)),
            (None, None) => None,
        };
        let mut page = Self::empty();
        if let Some(((generation, bits), next_slot)) = newest {
            page.generation = generation;
            page.next_slot = next_slot;
            page.durable = bits;
            if !lost {
                return (page, true);
            }
        }
        page.generation = page.generation.saturating_add(GENERATION_LEAP);
        page.durable.set(0..regions);
        (page, false)
    }

    /// Wants those of the bits that are not durable.
    fn want(&mut self, bits: Range<u64>) {
        self.wanted.set(bits);
        self.wanted.subtract(&self.durable);
    }

    /// True if a wanted bit is in no write in flight.
    fn wants_more(&self) -> bool {
        let mut missing = self.wanted.clone();
        if let Some(write) = &self.in_flight {
            missing.subtract(&write.bits);
        }
        !missing.is_empty()
    }
}

/// The regions of `region_bytes` each that a range touches.
pub(crate) fn region_numbers(range: ByteRange, region_bytes: u64) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.offset() / region_bytes..range.end().div_ceil(region_bytes)
}

/// A range of regions, page by page, as bits of each page.
fn page_parts(regions: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let pages = regions.start / PAGE_REGIONS..regions.end.div_ceil(PAGE_REGIONS);
    pages.map(move |page| {
        let start = page * PAGE_REGIONS;
        let first = regions.start.saturating_sub(start);
        (page, first..(regions.end - start).min(PAGE_REGIONS))
    })
}
