//! A planned switch under load, disturbed once, at its events in turn: at some of them in the gate, at each with
//! `FARSHORE_SWITCH_STEP=1`.

use daemon::group::Group;
use protocol::Role;

use super::plan::{MILLISECOND, SECOND};
use super::scripted::run_until;
use super::world::{Event, World};

/// What happens in the middle of the switch.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    KillOld,
    KillNew,
    PowerOld,
    PowerNew,
    StopOld,
    StopNew,
    KillBoth,
    CutLink,
    FailoverNew,
}

const ALL: [Disturbance; 9] = [
    Disturbance::KillOld,
    Disturbance::KillNew,
    Disturbance::PowerOld,
    Disturbance::PowerNew,
    Disturbance::StopOld,
    Disturbance::StopNew,
    Disturbance::KillBoth,
    Disturbance::CutLink,
    Disturbance::FailoverNew,
];

/// How a run went.
struct Played {
    /// Events from the order until the new side served hosts; all of them if it never did.
    events: u64,
    switches: u64,
    primary: Option<usize>,
}

fn disturb(world: &mut World, disturbance: Disturbance) {
    let later = 300 * MILLISECOND;
    match disturbance {
        Disturbance::KillOld => world.crash(0, false, later),
        Disturbance::KillNew => world.crash(1, false, later),
        Disturbance::PowerOld => world.crash(0, true, later),
        Disturbance::PowerNew => world.crash(1, true, later),
        Disturbance::StopOld => world.begin_stop(0),
        Disturbance::StopNew => world.begin_stop(1),
        Disturbance::KillBoth => {
            world.crash(0, false, later);
            world.crash(1, true, 2 * later);
        }
        Disturbance::CutLink => {
            world.network.up = false;
            world.sever_sessions(50 * MILLISECOND);
            world.after(later, Event::LinkUp);
        }
        Disturbance::FailoverNew => {
            let done = world.enter(1).is_some_and(|group| group.failover(None).is_ok());
            if done {
                world.sites[1].forced_epoch = world.sites[1].state.epoch.0 + 1;
            }
            world.pump(1);
        }
    }
}

fn play(seed: u64, disturbance: Option<(Disturbance, u64)>) -> Result<Played, String> {
    let mut world = World::new(seed, 0);
    world.plan.faults.clear();
    world.plan.iops = None;
    world.plan.start_grace = std::time::Duration::from_secs(30);
    world.plan.load_end = u64::MAX;
    world.create();
    world.after(0, Event::Host);
    world.after(MILLISECOND, Event::Check);
    let mut ordered: Option<u64> = None;
    let mut served = None;
    while let Some(((at, _), event)) = world.events.pop_first() {
        world.now = at;
        match &mut ordered {
            None if at > SECOND + 200 * MILLISECOND => {
                let done = world.enter(0).is_some_and(|group| Group::switch(group).is_ok());
                world.pump(0);
                if done {
                    ordered = Some(0);
                    // Hosts go on for a while at whichever side serves them.
                    world.plan.load_end = at + 800 * MILLISECOND;
                }
            }
            None => {}
            Some(count) => {
                let due = disturbance.filter(|(_, at)| at == count);
                *count += 1;
                let count = *count;
                if let Some((disturbance, _)) = due {
                    disturb(&mut world, disturbance);
                }
                if world.sites[1].presented {
                    served.get_or_insert(count);
                }
            }
        }
        if !world.healing && at >= world.plan.load_end.saturating_add(SECOND) {
            world.heal();
        }
        if world.healing && event == Event::Check && world.is_converged() {
            world.check_final();
            break;
        }
        if at > 200 * SECOND {
            let states = world.describe();
            world.fail(format!("not equal in time: {states}"));
        }
        if let Some(failure) = world.failure.take() {
            return Err(failure);
        }
        world.handle(event);
    }
    if let Some(failure) = world.failure.take() {
        return Err(failure);
    }
    Ok(Played {
        events: served.or(ordered).unwrap_or(0),
        switches: world.statistics.switches,
        primary: world.site_in(Role::Primary),
    })
}

