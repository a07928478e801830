//! The checks. Each compares the virtual disks with the oracle, never one part of the production code with another.

use std::time::Duration;

use block::Position;
use daemon::group::Group;
use journal::{Record, RecordKind, RecoveredCut};
use protocol::{GroupState, Message, Role};

use super::disk::VirtualFile;
use super::host::ANSWER_MAX;
use super::plan::MILLISECOND;
use super::world::{Event, World, site_id};
use super::{oracle, size};

/// An image and the position that it claims to be.
pub(super) struct Exposed {
    pub(super) tip: Position,
    pub(super) hashes: Vec<u64>,
    /// Blocks of each volume.
    pub(super) sizes: Vec<u64>,
}

impl World {
    /// What a start from `files` would expose as the target's committed image.
    fn exposed(&self, site: usize, files: &[VirtualFile]) -> Exposed {
        self.exposed_at(site, files, None)
    }

    /// The same with only the committed cuts up to a position.
    pub(super) fn exposed_at(&self, site: usize, files: &[VirtualFile], at: Option<&Position>) -> Exposed {
        let (recovered, _) = self.recover_from(files);
        let volumes = self.plan.volume_blocks.len();
        let mut homes: Vec<Vec<u8>> =
            files.iter().take(volumes).map(|file| file.current().to_vec()).collect();
        let mut sizes = self.sites[site].sizes.clone();
        let committed = recovered.cuts.iter().rposition(|cut| cut.meta.commit).map_or(0, |last| last + 1);
        let wanted =
            |cut: &&RecoveredCut| !cut.header_only && at.is_none_or(|at| cut.tip.position.order(at).is_le());
        for cut in recovered.cuts.iter().take(committed).filter(wanted) {
            let file = self.segment_file(cut.placement.file_index);
            let bytes = files[file].read(cut.placement.offset, cut.placement.length);
            if let Ok(decoded) = journal::decode(&bytes) {
                overlay(&mut homes, &mut sizes, &decoded.records);
            }
        }
        let hashes = homes.iter().flat_map(|home| home.chunks_exact(4096).map(oracle::hash)).collect();
        Exposed { tip: recovered.durable_tip.position, hashes, sizes }
    }

    /// The blocks of a target's image as a start would expose it now.
    pub(super) fn exposed_hashes(&self, site: usize) -> Vec<u64> {
        self.exposed(site, &self.sites[site].files).hashes
    }

    pub(super) fn has_image(&self, site: usize, tip: &Position) -> bool {
        let state = &self.sites[site].state;
        state.role == Role::Secondary && state.consistent && (!state.diverged || tip.epoch == state.epoch)
    }

    fn check_image(&mut self, site: usize, image: &Exposed, when: &str) {
        if !self.has_image(site, &image.tip) {
            return;
        }
        self.statistics.images += 1;
        self.check_sizes(site, &image.sizes, when);
        let (lineage, sequence) = (oracle::key(&image.tip), image.tip.sequence.0);
        self.compare_image(site, lineage, sequence, &image.hashes, when);
    }

    /// Hosts saw no more of a volume than the image has.
    pub(super) fn check_sizes(&mut self, site: usize, sizes: &[u64], when: &str) {
        if sizes.iter().zip(&self.shown).any(|(size, shown)| size < shown) {
            let shown = &self.shown;
            let text = format!("{when}: site {site} has {sizes:?} blocks, hosts have seen {shown:?}");
            self.fail(text);
        }
    }

    pub(super) fn compare_image(
        &mut self,
        site: usize,
        lineage: oracle::LineageKey,
        sequence: u64,
        hashes: &[u64],
        when: &str,
    ) {
        let wrong = hashes.iter().enumerate().find(|(block, hash)| {
            !self.bad.contains(block)
                && !self.planted.blocks.contains(block)
                && !self.oracle.allows(lineage, sequence, *block, **hash)
        });
        if let Some((block, hash)) = wrong {
            let expected = self.oracle.describe(lineage, block);
            self.fail(format!(
                "{when}: site {site} at {lineage:?}/{sequence} is no prefix: block {block} has {:08x}, expected {expected}",
                hash >> 32
            ));
        }
    }

    /// The target's image as it is, or as it would be after losing power now.
    fn probe(&mut self, site: usize, power: bool, when: &str) {
        let image = if power {
            let mut files = self.sites[site].files.clone();
            files.iter_mut().for_each(|file| file.lose_power(&mut self.random));
            self.exposed(site, &files)
        } else {
            self.exposed(site, &self.sites[site].files)
        };
        self.check_acked(site, &image.tip, when);
        self.check_image(site, &image, when);
    }

    fn check_acked(&mut self, site: usize, tip: &Position, when: &str) {
        if let Some(acked) = self.sites[site].acked_tip.filter(|acked| tip.order(acked).is_lt()) {
            self.fail(format!("{when}: site {site} acknowledged {acked} and holds only {tip}"));
        }
    }

