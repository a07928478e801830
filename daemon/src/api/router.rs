//! Routes, and what the API itself refuses before the daemon is asked.

use std::future::Future;
use std::sync::Arc;

use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use control::{FailoverRequest, MirrorCreate, Problem, ProblemKind, REQUEST_BYTES_MAX};
use serde::Serialize;

use super::extract::{Body, Name, Refusal};
use super::socket::Caller;
use super::{OperationError, Operations};

/// The API over these operations.
pub fn router<O: Operations>(operations: Arc<O>) -> Router {
    Router::new()
        .route("/v1/volumes", get(volume_list::<O>).post(volume_create::<O>))
        .route("/v1/volumes/{name}", get(volume_show::<O>).delete(volume_delete::<O>))
        .route("/v1/volumes/{name}/resize", post(volume_resize::<O>))
        .route("/v1/volumes/{name}/access", get(volume_access::<O>).post(volume_access_change::<O>))
        .route("/v1/certificate", get(certificate_show::<O>))
        .route("/v1/partners", get(partner_list::<O>).post(partner_add::<O>))
        .route("/v1/partners/{name}", get(partner_show::<O>).delete(partner_remove::<O>))
        .route("/v1/mirrors", get(mirror_list::<O>).post(mirror_create::<O>))
        .route("/v1/mirrors/{name}", get(mirror_show::<O>).delete(mirror_delete::<O>))
        .route("/v1/mirrors/{name}/set", post(mirror_set::<O>))
        .route("/v1/mirrors/{name}/verify", post(mirror_verify::<O>))
        .route("/v1/mirrors/{name}/stop", post(mirror_stop::<O>))
        .route("/v1/mirrors/{name}/start", post(mirror_start::<O>))
        .route("/v1/mirrors/{name}/switch", post(mirror_switch::<O>))
        .route("/v1/mirrors/{name}/orphans", post(mirror_orphans::<O>))
        .route("/v1/mirrors/{name}/failover", post(mirror_failover::<O>))
        .route("/v1/mirrors/{name}/drill/start", post(mirror_drill_start::<O>))
        .route("/v1/mirrors/{name}/drill/stop", post(mirror_drill_stop::<O>))
        .route("/v1/volumes/{name}/rotate", post(key_rotate_volume::<O>))
        .route("/v1/tenants", get(tenant_list::<O>).post(tenant_create::<O>))
        .route("/v1/tenants/{name}", get(tenant_show::<O>).delete(tenant_delete::<O>))
        .route("/v1/tenants/{name}/lock", post(tenant_lock::<O>))
        .route("/v1/tenants/{name}/unlock", post(tenant_unlock::<O>))
        .route("/v1/tenants/{name}/rotate", post(key_rotate_tenant::<O>))
        .route("/v1/key-provider/test", post(key_provider_test::<O>))
        .route("/v1/key-provider/init", post(key_provider_init::<O>))
        .route("/v1/audit/verify", post(audit_verify::<O>))
        .route("/v1/status", get(status::<O>))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .layer(axum::middleware::from_fn(name_caller))
        .with_state(operations)
}

tokio::task_local! {
    /// Who asks, for the audit log: the user and process at the other end of the socket.
    static CALLER: String;
}

/// Who asked for what is being done; empty outside of a request.
pub fn caller() -> String {
    CALLER.try_with(String::clone).unwrap_or_default()
}

/// Tells what runs for the request who asks.
async fn name_caller(request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<ConnectInfo<Caller>>();
    let caller = caller.map(|ConnectInfo(caller)| caller.to_string()).unwrap_or_default();
    CALLER.scope(caller, next.run(request)).await
}

type Daemon<O> = State<Arc<O>>;

/// Runs the operation to its end even if the caller goes away, and answers with its outcome and this status.
async fn answer<T, F>(status: StatusCode, operation: F) -> Result<Response, Refusal>
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T, OperationError>> + Send + 'static,
{
    let caller = CALLER.try_with(String::clone).unwrap_or_default();
    match tokio::spawn(CALLER.scope(caller, operation)).await {
        Ok(Ok(_)) if status == StatusCode::NO_CONTENT => Ok(status.into_response()),
        Ok(Ok(view)) => Ok((status, Json(view)).into_response()),
        Ok(Err(error)) => Err(error.into()),
        Err(error) => {
            tracing::error!(%error, "an operation of the control API ended without an outcome");
            let detail = "the daemon failed while doing this; its log says more";
            Err(Refusal::new(ProblemKind::Internal, detail))
        }
    }
}

