//! Drills: a copy of the target at a recovery point that hosts read and write while the mirror goes on.
//!
//! The model knows what each block of the copy must be: what the drill wrote, else what was read there before, else
//! the oracle's content at the point. That nothing of it reaches the replica is seen by every other check, for its
//! contents are nobody else's.

use std::collections::{BTreeMap, BTreeSet};

use block::{BlockCount, ByteRange, HostError, Lba, Position, VolumeIndex, WallTime};
use bytes::Bytes;
use daemon::group::{DrillIo, RewindTo};
use protocol::Role;

use super::disk::VirtualFile;
use super::plan::SECOND;
use super::site::Operation;
use super::world::World;
use super::{host, oracle, size};

/// Requests under way; more wait.
const REQUESTS_MAX: usize = 12;

#[derive(Debug)]
struct Request {
    volume: usize,
    range: ByteRange,
    /// What its blocks are when it is done; `None` for a read.
    hashes: Option<Vec<u64>>,
}

/// A drill as its hosts know it.
#[derive(Debug)]
pub(super) struct DrillModel {
    point: Position,
    /// The blocks of its volumes.
    sizes: Vec<u64>,
    /// What was read of the image, or written.
    known: BTreeMap<usize, u64>,
    /// Of these, what the drill wrote.
    written: BTreeMap<usize, u64>,
    busy: BTreeSet<usize>,
    requests: BTreeMap<u64, Request>,
}

impl World {
    pub(super) fn scratch_file(&self, volume: usize) -> usize {
        self.spill_file() + 1 + volume
    }

    /// An operator starts a drill, or stops the one that runs.
    pub(super) fn order_drill(&mut self) {
        let Some(site) = self.site_in(Role::Secondary).filter(|site| !self.is_stopping(*site)) else {
            return;
        };
        if self.sites[site].drill.is_some() {
            if self.random.chance(300) {
                let done = self.enter(site).is_some_and(|group| group.stop_drill().is_ok());
                self.tell(|| format!("an operator stops the drill of site {site}: {done}"));
                self.pump(site);
            }
            return;
        }
        let back = u64::try_from(self.plan.retention.window.as_nanos()).unwrap_or(SECOND);
        let at = self.random.chance(400).then(|| self.wall(site).0 - self.random.below(back + SECOND / 100));
        let at = at.map(|time| RewindTo::Time(WallTime(time)));
        let total: u64 = self.plan.volume_blocks.iter().sum();
        let scratch = 4096 * [total / 8, total, 2 * total][self.random.index(3)];
        for volume in 0..self.plan.volume_blocks.len() {
            let file = self.scratch_file(volume);
            // What an older drill still writes goes to a file that is gone.
            for pending in self.sites[site].pending.values_mut() {
                if matches!(&pending.operation, Operation::Write { file: of, .. } | Operation::Read { file: of, .. } if *of == file)
                {
                    pending.operation = Operation::Nothing;
                }
            }
            let bytes = BlockCount(self.plan.volume_blocks[volume]).bytes().0;
            self.sites[site].files[file] = VirtualFile::new(bytes);
        }
        let started = self.enter(site).map(|group| group.start_drill(at, scratch));
        self.tell(|| format!("an operator starts a drill of site {site} at {at:?}: {started:?}"));
        if let Some(Ok(started)) = started {
            self.statistics.drills += 1;
            let sizes: Vec<u64> = started.sizes.iter().map(|size| size.0 / 4096).collect();
            self.check_drill_sizes(site, &started.snapshot.position, &sizes);
            self.sites[site].drill = Some(DrillModel {
                point: started.snapshot.position,
                sizes,
                known: BTreeMap::new(),
                written: BTreeMap::new(),
                busy: BTreeSet::new(),
                requests: BTreeMap::new(),
            });
        }
        self.pump(site);
    }

    /// A drill has the sizes that a failover to its point would have.
    fn check_drill_sizes(&mut self, site: usize, point: &Position, sizes: &[u64]) {
        let image = self.exposed_at(site, &self.sites[site].files, Some(point));
        if image.sizes != sizes {
            let text =
                format!("the drill of site {site} at {point} has {sizes:?} blocks, not {:?}", image.sizes);
            self.fail(text);
        }
    }

