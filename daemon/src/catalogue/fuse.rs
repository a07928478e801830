//! Where a crash can be put in tests: each durable step asks the fuse first. In production it never blows.

use std::io;

/// Counts the durable steps that are left before the simulated crash, or before one simulated failure of the disk.
#[derive(Debug, Default)]
pub(super) struct Fuse {
    #[cfg(test)]
    steps_left: Option<std::sync::atomic::AtomicU32>,
    #[cfg(test)]
    once: bool,
}

impl Fuse {
    /// A fuse that lets `steps` durable steps pass, and none after.
    #[cfg(test)]
    pub(super) const fn after(steps: u32) -> Self {
        Self { steps_left: Some(std::sync::atomic::AtomicU32::new(steps)), once: false }
    }

    /// A fuse that lets `steps` durable steps pass and one fail; the process goes on.
    #[cfg(test)]
    pub(super) const fn once_after(steps: u32) -> Self {
        Self { steps_left: Some(std::sync::atomic::AtomicU32::new(steps)), once: true }
    }

    /// True if this step fails.
    #[cfg(test)]
    pub(super) fn blows(&self) -> bool {
        use std::sync::atomic::Ordering::SeqCst;
        let Some(left) = &self.steps_left else {
            return false;
        };
        let blown = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err();
        if blown && self.once {
            left.store(u32::MAX, SeqCst);
        }
        blown
    }

    /// True if this step fails.
    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "the test build counts")]
    pub(super) const fn blows(&self) -> bool {
        false
    }

    /// True if the process is taken for dead, and must not write any more.
    #[cfg(test)]
    pub(super) fn is_blown(&self) -> bool {
        self.steps_left.as_ref().is_some_and(|left| left.load(std::sync::atomic::Ordering::SeqCst) == 0)
    }

    /// True if the process is taken for dead, and must not write any more.
    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "the test build counts")]
    pub(super) const fn is_blown(&self) -> bool {
        false
    }

    /// One durable step without a torn outcome.
    pub(super) fn step(&self) -> io::Result<()> {
        if self.blows() {
            return Err(io::Error::other("simulated crash"));
        }
        Ok(())
    }
}
