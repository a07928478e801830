//! A volume's IOPS limit is kept: neither exceeded nor undershot.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use testbed::harness::{Fio, FioReport, Site, SiteOptions, World};

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
