//! Crashes of either site and cuts of the link: no acknowledged write is lost, and hosts notice nothing of the peer's.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::harness::{Fio, Load, Pair, RelaySettings, Site, SiteOptions, World};

const EXPORT_TIMEOUT: Duration = Duration::from_secs(60);
const REGION_BYTES: u64 = 4 << 20;

/// How often the primary is killed: few in the gate, more by hand (`FARSHORE_KILLS`).
fn kills() -> u32 {
    let wished = std::env::var("FARSHORE_KILLS").ok();
    wished.and_then(|count| count.parse().ok()).unwrap_or(5)
}

#[test]
fn killing_an_unmirrored_daemon_loses_no_acknowledged_write() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        site.run("volume create data --size 32MiB --iops unlimited")?;
        let mut load = Load::new(4, REGION_BYTES, 1);
        for round in 0..kills() {
            let export = site.export("data");
            load.run_while(&export, || {
                thread::sleep(Duration::from_millis(700));
                site.kill9()
            })?;
            site.resume()?;
            site.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
            load.verify_acknowledged(&export).with_context(|| format!("after kill {round}"))?;
            load.settle(&export)?;
        }
        ensure!(load.acknowledged() > 100, "only {} writes", load.acknowledged());
        site.terminate()
    })
}

#[test]
fn killing_the_primary_loses_no_acknowledged_write_and_both_sites_become_equal() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 64)?;
        let mut load = Load::new(4, REGION_BYTES, 2);
        for round in 0..kills() {
            let export = pair.west.export("data");
            let mut fio = Fio::verifying(&pair.west.export("data"), "32M").start()?;
            load.run_while(&export, || {
                thread::sleep(Duration::from_millis(500 + 300 * u64::from(round % 4)));
                ensure!(fio.is_running()?, "fio ended before the kill");
                pair.west.kill9()
            })?;
            let ended = fio.finish(Duration::from_secs(30))?;
            let bad_data = ["verify: bad", "verify failed", "crc32c: verify"];
            let printed = ended.stdout + &ended.stderr;
            ensure!(!bad_data.iter().any(|text| printed.contains(text)), "fio read wrong data: {printed}");
            pair.west.resume()?;
            pair.west.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
            load.verify_acknowledged(&export).with_context(|| format!("after kill {round}"))?;
            load.settle(&export)?;
        }
        pair.wait_caught_up()?;
        pair.check_equal("data")?;
        // The peer's image as hosts would read it.
        pair.west.kill9()?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        pair.east.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
        load.verify_acknowledged(&pair.east.export("data")).context("at the peer")
    })
}

#[test]
fn a_restart_of_either_site_resumes_without_a_full_copy() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 64)?;
        let mut load = Load::new(2, REGION_BYTES, 3);
        let export = pair.west.export("data");
        load.run_for(&export, Duration::from_secs(1))?;
        pair.wait_caught_up()?;
        pair.west.restart()?;
        pair.west.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
        load.run_for(&export, Duration::from_secs(1))?;
        pair.east.restart()?;
        load.run_for(&export, Duration::from_secs(1))?;
        pair.wait_caught_up()?;
        let view = pair.west.wait_for_mirror("synchronized", Duration::from_secs(30), |view| {
            view["state"] == "consistent_synchronized"
        })?;
        ensure!(view["role"] == "primary", "{view:#}");
        pair.check_equal("data")?;
        load.verify_acknowledged(&export)?;
        pair.west.terminate()?;
        pair.east.terminate()
    })
}

/// A load far below what the machine can do, so that its latency tells of disturbance and not of saturation.
fn steady(site: &Site, seconds: u64) -> Fio {
    Fio::new(&site.export("data"))
        .option("rw", "randwrite")
        .option("bs", "4k")
        .option("offset", "32M")
        .option("size", "32M")
        .option("iodepth", 4)
        .option("rate_iops", 500)
        .time_based(1, seconds)
}

/// The ratios of the 99th percentile while disturbed to that before. The median must be at most 1.2: one pair of
/// measurements says as much about the machine as about the daemon.
fn check_latency(ratios: &mut [f64]) -> Result<()> {
    ratios.sort_by(f64::total_cmp);
    let median = ratios.get(ratios.len() / 2).copied().context("no measurement")?;
    ensure!(median <= 1.2, "p99 of a disturbed mirror against before: {ratios:.2?}");
    Ok(())
}

#[test]
fn a_cut_link_is_invisible_to_hosts_and_heals_by_itself() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 64)?;
        let export = pair.west.export("data");
        let mut ratios = Vec::new();
        for _ in 0..3 {
            let before = steady(&pair.west, 5).run()?;
            pair.cut();
            let during = steady(&pair.west, 5).run()?;
            let view = pair.west.mirror_view()?;
            ensure!(view["rpo_seconds"].as_f64().is_some_and(|rpo| rpo > 3.0), "RPO of a cut link: {view:#}");
            let metric = pair.west.metrics()?.value("farshore_mirror_rpo_seconds", "mirror=\"mirror\"");
            ensure!(metric.is_some_and(|rpo| rpo > 3.0), "RPO metric of a cut link: {metric:?}");
            ratios.push(during.p99_us("write") / before.p99_us("write"));
            pair.heal();
            pair.wait_caught_up()?;
        }
        // A flood over a dead link must neither stop the host nor fill the memory: the ring folds into the map.
        let mut load = Load::new(4, REGION_BYTES, 4);
        pair.cut();
        load.run_for(&export, Duration::from_secs(4))?;
        pair.heal();
        load.run_for(&export, Duration::from_secs(2))?;
        pair.wait_caught_up()?;
        pair.check_equal("data")?;
        load.verify_acknowledged(&export)?;
        check_latency(&mut ratios)
    })
}

#[test]
fn killing_the_target_is_invisible_to_hosts_and_heals_by_itself() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 64)?;
        let export = pair.west.export("data");
        let mut ratios = Vec::new();
        for _ in 0..3 {
            let before = steady(&pair.west, 5).run()?;
            pair.east.kill9()?;
            let during = steady(&pair.west, 5).run()?;
            ratios.push(during.p99_us("write") / before.p99_us("write"));
            pair.east.resume()?;
            pair.wait_caught_up()?;
        }
        let mut load = Load::new(4, REGION_BYTES, 5);
        let (result, ends) = load.run_while(&export, || {
            for _ in 0..3 {
                thread::sleep(Duration::from_millis(700));
                pair.east.kill9()?;
                thread::sleep(Duration::from_millis(300));
                pair.east.resume()?;
            }
            Ok(())
        })?;
        let () = result;
        for end in ends {
            end.context("a host saw an error while the target was down")?;
        }
        pair.wait_caught_up()?;
        pair.check_equal("data")?;
        check_latency(&mut ratios)
    })
}

#[test]
fn a_bad_link_loses_nothing() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 64)?;
        let export = pair.west.export("data");
        pair.set_link(RelaySettings {
            drop_permille: 20,
            reorder_permille: 50,
            delay: Duration::from_millis(5),
            ..RelaySettings::default()
        });
        let mut load = Load::new(4, REGION_BYTES, 6);
        load.run_for(&export, Duration::from_secs(5))?;
        pair.wait_caught_up()?;
        pair.check_equal("data")?;
        load.verify_acknowledged(&export)
    })
}
