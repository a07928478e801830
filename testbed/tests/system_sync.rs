//! Synchronous mirroring: what a failover may claim, what a cut link costs, and both policies on it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::{Fio, Load, NbdClient, NbdError, Pair, World};

const TIMEOUT: Duration = Duration::from_secs(60);
const REGION_BYTES: u64 = 4 << 20;
/// The patience, the lease and its margin: no answer waits longer for the partner.
const WAIT_MAX: Duration = Duration::from_secs(6);

fn in_force(wanted: bool) -> impl Fn(&Value) -> bool {
    move |view| view.pointer("/sync/in_force") == Some(&Value::Bool(wanted))
}

fn synchronous(world: &World, policy: &str) -> Result<Pair> {
    let pair = Pair::start(world)?;
    for site in [&pair.west, &pair.east] {
        for text in ["partner", "grace", "promot", "epoch", "fence", "orphan", "diverge"] {
            site.log().allow(text);
        }
    }
    pair.west.run("volume create data --size 32MiB --iops unlimited")?;
    pair.west.run(&format!("mirror create mirror --partner east --volumes data --mode sync {policy}"))?;
    pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
    pair.east.wait_for_mirror("leased", TIMEOUT, in_force(true))?;
    Ok(pair)
}

#[test]
fn a_failover_under_sync_claims_zero_loss_and_has_none() -> Result<()> {
    World::run(|world| {
        let mut pair = synchronous(world, "")?;
        let mut load = Load::new(4, REGION_BYTES, 31);
        let export = pair.west.export("data");
        load.run_while(&export, || {
            thread::sleep(Duration::from_secs(2));
            pair.west.kill9()
        })?;
        ensure!(load.acknowledged() > 0, "nothing was written");
        let result = pair.east.json("mirror failover mirror --accept-loss")?;
        ensure!(result["zero_loss"] == true && result["seconds_lost"] == 0.0, "{result:#}");
        pair.east.wait_for_export("data", TIMEOUT)?.disconnect()?;
        load.verify_acknowledged(&pair.east.export("data")).context("an answered write is missing")?;
        // The old side comes back, and its own unanswered writes, if any, wait for an operator.
        load.settle(&pair.east.export("data"))?;
        pair.west.resume()?;
        let settled = |view: &Value| view["synchronized"] == true || view["needs_start"] == true;
        if pair.east.wait_for_mirror("compared", TIMEOUT, settled)?["needs_start"] == true {
            pair.east.run("mirror start mirror")?;
        }
        pair.east.wait_caught_up()?;
        // The mode is a site's own.
        ensure!(pair.east.mirror_view()?["mode"] == "async", "{:#}", pair.east.mirror_view()?);
        pair.east.run("mirror set mirror --mode sync")?;
        pair.east.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        load.run_for(&pair.east.export("data"), Duration::from_secs(1))?;
        pair.check_equal("data")
    })
}

#[test]
fn zero_loss_is_not_claimed_when_the_lease_is_over() -> Result<()> {
    World::run(|world| {
        let mut pair = synchronous(world, "")?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &[1; 4096])?;
        pair.cut();
        // Answered by the primary alone, when the lease is over.
        let begun = Instant::now();
        client.write(4096, &[2; 4096])?;
        ensure!(begun.elapsed() < WAIT_MAX + Duration::from_secs(1), "{:?}", begun.elapsed());
        let view = pair.east.mirror_view()?;
        ensure!(view["sync"].is_null(), "the target still claims: {view:#}");
        pair.west.kill9()?;
        let result = pair.east.json("mirror failover mirror --accept-loss")?;
        ensure!(result["zero_loss"] == false && result["seconds_lost"].as_f64() > Some(0.0), "{result:#}");
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        let mut block = [0; 4096];
        client.read(0, &mut block)?;
        ensure!(block == [1; 4096], "what was received is there");
        Ok(())
    })
}

