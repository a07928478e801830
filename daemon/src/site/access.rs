//! Who may open a volume, and that the replica of a mirrored one follows: it is never more open than its primary.
//!
//! What lets in less is durable at the partner before it is here, what lets in more is durable here first. What the
//! partner could not be told it is told again until it has heard, and whenever the mirror's session is opened. docs/protocols/replication.md, 12.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use block::{Epoch, MirrorId, VolumeId, VolumeName};
use control::{HostAccess, ProblemKind, Role, TlsRule, VolumeAccess, VolumeAccessChange, VolumeAccessView};
use protocol::{Message, MirrorAccess, MirrorHost, RefusalCode, SetAccess};

use super::mirrors::internal;
use super::partners::refusal;
use super::volumes::problem;
use super::{Site, lock};
use crate::api::OperationError;
use crate::catalogue::{MirrorRecord, VolumeRecord};
use crate::settings::NbdTls;
use crate::shard::ShardCommand;

/// The partner has two small writes to do.
const TELL_LIMIT: Duration = Duration::from_secs(10);
/// A partner that could not be told is told again after so long.
const TELL_PAUSE: Duration = Duration::from_secs(2);

type Refused = (RefusalCode, String);

/// What partners have not been told of who may open a volume.
#[derive(Debug, Default)]
pub(super) struct Untold {
    sentences: BTreeMap<VolumeId, String>,
    /// Mirrors whose partners are being told again and again.
    repeating: BTreeSet<MirrorId>,
}

impl Site {
    /// Who may open a volume, with what the partner has not been told.
    pub(super) fn access_view(&self, volume: &VolumeRecord) -> VolumeAccessView {
        VolumeAccessView { access: volume.access.clone(), warning: self.untold_of(volume.id) }
    }

    /// What a primary could not tell its partner of who may open a volume.
    pub(super) fn untold_of(&self, volume: VolumeId) -> Option<String> {
        let (mirror, _) = self.catalogue().mirror_of(volume)?;
        let untold = lock(&self.untold).sentences.get(&volume).cloned();
        untold.filter(|_| mirror.group.role == Role::Primary)
    }

    /// Changes who may open a volume; the caller holds `changes`.
    pub(super) async fn change_access(
        self: &Arc<Self>,
        name: &VolumeName,
        change: VolumeAccessChange,
    ) -> Result<VolumeAccessView, OperationError> {
        let old = self.known_volume(name)?;
        let access = old
            .access
            .changed(&change)
            .map_err(|error| problem(ProblemKind::Invalid, stays(name, &error.to_string())))?;
        if let Some(reason) = self.unreachable_by(&change) {
            return Err(problem(ProblemKind::Refused, stays(name, reason)));
        }
        let mirror = self.catalogue().mirror_of(old.id).map(|(mirror, _)| mirror);
        if let Some(mirror) = mirror.as_ref().filter(|mirror| mirror.group.role == Role::Secondary) {
            let reason = format!(
                "it is the replica of mirror '{}', which follows its primary; change it at partner '{}', or here after a \
                 failover",
                mirror.name, mirror.partner
            );
            return Err(problem(ProblemKind::Conflict, stays(name, &reason)));
        }
        if access == old.access {
            return Ok(self.access_view(&old));
        }
        match mirror {
            Some(mirror) => self.change_mirrored_access(&mirror, old, access, change.here_first).await,
            None => Ok(self.access_view(&self.store_access(old.id, access).await?)),
        }
    }

    async fn change_mirrored_access(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        old: VolumeRecord,
        access: VolumeAccess,
        here_first: bool,
    ) -> Result<VolumeAccessView, OperationError> {
        let _telling = self.telling.lock().await;
        let tighter = access.common_with(&old.access).ok_or_else(|| {
            let reason = "its mirror's partner cannot be told both at once; allow the new hosts first, then revoke the others";
            problem(ProblemKind::Refused, stays(&old.name, reason))
        })?;
        // If it lets in no less, what both have in common is what it has.
        let mut volume = old;
        if !volume.access.is_within(&tighter) {
            if !here_first {
                self.tighten_at_partner(mirror, &volume, &tighter).await?;
            }
            volume = self.store_access(volume.id, tighter.clone()).await?;
        }
        if volume.access != access {
            volume = self.store_access(volume.id, access).await?;
        }
        // What only lets in less has been told already.
        if here_first || volume.access != tighter {
            self.tell_partner(mirror, std::slice::from_ref(&volume)).await;
        }
        Ok(self.access_view(&volume))
    }

