//! The planned switch: the role moves, no acknowledged write is lost, and never two sides accept writes.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use testbed::harness::{Finished, Fio, Load, MIRROR, NbdClient, Pair, Random, Site, World, binary};

const TIMEOUT: Duration = Duration::from_secs(90);
const REGION_BYTES: u64 = 4 << 20;

fn expect_lines_of_role_changes(pair: &Pair) {
    for site in [&pair.west, &pair.east] {
        for text in ["switch", "epoch", "fence", "partner", "grace"] {
            site.log().allow(text);
        }
    }
}

fn from_and_to(pair: &Pair, west_is_primary: bool) -> (&Site, &Site) {
    if west_is_primary { (&pair.west, &pair.east) } else { (&pair.east, &pair.west) }
}

fn check_fio(ended: &Finished) -> Result<()> {
    let printed = format!("{}{}", ended.stdout, ended.stderr);
    let bad_data = ["verify: bad", "verify failed", "crc32c: verify"];
    ensure!(!bad_data.iter().any(|text| printed.contains(text)), "fio read wrong data: {printed}");
    Ok(())
}

#[test]
fn the_role_moves_back_and_forth_under_load_without_a_loss() -> Result<()> {
    World::run(|world| {
        let pair = Pair::with_mirrored_volume(world, 64)?;
        expect_lines_of_role_changes(&pair);
        let sentence = pair.east.refused(&format!("mirror switch {MIRROR}"))?;
        ensure!(sentence.contains("at the primary"), "{sentence}");
        let mut load = Load::new(4, REGION_BYTES, 31);
        for round in 0..5 {
            let (from, to) = from_and_to(&pair, round % 2 == 0);
            let fio = Fio::verifying(&from.export("data"), "32M").start()?;
            let (took, _) = load.run_while(&from.export("data"), || {
                thread::sleep(Duration::from_millis(700));
                let begin = Instant::now();
                from.run(&format!("mirror switch {MIRROR}"))?;
                Ok(begin.elapsed())
            })?;
            check_fio(&fio.finish(TIMEOUT)?)?;
            ensure!(took < Duration::from_secs(20), "round {round}: the switch took {took:?}");
            let view = from.mirror_view()?;
            ensure!(view["role"] == "secondary", "round {round}: {view:#}");
            ensure!(NbdClient::connect(&from.export("data")).is_err(), "the old side still serves hosts");
            to.wait_for_export("data", TIMEOUT)?.disconnect()?;
            load.verify_acknowledged(&to.export("data")).with_context(|| format!("round {round}"))?;
            load.settle(&to.export("data"))?;
            to.wait_caught_up().with_context(|| format!("round {round}"))?;
            let view = to.mirror_view()?;
            ensure!(view["orphaned_bytes"] == 0 && view["role"] == "primary", "round {round}: {view:#}");
        }
        ensure!(load.acknowledged() > 100, "only {} writes", load.acknowledged());
        pair.check_equal("data")
    })
}

#[test]
fn a_switch_without_the_partner_is_refused_and_hosts_go_on() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        expect_lines_of_role_changes(&pair);
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        pair.east.kill9()?;
        pair.west.wait_for_mirror("disconnected", TIMEOUT, |view| view["connected"] == false)?;
        let sentence = pair.west.refused(&format!("mirror switch {MIRROR}"))?;
        ensure!(sentence.contains("partner"), "{sentence}");
        client.write(0, &[7; 4096])?;
        pair.east.resume()?;
        pair.west.wait_caught_up()?;
        // A link that breaks while the partner is being asked or writes are held costs no host anything.
        pair.cut();
        let sentence = pair.west.refused(&format!("mirror switch {MIRROR}"))?;
        ensure!(sentence.contains("cannot be switched"), "{sentence}");
        client.write(4096, &[8; 4096])?;
        client.disconnect()?;
        pair.heal();
        pair.west.wait_caught_up()?;
        pair.west.run(&format!("mirror switch {MIRROR}"))?;
        let mut client = pair.east.wait_for_export("data", TIMEOUT)?;
        let mut bytes = vec![0; 8192];
        client.read(0, &mut bytes)?;
        ensure!(bytes[..4096] == [7; 4096] && bytes[4096..] == [8; 4096], "a write is lost");
        client.disconnect()?;
        Ok(())
    })
}

fn begin_switch(site: &Site) -> Result<Child> {
    let mut command = Command::new(binary("farshore")?);
    command.arg("--socket").arg(site.control_socket()).args(["mirror", "switch", MIRROR]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("cannot start farshore")
}

/// Waits until one side serves hosts; true if it is west. Never do both.
fn serving_side(pair: &Pair) -> Result<bool> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let serves = |site: &Site| NbdClient::connect(&site.export("data")).is_ok();
        match (serves(&pair.west), serves(&pair.east)) {
            (true, true) => bail!("both sides serve hosts"),
            (west, east) if west || east => return Ok(west),
            _ => {}
        }
        if Instant::now() > deadline {
            let (west, east) = (pair.west.mirror_view()?, pair.east.mirror_view()?);
            bail!("no side serves hosts: {west:#} {east:#}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_site_killed_in_the_middle_of_a_switch_loses_nothing() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 64)?;
        expect_lines_of_role_changes(&pair);
        let mut random = Random::new(77);
        let mut load = Load::new(4, REGION_BYTES, 32);
        let mut west_is_primary = true;
        for round in 0..8 {
            let export = from_and_to(&pair, west_is_primary).0.export("data");
            let kills_west = random.chance(500);
            let wait = Duration::from_millis(random.below(250));
            load.run_while(&export, || {
                thread::sleep(Duration::from_millis(400));
                let mut switch = begin_switch(from_and_to(&pair, west_is_primary).0)?;
                thread::sleep(wait);
                if kills_west {
                    pair.west.kill9()?
                } else {
                    pair.east.kill9()?
                }
                thread::sleep(Duration::from_millis(random.below(300)));
                if kills_west {
                    pair.west.resume()?
                } else {
                    pair.east.resume()?
                }
                // Done, refused, or its daemon is gone: whichever it was.
                switch.wait()?;
                Ok(())
            })?;
            west_is_primary = serving_side(&pair)?;
            let primary = from_and_to(&pair, west_is_primary).0;
            let export = primary.export("data");
            let context = || format!("round {round}: west killed: {kills_west}, after {wait:?}");
            load.verify_acknowledged(&export).with_context(context)?;
            load.settle(&export)?;
            primary.wait_caught_up().with_context(context)?;
        }
        pair.check_equal("data")
    })
}
