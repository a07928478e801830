//! Bad input: one clear error each, no panic, nothing lost.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::harness::{NbdClient, Pair, Random, Site, SiteOptions, World, finish};

const CONTENT: [u8; 4096] = [0x77; 4096];

fn site_with_content(world: &World) -> Result<Site> {
    let site = world.site("west", SiteOptions::default())?;
    site.run("volume create data --size 8MiB --iops unlimited")?;
    let mut client = NbdClient::connect(&site.export("data"))?;
    client.write_durable(4096, &CONTENT)?;
    client.disconnect()?;
    Ok(site)
}

fn check_content(site: &Site) -> Result<()> {
    let mut client = site.wait_for_export("data", Duration::from_secs(10))?;
    let mut bytes = [0; 4096];
    client.read(4096, &mut bytes)?;
    ensure!(bytes == CONTENT, "the volume's content changed");
    client.disconnect()?;
    Ok(())
}

#[test]
fn verbs_refuse_with_a_sentence_that_names_the_object() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_content(world)?;
        let garbage = world.text("garbage.pem");
        fs::write(&garbage, "no certificate")?;
        let own = world.text("own.pem");
        fs::write(&own, site.run("certificate show")?)?;
        let with_garbage = format!("partner add east --address 127.0.0.1:9 --certificate {garbage}");
        let cases = [
            ("volume create odd --size 1000001", "odd"),
            ("volume create tiny --size 4096", "tiny"),
            ("volume create huge --size 4096TiB", "huge"),
            ("volume create gold --size 8MiB --class gold", "gold"),
            ("volume create data --size 8MiB", "data"),
            ("volume show nothing", "nothing"),
            ("volume delete nothing", "nothing"),
            ("mirror create m --partner nobody --volumes data", "nobody"),
            ("mirror show nothing", "nothing"),
            ("mirror failover nothing --accept-loss", "nothing"),
            ("mirror start nothing", "nothing"),
            ("mirror wait nothing --for caught-up --timeout 2s", "nothing"),
            ("partner remove nobody", "nobody"),
            ("partner add east --address 127.0.0.1:9 --certificate /nowhere.pem", "/nowhere.pem"),
            (&with_garbage, "east"),
        ];
        for (line, name) in cases {
            let sentence = site.refused(line)?;
            ensure!(sentence.contains(name), "`{line}` does not name {name}: {sentence}");
        }
        let bad_address = format!("partner add east --address nowhere --certificate {own}");
        let usage = [
            "volume create ../x --size 8MiB",
            "volume create x --size many",
            "volume create x",
            "volume grow x",
            &bad_address,
        ];
        for line in usage {
            let finished = site.cli(line)?;
            ensure!(finished.status.code() == Some(2), "`{line}` ended with {}", finished.status);
            ensure!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
        }
        let list = site.json("volume list")?;
        ensure!(
            list.as_array().is_some_and(|list| list.len() == 1),
            "refused verbs left something: {list:#}"
        );
        check_content(&site)?;
        site.terminate()
    })
}

#[test]
fn a_class_that_cannot_be_mirrored_and_a_wrong_certificate_are_refused() -> Result<()> {
    World::run(|world| {
        let pair = Pair::start(world)?;
        for site in [&pair.west, &pair.east] {
            site.log().allow("partner");
            site.log().allow("certificate");
        }
        pair.west.run("volume create fast --size 8MiB --class ultra")?;
        let sentence = pair.west.refused("mirror create m --partner east --volumes fast")?;
        ensure!(sentence.contains("fast") && sentence.contains("ultra"), "{sentence}");

        pair.west.run("volume create data --size 8MiB")?;
        pair.east.run("volume create data --size 16MiB")?;
        let sentence = pair.west.refused("mirror create m --partner east --volumes data")?;
        ensure!(sentence.contains("data"), "{sentence}");
        ensure!(
            pair.east.data_file("data")?.metadata()?.len() == 16 << 20,
            "the partner's volume was changed"
        );

        // An impostor: east's address with west's certificate.
        let certificate = world.text("impostor.pem");
        fs::write(&certificate, pair.west.run("certificate show")?)?;
        let address = pair.east.replication();
        let add = format!("partner add impostor --address {address} --certificate {certificate}");
        if pair.west.cli(&add)?.status.success() {
            let sentence = pair.west.refused("mirror create m --partner impostor --volumes data")?;
            ensure!(sentence.contains("impostor"), "{sentence}");
        }
        let mirrors = pair.west.json("mirror list")?;
        ensure!(mirrors.as_array().is_some_and(Vec::is_empty), "a refused mirror is left: {mirrors:#}");
        Ok(())
    })
}

#[test]
fn a_second_daemon_on_the_same_directory_is_refused() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_content(world)?;
        let second = finish(site.daemon_command()?, Duration::from_secs(10))?;
        ensure!(!second.status.success(), "a second daemon started");
        ensure!(!second.stderr.contains("panicked"), "{}", second.stderr);
        ensure!(
            second.stderr.contains(&*site.directory().to_string_lossy()),
            "it does not name the directory: {}",
            second.stderr
        );
        check_content(&site)?;
        site.terminate()
    })
}

