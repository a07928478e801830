//! An exhaustive model of roles and epochs: two sites, a few writes, crashes, partitions, planned switches, forced
//! failovers and operators who settle forks, in every order.
//!
//! The decisions are the product's own ([`GroupState`]); the model adds only what surrounds them: which state is
//! durable, which session stands, and which image a site holds as a list of writes. Every reachable world is visited
//! once, breadth first, and what it must fulfil is checked there; an error prints the shortest way to it.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use block::{ChainHash, Incarnation, MirrorId, Position, Sequence, SiteId, Tip, WallTime};
use protocol::{GroupState, Hello, HelloVerdict, PROTOCOL_VERSION, RefusalCode, ResumePlan, Role};

const SITES: [SiteId; 2] = [SiteId::from_bytes([1; 16]), SiteId::from_bytes([2; 16])];

/// How often each may happen in one history.
#[derive(Clone, Copy)]
struct Budget {
    writes: u8,
    crashes: u8,
    losses: u8,
    switches: u8,
    failovers: u8,
    graces: u8,
}

#[derive(Clone, PartialEq, Eq)]
struct Site {
    state: GroupState,
    /// The writes that its homes hold, in order.
    image: Vec<u8>,
    /// The end of what it holds as a secondary.
    tip: Position,
    /// The sequence last given, as a primary.
    sequence: u64,
    up: bool,
    /// Hosts may write.
    open: bool,
    /// A primary whose partner refused it for a fork.
    forked: bool,
}

#[derive(Clone, PartialEq, Eq)]
struct World {
    sites: [Site; 2],
    /// The primary that has a session with its partner as the secondary. While the link is down nobody greets anybody:
    /// losing the session is all that a partition does.
    session: Option<usize>,
    /// Answered writes and where each was made.
    acked: Vec<(u8, Position)>,
    used: [u8; 6],
    /// The side that operators chose in a fork.
    chosen: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Write(usize),
    Replicate,
    Greet(usize),
    Crash(usize),
    Restart(usize),
    Grace(usize),
    LoseSession,
    Relinquish(usize),
    Take(usize),
    Failover(usize),
    Settle(usize),
    Overwrite(usize),
}

impl fmt::Debug for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, site) in ["A", "B"].iter().zip(&self.sites) {
            let Site { state, image, tip, up, open, .. } = site;
            writeln!(
                formatter,
                "  {name}: {:?} epoch {} up {up} open {open} diverged {} given up {} image {image:?} tip {tip}",
                state.role,
                state.epoch.0,
                state.diverged,
                state.relinquished.is_some(),
            )?;
        }
        write!(formatter, "  session {:?} acked {:?}", self.session, self.acked)
    }
}

impl Site {
    fn position(&self) -> Position {
        self.state.start_position().at(Sequence(self.sequence))
    }

    /// The end of its image, in whichever role.
    fn end(&self) -> Position {
        match self.state.role {
            Role::Primary => self.position(),
            Role::Secondary => self.tip,
        }
    }

    fn is_primary(&self) -> bool {
        self.up && self.state.role == Role::Primary
    }

    fn promote(&mut self, index: usize) {
        self.state = self.state.promoted(SITES[index], self.end());
        self.sequence = 0;
        self.open = true;
        self.forked = false;
    }

    fn fence(&mut self, state: GroupState) {
        self.tip = self.end();
        self.state = state;
        self.open = false;
        self.forked = false;
    }
}

impl World {
    fn new() -> Self {
        let site = |state: GroupState, open| Site {
            tip: state.start_position(),
            state,
            image: Vec::new(),
            sequence: 0,
            up: true,
            open,
            forked: false,
        };
        let begun = |state| GroupState { consistent: true, incarnation: Incarnation(1), ..state };
        Self {
            sites: [
                site(begun(GroupState::new_primary(SITES[0])), true),
                site(begun(GroupState::new_secondary(SITES[0])), false),
            ],
            session: Some(0),
            acked: Vec::new(),
            used: [0; 6],
            chosen: None,
        }
    }

    /// What tells worlds apart: histories that led to the same one need not be told apart.
    fn key(&self) -> Vec<u8> {
        let mut key = self.used.to_vec();
        for site in &self.sites {
            key.extend(site.state.encode());
            key.extend(site.image.iter().copied());
            key.push(u8::MAX);
            extend(&mut key, site.tip);
            key.push(u8::try_from(site.sequence).unwrap());
            key.extend([site.up, site.open, site.forked].map(u8::from));
        }
        key.extend(
            [self.session, self.chosen].map(|site| site.map_or(9, |site| u8::try_from(site).unwrap())),
        );
        for (id, position) in &self.acked {
            key.push(*id);
            extend(&mut key, *position);
        }
        key
    }

