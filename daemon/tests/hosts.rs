//! A whole site, asked over its control socket and opened over NBD: who is let in, and what a change does to whom is in.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "the whole file is a test")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use block::{ByteCount, VolumeName};
use control::{
    Cache, Call, CallError, VolumeAccess, VolumeAccessChange, VolumeAccessView, VolumeCreate, VolumeResize,
    VolumeView,
};
use daemon::settings::Settings;
use daemon::site::{Running, Site, install_metrics};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Nothing here takes so long, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running site with a listener of its own choice of port.
struct World {
    folder: TempDir,
    runtime: tokio::runtime::Runtime,
    running: Option<Running>,
    authority: Issuer<'static, KeyPair>,
    settings: Vec<String>,
}

impl World {
    /// A site whose listener has this TLS mode, and a client CA.
    fn new(tls: &str, settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        std::fs::write(folder.path().join("hosts-ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let mut world = Self {
            runtime: tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap(),
            running: None,
            authority: Issuer::new(params, key),
            settings: Vec::new(),
            folder,
        };
        let path = world.folder.path().display();
        std::fs::write(
            world.folder.path().join("farshored.toml"),
            format!(
                "site = 'test'\ndata_dir = '{path}/site'\ncontrol_socket = '{path}/control.sock'\nshards = 1\n\
                 minimum_size_bytes = 1048576\nconsole_listen = 'off'\nreplication_listen = '127.0.0.1:0'\n\
                 nbd_client_ca_file = '{path}/hosts-ca.pem'\n\
                 nbd_listen = [{{ address = '127.0.0.1:0', tls = '{tls}' }}]\n{settings}\n"
            ),
        )
        .unwrap();
        world.settings =
            vec!["farshored".to_owned(), "--config".to_owned(), format!("{path}/farshored.toml")];
        world.start();
        world
    }

    fn start(&mut self) {
        static METRICS: OnceLock<metrics_exporter_prometheus::PrometheusHandle> = OnceLock::new();
        let metrics = METRICS.get_or_init(|| install_metrics().unwrap()).clone();
        let deadline = Instant::now() + PATIENCE;
        // A site that was stopped in this process lets go of its directory when its last task has ended.
        self.running = loop {
            let settings = Settings::from_args(&self.settings).unwrap();
            match self.runtime.block_on(Site::start(settings, metrics.clone())) {
                Ok(running) => break Some(running),
                Err(error)
                    if Instant::now() < deadline && error.to_string().contains("in use by another") => {}
                Err(error) => panic!("{error:#}"),
            }
        };
    }

    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            self.runtime.block_on(running.stop());
        }
    }

    fn address(&self) -> SocketAddr {
        let uri = &self.running.as_ref().unwrap().nbd_uris()[0];
        uri.split_once("://").unwrap().1.parse().unwrap()
    }

    fn ask<T: DeserializeOwned>(&self, call: &Call<T>) -> Result<T, CallError> {
        let mut stream = UnixStream::connect(self.folder.path().join("control.sock")).unwrap();
        let head = format!(
            "{} {} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            call.method.as_str(),
            call.path,
            call.body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&call.body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        call.answer(status, &answer[end + 4..])
    }

    fn create(&self, cache: Cache) -> VolumeView {
        let class = "standard".to_owned();
        let iops = Some("unlimited".parse().unwrap());
        let access = VolumeAccessChange::default();
        let create = VolumeCreate {
            name: name(),
            size_bytes: ByteCount(4 * MIB),
            class,
            iops,
            cache,
            tenant: None,
            access,
        };
        let view = self.ask(&Call::volume_create(&create)).unwrap();
        // The shard presents it a moment later.
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.open(), Err(Refused(POLICY))) && Instant::now() < deadline {}
        view
    }

    fn access(&self, change: &VolumeAccessChange) -> Result<VolumeAccess, CallError> {
        let view: VolumeAccessView = self.ask(&Call::volume_access_change(&name(), change))?;
        Ok(view.access)
    }

    /// Opens the volume in clear text.
    fn open(&self) -> Result<Host<TcpStream>, Refused> {
        let mut host = Host::greet(self.connect());
        host.go().map(|()| host)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A host over TLS, with a certificate of this name or none.
    fn secured(&self, certificate: Option<&str>) -> Host<StreamOwned<ClientConnection, TcpStream>> {
        let mut host = Host::greet(self.connect());
        assert_eq!(host.option(STARTTLS, b""), Ok(()));
        let config = client_config(self.folder.path(), certificate.map(|name| self.sign(name)));
        let server = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::new(config), server).unwrap();
        Host { stream: StreamOwned::new(connection, host.stream), size: 0, flags: 0 }
    }

    fn sign(&self, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop();
    }
}