    /// A site is about to start: what it acknowledged must be there, as a prefix.
    pub(super) fn check_restarted(&mut self, site: usize) {
        self.probe(site, false, "restart");
    }

    /// A frame leaves a site.
    pub(super) fn check_sent(&mut self, site: usize, message: &Message) {
        match message {
            Message::Hello(hello) => {
                let state = &self.sites[site].state;
                let durable =
                    hello.position.epoch == state.epoch && hello.position.incarnation == state.incarnation;
                if !durable {
                    self.fail(format!("site {site} says {} but only {state:?} is durable", hello.position));
                }
            }
            Message::Relinquish { tip } => {
                if self.sites[site].state.offered(site_id(site)) != Some(*tip) {
                    let state = &self.sites[site].state;
                    self.fail(format!(
                        "site {site} gives its role up at {} but stored {state:?}",
                        tip.position
                    ));
                }
            }
            Message::Welcome(welcome) => self.told(site, &welcome.tip.position),
            Message::Ack(ack) => {
                if !ack.staged {
                    self.told(site, &ack.tip.position);
                }
                match self.random.below(128) {
                    0 => self.probe(site, true, "acknowledged, then power lost"),
                    1..=8 => self.probe(site, false, "acknowledged"),
                    _ => {}
                }
            }
            Message::Refuse(_)
            | Message::AbortPass { .. }
            | Message::PassRefused { .. }
            | Message::HashRequest(_)
            | Message::HashReply(_)
            | Message::VerifyRequest(_)
            | Message::VerifyReply(_)
            | Message::Orphans { .. }
            | Message::OrphanRequest(_)
            | Message::OrphanReply(_)
            | Message::SwitchAsk
            | Message::SwitchReady { .. }
            | Message::CreateMirror(_)
            | Message::Created { .. }
            | Message::DeleteMirror { .. }
            | Message::Deleted
            | Message::LeaseOffer
            | Message::LeaseAsk { .. }
            | Message::LeaseGrant { .. }
            | Message::SetAccess(_)
            | Message::AccessSet
            | Message::Grow { .. }
            | Message::Grown { .. }
            | Message::SetKeys(_)
            | Message::KeysSet
            | Message::Ping
            | Message::Pong { .. } => {}
        }
    }

    /// A target tells its primary which position it holds.
    fn told(&mut self, site: usize, tip: &Position) {
        self.check_acked(site, tip, "told");
        self.sites[site].acked_tip = Some(*tip);
        if let Some(owner) = self.oracle.owner(oracle::key(tip)) {
            self.oracle.committed(owner, tip);
        }
    }

    /// Nothing is read or written where a volume has no room.
    pub(super) fn check_room(&mut self, site: usize, volume: block::VolumeIndex, end: u64) {
        let room = self.sites[site].rooms[usize::from(volume.0)] * 4096;
        if end > room {
            self.fail(format!("site {site} uses volume {} up to byte {end}, it has {room}", volume.0));
        }
    }

    /// A size became durable at a site. What a primary shows that was replaced is no promise any more.
    pub(super) fn resized(&mut self, site: usize, volume: usize) {
        let (state, other) = (&self.sites[site].state, &self.sites[1 - site].state);
        let replaced = other.role == Role::Primary && other.epoch > state.epoch;
        if state.role == Role::Primary && !replaced {
            self.shown[volume] = self.shown[volume].max(self.sites[site].sizes[volume]);
        }
    }

    /// The mirror writes to a home: never over a fenced side's own writes.
    pub(super) fn check_target_write(&mut self, site: usize) {
        let state = &self.sites[site].state;
        if state.role != Role::Secondary || state.diverged {
            self.fail(format!("the mirror writes to the home of site {site} in state {state:?}"));
        }
    }

    /// What is wrong with a state that is to be stored.
    pub(super) fn persist_fault(&self, site: usize, next: &GroupState) -> Option<String> {
        let state = &self.sites[site].state;
        let falls =
            next.epoch < state.epoch || (next.epoch == state.epoch && next.incarnation < state.incarnation);
        if falls {
            return Some(format!("site {site} would go back from {state:?} to {next:?}"));
        }
        let made_whole = state.diverged && !next.diverged && next.role == Role::Secondary;
        let approved = self.sites[1 - site].start_given == next.epoch.0;
        if made_whole
            && !approved
            && let Some(block) = self.orphan(site, state)
        {
            return Some(format!(
                "site {site} gives up its own write in block {block} without an operator's start"
            ));
        }
        None
    }

