//! Refusals: RFC 9457 problem documents, media type `application/problem+json`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of refusal it is: it tells the caller what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProblemKind {
    /// The name is taken, or the object is in use: choose another or free it.
    #[serde(rename = "urn:farshore:problem:conflict")]
    Conflict,
    /// There is no such object or route.
    #[serde(rename = "urn:farshore:problem:not-found")]
    NotFound,
    /// The request itself is wrong: mend it.
    #[serde(rename = "urn:farshore:problem:invalid")]
    Invalid,
    /// The request is right, but must not be done in the present state.
    #[serde(rename = "urn:farshore:problem:refused")]
    Refused,
    /// It cannot be done now: a partner, a pool or the daemon is not ready; try later.
    #[serde(rename = "urn:farshore:problem:unavailable")]
    Unavailable,
    /// The daemon failed: its log says more.
    #[serde(rename = "urn:farshore:problem:internal")]
    Internal,
}

impl ProblemKind {
    /// The HTTP status that goes with the kind.
    pub const fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Refused => 422,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }

    /// The kind in words.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Conflict => "Conflict",
            Self::NotFound => "Not found",
            Self::Invalid => "Invalid request",
            Self::Refused => "Refused",
            Self::Unavailable => "Unavailable",
            Self::Internal => "Internal error",
        }
    }
}

/// A problem document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The kind, as a URI.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// One sentence that names the object, what is wrong and what to do.
    pub detail: String,
}

impl Problem {
    /// The problem of this kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, title: kind.title().to_owned(), status: kind.status(), detail: detail.into() }
    }

    /// The same with another status than the kind's, for what HTTP itself defines (405, 413).
    pub fn with_status(self, status: u16) -> Self {
        Self { status, ..self }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_has_the_members_of_rfc_9457() {
        let problem = Problem::new(ProblemKind::NotFound, "volume 'a' does not exist");
        let json = serde_json::to_string(&problem).unwrap();
        assert_eq!(
            json,
            r#"{"type":"urn:farshore:problem:not-found","title":"Not found","status":404,"detail":"volume 'a' does not exist"}"#
        );
        assert_eq!(serde_json::from_str::<Problem>(&json).unwrap(), problem);
    }
}