fn client_config(
    folder: &Path,
    certificate: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("site/tls/ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    match certificate {
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => builder.with_no_client_auth(),
    }
}

fn name() -> VolumeName {
    "a".parse().unwrap()
}

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const STARTTLS: u32 = 5;
const GO: u32 = 7;
const POLICY: u32 = 0x8000_0002;
const TLS_REQUIRED: u32 = 0x8000_0005;
const READ_ONLY: u16 = 2;

/// An option's error reply.
#[derive(Debug, PartialEq, Eq)]
struct Refused(u32);

/// The smallest NBD client.
struct Host<S> {
    stream: S,
    size: u64,
    flags: u16,
}

impl<S: Read + Write> Host<S> {
    fn greet(mut stream: S) -> Self {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        Self { stream, size: 0, flags: 0 }
    }

    fn go(&mut self) -> Result<(), Refused> {
        self.option(GO, b"\0\0\0\x01a\0\0")
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), Refused> {
        let mut request = IHAVEOPT.to_be_bytes().to_vec();
        request.extend(option.to_be_bytes());
        request.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).unwrap();
        loop {
            let mut head = [0; 20];
            self.stream.read_exact(&mut head).unwrap();
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut data = vec![0; usize::try_from(number(16)).unwrap()];
            self.stream.read_exact(&mut data).unwrap();
            match number(12) {
                1 => return Ok(()),
                3 if data[..2] == [0, 0] => {
                    self.size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                    self.flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
                }
                3 => {}
                error => return Err(Refused(error)),
            }
        }
    }

    /// Sends a command and gives the errno of its simple reply.
    fn command(
        &mut self,
        flags: u16,
        kind: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<u32> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(9_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request)?;
        self.errno()
    }

    /// Announces a write of so many bytes at the volume's start, and sends the beginning of its payload.
    fn begin_write(&mut self, length: u32, beginning: &[u8]) -> io::Result<()> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 1]);
        request.extend([0; 16]);
        request.extend(length.to_be_bytes());
        request.extend(beginning);
        self.stream.write_all(&request)?;
        self.stream.flush()
    }

    /// The errno of the next simple reply.
    fn errno(&mut self) -> io::Result<u32> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        Ok(u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }

    fn write(&mut self, fua: bool, offset: u64, payload: &[u8]) -> io::Result<u32> {
        self.command(u16::from(fua), 1, offset, u32::try_from(payload.len()).unwrap(), payload)
    }

    fn flush(&mut self) -> io::Result<u32> {
        self.command(0, 3, 0, 0, b"")
    }

    fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let errno = self.command(0, 0, offset, u32::try_from(length).unwrap(), b"")?;
        assert_eq!(errno, 0);
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }
}

