//! Decides whether the policy lets an image in.
//!
//! The rule is chosen by the name that was asked for, never by a mirror's. All of the rule's requirements must hold. For each that
//! wants a signature, one good signature is enough, whatever else is stored beside it.

use nacre_core::{Clock, Digest, KeySource};

use super::{
    admission::Encryption,
    collect::{Found, Places},
    error::{SignatureError, TrustError},
    gpg::Keyring,
    identity::SignedIdentity,
    lookaside::LookasideConfig,
    payload::{Payload, PayloadType},
    policy::{Policy, Requirement, SignedBy, SigstoreSigned},
    sigstore::Verifier,
};
use crate::{
    manifest::{Index, Manifest, RawManifest},
    reference::{ImageRef, Location},
    source::SignatureStorage,
};

/// The most manifests between a reference and its image: an index of indexes, and the image.
const CHAIN_LIMIT: usize = 4;
/// The most signatures that a refusal tells about.
const REASONS_LIMIT: usize = 8;

/// Everything that the decision depends on.
#[derive(Clone, Copy)]
pub struct TrustContext<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// What was asked for, before mirrors and remapping.
    pub requested: &'a Location,
    /// The manifests that it resolved through, as they came: the index, if there is one, then the image's manifest.
    pub chain: &'a [&'a RawManifest],
    /// Where signatures are; `None` where the transport has none.
    pub storage: Option<&'a dyn SignatureStorage>,
    /// Where registries keep GPG signatures.
    pub lookaside: &'a LookasideConfig,
    /// Releases keys that the policy names by `kbs://`.
    pub keys: &'a dyn KeySource,
    /// Judges what has a validity period.
    pub clock: &'a dyn Clock,
}

/// How a signature was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// GPG simple signing.
    Gpg,
    /// cosign: a payload with a signature.
    Cosign,
    /// A sigstore bundle.
    Bundle,
}

/// Who vouched for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// How.
    pub scheme: Scheme,
    /// The key's fingerprint, or whom the certificate names.
    pub who: String,
    /// The manifest or index that was signed.
    pub digest: Digest,
    /// The name that was signed; a bundle may have none.
    pub reference: Option<ImageRef>,
}

/// Proof that the policy lets an image in. Only [`TrustContext::evaluate`] makes one; what may be done with it says
/// [`AdmissionRules::admit`](super::AdmissionRules::admit).
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Admitted {
    image: String,
    chain: Vec<Digest>,
    manifest: Digest,
    policy: String,
    rule: String,
    signers: Vec<Signer>,
    encryption: Option<Encryption>,
}

impl Admitted {
    /// What was asked for.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The digests of the index, if there is one, and of the image's manifest, which is the last.
    pub fn chain(&self) -> &[Digest] {
        &self.chain
    }

    /// The digest of the image's manifest.
    pub fn manifest(&self) -> &Digest {
        &self.manifest
    }

    /// The policy that decided.
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The place of the rule in the policy.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// Who vouched for it, one for each requirement that wants a signature.
    pub fn signers(&self) -> &[Signer] {
        &self.signers
    }

    /// How much of the image is encrypted; `None` for an index.
    pub fn encryption(&self) -> Option<Encryption> {
        self.encryption
    }

    /// Whether anybody vouched for it.
    pub fn is_signed(&self) -> bool {
        !self.signers.is_empty()
    }
}

/// What was found of each kind, looked for when a requirement first needs it.
#[derive(Default)]
struct Signatures {
    gpg: Option<Found<Vec<u8>>>,
    attachments: Option<Found<super::collect::Attachment>>,
    bundles: Option<Found<Vec<u8>>>,
}

