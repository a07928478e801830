//! TLS, access to volumes and resize, with the clients that hosts use.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::harness::nbd::{COMMAND_READ, COMMAND_TRIM, COMMAND_WRITE};
use testbed::harness::{
    Bystander, Export, Fio, Footprint, NbdClient, NbdError, Pair, Random, Site, SiteOptions, World,
    files_equal, free_port, run,
};

const MEBIBYTE: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const TLS_REQUIRED: u32 = 0x8000_0005;

/// A site with the volume `data` of 64 MiB, a listener in plain text and one with TLS, and hosts with certificates.
struct Secured {
    site: Site,
    tls: SocketAddr,
    hosts: String,
}

impl Secured {
    fn start(world: &World, mode: &str) -> Result<Self> {
        let hosts = world.text("hosts");
        make_authority(&hosts, "ca")?;
        make_authority(&hosts, "foreign")?;
        let tls = free_port();
        let flags = vec![
            "--nbd".to_owned(),
            format!("{tls},tls={mode}"),
            "--nbd-client-ca".to_owned(),
            format!("{hosts}/ca-cert.pem"),
        ];
        let site = world.site("west", SiteOptions { flags, ..SiteOptions::default() })?;
        site.run("volume create data --size 64MiB --iops unlimited")?;
        site.wait_for_export("data", PATIENCE)?.disconnect()?;
        let secured = Self { site, tls, hosts };
        for host in ["web1", "backup", "stranger"] {
            secured.issue(host, host, "ca")?;
        }
        // Says that it is web1, by an authority that has the right name and another key.
        secured.issue("forger", "web1", "foreign")?;
        secured.trust_server("nobody")?;
        Ok(secured)
    }

    /// The volume as a host opens it over TLS; the host `nobody` has no certificate.
    fn uri(&self, host: &str) -> String {
        format!("nbds://{}/data?tls-certificates={}/{host}", self.tls, self.hosts)
    }

    fn trust_server(&self, host: &str) -> Result<()> {
        trust_servers(&self.hosts, host, &[&self.site])
    }

    fn check(&self, uri: &str, wanted: &str) -> Result<()> {
        check(uri, wanted)
    }

    fn issue(&self, host: &str, identity: &str, authority: &str) -> Result<()> {
        self.trust_server(host)?;
        issue(&self.hosts, host, identity, authority)
    }
}

fn check(uri: &str, wanted: &str) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/access.py");
    run("/usr/bin/python3", &[&*script.to_string_lossy(), uri, wanted])
        .with_context(|| format!("{uri} should be {wanted}"))?;
    Ok(())
}

fn trust_servers(hosts: &str, host: &str, sites: &[&Site]) -> Result<()> {
    let folder = format!("{hosts}/{host}");
    fs::create_dir_all(&folder)?;
    // qemu wants the issuer of the host's own certificate there too.
    let mut trusted = fs::read_to_string(format!("{hosts}/ca-cert.pem"))?;
    for site in sites {
        trusted += &fs::read_to_string(site.directory().join("tls/ca-cert.pem"))?;
    }
    Ok(fs::write(format!("{folder}/ca-cert.pem"), trusted)?)
}

/// A host's folder as libnbd and qemu want it.
fn issue(hosts: &str, host: &str, identity: &str, authority: &str) -> Result<()> {
    let folder = format!("{hosts}/{host}");
    let extensions = format!("{folder}/extensions");
    fs::write(&extensions, "extendedKeyUsage=clientAuth\n")?;
    let (key, request) = (format!("{folder}/client-key.pem"), format!("{folder}/request.pem"));
    openssl(&format!(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -subj /CN={identity} -out {request}"
    ))?;
    openssl(&format!(
        "x509 -req -in {request} -CA {hosts}/{authority}-cert.pem -CAkey {hosts}/{authority}-key.pem \
         -CAcreateserial -days 2 -extfile {extensions} -out {folder}/client-cert.pem"
    ))
}

fn make_authority(folder: &str, name: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    openssl(&format!(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {folder}/{name}-key.pem -days 2 \
         -subj /CN=authority -out {folder}/{name}-cert.pem"
    ))
}

