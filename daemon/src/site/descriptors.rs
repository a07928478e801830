//! Open files: how many this process may have, and how many of them others than hosts are sure to find free.
//!
//! The system gives the lowest free number to a new descriptor. So a connection whose number lies within the last few
//! below the limit says that all others are taken: whoever is to leave some free does not keep such a connection. That
//! holds also when the limit is changed while the daemon runs.

use std::os::fd::{AsFd, AsRawFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What connections of hosts leave free: for operators, for partners, and for the files that both make.
pub(super) const HOSTS_LEAVE: u64 = 16;
/// What connections to the console leave free: it is looked at when hosts have used up theirs.
pub(super) const CONSOLE_LEAVES: u64 = 8;
/// Descriptors that a site has whatever it serves: threads' rings and wakers, listeners, catalogue, standard streams.
const OWN: u64 = 64;

/// Raises the limit to what this process may set itself.
pub(super) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, limit = limit.current, "the limit on open files cannot be raised");
    }
}

/// True if `count` descriptors are left free, as far as the number of this one tells.
pub(super) fn leaves_free(descriptor: impl AsFd, count: u64) -> bool {
    let number = u64::try_from(descriptor.as_fd().as_raw_fd()).unwrap_or(0);
    getrlimit(Resource::Nofile).current.is_none_or(|limit| number.saturating_add(count) < limit)
}

/// What a site holds open at its fullest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    pub(super) connections: u64,
    pub(super) handshakes: u64,
    /// A home and an intent map each.
    pub(super) volumes: u64,
    /// Segments and checkpoints of redo logs, and spills.
    pub(super) redo_files: u64,
}

impl Demand {
    fn total(self) -> u64 {
        let Self { connections, handshakes, volumes, redo_files } = self;
        OWN + HOSTS_LEAVE + connections + handshakes + 2 * volumes + redo_files
    }

    /// What is wrong with the limit, if it is too low for this.
    pub(super) fn shortage(self) -> Option<String> {
        self.shortage_below(getrlimit(Resource::Nofile).current?)
    }

    fn shortage_below(self, limit: u64) -> Option<String> {
        let total = self.total();
        (limit < total).then(|| {
            format!(
                "the site may have {limit} files open, and needs {total} with all its connections: raise the limit \
                 (LimitNOFILE in its unit) or lower nbd_connections_max"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_below_the_demand_is_told() {
        let demand = Demand { connections: 1024, handshakes: 256, volumes: 100, redo_files: 65 };
        assert_eq!(demand.shortage_below(1625), None);
        let told = demand.shortage_below(1624).unwrap();
        assert!(told.contains("may have 1624 files open, and needs 1625"), "{told}");
    }

    #[test]
    fn a_descriptor_tells_what_is_left_by_its_number() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(leaves_free(&file, 0));
        assert!(getrlimit(Resource::Nofile).current.is_none_or(|limit| !leaves_free(&file, limit)));
    }
}
