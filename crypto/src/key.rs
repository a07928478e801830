//! Keys: the data key of a volume, the key-encryption key of a site, and the wrapped form that is stored.
//!
//! A data key never leaves memory but wrapped by AES-256 key wrap (RFC 3394), which also authenticates it: a
//! wrong key-encryption key or a damaged wrap is refused, it never yields a wrong key.

use std::fmt;
use std::hint::black_box;

use aes_kw::cipher::consts::{U16, U64};
use aes_kw::{KeyInit, KwAes256};
use zeroize::Zeroizing;

/// Bytes in one half of a data key, and in a key-encryption key.
const HALF_BYTES: usize = 32;
/// Bytes in a data key.
const DATA_KEY_BYTES: usize = 64;
/// Bytes in a wrapped data key: the key and the 8 bytes of the integrity check.
pub const WRAPPED_KEY_BYTES: usize = 72;
/// Wrapped to tell key-encryption keys apart. Its length differs from a data key's, so no wrapped data key
/// has anything in common with a fingerprint.
const FINGERPRINT_CONSTANT: &[u8; 16] = b"farshore key v1\0";

/// Why a key was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// XTS with equal halves is open to a chosen-ciphertext attack (FIPS 140-3 IG C.I).
    #[error(
        "the data key is refused, because its two halves are equal: draw another from a working random source"
    )]
    EqualHalves,
    /// The wrapped key is damaged on its way or on disk.
    #[error(
        "the wrapped data key has {found} bytes where {WRAPPED_KEY_BYTES} belong: restore it from the peer or a backup"
    )]
    WrongLength {
        /// The bytes found.
        found: usize,
    },
    /// Another key-encryption key wrapped it, or it is damaged.
    #[error(
        "the wrapped data key does not open with this key-encryption key: give the daemon the key that wrapped it"
    )]
    NotOpened,
}

/// A volume's data key: 32 bytes for the data and 32 bytes for the tweaks, never equal. Zeroed on drop.
pub struct DataKey {
    data: Zeroizing<[u8; HALF_BYTES]>,
    tweak: Zeroizing<[u8; HALF_BYTES]>,
}

impl DataKey {
    /// The key made of 64 bytes from a cryptographic random source: data key, then tweak key.
    ///
    /// # Errors
    /// [`KeyError::EqualHalves`]; a random source that works never has it happen.
    pub fn from_random(bytes: impl Into<Zeroizing<[u8; DATA_KEY_BYTES]>>) -> Result<Self, KeyError> {
        let bytes = bytes.into();
        let mut key = Self { data: Zeroizing::default(), tweak: Zeroizing::default() };
        let (data, tweak) = bytes.split_at(HALF_BYTES);
        key.data.copy_from_slice(data);
        key.tweak.copy_from_slice(tweak);
        if key.halves_are_equal() {
            return Err(KeyError::EqualHalves);
        }
        Ok(key)
    }

    /// The data key and the tweak key.
    pub(crate) fn halves(&self) -> (&[u8; HALF_BYTES], &[u8; HALF_BYTES]) {
        (&self.data, &self.tweak)
    }

    /// Data key, then tweak key, in one piece.
    pub(crate) fn concatenated(&self) -> Zeroizing<[u8; DATA_KEY_BYTES]> {
        let mut bytes = Zeroizing::new([0; DATA_KEY_BYTES]);
        let (data, tweak) = bytes.split_at_mut(HALF_BYTES);
        data.copy_from_slice(&*self.data);
        tweak.copy_from_slice(&*self.tweak);
        bytes
    }

    /// True if it is the same key. The time taken tells nothing about either.
    pub fn is_same(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.concatenated(), other.concatenated());
        let pairs = ours.iter().zip(theirs.iter());
        pairs.fold(0, |difference, (one, other)| black_box(difference | (one ^ other))) == 0
    }

    /// Compares all bytes, whatever they are, so that the time taken tells nothing about them.
    fn halves_are_equal(&self) -> bool {
        let pairs = self.data.iter().zip(self.tweak.iter());
        let difference = pairs.fold(0, |difference, (data, tweak)| black_box(difference | (data ^ tweak)));
        difference == 0
    }
}

/// A key that wraps data keys. Both sites of a mirror share it. Zeroed on drop.
pub struct KeyEncryptionKey {
    cipher: KwAes256,
}

