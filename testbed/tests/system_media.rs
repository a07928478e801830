//! Disks that run full, break and lose their power: each error reaches the host that it concerns, and what a flush
//! covered is there afterwards.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::harness::nbd::{COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, COMMAND_WRITE_ZEROES, FLAG_FUA};
use testbed::harness::{Backing, Bystander, Load, LoopDisk, NbdClient, Site, SiteOptions, World};

const MEBIBYTE: u64 = 1 << 20;
const EIO: u32 = 5;
const ENOSPC: u32 = 28;

/// A site with the volumes `other`, and `data` on a disk of its own.
struct Setting {
    site: Site,
    disk: LoopDisk,
    folder: PathBuf,
}

impl Setting {
    /// `None` where the machine cannot make such a disk.
    fn prepare(world: &World, backing: Backing, cache: &str) -> Result<Option<Self>> {
        let Some(mut disk) = LoopDisk::create(world.path("media"), 96 * MEBIBYTE, backing)? else {
            return Ok(None);
        };
        let mut site = world.site("west", SiteOptions::default())?;
        site.run(&format!("volume create data --size 32MiB --iops unlimited --cache {cache}"))?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let folder = site.data_file("data")?.parent().context("a folder of the volume")?.to_owned();
        site.terminate()?;
        disk.take_over(&folder)?;
        site.resume()?;
        Ok(Some(Self { site, disk, folder }))
    }

    /// The daemon dies, the disk comes back with what was on its media, the daemon starts.
    fn revive(&mut self) -> Result<()> {
        self.site.kill9()?;
        self.disk.repair(&self.folder)?;
        self.site.resume()
    }

    fn client(&self) -> Result<NbdClient> {
        self.site.wait_for_export("data", Duration::from_secs(10))
    }

    fn state(&self) -> Result<String> {
        let shown = self.site.json("volume show data")?;
        Ok(shown.get("state").and_then(|state| state.as_str()).context("a state")?.to_owned())
    }
}

fn expect(client: &mut NbdClient, command: u16, flags: u16, wanted: u32) -> Result<()> {
    let payload: &[u8] = if command == COMMAND_WRITE { &[8; 4096] } else { &[] };
    let length = if command == COMMAND_FLUSH { 0 } else { 4096 };
    let error = client.error_of(command, flags, 0, length, payload)?;
    ensure!(error == wanted, "command {command} with flags {flags}: error {error}, not {wanted}");
    Ok(())
}

#[test]
fn a_full_device_is_told_to_its_host_and_a_failed_durable_write_poisons_its_volume() -> Result<()> {
    World::run(|world| {
        let Some(mut setting) = Setting::prepare(world, Backing::Thin(40 * MEBIBYTE), "none")? else {
            return Ok(());
        };
        setting.site.log().allow("is poisoned");
        let mut client = setting.client()?;
        client.write_durable(0, &vec![7; 1 << 20])?;
        setting.site.wait_for_export("other", Duration::from_secs(10))?.disconnect()?;
        let bystander = Bystander::start(&setting.site.export("other"))?;
        setting.disk.fill_backing()?;
        let error = client.error_of(COMMAND_WRITE, 0, 16 * MEBIBYTE, 1 << 20, &vec![8; 1 << 20])?;
        ensure!(error == ENOSPC, "a write to a full device: error {error}");
        ensure!(setting.state()? == "online", "a failed write poisons nothing");
        let mut found = vec![0; 1 << 20];
        client.read(0, &mut found)?;
        ensure!(found == vec![7; 1 << 20], "what is on the device is served");
        let block = [8; 4096];
        let error = client.error_of(COMMAND_WRITE, FLAG_FUA, 18 * MEBIBYTE, 4096, &block)?;
        ensure!(error == ENOSPC, "a durable write to a full device: error {error}");
        ensure!(setting.state()? == "poisoned", "a failed durable write poisons: {}", setting.state()?);
        setting.disk.empty_backing()?;
        // Writing again would succeed now, and prove nothing about what was lost: refused until a restart.
        for (command, flags) in
            [(COMMAND_WRITE, 0), (COMMAND_WRITE, FLAG_FUA), (COMMAND_WRITE_ZEROES, 0), (COMMAND_FLUSH, 0)]
        {
            expect(&mut client, command, flags, EIO)?;
        }
        client.read(0, &mut found)?;
        ensure!(found == vec![7; 1 << 20], "a poisoned volume is read");
        drop(client);
        bystander.stop()?;
        setting.revive()?;
        let mut client = setting.client()?;
        client.read(0, &mut found)?;
        ensure!(found == vec![7; 1 << 20], "what was durable is there");
        client.write_durable(16 * MEBIBYTE, &found)?;
        setting.site.terminate()
    })
}