    /// A block in which a fenced side holds a write that the new primary never had.
    fn orphan(&self, site: usize, state: &GroupState) -> Option<usize> {
        let fork = state.fork();
        let (lineage, sequence) = (oracle::key(&fork), fork.sequence.0);
        self.oracle.owner(lineage)?;
        let hashes = self.home_hashes(site);
        let orphaned = |(block, hash): &(usize, &u64)| !self.oracle.allows(lineage, sequence, *block, **hash);
        hashes.iter().enumerate().find(orphaned).map(|(block, _)| block)
    }

    pub(super) fn persisted(&mut self, site: usize, state: GroupState) {
        if self.sites[site].state != state {
            self.tell(|| format!("site {site} stored {state:?}"));
        }
        self.sites[site].state = state;
    }

    /// A forced failover is done: its image is the fork, and no more was lost than it said.
    pub(super) fn check_promotion(
        &mut self,
        site: usize,
        fork: &Position,
        ordered_at: u64,
        loss: Option<Duration>,
        home: &[u64],
    ) {
        self.statistics.images += 1;
        self.compare_image(site, oracle::key(fork), fork.sequence.0, home, "promotion");
        let oldest = self.oracle.oldest_lost(1 - site, fork, ordered_at);
        // What is not in the fork is lost, or an orphan of the other side.
        self.oracle.acked[1 - site].clear();
        self.oracle.history[1 - site].clear();
        let (Some(loss), Some(oldest)) = (loss, oldest) else { return };
        let truth = Duration::from_nanos(ordered_at - oldest);
        if loss < truth {
            self.fail(format!("failover at {fork} said that at most {loss:?} is lost; it is {truth:?}"));
        }
    }

    /// A promotion that no operator forced is a switch's: the old side gave the role up, and nothing is lost.
    pub(super) fn check_switch(&mut self, site: usize, fork: &Position, home: &[u64]) {
        let other = &self.sites[1 - site];
        if other.state.role == Role::Primary || other.presented {
            let text =
                format!("site {site} took the role over at {fork} while the other side is {:?}", other.state);
            return self.fail(text);
        }
        self.statistics.images += 1;
        self.statistics.switches += 1;
        self.compare_image(site, oracle::key(fork), fork.sequence.0, home, "switch");
        if let Some(oldest) = self.oracle.oldest_missing(1 - site, fork, self.now) {
            self.fail(format!("the switch at {fork} lost a write that was answered at {oldest}"));
        }
    }

    pub(super) fn periodic_check(&mut self) {
        let wait = if self.healing { 20 } else { 5 };
        let jitter = self.random.below(wait * MILLISECOND);
        self.after(wait * MILLISECOND + jitter, Event::Check);
        for site in 0..2 {
            self.check_answers(site);
            self.check_waits(site);
            self.check_lease(site);
            self.check_rpo(site);
            if self.random.chance(60) {
                self.check_window(site);
            }
            self.check_alert(site);
            self.check_verify(site);
            self.check_orphans(site);
        }
        match self.random.below(200) {
            0 => self.check_coverage(true),
            1..=6 => self.check_coverage(false),
            _ => {}
        }
        if self.healing {
            self.operate();
            self.supervise_verify();
            let idle: Vec<usize> = (0..2).filter(|site| self.sites[*site].is_up()).collect();
            for site in idle {
                let _ = self.enter(site);
                self.pump(site);
            }
        }
    }

    fn check_answers(&mut self, site: usize) {
        let late =
            self.sites[site].commands.iter().find(|(_, known)| self.now > known.submitted + ANSWER_MAX);
        if let Some(((volume, id), known)) = late {
            let group = self.sites[site].group.as_ref().map(Group::volume_snapshots);
            let text = format!(
                "site {site} does not answer {:?} {id:?} of volume {} since {} s: {group:?}, pending {:?}, writes {:?}",
                known.command,
                volume.0,
                Duration::from_nanos(self.now - known.submitted).as_secs_f64(),
                self.sites[site].pending.values().map(|pending| pending.answer).collect::<Vec<_>>(),
                known.writes,
            );
            self.fail(text);
        }
    }

    fn check_rpo(&mut self, site: usize) {
        let snapshot = self.enter(site).and_then(|group| group.mirror_snapshot());
        let Some(snapshot) = snapshot else { return };
        if snapshot.role == Role::Primary && snapshot.memory.0 > self.plan.ring.bytes_max {
            self.fail(format!("site {site} holds {} bytes for the mirror", snapshot.memory.0));
        }
        let (Some(reported), Role::Primary) = (snapshot.rpo, snapshot.role) else { return };
        let known = self.sites[1 - site].acked_tip.unwrap_or_default();
        if let Some(oldest) = self.oracle.oldest_missing(site, &known, self.now) {
            let truth = Duration::from_nanos(self.now - oldest);
            if reported < truth {
                self.fail(format!("site {site} reports an RPO of {reported:?}, it is {truth:?}"));
            }
        }
    }

