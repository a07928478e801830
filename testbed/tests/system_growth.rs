//! Mirrored volumes grow: at the partner first, in the order of the writes, and only then for hosts.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::{Background, Fio, Load, NbdClient, Pair, Random, Site, World, binary};

const MEBIBYTE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);

fn expect_failover_lines(pair: &Pair) {
    for site in [&pair.west, &pair.east] {
        for text in ["failover", "promot", "epoch", "fence", "orphan", "diverge", "partner", "grace"] {
            site.log().allow(text);
        }
    }
}

fn size_at(site: &Site) -> Result<u64> {
    let shown = site.json("volume show data")?;
    shown.get("size_bytes").and_then(Value::as_u64).context("a size")
}

/// Waits until both sites have the size, and checks that hosts at `primary` see it.
fn check_size(pair: &Pair, primary: &Site, size: u64) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while size_at(&pair.west)? != size || size_at(&pair.east)? != size {
        ensure!(
            Instant::now() < deadline,
            "{} at west, {} at east",
            size_at(&pair.west)?,
            size_at(&pair.east)?
        );
        thread::sleep(Duration::from_millis(50));
    }
    let client = primary.wait_for_export("data", TIMEOUT)?;
    ensure!(client.size() == size, "hosts see {}", client.size());
    Ok(client.disconnect()?)
}

/// If the new primary waits for an operator because of orphaned writes, gives the verb.
fn start_where_asked(primary: &Site) -> Result<()> {
    let settled = |view: &Value| view["synchronized"] == true || view["needs_start"] == true;
    let view = primary.wait_for_mirror("compared", TIMEOUT, settled)?;
    if view.get("needs_start") == Some(&Value::Bool(true)) {
        primary.run("mirror start mirror --primary local")?;
    }
    primary.wait_caught_up()
}

#[test]
fn a_mirrored_volume_grows_under_load_and_a_failover_serves_its_new_size() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        expect_failover_lines(&pair);
        let export = pair.west.export("data");
        let fio = Fio::new(&export)
            .option("rw", "randwrite")
            .option("bs", "8k")
            .option("size", "16M")
            .option("offset", "8M")
            .option("iodepth", 8)
            .option("verify", "crc32c")
            .option("loops", 4)
            .start()?;
        let mut load = Load::new(2, 4 * MEBIBYTE, 31);
        let (_, ends) = load.run_while(&export, || {
            thread::sleep(Duration::from_millis(300));
            pair.west.run("volume resize data --size 64MiB")?;
            thread::sleep(Duration::from_millis(300));
            pair.west.run("volume resize data --size 96MiB")
        })?;
        ends.into_iter().try_for_each(|end| end.context("a writer saw an error"))?;
        fio.finish(TIMEOUT)?.success()?;
        check_size(&pair, &pair.west, 96 * MEBIBYTE)?;
        let sentence = pair.east.refused("volume resize data --size 128MiB")?;
        ensure!(sentence.contains("follows its primary"), "{sentence}");

        let pattern = vec![7; 1 << 20];
        NbdClient::connect(&export)?.write_durable(90 * MEBIBYTE, &pattern)?;
        pair.wait_caught_up()?;
        pair.check_equal("data")?;
        pair.west.kill9()?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        ensure!(client.size() == 96 * MEBIBYTE, "the promoted side has {}", client.size());
        let mut found = vec![0; 1 << 20];
        client.read(90 * MEBIBYTE, &mut found)?;
        ensure!(found == pattern, "the new part at the promoted side");
        load.verify_acknowledged(&pair.east.export("data"))?;

        let sentence = pair.east.refused("volume resize data --size 128MiB")?;
        ensure!(sentence.contains("not connected") && sentence.contains("keeps its size"), "{sentence}");
        pair.west.resume()?;
        start_where_asked(&pair.east)?;
        pair.east.run("volume resize data --size 128MiB")?;
        client.write_durable(0, &pattern)?;
        check_size(&pair, &pair.east, 128 * MEBIBYTE)?;
        pair.east.wait_caught_up()?;
        pair.check_equal("data")
    })
}

