//! Imports between crates run one way (docs/ARCHITECTURE.md, "Crates and their arrows"), and pure crates import
//! nothing that touches the kernel.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{CargoOpt, DependencyKind, Metadata, MetadataCommand};

/// Every crate of the workspace with what it may import. `crypto` is importable by `keystore` and `daemon` only, so
/// that replication cannot see plaintext.
const ARROWS: &[(&str, &[&str])] = &[
    ("block", &[]),
    ("crypto", &["block"]),
    ("keystore", &["block", "crypto"]),
    ("journal", &["block"]),
    ("protocol", &["block", "journal"]),
    ("replicator", &["block", "journal", "protocol"]),
    ("frontend", &["block"]),
    ("engine", &["block", "journal"]),
    ("store", &["block"]),
    ("control", &["block"]),
    ("cli", &["block", "control"]),
    ("daemon", DAEMON),
    ("benches", ANY),
    ("testbed", ANY),
];

/// All of the product but the command line.
const DAEMON: &[&str] = &[
    "block",
    "crypto",
    "keystore",
    "journal",
    "protocol",
    "replicator",
    "frontend",
    "engine",
    "store",
    "control",
];

/// What may import any crate of the product, and is imported by none.
const ANY: &[&str] = &[
    "block",
    "crypto",
    "keystore",
    "journal",
    "protocol",
    "replicator",
    "frontend",
    "engine",
    "store",
    "control",
    "cli",
    "daemon",
];

/// No clock, random source, thread, file, socket or async inside.
const PURE: &[&str] = &["block", "crypto", "journal", "protocol", "frontend", "engine", "control"];

/// What a pure crate must not import: runtimes, the kernel's interfaces, random sources, databases.
const IMPURE: &[&str] = &[
    "async-std",
    "axum",
    "crossbeam",
    "futures",
    "getrandom",
    "h2",
    "hyper",
    "hyper-util",
    "io-uring",
    "libc",
    "memmap2",
    "metrics",
    "mio",
    "nix",
    "parking_lot",
    "quinn",
    "quinn-proto",
    "rand",
    "rayon",
    "rcgen",
    "redb",
    "rustix",
    "rustls",
    "sd-notify",
    "smol",
    "socket2",
    "tempfile",
    "tokio",
    "tracing-subscriber",
];

/// An import: from a crate to another one, by names without the product's prefix.
type Arrow = (String, String);

fn metadata() -> Result<Metadata> {
    let mut command = MetadataCommand::new();
    command.manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    command.features(CargoOpt::AllFeatures).no_deps();
    command.other_options(["--offline".to_owned(), "--locked".to_owned()]);
    command.exec().context("cargo metadata")
}

fn short(name: &str) -> String {
    name.strip_prefix("farshore-").unwrap_or(name).to_owned()
}

/// Imports between crates of the workspace, of every kind: a test may not import what its crate may not.
fn workspace_arrows(metadata: &Metadata) -> Vec<Arrow> {
    let names: BTreeSet<_> =
        metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
    let mut arrows = Vec::new();
    for package in metadata.workspace_packages() {
        for dependency in package.dependencies.iter().filter(|dependency| names.contains(&dependency.name)) {
            arrows.push((short(&package.name), short(&dependency.name)));
        }
    }
    arrows
}

/// Imports of pure crates from outside the workspace, but for those of their tests.
fn pure_imports(metadata: &Metadata) -> Vec<Arrow> {
    let mut arrows = Vec::new();
    for package in metadata.workspace_packages() {
        let name = short(&package.name);
        if PURE.contains(&name.as_str()) {
            let outside = package
                .dependencies
                .iter()
                .filter(|dependency| dependency.kind != DependencyKind::Development);
            arrows.extend(outside.map(|dependency| (name.clone(), dependency.name.clone())));
        }
    }
    arrows
}

fn forbidden_arrows(arrows: &[Arrow]) -> Vec<&Arrow> {
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let permits = |arrow: &&Arrow| {
        let targets = allowed.get(arrow.0.as_str()).copied().unwrap_or_default();
        !targets.contains(&arrow.1.as_str())
    };
    arrows.iter().filter(permits).collect()
}

fn impure_arrows(arrows: &[Arrow]) -> Vec<&Arrow> {
    arrows.iter().filter(|arrow| IMPURE.contains(&arrow.1.as_str())).collect()
}

#[test]
fn crates_import_only_what_the_architecture_allows() -> Result<()> {
    let metadata = metadata()?;
    let arrows = workspace_arrows(&metadata);
    ensure!(arrows.len() > 10, "only {} imports found", arrows.len());
    let forbidden = forbidden_arrows(&arrows);
    ensure!(forbidden.is_empty(), "not allowed: {forbidden:?}");
    Ok(())
}

#[test]
fn every_crate_is_on_the_list() -> Result<()> {
    let metadata = metadata()?;
    let found: BTreeSet<_> =
        metadata.workspace_packages().iter().map(|package| short(&package.name)).collect();
    let listed: BTreeSet<_> = ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect();
    ensure!(found == listed, "workspace {found:?}, list {listed:?}");
    Ok(())
}

#[test]
fn pure_crates_import_nothing_that_touches_the_kernel() -> Result<()> {
    let metadata = metadata()?;
    let impure = pure_imports(&metadata);
    let found = impure_arrows(&impure);
    ensure!(found.is_empty(), "not pure: {found:?}");
    Ok(())
}

#[test]
fn pure_crates_forbid_clocks_files_and_threads() -> Result<()> {
    let metadata = metadata()?;
    for package in metadata.workspace_packages() {
        if !PURE.contains(&short(&package.name).as_str()) {
            continue;
        }
        let path = package.manifest_path.with_file_name("clippy.toml");
        let text = std::fs::read_to_string(&path).with_context(|| path.to_string())?;
        for banned in
            ["std::time::Instant::now", "std::thread::spawn", "std::fs::File", "std::collections::HashMap"]
        {
            ensure!(text.contains(banned), "{path} does not forbid {banned}");
        }
    }
    Ok(())
}

#[test]
fn the_check_finds_planted_arrows() {
    let arrow = |from: &str, to: &str| (from.to_owned(), to.to_owned());
    let planted = [
        arrow("replicator", "crypto"),
        arrow("engine", "store"),
        arrow("daemon", "testbed"),
        arrow("cli", "daemon"),
        arrow("new-crate", "block"),
    ];
    assert_eq!(forbidden_arrows(&planted).len(), planted.len());
    assert_eq!(impure_arrows(&[arrow("engine", "tokio"), arrow("engine", "bytes")]).len(), 1);
}
