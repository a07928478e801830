//! Synchronous mirroring: what may be claimed is true, and hosts wait no longer than the lease lets them.

use std::time::Duration;

use daemon::group::{Group, LinkFailure, MirrorMode};

use super::oracle;
use super::site::Outstanding;
use super::world::World;

/// No answer waits longer than the patience, the lease and its margin for the partner's sake; a disk and a tick beside them.
const WAIT_MAX: Duration =
    protocol::LEASE_PATIENCE.saturating_add(protocol::LEASE).saturating_add(protocol::LEASE_MARGIN);
const SLACK: Duration = Duration::from_millis(1500);

impl World {
    /// A target whose lease is valid has every write that a host of its primary was told of.
    pub(super) fn check_lease(&mut self, site: usize) {
        let Some(group) = self.enter(site) else { return };
        if group.lease_remaining().is_none() {
            return;
        }
        let Some(tip) = group.mirror_snapshot().map(|snapshot| snapshot.position) else { return };
        self.statistics.leased += 1;
        if let Some(oldest) = self.oracle.oldest_missing(1 - site, &tip, self.now) {
            self.fail(format!(
                "site {site} would claim a failover without loss at {tip}, but a write was answered at {oldest} ns that \
                 it lacks"
            ));
        }
    }

    /// A home write of a command ended.
    pub(super) fn note_home_ended(&mut self, site: usize, lineage: oracle::LineageKey, sequence: u64) {
        let now = self.now;
        let of = |known: &&mut Outstanding| {
            known.writes.iter().any(|write| (write.0, write.1) == (lineage, sequence))
        };
        if let Some(known) = self.sites[site].commands.values_mut().find(of) {
            known.home_ended = Some(now);
        }
    }

    /// Under `degrade` no host waits for a partner that is away.
    pub(super) fn check_waits(&mut self, site: usize) {
        if self.sites[site].policy.on_link_failure != LinkFailure::Degrade {
            return;
        }
        let limit = u64::try_from((WAIT_MAX + SLACK).as_nanos()).unwrap_or(u64::MAX);
        let late = |known: &&Outstanding| known.home_ended.is_some_and(|ended| self.now > ended + limit);
        if let Some(known) = self.sites[site].commands.values().find(late) {
            let text = format!("site {site} keeps {:?} although it is home for too long", known.command);
            self.fail(format!("{text}: {}", self.describe()));
        }
    }

    /// When all is calm a synchronous mirror is in force again by itself.
    pub(super) fn is_sync_back(&self, site: usize) -> bool {
        let snapshot = self.sites[site].group.as_ref().and_then(Group::mirror_snapshot);
        let in_force = snapshot.and_then(|snapshot| snapshot.sync).is_some_and(|sync| sync.in_force);
        self.sites[site].policy.mode == MirrorMode::Async || in_force
    }
}
