//! A volume's IOPS limit is kept: neither exceeded nor undershot.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::harness::{Fio, FioReport, Site, SiteOptions, World};

const LIMITS: [u32; 3] = [750, 2_000, 10_000];
const TOLERANCE: f64 = 0.02;

fn saturating(site: &Site, volume: &str, direction: &str, connections: u64) -> Fio {
    Fio::new(&site.export(volume))
        .option("rw", direction)
        .option("bs", "4k")
        .option("size", "32M")
        .option("numjobs", connections)
        .option("iodepth", 32)
        .time_based(2, 10)
}

fn check_rate(report: &FioReport, direction: &str, limit: u32) -> Result<()> {
    let measured = report.iops(direction);
    let ratio = measured / f64::from(limit);
    ensure!((1.0 - TOLERANCE..=1.0 + TOLERANCE).contains(&ratio), "{measured:.1} IOPS at a limit of {limit}");
    Ok(())
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
                let report = saturating(&site, &name, direction, connections).run()?;
                check_rate(&report, direction.trim_start_matches("rand"), limit)?;
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
        let crowd = saturating(&site, &slow, "randwrite", 4).start()?;
        let report = saturating(&site, &fast, "randread", 4).run()?;
        check_rate(&report, "read", 10_000)?;
        let crowd = FioReport::parse(&crowd.finish(Duration::from_secs(60))?.success()?)?;
        check_rate(&crowd, "write", 750)?;
        site.terminate()
    })
}

#[test]
fn large_commands_cost_a_token_for_each_256_kib() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        let name = create(&site, 750)?;
        let report = Fio::new(&site.export(&name))
            .option("rw", "read")
            .option("bs", "512k")
            .option("size", "32M")
            .option("iodepth", 16)
            .time_based(2, 6)
            .run()?;
        check_rate(&report, "read", 375)?;
        site.terminate()
    })
}
