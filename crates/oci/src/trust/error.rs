//! What a signature can be refused for, and what the refusal of an image says.

use nacre_core::Digest;

use super::material::MaterialError;
use crate::{manifest::ManifestError, source::TransportError};

/// Why one signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// It is not what a signature of its kind must be.
    #[error("malformed {what}: {problem}")]
    Malformed {
        /// The part of it.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// It was made with a hash function that can be broken.
    #[error("made with {0}, which is too weak to be believed; the image must be signed again with SHA-256 or better")]
    WeakHash(String),
    /// Nobody that the policy names made it.
    #[error("made by key {signer}, which is in none of the keyrings of the rule")]
    UnknownKey {
        /// The key's fingerprint or ID, as the signature says.
        signer: String,
    },
    /// The signature's mathematics do not hold.
    #[error("does not verify: {0}")]
    Invalid(String),
    /// A key, certificate or signature is past its time.
    #[error("{what} expired at {at} (it is {now} by {source_name})")]
    Expired {
        /// Which one.
        what: String,
        /// When, RFC 3339.
        at: String,
        /// The time that it was judged by.
        now: String,
        /// Whose time that is.
        source_name: &'static str,
    },
    /// A key was revoked.
    #[error("{what} was revoked{reason}")]
    Revoked {
        /// Which one.
        what: String,
        /// Why, where the revocation says so.
        reason: String,
    },
    /// A key may not sign data, or nothing binds it to its owner.
    #[error("{what} must not be used: {problem}")]
    UnusableKey {
        /// Which one.
        what: String,
        /// Why.
        problem: String,
    },
    /// Something has a validity period, and there is no trusted time to judge it by.
    #[error(
        "{what} is valid until {at}, and there is no trusted time to judge that by; attest first, or use a key without expiry"
    )]
    NoTrustedTime {
        /// Which one.
        what: String,
        /// Its end.
        at: String,
    },
    /// It is for another image.
    #[error("is for {found}, not for {expected}")]
    WrongDigest {
        /// The digest in the signature.
        found: Digest,
        /// Those that would do.
        expected: String,
    },
    /// It is for another name.
    #[error("is for the name '{found}', which {rule} does not accept for {requested}")]
    WrongIdentity {
        /// The name in the signature.
        found: String,
        /// The rule.
        rule: &'static str,
        /// What was asked for.
        requested: String,
    },
    /// It has no name at all, and the rule is about names.
    #[error(
        "names no image, only a digest, which {rule} does not accept for {requested}; \
         ask for the image by its digest, or use signedIdentity {{\"type\":\"matchDigest\"}}"
    )]
    NoIdentity {
        /// The rule.
        rule: &'static str,
        /// What was asked for.
        requested: String,
    },
    /// The certificate is not one that the rule accepts.
    #[error("certificate: {0}")]
    Certificate(String),
    /// The transparency log's entry does not hold.
    #[error("transparency log entry: {0}")]
    Log(String),
    /// A key of the rule could not be had.
    #[error("key of the rule: {0}")]
    Material(#[from] MaterialError),
    /// A key of the rule is none.
    #[error("key of the rule: {origin}: {problem}")]
    RuleKey {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        problem: String,
    },
}

impl SignatureError {
    pub(crate) fn malformed(what: &'static str, problem: impl std::fmt::Display) -> Self {
        let problem: String = problem.to_string().chars().take(400).collect();
        Self::Malformed { what, problem }
    }
}

/// Why an image is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A rule of the policy refused it.
    #[error("{image} is refused by {rule} of {policy}: {reason}")]
    Refused {
        /// What was asked for.
        image: String,
        /// The rule's place in the policy and its type.
        rule: String,
        /// The policy.
        policy: String,
        /// Why.
        reason: String,
    },
    /// The rule may be satisfied by a signature that could not be fetched.
    #[error("{image}: {rule} of {policy} could not be decided, since signatures could not be fetched: {source}")]
    Undecided {
        /// What was asked for.
        image: String,
        /// The rule's place in the policy and its type.
        rule: String,
        /// The policy.
        policy: String,
        /// What went wrong.
        #[source]
        source: TransportError,
    },
    /// The manifests given do not lead from the reference to the image.
    #[error("{image}: {problem}")]
    Chain {
        /// What was asked for.
        image: String,
        /// What is wrong.
        problem: String,
    },
    /// A manifest in the chain is none.
    #[error("{image}: {source}")]
    Manifest {
        /// What was asked for.
        image: String,
        /// What is wrong.
        #[source]
        source: ManifestError,
    },
    /// The image is of a kind that may not run here.
    #[error("{image} is {kind}, which {setting} = false of the admission rules refuses")]
    Kind {
        /// What was asked for.
        image: String,
        /// The kind.
        kind: super::Kind,
        /// The setting that would allow it.
        setting: &'static str,
    },
    /// Some layers are encrypted and some are not, and nobody signed the whole.
    #[error(
        "{image} has {encrypted} encrypted of {layers} layers and no signature; a mix is accepted only of a signed image"
    )]
    UnsignedMix {
        /// What was asked for.
        image: String,
        /// All layers.
        layers: usize,
        /// The encrypted ones.
        encrypted: usize,
    },
}

impl TrustError {
    /// Whether it says that the image is not to be trusted, and not that this could not be found out.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Undecided { .. })
    }
}
