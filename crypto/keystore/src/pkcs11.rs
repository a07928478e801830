//! The root key in a PKCS#11 token: wrapping and unwrapping happen inside, and the key never leaves.
//!
//! The key is an AES-256 key that the token will not give out; one that it would is refused. A domain key is wrapped with
//! AES-GCM, its tenant being the associated data. Whatever fails ends the session: the next call begins with loading the
//! module, so a token that comes back is found. Source: PKCS #11 v3.0, AES-GCM in section 2.13 of the mechanisms.

use std::ffi::c_ulong;
use std::fs;
use std::os::unix::fs::MetadataExt;

use block::TenantId;
use crypto::{DataKey, DomainKey, KeyError, RootKind, WrappedKey, Zeroizing};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::AuthPin;

use crate::uri::Pkcs11Uri;
use crate::{KeyProvider, KeystoreError, random_bytes};

const NONCE_BYTES: usize = 12;
const TAG_BITS: c_ulong = 128;
const KEY_BYTES: usize = 32;
/// Before the tenant in the associated data.
const PURPOSE: &[u8] = b"farshore domain key v1\0";
/// Encrypted to tell root keys apart.
const FINGERPRINT_CONSTANT: &[u8; 16] = b"farshore root v1";
/// The longest PIN file.
const PIN_BYTES_MAX: u64 = 1024;

/// A root key in a token.
pub struct Pkcs11Provider {
    uri: Pkcs11Uri,
    open: Option<Open>,
}

/// The session comes first: it ends before its module does.
struct Open {
    session: Session,
    module: Pkcs11,
}

impl Pkcs11Provider {
    /// The key at this address, which is not looked for before it is needed.
    pub const fn at(uri: Pkcs11Uri) -> Self {
        Self { uri, open: None }
    }

    fn failed(&self, operation: &'static str) -> impl Fn(Error) -> KeystoreError + use<> {
        let token = self.uri.token.clone();
        move |source| KeystoreError::Token { token: token.clone(), operation, source }
    }

    fn content(&self, what: impl Into<String>) -> KeystoreError {
        KeystoreError::TokenContent { token: self.uri.token.clone(), what: what.into() }
    }

    /// Does something in a session, a new one if there is none; a failure ends it.
    fn with_session<T>(
        &mut self,
        work: impl FnOnce(&Self, &Session) -> Result<T, KeystoreError>,
    ) -> Result<T, KeystoreError> {
        let open = match self.open.take() {
            Some(open) => open,
            None => self.log_in()?,
        };
        let outcome = work(self, &open.session);
        if outcome.is_ok() {
            self.open = Some(open);
        } else {
            drop(open.session);
            // Nothing else uses the module; a refusal to end leaves it initialized, which the next start takes.
            let _ = open.module.finalize();
        }
        outcome
    }

    fn log_in(&self) -> Result<Open, KeystoreError> {
        let pin = self.pin()?;
        let module = Pkcs11::new(&self.uri.module).map_err(self.failed("load its module"))?;
        match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, Function::Initialize)) => {}
            Err(error) => return Err(self.failed("start its module")(error)),
        }
        let session = self.session(&module, &pin);
        match session {
            Ok(session) => Ok(Open { session, module }),
            Err(error) => {
                let _ = module.finalize();
                Err(error)
            }
        }
    }

    fn session(&self, module: &Pkcs11, pin: &AuthPin) -> Result<Session, KeystoreError> {
        let slots = module.get_slots_with_token().map_err(self.failed("list its slots"))?;
        let slot = slots.into_iter().find(|slot| {
            let info = module.get_token_info(*slot);
            info.is_ok_and(|info| info.label().trim_end() == self.uri.token)
        });
        let slot =
            slot.ok_or_else(|| self.content("is in no slot of its module: insert or initialize it"))?;
        let session = module.open_rw_session(slot).map_err(self.failed("open a session"))?;
        session.login(UserType::User, Some(pin)).map_err(self.failed("log in"))?;
        Ok(session)
    }

    fn pin(&self) -> Result<AuthPin, KeystoreError> {
        let path = &self.uri.pin_file;
        let unreadable = |source| KeystoreError::Read { path: path.clone(), source };
        let metadata = fs::metadata(path).map_err(unreadable)?;
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeystoreError::Exposed { path: path.clone(), mode });
        }
        if !metadata.is_file() || metadata.len() > PIN_BYTES_MAX {
            return Err(KeystoreError::NotAFile { path: path.clone() });
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(unreadable)?);
        Ok(AuthPin::new(text.trim_end_matches('\n').into()))
    }

    /// The root key, which must be one, and one that stays inside.
    fn key(&self, session: &Session) -> Result<ObjectHandle, KeystoreError> {
        let label = &self.uri.object;
        match self.keys(session)?.as_slice() {
            [key] => {
                let wanted = [AttributeType::Sensitive, AttributeType::Extractable];
                let found =
                    session.get_attributes(*key, &wanted).map_err(self.failed("describe its root key"))?;
                let stays = found.contains(&Attribute::Sensitive(true))
                    && found.contains(&Attribute::Extractable(false));
                if stays {
                    return Ok(*key);
                }
                Err(self.content(format!(
                    "would give its key '{label}' out: make one that is sensitive and not extractable"
                )))
            }
            [] => Err(self.content(format!(
                "has no AES key '{label}': make it with 'farshore key provider init', or name another"
            ))),
            several => Err(self.content(format!(
                "has {} AES keys '{label}': leave one of them under that label",
                several.len()
            ))),
        }
    }

    fn keys(&self, session: &Session) -> Result<Vec<ObjectHandle>, KeystoreError> {
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Label(self.uri.object.clone().into_bytes()),
        ];
        session.find_objects(&template).map_err(self.failed("look for its root key"))
    }
}

