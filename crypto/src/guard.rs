//! Who is told where expanded keys lie, so as to keep the memory out of swap and core dumps.
//!
//! The crate is pure and does nothing of the kind itself. Told are addresses of bytes that stay where they are until the key
//! is dropped, which zeroes them.

use std::sync::OnceLock;

/// Takes the address and the number of bytes.
pub type KeyGuard = fn(*const u8, usize);

static GUARD: OnceLock<KeyGuard> = OnceLock::new();

/// From here on `guard` is told of each expanded key before it is used. The first call counts.
pub fn set_key_guard(guard: KeyGuard) {
    // A second guard is ignored, as documented.
    let _ = GUARD.set(guard);
}

pub(crate) fn guard(address: *const u8, bytes: usize) {
    if let Some(guard) = GUARD.get() {
        guard(address, bytes);
    }
}
