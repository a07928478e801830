//! The wrapped-key record of a volume: its data key under the keys above it, bound to tenant and volume.
//!
//! A root of trust, which is not here, wraps the domain key of a tenant; that wraps the volume's key-encryption key; that
//! wraps its data key. The record holds all three wraps, so it needs nothing but the root to be opened: a header, the
//! catalogue and the partner each have what they need. Each wrap is AES-256 key wrap (RFC 3394) over the key followed by
//! what it is bound to, so a wrap that was moved to another volume or tenant is refused as a damaged one is. Layout and
//! rules are docs/formats/keys.md's.

use std::fmt;

use aes_kw::{KeyInit, KwAes256};
use block::{TenantId, VolumeId};
use zeroize::Zeroizing;

use crate::{DataKey, KeyEncryptionKey, KeyError};

/// The longest record, in bytes.
pub const KEY_RECORD_BYTES_MAX: usize = FIXED_BYTES + WRAPPED_DOMAIN_KEY_BYTES_MAX;
/// The longest domain key as a root of trust wraps it: 12 bytes of nonce, the key, 16 bytes of tag.
pub const WRAPPED_DOMAIN_KEY_BYTES_MAX: usize = 60;

const MAGIC: [u8; 4] = *b"FKEY";
const VERSION: u8 = 2;
const KEY_BYTES: usize = 32;
const DATA_KEY_BYTES: usize = 64;
const IDENTITY_BYTES: usize = 16;
/// What key wrap adds.
const CHECK_BYTES: usize = 8;
/// Key-encryption key, tenant, volume.
const WRAPPED_KEK_BYTES: usize = KEY_BYTES + 2 * IDENTITY_BYTES + CHECK_BYTES;
/// Data key, volume.
const WRAPPED_DEK_BYTES: usize = DATA_KEY_BYTES + IDENTITY_BYTES + CHECK_BYTES;
/// Domain key, tenant, as a key file wraps it.
const WRAPPED_DOMAIN_BYTES: usize = KEY_BYTES + IDENTITY_BYTES + CHECK_BYTES;
const FIXED_BYTES: usize = 192;
const _: () = assert!(4 + 1 + 1 + 2 + 16 + 4 + 4 + WRAPPED_KEK_BYTES + WRAPPED_DEK_BYTES == FIXED_BYTES);

/// Why bytes are no wrapped-key record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is shorter or longer than it says, or than any.
    #[error(
        "the wrapped-key record has {0} bytes, which no record has: restore it from the peer or a backup"
    )]
    Length(usize),
    /// It is something else.
    #[error("the wrapped-key record does not begin as one: restore it from the peer or a backup")]
    Magic,
    /// A later daemon wrote it.
    #[error(
        "the wrapped-key record is of version {0}, this daemon knows version {VERSION}: use a newer daemon"
    )]
    Version(u8),
    /// A field holds what no daemon writes.
    #[error("field '{0}' of the wrapped-key record has no meaning: restore it from the peer or a backup")]
    Field(&'static str),
}

/// Which kind of root of trust wrapped a domain key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RootKind {
    /// A key in a file.
    File,
    /// A key inside a PKCS#11 token.
    Pkcs11,
}

impl RootKind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::File, Self::Pkcs11];

    /// The scheme of its URI.
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Pkcs11 => "pkcs11",
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Pkcs11 => 2,
        }
    }
}

impl fmt::Display for RootKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The key of a tenant's domain: wraps the key-encryption keys of its volumes. Zeroed on drop.
pub struct DomainKey(Zeroizing<[u8; KEY_BYTES]>);

impl DomainKey {
    /// The key with these bytes, from a cryptographic random source or a root of trust.
    pub fn from_bytes(bytes: impl Into<Zeroizing<[u8; KEY_BYTES]>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes, for a root of trust to wrap.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    fn cipher(&self) -> KwAes256 {
        KwAes256::new((&*self.0).into())
    }
}

impl fmt::Debug for DomainKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("DomainKey(redacted)")
    }
}

/// A domain key as a root of trust wrapped it.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedDomainKey {
    /// Whose.
    pub tenant: TenantId,
    /// What wrapped it.
    pub root: RootKind,
    /// Counts the tenant's domain keys, from 1.
    pub version: u32,
    /// At most [`WRAPPED_DOMAIN_KEY_BYTES_MAX`] bytes, at least one.
    bytes: Vec<u8>,
}

