//! Wrapped keys in catalogue and headers: what was replaced or destroyed is in no file any more, whenever a crash comes, and
//! tenants come back from the volumes' records.

use block::TenantId;
use crypto::{DataKey, DomainKey, KeyRecord, RootKind, WrappedDomainKey, Zeroizing};

use super::*;

const TENANT: TenantId = TenantId::from_bytes([0x77; 16]);

/// A record of volume `a`, the version of whose key is also that of the tenant's.
pub(super) fn wrap(version: u32) -> Vec<u8> {
    let domain = WrappedDomainKey::new(TENANT, RootKind::File, version, vec![9; 56]).unwrap();
    let key = DataKey::from_random(std::array::from_fn(|at| u8::try_from(at).unwrap())).unwrap();
    let random = Zeroizing::new([u8::try_from(version).unwrap(); 32]);
    let id = volume("a", "fast").id;
    KeyRecord::wrap(&key, id, &DomainKey::from_bytes([1; 32]), domain, version, &random).encode()
}

pub(super) fn tenant(text: &str) -> TenantRecord {
    TenantRecord { id: TENANT, name: name(text), locked: false, domain: None }
}

/// How often bytes are in the files below a folder, plain or as hexadecimal digits.
fn occurrences(folder: &Path, bytes: &[u8]) -> usize {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut found = 0;
    for entry in folder.read_dir().unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            found += occurrences(&entry.path(), bytes);
            continue;
        }
        let content = std::fs::read(entry.path()).unwrap();
        for wanted in [bytes, digits.as_bytes()] {
            found += content.windows(wanted.len()).filter(|part| *part == wanted).count();
        }
    }
    found
}

/// The wraps in a record, without what other records have too.
fn secret(record: &[u8]) -> &[u8] {
    &record[32..192]
}

fn with_records() -> Site {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    catalogue.replace_key(volume("a", "fast").id, wrap(1)).unwrap();
    drop(catalogue);
    site
}

#[test]
fn a_replaced_wrap_is_in_no_file_and_the_new_one_in_catalogue_and_both_slots() {
    let site = with_records();
    assert_eq!(occurrences(site.folder.path(), secret(&wrap(1))), 3);
    let (catalogue, _) = site.open().unwrap();
    catalogue.replace_key(volume("a", "fast").id, wrap(2)).unwrap();
    assert_eq!(occurrences(site.folder.path(), secret(&wrap(1))), 0);
    assert_eq!(occurrences(site.folder.path(), secret(&wrap(2))), 3);
    assert_eq!(catalogue.volume(&name("a")).unwrap().tenant(), TENANT);
}

#[test]
fn a_crash_at_any_step_of_a_rotation_leaves_a_wrap_that_opens_and_the_next_start_only_one() {
    let site = with_records();
    let mut steps = 0;
    loop {
        let crashed = site.copy();
        let catalogue = crashed.open_until(steps);
        let ended = catalogue.replace_key(volume("a", "fast").id, wrap(2)).is_ok();
        drop(catalogue);
        // An unclean end: the seal says so.
        let mut seal = std::fs::read(crashed.path("data/catalogue.sum")).unwrap();
        seal[0] ^= 1;
        std::fs::write(crashed.path("data/catalogue.sum"), seal).unwrap();
        let (catalogue, _) = crashed.open().unwrap();
        let stands = catalogue.volume(&name("a")).unwrap().wrapped_key;
        assert!(stands == wrap(1) || stands == wrap(2), "step {steps}");
        let record = KeyRecord::decode(&stands).unwrap();
        assert!(record.open(volume("a", "fast").id, &DomainKey::from_bytes([1; 32])).is_ok(), "step {steps}");
        let other = if stands == wrap(1) { wrap(2) } else { wrap(1) };
        assert_eq!(occurrences(crashed.folder.path(), secret(&other)), 0, "step {steps}");
        if ended {
            assert_eq!(stands, wrap(2));
            break;
        }
        steps += 1;
    }
    assert!(steps > 3, "header, catalogue, second slot and scrub are steps");
}

