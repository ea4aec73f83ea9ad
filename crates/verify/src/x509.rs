//! Certificates and revocation lists, as far as the vendors of TEEs use them: chains of two or three, each link checked here and named in
//! errors.
//!
//! For each link: the issuer's name, its being a CA, both validity periods, the signature, no unknown critical extension, and, where
//! there is a list of the issuer's, that the list is signed by it, in its time, and does not name the certificate.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PSS_2048_8192_SHA384, UnparsedPublicKey,
    VerificationAlgorithm,
};
use der::{
    Decode as _, Encode as _, Header, Reader as _, SliceReader, Tag,
    asn1::{AnyRef, BitStringRef, ObjectIdentifier},
    oid::AssociatedOid as _,
};
use x509_cert::{
    Certificate,
    crl::CertificateList,
    ext::{
        Extension,
        pkix::{BasicConstraints, KeyUsage, KeyUsages},
    },
    name::Name,
    serial_number::SerialNumber,
    time::Time,
};

/// Bytes of a certificate at most.
pub(crate) const LONGEST_CERT: usize = 16 * 1024;
/// Bytes of a list at most.
pub(crate) const LONGEST_CRL: usize = 1 << 20;
/// Certificates of a chain at most.
const MOST_CERTS: usize = 8;

const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const RSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
const RSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Parameters of RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes, as AMD writes them: the trailer, which is the
/// default, is left out in some certificates and written in others.
const PSS_SHA384: &[u8] = &[
    0x30, 0x34, 0xa0, 0x0f, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00,
    0xa1, 0x1c, 0x30, 0x1a, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0d, 0x06, 0x09,
    0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0xa2, 0x03, 0x02, 0x01, 0x30,
];
const PSS_TRAILER: &[u8] = &[0xa3, 0x03, 0x02, 0x01, 0x01];

/// What is wrong with a certificate or a list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub(crate) struct CertError {
    pub(crate) what: String,
    pub(crate) why: String,
}

fn error(what: impl Into<String>, why: impl Into<String>) -> CertError {
    CertError { what: what.into(), why: why.into() }
}

/// A public key that signatures are verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    P256(Vec<u8>),
    P384(Vec<u8>),
    /// `RSAPublicKey`.
    Rsa(Vec<u8>),
}

impl Key {
    /// Of a `SubjectPublicKeyInfo`.
    pub(crate) fn from_spki(der: &[u8]) -> Option<Self> {
        let spki = x509_cert::spki::SubjectPublicKeyInfoRef::try_from(der).ok()?;
        let bytes = spki.subject_public_key.as_bytes()?.to_vec();
        match spki.algorithm.oid {
            EC => match spki.algorithm.parameters_oid().ok()? {
                P256 if bytes.len() == 65 => Some(Self::P256(bytes)),
                P384 if bytes.len() == 97 => Some(Self::P384(bytes)),
                _ => None,
            },
            RSA => Some(Self::Rsa(bytes)),
            _ => None,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::P256(bytes) | Self::P384(bytes) | Self::Rsa(bytes) => bytes,
        }
    }

    /// Whether a signature holds.
    pub(crate) fn verifies(&self, with: &'static dyn VerificationAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(with, self.bytes()).verify(message, signature).is_ok()
    }
}

/// What is signed, by which algorithm, and the signature: the three parts of certificates and lists.
#[derive(Clone, Debug)]
struct Signed {
    message: Vec<u8>,
    algorithm: ObjectIdentifier,
    /// DER.
    parameters: Option<Vec<u8>>,
    signature: Vec<u8>,
}

impl Signed {
    fn parse(der: &[u8]) -> der::Result<Self> {
        let mut outer = SliceReader::new(der)?;
        let header = Header::decode(&mut outer)?;
        header.tag.assert_eq(Tag::Sequence)?;
        if outer.remaining_len() != header.length {
            return Err(Tag::Sequence.length_error());
        }
        let message = outer.tlv_bytes()?.to_vec();
        let algorithm = x509_cert::spki::AlgorithmIdentifier::<AnyRef<'_>>::decode(&mut outer)?;
        let signature = BitStringRef::decode(&mut outer)?;
        let signature = signature.as_bytes().ok_or_else(|| Tag::BitString.value_error())?.to_vec();
        let parameters = algorithm.parameters.map(|parameters| parameters.to_der()).transpose()?;
        outer.finish(Self { message, algorithm: algorithm.oid, parameters, signature })
    }

