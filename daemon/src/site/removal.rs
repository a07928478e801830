//! Giving the space of deleted volumes back.
//!
//! To remove a large file at once holds up its file system: the journal takes all of its extents in one go and, where it
//! is mounted with `discard`, the device takes them before any other file's flush. So files are shortened in steps, each
//! durable before the next, by one thread for all of a site's removals. A volume is gone for everybody else before that
//! begins; a removal that is cut short is taken up at the next start.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::lock;
use crate::catalogue::{CatalogueError, HEADER_FILE, remove_folder};

/// Steps take about so long: others' flushes wait for one of them at most.
const STEP_TIME: Duration = Duration::from_millis(50);
const STEP_BYTES_FIRST: u64 = 256 << 20;
const STEP_BYTES_MIN: u64 = 16 << 20;
const STEP_BYTES_MAX: u64 = 16 << 30;

/// Why a folder is still there.
#[derive(Debug, thiserror::Error)]
pub(super) enum RemovalError {
    #[error("cannot {action} {}: {source}", path.display())]
    System { action: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error("the site stops: the next start goes on with it")]
    Stopped,
    #[error("no thread can be had for it ({0}): the next start goes on with it")]
    NoThread(io::Error),
}

/// How a removal ended.
pub(super) type Removed = Result<(), RemovalError>;

/// All removals of a site.
#[derive(Debug, Default)]
pub(super) struct Removals {
    queue: Mutex<Queue>,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Removal>,
    /// What the thread works on, and its bytes that are left.
    current: Option<(String, u64)>,
}

#[derive(Debug)]
struct Removal {
    /// The volume, for people.
    name: String,
    folder: PathBuf,
    done: oneshot::Sender<Removed>,
}

impl Removals {
    /// Begins to remove a folder that belongs to nobody any more; the answer comes when it is gone, or stays.
    pub(super) fn begin(self: &Arc<Self>, name: &str, folder: PathBuf) -> oneshot::Receiver<Removed> {
        let (done, ended) = oneshot::channel();
        let mut queue = lock(&self.queue);
        let idle = queue.waiting.is_empty() && queue.current.is_none();
        queue.waiting.push_back(Removal { name: name.to_owned(), folder, done });
        if idle {
            queue.current = Some((name.to_owned(), 0));
            let removals = Arc::clone(self);
            let started =
                std::thread::Builder::new().name("removal".to_owned()).spawn(move || removals.run());
            if let Err(error) = started {
                queue.current = None;
                if let Some(removal) = queue.waiting.pop_back() {
                    let _ = removal.done.send(Err(RemovalError::NoThread(error)));
                }
            }
        }
        ended
    }

    /// Ends the removals with their present steps.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// What is still being removed, a sentence each.
    pub(super) fn running(&self) -> Vec<String> {
        let queue = lock(&self.queue);
        let current = queue.current.iter().map(|(name, left)| {
            format!("volume '{name}' is deleted; {left} bytes of its space are still to be given back")
        });
        let waiting = queue.waiting.iter().map(|removal| {
            format!("volume '{}' is deleted; its space is given back after that of others", removal.name)
        });
        current.chain(waiting).collect()
    }

    fn run(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let Some(removal) = queue.waiting.pop_front() else {
                queue.current = None;
                return;
            };
            queue.current = Some((removal.name.clone(), 0));
            drop(queue);
            let removed = self.remove(&removal);
            if let Err(error) = &removed {
                tracing::warn!(%error, volume = removal.name, "the space of a deleted volume is not given back yet");
            }
            // Whoever asked may have gone.
            let _ = removal.done.send(removed);
        }
    }

    fn remove(&self, removal: &Removal) -> Removed {
        for path in files_of(&removal.folder)? {
            self.shorten(removal, &path)?;
        }
        Ok(remove_folder(&removal.folder)?)
    }

    /// Shortens a file until removing it is quick.
    fn shorten(&self, removal: &Removal, path: &Path) -> Removed {
        let failed = |action| {
            let path = path.to_owned();
            move |source| RemovalError::System { action, path, source }
        };
        let file = OpenOptions::new().write(true).open(path).map_err(failed("open"))?;
        let mut left = file.metadata().map_err(failed("measure"))?.len();
        let mut step = STEP_BYTES_FIRST;
        while left > 0 {
            if self.stopping.load(Ordering::Relaxed) {
                return Err(RemovalError::Stopped);
            }
            lock(&self.queue).current = Some((removal.name.clone(), left));
            left = left.saturating_sub(step);
            let begun = Instant::now();
            truncate(&file, left).map_err(failed("shorten"))?;
            step = next_step(step, begun.elapsed());
        }
        Ok(())
    }
}

