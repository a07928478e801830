//! Why a key could not be had.

use std::io;
use std::path::PathBuf;

/// Why a key could not be had. No variant holds key material.
#[derive(Debug, thiserror::Error)]
pub enum KeystoreError {
    /// The key file cannot be read.
    #[error("key file '{path}' cannot be read: make it readable for the daemon's user", path = .path.display())]
    Read {
        /// The key file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The key file does not exist and cannot be made.
    #[error("key file '{path}' cannot be created: make its folder and let the daemon's user write there", path = .path.display())]
    Create {
        /// The key file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path names a folder, a device or the like.
    #[error("key file '{path}' is not a regular file: name a file, or a path that does not exist yet", path = .path.display())]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// Users other than the owner may read or write the key file.
    #[error("key file '{path}' is open to other users (mode {mode:03o}): run 'chmod 600' on it, and replace the key if they may have read it", path = .path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key file is not as long as a key.
    #[error("key file '{path}' does not hold exactly 64 hexadecimal digits: restore it from its backup, no other key opens the volumes", path = .path.display())]
    WrongLength {
        /// The key file.
        path: PathBuf,
    },
    /// The key file holds something other than hexadecimal digits.
    #[error("key file '{path}' holds a character that is not a hexadecimal digit: restore it from its backup, no other key opens the volumes", path = .path.display())]
    NotHexadecimal {
        /// The key file.
        path: PathBuf,
    },
    /// The kernel's random source failed.
    #[error("the kernel gives no random bytes: see why getrandom(2) fails, no key can be made without it")]
    Random(#[source] getrandom::Error),
}