impl WrappedDomainKey {
    /// # Errors
    /// The wrap is empty or too long, or the version is 0.
    pub fn new(tenant: TenantId, root: RootKind, version: u32, bytes: Vec<u8>) -> Result<Self, RecordError> {
        if version == 0 {
            return Err(RecordError::Field("domain version"));
        }
        if !(1..=WRAPPED_DOMAIN_KEY_BYTES_MAX).contains(&bytes.len()) {
            return Err(RecordError::Length(bytes.len()));
        }
        Ok(Self { tenant, root, version, bytes })
    }

    /// What the root of trust made.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for WrappedDomainKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "WrappedDomainKey({} of {}, redacted)", self.version, self.tenant)
    }
}

impl KeyEncryptionKey {
    /// Wraps a domain key as a root of trust, bound to its tenant.
    pub fn wrap_domain(&self, key: &DomainKey, tenant: TenantId) -> Vec<u8> {
        wrap::<WRAPPED_DOMAIN_BYTES>(self.cipher(), &*key.0, &[tenant.to_bytes()]).to_vec()
    }

    /// Opens what [`Self::wrap_domain`] made.
    ///
    /// # Errors
    /// [`KeyError::NotOpened`] if another key wrapped it, it is another tenant's, or a bit of it changed.
    pub fn unwrap_domain(&self, wrapped: &[u8], tenant: TenantId) -> Result<DomainKey, KeyError> {
        let wrapped: &[u8; WRAPPED_DOMAIN_BYTES] = wrapped.try_into().map_err(|_| KeyError::NotOpened)?;
        unwrap(self.cipher(), wrapped, &[tenant.to_bytes()]).map(DomainKey)
    }
}

/// A volume's data key under its key-encryption key, the domain key and the root of trust.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyRecord {
    domain: WrappedDomainKey,
    version: u32,
    wrapped_kek: [u8; WRAPPED_KEK_BYTES],
    wrapped_dek: [u8; WRAPPED_DEK_BYTES],
}

impl KeyRecord {
    /// Wraps a data key under a new key-encryption key of these random bytes; `wrapped` is `domain` under its root.
    /// `version` counts the volume's key-encryption keys, from 1.
    ///
    /// # Panics
    /// If the version is 0.
    pub fn wrap(
        key: &DataKey,
        volume: VolumeId,
        domain: &DomainKey,
        wrapped: WrappedDomainKey,
        version: u32,
        random: &Zeroizing<[u8; KEY_BYTES]>,
    ) -> Self {
        assert!(version > 0, "versions count from 1");
        let binding = [wrapped.tenant.to_bytes(), volume.to_bytes()];
        let kek = KwAes256::new((&**random).into());
        let record = Self {
            version,
            wrapped_kek: wrap(&domain.cipher(), &**random, &binding),
            wrapped_dek: wrap(&kek, &*key.concatenated(), &[volume.to_bytes()]),
            domain: wrapped,
        };
        assert!(record.open(volume, domain).is_ok(), "what was wrapped opens");
        record
    }

    /// The data key.
    ///
    /// # Errors
    /// [`KeyError::NotOpened`] if the domain key is not the one that wrapped it, the record belongs to another volume or
    /// tenant, or a bit of it changed; [`KeyError::EqualHalves`].
    pub fn open(&self, volume: VolumeId, domain: &DomainKey) -> Result<DataKey, KeyError> {
        let binding = [self.domain.tenant.to_bytes(), volume.to_bytes()];
        let kek: Zeroizing<[u8; KEY_BYTES]> = unwrap(&domain.cipher(), &self.wrapped_kek, &binding)?;
        let kek = KwAes256::new((&*kek).into());
        DataKey::from_random(unwrap(&kek, &self.wrapped_dek, &[volume.to_bytes()])?)
    }

    /// The domain key above it, wrapped.
    pub const fn domain(&self) -> &WrappedDomainKey {
        &self.domain
    }