impl KeyEncryptionKey {
    /// The key with these 32 bytes.
    pub fn from_bytes(bytes: impl Into<Zeroizing<[u8; 32]>>) -> Self {
        let bytes = bytes.into();
        Self { cipher: KwAes256::new((&*bytes).into()) }
    }

    pub(crate) const fn cipher(&self) -> &KwAes256 {
        &self.cipher
    }

    /// Wraps a data key (RFC 3394). The same key always gives the same wrap.
    pub fn wrap(&self, key: &DataKey) -> WrappedKey {
        WrappedKey(self.cipher.wrap_fixed_key::<U64>((&*key.concatenated()).into()).0)
    }

    /// Opens a wrapped data key (RFC 3394).
    ///
    /// # Errors
    /// [`KeyError::NotOpened`] if another key wrapped it or a bit of it changed, [`KeyError::EqualHalves`] if
    /// what was wrapped is not fit for XTS.
    pub fn unwrap(&self, wrapped: &WrappedKey) -> Result<DataKey, KeyError> {
        let mut bytes = Zeroizing::new([0; DATA_KEY_BYTES]);
        match self.cipher.unwrap_key(&wrapped.0, &mut *bytes) {
            Ok(_) => DataKey::from_random(bytes),
            Err(_) => Err(KeyError::NotOpened),
        }
    }

    /// A short public name of the key: two sites can compare theirs without showing the keys.
    pub fn fingerprint(&self) -> KeyFingerprint {
        let wrapped = self.cipher.wrap_fixed_key::<U16>(FINGERPRINT_CONSTANT.into());
        let ([fingerprint, ..], _) = wrapped.0.as_chunks() else {
            return KeyFingerprint([0; 8]);
        };
        KeyFingerprint(*fingerprint)
    }
}

/// A data key wrapped by a key-encryption key: what headers, the catalogue and the peer store.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedKey([u8; WRAPPED_KEY_BYTES]);

impl WrappedKey {
    /// The wrapped key in stored form; it is not checked before it is unwrapped.
    ///
    /// # Errors
    /// [`KeyError::WrongLength`] unless there are 72 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let wrong = |_| KeyError::WrongLength { found: bytes.len() };
        bytes.try_into().map(Self).map_err(wrong)
    }

    /// The stored form.
    pub const fn as_bytes(&self) -> &[u8; WRAPPED_KEY_BYTES] {
        &self.0
    }
}

/// The public name of a key-encryption key, shown as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyFingerprint([u8; 8]);

impl fmt::Display for KeyFingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyFingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyFingerprint({self})")
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("DataKey(redacted)")
    }
}

impl fmt::Debug for KeyEncryptionKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyEncryptionKey({})", self.fingerprint())
    }
}

