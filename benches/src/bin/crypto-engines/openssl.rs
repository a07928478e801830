//! The system's OpenSSL, by its own measurement: `openssl speed`.

use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};

use super::{Direction, UNIT_BYTES};

static VERSION: LazyLock<Option<String>> = LazyLock::new(|| {
    let output = Command::new("openssl").arg("version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    // Such as "OpenSSL 3.0.19 27 Jan 2026 (Library: ...)".
    Some(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
});

/// Name and version; none if there is no such command.
pub(crate) fn version() -> Option<&'static str> {
    VERSION.as_deref()
}

/// GB/s of CPU time, in calls of one data unit each.
pub(crate) fn measure(direction: Direction) -> Result<f64> {
    let mut command = Command::new("openssl");
    command
        .args(["speed", "-mr", "-seconds", "1", "-evp", "aes-256-xts", "-bytes"])
        .arg(UNIT_BYTES.to_string());
    match direction {
        Direction::Encrypt => {}
        Direction::Decrypt => {
            command.arg("-decrypt");
        }
    }
    let output = command.output().context("running openssl speed")?;
    ensure!(
        output.status.success(),
        "openssl speed failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8(output.stdout)?;
    bytes_per_second(&text)
        .map(|bytes| bytes / 1e9)
        .with_context(|| format!("openssl speed printed {text:?}"))
}

/// The figure in machine-readable output, which has a line `+F:25:AES-256-XTS:5337855502.91`.
fn bytes_per_second(output: &str) -> Option<f64> {
    let line = output.lines().find(|line| line.starts_with("+F:"))?;
    line.rsplit(':').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_is_found() {
        let output = "+H:4096\n+F:25:AES-256-XTS:5337855502.91\n";
        assert_eq!(bytes_per_second(output), Some(5_337_855_502.91));
        assert_eq!(bytes_per_second("+H:4096\n"), None);
    }
}
