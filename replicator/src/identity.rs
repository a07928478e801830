//! A site's own key and self-signed certificate.
//!
//! There is no CA and no expiry that anyone checks: partners pin the certificate itself (docs/protocols/transport.md).

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use crate::pins::{CertificateError, Fingerprint, PinnedCertificate};

/// The certificate's file in the identity's directory; it is public.
pub const CERTIFICATE_FILE: &str = "site.crt";
/// The private key's file in the identity's directory; mode 0600.
pub const KEY_FILE: &str = "site.key";
/// X.520's bound on a common name, where the site's name goes.
const SITE_NAME_BYTES_MAX: usize = 64;
/// Far above any PEM file of ours.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What went wrong with an identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name does not fit in a certificate.
    #[error("site name '{0}' is not allowed: use 1 to {SITE_NAME_BYTES_MAX} printable ASCII characters")]
    Name(String),
    /// Making the key or the certificate failed.
    #[error("cannot make the site's certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// A file operation failed.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The certificate file is not one certificate.
    #[error("{}: {source}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: CertificateError,
    },
    /// The key file is not a private key that TLS can use.
    #[error("{} is not a private key that TLS can use: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Never quotes the key.
        reason: String,
    },
    /// Others may read the private key.
    #[error("{} can be read by others (mode {mode:03o}): `chmod 600` it, or make a new identity if it leaked", path.display())]
    KeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Certificate and key are not of one pair.
    #[error("{} does not belong to the certificate beside it: restore both files from one backup", path.display())]
    Mismatch {
        /// The key's file.
        path: PathBuf,
    },
}

/// A site's certificate and private key; cheap to clone, and silent about the key.
#[derive(Clone)]
pub struct SiteIdentity {
    certificate_pem: Arc<str>,
    key_pem: Arc<Zeroizing<String>>,
    certificate: PinnedCertificate,
    certified_key: Arc<CertifiedKey>,
}

impl SiteIdentity {
    /// Makes a fresh ECDSA P-256 key and a certificate that signs itself, named after the site.
    ///
    /// # Errors
    /// [`IdentityError::Name`] for a name that does not fit, [`IdentityError::Generate`] if the RNG fails.
    pub fn generate(site_name: &str) -> Result<Self, IdentityError> {
        let printable = site_name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if site_name.is_empty() || site_name.len() > SITE_NAME_BYTES_MAX || !printable {
            let shown: String = site_name.chars().take(SITE_NAME_BYTES_MAX).collect();
            return Err(IdentityError::Name(shown));
        }
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, site_name);
        // Nobody checks the dates: a pin ends when it is removed. RFC 5280 4.1.2.5 names 9999 for "no end".
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(9999, 12, 31);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        Self::assemble(certificate.pem(), key_pem, Path::new(""))
    }

    /// Reads `site.crt` and `site.key` from `directory`.
    ///
    /// # Errors
    /// A missing or unusable file, a key that others may read, or a pair that does not match.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let key_path = directory.join(KEY_FILE);
        let key_pem = Zeroizing::new(read(&key_path, |mode| match mode & 0o077 {
            0 => Ok(()),
            _ => Err(IdentityError::KeyExposed { path: key_path.clone(), mode: mode & 0o777 }),
        })?);
        let certificate_pem = read(&directory.join(CERTIFICATE_FILE), |_| Ok(()))?;
        Self::assemble(certificate_pem, key_pem, directory)
    }

    /// Writes both files into `directory` (made 0700 if missing), never over existing ones, and syncs them.
    ///
    /// # Errors
    /// A file exists or cannot be written; what this call created is removed again.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        if !directory.exists() {
            let made = DirBuilder::new().mode(0o700).recursive(true).create(directory);
            made.map_err(file_error("make", directory))?;
        }
        let key_path = directory.join(KEY_FILE);
        let certificate_path = directory.join(CERTIFICATE_FILE);
        create(&key_path, 0o600, self.key_pem.as_bytes())?;
        if let Err(error) = create(&certificate_path, 0o644, self.certificate_pem.as_bytes()) {
            // Best effort: the error that matters is the first one.
            let _ = std::fs::remove_file(&key_path);
            return Err(error);
        }
        let synced = File::open(directory).and_then(|folder| folder.sync_all());
        synced.map_err(file_error("sync", directory))
    }

    /// The certificate, to be given to partners.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The certificate as a partner pins it.
    pub fn certificate(&self) -> &PinnedCertificate {
        &self.certificate
    }

    /// The certificate's fingerprint.
    pub fn fingerprint(&self) -> Fingerprint {
        self.certificate.fingerprint()
    }

    /// Certificate chain of one and signing key, as rustls takes it.
    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified_key)
    }

    fn assemble(
        certificate_pem: String,
        key_pem: Zeroizing<String>,
        directory: &Path,
    ) -> Result<Self, IdentityError> {
        let path = directory.join(KEY_FILE);
        let bad_key = |reason: String| IdentityError::Key { path: path.clone(), reason };
        let certificate = PinnedCertificate::from_pem(&certificate_pem).map_err(|source| {
            IdentityError::Certificate { path: directory.join(CERTIFICATE_FILE), source }
        })?;
        let key =
            PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|error| bad_key(error.to_string()))?;
        let provider = rustls::crypto::ring::default_provider();
        let signing =
            provider.key_provider.load_private_key(key).map_err(|error| bad_key(error.to_string()))?;
        let certified_key = CertifiedKey::new(vec![certificate.der().clone()], signing);
        if certified_key.keys_match().is_err() {
            return Err(IdentityError::Mismatch { path });
        }
        Ok(Self {
            certificate_pem: certificate_pem.into(),
            key_pem: Arc::new(key_pem),
            certificate,
            certified_key: Arc::new(certified_key),
        })
    }
}