    fn holds(&self, key: &Key) -> bool {
        let with: &'static dyn VerificationAlgorithm = match (self.algorithm, key) {
            (ECDSA_SHA256, Key::P256(_)) => &ECDSA_P256_SHA256_ASN1,
            (ECDSA_SHA384, Key::P256(_)) => &ECDSA_P256_SHA384_ASN1,
            (ECDSA_SHA256, Key::P384(_)) => &ECDSA_P384_SHA256_ASN1,
            (ECDSA_SHA384, Key::P384(_)) => &ECDSA_P384_SHA384_ASN1,
            (RSA_SHA256, Key::Rsa(_)) => &RSA_PKCS1_2048_8192_SHA256,
            (RSA_SHA384, Key::Rsa(_)) => &RSA_PKCS1_2048_8192_SHA384,
            (RSA_PSS, Key::Rsa(_)) if self.is_pss_sha384() => &RSA_PSS_2048_8192_SHA384,
            _ => return false,
        };
        key.verifies(with, &self.message, &self.signature)
    }

    fn is_pss_sha384(&self) -> bool {
        let Some(parameters) = self.parameters.as_deref() else { return false };
        // The same members, with another length before them.
        let with_trailer = || {
            let members = PSS_SHA384.get(2..)?;
            Some(parameters.strip_prefix(&[0x30, 0x39])?.strip_prefix(members)? == PSS_TRAILER)
        };
        parameters == PSS_SHA384 || with_trailer() == Some(true)
    }
}

/// A certificate, parsed. Nothing of it is verified.
#[derive(Clone, Debug)]
pub(crate) struct Cert {
    der: Vec<u8>,
    signed: Signed,
    parsed: Certificate,
    key: Key,
}

impl Cert {
    /// From DER.
    pub(crate) fn from_der(der: &[u8]) -> Result<Self, CertError> {
        let none = |why: String| error("a certificate", why);
        if der.len() > LONGEST_CERT {
            return Err(none(format!("{} bytes: at most {LONGEST_CERT} are accepted", der.len())));
        }
        let parsed = Certificate::from_der(der).map_err(|error| none(format!("it is none: {error}")))?;
        let signed = Signed::parse(der).map_err(|error| none(format!("it is none: {error}")))?;
        let tbs = &parsed.tbs_certificate;
        if tbs.signature != parsed.signature_algorithm {
            return Err(none("it names two signature algorithms".into()));
        }
        let spki = tbs.subject_public_key_info.to_der().map_err(|error| none(error.to_string()))?;
        let key = Key::from_spki(&spki)
            .ok_or_else(|| error(name_of(&tbs.subject), "its key is none that we know (P-256, P-384, RSA)"))?;
        Ok(Self { der: der.to_vec(), signed, parsed, key })
    }

    /// From DER, or PEM with one certificate.
    pub(crate) fn from_any(bytes: &[u8]) -> Result<Self, CertError> {
        match bytes.first() {
            Some(0x30) => Self::from_der(bytes),
            _ => match <[Self; 1]>::try_from(Self::chain(bytes)?) {
                Ok([cert]) => Ok(cert),
                Err(chain) => Err(error("a certificate", format!("one is expected, and there are {}", chain.len()))),
            },
        }
    }

    /// The certificates of a PEM text, at most eight.
    pub(crate) fn chain(pem: &[u8]) -> Result<Vec<Self>, CertError> {
        Self::several(pem, MOST_CERTS)
    }

