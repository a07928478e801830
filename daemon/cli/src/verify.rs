//! `mirror verify`: begins it, and polls the API until it has ended.

use std::time::Duration;

use anyhow::{Context, bail};
use block::VolumeName;
use control::{Call, MirrorVerify, VerifyState, VerifyView};

use crate::client::Client;

/// How often the mirror is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Begins a verify and waits for its report; it goes on if this command is ended.
///
/// # Errors
/// The daemon refuses or goes away, or this side is the primary no longer.
pub(crate) async fn verify(
    client: &Client,
    mirror: &VolumeName,
    verify: MirrorVerify,
) -> anyhow::Result<VerifyView> {
    let mut view = client.send(&Call::mirror_verify(mirror, verify)).await?;
    loop {
        let report = view.verify.with_context(|| {
            format!(
                "mirror '{mirror}' lost its verify: the side changed its role or restarted; begin it again"
            )
        })?;
        if report.state != VerifyState::Running {
            return Ok(report);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
        view = client.send(&Call::mirror_show(mirror)).await?;
    }
}

/// A report that is not clean ends the command with a failure.
///
/// # Errors
/// What is not as it should be.
pub(crate) fn judge(mirror: &VolumeName, report: &VerifyView) -> anyhow::Result<()> {
    if let Some(reason) = &report.reason {
        bail!("the verify of mirror '{mirror}' was given up: {reason}");
    }
    if !report.is_clean() {
        let differing = report.differing_bytes.saturating_sub(report.repaired_bytes);
        bail!(
            "mirror '{mirror}' is not as it should be: {differing} bytes differ and {} could not be read; \
             'farshore mirror verify {mirror} --repair-from local' overwrites the partner's blocks",
            report.unreadable_bytes
        );
    }
    Ok(())
}