/// Declares handlers that only pass on: name, what they take, and the status of success.
macro_rules! handlers {
    ($($name:ident($($extract:ident $argument:ident),*) -> $status:ident;)+) => {$(
        async fn $name<O: Operations>(
            State(daemon): Daemon<O>,
            $($extract($argument): handlers!(@type $extract $name)),*
        ) -> Result<Response, Refusal> {
            answer(StatusCode::$status, async move { daemon.$name($($argument),*).await }).await
        }
    )+};
    (@type Name $name:ident) => { Name };
    (@type Body volume_create) => { Body<control::VolumeCreate> };
    (@type Body volume_resize) => { Body<control::VolumeResize> };
    (@type Body volume_access_change) => { Body<control::VolumeAccessChange> };
    (@type Body partner_add) => { Body<control::PartnerAdd> };
    (@type Body mirror_set) => { Body<control::MirrorSet> };
    (@type Body mirror_verify) => { Body<control::MirrorVerify> };
    (@type Body mirror_start) => { Body<control::MirrorStart> };
    (@type Body mirror_drill_start) => { Body<control::DrillStart> };
    (@type Body tenant_create) => { Body<control::TenantCreate> };
    (@type Body audit_verify) => { Body<control::AuditVerify> };
    (@type Body mirror_orphans) => { Body<control::OrphansRequest> };
}

handlers! {
    volume_create(Body create) -> CREATED;
    volume_list() -> OK;
    volume_show(Name name) -> OK;
    volume_resize(Name name, Body resize) -> OK;
    volume_access(Name name) -> OK;
    volume_access_change(Name name, Body change) -> OK;
    volume_delete(Name name) -> NO_CONTENT;
    certificate_show() -> OK;
    partner_add(Body add) -> CREATED;
    partner_list() -> OK;
    partner_show(Name name) -> OK;
    partner_remove(Name name) -> NO_CONTENT;
    mirror_list() -> OK;
    mirror_show(Name name) -> OK;
    mirror_set(Name name, Body set) -> OK;
    mirror_verify(Name name, Body verify) -> ACCEPTED;
    mirror_stop(Name name) -> OK;
    mirror_start(Name name, Body start) -> OK;
    mirror_drill_start(Name name, Body drill) -> OK;
    mirror_drill_stop(Name name) -> OK;
    mirror_switch(Name name) -> OK;
    mirror_orphans(Name name, Body orphans) -> OK;
    mirror_delete(Name name) -> NO_CONTENT;
    tenant_create(Body create) -> CREATED;
    tenant_list() -> OK;
    tenant_show(Name name) -> OK;
    tenant_delete(Name name) -> NO_CONTENT;
    tenant_lock(Name name) -> OK;
    tenant_unlock(Name name) -> OK;
    key_rotate_volume(Name name) -> OK;
    key_rotate_tenant(Name name) -> OK;
    key_provider_test() -> OK;
    key_provider_init() -> OK;
    audit_verify(Body verify) -> OK;
    status() -> OK;
}

async fn mirror_create<O: Operations>(
    State(daemon): Daemon<O>,
    Body(create): Body<MirrorCreate>,
) -> Result<Response, Refusal> {
    let name = &create.name;
    let mut volumes = create.volumes.clone();
    volumes.sort_unstable();
    volumes.dedup();
    if volumes.is_empty() || volumes.len() != create.volumes.len() {
        let detail = format!(
            "mirror '{name}' needs at least one volume, and each only once: name them in --volumes A,B"
        );
        return Err(Refusal::new(ProblemKind::Invalid, detail));
    }
    answer(StatusCode::CREATED, async move { daemon.mirror_create(create).await }).await
}

async fn mirror_failover<O: Operations>(
    State(daemon): Daemon<O>,
    Name(name): Name,
    Body(failover): Body<FailoverRequest>,
) -> Result<Response, Refusal> {
    if !failover.accept_loss && failover.at.is_none() {
        let detail = format!(
            "mirror '{name}' was not failed over: writes after its recovery point would be lost; \
             give --accept-loss to accept that"
        );
        return Err(Refusal::new(ProblemKind::Refused, detail));
    }
    answer(StatusCode::OK, async move { daemon.mirror_failover(name, failover).await }).await
}

async fn no_route(uri: Uri) -> Refusal {
    let detail = format!(
        "the API has no '{}': its paths begin with /v1/volumes, /v1/mirrors and the like",
        uri.path()
    );
    Refusal::new(ProblemKind::NotFound, detail)
}

async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let detail = format!("'{}' does not take {method}: use another method", uri.path());
    Refusal(Problem::new(ProblemKind::Invalid, detail).with_status(StatusCode::METHOD_NOT_ALLOWED.as_u16()))
}
