//! Hierarchies of certificates as AMD's and Intel's, made in the test: other keys, the same names, and every mistake that one likes.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]
#![allow(dead_code, reason = "each test file has this module, and uses a part of it")]

pub(crate) mod amd;
pub(crate) mod intel;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DistinguishedName, DnType,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, SignatureAlgorithm,
};
use ring::signature::{EcdsaKeyPair, EcdsaSigningAlgorithm};
use time::OffsetDateTime;

/// 2026-01-01: when all of it begins.
pub(crate) const START: i64 = 1_767_225_600;
/// 2026-06-01: when it is used.
pub(crate) const NOW: i64 = 1_780_272_000;
/// 2027-01-01: when all of it ends.
pub(crate) const END: i64 = 1_798_761_600;
pub(crate) const DAY: i64 = 86_400;

pub(crate) fn date(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap()
}

pub(crate) fn rfc3339(seconds: i64) -> String {
    date(seconds).format(&time::format_description::well_known::Rfc3339).unwrap()
}

/// A key with its certificate.
pub(crate) struct Node {
    pub(crate) key: KeyPair,
    pub(crate) params: CertificateParams,
    pub(crate) der: Vec<u8>,
    pub(crate) pem: String,
}

/// What a certificate is to say.
pub(crate) struct Wish {
    pub(crate) name: String,
    pub(crate) serial: u64,
    pub(crate) ca: bool,
    pub(crate) from: i64,
    pub(crate) until: i64,
    pub(crate) extensions: Vec<(Vec<u64>, Vec<u8>)>,
}

impl Wish {
    pub(crate) fn new(name: &str, serial: u64, ca: bool) -> Self {
        Self { name: name.into(), serial, ca, from: START, until: END, extensions: Vec::new() }
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.name.as_str());
        params.serial_number = Some(SerialNumber::from(self.serial));
        params.not_before = date(self.from);
        params.not_after = date(self.until);
        if self.ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        }
        let extension = |(oid, content): &(Vec<u64>, Vec<u8>)| CustomExtension::from_oid_content(oid, content.clone());
        params.custom_extensions = self.extensions.iter().map(extension).collect();
        params
    }

    /// Signed by itself.
    pub(crate) fn root(&self, algorithm: &'static SignatureAlgorithm) -> Node {
        let (key, params) = (KeyPair::generate_for(algorithm).unwrap(), self.params());
        let cert = params.self_signed(&key).unwrap();
        Node { key, params, der: cert.der().to_vec(), pem: cert.pem() }
    }

    /// Signed by another.
    pub(crate) fn below(&self, issuer: &Node, algorithm: &'static SignatureAlgorithm) -> Node {
        let (key, params) = (KeyPair::generate_for(algorithm).unwrap(), self.params());
        let cert = params.signed_by(&key, &issuer.issuer()).unwrap();
        Node { key, params, der: cert.der().to_vec(), pem: cert.pem() }
    }
}

impl Node {
    pub(crate) fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    /// A revocation list of this authority.
    pub(crate) fn crl(&self, revoked: &[u64], from: i64, until: i64) -> Vec<u8> {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date(from),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date(from),
            next_update: date(until),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer()).unwrap().der().to_vec()
    }

    /// r and s, big-endian.
    pub(crate) fn sign(&self, algorithm: &'static EcdsaSigningAlgorithm, message: &[u8]) -> Vec<u8> {
        let rng = ring::rand::SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(algorithm, &self.key.serialize_der(), &rng).unwrap();
        key.sign(&rng, message).unwrap().as_ref().to_vec()
    }
}

/// DER: a tag, a length of two bytes at most, a content.
pub(crate) fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match content.len() {
        length @ 0..=127 => out.push(u8::try_from(length).unwrap()),
        length @ 128..=255 => out.extend([0x81, u8::try_from(length).unwrap()]),
        length => out.extend([&[0x82], &u16::try_from(length).unwrap().to_be_bytes()[..]].concat()),
    }
    out.extend_from_slice(content);
    out
}