impl KeyProvider for Pkcs11Provider {
    fn kind(&self) -> RootKind {
        RootKind::Pkcs11
    }

    fn name(&self) -> String {
        format!("pkcs11:token={};object={}", self.uri.token, self.uri.object)
    }

    fn wrap_domain(&mut self, key: &DomainKey, tenant: TenantId) -> Result<Vec<u8>, KeystoreError> {
        let mut nonce: [u8; NONCE_BYTES] = *random_bytes()?;
        let data = associated_data(tenant);
        let sealed = self.with_session(|provider, session| {
            let root = provider.key(session)?;
            let failed = provider.failed("wrap a domain key");
            let parameters = GcmParams::new(&mut nonce, &data, TAG_BITS.into()).map_err(&failed)?;
            session.encrypt(&Mechanism::AesGcm(parameters), root, key.expose()).map_err(failed)
        })?;
        // A token that draws its nonces itself has put it there.
        Ok([nonce.as_slice(), &sealed].concat())
    }

    fn unwrap_domain(&mut self, wrapped: &[u8], tenant: TenantId) -> Result<DomainKey, KeystoreError> {
        let not_opened =
            |provider: String| KeystoreError::NotOpened { provider, source: KeyError::NotOpened };
        let Some((nonce, sealed)) = wrapped.split_first_chunk::<NONCE_BYTES>() else {
            return Err(not_opened(self.name()));
        };
        let (mut nonce, data) = (*nonce, associated_data(tenant));
        let opened = self.with_session(|provider, session| {
            let root = provider.key(session)?;
            let failed = provider.failed("unwrap a domain key");
            let parameters = GcmParams::new(&mut nonce, &data, TAG_BITS.into()).map_err(&failed)?;
            session.decrypt(&Mechanism::AesGcm(parameters), root, sealed).map_err(failed)
        })?;
        let opened = Zeroizing::new(opened);
        let bytes: Result<[u8; KEY_BYTES], _> = opened.as_slice().try_into();
        bytes.map(DomainKey::from_bytes).map_err(|_| not_opened(self.name()))
    }

    fn unwrap_data(&mut self, _wrapped: &WrappedKey) -> Result<DataKey, KeystoreError> {
        Err(KeystoreError::Unsupported {
            provider: self.name(),
            what: "open a key from before there were tenants",
        })
    }

    fn fingerprint(&mut self) -> Result<String, KeystoreError> {
        let sealed = self.with_session(|provider, session| {
            let root = provider.key(session)?;
            let sealed = session.encrypt(&Mechanism::AesEcb, root, FINGERPRINT_CONSTANT);
            sealed.map_err(provider.failed("name its root key"))
        })?;
        Ok(sealed.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
    }

    fn make_root(&mut self) -> Result<(), KeystoreError> {
        self.with_session(|provider, session| {
            if !provider.keys(session)?.is_empty() {
                return provider.key(session).map(drop);
            }
            let template = [
                Attribute::Class(ObjectClass::SECRET_KEY),
                Attribute::KeyType(KeyType::AES),
                Attribute::Label(provider.uri.object.clone().into_bytes()),
                Attribute::ValueLen(32.into()),
                Attribute::Token(true),
                Attribute::Private(true),
                Attribute::Sensitive(true),
                Attribute::Extractable(false),
                Attribute::Encrypt(true),
                Attribute::Decrypt(true),
            ];
            let made = session.generate_key(&Mechanism::AesKeyGen, &template);
            made.map(drop).map_err(provider.failed("make a root key"))
        })
    }
}

fn associated_data(tenant: TenantId) -> Vec<u8> {
    [PURPOSE, &tenant.to_bytes()].concat()
}
