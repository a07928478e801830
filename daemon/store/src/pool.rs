//! Aligned buffers within a budget.
//!
//! A pool hands out page-aligned [`Buffer`]s in size classes (4 KiB to 1 MiB, powers of two; larger ones exactly,
//! in whole pages). It counts what is out, refuses beyond its budget, and takes buffers back from any thread.
//! Memory at rest above a watermark goes back to the system. All memory is initialised, but a reused buffer still
//! holds what it held before: fill it before anyone else sees it.
//!
//! Buffers of 16 KiB and more lie in huge pages, if the system has some to give. Returning a part of a huge page
//! splits it for good, so a pool at rest returns whole regions, which are mapped anew when they are needed.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::sys::memory::{Block, HUGE_PAGE_BYTES, PAGE_BYTES};

/// The longest buffer of a pool.
pub const BUFFER_BYTES_MAX: usize = 64 << 20;

/// The largest size class.
const CLASS_BYTES_MAX: usize = 1 << 20;
/// How much is mapped at once for classes below [`HUGE_CLASS_BYTES_MIN`].
const SMALL_REGION_BYTES: usize = 1 << 20;
/// From this class on buffers lie in huge pages: the smallest that saves a transfer more than a segment or two.
const HUGE_CLASS_BYTES_MIN: usize = 16 << 10;
/// 4 KiB, 8 KiB, ... 1 MiB.
const CLASS_COUNT: usize = 9;
/// Resting memory is kept warm up to this share of the budget; a busy pool swings by less, an idle one gives back
/// the rest.
const WARM_SHARE: usize = 4;

/// A pool of aligned buffers; a cheap handle, to be cloned and shared.
#[derive(Clone)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

/// An aligned piece of memory, owned alone; its memory returns to the pool when it is dropped.
pub struct Buffer {
    /// `None` only while being dropped.
    block: Option<Block>,
    length: usize,
    pool: Arc<Shared>,
}

struct Shared {
    budget_bytes: usize,
    warm_bytes_max: usize,
    in_use_bytes: AtomicUsize,
    shelves: Mutex<Shelves>,
}

/// The blocks at rest. Their number is bounded by the highest simultaneous use of each class.
#[derive(Default)]
struct Shelves {
    classes: [Shelf; CLASS_COUNT],
    warm_bytes: usize,
}

#[derive(Default)]
struct Shelf {
    /// Blocks whose pages are in memory, the most recently used last.
    warm: VecDeque<Block>,
    /// Blocks whose pages are with the system: addresses only.
    cold: Vec<Block>,
}

