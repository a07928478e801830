//! Key providers: roots of trust, which wrap and unwrap the domain keys of tenants.
//!
//! A root key never leaves its provider. Every call of a provider runs on that provider's own thread and has a deadline
//! ([`ProviderHandle`]): a token that hangs holds up nobody. Data keys are wrapped and unwrapped by `crypto`. [`memory`] keeps
//! keys out of swap and core dumps.

mod client;
mod error;
mod file;
pub mod memory;
#[cfg(feature = "pkcs11")]
mod pkcs11;
mod uri;

use block::TenantId;
use crypto::{DataKey, DomainKey, RootKind, WrappedKey, Zeroizing};

pub use client::ProviderHandle;
pub use error::KeystoreError;
pub use file::FileKeyProvider;
#[cfg(feature = "pkcs11")]
pub use pkcs11::Pkcs11Provider;
pub use uri::{Pkcs11Uri, ProviderUri};

/// A root of trust. Calls may take long, or never return: they belong behind a [`ProviderHandle`].
pub trait KeyProvider: Send {
    /// What kind it is.
    fn kind(&self) -> RootKind;

    /// Its address, for people; without secrets.
    fn name(&self) -> String;

    /// Wraps a domain key, bound to its tenant.
    ///
    /// # Errors
    /// The provider cannot be reached or refuses.
    fn wrap_domain(&mut self, key: &DomainKey, tenant: TenantId) -> Result<Vec<u8>, KeystoreError>;

    /// Opens what [`Self::wrap_domain`] made for the same tenant.
    ///
    /// # Errors
    /// The provider cannot be reached or refuses, or [`KeystoreError::NotOpened`].
    fn unwrap_domain(&mut self, wrapped: &[u8], tenant: TenantId) -> Result<DomainKey, KeystoreError>;

    /// Opens a data key of a volume from before there were tenants, wrapped by the root itself.
    ///
    /// # Errors
    /// As above; [`KeystoreError::Unsupported`] by all but a key file.
    fn unwrap_data(&mut self, wrapped: &WrappedKey) -> Result<DataKey, KeystoreError>;

    /// A short public name of the root key: two sites can compare theirs without showing the keys.
    ///
    /// # Errors
    /// The provider cannot be reached or refuses.
    fn fingerprint(&mut self) -> Result<String, KeystoreError>;

    /// Makes the root key if there is none.
    ///
    /// # Errors
    /// The provider cannot be reached or refuses.
    fn make_root(&mut self) -> Result<(), KeystoreError>;
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
