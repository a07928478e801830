//! What a daemon holds: descriptors, memory, connections. After any abuse it must be what it was before.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::Site;

/// The allocator's arenas and stacks of threads that came and went. A test that looks for leaks leaks more than this
/// if it finds one, and begins with a daemon whose buffers are warm.
const MEMORY_SLACK_BYTES: u64 = 24 << 20;

/// What a daemon held at one time.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    descriptors: usize,
    resident_bytes: u64,
    connections: u64,
}

impl Footprint {
    /// Measures.
    ///
    /// # Errors
    /// If the daemon does not run or does not answer.
    pub fn of(site: &Site) -> Result<Self> {
        let connections = site.metrics()?.value("farshore_volume_connections", "").unwrap_or(0.0);
        // The connection that the metrics came by, and others that were just closed, may still be there.
        let mut descriptors = usize::MAX;
        for _ in 0..5 {
            descriptors = descriptors.min(site.descriptors()?);
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Self {
            descriptors,
            resident_bytes: site.resident_bytes()?,
            connections: format!("{connections:.0}").parse()?,
        })
    }

    /// Waits until the daemon holds no more than at this time, give or take what an allocator keeps.
    ///
    /// # Errors
    /// If it still does after `timeout`.
    pub fn wait_restored(self, site: &Site, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = Self::of(site)?;
            let restored = now.descriptors <= self.descriptors
                && now.connections <= self.connections
                && now.resident_bytes <= self.resident_bytes + MEMORY_SLACK_BYTES;
            if restored {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("{} holds {now:?} after {timeout:?}, {self:?} before", site.name());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}
