//! TLS for hosts: the listeners' certificate and key, the CAs of the hosts' certificates, and a host's identity.
//!
//! Where the settings name no certificate the site makes its own at the first start: a CA, whose key is thrown away, and
//! a server certificate that it signed. Their folder can be given to libnbd and QEMU as `tls-certificates` or `dir`.
//! The rules are docs/SECURITY.md's.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use control::HostIdentity;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, SupportedCipherSuite};
use zeroize::Zeroizing;

use super::files::{self, FilesError};
use crate::settings::{CertificateFiles, NbdAddress, NbdTls, Settings};

/// The folder of the site's own certificate in the data directory; the names in it are those that libnbd and QEMU know.
const FOLDER: &str = "tls";
const CA_FILE: &str = "ca-cert.pem";
const CERTIFICATE_FILE: &str = "server-cert.pem";
const KEY_FILE: &str = "server-key.pem";
/// Far above any PEM file of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why hosts cannot be served over TLS.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsSetupError {
    #[error("setting '{setting}': '{}' cannot be read ({source}); correct the path or its permissions", .path.display())]
    Read { setting: &'static str, path: PathBuf, source: io::Error },
    #[error("setting '{setting}': '{}' is not usable ({reason}); give a PEM file with {wanted}", .path.display())]
    Content { setting: &'static str, path: PathBuf, reason: String, wanted: &'static str },
    #[error("setting 'nbd_key_file': '{}' can be read by everybody (mode {mode:03o}); make it 0600 or 0640, and make a new key if it leaked", .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("'{}' and '{}' cannot be used together ({source}); give the certificate's own key", .certificate.display(), .key.display())]
    Pair { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("setting 'nbd_client_ca_file': '{}' cannot be used ({reason}); give the CA that signs the hosts' certificates", .path.display())]
    ClientCa { path: PathBuf, reason: String },
    #[error("the site's own certificate for hosts cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error("the site's own certificate for hosts cannot be stored: {0}")]
    Store(#[from] FilesError),
}

/// What TLS listeners greet hosts with; none if no listener has TLS.
///
/// # Errors
/// A file is missing, unusable, or readable by everybody.
pub(super) fn server_config(settings: &Settings) -> Result<Option<Arc<ServerConfig>>, TlsSetupError> {
    if settings.nbd_listen.iter().all(|listener| listener.tls == NbdTls::Off) {
        return Ok(None);
    }
    let files = match &settings.nbd_certificate {
        Some(files) => files.clone(),
        None => own_files(settings)?,
    };
    let chain = certificates(&files.certificate, "nbd_certificate_file", "the server's certificate")?;
    let key = private_key(&files.key)?;
    let provider = Arc::new(provider());
    let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
    let pair = |source| TlsSetupError::Pair {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&versions);
    let builder = builder.map_err(pair)?;
    let builder = match &settings.nbd_client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let refused = |reason: String| TlsSetupError::ClientCa { path: path.clone(), reason };
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path, "nbd_client_ca_file", "one or more CA certificates")? {
                roots.add(certificate).map_err(|error| refused(error.to_string()))?;
            }
            // Which hosts need a certificate is for each volume's list to say.
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| refused(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
    config.ignore_client_order = true;
    // Hosts connect rarely and stay; a resumed session would carry an identity that is not verified anew.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Some(Arc::new(config)))
}

/// What TLS is made of. In TLS 1.2 keys cannot be renewed, and those of AES-GCM wear out after 2^24 records, which a busy
/// host receives in minutes; those of ChaCha20-Poly1305 do not, so that comes first there.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    let wears_out = |suite: &SupportedCipherSuite| match suite {
        SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit < u64::MAX,
        SupportedCipherSuite::Tls13(_) => false,
    };
    provider.cipher_suites.sort_by_key(wears_out);
    provider
}

