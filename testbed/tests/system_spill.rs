//! The journal's second tier: an outage that is longer than the ring, a link that flaps, and stops of every kind
//! while records are spilled.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::{Fio, Load, Pair, RelaySettings, SiteOptions, World};

const EXPORT_TIMEOUT: Duration = Duration::from_secs(60);
const REGION_BYTES: u64 = 4 << 20;
/// A ring so small that a moment fills it, and a spill file that takes some seconds of the writers at full speed.
const RING_BYTES: u64 = 4 << 20;
const SPILL_BYTES: u64 = 512 << 20;
/// How long the writers that remember write at full speed into an outage.
const BURST: Duration = Duration::from_millis(300);
const RESYNC: &str = "a resync begins";

fn pair(world: &World) -> Result<Pair> {
    let setting = |key: &str, value: u64| (key.to_owned(), value.to_string());
    let settings = vec![setting("ring_bytes", RING_BYTES), setting("spill_bytes", SPILL_BYTES)];
    let options = SiteOptions { settings, ..SiteOptions::default() };
    let pair = Pair::start_as(world, [options.clone(), options])?;
    pair.west.run("volume create data --size 256MiB --iops unlimited")?;
    pair.mirror(&["data"])?;
    synchronized(&pair)?;
    Ok(pair)
}

/// Waits until every write travels in order again.
fn synchronized(pair: &Pair) -> Result<Value> {
    pair.wait_caught_up()?;
    pair.west.wait_for_mirror("synchronized", Duration::from_secs(30), |view| {
        view["state"] == "consistent_synchronized" && view["journal_tier"] == "ring"
    })
}

/// Writes so many MiB behind the regions of the writers that remember; no write may fail.
fn fill(pair: &Pair, mebibytes: u64) -> Result<()> {
    Fio::new(&pair.west.export("data"))
        .option("rw", "randwrite")
        .option("bs", "64k")
        .option("offset", "64M")
        .option("size", "128M")
        .option("io_size", format_args!("{mebibytes}M"))
        .option("iodepth", 4)
        .run()?;
    Ok(())
}

fn sequence(view: &Value) -> u64 {
    view.pointer("/recovery_point/sequence").and_then(Value::as_u64).unwrap_or(0)
}

/// Cuts the link and writes until records are spilled.
fn spill(pair: &Pair, load: &mut Load) -> Result<Value> {
    pair.cut();
    load.run_for(&pair.west.export("data"), BURST)?;
    fill(pair, 16)?;
    pair.west.wait_for_mirror("spilled", Duration::from_secs(10), |view| {
        let spilled = view.pointer("/memory/spill_bytes").and_then(Value::as_u64);
        view["journal_tier"] == "spill" && spilled.is_some_and(|bytes| bytes > 8 << 20)
    })
}

#[test]
fn an_outage_goes_from_ring_to_spill_to_dirty_map_and_all_the_way_back() -> Result<()> {
    World::run(|world| {
        let pair = pair(world)?;
        let mut load = Load::new(4, REGION_BYTES, 1);
        let from = pair.west.log().length();
        pair.cut();
        fill(&pair, 1)?;
        ensure!(pair.west.mirror_view()?["journal_tier"] == "ring", "1 MiB fits into the ring");
        spill(&pair, &mut load)?;
        let metric = pair.west.metrics()?.value("farshore_mirror_spill_bytes", "mirror=\"mirror\"");
        ensure!(metric.is_some_and(|bytes| bytes > 8e6), "metric of the spill: {metric:?}");
        pair.heal();
        let view = synchronized(&pair)?;
        ensure!(view["memory"]["spill_bytes"] == 0, "the file is empty again: {view:#}");
        let resync = pair.west.log().wait_for(from, Duration::ZERO, |line| line.contains(RESYNC));
        ensure!(resync.is_none(), "what was spilled needs no resync: {resync:?}");
        pair.check_equal("data")?;

        spill(&pair, &mut load)?;
        fill(&pair, 2 * (SPILL_BYTES >> 20))?;
        load.run_for(&pair.west.export("data"), BURST)?;
        let view = pair.west.mirror_view()?;
        ensure!(view["journal_tier"] == "dirty-map", "the spill file is full: {view:#}");
        let held = view["memory"]["ring_bytes"].as_u64();
        ensure!(held.is_some_and(|held| held <= RING_BYTES), "memory is bounded: {view:#}");
        pair.heal();
        let view = synchronized(&pair)?;
        ensure!(view["rpo_seconds"].as_f64().is_some_and(|rpo| rpo < 1.0), "{view:#}");
        pair.check_equal("data")?;
        load.verify_acknowledged(&pair.west.export("data"))
    })
}