    /// Has the partner store what lets in less, or refuses.
    async fn tighten_at_partner(
        self: &Arc<Self>,
        mirror: &MirrorRecord,
        volume: &VolumeRecord,
        tighter: &VolumeAccess,
    ) -> Result<(), OperationError> {
        let revision = volume.revision.saturating_add(1);
        let said = vec![(volume.id, revision, to_mirror_access(tighter))];
        let Err(error) = self.ask_access(mirror, said).await else {
            return Ok(());
        };
        // The revision is used up: should the partner hear of it late, what it is told after this counts.
        let (site, id) = (Arc::clone(self), volume.id);
        let burnt = tokio::task::spawn_blocking(move || site.catalogue().change_volume(id, |_| {}));
        burnt.await.map_err(internal)??;
        let reason = format!(
            "its replica would let in more than the primary ({}); try again when the partner answers, or change it \
             here at once with --here-first",
            error.detail
        );
        Err(problem(ProblemKind::Unavailable, stays(&volume.name, &reason)))
    }

    /// Makes the access durable here, and acts by it.
    async fn store_access(
        self: &Arc<Self>,
        id: VolumeId,
        access: VolumeAccess,
    ) -> Result<VolumeRecord, OperationError> {
        let site = Arc::clone(self);
        let stored = tokio::task::spawn_blocking(move || {
            site.catalogue().change_volume(id, |volume| volume.access = access)
        });
        let volume = stored.await.map_err(internal)??;
        self.exports().update(&volume);
        // After the exports: a connection that the old access let in is on its shard by now.
        if let Some(key) = self.group_of_volume(id) {
            let (volume, access) = (id, volume.access.clone());
            self.shard_of(key).send(ShardCommand::Access { key, volume, access });
        }
        Ok(volume)
    }

    /// Tells the partner what these volumes of a mirror have; if that fails, again and again.
    async fn tell_partner(self: &Arc<Self>, mirror: &MirrorRecord, volumes: &[VolumeRecord]) {
        let said =
            volumes.iter().map(|volume| (volume.id, volume.revision, to_mirror_access(&volume.access)));
        let outcome = self.ask_access(mirror, said.collect()).await;
        let mut untold = lock(&self.untold);
        for volume in volumes {
            match &outcome {
                Ok(()) => {
                    untold.sentences.remove(&volume.id);
                }
                Err(error) => {
                    let text = format!(
                        "the replica of volume '{}' may not have the access that holds here: {}; the partner of mirror \
                         '{}' is told again until it has heard",
                        volume.name, error.detail, mirror.name
                    );
                    untold.sentences.insert(volume.id, text);
                }
            }
        }
        if outcome.is_err() && untold.repeating.insert(mirror.id) {
            tokio::spawn(keep_telling(Arc::downgrade(self), mirror.id));
        }
    }

    /// True if the mirror's partner is to be told once more. What a side that is not the primary knows is void.
    fn is_told_again(&self, id: MirrorId) -> bool {
        let mirror = self.catalogue().mirror_by_id(id);
        let primary = mirror.as_ref().is_some_and(|mirror| mirror.group.role == Role::Primary);
        let mut untold = lock(&self.untold);
        let members = mirror.map(|mirror| mirror.volumes).unwrap_or_default();
        if !primary {
            members.iter().for_each(|volume| drop(untold.sentences.remove(volume)));
        }
        let again = members.iter().any(|volume| untold.sentences.contains_key(volume));
        if !again {
            untold.repeating.remove(&id);
        }
        again
    }

    async fn ask_access(
        &self,
        mirror: &MirrorRecord,
        volumes: Vec<(VolumeId, u64, MirrorAccess)>,
    ) -> Result<(), OperationError> {
        // Asked anew: the epoch may have risen.
        let mirror = self.catalogue().mirror_by_id(mirror.id).unwrap_or_else(|| mirror.clone());
        let partner = self.catalogue().partner(&mirror.partner).ok_or_else(|| {
            problem(ProblemKind::Unavailable, format!("partner '{}' is not known any more", mirror.partner))
        })?;
        let set = SetAccess { mirror: mirror.id, epoch: Epoch(mirror.group.epoch), volumes };
        self.ask_to_set_access(&partner, set, TELL_LIMIT).await
    }

    /// A session of the mirror was opened: its partner is told what holds here.
    pub(super) async fn repeat_access(self: Arc<Self>, mirror: MirrorId) {
        let _telling = self.telling.lock().await;
        let Some(mirror) = self.catalogue().mirror_by_id(mirror) else {
            return;
        };
        if mirror.group.role == Role::Primary
            && let Ok(volumes) = self.mirror_volumes(&mirror)
        {
            self.tell_partner(&mirror, &volumes).await;
        }
    }

