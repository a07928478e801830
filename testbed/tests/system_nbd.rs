//! The NBD protocol as real clients see it: maps, sparse copies, refusals, large and long commands, bad relays.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::nbd::{
    COMMAND_BLOCK_STATUS, COMMAND_CACHE, COMMAND_FLUSH, COMMAND_READ, COMMAND_TRIM, COMMAND_WRITE,
    COMMAND_WRITE_ZEROES, FLAG_FUA,
};
use testbed::harness::{
    Background, Bystander, Export, Fio, NbdClient, Random, Site, SiteOptions, World, files_equal, run,
};

const MEBIBYTE: u64 = 1 << 20;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn site_with_volume(world: &World, size: &str) -> Result<Site> {
    let site = world.site("west", SiteOptions::default())?;
    site.run(&format!("volume create data --size {size} --iops unlimited"))?;
    Ok(site)
}

/// Ranges of a volume in MiB that are not known to be zeros, as `nbdinfo --map` tells; neighbours are joined.
fn data_mebibytes(export: &Export) -> Result<Vec<(u64, u64)>> {
    let printed = run("nbdinfo", &["--map", "--json", &export.uri()])?;
    let map: Vec<Value> = serde_json::from_str(&printed)?;
    let mut found: Vec<(u64, u64)> = Vec::new();
    for entry in &map {
        let field = |name: &str| entry[name].as_u64().with_context(|| format!("{name} in {entry}"));
        let (offset, length, kind) = (field("offset")?, field("length")?, field("type")?);
        ensure!(kind == 0 || kind == 2, "volumes are thick: {entry}");
        ensure!(offset % MEBIBYTE == 0 && length % MEBIBYTE == 0, "written in whole MiB: {entry}");
        let (begin, end) = (offset / MEBIBYTE, (offset + length) / MEBIBYTE);
        match found.last_mut() {
            _ if kind == 2 => {}
            Some((_, last)) if *last == begin => *last = end,
            Some(_) | None => found.push((begin, end)),
        }
    }
    Ok(found)
}

fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

#[test]
fn a_map_shows_what_was_written_and_zeros_again_after_trim_and_zeroes() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, "64MiB")?;
        let export = site.export("data");
        ensure!(data_mebibytes(&export)?.is_empty(), "a new volume has data");
        let mut client = NbdClient::connect(&export)?;
        for first in [4, 20, 40] {
            client.write(first * MEBIBYTE, &noise(first, 4 * MEBIBYTE))?;
        }
        let written = [(4, 8), (20, 24), (40, 44)];
        ensure!(data_mebibytes(&export)? == written, "{:?}", data_mebibytes(&export)?);
        client.trim(20 * MEBIBYTE, 4 << 20)?;
        client.write_zeroes(41 * MEBIBYTE, 2 << 20)?;
        let left = [(4, 8), (40, 41), (43, 44)];
        ensure!(data_mebibytes(&export)? == left, "{:?}", data_mebibytes(&export)?);
        client.flush()?;
        client.disconnect()?;
        site.restart()?;
        ensure!(data_mebibytes(&site.export("data"))? == left, "after a restart");
        site.terminate()
    })
}

#[test]
fn a_sparse_image_stays_sparse_both_ways() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, "256MiB")?;
        let uri = site.export("data").uri();
        let (source, copy) = (world.text("source.img"), world.text("copy.img"));
        let image = File::create(&source)?;
        image.set_len(256 * MEBIBYTE)?;
        for first in [0, 100, 255] {
            image.write_all_at(&noise(first, MEBIBYTE), first * MEBIBYTE)?;
        }
        // What was there before does not shine through the holes.
        NbdClient::connect(&site.export("data"))?.write(50 * MEBIBYTE, &noise(7, 8 * MEBIBYTE))?;
        let before = site.metrics()?.value("farshore_volume_write_bytes_total", "").unwrap_or(0.0);
        run("nbdcopy", &["--connections=4", "--flush", &source, &uri])?;
        let after = site.metrics()?.value("farshore_volume_write_bytes_total", "").unwrap_or(0.0);
        ensure!(
            after - before < 4.0 * 1_048_576.0,
            "{} bytes were written for 3 MiB of data",
            after - before
        );
        let data = data_mebibytes(&site.export("data"))?;
        ensure!(data == [(0, 1), (100, 101), (255, 256)], "{data:?}");

        run("nbdcopy", &["--connections=4", &uri, &copy])?;
        ensure!(files_equal(source.as_ref(), copy.as_ref())?, "nbdcopy from the volume changed bytes");
        let held = fs::metadata(&copy)?.blocks() * 512;
        ensure!(held <= 4 * MEBIBYTE, "the copy of 3 MiB of data holds {held} bytes");
        site.terminate()
    })
}