#[test]
fn a_destroyed_key_is_in_no_file_before_the_folder_is_removed() {
    let site = with_records();
    let (catalogue, _) = site.open().unwrap();
    catalogue.delete_mirror(MirrorId(Uuid::from_u128(42))).unwrap();
    let gone = catalogue.volume(&name("a")).unwrap();
    let folder = catalogue.delete_volume(gone.id).unwrap().unwrap();
    assert!(occurrences(site.folder.path(), secret(&wrap(1))) > 0);
    catalogue.destroy_key(&gone).unwrap();
    assert!(folder.exists());
    assert_eq!(occurrences(site.folder.path(), secret(&wrap(1))), 0);
}

#[test]
fn a_crash_at_any_step_of_an_erasure_destroys_the_key_at_the_next_start() {
    let site = with_records();
    let (catalogue, _) = site.open().unwrap();
    catalogue.delete_mirror(MirrorId(Uuid::from_u128(42))).unwrap();
    drop(catalogue);
    for steps in 0.. {
        let crashed = site.copy();
        let catalogue = crashed.open_until(steps);
        let gone = catalogue.volume(&name("a")).unwrap();
        let deleted = catalogue.delete_volume(gone.id);
        let destroyed = deleted.is_ok() && catalogue.destroy_key(&gone).is_ok();
        drop(catalogue);
        let mut seal = std::fs::read(crashed.path("data/catalogue.sum")).unwrap();
        seal[0] ^= 1;
        std::fs::write(crashed.path("data/catalogue.sum"), seal).unwrap();
        let (catalogue, _) = crashed.open().unwrap();
        let found = occurrences(crashed.folder.path(), secret(&wrap(1)));
        match catalogue.volume(&name("a")) {
            Some(volume) => assert_eq!((volume.wrapped_key, found), (wrap(1), 3), "step {steps}"),
            None => assert_eq!(found, 0, "step {steps}"),
        }
        if destroyed {
            assert!(steps > 3);
            break;
        }
    }
}

#[test]
fn tenants_have_names_and_rows_of_their_own_and_go_without_volumes_only() {
    let site = with_records();
    let (catalogue, _) = site.open().unwrap();
    catalogue.store_tenant(tenant("acme")).unwrap();
    let other = TenantRecord { id: TenantId::from_bytes([1; 16]), ..tenant("acme") };
    assert!(matches!(catalogue.store_tenant(other.clone()), Err(CatalogueError::Exists { .. })));
    let taken = TenantRecord { name: name("default"), ..other.clone() };
    assert!(matches!(catalogue.store_tenant(taken), Err(CatalogueError::Exists { .. })));
    catalogue.store_tenant(TenantRecord { name: name("other"), ..other.clone() }).unwrap();
    catalogue.store_tenant(TenantRecord { locked: true, ..tenant("acme") }).unwrap();
    let names = |catalogue: &Catalogue| -> Vec<String> {
        catalogue.tenants().iter().map(|tenant| tenant.name.to_string()).collect()
    };
    assert_eq!(names(&catalogue), ["acme", "default", "other"]);
    assert_eq!(catalogue.volumes_of(TENANT).len(), 1);
    assert_eq!(catalogue.volumes_of(TenantId::default()).len(), 2, "legacy wraps are the default tenant's");
    for tenant in ["acme", "default"] {
        assert!(catalogue.delete_tenant(&name(tenant)).is_err(), "{tenant}");
    }
    catalogue.delete_tenant(&name("other")).unwrap();
    drop(catalogue);
    let (catalogue, _) = site.open().unwrap();
    assert_eq!(names(&catalogue), ["acme", "default"]);
    assert!(catalogue.tenant_by_id(TENANT).unwrap().locked, "a lock holds over a restart");
}

#[test]
fn a_rebuild_finds_the_tenants_of_volumes_and_locks_them() {
    let site = with_records();
    let (catalogue, _) = site.open().unwrap();
    catalogue.store_tenant(TenantRecord { locked: true, ..tenant("acme") }).unwrap();
    drop(catalogue);
    let (catalogue, _) = site.rebuild().unwrap();
    let found = catalogue.tenant_by_id(TENANT).unwrap();
    assert!(found.locked && found.name.as_str() == "tenant-777777777777", "{found:?}");
    assert_eq!(found.wrapped_domain().unwrap().unwrap().version, 1);
    assert!(!catalogue.tenant_by_id(TenantId::default()).unwrap().locked);
}
