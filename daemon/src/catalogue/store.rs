//! The catalogue's file: an embedded transactional store (redb) with a row an object.
//!
//! Every change is one transaction that is durable when it returns. Tables and values are docs/formats/catalogue.md's.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{MirrorId, SiteId, TenantId, VolumeId, VolumeName};
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{CatalogueError, file_error};
use super::fuse::Fuse;
use super::record::{MirrorRecord, PartnerRecord, VolumeRecord};
use super::seal::{Seal, Verdict};
use super::tenant::TenantRecord;

/// Format 3 has no tenants, the rows of volumes have no revision in format 2, and in format 1 no access either. A daemon that
/// knows only these would open volumes of a locked tenant, forget the revision, or open volumes to any host, so a catalogue
/// is raised to this format when it is opened.
const FORMAT: u32 = 4;
const FORMATS: std::ops::RangeInclusive<u32> = 1..=FORMAT;
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const VOLUMES: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("volumes");
const PARTNERS: TableDefinition<&str, &[u8]> = TableDefinition::new("partners");
const MIRRORS: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("mirrors");
const TENANTS: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("tenants");
/// Bytes overwritten at a time.
const ERASE_BYTES: usize = 64 << 10;

/// Everything in the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) site: SiteId,
    pub(super) volumes: BTreeMap<VolumeId, VolumeRecord>,
    pub(super) partners: BTreeMap<VolumeName, PartnerRecord>,
    pub(super) mirrors: BTreeMap<MirrorId, MirrorRecord>,
    pub(super) tenants: BTreeMap<TenantId, TenantRecord>,
}

