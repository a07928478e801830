//! The operators' calls.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use block::VolumeName;
use control::{
    AuditVerify, AuditView, CertificateView, Counts, DrillStart, FailoverRequest, FailoverResult,
    MirrorCreate, MirrorSet, MirrorStart, MirrorVerify, MirrorView, OrphansRequest, OrphansView, PartnerAdd,
    PartnerView, ProblemKind, ProviderView, RecoveryPoint, RecoveryTarget, RotationView, Side, StatusView,
    TenantCreate, TenantView, Timestamp, VolumeAccessChange, VolumeAccessView, VolumeCreate, VolumeResize,
    VolumeView,
};
use crypto::VolumeCipher;
use replicator::PinnedCertificate;
use tokio::sync::oneshot;

use super::mirrors::internal;
use super::removal::Removed;
use super::volumes::problem;
use super::{Site, lock};
use crate::api::{OperationError, Operations};
use crate::catalogue::{MirrorRecord, PartnerRecord, VolumeRecord};
use crate::group::{LossReport, RewindTo};
use crate::settings::ConsoleAddress;
use crate::shard::{GroupKey, Verb};

type Outcome<T> = Result<T, OperationError>;

/// A delete is answered after so long though its space is still being given back; `status` then tells of it.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(30);

impl Site {
    pub(super) fn known_volume(&self, name: &VolumeName) -> Outcome<VolumeRecord> {
        self.catalogue().volume(name).ok_or_else(|| {
            problem(
                ProblemKind::NotFound,
                format!("volume '{name}' does not exist: see 'farshore volume list'"),
            )
        })
    }

    fn known_partner(&self, name: &VolumeName) -> Outcome<PartnerRecord> {
        self.catalogue().partner(name).ok_or_else(|| {
            problem(
                ProblemKind::NotFound,
                format!("partner '{name}' is not known: see 'farshore partner list'"),
            )
        })
    }

    pub(super) fn known_mirror(&self, name: &VolumeName) -> Outcome<(MirrorRecord, GroupKey)> {
        let mirror = self.catalogue().mirror(name).ok_or_else(|| {
            problem(
                ProblemKind::NotFound,
                format!("mirror '{name}' does not exist: see 'farshore mirror list'"),
            )
        })?;
        let key = self.group_of_mirror(mirror.id).ok_or_else(|| {
            problem(
                ProblemKind::Unavailable,
                format!("mirror '{name}' is offline: the daemon's log says why"),
            )
        })?;
        Ok((mirror, key))
    }