#[test]
fn a_flapping_link_moves_the_recovery_point_while_records_are_spilled() -> Result<()> {
    World::run(|world| {
        let pair = pair(world)?;
        let from = pair.west.log().length();
        // Half a ring for each round trip: less than the host writes.
        let slow = RelaySettings { delay: Duration::from_millis(150), ..RelaySettings::default() };
        pair.set_link(slow);
        let writer = Fio::new(&pair.west.export("data"))
            .option("rw", "randwrite")
            .option("bs", "64k")
            .option("rate", "12M")
            .option("iodepth", 4)
            .time_based(0, 10);
        let writer = writer.start()?;
        let mut seen = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(12);
        while Instant::now() < deadline {
            pair.set_link(RelaySettings { cut: true, ..slow });
            thread::sleep(Duration::from_millis(300));
            pair.set_link(slow);
            let up = Instant::now() + Duration::from_millis(1500);
            while Instant::now() < up {
                let view = pair.west.mirror_view()?;
                ensure!(view["journal_tier"] != "dirty-map", "the spill takes all of it: {view:#}");
                seen.push((view["journal_tier"] == "spill").then(|| sequence(&view)));
                thread::sleep(Duration::from_millis(50));
            }
        }
        writer.finish(Duration::from_secs(60))?.success()?;
        let moves = |pair: &&[Option<u64>]| match pair {
            [Some(before), Some(after)] => after > before,
            _ => false,
        };
        let moved = seen.windows(2).filter(moves).count();
        ensure!(moved >= 3, "the recovery point moved {moved} times while records were spilled: {seen:?}");
        pair.set_link(RelaySettings::default());
        synchronized(&pair)?;
        let resync = pair.west.log().wait_for(from, Duration::ZERO, |line| line.contains(RESYNC));
        ensure!(resync.is_none(), "small cuts were enough: {resync:?}");
        pair.check_equal("data")
    })
}

#[test]
fn a_kill_while_records_are_spilled_discards_them_and_both_sites_become_equal() -> Result<()> {
    World::run(|world| {
        let mut pair = pair(world)?;
        let mut load = Load::new(4, REGION_BYTES, 2);
        for round in 0..2 {
            let before = spill(&pair, &mut load)?;
            pair.west.kill9()?;
            pair.west.resume()?;
            let incarnation = |view: &Value| view["position"]["incarnation"].as_u64();
            let view = pair.west.wait_for_mirror("in a new incarnation", EXPORT_TIMEOUT, |view| {
                incarnation(view) > incarnation(&before)
            })?;
            ensure!(view["memory"]["spill_bytes"] == 0, "nothing of the file counts: {view:#}");
            pair.heal();
            pair.west.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
            synchronized(&pair)?;
            pair.check_equal("data")?;
            load.verify_acknowledged(&pair.west.export("data")).with_context(|| format!("round {round}"))?;
        }
        Ok(())
    })
}

#[test]
fn a_clean_stop_while_records_are_spilled_continues_without_a_resync() -> Result<()> {
    World::run(|world| {
        let mut pair = pair(world)?;
        let mut load = Load::new(4, REGION_BYTES, 3);
        let before = spill(&pair, &mut load)?;
        let from = pair.west.log().length();
        pair.west.restart()?;
        let view = pair.west.mirror_view()?;
        ensure!(view["journal_tier"] == "spill", "the journal is continued: {view:#}");
        ensure!(view["position"] == before["position"], "in the same incarnation: {view:#}");
        // Once more, before the partner was heard.
        pair.west.restart()?;
        pair.heal();
        pair.west.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
        let export = pair.west.export("data");
        load.run_for(&export, Duration::from_secs(1))?;
        let view = synchronized(&pair)?;
        ensure!(sequence(&view) > before["position"]["sequence"].as_u64().unwrap_or(u64::MAX), "{view:#}");
        let resync = pair.west.log().wait_for(from, Duration::ZERO, |line| line.contains(RESYNC));
        ensure!(resync.is_none(), "it goes on in order: {resync:?}");
        pair.check_equal("data")?;
        load.verify_acknowledged(&export)?;

        // The record of a clean stop is good for one start.
        spill(&pair, &mut load)?;
        pair.west.restart()?;
        let before = pair.west.mirror_view()?;
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.wait_for_mirror("in a new incarnation", EXPORT_TIMEOUT, |view| {
            view["position"]["incarnation"] != before["position"]["incarnation"]
        })?;
        pair.heal();
        pair.west.wait_for_export("data", EXPORT_TIMEOUT)?.disconnect()?;
        synchronized(&pair)?;
        pair.check_equal("data")?;
        load.verify_acknowledged(&export)?;
        pair.west.terminate()?;
        pair.east.terminate()
    })
}
