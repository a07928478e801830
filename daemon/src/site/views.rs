//! Objects as operators see them.

use control::{
    Iops, MirrorMemory, MirrorView, PartnerView, ProblemKind, RecoveryPoint, ResyncView, SyncView, Timestamp,
    VolumeState, VolumeView, WindowView,
};
use protocol::Role;

use super::volumes::problem;
use super::{Site, lock};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, PartnerRecord, VolumeRecord};
use crate::group::MirrorSnapshot;
use crate::shard::GroupSnapshot;

impl Site {
    pub(super) async fn volume_view(&self, volume: &VolumeRecord) -> VolumeView {
        let snapshot = match self.group_of_volume(volume.id) {
            Some(key) => self.snapshot(key).await.ok(),
            None => None,
        };
        let (state, state_reason) = self.volume_state(volume, snapshot.as_ref());
        let tls_only = volume.access.tls_required || !volume.access.hosts.is_empty();
        let uris = lock(&self.nbd_uris)
            .iter()
            .filter(|uri| !tls_only || uri.starts_with("nbds"))
            .map(|uri| with_export(uri, volume.name.as_str()))
            .collect();
        VolumeView {
            name: volume.name.clone(),
            id: volume.id,
            size_bytes: volume.size,
            class: volume.class.clone(),
            iops_limit: Iops(self.limit(volume)),
            cache: volume.cache,
            tenant: self.catalogue().tenant_by_id(volume.tenant()).map(|tenant| tenant.name),
            state,
            state_reason,
            mirror: self.catalogue().mirror_of(volume.id).map(|(mirror, _)| mirror.name),
            access: volume.access.clone(),
            uris,
            warning: None,
        }
    }

    fn volume_state(
        &self,
        volume: &VolumeRecord,
        snapshot: Option<&GroupSnapshot>,
    ) -> (VolumeState, Option<String>) {
        if let Some(reason) = self.lock_of(volume) {
            return (VolumeState::Locked, Some(reason));
        }
        let Some(snapshot) = snapshot else {
            let trouble = lock(&self.troubles).get(&volume.id).cloned();
            let locked = trouble.as_ref().is_some_and(|trouble| trouble.contains("is locked"));
            return (if locked { VolumeState::Locked } else { VolumeState::Offline }, trouble);
        };
        if snapshot.volumes.iter().any(|counters| counters.poisoned) {
            let reason = "a flush failed: writes are refused until farshored restarts".to_owned();
            return (VolumeState::Poisoned, Some(reason));
        }
        match (&snapshot.presented, &snapshot.state) {
            (Ok(()), _) => (VolumeState::Online, None),
            (Err(_), Some(state)) if state.role == Role::Primary => {
                (VolumeState::Waiting, snapshot.presented.clone().err())
            }
            (Err(_), Some(state)) if state.diverged => {
                (VolumeState::Fenced, snapshot.presented.clone().err())
            }
            (Err(_), Some(_)) => (VolumeState::Secondary, snapshot.presented.clone().err()),
            (Err(_), None) => (VolumeState::Offline, snapshot.presented.clone().err()),
        }
    }