    /// Deletes a volume; its space is given back behind that. The caller holds `changes`.
    async fn delete_volume(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Outcome<Option<oneshot::Receiver<Removed>>> {
        let volume = self.known_volume(name)?;
        let id = volume.id;
        if let Some((mirror, _)) = self.catalogue().mirror_of(volume.id) {
            let detail = format!("volume '{name}' is in mirror '{}': delete the mirror first", mirror.name);
            return Err(problem(ProblemKind::Conflict, detail));
        }
        if let Some(key) = self.group_of_volume(volume.id) {
            let connections: usize = self.snapshot(key).await?.connections.iter().sum();
            if connections > 0 {
                let detail = format!(
                    "volume '{name}' is in use by {connections} connections: disconnect its hosts first"
                );
                return Err(problem(ProblemKind::Conflict, detail));
            }
            self.end_group(key).await?;
        }
        self.exports().remove(name.as_str());
        let site = Arc::clone(self);
        let deleted = tokio::task::spawn_blocking(move || {
            let folder = site.catalogue().delete_volume(volume.id)?;
            Ok::<_, OperationError>((folder, site.catalogue().destroy_key(&volume)))
        });
        let (folder, destroyed) = deleted.await.map_err(internal)??;
        lock(&self.troubles).remove(&id);
        let removal = folder.map(|folder| self.removals.begin(name.as_str(), folder));
        destroyed.map_err(|error| {
            let detail = format!("volume '{name}' is deleted, but its key is not destroyed yet: {error}");
            problem(ProblemKind::Internal, detail)
        })?;
        Ok(removal)
    }

    fn store_partner(&self, add: PartnerAdd) -> Outcome<PartnerRecord> {
        let certificate = PinnedCertificate::from_pem(&add.certificate).map_err(|error| {
            let detail = format!("the certificate of partner '{}' cannot be used: {error}", add.name);
            problem(ProblemKind::Invalid, detail)
        })?;
        if certificate.fingerprint() == self.identity.fingerprint() {
            let detail =
                format!("partner '{}' has this site's own certificate: give the partner's", add.name);
            return Err(problem(ProblemKind::Invalid, detail));
        }
        let partner = PartnerRecord { name: add.name, address: add.address, certificate: add.certificate };
        if self.catalogue().partner(&partner.name).is_some() {
            let detail = format!("partner '{}' is known already: remove it first", partner.name);
            return Err(problem(ProblemKind::Conflict, detail));
        }
        let pinned = self.pins.insert(partner.name.as_str(), certificate);
        pinned.map_err(|error| problem(ProblemKind::Conflict, error.to_string()))?;
        if let Err(error) = self.catalogue().add_partner(partner.clone()) {
            self.pins.remove(partner.name.as_str());
            return Err(error.into());
        }
        Ok(partner)
    }

    fn loss_not_accepted(&self, name: &VolumeName, report: Option<LossReport>) -> OperationError {
        let loss = report.map(|report| {
            let lost = report.lost_at_most.map_or("an unknown time".to_owned(), |lost| {
                format!("at most {:.3} seconds", lost.as_secs_f64())
            });
            let time = Timestamp(report.time.unwrap_or_default());
            if report.zero {
                let point = report.recovery_point;
                return format!("its recovery point would be {point} of {time}, with zero loss");
            }
            format!(
                "its recovery point would be {} of {time}, and {lost} of writes lost",
                report.recovery_point
            )
        });
        let detail = format!(
            "mirror '{name}' was not failed over: {}; give --accept-loss to accept that",
            loss.unwrap_or_default()
        );
        problem(ProblemKind::Refused, detail)
    }

    fn warnings(&self) -> Vec<String> {
        let troubles = lock(&self.troubles);
        let names = self.catalogue().volumes();
        let of = |id: &block::VolumeId| {
            names.iter().find(|volume| volume.id == *id).map(|volume| volume.name.clone())
        };
        troubles
            .iter()
            .map(|(id, trouble)| match of(id) {
                Some(name) => format!("volume '{name}' is not served: {trouble}"),
                None => trouble.clone(),
            })
            .chain(names.iter().filter_map(|volume| self.untold_of(volume.id)))
            .chain(self.descriptors_wanted().shortage())
            .chain(self.removals.running())
            .chain(self.audit.damage().map(|damage| damage.to_string()))
            .collect()
    }
}

fn sentences(sentences: &[String]) -> Option<String> {
    (!sentences.is_empty()).then(|| sentences.join("; "))
}

/// A point as the group takes it.
const fn rewind_to(target: RecoveryTarget) -> RewindTo {
    match target {
        RecoveryTarget::Time(time) => RewindTo::Time(time.0),
        RecoveryTarget::Sequence(sequence) => RewindTo::Sequence(sequence),
    }
}

/// The site as the API shares it.
pub(super) struct Operator(pub(super) Arc<Site>);

impl Deref for Operator {
    type Target = Arc<Site>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Operations for Operator {
    async fn volume_create(&self, create: VolumeCreate) -> Outcome<VolumeView> {
        let _changing = self.changes.lock().await;
        let site = Arc::clone(&self.0);
        let object = format!("volume '{}'", create.name);
        let made = self.audited("key create", &object, async {
            tokio::task::spawn_blocking(move || site.make_volume(&create)).await.map_err(internal)?
        });
        let made = made.await?;
        let view = self.volume_view(&made).await;
        Ok(VolumeView { warning: self.limit_warning(&made), ..view })
    }

    async fn volume_list(&self) -> Outcome<Vec<VolumeView>> {
        let mut views = Vec::new();
        for volume in self.catalogue().volumes() {
            views.push(self.volume_view(&volume).await);
        }
        Ok(views)
    }

    async fn volume_show(&self, name: VolumeName) -> Outcome<VolumeView> {
        let volume = self.known_volume(&name)?;
        Ok(self.volume_view(&volume).await)
    }

    async fn volume_resize(&self, name: VolumeName, resize: VolumeResize) -> Outcome<VolumeView> {
        let _changing = self.changes.lock().await;
        self.resize_volume(&name, resize).await
    }

    async fn volume_access(&self, name: VolumeName) -> Outcome<VolumeAccessView> {
        Ok(self.access_view(&self.known_volume(&name)?))
    }

    async fn volume_access_change(
        &self,
        name: VolumeName,
        change: VolumeAccessChange,
    ) -> Outcome<VolumeAccessView> {
        let _changing = self.changes.lock().await;
        self.change_access(&name, change).await
    }

    async fn volume_delete(&self, name: VolumeName) -> Outcome<()> {
        let changing = self.changes.lock().await;
        let object = format!("volume '{name}'");
        let removal = self.audited("key destroy", &object, self.delete_volume(&name)).await?;
        drop(changing);
        // The volume is gone. Its space mostly is in a moment too, and whoever makes the next one counts on it.
        let Some(removal) = removal else { return Ok(()) };
        match tokio::time::timeout(REMOVAL_PATIENCE, removal).await {
            Ok(Ok(Err(error))) => {
                let detail =
                    format!("volume '{name}' is deleted, but its space is not given back yet: {error}");
                Err(problem(ProblemKind::Internal, detail))
            }
            Ok(Ok(Ok(())) | Err(_)) | Err(_) => Ok(()),
        }
    }

    async fn certificate_show(&self) -> Outcome<CertificateView> {
        Ok(CertificateView {
            site: self.catalogue().site(),
            fingerprint: self.identity.fingerprint().to_string(),
            certificate: self.identity.certificate_pem().to_owned(),
        })
    }

    async fn partner_add(&self, add: PartnerAdd) -> Outcome<PartnerView> {
        let _changing = self.changes.lock().await;
        let site = Arc::clone(&self.0);
        let partner =
            tokio::task::spawn_blocking(move || site.store_partner(add)).await.map_err(internal)??;
        // Not asked now: the partner does not know this site before the same was done there.
        let unasked =
            Err("not asked yet: see 'farshore partner show' when both sites know each other".to_owned());
        Ok(self.partner_view(&partner, unasked))
    }

    async fn partner_list(&self) -> Outcome<Vec<PartnerView>> {
        let mut views = Vec::new();
        for partner in self.catalogue().partners() {
            let answers = self.ping(&partner).await;
            views.push(self.partner_view(&partner, answers));
        }
        Ok(views)
    }

    async fn partner_show(&self, name: VolumeName) -> Outcome<PartnerView> {
        let partner = self.known_partner(&name)?;
        let answers = self.ping(&partner).await;
        Ok(self.partner_view(&partner, answers))
    }

    async fn partner_remove(&self, name: VolumeName) -> Outcome<()> {
        let _changing = self.changes.lock().await;
        self.known_partner(&name)?;
        let site = Arc::clone(&self.0);
        let removed = name.clone();
        tokio::task::spawn_blocking(move || site.catalogue().remove_partner(&removed))
            .await
            .map_err(internal)??;
        self.pins.remove(name.as_str());
        lock(&self.partner_troubles).remove(&name);
        Ok(())
    }

    async fn mirror_create(&self, create: MirrorCreate) -> Outcome<MirrorView> {
        let _changing = self.changes.lock().await;
        let mirror = self.make_mirror(create).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_list(&self) -> Outcome<Vec<MirrorView>> {
        Ok(self.mirror_views().await)
    }

    async fn mirror_show(&self, name: VolumeName) -> Outcome<MirrorView> {
        let (mirror, _) = self.known_mirror(&name)?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_set(&self, name: VolumeName, set: MirrorSet) -> Outcome<MirrorView> {
        let _changing = self.changes.lock().await;
        self.set_mirror_policy(&name, set).await
    }

    async fn mirror_verify(&self, name: VolumeName, verify: MirrorVerify) -> Outcome<MirrorView> {
        self.begin_verify(&name, verify).await
    }

    async fn mirror_stop(&self, name: VolumeName) -> Outcome<MirrorView> {
        let (mirror, key) = self.known_mirror(&name)?;
        self.verb(key, Verb::Stop).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_start(&self, name: VolumeName, start: MirrorStart) -> Outcome<MirrorView> {
        let (mirror, key) = self.known_mirror(&name)?;
        if start.primary == Some(Side::Partner) {
            let detail = format!(
                "mirror '{name}' cannot be started with --primary partner: run 'farshore mirror start {name}' at the \
                 site that is to be the primary"
            );
            return Err(problem(ProblemKind::Refused, detail));
        }
        self.verb(key, Verb::Start { local: start.primary == Some(Side::Local) }).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_failover(&self, name: VolumeName, failover: FailoverRequest) -> Outcome<FailoverResult> {
        let _changing = self.changes.lock().await;
        let (mirror, key) = self.known_mirror(&name)?;
        let at = failover.at.map(rewind_to);
        if !failover.accept_loss {
            let report = self.verb(key, Verb::Loss { at }).await?;
            return Err(self.loss_not_accepted(&name, report));
        }
        let report = self.fail_over_group(&mirror, key, at).await?;
        Ok(FailoverResult {
            recovery_point: RecoveryPoint {
                position: report.recovery_point,
                time: Timestamp(report.time.unwrap_or_default()),
            },
            seconds_lost: report.lost_at_most.unwrap_or_default().as_secs_f64(),
            seconds_lost_bound: !report.zero,
            zero_loss: report.zero,
        })
    }

    async fn mirror_drill_start(&self, name: VolumeName, drill: DrillStart) -> Outcome<MirrorView> {
        let _changing = self.changes.lock().await;
        let (mirror, key) = self.known_mirror(&name)?;
        self.start_drill(&mirror, key, drill.at.map(rewind_to)).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_drill_stop(&self, name: VolumeName) -> Outcome<MirrorView> {
        let _changing = self.changes.lock().await;
        let (mirror, key) = self.known_mirror(&name)?;
        self.stop_drill(&mirror, key).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_switch(&self, name: VolumeName) -> Outcome<MirrorView> {
        // Not held while it goes on: the role may have to be taken back meanwhile.
        let (mirror, key) = self.known_mirror(&name)?;
        self.switch_group(&mirror, key).await?;
        self.mirror_view(&mirror).await
    }

    async fn mirror_orphans(&self, name: VolumeName, orphans: OrphansRequest) -> Outcome<OrphansView> {
        let (mirror, key) = self.known_mirror(&name)?;
        self.find_orphans(&mirror, key, orphans).await
    }

    async fn mirror_delete(&self, name: VolumeName) -> Outcome<()> {
        let changing = self.changes.lock().await;
        let mirror = self.catalogue().mirror(&name).ok_or_else(|| {
            problem(
                ProblemKind::NotFound,
                format!("mirror '{name}' does not exist: see 'farshore mirror list'"),
            )
        })?;
        let partner = self.catalogue().partner(&mirror.partner);
        self.forget_mirror(&mirror).await?;
        // The partner may be deleting it at the same moment and ask this site.
        drop(changing);
        if let Some(partner) = partner
            && let Err(error) =
                self.ask_to_delete(&partner, mirror.id, block::Epoch(mirror.group.epoch)).await
        {
            tracing::warn!(mirror = %name, %error, "the mirror is deleted here only: delete it at the partner too");
        }
        Ok(())
    }

    async fn tenant_create(&self, create: TenantCreate) -> Outcome<TenantView> {
        let _changing = self.changes.lock().await;
        let site = Arc::clone(&self.0);
        let object = create.name.to_string();
        let made = self.audited("tenant create", &object, async {
            tokio::task::spawn_blocking(move || site.make_tenant(&create)).await.map_err(internal)?
        });
        Ok(self.tenant_view(&made.await?))
    }

    async fn tenant_list(&self) -> Outcome<Vec<TenantView>> {
        Ok(self.catalogue().tenants().iter().map(|tenant| self.tenant_view(tenant)).collect())
    }

    async fn tenant_show(&self, name: VolumeName) -> Outcome<TenantView> {
        Ok(self.tenant_view(&self.known_tenant(&name)?))
    }

    async fn tenant_delete(&self, name: VolumeName) -> Outcome<()> {
        let _changing = self.changes.lock().await;
        let site = Arc::clone(&self.0);
        let object = name.to_string();
        let removed = self.audited("tenant delete", &object, async {
            tokio::task::spawn_blocking(move || site.remove_tenant(&name)).await.map_err(internal)?
        });
        removed.await
    }

    async fn tenant_lock(&self, name: VolumeName) -> Outcome<TenantView> {
        let changing = self.changes.lock().await;
        let locked = self.audited("tenant lock", name.as_str(), self.lock_tenant(&name)).await?;
        // The partner may be telling this site of a lock at the same moment.
        drop(changing);
        let warning = sentences(&self.tell_lock(&locked).await);
        Ok(TenantView { warning, ..self.tenant_view(&locked) })
    }

    async fn tenant_unlock(&self, name: VolumeName) -> Outcome<TenantView> {
        let changing = self.changes.lock().await;
        let unlocked = self.audited("tenant unlock", name.as_str(), self.unlock_tenant(&name)).await?;
        drop(changing);
        let warning = sentences(&self.tell_lock(&unlocked).await);
        Ok(TenantView { warning, ..self.tenant_view(&unlocked) })
    }

    async fn key_rotate_volume(&self, name: VolumeName) -> Outcome<RotationView> {
        let _changing = self.changes.lock().await;
        let object = format!("volume '{name}'");
        self.audited("key rotate", &object, self.rotate_volume(&name)).await
    }

    async fn key_rotate_tenant(&self, name: VolumeName) -> Outcome<RotationView> {
        let _changing = self.changes.lock().await;
        let object = format!("tenant '{name}'");
        self.audited("key rotate", &object, self.rotate_tenant(&name)).await
    }

    async fn key_provider_test(&self) -> Outcome<ProviderView> {
        self.test_provider(false).await
    }

    async fn key_provider_init(&self) -> Outcome<ProviderView> {
        self.audited("key provider init", "root key", self.test_provider(true)).await
    }

    async fn audit_verify(&self, verify: AuditVerify) -> Outcome<AuditView> {
        self.check_audit(verify.expected).await
    }

    async fn status(&self) -> Outcome<StatusView> {
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let connections =
            self.connection_counts().await.into_iter().map(|(_, connections)| connections).sum();
        Ok(StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            site: self.catalogue().site(),
            site_name: self.settings.site.clone(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            encryption_engine: VolumeCipher::engine_name().to_owned(),
            nbd_uris: lock(&self.nbd_uris).clone(),
            replication_address: self.endpoint().local_address().to_string(),
            console_address: match self.settings.console_listen {
                ConsoleAddress::Tcp(address) => Some(address.to_string()),
                ConsoleAddress::Off => None,
            },
            counts: Counts {
                volumes: count(self.catalogue().volumes().len()),
                partners: count(self.catalogue().partners().len()),
                mirrors: count(self.catalogue().mirrors().len()),
                connections,
            },
            warnings: self.warnings(),
        })
    }
}
