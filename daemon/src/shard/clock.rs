//! The clocks of production: pure crates get their readings as arguments.

use block::{Monotonic, WallTime};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// CLOCK_BOOTTIME: never goes back, and goes on while the machine sleeps, as leases and grace times must.
pub fn monotonic() -> Monotonic {
    Monotonic(nanos(clock_gettime(ClockId::Boottime)))
}

/// CLOCK_REALTIME: for people and stamps; it may jump.
pub fn wall() -> WallTime {
    WallTime(nanos(clock_gettime(ClockId::Realtime)))
}

fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
