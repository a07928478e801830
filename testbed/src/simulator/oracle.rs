//! What the images must be: a record of every write that a primary issued, independent of the production code.
//!
//! Each lineage (epoch and incarnation) starts from the home that the primary had then; its writes are noted with
//! their sequences as they are issued. So the state after every sequence of every lineage is known block by block.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use block::Position;

/// Epoch and incarnation: what orders lineages.
pub(super) type LineageKey = (u64, u64);

pub(super) fn key(position: &Position) -> LineageKey {
    (position.epoch.0, position.incarnation.0)
}

/// A content that a block has from a sequence on.
#[derive(Clone, Copy, Debug)]
struct Version {
    sequence: u64,
    hash: u64,
    /// The write failed: the block may also have what it had before.
    doubtful: bool,
}

#[derive(Debug)]
struct Lineage {
    site: usize,
    base: Vec<u64>,
    /// Sequences of hosts' writes.
    taken: BTreeSet<u64>,
    versions: BTreeMap<usize, Vec<Version>>,
}

/// A write that a host was told of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acked {
    pub(super) lineage: LineageKey,
    pub(super) sequence: u64,
    pub(super) at: u64,
}

/// The record.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    lineages: BTreeMap<LineageKey, Lineage>,
    epochs: BTreeMap<u64, usize>,
    /// Both sites were promoted in this epoch, by two operators, and no host wrote at the second one.
    pub(super) forked_epoch: Option<u64>,
    /// Acknowledged writes by site that may not be at the other one.
    pub(super) acked: [VecDeque<Acked>; 2],
    /// All writes acknowledged in this epoch, also those at the other site: a rewind may lose them.
    pub(super) history: [Vec<Acked>; 2],
    /// Epochs that began with a rewind.
    pub(super) rewound: std::collections::BTreeSet<u64>,
    /// When each write was issued.
    issued_at: BTreeMap<(LineageKey, u64), u64>,
}

impl Oracle {
    pub(super) fn knows(&self, lineage: LineageKey) -> bool {
        self.lineages.contains_key(&lineage)
    }

    pub(super) fn knows_epoch(&self, epoch: u64) -> bool {
        self.epochs.contains_key(&epoch)
    }

    /// A primary begins a lineage with this home. Positions must never be used twice.
    pub(super) fn begin(&mut self, lineage: LineageKey, site: usize, base: Vec<u64>) -> Result<(), String> {
        let owner = *self.epochs.entry(lineage.0).or_insert(site);
        if owner != site && self.forked_epoch == Some(lineage.0) {
            return Ok(());
        }
        if owner != site {
            return Err(format!("site {site} writes in epoch {} of site {owner}", lineage.0));
        }
        let newest = self.lineages.last_key_value();
        if let Some((last, _)) = newest.filter(|(last, known)| **last >= lineage && known.site == site) {
            return Err(format!("lineage {lineage:?} does not follow {last:?} of the same site"));
        }
        self.lineages
            .insert(lineage, Lineage { site, base, taken: BTreeSet::new(), versions: BTreeMap::new() });
        Ok(())
    }

    pub(super) fn owner(&self, lineage: LineageKey) -> Option<usize> {
        self.lineages.get(&lineage).map(|lineage| lineage.site)
    }

    /// A host's write takes a sequence: false if another one had it.
    pub(super) fn takes(&mut self, lineage: LineageKey, sequence: u64) -> bool {
        self.lineages.get_mut(&lineage).is_none_or(|lineage| lineage.taken.insert(sequence))
    }

    /// A write of a block is issued.
    pub(super) fn issued(&mut self, lineage: LineageKey, sequence: u64, block: usize, hash: u64) {
        if let Some(lineage) = self.lineages.get_mut(&lineage) {
            let version = Version { sequence, hash, doubtful: false };
            lineage.versions.entry(block).or_default().push(version);
        }
    }

    /// Notes when a write was issued.
    pub(super) fn issued_at(&mut self, lineage: LineageKey, sequence: u64, at: u64) {
        self.issued_at.entry((lineage, sequence)).or_insert(at);
    }

    /// When the last write up to `sequence` was issued.
    pub(super) fn newest_in(&self, lineage: LineageKey, sequence: u64) -> Option<u64> {
        self.issued_at.range((lineage, 0)..=(lineage, sequence)).map(|(_, at)| *at).max()
    }

    /// When the oldest acknowledged write of `site` that a fork at `position` loses was acknowledged.
    pub(super) fn oldest_lost(&self, site: usize, position: &Position, before: u64) -> Option<u64> {
        let lost = self.history[site].iter().filter(|acked| acked.at <= before && !includes(position, acked));
        lost.map(|acked| acked.at).min()
    }