    pub(super) async fn mirror_view(&self, mirror: &MirrorRecord) -> Result<MirrorView, OperationError> {
        let offline = || {
            let detail = format!("mirror '{}' is offline: the daemon's log says why", mirror.name);
            problem(ProblemKind::Unavailable, detail)
        };
        let key = self.group_of_mirror(mirror.id).ok_or_else(offline)?;
        let snapshot = self.snapshot(key).await?;
        let (Some(view), Some(state)) = (&snapshot.mirror, &snapshot.state) else {
            return Err(offline());
        };
        let names: Vec<_> = self.mirror_volumes(mirror)?.into_iter().map(|volume| volume.name).collect();
        let verify = snapshot.verify.as_ref().map(|report| super::verify::verify_view(report, &names));
        let waiting = snapshot.presented.clone().err().filter(|_| view.role == Role::Primary);
        Ok(MirrorView {
            name: mirror.name.clone(),
            mode: mirror.mode,
            role: match view.role {
                Role::Primary => control::Role::Primary,
                Role::Secondary => control::Role::Secondary,
            },
            state: view.state.name().parse().map_err(super::mirrors::internal)?,
            state_reason: waiting.or_else(|| view.reason.clone()),
            synchronized: view.synchronized,
            connected: view.connected,
            needs_start: view.needs_start,
            epoch: state.epoch.0,
            position: view.position,
            recovery_point: view.recovery_point.map(|(position, time)| RecoveryPoint {
                position,
                time: Timestamp(time.unwrap_or_default()),
            }),
            rpo_seconds: view.rpo.map(|rpo| rpo.as_secs_f64()),
            rpo_bound: view.rpo_is_bound,
            rpo_budget_seconds: mirror.rpo_seconds.get(),
            backlog_bytes: view.backlog.0,
            journal_tier: tier(view),
            resync: view
                .resync_remaining
                .map(|remaining| ResyncView { remaining_bytes: remaining.0, eta_seconds: None }),
            orphaned_bytes: view.orphaned.0,
            on_link_failure: mirror.on_link_failure,
            sync: view
                .sync
                .as_ref()
                .map(|sync| SyncView { in_force: sync.in_force, text: sync.text.clone() }),
            overload: mirror.overload,
            pressure: super::policy::pressure_view(view.pressure),
            bandwidth: mirror.bandwidth,
            resync_rate: mirror.resync_rate,
            verify,
            memory: MirrorMemory {
                ring_bytes: view.memory.0,
                ring_bytes_max: self.settings.ring.0,
                map_bytes: 0,
                spill_bytes: view.spilled.0,
                spill_bytes_max: self.settings.spill.0,
            },
            drill: view.drill.map(|drill| self.drill_view(mirror, drill)),
            window: view.window.map(|window| WindowView {
                oldest: window
                    .oldest
                    .map(|(position, time)| RecoveryPoint { position, time: Timestamp(time) }),
                seconds: window.span.as_secs_f64(),
                seconds_wanted: self.settings.retention.window.as_secs(),
                bytes: window.waiting_bytes,
            }),
            volumes: names,
            partner: mirror.partner.clone(),
        })
    }

    /// All mirrors that can be looked at.
    pub(super) async fn mirror_views(&self) -> Vec<MirrorView> {
        let mut views = Vec::new();
        for mirror in self.catalogue().mirrors() {
            views.extend(self.mirror_view(&mirror).await.ok());
        }
        views
    }

    /// Open connections of hosts, by volume.
    pub(super) async fn connection_counts(&self) -> Vec<(String, u64)> {
        let groups: Vec<_> =
            lock(&self.groups).entries.iter().map(|(key, entry)| (*key, entry.clone())).collect();
        let mut counts = Vec::new();
        for (key, entry) in groups {
            let Ok(snapshot) = self.snapshot(key).await else {
                continue;
            };
            for (id, connections) in entry.volumes.iter().zip(snapshot.connections) {
                if let Some(volume) = self.catalogue().volume_by_id(*id) {
                    counts.push((volume.name.to_string(), u64::try_from(connections).unwrap_or(u64::MAX)));
                }
            }
        }
        counts
    }

    pub(super) fn partner_view(&self, partner: &PartnerRecord, answers: Result<(), String>) -> PartnerView {
        let fingerprint = self.pins.find(partner.name.as_str()).map(|pin| pin.fingerprint().to_string());
        PartnerView {
            name: partner.name.clone(),
            address: partner.address.clone(),
            fingerprint: fingerprint.unwrap_or_default(),
            connected: answers.is_ok(),
            last_error: answers.err(),
        }
    }
}

fn tier(view: &MirrorSnapshot) -> control::JournalTier {
    match view.tier {
        protocol::JournalTier::Ring => control::JournalTier::Ring,
        protocol::JournalTier::Spill => control::JournalTier::Spill,
        protocol::JournalTier::DirtyMap => control::JournalTier::DirtyMap,
    }
}

/// The URI of an export: the name goes into the path, before a Unix socket's query.
fn with_export(uri: &str, export: &str) -> String {
    match uri.split_once("/?") {
        Some((scheme, query)) => format!("{scheme}/{export}?{query}"),
        None => format!("{uri}/{export}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn export_names_go_into_the_path_of_the_uri() {
        assert_eq!(with_export("nbd://127.0.0.1:10809", "db"), "nbd://127.0.0.1:10809/db");
        assert_eq!(with_export("nbd+unix:///?socket=/run/x", "db"), "nbd+unix:///db?socket=/run/x");
    }
}
