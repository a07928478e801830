//! Rewind: a failover goes back to a point of the retention window, and the old side gets the point back.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::harness::{NbdClient, Pair, World};

const TIMEOUT: Duration = Duration::from_secs(60);
const CHUNK_BYTES: u64 = 256 << 10;
const CHUNKS: u64 = 32;
const FLAGS: [&str; 2] = ["--retention-window-seconds", "600"];

/// A pair whose `east` keeps a window, with the volume `data`, caught up.
fn pair(world: &World) -> Result<Pair> {
    let pair = Pair::start_with(world, [Vec::new(), FLAGS.map(str::to_owned).to_vec()])?;
    pair.west.run("volume create data --size 32MiB --iops unlimited")?;
    pair.mirror(&["data"])?;
    for site in [&pair.west, &pair.east] {
        for text in ["failover", "promot", "epoch", "fence", "orphan", "diverge", "partner", "grace"] {
            site.log().allow(text);
        }
    }
    Ok(pair)
}

fn chunk(number: u64, generation: u8) -> Vec<u8> {
    let length = usize::try_from(CHUNK_BYTES).unwrap_or_default();
    (0..length)
        .map(|at| {
            generation ^ u8::try_from((at / 512 + usize::try_from(number).unwrap_or(0)) % 251).unwrap_or(0)
        })
        .collect()
}

/// Writes every chunk in a generation.
fn overwrite(client: &mut NbdClient, generation: u8) -> Result<()> {
    for number in 0..CHUNKS {
        client.write(number * CHUNK_BYTES, &chunk(number, generation))?;
    }
    Ok(())
}

fn check(client: &mut NbdClient, generation: u8) -> Result<()> {
    for number in 0..CHUNKS {
        let mut bytes = chunk(number, 0);
        client.read(number * CHUNK_BYTES, &mut bytes)?;
        ensure!(bytes == chunk(number, generation), "chunk {number} is not of generation {generation}");
    }
    Ok(())
}

/// The time as an operator would write it.
fn now() -> Result<String> {
    let date = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]).output()?;
    Ok(String::from_utf8(date.stdout)?.trim().to_owned())
}

/// The old primary comes back, waits for an operator, and becomes equal.
fn fail_back(pair: &mut Pair) -> Result<()> {
    pair.west.resume()?;
    let view = pair.west.wait_for_mirror("fenced and compared", TIMEOUT, |view| {
        let orphaned = view.get("orphaned_bytes").and_then(serde_json::Value::as_u64);
        orphaned.is_some_and(|bytes| bytes >= CHUNKS * CHUNK_BYTES)
    })?;
    ensure!(view.get("role").is_some_and(|role| role == "secondary"), "{view:#}");
    pair.east.wait_for_mirror("waiting for a start", TIMEOUT, |view| {
        view.get("needs_start").is_some_and(|needed| needed == true)
    })?;
    pair.east.run("mirror start mirror --primary local")?;
    pair.east.wait_caught_up()?;
    pair.check_equal("data")
}

#[test]
fn a_failover_goes_back_to_before_an_overwrite_by_time() -> Result<()> {
    World::run(|world| {
        let mut pair = pair(world)?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        overwrite(&mut client, 1)?;
        pair.wait_caught_up()?;
        let before = now()?;
        // The intruder.
        overwrite(&mut client, 2)?;
        pair.wait_caught_up()?;
        check(&mut client, 2)?;
        client.disconnect()?;

        let view = pair.east.mirror_view()?;
        ensure!(view["window"]["oldest"].is_object(), "{view:#}");
        ensure!(view["window"]["bytes"].as_u64() >= Some(2 * CHUNKS * CHUNK_BYTES), "{view:#}");
        let sentence = pair.east.refused(&format!("mirror failover mirror --at {before}"))?;
        ensure!(sentence.contains("--accept-loss") && sentence.contains("recovery point"), "{sentence}");
        let sentence = pair.east.refused("mirror failover mirror --accept-loss --at 2001-01-01T00:00:00Z")?;
        ensure!(sentence.contains("lies outside the retention window"), "{sentence}");
        ensure!(pair.east.mirror_view()?["role"] == "secondary", "a refused failover changed the role");

        pair.west.kill9()?;
        let result = pair.east.json(&format!("mirror failover mirror --accept-loss --at {before}"))?;
        let point = result["recovery_point"]["time"].as_str().context("no time")?;
        ensure!(point <= before.as_str(), "{result:#}");
        ensure!(result["seconds_lost"].as_f64() > Some(0.0), "{result:#}");
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        check(&mut client, 1)?;
        client.write(16 << 20, &[7; 4096])?;
        client.disconnect()?;
        fail_back(&mut pair)
    })
}

#[test]
fn the_window_survives_a_crash_and_discarded_blocks_survive_one_after_the_promotion() -> Result<()> {
    World::run(|world| {
        let mut pair = pair(world)?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        overwrite(&mut client, 1)?;
        pair.wait_caught_up()?;
        let good = pair.west.mirror_view()?["position"]["sequence"].as_u64().context("no sequence")?;
        overwrite(&mut client, 2)?;
        pair.wait_caught_up()?;
        client.disconnect()?;
        pair.east.kill9()?;
        pair.east.resume()?;
        pair.west.wait_caught_up()?;
        pair.west.kill9()?;
        let result = pair.east.json(&format!("mirror failover mirror --accept-loss --at {good}"))?;
        ensure!(result["recovery_point"]["sequence"].as_u64() == Some(good), "{result:#}");
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        check(&mut client, 1)?;
        client.disconnect()?;
        // The new primary forgets what it knew of the discarded cuts, but for the intent map.
        pair.east.kill9()?;
        pair.east.resume()?;
        pair.east.run("mirror start mirror --primary local")?;
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        check(&mut client, 1)?;
        client.disconnect()?;
        fail_back(&mut pair)
    })
}
