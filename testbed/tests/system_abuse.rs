//! Abuse: whatever clients do, the daemon holds afterwards what it held before, and another volume's host never sees
//! an error.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::harness::nbd::{COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE};
use testbed::harness::{Bystander, Export, Footprint, NbdClient, Random, Site, SiteOptions, World, run};

const MEBIBYTE: u64 = 1 << 20;
/// Far above what anything here takes on a slow machine, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// A host that comes while others misbehave is served in this time.
const PROMPT: Duration = Duration::from_secs(2);
/// A handshake may take so long.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Runs `abuse` of the volume `data` of a fresh site, with a host on the volume `other` that must not notice, and
/// checks that nothing is left of it.
fn abused(abuse: impl FnOnce(&Site, &Export) -> Result<()>) -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        site.run("volume create data --size 128MiB --iops unlimited")?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let export = site.export("data");
        warm_up(&export)?;
        let bystander = Bystander::start(&site.export("other"))?;
        let before = Footprint::of(&site)?;
        abuse(&site, &export)?;
        before.wait_restored(&site, PATIENCE)?;
        bystander.stop()?;
        let mut last = NbdClient::connect(&export)?;
        last.write(0, &[2; 4096])?;
        last.disconnect()?;
        site.terminate()
    })
}

/// What a daemon keeps once it was busy, threads and warm buffers, is no leak: it is there before the abuse.
fn warm_up(export: &Export) -> Result<()> {
    const LENGTH: u32 = 64 << 20;
    let mut client = NbdClient::connect(export)?;
    let payload = vec![1; 64 << 20];
    for offset in [0, 64 * MEBIBYTE] {
        client.write(offset, &payload)?;
    }
    client.begin_read(0, LENGTH)?;
    client.begin_read(64 * MEBIBYTE, LENGTH)?;
    let mut found = payload.clone();
    for _ in 0..2 {
        ensure!(client.reply()?.1 == 0, "a read failed");
        client.receive(&mut found)?;
    }
    client.disconnect()?;
    ensure!(found == payload, "read back");
    Ok(())
}

/// A new host is served at once.
fn check_served(export: &Export) -> Result<()> {
    let begin = Instant::now();
    let mut client = NbdClient::connect(export)?;
    client.read(0, &mut [0; 4096])?;
    client.disconnect()?;
    ensure!(begin.elapsed() < PROMPT, "a new host was served after {:?}", begin.elapsed());
    Ok(())
}

/// Waits until the server has closed a connection; what it still sent is read and dropped.
fn wait_closed(stream: &mut TcpStream, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.checked_duration_since(Instant::now()).context("a connection stays open")?;
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error).context("a connection stays open"),
        }
    }
}

#[test]
fn hundreds_of_slow_handshakes_stop_no_new_host_and_are_ended() -> Result<()> {
    // The client's flags, then an option whose name never comes to its end.
    const BEGINNING: &[u8] = b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x10\x00\x00\x00\x04da";
    abused(|_, export| {
        let mut idle = Vec::new();
        for number in 0..600 {
            let mut stream = export.dial()?;
            let sent = number % (BEGINNING.len() + 1);
            stream.write_all(BEGINNING.get(..sent).unwrap_or_default())?;
            idle.push(stream);
        }
        let begin = Instant::now();
        check_served(export)?;
        for stream in &mut idle {
            wait_closed(stream, HANDSHAKE_LIMIT + PATIENCE)?;
        }
        let took = begin.elapsed();
        ensure!(took < HANDSHAKE_LIMIT + Duration::from_secs(5), "slow handshakes were ended after {took:?}");
        Ok(())
    })
}

#[test]
fn half_closed_connections_are_closed() -> Result<()> {
    abused(|_, export| {
        for round in 0..50_u64 {
            let before_go = export.dial()?;
            before_go.shutdown(Shutdown::Write)?;
            let stream = export.dial()?;
            let mut client = NbdClient::over(stream.try_clone()?, export)?;
            client.write(round * 4096, &[3; 4096])?;
            client.begin_read(0, 65536)?;
            stream.shutdown(Shutdown::Write)?;
            for mut stream in [before_go, stream] {
                wait_closed(&mut stream, PATIENCE)?;
            }
            // The other direction: nobody will read the answers.
            let deaf = export.dial()?;
            let mut client = NbdClient::over(deaf.try_clone()?, export)?;
            deaf.shutdown(Shutdown::Read)?;
            client.begin(COMMAND_READ, 0, 0, 1 << 20, &[])?;
        }
        check_served(export)
    })
}

