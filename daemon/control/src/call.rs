//! Requests as data: method, path and body, with the type of the answer.

use std::fmt;
use std::marker::PhantomData;

use block::VolumeName;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{
    AuditVerify, AuditView, CertificateView, DrillStart, FailoverRequest, FailoverResult, MirrorCreate,
    MirrorSet, MirrorStart, MirrorVerify, MirrorView, OrphansRequest, OrphansView, PartnerAdd, PartnerView,
    Problem, ProviderView, RotationView, StatusView, TenantCreate, TenantView, VolumeAccessChange,
    VolumeAccessView, VolumeCreate, VolumeResize, VolumeView,
};

/// The HTTP methods of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read; changes nothing.
    Get,
    /// Create, or do.
    Post,
    /// Remove.
    Delete,
}

impl Method {
    /// The method's name in HTTP.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Delete => "DELETE",
        }
    }
}

/// A request whose answer is of type `Answer`; `()` for an answer without a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call<Answer> {
    /// The HTTP method.
    pub method: Method,
    /// The path, from `/v1` on. Names need no escaping.
    pub path: String,
    /// The JSON body; empty if there is none.
    pub body: Vec<u8>,
    answer: PhantomData<fn() -> Answer>,
}

/// Why a request did not end as wished.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The daemon refused.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// What came back is no answer of this API.
    #[error("the answer to {request} (HTTP status {status}) is not understood: {source}")]
    Answer {
        /// Method and path.
        request: String,
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl<Answer> Call<Answer> {
    fn bare(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), body: Vec::new(), answer: PhantomData }
    }

    fn post(path: impl Into<String>, body: &impl Serialize) -> Self {
        let mut call = Self::bare(Method::Post, path);
        let written = serde_json::to_writer(&mut call.body, body);
        assert!(written.is_ok(), "our own request types have no maps and no failing serializers");
        call
    }
}

impl<Answer: DeserializeOwned> Call<Answer> {
    /// Reads the answer: statuses 200 to 299 carry an `Answer`, all others a problem document.
    ///
    /// # Errors
    /// The daemon's refusal, or an answer that is neither.
    pub fn answer(&self, status: u16, body: &[u8]) -> Result<Answer, CallError> {
        let not_understood = |source| CallError::Answer { request: self.to_string(), status, source };
        if (200..300).contains(&status) {
            let body = if body.is_empty() { b"null" } else { body };
            serde_json::from_slice(body).map_err(not_understood)
        } else {
            let problem: Problem = serde_json::from_slice(body).map_err(not_understood)?;
            Err(problem.into())
        }
    }
}

impl<Answer> fmt::Display for Call<Answer> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.method.as_str(), self.path)
    }
}

impl Call<VolumeView> {
    /// Creates a volume.
    pub fn volume_create(create: &VolumeCreate) -> Self {
        Self::post("/v1/volumes", create)
    }

    /// One volume.
    pub fn volume_show(name: &VolumeName) -> Self {
        Self::bare(Method::Get, format!("/v1/volumes/{name}"))
    }

    /// Makes a volume larger.
    pub fn volume_resize(name: &VolumeName, resize: VolumeResize) -> Self {
        Self::post(format!("/v1/volumes/{name}/resize"), &resize)
    }
}

impl Call<VolumeAccessView> {
    /// Who may open a volume.
    pub fn volume_access(name: &VolumeName) -> Self {
        Self::bare(Method::Get, format!("/v1/volumes/{name}/access"))
    }

    /// Changes who may open a volume.
    pub fn volume_access_change(name: &VolumeName, change: &VolumeAccessChange) -> Self {
        Self::post(format!("/v1/volumes/{name}/access"), change)
    }
}

impl Call<Vec<VolumeView>> {
    /// All volumes, by name.
    pub fn volume_list() -> Self {
        Self::bare(Method::Get, "/v1/volumes")
    }
}

impl Call<CertificateView> {
    /// This site's own certificate.
    pub fn certificate_show() -> Self {
        Self::bare(Method::Get, "/v1/certificate")
    }
}

impl Call<PartnerView> {
    /// Adds a partner.
    pub fn partner_add(add: &PartnerAdd) -> Self {
        Self::post("/v1/partners", add)
    }

    /// One partner.
    pub fn partner_show(name: &VolumeName) -> Self {
        Self::bare(Method::Get, format!("/v1/partners/{name}"))
    }
}

impl Call<Vec<PartnerView>> {
    /// All partners, by name.
    pub fn partner_list() -> Self {
        Self::bare(Method::Get, "/v1/partners")
    }
}

impl Call<MirrorView> {
    /// Creates a mirror.
    pub fn mirror_create(create: &MirrorCreate) -> Self {
        Self::post("/v1/mirrors", create)
    }

    /// One mirror.
    pub fn mirror_show(name: &VolumeName) -> Self {
        Self::bare(Method::Get, format!("/v1/mirrors/{name}"))
    }

    /// Changes what a mirror is to do while it runs.
    pub fn mirror_set(name: &VolumeName, set: MirrorSet) -> Self {
        Self::post(format!("/v1/mirrors/{name}/set"), &set)
    }