/// Durably, so that the file system has nothing of it left to do.
fn truncate(file: &File, length: u64) -> io::Result<()> {
    file.set_len(length)?;
    file.sync_all()
}

/// Twice as much after a quick step, half after a long one.
fn next_step(step: u64, took: Duration) -> u64 {
    if took < STEP_TIME / 2 {
        (step * 2).min(STEP_BYTES_MAX)
    } else if took > STEP_TIME * 2 {
        (step / 2).max(STEP_BYTES_MIN)
    } else {
        step
    }
}

/// The files that hold the space; the header says what the folder is until its end. A folder that is gone has none.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>, RemovalError> {
    let failed = |source| RemovalError::System { action: "read", path: folder.to_owned(), source };
    let entries = match folder.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_name() != HEADER_FILE && entry.file_type().map_err(failed)?.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("volume");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(HEADER_FILE), b"header").unwrap();
        std::fs::write(folder.join("intent"), b"map").unwrap();
        File::create(folder.join("data")).unwrap().set_len(bytes).unwrap();
        (parent, folder)
    }

    #[test]
    fn folders_are_removed_one_after_another_and_each_end_is_told() {
        let removals = Arc::new(Removals::default());
        let made: Vec<_> = (0..3).map(|_| folder(3 << 30)).collect();
        let ends: Vec<_> = made.iter().map(|(_, folder)| removals.begin("a", folder.clone())).collect();
        for (end, (_, folder)) in ends.into_iter().zip(&made) {
            end.blocking_recv().unwrap().unwrap();
            assert!(!folder.exists());
        }
        while !removals.running().is_empty() {
            std::thread::yield_now();
        }
        // The thread has ended; the next one begins with another.
        let (_parent, folder) = folder(1);
        removals.begin("a", folder.clone()).blocking_recv().unwrap().unwrap();
        assert!(!folder.exists());
        removals.begin("a", folder).blocking_recv().unwrap().unwrap();
    }

    #[test]
    fn a_removal_that_is_stopped_keeps_the_header_and_goes_on_later() {
        let (_parent, folder) = folder(3 << 30);
        let stopped = Arc::new(Removals::default());
        stopped.stop();
        let ended = stopped.begin("a", folder.clone()).blocking_recv().unwrap();
        assert!(matches!(ended, Err(RemovalError::Stopped)));
        assert!(folder.join(HEADER_FILE).exists() && folder.join("data").exists());
        Arc::new(Removals::default()).begin("a", folder.clone()).blocking_recv().unwrap().unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn steps_follow_the_time_that_they_take() {
        assert_eq!(next_step(STEP_BYTES_FIRST, Duration::from_millis(1)), 2 * STEP_BYTES_FIRST);
        assert_eq!(next_step(STEP_BYTES_FIRST, STEP_TIME), STEP_BYTES_FIRST);
        assert_eq!(next_step(STEP_BYTES_FIRST, Duration::from_secs(1)), STEP_BYTES_FIRST / 2);
        assert_eq!(next_step(STEP_BYTES_MAX, Duration::ZERO), STEP_BYTES_MAX);
        assert_eq!(next_step(STEP_BYTES_MIN, Duration::from_secs(1)), STEP_BYTES_MIN);
    }
}
