//! Starts of a site, as the daemon does them: creation, restart from the files, clean stop.

use std::convert::Infallible;

use block::{BlockCount, ByteCount, Monotonic, Tip};
use bytes::Bytes;
use daemon::group::{Group, OpenedMirror};
use engine::intent_map::IntentMap;
use journal::{Checkpoint, PAGE_BYTES, Recovered, recover};
use protocol::{GroupState, Role};

use super::disk::VirtualFile;
use super::plan::{MILLISECOND, Plan, SECOND};
use super::site::{Site, Stopping};
use super::wide;
use super::world::{MIRROR, World, site_id, volume_id};

impl World {
    pub(super) fn new_site(plan: &Plan, site: usize) -> Site {
        let volumes = plan.volume_blocks.len();
        let homes = plan.volume_blocks.iter().map(|blocks| VirtualFile::new(BlockCount(*blocks).bytes().0));
        let mut files: Vec<VirtualFile> = homes.collect();
        files.extend((0..volumes).map(|_| VirtualFile::new(2 * PAGE_BYTES)));
        files.push(VirtualFile::new(2 * PAGE_BYTES));
        files.extend((0..plan.redo.file_count()).map(|_| VirtualFile::new(plan.redo.segment_bytes())));
        files.push(VirtualFile::new(plan.spill_bytes));
        files.extend(plan.volume_blocks.iter().map(|blocks| VirtualFile::new(BlockCount(*blocks).bytes().0)));
        let primary = site_id(0);
        Site {
            files,
            state: if site == 0 {
                GroupState::new_primary(primary)
            } else {
                GroupState::new_secondary(primary)
            },
            clean: None,
            sizes: plan.first_blocks.clone(),
            rooms: plan.first_blocks.clone(),
            group: None,
            process: 1,
            pending: std::collections::BTreeMap::new(),
            commands: std::collections::BTreeMap::new(),
            steps: std::collections::BTreeMap::new(),
            prepared: std::collections::BTreeMap::new(),
            presented: false,
            stopping: Stopping::No,
            timer_at: None,
            spins: 0,
            boot_due: false,
            monotonic_offset: wide(site) * 5_000 * SECOND,
            wall_offset: 1_700_000_000 * SECOND + plan.skews[site],
            wall_offset_max: 1_700_000_000 * SECOND + plan.skews[site],
            slowness: 1,
            spill_slowness: 1,
            acked_tip: None,
            lineage: None,
            sent: None,
            policy: plan.policies[site],
            held_since: None,
            owed: Default::default(),
            heard_epoch: 0,
            start_given: 0,
            failover: None,
            rewind: None,
            drill: None,
            searching: false,
            forced_epoch: 0,
        }
    }

    pub(super) fn intent_file(&self, volume: usize) -> usize {
        self.plan.volume_blocks.len() + volume
    }

    pub(super) fn checkpoint_file(&self) -> usize {
        2 * self.plan.volume_blocks.len()
    }

    pub(super) fn segment_file(&self, index: u32) -> usize {
        self.checkpoint_file() + 1 + super::size(u64::from(index))
    }

    pub(super) fn spill_file(&self) -> usize {
        self.segment_file(self.plan.redo.file_count())
    }

    fn volume_size(&self, volume: usize) -> ByteCount {
        BlockCount(self.plan.volume_blocks[volume]).bytes()
    }

    /// The mirror is made: the secondary first, then the primary's lone volumes join it while hosts go on.
    pub(super) fn create(&mut self) {
        for site in [1, 0] {
            let applied = Tip { position: self.sites[site].state.start_position(), ..Tip::default() };
            let first = Checkpoint::first(MIRROR, self.plan.redo, applied);
            let second = first.next(applied, first.scan_start);
            let file = self.checkpoint_file();
            for page in [first, second] {
                let content = super::disk::Content::Data(page.encode());
                self.sites[site].files[file].land_durable(page.slot() * PAGE_BYTES, content);
            }
            let (redo, checkpoint) = self.recover(site);
            let volumes = self.plan.volume_blocks.len();
            let region = ByteCount(self.plan.region_bytes);
            let size = |volume: usize| BlockCount(self.plan.first_blocks[volume]).bytes();
            let intents = (0..volumes).map(|volume| IntentMap::new(volume_id(volume), size(volume), region));
            let opened = OpenedMirror { intents: intents.collect(), clean: None, redo, checkpoint };
            let (settings, state, now) =
                (self.settings(site), self.sites[site].state.clone(), self.monotonic(site));
            let group = if site == 0 {
                let mut group = Group::alone(&settings.volumes, now);
                group.set_clocks(now, self.wall(site));
                group.attach(settings, state, opened, now);
                self.sites[site].presented = true;
                group
            } else {
                Group::open(settings, state, opened, now)
            };
            self.sites[site].group = Some(group);
            let _ = self.enter(site);
            self.pump(site);
        }
    }