/// Every how many events a fault is tried.
fn step(events: u64) -> u64 {
    let wished = std::env::var("FARSHORE_SWITCH_STEP").ok().and_then(|step| step.parse().ok());
    wished.unwrap_or(events / 10).max(1)
}

fn disturb_everywhere(seed: u64) {
    let clean = play(seed, None).unwrap_or_else(|failure| panic!("seed {seed}, undisturbed: {failure}"));
    assert_eq!((clean.switches, clean.primary), (1, Some(1)), "seed {seed}: the role moved");
    let mut moved = 0;
    let step = step(clean.events);
    for (disturbance, first) in ALL.into_iter().zip(0_u64..) {
        for at in (first % step..clean.events + 5).step_by(super::size(step)) {
            let played = play(seed, Some((disturbance, at)))
                .unwrap_or_else(|failure| panic!("seed {seed}, {disturbance:?} at event {at}: {failure}"));
            moved += played.switches;
        }
    }
    assert!(moved > 10, "a fault that comes late enough does not keep the role from moving: {moved}");
}

/// Two plans of several volumes and little else, so that a run is short.
#[test]
fn a_switch_survives_each_fault_at_any_of_its_events() {
    let mut seeds = (0_u64..).filter(|seed| {
        let plan = World::new(*seed, 0).plan;
        plan.volume_blocks.iter().sum::<u64>() < 200 && plan.host_interval >= 4 * MILLISECOND
    });
    for seed in seeds.by_ref().take(2) {
        disturb_everywhere(seed);
    }
}

/// Two operators take the role at the same time: one by `failover` at the side that gave it up, one at its partner.
fn make_fork(world: &mut World) {
    run_until(world, "load", |world| world.now > SECOND + 200 * MILLISECOND);
    assert!(world.enter(0).is_some_and(|group| Group::switch(group).is_ok()));
    world.pump(0);
    // From here on no host writes: the oracle knows one lineage.
    world.plan.load_end = world.now;
    run_until(world, "the role is given up", |world| world.sites[0].state.relinquished.is_some());
    world.network.up = false;
    world.sever_sessions(50 * MILLISECOND);
    world.oracle.forked_epoch = Some(2);
    for site in 0..2 {
        run_until(world, "a promotion", |world| {
            world.sites[site].forced_epoch = 2;
            let begun = world.enter(site).is_some_and(|group| group.failover(None).is_ok());
            world.pump(site);
            begun
        });
    }
    let promoted =
        |world: &mut World| world.sites.iter().all(|site| site.presented && site.state.epoch.0 == 2);
    run_until(world, "both sides serve hosts", promoted);
    world.network.up = true;
}

#[test]
fn a_fork_rests_until_an_operator_chooses_a_side() {
    for chosen in 0..2 {
        let mut world = World::new(3, 0);
        world.plan.faults.clear();
        world.plan.iops = None;
        world.plan.load_end = u64::MAX;
        world.create();
        world.after(0, Event::Host);
        world.after(MILLISECOND, Event::Check);
        make_fork(&mut world);
        let reports = |world: &mut World| {
            (0..2).all(|site| {
                let snapshot = world.enter(site).and_then(|group| group.mirror_snapshot());
                snapshot
                    .and_then(|mirror| mirror.reason)
                    .is_some_and(|reason| reason.contains("promoted in epoch 2"))
            })
        };
        run_until(&mut world, "both sides report the fork", reports);
        assert!(world.enter(chosen).is_some_and(|group| group.start(false).is_err()), "no side was chosen");
        world.sites[chosen].forced_epoch = 3;
        assert!(world.enter(chosen).is_some_and(|group| group.start(true).is_ok()));
        world.pump(chosen);
        run_until(&mut world, "the other side is fenced", |world| !world.sites[1 - chosen].presented);
        assert!(world.sites[1 - chosen].state.diverged || !world.sites[1 - chosen].presented);
        world.heal();
        run_until(&mut world, "both sides are equal", World::is_converged);
        world.check_final();
        assert_eq!(world.failure, None);
        assert_eq!((world.site_in(Role::Primary), world.sites[chosen].state.epoch.0), (Some(chosen), 3));
    }
}