fn openssl(line: &str) -> Result<()> {
    run("openssl", &line.split_whitespace().collect::<Vec<_>>())?;
    Ok(())
}

#[test]
fn clients_work_over_tls() -> Result<()> {
    World::run(|world| {
        let mut secured = Secured::start(world, "required")?;
        let uri = secured.uri("web1");
        let shown = run("nbdinfo", &["--json", &uri])?;
        ensure!(shown.contains("\"TLS\": true"), "nbdinfo: {shown}");
        let (source, copy) = (world.text("source.img"), world.text("copy.img"));
        let mut random = Random::new(5);
        fs::write(&source, (0..8 * MEBIBYTE).flat_map(|_| random.next().to_le_bytes()).collect::<Vec<_>>())?;
        run("nbdcopy", &["--connections=4", "--flush", &source, &uri])?;
        run("nbdcopy", &["--connections=4", &uri, &copy])?;
        ensure!(files_equal(source.as_ref(), copy.as_ref())?, "nbdcopy over TLS changed bytes");
        let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}/web1", secured.hosts);
        let (host, port) = (secured.tls.ip(), secured.tls.port());
        let image = format!(
            "driver=nbd,server.type=inet,server.host={host},server.port={port},export=data,tls-creds=tls"
        );
        let compared = run(
            "qemu-img",
            &[
                "compare",
                "--object",
                &credentials,
                "--image-opts",
                &image,
                &format!("driver=raw,file.driver=file,file.filename={source}"),
            ],
        )?;
        ensure!(compared.contains("identical"), "qemu-img compare: {compared}");
        secured.site.terminate()
    })
}

#[test]
fn without_tls_nothing_is_served_where_it_is_required() -> Result<()> {
    World::run(|world| {
        let mut secured = Secured::start(world, "required")?;
        let plain = Export::tcp(secured.tls, "data");
        let refusal = NbdClient::connect(&plain).err();
        ensure!(matches!(refusal, Some(NbdError::Refused { code: TLS_REQUIRED, .. })), "{refusal:?}");
        secured.check(&plain.uri(), "refused")?;
        // A volume that requires TLS is not served in plain text on any listener; connections in plain text end.
        let mut earlier = NbdClient::connect(&secured.site.export("data"))?;
        secured.site.run("volume access data --tls required")?;
        ensure!(earlier.read(0, &mut [0; 512]).is_err(), "a connection in plain text goes on");
        secured.check(&secured.site.export("data").uri(), "refused")?;
        secured.check(&secured.uri("web1"), "rw")?;
        secured.check(&secured.uri("nobody"), "rw")?;
        secured.site.restart()?;
        secured.check(&secured.uri("web1"), "rw")?;
        secured.check(&secured.site.export("data").uri(), "refused")?;
        secured.site.terminate()
    })
}

#[test]
fn only_listed_hosts_open_a_volume_and_as_the_list_says() -> Result<()> {
    World::run(|world| {
        let mut secured = Secured::start(world, "optional")?;
        for host in ["web1", "stranger", "nobody"] {
            secured.check(&secured.uri(host), "rw")?;
        }
        secured.check(&secured.uri("forger"), "refused")?;
        secured.site.run("volume access data --allow web1 --allow backup:ro")?;
        let wanted = [
            ("web1", "rw"),
            ("backup", "ro"),
            ("stranger", "refused"),
            ("nobody", "refused"),
            ("forger", "refused"),
        ];
        for round in 0..2 {
            for (host, wanted) in wanted {
                secured.check(&secured.uri(host), wanted)?;
            }
            secured.check(&Export::tcp(secured.tls, "data").uri(), "refused")?;
            secured.check(&secured.site.export("data").uri(), "refused")?;
            if round == 0 {
                secured.site.restart()?;
            }
        }
        secured.site.run("volume access data --revoke web1")?;
        secured.check(&secured.uri("web1"), "refused")?;
        secured.site.run("volume access data --any-host")?;
        secured.check(&secured.uri("stranger"), "rw")?;
        secured.site.terminate()
    })
}

/// Who may open the volume `data` at a site, without what is said of the partner.
fn access_at(site: &Site) -> Result<Value> {
    let mut access = site.json("volume access data")?;
    if let Some(access) = access.as_object_mut() {
        access.remove("warning");
    }
    Ok(access)
}