    fn recover(&self, site: usize) -> (Recovered, Checkpoint) {
        self.recover_from(&self.sites[site].files)
    }

    /// The redo log as a start finds it in `files`.
    pub(super) fn recover_from(&self, files: &[VirtualFile]) -> (Recovered, Checkpoint) {
        let pages = &files[self.checkpoint_file()];
        let newest = Checkpoint::newest(&pages.read(0, PAGE_BYTES), &pages.read(PAGE_BYTES, PAGE_BYTES));
        let checkpoint = match newest {
            Ok(Some(checkpoint)) => checkpoint,
            Ok(None) | Err(_) => unreachable!("one checkpoint slot is always good: {newest:?}"),
        };
        let mut read = |file: u32, offset: u64, length: u64| -> Result<Bytes, Infallible> {
            Ok(files[self.segment_file(file)].read(offset, length))
        };
        let recovered = recover(self.plan.redo, MIRROR, &checkpoint, &mut read);
        (recovered.unwrap_or_else(|error| unreachable!("{error}")), checkpoint)
    }

    /// The durable intent map of a volume, as a start after a power loss would load it.
    pub(super) fn durable_intent(&self, site: usize, volume: usize) -> IntentMap {
        let file = &self.sites[site].files[self.intent_file(volume)];
        Self::load_intent(file.stable(), volume, self.volume_size(volume), self.plan.region_bytes)
    }

    fn load_intent(bytes: &[u8], volume: usize, size: ByteCount, region_bytes: u64) -> IntentMap {
        let page = super::size(PAGE_BYTES);
        let slot = |index: usize| Some(Bytes::copy_from_slice(&bytes[index * page..(index + 1) * page]));
        IntentMap::load(volume_id(volume), size, ByteCount(region_bytes), [[slot(0), slot(1)]]).0
    }

    /// The daemon of a site starts.
    pub(super) fn boot(&mut self, site: usize) {
        if self.sites[site].is_up() {
            return;
        }
        self.statistics.boots += 1;
        self.sites[site].boot_due = false;
        // A clock that went back while nobody looked cannot be noticed: the model corrects it before a start.
        self.sites[site].wall_offset = self.sites[site].wall_offset_max;
        for file in &mut self.sites[site].files {
            let mark = file.mark();
            file.sync(mark);
        }
        (0..self.plan.volume_blocks.len()).for_each(|volume| self.resized(site, volume));
        self.check_restarted(site);
        let (mut redo, mut checkpoint) = self.recover(site);
        let volumes = self.plan.volume_blocks.len();
        let intent = |volume: usize| {
            let size = BlockCount(self.sites[site].sizes[volume]).bytes();
            let bytes = self.sites[site].files[self.intent_file(volume)].stable();
            Self::load_intent(bytes, volume, size, self.plan.region_bytes)
        };
        let intents = (0..volumes).map(intent).collect();
        let state = self.sites[site].state.clone();
        if state.role == Role::Primary
            && let Some(next) = redo.void(&checkpoint)
        {
            let (file, content) = (self.checkpoint_file(), super::disk::Content::Data(next.encode()));
            self.sites[site].files[file].land_durable(next.slot() * PAGE_BYTES, content);
            checkpoint = next;
        }
        let clean = self.sites[site].clean.take().filter(|_| state.role == Role::Primary);
        let continues = clean.as_ref().is_some_and(|clean| clean.journal.is_some());
        self.statistics.continued += u64::from(continues);
        let lineage = (state.epoch.0, state.incarnation.0);
        self.tell(|| {
            format!(
                "site {site} starts: {state:?}, redo tip {:?} staged {:?}, clean {}, with its journal {continues}",
                redo.durable_tip.position,
                redo.staged_tip.map(|(pass, tip)| (pass, tip.position)),
                clean.is_some()
            )
        });
        let opened = OpenedMirror { intents, clean, redo, checkpoint };
        let now: Monotonic = self.monotonic(site);
        let group = Group::open(self.settings(site), state, opened, now);
        let known = &mut self.sites[site];
        known.group = Some(group);
        // A journal that was kept is of the same lineage; what follows it too.
        known.lineage = continues.then_some(lineage);
        known.owed = Default::default();
        known.heard_epoch = 0;
        known.presented = false;
        let _ = self.enter(site);
        self.pump(site);
    }

