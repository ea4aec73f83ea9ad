//! Judges cosign signatures: keys, Fulcio certificates, other CAs' certificates, each with a transparency log's promise where the rule
//! asks for one.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Clock, KeySource};
use rustls_pki_types::CertificateDer;

use super::{
    bundle::{Bundle, Statement},
    certificate::{SignerCertificate, certificates},
    collect::{Attachment, SIGNATURE_ANNOTATION},
    error::SignatureError,
    material::Material,
    policy::{Authority, SigstoreSigned},
    public_key::PublicKey,
    rekor::{Logged, Promise},
};
use crate::manifest::RawManifest;

const PROMISE_ANNOTATION: &str = "dev.sigstore.cosign/bundle";
const CERTIFICATE_ANNOTATION: &str = "dev.sigstore.cosign/certificate";
const CHAIN_ANNOTATION: &str = "dev.sigstore.cosign/chain";

/// A rule with its keys and certificates loaded.
pub(super) struct Verifier<'a> {
    authority: LoadedAuthority<'a>,
    logs: Vec<PublicKey>,
}

enum LoadedAuthority<'a> {
    Keys(Vec<PublicKey>),
    Fulcio {
        roots: Vec<CertificateDer<'static>>,
        issuer: &'a str,
        email: &'a str,
    },
    Pki {
        roots: Vec<CertificateDer<'static>>,
        intermediates: Vec<CertificateDer<'static>>,
        email: Option<&'a str>,
        hostname: Option<&'a str>,
    },
}

fn load_key(material: &Material, keys: &dyn KeySource) -> Result<PublicKey, SignatureError> {
    PublicKey::from_pem(&material.load(keys)?)
        .map_err(|problem| SignatureError::RuleKey { origin: material.to_string(), problem })
}

fn load_certificates(
    material: &Material,
    keys: &dyn KeySource,
) -> Result<Vec<CertificateDer<'static>>, SignatureError> {
    let bad = |problem: String| SignatureError::RuleKey { origin: material.to_string(), problem };
    let found = certificates(&material.load(keys)?).map_err(bad)?;
    if found.is_empty() { Err(bad("no certificate in it".into())) } else { Ok(found) }
}

impl<'a> Verifier<'a> {
    pub(super) fn load(rule: &'a SigstoreSigned, keys: &dyn KeySource) -> Result<Self, SignatureError> {
        let authority = match &rule.authority {
            Authority::Keys(materials) => LoadedAuthority::Keys(
                materials.iter().map(|material| load_key(material, keys)).collect::<Result<_, _>>()?,
            ),
            Authority::Fulcio { ca, oidc_issuer, subject_email } => LoadedAuthority::Fulcio {
                roots: load_certificates(ca, keys)?,
                issuer: oidc_issuer,
                email: subject_email,
            },
            Authority::Pki { roots, intermediates, subject_email, subject_hostname } => LoadedAuthority::Pki {
                roots: load_certificates(roots, keys)?,
                intermediates: match intermediates {
                    Some(intermediates) => load_certificates(intermediates, keys)?,
                    None => Vec::new(),
                },
                email: subject_email.as_deref(),
                hostname: subject_hostname.as_deref(),
            },
        };
        let logs: Vec<PublicKey> =
            rule.rekor.iter().map(|material| load_key(material, keys)).collect::<Result<_, _>>()?;
        for (log, material) in logs.iter().zip(&rule.rekor) {
            if !log.is_ecdsa() {
                let problem = "a rekorPublicKey must be ECDSA".into();
                return Err(SignatureError::RuleKey { origin: material.to_string(), problem });
            }
        }
        Ok(Self { authority, logs })
    }