    /// A write failed; the block's home content is `hash` now. If it was sent, the target may have what was wanted.
    pub(super) fn failed(&mut self, lineage: LineageKey, sequence: u64, block: usize, hash: u64, sent: bool) {
        let lineage = self.lineages.get_mut(&lineage);
        let Some(versions) = lineage.and_then(|lineage| lineage.versions.get_mut(&block)) else { return };
        let Some(at) = versions.iter().position(|version| version.sequence == sequence) else { return };
        if sent {
            versions[at].doubtful = true;
            versions.insert(at + 1, Version { sequence, hash, doubtful: true });
        } else {
            versions[at] = Version { sequence, hash, doubtful: true };
        }
    }

    /// A write of an older incarnation ended only now: the base of `lineage` was not what it seemed.
    pub(super) fn late(&mut self, lineage: LineageKey, block: usize, hash: u64) {
        if let Some(lineage) = self.lineages.get_mut(&lineage) {
            lineage.base[block] = hash;
        }
    }

    /// Whether the state of `lineage` after `sequence` may have `hash` in a block.
    pub(super) fn allows(&self, lineage: LineageKey, sequence: u64, block: usize, hash: u64) -> bool {
        let Some(lineage) = self.lineages.get(&lineage) else { return false };
        let versions = lineage.versions.get(&block).map_or(&[][..], Vec::as_slice);
        for version in versions.iter().rev().filter(|version| version.sequence <= sequence) {
            if version.hash == hash {
                return true;
            }
            if !version.doubtful {
                return false;
            }
        }
        lineage.base[block] == hash
    }

    /// Whether a host of the lineage's site wrote the block after `sequence`, also in its later lineages.
    pub(super) fn wrote_after(&self, lineage: LineageKey, sequence: u64, block: usize) -> bool {
        let Some(site) = self.owner(lineage) else { return false };
        let later = self.lineages.range(lineage..).filter(|(_, known)| known.site == site);
        later.into_iter().any(|(key, known)| {
            let after = if *key == lineage { sequence } else { 0 };
            let versions = known.versions.get(&block).map_or(&[][..], Vec::as_slice);
            versions.iter().any(|version| version.sequence > after)
        })
    }

    /// Whether the block ever had this content in an epoch after `epoch`: then a later primary has, or had, it.
    pub(super) fn had_after(&self, epoch: u64, block: usize, hash: u64) -> bool {
        let mut later = self.lineages.iter().filter(|(key, _)| key.0 > epoch);
        later.any(|(_, known)| {
            let versions = known.versions.get(&block).map_or(&[][..], Vec::as_slice);
            known.base[block] == hash || versions.iter().any(|version| version.hash == hash)
        })
    }

    /// Says what the block should be.
    pub(super) fn describe(&self, lineage: LineageKey, block: usize) -> String {
        let Some(lineage) = self.lineages.get(&lineage) else { return "unknown lineage".to_owned() };
        let versions: Vec<String> = lineage.versions.get(&block).map_or_else(Vec::new, |versions| {
            let skip = versions.len().saturating_sub(6);
            versions[skip..]
                .iter()
                .map(|version| {
                    format!(
                        "{}:{:08x}{}",
                        version.sequence,
                        version.hash >> 32,
                        if version.doubtful { "?" } else { "" }
                    )
                })
                .collect()
        });
        format!("base {:08x}, then {}", lineage.base[block] >> 32, versions.join(" "))
    }

    /// The target of `site` committed everything up to `position`.
    pub(super) fn committed(&mut self, site: usize, position: &Position) {
        self.acked[site].retain(|acked| !includes(position, acked));
    }

    /// The time of the oldest acknowledged write of `site` that `position` does not include.
    pub(super) fn oldest_missing(&self, site: usize, position: &Position, before: u64) -> Option<u64> {
        let missing =
            self.acked[site].iter().filter(|acked| acked.at <= before && !includes(position, acked));
        missing.map(|acked| acked.at).min()
    }
}

fn includes(position: &Position, acked: &Acked) -> bool {
    let tip = key(position);
    tip > acked.lineage || (tip == acked.lineage && position.sequence.0 >= acked.sequence)
}

/// A hash of a block's content; zeros give 0.
pub(super) fn hash(block: &[u8]) -> u64 {
    let mut state = 0_u64;
    for word in block.chunks_exact(8) {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        if word != 0 || state != 0 {
            state = (state.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    state
}
