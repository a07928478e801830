//! `mirror verify`: the group does it; here is how it is asked for and how its report reads.

use block::VolumeName;
use control::{Extent, MirrorVerify, MirrorView, Timestamp, VerifyState, VerifyView};

use super::Site;
use crate::api::OperationError;
use crate::group::{VerifyProgress, VerifyReport};
use crate::shard::Verb;

impl Site {
    /// Begins a verify; the mirror's view tells how far it is.
    pub(super) async fn begin_verify(
        &self,
        name: &VolumeName,
        verify: MirrorVerify,
    ) -> Result<MirrorView, OperationError> {
        let (mirror, key) = self.known_mirror(name)?;
        self.verb(key, Verb::Verify { repair_from: verify.repair_from }).await?;
        self.mirror_view(&mirror).await
    }
}

/// How a group's report reads to operators; `names` are its volumes in index order.
pub(super) fn verify_view(report: &VerifyReport, names: &[VolumeName]) -> VerifyView {
    let extents = report.extents().into_iter().filter_map(|(volume, range)| {
        let volume = names.get(usize::from(volume.0))?.clone();
        Some(Extent { volume, offset: range.offset(), length: range.length() })
    });
    let (state, reason) = match &report.progress {
        VerifyProgress::Running => (VerifyState::Running, None),
        VerifyProgress::Ended => (VerifyState::Ended, None),
        VerifyProgress::GivenUp(reason) => (VerifyState::GivenUp, Some(reason.clone())),
    };
    VerifyView {
        state,
        reason,
        repair_from: report.repair_from,
        total_bytes: report.total.0,
        compared_bytes: report.compared.0,
        differing_bytes: report.differing_bytes().0,
        repaired_bytes: report.repaired.0,
        unreadable_bytes: report.unreadable.0,
        busy_bytes: report.busy.0,
        began: Timestamp(report.began),
        ended: report.ended.map(Timestamp),
        extents: extents.collect(),
    }
}