#[test]
fn a_host_that_vanishes_in_the_middle_of_64_mib_changes_nothing_and_leaves_no_memory() -> Result<()> {
    const LENGTH: u32 = 64 << 20;
    abused(|site, export| {
        let mut observer = NbdClient::connect(export)?;
        let old: Vec<u8> = (0..LENGTH / 4).flat_map(u32::to_le_bytes).collect();
        observer.write(0, &old)?;
        let resting = site.resident_bytes()?;
        let new = vec![0xa5; old.len()];
        for sent in [0, 1, 4095, 1 << 20, 33 << 20, old.len() - 1] {
            let mut vanishing = NbdClient::connect(export)?;
            vanishing.begin_write(0, LENGTH, new.get(..sent).context("a beginning")?)?;
            drop(vanishing);
        }
        let mut found = vec![0; old.len()];
        observer.read(0, &mut found)?;
        ensure!(found == old, "a write whose payload never arrived changed the volume");
        // Sixteen at once, each with almost all of its payload sent: more than there is memory for requests.
        let mut crowd = Vec::new();
        for _ in 0..16 {
            let stream = export.dial()?;
            let mut client = NbdClient::over(stream.try_clone()?, export)?;
            client.begin_write(0, LENGTH, &[])?;
            stream.set_nonblocking(true)?;
            crowd.push((client, stream, 0_usize));
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            for (_, stream, sent) in &mut crowd {
                let left = new.get(*sent..new.len() - 1).unwrap_or_default();
                *sent += stream.write(left).unwrap_or(0);
            }
        }
        let resident = site.resident_bytes()?;
        ensure!(resident < resting + (384 << 20), "{resident} bytes are resident, {resting} before");
        check_served(&site.export("other"))?;
        drop(crowd);
        observer.read(0, &mut found)?;
        ensure!(found == old, "a write whose payload never arrived changed the volume");
        observer.disconnect()?;
        Ok(())
    })
}

#[test]
fn a_thousand_connects_and_disconnects_leave_nothing() -> Result<()> {
    abused(|_, export| {
        let begin = Instant::now();
        for round in 0..1000_u64 {
            match round % 4 {
                0 => drop(export.dial()?),
                1 => NbdClient::connect(export)?.disconnect()?,
                2 => drop(NbdClient::connect(export)?),
                _ => {
                    let mut client = NbdClient::connect(export)?;
                    client.begin(COMMAND_WRITE, 0, round * 4096, 4096, &[4; 4096])?;
                    client.begin(COMMAND_READ, 0, 0, 65536, &[])?;
                    client.begin(COMMAND_FLUSH, 0, 0, 0, &[])?;
                }
            }
        }
        ensure!(begin.elapsed() < PATIENCE, "1,000 connections took {:?}", begin.elapsed());
        check_served(export)
    })
}

