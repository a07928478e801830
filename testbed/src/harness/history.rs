//! What one writer wrote, and what an image may therefore hold.
//!
//! A writer has one write in flight. Every 512-byte sector that it writes carries a stamp: writer, sector and number
//! of the write. So an image of its region shows which write each sector comes from, and the image is right exactly
//! if it is the state after some first k writes: invariant 1 of the replication protocol, seen from outside. A write
//! that was never acknowledged (the daemon died under it) may be there in part.

use anyhow::{Result, bail, ensure};

/// Bytes of a sector.
pub(crate) const SECTOR_BYTES: u64 = 512;
const SECTOR_LENGTH: usize = 512;
const STAMP_BYTES: usize = 32;
const STAMP_MAGIC: u64 = 0x7374_616d_7065_6421;

/// One write of a writer.
#[derive(Clone, Copy, Debug)]
struct Entry {
    number: u64,
    first: usize,
    count: usize,
    submitted: u64,
    acknowledged: Option<u64>,
}

/// All writes of one writer to its region, in order.
#[derive(Clone, Debug)]
pub struct History {
    writer: u64,
    sectors: usize,
    entries: Vec<Entry>,
    last_number: u64,
}

/// How much of a history an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The number of the last write that is in the image; 0 if none is.
    pub last: u64,
}

/// Ticks of the common clock that [`History::check_order`] compares.
#[derive(Clone, Copy, Debug)]
pub struct Resume {
    /// The tick at which the last write in the image was submitted.
    pub submitted: u64,
}

impl History {
    /// The empty history of a region of zeros.
    pub const fn new(writer: u64, sectors: usize) -> Self {
        Self { writer, sectors, entries: Vec::new(), last_number: 0 }
    }

    /// The number of sectors of the region.
    pub const fn sectors(&self) -> usize {
        self.sectors
    }

