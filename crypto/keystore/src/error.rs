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
    /// The provider's key is not the one that wrapped this.
    #[error("'{provider}' does not open it: {source}")]
    NotOpened {
        /// The provider's name.
        provider: String,
        /// The refusal.
        source: crypto::KeyError,
    },
    /// The provider cannot do this.
    #[error(
        "'{provider}' cannot {what}: only a key file can; keep it in kek_file until every volume was rotated"
    )]
    Unsupported {
        /// The provider's name.
        provider: String,
        /// What was asked.
        what: &'static str,
    },
    /// The provider does not answer in time.
    #[error("'{provider}' does not answer within {seconds} seconds: see that it can be reached")]
    NoAnswer {
        /// The provider's name.
        provider: String,
        /// The time it had.
        seconds: u64,
    },
    /// The provider's thread cannot be had, or has ended.
    #[error("'{provider}' has no thread: restart the daemon")]
    NoThread {
        /// The provider's name.
        provider: String,
    },
    /// A provider's address is not understood.
    #[error("key provider '{uri}' is not understood: {advice}")]
    Uri {
        /// What was given.
        uri: String,
        /// What to write.
        advice: &'static str,
    },
    /// The token refuses.
    #[cfg(feature = "pkcs11")]
    #[error("PKCS#11 token '{token}' refuses to {operation}: {source}")]
    Token {
        /// The token's label.
        token: String,
        /// What was being done.
        operation: &'static str,
        /// What the module said.
        source: cryptoki::error::Error,
    },
    /// The module has no such token, or the token no such key, or it gave something unexpected.
    #[error("PKCS#11 token '{token}' {what}")]
    TokenContent {
        /// The token's label.
        token: String,
        /// What is wrong and what to do.
        what: String,
    },
}