#[test]
fn garbage_on_every_port_harms_nobody() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_content(world)?;
        // Refusing a peer's or a host's garbage is odd but handled.
        site.log().allow("WARN");
        let mut random = Random::new(5);
        let mut garbage = || -> Vec<u8> { (0..600).flat_map(|_| random.next().to_le_bytes()).collect() };
        let udp = UdpSocket::bind("127.0.0.1:0")?;
        for _ in 0..30 {
            for port in [site.nbd(), site.console()] {
                throw(TcpStream::connect(port)?, &garbage());
            }
            let control = UnixStream::connect(site.control_socket())?;
            control.set_read_timeout(Some(Duration::from_millis(20)))?;
            throw(control, &garbage());
            udp.send_to(garbage().get(..1200).unwrap_or_default(), site.replication())?;
        }
        // A good greeting, then garbage; and requests of a client that disappears.
        for prefix in [&b"\0\0\0\x03"[..], b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"] {
            throw(TcpStream::connect(site.nbd())?, &[prefix, &garbage()].concat());
        }
        for request in [
            "GET /v1/nothing HTTP/1.1\r\n\r\n",
            "POST /v1/volumes HTTP/1.1\r\nContent-Length: 5\r\n\r\n{{{{{",
        ] {
            throw(UnixStream::connect(site.control_socket())?, request.as_bytes());
        }
        check_content(&site)?;
        ensure!(site.json("status")?.is_object(), "status");
        site.terminate()
    })
}

/// Sends and reads a little; whatever the server does with it is right but a crash.
fn throw(mut stream: impl Read + Write, bytes: &[u8]) {
    drop(stream.write_all(bytes));
    let mut answer = [0; 512];
    drop(stream.read(&mut answer));
}

/// All files below a directory with this ending or name.
fn files(directory: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, wanted)?);
        } else if wanted(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

#[test]
fn a_damaged_catalogue_is_rebuilt_from_the_volumes_headers() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_content(world)?;
        // A person must look.
        site.log().allow("catalogue");
        site.terminate()?;
        let is_catalogue = |path: &Path| path.extension().is_some_and(|ending| ending == "redb");
        let catalogues = files(site.directory(), is_catalogue)?;
        ensure!(!catalogues.is_empty(), "no catalogue in {}", site.directory().display());
        let damages: [fn(&Path) -> std::io::Result<()>; 4] = [
            |file| fs::write(file, b"garbage"),
            |file| fs::write(file, b""),
            |file| fs::File::options().write(true).open(file)?.set_len(5000),
            |file| fs::remove_file(file),
        ];
        for (number, damage) in damages.iter().enumerate() {
            catalogues.iter().try_for_each(|file| damage(file))?;
            let refused = site.resume().err().map(|error| format!("{error:#}"));
            let refused = refused.with_context(|| format!("damage {number} was not noticed"))?;
            ensure!(refused.contains("--rebuild-catalogue"), "damage {number}: {refused}");
            ensure!(!refused.contains("panicked"), "damage {number}: {refused}");
            let mut rebuild = site.daemon_command()?;
            rebuild.arg("--rebuild-catalogue");
            finish(rebuild, Duration::from_secs(10))?.success()?;
            site.resume().with_context(|| format!("rebuilt after damage {number}"))?;
            check_content(&site)?;
            site.terminate()?;
        }
        Ok(())
    })
}

#[test]
fn a_damaged_redo_log_costs_no_write() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::with_mirrored_volume(world, 16)?;
        // A person must look.
        for text in ["redo", "journal", "compare", "tip"] {
            pair.east.log().allow(text);
            pair.west.log().allow(text);
        }
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        for block in 0..256 {
            client.write(block * 4096, &[5; 4096])?;
        }
        pair.wait_caught_up()?;
        pair.east.kill9()?;
        let is_redo = |path: &Path| path.to_string_lossy().contains("redo");
        let logs = files(pair.east.directory(), is_redo)?;
        ensure!(!logs.is_empty(), "no redo log in {}", pair.east.directory().display());
        for path in &logs {
            let mut bytes = fs::read(path)?;
            bytes.chunks_mut(4096).for_each(|page| page.iter_mut().take(64).for_each(|byte| *byte ^= 0x5a));
            fs::write(path, bytes)?;
        }
        // It starts and tells, or refuses in one sentence; either way the host's writes go on.
        let started = pair.east.resume();
        client.write(0, &[6; 4096])?;
        client.disconnect()?;
        if let Err(error) = started {
            let text = format!("{error:#}");
            ensure!(!text.contains("panicked"), "{text}");
            ensure!(text.contains("redo") || text.contains("journal"), "{text}");
        } else {
            let view = pair.west.mirror_view()?;
            ensure!(view["role"] == "primary", "{view:#}");
        }
        Ok(())
    })
}

#[test]
fn a_wrong_key_locks_the_volumes_and_the_right_one_opens_them() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_content(world)?;
        site.log().allow("key");
        site.terminate()?;
        let keys = files(site.directory(), |path: &Path| path.file_name().is_some_and(|name| name == "kek"))?;
        let key = keys.first().context("no file `kek` in the site's directory")?;
        let saved = fs::read(key)?;
        // Written in place, so that its mode stays.
        fs::write(key, "5a".repeat(32) + "\n")?;
        // With another key the daemon starts with the volume locked, or refuses to start; it never shows garbage.
        if site.resume().is_ok() {
            let shown = site.json("volume show data")?;
            ensure!(shown["state"] == "locked", "{shown:#}");
            ensure!(NbdClient::connect(&site.export("data")).is_err(), "a locked volume is served");
            site.terminate()?;
        }
        fs::write(key, saved)?;
        site.resume()?;
        check_content(&site)?;
        site.terminate()
    })
}