    fn connected(&self) -> bool {
        self.sites.iter().all(|site| site.up)
    }

    fn actions(&self, budget: Budget) -> Vec<Action> {
        let mut actions = vec![Action::Replicate, Action::LoseSession];
        for site in [0, 1] {
            actions.extend([
                Action::Write(site),
                Action::Greet(site),
                Action::Crash(site),
                Action::Restart(site),
                Action::Grace(site),
                Action::Relinquish(site),
                Action::Take(site),
                Action::Failover(site),
                Action::Settle(site),
                Action::Overwrite(site),
            ]);
        }
        actions.retain(|action| self.allows(*action, budget));
        actions
    }

    fn allows(&self, action: Action, budget: Budget) -> bool {
        let in_budget = |index: usize, most: u8| self.used[index] < most;
        match action {
            Action::Write(site) => {
                self.sites[site].is_primary() && self.sites[site].open && in_budget(0, budget.writes)
            }
            Action::Replicate => self.connected() && self.session.is_some(),
            // A primary dials, and a side that gave its role up and does not know who took it.
            Action::Greet(site) => {
                let ours = &self.sites[site];
                let dials = ours.is_primary() || ours.state.offered(SITES[site]).is_some();
                self.connected() && dials && self.session != Some(site)
            }
            Action::Crash(site) => self.sites[site].up && in_budget(1, budget.crashes),
            Action::Restart(site) => !self.sites[site].up,
            Action::Grace(site) => {
                self.sites[site].is_primary() && !self.sites[site].open && in_budget(5, budget.graces)
            }
            Action::LoseSession => self.session.is_some() && in_budget(2, budget.losses),
            Action::Relinquish(site) => {
                let (ours, theirs) = (&self.sites[site], &self.sites[1 - site]);
                let drained = self.session == Some(site) && self.connected() && ours.image == theirs.image;
                drained && ours.open && theirs.tip == ours.position() && in_budget(3, budget.switches)
            }
            Action::Take(site) => {
                let (ours, theirs) = (&self.sites[site], &self.sites[1 - site]);
                let offered = theirs.state.offered(SITES[1 - site]);
                self.connected()
                    && ours.state.role == Role::Secondary
                    && ours.state.consistent
                    && !ours.state.diverged
                    && ours.state.epoch == theirs.state.epoch
                    && ours.state.origin == theirs.state.origin
                    && offered.is_some_and(|tip| tip.position == ours.tip)
            }
            Action::Failover(site) => {
                let ours = &self.sites[site];
                ours.up
                    && ours.state.role == Role::Secondary
                    && ours.state.consistent
                    && !ours.state.diverged
                    && in_budget(4, budget.failovers)
            }
            // Operators who cannot agree make forks for ever: these settle on one side.
            Action::Settle(site) => {
                let ours = &self.sites[site];
                ours.is_primary() && ours.forked && self.chosen.is_none_or(|chosen| chosen == site)
            }
            Action::Overwrite(site) => {
                self.session == Some(site) && self.connected() && self.sites[1 - site].state.diverged
            }
        }
    }

    fn after(&self, action: Action) -> Self {
        let mut next = self.clone();
        match action {
            Action::Write(site) => next.write(site),
            Action::Replicate => {
                let primary = next.session.unwrap();
                // What a diverged side holds alone is overwritten only by an operator.
                let diverged = next.sites[1 - primary].state.diverged;
                if !diverged || next.sites[primary].image.starts_with(&next.sites[1 - primary].image) {
                    next.copy(primary);
                }
            }
            Action::Greet(site) => next.greet(site),
            Action::Crash(site) => {
                next.used[1] += 1;
                next.session = None;
                let crashed = &mut next.sites[site];
                crashed.up = false;
                crashed.open = false;
                crashed.forked = false;
            }
            Action::Restart(site) => {
                let started = &mut next.sites[site];
                started.up = true;
                if started.state.role == Role::Primary {
                    started.state.incarnation = started.state.incarnation.next();
                    started.sequence = 0;
                }
            }
            Action::Grace(site) => {
                next.used[5] += 1;
                next.sites[site].open = true;
            }
            Action::LoseSession => {
                next.used[2] += 1;
                next.session = None;
            }
            Action::Relinquish(site) => {
                next.used[3] += 1;
                next.session = None;
                let ours = &mut next.sites[site];
                let tip = Tip { position: ours.position(), chain: ChainHash([0; 32]) };
                let state = ours.state.relinquishing(tip);
                ours.fence(state);
            }
            Action::Take(site) => next.sites[site].promote(site),
            Action::Failover(site) => {
                next.used[4] += 1;
                next.session = None;
                next.sites[site].promote(site);
            }
            Action::Settle(site) => {
                next.chosen = Some(site);
                next.session = None;
                next.sites[site].promote(site);
            }
            Action::Overwrite(site) => next.copy(site),
        }
        next
    }

