//! When an OpenPGP key may vouch for an image: bound by its own signatures, allowed to sign, not revoked, not expired, now.
//!
//! - Any revocation of the primary key or of the signing subkey counts, from whenever and for whatever reason: that the signature is
//!   older is only what the signature itself claims. A revocation that a designated revoker made counts even where we lack the key to
//!   check it. A key all of whose user IDs are revoked counts as revoked.
//! - Expiry is as gpg computes it: of the newest direct-key self-signature with an expiry, else of the newest user ID's; for a subkey
//!   of its newest binding, and its primary key's besides. It is judged by the trusted time, never by when the signature claims to
//!   have been made; without a trusted time, what has an expiry is refused.
//! - The keyring comes from the policy and is trusted like it, so the hashes of self-signatures are not judged, only those of the
//!   signature over the image.

use nacre_core::Clock;
use pgp::{
    composed::{SignedPublicKey, SignedPublicSubKey},
    packet::{Signature, SignatureType},
    types::{Duration, Fingerprint, KeyDetails as _, SignedUser, Tag, Timestamp},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::error::SignatureError;

/// A primary key or a subkey.
#[derive(Clone, Copy)]
pub(super) enum Component<'a> {
    Primary(&'a pgp::packet::PublicKey),
    Sub(&'a SignedPublicSubKey),
}

impl Component<'_> {
    pub(super) fn fingerprint(self) -> String {
        match self {
            Self::Primary(key) => hex(&key.fingerprint()),
            Self::Sub(key) => hex(&key.key.fingerprint()),
        }
    }

    pub(super) fn verify(self, signature: &Signature, payload: &[u8]) -> Result<(), SignatureError> {
        let result = match self {
            Self::Primary(key) => signature.verify(key, payload),
            Self::Sub(key) => signature.verify(&key.key, payload),
        };
        result.map_err(|error| SignatureError::Invalid(format!("key {}: {error}", self.fingerprint())))
    }

    fn created(self) -> Timestamp {
        match self {
            Self::Primary(key) => key.created_at(),
            Self::Sub(key) => key.key.created_at(),
        }
    }
}

pub(super) fn hex(fingerprint: &Fingerprint) -> String {
    fingerprint.to_string().to_uppercase()
}

pub(super) fn components(key: &SignedPublicKey) -> impl Iterator<Item = Component<'_>> {
    std::iter::once(Component::Primary(&key.primary_key)).chain(key.public_subkeys.iter().map(Component::Sub))
}

/// Whether the signature says that this key made it. Only a hint which key to try.
pub(super) fn names(signature: &Signature, component: Component<'_>) -> bool {
    let (fingerprint, id) = match component {
        Component::Primary(key) => (key.fingerprint(), key.legacy_key_id()),
        Component::Sub(key) => (key.key.fingerprint(), key.key.legacy_key_id()),
    };
    let fingerprints = signature.issuer_fingerprint();
    if fingerprints.is_empty() {
        return signature.issuer_key_id().into_iter().any(|issuer| *issuer == id);
    }
    fingerprints.into_iter().any(|issuer| *issuer == fingerprint)
}

/// How messages call the maker of a signature.
pub(super) fn issuer(signature: &Signature) -> String {
    if let Some(fingerprint) = signature.issuer_fingerprint().first() {
        return hex(fingerprint);
    }
    signature.issuer_key_id().first().map_or_else(|| "of no name".into(), |id| id.to_string().to_uppercase())
}

/// Checks that `component` of `key` may sign, now. `revocations` are the key revocations that came with the key, of whatever keys.
pub(super) fn check(
    key: &SignedPublicKey,
    component: Component<'_>,
    revocations: &[Signature],
    clock: &dyn Clock,
) -> Result<(), SignatureError> {
    let primary = Component::Primary(&key.primary_key);
    let name = format!("key {}", primary.fingerprint());
    check_not_revoked(key, revocations, &name)?;
    let own = OwnSignatures::of(key, clock, &name)?;
    check_end(&name, primary.created(), own.expiry, clock)?;
    match component {
        Component::Primary(_) => {
            if own.may_sign == Some(false) {
                return Err(SignatureError::UnusableKey { what: name, problem: "it is not a signing key".into() });
            }
            Ok(())
        }
        Component::Sub(subkey) => check_subkey(key, subkey, clock),
    }
}

