//! The keys of volumes: the providers that wrap them, opening them, and wrapping them anew.
//!
//! Every call of a provider has a deadline and runs on the provider's own thread, never on a shard's. Unwrapped keys live in
//! volumes' ciphers only; those above them are in memory for the time of a call. docs/formats/keys.md, docs/SECURITY.md.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use block::{Epoch, TenantId, VolumeId, VolumeName};
use control::{ProblemKind, ProviderView, Role, RotationView, VolumeKeyView};
use crypto::{
    DataKey, DomainKey, KeyRecord, RootKind, VolumeCipher, WRAPPED_KEY_BYTES, WrappedDomainKey, WrappedKey,
};
use keystore::{FileKeyProvider, KeystoreError, ProviderHandle, ProviderUri};
use protocol::{SetKeys, TenantLock};

use super::Site;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::{DomainRecord, TenantRecord, VolumeRecord};
use crate::settings::Settings;

/// The longest call of a provider.
const PROVIDER_DEADLINE: Duration = Duration::from_secs(10);
/// The partner has two small writes a volume to do.
const TELL_LIMIT: Duration = Duration::from_secs(30);

/// The site's key providers.
pub(super) struct Keys {
    /// Wraps new domain keys.
    preferred: ProviderHandle,
    /// What older ones may be wrapped by.
    others: Vec<ProviderHandle>,
    fingerprint: OnceLock<String>,
}

impl Keys {
    /// Starts the providers. Nothing is asked of them but of a key file: it is made if it is missing and `is_new`, that is if no
    /// key that it would have wrapped is known, and a file that holds no key then stops the start.
    pub(super) fn start(settings: &Settings, is_new: bool) -> Result<Self, KeystoreError> {
        let file = FileKeyProvider::at(settings.kek_file.clone());
        if is_new && settings.key_provider.kind() == RootKind::File {
            FileKeyProvider::open_or_create(file.path(), keystore::random_bytes::<32>)?;
        }
        let file = ProviderHandle::start(file, PROVIDER_DEADLINE)?;
        let (preferred, others) = match &settings.key_provider {
            ProviderUri::File(_) => (file, Vec::new()),
            ProviderUri::Pkcs11(uri) => {
                let token = keystore::Pkcs11Provider::at(uri.clone());
                (ProviderHandle::start(token, PROVIDER_DEADLINE)?, vec![file])
            }
        };
        Ok(Self { preferred, others, fingerprint: OnceLock::new() })
    }

    fn provider(&self, kind: RootKind) -> Result<&ProviderHandle, OperationError> {
        let mut all = std::iter::once(&self.preferred).chain(&self.others);
        all.find(|provider| provider.kind() == kind).ok_or_else(|| {
            let detail = format!("a {kind} provider wrapped its tenant's key, and the settings name none");
            problem(ProblemKind::Unavailable, detail)
        })
    }