impl BufferPool {
    /// A pool whose buffers together take at most `budget_bytes` ([`take_over`](Self::take_over) aside).
    pub fn new(budget_bytes: usize) -> Self {
        let shared = Shared {
            budget_bytes,
            warm_bytes_max: budget_bytes / WARM_SHARE,
            in_use_bytes: AtomicUsize::new(0),
            shelves: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A buffer of `length` bytes, or `None` if the budget (or the system's memory) does not allow it now: wait
    /// until others are dropped. Its content is initialised but arbitrary.
    ///
    /// # Panics
    ///
    /// If `length` is above [`BUFFER_BYTES_MAX`].
    pub fn try_take(&self, length: usize) -> Option<Buffer> {
        let capacity = capacity_of(length);
        let charge = |in_use: usize| {
            let total = in_use.checked_add(capacity)?;
            (total <= self.shared.budget_bytes).then_some(total)
        };
        let counter = &self.shared.in_use_bytes;
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, charge).ok()?;
        let Some(block) = self.shared.block(capacity) else {
            counter.fetch_sub(capacity, Ordering::Relaxed);
            return None;
        };
        Some(self.buffer(block, length))
    }

    /// A buffer of `length` bytes, beyond the budget if need be: for bounded internal uses that must not wait. It
    /// counts as in use all the same.
    ///
    /// # Panics
    ///
    /// If `length` is above [`BUFFER_BYTES_MAX`]. Aborts if the system has no memory.
    pub fn take_over(&self, length: usize) -> Buffer {
        let capacity = capacity_of(length);
        let Some(block) = self.shared.block(capacity) else {
            let layout = Layout::from_size_align(capacity, PAGE_BYTES);
            handle_alloc_error(layout.unwrap_or(Layout::new::<u8>()));
        };
        self.shared.in_use_bytes.fetch_add(capacity, Ordering::Relaxed);
        self.buffer(block, length)
    }

    /// Gives all resting memory back to the system; for a pool that has nothing to do.
    pub fn trim(&self) {
        let regions =
            self.shared.shelves.lock().unwrap_or_else(PoisonError::into_inner).take_regions_at_rest();
        drop(regions);
        self.shared.shrink_to(0);
    }

    /// Bytes of all buffers that are out, at their full capacity.
    pub fn in_use_bytes(&self) -> usize {
        self.shared.in_use_bytes.load(Ordering::Relaxed)
    }

    /// The budget.
    pub fn budget_bytes(&self) -> usize {
        self.shared.budget_bytes
    }

    fn buffer(&self, block: Block, length: usize) -> Buffer {
        Buffer { block: Some(block), length, pool: Arc::clone(&self.shared) }
    }
}

impl Shared {
    /// A block of exactly `capacity` bytes, warm if there is one; `None` if the system refuses.
    fn block(&self, capacity: usize) -> Option<Block> {
        if capacity > CLASS_BYTES_MAX {
            return Block::map(1, capacity).ok()?.pop();
        }
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        let shelf = shelves.shelf(capacity);
        if let Some(block) = shelf.warm.pop_back() {
            shelves.warm_bytes -= capacity;
            return Some(block);
        }
        if shelf.cold.is_empty() {
            shelf.cold = Block::map(region_bytes(capacity) / capacity, capacity).ok()?;
        }
        shelf.cold.pop()
    }

    /// Takes a block back that came from [`block`](Self::block).
    fn put_back(&self, block: Block) {
        let capacity = block.bytes();
        self.in_use_bytes.fetch_sub(capacity, Ordering::Relaxed);
        if capacity > CLASS_BYTES_MAX {
            return;
        }
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.shelf(capacity).warm.push_back(block);
        shelves.warm_bytes += capacity;
        let over = shelves.warm_bytes > self.warm_bytes_max;
        drop(shelves);
        if over {
            self.shrink_to(self.warm_bytes_max);
        }
    }

    /// Gives resting memory above `warm_bytes_max` back to the system.
    fn shrink_to(&self, warm_bytes_max: usize) {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        while shelves.warm_bytes > warm_bytes_max {
            let Some(mut coldest) = shelves.least_useful() else {
                break;
            };
            // The system call runs without the lock: other threads take and return buffers meanwhile.
            drop(shelves);
            coldest.release_pages();
            shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
            shelves.shelf(coldest.bytes()).cold.push(coldest);
        }
    }
}

impl Shelves {
    /// The shelf of a class, by the class's size.
    fn shelf(&mut self, capacity: usize) -> &mut Shelf {
        assert!(capacity.is_power_of_two() && capacity >= PAGE_BYTES, "{capacity} is no class");
        let shift = capacity.trailing_zeros() - PAGE_BYTES.trailing_zeros();
        let index = usize::try_from(shift).unwrap_or(usize::MAX);
        self.classes.get_mut(index).expect("the size is a class's")
    }

    /// Takes all blocks of those huge regions of which none is out; dropped, they are unmapped.
    fn take_regions_at_rest(&mut self) -> Vec<Block> {
        let huge = |block: &Block| block.bytes() >= HUGE_CLASS_BYTES_MIN;
        let mut at_rest: BTreeMap<usize, usize> = BTreeMap::new();
        for block in self.classes.iter().flat_map(|shelf| shelf.warm.iter().chain(&shelf.cold)) {
            if huge(block) {
                *at_rest.entry(block.region()).or_default() += 1;
            }
        }
        let is_whole = |block: &Block| at_rest.get(&block.region()) == Some(&block.siblings());
        let mut taken = Vec::new();
        for shelf in &mut self.classes {
            let (whole, warm): (VecDeque<_>, VecDeque<_>) = shelf.warm.drain(..).partition(is_whole);
            self.warm_bytes -= whole.iter().map(Block::bytes).sum::<usize>();
            shelf.warm = warm;
            taken.extend(whole);
            taken.extend(shelf.cold.extract_if(.., |block| is_whole(block)));
        }
        taken
    }

    /// Takes the longest resting block of the class that holds the most, so that a class which the load no longer
    /// uses makes room for the one that it does use.
    fn least_useful(&mut self) -> Option<Block> {
        let warm_bytes =
            |shelf: &Shelf| shelf.warm.iter().map(Block::bytes).next().unwrap_or(0) * shelf.warm.len();
        let largest = self.classes.iter_mut().max_by_key(|shelf| warm_bytes(shelf))?;
        let block = largest.warm.pop_front()?;
        self.warm_bytes -= block.bytes();
        Some(block)
    }
}

impl Buffer {
    /// The bytes that [`set_len`](Self::set_len) may reach.
    pub fn capacity(&self) -> usize {
        self.block.as_ref().map_or(0, Block::bytes)
    }

    /// Changes the length; bytes gained are initialised but arbitrary.
    ///
    /// # Panics
    ///
    /// If `length` exceeds the capacity.
    pub fn set_len(&mut self, length: usize) {
        assert!(length <= self.capacity(), "{length} bytes in a buffer of {}", self.capacity());
        self.length = length;
    }

    /// Shortens the buffer to `length` bytes, if it is longer.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Makes the content immutable and shareable, without a copy. The memory returns to the pool, from whatever
    /// thread, when the last `Bytes` of it is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], |block| block.prefix(self.length))
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        self.block.as_mut().map_or(&mut [], |block| block.prefix_mut(length))
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.put_back(block);
        }
    }
}

