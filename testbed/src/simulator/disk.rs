//! A virtual file on a disk with a volatile cache.
//!
//! Fault model: a completed write is visible and volatile until a sync that was submitted after its completion
//! succeeds. At power loss each unflushed sector of 512 bytes survives or not, independently, also of writes in
//! flight. A sync that fails drops some of what it covered, visibly: reads show the older content from then on; the
//! rest stays volatile and a later sync covers it. A failed write has stored some of its sectors, visibly.

use std::collections::VecDeque;

use block::SECTOR_BYTES;
use bytes::Bytes;

use super::size;
use crate::harness::Random;

/// What a write stores.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Data(Bytes),
    Zeros(usize),
}

impl Content {
    pub(super) fn length(&self) -> usize {
        match self {
            Self::Data(bytes) => bytes.len(),
            Self::Zeros(length) => *length,
        }
    }

    fn slice(&self, start: usize, end: usize) -> Self {
        match self {
            Self::Data(bytes) => Self::Data(bytes.slice(start..end)),
            Self::Zeros(_) => Self::Zeros(end - start),
        }
    }

    fn store(&self, image: &mut [u8], offset: usize) {
        match self {
            Self::Data(bytes) => image[offset..offset + bytes.len()].copy_from_slice(bytes),
            Self::Zeros(length) => image[offset..offset + length].fill(0),
        }
    }
}

/// A completed write, or what a failed sync left of it.
#[derive(Clone, Debug)]
struct Landed(Vec<(usize, Content)>);

/// One file.
#[derive(Clone, Debug)]
pub(super) struct VirtualFile {
    /// What reads show.
    current: Vec<u8>,
    /// What survives every power loss.
    stable: Vec<u8>,
    unflushed: VecDeque<Landed>,
    /// How many writes left `unflushed` at its front.
    flushed: u64,
}

impl VirtualFile {
    pub(super) fn new(length: u64) -> Self {
        let length = size(length);
        Self { current: vec![0; length], stable: vec![0; length], unflushed: VecDeque::new(), flushed: 0 }
    }

    pub(super) fn current(&self) -> &[u8] {
        &self.current
    }

    pub(super) fn stable(&self) -> &[u8] {
        &self.stable
    }

    pub(super) fn read(&self, offset: u64, length: u64) -> Bytes {
        Bytes::copy_from_slice(&self.current[size(offset)..size(offset + length)])
    }

    /// Everything that completed so far lies before this mark.
    pub(super) fn mark(&self) -> u64 {
        self.flushed + super::wide(self.unflushed.len())
    }

    /// Everything before the mark is on stable media.
    pub(super) fn is_stable_before(&self, mark: u64) -> bool {
        self.flushed >= mark
    }

    /// A write completed.
    pub(super) fn land(&mut self, offset: u64, content: Content) {
        let offset = size(offset);
        content.store(&mut self.current, offset);
        self.unflushed.push_back(Landed(vec![(offset, content)]));
    }

    /// A write completed that is durable by itself.
    pub(super) fn land_durable(&mut self, offset: u64, content: Content) {
        let (start, end) = (size(offset), size(offset) + content.length());
        // An older write of these sectors must not come back later.
        for landed in &mut self.unflushed {
            let parts = std::mem::take(&mut landed.0);
            landed.0 = parts
                .into_iter()
                .flat_map(|(offset, content)| outside(offset, &content, start, end))
                .collect();
        }
        content.store(&mut self.current, start);
        content.store(&mut self.stable, start);
    }

    /// A byte turns over on the media, and nobody is told.
    pub(super) fn corrupt(&mut self, offset: u64) {
        let offset = size(offset);
        self.current[offset] ^= 0x40;
        self.stable[offset] = self.current[offset];
    }

    /// Some sectors of a write reached the cache, others did not.
    pub(super) fn land_partly(&mut self, offset: u64, content: &Content, permille: u32, random: &mut Random) {
        for (sector, part) in sectors(size(offset), content) {
            if random.chance(permille) {
                self.land(super::wide(sector), part);
            }
        }
    }

    /// A sync that was submitted at `mark` succeeded.
    pub(super) fn sync(&mut self, mark: u64) {
        while self.flushed < mark {
            let Some(landed) = self.unflushed.pop_front() else { return };
            landed.0.iter().for_each(|(offset, content)| content.store(&mut self.stable, *offset));
            self.flushed += 1;
        }
    }

    /// A sync that was submitted at `mark` failed.
    pub(super) fn fail_sync(&mut self, mark: u64, random: &mut Random) {
        let permille = [0, 300, 700, 1000][random.index(4)];
        for (offset, content) in self.unflushed.iter().flat_map(|landed| &landed.0) {
            let range = *offset..*offset + content.length();
            self.current[range.clone()].copy_from_slice(&self.stable[range]);
        }
        for (index, landed) in (self.flushed..).zip(&mut self.unflushed) {
            if index < mark {
                let parts = landed.0.iter().flat_map(|(offset, content)| sectors(*offset, content));
                landed.0 = parts.filter(|_| random.chance(permille)).collect();
            }
            landed.0.iter().for_each(|(offset, content)| content.store(&mut self.current, *offset));
        }
    }

    /// Power is lost: each unflushed sector survives or not.
    pub(super) fn lose_power(&mut self, random: &mut Random) {
        let permille = [0, 100, 500, 900, 1000][random.index(5)];
        for landed in std::mem::take(&mut self.unflushed) {
            for (offset, content) in landed.0.iter().flat_map(|(offset, content)| sectors(*offset, content)) {
                if random.chance(permille) {
                    content.store(&mut self.stable, offset);
                }
            }
            self.flushed += 1;
        }
        self.current.copy_from_slice(&self.stable);
    }
}

fn sectors(offset: usize, content: &Content) -> impl Iterator<Item = (usize, Content)> + use<> {
    let step = size(SECTOR_BYTES);
    let length = content.length();
    let content = content.clone();
    (0..length)
        .step_by(step)
        .map(move |start| (offset + start, content.slice(start, length.min(start + step))))
}

/// The parts of a write that lie outside `start..end`.
fn outside(
    offset: usize,
    content: &Content,
    start: usize,
    end: usize,
) -> impl Iterator<Item = (usize, Content)> + use<> {
    let length = content.length();
    let before = start.saturating_sub(offset).min(length);
    let after = end.saturating_sub(offset).min(length).max(before);
    let parts = [(offset, content.slice(0, before)), (offset + after, content.slice(after, length))];
    parts.into_iter().filter(|(_, part)| part.length() > 0)
}