#[test]
fn what_a_client_must_not_send_is_answered_and_the_connection_stays() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, "256MiB")?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/refusals.py");
        run("/usr/bin/python3", &[&script.to_string_lossy(), site.export("data").uri().as_str()])?;
        commands_that_no_library_sends(&site.export("data"))?;
        site.terminate()
    })
}

/// What libnbd sends in no mode; with simple replies.
fn commands_that_no_library_sends(export: &Export) -> Result<()> {
    const UNKNOWN: [u16; 4] = [8, 9, 42, u16::MAX];
    const TOO_LONG: u32 = (64 << 20) + 1;
    let mut client = NbdClient::connect(export)?;
    let mut expect = |command, flags, offset, length, payload: &[u8], wanted| -> Result<()> {
        let error = client.error_of(command, flags, offset, length, payload)?;
        ensure!(error == wanted, "command {command} {flags:#x} {offset}+{length}: {error}, not {wanted}");
        // The connection goes on in step.
        let mut bytes = [1; 512];
        client.read(0, &mut bytes)?;
        Ok(())
    };
    for command in UNKNOWN {
        expect(command, 0, 0, 4096, &[], EINVAL)?;
        expect(command, FLAG_FUA, u64::MAX, u32::MAX, &[], EINVAL)?;
    }
    expect(COMMAND_FLUSH, 0, 4096, 0, &[], EINVAL)?;
    expect(COMMAND_FLUSH, 0, 0, 4096, &[], EINVAL)?;
    expect(COMMAND_BLOCK_STATUS, 0, 0, 4096, &[], EINVAL)?;
    expect(COMMAND_READ, 0, 0, TOO_LONG, &[], EINVAL)?;
    expect(COMMAND_READ, 0, 0, u32::MAX, &[], EINVAL)?;
    expect(COMMAND_WRITE, 0, 0, TOO_LONG, &vec![9; 64 << 20 | 1], EINVAL)?;
    expect(COMMAND_WRITE, 0, 255 * MEBIBYTE, 2 << 20, &vec![9; 2 << 20], ENOSPC)?;
    expect(COMMAND_WRITE, 1 << 15, 0, 4096, &[9; 4096], EINVAL)?;
    expect(COMMAND_WRITE_ZEROES, 0, 4096, u32::MAX, &[], ENOSPC)?;
    expect(COMMAND_TRIM, 0, 4096, u32::MAX, &[], EINVAL)?;
    expect(COMMAND_CACHE, 0, u64::MAX, 1, &[], EINVAL)?;
    for command in [COMMAND_READ, COMMAND_WRITE, COMMAND_TRIM, COMMAND_WRITE_ZEROES, COMMAND_CACHE] {
        expect(command, FLAG_FUA, 4096, 0, &[], 0)?;
    }
    Ok(())
}

#[test]
fn qemu_zeroes_discards_and_maps() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, "256MiB")?;
        let export = site.export("data");
        let uri = export.uri();
        let commands = [
            "write -P 0xab 8M 24M",
            "write -z -u 8M 8M",
            "read -P 0 8M 8M",
            "discard 24M 4M",
            "read -P 0 24M 4M",
            "read -P 0xab 16M 8M",
            "read -P 0xab 28M 4M",
            // Of odd places nothing but the range itself may change.
            "write -z -u 16777217 3000001",
            "read -P 0xab 16M 1",
            "read -P 0 16777217 3000001",
            "read -P 0xab 19777218 1000000",
            "write -f -P 0xcd 47M 48M",
            "read -P 0xcd 47M 48M",
            "write -z 47M 48M",
            "read -P 0 47M 48M",
            "flush",
        ];
        let mut arguments = vec!["-f", "raw", "-t", "none", "-d", "unmap"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push(&uri);
        let printed = run("qemu-io", &arguments)?;
        ensure!(!printed.contains("failed"), "qemu-io: {printed}");

        let map: Vec<Value> =
            serde_json::from_str(&run("qemu-img", &["map", "--output=json", "-f", "raw", &uri])?)?;
        let at = |offset: u64| {
            let holds = |entry: &&Value| {
                let (start, length) = (entry["start"].as_u64(), entry["length"].as_u64());
                start.is_some_and(|start| (start..start + length.unwrap_or(0)).contains(&offset))
            };
            map.iter().find(holds).and_then(|entry| entry["zero"].as_bool())
        };
        for (mebibyte, zero) in [(0, true), (10, true), (22, false), (25, true), (30, false), (60, true)] {
            ensure!(at(mebibyte * MEBIBYTE) == Some(zero), "at {mebibyte} MiB: {map:?}");
        }
        ensure!(map.iter().all(|entry| entry["present"] == true), "volumes are thick: {map:?}");
        site.terminate()
    })
}

