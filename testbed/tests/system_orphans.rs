//! Orphaned writes of an old primary: listed exactly, with times, and exported as hosts wrote them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::{MIRROR, NbdClient, Pair, World};

const TIMEOUT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;

/// (offset, length, certain, has a time) of each extent.
fn extents(view: &Value) -> Result<Vec<(u64, u64, bool, bool)>> {
    let list = view["extents"].as_array().context("no list of extents")?;
    let extent = |extent: &Value| {
        let offset = extent["offset_bytes"].as_u64().context("no offset")?;
        let length = extent["length_bytes"].as_u64().context("no length")?;
        let certain = extent["exact"].as_bool().context("no certainty")?;
        ensure!(extent["volume"] == "data", "{extent:#}");
        Ok((offset, length, certain, extent["written"].is_string()))
    };
    list.iter().map(extent).collect()
}

#[test]
fn orphans_are_listed_exactly_and_exported_as_they_were_written() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        for site in [&pair.west, &pair.east] {
            for text in ["failover", "promot", "epoch", "fence", "orphan", "diverge", "partner", "grace"] {
                site.log().allow(text);
            }
        }
        let sentence = pair.west.refused(&format!("mirror orphans {MIRROR}"))?;
        ensure!(sentence.contains("not fenced"), "{sentence}");
        let mut west = NbdClient::connect(&pair.west.export("data"))?;
        west.write(0, &[1; 8192])?;
        pair.wait_caught_up()?;
        pair.cut();
        // Orphans: two neighbouring blocks, part of a block, and one that the new primary overwrites too.
        west.write(1 << 20, &[2; 8192])?;
        west.write((2 << 20) + 512, &[3; 512])?;
        west.write(3 << 20, &[4; 4096])?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        let mut east = pair.east.wait_for_export("data", TIMEOUT)?;
        east.write(3 << 20, &[5; 4096])?;
        // Not an orphan: only the new primary wrote it.
        east.write(4 << 20, &[6; 4096])?;
        pair.heal();
        pair.east.wait_for_mirror("waiting for a start", TIMEOUT, |view| view["needs_start"] == true)?;

        let view = pair.west.json(&format!("mirror orphans {MIRROR}"))?;
        let expected =
            [(1 << 20, 2 * BLOCK, true, true), (2 << 20, BLOCK, true, true), (3 << 20, BLOCK, true, true)];
        ensure!(extents(&view)? == expected, "{view:#}");
        ensure!(view["exact_bytes"] == 4 * BLOCK && view["possible_bytes"] == 0, "{view:#}");

        let folder = world.text("export");
        let view = pair.west.json(&format!("mirror orphans {MIRROR} --export {folder}"))?;
        ensure!(view["exported"] == folder.as_str(), "{view:#}");
        let exported = |offset: u64| std::fs::read(format!("{folder}/data/{offset}"));
        ensure!(exported(1 << 20)? == [2; 8192], "the export differs from what was written");
        let mut part = vec![0; 4096];
        part[512..1024].fill(3);
        ensure!(exported(2 << 20)? == part, "the export differs from what was written");
        ensure!(exported(3 << 20)? == [4; 4096], "the export differs from what was written");
        let sentence = pair.west.refused(&format!("mirror orphans {MIRROR} --export {folder}"))?;
        ensure!(sentence.contains("not empty"), "{sentence}");

        // After a restart only differences are known: the block that both wrote may be one.
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.wait_for_mirror("connected", TIMEOUT, |view| view["connected"] == true)?;
        let view = pair.west.json(&format!("mirror orphans {MIRROR}"))?;
        let (certain, possible): (Vec<_>, Vec<_>) =
            extents(&view)?.into_iter().partition(|(_, _, certain, _)| *certain);
        let expected = [(1 << 20, 2 * BLOCK, true, false), (2 << 20, BLOCK, true, false)];
        ensure!(certain == expected, "{view:#}");
        let overwritten = [(3 << 20, BLOCK, false, false), (4 << 20, BLOCK, false, false)];
        ensure!(possible.contains(&overwritten[0]), "{view:#}");
        ensure!(possible.iter().all(|extent| overwritten.contains(extent)), "{view:#}");

        pair.east.run("mirror start mirror --primary local")?;
        pair.east.wait_caught_up()?;
        let sentence = pair.west.refused(&format!("mirror orphans {MIRROR}"))?;
        ensure!(sentence.contains("no orphans"), "{sentence}");
        east.disconnect()?;
        pair.check_equal("data")
    })
}
