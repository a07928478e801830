//! What hosts can open: the handshake's view of the volumes, a view for each connection.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use block::{ByteCount, VolumeId};
use control::{AccessRefusal, Admission, Peer, VolumeAccess};
use frontend::nbd::{ExportDirectory, ExportInfo, ExportRefusal};

use crate::catalogue::VolumeRecord;
use crate::shard::GroupKey;

#[derive(Clone, Debug)]
struct Export {
    volume: VolumeId,
    size: ByteCount,
    access: VolumeAccess,
    group: Option<GroupKey>,
    presented: Result<(), String>,
    /// Its keys are wiped: nobody may open it, whatever its group says.
    locked: bool,
}

/// All exports, by name.
#[derive(Debug, Default)]
pub(super) struct Exports {
    exports: RwLock<BTreeMap<String, Export>>,
}

impl Exports {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Export>> {
        self.exports.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an export that is not presented yet, or one that cannot be.
    pub(super) fn insert(&self, volume: &VolumeRecord, group: Option<GroupKey>, reason: &str) {
        self.insert_as(volume.name.as_str(), volume, group, reason);
    }

    /// The same by another name: a copy of the volume.
    pub(super) fn insert_as(&self, name: &str, volume: &VolumeRecord, group: Option<GroupKey>, reason: &str) {
        let export = Export {
            volume: volume.id,
            size: volume.size,
            access: volume.access.clone(),
            group,
            presented: Err(reason.to_owned()),
            locked: false,
        };
        self.write().insert(name.to_owned(), export);
    }

    pub(super) fn remove(&self, name: &str) {
        self.write().remove(name);
    }

    /// A group's volumes are presented, or not, for a reason.
    pub(super) fn present(&self, group: GroupKey, presented: &Result<(), String>) {
        for export in self.write().values_mut().filter(|export| export.group == Some(group)) {
            export.presented.clone_from(presented);
        }
    }

    /// A copy that was added without a group is presented, in its own size.
    pub(super) fn present_copy(&self, name: &str, group: GroupKey, size: ByteCount) {
        if let Some(export) = self.write().get_mut(name) {
            *export = Export { size, group: Some(group), presented: Ok(()), ..export.clone() };
        }
    }

    /// A volume and its copies are not opened to anybody from here on; a connection that was handed over before has reached
    /// its shard.
    pub(super) fn lock(&self, volume: VolumeId) {
        self.set_locked(volume, true);
    }

    /// They may be opened again.
    pub(super) fn unlock(&self, volume: VolumeId) {
        self.set_locked(volume, false);
    }

    fn set_locked(&self, volume: VolumeId, locked: bool) {
        for export in self.write().values_mut().filter(|export| export.volume == volume) {
            export.locked = locked;
        }
    }

    /// A volume's size or access has changed; connections that are handed over from now on have the new one.
    pub(super) fn update(&self, volume: &VolumeRecord) {
        let mut exports = self.write();
        if let Some(export) = exports.get_mut(volume.name.as_str()) {
            export.size = volume.size;
        }
        // A copy of the volume is no more open than the volume.
        for export in exports.values_mut().filter(|export| export.volume == volume.id) {
            export.access.clone_from(&volume.access);
        }
    }

    /// Hands a connection over to the export's group, if its host may still have what it was promised. No change of
    /// access comes between this check and the end of `hand_over`. False if it is refused.
    pub(super) fn hand_over(
        &self,
        name: &str,
        peer: &Peer,
        read_only: bool,
        hand_over: impl FnOnce(GroupKey),
    ) -> bool {
        let exports = self.read();
        let export = exports.get(name);
        let export = export.filter(|export| !export.locked && export.access.permits(peer, read_only));
        match export.and_then(|export| export.group) {
            Some(group) => {
                hand_over(group);
                true
            }
            None => false,
        }
    }

    /// What this host may see. `full` is why no further host is served, if so.
    pub(super) const fn seen_by<'site>(
        &'site self,
        peer: &'site Peer,
        full: Option<String>,
    ) -> HostView<'site> {
        HostView { exports: self, peer, full }
    }
}

/// The exports as one host sees them.
pub(super) struct HostView<'site> {
    exports: &'site Exports,
    peer: &'site Peer,
    full: Option<String>,
}

impl ExportDirectory for HostView<'_> {
    /// What the host may not open it does not learn of.
    fn list(&self) -> Vec<String> {
        let exports = self.exports.read();
        let admitted = exports.iter().filter(|(_, export)| export.access.admit(self.peer).is_ok());
        admitted.map(|(name, _)| name.clone()).collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        let exports = self.exports.read();
        let export = exports.get(name).ok_or(ExportRefusal::Unknown)?;
        let admission = export.access.admit(self.peer).map_err(|refusal| refused(name, refusal))?;
        if export.locked {
            return Err(ExportRefusal::NotPresented {
                reason: format!("export '{name}' is not available: it is locked"),
            });
        }
        if let Err(reason) = &export.presented {
            return Err(ExportRefusal::NotPresented {
                reason: format!("export '{name}' is not available: {reason}"),
            });
        }
        if let Some(reason) = &self.full {
            return Err(ExportRefusal::Denied {
                reason: format!("export '{name}' is not available: {reason}"),
            });
        }
        let read_only = match admission {
            Admission::ReadOnly => true,
            Admission::ReadWrite => false,
        };
        Ok(ExportInfo { volume: export.volume, size: export.size, read_only, description: None })
    }
}