/// One row's change.
#[derive(Debug)]
pub(super) enum Change<'a> {
    Volume(&'a VolumeRecord),
    NoVolume(VolumeId),
    Partner(&'a PartnerRecord),
    NoPartner(&'a VolumeName),
    Mirror(&'a MirrorRecord),
    NoMirror(MirrorId),
    Tenant(&'a TenantRecord),
    NoTenant(TenantId),
}

/// The open file.
#[derive(Debug)]
pub(super) struct Store {
    /// Present until the store is dropped.
    database: Mutex<Option<Database>>,
    file: PathBuf,
    seal: Seal,
    /// True if it was not closed in order before it was opened.
    unclean: bool,
}

/// The database while it is used.
type Held<'a> = MutexGuard<'a, Option<Database>>;

impl Drop for Store {
    fn drop(&mut self) {
        // Closing writes to the file. If the seal cannot follow, the next start leaves the judgement to the store.
        if self.seal.open().is_ok() {
            drop(self.held().take());
            let _ = self.seal.close();
        }
    }
}

impl Store {
    /// Opens the file, checks all of it and reads its content.
    ///
    /// # Errors
    /// It is damaged, or of a format that we do not know.
    pub(super) fn open(file: &Path) -> Result<(Self, Content), CatalogueError> {
        erase(&replaced(file)).map_err(file_error("overwriting", &replaced(file)))?;
        let damaged = |reason: String| CatalogueError::Damaged { file: file.to_owned(), reason };
        let seal = Seal::of(file);
        let failed = file_error("reading", file);
        let verdict = seal.verdict().map_err(&failed)?;
        if verdict == Verdict::Damaged {
            return Err(damaged("it is not as it was left".to_owned()));
        }
        seal.open().map_err(&failed)?;
        let mut database = Database::open(file).map_err(|error| damaged(error.to_string()))?;
        match database.check_integrity() {
            Ok(true) => {}
            Ok(false) => return Err(damaged("its checksums do not match".to_owned())),
            Err(error) => return Err(damaged(error.to_string())),
        }
        seal.close().map_err(&failed)?;
        let store = Self {
            database: Mutex::new(Some(database)),
            file: file.to_owned(),
            seal,
            unclean: verdict == Verdict::Unknown,
        };
        let content = match store.read() {
            Ok(content) => content,
            Err(ReadError::Format(found)) => {
                return Err(CatalogueError::Format { file: file.to_owned(), found, known: FORMAT });
            }
            Err(error) => return Err(damaged(error.to_string())),
        };
        store.raise_format()?;
        Ok((store, content))
    }

    /// Makes a file with this content, whole or not at all: it is written aside and then renamed.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn create(file: &Path, content: &Content) -> Result<Self, CatalogueError> {
        let database = Self::write_aside(file, content)?;
        let seal = Seal::of(file);
        let sealing = file_error("sealing", file);
        seal.open().map_err(&sealing)?;
        std::fs::rename(aside(file), file).map_err(file_error("renaming", &aside(file)))?;
        sync_folder_of(file)?;
        seal.close().map_err(&sealing)?;
        Ok(Self { database: Mutex::new(Some(database)), file: file.to_owned(), seal, unclean: false })
    }

    /// Makes a file with this content beside the one that it is to replace.
    fn write_aside(file: &Path, content: &Content) -> Result<Database, CatalogueError> {
        let aside = aside(file);
        if aside.exists() {
            std::fs::remove_file(&aside).map_err(file_error("removing", &aside))?;
        }
        let failed = store_error(&aside);
        let database = Database::create(&aside).map_err(|error| failed(error.into()))?;
        let write = |transaction: &WriteTransaction| {
            let mut meta = transaction.open_table(META)?;
            meta.insert("format", FORMAT.to_le_bytes().as_slice())?;
            meta.insert("site", content.site.to_bytes().as_slice())?;
            let volumes = content.volumes.values().map(Change::Volume);
            let partners = content.partners.values().map(Change::Partner);
            let mirrors = content.mirrors.values().map(Change::Mirror);
            let tenants = content.tenants.values().map(Change::Tenant);
            let mut all = volumes.chain(partners).chain(mirrors).chain(tenants);
            all.try_for_each(|change| change.apply(transaction))
        };
        commit(&database, write).map_err(failed)?;
        Ok(database)
    }

    /// Replaces the file by one with the same content, and overwrites the old: a store that never writes in place leaves
    /// rows that were replaced, and with them wrapped keys, in pages that are free. The old file has a second name until it
    /// is overwritten, so that the next start ends what a crash cut short.
    ///
    /// # Errors
    /// It cannot be written; the content stands in any case.
    pub(super) fn scrub(&self, content: &Content, fuse: &Fuse) -> Result<(), CatalogueError> {
        let file = &self.file;
        let old = replaced(file);
        let failed = |operation| file_error(operation, file);
        erase(&old).map_err(file_error("overwriting", &old))?;
        let database = Self::write_aside(file, content)?;
        let mut held = self.held();
        self.seal.open().map_err(failed("sealing"))?;
        std::fs::hard_link(file, &old).map_err(failed("linking"))?;
        fuse.step().map_err(failed("replacing"))?;
        std::fs::rename(aside(file), file).map_err(failed("replacing"))?;
        sync_folder_of(file)?;
        // Closing the old one writes to it.
        drop(held.replace(database));
        drop(held);
        // As after a change: without a seal the next start leaves the judgement to the store.
        let _ = self.seal.close();
        fuse.step().map_err(failed("overwriting"))?;
        erase(&old).map_err(file_error("overwriting", &old))
    }

    /// Makes the changes durable, all or none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn apply(&self, changes: &[Change<'_>]) -> Result<(), CatalogueError> {
        let sealing = file_error("sealing", &self.file);
        let write =
            |transaction: &WriteTransaction| changes.iter().try_for_each(|change| change.apply(transaction));
        let held = self.held();
        self.seal.open().map_err(&sealing)?;
        commit(database(&held), write).map_err(store_error(&self.file))?;
        // The change is durable; without a seal the next start merely leaves the judgement to the store.
        let _ = self.seal.close();
        Ok(())
    }

    /// Writes the present format into a catalogue of an older one.
    fn raise_format(&self) -> Result<(), CatalogueError> {
        let found = |database: &Database| -> Result<bool, redb::Error> {
            let meta = database.begin_read()?.open_table(META)?;
            Ok(meta.get("format")?.is_some_and(|bytes| *bytes.value() == FORMAT.to_le_bytes()))
        };
        let held = self.held();
        if found(database(&held)).map_err(store_error(&self.file))? {
            return Ok(());
        }
        let sealing = file_error("sealing", &self.file);
        self.seal.open().map_err(&sealing)?;
        let write = |transaction: &WriteTransaction| {
            transaction.open_table(META)?.insert("format", FORMAT.to_le_bytes().as_slice())?;
            Ok(())
        };
        commit(database(&held), write).map_err(store_error(&self.file))?;
        // As after a change: without a seal the next start leaves the judgement to the store.
        let _ = self.seal.close();
        Ok(())
    }

    /// True if it was not closed in order before it was opened.
    pub(super) const fn was_unclean(&self) -> bool {
        self.unclean
    }

    fn held(&self) -> Held<'_> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<Content, ReadError> {
        let held = self.held();
        let transaction = database(&held).begin_read().map_err(redb::Error::from)?;
        let meta = transaction.open_table(META).map_err(redb::Error::from)?;
        let value = |key| meta.get(key).map_err(redb::Error::from);
        let format = value("format")?.and_then(|bytes| bytes.value().try_into().ok().map(u32::from_le_bytes));
        match format {
            Some(found) if FORMATS.contains(&found) => {}
            Some(found) => return Err(ReadError::Format(found)),
            None => return Err(ReadError::Row("meta")),
        }
        let site: Option<[u8; 16]> = value("site")?.and_then(|bytes| bytes.value().try_into().ok());
        let volumes = transaction.open_table(VOLUMES).map_err(redb::Error::from)?;
        let partners = transaction.open_table(PARTNERS).map_err(redb::Error::from)?;
        let mirrors = transaction.open_table(MIRRORS).map_err(redb::Error::from)?;
        let tenants: Vec<TenantRecord> = match transaction.open_table(TENANTS) {
            Ok(tenants) => rows(&tenants, "tenants")?,
            // Until it is raised from format 3.
            Err(TableError::TableDoesNotExist(_)) => Vec::new(),
            Err(error) => return Err(redb::Error::from(error).into()),
        };
        let volumes: Vec<VolumeRecord> = rows(&volumes, "volumes")?;
        let partners: Vec<PartnerRecord> = rows(&partners, "partners")?;
        let mirrors: Vec<MirrorRecord> = rows(&mirrors, "mirrors")?;
        Ok(Content {
            site: SiteId::from_bytes(site.ok_or(ReadError::Row("meta"))?),
            volumes: volumes.into_iter().map(|volume| (volume.id, volume)).collect(),
            partners: partners.into_iter().map(|partner| (partner.name.clone(), partner)).collect(),
            mirrors: mirrors.into_iter().map(|mirror| (mirror.id, mirror)).collect(),
            tenants: tenants.into_iter().map(|tenant| (tenant.id, tenant)).collect(),
        })
    }
}

fn database<'a>(held: &'a Held<'_>) -> &'a Database {
    let Some(database) = &**held else {
        unreachable!("only dropping takes the database");
    };
    database
}

/// Where a new file is made.
fn aside(file: &Path) -> PathBuf {
    file.with_extension("redb.new")
}

/// The second name of a file that was replaced and is to be overwritten.
fn replaced(file: &Path) -> PathBuf {
    file.with_extension("redb.replaced")
}

/// Overwrites a file with zeros, durably, and removes it; that there is none is no error. A file that still has its first
/// name, as after a crash before it was replaced, only loses this one.
fn erase(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let mut file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    if file.metadata()?.nlink() == 1 {
        let mut left = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let zeros = vec![0; ERASE_BYTES];
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(ERASE_BYTES);
            file.write_all(zeros.get(..count).unwrap_or_default())?;
            left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
        file.sync_all()?;
    }
    std::fs::remove_file(path)
}

/// One durable transaction.
fn commit(
    database: &Database,
    write: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    // Every table exists from the first transaction on, so that reading never meets a missing one.
    transaction.open_table(VOLUMES)?;
    transaction.open_table(PARTNERS)?;
    transaction.open_table(MIRRORS)?;
    transaction.open_table(TENANTS)?;
    write(&transaction)?;
    Ok(transaction.commit()?)
}

/// Why the content cannot be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Store(#[from] redb::Error),
    #[error("a row of table '{0}' is not understood")]
    Row(&'static str),
    #[error("format {0}")]
    Format(u32),
}

fn rows<K: redb::Key + 'static, T: DeserializeOwned>(
    table: &impl ReadableTable<K, &'static [u8]>,
    name: &'static str,
) -> Result<Vec<T>, ReadError> {
    let mut rows = Vec::new();
    for row in table.iter().map_err(redb::Error::from)? {
        let (_, value) = row.map_err(redb::Error::from)?;
        rows.push(serde_json::from_slice(value.value()).map_err(|_| ReadError::Row(name))?);
    }
    Ok(rows)
}

