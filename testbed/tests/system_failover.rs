//! Failover: the peer serves a prefix of the writes, and the old primary is fenced from its first moment.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::{Load, NbdClient, NbdError, Pair, Site, World, first_difference};

const TIMEOUT: Duration = Duration::from_secs(60);
const REGION_BYTES: u64 = 4 << 20;

/// Tries to write to a volume for a time: not one write may be accepted.
fn check_serves_no_write(site: &Site, duration: Duration) -> Result<()> {
    let deadline = Instant::now() + duration;
    while Instant::now() < deadline {
        let written =
            NbdClient::connect(&site.export("data")).and_then(|mut client| client.write(0, &[1; 4096]));
        match written {
            Ok(()) => anyhow::bail!("{} accepted a write", site.name()),
            Err(
                NbdError::Refused { .. } | NbdError::Command(_) | NbdError::Io(_) | NbdError::Protocol(_),
            ) => {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    Ok(())
}

fn expect_failover_lines(pair: &Pair) {
    // A promotion, a lost partner and orphaned writes are events that operators must see.
    for site in [&pair.west, &pair.east] {
        for text in ["failover", "promot", "epoch", "fence", "orphan", "diverge", "partner", "grace"] {
            site.log().allow(text);
        }
    }
}

#[test]
fn the_secondary_refuses_hosts_until_it_is_promoted() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        expect_failover_lines(&pair);
        check_serves_no_write(&pair.east, Duration::from_millis(300))?;
        let view = pair.east.mirror_view()?;
        ensure!(view["role"] == "secondary", "{view:#}");
        let shown = pair.east.json("volume show data")?;
        ensure!(shown["state"] == "secondary", "{shown:#}");

        let sentence = pair.east.refused("mirror failover mirror")?;
        ensure!(sentence.contains("--accept-loss"), "{sentence}");
        pair.west.kill9()?;
        let result = pair.east.json("mirror failover mirror --accept-loss")?;
        ensure!(result["seconds_lost"].is_number() && result["recovery_point"].is_object(), "{result:#}");
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        client.write(4096, &[9; 4096])?;
        client.disconnect()?;
        Ok(())
    })
}

#[test]
fn a_failover_under_load_serves_a_prefix_in_order() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 64)?;
        expect_failover_lines(&pair);
        let mut load = Load::new(4, REGION_BYTES, 21);
        let export = pair.west.export("data");
        load.run_while(&export, || {
            thread::sleep(Duration::from_secs(2));
            pair.west.kill9()
        })?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        pair.east.wait_for_export("data", TIMEOUT)?.disconnect()?;
        let prefixes = load.verify_prefix(&pair.east.export("data")).context("at the peer")?;
        ensure!(
            prefixes.iter().all(|prefix| prefix.last > 0),
            "the peer holds nothing of the load: {prefixes:?}"
        );

        // Go on at the peer, then bring the old primary back as its secondary.
        load.discard_after(&prefixes)?;
        load.settle(&pair.east.export("data"))?;
        load.run_for(&pair.east.export("data"), Duration::from_secs(1))?;
        pair.west.resume()?;
        check_serves_no_write(&pair.west, Duration::from_secs(1))?;
        start_where_asked(&pair)?;
        pair.east.wait_caught_up()?;
        load.verify_acknowledged(&pair.east.export("data"))?;
        pair.check_equal("data")
    })
}

/// If the new primary waits for an operator because of orphaned writes, gives the verb.
fn start_where_asked(pair: &Pair) -> Result<()> {
    let settled = |view: &Value| view["synchronized"] == true || view["needs_start"] == true;
    let view = pair.east.wait_for_mirror("compared", TIMEOUT, settled)?;
    if view.get("needs_start") == Some(&Value::Bool(true)) {
        pair.east.run("mirror start mirror --primary local")?;
    }
    Ok(())
}

/// Nothing is overwritten without `start`.
fn check_not_overwritten(world: &World, site: &Site) -> Result<()> {
    let (data, saved) = (site.data_file("data")?, world.path("before.data"));
    std::fs::copy(&data, &saved)?;
    thread::sleep(Duration::from_secs(3));
    let difference = first_difference(&data, &saved)?;
    ensure!(difference.is_none(), "orphaned writes were overwritten without a start, at {difference:?}");
    Ok(())
}

#[test]
fn the_old_primary_is_fenced_and_its_orphaned_writes_wait_for_an_operator() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        expect_failover_lines(&pair);
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &[1; 8192])?;
        pair.wait_caught_up()?;
        // These writes never reach the peer: orphans.
        pair.cut();
        for block in 0..16 {
            client.write((1 << 20) + block * 4096, &[2; 4096])?;
        }
        pair.west.kill9()?;
        let result = pair.east.json("mirror failover mirror --accept-loss")?;
        let seconds_lost = result["seconds_lost"].as_f64().unwrap_or(0.0);
        ensure!(seconds_lost > 0.0, "{result:#}");
        let mut peer = pair.east.wait_for_export("data", TIMEOUT)?;
        let mut bytes = vec![0; 8192];
        peer.read(0, &mut bytes)?;
        ensure!(bytes == [1; 8192], "the peer lacks a write that was caught up");
        peer.write(2 << 20, &[3; 4096])?;

        pair.heal();
        let from = pair.west.spawn()?;
        check_serves_no_write(&pair.west, Duration::from_secs(3))?;
        let ready = pair.west.log().wait_for(from, TIMEOUT, |line| line.contains("READY"));
        ensure!(ready.is_some(), "west is not ready");
        let view = pair.west.wait_for_mirror("fenced", TIMEOUT, |view| {
            view["orphaned_bytes"].as_u64().is_some_and(|bytes| bytes >= 16 * 4096)
        })?;
        ensure!(view["state_reason"].is_string(), "mirror show does not say why: {view:#}");
        let shown = pair.west.json("volume show data")?;
        ensure!(shown["state"] == "fenced" || shown["state"] == "secondary", "{shown:#}");

        check_not_overwritten(world, &pair.west)?;
        pair.east.wait_for_mirror("waiting for a start", TIMEOUT, |view| view["needs_start"] == true)?;

        pair.east.run("mirror start mirror --primary local")?;
        pair.east.wait_caught_up()?;
        pair.check_equal("data")?;
        let view = pair.west.mirror_view()?;
        ensure!(view["role"] == "secondary", "{view:#}");
        peer.disconnect()?;
        check_serves_no_write(&pair.west, Duration::from_millis(300))
    })
}