    /// The certificates of a PEM text, at most so many.
    pub(crate) fn several(pem: &[u8], most: usize) -> Result<Vec<Self>, CertError> {
        let none = |why: &str| error("a chain of certificates", why);
        if pem.len() > most * LONGEST_CERT {
            return Err(none("it is too long"));
        }
        // Intel's chains end with a zero byte.
        let text = std::str::from_utf8(pem).map_err(|_| none("it is not PEM"))?.trim_end_matches('\0');
        let mut certs = Vec::new();
        let mut rest = text;
        while let Some((_, body)) = rest.split_once("-----BEGIN CERTIFICATE-----") {
            let (body, after) =
                body.split_once("-----END CERTIFICATE-----").ok_or_else(|| none("it ends within a certificate"))?;
            let base64: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
            let der = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, base64);
            certs.push(Self::from_der(&der.map_err(|_| none("it is not PEM"))?)?);
            if certs.len() > most {
                return Err(none("it has too many certificates"));
            }
            rest = after;
        }
        Ok(certs)
    }

    /// The bytes.
    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }

    /// The key.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// `SubjectPublicKeyInfo`, DER.
    pub(crate) fn spki(&self) -> der::Result<Vec<u8>> {
        self.parsed.tbs_certificate.subject_public_key_info.to_der()
    }

    /// Whether it says that it issued itself.
    pub(crate) fn is_own_issuer(&self) -> bool {
        self.names_issuer(self)
    }

    /// Whether another certificate has the name of its issuer.
    pub(crate) fn names_issuer(&self, issuer: &Self) -> bool {
        self.parsed.tbs_certificate.issuer == issuer.parsed.tbs_certificate.subject
    }

    /// The subject's common name.
    pub(crate) fn name(&self) -> String {
        name_of(&self.parsed.tbs_certificate.subject)
    }

    /// The issuer's common name.
    pub(crate) fn issuer(&self) -> String {
        name_of(&self.parsed.tbs_certificate.issuer)
    }

    /// From when and until when it is good, in seconds since 1970.
    pub(crate) fn validity(&self) -> (i64, i64) {
        let validity = &self.parsed.tbs_certificate.validity;
        (seconds(&validity.not_before), seconds(&validity.not_after))
    }

    /// An extension's content.
    pub(crate) fn extension(&self, oid: ObjectIdentifier) -> Option<&[u8]> {
        let mut found = self.extensions().filter(|extension| extension.extn_id == oid);
        // Two of them: no telling which one others look at.
        found.next().filter(|_| found.next().is_none()).map(|extension| extension.extn_value.as_bytes())
    }

    fn extensions(&self) -> impl Iterator<Item = &Extension> {
        self.parsed.tbs_certificate.extensions.iter().flatten()
    }

    /// Whether it may issue certificates.
    pub(crate) fn is_ca(&self) -> bool {
        let constraints = self.extension(BasicConstraints::OID).and_then(|der| BasicConstraints::from_der(der).ok());
        let usage = self.extension(KeyUsage::OID).and_then(|der| KeyUsage::from_der(der).ok());
        constraints.is_some_and(|constraints| constraints.ca)
            && usage.is_none_or(|usage| usage.0.contains(KeyUsages::KeyCertSign))
    }

    /// Whether it is in its time and has no critical extension that we do not understand.
    pub(crate) fn usable(&self, now: i64) -> Result<(), CertError> {
        self.usable_understanding(now, &[])
    }

    fn usable_understanding(&self, now: i64, understood: &[ObjectIdentifier]) -> Result<(), CertError> {
        in_time(self.validity(), now).map_err(|why| error(self.name(), why))?;
        let unknown = self.extensions().find(|extension| {
            let known = [BasicConstraints::OID, KeyUsage::OID].contains(&extension.extn_id);
            extension.critical && !known && !understood.contains(&extension.extn_id)
        });
        match unknown {
            Some(extension) => {
                Err(error(self.name(), format!("critical extension {} is not understood", extension.extn_id)))
            }
            None => Ok(()),
        }
    }

    /// Whether another certificate vouches for it, by one revocation list of the other's or none. The issuer itself has to be
    /// checked as well.
    pub(crate) fn issued_by(&self, issuer: &Self, now: i64, crl: Option<&VerifiedCrl>) -> Result<(), CertError> {
        self.issued_by_understanding(issuer, now, &[])?;
        self.not_revoked(issuer, crl)
    }

    /// As [`issued_by`](Self::issued_by) without a list, and with other critical extensions than those that everybody understands.
    pub(crate) fn issued_by_understanding(
        &self,
        issuer: &Self,
        now: i64,
        understood: &[ObjectIdentifier],
    ) -> Result<(), CertError> {
        self.usable_understanding(now, understood)?;
        let fail = |why: String| Err(error(self.name(), why));
        if self.parsed.tbs_certificate.issuer != issuer.parsed.tbs_certificate.subject {
            return fail(format!("it is issued by {}, not by {}", self.issuer(), issuer.name()));
        }
        if !issuer.is_ca() {
            return fail(format!("its issuer {} is no certificate authority", issuer.name()));
        }
        if !self.signed.holds(&issuer.key) {
            return fail(format!("its signature is not {}'s", issuer.name()));
        }
        Ok(())
    }

    /// Whether a list of its issuer's does not name it.
    pub(crate) fn not_revoked(&self, issuer: &Self, crl: Option<&VerifiedCrl>) -> Result<(), CertError> {
        let fail = |why: String| Err(error(self.name(), why));
        match crl {
            Some(crl) if crl.issuer != issuer.parsed.tbs_certificate.subject => {
                fail(format!("the revocation list is not that of its issuer {}", issuer.name()))
            }
            Some(crl) if crl.revoked.contains(&self.parsed.tbs_certificate.serial_number) => {
                fail("it was revoked".into())
            }
            _ => Ok(()),
        }
    }
}

