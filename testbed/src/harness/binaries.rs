//! Where the product's binaries are.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// The path of `farshored` or `farshore`: in `FARSHORE_BIN_DIR`, else in the release folder of the target directory.
///
/// # Errors
/// If it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = directory().join(name);
    ensure!(
        path.is_file(),
        "{} is missing: run `cargo build --release -p farshore-daemon -p farshore-cli`, or set FARSHORE_BIN_DIR",
        path.display()
    );
    Ok(path)
}

fn directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("FARSHORE_BIN_DIR") {
        return directory.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    target.join("release")
}
