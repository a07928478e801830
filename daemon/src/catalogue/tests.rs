//! The catalogue under crashes at every durable step, damage and misuse.

use std::num::NonZeroU32;
use std::path::Path;

use block::ByteCount;
use control::{Cache, MirrorMode, Overload, Rate, Role, VolumeAccess};
use uuid::Uuid;

use super::header::Header;
use super::*;

/// A data directory with two pools, that can be copied and opened again.
struct Site {
    folder: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let folder = scratch();
        for pool in ["fast", "slow"] {
            std::fs::create_dir(folder.path().join(pool)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn pools(&self) -> Pools {
        ["fast", "slow"].into_iter().map(|pool| (name(pool), self.path(pool))).collect()
    }

    fn lock(&self) -> DirectoryLock {
        DirectoryLock::acquire(&self.path("data")).unwrap()
    }

    fn open(&self) -> Result<(Catalogue, Vec<Notice>), CatalogueError> {
        cleared(Catalogue::open(self.lock(), self.pools()))
    }

    fn rebuild(&self) -> Result<(Catalogue, Vec<Notice>), CatalogueError> {
        cleared(Catalogue::rebuild(self.lock(), self.pools()))
    }

    /// Opens with a crash after some durable steps; opening takes none if all is well.
    fn open_until(&self, steps: u32) -> Catalogue {
        Catalogue::open_with(self.lock(), self.pools(), Fuse::after(steps)).unwrap().0
    }

    /// Puts the catalogue and its seal back as they are in `backup`.
    fn restore_catalogue(&self, backup: &Self) {
        for file in [FILE_NAME, "catalogue.sum"] {
            std::fs::copy(backup.path("data").join(file), self.path("data").join(file)).unwrap();
        }
    }

    fn copy(&self) -> Self {
        let copy = Self { folder: scratch() };
        copy_folder(self.folder.path(), copy.folder.path());
        copy
    }
}

type Opened = Result<(Catalogue, Vec<Notice>), CatalogueError>;

/// What a site does with leftovers once it runs.
fn cleared(opened: Opened) -> Opened {
    if let Ok((catalogue, _)) = &opened {
        for folder in catalogue.take_leftovers() {
            remove_folder(&folder).unwrap();
            assert!(!folder.exists());
        }
        assert!(catalogue.take_leftovers().is_empty());
    }
    opened
}

/// A folder in memory if there is such: the crashes here are simulated, so nothing is gained by waiting for a disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in from.read_dir().unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

fn volume(text: &str, pool: &str) -> VolumeRecord {
    let mut bytes = [7; 16];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    VolumeRecord {
        id: VolumeId::from_bytes(bytes),
        name: name(text),
        size: ByteCount(1 << 20),
        class: "standard".to_owned(),
        iops: Some("750".parse().unwrap()),
        cache: Cache::Page,
        access: VolumeAccess::default(),
        wrapped_key: vec![0x5a; 72],
        pool: name(pool),
        revision: 1,
    }
}

impl Catalogue {
    fn update_volume(&self, new: VolumeRecord) -> Result<(), CatalogueError> {
        let changed = self.change_volume(new.id, |volume| {
            volume.size = new.size;
            volume.access = new.access;
        });
        changed.map(drop)
    }
}

fn restricted() -> VolumeAccess {
    let hosts = ["host 1", "host 2:ro"].map(|host| host.parse().unwrap()).into();
    VolumeAccess { tls_required: true, read_only: false, hosts }
}

fn partner(text: &str) -> PartnerRecord {
    PartnerRecord {
        name: name(text),
        address: "127.0.0.1:10820".parse().unwrap(),
        certificate: "-----BEGIN CERTIFICATE-----".repeat(20),
    }
}

fn group(epoch: u64, incarnation: u64, state: &str) -> GroupRecord {
    GroupRecord { epoch, incarnation, role: Role::Primary, state: state.as_bytes().to_vec() }
}

fn mirror(text: &str, volumes: &[&VolumeRecord]) -> MirrorRecord {
    MirrorRecord {
        id: MirrorId(Uuid::from_u128(42)),
        name: name(text),
        partner: name("az2"),
        mode: MirrorMode::Async,
        rpo_seconds: NonZeroU32::new(900).unwrap(),
        overload: Overload::Bitmap,
        bandwidth: Rate::default(),
        resync_rate: Rate::default(),
        volumes: volumes.iter().map(|volume| volume.id).collect(),
        group: group(1, 1, "first"),
        revision: 0,
        rebuilt: false,
    }
}

fn create_volume(catalogue: &Catalogue, volume: &VolumeRecord) -> Result<(), CatalogueError> {
    let folder = catalogue.reserve_volume(volume.clone())?;
    std::fs::write(folder.join("data"), b"data").unwrap();
    catalogue.commit_volume(volume.id)
}

/// Volumes a and b mirrored as m, and c on its own.
fn populated() -> Site {
    let site = Site::new();
    let (catalogue, notices) = site.open().unwrap();
    assert_eq!(notices, []);
    let (a, b, c) = (volume("a", "fast"), volume("b", "slow"), volume("c", "fast"));
    for volume in [&a, &b, &c] {
        create_volume(&catalogue, volume).unwrap();
    }
    catalogue.add_partner(partner("az2")).unwrap();
    catalogue.create_mirror(mirror("m", &[&b, &a])).unwrap();
    drop(catalogue);
    site
}

fn content(catalogue: &Catalogue) -> Content {
    catalogue.state().content.clone()
}

/// What a rebuild can know: partners only through mirrors; and it marks mirrors.
fn rebuildable(mut content: Content) -> Content {
    let mirrors = &mut content.mirrors;
    content.partners.retain(|name, _| mirrors.values().any(|mirror| mirror.partner == *name));
    for mirror in mirrors.values_mut() {
        mirror.rebuilt = true;
    }
    content
}

type Operation = fn(&Catalogue) -> Result<(), CatalogueError>;

const OPERATIONS: [(&str, Operation); 9] = [
    ("create a volume", |catalogue| create_volume(catalogue, &volume("d", "slow"))),
    ("delete a volume", |catalogue| {
        let folder = catalogue.delete_volume(volume("c", "fast").id)?.unwrap();
        catalogue.fuse.step().map_err(error::file_error("removing volume folder", &folder))?;
        remove_folder(&folder)
    }),
    ("add a partner", |catalogue| catalogue.add_partner(partner("az3"))),
    ("create a mirror", |catalogue| {
        let second =
            MirrorRecord { id: MirrorId(Uuid::from_u128(43)), ..mirror("n", &[&volume("c", "fast")]) };
        catalogue.create_mirror(second)
    }),
    ("raise the epoch", |catalogue| {
        let id = MirrorId(Uuid::from_u128(42));
        catalogue.update_group(id, group(2, 1, "second")).map(|notices| assert_eq!(notices, []))
    }),
    ("change the state only", |catalogue| {
        let id = MirrorId(Uuid::from_u128(42));
        catalogue.update_group(id, group(1, 1, "stopped")).map(|notices| assert_eq!(notices, []))
    }),
    ("grow a volume", |catalogue| {
        catalogue.update_volume(VolumeRecord { size: ByteCount(2 << 20), ..volume("c", "fast") })
    }),
    ("limit a mirrored volume to hosts", |catalogue| {
        catalogue.update_volume(VolumeRecord { access: restricted(), ..volume("a", "fast") })
    }),
    ("delete a mirror", |catalogue| {
        let notices = catalogue.delete_mirror(MirrorId(Uuid::from_u128(42)))?;
        assert_eq!(notices, []);
        Ok(())
    }),
];

/// Some failures after the point of no return are notices; a crash there must still leave one of the two states.
fn run(operation: Operation, catalogue: &Catalogue) -> bool {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| operation(catalogue)));
    matches!(outcome, Ok(Ok(())))
}

