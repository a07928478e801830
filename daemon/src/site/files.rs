//! The files of volumes and mirrors: opened, created and read at a start. Blocking; not for the data path.
//!
//! A volume's folder holds `data` (home) and, if it is mirrored, `intent`. A mirror's folder, `mirrors/ID` in the data
//! directory, holds `checkpoint`, `redo-NNNN`, `spill` and, after a clean stop of a primary, `clean`
//! (docs/formats/mirror-files.md).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block::{ByteCount, MirrorId, Tip, VolumeId};
use bytes::Bytes;
use control::Cache;
use engine::intent_map::IntentMap;
use journal::{Checkpoint, PAGE_BYTES, Recovered, RecoveryStop, RedoConfig, RedoLog};
use protocol::GroupState;
use store::{BufferPool, File};

use crate::catalogue::VolumeRecord;
use crate::group::OpenedMirror;
use crate::shard::RedoFiles;

/// The home file in a volume's folder.
pub(super) const DATA_FILE: &str = "data";
/// The intent map in a volume's folder.
pub(super) const INTENT_FILE: &str = "intent";
const CHECKPOINT_FILE: &str = "checkpoint";
/// The spill file in a mirror's folder.
const SPILL_FILE: &str = "spill";
/// Reads of a redo scan need aligned memory of at most a cut's length.
const SCAN_BYTES: usize = 64 << 20;

/// Why files of a volume or mirror cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesError {
    #[error(transparent)]
    File(#[from] store::FileError),
    #[error("cannot {action} {}: {source}", path.display())]
    System { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} holds no usable redo checkpoint ({reason}): restore it from a backup, or delete the mirror and create it anew", path.display())]
    Checkpoint { path: PathBuf, reason: String },
    #[error("the redo log in {} cannot be read: {reason}", path.display())]
    Redo { path: PathBuf, reason: String },
    #[error("{} has {found} bytes where {expected} are expected: it was cut or replaced; restore it from a backup", path.display())]
    Size { path: PathBuf, found: u64, expected: u64 },
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    let path = path.to_owned();
    move |source| FilesError::System { action, path, source }
}

/// Opens a volume's home and checks its size.
pub(super) fn open_home(folder: &Path, size: ByteCount, direct: bool) -> Result<File, FilesError> {
    let path = folder.join(DATA_FILE);
    let file = File::open(&path, direct)?;
    let found = file.size().map_err(system("measure", &path))?;
    if found < size.0 {
        return Err(FilesError::Size { path, found, expected: size.0 });
    }
    Ok(file)
}

/// A volume's part in a new mirror: an intent map file. What a failed attempt left is replaced.
pub(super) fn create_intent(
    folder: &Path,
    volume: VolumeId,
    size: ByteCount,
    region: ByteCount,
) -> Result<(IntentMap, File), FilesError> {
    let path = folder.join(INTENT_FILE);
    remove_if_there(&path)?;
    let map = IntentMap::new(volume, size, region);
    let file = File::create_thick(&path, map.file_bytes().0, true)?;
    Ok((map, file))
}

/// Makes a volume's home and its intent map large enough for `size`, durably.
pub(super) fn grow(
    folder: &Path,
    volume: &VolumeRecord,
    size: ByteCount,
    region: ByteCount,
) -> Result<(), FilesError> {
    let home = folder.join(DATA_FILE);
    File::open(&home, volume.cache == Cache::None)?.grow(&home, size.0)?;
    let intent = folder.join(INTENT_FILE);
    let map = IntentMap::new(volume.id, size, region);
    Ok(File::open(&intent, true)?.grow(&intent, map.file_bytes().0)?)
}

/// Reads a volume's intent map; pages that cannot be read count as set.
pub(super) fn open_intent(
    folder: &Path,
    volume: VolumeId,
    size: ByteCount,
    region: ByteCount,
) -> Result<(IntentMap, File), FilesError> {
    let path = folder.join(INTENT_FILE);
    let file = File::open(&path, true)?;
    let bytes = Bytes::from(fs::read(&path).map_err(system("read", &path))?);
    let page = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let slot = |index: usize| {
        let start = index.saturating_mul(page);
        (start + page <= bytes.len()).then(|| bytes.slice(start..start + page))
    };
    let slots = (0..bytes.len() / (2 * page)).map(|index| [slot(2 * index), slot(2 * index + 1)]);
    let (map, unreadable) = IntentMap::load(volume, size, region, slots);
    if !unreadable.is_empty() {
        tracing::warn!(file = %path.display(), pages = unreadable.len(), "pages of an intent map are not readable and count as set");
    }
    Ok((map, file))
}

pub(super) fn remove_if_there(path: &Path) -> Result<(), FilesError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Takes a file's name away, durably: its content is of no use any more, and is removed with its folder.
pub(super) fn set_aside(folder: &Path, name: &str) -> Result<(), FilesError> {
    let path = folder.join(name);
    match fs::rename(&path, path.with_extension("void")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("rename", &path)(error)),
        Ok(()) | Err(_) => sync_folder(folder),
    }
}

/// A mirror's folder.
pub(super) fn mirror_folder(data_dir: &Path, mirror: MirrorId) -> PathBuf {
    data_dir.join("mirrors").join(mirror.to_string())
}

fn segment_path(folder: &Path, index: u32) -> PathBuf {
    folder.join(format!("redo-{index:04}"))
}

