//! Silent corruption of a replica, or of the primary, is found block by block while hosts write, and repaired when an
//! operator says from where.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::harness::{Load, NbdClient, Pair, Site, World};

const MEBIBYTE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Turns bits over in a site's ciphertext.
fn corrupt(site: &Site, offset: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(site.data_file("data")?)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x5a], offset)?;
    // The daemon reads past the page cache.
    file.sync_all()?;
    Ok(())
}

/// Waits until home holds what redo does, so that no replay repairs what is corrupted.
fn settle(pair: &Pair) -> Result<()> {
    pair.wait_caught_up()?;
    pair.check_equal("data")
}

/// Runs a verify that finds something; its report.
fn verify_finds(site: &Site) -> Result<Value> {
    let finished = site.cli("--json mirror verify mirror")?;
    ensure!(finished.status.code() == Some(1), "{}{}", finished.stdout, finished.stderr);
    ensure!(finished.stderr.contains("--repair-from"), "{}", finished.stderr);
    serde_json::from_str(&finished.stdout).with_context(|| finished.stdout.clone())
}

fn extents(report: &Value) -> Vec<(u64, u64)> {
    let list = report["extents"].as_array().cloned().unwrap_or_default();
    let number = |value: &Value| value.as_u64().unwrap_or(u64::MAX);
    list.iter().map(|extent| (number(&extent["offset"]), number(&extent["length"]))).collect()
}

#[test]
fn a_flipped_byte_of_the_replica_is_found_while_hosts_write_and_repaired_from_the_primary() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 32)?;
        pair.west.log().allow("verify:");
        let export = pair.west.export("data");
        let mut client = NbdClient::connect(&export)?;
        // Behind what the load writes.
        for mebibyte in 8..32 {
            client.write(mebibyte * MEBIBYTE, &vec![u8::try_from(mebibyte)? + 1; 1 << 20])?;
        }
        settle(&pair)?;
        // Nothing is wrong, and hosts that write make no false alarm.
        let mut load = Load::new(2, 4 * MEBIBYTE, 5);
        load.run_while(&export, || {
            let report = pair.west.json("mirror verify mirror")?;
            ensure!(report["state"] == "ended" && extents(&report).is_empty(), "{report:#}");
            let compared = report["compared_bytes"].as_u64().unwrap_or(0);
            let busy = report["busy_bytes"].as_u64().unwrap_or(0);
            ensure!(compared + busy == 32 * MEBIBYTE, "{report:#}");
            Ok(())
        })?;
        settle(&pair)?;

        // Far from where the load writes; the last one is in the last block.
        for offset in [20 * MEBIBYTE + 5000, 20 * MEBIBYTE + 8192, 32 * MEBIBYTE - 1] {
            corrupt(&pair.east, offset)?;
        }
        let expected = vec![(20 * MEBIBYTE + 4096, 8192), (32 * MEBIBYTE - 4096, 4096)];
        load.run_while(&export, || {
            let report = verify_finds(&pair.west)?;
            ensure!(extents(&report) == expected && report["repaired_bytes"] == 0, "{report:#}");
            Ok(())
        })?;
        let view = pair.west.mirror_view()?;
        ensure!(view["verify"]["differing_bytes"] == 12_288, "{view:#}");
        let differing =
            pair.west.metrics()?.value("farshore_mirror_verify_differing_bytes", "mirror=\"mirror\"");
        ensure!(differing == Some(12_288.0), "{differing:?}");
        let sentence = pair.east.refused("mirror verify mirror")?;
        ensure!(sentence.contains("at the primary"), "{sentence}");

        let report = pair.west.json("mirror verify mirror --repair-from local")?;
        ensure!(extents(&report) == expected && report["repaired_bytes"] == 12_288, "{report:#}");
        settle(&pair)?;
        let report = pair.west.json("mirror verify mirror")?;
        ensure!(report["extents"] == json!([]), "{report:#}");
        load.verify_acknowledged(&export)?;
        client.disconnect()?;
        Ok(())
    })
}

#[test]
fn a_flipped_byte_of_the_primary_is_repaired_from_the_partner_also_for_hosts() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 8)?;
        pair.west.log().allow("verify:");
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &vec![7; 4 << 20])?;
        settle(&pair)?;
        corrupt(&pair.west, MEBIBYTE + 17)?;
        let mut block = vec![0; 4096];
        client.read(MEBIBYTE, &mut block)?;
        ensure!(block != vec![7; 4096], "the corruption is not seen: the test proves nothing");
        let report = verify_finds(&pair.west)?;
        ensure!(extents(&report) == [(MEBIBYTE, 4096)], "{report:#}");
        let report = pair.west.json("mirror verify mirror --repair-from partner")?;
        ensure!(report["repaired_bytes"] == 4096, "{report:#}");
        client.read(MEBIBYTE, &mut block)?;
        ensure!(block == vec![7; 4096], "hosts still read the corrupted block");
        client.disconnect()?;
        settle(&pair)
    })
}

#[test]
fn a_verify_waits_for_the_link_and_a_stopped_mirror_has_none() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 8)?;
        for text in ["partner", "verify:"] {
            pair.west.log().allow(text);
        }
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &vec![7; 8 << 20])?;
        settle(&pair)?;
        pair.west.run("mirror set mirror --resync-rate 2MiB/s")?;
        let running = std::thread::scope(|scope| {
            let verify = scope.spawn(|| pair.west.json("mirror verify mirror"));
            pair.west.wait_for_mirror("verifying", TIMEOUT, |view| {
                view["verify"]["compared_bytes"].as_u64().is_some_and(|bytes| bytes > 0)
            })?;
            pair.cut();
            let again = pair.west.refused("mirror verify mirror")?;
            ensure!(again.contains("runs already"), "{again}");
            client.write(0, &[8; 4096])?;
            pair.heal();
            verify.join().map_err(|_| anyhow::anyhow!("the verify's command panicked"))?
        })?;
        ensure!(running["state"] == "ended" && extents(&running).is_empty(), "{running:#}");
        pair.west.run("mirror stop mirror")?;
        let sentence = pair.west.refused("mirror verify mirror")?;
        ensure!(sentence.contains("stopped"), "{sentence}");
        client.disconnect()?;
        Ok(())
    })
}