#[test]
fn a_crash_at_any_step_leaves_the_state_before_or_after_also_for_a_rebuild() {
    for (what, operation) in OPERATIONS {
        let site = populated();
        let before = content(&site.open().unwrap().0);
        let after = {
            let done = site.copy();
            let (catalogue, _) = done.open().unwrap();
            operation(&catalogue).unwrap();
            content(&catalogue)
        };
        assert_ne!(before, after, "{what}");
        let mut crashes = 0;
        loop {
            let crashed = site.copy();
            let ended = run(operation, &crashed.open_until(crashes));
            check_crashed(&crashed, what, crashes, &before, &after);
            if ended {
                break;
            }
            crashes += 1;
        }
        assert!(crashes > 0, "{what} has a durable step");
    }
}

fn check_crashed(crashed: &Site, what: &str, step: u32, before: &Content, after: &Content) {
    let lost = crashed.copy();
    let reopened = content(&crashed.open().unwrap().0);
    assert!(reopened == *before || reopened == *after, "{what}, crash at step {step}: {reopened:#?}");
    // Catalogue and headers agree now, and nothing is left to mend.
    let (catalogue, notices) = crashed.open().unwrap();
    assert_eq!((notices, content(&catalogue)), (vec![], reopened.clone()), "{what}, {step}");
    drop(catalogue);
    let rebuilt = content(&crashed.rebuild().unwrap().0);
    assert_eq!(rebuilt, rebuildable(reopened), "{what}, crash at step {step}, rebuilt after reopening");
    // The crash takes the catalogue with it.
    std::fs::remove_file(lost.path("data").join(FILE_NAME)).unwrap();
    let rebuilt = content(&lost.rebuild().unwrap().0);
    let possible = [rebuildable(before.clone()), rebuildable(after.clone())];
    assert!(possible.contains(&rebuilt), "{what}, crash at step {step}, rebuilt at once: {rebuilt:#?}");
}

