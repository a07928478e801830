//! The catalogue's file: an embedded transactional store (redb) with a row an object.
//!
//! Every change is one transaction that is durable when it returns. Tables and values are docs/formats/catalogue.md's.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use block::{MirrorId, SiteId, VolumeId, VolumeName};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{CatalogueError, file_error};
use super::record::{MirrorRecord, PartnerRecord, VolumeRecord};
use super::seal::{Seal, Verdict};

/// The rows of volumes have no revision in format 2, and in format 1 no access either. A daemon that knows only these would
/// forget the revision, or open volumes to any host, so a catalogue is raised to this format when it is opened.
const FORMAT: u32 = 3;
const FORMATS: std::ops::RangeInclusive<u32> = 1..=FORMAT;
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const VOLUMES: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("volumes");
const PARTNERS: TableDefinition<&str, &[u8]> = TableDefinition::new("partners");
const MIRRORS: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("mirrors");

/// Everything in the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) site: SiteId,
    pub(super) volumes: BTreeMap<VolumeId, VolumeRecord>,
    pub(super) partners: BTreeMap<VolumeName, PartnerRecord>,
    pub(super) mirrors: BTreeMap<MirrorId, MirrorRecord>,
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
}

/// The open file.
#[derive(Debug)]
pub(super) struct Store {
    /// Present until the store is dropped.
    database: Option<Database>,
    file: PathBuf,
    seal: Seal,
}

impl Drop for Store {
    fn drop(&mut self) {
        // Closing writes to the file. If the seal cannot follow, the next start leaves the judgement to the store.
        if self.seal.open().is_ok() {
            drop(self.database.take());
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
        let damaged = |reason: String| CatalogueError::Damaged { file: file.to_owned(), reason };
        let seal = Seal::of(file);
        let failed = file_error("reading", file);
        if seal.verdict().map_err(&failed)? == Verdict::Damaged {
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
        let store = Self { database: Some(database), file: file.to_owned(), seal };
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
        let aside = file.with_extension("redb.new");
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
            volumes.chain(partners).chain(mirrors).try_for_each(|change| change.apply(transaction))
        };
        commit(&database, write).map_err(failed)?;
        let seal = Seal::of(file);
        let sealing = file_error("sealing", file);
        seal.open().map_err(&sealing)?;
        std::fs::rename(&aside, file).map_err(file_error("renaming", &aside))?;
        sync_folder_of(file)?;
        seal.close().map_err(&sealing)?;
        Ok(Self { database: Some(database), file: file.to_owned(), seal })
    }

    /// Makes the changes durable, all or none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn apply(&self, changes: &[Change<'_>]) -> Result<(), CatalogueError> {
        let sealing = file_error("sealing", &self.file);
        let write =
            |transaction: &WriteTransaction| changes.iter().try_for_each(|change| change.apply(transaction));
        self.seal.open().map_err(&sealing)?;
        commit(self.database(), write).map_err(store_error(&self.file))?;
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
        if found(self.database()).map_err(store_error(&self.file))? {
            return Ok(());
        }
        let sealing = file_error("sealing", &self.file);
        self.seal.open().map_err(&sealing)?;
        let write = |transaction: &WriteTransaction| {
            transaction.open_table(META)?.insert("format", FORMAT.to_le_bytes().as_slice())?;
            Ok(())
        };
        commit(self.database(), write).map_err(store_error(&self.file))?;
        // As after a change: without a seal the next start leaves the judgement to the store.
        let _ = self.seal.close();
        Ok(())
    }

    fn database(&self) -> &Database {
        let Some(database) = &self.database else {
            unreachable!("only dropping takes the database");
        };
        database
    }

    fn read(&self) -> Result<Content, ReadError> {
        let transaction = self.database().begin_read().map_err(redb::Error::from)?;
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
        let volumes: Vec<VolumeRecord> = rows(&volumes, "volumes")?;
        let partners: Vec<PartnerRecord> = rows(&partners, "partners")?;
        let mirrors: Vec<MirrorRecord> = rows(&mirrors, "mirrors")?;
        Ok(Content {
            site: SiteId::from_bytes(site.ok_or(ReadError::Row("meta"))?),
            volumes: volumes.into_iter().map(|volume| (volume.id, volume)).collect(),
            partners: partners.into_iter().map(|partner| (partner.name.clone(), partner)).collect(),
            mirrors: mirrors.into_iter().map(|mirror| (mirror.id, mirror)).collect(),
        })
    }
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