    /// Which of the volume's key-encryption keys this is, from 1.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// The stored form.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(KEY_RECORD_BYTES_MAX);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, self.domain.root.code()]);
        // At most 60.
        bytes.extend(u16::try_from(self.domain.bytes.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(self.domain.tenant.to_bytes());
        bytes.extend(self.domain.version.to_le_bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.wrapped_kek);
        bytes.extend(self.wrapped_dek);
        bytes.extend(&self.domain.bytes);
        bytes
    }

    /// Reads the stored form; its wraps are not checked before they are opened.
    ///
    /// # Errors
    /// It is no record that this daemon knows.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let length = RecordError::Length(bytes.len());
        let (magic, rest) = bytes.split_first_chunk::<4>().ok_or(length)?;
        if *magic != MAGIC {
            return Err(RecordError::Magic);
        }
        let ([version, root], rest) = rest.split_first_chunk::<2>().ok_or(length)?;
        if *version != VERSION {
            return Err(RecordError::Version(*version));
        }
        let root = RootKind::ALL.into_iter().find(|kind| kind.code() == *root);
        let (domain_length, rest) = rest.split_first_chunk::<2>().ok_or(length)?;
        let (tenant, rest) = rest.split_first_chunk::<IDENTITY_BYTES>().ok_or(length)?;
        let (domain_version, rest) = rest.split_first_chunk::<4>().ok_or(length)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(length)?;
        let (wrapped_kek, rest) = rest.split_first_chunk().ok_or(length)?;
        let (wrapped_dek, domain) = rest.split_first_chunk().ok_or(length)?;
        if usize::from(u16::from_le_bytes(*domain_length)) != domain.len() {
            return Err(length);
        }
        let version = u32::from_le_bytes(*version);
        if version == 0 {
            return Err(RecordError::Field("version"));
        }
        let root = root.ok_or(RecordError::Field("root of trust"))?;
        let tenant = TenantId::from_bytes(*tenant);
        let domain_version = u32::from_le_bytes(*domain_version);
        let domain = WrappedDomainKey::new(tenant, root, domain_version, domain.to_vec())?;
        Ok(Self { domain, version, wrapped_kek: *wrapped_kek, wrapped_dek: *wrapped_dek })
    }
}

impl fmt::Debug for KeyRecord {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyRecord({} under {:?}, redacted)", self.version, self.domain)
    }
}

/// Key wrap of the key followed by what it is bound to.
fn wrap<const WRAPPED: usize>(
    cipher: &KwAes256,
    key: &[u8],
    binding: &[[u8; IDENTITY_BYTES]],
) -> [u8; WRAPPED] {
    let mut plain = Zeroizing::new(Vec::with_capacity(WRAPPED));
    plain.extend_from_slice(key);
    plain.extend(binding.iter().flatten());
    let mut wrapped = [0; WRAPPED];
    assert!(cipher.wrap_key(&plain, &mut wrapped).is_ok(), "whole blocks of 8 bytes, and room for the check");
    wrapped
}

/// The key that [`wrap`] wrapped, if it is bound to the same.
fn unwrap<const KEY: usize, const WRAPPED: usize>(
    cipher: &KwAes256,
    wrapped: &[u8; WRAPPED],
    binding: &[[u8; IDENTITY_BYTES]],
) -> Result<Zeroizing<[u8; KEY]>, KeyError> {
    let mut plain = Zeroizing::new(vec![0; WRAPPED - CHECK_BYTES]);
    cipher.unwrap_key(wrapped, &mut plain).map_err(|_| KeyError::NotOpened)?;
    let (key, bound) = plain.split_first_chunk::<KEY>().ok_or(KeyError::NotOpened)?;
    // Identities are no secrets.
    if bound != binding.concat() {
        return Err(KeyError::NotOpened);
    }
    Ok(Zeroizing::new(*key))
}

#[cfg(test)]
mod tests {
    use block::{TenantId, VolumeId};
    use proptest::prelude::*;

    use super::*;

    const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
    const TENANT: TenantId = TenantId::from_bytes([3; 16]);

    fn data_key(first: u8) -> DataKey {
        let bytes: [u8; 64] = std::array::from_fn(|at| first.wrapping_add(u8::try_from(at).unwrap()));
        DataKey::from_random(bytes).unwrap()
    }

    fn domain(byte: u8) -> DomainKey {
        DomainKey::from_bytes([byte; 32])
    }

    fn wrapped_domain(tenant: TenantId, length: usize) -> WrappedDomainKey {
        WrappedDomainKey::new(tenant, RootKind::File, 5, vec![9; length]).unwrap()
    }

    fn record() -> KeyRecord {
        let random = Zeroizing::new([0x5a; 32]);
        KeyRecord::wrap(&data_key(1), VOLUME, &domain(1), wrapped_domain(TENANT, 56), 4, &random)
    }