    /// The primary of a mirror says who may open the replicas.
    pub(super) async fn take_access(self: &Arc<Self>, partner: &VolumeName, set: SetAccess) -> Message {
        let mut told = self.told.lock().await;
        let volumes = match self.check_access(partner, &set) {
            Ok(volumes) => volumes,
            Err((code, text)) => return refusal(code, text),
        };
        for (volume, revision, access) in volumes {
            let order = (set.epoch.0, revision);
            if told.get(&volume.id).is_some_and(|latest| *latest > order) {
                let text = format!("site '{}' has heard of a later access to '{}'", self.name(), volume.name);
                return refusal(RefusalCode::Busy, text);
            }
            if access != volume.access
                && let Err(error) = self.store_access(volume.id, access).await
            {
                return refusal(RefusalCode::NoSpace, format!("site '{}': {}", self.name(), error.detail));
            }
            told.insert(volume.id, order);
        }
        Message::AccessSet
    }

    fn check_access(
        &self,
        partner: &VolumeName,
        set: &SetAccess,
    ) -> Result<Vec<(VolumeRecord, u64, VolumeAccess)>, Refused> {
        let here = self.name();
        let mirror = self.catalogue().mirror_by_id(set.mirror).ok_or_else(|| {
            (RefusalCode::UnknownMirror, format!("site '{here}' does not know this mirror"))
        })?;
        let name = &mirror.name;
        if mirror.partner != *partner {
            let text = format!("mirror '{name}' belongs to another partner than '{partner}'");
            return Err((RefusalCode::WrongPartner, text));
        }
        if set.epoch.0 < mirror.group.epoch || mirror.group.role == Role::Primary {
            let text = format!("mirror '{name}' is of epoch {} at site '{here}'", mirror.group.epoch);
            return Err((RefusalCode::StaleEpoch, text));
        }
        if set.epoch.0 > mirror.group.epoch {
            let text = format!("site '{here}' has not taken over epoch {} yet: try again", set.epoch.0);
            return Err((RefusalCode::Busy, text));
        }
        let mismatch = |text: String| (RefusalCode::Mismatch, text);
        let of = |(id, revision, access): &(VolumeId, u64, MirrorAccess)| {
            let volume = self.catalogue().volume_by_id(*id).filter(|_| mirror.volumes.contains(id));
            let volume = volume.ok_or_else(|| mismatch(format!("mirror '{name}' has no volume {id}")))?;
            Ok((volume, *revision, to_access(access).map_err(mismatch)?))
        };
        set.volumes.iter().map(of).collect()
    }

    /// Why no host could meet what the change asks for, if the settings are to blame.
    pub(super) fn unreachable_by(&self, change: &VolumeAccessChange) -> Option<&'static str> {
        let names = !change.allow.is_empty();
        let tls = self.settings.nbd_listen.iter().any(|listener| listener.tls != NbdTls::Off);
        if names && self.settings.nbd_client_ca.is_none() {
            return Some(
                "hosts are known by certificates, and no CA of theirs is set; set nbd_client_ca_file first",
            );
        }
        if (names || change.tls == Some(TlsRule::Required)) && !tls {
            return Some(
                "no NBD listener has TLS; give one tls = \"optional\" or \"required\" in nbd_listen first",
            );
        }
        None
    }
}

/// Tells a mirror's partner who may open its volumes until it has heard.
fn keep_telling(site: Weak<Site>, mirror: MirrorId) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    // Boxed, as telling begins this and this tells.
    Box::pin(async move {
        loop {
            tokio::time::sleep(TELL_PAUSE).await;
            let Some(site) = site.upgrade() else { return };
            Arc::clone(&site).repeat_access(mirror).await;
            if !site.is_told_again(mirror) {
                return;
            }
        }
    })
}

fn stays(name: &VolumeName, reason: &str) -> String {
    format!("the access to volume '{name}' stays as it is: {reason}")
}

/// As the partner is told.
pub(super) fn to_mirror_access(access: &VolumeAccess) -> MirrorAccess {
    let host = |host: &HostAccess| MirrorHost {
        identity: host.identity.as_str().to_owned(),
        read_only: host.read_only,
    };
    MirrorAccess {
        tls_required: access.tls_required,
        read_only: access.read_only,
        hosts: access.hosts.iter().map(host).collect(),
    }
}

/// As a partner told it; the text says what cannot be.
pub(super) fn to_access(told: &MirrorAccess) -> Result<VolumeAccess, String> {
    let host = |host: &MirrorHost| {
        let identity = host.identity.parse();
        let identity = identity.map_err(|error: control::HostIdentityError| error.to_string())?;
        Ok(HostAccess { identity, read_only: host.read_only })
    };
    let hosts = told.hosts.iter().map(host).collect::<Result<Vec<_>, String>>()?;
    if !hosts.is_sorted_by(|one, other| one.identity < other.identity) {
        return Err("a list of hosts is not in order, or names one twice".to_owned());
    }
    Ok(VolumeAccess { tls_required: told.tls_required, read_only: told.read_only, hosts })
}
