//! Data files and block devices.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, fallocate, fcntl_getfl, fcntl_setfl, fstatvfs, ftruncate, seek,
};
use rustix::io::Errno;

/// The mode of new data files: their owner's only.
const FILE_MODE: u32 = 0o600;

/// An open data file or block device; a cheap handle. It closes when the last handle is gone, the ring's own ones
/// included.
#[derive(Clone, Debug)]
pub struct File {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    descriptor: OwnedFd,
    direct: bool,
}

/// Why a data file could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A new file's path is taken.
    #[error("cannot create {path}: it already exists")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The space is not there; nothing has changed.
    #[error(
        "cannot allocate {path}: it needs {size} bytes, its file system has {available} free; free or add space"
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// The bytes that it lacks.
        size: u64,
        /// What the file system could give.
        available: u64,
    },
    /// The file system cannot reserve space for a file.
    #[error(
        "cannot allocate {path}: its file system cannot preallocate space; use one that can, as ext4 or XFS"
    )]
    NoPreallocation {
        /// The file.
        path: PathBuf,
    },
    /// The file system does no O_DIRECT.
    #[error(
        "cannot open {path} for direct I/O: its file system refuses O_DIRECT; use another, or the page cache"
    )]
    DirectRefused {
        /// The file.
        path: PathBuf,
    },
    /// The device is mounted or otherwise claimed.
    #[error("cannot open {path}: the device is in use; unmount it or stop what uses it")]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// Anything else that the system says.
    #[error("cannot {action} {path}: {source}")]
    System {
        /// What failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl File {
    /// Makes a file of `size` bytes with all its space allocated, durably: the file and its folder's entry are on
    /// stable media. It reads as zeros. With `direct`, all I/O bypasses the page cache.
    ///
    /// # Errors
    ///
    /// If the path is taken, the space is not there, or the file system cannot do it; then no file is left behind.
    pub fn create_thick(path: &Path, size: u64, direct: bool) -> Result<Self, FileError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(FILE_MODE);
        let file = options.open(path).map_err(|source| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                let path = path.to_owned();
                return FileError::Exists { path };
            }
            system("create", path, source)
        })?;
        let descriptor = OwnedFd::from(file);
        let outcome = fill(&descriptor, path, size, direct);
        if let Err(error) = outcome {
            // The file is ours, since it did not exist before. If it cannot be removed, the first error counts.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        Ok(Self::new(descriptor, direct))
    }

    /// Opens a file or a block device for reading and writing; a device exclusively, so that a mounted one is
    /// refused.
    ///
    /// # Errors
    ///
    /// If it is not there, is in use, is of another type, or its file system refuses `direct`.
    pub fn open(path: &Path, direct: bool) -> Result<Self, FileError> {
        let kind = std::fs::metadata(path).map_err(|source| system("open", path, source))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device");
            return Err(system("open", path, source));
        }
        let exclusive = if kind.is_block_device() { libc::O_EXCL } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(exclusive);
        let file = options.open(path).map_err(|source| {
            if source.kind() == io::ErrorKind::ResourceBusy {
                let path = path.to_owned();
                return FileError::Busy { path };
            }
            system("open", path, source)
        })?;
        let descriptor = OwnedFd::from(file);
        if direct {
            set_direct(&descriptor, path)?;
        }
        Ok(Self::new(descriptor, direct))
    }

    /// The size in bytes, of a device too.
    ///
    /// # Errors
    ///
    /// What lseek(2) says.
    pub fn size(&self) -> io::Result<u64> {
        // All transfers name their offset, so the position that this moves is nobody's.
        Ok(seek(&self.shared.descriptor, SeekFrom::End(0))?)
    }

    /// Makes the file at `path`, which this is, at least `size` bytes long, with all its space allocated, durably. What
    /// is added reads as zeros. A file that is as long already stays as it is.
    ///
    /// # Errors
    ///
    /// If the space is not there, or the file system cannot do it, or this is a device that is smaller; then the file is
    /// as it was.
    pub fn grow(&self, path: &Path, size: u64) -> Result<(), FileError> {
        let descriptor = &self.shared.descriptor;
        let old = self.size().map_err(|source| system("measure", path, source))?;
        if let Some(missing) = size.checked_sub(old).filter(|missing| *missing > 0)
            && let Err(error) = allocate(descriptor, path, old, missing)
        {
            // What it got before it failed goes back. If that fails too the file is merely longer than it has to be.
            let _ = ftruncate(descriptor, old);
            return Err(error);
        }
        // Also where nothing was missing: an earlier attempt may have ended before its flush.
        rustix::fs::fsync(descriptor).map_err(|errno| system("flush", path, errno.into()))
    }

    /// Tells open files apart, as long as both are open.
    pub(crate) fn key(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// True if I/O bypasses the page cache and has to be aligned.
    pub fn is_direct(&self) -> bool {
        self.shared.direct
    }

    fn new(descriptor: OwnedFd, direct: bool) -> Self {
        let shared = Shared { descriptor, direct };
        Self { shared: Arc::new(shared) }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.descriptor.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.descriptor.as_raw_fd()
    }
}

/// Gives a new file its space and makes it durable.
fn fill(descriptor: &OwnedFd, path: &Path, size: u64, direct: bool) -> Result<(), FileError> {
    if direct {
        set_direct(descriptor, path)?;
    }
    allocate(descriptor, path, 0, size)?;
    rustix::fs::fsync(descriptor).map_err(|errno| system("flush", path, errno.into()))?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let flushed = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    flushed.map_err(|source| system("flush the folder of", path, source))
}

/// Allocates `size` bytes from `start` on.
fn allocate(descriptor: &OwnedFd, path: &Path, start: u64, size: u64) -> Result<(), FileError> {
    // Asked first: an allocation that is bound to fail would take all the space from others for a while.
    let available =
        available(descriptor).map_err(|errno| system("ask for the space of", path, errno.into()))?;
    let no_space = || FileError::NoSpace { path: path.to_owned(), size, available };
    if size > available {
        return Err(no_space());
    }
    fallocate(descriptor, FallocateFlags::empty(), start, size).map_err(|errno| match errno {
        Errno::NOSPC => no_space(),
        Errno::OPNOTSUPP => FileError::NoPreallocation { path: path.to_owned() },
        _ => system("allocate", path, errno.into()),
    })
}

/// Free bytes of the file system, without what it reserves for root.
fn available(descriptor: &OwnedFd) -> Result<u64, Errno> {
    let space = fstatvfs(descriptor)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// Switches O_DIRECT on. Done after opening, since there EINVAL has this one meaning.
fn set_direct(descriptor: &OwnedFd, path: &Path) -> Result<(), FileError> {
    let set = fcntl_getfl(descriptor).and_then(|flags| fcntl_setfl(descriptor, flags | OFlags::DIRECT));
    set.map_err(|errno| match errno {
        Errno::INVAL => FileError::DirectRefused { path: path.to_owned() },
        _ => system("open for direct I/O", path, errno.into()),
    })
}

fn system(action: &'static str, path: &Path, source: io::Error) -> FileError {
    FileError::System { action, path: path.to_owned(), source }
}
