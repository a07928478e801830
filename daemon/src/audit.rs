//! The audit log: who did what to keys and tenants, when, and how it ended. Append-only, one line of JSON each.
//!
//! Each line holds the hash of the one before and of itself, so that a line that was changed, taken out or put in between is
//! found; lines cut off at the end are found by whoever has kept a later hash ([`verify`] takes one). A line is durable before
//! the action that it announces begins, and its outcome is one more line. What a crash left of a line is cut off at the next
//! opening, for nothing was done on it. docs/formats/audit.md.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use control::Timestamp;
use serde::{Deserialize, Serialize};

/// The log's file in the data directory.
pub const FILE_NAME: &str = "audit.log";
/// The longest line, in bytes.
pub const LINE_BYTES_MAX: usize = 4096;
/// The longest detail, in bytes: what a line has room for besides, even if each byte is escaped.
const DETAIL_BYTES_MAX: usize = 512;
const HASH_PURPOSE: &[u8] = b"farshore audit v1\n";
/// Before the hash in a line.
const HASH_BEGIN: &[u8] = b",\"hash\":\"";
/// BLAKE3, as lower-case hexadecimal digits.
const HASH_DIGITS: usize = 64;

/// How an action ended, or that it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is about to be done.
    Begun,
    /// It was done.
    Done,
    /// It was refused or failed.
    Failed,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// From 1, without gaps.
    pub sequence: u64,
    /// When, by the site's clock.
    pub time: Timestamp,
    /// Who.
    pub actor: String,
    /// What, as the command says it.
    pub action: String,
    /// To what.
    pub object: String,
    /// How it ended.
    pub outcome: Outcome,
    /// More about that.
    pub detail: String,
    /// The hash of the line before; empty in the first.
    pub previous: String,
}

/// Why a log is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} {reason}")]
pub struct Damage {
    /// Which, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// A log that is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// Its lines.
    pub lines: u64,
    /// The hash of the last one; empty if there is none.
    pub head: String,
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file system failed.
    #[error("audit log '{}' cannot be {operation}: {source}", .path.display())]
    File {
        /// What was being done.
        operation: &'static str,
        /// The log.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// It was changed.
    #[error("audit log '{}' is not as it was written: {damage}; keep it elsewhere, move it away and restart farshored", .path.display())]
    Damaged {
        /// The log.
        path: PathBuf,
        /// Where.
        damage: Damage,
    },
}

impl Entry {
    /// Without the hash.
    fn body(&self) -> Vec<u8> {
        let body = serde_json::to_vec(self).unwrap_or_default();
        assert!(body.ends_with(b"}"), "an entry is texts and numbers");
        body
    }

    fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(HASH_PURPOSE);
        hasher.update(&self.body());
        hasher.finalize().to_hex().to_string()
    }

    /// The line, with its end: the entry as JSON, and its hash as the last field.
    ///
    /// # Panics
    /// If an entry has no form in JSON, which all have.
    pub fn line(&self) -> Vec<u8> {
        let mut line = self.body();
        line.pop();
        line.extend(HASH_BEGIN);
        line.extend(self.hash().as_bytes());
        line.extend(b"\"}\n");
        line
    }

    /// Reads a line without its end; gives its hash too, which is right.
    ///
    /// # Errors
    /// It is no line as [`Self::line`] writes it.
    pub fn read(line: &[u8]) -> Result<(Self, String), &'static str> {
        const NONE: &str = "is no entry";
        if line.len() > LINE_BYTES_MAX {
            return Err("is longer than any line");
        }
        let rest = line.strip_suffix(b"\"}").ok_or(NONE)?;
        let (rest, hash) = rest.split_last_chunk::<HASH_DIGITS>().ok_or(NONE)?;
        let mut body = rest.strip_suffix(HASH_BEGIN).ok_or(NONE)?.to_vec();
        body.push(b'}');
        let entry: Self = serde_json::from_slice(&body).map_err(|_| NONE)?;
        let expected = entry.hash();
        if expected.as_bytes() != hash || entry.body() != body {
            return Err("was changed: its hash is not that of its content");
        }
        Ok((entry, expected))
    }
}

