//! Drills: a writable copy of the target at a recovery point, while the mirror goes on.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::harness::{Fio, FioReport, NbdClient, NbdError, Pair, World};

const TIMEOUT: Duration = Duration::from_secs(60);
const CHUNK_BYTES: u64 = 256 << 10;

fn pair(world: &World, flags: &[&str], mebibytes: u64) -> Result<Pair> {
    let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let pair = Pair::start_with(world, [Vec::new(), flags])?;
    pair.west.run(&format!("volume create data --size {mebibytes}MiB --iops unlimited"))?;
    pair.mirror(&["data"])?;
    for site in [&pair.west, &pair.east] {
        ["drill", "partner", "session"].iter().for_each(|text| site.log().allow(text));
    }
    Ok(pair)
}

fn chunk(number: u64, generation: u8) -> Vec<u8> {
    let seed = generation ^ u8::try_from(number % 251).unwrap_or(0);
    vec![seed | 1; usize::try_from(CHUNK_BYTES).unwrap_or(0)]
}

fn overwrite(client: &mut NbdClient, chunks: u64, generation: u8) -> Result<()> {
    for number in 0..chunks {
        client.write(number * CHUNK_BYTES, &chunk(number, generation))?;
    }
    Ok(())
}

fn check(client: &mut NbdClient, chunks: std::ops::Range<u64>, generation: u8) -> Result<()> {
    for number in chunks {
        let mut bytes = chunk(number, 0);
        client.read(number * CHUNK_BYTES, &mut bytes)?;
        ensure!(bytes == chunk(number, generation), "chunk {number} is not of generation {generation}");
    }
    Ok(())
}

#[test]
fn a_drill_stays_what_it_was_and_never_reaches_the_replica() -> Result<()> {
    World::run(|world| {
        let pair = pair(world, &[], 64)?;
        let chunks = (64 << 20) / CHUNK_BYTES;
        let mut host = NbdClient::connect(&pair.west.export("data"))?;
        overwrite(&mut host, chunks, 1)?;
        pair.wait_caught_up()?;
        let sentence = pair.west.refused("mirror drill start mirror")?;
        ensure!(sentence.contains("primary"), "{sentence}");
        let view = pair.east.json("mirror drill start mirror")?;
        ensure!(view["drill"]["exports"][0] == "data@drill", "{view:#}");
        let sentence = pair.east.refused("mirror drill start mirror")?;
        ensure!(sentence.contains("already"), "{sentence}");

        let mut drill = pair.east.wait_for_export("data@drill", TIMEOUT)?;
        check(&mut drill, 0..chunks, 1)?;
        // The drill's hosts write the first quarter.
        overwrite(&mut drill, chunks / 4, 77)?;
        // The mirror goes on, by more than half of the redo log: what it overwrites has to be kept.
        for generation in 2..8 {
            overwrite(&mut host, chunks, generation)?;
        }
        pair.wait_caught_up()?;
        check(&mut drill, 0..chunks / 4, 77)?;
        check(&mut drill, chunks / 4..chunks, 1)?;
        let view = pair.east.mirror_view()?;
        ensure!(view["drill"]["scratch_bytes"].as_u64() > Some(16 << 20), "{view:#}");

        // A client of its own works on the drill's export, with the mirror under load.
        drill.disconnect()?;
        let fio = Fio::new(&pair.east.export("data@drill")).option("rw", "randwrite").option("bs", "4k");
        let fio = fio.option("iodepth", 8).option("size", "12M").option("verify", "crc32c");
        let under_way = fio.start()?;
        overwrite(&mut host, chunks, 8)?;
        FioReport::parse(&under_way.finish(TIMEOUT)?.success()?)?;
        pair.east.run("mirror drill stop mirror")?;
        ensure!(pair.east.mirror_view()?["drill"].is_null(), "the drill is still shown");
        let gone = NbdClient::connect(&pair.east.export("data@drill"));
        ensure!(matches!(gone, Err(NbdError::Refused { .. })), "the drill's export is still there");
        pair.wait_caught_up()?;
        check(&mut host, 0..chunks, 8)?;
        host.disconnect()?;
        pair.check_equal("data")
    })
}

#[test]
fn a_drill_is_of_the_chosen_point_and_ends_with_the_daemon() -> Result<()> {
    World::run(|world| {
        let mut pair = pair(world, &["--retention-window-seconds", "600"], 16)?;
        let chunks = (16 << 20) / CHUNK_BYTES;
        let mut host = NbdClient::connect(&pair.west.export("data"))?;
        overwrite(&mut host, chunks, 1)?;
        pair.wait_caught_up()?;
        let point = pair.west.mirror_view()?["position"]["sequence"].as_u64().unwrap_or_default();
        overwrite(&mut host, chunks, 2)?;
        pair.wait_caught_up()?;
        let view = pair.east.json(&format!("mirror drill start mirror --at {point}"))?;
        ensure!(view["drill"]["recovery_point"]["sequence"].as_u64() == Some(point), "{view:#}");
        let mut drill = pair.east.wait_for_export("data@drill", TIMEOUT)?;
        check(&mut drill, 0..chunks, 1)?;
        drill.write(0, &[9; 8192])?;
        pair.east.kill9()?;
        pair.east.resume()?;
        ensure!(pair.east.mirror_view()?["drill"].is_null(), "a drill outlived its daemon");
        let gone = NbdClient::connect(&pair.east.export("data@drill"));
        ensure!(matches!(gone, Err(NbdError::Refused { .. })), "the drill's export is still there");
        pair.wait_caught_up()?;
        // The window is as it was, and a failover is what it was.
        pair.west.kill9()?;
        for text in ["failover", "promot", "epoch", "fence", "grace"] {
            pair.east.log().allow(text);
        }
        pair.east.run(&format!("mirror failover mirror --accept-loss --at {point}"))?;
        let mut promoted = pair.east.wait_for_export("data", TIMEOUT)?;
        check(&mut promoted, 0..chunks, 1)?;
        promoted.disconnect()?;
        Ok(())
    })
}

#[test]
fn a_drill_that_needs_too_much_scratch_ends_and_the_mirror_does_not() -> Result<()> {
    World::run(|world| {
        let pair = pair(world, &[], 320)?;
        let chunks = (320 << 20) / CHUNK_BYTES;
        pair.east.run("mirror drill start mirror")?;
        let mut drill = pair.east.wait_for_export("data@drill", TIMEOUT)?;
        let ended = overwrite(&mut drill, chunks, 3);
        ensure!(ended.is_err(), "320 MiB went into 256 MiB of scratch space");
        let started = Instant::now();
        while !pair.east.mirror_view()?["drill"].is_null() {
            ensure!(started.elapsed() < TIMEOUT, "the drill does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut host = NbdClient::connect(&pair.west.export("data"))?;
        overwrite(&mut host, 64, 5)?;
        host.disconnect()?;
        pair.wait_caught_up()?;
        pair.check_equal("data")
    })
}