/// Checks the signature's own time.
pub(super) fn check_signature(
    signature: &Signature,
    component: Component<'_>,
    clock: &dyn Clock,
) -> Result<(), SignatureError> {
    let Some(created) = signature.created() else {
        return Err(SignatureError::malformed("OpenPGP signature", "has no creation time"));
    };
    if created.as_secs() < component.created().as_secs() {
        let problem = format!("is older than its key {}", component.fingerprint());
        return Err(SignatureError::malformed("OpenPGP signature", problem));
    }
    check_end("the signature", created, signature.signature_expiration_time(), clock)
}

fn check_not_revoked(key: &SignedPublicKey, more: &[Signature], name: &str) -> Result<(), SignatureError> {
    let revokers: Vec<String> = key
        .details
        .direct_signatures
        .iter()
        .filter(|signature| signature.verify_key(&key.primary_key).is_ok())
        .filter_map(|signature| signature.revocation_key())
        .map(|revoker| revoker.fingerprint.iter().map(|byte| format!("{byte:02X}")).collect())
        .collect();
    for revocation in key.details.revocation_signatures.iter().chain(more) {
        let own = revocation.verify_key(&key.primary_key).is_ok();
        let maker = issuer(revocation);
        if own || revokers.iter().any(|revoker| revoker.ends_with(&maker)) {
            return Err(revoked(name, revocation));
        }
    }
    Ok(())
}

fn revoked(name: &str, revocation: &Signature) -> SignatureError {
    let code = revocation.revocation_reason_code().map(|code| format!("{code:?}"));
    let text = revocation
        .revocation_reason_string()
        .map(|text| String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect::<String>())
        .filter(|text| !text.is_empty());
    let reason = match (code, text) {
        (Some(code), Some(text)) => format!(" ({code}: {text})"),
        (Some(code), None) => format!(" ({code})"),
        (None, _) => String::new(),
    };
    SignatureError::Revoked { what: name.into(), reason }
}

/// What a primary key's signatures over itself say.
struct OwnSignatures {
    expiry: Option<Duration>,
    may_sign: Option<bool>,
}

impl OwnSignatures {
    fn of(key: &SignedPublicKey, clock: &dyn Clock, name: &str) -> Result<Self, SignatureError> {
        let direct: Vec<&Signature> = newest_first(key.details.direct_signatures.iter().filter(|signature| {
            signature.typ() == Some(SignatureType::Key)
                && signature.verify_key(&key.primary_key).is_ok()
                && is_live(signature, clock)
        }));
        let mut any_user_revoked = false;
        let mut users: Vec<&Signature> = Vec::new();
        for user in &key.details.users {
            match newest_of_user(key, user, clock) {
                Some(signature) if signature.typ() == Some(SignatureType::CertRevocation) => any_user_revoked = true,
                Some(signature) => users.push(signature),
                None => {}
            }
        }
        if users.is_empty() && any_user_revoked {
            return Err(SignatureError::Revoked { what: format!("every user ID of {name}"), reason: String::new() });
        }
        if users.is_empty() && direct.is_empty() {
            let problem = "no valid signature of its own binds it to a user ID".to_owned();
            return Err(SignatureError::UnusableKey { what: name.into(), problem });
        }
        let users = newest_first(users.into_iter());
        let expiry = direct.iter().chain(&users).find_map(|signature| has_end(signature.key_expiration_time()));
        let may_sign = users.iter().chain(&direct).find_map(|signature| flags_sign(signature));
        Ok(Self { expiry, may_sign })
    }
}