#[test]
fn a_rebuild_equals_what_was_lost_and_counts_as_unclean() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let long = "x".repeat(GROUP_STATE_BYTES_MAX);
    let id = MirrorId(Uuid::from_u128(42));
    catalogue.update_group(id, group(3, 5, &long)).unwrap();
    let before = content(&catalogue);
    drop(catalogue);
    let (catalogue, notices) = site.rebuild().unwrap();
    assert_eq!(content(&catalogue), rebuildable(before));
    assert_eq!(notices.len(), 2, "the headers learn of the rebuild: {notices:?}");
    assert!(site.path("data/catalogue.redb.old-1").exists());
    // The mark stays until the unclean start has been counted.
    catalogue.update_group(id, group(3, 5, "seen")).unwrap();
    assert!(catalogue.mirror_by_id(id).unwrap().rebuilt);
    catalogue.update_group(id, group(3, 6, "counted")).unwrap();
    assert!(!catalogue.mirror_by_id(id).unwrap().rebuilt);
    drop(catalogue);
    assert_eq!(site.open().unwrap().1, []);
}

#[test]
fn the_highest_epoch_of_any_header_wins() {
    let site = populated();
    let older = site.copy();
    let (catalogue, _) = site.open().unwrap();
    catalogue.update_group(MirrorId(Uuid::from_u128(42)), group(9, 1, "fenced")).unwrap();
    drop(catalogue);
    // One volume's pool comes from before the change, and the catalogue too.
    site.restore_catalogue(&older);
    let folder = format!("slow/{}", volume("b", "slow").id);
    std::fs::copy(older.path(&folder).join("header"), site.path(&folder).join("header")).unwrap();
    let rebuilt = site.copy();
    let (catalogue, notices) = site.open().unwrap();
    assert_eq!(catalogue.mirror(&name("m")).unwrap().group, group(9, 1, "fenced"));
    assert!(
        matches!(notices[..], [Notice::HeaderAhead { epoch: 9, .. }, Notice::HeaderRestored { .. }]),
        "{notices:?}"
    );
    let (catalogue, _) = rebuilt.rebuild().unwrap();
    assert_eq!(catalogue.mirror(&name("m")).unwrap().group, group(9, 1, "fenced"));
}

#[test]
fn neither_epoch_nor_incarnation_falls() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let id = MirrorId(Uuid::from_u128(42));
    catalogue.update_group(id, group(4, 4, "")).unwrap();
    for (epoch, incarnation) in [(3, 4), (4, 3), (5, 3)] {
        let refused = catalogue.update_group(id, group(epoch, incarnation, "")).unwrap_err();
        assert!(matches!(refused, CatalogueError::Falls { .. }), "{refused}");
    }
    assert_eq!(catalogue.mirror_by_id(id).unwrap().group, group(4, 4, ""));
}

#[test]
fn a_torn_or_damaged_slot_leaves_the_other_and_two_are_restored_from_the_catalogue() {
    let site = populated();
    let folder = site.path("fast").join(volume("c", "fast").id.to_string());
    let path = folder.join("header");
    let whole = std::fs::read(&path).unwrap();
    let newest = Header::read(&folder, &name("fast")).unwrap();
    for damaged in [0, 4, 20, 100, 255, 300, 16_383] {
        let mut older = 0;
        for slot in [0, 16_384] {
            let mut bytes = whole.clone();
            bytes[slot + damaged] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            older += u32::from(Header::read(&folder, &name("fast")).unwrap() != newest);
        }
        assert_eq!(older, 1, "the slot of the newer generation was the damaged one once");
    }
    let mut bytes = whole;
    bytes[200] ^= 1;
    bytes[16_584] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(Header::read(&folder, &name("fast")).is_err());
    let (_, notices) = site.open().unwrap();
    assert_eq!(notices, [Notice::HeaderRestored { volume: name("c") }]);
    assert_eq!(Header::read(&folder, &name("fast")).unwrap(), newest);
}