    #[test]
    fn a_record_opens_to_its_data_key_and_survives_its_stored_form() {
        let stored = record().encode();
        assert_eq!(stored.len(), 192 + 56);
        let read = KeyRecord::decode(&stored).unwrap();
        assert_eq!(read, record());
        assert_eq!((read.version(), read.domain().version, read.domain().tenant), (4, 5, TENANT));
        let opened = read.open(VOLUME, &domain(1)).unwrap();
        assert_eq!(*opened.concatenated(), *data_key(1).concatenated());
    }

    #[test]
    fn a_record_of_another_volume_tenant_or_domain_is_refused() {
        let record = record();
        let not_opened = |outcome: Result<DataKey, KeyError>| outcome.unwrap_err() == KeyError::NotOpened;
        assert!(not_opened(record.open(VolumeId::from_bytes([8; 16]), &domain(1))));
        assert!(not_opened(record.open(VOLUME, &domain(2))));
        let moved = KeyRecord { domain: wrapped_domain(TenantId::default(), 56), ..record };
        assert!(not_opened(moved.open(VOLUME, &domain(1))), "even under the same domain key");
    }

    #[test]
    fn the_data_keys_wrap_of_another_volume_is_refused() {
        let random = Zeroizing::new([0x5a; 32]);
        let other = VolumeId::from_bytes([8; 16]);
        let other = KeyRecord::wrap(&data_key(2), other, &domain(1), wrapped_domain(TENANT, 56), 4, &random);
        let mixed = KeyRecord { wrapped_dek: other.wrapped_dek, ..record() };
        assert_eq!(mixed.open(VOLUME, &domain(1)).unwrap_err(), KeyError::NotOpened);
    }

    #[test]
    fn a_changed_bit_of_either_wrap_does_not_open() {
        let stored = record().encode();
        for bit in 32 * 8..192 * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let damaged = KeyRecord::decode(&damaged).unwrap();
            assert_eq!(damaged.open(VOLUME, &domain(1)).unwrap_err(), KeyError::NotOpened, "bit {bit}");
        }
    }

    #[test]
    fn a_root_opens_its_own_wrap_for_the_same_tenant_only() {
        let root = KeyEncryptionKey::from_bytes([4; 32]);
        let wrapped = root.wrap_domain(&domain(6), TENANT);
        assert_eq!(root.unwrap_domain(&wrapped, TENANT).unwrap().expose(), &[6; 32]);
        let other = KeyEncryptionKey::from_bytes([5; 32]);
        for outcome in [
            root.unwrap_domain(&wrapped, TenantId::default()),
            other.unwrap_domain(&wrapped, TENANT),
            root.unwrap_domain(&wrapped[1..], TENANT),
        ] {
            assert_eq!(outcome.unwrap_err(), KeyError::NotOpened);
        }
    }

    #[test]
    fn what_no_daemon_writes_is_refused() {
        let with = |at: usize, byte: u8| {
            let mut stored = record().encode();
            stored[at] = byte;
            KeyRecord::decode(&stored).unwrap_err()
        };
        assert_eq!(with(0, b'X'), RecordError::Magic);
        assert_eq!(with(4, 9), RecordError::Version(9));
        assert_eq!(with(5, 0), RecordError::Field("root of trust"));
        assert_eq!(with(6, 55), RecordError::Length(248));
        assert_eq!(with(24, 0), RecordError::Field("domain version"));
        assert_eq!(with(28, 0), RecordError::Field("version"));
        for length in 0..record().encode().len() {
            assert!(KeyRecord::decode(&record().encode()[..length]).is_err(), "{length} bytes");
        }
        assert!(WrappedDomainKey::new(TENANT, RootKind::File, 1, vec![0; 61]).is_err());
        assert!(WrappedDomainKey::new(TENANT, RootKind::File, 1, vec![]).is_err());
    }

    #[test]
    fn debug_output_shows_no_key_and_no_wrap() {
        assert!(!format!("{:?} {:?}", record(), domain(1)).contains("[9"));
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            length in 1_usize..70,
        ) {
            let mut bytes = bytes;
            bytes.resize(192 + length, 1);
            bytes[..8].copy_from_slice(&[b'F', b'K', b'E', b'Y', 2, 2, u8::try_from(length).unwrap(), 0]);
            if let Ok(record) = KeyRecord::decode(&bytes) {
                prop_assert_eq!(record.encode(), bytes);
            }
        }
    }
}
