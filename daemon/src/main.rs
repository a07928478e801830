//! The daemon `farshored`: reads its settings, starts the site, says READY, and stops in order on SIGTERM.

use std::process::ExitCode;

use anyhow::Context as _;
use daemon::settings::{Settings, SettingsError};
use daemon::site::{Site, act, install_metrics};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let settings = match Settings::from_args(std::env::args_os()) {
        Ok(settings) => settings,
        Err(SettingsError::Usage(error)) => error.exit(),
        Err(error) => return refuse(&error.to_string()),
    };
    start_log();
    if let Err(error) = keystore::memory::forbid_dumps() {
        tracing::warn!(%error, "core dumps cannot be forbidden: they would hold keys");
    }
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refuse(&format!("{error:#}")),
    }
}

/// One line that says why the daemon does not run.
#[expect(clippy::print_stderr, reason = "the line that READY and refusals are read from")]
fn refuse(reason: &str) -> ExitCode {
    eprintln!("farshored: {reason}");
    ExitCode::FAILURE
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FARSHORE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn run(settings: Settings) -> anyhow::Result<()> {
    if act(&settings)? {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(serve(settings))
}

#[expect(clippy::print_stderr, reason = "the word that supervisors and scripts wait for")]
async fn serve(settings: Settings) -> anyhow::Result<()> {
    let metrics = install_metrics()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let site = settings.site.clone();
    let running = Site::start(settings, metrics).await?;
    tracing::info!(%site, uris = running.nbd_uris().join(" "), "serving");
    eprintln!("READY");
    // Without a supervisor there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    running.stop().await;
    tracing::info!("stopped");
    Ok(())
}