/// The identity that a verified certificate gives its host: the subject's common name, or the first DNS name if it has
/// none. None if it has several common names, or one that is no [`HostIdentity`]: a guess here would open volumes.
pub(super) fn host_identity(certificate: &CertificateDer<'_>) -> Option<HostIdentity> {
    let anchor = webpki::anchor_from_trusted_cert(certificate).ok()?;
    let text = match common_names(&anchor.subject)?.as_slice() {
        [] => {
            let entity = webpki::EndEntityCert::try_from(certificate).ok()?;
            entity.valid_dns_names().next()?.to_owned()
        }
        [name] => name.clone(),
        [_, _, ..] => return None,
    };
    text.try_into().ok()
}

/// The common names of a subject (RFC 5280 4.1.2.6, without the outer SEQUENCE); none if it is not understood.
fn common_names(mut subject: &[u8]) -> Option<Vec<String>> {
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    /// UTF8String, PrintableString, IA5String.
    const TEXTS: [u8; 3] = [0x0c, 0x13, 0x16];
    /// id-at-commonName, 2.5.4.3.
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    let mut names = Vec::new();
    while !subject.is_empty() {
        let (mut set, rest) = element(subject, &[SET])?;
        subject = rest;
        while !set.is_empty() {
            let (attribute, rest) = element(set, &[SEQUENCE])?;
            set = rest;
            let (kind, value) = element(attribute, &[OBJECT_IDENTIFIER])?;
            if kind == COMMON_NAME {
                let (text, _) = element(value, &TEXTS)?;
                names.push(String::from_utf8(text.to_vec()).ok()?);
            }
        }
    }
    Some(names)
}

/// The content of the DER element at the start of `bytes`, of one of these tags, and what follows it.
fn element<'bytes>(bytes: &'bytes [u8], tags: &[u8]) -> Option<(&'bytes [u8], &'bytes [u8])> {
    let ([tag, first], rest) = bytes.split_first_chunk()?;
    let (length, rest) = match first {
        ..=0x7f => (usize::from(*first), rest),
        0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
        0x82 => {
            rest.split_first_chunk().map(|(length, rest)| (usize::from(u16::from_be_bytes(*length)), rest))?
        }
        _ => return None,
    };
    if !tags.contains(tag) {
        return None;
    }
    rest.split_at_checked(length)
}

fn read(path: &Path, setting: &'static str) -> Result<(Zeroizing<Vec<u8>>, u32), TlsSetupError> {
    let failed = |source| TlsSetupError::Read { setting, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes, mode & 0o777))
}