    /// A public name of the root key.
    pub(super) fn fingerprint(&self) -> Result<String, OperationError> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let asked = self.preferred.call(|provider| provider.fingerprint());
        let found = asked.map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))?;
        Ok(self.fingerprint.get_or_init(|| found).clone())
    }

    fn domain(&self, wrapped: &WrappedDomainKey) -> Result<DomainKey, OperationError> {
        let (bytes, tenant) = (wrapped.bytes().to_vec(), wrapped.tenant);
        let opened =
            self.provider(wrapped.root)?.call(move |provider| provider.unwrap_domain(&bytes, tenant));
        opened.map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))
    }

    fn data_key(&self, volume: &VolumeRecord) -> Result<DataKey, OperationError> {
        let broken = |error: &dyn std::fmt::Display| problem(ProblemKind::Internal, error.to_string());
        if volume.wrapped_key.len() == WRAPPED_KEY_BYTES {
            let wrapped = WrappedKey::from_bytes(&volume.wrapped_key).map_err(|error| broken(&error))?;
            let opened = self.provider(RootKind::File)?.call(move |provider| provider.unwrap_data(&wrapped));
            return opened.map_err(|error| problem(ProblemKind::Unavailable, error.to_string()));
        }
        let record = KeyRecord::decode(&volume.wrapped_key).map_err(|error| broken(&error))?;
        let domain = self.domain(record.domain())?;
        record.open(volume.id, &domain).map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))
    }

    /// A new domain key of a tenant.
    fn new_domain(&self, tenant: TenantId, version: u32) -> Result<WrappedDomainKey, OperationError> {
        let unavailable = |error: KeystoreError| problem(ProblemKind::Unavailable, error.to_string());
        let key = DomainKey::from_bytes(keystore::random_bytes::<32>().map_err(unavailable)?);
        let wrapped = self.preferred.call(move |provider| provider.wrap_domain(&key, tenant));
        let wrapped = wrapped.map_err(unavailable)?;
        WrappedDomainKey::new(tenant, self.preferred.kind(), version, wrapped).map_err(internal)
    }

    /// Wraps and unwraps a key, and compares.
    fn test(&self) -> Result<ProviderView, OperationError> {
        let unavailable = |error: KeystoreError| problem(ProblemKind::Unavailable, error.to_string());
        let begun = Instant::now();
        let bytes = keystore::random_bytes::<32>().map_err(unavailable)?;
        let tenant = TenantId(uuid::Uuid::new_v4());
        let same = self.preferred.call(move |provider| {
            let wrapped = provider.wrap_domain(&DomainKey::from_bytes(bytes.clone()), tenant)?;
            Ok(*provider.unwrap_domain(&wrapped, tenant)?.expose() == *bytes)
        });
        let provider = self.preferred.name().to_owned();
        if !same.map_err(unavailable)? {
            let detail = format!("'{provider}' gives another key than it was given: do not use it");
            return Err(problem(ProblemKind::Internal, detail));
        }
        let seconds = begun.elapsed().as_secs_f64();
        let fingerprint = self.preferred.call(|provider| provider.fingerprint()).map_err(unavailable)?;
        Ok(ProviderView { provider, fingerprint, seconds, unguarded: keystore::memory::unguarded() })
    }
}

impl Site {
    /// The volume's cipher, by unwrapping its data key, unless its tenant is locked. Blocks, at most for the deadline of the
    /// provider's calls.
    pub(super) fn unlock(&self, volume: &VolumeRecord) -> Result<Arc<VolumeCipher>, OperationError> {
        self.refuse_locked(volume)?;
        let key = tokio::task::block_in_place(|| self.keys.data_key(volume));
        let key = key.map_err(|error| {
            let detail = format!("volume '{}' is locked: {}", volume.name, error.detail);
            problem(error.kind, detail)
        })?;
        Ok(Arc::new(VolumeCipher::new(&key)))
    }

    fn refuse_locked(&self, volume: &VolumeRecord) -> Result<(), OperationError> {
        match self.lock_of(volume) {
            Some(reason) => Err(problem(ProblemKind::Unavailable, reason)),
            None => Ok(()),
        }
    }

    /// Why the volume is locked by its tenant, if so.
    pub(super) fn lock_of(&self, volume: &VolumeRecord) -> Option<String> {
        let tenant = self.catalogue().tenant_by_id(volume.tenant())?;
        tenant.locked.then(|| {
            let (name, tenant) = (&volume.name, &tenant.name);
            format!(
                "volume '{name}' is locked: its tenant '{tenant}' is; run 'farshore tenant unlock {tenant}'"
            )
        })
    }

    /// A new data key for a volume of the tenant, and its record.
    pub(super) fn new_key(
        &self,
        tenant: &TenantRecord,
        volume: VolumeId,
    ) -> Result<(DataKey, Vec<u8>), OperationError> {
        let random = keystore::random_bytes::<64>().map_err(internal)?;
        let key = DataKey::from_random(random).map_err(internal)?;
        let wrapped = match tenant.wrapped_domain().map_err(internal)? {
            Some(wrapped) => wrapped,
            None => self.next_domain(tenant)?,
        };
        let record = self.wrap(&key, volume, wrapped, 1)?;
        Ok((key, record))
    }

