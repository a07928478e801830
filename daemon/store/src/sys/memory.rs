//! Page-aligned anonymous memory: always initialised, never in a core dump, never shared with a child process.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The alignment of every block and the unit in which pages return to the system.
pub(crate) const PAGE_BYTES: usize = 4096;

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
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address that the kernel chooses touches no existing memory.
        let address = unsafe { mmap_anonymous(ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) }?;
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Self { address, bytes };
        // Buffers hold plaintext, which must not reach core dumps; and a child's copy-on-write must not part a
        // page from the transfer that the kernel does into it. Kernels that know neither advice still serve.
        region.advise(Advice::LinuxDontDump);
        region.advise(Advice::LinuxDontFork);
        Ok(region)
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
