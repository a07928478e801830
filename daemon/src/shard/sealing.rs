//! The work of sealing and opening: at most 256 KiB a turn, so that one long request does not hold up the others.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{ByteRange, DATA_UNIT_BYTES, Lba, VolumeIndex};
use crypto::VolumeCipher;
use engine::{CommandId, StepId};
use store::Buffer;

use super::GroupKey;

/// Bytes sealed or opened in one turn.
pub(super) const TURN_BYTES: usize = 256 << 10;
/// Whole data units are sealed.
const UNIT: usize = 4096;

/// What is left of a turn's budget after these bytes, in whole data units.
pub(super) fn less(budget: usize, bytes: usize) -> usize {
    budget.saturating_sub(bytes.next_multiple_of(UNIT))
}

/// What becomes of the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// Plaintext for a host.
    Deliver { step: StepId, command: CommandId, device: ByteRange, wanted: ByteRange },
    /// Ciphertext of a write step.
    Prepared { step: StepId },
}

/// One buffer to be sealed or opened in place.
pub(super) struct Job {
    pub(super) key: GroupKey,
    pub(super) volume: VolumeIndex,
    pub(super) cipher: Arc<VolumeCipher>,
    pub(super) first: Lba,
    pub(super) buffer: Buffer,
    pub(super) then: Then,
    done: usize,
}

impl Job {
    pub(super) const fn new(
        key: GroupKey,
        volume: VolumeIndex,
        cipher: Arc<VolumeCipher>,
        first: Lba,
        buffer: Buffer,
        then: Then,
    ) -> Self {
        Self { key, volume, cipher, first, buffer, then, done: 0 }
    }

    /// Works on at most `budget` bytes; returns how many.
    fn work(&mut self, budget: usize) -> usize {
        let end = self.buffer.len().min(self.done + budget);
        let worked = end - self.done;
        let units = u64::try_from(self.done).unwrap_or(0) / DATA_UNIT_BYTES;
        let first = Lba(self.first.0 + units);
        if let Some(part) = self.buffer.get_mut(self.done..end) {
            match self.then {
                Then::Deliver { .. } => self.cipher.open(first, part),
                Then::Prepared { .. } => self.cipher.seal(first, part),
            }
        }
        self.done = end;
        worked
    }
}

/// Jobs in order.
#[derive(Default)]
pub(super) struct Sealing {
    jobs: VecDeque<Job>,
}

impl Sealing {
    pub(super) fn push(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Works on at most `budget` bytes, which it lowers; gives the jobs that it finished.
    pub(super) fn turn(&mut self, budget: &mut usize) -> Vec<Job> {
        assert!(budget.is_multiple_of(UNIT), "a budget is in whole data units");
        let mut finished = Vec::new();
        while *budget > 0 {
            let Some(mut job) = self.jobs.pop_front() else {
                break;
            };
            *budget -= job.work(*budget);
            if job.done == job.buffer.len() {
                finished.push(job);
            } else {
                // Long jobs take turns with those behind them.
                self.jobs.push_back(job);
            }
        }
        finished
    }
}
