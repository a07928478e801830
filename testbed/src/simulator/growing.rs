//! Growth beside the other verbs: a rewind to before it, a drill and a verify over it.

use std::time::Duration;

use block::{BlockCount, VolumeIndex, WallTime};
use daemon::group::{Group, MirrorPolicy, Overload, Retention, RewindTo, VerifyProgress};
use protocol::Role;

use super::plan::{MILLISECOND, SECOND};
use super::scripted::run_until;
use super::world::{Event, World};

/// A calm world under load, whose volumes have half of the blocks that they may come to have.
fn half_grown(seed: u64, window: Duration) -> World {
    let mut world = World::new(seed, 0);
    world.plan.faults.clear();
    world.plan.iops = None;
    world.plan.start_grace = Duration::from_secs(30);
    world.plan.load_end = u64::MAX;
    world.plan.retention = Retention { window, failover_within: Duration::from_secs(100) };
    // A load that the window has room for, and nothing that holds copies or hosts back.
    world.plan.host_interval = 5 * MILLISECOND;
    world.plan.write_blocks_max = world.plan.write_blocks_max.min(4);
    for site in &mut world.sites {
        site.policy =
            MirrorPolicy { overload: Overload::Bitmap, bandwidth: None, resync_rate: None, ..site.policy };
    }
    let halves: Vec<u64> = world.plan.volume_blocks.iter().map(|blocks| blocks / 2).collect();
    for site in &mut world.sites {
        site.sizes.clone_from(&halves);
        site.rooms.clone_from(&halves);
    }
    world.shown.clone_from(&halves);
    world.plan.first_blocks = halves;
    world.create();
    world.after(0, Event::Host);
    world.after(MILLISECOND, Event::Check);
    world
}

fn run_for(world: &mut World, span: u64) {
    let until = world.now + span;
    run_until(world, "time", |world| world.now >= until);
}

fn is_synchronized(world: &mut World, site: usize) -> bool {
    let snapshot = world.enter(site).and_then(|group| group.mirror_snapshot());
    snapshot.is_some_and(|mirror| mirror.synchronized && mirror.role == Role::Primary)
}

/// Every volume gets all the blocks that it may have.
fn grow_all(world: &mut World, site: usize) {
    for volume in 0..world.plan.volume_blocks.len() {
        let blocks = world.plan.volume_blocks[volume];
        let index = VolumeIndex(u16::try_from(volume).unwrap());
        let order = |world: &mut World| {
            let size = BlockCount(blocks).bytes();
            let begun = world.enter(site).is_some_and(|group| group.grow(index, size).is_ok());
            world.pump(site);
            begun
        };
        run_until(world, "a growth begins", order);
        run_until(world, "a volume has grown", |world| world.sites[site].sizes[volume] == blocks);
    }
}

fn calm(world: &mut World) {
    world.plan.load_end = world.now;
    world.heal();
    run_until(world, "both sides are equal", World::is_converged);
    world.check_final();
    assert_eq!(world.failure, None);
}