#[test]
fn a_growth_that_either_side_dies_in_is_whole_or_is_done_again() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 16)?;
        expect_failover_lines(&pair);
        for site in [&pair.west, &pair.east] {
            site.log().allow("intent map");
        }
        let mut random = Random::new(17);
        let mut size = 16;
        for round in 0..6 {
            let shown = size_at(&pair.west)?;
            size += 16;
            let mut command = Command::new(binary("farshore")?);
            command.arg("--socket").arg(pair.west.control_socket());
            command.args(["volume", "resize", "data", "--size", &format!("{size}MiB")]);
            let resize = Background::start(command)?;
            thread::sleep(Duration::from_millis(random.below(40)));
            let victim = if round % 2 == 0 { &mut pair.west } else { &mut pair.east };
            victim.kill9()?;
            thread::sleep(Duration::from_millis(200));
            victim.resume()?;
            let done = resize.finish(TIMEOUT + TIMEOUT)?;
            pair.west.wait_for_export("data", TIMEOUT)?.disconnect()?;
            pair.west.wait_caught_up()?;
            let west = size_at(&pair.west)?;
            ensure!(west == shown || west == size * MEBIBYTE, "west has {west} bytes");
            ensure!(
                !done.status.success() || west == size * MEBIBYTE,
                "an answered resize is lost: {done:?}"
            );
            ensure!(size_at(&pair.east)? >= west, "the target is smaller than what hosts see");
            pair.west.run(&format!("volume resize data --size {size}MiB"))?;
            check_size(&pair, &pair.west, size * MEBIBYTE)?;
            let mut client = NbdClient::connect(&pair.west.export("data"))?;
            client.write_durable((size - 1) * MEBIBYTE, &vec![3; 4096])?;
            pair.west.wait_caught_up()?;
            pair.check_equal("data")?;
        }
        Ok(())
    })
}

/// The export of a drill at a point of the window, and what it has at a place; then the drill is stopped.
fn drill(pair: &Pair, at: &str, offset: Option<u64>) -> Result<(u64, Vec<u8>)> {
    pair.east.run(&format!("mirror drill start mirror{at}"))?;
    let mut client = pair.east.wait_for_export("data@drill", TIMEOUT)?;
    let mut found = vec![0; 1 << 20];
    if let Some(offset) = offset {
        client.read(offset, &mut found)?;
    }
    let size = client.size();
    client.disconnect()?;
    pair.east.run("mirror drill stop mirror")?;
    Ok((size, found))
}

/// Hosts at a site see this size, and zeros at a place.
fn check_zeros(site: &Site, size: u64, offset: u64) -> Result<()> {
    let mut client = site.wait_for_export("data", TIMEOUT)?;
    ensure!(client.size() == size, "hosts see {} instead of {size}", client.size());
    let mut found = vec![1; 1 << 20];
    client.read(offset, &mut found)?;
    ensure!(found.iter().all(|byte| *byte == 0), "what a rewind discarded is there again");
    Ok(client.disconnect()?)
}

