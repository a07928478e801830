//! The PKCS#11 provider against SoftHSM2 (Debian's `softhsm2`); skipped, and it says so, where that is not installed.
//!
//! SoftHSM takes its configuration from the process's environment, so all claims are made in one test, and its module is
//! used by one process: this one.
#![cfg(feature = "pkcs11")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test, without `mod tests` around it"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use block::TenantId;
use crypto::DomainKey;
use keystore::{KeyProvider, KeystoreError, Pkcs11Provider, Pkcs11Uri, ProviderHandle};

const TENANT: TenantId = TenantId::from_bytes([3; 16]);

fn module() -> Option<PathBuf> {
    ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

fn run(folder: &Path, arguments: &[&str]) {
    let mut command = Command::new("softhsm2-util");
    let output = command.env("SOFTHSM2_CONF", folder.join("softhsm2.conf")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A token with a PIN, in a folder.
fn token(folder: &Path) {
    let tokens = folder.join("tokens");
    fs::create_dir_all(&tokens).unwrap();
    let text = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
    fs::write(folder.join("softhsm2.conf"), text).unwrap();
    fs::write(folder.join("pin"), "4321\n").unwrap();
    fs::set_permissions(folder.join("pin"), fs::Permissions::from_mode(0o600)).unwrap();
    run(folder, &["--init-token", "--free", "--label", "farshore", "--pin", "4321", "--so-pin", "8765"]);
}

#[test]
fn a_token_wraps_and_unwraps_domain_keys_and_keeps_its_own() {
    let Some(module) = module() else {
        eprintln!("skipped: softhsm2 is not installed");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    token(folder.path());
    // The module reads it when it is loaded. nextest gives each test a process of its own.
    // The variable is set by a second start of this test, as changing the own environment is unsafe.
    if std::env::var_os("SOFTHSM2_CONF").is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_token_wraps_and_unwraps_domain_keys_and_keeps_its_own", "--nocapture"])
            .env("SOFTHSM2_CONF", folder.path().join("softhsm2.conf"))
            .env("FARSHORE_TOKEN", folder.path())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let folder = PathBuf::from(std::env::var_os("FARSHORE_TOKEN").unwrap());
    let uri = |object: &str, pin: &str| Pkcs11Uri {
        token: "farshore".to_owned(),
        object: object.to_owned(),
        module: module.clone(),
        pin_file: folder.join(pin),
    };
    let mut provider = Pkcs11Provider::at(uri("root", "pin"));
    let missing = provider.fingerprint().unwrap_err().to_string();
    assert!(missing.contains("has no AES key 'root'"), "{missing}");
    provider.make_root().unwrap();
    provider.make_root().unwrap();
    wraps(&mut provider);

    let mut other = Pkcs11Provider::at(uri("other", "pin"));
    // One process has one login for a token; the first provider's ends here.
    drop(provider);
    other.make_root().unwrap();
    let wrapped = other.wrap_domain(&DomainKey::from_bytes([6; 32]), TENANT).unwrap();
    drop(other);
    let mut provider = Pkcs11Provider::at(uri("root", "pin"));
    assert!(provider.unwrap_domain(&wrapped, TENANT).is_err(), "another root key's");
    drop(provider);
    refusals(&uri, &folder);
}

fn wraps(provider: &mut Pkcs11Provider) {
    let wrapped = provider.wrap_domain(&DomainKey::from_bytes([6; 32]), TENANT).unwrap();
    assert_eq!(wrapped.len(), crypto::WRAPPED_DOMAIN_KEY_BYTES_MAX);
    assert!(!wrapped.windows(8).any(|part| part == [6; 8]));
    assert_eq!(provider.unwrap_domain(&wrapped, TENANT).unwrap().expose(), &[6; 32]);
    let again = provider.wrap_domain(&DomainKey::from_bytes([6; 32]), TENANT).unwrap();
    assert_ne!(wrapped, again, "each wrap has a nonce of its own");
    assert!(provider.unwrap_domain(&wrapped, TenantId::default()).is_err(), "bound to its tenant");
    let mut damaged = wrapped.clone();
    damaged[20] ^= 1;
    assert!(provider.unwrap_domain(&damaged, TENANT).is_err());
    assert!(provider.unwrap_domain(&[1, 2, 3], TENANT).is_err());
    // A failure ended the session; the next call has another.
    assert_eq!(provider.unwrap_domain(&wrapped, TENANT).unwrap().expose(), &[6; 32]);
    assert_eq!(provider.fingerprint().unwrap().len(), 16);
    assert_eq!(provider.fingerprint().unwrap(), provider.fingerprint().unwrap());
}

fn refusals(uri: &impl Fn(&str, &str) -> Pkcs11Uri, folder: &Path) {
    fs::write(folder.join("wrong"), "0000").unwrap();
    fs::write(folder.join("open"), "4321").unwrap();
    fs::set_permissions(folder.join("wrong"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(folder.join("open"), fs::Permissions::from_mode(0o644)).unwrap();
    let refusal = |uri| {
        let handle = ProviderHandle::start(Pkcs11Provider::at(uri), Duration::from_secs(30)).unwrap();
        handle.call(|provider| provider.fingerprint()).unwrap_err()
    };
    assert!(matches!(refusal(uri("root", "wrong")), KeystoreError::Token { operation: "log in", .. }));
    assert!(matches!(refusal(uri("root", "open")), KeystoreError::Exposed { .. }));
    assert!(matches!(refusal(uri("root", "none")), KeystoreError::Read { .. }));
    let elsewhere = Pkcs11Uri { token: "elsewhere".to_owned(), ..uri("root", "pin") };
    assert!(refusal(elsewhere).to_string().contains("is in no slot"));
    let no_module = Pkcs11Uri { module: "/no/such/module.so".into(), ..uri("root", "pin") };
    assert!(matches!(refusal(no_module), KeystoreError::Token { operation: "load its module", .. }));
}