#[test]
fn a_grown_volume_keeps_its_data_and_shows_its_size_to_new_connections_also_after_a_restart() {
    let mut world = World::new("off", "");
    world.create(Cache::None);
    let mut old = world.open().unwrap();
    assert_eq!(old.write(true, 0, &[7; 4096]).unwrap(), 0);
    let resize = |mib| Call::volume_resize(&name(), VolumeResize { size_bytes: ByteCount(mib * MIB) });
    assert_eq!(world.ask(&resize(8)).unwrap().size_bytes, ByteCount(8 * MIB));
    assert_eq!(world.ask(&resize(8)).unwrap().size_bytes, ByteCount(8 * MIB));
    let refused = world.ask(&resize(4)).unwrap_err().to_string();
    assert!(refused.contains("is not made smaller"), "{refused}");
    assert_eq!(old.read(0, 4096).unwrap(), [7; 4096], "the old connection goes on");
    for _ in 0..2 {
        let mut new = world.open().unwrap();
        assert_eq!(new.size, 8 * MIB);
        assert_eq!(new.read(0, 4096).unwrap(), [7; 4096]);
        assert_eq!(new.read(8 * MIB - 4096, 4096).unwrap(), [0; 4096]);
        assert_eq!(new.write(true, 6 * MIB, &[8; 4096]).unwrap(), 0);
        assert_eq!(new.read(6 * MIB, 4096).unwrap(), [8; 4096]);
        assert_eq!(new.write(false, 6 * MIB, &[0; 4096]).unwrap(), 0);
        drop(new);
        world.stop();
        world.start();
        while world.open().is_err() {}
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_volume_stays_as_it_is() {
    let world = World::new("off", "");
    world.create(Cache::None);
    let resize = Call::volume_resize(&name(), VolumeResize { size_bytes: ByteCount(1 << 52) });
    let refused = world.ask(&resize).unwrap_err().to_string();
    assert!(
        refused.contains("volume 'a' keeps its size") && refused.contains("free or add space"),
        "{refused}"
    );
    assert_eq!(world.open().unwrap().size, 4 * MIB);
}

/// The flags that this process has the volume's data file open with.
fn open_flags(world: &World) -> Vec<u32> {
    let mut flags = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        if target.starts_with(world.folder.path()) && target.file_name().is_some_and(|name| name == "data") {
            let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
            let info = std::fs::read_to_string(info).unwrap();
            let line = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            flags.push(u32::from_str_radix(line.trim(), 8).unwrap());
        }
    }
    flags
}

#[test]
fn a_volume_with_page_cache_is_opened_without_o_direct_also_after_a_restart_and_holds_what_was_flushed() {
    const O_DIRECT: u32 = 0o40_000;
    for (cache, direct) in [(Cache::Page, false), (Cache::None, true)] {
        let mut world = World::new("off", "");
        assert_eq!(world.create(cache).cache, cache);
        for round in 0..2_u8 {
            let flags = open_flags(&world);
            assert!(
                !flags.is_empty() && flags.iter().all(|flags| (flags & O_DIRECT != 0) == direct),
                "{flags:?}"
            );
            assert_eq!(world.ask(&Call::volume_show(&name())).unwrap().cache, cache);
            let mut host = world.open().unwrap();
            let place = 8192 * u64::from(round);
            assert_eq!(host.read(0, 1).unwrap(), [round]);
            assert_eq!(host.write(true, place, &[round; 4096]).unwrap(), 0);
            assert_eq!(host.write(false, place + 4097, &[round; 100]).unwrap(), 0);
            assert_eq!(host.write(false, 0, &[round + 1]).unwrap(), 0);
            assert_eq!(host.flush().unwrap(), 0);
            assert_eq!(host.read(place + 4096, 102).unwrap()[..2], [0, round]);
            drop(host);
            world.stop();
            world.start();
            while world.open().is_err() {}
        }
    }
}

#[test]
fn connections_beyond_the_most_are_refused_and_a_place_that_is_left_is_free() {
    let world = World::new("off", "nbd_connections_max = 2");
    world.create(Cache::None);
    let deadline = Instant::now() + PATIENCE;
    let mut hosts = Vec::new();
    // What `create` opened to look is closed by the shard a moment later.
    while hosts.len() < 2 && Instant::now() < deadline {
        hosts.extend(world.open().ok());
    }
    for host in &mut hosts {
        assert_eq!(host.read(0, 512).unwrap(), [0; 512]);
    }
    assert_eq!(world.open().map(|_| ()), Err(Refused(POLICY)));
    hosts.pop();
    while world.open().is_err() {
        assert!(Instant::now() < deadline, "the place is not free");
    }
}

#[test]
fn idle_connections_before_go_keep_nobody_out() {
    let world = World::new("off", "");
    world.create(Cache::None);
    let idle: Vec<_> = (0..400).map(|_| world.connect()).collect();
    let started = Instant::now();
    let mut host = world.open().unwrap();
    assert_eq!(host.read(0, 512).unwrap(), [0; 512]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(idle);
}

#[test]
fn a_limit_beyond_a_shards_estimate_is_told_at_create() {
    let world = World::new("off", "shard_iops_estimate = 1000");
    let iops = |iops: &str| VolumeCreate {
        name: format!("v{iops}").parse().unwrap(),
        size_bytes: ByteCount(MIB),
        class: "standard".to_owned(),
        iops: Some(iops.parse().unwrap()),
        cache: Cache::None,
        tenant: None,
        access: VolumeAccessChange::default(),
    };
    assert_eq!(world.ask(&Call::volume_create(&iops("1000"))).unwrap().warning, None);
    let warning = world.ask(&Call::volume_create(&iops("1001"))).unwrap().warning.unwrap();
    assert!(warning.contains("volume 'v1001' may do 1001 IOPS"), "{warning}");
    assert_eq!(world.ask(&Call::volume_show(&"v1001".parse().unwrap())).unwrap().warning, None);
}

#[test]
fn a_volume_is_made_with_its_access_or_not_at_all() {
    let mut world = World::new("optional", "");
    let named = |volume: &str, access| VolumeCreate {
        name: volume.parse().unwrap(),
        size_bytes: ByteCount(MIB),
        class: "standard".to_owned(),
        iops: None,
        cache: Cache::None,
        tenant: None,
        access,
    };
    let change = VolumeAccessChange {
        read_only: Some(true),
        allow: vec!["web1".parse().unwrap()],
        ..VolumeAccessChange::default()
    };
    let view = world.ask(&Call::volume_create(&named("v", change.clone()))).unwrap();
    let expected = VolumeAccess::default().changed(&change).unwrap();
    assert_eq!(view.access, expected);
    let revoked = VolumeAccessChange { revoke: vec!["web2".parse().unwrap()], ..change };
    let refused = world.ask(&Call::volume_create(&named("w", revoked))).unwrap_err().to_string();
    assert!(refused.contains("volume 'w' cannot be made: host 'web2' is not in its list"), "{refused}");
    assert!(world.ask(&Call::volume_show(&"w".parse().unwrap())).is_err());
    world.stop();
    world.start();
    assert_eq!(world.ask(&Call::volume_show(&"v".parse().unwrap())).unwrap().access, expected);
}

#[test]
fn a_connection_that_loses_its_access_is_closed_and_the_access_survives_a_restart() {
    let mut world = World::new("optional", "");
    world.create(Cache::None);
    let mut host = world.open().unwrap();
    assert_eq!(host.flags & READ_ONLY, 0);
    let read_only = VolumeAccessChange { read_only: Some(true), ..VolumeAccessChange::default() };
    assert!(world.access(&read_only).unwrap().read_only);
    assert!(host.is_closed(), "it could write");
    let mut host = world.open().unwrap();
    assert_eq!(host.flags & READ_ONLY, READ_ONLY);
    let tls = VolumeAccessChange { tls: Some(control::TlsRule::Required), ..VolumeAccessChange::default() };
    world.access(&tls).unwrap();
    assert!(host.is_closed(), "it is in clear text");
    for _ in 0..2 {
        assert_eq!(world.open().map(|_| ()), Err(Refused(TLS_REQUIRED)));
        let view = world.ask(&Call::volume_show(&name())).unwrap();
        assert_eq!((view.access.tls_required, view.access.read_only), (true, true));
        world.stop();
        world.start();
    }
}

#[test]
fn named_hosts_are_let_in_by_their_certificates_and_nobody_else() {
    let world = World::new("optional", "");
    world.create(Cache::None);
    let allow = ["host 1", "host 2:ro"].map(|host| host.parse().unwrap()).into();
    world.access(&VolumeAccessChange { allow, ..VolumeAccessChange::default() }).unwrap();
    assert_eq!(world.open().map(|_| ()), Err(Refused(TLS_REQUIRED)));
    for (certificate, expected) in [
        (None, Err(Refused(POLICY))),
        (Some("host 3"), Err(Refused(POLICY))),
        (Some("host 1"), Ok(0)),
        (Some("host 2"), Ok(READ_ONLY)),
    ] {
        let mut host = world.secured(certificate);
        assert_eq!(host.go().map(|()| host.flags & READ_ONLY), expected, "{certificate:?}");
    }
}

#[test]
fn a_certificate_of_another_ca_ends_the_handshake() {
    let world = World::new("required", "");
    let other = World::new("off", "");
    let mut host = Host::greet(world.connect());
    assert_eq!(host.option(STARTTLS, b""), Ok(()));
    let config = client_config(world.folder.path(), Some(other.sign("host 1")));
    let server = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), server).unwrap();
    let ended =
        connection.complete_io(&mut host.stream).and_then(|_| connection.complete_io(&mut host.stream));
    assert!(ended.is_err() || connection.reader().read(&mut [0]).is_err());
}