fn certificates(
    path: &Path,
    setting: &'static str,
    wanted: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsSetupError> {
    let refused = |reason: String| TlsSetupError::Content { setting, path: path.to_owned(), reason, wanted };
    let (bytes, _) = read(path, setting)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| refused(error.to_string()))?;
    if found.is_empty() {
        return Err(refused("it holds no certificate".to_owned()));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsSetupError> {
    let setting = "nbd_key_file";
    let (bytes, mode) = read(path, setting)?;
    if mode & 0o007 != 0 {
        return Err(TlsSetupError::Exposed { path: path.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| TlsSetupError::Content {
        setting,
        path: path.to_owned(),
        reason: error.to_string(),
        wanted: "the private key of nbd_certificate_file",
    })
}

/// The site's own certificate, made if it has none yet.
fn own_files(settings: &Settings) -> Result<CertificateFiles, TlsSetupError> {
    let folder = settings.data_dir.join(FOLDER);
    let files = CertificateFiles { certificate: folder.join(CERTIFICATE_FILE), key: folder.join(KEY_FILE) };
    // It is written last: without it the others are what a crash has left, and nobody has a certificate to that key.
    if files.certificate.exists() {
        return Ok(files);
    }
    let system = |source| FilesError::System { action: "make", path: folder.clone(), source };
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder).map_err(system)?;
    files::sync_folder(&settings.data_dir)?;
    let made = make(server_names(settings), settings.site.as_str())?;
    files::write_durably(&folder.join(CA_FILE), made.ca.as_bytes())?;
    files::write_durably(&files.key, made.key.as_bytes())?;
    // Last, as what makes the others be used.
    files::write_durably(&files.certificate, made.certificate.as_bytes())?;
    tracing::info!(folder = %folder.display(), "a certificate for hosts was made; hosts need its {CA_FILE}");
    Ok(files)
}

/// Certificates and the server's key as PEM.
struct Made {
    ca: String,
    certificate: String,
    key: Zeroizing<String>,
}

fn make(names: Vec<String>, site: &str) -> Result<Made, rcgen::Error> {
    let mut authority = parameters(Vec::new(), &format!("{site} NBD CA"))?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority_key = KeyPair::generate()?;
    let ca = authority.self_signed(&authority_key)?.pem();
    // Its key signs this one certificate and ends here.
    let issuer = Issuer::new(authority, authority_key);
    let mut server = parameters(names, &format!("{site} NBD"))?;
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = server.signed_by(&key, &issuer)?.pem();
    Ok(Made { ca, certificate, key: Zeroizing::new(key.serialize_pem()) })
}

fn parameters(names: Vec<String>, common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    // RFC 5280 4.1.2.5 names 9999 for "no end"; a date that nobody watches would only take hosts offline one day.
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(9999, 12, 31);
    Ok(params)
}

/// What hosts may call this machine: its loopback names, its own name and the listeners' addresses.
fn server_names(settings: &Settings) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let listeners = settings.nbd_listen.iter().filter_map(|listener| match &listener.address {
        NbdAddress::Tcp(address) if !address.ip().is_unspecified() => Some(address.ip().to_string()),
        NbdAddress::Tcp(_) | NbdAddress::Unix(_) => None,
    });
    let host = Some(host.trim().to_owned()).filter(|host| !host.is_empty() && host.is_ascii());
    for name in host.into_iter().chain(listeners) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn settings(folder: &Path, flags: &[&str]) -> Settings {
        let mut arguments: Vec<OsString> = vec!["farshored".into(), "--dev".into(), folder.into()];
        arguments.extend(flags.iter().map(Into::into));
        Settings::from_args(arguments).unwrap()
    }

    fn certificate(names: &[&str], common_names: &[&str]) -> CertificateDer<'static> {
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let params = params.as_mut().unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        for (place, name) in common_names.iter().enumerate() {
            // rcgen holds one value a type; a second common name hides behind its object identifier.
            let kind = if place == 0 { DnType::CommonName } else { DnType::CustomDnType(vec![2, 5, 4, 3]) };
            params.distinguished_name.push(kind, *name);
        }
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_hosts_identity_is_its_common_name_or_else_its_first_dns_name() {
        let identity = |names: &[&str], common_names: &[&str]| {
            host_identity(&certificate(names, common_names)).map(String::from)
        };
        assert_eq!(identity(&["a.example"], &["host 1"]).as_deref(), Some("host 1"));
        assert_eq!(identity(&["a.example", "b.example"], &[]).as_deref(), Some("a.example"));
        assert_eq!(identity(&["10.0.0.1"], &[]), None);
        assert_eq!(identity(&["a.example"], &["one", "two"]), None, "several names are no identity");
        assert_eq!(identity(&["a.example"], &["a\0b"]), None, "no identity is made of a part of a name");
        assert_eq!(identity(&["a.example"], &[&"x".repeat(200)]), None);
    }

    #[test]
    fn no_subject_makes_the_reader_panic() {
        let whole = [0x31, 0x0c, 0x30, 0x0a, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x03, b'a', b'b', b'c'];
        assert_eq!(common_names(&whole), Some(vec!["abc".to_owned()]));
        for end in 1..whole.len() {
            assert_eq!(common_names(&whole[..end]), None, "cut at {end}");
        }
        for place in 0..whole.len() {
            for value in 0..=255 {
                let mut changed = whole;
                changed[place] = value;
                let _ = common_names(&changed);
            }
        }
    }

    #[test]
    fn tls_1_2_prefers_ciphers_whose_keys_do_not_wear_out() {
        let suites = provider().cipher_suites;
        let first = suites.iter().find(|suite| suite.tls13().is_none()).unwrap();
        assert!(format!("{:?}", first.suite()).contains("CHACHA20"), "{first:?}");
        let first = suites.iter().find(|suite| suite.tls13().is_some()).unwrap();
        assert!(format!("{:?}", first.suite()).contains("AES_256_GCM"), "{first:?}");
    }

    #[test]
    fn without_a_tls_listener_nothing_is_made() {
        let folder = tempfile::tempdir().unwrap();
        assert!(server_config(&settings(folder.path(), &[])).unwrap().is_none());
        assert!(!folder.path().join(FOLDER).exists());
    }

    #[test]
    fn the_site_makes_its_own_certificate_once_and_keeps_its_key_to_itself() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path(), &["--nbd", "127.0.0.9:0,tls=required"]);
        assert!(server_config(&settings).unwrap().is_some());
        let path = |name| folder.path().join(FOLDER).join(name);
        let key = std::fs::read(path(KEY_FILE)).unwrap();
        assert_eq!(std::fs::metadata(path(KEY_FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        server_config(&settings).unwrap();
        assert_eq!(std::fs::read(path(KEY_FILE)).unwrap(), key);
        assert!(server_names(&settings).contains(&"127.0.0.9".to_owned()));
    }

    #[test]
    fn a_start_that_ended_before_its_certificate_was_written_is_made_good_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path(), &["--nbd", "127.0.0.1:0,tls=required"]);
        server_config(&settings).unwrap();
        std::fs::remove_file(folder.path().join(FOLDER).join(CERTIFICATE_FILE)).unwrap();
        assert!(server_config(&settings).unwrap().is_some());
    }

    #[test]
    fn a_refusal_names_the_file_and_says_what_to_give() {
        let folder = tempfile::tempdir().unwrap();
        let own = settings(folder.path(), &["--nbd", "127.0.0.1:0,tls=optional"]);
        server_config(&own).unwrap();
        let path = |name: &str| folder.path().join(FOLDER).join(name);
        let files = |certificate: &str, key: &str| Settings {
            nbd_certificate: Some(CertificateFiles { certificate: path(certificate), key: path(key) }),
            ..own.clone()
        };
        let other = make(vec!["x".to_owned()], "x").unwrap();
        std::fs::write(path("other"), other.key.as_bytes()).unwrap();
        std::fs::set_permissions(path("other"), PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::write(path("open"), other.key.as_bytes()).unwrap();
        std::fs::set_permissions(path("open"), PermissionsExt::from_mode(0o644)).unwrap();
        std::fs::write(path("empty"), b"").unwrap();
        std::fs::set_permissions(path("empty"), PermissionsExt::from_mode(0o600)).unwrap();
        let client_ca = |name: &str| Settings { nbd_client_ca: Some(path(name)), ..own.clone() };
        for (settings, expected) in [
            (files("absent", KEY_FILE), "setting 'nbd_certificate_file': '"),
            (files(KEY_FILE, KEY_FILE), "give a PEM file with the server's certificate"),
            (files(CERTIFICATE_FILE, "absent"), "setting 'nbd_key_file': '"),
            (files(CERTIFICATE_FILE, "empty"), "give a PEM file with the private key"),
            (files(CERTIFICATE_FILE, "open"), "can be read by everybody (mode 644)"),
            (files(CERTIFICATE_FILE, "other"), "give the certificate's own key"),
            (client_ca("empty"), "setting 'nbd_client_ca_file': '"),
        ] {
            let refused = server_config(&settings).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
            assert!(refused.contains(folder.path().to_str().unwrap()), "{refused}");
            assert_eq!(refused.lines().count(), 1, "{refused}");
        }
        server_config(&client_ca(CA_FILE)).unwrap();
    }
}
