//! The check of a search for orphans: nothing is missing from its report, and what it calls exact is true.

use daemon::group::{Group, OrphanExtent, OrphanProgress};

use super::world::World;
use super::{oracle, size};

impl World {
    pub(super) fn check_orphans(&mut self, site: usize) {
        let progress = self.sites[site].group.as_ref().map(Group::orphan_progress);
        if !self.sites[site].searching || progress == Some(OrphanProgress::Searching) {
            return;
        }
        self.sites[site].searching = false;
        if let Some(OrphanProgress::Found(extents)) = progress {
            self.statistics.searches += 1;
            self.compare_orphans(site, &extents);
        }
    }

    fn compare_orphans(&mut self, site: usize, extents: &[OrphanExtent]) {
        let state = self.sites[site].state.clone();
        let fork = state.fork();
        let (lineage, sequence) = (oracle::key(&fork), fork.sequence.0);
        if !state.diverged || self.oracle.owner(lineage) != Some(site) {
            return;
        }
        let hashes = self.home_hashes(site);
        let mut listed: Vec<Option<bool>> = vec![None; hashes.len()];
        for extent in extents {
            let first = self.first_block(usize::from(extent.volume.0)) + size(extent.range.first_block().0);
            listed[first..first + size(extent.range.block_count().0)].fill(Some(extent.exact));
        }
        for (block, (hash, listed)) in hashes.iter().zip(listed).enumerate() {
            let orphan = !self.oracle.allows(lineage, sequence, block, *hash);
            let written = self.oracle.wrote_after(lineage, sequence, block);
            let known_bad = self.bad.contains(&block);
            let expected = || self.oracle.describe(lineage, block);
            // Zeros, say, that the new primary's host wrote too.
            let equal = self.oracle.had_after(lineage.0, block, *hash);
            // What it had acknowledged to the target before a rewind its intent map need not name any more.
            let discarded = self.oracle.rewound.contains(&state.epoch.0);
            // A block that nobody wrote since may lack an older write: home lost it in a flush that failed, or never had it
            // when the target had received it.
            if orphan && written && listed.is_none() && !known_bad && !equal && !discarded {
                let text =
                    format!("site {site}: orphaned block {block} is not listed; fork {fork}, {}", expected());
                return self.fail(text);
            }
            if listed == Some(true) && !orphan && !written && !known_bad {
                let text = format!(
                    "site {site}: block {block} is listed and no orphan; fork {fork}, {}",
                    expected()
                );
                return self.fail(text);
            }
        }
    }
}