    /// The process is gone. With `power`, so is what was not flushed.
    pub(super) fn crash(&mut self, site: usize, power: bool, boot_after: u64) {
        if !self.sites[site].is_up() {
            return;
        }
        self.tell(|| format!("site {site} dies, power lost: {power}"));
        let permille = [0, 300, 1000][self.random.index(3)];
        let known = &mut self.sites[site];
        for pending in std::mem::take(&mut known.pending).into_values() {
            match pending.operation {
                super::site::Operation::Write { file, offset, content, .. } => {
                    known.files[file].land_partly(offset, &content, permille, &mut self.random);
                }
                super::site::Operation::Persist(state) if self.random.chance(500) => known.state = *state,
                super::site::Operation::Grow { volume, blocks, stored } if self.random.chance(500) => {
                    known.rooms[volume] = blocks.max(known.rooms[volume]);
                    if stored {
                        known.sizes[volume] = blocks.max(known.sizes[volume]);
                    }
                }
                super::site::Operation::Grow { .. }
                | super::site::Operation::Persist(_)
                | super::site::Operation::Sync { .. }
                | super::site::Operation::Read { .. }
                | super::site::Operation::Nothing => {}
            }
        }
        if power {
            for file in &mut known.files {
                file.lose_power(&mut self.random);
            }
            self.oracle.acked[site].clear();
            self.oracle.history[site].clear();
        }
        self.process_ended(site, if power { 3 * SECOND } else { 50 * MILLISECOND });
        self.sites[site].boot_due = true;
        self.after(boot_after, super::world::Event::Boot { site });
    }

    fn process_ended(&mut self, site: usize, noticed_within: u64) {
        let known = &mut self.sites[site];
        known.group = None;
        known.process += 1;
        known.pending.clear();
        known.commands.clear();
        known.steps.clear();
        known.prepared.clear();
        known.presented = false;
        known.stopping = Stopping::No;
        known.timer_at = None;
        known.failover = None;
        known.drill = None;
        known.searching = false;
        let process = known.process;
        let mine: Vec<(u64, usize)> = self
            .network
            .sessions
            .iter()
            .filter_map(|(id, session)| {
                let side = session
                    .sides
                    .iter()
                    .position(|side| side.site == site && side.process < process && side.open)?;
                Some((*id, side))
            })
            .collect();
        for (session, side) in mine {
            if let Some(known) = self.network.sessions.get_mut(&session) {
                known.sides[side].open = false;
            }
            let delay = self.random.below(noticed_within) + 1;
            self.after(delay, super::world::Event::Closed { session, side: 1 - side });
        }
    }

    /// The daemon is asked to stop in order.
    pub(super) fn begin_stop(&mut self, site: usize) {
        if !self.sites[site].is_up() || self.sites[site].stopping != Stopping::No {
            return;
        }
        self.tell(|| format!("site {site} is asked to stop"));
        self.sites[site].stopping = Stopping::Draining { give_up_at: self.now + 2 * SECOND };
        if let Some(group) = self.enter(site) {
            group.drain();
            self.pump(site);
        }
    }

    /// A drained process flushes its homes, leaves its clean state and ends.
    pub(super) fn stop_when_drained(&mut self, site: usize) {
        let Stopping::Draining { give_up_at } = self.sites[site].stopping else { return };
        let boot_after = MILLISECOND * (10 + self.random.below(1000));
        let idle = self.sites[site].pending.is_empty();
        let drained = self.sites[site].group.as_ref().is_some_and(Group::is_drained);
        if !(drained && idle) {
            if self.now >= give_up_at {
                self.crash(site, false, boot_after);
            }
            return;
        }
        for file in 0..self.plan.volume_blocks.len() {
            let mark = self.sites[site].files[file].mark();
            self.sites[site].files[file].sync(mark);
        }
        let clean = self.sites[site].group.as_mut().and_then(Group::clean_state);
        // What the clean state names is on stable media.
        let spill = self.spill_file();
        self.sites[site].files[spill].lose_power(&mut self.random);
        let kept = clean.as_ref().is_some_and(|clean| clean.journal.is_some());
        self.tell(|| {
            format!("site {site} stopped in order, clean state: {}, journal kept: {kept}", clean.is_some())
        });
        self.sites[site].clean = clean;
        self.process_ended(site, 50 * MILLISECOND);
        self.sites[site].boot_due = true;
        self.after(boot_after, super::world::Event::Boot { site });
    }
}
