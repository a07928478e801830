//! Which of two rules of access lets in more: a replica is never more open than its primary.

use crate::access::{HostAccess, VolumeAccess};

impl VolumeAccess {
    /// True if no connection may do more under these rules than under `other`.
    pub fn is_within(&self, other: &Self) -> bool {
        if other.needs_tls() && !self.needs_tls() {
            return false;
        }
        if other.hosts.is_empty() {
            let only_reads = !self.hosts.is_empty() && self.hosts.iter().all(|host| host.read_only);
            return !other.read_only || self.read_only || only_reads;
        }
        let within = |host: &HostAccess| {
            let known = other.hosts.iter().find(|known| known.identity == host.identity);
            known.is_some_and(|known| {
                let only_reads = other.read_only || known.read_only;
                !only_reads || self.read_only || host.read_only
            })
        };
        !self.hosts.is_empty() && self.hosts.iter().all(within)
    }

    /// The rules under which every connection may do what it may under both; none if that is nothing for anybody, which
    /// no rules say.
    pub fn common_with(&self, other: &Self) -> Option<Self> {
        let hosts: Vec<_> = if self.hosts.is_empty() {
            other.hosts.clone()
        } else if other.hosts.is_empty() {
            self.hosts.clone()
        } else {
            let in_both = |host: &HostAccess| {
                let known = other.hosts.iter().find(|known| known.identity == host.identity)?;
                Some(HostAccess { read_only: host.read_only || known.read_only, ..host.clone() })
            };
            let hosts: Vec<_> = self.hosts.iter().filter_map(in_both).collect();
            if hosts.is_empty() {
                return None;
            }
            hosts
        };
        Some(Self {
            tls_required: self.tls_required || other.tls_required,
            read_only: self.read_only || other.read_only,
            hosts,
        })
    }

    /// Hosts are told apart by TLS only, so a list needs it.
    const fn needs_tls(&self) -> bool {
        self.tls_required || !self.hosts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use crate::access::{Admission, Peer};

    use super::*;

    /// Every rule over two hosts.
    fn rules() -> Vec<VolumeAccess> {
        let mut rules = Vec::new();
        for bits in 0..36_u32 {
            let host = |name: &str, way: u32| {
                let host: HostAccess = name.parse().unwrap();
                (way > 0).then_some(HostAccess { read_only: way == 2, ..host })
            };
            rules.push(VolumeAccess {
                tls_required: bits % 2 == 1,
                read_only: bits / 2 % 2 == 1,
                hosts: [host("a", bits / 4 % 3), host("b", bits / 12)].into_iter().flatten().collect(),
            });
        }
        rules
    }

    /// What each kind of connection may do: nothing, read, write.
    fn rights(rules: &VolumeAccess) -> Vec<u8> {
        let mut peers = vec![Peer { secured: false, identity: None }, Peer { secured: true, identity: None }];
        let named = |name: &str| Peer { secured: true, identity: Some(name.parse().unwrap()) };
        peers.extend(["a", "b", "stranger"].map(named));
        let right = |peer: &Peer| match rules.admit(peer) {
            Err(_) => 0,
            Ok(Admission::ReadOnly) => 1,
            Ok(Admission::ReadWrite) => 2,
        };
        peers.iter().map(right).collect()
    }

    #[test]
    fn the_order_and_the_common_part_are_what_admission_says_for_every_pair_of_rules() {
        for one in rules() {
            for other in rules() {
                let (ours, theirs) = (rights(&one), rights(&other));
                let within = ours.iter().zip(&theirs).all(|(ours, theirs)| ours <= theirs);
                assert_eq!(one.is_within(&other), within, "{one:?} within {other:?}");
                let common: Vec<_> = ours.iter().zip(&theirs).map(|(one, other)| *one.min(other)).collect();
                match one.common_with(&other) {
                    Some(found) => assert_eq!(rights(&found), common, "{one:?} and {other:?}"),
                    None => assert!(common.iter().all(|right| *right == 0), "{one:?} and {other:?}"),
                }
            }
        }
    }
}
