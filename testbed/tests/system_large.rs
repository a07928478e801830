//! A volume of 1 TiB: commands on all of it neither hold up its shard nor try its clients' patience.
//!
//! It lies on XFS, in a sparse file on a loop device: space that nobody writes costs nothing there. Where the machine has
//! no loop devices or no XFS, the test says so and passes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::harness::nbd::{COMMAND_TRIM, COMMAND_WRITE_ZEROES, FLAG_FUA};
use testbed::harness::{Bystander, Export, LoopDisk, NbdClient, Random, SiteOptions, World};

const TEBIBYTE: u64 = 1 << 40;
/// Linux gives a request up after 30 s unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest that a small command of somebody else takes meanwhile.
const BOUND: Duration = Duration::from_secs(2);

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_GO: u32 = 7;
const OPTION_EXTENDED_HEADERS: u32 = 11;
const REQUEST_MAGIC: u32 = 0x21e4_1c71;
const REPLY_MAGIC: u32 = 0x6e8a_278c;
const REPLY_ACK: u32 = 1;

/// A client with extended headers, so that a length has 64 bits.
struct WideClient(TcpStream);

impl WideClient {
    fn connect(export: &Export, volume: &str) -> Result<Self> {
        let mut client = Self(export.dial()?);
        let _greeting: [u8; 18] = client.array()?;
        client.0.write_all(&3_u32.to_be_bytes())?;
        client.option(OPTION_EXTENDED_HEADERS, &[])?;
        let mut go = u32::try_from(volume.len())?.to_be_bytes().to_vec();
        go.extend(volume.as_bytes());
        go.extend([0, 0]);
        client.option(OPTION_GO, &go)?;
        Ok(client)
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut request = OPTION_MAGIC.to_be_bytes().to_vec();
        request.extend(option.to_be_bytes());
        request.extend(u32::try_from(data.len())?.to_be_bytes());
        request.extend(data);
        self.0.write_all(&request)?;
        loop {
            let _magic_and_option: [u8; 12] = self.array()?;
            let (kind, length) =
                (self.array().map(u32::from_be_bytes)?, self.array().map(u32::from_be_bytes)?);
            let mut data = vec![0; usize::try_from(length)?];
            self.0.read_exact(&mut data)?;
            ensure!(kind < 1 << 31, "option {option} is refused with {kind:#x}");
            if kind == REPLY_ACK {
                return Ok(());
            }
        }
    }

    /// Runs a command without payload; it must succeed.
    fn run(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> Result<()> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(7_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        self.0.write_all(&request)?;
        let magic = self.array().map(u32::from_be_bytes)?;
        let [_flags, kind] = [self.array().map(u16::from_be_bytes)?, self.array().map(u16::from_be_bytes)?];
        let _cookie_and_offset: [u8; 16] = self.array()?;
        let payload = self.array().map(u64::from_be_bytes)?;
        let mut text = vec![0; usize::try_from(payload)?];
        self.0.read_exact(&mut text)?;
        ensure!(magic == REPLY_MAGIC && kind == 0, "command {command}: reply {kind:#x}, {text:?}");
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// The slowest of many reads of 4 KiB anywhere in the volume, until it is told to stop.
fn slowest_read(export: &Export, stop: &AtomicBool) -> Result<(Duration, u64)> {
    let mut client = NbdClient::connect(export)?;
    let mut random = Random::new(5);
    let (mut slowest, mut count) = (Duration::ZERO, 0);
    while !stop.load(Ordering::Relaxed) {
        let offset = random.next() % (TEBIBYTE / 4096) * 4096;
        let begin = Instant::now();
        client.read(offset, &mut [0; 4096])?;
        slowest = slowest.max(begin.elapsed());
        count += 1;
    }
    client.disconnect()?;
    Ok((slowest, count))
}

#[test]
fn a_trim_and_zeroes_of_1_tib_hold_up_nobody_and_end_in_time() -> Result<()> {
    World::run(|world| {
        let Some(mut disk) = LoopDisk::create_large(world.path("media"), TEBIBYTE + (64 << 30))? else {
            return Ok(());
        };
        std::fs::create_dir(world.path("west"))?;
        disk.take_over(&world.path("west"))?;
        let flags = vec!["--shards".to_owned(), "1".to_owned()];
        let mut site = world.site("west", SiteOptions { flags, ..SiteOptions::default() })?;
        site.run("volume create data --size 1TiB --iops unlimited")?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let export = site.export("data");
        let mut client = NbdClient::connect(&export)?;
        let places: Vec<u64> = (0..64).map(|place| place * (TEBIBYTE / 64) + 8192).collect();
        let mut wide = WideClient::connect(&export, "data")?;
        for (command, flags) in
            [(COMMAND_TRIM, 0), (COMMAND_WRITE_ZEROES, FLAG_FUA), (COMMAND_WRITE_ZEROES, 1 << 4)]
        {
            for offset in &places {
                client.write(*offset, &vec![9; 1 << 20])?;
            }
            let bystander = Bystander::start(&site.export("other"))?;
            let stop = Arc::new(AtomicBool::new(false));
            let (flag, same) = (Arc::clone(&stop), export.clone());
            let reader = std::thread::spawn(move || slowest_read(&same, &flag));
            let begin = Instant::now();
            wide.run(command, flags, 0, TEBIBYTE)?;
            let took = begin.elapsed();
            stop.store(true, Ordering::Relaxed);
            let (slowest, count) = reader.join().ok().context("the reader panicked")??;
            let others = bystander.stop()?;
            let told = format!(
                "command {command}/{flags:#x} took {took:?}; {count} reads, the slowest {slowest:?}; another volume: {:?}",
                others.longest()
            );
            ensure!(took < PATIENCE && slowest < BOUND && others.longest() < BOUND, "{told}");
            drop(writeln!(std::io::stderr(), "{told}"));
            let mut found = vec![1; 1 << 20];
            for offset in &places {
                client.read(*offset, &mut found)?;
                ensure!(found.iter().all(|byte| *byte == 0), "what was at {offset} reads as zeros");
            }
        }
        drop((client, wide));
        let begin = Instant::now();
        while site.cli("volume delete data")?.status.code() != Some(0) {
            ensure!(begin.elapsed() < PATIENCE, "the volume stays in use");
        }
        ensure!(begin.elapsed() < PATIENCE, "to delete it took {:?}", begin.elapsed());
        site.run("volume create data --size 1TiB --iops unlimited")?;
        site.terminate()
    })
}
