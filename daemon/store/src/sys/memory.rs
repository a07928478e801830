//! Page-aligned anonymous memory: always initialised, never in a core dump, never shared with a child process.
//!
//! Regions of whole huge pages are aligned to them and ask for them (`MADV_HUGEPAGE`): a direct transfer of such a
//! buffer is one segment for the device instead of one for each 4096 bytes, which virtio disks serve twice as fast.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The alignment of every block and the unit in which pages return to the system.
pub(crate) const PAGE_BYTES: usize = 4096;

/// The size and alignment of a transparent huge page (x86-64, and AArch64 with 4 KiB pages).
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A private anonymous mapping; unmapped when the last block in it is gone.
struct Region {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Region` itself hands out no access to it.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` allows nothing.
unsafe impl Sync for Region {}

/// A piece of a region that nobody else can reach: as unique as a `Box<[u8]>`, but page-aligned.
pub(crate) struct Block {
    address: NonNull<u8>,
    bytes: usize,
    region: Arc<Region>,
}

// SAFETY: a block is the only way to its bytes, like a `Box<[u8]>`, and may move between threads as one does.
unsafe impl Send for Block {}
// SAFETY: `&Block` gives `&[u8]` only.
unsafe impl Sync for Block {}

impl Region {
    fn map(bytes: usize) -> io::Result<Self> {
        let region =
            if bytes >= HUGE_PAGE_BYTES { Self::map_aligned(bytes)? } else { Self::map_at_any(bytes)? };
        // Buffers hold plaintext, which must not reach core dumps; and a child's copy-on-write must not part a
        // page from the transfer that the kernel does into it. Kernels that know neither advice still serve.
        region.advise(Advice::LinuxDontDump);
        region.advise(Advice::LinuxDontFork);
        if bytes >= HUGE_PAGE_BYTES {
            region.advise(Advice::LinuxHugepage);
        }
        Ok(region)
    }

    fn map_at_any(bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address that the kernel chooses touches no existing memory.
        let address = unsafe { mmap_anonymous(ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) }?;
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, bytes })
    }

    /// A mapping that begins at a huge page. Newer kernels align by themselves; older ones are asked for more, of
    /// which the ends go back.
    fn map_aligned(bytes: usize) -> io::Result<Self> {
        let whole = Self::map_at_any(bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?)?;
        let head = whole.address.align_offset(HUGE_PAGE_BYTES);
        assert!(head < HUGE_PAGE_BYTES, "bytes can be aligned to any power of two");
        let (address, whole_bytes) = (whole.address, whole.bytes);
        std::mem::forget(whole);
        // SAFETY: `head + bytes <= whole_bytes`, so all three pieces lie within the new mapping, whose owner was
        // forgotten; each piece gets exactly one owner, and those of the ends unmap them at once.
        unsafe {
            let piece = |offset: usize, bytes: usize| Self { address: address.add(offset), bytes };
            if head > 0 {
                drop(piece(0, head));
            }
            drop(piece(head + bytes, whole_bytes - head - bytes));
            Ok(piece(head, bytes))
        }
    }

    fn advise(&self, advice: Advice) {
        // SAFETY: the range is this region's own mapping, and neither advice given here changes its content.
        let _ = unsafe { madvise(self.address.as_ptr().cast(), self.bytes, advice) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping, and every block in it held an `Arc` to it, so none is left.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

impl Block {
    /// Maps `count` new blocks of `bytes` each, all zero. Their pages take no memory before they are touched.
    ///
    /// `bytes` must be a positive multiple of [`PAGE_BYTES`], `count` positive.
    pub(crate) fn map(count: usize, bytes: usize) -> io::Result<Vec<Self>> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES) && count > 0, "a block is whole pages");
        let total = count.checked_mul(bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Arc::new(Region::map(total)?);
        let block = |index: usize| Self {
            // SAFETY: `index < count`, so the result lies within the mapping of `count * bytes` bytes.
            address: unsafe { region.address.add(index * bytes) },
            bytes,
            region: Arc::clone(&region),
        };
        Ok((0..count).map(block).collect())
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where its region begins: blocks of one region have the same.
    pub(crate) fn region(&self) -> usize {
        self.region.address.addr().get()
    }

    /// How many blocks of this size its region was cut into.
    pub(crate) fn siblings(&self) -> usize {
        self.region.bytes / self.bytes
    }

    /// The first `length` bytes; at most all of them.
    pub(crate) fn prefix(&self, length: usize) -> &[u8] {
        let length = length.min(self.bytes);
        // SAFETY: the block's bytes are mapped while `region` lives, initialised (the kernel zeroes new pages), and
        // reachable through this block only, which is borrowed.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), length) }
    }

    /// The first `length` bytes, to write; at most all of them.
    pub(crate) fn prefix_mut(&mut self, length: usize) -> &mut [u8] {
        let length = length.min(self.bytes);
        // SAFETY: as in `prefix`, and the block is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), length) }
    }

    /// Returns the block's pages to the system. The block stays usable and reads as zeros.
    pub(crate) fn release_pages(&mut self) {
        assert!(self.bytes <= self.region.bytes, "a block lies within its region");
        // SAFETY: the range is this block's own, borrowed mutably; dropping private anonymous pages makes them
        // read as zeros, which is a valid content. A refusal leaves the content, which is valid as well.
        let _ = unsafe { madvise(self.address.as_ptr().cast(), self.bytes, Advice::LinuxDontNeed) };
    }
}