#[test]
fn a_cut_link_degrades_and_sync_returns_by_itself() -> Result<()> {
    World::run(|world| {
        let pair = synchronous(world, "")?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &[1; 4096])?;
        // A short cut costs a pause only.
        let from = pair.west.log().length();
        pair.cut();
        client.begin_write(4096, 4096, &[2; 4096])?;
        thread::sleep(Duration::from_millis(500));
        pair.heal();
        ensure!(client.reply()?.1 == 0, "a write across a short cut");
        pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        // A long one degrades.
        pair.cut();
        let begun = Instant::now();
        client.write(8192, &[3; 4096])?;
        let waited = begun.elapsed();
        ensure!(waited < WAIT_MAX + Duration::from_secs(1), "{waited:?}");
        ensure!(waited > Duration::from_secs(2), "answered after {waited:?}, within the lease");
        let degraded =
            pair.west.log().wait_for(from, TIMEOUT, |line| line.contains("asynchronous until it is back"));
        ensure!(degraded.is_some(), "no word of it");
        let begun = Instant::now();
        client.write(12_288, &[4; 4096])?;
        ensure!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        ensure!(in_force(false)(&pair.west.mirror_view()?), "{:#}", pair.west.mirror_view()?);
        pair.heal();
        pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        pair.east.wait_for_mirror("leased", TIMEOUT, in_force(true))?;
        client.write(16_384, &[5; 4096])?;
        client.disconnect()?;
        pair.west.wait_caught_up()?;
        pair.check_equal("data")
    })
}

#[test]
fn under_stop_writes_end_with_an_error_while_the_partner_is_away() -> Result<()> {
    World::run(|world| {
        let mut pair = synchronous(world, "--on-link-failure stop")?;
        pair.west.log().allow("on link failure");
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &[1; 4096])?;
        let from = pair.west.log().length();
        pair.cut();
        let refused = client.write(4096, &[2; 4096]);
        ensure!(matches!(refused, Err(NbdError::Command(5))), "{refused:?}");
        ensure!(
            pair.west.log().wait_for(from, TIMEOUT, |line| line.contains("refused")).is_some(),
            "no ERROR"
        );
        client.read(0, &mut [0; 4096])?;
        client.flush()?;
        let begun = Instant::now();
        let refused = client.write(8192, &[3; 4096]);
        ensure!(matches!(refused, Err(NbdError::Command(5))), "{refused:?}");
        ensure!(begun.elapsed() < Duration::from_secs(1), "refused only after {:?}", begun.elapsed());
        // The partner is back: everything goes on by itself.
        pair.heal();
        pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        client.write(8192, &[4; 4096])?;
        client.disconnect()?;
        pair.west.wait_caught_up()?;
        pair.check_equal("data")?;
        // A crash is no way around it; an operator's word is.
        pair.cut();
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.run("mirror start mirror --primary local")?;
        let mut client = pair.west.wait_for_export("data", TIMEOUT)?;
        let refused = client.write(12_288, &[5; 4096]);
        ensure!(matches!(refused, Err(NbdError::Command(5))), "{refused:?}");
        pair.west.run("mirror set mirror --on-link-failure degrade")?;
        client.write(12_288, &[6; 4096])?;
        client.disconnect()?;
        pair.heal();
        pair.west.wait_caught_up()?;
        pair.check_equal("data")
    })
}

#[test]
fn the_mode_is_changed_under_load() -> Result<()> {
    World::run(|world| {
        let mut pair = synchronous(world, "")?;
        let export = pair.west.export("data");
        let fio = Fio::new(&export)
            .option("rw", "randwrite")
            .option("bs", "4k")
            .option("size", "32M")
            .option("iodepth", 16)
            .option("verify", "crc32c")
            .time_based(0, 12)
            .start()?;
        for mode in ["async", "sync", "async", "sync"] {
            thread::sleep(Duration::from_secs(1));
            let view = pair.west.json(&format!("mirror set mirror --mode {mode}"))?;
            ensure!(view["mode"] == mode, "{view:#}");
            match mode {
                "sync" => pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?,
                _ => pair.west.wait_for_mirror("asynchronous", TIMEOUT, |view| view["sync"].is_null())?,
            };
        }
        fio.finish(TIMEOUT)?.success()?;
        // It outlives a crash, and the partner's crash.
        pair.east.kill9()?;
        pair.east.resume()?;
        pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.wait_for_mirror("synchronous", TIMEOUT, in_force(true))?;
        // The role can be given away while it is in force.
        pair.west.run("mirror switch mirror")?;
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        client.write(0, &[7; 4096])?;
        client.disconnect()?;
        pair.east.wait_caught_up()?;
        pair.check_equal("data")
    })
}