/// A revocation list, parsed. Nothing of it is verified.
#[derive(Clone, Debug)]
pub(crate) struct Crl {
    signed: Signed,
    parsed: CertificateList,
}

impl Crl {
    /// From DER or PEM.
    pub(crate) fn from_any(bytes: &[u8]) -> Result<Self, CertError> {
        let none = |why: String| error("a revocation list", why);
        if bytes.len() > LONGEST_CRL {
            return Err(none(format!("{} bytes: at most {LONGEST_CRL} are accepted", bytes.len())));
        }
        let decoded;
        let der = match bytes.first() {
            Some(0x30) => bytes,
            _ => {
                let text = std::str::from_utf8(bytes).map_err(|_| none("it is neither DER nor PEM".into()))?;
                let body =
                    text.split_once("-----BEGIN X509 CRL-----").and_then(|(_, rest)| rest.split_once("-----END"));
                let (body, _) = body.ok_or_else(|| none("it is neither DER nor PEM".into()))?;
                let base64: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
                decoded = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, base64)
                    .map_err(|error| none(error.to_string()))?;
                &decoded
            }
        };
        let parsed = CertificateList::from_der(der).map_err(|error| none(format!("it is none: {error}")))?;
        let signed = Signed::parse(der).map_err(|error| none(format!("it is none: {error}")))?;
        Ok(Self { signed, parsed })
    }

    /// The issuer's common name.
    pub(crate) fn issuer(&self) -> String {
        name_of(&self.parsed.tbs_cert_list.issuer)
    }

    /// From when and until when it is good; a list without end is good for ever.
    pub(crate) fn validity(&self) -> (i64, i64) {
        let list = &self.parsed.tbs_cert_list;
        (seconds(&list.this_update), list.next_update.as_ref().map_or(i64::MAX, seconds))
    }

    /// Checks that it is the issuer's, and in its time; it still counts `grace` seconds after that.
    pub(crate) fn verify(self, issuer: &Cert, now: i64, grace: i64) -> Result<VerifiedCrl, CertError> {
        let (from, until) = self.validity();
        let list = self.parsed.tbs_cert_list;
        let fail = |why: &str| Err(error(format!("the revocation list of {}", issuer.name()), why));
        if list.issuer != issuer.parsed.tbs_certificate.subject {
            return fail("it is another issuer's");
        }
        if !self.signed.holds(&issuer.key) {
            return fail("its signature is not the issuer's");
        }
        if let Err(why) = in_time((from, until.saturating_add(grace)), now) {
            return fail(&why);
        }
        // A critical extension may say that it is a part of the list only.
        if list.crl_extensions.iter().flatten().any(|extension| extension.critical) {
            return fail("it has a critical extension that is not understood");
        }
        let revoked = list.revoked_certificates.into_iter().flatten().map(|revoked| revoked.serial_number).collect();
        Ok(VerifiedCrl { issuer: list.issuer, revoked })
    }
}

/// A revocation list that is its issuer's and in its time.
#[derive(Clone, Debug)]
pub(crate) struct VerifiedCrl {
    issuer: Name,
    revoked: Vec<SerialNumber>,
}

/// Whether a time lies within a validity period.
pub(crate) fn in_time((from, until): (i64, i64), now: i64) -> Result<(), String> {
    if now < from {
        return Err(format!("it is not valid before {}, and it is {}", date(from), date(now)));
    }
    if now > until {
        return Err(format!("it expired {}, and it is {}", date(until), date(now)));
    }
    Ok(())
}

/// A time as people read it.
pub(crate) fn date(seconds: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|time| time.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

fn seconds(time: &Time) -> i64 {
    i64::try_from(time.to_unix_duration().as_secs()).unwrap_or(i64::MAX)
}

/// The common name; all of the name where it has none.
fn name_of(name: &Name) -> String {
    let attributes = name.0.iter().flat_map(|set| set.0.iter());
    let mut texts = attributes
        .filter(|attribute| attribute.oid == COMMON_NAME)
        .filter_map(|attribute| std::str::from_utf8(attribute.value.value()).ok());
    match (texts.next(), texts.next()) {
        (Some(text), None) => text.chars().take(120).collect(),
        _ => name.to_string().chars().take(120).collect(),
    }
}
