//! Whether an image is to be trusted: the policy (policy.json), signatures, and which kinds of image may run.
//!
//! ```text
//! Policy + requested name + manifests + stored signatures ──evaluate──▶ Admitted ──admit──▶ Admission
//! ```
//!
//! [`Admitted`] and [`Admission`] are proofs with private fields: unpacking takes an [`Admission`], so that code which forgot to ask does
//! not compile. There is no way to have no policy: [`Policy::insecure_accept_anything`] must be chosen by name.
//!
//! Everything that a signature storage gives is untrusted; keys and certificates are trusted because the policy names them
//! ([`Material`]), and time only where a [`Clock`] has one. Limits: [`SIGNATURES_LIMIT`] signatures of [`SIGNATURE_LIMIT`] bytes,
//! [`POLICY_LIMIT`], [`MATERIAL_LIMIT`].

mod admission;
mod bundle;
mod certificate;
mod collect;
mod error;
mod evaluate;
mod gpg;
mod gpg_key;
mod identity;
mod json;
mod lookaside;
mod material;
mod payload;
mod policy;
mod public_key;
mod rekor;
mod scope;
mod sigstore;

#[cfg(feature = "sign")]
pub mod sign;
use nacre_core::{Clock, Digest};
use time::format_description::well_known::Rfc3339;

#[cfg(feature = "sign")]
pub(crate) use self::collect::{decode_blob, encode_blob};
pub use self::{
    admission::{Admission, AdmissionRules, Encryption, Kind},
    bundle::Bundle,
    collect::signature_tag,
    error::{SignatureError, TrustError},
    evaluate::{Admitted, Scheme, Signer, TrustContext},
    gpg::{GpgSigner, Keyring, SignedMessage},
    identity::SignedIdentity,
    lookaside::LookasideConfig,
    material::{MATERIAL_LIMIT, Material, MaterialError},
    payload::{Payload, PayloadType, SIGNATURE_LIMIT, SIGNATURES_LIMIT},
    policy::{Applicable, Authority, POLICY_LIMIT, Policy, PolicyError, Requirement, SignedBy, SigstoreSigned},
    public_key::PublicKey,
    rekor::Promise,
};
use crate::manifest::RawManifest;

/// Whether a digest, of whatever algorithm, is that of one of the manifests.
fn names_one_of(digest: &Digest, chain: &[&RawManifest]) -> bool {
    chain.iter().any(|manifest| Digest::of(digest.algorithm(), manifest.bytes()) == *digest)
}

fn wrong_digest(found: Digest, chain: &[&RawManifest]) -> SignatureError {
    let expected: Vec<String> = chain.iter().map(|manifest| manifest.digest().to_string()).collect();
    SignatureError::WrongDigest { found, expected: expected.join(" or ") }
}

/// Refuses what ends at a Unix time that has come, and what has an end where no trusted time can judge it.
fn check_end(what: &str, end: i64, clock: &dyn Clock) -> Result<(), SignatureError> {
    let at = gpg_key::moment(end);
    let Some(time) = clock.now() else {
        return Err(SignatureError::NoTrustedTime { what: what.into(), at });
    };
    if time.now.unix_timestamp() < end {
        return Ok(());
    }
    let now = time.now.format(&Rfc3339).unwrap_or_else(|_| time.now.to_string());
    Err(SignatureError::Expired { what: what.into(), at, now, source_name: time.source })
}