#[test]
fn a_damaged_catalogue_is_one_clear_error_and_never_a_panic() {
    let site = populated();
    let file = site.path("data").join(FILE_NAME);
    let whole = std::fs::read(&file).unwrap();
    let before = content(&site.open().unwrap().0);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..300 {
        let mut bytes = whole.clone();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let place = usize::try_from(random >> 8).unwrap() % bytes.len();
        match round % 5 {
            0 => bytes.truncate(place),
            1 => bytes[place..].iter_mut().take(4096).for_each(|byte| *byte = 0),
            2 => bytes.iter_mut().skip(place).take(512).for_each(|byte| *byte ^= 0xa5),
            3 => bytes[place % 512] ^= 1 << (random % 8),
            _ => bytes[place] ^= 1 << (random % 8),
        }
        std::fs::write(&file, &bytes).unwrap();
        let text = site.open().unwrap_err().to_string();
        assert!(text.contains(file.to_str().unwrap()), "{text}");
        assert!(text.contains("farshored --rebuild-catalogue"), "{text}");
    }
    std::fs::write(&file, b"").unwrap();
    assert!(matches!(site.open(), Err(CatalogueError::Damaged { .. })));
    let (catalogue, _) = site.rebuild().unwrap();
    assert_eq!(content(&catalogue), rebuildable(before));
}

#[test]
fn a_death_while_the_catalogue_changes_leaves_the_judgement_to_the_store() {
    let site = populated();
    let before = content(&site.open().unwrap().0);
    // The catalogue as a killed process leaves it: not closed, and its seal open.
    let (catalogue, _) = site.open().unwrap();
    let killed = site.copy();
    drop(catalogue);
    for seal in ["missing", "open", "closed"] {
        let copy = killed.copy();
        let file = copy.path("data").join(FILE_NAME);
        match seal {
            "missing" => std::fs::remove_file(file.with_extension("sum")).unwrap(),
            "open" => seal::Seal::of(&file).open().unwrap(),
            _ => {}
        }
        assert_eq!(content(&copy.open().unwrap().0), before, "{seal}");
    }
    // Without a seal the plainest damage is the store's to report.
    let file = killed.path("data").join(FILE_NAME);
    std::fs::remove_file(file.with_extension("sum")).unwrap();
    for damage in [b"".as_slice(), b"not a database"] {
        std::fs::write(&file, damage).unwrap();
        let refused = killed.open().unwrap_err();
        assert!(matches!(refused, CatalogueError::Damaged { .. }), "{refused}");
    }
}

#[test]
fn a_missing_catalogue_beside_volumes_is_refused_and_an_empty_site_starts_empty() {
    let site = populated();
    std::fs::remove_file(site.path("data").join(FILE_NAME)).unwrap();
    let refused = site.open().unwrap_err().to_string();
    assert!(
        refused.contains("catalogue.redb' is missing") && refused.contains("--rebuild-catalogue"),
        "{refused}"
    );
    site.rebuild().unwrap();
    let empty = Site::new();
    assert!(matches!(empty.rebuild(), Err(CatalogueError::NothingToRebuild { .. })));
    let identity = empty.open().unwrap().0.site();
    assert_eq!(empty.open().unwrap().0.site(), identity);
}

#[test]
fn an_old_catalogue_and_a_foreign_volume_are_refused() {
    let site = populated();
    let old = site.copy();
    let (catalogue, _) = site.open().unwrap();
    create_volume(&catalogue, &volume("d", "fast")).unwrap();
    drop(catalogue);
    site.restore_catalogue(&old);
    let refused = site.open().unwrap_err();
    assert!(matches!(refused, CatalogueError::Stale { .. }), "{refused}");
    assert_eq!(site.rebuild().unwrap().0.volumes().len(), 4);

    let other = Site::new();
    let (catalogue, _) = other.open().unwrap();
    let foreign = volume("x", "fast");
    create_volume(&catalogue, &foreign).unwrap();
    let folder = format!("fast/{}", foreign.id);
    std::fs::create_dir(old.path(&folder)).unwrap();
    copy_folder(&other.path(&folder), &old.path(&folder));
    for refused in [old.open().unwrap_err(), old.rebuild().unwrap_err()] {
        assert!(matches!(refused, CatalogueError::OtherSite { .. }), "{refused}");
    }
}