    /// The drill's hosts issue some requests; no two of them overlap.
    pub(super) fn drill_turn(&mut self, site: usize) {
        for _ in 0..=self.random.below(3) {
            let volume = self.random.index(self.plan.volume_blocks.len());
            let Some(blocks) = self.sites[site].drill.as_ref().map(|drill| drill.sizes[volume]) else {
                return;
            };
            let near = if self.random.chance(600) { self.plan.hot_blocks.min(blocks) } else { blocks };
            let first = self.random.below(near);
            let count = 1 + self.random.below(self.plan.write_blocks_max.min(blocks - first));
            let range = ByteRange::of_blocks(Lba(first), BlockCount(count)).unwrap_or_default();
            let start = self.first_block(volume) + size(first);
            let touched = start..start + size(count);
            self.commands += 1;
            let (id, kind) = (self.commands, self.random.below(10));
            let Some(model) = &mut self.sites[site].drill else { return };
            let collides = model.busy.range(touched.clone()).next().is_some();
            if collides || model.requests.len() >= REQUESTS_MAX {
                continue;
            }
            model.busy.extend(touched);
            let mut data = vec![0; size(range.length())];
            host::fill(id | 1 << 31, range.offset(), &mut data);
            let hashes = match kind {
                0..=4 => None,
                5 => Some(vec![0; size(count)]),
                _ => Some(data.chunks_exact(4096).map(oracle::hash).collect()),
            };
            model.requests.insert(id, Request { volume, range, hashes });
            let index = VolumeIndex(u16::try_from(volume).unwrap_or(0));
            self.note(id);
            if let Some(group) = self.enter(site) {
                match kind {
                    0..=4 => group.read_drill(DrillIo(id), index, range),
                    5 => group.write_drill(DrillIo(id), index, range, None),
                    _ => group.write_drill(DrillIo(id), index, range, Some(Bytes::from(data))),
                }
            }
            self.pump(site);
        }
    }

    /// A request of the drill's hosts was answered.
    pub(super) fn drill_done(&mut self, site: usize, id: DrillIo, result: Result<Bytes, HostError>) {
        let Some(model) = &mut self.sites[site].drill else {
            return self.fail(format!("site {site} answers {id:?} of no drill"));
        };
        let Some(request) = model.requests.remove(&id.0) else {
            return self.fail(format!("site {site} answers {id:?} of its drill twice"));
        };
        let point = model.point;
        let first = self.first_block(request.volume) + size(request.range.first_block().0);
        let Some(model) = &mut self.sites[site].drill else { return };
        let count = size(request.range.block_count().0);
        (first..first + count).for_each(|block| {
            model.busy.remove(&block);
        });
        let Ok(data) = result else { return };
        if let Some(hashes) = request.hashes {
            model.written.extend((first..).zip(hashes.iter().copied()));
            model.known.extend((first..).zip(hashes));
            return;
        }
        self.statistics.images += 1;
        for (block, found) in (first..).zip(data.chunks_exact(4096).map(oracle::hash)) {
            let Some(model) = &mut self.sites[site].drill else { return };
            let known = *model.known.entry(block).or_insert(found);
            let (lineage, sequence) = (oracle::key(&point), point.sequence.0);
            if known != found {
                self.fail(format!("the drill of site {site} at {point} changed block {block} by itself"));
            } else if !self.bad.contains(&block)
                && !self.oracle.allows(lineage, sequence, block, found)
                && !self.drill_wrote(site, block, found)
            {
                let expected = self.oracle.describe(lineage, block);
                self.fail(format!(
                    "the drill of site {site} at {point} has {:08x} in block {block}, expected {expected}",
                    found >> 32
                ));
            }
        }
        if data.len() != size(request.range.length()) {
            self.fail(format!("a read of the drill gave {} bytes of {}", data.len(), request.range));
        }
    }

    /// True if the content is what the drill wrote there last.
    fn drill_wrote(&self, site: usize, block: usize, hash: u64) -> bool {
        self.sites[site].drill.as_ref().is_some_and(|model| model.written.get(&block) == Some(&hash))
    }

    pub(super) fn drill_ended(&mut self, site: usize, reason: &str) {
        self.tell(|| format!("the drill of site {site} ended: {reason}"));
        let model = self.sites[site].drill.take();
        if let Some(id) = model.as_ref().and_then(|model| model.requests.keys().next()) {
            self.fail(format!("the drill of site {site} ended without an answer to request {id}"));
        }
        if model.is_none() {
            self.fail(format!("site {site} ends a drill that does not run"));
        }
    }
}
