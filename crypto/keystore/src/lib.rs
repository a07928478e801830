//! Key providers: where key-encryption keys come from.
//!
//! A provider hands out the key-encryption key and nothing else; data keys are wrapped and unwrapped by `crypto`.
//! The key is read when the provider is opened, so that a bad key stops the daemon at its start.
//!
//! Keys are zeroed when they are dropped; they are not locked in memory nor kept out of core dumps here.

mod error;
mod file;

use std::sync::Arc;

use crypto::{KeyEncryptionKey, Zeroizing};

pub use error::KeystoreError;
pub use file::FileKeyProvider;

/// A source of the site's key-encryption key.
pub trait KeyProvider: Send + Sync {
    /// The key-encryption key; every call gives the same one.
    ///
    /// # Errors
    /// [`KeystoreError`] if the provider cannot be reached or does not hold the key.
    fn key_encryption_key(&self) -> Result<Arc<KeyEncryptionKey>, KeystoreError>;
}

/// `N` bytes from the kernel's random source, fit for keys and identities.
///
/// # Errors
/// [`KeystoreError::Random`] if the kernel has none to give.
pub fn random_bytes<const N: usize>() -> Result<Zeroizing<[u8; N]>, KeystoreError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(KeystoreError::Random)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_differ_from_call_to_call() {
        let (one, other) = (random_bytes::<32>().unwrap(), random_bytes::<32>().unwrap());
        assert_ne!(*one, *other);
    }
}