#[test]
fn an_absent_pool_takes_its_volumes_offline_and_stops_a_rebuild_of_their_mirror() {
    let site = populated();
    std::fs::rename(site.path("slow"), site.path("unmounted")).unwrap();
    let (catalogue, notices) = site.open().unwrap();
    assert!(
        matches!(&notices[..], [Notice::FolderMissing { volume, .. }] if *volume == name("b")),
        "{notices:?}"
    );
    // The group can still be fenced.
    let id = MirrorId(Uuid::from_u128(42));
    let notices = catalogue.update_group(id, group(2, 1, "fenced")).unwrap();
    assert!(matches!(notices[..], [Notice::HeaderNotWritten { .. }]), "{notices:?}");
    drop(catalogue);
    assert!(matches!(site.rebuild(), Err(CatalogueError::MirrorIncomplete { expected: 2, found: 1, .. })));
    std::fs::rename(site.path("unmounted"), site.path("slow")).unwrap();
    let (catalogue, notices) = site.open().unwrap();
    assert_eq!(notices, [Notice::HeaderRestored { volume: name("b") }]);
    assert_eq!(catalogue.mirror_by_id(id).unwrap().group.epoch, 2);
}

#[test]
fn what_is_taken_in_use_unknown_or_too_long_is_refused_and_changes_nothing() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let before = content(&catalogue);
    let a = volume("a", "fast");
    let long = |length| "x".repeat(length);
    let refusals = [
        catalogue.reserve_volume(a.clone()).map(drop),
        catalogue.reserve_volume(VolumeRecord { name: name("c"), ..volume("e", "fast") }).map(drop),
        catalogue.reserve_volume(volume("e", "nowhere")).map(drop),
        catalogue.reserve_volume(VolumeRecord { class: long(65), ..volume("e", "fast") }).map(drop),
        catalogue.reserve_volume(VolumeRecord { wrapped_key: vec![], ..volume("e", "fast") }).map(drop),
        catalogue.commit_volume(a.id),
        catalogue.delete_volume(a.id).map(drop),
        catalogue.delete_volume(volume("e", "fast").id).map(drop),
        catalogue.add_partner(partner("az2")),
        catalogue.add_partner(PartnerRecord { certificate: long(7000), ..partner("az3") }),
        catalogue.remove_partner(&name("az2")),
        catalogue.remove_partner(&name("az3")),
    ];
    all_refused(refusals);
    assert_eq!(content(&catalogue), before);
}

fn all_refused<const N: usize>(refusals: [Result<(), CatalogueError>; N]) {
    for (number, refusal) in refusals.into_iter().enumerate() {
        let kind = refusal.unwrap_err().kind();
        assert_ne!(kind, control::ProblemKind::Internal, "refusal {number}");
    }
}

#[test]
fn a_mirror_of_what_is_taken_or_unknown_is_refused_and_changes_nothing() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let before = content(&catalogue);
    let (a, c) = (volume("a", "fast"), volume("c", "fast"));
    let long = |length| "x".repeat(length);
    let second = MirrorRecord { id: MirrorId(Uuid::from_u128(43)), ..mirror("n", &[&c]) };
    all_refused([
        catalogue.create_mirror(mirror("m", &[&c])),
        catalogue.create_mirror(MirrorRecord { name: name("m"), ..second.clone() }),
        catalogue.create_mirror(MirrorRecord { volumes: vec![], ..second.clone() }),
        catalogue.create_mirror(MirrorRecord { volumes: vec![c.id, c.id], ..second.clone() }),
        catalogue.create_mirror(MirrorRecord { volumes: vec![a.id], ..second.clone() }),
        catalogue.create_mirror(MirrorRecord { partner: name("az3"), ..second.clone() }),
        catalogue.create_mirror(MirrorRecord { group: group(1, 1, &long(8193)), ..second }),
        catalogue.delete_mirror(MirrorId(Uuid::from_u128(43))).map(drop),
    ]);
    assert_eq!(content(&catalogue), before);
}