    fn wrap(
        &self,
        key: &DataKey,
        volume: VolumeId,
        wrapped: WrappedDomainKey,
        version: u32,
    ) -> Result<Vec<u8>, OperationError> {
        let domain = self.keys.domain(&wrapped)?;
        let random = keystore::random_bytes::<32>().map_err(internal)?;
        Ok(KeyRecord::wrap(key, volume, &domain, wrapped, version, &random).encode())
    }

    /// Gives a tenant its first or next domain key, durably.
    pub(super) fn next_domain(&self, tenant: &TenantRecord) -> Result<WrappedDomainKey, OperationError> {
        let version = tenant.domain.as_ref().map_or(0, |domain| domain.version).saturating_add(1);
        let wrapped = self.keys.new_domain(tenant.id, version)?;
        let domain = Some(DomainRecord::from(&wrapped));
        self.catalogue().store_tenant(TenantRecord { domain, ..tenant.clone() })?;
        Ok(wrapped)
    }

    /// `key provider test`, and `init` with `make`.
    pub(super) async fn test_provider(self: &Arc<Self>, make: bool) -> Result<ProviderView, OperationError> {
        let site = Arc::clone(self);
        let tested = tokio::task::spawn_blocking(move || {
            if make {
                let made = site.keys.preferred.call(|provider| provider.make_root());
                made.map_err(|error| problem(ProblemKind::Unavailable, error.to_string()))?;
            }
            site.keys.test()
        });
        tested.await.map_err(internal)?
    }