#[test]
fn clear_text_behind_starttls_is_not_taken_for_the_hosts_words() {
    let world = World::new("optional", "");
    let mut host = Host::greet(world.connect());
    let mut injected = IHAVEOPT.to_be_bytes().to_vec();
    injected.extend(STARTTLS.to_be_bytes());
    injected.extend(0_u32.to_be_bytes());
    let option = injected.clone();
    injected.extend(&option);
    host.stream.write_all(&injected).unwrap();
    let mut rest = Vec::new();
    // A reset is as good an end as an orderly one.
    let _ = host.stream.read_to_end(&mut rest);
    assert!(rest.len() <= 20, "at most the acknowledgement: {rest:?}");
}

#[test]
fn access_that_the_settings_make_impossible_is_refused() {
    let world = World::new("off", "");
    world.create(Cache::None);
    let tls = VolumeAccessChange { tls: Some(control::TlsRule::Required), ..VolumeAccessChange::default() };
    let refused = world.access(&tls).unwrap_err().to_string();
    assert!(refused.contains("no NBD listener has TLS"), "{refused}");
    assert_eq!(world.ask(&Call::volume_access(&name())).unwrap(), VolumeAccessView::default());
}

/// The smallest pool: four writes of 1 MiB fill it.
const SMALL_POOL: &str = "receive_pool_bytes = 4194304\nnbd_stall_seconds = 2";