#[test]
fn garbage_closes_its_own_connection_only() -> Result<()> {
    abused(|_, export| {
        let mut random = Random::new(23);
        for round in 0..200 {
            let mut stream = export.dial()?;
            if round % 2 == 1 {
                drop(NbdClient::over(stream.try_clone()?, export)?);
            }
            let length = 1 + random.index(70_000);
            let garbage: Vec<u8> = (0..length).map(|_| random.next().to_le_bytes()[0]).collect();
            // The server may have closed before all of it was sent.
            drop(stream.write_all(&garbage));
            drop(stream.shutdown(Shutdown::Write));
            wait_closed(&mut stream, PATIENCE)?;
        }
        // An HTTP client and a TLS client on the wrong port.
        for greeting in
            [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"]
        {
            let mut stream = export.dial()?;
            stream.write_all(greeting)?;
            wait_closed(&mut stream, PATIENCE)?;
        }
        check_served(export)
    })
}

#[test]
fn hosts_that_never_read_their_replies_hold_bounded_memory() -> Result<()> {
    abused(|site, export| {
        let mut greedy = Vec::new();
        for _ in 0..8 {
            let mut client = NbdClient::connect(export)?;
            for number in 0..300 {
                client.begin_read(number % 8 * 8 * MEBIBYTE, 8 << 20)?;
            }
            greedy.push(client);
        }
        check_served(&site.export("other"))?;
        let resident = site.resident_bytes()?;
        ensure!(resident < 512 << 20, "{resident} bytes are resident");
        Ok(())
    })
}

#[test]
fn a_daemon_without_descriptors_serves_on_and_recovers() -> Result<()> {
    const SPARE: usize = 24;
    abused(|site, export| {
        // By the limit on descriptors new connections cannot be accepted, and that is worth a line.
        site.log().allow("cannot be accepted");
        let pid = site.process_id()?.to_string();
        let usual = run("prlimit", &["--pid", &pid, "--nofile", "--noheadings", "--output", "SOFT"])?;
        let limit = format!("--nofile={}:", site.descriptors()? + SPARE);
        run("prlimit", &["--pid", &pid, &limit])?;
        let mut established = NbdClient::connect(export)?;
        let from = site.log().length();
        let mut crowd = Vec::new();
        for _ in 0..4 * SPARE {
            crowd.push(export.dial()?);
        }
        let complains = |line: &str| line.contains("cannot be accepted");
        site.log().wait_for(from, PATIENCE, complains).context("no word of the missing descriptors")?;
        for block in 0..256 {
            established.write(block * 4096, &[5; 4096])?;
        }
        established.flush()?;
        drop(crowd);
        let begin = Instant::now();
        check_served(export)?;
        ensure!(begin.elapsed() < PROMPT, "served again after {:?}", begin.elapsed());
        established.read(0, &mut [0; 4096])?;
        established.disconnect()?;
        // The descriptors suffice for what else the daemon does.
        site.run("volume create third --size 4MiB")?;
        site.run("volume delete third")?;
        run("prlimit", &["--pid", &pid, &format!("--nofile={}:", usual.trim())])?;
        Ok(())
    })
}

#[test]
fn an_operator_is_served_while_hosts_use_up_the_descriptors() -> Result<()> {
    abused(|site, export| {
        site.log().allow("cannot be accepted");
        let pid = site.process_id()?.to_string();
        run("prlimit", &["--pid", &pid, &format!("--nofile={}:", site.descriptors()? + 24)])?;
        let crowd: Vec<TcpStream> = (0..96).map(|_| export.dial()).collect::<Result<_, _>>()?;
        for verb in ["volume list", "volume create third --size 4MiB", "volume delete third", "--json status"]
        {
            let begin = Instant::now();
            let printed = site.run(verb)?;
            ensure!(begin.elapsed() < PROMPT, "{verb} took {:?}", begin.elapsed());
            ensure!(!verb.contains("status") || printed.contains("nbd_connections_max"), "{printed}");
        }
        // A new host takes the place of an idle one.
        check_served(export)?;
        drop(crowd);
        check_served(export)
    })
}

#[test]
fn hosts_that_stall_in_their_payloads_give_way_to_another_volumes_host() -> Result<()> {
    const LENGTH: u32 = 64 << 20;
    const STALL: Duration = Duration::from_secs(2);
    World::run(|world| {
        let setting = |key: &str, value: u64| (key.to_owned(), value.to_string());
        let settings = vec![setting("shards", 1), setting("nbd_stall_seconds", STALL.as_secs())];
        let mut site = world.site("west", SiteOptions { settings, ..SiteOptions::default() })?;
        site.log().allow("it moves no bytes, and others wait");
        site.run("volume create data --size 128MiB --iops unlimited")?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let export = site.export("data");
        let before = Footprint::of(&site)?;
        let payload = vec![7; 64 << 20];
        // Each is charged for its payload and the steps of it: three fill the memory, and one waits for it.
        let mut stalled = Vec::new();
        for sent in [0, 1, 1 << 20, 33 << 20] {
            let mut client = NbdClient::connect(&export)?;
            client.begin_write(0, LENGTH, payload.get(..sent).context("a beginning")?)?;
            stalled.push(client);
        }
        std::thread::sleep(STALL * 2);
        ensure!(site.log().wait_for(0, Duration::ZERO, |line| line.contains("moves no bytes")).is_some());
        let begin = Instant::now();
        let mut fifth = NbdClient::connect(&site.export("other"))?;
        fifth.write(0, &[1; 4096])?;
        fifth.disconnect()?;
        let took = begin.elapsed();
        ensure!(took < STALL + Duration::from_secs(3), "another volume's host was served after {took:?}");
        drop(stalled);
        before.wait_restored(&site, PATIENCE)?;
        site.terminate()
    })
}

#[test]
fn requests_that_have_not_started_are_dropped_with_their_connection() -> Result<()> {
    const WRITES: u64 = 100;
    abused(|site, _| {
        site.run("volume create slow --size 4MiB --iops 40")?;
        let export = site.export("slow");
        let mut vanishing = NbdClient::connect(&export)?;
        for block in 0..WRITES {
            vanishing.begin(COMMAND_WRITE, 0, block * 4096, 4096, &[6; 4096])?;
        }
        // The limit holds most of them back, so that some are answered and many have not started.
        for _ in 0..5 {
            ensure!(vanishing.reply()?.1 == 0, "a write failed");
        }
        let begin = Instant::now();
        drop(vanishing);
        // Commands wait in one line for the limit: whatever of the writes were still to come would come before this.
        let mut client = NbdClient::connect(&export)?;
        let mut found = vec![0; 4096 * usize::try_from(WRITES)?];
        client.read(0, &mut found)?;
        ensure!(begin.elapsed() < Duration::from_secs(1), "the line was {:?} long", begin.elapsed());
        client.read(0, &mut found)?;
        let landed = found.chunks(4096).take_while(|block| *block == [6; 4096]).count();
        ensure!((5..=20).contains(&landed), "{landed} writes landed");
        let rest = found.chunks(4096).skip(landed);
        ensure!(rest.into_iter().all(|block| *block == [0; 4096]), "a write landed out of its order");
        client.disconnect()?;
        let written = site.metrics()?.value("farshore_volume_writes_total", "volume=\"slow\"");
        ensure!(written.is_some_and(|count| count <= 20.0), "{written:?} writes were counted");
        // A connection may still be closing; the volume goes when it is gone.
        Footprint::of(site)?.wait_restored(site, PATIENCE)?;
        site.run("volume delete slow")?;
        Ok(())
    })
}
