//! What hosts and operators see when the partner falls behind: alerts, `pace`, `stop`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::harness::{Fio, NbdClient, NbdError, Pair, World};

const TIMEOUT: Duration = Duration::from_secs(30);
const MIRROR: &str = "mirror";

fn mirrored(world: &World, volume: &str, mirror: &str) -> Result<Pair> {
    let pair = Pair::start(world)?;
    for site in [&pair.west, &pair.east] {
        for text in ["RPO alert", "policy 'stop'", "partner", "grace"] {
            site.log().allow(text);
        }
    }
    pair.west.run(&format!("volume create data --size 64MiB {volume}"))?;
    pair.west.run(&format!("mirror create {MIRROR} --partner east --volumes data {mirror}"))?;
    pair.west.wait_caught_up()?;
    Ok(pair)
}

fn writes_are(wanted: &'static str) -> impl Fn(&Value) -> bool {
    move |view| view["host_writes"] == wanted
}

#[test]
fn an_alert_stands_in_log_metric_and_view_and_ends_by_itself() -> Result<()> {
    World::run(|world| {
        let pair = mirrored(world, "--iops unlimited", "--rpo 2s")?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        let from = pair.west.log().length();
        pair.cut();
        client.write(0, &[1; 4096])?;
        for part in ["50 %", "80 %", "100 %"] {
            let line = pair
                .west
                .log()
                .wait_for(from, TIMEOUT, |line| line.contains("RPO alert") && line.contains(part));
            ensure!(line.is_some(), "no alert at {part}");
        }
        pair.west.wait_for_mirror("alerted", TIMEOUT, |view| view["rpo_alert_percent"] == 100)?;
        let label = format!("mirror=\"{MIRROR}\"");
        let alert = pair.west.metrics()?.value("farshore_mirror_rpo_alert_percent", &label);
        ensure!(alert == Some(100.0), "{alert:?}");
        // Policy bitmap: hosts see nothing of it.
        client.write(4096, &[2; 4096])?;
        let view = pair.west.mirror_view()?;
        ensure!(view["host_writes"] == "served" && view["limit_lowered_percent"] == 0, "{view:#}");
        pair.heal();
        pair.west.wait_caught_up()?;
        pair.west.wait_for_mirror("quiet", TIMEOUT, |view| view["rpo_alert_percent"] == 0)?;
        client.disconnect()?;
        pair.check_equal("data")
    })
}

#[test]
fn paced_hosts_get_the_lowered_limit_and_then_their_own_again() -> Result<()> {
    World::run(|world| {
        let pair = mirrored(world, "--iops 2000", "--rpo 1s --overload pace")?;
        pair.cut();
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        client.write(0, &[1; 4096])?;
        client.disconnect()?;
        pair.west.wait_for_mirror("paced", TIMEOUT, |view| view["limit_lowered_percent"] == 10)?;
        // Within 2 % of the lowered limit: at once if it is more, each of three times if it is less.
        let mut seen = Vec::new();
        while seen.len() < 3 {
            let report = Fio::new(&pair.west.export("data"))
                .option("rw", "randwrite")
                .option("bs", "4k")
                .option("size", "32M")
                .option("iodepth", 32)
                .time_based(2, 8)
                .run()?;
            let ratio = report.iops("write") / 1800.0;
            ensure!(ratio <= 1.02, "{:.1} IOPS at a lowered limit of 1800", report.iops("write"));
            seen.push(report.iops("write"));
            if ratio >= 0.98 {
                break;
            }
            ensure!(seen.len() < 3, "{seen:.1?} IOPS at a lowered limit of 1800");
        }
        pair.heal();
        pair.west.wait_caught_up()?;
        pair.west.wait_for_mirror("at its own limit", TIMEOUT, |view| view["limit_lowered_percent"] == 0)?;
        pair.check_equal("data")
    })
}

