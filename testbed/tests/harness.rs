//! The harness itself, against nbdkit: what it finds right is right, and what is planted wrong it finds.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use testbed::harness::{Background, Export, Fio, Load, NbdClient, NbdError, free_port};

const REGION_BYTES: u64 = 256 << 10;

/// nbdkit with some filters and plugin arguments, as soon as it listens.
fn nbdkit(address: SocketAddr, arguments: &[&str]) -> Result<Background> {
    let port = address.port().to_string();
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port]);
    command.args(arguments);
    let mut server = Background::start(command)?;
    for _ in 0..500 {
        ensure!(server.is_running()?, "nbdkit ended");
        if NbdClient::connect(&Export::tcp(address, "data")).is_ok() {
            return Ok(server);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("nbdkit does not listen");
}

#[test]
fn a_load_on_a_good_server_verifies_and_ends_with_the_connection() -> Result<()> {
    let address = free_port();
    let export = Export::tcp(address, "data");
    let server = nbdkit(address, &["memory", "4M"])?;
    let mut load = Load::new(3, REGION_BYTES, 1);
    load.run_for(&export, Duration::from_millis(300))?;
    load.verify_acknowledged(&export)?;
    let prefixes = load.verify_prefix(&export)?;
    ensure!(prefixes.iter().all(|prefix| prefix.last > 0), "{prefixes:?}");

    let ((), ends) = load.run_while(&export, || {
        std::thread::sleep(Duration::from_millis(100));
        drop(server);
        Ok(())
    })?;
    ensure!(ends.iter().all(|end| matches!(end, Err(NbdError::Io(_)))), "{ends:?}");
    Ok(())
}

#[test]
fn lost_and_foreign_writes_are_found() -> Result<()> {
    let address = free_port();
    let export = Export::tcp(address, "data");
    let _server = nbdkit(address, &["memory", "4M"])?;
    let mut load = Load::new(2, REGION_BYTES, 2);
    load.run_for(&export, Duration::from_millis(300))?;
    let mut client = NbdClient::connect(&export)?;
    let mut sector = [0; 512];
    client.read(REGION_BYTES, &mut sector)?;
    for wrong in [[0; 512], [7; 512]] {
        client.write(REGION_BYTES, &wrong)?;
        ensure!(load.verify_acknowledged(&export).is_err(), "a lost or foreign sector is not found");
    }
    client.write(REGION_BYTES, &sector)?;
    load.verify_acknowledged(&export)?;
    client.disconnect()?;
    Ok(())
}

#[test]
fn commands_errors_and_refusals_are_told_apart() -> Result<()> {
    let address = free_port();
    let export = Export::tcp(address, "data");
    let _server = nbdkit(address, &["memory", "1M"])?;
    let mut client = NbdClient::connect(&export)?;
    ensure!(client.size() == 1 << 20, "size {}", client.size());
    client.write_durable(3, b"abc")?;
    client.write_zeroes(4, 1)?;
    client.trim(65_536, 4096)?;
    client.flush()?;
    let mut bytes = [0; 5];
    client.read(2, &mut bytes)?;
    ensure!(&bytes == b"\0a\0c\0", "{bytes:?}");
    let beyond = client.read(1 << 20, &mut bytes);
    ensure!(matches!(beyond, Err(NbdError::Command(22))), "{beyond:?}");
    client.disconnect()?;
    let nobody = NbdClient::connect(&Export::tcp(free_port(), "data"));
    ensure!(matches!(nobody, Err(NbdError::Io(_))), "connected to nobody");
    Ok(())
}

#[test]
fn fio_reports_rates_and_fails_on_errors() -> Result<()> {
    let address = free_port();
    let export = Export::tcp(address, "data");
    let good = nbdkit(address, &["memory", "4M"])?;
    let job = || Fio::new(&export).option("rw", "randwrite").option("bs", "4k").option("size", "1M");
    let report = job().option("verify", "crc32c").run()?;
    ensure!(report.operations("write") == 256, "{report:?}");
    ensure!(report.iops("write") > 0.0 && report.p99_us("write") > 0.0, "{report:?}");
    drop(good);
    let _bad = nbdkit(address, &["--filter=error", "memory", "4M", "error-pwrite-rate=100%"])?;
    ensure!(job().run().is_err(), "fio's errors are not found");
    Ok(())
}