fn wait_for_same_access(pair: &Pair) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (west, east) = (access_at(&pair.west)?, access_at(&pair.east)?);
        if west == east {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "west has {west}, its replica {east}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_replica_is_never_more_open_than_its_primary_also_after_a_failover() -> Result<()> {
    World::run(|world| {
        let hosts = world.text("hosts");
        make_authority(&hosts, "ca")?;
        let ports = [free_port(), free_port()];
        let flags = |tls: SocketAddr| {
            let listener = format!("{tls},tls=optional");
            vec!["--nbd".to_owned(), listener, "--nbd-client-ca".to_owned(), format!("{hosts}/ca-cert.pem")]
        };
        let mut pair = Pair::start_with(world, ports.map(flags))?;
        for site in [&pair.west, &pair.east] {
            ["partner", "failover", "promot", "epoch"].into_iter().for_each(|text| site.log().allow(text));
        }
        for host in ["web1", "web2", "backup", "stranger"] {
            trust_servers(&hosts, host, &[&pair.west, &pair.east])?;
            issue(&hosts, host, host, "ca")?;
        }
        let uri = |tls: SocketAddr, host: &str| format!("nbds://{tls}/data?tls-certificates={hosts}/{host}");

        pair.west.run("volume create data --size 16MiB --iops unlimited --allow web1 --allow backup:ro")?;
        pair.mirror(&["data"])?;
        ensure!(access_at(&pair.west)?["hosts"].as_array().is_some_and(|hosts| hosts.len() == 2), "the list");
        ensure!(access_at(&pair.west)? == access_at(&pair.east)?, "the replica is made without its access");
        let sentence = pair.east.refused("volume access data --any-host")?;
        ensure!(sentence.contains("follows its primary"), "{sentence}");

        // What lets in less is there when the answer is.
        pair.west.run("volume access data --revoke backup")?;
        ensure!(access_at(&pair.west)? == access_at(&pair.east)?, "the replica is behind");
        let tightest = access_at(&pair.east)?;

        pair.cut();
        let sentence = pair.west.refused("volume access data --read-only")?;
        ensure!(sentence.contains("--here-first"), "{sentence}");
        ensure!(access_at(&pair.west)? == tightest, "a refused change was made");
        let told = pair.west.cli("volume access data --allow web2")?;
        ensure!(told.stderr.contains("warning"), "{told:?}");
        check(&uri(ports[0], "web2"), "rw")?;
        let status = pair.west.json("status")?;
        ensure!(status["warnings"].to_string().contains("the replica of volume 'data'"), "{status:#}");
        ensure!(access_at(&pair.east)? == tightest, "the replica heard through a cut link");
        pair.heal();
        wait_for_same_access(&pair)?;

        pair.cut();
        pair.west.run("volume access data --revoke web2 --here-first")?;
        check(&uri(ports[0], "web2"), "refused")?;
        pair.heal();
        wait_for_same_access(&pair)?;

        pair.wait_caught_up()?;
        pair.east.restart()?;
        pair.west.kill9()?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        check(&uri(ports[1], "web1"), "rw")?;
        for host in ["stranger", "backup", "web2"] {
            check(&uri(ports[1], host), "refused")?;
        }
        check(&pair.east.export("data").uri(), "refused")?;
        // It is the primary now, and its list its own to change.
        pair.east.run("volume access data --allow backup:ro")?;
        check(&uri(ports[1], "backup"), "ro")?;
        Ok(())
    })
}

#[test]
fn a_read_only_volume_refuses_writes_and_keeps_the_connection() -> Result<()> {
    World::run(|world| {
        let mut secured = Secured::start(world, "optional")?;
        let export = secured.site.export("data");
        let mut writer = NbdClient::connect(&export)?;
        writer.write_durable(0, &[3; 4096])?;
        secured.site.run("volume access data --read-only")?;
        ensure!(writer.write(0, &[4; 4096]).is_err(), "an open connection still writes");
        secured.check(&export.uri(), "ro")?;
        secured.check(&secured.uri("web1"), "ro")?;
        let mut found = [0; 4096];
        NbdClient::connect(&export)?.read(0, &mut found)?;
        ensure!(found == [3; 4096], "a read-only volume changed");
        secured.site.run("volume access data --read-write")?;
        secured.check(&export.uri(), "rw")?;
        secured.site.terminate()
    })
}