#[test]
fn a_rewind_to_before_a_growth_has_the_old_size_and_nothing_of_what_was_behind_it() {
    let mut rewinds = 0;
    for seed in 0..40 {
        let mut world = half_grown(seed, Duration::from_secs(60));
        let halves = world.plan.first_blocks.clone();
        run_until(&mut world, "the initial copy", |world| is_synchronized(world, 0));
        run_for(&mut world, 200 * MILLISECOND);
        let before = RewindTo::Time(WallTime(world.wall(1).0));
        run_for(&mut world, 200 * MILLISECOND);
        grow_all(&mut world, 0);
        run_for(&mut world, 100 * MILLISECOND);
        if world.enter(1).is_none_or(|group| group.loss(Some(before)).is_err()) {
            // The load was too high for this window.
            continue;
        }
        world.network.up = false;
        world.sever_sessions(50 * MILLISECOND);
        world.after(2 * SECOND, Event::LinkUp);
        let report = world.enter(1).unwrap().failover(Some(before)).unwrap();
        world.sites[1].rewind = Some(report.recovery_point);
        world.sites[1].failover = Some((world.now, report.lost_at_most));
        world.sites[1].forced_epoch = world.sites[1].state.epoch.0 + 1;
        world.pump(1);
        run_until(&mut world, "the point is served", |world| world.sites[1].presented);
        assert_eq!(world.sites[1].sizes, halves, "seed {seed}: the size is that of the point");
        let asks = |world: &mut World| {
            let snapshot = world.enter(1).and_then(|group| group.mirror_snapshot());
            snapshot.is_some_and(|mirror| mirror.needs_start)
        };
        run_until(&mut world, "an operator is asked", asks);
        // Where the old side differs behind the size counts too, and its search for orphans ends.
        assert!(world.enter(0).is_some_and(|group| group.search_orphans().is_ok()));
        world.sites[0].searching = true;
        world.pump(0);
        run_until(&mut world, "the orphans are found", |world| !world.sites[0].searching);
        world.order_start();
        run_until(&mut world, "the old side follows", |world| is_synchronized(world, 1));
        let refused = world.enter(1).unwrap().switch().unwrap_err().to_string();
        assert!(refused.contains("the partner has more of volume"), "{refused}");
        grow_all(&mut world, 1);
        run_for(&mut world, 300 * MILLISECOND);
        calm(&mut world);
        assert_eq!(world.sites[1].sizes, world.plan.volume_blocks);
        rewinds += 1;
        if rewinds == 4 {
            return;
        }
    }
    panic!("only {rewinds} windows reached back to before the growth");
}

#[test]
fn a_drill_keeps_the_size_of_its_point_and_a_verify_that_of_its_beginning() {
    let mut drills = 0;
    for seed in 0..6 {
        let mut world = half_grown(seed, Duration::from_secs(60));
        let halves = world.plan.first_blocks.clone();
        run_until(&mut world, "the initial copy", |world| is_synchronized(world, 0));
        run_for(&mut world, 200 * MILLISECOND);
        assert!(world.enter(0).is_some_and(|group| group.verify(None).is_ok()));
        world.pump(0);
        let before = world.wall(1).0;
        grow_all(&mut world, 0);
        for (at, expected) in [(Some(before), &halves), (None, &world.plan.volume_blocks.clone())] {
            let at = at.map(|at| RewindTo::Time(WallTime(at)));
            // The load may be too high for this window.
            let Ok(begun) = world.enter(1).unwrap().start_drill(at, 1 << 30) else { continue };
            drills += usize::from(at.is_some());
            let blocks: Vec<u64> = begun.sizes.iter().map(|size| size.0 / 4096).collect();
            assert_eq!(&blocks, expected, "seed {seed}");
            assert!(world.enter(1).is_some_and(|group| group.stop_drill().is_ok()));
        }
        while let Some(effect) = world.sites[1].group.as_mut().and_then(Group::poll_effect) {
            // No host used them.
            if !matches!(effect, daemon::group::Effect::DrillEnded { .. }) {
                world.perform(1, effect);
            }
        }
        let ended = |world: &mut World| {
            let report = world.sites[0].group.as_ref().and_then(Group::verify_report);
            report.is_some_and(|report| report.progress != VerifyProgress::Running)
        };
        run_until(&mut world, "the verify ends", ended);
        let report = world.sites[0].group.as_ref().and_then(Group::verify_report).unwrap().clone();
        assert_eq!(report.total, BlockCount(halves.iter().sum()).bytes(), "seed {seed}");
        assert!(report.is_clean() && report.compared.0 + report.busy.0 == report.total.0, "{report:?}");
        // What grew in this session is not in the way of a switch.
        let begins = |world: &mut World| {
            let begun = world.enter(0).is_some_and(|group| Group::switch(group).is_ok());
            world.pump(0);
            begun
        };
        run_until(&mut world, "a switch begins", begins);
        run_until(&mut world, "the role has moved", |world| world.sites[1].presented);
        run_for(&mut world, 300 * MILLISECOND);
        calm(&mut world);
    }
    assert!(drills > 0, "no window reached back to before the growth");
}