/// The newest of a user ID's valid self-certifications and revocations.
fn newest_of_user<'a>(key: &SignedPublicKey, user: &'a SignedUser, clock: &dyn Clock) -> Option<&'a Signature> {
    let valid = user.signatures.iter().filter(|signature| {
        let kind = matches!(
            signature.typ(),
            Some(
                SignatureType::CertGeneric
                    | SignatureType::CertPersona
                    | SignatureType::CertCasual
                    | SignatureType::CertPositive
                    | SignatureType::CertRevocation
            )
        );
        kind && is_live(signature, clock)
            && signature.verify_certification(&key.primary_key, Tag::UserId, &user.id).is_ok()
    });
    newest_first(valid).into_iter().next()
}

fn check_subkey(key: &SignedPublicKey, subkey: &SignedPublicSubKey, clock: &dyn Clock) -> Result<(), SignatureError> {
    let component = Component::Sub(subkey);
    let name = format!("subkey {} of key {}", component.fingerprint(), hex(&key.primary_key.fingerprint()));
    let valid = |signature: &&Signature, kind| {
        signature.typ() == Some(kind) && signature.verify_subkey_binding(&key.primary_key, &subkey.key).is_ok()
    };
    if let Some(revocation) = subkey.signatures.iter().find(|s| valid(s, SignatureType::SubkeyRevocation)) {
        return Err(revoked(&name, revocation));
    }
    let bindings =
        newest_first(subkey.signatures.iter().filter(|s| valid(s, SignatureType::SubkeyBinding) && is_live(s, clock)));
    let unusable = |problem: &str| SignatureError::UnusableKey { what: name.clone(), problem: problem.into() };
    let binding = bindings.first().ok_or_else(|| unusable("no valid signature binds it to its primary key"))?;
    if flags_sign(binding) == Some(false) {
        return Err(unusable("it is not a signing key"));
    }
    // Without the subkey's own consent, anybody could adopt a foreign signing key as a subkey.
    let consents = binding
        .embedded_signature()
        .is_some_and(|back| back.verify_primary_key_binding(&subkey.key, &key.primary_key).is_ok());
    if !consents {
        return Err(unusable("it has not signed that it belongs to its primary key"));
    }
    check_end(&name, component.created(), binding.key_expiration_time(), clock)
}

/// `None` where the signature has no key flags.
fn flags_sign(signature: &Signature) -> Option<bool> {
    use pgp::packet::SubpacketData;
    let config = signature.config()?;
    config.hashed_subpackets().find_map(|subpacket| match &subpacket.data {
        SubpacketData::KeyFlags(flags) => Some(flags.sign()),
        _ => None,
    })
}

fn newest_first<'a>(signatures: impl Iterator<Item = &'a Signature>) -> Vec<&'a Signature> {
    let mut signatures: Vec<&Signature> = signatures.collect();
    // Of one second: a revocation counts before a certification, the later in the file before the earlier.
    signatures.reverse();
    signatures.sort_by_key(|signature| {
        let created = signature.created().map_or(0, Timestamp::as_secs);
        (std::cmp::Reverse(created), signature.typ() != Some(SignatureType::CertRevocation))
    });
    signatures
}

fn has_end(duration: Option<Duration>) -> Option<Duration> {
    duration.filter(|duration| duration.as_secs() != 0)
}

/// Whether a self-signature itself still counts.
fn is_live(signature: &Signature, clock: &dyn Clock) -> bool {
    signature
        .created()
        .is_some_and(|created| check_end("", created, signature.signature_expiration_time(), clock).is_ok())
}

/// Refuses what ended, or has an end and no time to judge it by.
fn check_end(what: &str, start: Timestamp, lasts: Option<Duration>, clock: &dyn Clock) -> Result<(), SignatureError> {
    let Some(lasts) = has_end(lasts) else { return Ok(()) };
    let end = i64::from(start.as_secs()) + i64::from(lasts.as_secs());
    super::check_end(what, end, clock)
}

/// RFC 3339, for messages.
pub(super) fn moment(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("second {seconds}"))
}
