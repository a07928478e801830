//! The API over a real socket, asked with the command line's own requests.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use block::{ByteCount, Position, SiteId, TenantId, VolumeId, VolumeName};
use control::{
    AuditVerify, AuditView, Cache, Call, CallError, CertificateView, Counts, DrillStart, FailoverRequest,
    FailoverResult, MirrorCreate, MirrorMode, MirrorSet, MirrorStart, MirrorView, Overload, PartnerAdd,
    PartnerView, Problem, ProblemKind, ProviderView, RecoveryPoint, RotationView, Side, StatusView,
    TenantCreate, TenantView, Timestamp, VolumeAccess, VolumeAccessChange, VolumeAccessView, VolumeCreate,
    VolumeResize, VolumeState, VolumeView,
};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::*;

/// Records what it was asked and refuses everything named `missing`.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, what: impl Into<String>, name: Option<&VolumeName>) -> Result<(), OperationError> {
        let mut what = what.into();
        if let Some(name) = name {
            what = format!("{what} {name}");
        }
        self.asked.lock().unwrap().push(what.clone());
        if what.ends_with("missing") {
            return Err(OperationError::new(ProblemKind::NotFound, format!("{what}: there is none")));
        }
        assert!(!what.ends_with("fatal"), "a bug");
        Ok(())
    }
}

fn volume(name: VolumeName) -> VolumeView {
    VolumeView {
        name,
        id: VolumeId::default(),
        size_bytes: ByteCount(1 << 20),
        class: "standard".to_owned(),
        iops_limit: "750".parse().unwrap(),
        cache: Cache::None,
        tenant: None,
        state: VolumeState::Online,
        state_reason: None,
        mirror: None,
        access: VolumeAccess::default(),
        uris: vec![],
        warning: None,
    }
}

fn partner(name: VolumeName) -> PartnerView {
    PartnerView {
        name,
        address: "127.0.0.1:1".parse().unwrap(),
        fingerprint: String::new(),
        connected: false,
        last_error: None,
    }
}

fn mirror(name: VolumeName) -> MirrorView {
    MirrorView {
        name,
        mode: MirrorMode::Async,
        role: control::Role::Primary,
        state: control::MirrorState::InconsistentCopying,
        state_reason: None,
        synchronized: false,
        connected: true,
        needs_start: false,
        epoch: 1,
        position: Position::default(),
        recovery_point: None,
        rpo_seconds: None,
        rpo_bound: false,
        rpo_budget_seconds: 900,
        backlog_bytes: 0,
        journal_tier: control::JournalTier::Ring,
        resync: None,
        orphaned_bytes: 0,
        on_link_failure: control::LinkFailure::Degrade,
        sync: None,
        overload: Overload::Bitmap,
        pressure: control::PressureView::default(),
        bandwidth: control::Rate::default(),
        resync_rate: control::Rate::default(),
        verify: None,
        memory: control::MirrorMemory::default(),
        window: None,
        drill: None,
        volumes: vec![],
        partner: "p".parse().unwrap(),
    }
}

fn tenant(name: VolumeName) -> TenantView {
    TenantView {
        name,
        id: TenantId::default(),
        locked: false,
        key_version: None,
        root: None,
        volumes: vec![],
        volumes_behind: vec![],
        warning: None,
    }
}

fn provider() -> ProviderView {
    ProviderView { provider: "file:k".to_owned(), fingerprint: String::new(), seconds: 0.0, unguarded: 0 }
}

impl Operations for Fake {
    async fn volume_create(&self, create: VolumeCreate) -> Result<VolumeView, OperationError> {
        self.note("volume create", Some(&create.name))?;
        Ok(volume(create.name))
    }

    async fn volume_list(&self) -> Result<Vec<VolumeView>, OperationError> {
        self.note("volume list", None)?;
        Ok(vec![volume("a".parse().unwrap())])
    }

    async fn volume_show(&self, name: VolumeName) -> Result<VolumeView, OperationError> {
        self.note("volume show", Some(&name))?;
        Ok(volume(name))
    }

    async fn volume_resize(
        &self,
        name: VolumeName,
        resize: VolumeResize,
    ) -> Result<VolumeView, OperationError> {
        self.note(format!("volume resize to {}", resize.size_bytes.0), Some(&name))?;
        Ok(volume(name))
    }

    async fn volume_access(&self, name: VolumeName) -> Result<VolumeAccessView, OperationError> {
        self.note("volume access", Some(&name))?;
        Ok(VolumeAccessView::default())
    }