    fn write(&mut self, index: usize) {
        self.used[0] += 1;
        let id = self.used[0];
        let site = &mut self.sites[index];
        site.sequence += 1;
        site.image.push(id);
        let position = site.position();
        self.acked.push((id, position));
    }

    /// The secondary becomes equal.
    fn copy(&mut self, primary: usize) {
        let (image, position) = (self.sites[primary].image.clone(), self.sites[primary].position());
        let target = &mut self.sites[1 - primary];
        target.image = image;
        target.tip = position;
        target.state.consistent = true;
        target.state.diverged = false;
        target.state.overwrite_approved = false;
        if target.state.relinquished.is_some_and(|tip| tip.position.epoch < position.epoch) {
            target.state.relinquished = None;
        }
        self.sites[primary].state.consistent = true;
    }

    /// `index` says hello to its partner.
    fn greet(&mut self, index: usize) {
        let ours = &self.sites[index];
        let hello = Hello {
            version: PROTOCOL_VERSION,
            mirror: MirrorId::from_bytes([9; 16]),
            position: ours.end(),
            forks: ours.state.forks.clone(),
            volumes: Vec::new(),
            echo: WallTime(0),
        };
        let theirs = &self.sites[1 - index];
        match theirs.state.judge_hello(&hello, theirs.end()) {
            HelloVerdict::Accept => self.welcome(index),
            HelloVerdict::Adopt(state) => {
                self.sites[1 - index].fence(*state);
                self.welcome(index);
            }
            HelloVerdict::Refuse(refusal) => match refusal.code {
                RefusalCode::StaleEpoch => {
                    let (epoch, origin, fork) =
                        (theirs.state.epoch, theirs.state.origin, theirs.state.fork());
                    let fenced = self.sites[index].state.fenced(epoch, origin, fork);
                    self.sites[index].fence(fenced);
                }
                RefusalCode::Fork => {
                    let ours = &mut self.sites[index];
                    ours.forked = ours.state.role == Role::Primary;
                    ours.open |= ours.forked;
                }
                RefusalCode::UnknownMirror
                | RefusalCode::Mismatch
                | RefusalCode::WrongPartner
                | RefusalCode::Busy
                | RefusalCode::Conflict
                | RefusalCode::NoSpace
                | RefusalCode::Protocol => panic!("a sound hello was refused: {}", refusal.text),
            },
        }
    }

    fn welcome(&mut self, index: usize) {
        let (ours, theirs) = (&self.sites[index], &self.sites[1 - index]);
        if ours.state.role == Role::Secondary {
            // A side that gave its role up opens no session for writes: its partner takes the role (see `Take`).
            return;
        }
        let tip = Tip { position: theirs.tip, chain: ChainHash([0; 32]) };
        match ours.state.judge_tip(ours.position(), &tip, theirs.state.diverged) {
            ResumePlan::SameIncarnation | ResumePlan::Ancestor => {
                assert!(
                    ours.image.starts_with(&theirs.image),
                    "an image taken for an ancestor is none: {:?} of {:?}",
                    theirs.image,
                    ours.image
                );
            }
            ResumePlan::Diverged => {}
            ResumePlan::Unrelated => {
                panic!("a tip of this mirror is taken for a stranger's: {}", tip.position)
            }
        }
        self.session = Some(index);
        self.sites[index].open = true;
    }