#[test]
fn a_mirror_keeps_its_bandwidth_and_a_copy_its_rate() -> Result<()> {
    World::run(|world| {
        let pair = Pair::start(world)?;
        pair.west.run("volume create data --size 24MiB --iops unlimited")?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        for mebibyte in 0..24 {
            client.write(mebibyte << 20, &vec![7; 1 << 20])?;
        }
        // The copy of 24 MiB at 8 MiB/s takes three seconds.
        let started = Instant::now();
        pair.west.run("mirror create mirror --partner east --volumes data --resync-rate 8MiB/s")?;
        pair.west.wait_caught_up()?;
        let copied = started.elapsed().as_secs_f64();
        ensure!((2.7..12.0).contains(&copied), "24 MiB at 8 MiB/s took {copied} s");
        let view = pair.west.json("mirror set mirror --resync-rate unlimited --bandwidth 4MiB/s")?;
        ensure!(view["resync_rate"] == "unlimited" && view["bandwidth"] == 4 << 20, "{view:#}");
        let started = Instant::now();
        for mebibyte in 0..12 {
            client.write(mebibyte << 20, &vec![8; 1 << 20])?;
        }
        // Hosts are not held to it.
        let written = started.elapsed();
        pair.west.wait_caught_up()?;
        let sent = started.elapsed().as_secs_f64();
        ensure!((2.6..9.0).contains(&sent), "12 MiB at 4 MiB/s took {sent} s");
        ensure!(written.as_secs_f64() < sent, "{written:?} of {sent} s");
        client.disconnect()?;
        pair.check_equal("data")
    })
}

#[test]
fn under_stop_writes_wait_for_the_partner_and_are_refused_when_it_stays_away() -> Result<()> {
    World::run(|world| {
        let mut pair = mirrored(world, "--iops unlimited", "--rpo 2s")?;
        pair.west.run("mirror set mirror --overload stop --rpo 1s")?;
        // The choice outlives a crash.
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.wait_caught_up()?;
        let view = pair.west.mirror_view()?;
        ensure!(view["overload"] == "stop" && view["rpo_budget_seconds"] == 1, "{view:#}");

        let mut client = pair.west.wait_for_export("data", TIMEOUT)?;
        pair.cut();
        client.write(0, &[1; 4096])?;
        pair.west.wait_for_mirror("holding writes", TIMEOUT, writes_are("held"))?;
        // Held, and released when the partner is back; reads are served meanwhile.
        client.begin_write(4096, 4096, &[2; 4096])?;
        let mut reader = NbdClient::connect(&pair.west.export("data"))?;
        reader.read(0, &mut [0; 4096])?;
        let healed = Instant::now();
        pair.heal();
        let (_, error) = client.reply()?;
        ensure!(error == 0, "a held write ended with {error} after {:?}", healed.elapsed());
        pair.west.wait_caught_up()?;

        // The partner stays away: refused, until an operator lets the writes go on without it.
        pair.cut();
        client.write(8192, &[3; 4096])?;
        pair.west.wait_for_mirror("refusing writes", TIMEOUT, writes_are("refused"))?;
        let refused = client.write(12_288, &[4; 4096]);
        ensure!(matches!(refused, Err(NbdError::Command(5))), "{refused:?}");
        client.read(8192, &mut [0; 4096])?;
        client.flush()?;
        // A crash is no way around it: the RPO is not known then.
        pair.west.kill9()?;
        pair.west.resume()?;
        pair.west.run("mirror start mirror --primary local")?;
        let mut client = pair.west.wait_for_export("data", TIMEOUT)?;
        pair.west.wait_for_mirror("refusing writes", TIMEOUT, writes_are("refused"))?;
        let refused = client.write(12_288, &[4; 4096]);
        ensure!(matches!(refused, Err(NbdError::Command(5))), "{refused:?}");
        pair.west.run("mirror set mirror --overload bitmap")?;
        client.write(12_288, &[5; 4096])?;
        pair.heal();
        pair.west.wait_caught_up()?;
        pair.check_equal("data")
    })
}
