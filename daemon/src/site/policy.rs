//! What an operator may change of a mirror while it runs: the catalogue first, then the group.

use std::sync::Arc;
use std::time::Duration;

use block::VolumeName;
use control::{HostWrites, MirrorSet, MirrorView, PressureView, ProblemKind};

use super::Site;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::MirrorRecord;
use crate::group::{MirrorPolicy, Pressure, Writes};
use crate::shard::Verb;

/// Of the memory for hosts' payloads one volume's held writes may have this part: the rest is for the others.
const HOLD_PART: u64 = 8;

impl Site {
    /// The policy of a mirror as its group needs it.
    pub(super) fn mirror_policy(&self, mirror: &MirrorRecord) -> MirrorPolicy {
        MirrorPolicy {
            rpo_budget: Duration::from_secs(u64::from(mirror.rpo_seconds.get())),
            overload: mirror.overload,
            hold: self.settings.overload_hold,
            hold_bytes: self.settings.receive_pool.0 / HOLD_PART,
            bandwidth: mirror.bandwidth.0,
            resync_rate: mirror.resync_rate.0,
            mode: mirror.mode,
            on_link_failure: mirror.on_link_failure,
        }
    }

    /// `mirror set`.
    pub(super) async fn set_mirror_policy(
        self: &Arc<Self>,
        name: &VolumeName,
        set: MirrorSet,
    ) -> Result<MirrorView, OperationError> {
        if set == MirrorSet::default() {
            let detail = format!("mirror '{name}' stays as it is: say what is to change, as in --rpo 15m");
            return Err(problem(ProblemKind::Invalid, detail));
        }
        let (mirror, key) = self.known_mirror(name)?;
        let wanted = changed(mirror, set);
        let site = Arc::clone(self);
        let stored = tokio::task::spawn_blocking(move || site.catalogue().update_policy(&wanted));
        let (mirror, notices) = stored.await.map_err(internal)??;
        for notice in notices {
            tracing::warn!("{notice}");
        }
        self.verb(key, Verb::Policy(self.mirror_policy(&mirror))).await?;
        self.mirror_view(&mirror).await
    }
}

fn changed(mirror: MirrorRecord, set: MirrorSet) -> MirrorRecord {
    MirrorRecord {
        mode: set.mode.unwrap_or(mirror.mode),
        on_link_failure: set.on_link_failure.unwrap_or(mirror.on_link_failure),
        rpo_seconds: set.rpo_seconds.unwrap_or(mirror.rpo_seconds),
        overload: set.overload.unwrap_or(mirror.overload),
        bandwidth: set.bandwidth.unwrap_or(mirror.bandwidth),
        resync_rate: set.resync_rate.unwrap_or(mirror.resync_rate),
        ..mirror
    }
}

/// How the group's pressure reads to operators.
pub(super) const fn pressure_view(pressure: Pressure) -> PressureView {
    PressureView {
        rpo_alert_percent: pressure.alert,
        limit_lowered_percent: pressure.lowered,
        host_writes: match pressure.writes {
            Writes::Served => HostWrites::Served,
            Writes::Held => HostWrites::Held,
            Writes::Refused => HostWrites::Refused,
        },
    }
}
