//! The planned switch as operators order it, and the keys that the side needs which takes the role over.

use std::time::Duration;

use control::ProblemKind;
use protocol::Role;

use super::Site;
use super::mirrors::POLL;
use super::volumes::problem;
use crate::api::OperationError;
use crate::catalogue::MirrorRecord;
use crate::group::SwitchProgress;
use crate::shard::{GroupKey, ShardCommand, Verb};

/// The partner applies what it has before it is writable; a long redo log takes its time.
const SWITCH_LIMIT: Duration = Duration::from_secs(120);

impl Site {
    /// Gives this side's role to the partner and waits until it is heard to have taken it.
    pub(super) async fn switch_group(
        &self,
        mirror: &MirrorRecord,
        key: GroupKey,
    ) -> Result<(), OperationError> {
        let name = &mirror.name;
        let refused = |detail: String| {
            let detail = detail.replace("NAME", name.as_str());
            problem(ProblemKind::Refused, format!("mirror '{name}' cannot be switched: {detail}"))
        };
        self.verb(key, Verb::Switch).await.map_err(|error| refused(error.detail))?;
        let switched = async {
            loop {
                let snapshot = self.snapshot(key).await?;
                match snapshot.switch {
                    SwitchProgress::GivenUp(reason) => {
                        return Err(refused(format!("{reason}; hosts go on here")));
                    }
                    SwitchProgress::Idle
                        if snapshot.state.is_some_and(|state| state.role == Role::Secondary) =>
                    {
                        return Ok(());
                    }
                    SwitchProgress::Idle => {
                        return Err(refused("its role changed in another way".to_owned()));
                    }
                    SwitchProgress::Running | SwitchProgress::Offered(_) => tokio::time::sleep(POLL).await,
                }
            }
        };
        match tokio::time::timeout(SWITCH_LIMIT, switched).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let detail = format!(
                    "mirror '{name}' is still being switched: look at 'farshore mirror show' and the logs of both sites"
                );
                Err(problem(ProblemKind::Unavailable, detail))
            }
        }
    }

    /// Opens the keys of a group that is about to take the role over.
    pub(super) fn unlock_for(&self, key: GroupKey) {
        let result = match self.mirror_of_group(key) {
            Some(mirror) => self.unlock_group(&mirror, key).map_err(|error| error.detail),
            None => Err("the mirror is not known any more".to_owned()),
        };
        self.shard_of(key).send(ShardCommand::Unlocked { key, result });
    }
}