impl Change<'_> {
    fn apply(&self, transaction: &WriteTransaction) -> Result<(), redb::Error> {
        match self {
            Self::Volume(volume) => {
                transaction.open_table(VOLUMES)?.insert(volume.id.to_bytes(), row(volume).as_slice())?;
            }
            Self::NoVolume(id) => {
                transaction.open_table(VOLUMES)?.remove(id.to_bytes())?;
            }
            Self::Partner(partner) => {
                transaction.open_table(PARTNERS)?.insert(partner.name.as_str(), row(partner).as_slice())?;
            }
            Self::NoPartner(name) => {
                transaction.open_table(PARTNERS)?.remove(name.as_str())?;
            }
            Self::Mirror(mirror) => {
                transaction.open_table(MIRRORS)?.insert(mirror.id.to_bytes(), row(mirror).as_slice())?;
            }
            Self::NoMirror(id) => {
                transaction.open_table(MIRRORS)?.remove(id.to_bytes())?;
            }
            Self::Tenant(tenant) => {
                transaction.open_table(TENANTS)?.insert(tenant.id.to_bytes(), row(tenant).as_slice())?;
            }
            Self::NoTenant(id) => {
                transaction.open_table(TENANTS)?.remove(id.to_bytes())?;
            }
        }
        Ok(())
    }
}