    /// Checks the signature over the attachment's payload. Says who made it.
    pub(super) fn verify(&self, attachment: &Attachment, clock: &dyn Clock) -> Result<String, SignatureError> {
        let text = annotation(attachment, SIGNATURE_ANNOTATION)?;
        let signature = STANDARD
            .decode(text)
            .map_err(|error| SignatureError::malformed("cosign signature", format!("not base64: {error}")))?;
        match &self.authority {
            LoadedAuthority::Keys(keys) => self.verify_keys(keys, attachment, &signature),
            LoadedAuthority::Fulcio { roots, issuer, email } => {
                let certificate = SignerCertificate::from_pem(annotation(attachment, CERTIFICATE_ANNOTATION)?)?;
                let promise = Promise::parse(annotation(attachment, PROMISE_ANNOTATION)?.as_bytes())?;
                let logged = Logged {
                    key_or_certificate: certificate.der(),
                    signature: &signature,
                    payload: &attachment.payload,
                };
                let signed_at = promise.verify(&self.logs, &logged)?;
                certificate.verify_path(roots, &chain(attachment)?, signed_at)?;
                certificate.check_oidc_issuer(issuer)?;
                certificate.check_email(email)?;
                certificate.public_key()?.verify(&attachment.payload, &signature)?;
                Ok(format!("{email}, identified by {issuer}"))
            }
            LoadedAuthority::Pki { roots, intermediates, email, hostname } => {
                let certificate = SignerCertificate::from_pem(annotation(attachment, CERTIFICATE_ANNOTATION)?)?;
                let mut path = chain(attachment)?;
                path.extend(intermediates.iter().cloned());
                let now = certificate.trusted_now(clock)?;
                certificate.verify_path(roots, &path, now)?;
                if let Some(email) = email {
                    certificate.check_email(email)?;
                }
                if let Some(hostname) = hostname {
                    certificate.check_hostname(hostname)?;
                }
                certificate.public_key()?.verify(&attachment.payload, &signature)?;
                let names: Vec<&str> = email.iter().chain(hostname).copied().collect();
                Ok(names.join(", "))
            }
        }
    }

    fn verify_keys(
        &self,
        keys: &[PublicKey],
        attachment: &Attachment,
        signature: &[u8],
    ) -> Result<String, SignatureError> {
        let mut failure = SignatureError::Invalid("the rule has no key".into());
        let promise = match self.logs.is_empty() {
            true => None,
            false => Some(Promise::parse(annotation(attachment, PROMISE_ANNOTATION)?.as_bytes())?),
        };
        for key in keys {
            let logged = Logged { key_or_certificate: key.spki(), signature, payload: &attachment.payload };
            let seen = promise.as_ref().map_or(Ok(0), |promise| promise.verify(&self.logs, &logged));
            match seen.and_then(|_| key.verify(&attachment.payload, signature)) {
                Ok(()) => return Ok(format!("key {}", key.fingerprint())),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Checks a sigstore bundle.
    pub(super) fn verify_bundle(&self, bytes: &[u8], manifests: &[&RawManifest]) -> Result<Statement, SignatureError> {
        let bundle = Bundle::parse(bytes)?;
        match &self.authority {
            LoadedAuthority::Keys(keys) if self.logs.is_empty() => bundle.verify(keys, manifests),
            _ => {
                let problem = "bundles are verified with keys only; the rule wants a certificate or a transparency log";
                Err(SignatureError::malformed("bundle", problem))
            }
        }
    }
}

fn annotation<'a>(attachment: &'a Attachment, name: &str) -> Result<&'a str, SignatureError> {
    let missing = || SignatureError::malformed("cosign signature", format!("annotation {name} is missing"));
    attachment.annotations.get(name).map(String::as_str).ok_or_else(missing)
}

fn chain(attachment: &Attachment) -> Result<Vec<CertificateDer<'static>>, SignatureError> {
    match attachment.annotations.get(CHAIN_ANNOTATION) {
        Some(pem) => certificates(pem.as_bytes()).map_err(SignatureError::Certificate),
        None => Ok(Vec::new()),
    }
}
