//! A rewind under load, disturbed once, at its events in turn: at some of them in the gate, at each with
//! `FARSHORE_REWIND_STEP=1`.

use std::time::Duration;

use block::WallTime;
use daemon::group::{Retention, RewindTo};
use protocol::Role;

use super::plan::{MILLISECOND, SECOND};
use super::world::{Event, World};

/// What happens in the middle of the rewind.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    Kill,
    Power,
    KillBoth,
}

/// How a run went.
struct Played {
    /// Events from the order until the new side served hosts.
    events: u64,
    rewound: bool,
}

fn order(world: &mut World) -> bool {
    let at = RewindTo::Time(WallTime(world.wall(1).0 - 400 * MILLISECOND));
    let Some(Ok(report)) = world.enter(1).map(|group| group.loss(Some(at))) else { return false };
    world.network.up = false;
    world.sever_sessions(50 * MILLISECOND);
    world.after(2 * SECOND, Event::LinkUp);
    let done = world.enter(1).is_some_and(|group| group.failover(Some(at)).is_ok());
    world.sites[1].failover = Some((world.now, report.lost_at_most));
    world.sites[1].rewind = Some(report.recovery_point);
    world.sites[1].forced_epoch = world.sites[1].state.epoch.0 + 1;
    world.pump(1);
    done
}

fn play(seed: u64, disturbance: Option<(Disturbance, u64)>) -> Result<Played, String> {
    let mut world = World::new(seed, 0);
    world.plan.faults.clear();
    world.plan.iops = None;
    world.plan.retention =
        Retention { window: Duration::from_secs(20), failover_within: Duration::from_secs(100) };
    world.plan.load_end = u64::MAX;
    // The sites exist already, with the plan's own window: a process opens with the settings of its start.
    world.create();
    world.after(0, Event::Host);
    world.after(MILLISECOND, Event::Check);
    let mut ordered: Option<u64> = None;
    let mut served = None;
    while let Some(((at, _), event)) = world.events.pop_first() {
        world.now = at;
        match &mut ordered {
            None if at > 3 * SECOND => {
                let done = order(&mut world);
                if done {
                    ordered = Some(0);
                    world.plan.load_end = at + 1500 * MILLISECOND;
                }
            }
            None => {}
            Some(count) => {
                let due = disturbance.filter(|(_, at)| at == count);
                *count += 1;
                let count = *count;
                match due.map(|(disturbance, _)| disturbance) {
                    Some(Disturbance::Kill) => world.crash(1, false, 300 * MILLISECOND),
                    Some(Disturbance::Power) => world.crash(1, true, 300 * MILLISECOND),
                    Some(Disturbance::KillBoth) => {
                        world.crash(0, false, 600 * MILLISECOND);
                        world.crash(1, true, 300 * MILLISECOND);
                    }
                    None => {}
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
        if at > 300 * SECOND {
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
    let rewound = world.site_in(Role::Primary) == Some(1);
    Ok(Played { events: served.or(ordered).unwrap_or(0), rewound })
}

#[test]
fn a_rewind_is_done_or_undone_whatever_crashes_in_the_middle() {
    let mut rewinds = 0;
    for seed in [3, 8, 21] {
        let calm = play(seed, None).unwrap();
        assert!(calm.rewound, "seed {seed}: nothing was rewound");
        let wished = std::env::var("FARSHORE_REWIND_STEP").ok().and_then(|step| step.parse().ok());
        let step = wished.unwrap_or(calm.events / 12).max(1);
        for disturbance in [Disturbance::Kill, Disturbance::Power, Disturbance::KillBoth] {
            for at in (0..calm.events + 3 * step).step_by(usize::try_from(step).unwrap()) {
                let played = play(seed, Some((disturbance, at)));
                let played =
                    played.unwrap_or_else(|failure| panic!("{seed} {disturbance:?} at {at}: {failure}"));
                rewinds += u64::from(played.rewound);
            }
        }
    }
    assert!(rewinds > 10, "only {rewinds} rewinds outlived their disturbance");
}
