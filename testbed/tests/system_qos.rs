//! A volume's IOPS limit is kept: neither exceeded nor undershot.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use testbed::harness::{Fio, FioReport, NbdClient, Site, SiteOptions, World};

const LIMITS: [u32; 3] = [750, 2_000, 10_000];
const TOLERANCE: f64 = 0.02;
const ATTEMPTS: usize = 3;

fn saturating(site: &Site, volume: &str, direction: &str, connections: u64) -> Fio {
    Fio::new(&site.export(volume))
        .option("rw", direction)
        .option("bs", "4k")
        .option("size", "32M")
        .option("numjobs", connections)
        .option("iodepth", 32)
        .time_based(2, 10)
}

/// Runs `measure` until its rate is the limit, at most [`ATTEMPTS`] times. More than the limit is wrong at once; less
/// may be a device that stalled for longer than the host's requests in flight last, so it has to be less each time.
fn settles_at(limit: u32, mut measure: impl FnMut() -> Result<f64>) -> Result<()> {
    let mut seen = Vec::new();
    while seen.len() < ATTEMPTS {
        let measured = measure()?;
        let ratio = measured / f64::from(limit);
        ensure!(ratio <= 1.0 + TOLERANCE, "{measured:.1} IOPS at a limit of {limit}");
        if ratio >= 1.0 - TOLERANCE {
            return Ok(());
        }
        seen.push(measured);
    }
    bail!("{seen:.1?} IOPS at a limit of {limit}")
}

fn create(site: &Site, limit: u32) -> Result<String> {
    let name = format!("limit{limit}");
    site.run(&format!("volume create {name} --size 32MiB --iops {limit}"))?;
    Ok(name)
}

#[test]
fn the_measured_rate_is_the_limit_on_one_and_on_four_connections() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        for limit in LIMITS {
            let name = create(&site, limit)?;
            for (connections, direction) in [(1, "randwrite"), (4, "randread")] {
                settles_at(limit, || {
                    let report = saturating(&site, &name, direction, connections).run()?;
                    Ok(report.iops(direction.trim_start_matches("rand")))
                })?;
            }
            let metrics = site.metrics()?;
            let label = format!("volume=\"{name}\"");
            let throttled = metrics.value("farshore_volume_throttled_total", &label);
            ensure!(throttled.is_some_and(|count| count > 0.0), "throttled commands: {throttled:?}");
        }
        site.terminate()
    })
}

#[test]
fn a_volume_at_its_limit_does_not_slow_another() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        let (slow, fast) = (create(&site, 750)?, create(&site, 10_000)?);
        let mut crowd_rates = Vec::new();
        settles_at(10_000, || {
            let crowd = saturating(&site, &slow, "randwrite", 4).start()?;
            let report = saturating(&site, &fast, "randread", 4).run()?;
            let crowd = FioReport::parse(&crowd.finish(Duration::from_secs(60))?.success()?)?;
            crowd_rates.push(crowd.iops("write"));
            Ok(report.iops("read"))
        })?;
        ensure!(crowd_rates.iter().all(|rate| *rate <= 750.0 * (1.0 + TOLERANCE)), "{crowd_rates:.1?}");
        site.terminate()
    })
}

#[test]
fn large_commands_cost_a_token_for_each_256_kib() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        let name = create(&site, 750)?;
        settles_at(375, || {
            let fio = Fio::new(&site.export(&name)).option("rw", "read").option("bs", "512k");
            Ok(fio.option("size", "32M").option("iodepth", 16).time_based(2, 6).run()?.iops("read"))
        })?;
        site.terminate()
    })
}

#[test]
fn long_writes_that_wait_for_their_limit_hold_no_memory_of_others() -> Result<()> {
    const LENGTH: u32 = 64 << 20;
    World::run(|world| {
        let settings = vec![("shards".to_owned(), "1".to_owned())];
        let mut site = world.site("west", SiteOptions { settings, ..SiteOptions::default() })?;
        site.run("volume create other --size 128MiB --iops unlimited")?;
        let payload: Arc<[u8]> = vec![7; usize::try_from(LENGTH)?].into();
        let mut senders = Vec::new();
        for name in ["slow", "slower"] {
            // A write of 64 MiB costs 256 tokens, so after the first of them the next waits for four minutes.
            site.run(&format!("volume create {name} --size 128MiB --iops 1"))?;
            NbdClient::connect(&site.export(name))?.write(0, &payload)?;
            for _ in 0..4 {
                let mut client = NbdClient::connect(&site.export(name))?;
                let payload = Arc::clone(&payload);
                // It ends when the site does, at the latest.
                senders.push(thread::spawn(move || client.begin_write(0, LENGTH, &payload)));
            }
        }
        let mut client = NbdClient::connect(&site.export("other"))?;
        for _ in 0..4 {
            client.write(0, &payload)?;
            let mut found = vec![0; payload.len()];
            client.read(0, &mut found)?;
            ensure!(found == *payload, "another volume's content");
        }
        client.disconnect()?;
        let written = site.metrics()?.value("farshore_volume_writes_total", "volume=\"slow\"");
        ensure!(written == Some(1.0), "writes of the slow volume: {written:?}");
        site.kill9()?;
        for sender in senders {
            let _ = sender.join();
        }
        Ok(())
    })
}
