//! The binary against a socket that answers as the daemon would: exit codes, streams and sentences.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "the whole file is a test")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use control::{
    Cache, JournalTier, MirrorMode, MirrorState, MirrorView, Overload, Problem, ProblemKind, Role,
    VolumeAccess, VolumeAccessView, VolumeState, VolumeView,
};
use tempfile::TempDir;

/// A site whose every answer is written by `answer(request number, head and body)`.
struct Site {
    folder: TempDir,
}

impl Site {
    fn answering(answer: impl Fn(usize, &str) -> (u16, String) + Send + 'static) -> Self {
        let site = Self::absent();
        let listener = UnixListener::bind(site.socket()).unwrap();
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                serve(stream.unwrap(), |request| answer(number, request));
            }
        });
        site
    }

    fn absent() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
        command.env("FARSHORE_SOCKET", self.socket()).args(arguments.split(' '));
        command
    }

    fn run(&self, arguments: &str) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }
}

fn serve(mut stream: UnixStream, answer: impl Fn(&str) -> (u16, String)) {
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    // The client sends head and body at once or in two; a body says its length.
    loop {
        let length = stream.read(&mut chunk).unwrap();
        request.extend_from_slice(&chunk[..length]);
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let expected = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if body.len() >= expected.map_or(0, |length| length.parse().unwrap()) {
            break;
        }
    }
    let (status, body) = answer(&String::from_utf8(request).unwrap());
    let head = format!("HTTP/1.1 {status} Status\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).unwrap();
}

fn mirror(state: MirrorState) -> MirrorView {
    let synchronized = state == MirrorState::ConsistentSynchronized;
    MirrorView {
        name: "m".parse().unwrap(),
        mode: MirrorMode::Async,
        role: Role::Primary,
        state,
        state_reason: None,
        synchronized,
        connected: true,
        needs_start: false,
        epoch: 1,
        position: block::Position::default(),
        recovery_point: None,
        rpo_seconds: synchronized.then_some(0.0),
        rpo_bound: false,
        rpo_budget_seconds: 900,
        backlog_bytes: 0,
        journal_tier: JournalTier::Ring,
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
        volumes: vec!["a".parse().unwrap()],
        partner: "az2".parse().unwrap(),
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

fn one_sentence(stderr: &str) {
    assert!(stderr.starts_with("farshore: ") && stderr.ends_with('\n'), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn without_a_daemon_the_sentence_names_the_socket_and_says_how_to_start() {
    let site = Site::absent();
    let (code, stdout, stderr) = site.run("status");
    assert_eq!((code, stdout.as_str()), (1, ""));
    one_sentence(&stderr);
    assert!(stderr.contains(site.socket().to_str().unwrap()), "{stderr}");
    assert!(stderr.contains("farshored --dev DIR"), "{stderr}");
}

#[test]
fn wrong_usage_exits_2_with_one_sentence() {
    for arguments in [
        "volume create",
        "volume create a --size 10GB",
        "volume create ../a --size 1MiB",
        "mirror wait m --for synchronised",
        "partner add p --address nowhere --certificate f",
        "sing",
    ] {
        let (code, stdout, stderr) = Site::absent().run(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments}");
        one_sentence(&stderr);
    }
    assert_eq!(Site::absent().run("mirror --help").0, 0);
}

#[test]
fn a_refusal_exits_1_with_the_daemons_sentence() {
    let site = Site::answering(|_, request| {
        assert!(request.starts_with("POST /v1/volumes HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with(r#"{"name":"a","size_bytes":1048576,"class":"standard","cache":"none"}"#));
        let problem = Problem::new(ProblemKind::Conflict, "volume 'a' exists: choose another name");
        (problem.status, json(&problem))
    });
    let (code, stdout, stderr) = site.run("volume create a --size 1MiB");
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr, "farshore: volume 'a' exists: choose another name\n");
}

#[test]
fn json_is_the_view_and_the_default_is_a_table() {
    let view = mirror(MirrorState::ConsistentSynchronized);
    let answer = json(&view);
    let site = Site::answering(move |_, _| (200, answer.clone()));
    let (code, stdout, _) = site.run("mirror show m --json");
    assert_eq!((code, serde_json::from_str::<MirrorView>(&stdout).unwrap()), (0, view));
    let (code, stdout, _) = site.run("mirror show m");
    assert_eq!(code, 0);
    assert!(stdout.contains("state           consistent_synchronized\n"), "{stdout}");
}

#[test]
fn failover_without_accepting_the_loss_is_refused_and_explained() {
    let mut view = mirror(MirrorState::ConsistentDisconnected);
    view.recovery_point = Some(control::RecoveryPoint {
        position: block::Position::default(),
        time: control::Timestamp::default(),
    });
    let site = Site::answering(move |_, request| {
        assert!(request.starts_with("GET "), "nothing is changed: {request}");
        (200, json(&view))
    });
    let (code, _, stderr) = site.run("mirror failover m");
    assert_eq!(code, 1);
    one_sentence(&stderr);
    assert!(stderr.contains("1970-01-01T00:00:00") && stderr.contains("--accept-loss"), "{stderr}");
}

#[test]
fn wait_ends_when_the_goal_is_reached_and_fails_at_the_timeout() {
    let site = Site::answering(|number, _| {
        let state = match number {
            0..3 => MirrorState::InconsistentCopying,
            _ => MirrorState::ConsistentSynchronized,
        };
        (200, json(&mirror(state)))
    });
    let started = Instant::now();
    assert_eq!(site.run("mirror wait m --for caught-up").0, 0);
    assert!(started.elapsed() >= Duration::from_millis(300));
    let (code, _, stderr) = site.run("mirror wait m --for idling --timeout 250ms");
    assert_eq!(code, 1);
    one_sentence(&stderr);
    assert!(stderr.contains("250ms: its last state is consistent_synchronized"), "{stderr}");
}

fn volume(warning: Option<&str>) -> VolumeView {
    VolumeView {
        name: "a".parse().unwrap(),
        id: block::VolumeId::default(),
        size_bytes: block::ByteCount(2 << 20),
        class: "ultra".to_owned(),
        iops_limit: "150000".parse().unwrap(),
        cache: Cache::None,
        tenant: None,
        state: VolumeState::Online,
        state_reason: None,
        mirror: None,
        access: VolumeAccess::default(),
        uris: vec![],
        warning: warning.map(str::to_owned),
    }
}

#[test]
fn a_warning_is_a_sentence_on_stderr_beside_the_answer() {
    let view = volume(Some("the limit may not be reached"));
    let site = Site::answering(move |_, _| (201, json(&view)));
    let (code, stdout, stderr) = site.run("volume create a --size 2MiB");
    assert_eq!((code, stderr.as_str()), (0, "farshore: warning: the limit may not be reached\n"));
    assert!(stdout.contains("size") && !stdout.contains("warning"), "{stdout}");
}

#[test]
fn a_volume_is_created_with_the_words_of_access() {
    let site = Site::answering(|number, request| {
        let access = r#","access":{"tls":"required","read_only":true,"allow":[{"identity":"h1","read_only":true}],"any_host":false,"here_first":false}}"#;
        assert_eq!(request.contains("\"access\""), number == 0, "{request}");
        assert!(number > 0 || request.ends_with(access), "{request}");
        (200, json(&volume(None)))
    });
    assert_eq!(site.run("volume create a --size 1MiB --tls required --read-only --allow h1:ro").0, 0);
    assert_eq!(site.run("volume create a --size 1MiB").0, 0);
    assert_eq!(Site::absent().run("volume create a --size 1MiB --revoke h1").0, 2);
}

#[test]
fn what_the_partner_was_not_told_is_a_warning_beside_the_access() {
    let site = Site::answering(|_, _| {
        let warning = Some("the replica of volume 'a' may not have it".to_owned());
        (200, json(&VolumeAccessView { warning, ..VolumeAccessView::default() }))
    });
    let (code, stdout, stderr) = site.run("volume access a --read-only --here-first");
    assert_eq!((code, stdout.as_str()), (0, "TLS     optional\naccess  read-write\nhosts   any\n"));
    assert_eq!(stderr, "farshore: warning: the replica of volume 'a' may not have it\n");
}

#[test]
fn a_resize_asks_for_the_new_size() {
    let site = Site::answering(|_, request| {
        assert!(request.starts_with("POST /v1/volumes/a/resize HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with(r#"{"size_bytes":2097152}"#), "{request}");
        (200, json(&volume(None)))
    });
    assert_eq!(site.run("volume resize a --size 2MiB").0, 0);
}

#[test]
fn access_is_shown_without_flags_and_changed_with_them() {
    let site = Site::answering(|number, request| {
        let expected = match number {
            0 => "GET /v1/volumes/a/access HTTP/1.1\r\n",
            _ => "POST /v1/volumes/a/access HTTP/1.1\r\n",
        };
        assert!(request.starts_with(expected), "{request}");
        let body = r#"{"tls":"required","read_only":false,"allow":[{"identity":"h1","read_only":false},{"identity":"h2","read_only":true}],"revoke":["h3"],"any_host":false,"here_first":false}"#;
        assert!(number == 0 || request.ends_with(body), "{request}");
        let hosts = vec!["h1".parse().unwrap(), "h2:ro".parse().unwrap()];
        (200, json(&VolumeAccess { hosts, ..VolumeAccess::default() }))
    });
    let (code, stdout, _) = site.run("volume access a");
    assert_eq!((code, stdout.as_str()), (0, "TLS     required\naccess  read-write\nhosts   h1:rw, h2:ro\n"));
    let flags = "volume access a --tls required --read-write --allow h1 --allow h2:ro --revoke h3";
    assert_eq!(site.run(flags).0, 0);
    assert_eq!(Site::absent().run("volume access a --read-only --read-write").0, 2);
}

#[test]
fn a_certificate_file_that_is_none_is_named() {
    let site = Site::absent();
    let long = site.folder.path().join("long");
    std::fs::write(&long, vec![b'x'; 10_000]).unwrap();
    for path in [Path::new("/nonexistent/file"), &long] {
        let (code, _, stderr) =
            site.run(&format!("partner add p --address h:1 --certificate {}", path.display()));
        assert_eq!(code, 1);
        one_sentence(&stderr);
        assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    }
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let view = mirror(MirrorState::Idling);
    let list = json(&vec![view; 2000]);
    let site = Site::answering(move |_, _| (200, list.clone()));
    let mut child =
        site.command("mirror list --json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
}