impl fmt::Debug for SiteIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("SiteIdentity").field(&self.fingerprint()).finish()
    }
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::File { operation, path, source }
}

fn read(path: &Path, check: impl FnOnce(u32) -> Result<(), IdentityError>) -> Result<String, IdentityError> {
    let file = File::open(path).map_err(file_error("open", path))?;
    let metadata = file.metadata().map_err(file_error("inspect", path))?;
    check(metadata.permissions().mode())?;
    // Room for the whole file at once: growing would leave copies of a key in freed memory.
    let size = metadata.len().min(FILE_BYTES_MAX);
    let mut text = String::with_capacity(usize::try_from(size).unwrap_or(0).saturating_add(1));
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(file_error("read", path))?;
    Ok(text)
}

fn create(path: &Path, mode: u32, content: &[u8]) -> Result<(), IdentityError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = opened.map_err(file_error("create", path))?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    written.map_err(|source| {
        // Best effort: a half-written file that this call made must not look like an identity.
        let _ = std::fs::remove_file(path);
        file_error("write", path)(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_identity_loads_as_itself_and_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("identity");
        let identity = SiteIdentity::generate("az-one").unwrap();
        identity.save(&place).unwrap();
        let mode = std::fs::metadata(place.join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let loaded = SiteIdentity::load(&place).unwrap();
        assert_eq!(loaded.fingerprint(), identity.fingerprint());
        assert_eq!(loaded.certificate_pem(), identity.certificate_pem());
        let other = SiteIdentity::generate("az-one").unwrap();
        assert_ne!(other.fingerprint(), identity.fingerprint());
        assert!(matches!(other.save(&place), Err(IdentityError::File { operation: "create", .. })));
        assert_eq!(SiteIdentity::load(&place).unwrap().fingerprint(), identity.fingerprint());
    }

    #[test]
    fn a_key_that_leaks_or_belongs_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (here, there) = (folder.path().join("a"), folder.path().join("b"));
        SiteIdentity::generate("a").unwrap().save(&here).unwrap();
        SiteIdentity::generate("b").unwrap().save(&there).unwrap();
        let key = here.join(KEY_FILE);
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(matches!(SiteIdentity::load(&here), Err(IdentityError::KeyExposed { mode: 0o640, .. })));
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::copy(there.join(CERTIFICATE_FILE), here.join(CERTIFICATE_FILE)).unwrap();
        assert!(matches!(SiteIdentity::load(&here), Err(IdentityError::Mismatch { .. })));
        std::fs::write(&key, "nonsense").unwrap();
        assert!(matches!(SiteIdentity::load(&here), Err(IdentityError::Key { .. })));
        std::fs::remove_file(&key).unwrap();
        assert!(matches!(SiteIdentity::load(&here), Err(IdentityError::File { operation: "open", .. })));
    }

    #[test]
    fn a_failed_save_leaves_no_half_identity() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CERTIFICATE_FILE), "taken").unwrap();
        assert!(SiteIdentity::generate("a").unwrap().save(folder.path()).is_err());
        assert!(!folder.path().join(KEY_FILE).exists());
    }

    #[test]
    fn names_and_debug_output_are_safe() {
        for bad in ["", "a\nb", "ä", &"n".repeat(65)] {
            assert!(matches!(SiteIdentity::generate(bad), Err(IdentityError::Name(_))), "{bad:?}");
        }
        let identity = SiteIdentity::generate("az one").unwrap();
        assert!(!format!("{identity:?}").contains("PRIVATE"));
    }
}