    /// Begins to compare the target's image with this primary's; the view tells how far it is.
    pub fn mirror_verify(name: &VolumeName, verify: MirrorVerify) -> Self {
        Self::post(format!("/v1/mirrors/{name}/verify"), &verify)
    }

    /// Stops a mirror.
    pub fn mirror_stop(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/mirrors/{name}/stop"))
    }

    /// Starts a mirror.
    pub fn mirror_start(name: &VolumeName, start: MirrorStart) -> Self {
        Self::post(format!("/v1/mirrors/{name}/start"), &start)
    }

    /// Begins a drill at the secondary.
    pub fn mirror_drill_start(name: &VolumeName, drill: DrillStart) -> Self {
        Self::post(format!("/v1/mirrors/{name}/drill/start"), &drill)
    }

    /// Ends a drill; its copy is discarded.
    pub fn mirror_drill_stop(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/mirrors/{name}/drill/stop"))
    }

    /// Gives the primary's role to the secondary; nothing is lost.
    pub fn mirror_switch(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/mirrors/{name}/switch"))
    }
}

impl Call<Vec<MirrorView>> {
    /// All mirrors, by name.
    pub fn mirror_list() -> Self {
        Self::bare(Method::Get, "/v1/mirrors")
    }
}

impl Call<FailoverResult> {
    /// Makes the secondary primary, at the cost of what is not there.
    pub fn mirror_failover(name: &VolumeName, failover: FailoverRequest) -> Self {
        Self::post(format!("/v1/mirrors/{name}/failover"), &failover)
    }
}

impl Call<OrphansView> {
    /// Which writes of an old primary the new one never had.
    pub fn mirror_orphans(name: &VolumeName, orphans: &OrphansRequest) -> Self {
        Self::post(format!("/v1/mirrors/{name}/orphans"), orphans)
    }
}

impl Call<TenantView> {
    /// Makes a tenant.
    pub fn tenant_create(create: &TenantCreate) -> Self {
        Self::post("/v1/tenants", create)
    }

    /// One tenant.
    pub fn tenant_show(name: &VolumeName) -> Self {
        Self::bare(Method::Get, format!("/v1/tenants/{name}"))
    }

    /// Takes a tenant's volumes offline and forgets their keys.
    pub fn tenant_lock(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/tenants/{name}/lock"))
    }

    /// Brings them back.
    pub fn tenant_unlock(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/tenants/{name}/unlock"))
    }
}

impl Call<Vec<TenantView>> {
    /// All tenants, by name.
    pub fn tenant_list() -> Self {
        Self::bare(Method::Get, "/v1/tenants")
    }
}

impl Call<RotationView> {
    /// Wraps a volume's key anew.
    pub fn key_rotate_volume(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/volumes/{name}/rotate"))
    }

    /// Makes a new domain key and wraps the keys of all of a tenant's volumes anew.
    pub fn key_rotate_tenant(name: &VolumeName) -> Self {
        Self::bare(Method::Post, format!("/v1/tenants/{name}/rotate"))
    }
}

impl Call<ProviderView> {
    /// Wraps and unwraps a key with the key provider.
    pub fn key_provider_test() -> Self {
        Self::bare(Method::Post, "/v1/key-provider/test")
    }

    /// Makes the provider's root key if there is none, and tests it.
    pub fn key_provider_init() -> Self {
        Self::bare(Method::Post, "/v1/key-provider/init")
    }
}

impl Call<AuditView> {
    /// Checks the audit log.
    pub fn audit_verify(verify: &AuditVerify) -> Self {
        Self::post("/v1/audit/verify", verify)
    }
}

impl Call<StatusView> {
    /// The site as a whole.
    pub fn status() -> Self {
        Self::bare(Method::Get, "/v1/status")
    }
}

impl Call<()> {
    /// Deletes a volume and its data.
    pub fn volume_delete(name: &VolumeName) -> Self {
        Self::bare(Method::Delete, format!("/v1/volumes/{name}"))
    }

    /// Deletes a tenant without volumes, and its key.
    pub fn tenant_delete(name: &VolumeName) -> Self {
        Self::bare(Method::Delete, format!("/v1/tenants/{name}"))
    }

    /// Removes a partner.
    pub fn partner_remove(name: &VolumeName) -> Self {
        Self::bare(Method::Delete, format!("/v1/partners/{name}"))
    }

    /// Deletes a mirror; the volumes stay.
    pub fn mirror_delete(name: &VolumeName) -> Self {
        Self::bare(Method::Delete, format!("/v1/mirrors/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ProblemKind;

    #[test]
    fn an_answer_is_a_view_a_problem_or_not_understood() {
        let call = Call::volume_delete(&"a".parse().unwrap());
        assert_eq!(call.to_string(), "DELETE /v1/volumes/a");
        call.answer(204, b"").unwrap();
        let problem = Problem::new(ProblemKind::Refused, "volume 'a' is in use");
        let refused = call.answer(422, &serde_json::to_vec(&problem).unwrap()).unwrap_err();
        assert_eq!(refused.to_string(), "volume 'a' is in use");
        let strange = call.answer(502, b"<html>").unwrap_err();
        assert!(strange.to_string().contains("DELETE /v1/volumes/a (HTTP status 502)"));
    }
}
