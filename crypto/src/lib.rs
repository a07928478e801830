//! XTS-AES-256 over whole requests, volume keys and key wrapping.
//!
//! The crate is pure: random bytes come in as arguments, keys go out wrapped only. Keys are zeroed on drop and
//! never shown by `Debug`. XTS gives confidentiality, not integrity: whoever can write a home file can change
//! what a host reads, block by block.
//!
//! Sources: IEEE 1619-2007 (XTS), RFC 3394 (key wrap).

#[cfg(feature = "aws-lc")]
mod aws_lc;
mod cipher;
mod engine;
mod guard;
mod key;
#[cfg(test)]
mod oracle;
mod record;
mod rust_crypto;
mod zero;

pub use cipher::VolumeCipher;
pub use engine::{Engine, EngineError};
pub use guard::{KeyGuard, set_key_guard};
pub use key::{DataKey, KeyEncryptionKey, KeyError, KeyFingerprint, WRAPPED_KEY_BYTES, WrappedKey};
pub use record::{
    DomainKey, KEY_RECORD_BYTES_MAX, KeyRecord, RecordError, RootKind, WRAPPED_DOMAIN_KEY_BYTES_MAX,
    WrappedDomainKey,
};
pub use zeroize::Zeroizing;
