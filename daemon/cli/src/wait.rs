//! `mirror wait`: polls the API until the mirror is where it should be.

use std::time::Duration;

use anyhow::bail;
use block::VolumeName;
use control::{Call, MirrorView};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::arguments::Goal;
use crate::client::Client;

/// How often the mirror is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The longest wait, a year: beyond it the clock's arithmetic could overflow.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Waits until `mirror` reaches `goal`. A daemon that was there and goes away is waited for: it may restart.
///
/// # Errors
/// The time is over, the daemon was never there, or it refuses.
pub(crate) async fn wait(
    client: &Client,
    mirror: &VolumeName,
    goal: Goal,
    timeout: Duration,
) -> anyhow::Result<MirrorView> {
    let call = Call::mirror_show(mirror);
    let started = Instant::now();
    let deadline = started + timeout.min(TIMEOUT_MAX);
    let mut seen: Option<MirrorView> = None;
    let mut next_look = started;
    loop {
        let absent = match timeout_at(deadline, client.send(&call)).await {
            Ok(Ok(view)) if reached(&view, goal) => return Ok(view),
            Ok(Ok(view)) => {
                seen = Some(view);
                None
            }
            Ok(Err(error)) if seen.is_some() && error.is_absence() => Some(error.to_string()),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => Some("the daemon did not answer".to_owned()),
        };
        next_look += POLL_INTERVAL;
        if next_look >= deadline {
            let waited = humantime::format_duration(timeout);
            let last = last_words(seen.as_ref(), absent);
            bail!("mirror '{mirror}' was not {goal} within {waited}: {last}");
        }
        sleep_until(next_look).await;
    }
}

fn reached(view: &MirrorView, goal: Goal) -> bool {
    match goal {
        Goal::CaughtUp => view.is_caught_up(),
        Goal::State(state) => view.state == state,
    }
}

/// What was seen last, for the refusal.
fn last_words(seen: Option<&MirrorView>, absent: Option<String>) -> String {
    let Some(view) = seen else {
        return absent.unwrap_or_else(|| "it was not seen".to_owned());
    };
    let connected = if view.connected { "connected" } else { "not connected" };
    let rpo = view.rpo_seconds.map_or("unknown".to_owned(), |rpo| format!("{rpo:.1} s"));
    let mut words = format!(
        "its last state is {}, {connected}, backlog {} bytes, RPO {rpo}",
        view.state, view.backlog_bytes
    );
    for more in [view.state_reason.as_deref(), absent.as_deref()].into_iter().flatten() {
        words.push_str("; ");
        words.push_str(more);
    }
    words
}