fn refused(name: &str, refusal: AccessRefusal) -> ExportRefusal {
    match refusal {
        AccessRefusal::TlsRequired => ExportRefusal::TlsRequired,
        AccessRefusal::NoIdentity | AccessRefusal::NotListed => {
            ExportRefusal::Denied { reason: format!("export '{name}' is refused: {refusal}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use control::{Cache, HostAccess};

    use super::*;

    const GROUP: GroupKey = GroupKey(7);

    fn volume(name: &str, access: VolumeAccess) -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::default(),
            name: name.parse().unwrap(),
            size: ByteCount(1 << 20),
            class: "standard".to_owned(),
            iops: None,
            cache: Cache::None,
            access,
            wrapped_key: Vec::new(),
            pool: "default".parse().unwrap(),
            revision: 0,
        }
    }

    fn listed(hosts: &[&str]) -> VolumeAccess {
        let hosts = hosts.iter().map(|host| host.parse::<HostAccess>().unwrap()).collect();
        VolumeAccess { hosts, ..VolumeAccess::default() }
    }

    fn host(name: &str) -> Peer {
        Peer { secured: true, identity: Some(name.parse().unwrap()) }
    }

    fn site() -> Exports {
        let exports = Exports::default();
        exports.insert(&volume("open", VolumeAccess::default()), Some(GROUP), "");
        let secured = VolumeAccess { tls_required: true, ..VolumeAccess::default() };
        exports.insert(&volume("secured", secured), Some(GROUP), "");
        exports.insert(&volume("named", listed(&["a", "b:ro"])), Some(GROUP), "");
        exports.present(GROUP, &Ok(()));
        exports
    }

    #[test]
    fn a_host_sees_and_opens_what_its_access_allows() {
        let exports = site();
        let clear = Peer::default();
        let unknown = Peer { secured: true, identity: None };
        for (peer, seen) in [
            (&clear, vec!["open"]),
            (&unknown, vec!["open", "secured"]),
            (&host("a"), vec!["named", "open", "secured"]),
            (&host("c"), vec!["open", "secured"]),
        ] {
            assert_eq!(exports.seen_by(peer, None).list(), seen, "{peer:?}");
        }
        let find = |peer: &Peer, name: &str| exports.seen_by(peer, None).find(name);
        assert_eq!(find(&clear, "secured"), Err(ExportRefusal::TlsRequired));
        assert_eq!(find(&clear, "named"), Err(ExportRefusal::TlsRequired));
        assert_eq!(find(&clear, "other"), Err(ExportRefusal::Unknown));
        assert!(matches!(find(&unknown, "named"), Err(ExportRefusal::Denied { .. })));
        assert!(matches!(find(&host("c"), "named"), Err(ExportRefusal::Denied { .. })));
        assert!(!find(&host("a"), "named").unwrap().read_only);
        assert!(find(&host("b"), "named").unwrap().read_only);
    }

    #[test]
    fn a_full_site_refuses_with_its_reason() {
        let exports = site();
        let refused =
            exports.seen_by(&Peer::default(), Some("it is full".to_owned())).find("open").unwrap_err();
        assert_eq!(refused.to_string(), "export 'open' is not available: it is full");
    }

    #[test]
    fn a_connection_is_handed_over_only_with_what_it_still_may() {
        let exports = site();
        let hand_over = |peer: &Peer, read_only| {
            let mut group = None;
            let handed = exports.hand_over("named", peer, read_only, |key| group = Some(key));
            assert_eq!(handed, group == Some(GROUP));
            handed
        };
        assert!(hand_over(&host("a"), false));
        exports.update(&volume("named", listed(&["a:ro"])));
        assert!(!hand_over(&host("a"), false), "it was promised more than it may now");
        assert!(hand_over(&host("a"), true));
        assert!(!hand_over(&host("b"), true));
        exports.remove("named");
        assert!(!hand_over(&host("a"), true));
    }

    #[test]
    fn a_copy_has_its_own_size_and_the_volumes_access() {
        let exports = site();
        let open = volume("open", VolumeAccess::default());
        exports.insert_as("open@drill", &open, None, "it begins");
        exports.present(GROUP, &Ok(()));
        assert!(exports.seen_by(&Peer::default(), None).find("open@drill").is_err());
        exports.update(&VolumeRecord { size: ByteCount(4 << 20), access: listed(&["a"]), ..open });
        exports.present_copy("open@drill", GROUP, ByteCount(3 << 20));
        assert!(
            exports.seen_by(&Peer::default(), None).find("open@drill").is_err(),
            "the access has changed"
        );
        let seen = exports.seen_by(&host("a"), None).find("open@drill").unwrap();
        assert_eq!(seen.size, ByteCount(3 << 20));
    }

    #[test]
    fn a_new_size_is_seen_by_the_next_handshake() {
        let exports = site();
        let grown = VolumeRecord { size: ByteCount(2 << 20), ..volume("open", VolumeAccess::default()) };
        exports.update(&grown);
        let seen = exports.seen_by(&Peer::default(), None).find("open").unwrap();
        assert_eq!(seen.size, ByteCount(2 << 20));
    }
}
