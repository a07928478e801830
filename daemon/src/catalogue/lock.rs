//! One daemon a data directory: an advisory lock (flock) on `DIR/lock`, which the kernel releases at any death.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::{CatalogueError, file_error};

/// The right to use a data directory, held until dropped.
#[derive(Debug)]
pub struct DirectoryLock {
    directory: PathBuf,
    _file: File,
}

impl DirectoryLock {
    /// Makes the directory (mode 0700) if it is missing, and takes its lock.
    ///
    /// # Errors
    /// Another process holds it, or the directory cannot be used.
    pub fn acquire(directory: &Path) -> Result<Self, CatalogueError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(file_error("making data directory", directory))?;
        let path = directory.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(file_error("opening lock file", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(CatalogueError::InUse {
                    directory: directory.to_owned(),
                    process: process(&mut file),
                });
            }
            Err(errno) => return Err(file_error("locking", &path)(errno.into())),
        }
        file.set_len(0)
            .and_then(|()| write!(file, "{}", std::process::id()))
            .map_err(file_error("writing lock file", &path))?;
        Ok(Self { directory: directory.to_owned(), _file: file })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// The process number that the holder wrote; only for the message.
fn process(file: &mut File) -> Option<String> {
    let mut text = String::new();
    file.take(20).read_to_string(&mut text).ok()?;
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_on_the_directory_is_refused_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("site");
        let first = DirectoryLock::acquire(&directory).unwrap();
        let refused = DirectoryLock::acquire(&directory).unwrap_err().to_string();
        assert!(refused.contains(directory.to_str().unwrap()), "{refused}");
        assert!(refused.contains(&format!("(process {})", std::process::id())), "{refused}");
        drop(first);
        DirectoryLock::acquire(&directory).unwrap();
    }
}