/// Checks a log from its first line on. With `expected`, that hash must be in it: one that was kept elsewhere shows that no
/// line up to it was cut off.
///
/// # Errors
/// The first line that is not what was written there, or that the log ends before `expected`.
pub fn verify(log: impl Read, expected: Option<&str>) -> io::Result<Result<Whole, Damage>> {
    let mut log = BufReader::new(log);
    let mut whole = Whole::default();
    let mut seen = expected.is_none();
    loop {
        let mut line = Vec::new();
        let limit = u64::try_from(LINE_BYTES_MAX + 2).unwrap_or(u64::MAX);
        (&mut log).take(limit).read_until(b'\n', &mut line)?;
        let number = whole.lines.saturating_add(1);
        let damage = |reason| Ok(Err(Damage { line: number, reason }));
        if line.is_empty() {
            break;
        }
        let Some(line) = line.strip_suffix(b"\n") else {
            return damage("has no end: it was cut short");
        };
        let (entry, hash) = match Entry::read(line) {
            Ok(read) => read,
            Err(reason) => return damage(reason),
        };
        if entry.sequence != number {
            return damage("is out of sequence: lines were taken out or put in before it");
        }
        if entry.previous != whole.head {
            return damage("does not follow the one before it");
        }
        seen = seen || expected == Some(hash.as_str());
        whole = Whole { lines: number, head: hash };
    }
    if seen {
        return Ok(Ok(whole));
    }
    let line = whole.lines.saturating_add(1);
    Ok(Err(Damage { line, reason: "is missing: the log ends before the expected hash" }))
}

/// The open log of a site.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    /// None if the log is damaged: nothing is added to it.
    state: Result<Mutex<State>, Damage>,
}

#[derive(Debug)]
struct State {
    file: File,
    end: u64,
    last: Whole,
}

impl AuditLog {
    /// Opens the log, or makes an empty one. A last line without an end is cut off. A log that is damaged stays as it is, and
    /// refuses what is added: see [`Self::damage`].
    ///
    /// # Errors
    /// The file system fails.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let failed = |operation| {
            let path = path.to_owned();
            move |source| AuditError::File { operation, path, source }
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).map_err(failed("opened"))?;
        let end = cut_torn_line(&mut file).map_err(failed("mended"))?;
        file.rewind().map_err(failed("read"))?;
        let last = verify(&file, None).map_err(failed("read"))?;
        let state = last.map(|last| Mutex::new(State { file, end, last }));
        Ok(Self { path: path.to_owned(), state })
    }

    /// That the log is damaged, if so.
    pub fn damage(&self) -> Option<AuditError> {
        let damage = self.state.as_ref().err()?.clone();
        Some(AuditError::Damaged { path: self.path.clone(), damage })
    }

    /// The log's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds an entry; it is durable when this returns. Sequence and hash of the line before are set here.
    ///
    /// # Errors
    /// The file cannot be written or is damaged; then nothing was added.
    ///
    /// # Panics
    /// If the names in the entry are longer than names are.
    pub fn append(&self, entry: Entry) -> Result<(), AuditError> {
        let state = self
            .state
            .as_ref()
            .map_err(|damage| AuditError::Damaged { path: self.path.clone(), damage: damage.clone() })?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Entry {
            sequence: state.last.lines.saturating_add(1),
            previous: state.last.head.clone(),
            detail: shortened(&entry.detail).to_owned(),
            ..entry
        };
        let (line, end) = (entry.line(), state.end);
        assert!(line.len() <= LINE_BYTES_MAX, "names and details are bounded");
        let written = state.file.seek(SeekFrom::Start(end)).and_then(|_| {
            state.file.write_all(&line)?;
            state.file.sync_data()
        });
        if let Err(source) = written {
            // What may have been written of it goes, now or at the next opening.
            let _ = state.file.set_len(end);
            return Err(AuditError::File { operation: "written", path: self.path.clone(), source });
        }
        state.end = end.saturating_add(u64::try_from(line.len()).unwrap_or(u64::MAX));
        state.last = Whole { lines: entry.sequence, head: entry.hash() };
        Ok(())
    }
}

/// At most [`DETAIL_BYTES_MAX`] bytes of a text.
fn shortened(text: &str) -> &str {
    text.get(..text.floor_char_boundary(DETAIL_BYTES_MAX)).unwrap_or(text)
}

