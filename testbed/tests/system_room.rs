//! A mirror for which a site has no room is refused before anything is made, with the bytes that are missing.

use anyhow::{Context, Result, ensure};
use testbed::harness::{Backing, LoopDisk, Pair, World};

const MEBIBYTE: u64 = 1 << 20;
/// The redo log and the spill file of `--dev`.
const JOURNAL_BYTES: u64 = (512 + 256) * MEBIBYTE;

/// Two sites, one of them on a small disk of its own; `None` where the machine cannot make one.
fn pair_with_small(world: &World, small: &str) -> Result<Option<(Pair, LoopDisk)>> {
    let Some(disk) = LoopDisk::create(world.path("media"), 160 * MEBIBYTE, Backing::File)? else {
        return Ok(None);
    };
    let folder = disk.root().join(small);
    std::fs::create_dir(&folder)?;
    std::os::unix::fs::symlink(&folder, world.path(small))?;
    Ok(Some((Pair::start(world)?, disk)))
}

/// The bytes that a refusal says are missing.
fn missing(sentence: &str) -> Result<u64> {
    let (before, _) = sentence.split_once(" bytes are missing").with_context(|| sentence.to_owned())?;
    let number = before.rsplit(' ').next().context("a number")?;
    Ok(number.parse()?)
}

#[test]
fn a_partner_without_room_is_named_with_what_it_lacks_and_nothing_is_left() -> Result<()> {
    World::run(|world| {
        let Some((mut pair, _disk)) = pair_with_small(world, "east")? else { return Ok(()) };
        pair.west.run("volume create data --size 32MiB")?;
        let sentence = pair.west.refused("mirror create mirror --partner east --volumes data")?;
        ensure!(sentence.contains("site 'east' has no room"), "{sentence}");
        let missing = missing(&sentence)?;
        ensure!(
            (JOURNAL_BYTES - 160 * MEBIBYTE..JOURNAL_BYTES + 40 * MEBIBYTE).contains(&missing),
            "{sentence}"
        );
        ensure!(pair.east.json("volume list")?.as_array().is_some_and(Vec::is_empty), "a replica is left");
        ensure!(pair.west.json("mirror list")?.as_array().is_some_and(Vec::is_empty), "a mirror is left");
        // The sites end before their disk does.
        pair.east.terminate()?;
        pair.west.terminate()
    })
}

#[test]
fn a_primary_without_room_for_a_redo_log_is_refused_before_its_partner_is_asked() -> Result<()> {
    World::run(|world| {
        let Some((mut pair, _disk)) = pair_with_small(world, "west")? else { return Ok(()) };
        pair.west.run("volume create data --size 32MiB")?;
        let sentence = pair.west.refused("mirror create mirror --partner east --volumes data")?;
        ensure!(sentence.contains("site 'west' has no room") && sentence.contains("redo"), "{sentence}");
        ensure!(missing(&sentence)? > JOURNAL_BYTES - 160 * MEBIBYTE, "{sentence}");
        ensure!(pair.east.json("volume list")?.as_array().is_some_and(Vec::is_empty), "a replica is left");
        pair.west.terminate()?;
        pair.east.terminate()
    })
}
