//! The root key in a file: 32 bytes as 64 hexadecimal digits and a line end.
//!
//! The file is read for each call, so the key is in memory for its time only, and a file that is gone or replaced is noticed.
//! The file is never overwritten. It appears whole or not at all: a crash while it is made leaves no part of a
//! key under its name, and of two daemons that make it at once (the two sites of a test bed share it) one wins
//! and both read the winner's key.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block::TenantId;
use crypto::{DataKey, DomainKey, KeyEncryptionKey, RootKind, WrappedKey, Zeroizing};

use crate::{KeyProvider, KeystoreError, random_bytes};

/// Bytes in a key-encryption key.
const KEY_BYTES: usize = 32;
/// Digits in a key file.
const DIGITS: usize = 2 * KEY_BYTES;
/// The longest key file: the digits and a line end.
const FILE_BYTES_MAX: usize = DIGITS + 1;

/// A root key in a file of its own.
#[derive(Clone, Debug)]
pub struct FileKeyProvider {
    path: PathBuf,
}

impl FileKeyProvider {
    /// The key file at `path`, which is not looked at before it is needed.
    pub const fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Reads the key file at `path`; if there is none, makes it (mode 0600, durable) with the key that `random`
    /// draws, in production [`random_bytes`].
    ///
    /// # Errors
    /// [`KeystoreError`] if the file cannot be read or made, is open to other users, or holds no key.
    pub fn open_or_create(
        path: &Path,
        random: impl FnOnce() -> Result<Zeroizing<[u8; KEY_BYTES]>, KeystoreError>,
    ) -> Result<Self, KeystoreError> {
        match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => create(path, &*random()?)?,
            Ok(_) | Err(_) => {}
        }
        let provider = Self::at(path.to_owned());
        provider.key_encryption_key().map(|_| provider)
    }

    /// The key file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn key_encryption_key(&self) -> Result<KeyEncryptionKey, KeystoreError> {
        let file = File::open(&self.path).map_err(failed_read(&self.path))?;
        Ok(KeyEncryptionKey::from_bytes(read(&self.path, &file)?))
    }
}

impl KeyProvider for FileKeyProvider {
    fn kind(&self) -> RootKind {
        RootKind::File
    }

    fn name(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn wrap_domain(&mut self, key: &DomainKey, tenant: TenantId) -> Result<Vec<u8>, KeystoreError> {
        Ok(self.key_encryption_key()?.wrap_domain(key, tenant))
    }

    fn unwrap_domain(&mut self, wrapped: &[u8], tenant: TenantId) -> Result<DomainKey, KeystoreError> {
        let opened = self.key_encryption_key()?.unwrap_domain(wrapped, tenant);
        opened.map_err(|source| KeystoreError::NotOpened { provider: self.name(), source })
    }

    fn unwrap_data(&mut self, wrapped: &WrappedKey) -> Result<DataKey, KeystoreError> {
        let opened = self.key_encryption_key()?.unwrap(wrapped);
        opened.map_err(|source| KeystoreError::NotOpened { provider: self.name(), source })
    }

    fn fingerprint(&mut self) -> Result<String, KeystoreError> {
        Ok(self.key_encryption_key()?.fingerprint().to_string())
    }

    fn make_root(&mut self) -> Result<(), KeystoreError> {
        Self::open_or_create(&self.path, random_bytes::<KEY_BYTES>).map(drop)
    }
}

fn failed_read(path: &Path) -> impl Fn(io::Error) -> KeystoreError {
    move |source| KeystoreError::Read { path: path.to_owned(), source }
}

fn read(path: &Path, file: &File) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeystoreError> {
    // The open file is looked at, not its name, which could change meanwhile.
    let metadata = file.metadata().map_err(failed_read(path))?;
    let path_buffer = || path.to_owned();
    if !metadata.is_file() {
        return Err(KeystoreError::NotAFile { path: path_buffer() });
    }
    let mode = metadata.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeystoreError::Exposed { path: path_buffer(), mode });
    }
    // One byte more than allowed, so that a longer file is seen; no growth, which would leave copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX + 1));
    let limit = u64::try_from(FILE_BYTES_MAX + 1).unwrap_or(u64::MAX);
    file.take(limit).read_to_end(&mut text).map_err(failed_read(path))?;
    let digits = text.strip_suffix(b"\n").unwrap_or(&text);
    if digits.len() != DIGITS {
        return Err(KeystoreError::WrongLength { path: path_buffer() });
    }
    decode(digits).ok_or_else(|| KeystoreError::NotHexadecimal { path: path_buffer() })
}

fn decode(digits: &[u8]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    let (pairs, _) = digits.as_chunks();
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = value(*high)? << 4 | value(*low)?;
    }
    Some(bytes)
}

fn encode(bytes: &[u8; KEY_BYTES]) -> Zeroizing<Vec<u8>> {
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX));
    for byte in bytes {
        for value in [byte >> 4, byte & 0xf] {
            text.push(if value < 10 { b'0' + value } else { b'a' + value - 10 });
        }
    }
    text.push(b'\n');
    text
}

