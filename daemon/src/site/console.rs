//! The console address: `/metrics` for Prometheus.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::Listener;
use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::{TcpListener, TcpStream};

use super::{Site, descriptors};

/// Latency buckets in seconds: from a cached read to a stalled disk.
const LATENCY_BUCKETS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// Installs the recorder; before any metric is made.
///
/// # Errors
/// If one is installed already.
pub fn install_metrics() -> anyhow::Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new().set_buckets(&LATENCY_BUCKETS)?;
    let handle = builder.install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_volumes();
    describe_mirrors();
}

fn describe_volumes() {
    describe_counter!("farshore_volume_reads_total", "Read commands answered.");
    describe_counter!("farshore_volume_read_bytes_total", Unit::Bytes, "Bytes of read commands answered.");
    describe_histogram!(
        "farshore_volume_read_seconds",
        Unit::Seconds,
        "Time from a read's arrival to its answer."
    );
    describe_counter!("farshore_volume_writes_total", "Write commands answered.");
    describe_counter!("farshore_volume_write_bytes_total", Unit::Bytes, "Bytes of write commands answered.");
    describe_histogram!(
        "farshore_volume_write_seconds",
        Unit::Seconds,
        "Time from a write's arrival to its answer."
    );
    describe_counter!("farshore_volume_flushes_total", "Flush commands answered.");
    describe_histogram!(
        "farshore_volume_flush_seconds",
        Unit::Seconds,
        "Time from a flush's arrival to its answer."
    );
    describe_counter!("farshore_volume_trims_total", "Trim commands answered.");
    describe_counter!("farshore_volume_write_zeroes_total", "Write-zeroes commands answered.");
    describe_counter!("farshore_volume_errors_total", "Commands answered with an error.");
    describe_counter!("farshore_volume_throttled_total", "Commands that waited for the IOPS limit.");
    describe_gauge!("farshore_volume_connections", "Open connections of hosts.");
}

fn describe_mirrors() {
    describe_gauge!(
        "farshore_mirror_rpo_seconds",
        Unit::Seconds,
        "Age of the oldest write the target lacks."
    );
    describe_gauge!("farshore_mirror_rpo_budget_seconds", Unit::Seconds, "The RPO budget.");
    describe_gauge!(
        "farshore_mirror_rpo_alert_percent",
        "Part of the RPO budget, in percent, for which an alert stands: 0, 50, 80 or 100."
    );
    describe_gauge!(
        "farshore_mirror_limit_lowered_percent",
        "By how many percent the hosts' limits are lowered (policy pace)."
    );
    describe_gauge!(
        "farshore_mirror_host_writes",
        "1 for what hosts' writes meet (policy stop), 0 for the others."
    );
    describe_gauge!("farshore_mirror_verify_running", "1 while a verify runs.");
    describe_gauge!(
        "farshore_mirror_verify_differing_bytes",
        Unit::Bytes,
        "Bytes that the last verify found to differ and that were not repaired."
    );
    describe_gauge!("farshore_mirror_backlog_bytes", Unit::Bytes, "Bytes that the target lacks.");
    describe_gauge!("farshore_mirror_state", "1 for the state the mirror is in, 0 for the others.");
    describe_gauge!("farshore_mirror_tier", "1 for the journal tier in use, 0 for the others.");
    describe_gauge!("farshore_mirror_connected", "1 while a session with the partner is open.");
    describe_gauge!("farshore_mirror_ring_bytes", Unit::Bytes, "Payload bytes in the mirror's RAM ring.");
}

/// Serves until the listener fails.
pub(super) async fn serve(listener: TcpListener, site: Arc<Site>, handle: PrometheusHandle) {
    let router = Router::new().route("/metrics", get(metrics_page)).with_state((site, handle));
    if let Err(error) = axum::serve(Modest(listener), router).await {
        tracing::error!(%error, "the console's listener failed");
    }
}

/// Binds the console's listener.
pub(super) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// A listener that leaves descriptors to operators and partners: connections beyond are closed.
struct Modest(TcpListener);

impl Listener for Modest {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            // It waits by itself when the system refuses.
            let (stream, address) = Listener::accept(&mut self.0).await;
            if descriptors::leaves_free(&stream, descriptors::CONSOLE_LEAVES) {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

async fn metrics_page(State((site, handle)): State<(Arc<Site>, PrometheusHandle)>) -> impl IntoResponse {
    refresh(&site).await;
    handle.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render())
}

/// Sets the gauges that are read from the groups.
async fn refresh(site: &Site) {
    for view in site.mirror_views().await {
        let mirror = || view.name.to_string();
        let flag = |on: bool| if on { 1.0 } else { 0.0 };
        if let Some(rpo) = view.rpo_seconds {
            gauge!("farshore_mirror_rpo_seconds", "mirror" => mirror()).set(rpo);
        }
        gauge!("farshore_mirror_rpo_budget_seconds", "mirror" => mirror())
            .set(f64::from(view.rpo_budget_seconds));
        gauge!("farshore_mirror_backlog_bytes", "mirror" => mirror()).set(approximate(view.backlog_bytes));
        gauge!("farshore_mirror_connected", "mirror" => mirror()).set(flag(view.connected));
        gauge!("farshore_mirror_ring_bytes", "mirror" => mirror()).set(approximate(view.memory.ring_bytes));
        gauge!("farshore_mirror_spill_bytes", "mirror" => mirror()).set(approximate(view.memory.spill_bytes));
        gauge!("farshore_mirror_rpo_alert_percent", "mirror" => mirror())
            .set(f64::from(view.pressure.rpo_alert_percent));
        gauge!("farshore_mirror_limit_lowered_percent", "mirror" => mirror())
            .set(f64::from(view.pressure.limit_lowered_percent));
        for writes in control::HostWrites::ALL {
            gauge!("farshore_mirror_host_writes", "mirror" => mirror(), "writes" => writes.as_str())
                .set(flag(*writes == view.pressure.host_writes));
        }
        if let Some(verify) = &view.verify {
            gauge!("farshore_mirror_verify_running", "mirror" => mirror())
                .set(flag(verify.state == control::VerifyState::Running));
            gauge!("farshore_mirror_verify_differing_bytes", "mirror" => mirror())
                .set(approximate(verify.differing_bytes.saturating_sub(verify.repaired_bytes)));
        }
        for state in control::MirrorState::ALL {
            gauge!("farshore_mirror_state", "mirror" => mirror(), "state" => state.as_str())
                .set(flag(*state == view.state));
        }
        for tier in control::JournalTier::ALL {
            gauge!("farshore_mirror_tier", "mirror" => mirror(), "tier" => tier.as_str())
                .set(flag(*tier == view.journal_tier));
        }
    }
    for (volume, connections) in site.connection_counts().await {
        gauge!("farshore_volume_connections", "volume" => volume).set(approximate(connections));
    }
}

/// Exact up to 2^53, which is more bytes than there are.
#[expect(clippy::cast_precision_loss, reason = "metrics are floating point numbers")]
fn approximate(value: u64) -> f64 {
    value as f64
}
