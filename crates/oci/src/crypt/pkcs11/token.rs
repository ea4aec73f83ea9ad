//! Operations of a token, through its module (a shared library).
//!
//! One at a time: modules differ in what they make of several threads, and a log-in belongs to the whole program.

use std::sync::Mutex;

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, ObjectClass, ObjectHandle},
    session::{Session, UserType},
    slot::Slot,
    types::AuthPin,
};
use nacre_core::SecretBytes;

use super::{Hash, SchemeError, Uri};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(super) fn decrypt(uri: &Uri, wrapped: &[u8], hash: Hash) -> Result<SecretBytes, SchemeError> {
    if uri.pin()?.is_none() {
        return Err(SchemeError::Token(
            "the URI has neither pin-value nor pin-source, which a private key needs".into(),
        ));
    }
    with_session(uri, |session| {
        let key = find(session, uri, ObjectClass::PRIVATE_KEY)?;
        session.decrypt(&oaep(hash), key, wrapped).map(SecretBytes::new).map_err(|error| refused("C_Decrypt", &error))
    })
}

pub(super) fn encrypt(uri: &Uri, private: &SecretBytes, hash: Hash) -> Result<Vec<u8>, SchemeError> {
    with_session(uri, |session| {
        let key = find(session, uri, ObjectClass::PUBLIC_KEY)?;
        session.encrypt(&oaep(hash), key, private.expose()).map_err(|error| refused("C_Encrypt", &error))
    })
}

fn with_session<T>(uri: &Uri, work: impl FnOnce(&Session) -> Result<T, SchemeError>) -> Result<T, SchemeError> {
    let path = uri.module()?;
    // Whoever panicked while holding it left no state behind.
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let module =
        Pkcs11::new(&path).map_err(|error| SchemeError::Token(format!("module {}: {error}", path.display())))?;
    match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        // It stays initialised for the next use: others in this program may use it too.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
        Err(error) => return Err(refused("C_Initialize", &error)),
    }
    let pin = uri.pin()?;
    let mut last = SchemeError::Token("no slot holds the token that the URI names".into());
    for slot in slots(&module, uri)? {
        match open(&module, slot, pin.as_ref()) {
            Ok(session) => return work(&session),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn slots(module: &Pkcs11, uri: &Uri) -> Result<Vec<Slot>, SchemeError> {
    let mut slots = module.get_slots_with_token().map_err(|error| refused("C_GetSlotList", &error))?;
    if let Some(number) = uri.attribute("slot-id") {
        let number: u64 = number.parse().map_err(|_| SchemeError::Token("the URI's slot-id is no number".into()))?;
        slots.retain(|slot| slot.id() == number);
    } else if let Some(label) = uri.attribute("token") {
        slots.retain(|slot| module.get_token_info(*slot).is_ok_and(|token| token.label() == label));
    } else {
        return Err(SchemeError::Token("the URI has neither token nor slot-id".into()));
    }
    Ok(slots)
}

fn open(module: &Pkcs11, slot: Slot, pin: Option<&SecretBytes>) -> Result<Session, SchemeError> {
    let session = module.open_ro_session(slot).map_err(|error| refused("C_OpenSession", &error))?;
    if let Some(pin) = pin {
        let pin = std::str::from_utf8(pin.expose()).map_err(|_| SchemeError::Token("the PIN is not UTF-8".into()))?;
        match session.login(UserType::User, Some(&AuthPin::from(pin))) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(error) => return Err(refused("C_Login", &error)),
        }
    }
    Ok(session)
}

fn find(session: &Session, uri: &Uri, class: ObjectClass) -> Result<ObjectHandle, SchemeError> {
    let mut template = vec![Attribute::Class(class)];
    template.extend(uri.attribute("object").map(|label| Attribute::Label(label.as_bytes().to_vec())));
    template.extend(uri.id().map(|id| Attribute::Id(id.to_vec())));
    if template.len() == 1 {
        return Err(SchemeError::Token("the URI has neither object nor id".into()));
    }
    match session.find_objects(&template).map_err(|error| refused("C_FindObjects", &error))?.as_slice() {
        [key] => Ok(*key),
        [] => Err(SchemeError::Token("it has no key of the URI's object and id".into())),
        several => Err(SchemeError::Token(format!("it has {} keys of the URI's object and id", several.len()))),
    }
}

fn oaep(hash: Hash) -> Mechanism<'static> {
    let (hash, mask) = match hash {
        Hash::Sha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
        Hash::Sha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
    };
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mask, PkcsOaepSource::empty()))
}

fn refused(what: &str, error: &Error) -> SchemeError {
    SchemeError::Token(match error {
        // The library's own words explain the standard, at length.
        Error::Pkcs11(code, _) => format!("{what} failed: {code:?}"),
        other => format!("{what} failed: {other}"),
    })
}
