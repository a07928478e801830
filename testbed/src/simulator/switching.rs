//! A planned switch under load, disturbed once, at its events in turn: at some of them in the gate, at each with
//! `FARSHORE_SWITCH_STEP=1`.

use daemon::group::Group;
use protocol::Role;

use super::plan::{MILLISECOND, SECOND};
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
            let done = world.enter(1).is_some_and(|group| group.failover().is_ok());
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