/// Cuts off what follows the last line's end; gives the length left.
fn cut_torn_line(file: &mut File) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    let tail_bytes = length.min(u64::try_from(LINE_BYTES_MAX + 1).unwrap_or(u64::MAX));
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(length - tail_bytes))?;
    file.take(tail_bytes).read_to_end(&mut tail)?;
    let torn = match tail.iter().rposition(|byte| *byte == b'\n') {
        Some(place) => tail.len() - place - 1,
        // One line is shorter; if this is not ours at all, checking it will tell.
        None if tail_bytes == length => tail.len(),
        None => 0,
    };
    let end = length.saturating_sub(u64::try_from(torn).unwrap_or(0));
    if torn > 0 {
        file.set_len(end)?;
        file.sync_all()?;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use block::WallTime;
    use proptest::prelude::*;

    use super::*;

    fn entry(object: &str) -> Entry {
        Entry {
            sequence: 0,
            time: Timestamp(WallTime(1_700_000_000_000_000_000)),
            actor: "user 0".to_owned(),
            action: "tenant lock".to_owned(),
            object: object.to_owned(),
            outcome: Outcome::Done,
            detail: "\"quoted\" \u{e9}".to_owned(),
            previous: String::new(),
        }
    }

    fn written(objects: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        for object in objects {
            // Opened anew for each, as after a restart.
            AuditLog::open(&path).unwrap().append(entry(object)).unwrap();
        }
        (folder, path)
    }

    fn verified(bytes: &[u8]) -> Result<Whole, Damage> {
        verify(bytes, None).unwrap()
    }

    #[test]
    fn a_log_is_whole_over_restarts_and_continues_its_chain() {
        let (_folder, path) = written(&["a", "b", "c"]);
        let bytes = std::fs::read(&path).unwrap();
        let whole = verified(&bytes).unwrap();
        assert_eq!(whole.lines, 3);
        assert!(verify(bytes.as_slice(), Some(&whole.head)).unwrap().is_ok());
        assert_eq!(verified(b"").unwrap(), Whole::default());
    }

    #[test]
    fn a_changed_missing_moved_or_added_line_is_found() {
        let (_folder, path) = written(&["a", "b", "c"]);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(verified(&changed).is_err(), "byte {at}");
        }
        let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        for order in [&[0, 2][..], &[1, 2], &[0, 0, 1, 2], &[0, 2, 1]] {
            let log: Vec<u8> = order.iter().flat_map(|line| lines[*line].to_vec()).collect();
            assert!(verified(&log).is_err(), "{order:?}");
        }
        // Only a hash that was kept shows that the end is missing.
        let head = verified(&bytes).unwrap().head;
        let cut: Vec<u8> = lines[..2].concat();
        assert!(verified(&cut).is_ok());
        assert_eq!(verify(cut.as_slice(), Some(&head)).unwrap().unwrap_err().line, 3);
    }

    #[test]
    fn a_crash_within_a_line_loses_that_line_only() {
        let (_folder, path) = written(&["a", "b"]);
        let bytes = std::fs::read(&path).unwrap();
        let first = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            AuditLog::open(&path).unwrap().append(entry("c")).unwrap();
            let whole = verified(&std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(whole.lines, if length < first { 1 } else { 2 }, "{length} bytes");
        }
    }

    #[test]
    fn a_damaged_log_is_not_added_to() {
        let (_folder, path) = written(&["a", "b"]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let log = AuditLog::open(&path).unwrap();
        assert!(matches!(log.damage(), Some(AuditError::Damaged { .. })));
        assert!(matches!(log.append(entry("c")), Err(AuditError::Damaged { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn the_longest_entry_is_a_line() {
        let (_folder, path) = written(&[]);
        let long = Entry { detail: "\u{1}".repeat(5000), ..entry(&"o".repeat(64)) };
        AuditLog::open(&path).unwrap().append(long).unwrap();
        assert_eq!(verified(&std::fs::read(&path).unwrap()).unwrap().lines, 1);
    }

    proptest! {
        #[test]
        fn whatever_reads_as_a_line_is_written_as_that_line(
            detail in ".{0,40}",
            noise in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let line = Entry { detail, ..entry("x") }.line();
            let (read, _) = Entry::read(line.strip_suffix(b"\n").unwrap()).unwrap();
            prop_assert_eq!(read.line(), line);
            prop_assert!(Entry::read(&noise).is_err());
        }
    }
}