    /// `key rotate VOLUME`: a new key-encryption key under the tenant's newest domain key. The caller holds `changes`.
    pub(super) async fn rotate_volume(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<RotationView, OperationError> {
        let volume = self.known_volume(name)?;
        self.rewrap(&volume).await?;
        let volume = self.known_volume(name)?;
        Ok(RotationView { volumes: vec![key_view(&volume, None)] })
    }

    /// `key rotate --tenant T`: a new domain key, then each volume. A volume that fails keeps its keys, which still open; the
    /// next rotation takes it along. The caller holds `changes`.
    pub(super) async fn rotate_tenant(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<RotationView, OperationError> {
        let tenant = self.known_tenant(name)?;
        if tenant.locked {
            let detail =
                format!("the keys of tenant '{name}' stay as they are: it is locked; unlock it first");
            return Err(problem(ProblemKind::Refused, detail));
        }
        let site = Arc::clone(self);
        let id = tenant.id;
        tokio::task::spawn_blocking(move || site.next_domain(&tenant)).await.map_err(internal)??;
        let mut volumes = Vec::new();
        for volume in self.catalogue().volumes_of(id) {
            let failure = self.rewrap(&volume).await.err().map(|error| error.detail);
            let volume = self.catalogue().volume_by_id(volume.id).unwrap_or(volume);
            volumes.push(key_view(&volume, failure));
        }
        let site = Arc::clone(self);
        tokio::task::spawn_blocking(move || site.catalogue().scrub()).await.map_err(internal)??;
        Ok(RotationView { volumes })
    }

    /// Wraps a volume's data key anew: the partner of a mirrored one stores the new wrap first, then this site does, and only
    /// that destroys the old one. Wherever it ends, each site has a wrap that opens.
    async fn rewrap(self: &Arc<Self>, volume: &VolumeRecord) -> Result<(), OperationError> {
        let stays = |reason: &str| format!("the key of volume '{}' stays as it is: {reason}", volume.name);
        self.refuse_locked(volume)?;
        let mirror = self.catalogue().mirror_of(volume.id).map(|(mirror, _)| mirror);
        if let Some(mirror) = mirror.as_ref().filter(|mirror| mirror.group.role == Role::Secondary) {
            let reason = format!("it is a replica; rotate it at partner '{}', its primary", mirror.partner);
            return Err(problem(ProblemKind::Conflict, stays(&reason)));
        }
        let (site, old) = (Arc::clone(self), volume.clone());
        let new = tokio::task::spawn_blocking(move || site.new_wrap(&old)).await.map_err(internal)?;
        let new = new.map_err(|error| problem(error.kind, stays(&error.detail)))?;
        if let Some(mirror) = mirror {
            let partner = self.catalogue().partner(&mirror.partner);
            let partner = partner.ok_or_else(|| internal("the mirror's partner is not known"))?;
            let set = SetKeys {
                mirror: mirror.id,
                epoch: Epoch(mirror.group.epoch),
                lock: TenantLock::Keep,
                volumes: vec![(volume.id, new.clone())],
            };
            let told = self.ask_to_set_keys(&partner, set, TELL_LIMIT).await;
            told.map_err(|error| problem(error.kind, stays(&error.detail)))?;
        }
        let (site, id) = (Arc::clone(self), volume.id);
        let stored = tokio::task::spawn_blocking(move || site.catalogue().replace_key(id, new));
        stored.await.map_err(internal)??;
        Ok(())
    }

    fn new_wrap(&self, volume: &VolumeRecord) -> Result<Vec<u8>, OperationError> {
        let key = self.keys.data_key(volume)?;
        let tenant = self.catalogue().tenant_by_id(volume.tenant());
        let tenant = tenant.ok_or_else(|| internal("the volume's tenant is not known"))?;
        let wrapped = match tenant.wrapped_domain().map_err(internal)? {
            Some(wrapped) => wrapped,
            None => self.next_domain(&tenant)?,
        };
        let version = volume.key_record().map_or(0, |record| record.version()).saturating_add(1);
        self.wrap(&key, volume.id, wrapped, version)
    }

    /// Whether a partner's wrap opens the data key that a replica has, or, without one, opens at all.
    pub(super) fn check_wrap(&self, volume: &VolumeRecord, wrapped_key: &[u8]) -> Result<(), OperationError> {
        let told = VolumeRecord { wrapped_key: wrapped_key.to_vec(), ..volume.clone() };
        if told.tenant() != volume.tenant() {
            let detail = format!("the wrap of volume '{}' is of another tenant", volume.name);
            return Err(problem(ProblemKind::Refused, detail));
        }
        let (new, old) = (self.keys.data_key(&told)?, self.keys.data_key(volume)?);
        if new.is_same(&old) {
            return Ok(());
        }
        let detail = format!("the wrap of volume '{}' holds another data key", volume.name);
        Err(problem(ProblemKind::Refused, detail))
    }
}

impl Site {
    /// Takes a new replica's key if it opens here: a key that is missing is found now, not at the disaster. Its tenant is
    /// entered if it is not known.
    pub(super) fn accept_key(&self, volume: &VolumeRecord) -> Result<(), String> {
        if let Some(reason) = self.lock_of(volume) {
            return Err(reason);
        }
        let opened = self.keys.data_key(volume).map(drop);
        opened.map_err(|error| {
            format!("the key of volume '{}' does not open here: {}", volume.name, error.detail)
        })?;
        let Some(record) = volume.key_record() else { return Ok(()) };
        if self.catalogue().tenant_by_id(volume.tenant()).is_some() {
            return Ok(());
        }
        self.catalogue().store_tenant(TenantRecord::of_record(&record)).map_err(|error| error.to_string())
    }
}

fn key_view(volume: &VolumeRecord, failure: Option<String>) -> VolumeKeyView {
    let record = volume.key_record();
    let domain = record.as_ref().map(KeyRecord::domain);
    VolumeKeyView {
        volume: volume.name.clone(),
        key_version: record.as_ref().map_or(0, KeyRecord::version),
        domain_version: domain.map_or(0, |domain| domain.version),
        root: domain.map_or(RootKind::File, |domain| domain.root).name().to_owned(),
        failure,
    }
}
