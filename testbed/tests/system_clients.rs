//! The clients that hosts use work on a volume: libnbd, qemu and fio, over TCP and Unix sockets.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::harness::{Export, Fio, NbdClient, Site, SiteOptions, World, files_equal, run};

const MEBIBYTE: u64 = 1 << 20;

/// A site with one volume `data` of 64 MiB without a limit.
fn site_with_volume(world: &World, nbd_unix: bool) -> Result<Site> {
    let options = SiteOptions { nbd_unix, ..SiteOptions::default() };
    let site = world.site("west", options)?;
    site.run("volume create data --size 64MiB --iops unlimited")?;
    Ok(site)
}

#[test]
fn clients_work_over_tcp() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, false)?;
        all_clients(world, &site.export("data"))?;
        site.restart()?;
        filesystem_survives(world, &site.export("data"))?;
        site.terminate()
    })
}

#[test]
fn clients_work_over_a_unix_socket() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, true)?;
        all_clients(world, &site.export("data"))?;
        filesystem_survives(world, &site.export("data"))?;
        site.terminate()
    })
}

fn all_clients(world: &World, export: &Export) -> Result<()> {
    information(export)?;
    fio_verifies(export, 1)?;
    fio_verifies(export, 4)?;
    copies_are_identical(world, export)?;
    qemu_reads_and_writes(world, export)?;
    any_byte_range_is_served(export)
}

fn information(export: &Export) -> Result<()> {
    let uri = export.uri();
    let shown = run("nbdinfo", &["--json", &uri])?;
    for wanted in [
        "\"export-size\": 67108864",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
        "newstyle-fixed",
        "\"structured\": true",
    ] {
        ensure!(shown.contains(wanted), "nbdinfo lacks {wanted}: {shown}");
    }
    let list = run("nbdinfo", &["--list", &export.server_uri()])?;
    ensure!(list.contains("data"), "nbdinfo --list: {list}");
    Ok(())
}

fn fio_verifies(export: &Export, connections: u64) -> Result<()> {
    let size = 16 * MEBIBYTE;
    for (pattern, block) in [("randwrite", "4k"), ("randrw", "512-96k"), ("write", "256k")] {
        let report = Fio::new(export)
            .option("rw", pattern)
            .option(if block.contains('-') { "bsrange" } else { "bs" }, block)
            .option("size", size)
            .option("offset_increment", size)
            .option("numjobs", connections)
            .option("iodepth", 16)
            .option("verify", "crc32c")
            .option("verify_fatal", 1)
            .option("serialize_overlap", 1)
            .option("fsync", 64)
            .run()?;
        ensure!(report.operations("write") > 0, "fio wrote nothing");
        ensure!(report.operations("read") > 0, "fio verified nothing");
    }
    Ok(())
}

fn copies_are_identical(world: &World, export: &Export) -> Result<()> {
    let (source, copy) = (world.text("source.img"), world.text("copy.img"));
    let mut random = testbed::harness::Random::new(3);
    let bytes: Vec<u8> = (0..8 * MEBIBYTE).flat_map(|_| random.next().to_le_bytes()).collect();
    fs::write(&source, bytes)?;
    let uri = export.uri();
    for connections in ["--connections=1", "--connections=4"] {
        run("nbdcopy", &[connections, "--flush", &source, &uri])?;
        run("nbdcopy", &[connections, &uri, &copy])?;
        ensure!(files_equal(source.as_ref(), copy.as_ref())?, "nbdcopy {connections} changed bytes");
    }
    fs::remove_file(&copy)?;
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &copy])?;
    ensure!(files_equal(source.as_ref(), copy.as_ref())?, "qemu-img convert from the volume changed bytes");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source, &uri])?;
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &uri])?;
    ensure!(compared.contains("identical"), "qemu-img compare: {compared}");
    Ok(())
}