    fn check(&self) {
        let mut positions = BTreeSet::new();
        let mut writers: BTreeMap<u64, SiteId> = BTreeMap::new();
        for (id, position) in &self.acked {
            assert!(
                positions.insert(format!("{position:?}")),
                "position {position} of write {id} was used before"
            );
            let writer = writers.entry(position.epoch.0).or_insert(position.origin);
            // Two operators who both promote make a fork; nothing else does.
            assert!(
                *writer == position.origin || self.used[4] > 0,
                "both sites wrote in epoch {}",
                position.epoch.0
            );
        }
        if self.used[4] == 0 {
            let open = self.sites.iter().filter(|site| site.open).count();
            assert!(open <= 1, "both sides are writable and no operator forced it");
            for site in self.sites.iter().filter(|site| site.open) {
                for (id, _) in &self.acked {
                    assert!(site.image.contains(id), "write {id} is lost and no operator forced it");
                }
            }
        }
        for (name, site) in ["A", "B"].iter().zip(&self.sites) {
            assert!(!site.open || site.state.role == Role::Primary, "{name} serves hosts and is no primary");
            assert_eq!(
                site.state.forks.last().unwrap().epoch,
                site.state.epoch,
                "{name}'s history ends elsewhere"
            );
        }
        // What is acknowledged and nowhere in the primary's image is on a side that says so.
        if let Some(primary) = self.session {
            let (ours, theirs) = (&self.sites[primary], &self.sites[1 - primary]);
            let orphaned = theirs.image.iter().any(|id| !ours.image.contains(id));
            assert!(!orphaned || theirs.state.diverged, "orphaned writes that nobody reports");
        }
    }

    /// One primary with a session, both images equal: where every history must be able to end.
    fn is_healed(&self) -> bool {
        let Some(primary) = self.session else { return false };
        let (ours, theirs) = (&self.sites[primary], &self.sites[1 - primary]);
        ours.open && !theirs.state.diverged && ours.image == theirs.image && theirs.tip == ours.position()
    }
}

fn extend(key: &mut Vec<u8>, position: Position) {
    let Position { epoch, origin, incarnation, sequence } = position;
    let numbers = [epoch.0, incarnation.0, sequence.0].map(|number| u8::try_from(number).unwrap());
    key.extend(numbers);
    key.push(origin.to_bytes()[0]);
}

/// Every world that can be reached, with the worlds and actions before each.
fn explore(budget: Budget) -> usize {
    let mut numbers: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut worlds = vec![World::new()];
    let mut reached_from: Vec<Option<(usize, Action)>> = vec![None];
    let mut predecessors: Vec<Vec<usize>> = vec![Vec::new()];
    numbers.insert(worlds[0].key(), 0);
    let mut queue = VecDeque::from([0]);
    while let Some(number) = queue.pop_front() {
        let world = worlds[number].clone();
        for action in world.actions(budget) {
            let next = std::panic::catch_unwind(|| {
                let next = world.after(action);
                next.check();
                next
            });
            let Ok(next) = next else {
                panic!("{}\nthen {action:?}", history(&worlds, &reached_from, number));
            };
            let known = numbers.len();
            let target = *numbers.entry(next.key()).or_insert(known);
            if target == known {
                worlds.push(next);
                reached_from.push(Some((number, action)));
                predecessors.push(Vec::new());
                queue.push_back(target);
            }
            predecessors[target].push(number);
        }
    }
    // Backwards from every healed world: what is not met on the way has no way out.
    let mut healing: BTreeSet<usize> =
        (0..worlds.len()).filter(|number| worlds[*number].is_healed()).collect();
    let mut queue: VecDeque<usize> = healing.iter().copied().collect();
    while let Some(number) = queue.pop_front() {
        for before in &predecessors[number] {
            if healing.insert(*before) {
                queue.push_back(*before);
            }
        }
    }
    if let Some(stuck) = (0..worlds.len()).find(|number| !healing.contains(number)) {
        panic!("there is no way out of this:\n{}", history(&worlds, &reached_from, stuck));
    }
    worlds.len()
}

fn history(worlds: &[World], reached_from: &[Option<(usize, Action)>], mut number: usize) -> String {
    let mut lines = vec![format!("{:?}", worlds[number])];
    while let Some((before, action)) = reached_from[number] {
        lines.push(format!("{action:?}"));
        number = before;
    }
    lines.reverse();
    lines.join("\n")
}

#[test]
fn no_order_of_switches_crashes_and_partitions_loses_a_write_or_makes_two_writable_sides() {
    let budget = Budget { writes: 3, crashes: 2, losses: 1, switches: 2, failovers: 0, graces: 1 };
    let worlds = explore(budget);
    assert!(worlds > 1000, "{worlds} worlds");
}

#[test]
fn every_history_with_failovers_and_forks_can_be_healed_and_no_orphan_goes_unreported() {
    let budget = Budget { writes: 2, crashes: 1, losses: 1, switches: 1, failovers: 2, graces: 1 };
    let worlds = explore(budget);
    assert!(worlds > 1000, "{worlds} worlds");
}