impl TrustContext<'_> {
    /// Applies the policy.
    ///
    /// # Errors
    /// [`TrustError`], which says which rule of which policy refused what, and why.
    pub fn evaluate(&self) -> Result<Admitted, TrustError> {
        let (manifest, encryption) = self.check_chain()?;
        let applicable = self.policy.lookup(self.requested);
        let mut signers = Vec::new();
        let mut signatures = Signatures::default();
        for (number, requirement) in applicable.requirements.iter().enumerate() {
            let rule = || format!("requirement {} ({}) of {}", number + 1, requirement.name(), applicable.place());
            match requirement {
                Requirement::InsecureAcceptAnything => {
                    tracing::warn!(image = %self.requested, policy = self.policy.name(), "accepted without any signature");
                }
                Requirement::Reject => return Err(self.refuse(rule(), "it rejects everything")),
                Requirement::SignedBy(signed_by) => signers.push(self.signed_by(signed_by, &mut signatures, &rule)?),
                Requirement::SigstoreSigned(signed) => {
                    signers.push(self.sigstore_signed(signed, &mut signatures, &rule)?)
                }
            }
        }
        Ok(Admitted {
            image: self.requested.to_string(),
            chain: self.chain.iter().map(|manifest| *manifest.digest()).collect(),
            manifest,
            policy: self.policy.name().to_owned(),
            rule: applicable.place(),
            signers,
            encryption,
        })
    }

    /// Checks that the manifests really lead from the reference to the image, so that a signature of one of them is a signature of the
    /// image that was asked for.
    fn check_chain(&self) -> Result<(Digest, Option<Encryption>), TrustError> {
        let bad = |problem: String| TrustError::Chain { image: self.requested.to_string(), problem };
        let malformed = |source| TrustError::Manifest { image: self.requested.to_string(), source };
        let (Some(first), Some(last)) = (self.chain.first(), self.chain.last()) else {
            return Err(bad("there is no manifest to judge".into()));
        };
        if self.chain.len() > CHAIN_LIMIT {
            return Err(bad(format!("{} manifests deep; at most {CHAIN_LIMIT} are allowed", self.chain.len())));
        }
        if let Some(wanted) = self.requested.image_ref().and_then(ImageRef::digest) {
            let found = Digest::of(wanted.algorithm(), first.bytes());
            if found != *wanted {
                return Err(bad(format!("digest mismatch: expected {wanted}, the manifest has {found}")));
            }
        }
        for (parent, child) in self.chain.iter().zip(self.chain.iter().skip(1)) {
            let index = Index::parse(parent).map_err(malformed)?;
            let listed = index.manifests.iter().any(|entry| {
                entry.size == child.bytes().len() as u64
                    && Digest::of(entry.digest.algorithm(), child.bytes()) == entry.digest
            });
            if !listed {
                return Err(bad(format!("manifest {} is not in index {}", child.digest(), parent.digest())));
            }
        }
        let encryption = match last.is_index() {
            true => None,
            false => Some(Encryption::of(&Manifest::parse(last).map_err(malformed)?)),
        };
        Ok((*last.digest(), encryption))
    }

    fn places(&self) -> Places<'_> {
        Places { requested: self.requested, chain: self.chain, storage: self.storage, lookaside: self.lookaside }
    }

    fn signed_by(
        &self,
        requirement: &SignedBy,
        signatures: &mut Signatures,
        rule: &dyn Fn() -> String,
    ) -> Result<Signer, TrustError> {
        let keyring = self.keyring(requirement).map_err(|error| self.refuse(rule(), error))?;
        let found = signatures.gpg.get_or_insert_with(|| self.places().gpg());
        let mut reasons = Vec::new();
        for signature in &found.items {
            match self.check_gpg(&keyring, signature, &requirement.identity) {
                Ok(signer) => return Ok(signer),
                Err(error) => reasons.push(error),
            }
        }
        let failure = found.failure.take();
        Err(self.none_accepted("GPG signature", rule, &reasons, &found.notes, failure))
    }

    fn keyring(&self, requirement: &SignedBy) -> Result<Keyring, SignatureError> {
        let mut all: Option<Keyring> = None;
        for material in &requirement.keyrings {
            let keyring = Keyring::parse(&material.load(self.keys)?)
                .map_err(|problem| SignatureError::RuleKey { origin: material.to_string(), problem })?;
            match &mut all {
                Some(all) => all.append(keyring),
                None => all = Some(keyring),
            }
        }
        all.ok_or_else(|| SignatureError::RuleKey { origin: "the rule".into(), problem: "no keyring".into() })
    }

    fn check_gpg(
        &self,
        keyring: &Keyring,
        signature: &[u8],
        identity: &SignedIdentity,
    ) -> Result<Signer, SignatureError> {
        let (payload, signer) = keyring.verify(signature, self.clock)?;
        let payload = Payload::parse(&payload, PayloadType::Gpg)?;
        self.check_statement(payload.digest, Some(&payload.reference), identity)?;
        Ok(Signer {
            scheme: Scheme::Gpg,
            who: signer.fingerprint,
            digest: payload.digest,
            reference: Some(payload.reference),
        })
    }

    fn check_statement(
        &self,
        digest: Digest,
        reference: Option<&ImageRef>,
        identity: &SignedIdentity,
    ) -> Result<(), SignatureError> {
        if !super::names_one_of(&digest, self.chain) {
            return Err(super::wrong_digest(digest, self.chain));
        }
        let (rule, requested) = (identity.name(), self.requested.to_string());
        match reference {
            Some(name) if identity.accepts(self.requested, name) => Ok(()),
            Some(name) => Err(SignatureError::WrongIdentity { found: name.to_string(), rule, requested }),
            None if identity.accepts_unnamed(self.requested) => Ok(()),
            None => Err(SignatureError::NoIdentity { rule, requested }),
        }
    }

    fn sigstore_signed(
        &self,
        requirement: &SigstoreSigned,
        signatures: &mut Signatures,
        rule: &dyn Fn() -> String,
    ) -> Result<Signer, TrustError> {
        let verifier = Verifier::load(requirement, self.keys).map_err(|error| self.refuse(rule(), error))?;
        let mut reasons = Vec::new();
        let attachments = signatures.attachments.get_or_insert_with(|| self.places().attachments());
        for attachment in &attachments.items {
            let verified = verifier.verify(attachment, self.clock).and_then(|who| {
                let payload = Payload::parse(&attachment.payload, PayloadType::Cosign)?;
                self.check_statement(payload.digest, Some(&payload.reference), &requirement.identity)?;
                Ok(Signer { scheme: Scheme::Cosign, who, digest: payload.digest, reference: Some(payload.reference) })
            });
            match verified {
                Ok(signer) => return Ok(signer),
                Err(error) => reasons.push(error),
            }
        }
        let bundles = signatures.bundles.get_or_insert_with(|| self.places().bundles());
        for bundle in &bundles.items {
            let verified = verifier.verify_bundle(bundle, self.chain).and_then(|statement| {
                self.check_statement(statement.digest, statement.reference.as_ref(), &requirement.identity)?;
                Ok(Signer {
                    scheme: Scheme::Bundle,
                    who: format!("key {}", statement.key),
                    digest: statement.digest,
                    reference: statement.reference,
                })
            });
            match verified {
                Ok(signer) => return Ok(signer),
                Err(error) => reasons.push(error),
            }
        }
        let failure = attachments.failure.take().or_else(|| bundles.failure.take());
        let notes: Vec<String> = attachments.notes.iter().chain(&bundles.notes).cloned().collect();
        Err(self.none_accepted("sigstore signature", rule, &reasons, &notes, failure))
    }

    fn none_accepted(
        &self,
        kind: &str,
        rule: &dyn Fn() -> String,
        reasons: &[SignatureError],
        notes: &[String],
        failure: Option<crate::source::TransportError>,
    ) -> TrustError {
        if let Some(source) = failure {
            return TrustError::Undecided {
                image: self.requested.to_string(),
                rule: rule(),
                policy: self.policy.name().to_owned(),
                source,
            };
        }
        let mut texts: Vec<String> = reasons
            .iter()
            .take(REASONS_LIMIT)
            .enumerate()
            .map(|(number, reason)| format!("signature {}: {reason}", number + 1))
            .collect();
        if reasons.len() > REASONS_LIMIT {
            texts.push(format!("and {} more", reasons.len() - REASONS_LIMIT));
        }
        texts.extend(notes.iter().take(REASONS_LIMIT).cloned());
        let summary =
            if reasons.is_empty() { format!("the image has no {kind}") } else { format!("no {kind} was accepted") };
        let reason = if texts.is_empty() { summary } else { format!("{summary}: {}", texts.join("; ")) };
        self.refuse(rule(), reason)
    }

    fn refuse(&self, rule: String, reason: impl std::fmt::Display) -> TrustError {
        TrustError::Refused {
            image: self.requested.to_string(),
            rule,
            policy: self.policy.name().to_owned(),
            reason: reason.to_string(),
        }
    }
}