#[test]
fn a_failover_to_before_a_resize_takes_size_and_content_back_for_good() -> Result<()> {
    World::run(|world| {
        let flags = ["--retention-window-seconds", "600"].map(str::to_owned).to_vec();
        let mut pair = Pair::start_with(world, [Vec::new(), flags])?;
        expect_failover_lines(&pair);
        for site in [&pair.west, &pair.east] {
            ["drill", "session", "switch"].iter().for_each(|text| site.log().allow(text));
        }
        pair.west.run("volume create data --size 16MiB --iops unlimited")?;
        pair.mirror(&["data"])?;
        let pattern = vec![9; 1 << 20];
        NbdClient::connect(&pair.west.export("data"))?.write_durable(0, &pattern)?;
        pair.wait_caught_up()?;
        let good = pair.west.mirror_view()?["position"]["sequence"].as_u64().context("no sequence")?;
        pair.west.run("volume resize data --size 32MiB")?;
        NbdClient::connect(&pair.west.export("data"))?.write_durable(24 * MEBIBYTE, &pattern)?;
        pair.wait_caught_up()?;
        let (size, _) = drill(&pair, &format!(" --at {good}"), None)?;
        ensure!(size == 16 * MEBIBYTE, "a drill at a point before the resize has {size} bytes");
        let (size, found) = drill(&pair, "", Some(24 * MEBIBYTE))?;
        ensure!(size == 32 * MEBIBYTE && found == pattern, "a drill at the tip has {size} bytes");

        pair.west.kill9()?;
        pair.east.run(&format!("mirror failover mirror --accept-loss --at {good}"))?;
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        ensure!(client.size() == 16 * MEBIBYTE, "the point is served with {} bytes", client.size());
        let mut found = vec![0; 1 << 20];
        client.read(0, &mut found)?;
        ensure!(found == pattern, "what was written before the point");
        client.disconnect()?;

        pair.west.resume()?;
        pair.east.wait_for_mirror("waiting for a start", TIMEOUT, |view| view["needs_start"] == true)?;
        pair.east.run("mirror start mirror --primary local")?;
        pair.east.wait_caught_up()?;
        let sentence = pair.east.refused("mirror switch mirror")?;
        ensure!(sentence.contains("has more of volume"), "{sentence}");
        pair.east.run("volume resize data --size 28MiB")?;
        check_zeros(&pair.east, 28 * MEBIBYTE, 24 * MEBIBYTE)?;
        pair.east.run("volume resize data --size 32MiB")?;
        pair.east.wait_caught_up()?;
        // Nor is a size in the way that was reached in this very session.
        pair.east.run("mirror switch mirror")?;
        check_zeros(&pair.west, 32 * MEBIBYTE, 24 * MEBIBYTE)?;
        pair.west.wait_caught_up()?;
        pair.check_equal("data")
    })
}

#[test]
fn a_resize_beside_a_verify_a_cut_link_and_a_switch_works_or_is_refused() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 32)?;
        expect_failover_lines(&pair);
        for site in [&pair.west, &pair.east] {
            ["session", "switch"].iter().for_each(|text| site.log().allow(text));
        }
        let export = pair.west.export("data");
        let mut load = Load::new(2, 4 * MEBIBYTE, 47);
        load.run_while(&export, || {
            let verify = thread::scope(|scope| {
                let verify = scope.spawn(|| pair.west.json("mirror verify mirror"));
                pair.west.run("volume resize data --size 48MiB")?;
                verify.join().map_err(|_| anyhow::anyhow!("the verify panicked"))?
            })?;
            ensure!(verify["state"] == "ended", "{verify:#}");
            let total = verify["total_bytes"].as_u64().context("a total")?;
            ensure!([32, 48].map(|size| size * MEBIBYTE).contains(&total), "{verify:#}");
            Ok(())
        })?;
        check_size(&pair, &pair.west, 48 * MEBIBYTE)?;
        let verify = pair.west.json("mirror verify mirror")?;
        ensure!(verify["total_bytes"] == 48 * MEBIBYTE && verify["state"] == "ended", "{verify:#}");

        pair.cut();
        pair.west.wait_for_mirror("away", TIMEOUT, |view| view["state"] == "idling_disconnected")?;
        let sentence = pair.west.refused("volume resize data --size 64MiB")?;
        ensure!(sentence.contains("not connected") && sentence.contains("keeps its size"), "{sentence}");
        pair.heal();
        pair.west.wait_caught_up()?;

        // Whichever comes first, the other one works or is refused with its reason.
        let (switched, resized) = thread::scope(|scope| {
            let switch = scope.spawn(|| pair.west.cli("mirror switch mirror"));
            (pair.west.cli("volume resize data --size 64MiB"), switch.join())
        });
        let switched = switched?;
        let resized = resized.map_err(|_| anyhow::anyhow!("the switch panicked"))??;
        for finished in [&switched, &resized] {
            ensure!(
                finished.status.success() || finished.stderr.trim().lines().count() == 1,
                "{}",
                finished.stderr
            );
        }
        ensure!(
            switched.status.success() || resized.status.success(),
            "{}{}",
            switched.stderr,
            resized.stderr
        );
        let primary = if pair.east.mirror_view()?["role"] == "primary" { &pair.east } else { &pair.west };
        primary.wait_caught_up()?;
        primary.run("volume resize data --size 64MiB")?;
        check_size(&pair, primary, 64 * MEBIBYTE)?;
        pair.check_equal("data")
    })
}
