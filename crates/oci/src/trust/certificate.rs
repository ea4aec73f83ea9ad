//! Certificates of signers: Fulcio's short-lived ones and those of other CAs (`pki`).
//!
//! The path is built and checked by rustls-webpki; what names its purposes must name code signing. A Fulcio certificate lives for minutes: it is judged at
//! the time that the transparency log has signed, for which no clock is needed. A `pki` certificate is judged by the trusted time, now,
//! and without one it is refused.

use std::time::Duration;

use nacre_core::Clock;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _};
use spki::{
    ObjectIdentifier,
    der::{Decode as _, Encode as _, asn1::Utf8StringRef},
};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_cert::{
    Certificate,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::{error::SignatureError, public_key::PublicKey};

/// id-kp-codeSigning, 1.3.6.1.5.5.7.3.3, without tag and length.
const CODE_SIGNING: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 3];
const SUBJECT_ALT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");
/// Fulcio's OIDC issuer, as a raw string (deprecated, still issued).
const ISSUER_V1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.57264.1.1");
/// Fulcio's OIDC issuer, as a DER UTF8String.
const ISSUER_V2: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.57264.1.8");
/// The most certificates of a chain or set.
const CERTIFICATES_LIMIT: usize = 64;

/// A signer's certificate, of which only the form was checked.
pub(super) struct SignerCertificate {
    der: CertificateDer<'static>,
    parsed: Certificate,
}

impl SignerCertificate {
    /// Reads the one certificate of a PEM text.
    pub(super) fn from_pem(pem: &str) -> Result<Self, SignatureError> {
        let mut all = certificates(pem.as_bytes()).map_err(SignatureError::Certificate)?;
        match (all.pop(), all.is_empty()) {
            (Some(der), true) => {
                let parsed = Certificate::from_der(&der).map_err(|error| bad(format!("not X.509: {error}")))?;
                Ok(Self { der, parsed })
            }
            (None, _) => Err(bad("none in the signature")),
            (Some(_), false) => Err(bad("several in the signature, where one belongs")),
        }
    }

    pub(super) fn der(&self) -> &[u8] {
        &self.der
    }

    pub(super) fn public_key(&self) -> Result<PublicKey, SignatureError> {
        let der =
            self.parsed.tbs_certificate.subject_public_key_info.to_der().map_err(|error| bad(error.to_string()))?;
        PublicKey::from_spki(&der).map_err(bad)
    }

    /// Checks the path to one of `roots`, in which what names its purposes must name code signing, at a time in Unix seconds.
    pub(super) fn verify_path(
        &self,
        roots: &[CertificateDer<'static>],
        intermediates: &[CertificateDer<'static>],
        at: i64,
    ) -> Result<(), SignatureError> {
        let anchors: Vec<_> = roots
            .iter()
            .map(anchor_from_trusted_cert)
            .collect::<Result<_, _>>()
            .map_err(|error| bad(format!("a CA certificate of the rule: {error}")))?;
        let seconds = u64::try_from(at).map_err(|_| bad("the time to judge it by is before 1970"))?;
        let leaf = EndEntityCert::try_from(&self.der).map_err(|error| bad(error.to_string()))?;
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            intermediates,
            UnixTime::since_unix_epoch(Duration::from_secs(seconds)),
            KeyUsage::required_if_present(CODE_SIGNING),
            None,
            None,
        )
        .map_err(|error| {
            bad(format!("no valid path to a CA of the rule at {}: {error}", super::gpg_key::moment(at)))
        })?;
        Ok(())
    }

    /// Judges the validity periods by the trusted time, so that the message can say which time that was.
    pub(super) fn trusted_now(&self, clock: &dyn Clock) -> Result<i64, SignatureError> {
        let until = self.parsed.tbs_certificate.validity.not_after.to_unix_duration().as_secs();
        let until = i64::try_from(until).unwrap_or(i64::MAX);
        super::check_end("the signer's certificate", until, clock)?;
        let no_time = || SignatureError::NoTrustedTime {
            what: "the signer's certificate".into(),
            at: super::gpg_key::moment(until),
        };
        Ok(clock.now().ok_or_else(no_time)?.now.unix_timestamp())
    }

    pub(super) fn check_email(&self, expected: &str) -> Result<(), SignatureError> {
        let mut found = Vec::new();
        for value in self.extension_values(SUBJECT_ALT_NAME) {
            let names = SubjectAltName::from_der(value).map_err(|error| bad(format!("subject names: {error}")))?;
            for name in names.0 {
                if let GeneralName::Rfc822Name(email) = name {
                    if email.as_str() == expected {
                        return Ok(());
                    }
                    found.push(email.as_str().chars().take(100).collect::<String>());
                }
            }
        }
        let found = if found.is_empty() { "no e-mail address".into() } else { found.join(", ") };
        Err(bad(format!("is for {found}, not for {expected}")))
    }

    pub(super) fn check_hostname(&self, expected: &str) -> Result<(), SignatureError> {
        let name =
            ServerName::try_from(expected).map_err(|error| bad(format!("subjectHostname of the rule: {error}")))?;
        let leaf = EndEntityCert::try_from(&self.der).map_err(|error| bad(error.to_string()))?;
        leaf.verify_is_valid_for_subject_name(&name)
            .map_err(|error| bad(format!("is not for host {expected}: {error}")))
    }

    pub(super) fn check_oidc_issuer(&self, expected: &str) -> Result<(), SignatureError> {
        let v1 = self.single_extension(ISSUER_V1)?.map(|value| String::from_utf8_lossy(value).into_owned());
        let v2 = self
            .single_extension(ISSUER_V2)?
            .map(|value| Utf8StringRef::from_der(value).map(|text| text.as_str().to_owned()))
            .transpose()
            .map_err(|error| bad(format!("OIDC issuer: {error}")))?;
        let found = match (v1, v2) {
            (Some(v1), Some(v2)) if v1 != v2 => return Err(bad("names two OIDC issuers that differ")),
            (Some(issuer), _) | (None, Some(issuer)) => issuer,
            (None, None) => return Err(bad("names no OIDC issuer")),
        };
        if found == expected { Ok(()) } else { Err(bad(format!("was issued for {found:.200}, not for {expected}"))) }
    }

    fn extension_values(&self, oid: ObjectIdentifier) -> impl Iterator<Item = &[u8]> {
        let extensions = self.parsed.tbs_certificate.extensions.iter().flatten();
        extensions.filter(move |extension| extension.extn_id == oid).map(|extension| extension.extn_value.as_bytes())
    }

    fn single_extension(&self, oid: ObjectIdentifier) -> Result<Option<&[u8]>, SignatureError> {
        let mut values = self.extension_values(oid);
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(bad(format!("has extension {oid} twice"))),
        }
    }
}

/// The certificates of a PEM text.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .take(CERTIFICATES_LIMIT + 1)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("not PEM: {error}"))?;
    if all.len() > CERTIFICATES_LIMIT { Err(format!("more than {CERTIFICATES_LIMIT} certificates")) } else { Ok(all) }
}

fn bad(problem: impl Into<String>) -> SignatureError {
    SignatureError::Certificate(problem.into())
}