#[test]
fn a_broken_device_is_eio_for_its_host_and_what_was_durable_comes_back() -> Result<()> {
    World::run(|world| {
        let Some(mut setting) = Setting::prepare(world, Backing::File, "none")? else {
            return Ok(());
        };
        setting.site.log().allow("is poisoned");
        let mut client = setting.client()?;
        client.write_durable(0, &[7; 4096])?;
        setting.site.wait_for_export("other", Duration::from_secs(10))?.disconnect()?;
        let bystander = Bystander::start(&setting.site.export("other"))?;
        setting.disk.break_down()?;
        expect(&mut client, COMMAND_WRITE, 0, EIO)?;
        ensure!(client.error_of(COMMAND_READ, 0, 0, 4096, &[])? == EIO, "a read of a broken device");
        ensure!(setting.state()? == "online", "only a failed flush poisons: {}", setting.state()?);
        expect(&mut client, COMMAND_WRITE, FLAG_FUA, EIO)?;
        ensure!(setting.state()? == "poisoned", "a failed durable write poisons: {}", setting.state()?);
        expect(&mut client, COMMAND_FLUSH, 0, EIO)?;
        client.disconnect()?;
        bystander.stop()?;
        setting.revive()?;
        ensure!(setting.state()? == "online", "after a restart: {}", setting.state()?);
        let mut found = [0; 4096];
        let mut client = setting.client()?;
        client.read(0, &mut found)?;
        ensure!(found == [7; 4096], "what was durable is lost");
        client.write_durable(0, &[9; 4096])?;
        setting.site.terminate()
    })
}

#[test]
fn a_flush_on_one_connection_covers_what_others_wrote_when_the_power_goes() -> Result<()> {
    for cache in ["none", "page"] {
        World::run(|world| {
            let Some(mut setting) = Setting::prepare(world, Backing::File, cache)? else {
                return Ok(());
            };
            for round in 1..=3_u8 {
                let mut writers = [setting.client()?, setting.client()?, setting.client()?];
                let mut flusher = setting.client()?;
                for (number, writer) in (0_u64..).zip(&mut writers) {
                    let offset = (u64::from(round) * 3 + number) * MEBIBYTE;
                    writer.write(offset, &vec![round; 300_000])?;
                    writer.write(offset + 500_001, &[round; 777])?;
                }
                flusher.flush()?;
                setting.disk.break_down()?;
                drop((writers, flusher));
                setting.revive()?;
                let mut client = setting.client()?;
                for part in 0..u64::from(round) * 3 + 3 {
                    let wanted = u8::try_from(part / 3)?;
                    let offset = part * MEBIBYTE;
                    let mut found = vec![0; 300_000];
                    client.read(offset, &mut found)?;
                    ensure!(found == vec![wanted; 300_000], "{cache}, round {round}: lost at {offset}");
                    let mut found = [0; 777];
                    client.read(offset + 500_001, &mut found)?;
                    ensure!(found == [wanted; 777], "{cache}, round {round}: lost at {offset} + 500001");
                }
            }
            setting.site.terminate()
        })
        .with_context(|| format!("with --cache {cache}"))?;
    }
    Ok(())
}

/// The kernel tells of data that it could not write back only once for each open file: to whichever flush or durable
/// write asks first. The flush that covers the data must fail though durable writes of sound blocks run beside it.
#[test]
fn a_flush_of_lost_data_fails_though_durable_writes_run_beside_it() -> Result<()> {
    World::run(|world| {
        let Some(mut setting) = Setting::prepare(world, Backing::Thin(40 * MEBIBYTE), "page")? else {
            return Ok(());
        };
        setting.site.log().allow("is poisoned");
        for round in 0..4_u64 {
            let mut writer = setting.client()?;
            writer.write_durable(0, &vec![7; 1 << 20])?;
            setting.disk.fill_backing()?;
            // Into the page cache, where there is room for it.
            writer.write((16 + round) * MEBIBYTE, &vec![8; 1 << 20])?;
            let mut durable = setting.client()?;
            for block in 0..32 {
                durable.begin(COMMAND_WRITE, FLAG_FUA, block * 4096, 4096, &[9; 4096])?;
            }
            let error = writer.error_of(COMMAND_FLUSH, 0, 0, 0, &[])?;
            ensure!(error != 0, "round {round}: a flush of data that is lost succeeded");
            for _ in 0..32 {
                durable.reply()?;
            }
            ensure!(setting.state()? == "poisoned", "round {round}: {}", setting.state()?);
            expect(&mut writer, COMMAND_FLUSH, 0, EIO)?;
            setting.disk.empty_backing()?;
            drop((writer, durable));
            setting.revive()?;
        }
        setting.site.terminate()
    })
}

/// The power goes while writers write; each of them flushed nothing, but writes with FUA are durable by themselves.
#[test]
fn durable_writes_survive_the_loss_of_power_under_load() -> Result<()> {
    World::run(|world| {
        let Some(mut setting) = Setting::prepare(world, Backing::File, "none")? else {
            return Ok(());
        };
        setting.site.log().allow("is poisoned");
        let mut load = Load::durable(4, 2 * MEBIBYTE, 31);
        let export = setting.site.export("data");
        setting.client()?.disconnect()?;
        load.run_while(&export, || {
            std::thread::sleep(Duration::from_secs(1));
            setting.disk.break_down()
        })?;
        setting.revive()?;
        setting.client()?.disconnect()?;
        load.verify_acknowledged(&export)?;
        ensure!(load.acknowledged() > 20, "only {} writes", load.acknowledged());
        setting.site.terminate()
    })
}
