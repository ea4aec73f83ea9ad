//! OpenPGP recipients: which key of a certificate to encrypt to, and certificates out of GnuPG's key ring.

use std::{ffi::OsStr, path::Path, time::Duration, time::SystemTime};

use ::pgp::{
    composed::{Deserializable as _, MessageBuilder, SignedPublicKey, SignedPublicSubKey},
    crypto::sym::SymmetricKeyAlgorithm,
    packet::{PublicSubkey, Signature, SignatureType},
    types::KeyDetails as _,
};
use nacre_core::SecretBytes;
use rand_core::OsRng;

use crate::crypt::{
    SchemeError,
    provider::{Exit, Run, run},
};

/// Longer than any ring that is exported for one recipient.
const RING_LIMIT: usize = 16 << 20;
const GPG_TIMEOUT: Duration = Duration::from_secs(30);
const KEY_LIMIT: usize = 1024;

/// A certificate with a key that can be encrypted to now.
pub struct Certificate {
    subkey: PublicSubkey,
    users: Vec<String>,
}

impl Certificate {
    /// Reads all certificates, armoured or not, that have a valid, unrevoked, unexpired key to encrypt to.
    ///
    /// # Errors
    /// [`SchemeError`]: malformed, or none of them has such a key.
    pub fn parse(bytes: &[u8]) -> Result<Vec<Self>, SchemeError> {
        let bad = |error: ::pgp::errors::Error| SchemeError::malformed(format!("the OpenPGP certificate: {error}"));
        let keys: Vec<SignedPublicKey> = if bytes.starts_with(b"-----") {
            SignedPublicKey::from_armor_many(bytes).map_err(bad)?.0.take(KEY_LIMIT).collect::<Result<_, _>>()
        } else {
            SignedPublicKey::from_bytes_many(bytes).map_err(bad)?.take(KEY_LIMIT).collect::<Result<_, _>>()
        }
        .map_err(bad)?;
        let now = SystemTime::now();
        let found: Vec<Self> = keys
            .iter()
            .filter_map(|key| {
                let users = key.details.users.iter().filter_map(|user| user.id.as_str().map(str::to_owned)).collect();
                Some(Self { subkey: encryption_subkey(key, now)?, users })
            })
            .collect();
        if found.is_empty() {
            let problem =
                "none of its certificates has a valid key to encrypt to (revoked, expired, or only for signatures)";
            return Err(SchemeError::NoKey(problem.into()));
        }
        Ok(found)
    }

    /// Whether one of the user ids has this name or this mail address, wholly.
    fn is_of(&self, recipient: &str) -> bool {
        self.users.iter().any(|user| match user.split_once('<') {
            Some((name, address)) => name.trim() == recipient || address.trim_end_matches('>').trim() == recipient,
            None => user.trim() == recipient,
        })
    }
}

/// The newest subkey that is meant for encryption, bound by the primary key, not revoked and not expired.
fn encryption_subkey(key: &SignedPublicKey, now: SystemTime) -> Option<PublicSubkey> {
    let primary = &key.primary_key;
    if key.details.revocation_signatures.iter().any(|signature| signature.verify_key(primary).is_ok()) {
        return None;
    }
    let self_signatures = key.details.users.iter().flat_map(|user| {
        user.signatures
            .iter()
            .filter(|signature| signature.verify_certification(primary, ::pgp::types::Tag::UserId, &user.id).is_ok())
    });
    let direct = key.details.direct_signatures.iter().filter(|signature| signature.verify_key(primary).is_ok());
    let newest = self_signatures.chain(direct).max_by_key(|signature| signature.created())?;
    if expired(newest, primary.created_at().into(), now) {
        return None;
    }
    let usable = |subkey: &&SignedPublicSubKey| {
        let bindings = |kind| {
            subkey.signatures.iter().filter(move |signature| {
                signature.typ() == Some(kind) && signature.verify_subkey_binding(primary, &subkey.key).is_ok()
            })
        };
        subkey.key.algorithm().can_encrypt()
            && bindings(SignatureType::SubkeyRevocation).next().is_none()
            && bindings(SignatureType::SubkeyBinding).max_by_key(|signature| signature.created()).is_some_and(
                |signature| {
                    let flags = signature.key_flags();
                    (flags.encrypt_storage() || flags.encrypt_comms())
                        && !expired(signature, subkey.key.created_at().into(), now)
                },
            )
    };
    key.public_subkeys
        .iter()
        .filter(usable)
        .max_by_key(|subkey| subkey.key.created_at())
        .map(|subkey| subkey.key.clone())
}

fn expired(signature: &Signature, created: SystemTime, now: SystemTime) -> bool {
    let limit = signature.key_expiration_time().map(|limit| Duration::from_secs(u64::from(limit.as_secs())));
    created > now || limit.is_some_and(|limit| !limit.is_zero() && created + limit <= now)
}

/// Has GnuPG export the certificates of a recipient, named as skopeo's users do: by the whole name or mail address of a user id.
///
/// # Errors
/// [`SchemeError`]: gpg cannot be run, or knows nobody of that name with a valid key.
pub fn certificates_of_gpg(recipient: &str, home: Option<&Path>) -> Result<Vec<Certificate>, SchemeError> {
    let problem = |text: String| SchemeError::NoKey(text);
    let mut args: Vec<&OsStr> =
        home.map(|home| [OsStr::new("--homedir"), home.as_os_str()]).into_iter().flatten().collect();
    args.extend(["--batch", "--no-tty", "--export", "--", recipient].map(OsStr::new));
    let ran = run(Run { program: Path::new("gpg"), args: &args, stdin: b"", limit: RING_LIMIT, timeout: GPG_TIMEOUT });
    let ring = match ran {
        Ok(Exit::Success(ring)) => ring,
        Ok(Exit::Failure { status, stderr }) => {
            return Err(problem(format!("gpg --export ended with {status}: {stderr}")));
        }
        Ok(Exit::TimedOut) => {
            return Err(problem(format!("gpg --export did not end within {} s", GPG_TIMEOUT.as_secs())));
        }
        Ok(Exit::TooLarge) => return Err(problem(format!("gpg --export wrote more than {RING_LIMIT} bytes"))),
        Err(error) => return Err(problem(format!("gpg could not be run: {error}"))),
    };
    if ring.is_empty() {
        return Err(problem(format!("GnuPG's key ring has nobody called '{recipient:.100}'")));
    }
    let mut found = Certificate::parse(ring.expose())?;
    // gpg takes parts of names too; a key for somebody else must not slip in.
    found.retain(|certificate| certificate.is_of(recipient));
    if found.is_empty() {
        return Err(problem(format!(
            "GnuPG's key ring has nobody whose whole name or mail address is '{recipient:.100}'"
        )));
    }
    Ok(found)
}

/// Wraps a PRIV document for all recipients in one message.
///
/// # Errors
/// [`SchemeError::Unsupported`]: a key cannot be encrypted to after all.
pub fn wrap(private: &SecretBytes, recipients: &[Certificate]) -> Result<Vec<u8>, SchemeError> {
    let failed =
        |error: ::pgp::errors::Error| SchemeError::Unsupported(format!("OpenPGP encryption to this key ({error})"));
    let mut message =
        MessageBuilder::from_bytes("", private.expose().to_vec()).seipd_v1(OsRng, SymmetricKeyAlgorithm::AES256);
    for recipient in recipients {
        message.encrypt_to_key(OsRng, &recipient.subkey).map_err(failed)?;
    }
    message.to_vec(OsRng).map_err(failed)
}