/// Makes the key file, unless another process made it first.
fn create(path: &Path, bytes: &[u8; KEY_BYTES]) -> Result<(), KeystoreError> {
    let failed = |source| KeystoreError::Create { path: path.to_owned(), source };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    let draft = folder.join(draft_name(path)?);
    let published = write_durably(&draft, &encode(bytes)).and_then(|()| match fs::hard_link(&draft, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    });
    // The draft goes in any case; whatever failed first is the error to report.
    let removed = fs::remove_file(&draft);
    published.and(removed).map_err(failed)?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// A name for the file before it is whole, that no other process uses.
fn draft_name(path: &Path) -> Result<OsString, KeystoreError> {
    let number = u64::from_ne_bytes(*random_bytes()?);
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{number:016x}.new"));
    Ok(name)
}

fn write_durably(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const DIGITS_TEXT: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1eFF";

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn constant(byte: u8) -> impl FnOnce() -> Result<Zeroizing<[u8; KEY_BYTES]>, KeystoreError> {
        move || Ok(Zeroizing::new([byte; KEY_BYTES]))
    }

    fn not_drawn() -> Result<Zeroizing<[u8; KEY_BYTES]>, KeystoreError> {
        panic!("no key may be drawn while the file exists")
    }

    fn key_file(folder: &Path, text: &str, mode: u32) -> PathBuf {
        let path = folder.join("kek");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    fn fingerprint(provider: &FileKeyProvider) -> String {
        provider.key_encryption_key().unwrap().fingerprint().to_string()
    }

    fn refusal(text: &str, mode: u32) -> String {
        let folder = folder();
        let path = key_file(folder.path(), text, mode);
        let refusal = FileKeyProvider::open_or_create(&path, not_drawn).unwrap_err().to_string();
        assert!(refusal.contains(path.to_str().unwrap()), "{refusal}");
        refusal
    }

    #[test]
    fn a_missing_file_is_made_private_and_read_again() {
        let folder = folder();
        let path = folder.path().join("kek");
        let made = FileKeyProvider::open_or_create(&path, constant(0xab)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "ab".repeat(32) + "\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let read = FileKeyProvider::open_or_create(&path, not_drawn).unwrap();
        assert_eq!(fingerprint(&made), fingerprint(&read));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no draft stays behind");
    }

    #[test]
    fn a_written_key_reads_as_the_same_bytes() {
        let folder = folder();
        let mut bytes: [u8; KEY_BYTES] = std::array::from_fn(|index| u8::try_from(index).unwrap());
        bytes[31] = 0xff;
        let expected = KeyEncryptionKey::from_bytes(bytes).fingerprint().to_string();
        for text in [DIGITS_TEXT.to_owned(), format!("{DIGITS_TEXT}\n")] {
            let path = key_file(folder.path(), &text, 0o400);
            let read = FileKeyProvider::open_or_create(&path, not_drawn).unwrap();
            assert_eq!(fingerprint(&read), expected);
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn two_that_make_the_file_at_once_read_the_same_key() {
        let folder = folder();
        let path = folder.path().join("kek");
        let open = |byte| FileKeyProvider::open_or_create(&path, constant(byte)).unwrap();
        let fingerprints: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..9).map(|byte| scope.spawn(move || fingerprint(&open(byte)))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(fingerprints.iter().all(|found| *found == fingerprints[0]), "{fingerprints:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_open_to_others_is_refused() {
        for mode in [0o640, 0o604, 0o620, 0o666] {
            assert!(refusal(DIGITS_TEXT, mode).contains(&format!("open to other users (mode {mode:o})")));
        }
    }

    #[test]
    fn a_file_of_wrong_length_is_refused() {
        let long = format!("{DIGITS_TEXT}0\n");
        for text in ["", "\n", &DIGITS_TEXT[..63], &long, &format!("{DIGITS_TEXT}\n\n"), &"0".repeat(9000)] {
            assert!(refusal(text, 0o600).contains("exactly 64 hexadecimal digits"));
        }
    }

    #[test]
    fn a_file_that_is_not_hexadecimal_is_refused() {
        for bad in ["g", "+", " ", "\0", "\n"] {
            let text = format!("{}{bad}\n", &DIGITS_TEXT[..63]);
            assert!(refusal(&text, 0o600).contains("not a hexadecimal digit"), "{bad:?}");
        }
    }

    #[test]
    fn a_folder_is_refused() {
        let folder = folder();
        let refusal = FileKeyProvider::open_or_create(folder.path(), not_drawn).unwrap_err();
        assert!(matches!(refusal, KeystoreError::NotAFile { .. }));
    }

    #[test]
    fn a_key_file_in_a_missing_folder_is_not_made() {
        let folder = folder();
        let path = folder.path().join("missing/kek");
        let refusal = FileKeyProvider::open_or_create(&path, constant(1)).unwrap_err();
        assert!(matches!(refusal, KeystoreError::Create { .. }));
    }
}
