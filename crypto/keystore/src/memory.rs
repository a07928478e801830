//! Keeping keys out of swap and core dumps.
//!
//! [`forbid_dumps`] is for the whole process: no core file, and no other process of the user may read its memory. [`guard`] is
//! for the places where keys lie for long, the expanded keys of open volumes: their pages are locked in memory and left out
//! of dumps that ignore the former. Both are best effort, as limits may forbid the locking: keys are guarded before they are
//! needed, and a volume is not refused for it; [`unguarded`] tells.
#![allow(unsafe_code, reason = "mlock and madvise by address; neither changes what the memory holds")]

use std::ffi::c_void;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, madvise, mlock};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Places that could not be locked.
static UNGUARDED: AtomicU64 = AtomicU64::new(0);

/// No core dump of this process from here on.
///
/// # Errors
/// The kernel refuses.
pub fn forbid_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Locks the pages that hold these bytes in memory and leaves them out of core dumps. They stay so when the bytes are freed:
/// other keys may lie in the same pages, and memory that held keys is used for the next ones.
pub fn guard(address: *const u8, bytes: usize) {
    let page = rustix::param::page_size();
    let offset = address.addr() % page;
    let start = address.wrapping_sub(offset).cast_mut().cast::<c_void>();
    let length = (offset + bytes).next_multiple_of(page);
    // SAFETY: locking pages changes no memory; an address that is not mapped is refused by the kernel.
    let locked = unsafe { mlock(start, length) };
    // SAFETY: leaving pages out of dumps changes no memory; an address that is not mapped is refused by the kernel.
    let left_out = unsafe { madvise(start, length, Advice::LinuxDontDump) };
    if locked.is_err() || left_out.is_err() {
        UNGUARDED.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many places could not be locked, or not be left out of dumps.
pub fn unguarded() -> u64 {
    UNGUARDED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping that holds the address, from /proc/self/smaps.
    fn flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some((from, to)) = range
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                inside = (from..to).contains(&address);
            }
            if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.to_owned();
            }
        }
        panic!("the address is not mapped")
    }

    #[test]
    fn guarded_bytes_are_locked_and_left_out_of_dumps() {
        let bytes = vec![1_u8; 100_000];
        guard(bytes.as_ptr(), bytes.len());
        for place in [0, 50_000, 99_999] {
            let flags = flags(bytes.as_ptr().addr() + place);
            assert!(flags.contains(" lo") && flags.contains(" dd"), "{flags}");
        }
        assert_eq!(unguarded(), 0);
    }
}
