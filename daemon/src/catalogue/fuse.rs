//! Where a crash can be put in tests: each durable step asks the fuse first. In production it never blows.

use std::io;

/// Counts the durable steps that are left before the simulated crash.
#[derive(Debug, Default)]
pub(super) struct Fuse {
    #[cfg(test)]
    steps_left: Option<std::sync::atomic::AtomicU32>,
}

impl Fuse {
    /// A fuse that lets `steps` durable steps pass, and none after.
    #[cfg(test)]
    pub(super) const fn after(steps: u32) -> Self {
        Self { steps_left: Some(std::sync::atomic::AtomicU32::new(steps)) }
    }

    /// True if the process is to be taken for dead from here on.
    #[cfg(test)]
    pub(super) fn blows(&self) -> bool {
        use std::sync::atomic::Ordering::SeqCst;
        let one_less = |left: u32| left.checked_sub(1);
        self.steps_left.as_ref().is_some_and(|left| left.fetch_update(SeqCst, SeqCst, one_less).is_err())
    }

    /// True if the process is to be taken for dead from here on.
    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "the test build counts")]
    pub(super) const fn blows(&self) -> bool {
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