/// Makes a mirror's redo log; its folder is new.
pub(super) fn create_redo(
    folder: &Path,
    mirror: MirrorId,
    config: RedoConfig,
    state: &GroupState,
) -> Result<(RedoFiles, Recovered, Checkpoint), FilesError> {
    fs::create_dir_all(folder).map_err(system("make", folder))?;
    // The folder's own entry, and that of the folder of all mirrors.
    for parent in folder.ancestors().skip(1).take(2) {
        sync_folder(parent)?;
    }
    let mut segments = Vec::new();
    for index in 0..config.file_count() {
        segments.push(File::create_thick(&segment_path(folder, index), config.segment_bytes(), true)?);
    }
    let applied = Tip { position: state.start_position(), ..Tip::default() };
    let first = Checkpoint::first(mirror, config, applied);
    let second = first.next(applied, first.scan_start);
    let path = folder.join(CHECKPOINT_FILE);
    let pages = [first.encode(), second.encode()].concat();
    write_durably(&path, &pages)?;
    let checkpoint = File::open(&path, true)?;
    let recovered = Recovered {
        log: RedoLog::new(config, mirror),
        durable_tip: applied,
        staged_tip: None,
        cuts: Vec::new(),
        stopped_at: RecoveryStop::End,
    };
    Ok((RedoFiles { segments, checkpoint, spill: None }, recovered, second))
}

/// Opens a mirror's redo log: syncs every segment, then scans from the newest checkpoint.
pub(super) fn open_redo(
    folder: &Path,
    mirror: MirrorId,
) -> Result<(RedoFiles, Recovered, Checkpoint), FilesError> {
    let path = folder.join(CHECKPOINT_FILE);
    let bytes = fs::read(&path).map_err(system("read", &path))?;
    let refuse = |reason: String| FilesError::Checkpoint { path: path.clone(), reason };
    let page = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let slot = |index: usize| bytes.get(index * page..(index + 1) * page).unwrap_or_default();
    let newest = Checkpoint::newest(slot(0), slot(1)).map_err(|error| refuse(error.to_string()))?;
    let checkpoint = newest.ok_or_else(|| refuse("both slots are empty".to_owned()))?;
    let config = checkpoint.config;
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
    let mut segments = Vec::new();
    let mut readers = Vec::new();
    for index in 0..config.file_count() {
        let path = segment_path(folder, index);
        segments.push(File::open(&path, true)?);
        let reader = fs::OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(&path)
            .map_err(system("open", &path))?;
        // A cut that the scan finds may never have been synced; it must be before anybody is told of it.
        reader.sync_all().map_err(system("sync", &path))?;
        readers.push(reader);
    }
    let pool = BufferPool::new(SCAN_BYTES);
    let mut read = |file: u32, offset: u64, length: u64| -> io::Result<Bytes> {
        let reader = usize::try_from(file).ok().and_then(|index| readers.get(index));
        let reader = reader.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut buffer = pool.take_over(length.next_multiple_of(page));
        reader.read_exact_at(&mut buffer, offset)?;
        buffer.truncate(length);
        Ok(buffer.freeze())
    };
    let recovered =
        journal::recover(config, mirror, &checkpoint, &mut read).map_err(|error| FilesError::Redo {
            path: folder.to_owned(),
            reason: match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            },
        })?;
    if recovered.stopped_at == RecoveryStop::ScanStartLost {
        tracing::warn!(folder = %folder.display(), "the redo log does not continue from its checkpoint");
    }
    let files = RedoFiles { segments, checkpoint: File::open(&path, true)?, spill: None };
    Ok((files, recovered, checkpoint))
}

/// The spill file of a mirror, made if it is missing or of another size; `None` with 0 bytes.
pub(super) fn open_spill(folder: &Path, bytes: ByteCount) -> Result<Option<File>, FilesError> {
    let path = folder.join(SPILL_FILE);
    let found = fs::metadata(&path).map(|metadata| metadata.len()).ok();
    if bytes.0 > 0 && found == Some(bytes.0) {
        return Ok(Some(File::open(&path, true)?));
    }
    remove_if_there(&path)?;
    if bytes.0 == 0 {
        return Ok(None);
    }
    Ok(Some(File::create_thick(&path, bytes.0, true)?))
}

/// Voids the cuts that a crash left in a primary's redo log between the promotion of a rewind and its end.
pub(super) fn empty_redo(
    folder: &Path,
    recovered: &mut Recovered,
    checkpoint: Checkpoint,
) -> Result<Checkpoint, FilesError> {
    let Some(next) = recovered.void(&checkpoint) else {
        return Ok(checkpoint);
    };
    let path = folder.join(CHECKPOINT_FILE);
    let file = fs::OpenOptions::new().write(true).open(&path).map_err(system("open", &path))?;
    file.write_all_at(&next.encode(), next.slot() * PAGE_BYTES).map_err(system("write", &path))?;
    file.sync_all().map_err(system("sync", &path))?;
    tracing::info!(folder = %folder.display(), "the cuts that the last promotion discarded are void");
    Ok(next)
}

/// Writes a file so that it is wholly there or not at all after a crash.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), FilesError> {
    let aside = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&aside).map_err(system("create", &aside))?;
    file.write_all(bytes).map_err(system("write", &aside))?;
    file.sync_all().map_err(system("sync", &aside))?;
    fs::rename(&aside, path).map_err(system("rename", &aside))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// Makes a folder's entries durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), FilesError> {
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(system("sync", folder))
}

/// Removes a mirror's folder.
pub(super) fn remove_mirror_folder(folder: &Path) -> Result<(), FilesError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("remove", folder)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The parts of a mirror's start, from its files.
pub(super) fn opened(
    intents: Vec<IntentMap>,
    clean: Option<crate::group::CleanState>,
    redo: Recovered,
    checkpoint: Checkpoint,
) -> OpenedMirror {
    OpenedMirror { intents, clean, redo, checkpoint }
}