#[test]
fn commands_of_almost_4_gib_neither_fail_nor_hold_up_another_volume() -> Result<()> {
    const LONGEST: u32 = u32::MAX - 4095;
    World::run(|world| {
        let mut site = site_with_volume(world, "8GiB")?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let (export, other) = (site.export("data"), site.export("other"));
        let mut client = NbdClient::connect(&export)?;
        for part in 0..16 {
            client.write(part * 256 * MEBIBYTE, &noise(part, 8 * MEBIBYTE))?;
        }
        client.flush()?;
        let before = Bystander::watch(&other, Duration::from_secs(2))?;
        let bystander = Bystander::start(&other)?;
        let (begin, mut slowest, mut rounds) = (Instant::now(), Duration::ZERO, 0);
        while rounds < 2 || begin.elapsed() < Duration::from_secs(2) {
            for (command, offset) in
                [(COMMAND_TRIM, 0), (COMMAND_WRITE_ZEROES, 3), (COMMAND_TRIM, 4 << 30), (COMMAND_CACHE, 0)]
            {
                let start = Instant::now();
                let error = client.error_of(command, FLAG_FUA, offset, LONGEST, &[])?;
                ensure!(error == 0, "command {command} of {LONGEST} bytes: error {error}");
                slowest = slowest.max(start.elapsed());
            }
            client.write(rounds % 16 * 256 * MEBIBYTE, &noise(rounds, 8 * MEBIBYTE))?;
            rounds += 1;
        }
        let during = bystander.stop()?;
        // A device that is busy with another's commands is slower; a shard that is blocked stands still.
        ensure!(slowest < Duration::from_secs(10), "a long command took {slowest:?}");
        let allowed = before.median() * 10 + Duration::from_millis(2);
        ensure!(during.median() <= allowed, "median {:?}, {:?} before", during.median(), before.median());
        let allowed = before.longest().max(before.percentile(99) * 10) + Duration::from_millis(200);
        ensure!(
            during.longest() <= allowed,
            "longest {:?}, before: p99 {:?}, longest {:?}",
            during.longest(),
            before.percentile(99),
            before.longest()
        );
        let mut bytes = [1; 4096];
        client.read(1024 * MEBIBYTE, &mut bytes)?;
        ensure!(bytes == [0; 4096], "what was zeroed reads as zeros");
        site.terminate()
    })
}

/// nbdkit between client and daemon: it serves what the daemon serves, with delays, and with errors that its retry
/// filter answers by connecting anew.
fn relay(world: &World, export: &Export) -> Result<(Background, String)> {
    let socket = world.text("relay.sock");
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--unix", &socket, "--filter=retry", "--filter=error", "--filter=delay"]);
    command.args(["nbd", &format!("uri={}", export.uri()), "retry-delay=1", "retry-exponential=no"]);
    command.args(["error-rate=0.3%", "error=EIO", "rdelay=1ms", "wdelay=1ms"]);
    let mut relay = Background::start(command)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Path::new(&socket).exists() {
        ensure!(relay.is_running()? && Instant::now() < deadline, "nbdkit does not serve");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok((relay, socket))
}

#[test]
fn a_relay_that_delays_fails_and_connects_anew_loses_nothing() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, "64MiB")?;
        let (guard, socket) = relay(world, &site.export("data"))?;
        let through = Export::unix(socket.into(), "data");
        let report = Fio::new(&through)
            .option("rw", "randrw")
            .option("bsrange", "512-64k")
            .option("size", 4 * MEBIBYTE)
            .option("offset_increment", 4 * MEBIBYTE)
            .option("numjobs", 4)
            .option("iodepth", 8)
            .option("verify", "crc32c")
            .option("verify_fatal", 1)
            .option("serialize_overlap", 1)
            .run()?;
        ensure!(report.operations("write") > 100, "fio wrote little");
        let (source, copy) = (world.text("source.img"), world.text("copy.img"));
        fs::write(&source, noise(1, 64 * MEBIBYTE))?;
        run("nbdcopy", &["--connections=4", "--flush", &source, &through.uri()])?;
        run("nbdcopy", &["--connections=4", &through.uri(), &copy])?;
        ensure!(files_equal(source.as_ref(), copy.as_ref())?, "bytes changed through the relay");
        drop(guard);
        fs::remove_file(&copy)?;
        run("nbdcopy", &[&site.export("data").uri(), &copy])?;
        ensure!(files_equal(source.as_ref(), copy.as_ref())?, "the volume lacks what the relay acknowledged");
        site.terminate()
    })
}