    /// The number of writes acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.entries.iter().filter(|entry| entry.acknowledged.is_some()).count()
    }

    /// Enters a write of `count` sectors from `first` on and gives the bytes to write.
    ///
    /// # Panics
    /// If the write is empty or leaves the region.
    pub fn submit(&mut self, first: usize, count: usize, tick: u64) -> Vec<u8> {
        assert!(count > 0 && first + count <= self.sectors, "a write lies in its region");
        self.last_number += 1;
        self.entries.push(Entry {
            number: self.last_number,
            first,
            count,
            submitted: tick,
            acknowledged: None,
        });
        let mut data = Vec::with_capacity(count * SECTOR_LENGTH);
        for sector in first..first + count {
            let stamp = self.stamp(sector, self.last_number);
            for _ in 0..SECTOR_LENGTH / STAMP_BYTES {
                data.extend_from_slice(&stamp);
            }
        }
        data
    }

    /// The last write was acknowledged.
    pub fn acknowledge(&mut self, tick: u64) {
        if let Some(entry) = self.entries.last_mut() {
            entry.acknowledged = Some(tick);
        }
    }

    /// The sectors of the last write if it was never acknowledged: first and count.
    pub fn unacknowledged(&self) -> Option<(usize, usize)> {
        let last = self.entries.last()?;
        last.acknowledged.is_none().then_some((last.first, last.count))
    }

    /// Checks that `image`, the bytes of the region, is the state after some first k writes.
    ///
    /// # Errors
    /// Names the first sector that is not.
    pub fn verify_prefix(&self, image: &[u8]) -> Result<Prefix> {
        ensure!(image.len() == self.sectors * SECTOR_LENGTH, "the image has another size");
        let mut found = Vec::with_capacity(self.sectors);
        for (sector, bytes) in image.chunks(SECTOR_LENGTH).enumerate() {
            found.push(self.read_stamp(sector, bytes)?);
        }
        let last = found.iter().copied().max().unwrap_or(0);
        ensure!(
            last == 0 || self.entries.iter().any(|entry| entry.number == last),
            "writer {}: the image holds write {last}, which is not in the history",
            self.writer
        );
        let mut expected = vec![0; self.sectors];
        let mut torn = None;
        for entry in self.entries.iter().take_while(|entry| entry.number <= last) {
            if entry.number == last && entry.acknowledged.is_none() {
                torn = Some(*entry);
            } else if let Some(range) = expected.get_mut(entry.first..entry.first + entry.count) {
                range.fill(entry.number);
            }
        }
        for (sector, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let in_torn =
                torn.is_some_and(|entry| (entry.first..entry.first + entry.count).contains(&sector));
            if found != expected && !(in_torn && *found == last) {
                bail!(
                    "writer {}, sector {sector}: holds write {found}, expected write {expected} (of the first {last})",
                    self.writer
                );
            }
        }
        Ok(Prefix { last })
    }

    /// Checks that `image` holds every acknowledged write, and is in order as in [`Self::verify_prefix`].
    ///
    /// # Errors
    /// If an acknowledged write is missing.
    pub fn verify_acknowledged(&self, image: &[u8]) -> Result<Prefix> {
        let prefix = self.verify_prefix(image)?;
        let last = self.entries.iter().rev().find(|entry| entry.acknowledged.is_some());
        // A later acknowledged write may have covered nothing that is left of it only if a newer one replaced it,
        // so the newest acknowledged write always shows.
        if let Some(entry) = last {
            ensure!(
                prefix.last >= entry.number,
                "writer {}: acknowledged write {} is lost, the image ends with write {}",
                self.writer,
                entry.number,
                prefix.last
            );
        }
        Ok(prefix)
    }

    /// Forgets the writes that the image of a failover does not hold.
    pub fn discard_after(&mut self, prefix: Prefix) {
        self.entries.retain(|entry| entry.number <= prefix.last);
    }

    /// When the last write of the prefix was submitted; `None` if there is none.
    pub fn resume(&self, prefix: Prefix) -> Option<Resume> {
        let entry = self.entries.iter().find(|entry| entry.number == prefix.last)?;
        Some(Resume { submitted: entry.submitted })
    }

    /// Checks that every write acknowledged before another writer's write was submitted is in the image, if that one
    /// is: invariant 2.
    ///
    /// # Errors
    /// Names the write that is missing.
    pub fn check_order(&self, prefix: Prefix, other: Resume) -> Result<()> {
        let missing = self.entries.iter().find(|entry| {
            entry.number > prefix.last && entry.acknowledged.is_some_and(|tick| tick < other.submitted)
        });
        match missing {
            None => Ok(()),
            Some(entry) => bail!(
                "writer {}: write {} was acknowledged before another writer's write in the image, and is not there",
                self.writer,
                entry.number
            ),
        }
    }

    fn stamp(&self, sector: usize, number: u64) -> [u8; STAMP_BYTES] {
        let sector = u64::try_from(sector).unwrap_or(u64::MAX);
        let mut stamp = [0; STAMP_BYTES];
        let words = [STAMP_MAGIC, self.writer, sector, number];
        for (bytes, word) in stamp.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        stamp
    }

    /// The number of the write that a sector comes from; 0 for zeros.
    fn read_stamp(&self, sector: usize, bytes: &[u8]) -> Result<u64> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let number_bytes = bytes.get(24..32).and_then(|word| word.try_into().ok());
        let number = number_bytes.map_or(0, u64::from_le_bytes);
        let stamp = self.stamp(sector, number);
        ensure!(
            bytes.chunks(STAMP_BYTES).all(|chunk| chunk == stamp),
            "writer {}, sector {sector}: holds neither zeros nor one of its writes",
            self.writer
        );
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes of two sectors each at 0, 1 and 2 in a region of four.
    fn written() -> (History, Vec<Vec<u8>>) {
        let mut history = History::new(5, 4);
        let mut image = vec![0; 4 * SECTOR_LENGTH];
        let mut images = vec![image.clone()];
        for (tick, first) in [0_usize, 1, 2].into_iter().enumerate() {
            let tick = u64::try_from(tick).unwrap() * 10;
            let data = history.submit(first, 2, tick);
            image[first * SECTOR_LENGTH..(first + 2) * SECTOR_LENGTH].copy_from_slice(&data);
            images.push(image.clone());
            if first < 2 {
                history.acknowledge(tick + 5);
            }
        }
        (history, images)
    }

    #[test]
    fn every_prefix_is_accepted_and_only_those_with_all_acknowledged_writes_are_complete() {
        let (history, images) = written();
        for (count, image) in images.iter().enumerate() {
            let prefix = history.verify_prefix(image).unwrap();
            assert_eq!(prefix.last, u64::try_from(count).unwrap());
            assert_eq!(history.verify_acknowledged(image).is_ok(), count >= 2);
        }
    }

    #[test]
    fn a_torn_write_is_accepted_only_if_it_was_not_acknowledged() {
        let (mut history, images) = written();
        let mut torn = images[2].clone();
        torn[3 * SECTOR_LENGTH..].copy_from_slice(&images[3][3 * SECTOR_LENGTH..]);
        history.verify_acknowledged(&torn).unwrap();
        history.acknowledge(30);
        history.verify_prefix(&torn).unwrap_err();
    }

    #[test]
    fn a_hole_in_the_order_and_foreign_bytes_are_found() {
        let (history, images) = written();
        let mut hole = images[3].clone();
        hole[..SECTOR_LENGTH].fill(0);
        history.verify_prefix(&hole).unwrap_err();
        let mut foreign = images[2].clone();
        foreign[100] ^= 1;
        history.verify_prefix(&foreign).unwrap_err();
    }

    #[test]
    fn order_between_writers_is_checked_by_ticks() {
        let (history, _) = written();
        let first = Prefix { last: 1 };
        history.check_order(first, Resume { submitted: 14 }).unwrap();
        history.check_order(first, Resume { submitted: 16 }).unwrap_err();
    }
}