impl fmt::Debug for Buffer {
    /// Says the length only: the content may be plaintext.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Buffer({} of {} bytes)", self.length, self.capacity())
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (in_use, budget) = (self.in_use_bytes(), self.budget_bytes());
        write!(formatter, "BufferPool({in_use} of {budget} bytes in use)")
    }
}

/// The capacity of the smallest block for `length` bytes.
fn capacity_of(length: usize) -> usize {
    assert!(length <= BUFFER_BYTES_MAX, "{length} bytes in one buffer");
    if length > CLASS_BYTES_MAX {
        length.next_multiple_of(PAGE_BYTES)
    } else {
        length.next_power_of_two().max(PAGE_BYTES)
    }
}

/// How much is mapped at once for a class.
fn region_bytes(capacity: usize) -> usize {
    if capacity >= HUGE_CLASS_BYTES_MIN { HUGE_PAGE_BYTES } else { SMALL_REGION_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warm_bytes(pool: &BufferPool) -> usize {
        pool.shared.shelves.lock().unwrap().warm_bytes
    }

    #[test]
    fn the_budget_refuses_and_a_drop_frees_it() {
        let pool = BufferPool::new(64 << 10);
        let first = pool.try_take(33 << 10).unwrap();
        assert_eq!((first.len(), first.capacity()), (33 << 10, 64 << 10));
        assert!(pool.try_take(1).is_none());
        let beyond = pool.take_over(1);
        assert_eq!(pool.in_use_bytes(), 68 << 10);
        drop(first);
        assert!(pool.try_take(60 << 10).is_none());
        drop(beyond);
        assert_eq!(pool.in_use_bytes(), 0);
        assert!(pool.try_take(60 << 10).is_some());
    }

    #[test]
    fn buffers_are_aligned_disjoint_zero_at_first_and_reused() {
        let pool = BufferPool::new(16 << 20);
        let mut buffers: Vec<Buffer> = (0..600).map(|_| pool.try_take(4096).unwrap()).collect();
        for (index, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!(buffer.as_ptr().align_offset(4096), 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(u8::try_from(index % 251).unwrap());
        }
        for (index, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|byte| usize::from(*byte) == index % 251));
        }
        let last = buffers.pop().unwrap();
        let address = last.as_ptr();
        drop(last);
        assert_eq!(pool.try_take(100).unwrap().as_ptr(), address);
    }

    #[test]
    fn memory_at_rest_above_the_watermark_goes_back_to_the_system() {
        let pool = BufferPool::new(4 << 20);
        let fill = |length: usize| {
            let take = |_| pool.try_take(length).unwrap();
            let mut buffers: Vec<Buffer> = (0..(4 << 20) / length).map(take).collect();
            buffers.iter_mut().for_each(|buffer| buffer.fill(7));
        };
        fill(4096);
        assert_eq!(warm_bytes(&pool), 1 << 20);
        let released = |length| {
            let buffers: Vec<Buffer> = std::iter::from_fn(|| pool.try_take(length)).collect();
            buffers.iter().filter(|buffer| buffer.iter().all(|byte| *byte == 0)).count()
        };
        assert_eq!(released(4096), 768);
        // The other class gets its share although the first one fills the watermark.
        fill(64 << 10);
        assert_eq!(warm_bytes(&pool), 1 << 20);
        let shelves = pool.shared.shelves.lock().unwrap();
        assert!(shelves.classes[4].warm.len() >= 7);
    }

    #[test]
    fn a_trimmed_pool_holds_no_memory_and_serves_on() {
        let pool = BufferPool::new(4 << 20);
        let mut buffer = pool.try_take(64 << 10).unwrap();
        buffer.fill(1);
        drop(buffer);
        pool.trim();
        assert_eq!(warm_bytes(&pool), 0);
        assert!(pool.try_take(64 << 10).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_trim_unmaps_whole_regions_and_leaves_those_in_use() {
        let pool = BufferPool::new(8 << 20);
        let per_region = HUGE_PAGE_BYTES / (128 << 10);
        let mut buffers: Vec<Buffer> =
            (0..3 * per_region).map(|_| pool.try_take(128 << 10).unwrap()).collect();
        buffers.iter_mut().for_each(|buffer| buffer.fill(5));
        for buffer in buffers.iter().step_by(per_region) {
            assert_eq!(buffer.as_ptr().align_offset(128 << 10), 0, "a region is aligned to its huge page");
        }
        let kept = buffers.pop().unwrap();
        drop(buffers);
        pool.trim();
        let at_rest = |pool: &BufferPool| {
            let shelves = pool.shared.shelves.lock().unwrap();
            shelves.classes.iter().map(|shelf| shelf.warm.len() + shelf.cold.len()).sum::<usize>()
        };
        assert_eq!(at_rest(&pool), per_region - 1);
        assert!(kept.iter().all(|byte| *byte == 5));
        drop(kept);
        pool.trim();
        assert_eq!((at_rest(&pool), warm_bytes(&pool)), (0, 0));
        assert!(pool.try_take(128 << 10).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn large_buffers_are_exact_and_counted() {
        let pool = BufferPool::new(64 << 20);
        let mut large = pool.try_take((3 << 20) + 1).unwrap();
        assert_eq!(large.capacity(), (3 << 20) + 4096);
        large.fill(1);
        assert!(pool.try_take(BUFFER_BYTES_MAX).is_none());
        drop(large);
        assert_eq!(pool.in_use_bytes(), 0);
        assert_eq!(warm_bytes(&pool), 0);
        assert!(pool.try_take(BUFFER_BYTES_MAX).is_some());
    }

    #[test]
    fn frozen_buffers_return_from_other_threads() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.try_take(1 << 20).unwrap();
        buffer.fill(9);
        buffer.truncate(5000);
        let bytes = buffer.freeze();
        let slices: Vec<Bytes> = (0..4).map(|index| bytes.slice(index * 1000..)).collect();
        drop(bytes);
        let threads: Vec<_> = slices
            .into_iter()
            .map(|slice| std::thread::spawn(move || slice.iter().all(|byte| *byte == 9)))
            .collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
        assert_eq!(pool.in_use_bytes(), 0);
        assert!(pool.try_take(1 << 20).is_some());
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let mut buffer = BufferPool::new(8192).try_take(8192).unwrap();
        buffer.fill(3);
        buffer.set_len(10);
        assert_eq!(buffer.freeze().as_ref(), [3; 10]);
    }
}