#[test]
fn a_resized_volume_is_larger_for_new_connections() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("west", SiteOptions::default())?;
        site.run("volume create data --size 64MiB --iops unlimited")?;
        site.run("volume create other --size 4MiB --iops unlimited")?;
        let export = site.export("data");
        let mut old = NbdClient::connect(&export)?;
        old.write(60 * MEBIBYTE, &vec![1; 4 << 20])?;
        let bystander = Bystander::start(&site.export("other"))?;
        site.run("volume resize data --size 256MiB")?;
        ensure!(site.refused("volume resize data --size 64MiB")?.contains("data"), "a volume shrinks");
        ensure!(old.error_of(COMMAND_WRITE, 0, 64 * MEBIBYTE, 512, &[1; 512])? == 28, "the old size holds");
        ensure!(old.error_of(COMMAND_READ, 0, 64 * MEBIBYTE, 512, &[])? == 22, "the old size holds");
        let mut new = NbdClient::connect(&export)?;
        ensure!(new.size() == 256 * MEBIBYTE, "size {}", new.size());
        let mut found = vec![1; 4 << 20];
        new.read(62 * MEBIBYTE, &mut found)?;
        let (kept, added) = found.split_at(2 << 20);
        ensure!(kept.iter().all(|byte| *byte == 1) && added.iter().all(|byte| *byte == 0), "the seam");
        new.write_durable(252 * MEBIBYTE, &vec![2; 4 << 20])?;
        ensure!(new.error_of(COMMAND_TRIM, 0, 64 * MEBIBYTE, 100 << 20, &[])? == 0, "trim of the new part");
        old.write(0, &[3; 4096])?;
        bystander.stop()?;
        site.kill9()?;
        site.resume()?;
        let mut client = site.wait_for_export("data", PATIENCE)?;
        ensure!(client.size() == 256 * MEBIBYTE, "size {} after a crash", client.size());
        client.read(252 * MEBIBYTE, &mut found)?;
        ensure!(found == vec![2; 4 << 20], "the new part after a crash");
        let report = Fio::new(&site.export("data"))
            .option("rw", "randwrite")
            .option("bs", "64k")
            .option("offset", "60M")
            .option("size", "32M")
            .option("iodepth", 8)
            .option("verify", "crc32c")
            .run()?;
        ensure!(report.operations("read") > 0, "fio verified nothing");
        site.terminate()
    })
}

#[test]
fn bytes_in_clear_behind_starttls_and_broken_handshakes_close_their_connection_only() -> Result<()> {
    const FLAGS: &[u8] = b"\x00\x00\x00\x03";
    const STARTTLS: &[u8] = b"IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00";
    const LIST: &[u8] = b"IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00";
    World::run(|world| {
        let mut secured = Secured::start(world, "required")?;
        let export = Export::tcp(secured.tls, "data");
        let before = Footprint::of(&secured.site)?;
        let mut random = Random::new(3);
        for round in 0..60 {
            let mut stream = export.dial()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(FLAGS)?;
            let behind: Vec<u8> = match round % 3 {
                0 => LIST.to_vec(),
                1 => (0..1000).map(|_| random.next().to_le_bytes()[0]).collect(),
                _ => Vec::new(),
            };
            stream.write_all(&[STARTTLS, &behind].concat())?;
            if round % 3 == 2 {
                stream.read_exact(&mut [0; 18 + 20])?;
                stream.write_all(b"\x16\x03\x01\x00\x04nope")?;
            }
            let mut answers = Vec::new();
            drop(stream.read_to_end(&mut answers));
            ensure!(answers.len() < 200, "something was served: {} bytes", answers.len());
        }
        let begin = Instant::now();
        secured.check(&secured.uri("web1"), "rw")?;
        ensure!(begin.elapsed() < PATIENCE, "a good host was served after {:?}", begin.elapsed());
        before.wait_restored(&secured.site, PATIENCE)?;
        secured.site.terminate()
    })
}