fn qemu_reads_and_writes(world: &World, export: &Export) -> Result<()> {
    let uri = export.uri();
    let commands = [
        "write -P 0xab 0 64k",
        "read -P 0xab 0 64k",
        "write -P 0xcd 1537 1000",
        "read -P 0xcd 1537 1000",
        "read -P 0xab 0 1537",
        "read -P 0xab 2537 1000",
        "write -z 8k 4k",
        "read -P 0 8k 4k",
        "read -P 0xab 12k 4k",
        "discard 1M 2M",
        "read -P 0 1M 2M",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "none"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let printed = run("qemu-io", &arguments)?;
    ensure!(!printed.contains("failed"), "qemu-io: {printed}");

    let script = world.path("client.py");
    fs::write(&script, PYTHON_CLIENT)?;
    run("/usr/bin/python3", &[&script.to_string_lossy(), uri.as_str()])?;
    Ok(())
}

/// libnbd's own view of replies: FUA, zero-length and out-of-range commands, many in flight.
const PYTHON_CLIENT: &str = r#"
import errno, nbd, sys
client = nbd.NBD()
client.set_strict_mode(0)
client.connect_uri(sys.argv[1])
assert client.get_structured_replies_negotiated()
size = client.get_size()
client.pwrite(b"x" * 70000, 12345, nbd.CMD_FLAG_FUA)
assert client.pread(70000, 12345) == b"x" * 70000
client.zero(5000, 20000)
assert client.pread(5000, 20000) == bytes(5000)
assert client.pread(1, 19999) == b"x" and client.pread(1, 25000) == b"x"
for action, wanted in [
    (lambda: client.pread(4096, size), errno.EINVAL),
    (lambda: client.pwrite(bytes(4096), size - 512), errno.ENOSPC),
]:
    try:
        action()
    except nbd.Error as error:
        assert error.errnum == wanted, error
    else:
        raise AssertionError("accepted a command beyond the end")
buffers = [nbd.Buffer(65536) for _ in range(64)]
cookies = [client.aio_pread(buffer, number * 65536) for number, buffer in enumerate(buffers)]
while client.aio_in_flight() > 0:
    client.poll(-1)
    for cookie in list(cookies):
        if client.aio_command_completed(cookie):
            cookies.remove(cookie)
client.flush()
client.shutdown()
"#;

/// Writes of every alignment against a copy in memory.
fn any_byte_range_is_served(export: &Export) -> Result<()> {
    const REGION_BYTES: usize = 256 << 10;
    let mut client = NbdClient::connect(export)?;
    ensure!(client.size() == 64 * MEBIBYTE, "size {}", client.size());
    let mut model = vec![0; REGION_BYTES];
    client.read(0, &mut model)?;
    let mut random = testbed::harness::Random::new(11);
    for round in 0..400_u32 {
        let offset = random.index(REGION_BYTES - 1);
        let length = (1 + random.index(20_000)).min(REGION_BYTES - offset);
        let place = u64::try_from(offset)?;
        let window = model.get_mut(offset..offset + length).context("a range of the model")?;
        if random.chance(150) {
            client.write_zeroes(place, u32::try_from(length)?)?;
            window.fill(0);
        } else {
            let byte = random.next().to_le_bytes()[0];
            let data = vec![byte; length];
            if round % 16 == 0 {
                client.write_durable(place, &data)?;
            } else {
                client.write(place, &data)?;
            }
            window.copy_from_slice(&data);
        }
    }
    let mut image = vec![0; REGION_BYTES];
    client.read(0, &mut image)?;
    ensure!(image == model, "the volume differs from the model");
    client.flush()?;
    client.disconnect()?;
    Ok(())
}

fn filesystem_survives(world: &World, export: &Export) -> Result<()> {
    let (image, copy) = (world.text("ext4.img"), world.text("ext4-copy.img"));
    let folder = world.path("files");
    fs::create_dir_all(&folder)?;
    for number in 0..50_usize {
        fs::write(folder.join(format!("file{number}")), vec![b'a'; number * 3001])?;
    }
    let file = fs::File::create(&image)?;
    file.set_len(64 * MEBIBYTE)?;
    run("mkfs.ext4", &["-q", "-F", "-d", &folder.to_string_lossy(), &image])?;
    run("e2fsck", &["-fn", &image])?;
    run("nbdcopy", &["--connections=4", "--flush", &image, &export.uri()])?;
    run("nbdcopy", &["--connections=4", &export.uri(), &copy])?;
    run("e2fsck", &["-fn", &copy])?;
    ensure!(files_equal(image.as_ref(), copy.as_ref())?, "the file system's image came back changed");
    Ok(())
}

#[test]
fn an_idle_daemon_uses_no_cpu_and_metrics_count_commands() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, false)?;
        let mut client = NbdClient::connect(&site.export("data"))?;
        for number in 0..10_u64 {
            client.write(number * 4096, &[7; 4096])?;
        }
        let mut bytes = [0; 4096];
        client.read(0, &mut bytes)?;
        ensure!(bytes == [7; 4096], "read back");
        let metrics = site.metrics()?;
        let label = "volume=\"data\"";
        for (name, least) in
            [("farshore_volume_write_bytes_total", 40_960.0), ("farshore_volume_read_bytes_total", 4096.0)]
        {
            let value = metrics.value(name, label);
            ensure!(value.is_some_and(|value| value >= least), "{name} is {value:?}:\n{}", metrics.text());
        }
        client.disconnect()?;
        let before = site.cpu_ticks()?;
        std::thread::sleep(Duration::from_secs(3));
        // A tick is 10 ms: housekeeping may take some, polling would take 300.
        let used = site.cpu_ticks()? - before;
        ensure!(used <= 6, "an idle daemon used {used} ticks in 3 s");
        site.terminate()
    })
}

#[test]
fn a_host_that_vanishes_in_the_middle_of_a_payload_changes_nothing() -> Result<()> {
    World::run(|world| {
        let mut site = site_with_volume(world, false)?;
        let export = site.export("data");
        let mut other = NbdClient::connect(&export)?;
        let old = vec![0x5a; 1 << 20];
        other.write(0, &old)?;
        for beginning in [1, 4096, 100_000, (1 << 20) - 1] {
            let mut vanishing = NbdClient::connect(&export)?;
            vanishing.begin_write(0, 1 << 20, &vec![0xa5; beginning / 2])?;
            // By its answer the server has taken what came before on the other connection.
            other.flush()?;
            vanishing.send_payload(&vec![0xa5; beginning - beginning / 2])?;
            drop(vanishing);
            other.flush()?;
        }
        other.disconnect()?;
        site.restart()?;
        let mut found = vec![0; 1 << 20];
        NbdClient::connect(&site.export("data"))?.read(0, &mut found)?;
        ensure!(found == old, "a write whose payload never arrived changed the volume");
        site.terminate()
    })
}

#[test]
fn a_host_that_does_not_read_its_replies_slows_only_itself() -> Result<()> {
    World::run(|world| {
        let site = site_with_volume(world, false)?;
        let export = site.export("data");
        let mut greedy = NbdClient::connect(&export)?;
        for _ in 0..200 {
            greedy.begin_read(0, 8 << 20)?;
        }
        let mut other = NbdClient::connect(&export)?;
        for block in 0..64 {
            other.write(block * 4096, &[7; 4096])?;
        }
        let resident = site.resident_bytes()?;
        ensure!(resident < 512 << 20, "{resident} bytes are resident");
        Ok(())
    })
}
