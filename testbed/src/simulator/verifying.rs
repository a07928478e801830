//! Verifies: no false alarm whatever happens, and silent corruption, planted when all is calm, is found and repaired
//! while hosts write.

use std::collections::BTreeSet;

use daemon::group::{Overload, Side, VerifyProgress};
use protocol::Role;

use super::plan::SECOND;
use super::size;
use super::world::{Event, World};

/// Corruption that was planted in a home.
#[derive(Debug, Default)]
pub(super) struct Planted {
    /// Blocks whose content is not what was written; the oracle's checks leave them out.
    pub(super) blocks: BTreeSet<usize>,
    /// All of them, also when they are repaired.
    ever: BTreeSet<usize>,
    /// Those that a host has written since: nothing is wrong with them any more.
    pub(super) written: BTreeSet<usize>,
    at_primary: bool,
    ordered: bool,
    done: bool,
}

impl World {
    /// An operator has the mirror verified; nothing is wrong with it.
    pub(super) fn order_verify(&mut self) {
        let repair_from = [None, Some(Side::Local), Some(Side::Partner)][self.random.index(3)];
        let Some(site) = self.site_in(Role::Primary).filter(|site| !self.is_stopping(*site)) else { return };
        let begun = self.enter(site).map(|group| group.verify(repair_from));
        self.tell(|| format!("an operator orders verify from {repair_from:?} at site {site}: {begun:?}"));
        self.pump(site);
    }

    /// What a verify reports must be what was planted.
    pub(super) fn check_verify(&mut self, site: usize) {
        let Some(report) = self.sites[site].group.as_ref().and_then(|group| group.verify_report()) else {
            return;
        };
        let found = self.blocks(&report.extents());
        if let Some(block) = found.iter().find(|block| !self.planted.ever.contains(block)) {
            self.fail(format!("site {site}: a verify reports block {block}, with which nothing is wrong"));
        }
    }

    fn blocks(&self, extents: &[(block::VolumeIndex, block::ByteRange)]) -> BTreeSet<usize> {
        let of = |(volume, range): &(block::VolumeIndex, block::ByteRange)| {
            let first = self.first_block(usize::from(volume.0)) + size(range.first_block().0);
            first..first + size(range.block_count().0)
        };
        extents.iter().flat_map(of).collect()
    }

    /// Home was corrupted once: images from before the repair show it.
    pub(super) fn was_planted(&self) -> bool {
        !self.planted.ever.is_empty()
    }

    /// Hosts write this block.
    pub(super) fn note_planted_write(&mut self, block: usize) {
        if self.planted.blocks.contains(&block) {
            self.planted.written.insert(block);
        }
    }

    /// Called when both sides are equal: plants corruption once, has it repaired, and says when that is over.
    pub(super) fn is_verified(&mut self) -> bool {
        if !self.plan.plant || self.planted.done {
            return true;
        }
        // A drill shows the home below it, as it is.
        let drills =
            (0..2).filter_map(|site| self.sites[site].group.as_ref()?.mirror_snapshot()?.drill).count();
        if self.planted.blocks.is_empty() && drills > 0 {
            return true;
        }
        // One that runs may have its own word on whose blocks are right.
        let runs = (0..2).filter_map(|site| self.sites[site].group.as_ref()?.verify_report());
        let idle = runs.into_iter().all(|report| report.progress != VerifyProgress::Running);
        if self.planted.blocks.is_empty() && idle {
            self.plant();
        }
        false
    }

    fn plant(&mut self) {
        let (Some(primary), Some(secondary)) = (self.site_in(Role::Primary), self.site_in(Role::Secondary))
        else {
            return;
        };
        self.planted.at_primary = self.random.chance(400);
        let site = if self.planted.at_primary { primary } else { secondary };
        let wanted = 1 + self.random.below(3);
        for _ in 0..4 * wanted {
            if super::wide(self.planted.blocks.len()) >= wanted {
                break;
            }
            let volume = self.random.index(self.plan.volume_blocks.len());
            let index = self.random.below(self.sites[primary].sizes[volume]);
            let byte = index * 4096 + self.random.below(4096);
            let block = self.first_block(volume) + size(index);
            if !self.bad.contains(&block) && self.planted.blocks.insert(block) {
                self.sites[site].files[volume].corrupt(byte);
                if !self.planted.at_primary && !self.is_exposed(site, block, primary) {
                    // Redo lies over it and will mend it.
                    self.sites[site].files[volume].corrupt(byte);
                    self.planted.blocks.remove(&block);
                    continue;
                }
                self.planted.ever.insert(block);
                self.tell(|| {
                    format!("byte {byte} of volume {volume}, block {block}, turns over at site {site}")
                });
            }
        }
        // Hosts go on meanwhile, or all is quiet.
        if self.random.chance(600) {
            // A rate below the load would keep them from ever being equal: the load ends.
            self.load_again_until = self.now + self.random.below(2 * SECOND);
            self.after(0, Event::Host);
        }
    }

    /// The target's image differs from the primary's in a block: no redo lies over what was corrupted there.
    fn is_exposed(&self, site: usize, block: usize, primary: usize) -> bool {
        self.exposed_hashes(site)[block] != self.home_hashes(primary)[block]
    }

    /// In the calm, until what was planted is repaired.
    pub(super) fn supervise_verify(&mut self) {
        if self.planted.blocks.is_empty() || self.planted.done {
            return;
        }
        let Some(site) = self.site_in(Role::Primary) else { return };
        let Some(group) = self.sites[site].group.as_ref() else { return };
        let progress = group.verify_report().map(|report| report.progress.clone());
        let lost = !matches!(progress, Some(VerifyProgress::Running | VerifyProgress::Ended));
        if !self.planted.ordered || lost {
            let from = if self.planted.at_primary { Side::Partner } else { Side::Local };
            let begun = self.enter(site).map(|group| group.verify(Some(from)));
            self.planted.ordered = matches!(begun, Some(Ok(())));
            self.tell(|| format!("an operator orders a repair from {from:?} at site {site}: {begun:?}"));
            self.pump(site);
            return;
        }
        if progress == Some(VerifyProgress::Running) {
            return;
        }
        let Some(report) = self.sites[site].group.as_ref().and_then(|group| group.verify_report()) else {
            return;
        };
        let (found, clean, sentence) = (self.blocks(&report.extents()), report.is_clean(), report.sentence());
        self.tell(|| format!("the verify ended: {sentence}"));
        let missed =
            self.planted.blocks.difference(&found).find(|block| !self.planted.written.contains(block));
        if let Some(block) = missed {
            self.fail(format!("block {block} was corrupted and the verify has not found it: {sentence}"));
        } else if !clean && self.sites[site].policy.overload == Overload::Stop {
            // Repairs are writes: they were refused with the hosts'.
            self.planted.ordered = false;
            return;
        } else if !clean {
            self.fail(format!("a verify has not repaired what it found: {sentence}"));
        }
        self.statistics.verified += 1;
        // From here on the images must be right again, in every block.
        self.planted.done = true;
        self.planted.blocks.clear();
    }

    /// Hosts write in the calm too, while corruption is looked for.
    pub(super) fn hosts_rest(&self) -> bool {
        self.now > self.load_again_until && (self.healing || self.now > self.plan.load_end)
    }
}