#[test]
fn a_discarded_volume_leaves_nothing_and_frees_its_name() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let d = volume("d", "fast");
    let folder = catalogue.reserve_volume(d.clone()).unwrap();
    std::fs::write(folder.join("data"), b"data").unwrap();
    assert!(catalogue.reserve_volume(VolumeRecord { id: volume("e", "fast").id, ..d.clone() }).is_err());
    catalogue.discard_volume(d.id).unwrap();
    assert!(!folder.exists());
    create_volume(&catalogue, &d).unwrap();
    assert_eq!(catalogue.volume(&d.name), Some(d));
}

#[test]
fn a_second_daemon_on_the_directory_is_refused() {
    let site = populated();
    let _open = site.open().unwrap();
    let refused = DirectoryLock::acquire(&site.path("data")).unwrap_err();
    assert!(matches!(refused, CatalogueError::InUse { .. }), "{refused}");
}

#[test]
fn the_header_stands_as_documented() {
    let site = populated();
    let folder = site.path("slow").join(volume("b", "slow").id.to_string());
    let bytes = std::fs::read(folder.join("header")).unwrap();
    assert_eq!(bytes.len(), 32_768);
    // Creating, live, mirror not settled, mirror settled: four generations, so the newest is in slot 0.
    let slot = &bytes[..16_384];
    assert_eq!(&slot[..8], b"FARSHVOL");
    assert_eq!(slot[8..12], [4, 0, 0, 0]);
    assert_eq!(slot[16..24], [4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(slot[40..56], volume("b", "slow").id.to_bytes());
    assert_eq!(slot[56..64], [0, 0, 16, 0, 0, 0, 0, 0]);
    assert_eq!(slot[64..68], 750_u32.to_le_bytes());
    assert_eq!(slot[68..76], [0, 2, 2, 2, 1, 1, 1, 0]);
    assert_eq!(slot[76..80], [0, 0, 2, 0]);
    assert_eq!(slot[80..84], 900_u32.to_le_bytes());
    assert_eq!(slot[84..100], Uuid::from_u128(42).into_bytes());
    assert_eq!(slot[124..132], [1, 0, 8, 0, 72, 0, 1, 0]);
    assert!(slot[140..144].iter().all(|byte| *byte == 0));
    assert_eq!(slot[144..152], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(slot[152..256].iter().all(|byte| *byte == 0));
    assert_eq!(&slot[256..265], b"bstandard");
}

#[test]
fn the_access_stands_in_the_header_as_documented() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let access = VolumeAccess { read_only: true, ..restricted() };
    catalogue.update_volume(VolumeRecord { access, ..volume("c", "fast") }).unwrap();
    let folder = site.path("fast").join(volume("c", "fast").id.to_string());
    let bytes = std::fs::read(folder.join("header")).unwrap();
    // The third generation is in slot 1.
    let slot = &bytes[16_384..];
    assert_eq!(slot[140..144], [16, 0, 3, 0]);
    assert_eq!(slot[144..152], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(slot[152..256].iter().all(|byte| *byte == 0), "no rates");
    assert_eq!(&slot[256 + 81..256 + 97], b"\x00\x06host 1\x01\x06host 2");
}

#[test]
fn a_header_of_version_1_is_read_and_means_any_host() {
    let folder = tempfile::tempdir().unwrap();
    let mut slot = include_bytes!("golden/header-1").to_vec();
    slot.resize(2 * 16_384, 0);
    std::fs::write(folder.path().join("header"), &slot).unwrap();
    let header = Header::read(folder.path(), &name("slow")).unwrap();
    assert_eq!(header.volume, VolumeRecord { revision: 0, ..volume("b", "slow") });
    assert_eq!(header.mirror.unwrap().mirror.name, name("m"));
}

#[test]
fn a_header_of_version_2_is_read_with_its_access_and_no_revision() {
    let folder = tempfile::tempdir().unwrap();
    let mut slot = include_bytes!("golden/header-2").to_vec();
    slot.resize(2 * 16_384, 0);
    std::fs::write(folder.path().join("header"), &slot).unwrap();
    let header = Header::read(folder.path(), &name("slow")).unwrap();
    assert_eq!(header.volume, VolumeRecord { revision: 0, access: restricted(), ..volume("b", "slow") });
    // What the version does not have, it cannot say.
    slot[144] = 1;
    reseal(&mut slot[..16_384]);
    std::fs::write(folder.path().join("header"), &slot).unwrap();
    assert!(Header::read(folder.path(), &name("slow")).is_err());
}

#[test]
fn a_header_of_version_3_is_read_and_means_no_limit() {
    let folder = tempfile::tempdir().unwrap();
    let mut slot = include_bytes!("golden/header-3").to_vec();
    slot.resize(2 * 16_384, 0);
    std::fs::write(folder.path().join("header"), &slot).unwrap();
    let header = Header::read(folder.path(), &name("slow")).unwrap();
    assert_eq!(header.volume, VolumeRecord { revision: 7, access: restricted(), ..volume("b", "slow") });
    let mirror = header.mirror.unwrap().mirror;
    assert_eq!((mirror.bandwidth, mirror.resync_rate), (Rate(None), Rate(None)));
    // What the version does not have, it cannot say.
    slot[152 + 4] = 1;
    reseal(&mut slot[..16_384]);
    std::fs::write(folder.path().join("header"), &slot).unwrap();
    assert!(Header::read(folder.path(), &name("slow")).is_err());
}

#[test]
fn a_policy_is_in_headers_and_catalogue_and_leaves_the_group_alone() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    let old = catalogue.mirror(&name("m")).unwrap();
    let wanted = MirrorRecord {
        overload: Overload::Stop,
        bandwidth: "50MB/s".parse().unwrap(),
        resync_rate: "1MiB/s".parse().unwrap(),
        partner: name("other"),
        ..old.clone()
    };
    let (new, notices) = catalogue.update_policy(&wanted).unwrap();
    assert!(notices.is_empty());
    assert_eq!(new, MirrorRecord { partner: old.partner, revision: old.revision + 1, ..wanted });
    drop(catalogue);
    assert_eq!(site.open().unwrap().0.mirror(&name("m")).unwrap(), new);
    let (catalogue, _) = site.rebuild().unwrap();
    let rebuilt = catalogue.mirror(&name("m")).unwrap();
    assert_eq!(rebuilt, MirrorRecord { rebuilt: true, ..new });
}

/// Gives a slot the checksum of its content.
fn reseal(slot: &mut [u8]) {
    slot[12..16].fill(0);
    let checksum = crc32c::crc32c(slot);
    slot[12..16].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn a_header_whose_access_is_not_understood_is_refused() {
    let site = populated();
    let folder = site.path("fast").join(volume("c", "fast").id.to_string());
    let path = folder.join("header");
    let whole = std::fs::read(&path).unwrap();
    for slot in [0, 16_384] {
        let mut bytes = whole.clone();
        bytes[slot + 142] = 4;
        reseal(&mut bytes[slot..slot + 16_384]);
        bytes[16_384 - slot..][..16_384].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        assert!(Header::read(&folder, &name("fast")).is_err(), "slot {slot}");
    }
}

#[test]
fn a_catalogue_of_an_older_format_is_opened_and_raised_so_that_no_older_daemon_opens_it() {
    let site = populated();
    let before = content(&site.open().unwrap().0);
    let file = site.path("data").join(FILE_NAME);
    let rewrite = |format: u32| store::rewrite_as_format(&file, format);
    for format in [1, 2] {
        rewrite(format);
        // The headers are of the present version, so they are ahead of rows that have no revision.
        assert_eq!(content(&site.open().unwrap().0), before, "format {format}");
        assert_eq!(store::format_of(&file), 3);
    }
    rewrite(4);
    let refused = site.open().unwrap_err();
    assert!(matches!(refused, CatalogueError::Format { found: 4, known: 3, .. }), "{refused}");
}

#[test]
fn a_rebuild_does_not_open_a_restricted_volume_to_others() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    catalogue.update_volume(VolumeRecord { access: restricted(), ..volume("c", "fast") }).unwrap();
    drop(catalogue);
    let (catalogue, _) = site.rebuild().unwrap();
    assert_eq!(catalogue.volume(&name("c")).unwrap().access, restricted());
}

/// Changes of volume c, one after the other: laxer, stricter, larger.
fn change(step: u64) -> VolumeRecord {
    let access = match step % 3 {
        0 => restricted(),
        1 => VolumeAccess { read_only: true, ..restricted() },
        _ => VolumeAccess::default(),
    };
    VolumeRecord { access, size: ByteCount((1 + step / 2) << 20), ..volume("c", "fast") }
}

/// The site after each durable step of five changes of volume c, as a crash would leave it there; in order of time.
fn moments() -> Vec<Site> {
    let (mut moments, mut done) = (Vec::new(), populated());
    for step in 0..5 {
        let mut steps = 0;
        loop {
            let crashed = done.copy();
            let catalogue = crashed.open_until(steps);
            let ended = catalogue.update_volume(change(step)).is_ok();
            drop(catalogue);
            if ended {
                done = crashed.copy();
                moments.push(crashed);
                break;
            }
            moments.push(crashed);
            steps += 1;
        }
        assert_eq!(steps, 2, "the header, then the catalogue");
    }
    moments
}

fn header_of_c(site: &Site) -> PathBuf {
    site.path(&format!("fast/{}/header", volume("c", "fast").id))
}

#[test]
fn of_any_header_and_any_catalogue_the_later_revision_wins_and_both_agree_afterwards() {
    let moments = moments();
    for (older, catalogue_of) in moments.iter().enumerate() {
        for (newer, header_of) in moments.iter().enumerate() {
            let what = format!("catalogue of moment {older}, header of moment {newer}");
            let site = catalogue_of.copy();
            std::fs::copy(header_of_c(header_of), header_of_c(&site)).unwrap();
            let header = Header::read(header_of_c(&site).parent().unwrap(), &name("fast")).unwrap().volume;
            let rows = Store::open(&site.path("data").join(FILE_NAME)).unwrap().1;
            let row = rows.volumes[&header.id].clone();
            assert!(row.revision != header.revision || row == header, "{what}: a revision means one thing");
            let expected = if header.revision > row.revision { header } else { row };
            let (catalogue, notices) = site.open().unwrap();
            assert_eq!(catalogue.volume(&name("c")), Some(expected.clone()), "{what}");
            assert!(notices.len() <= 1, "{what}: {notices:?}");
            drop(catalogue);
            let (catalogue, notices) = site.open().unwrap();
            assert_eq!((catalogue.volume(&name("c")), notices), (Some(expected.clone()), vec![]), "{what}");
            drop(catalogue);
            let (catalogue, _) = site.rebuild().unwrap();
            assert_eq!(catalogue.volume(&name("c")), Some(expected), "{what}, rebuilt");
        }
    }
}

#[test]
fn an_older_pool_does_not_open_a_volume_that_was_restricted_since() {
    let site = populated();
    let (catalogue, _) = site.open().unwrap();
    catalogue.update_volume(change(2)).unwrap();
    let older = std::fs::read(header_of_c(&site)).unwrap();
    catalogue.update_volume(VolumeRecord { access: restricted(), ..change(2) }).unwrap();
    drop(catalogue);
    std::fs::write(header_of_c(&site), older).unwrap();
    let (catalogue, notices) = site.open().unwrap();
    assert_eq!(notices, [Notice::HeaderRestored { volume: name("c") }]);
    assert_eq!(catalogue.volume(&name("c")).unwrap().access, restricted());
}

#[test]
fn a_newer_pool_does_not_open_a_volume_that_an_old_catalogue_says_is_open() {
    let site = populated();
    let older = site.copy();
    let (catalogue, _) = site.open().unwrap();
    catalogue.update_volume(change(0)).unwrap();
    drop(catalogue);
    site.restore_catalogue(&older);
    let (catalogue, notices) = site.open().unwrap();
    assert_eq!(notices, [Notice::VolumeAhead { volume: name("c") }]);
    assert_eq!(catalogue.volume(&name("c")), Some(VolumeRecord { revision: 2, ..change(0) }));
}

#[test]
fn a_change_that_a_disk_refused_does_not_come_up_at_a_restart_nor_hide_the_next() {
    for failing in 0..2 {
        let site = populated();
        let fuse = Fuse::once_after(failing);
        let (catalogue, _) = Catalogue::open_with(site.lock(), site.pools(), fuse).unwrap();
        let before = catalogue.volume(&name("c")).unwrap();
        catalogue.update_volume(change(2)).unwrap_err();
        let stands = VolumeRecord { revision: 3, ..before };
        assert_eq!(catalogue.volume(&name("c")), Some(stands.clone()), "{failing}");
        let restarted = site.copy();
        catalogue.update_volume(change(0)).unwrap();
        drop(catalogue);
        assert_eq!(restarted.open().unwrap().0.volume(&name("c")), Some(stands), "{failing}");
        let next = VolumeRecord { revision: 4, ..change(0) };
        assert_eq!(site.open().unwrap().0.volume(&name("c")), Some(next), "{failing}");
    }
}