/// Two hosts, which hold all that their volume may, stall in their payloads; a third gets the memory of one of them, and
/// the other goes on.
fn stall<S: Read + Write>(world: &World, mut hosts: Vec<Host<S>>) {
    const LENGTH: u32 = 1 << 20;
    let payload = vec![7; 1 << 20];
    let half = payload.len() / 2;
    for host in &mut hosts {
        host.begin_write(LENGTH, &payload[..half]).unwrap();
        // In their order: the first is the one that has stalled longest.
        std::thread::sleep(Duration::from_millis(100));
    }
    let started = Instant::now();
    let mut third = world.open().unwrap();
    assert_eq!(third.write(false, 0, &[1; 4096]).unwrap(), 0);
    let took = started.elapsed();
    assert!(took > Duration::from_secs(1), "there was no memory before: {took:?}");
    assert!(took < Duration::from_secs(8), "served after {took:?}");
    let (first, others) = hosts.split_first_mut().unwrap();
    let ended = first.stream.read(&mut [0]).map_err(|error| error.kind());
    assert!(
        matches!(ended, Ok(0) | Err(io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)),
        "the one that has stalled longest makes room: {ended:?}"
    );
    for host in others {
        host.stream.write_all(&payload[half..]).unwrap();
        assert_eq!(host.errno().unwrap(), 0, "nobody needs the memory of the others");
    }
}

#[test]
fn a_host_that_stalls_in_its_payload_gives_way_to_one_that_waits() {
    let world = World::new("off", SMALL_POOL);
    world.create(Cache::None);
    stall(&world, (0..2).map(|_| world.open().unwrap()).collect());
}

#[test]
fn a_host_that_stalls_in_its_payload_over_tls_gives_way_too() {
    let world = World::new("optional", SMALL_POOL);
    world.create(Cache::None);
    let secured = |_| {
        let mut host = world.secured(None);
        host.go().unwrap();
        host
    };
    stall(&world, (0..2).map(secured).collect());
}

#[test]
fn hosts_that_do_not_read_their_replies_give_way_to_one_that_waits() {
    const READS: u64 = 64;
    let world = World::new("off", SMALL_POOL);
    world.create(Cache::None);
    let mut deaf: Vec<_> = (0..2).map(|_| world.open().unwrap()).collect();
    let mut request = Vec::new();
    for host in &mut deaf {
        for _ in 0..READS {
            request.clear();
            request.extend(0x2560_9513_u32.to_be_bytes());
            request.extend([0; 20]);
            request.extend((1_u32 << 20).to_be_bytes());
            host.stream.write_all(&request).unwrap();
        }
    }
    // What the kernel queues for a host is not the daemon's memory: wait until that is full.
    std::thread::sleep(Duration::from_secs(1));
    let started = Instant::now();
    let mut third = world.open().unwrap();
    assert_eq!(third.write(false, 0, &[1; 4096]).unwrap(), 0);
    assert!(started.elapsed() < Duration::from_secs(8), "served after {:?}", started.elapsed());
    let mut closed = 0;
    for host in &mut deaf {
        let mut replies = vec![0; 16 + (1 << 20)];
        closed += usize::from((0..READS).any(|_| host.stream.read_exact(&mut replies).is_err()));
    }
    assert_eq!(closed, 1, "as many as were in the way");
}

#[test]
fn a_host_that_never_reads_does_not_keep_the_site_from_stopping() {
    let mut world = World::new("off", "");
    world.create(Cache::None);
    let mut deaf = world.open().unwrap();
    for _ in 0..64 {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 20]);
        request.extend((1_u32 << 20).to_be_bytes());
        deaf.stream.write_all(&request).unwrap();
    }
    std::thread::sleep(Duration::from_millis(500));
    let started = Instant::now();
    world.stop();
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[test]
fn a_deleted_volume_is_gone_at_once_and_its_space_comes_back() {
    let world = World::new("off", "");
    world.create(Cache::None);
    let pool = world.folder.path().join("site/pool");
    assert_eq!(std::fs::read_dir(&pool).unwrap().count(), 1);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = world.ask(&Call::volume_delete(&name())) {
        // What `create` opened to look is closed by the shard a moment later.
        assert!(error.to_string().contains("is in use") && Instant::now() < deadline, "{error}");
    }
    assert_eq!(std::fs::read_dir(&pool).unwrap().count(), 0);
    world.create(Cache::None);
}