impl fmt::Debug for WrappedKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("WrappedKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use aes_kw::KwpAes192;

    use super::*;

    fn bytes(hexadecimal: &str) -> Vec<u8> {
        let digits = hexadecimal.as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.map(byte).collect()
    }

    /// Bytes that differ from each other, starting with `first`.
    fn counting<const N: usize>(first: u8) -> [u8; N] {
        let mut next = first;
        [(); N].map(|()| {
            next = next.wrapping_add(1);
            next
        })
    }

    fn data_key() -> DataKey {
        DataKey::from_random(counting::<64>(9)).unwrap()
    }

    fn key_encryption_key() -> KeyEncryptionKey {
        KeyEncryptionKey::from_bytes(counting::<32>(100))
    }

    #[test]
    fn equal_halves_are_refused() {
        assert_eq!(DataKey::from_random([5; 64]).unwrap_err(), KeyError::EqualHalves);
        for different in 0..64 {
            let mut bytes = [5; 64];
            bytes[different] = 4;
            assert!(DataKey::from_random(bytes).is_ok(), "byte {different}");
        }
    }

    #[test]
    fn a_key_is_the_same_as_itself_and_as_no_other() {
        assert!(data_key().is_same(&data_key()));
        for different in 0..64 {
            let mut bytes = counting::<64>(9);
            bytes[different] ^= 0x80;
            assert!(!data_key().is_same(&DataKey::from_random(bytes).unwrap()), "byte {different}");
        }
    }

    #[test]
    fn a_wrapped_key_opens_to_the_same_key() {
        let wrapped = key_encryption_key().wrap(&data_key());
        let stored = WrappedKey::from_bytes(wrapped.as_bytes()).unwrap();
        let opened = key_encryption_key().unwrap(&stored).unwrap();
        assert_eq!(opened.halves(), data_key().halves());
    }

    #[test]
    fn another_key_or_a_changed_bit_does_not_open() {
        let wrapped = key_encryption_key().wrap(&data_key());
        let other = KeyEncryptionKey::from_bytes(counting::<32>(101));
        assert_eq!(other.unwrap(&wrapped).unwrap_err(), KeyError::NotOpened);
        for bit in 0..WRAPPED_KEY_BYTES * 8 {
            let mut damaged = *wrapped.as_bytes();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let damaged = WrappedKey::from_bytes(&damaged).unwrap();
            assert_eq!(key_encryption_key().unwrap(&damaged).unwrap_err(), KeyError::NotOpened);
        }
    }

    #[test]
    fn a_wrap_of_equal_halves_is_refused() {
        let mut wrapped = [0; WRAPPED_KEY_BYTES];
        key_encryption_key().cipher.wrap_key(&[3; 64], &mut wrapped).unwrap();
        let wrapped = WrappedKey::from_bytes(&wrapped).unwrap();
        assert_eq!(key_encryption_key().unwrap(&wrapped).unwrap_err(), KeyError::EqualHalves);
    }

    #[test]
    fn a_wrapped_key_of_wrong_length_is_refused() {
        for found in [0, 71, 73] {
            let refusal = WrappedKey::from_bytes(&vec![0; found]).unwrap_err();
            assert_eq!(refusal, KeyError::WrongLength { found });
        }
    }

    #[test]
    fn rfc_3394_vectors_match() {
        let key = KeyEncryptionKey::from_bytes(std::array::from_fn(|index| u8::try_from(index).unwrap()));
        let vectors = [
            ("00112233445566778899AABBCCDDEEFF", "64E8C3F9CE0F5BA263E9777905818A2A93C8191E7D6E8AE7"),
            (
                "00112233445566778899AABBCCDDEEFF0001020304050607",
                "A8F9BC1612C68B3FF6E6F4FBE30E71E4769C8B80A32CB8958CD5D17D6B254DA1",
            ),
            (
                "00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F",
                "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21",
            ),
        ];
        for (plain, wrapped) in vectors {
            let mut buffer = [0; 64];
            assert_eq!(key.cipher.wrap_key(&bytes(plain), &mut buffer).unwrap(), bytes(wrapped));
            assert_eq!(key.cipher.unwrap_key(&bytes(wrapped), &mut buffer).unwrap(), bytes(plain));
        }
    }

    /// Not used by us yet, but a key that another system wrapped may come this way.
    #[test]
    fn rfc_5649_vectors_match() {
        let key: [u8; 24] = bytes("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8").try_into().unwrap();
        let key = KwpAes192::new(&key.into());
        let vectors = [
            (
                "c37b7e6492584340bed12207808941155068f738",
                "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
            ),
            ("466f7250617369", "afbeb0f07dfbf5419200f2ccb50bb24f"),
        ];
        for (plain, wrapped) in vectors {
            let mut buffer = [0; 64];
            assert_eq!(key.wrap_key(&bytes(plain), &mut buffer).unwrap(), bytes(wrapped));
            assert_eq!(key.unwrap_key(&bytes(wrapped), &mut buffer).unwrap(), bytes(plain));
        }
    }

    #[test]
    fn fingerprints_are_stable_and_tell_keys_apart() {
        let fingerprint = key_encryption_key().fingerprint();
        assert_eq!(fingerprint, key_encryption_key().fingerprint());
        assert_ne!(fingerprint, KeyEncryptionKey::from_bytes(counting::<32>(101)).fingerprint());
        assert_eq!(fingerprint.to_string().len(), 16);
    }

    #[test]
    fn debug_output_shows_no_key() {
        assert_eq!(format!("{:?}", data_key()), "DataKey(redacted)");
        let wrapped = key_encryption_key().wrap(&data_key());
        assert_eq!(format!("{wrapped:?}"), "WrappedKey(redacted)");
    }
}