fn row(record: &impl Serialize) -> Vec<u8> {
    let row = serde_json::to_vec(record).unwrap_or_default();
    assert!(!row.is_empty(), "our own records have no maps and no failing serializers");
    row
}

fn store_error(file: &Path) -> impl Fn(redb::Error) -> CatalogueError {
    move |source| CatalogueError::Store { file: file.to_owned(), source: Box::new(source) }
}

/// Makes the names in the folder of `path` durable.
///
/// # Errors
/// The folder cannot be synced.
pub(super) fn sync_folder_of(path: &Path) -> Result<(), CatalogueError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(file_error("syncing folder", folder))
}

/// Takes from the rows of volumes what this format does not have, and writes its number.
#[cfg(test)]
pub(super) fn rewrite_as_format(file: &Path, format: u32) {
    let seal = Seal::of(file);
    seal.open().unwrap();
    let database = Database::open(file).unwrap();
    commit(&database, |transaction| {
        transaction.open_table(META)?.insert("format", format.to_le_bytes().as_slice())?;
        if format < 4 {
            transaction.delete_table(TENANTS)?;
        }
        let mut volumes = transaction.open_table(VOLUMES)?;
        let rows: Vec<_> = volumes
            .iter()?
            .map(|row| row.unwrap())
            .map(|(key, row)| (key.value(), row.value().to_vec()))
            .collect();
        for (key, row) in rows {
            let mut row: serde_json::Value = serde_json::from_slice(&row).unwrap();
            let fields = row.as_object_mut().unwrap();
            if format < 3 {
                fields.remove("revision");
            }
            if format < 2 {
                fields.remove("access");
            }
            volumes.insert(key, row.to_string().as_bytes())?;
        }
        Ok(())
    })
    .unwrap();
    drop(database);
    seal.close().unwrap();
}

/// The format that a closed catalogue has.
#[cfg(test)]
pub(super) fn format_of(file: &Path) -> u32 {
    let seal = Seal::of(file);
    seal.open().unwrap();
    let database = Database::open(file).unwrap();
    let meta = database.begin_read().unwrap().open_table(META).unwrap();
    let format = u32::from_le_bytes(meta.get("format").unwrap().unwrap().value().try_into().unwrap());
    drop(meta);
    drop(database);
    seal.close().unwrap();
    format
}