    async fn volume_access_change(
        &self,
        name: VolumeName,
        change: VolumeAccessChange,
    ) -> Result<VolumeAccessView, OperationError> {
        self.note("volume access change", Some(&name))?;
        let access = VolumeAccess::default()
            .changed(&change)
            .map_err(|error| OperationError::new(ProblemKind::Invalid, error.to_string()))?;
        Ok(VolumeAccessView { access, warning: None })
    }

    async fn volume_delete(&self, name: VolumeName) -> Result<(), OperationError> {
        self.note("volume delete", Some(&name))
    }

    async fn certificate_show(&self) -> Result<CertificateView, OperationError> {
        self.note("certificate show", None)?;
        Ok(CertificateView {
            site: SiteId::default(),
            fingerprint: String::new(),
            certificate: "PEM".to_owned(),
        })
    }

    async fn partner_add(&self, add: PartnerAdd) -> Result<PartnerView, OperationError> {
        self.note("partner add", Some(&add.name))?;
        Ok(partner(add.name))
    }

    async fn partner_list(&self) -> Result<Vec<PartnerView>, OperationError> {
        self.note("partner list", None)?;
        Ok(vec![])
    }

    async fn partner_show(&self, name: VolumeName) -> Result<PartnerView, OperationError> {
        self.note("partner show", Some(&name))?;
        Ok(partner(name))
    }

    async fn partner_remove(&self, name: VolumeName) -> Result<(), OperationError> {
        self.note("partner remove", Some(&name))
    }

    async fn mirror_create(&self, create: MirrorCreate) -> Result<MirrorView, OperationError> {
        self.note("mirror create", Some(&create.name))?;
        Ok(mirror(create.name))
    }

    async fn mirror_list(&self) -> Result<Vec<MirrorView>, OperationError> {
        self.note("mirror list", None)?;
        Ok(vec![])
    }