    /// Every block in which primary and target differ is in a durable intent region.
    fn check_coverage(&mut self, power: bool) {
        let primary = (0..2).filter(|site| self.sites[*site].state.role == Role::Primary);
        let Some(primary) = primary.max_by_key(|site| self.sites[*site].state.epoch) else { return };
        let target = 1 - primary;
        let image = if self.sites[target].state.role == Role::Primary {
            self.home_hashes(target)
        } else {
            if power {
                let mut files = self.sites[target].files.clone();
                files.iter_mut().for_each(|file| file.lose_power(&mut self.random));
                self.exposed(target, &files).hashes
            } else {
                self.exposed(target, &self.sites[target].files).hashes
            }
        };
        let home = self.home_hashes(primary);
        let other = &self.sites[target].state;
        let both = other.role == Role::Primary || other.diverged;
        for volume in 0..self.plan.volume_blocks.len() {
            let ours = self.durable_intent(primary, volume);
            let theirs = both.then(|| self.durable_intent(target, volume));
            // What a target has behind its primary's size is nobody's, until a record has zeroed it.
            for index in 0..self.sites[primary].sizes[volume] {
                let block = self.first_block(volume) + size(index);
                let range = block::ByteRange::new(index * 4096, 4096).unwrap_or_default();
                let covered =
                    ours.is_durable(range) || theirs.as_ref().is_some_and(|map| map.is_durable(range));
                if home[block] != image[block] && !covered && !self.planted.blocks.contains(&block) {
                    return self.fail(format!(
                        "block {block} differs between site {primary} and its target and no intent bit covers it"
                    ));
                }
            }
        }
    }

    pub(super) fn is_converged(&mut self) -> bool {
        let Some(primary) = self.site_in(Role::Primary) else { return false };
        let Some(secondary) = self.site_in(Role::Secondary).filter(|secondary| *secondary != primary) else {
            return false;
        };
        let snapshot =
            |world: &mut Self, site: usize| world.enter(site).and_then(|group| group.mirror_snapshot());
        let (Some(ours), Some(theirs)) = (snapshot(self, primary), snapshot(self, secondary)) else {
            return false;
        };
        let settled = [primary, secondary].iter().all(|site| self.sites[*site].pending.is_empty());
        settled
            && self.sites[primary].presented
            && self.sites[primary].commands.is_empty()
            && ours.synchronized
            && theirs.synchronized
            && ours.backlog.0 == 0
            && ours.rpo == Some(Duration::ZERO)
            && self.is_sync_back(primary)
            && !self.sites[secondary].state.diverged
            && !ours.growing
            && self.same_image(primary, secondary)
    }

    fn same_image(&self, primary: usize, secondary: usize) -> bool {
        let image = self.exposed(secondary, &self.sites[secondary].files);
        let smaller = image.sizes.iter().zip(&self.sites[primary].sizes).any(|(theirs, ours)| theirs < ours);
        !smaller && self.home_hashes(primary) == image.hashes
    }

    pub(super) fn check_final(&mut self) {
        let Some(secondary) = self.site_in(Role::Secondary) else { return };
        self.tell(|| "both sides are equal".to_owned());
        self.probe(secondary, true, "at the end");
    }

    /// Where both sites are, for a failure's text.
    pub(super) fn describe(&self) -> String {
        let site = |site: usize| {
            let known = &self.sites[site];
            let snapshot = known.group.as_ref().and_then(Group::mirror_snapshot);
            let text = snapshot.map_or_else(|| "down".to_owned(), |mirror| format!("{mirror:?}"));
            format!("site {site}: pending {} presented {} {text}", known.pending.len(), known.presented)
        };
        let differs = {
            let (ours, theirs) = (self.home_hashes(0), self.home_hashes(1));
            (0..ours.len()).filter(|block| ours[*block] != theirs[*block]).take(8).collect::<Vec<_>>()
        };
        format!("{}; {}; homes differ in {differs:?}", site(0), site(1))
    }
}

/// Applies records one after the other.
fn overlay(homes: &mut [Vec<u8>], sizes: &mut [u64], records: &[Record]) {
    for record in records {
        let range = size(record.range.offset())..size(record.range.end());
        let home = &mut homes[usize::from(record.volume.0)];
        if record.kind == RecordKind::Resize {
            let known = &mut sizes[usize::from(record.volume.0)];
            *known = (*known).max(record.range.end() / 4096);
            home[range.end..].fill(0);
        }
        match record.kind {
            RecordKind::Write | RecordKind::Copy => home[range].copy_from_slice(&record.payload),
            RecordKind::Zero | RecordKind::Trim | RecordKind::CopyZero => home[range].fill(0),
            RecordKind::Resize | RecordKind::Void | RecordKind::Bad | RecordKind::Marker => {}
        }
    }
}
