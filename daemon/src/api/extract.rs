//! Requests into types, and refusals into problem documents.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use block::VolumeName;
use control::{Problem, ProblemKind, REQUEST_BYTES_MAX};
use serde::de::DeserializeOwned;

use super::OperationError;

/// A refusal as the API answers it.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Problem);

impl Refusal {
    pub(super) fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self(Problem::new(kind, detail))
    }
}

impl From<OperationError> for Refusal {
    fn from(error: OperationError) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.0)).into_response();
        let media_type = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, media_type);
        response
    }
}

/// The `{name}` of the path.
#[derive(Debug)]
pub(super) struct Name(pub(super) VolumeName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let invalid = |detail: String| Refusal::new(ProblemKind::Invalid, detail);
        let parameters = RawPathParams::from_request_parts(parts, state).await;
        let parameters = parameters.map_err(|error| invalid(error.body_text()))?;
        let name = parameters.iter().find(|(key, _)| *key == "name").map_or("", |(_, value)| value);
        name.parse().map(Self).map_err(|error: block::NameError| invalid(error.to_string()))
    }
}

/// The request's body, read as JSON whatever its media type; an empty body is an empty object.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bytes = Bytes::from_request(request, state).await.map_err(unread)?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|error| {
            Refusal::new(ProblemKind::Invalid, format!("the request's body is not understood: {error}"))
        })
    }
}

fn unread(rejection: BytesRejection) -> Refusal {
    let status = rejection.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        let detail =
            format!("the request's body is longer than {REQUEST_BYTES_MAX} bytes: send a shorter one");
        return Refusal(Problem::new(ProblemKind::Invalid, detail).with_status(status.as_u16()));
    }
    Refusal::new(
        ProblemKind::Invalid,
        format!("the request's body cannot be read: {}", rejection.body_text()),
    )
}