    async fn mirror_show(&self, name: VolumeName) -> Result<MirrorView, OperationError> {
        self.note("mirror show", Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_set(&self, name: VolumeName, set: MirrorSet) -> Result<MirrorView, OperationError> {
        self.note(format!("mirror set {:?}", set.overload), Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_verify(
        &self,
        name: VolumeName,
        verify: control::MirrorVerify,
    ) -> Result<MirrorView, OperationError> {
        self.note(format!("mirror verify {:?}", verify.repair_from), Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_stop(&self, name: VolumeName) -> Result<MirrorView, OperationError> {
        self.note("mirror stop", Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_start(&self, name: VolumeName, start: MirrorStart) -> Result<MirrorView, OperationError> {
        self.note(format!("mirror start {:?}", start.primary), Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_failover(
        &self,
        name: VolumeName,
        failover: FailoverRequest,
    ) -> Result<FailoverResult, OperationError> {
        self.note(
            failover.at.map_or("mirror failover".to_owned(), |at| format!("mirror failover at {at}")),
            Some(&name),
        )?;
        Ok(FailoverResult {
            recovery_point: RecoveryPoint { position: Position::default(), time: Timestamp::default() },
            seconds_lost: 0.25,
            seconds_lost_bound: true,
            zero_loss: false,
        })
    }

    async fn mirror_drill_start(
        &self,
        name: VolumeName,
        drill: DrillStart,
    ) -> Result<MirrorView, OperationError> {
        self.note(
            drill.at.map_or("drill start".to_owned(), |at| format!("drill start at {at}")),
            Some(&name),
        )?;
        Ok(mirror(name))
    }

    async fn mirror_drill_stop(&self, name: VolumeName) -> Result<MirrorView, OperationError> {
        self.note("drill stop", Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_switch(&self, name: VolumeName) -> Result<MirrorView, OperationError> {
        self.note("mirror switch", Some(&name))?;
        Ok(mirror(name))
    }

    async fn mirror_orphans(
        &self,
        name: VolumeName,
        orphans: control::OrphansRequest,
    ) -> Result<control::OrphansView, OperationError> {
        self.note(format!("mirror orphans {:?}", orphans.export), Some(&name))?;
        Ok(control::OrphansView {
            extents: vec![],
            exact_bytes: 0,
            possible_bytes: 0,
            exported: orphans.export,
        })
    }

    async fn mirror_delete(&self, name: VolumeName) -> Result<(), OperationError> {
        self.note("mirror delete", Some(&name))
    }

    async fn tenant_create(&self, create: TenantCreate) -> Result<TenantView, OperationError> {
        self.note("tenant create", Some(&create.name))?;
        Ok(tenant(create.name))
    }

    async fn tenant_list(&self) -> Result<Vec<TenantView>, OperationError> {
        self.note("tenant list", None)?;
        Ok(vec![])
    }

    async fn tenant_show(&self, name: VolumeName) -> Result<TenantView, OperationError> {
        self.note("tenant show", Some(&name))?;
        Ok(tenant(name))
    }

    async fn tenant_delete(&self, name: VolumeName) -> Result<(), OperationError> {
        self.note("tenant delete", Some(&name))
    }

    async fn tenant_lock(&self, name: VolumeName) -> Result<TenantView, OperationError> {
        self.note(format!("tenant lock by {}", caller()), Some(&name))?;
        Ok(tenant(name))
    }

    async fn tenant_unlock(&self, name: VolumeName) -> Result<TenantView, OperationError> {
        self.note("tenant unlock", Some(&name))?;
        Ok(tenant(name))
    }

    async fn key_rotate_volume(&self, name: VolumeName) -> Result<RotationView, OperationError> {
        self.note("key rotate volume", Some(&name))?;
        Ok(RotationView { volumes: vec![] })
    }

    async fn key_rotate_tenant(&self, name: VolumeName) -> Result<RotationView, OperationError> {
        self.note("key rotate tenant", Some(&name))?;
        Ok(RotationView { volumes: vec![] })
    }

    async fn key_provider_test(&self) -> Result<ProviderView, OperationError> {
        self.note("key provider test", None)?;
        Ok(provider())
    }

    async fn key_provider_init(&self) -> Result<ProviderView, OperationError> {
        self.note("key provider init", None)?;
        Ok(provider())
    }

    async fn audit_verify(&self, verify: AuditVerify) -> Result<AuditView, OperationError> {
        self.note(format!("audit verify {:?}", verify.expected), None)?;
        Ok(AuditView { file: "f".to_owned(), lines: 2, head: "h".to_owned() })
    }

    async fn status(&self) -> Result<StatusView, OperationError> {
        self.note("status", None)?;
        Ok(StatusView {
            version: String::new(),
            site: SiteId::default(),
            site_name: "a".parse().unwrap(),
            uptime_seconds: 0.0,
            encryption_engine: String::new(),
            nbd_uris: vec![],
            replication_address: String::new(),
            console_address: None,
            counts: Counts::default(),
            warnings: vec![],
        })
    }
}

/// A served API.
struct Api {
    fake: Arc<Fake>,
    folder: tempfile::TempDir,
    stop: oneshot::Sender<()>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Api {
    fn serve() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let (stop, stopped) = oneshot::channel();
        let socket = ControlSocket::bind(&folder.path().join("control.sock")).unwrap();
        let stopped = async move {
            let _ = stopped.await;
        };
        let server = tokio::spawn(socket.serve(router(Arc::clone(&fake)), stopped));
        Self { fake, folder, stop, server }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    async fn send<T: DeserializeOwned>(&self, call: Call<T>) -> Result<T, CallError> {
        let (status, _, body) = exchange(&self.path(), call.method.as_str(), &call.path, &call.body).await;
        call.answer(status, &body)
    }

    async fn problem(&self, method: &str, path: &str, body: &[u8]) -> (u16, Problem) {
        let (status, head, body) = exchange(&self.path(), method, path, body).await;
        assert!(head.contains("content-type: application/problem+json"), "{head}");
        let problem: Problem = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem.status, status);
        (status, problem)
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.fake.asked.lock().unwrap())
    }
}

async fn exchange(socket: &Path, method: &str, path: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // A server that refuses by the length alone may close before all is sent.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let body = answer.split_off(end + 4);
    let head = String::from_utf8(answer).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, body)
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

fn mirror_create(volumes: &[&str]) -> MirrorCreate {
    MirrorCreate {
        name: name("m"),
        partner: name("p"),
        volumes: volumes.iter().copied().map(name).collect(),
        mode: MirrorMode::Sync,
        on_link_failure: control::LinkFailure::Degrade,
        rpo_seconds: None,
        overload: Overload::Bitmap,
        bandwidth: control::Rate::default(),
        resync_rate: control::Rate::default(),
    }
}

#[tokio::test]
async fn every_call_of_the_command_line_reaches_its_operation() {
    let api = Api::serve();
    let create = VolumeCreate {
        name: name("a"),
        size_bytes: ByteCount(1 << 20),
        class: "standard".to_owned(),
        iops: None,
        cache: Cache::None,
        tenant: None,
        access: VolumeAccessChange::default(),
    };
    assert_eq!(api.send(Call::volume_create(&create)).await.unwrap().name, name("a"));
    assert_eq!(api.send(Call::volume_list()).await.unwrap().len(), 1);
    api.send(Call::volume_show(&name("a"))).await.unwrap();
    let resize = VolumeResize { size_bytes: ByteCount(2 << 20) };
    api.send(Call::volume_resize(&name("a"), resize)).await.unwrap();
    assert_eq!(api.send(Call::volume_access(&name("a"))).await.unwrap(), VolumeAccessView::default());
    let change = VolumeAccessChange { allow: vec!["h:ro".parse().unwrap()], ..VolumeAccessChange::default() };
    let access = api.send(Call::volume_access_change(&name("a"), &change)).await.unwrap();
    assert_eq!(access.access.hosts, change.allow);
    api.send(Call::volume_delete(&name("a"))).await.unwrap();
    assert_eq!(api.send(Call::certificate_show()).await.unwrap().certificate, "PEM");
    let add =
        PartnerAdd { name: name("p"), address: "az2:1".parse().unwrap(), certificate: "PEM".to_owned() };
    api.send(Call::partner_add(&add)).await.unwrap();
    api.send(Call::partner_list()).await.unwrap();
    api.send(Call::partner_show(&name("p"))).await.unwrap();
    api.send(Call::partner_remove(&name("p"))).await.unwrap();
    api.send(Call::mirror_create(&mirror_create(&["a", "b"]))).await.unwrap();
    api.send(Call::mirror_list()).await.unwrap();
    assert_eq!(api.send(Call::mirror_show(&name("m"))).await.unwrap(), mirror(name("m")));
    let set = MirrorSet { overload: Some(Overload::Pace), ..MirrorSet::default() };
    api.send(Call::mirror_set(&name("m"), set)).await.unwrap();
    let verify = control::MirrorVerify { repair_from: Some(Side::Local) };
    api.send(Call::mirror_verify(&name("m"), verify)).await.unwrap();
    api.send(Call::mirror_stop(&name("m"))).await.unwrap();
    let start = MirrorStart { primary: Some(Side::Local) };
    api.send(Call::mirror_start(&name("m"), start)).await.unwrap();
    assert_eq!(api.send(Call::mirror_switch(&name("m"))).await.unwrap(), mirror(name("m")));
    let orphans = control::OrphansRequest { export: Some("/x".to_owned()) };
    assert_eq!(api.send(Call::mirror_orphans(&name("m"), &orphans)).await.unwrap().exported, orphans.export);
    let failover = FailoverRequest { accept_loss: true, at: None };
    assert!(api.send(Call::mirror_failover(&name("m"), failover)).await.unwrap().seconds_lost_bound);
    let failover = FailoverRequest { accept_loss: false, at: Some("77".parse().unwrap()) };
    api.send(Call::mirror_failover(&name("m"), failover)).await.unwrap();
    let drill = DrillStart { at: Some("78".parse().unwrap()) };
    api.send(Call::mirror_drill_start(&name("m"), drill)).await.unwrap();
    api.send(Call::mirror_drill_stop(&name("m"))).await.unwrap();
    api.send(Call::mirror_delete(&name("m"))).await.unwrap();
    api.send(Call::status()).await.unwrap();
    let expected = "volume create a, volume list, volume show a, volume resize to 2097152 a, volume access a, \
                    volume access change a, volume delete a, certificate show, partner add p, \
                    partner list, partner show p, partner remove p, mirror create m, mirror list, mirror show m, \
                    mirror set Some(Pace) m, mirror verify Some(Local) m, mirror stop m, mirror start Some(Local) m, \
                    mirror switch m, mirror orphans Some(\"/x\") m, mirror failover m, mirror failover at 77 m, \
                    drill start at 78 m, drill stop m, mirror delete m, status";
    assert_eq!(api.asked().join(", "), expected);
}

#[tokio::test]
async fn every_call_of_tenants_and_keys_reaches_its_operation_and_its_caller_is_known() {
    let api = Api::serve();
    let create = TenantCreate { name: name("t"), id: None };
    assert_eq!(api.send(Call::tenant_create(&create)).await.unwrap(), tenant(name("t")));
    api.send(Call::tenant_list()).await.unwrap();
    api.send(Call::tenant_show(&name("t"))).await.unwrap();
    api.send(Call::tenant_lock(&name("t"))).await.unwrap();
    api.send(Call::tenant_unlock(&name("t"))).await.unwrap();
    api.send(Call::tenant_delete(&name("t"))).await.unwrap();
    api.send(Call::key_rotate_volume(&name("a"))).await.unwrap();
    api.send(Call::key_rotate_tenant(&name("t"))).await.unwrap();
    api.send(Call::key_provider_test()).await.unwrap();
    api.send(Call::key_provider_init()).await.unwrap();
    let verify = AuditVerify { expected: Some("h".to_owned()) };
    assert_eq!(api.send(Call::audit_verify(&verify)).await.unwrap().lines, 2);
    let caller = format!("user {}, process {}", rustix::process::getuid().as_raw(), std::process::id());
    let expected = format!(
        "tenant create t, tenant list, tenant show t, tenant lock by {caller} t, tenant unlock t, \
         tenant delete t, key rotate volume a, key rotate tenant t, key provider test, key provider init, \
         audit verify Some(\"h\")"
    );
    assert_eq!(api.asked().join(", "), expected);
}

#[tokio::test]
async fn a_refused_operation_and_a_bug_are_problem_documents() {
    let api = Api::serve();
    let refused = api.send(Call::volume_show(&name("missing"))).await.unwrap_err();
    assert_eq!(refused.to_string(), "volume show missing: there is none");
    let (status, problem) = api.problem("GET", "/v1/volumes/fatal", b"").await;
    assert_eq!((status, problem.kind), (500, ProblemKind::Internal));
}

#[tokio::test]
async fn what_is_no_request_of_the_api_is_refused_before_the_daemon_is_asked() {
    let api = Api::serve();
    let long = vec![b' '; control::REQUEST_BYTES_MAX + 1];
    for (method, path, body, status) in [
        ("GET", "/", b"".as_slice(), 404),
        ("GET", "/v2/volumes", b"", 404),
        ("GET", "/v1/volumes/a/b", b"", 404),
        ("PUT", "/v1/volumes", b"{}", 405),
        ("POST", "/v1/status", b"{}", 405),
        ("GET", "/v1/volumes/..", b"", 400),
        ("GET", "/v1/volumes/a%2fb", b"", 400),
        ("GET", "/v1/volumes/%ff", b"", 400),
        ("POST", "/v1/volumes", b"", 400),
        ("POST", "/v1/volumes", b"not json", 400),
        ("POST", "/v1/volumes", b"{\"name\":\"a\",\"size_bytes\":1,\"x\":1}", 400),
        ("POST", "/v1/volumes", b"{\"name\":\"-\",\"size_bytes\":1}", 400),
        ("POST", "/v1/volumes", &long, 413),
        ("POST", "/v1/mirrors/m/failover", b"", 422),
        ("POST", "/v1/mirrors/m/failover", b"{\"accept_loss\":false}", 422),
    ] {
        let (answered, problem) = api.problem(method, path, body).await;
        assert_eq!(answered, status, "{method} {path}: {problem}");
        assert!(!problem.detail.contains('\n'), "{problem}");
    }
    for (create, expected) in
        [(mirror_create(&[]), "at least one volume"), (mirror_create(&["a", "b", "a"]), "each only once")]
    {
        let refused = api.send(Call::mirror_create(&create)).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    assert_eq!(api.asked(), [] as [&str; 0]);
}

#[tokio::test]
async fn garbage_on_the_socket_harms_nobody() {
    let api = Api::serve();
    for garbage in [b"\x00\xff\x16\x03garbage\r\n\r\n".as_slice(), b"GET", b""] {
        let mut stream = UnixStream::connect(api.path()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
    }
    api.send(Call::status()).await.unwrap();
}

#[tokio::test]
async fn the_socket_is_private_exclusive_and_replaced_after_a_death() {
    let api = Api::serve();
    let path = api.path();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse(_))));
    api.send(Call::status()).await.unwrap();
    api.stop.send(()).unwrap();
    api.server.await.unwrap().unwrap();
    assert!(!path.exists(), "an orderly end removes the file");
    // A daemon that was killed leaves its file.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(ControlSocket::bind(&path).unwrap());
    std::fs::write(&path, b"precious").unwrap();
    assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
