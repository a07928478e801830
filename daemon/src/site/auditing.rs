//! What the site writes into its audit log: every action on keys and tenants, before it begins and when it has ended.

use std::future::Future;

use block::VolumeName;
use control::{AuditView, ProblemKind, Timestamp};

use super::Site;
use super::mirrors::internal;
use super::volumes::problem;
use crate::api::OperationError;
use crate::audit::{AuditError, Entry, Outcome, verify};

impl Site {
    /// Does something and writes down who asked for it and how it ended. What cannot be written down is not begun, unless it
    /// takes keys away, as that must not wait for a disk.
    pub(super) async fn audited<T>(
        &self,
        action: &str,
        object: &str,
        work: impl Future<Output = Result<T, OperationError>>,
    ) -> Result<T, OperationError> {
        let actor = crate::api::caller();
        let takes_away = action == "tenant lock";
        let begun = self.note(&actor, action, object, Outcome::Begun, "");
        if let Err(error) = begun {
            tracing::error!(%error, action, object, "an action is not in the audit log");
            if !takes_away {
                let detail =
                    format!("'{action}' of {object} is refused, as it cannot be written down: {error}");
                return Err(problem(ProblemKind::Unavailable, detail));
            }
        }
        let outcome = work.await;
        let ended = match &outcome {
            Ok(_) => self.note(&actor, action, object, Outcome::Done, ""),
            Err(error) => self.note(&actor, action, object, Outcome::Failed, &error.detail),
        };
        if let Err(error) = ended {
            tracing::error!(%error, action, object, "the outcome of an action is not in the audit log");
        }
        outcome
    }

    /// Writes down what a partner had this site do.
    pub(super) fn record(&self, action: &str, object: &str, partner: &VolumeName) {
        let actor = format!("partner '{partner}'");
        if let Err(error) = self.note(&actor, action, object, Outcome::Done, "") {
            tracing::error!(%error, action, object, "an action is not in the audit log");
        }
    }

    fn note(
        &self,
        actor: &str,
        action: &str,
        object: &str,
        outcome: Outcome,
        detail: &str,
    ) -> Result<(), AuditError> {
        let actor = if actor.is_empty() { "unknown" } else { actor };
        let entry = Entry {
            sequence: 0,
            time: Timestamp(super::wall_time()),
            actor: actor.to_owned(),
            action: action.to_owned(),
            object: object.to_owned(),
            outcome,
            detail: detail.to_owned(),
            previous: String::new(),
        };
        // Two small writes and a sync, behind which the caller waits in any case.
        tokio::task::block_in_place(|| self.audit.append(entry))
    }

    /// `audit verify`.
    pub(super) async fn check_audit(&self, expected: Option<String>) -> Result<AuditView, OperationError> {
        let path = self.audit.path().to_owned();
        let shown = path.display().to_string();
        let checked = tokio::task::spawn_blocking(move || {
            std::fs::File::open(&path).and_then(|file| verify(file, expected.as_deref()))
        });
        let checked = checked.await.map_err(internal)?;
        let checked = checked.map_err(|error| {
            problem(ProblemKind::Unavailable, format!("audit log '{shown}' cannot be read: {error}"))
        })?;
        let whole = checked.map_err(|damage| {
            let detail =
                format!("audit log '{shown}' is not as it was written: {damage}; compare it with a copy");
            problem(ProblemKind::Refused, detail)
        })?;
        Ok(AuditView { file: shown, lines: whole.lines, head: whole.head })
    }
}
