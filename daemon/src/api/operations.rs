//! What the API can ask of the daemon.

use std::future::Future;

use block::VolumeName;
use control::{
    AuditVerify, AuditView, CertificateView, DrillStart, FailoverRequest, FailoverResult, MirrorCreate,
    MirrorSet, MirrorStart, MirrorVerify, MirrorView, OrphansRequest, OrphansView, PartnerAdd, PartnerView,
    Problem, ProblemKind, ProviderView, RotationView, StatusView, TenantCreate, TenantView,
    VolumeAccessChange, VolumeAccessView, VolumeCreate, VolumeResize, VolumeView,
};

/// A refused or failed operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct OperationError {
    /// What kind of refusal it is.
    pub kind: ProblemKind,
    /// One sentence that names the object, what is wrong and what to do.
    pub detail: String,
}

impl OperationError {
    /// The refusal of this kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }
}

impl From<OperationError> for Problem {
    fn from(error: OperationError) -> Self {
        Self::new(error.kind, error.detail)
    }
}

/// The outcome of an operation.
type Outcome<T> = Result<T, OperationError>;

/// The daemon as the API sees it. Calls run concurrently; each either has its whole effect or fails. A call is not
/// cancelled by its caller: the API runs it to its end when the connection closes.
///
/// # Errors
/// Each refuses with one sentence for the operator.
pub trait Operations: Send + Sync + 'static {
    /// Creates a volume.
    fn volume_create(&self, create: VolumeCreate) -> impl Future<Output = Outcome<VolumeView>> + Send;
    /// All volumes, by name.
    fn volume_list(&self) -> impl Future<Output = Outcome<Vec<VolumeView>>> + Send;
    /// One volume.
    fn volume_show(&self, name: VolumeName) -> impl Future<Output = Outcome<VolumeView>> + Send;
    /// Makes a volume larger.
    fn volume_resize(
        &self,
        name: VolumeName,
        resize: VolumeResize,
    ) -> impl Future<Output = Outcome<VolumeView>> + Send;
    /// Who may open a volume.
    fn volume_access(&self, name: VolumeName) -> impl Future<Output = Outcome<VolumeAccessView>> + Send;
    /// Changes who may open a volume.
    fn volume_access_change(
        &self,
        name: VolumeName,
        change: VolumeAccessChange,
    ) -> impl Future<Output = Outcome<VolumeAccessView>> + Send;
    /// Deletes a volume and its data.
    fn volume_delete(&self, name: VolumeName) -> impl Future<Output = Outcome<()>> + Send;
    /// This site's own certificate.
    fn certificate_show(&self) -> impl Future<Output = Outcome<CertificateView>> + Send;
    /// Adds a partner.
    fn partner_add(&self, add: PartnerAdd) -> impl Future<Output = Outcome<PartnerView>> + Send;
    /// All partners, by name.
    fn partner_list(&self) -> impl Future<Output = Outcome<Vec<PartnerView>>> + Send;
    /// One partner.
    fn partner_show(&self, name: VolumeName) -> impl Future<Output = Outcome<PartnerView>> + Send;
    /// Removes a partner that no mirror needs.
    fn partner_remove(&self, name: VolumeName) -> impl Future<Output = Outcome<()>> + Send;
    /// Creates a mirror; its volumes are distinct and at least one.
    fn mirror_create(&self, create: MirrorCreate) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// All mirrors, by name.
    fn mirror_list(&self) -> impl Future<Output = Outcome<Vec<MirrorView>>> + Send;
    /// One mirror.
    fn mirror_show(&self, name: VolumeName) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Changes what a mirror is to do while it runs; something is to change.
    fn mirror_set(
        &self,
        name: VolumeName,
        set: MirrorSet,
    ) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Begins to compare the target's image with this primary's.
    fn mirror_verify(
        &self,
        name: VolumeName,
        verify: MirrorVerify,
    ) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Stops a mirror.
    fn mirror_stop(&self, name: VolumeName) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Starts a mirror.
    fn mirror_start(
        &self,
        name: VolumeName,
        start: MirrorStart,
    ) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Makes the secondary primary, or says what that would lose if the operator has not accepted it.
    fn mirror_failover(
        &self,
        name: VolumeName,
        failover: FailoverRequest,
    ) -> impl Future<Output = Outcome<FailoverResult>> + Send;
    /// Begins a drill at the secondary.
    fn mirror_drill_start(
        &self,
        name: VolumeName,
        drill: DrillStart,
    ) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Ends a drill; its copy is discarded.
    fn mirror_drill_stop(&self, name: VolumeName) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Gives this side's role to the partner; nothing is lost.
    fn mirror_switch(&self, name: VolumeName) -> impl Future<Output = Outcome<MirrorView>> + Send;
    /// Which writes of this old primary the new one never had; exports them if that is asked for.
    fn mirror_orphans(
        &self,
        name: VolumeName,
        orphans: OrphansRequest,
    ) -> impl Future<Output = Outcome<OrphansView>> + Send;
    /// Deletes a mirror; its volumes stay.
    fn mirror_delete(&self, name: VolumeName) -> impl Future<Output = Outcome<()>> + Send;
    /// Makes a tenant.
    fn tenant_create(&self, create: TenantCreate) -> impl Future<Output = Outcome<TenantView>> + Send;
    /// All tenants, by name.
    fn tenant_list(&self) -> impl Future<Output = Outcome<Vec<TenantView>>> + Send;
    /// One tenant.
    fn tenant_show(&self, name: VolumeName) -> impl Future<Output = Outcome<TenantView>> + Send;
    /// Deletes a tenant that has no volumes.
    fn tenant_delete(&self, name: VolumeName) -> impl Future<Output = Outcome<()>> + Send;
    /// Takes a tenant's volumes offline and forgets their keys.
    fn tenant_lock(&self, name: VolumeName) -> impl Future<Output = Outcome<TenantView>> + Send;
    /// Brings them back.
    fn tenant_unlock(&self, name: VolumeName) -> impl Future<Output = Outcome<TenantView>> + Send;
    /// Wraps the key of a volume anew.
    fn key_rotate_volume(&self, name: VolumeName) -> impl Future<Output = Outcome<RotationView>> + Send;
    /// Wraps the keys of a tenant's volumes anew, under a new domain key.
    fn key_rotate_tenant(&self, name: VolumeName) -> impl Future<Output = Outcome<RotationView>> + Send;
    /// Wraps and unwraps a key with the key provider.
    fn key_provider_test(&self) -> impl Future<Output = Outcome<ProviderView>> + Send;
    /// Makes the provider's root key if there is none.
    fn key_provider_init(&self) -> impl Future<Output = Outcome<ProviderView>> + Send;
    /// Checks the audit log.
    fn audit_verify(&self, verify: AuditVerify) -> impl Future<Output = Outcome<AuditView>> + Send;
    /// The site as a whole.
    fn status(&self) -> impl Future<Output = Outcome<StatusView>> + Send;
}
