//! Whether an attestation key (AK) is in a TPM that somebody made whom the operator trusts.
//!
//! ```text
//! EK certificate ── issued by a chain to one of the operator's roots, for endorsement keys ──▶ EK
//! EK public area ── the certificate's key; restricted decryption, by PolicySecret of the endorsement hierarchy; bound to its TPM
//! AK public area ── restricted signing; made in, and bound to, its TPM
//! credential     ── a secret that a TPM gives only where it has that EK, and beside it an object of the AK's name (part 1 §24)
//! ```
//!
//! ```text
//! seed            random; RSA: OAEP(SHA-256, "IDENTITY") to the EK; P-256: KDFe(Z.x, "IDENTITY", our x, its x)
//! encIdentity     AES-128-CFB(KDFa(seed, "STORAGE", AK's name), IV 0, TPM2B(secret))
//! integrity       HMAC-SHA256(KDFa(seed, "INTEGRITY"), encIdentity ‖ AK's name)
//! credential      TPM2B(integrity) ‖ encIdentity
//! ```
//!
//! Revocation lists of TPM manufacturers are not looked at: an operator who learns that a TPM is bad revokes its enrolment.

use aws_lc_rs::{
    agreement,
    cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey},
    hmac,
    iv::FixedLength,
    rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey},
};
use der::{Decode as _, asn1::ObjectIdentifier};
use nacre_attest::{attesters::tpm::spki, enrolment::Candidate, evidence::hex};
use nacre_core::{Algorithm, Digest};
use nacre_tpm::response::{self, PublicKey};
use x509_cert::ext::pkix::ExtendedKeyUsage;

use crate::x509::{Cert, CertError, Key};

/// Certificates of authorities at most, and their bytes.
const MOST_ROOTS: usize = 200;
/// Authorities between a certificate and a root at most.
const LONGEST_CHAIN: usize = 4;
/// tcg-kp-EKCertificate.
const EK_CERTIFICATE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.8.1");
const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");
/// Critical in EK certificates, whose subject it stands for: the TPM's make. Nothing is decided by it.
const ALTERNATIVE_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");
/// PolicySecret of the endorsement hierarchy.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7,
    0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
const ALG_SHA256: [u8; 2] = [0x00, 0x0b];
/// FIXEDTPM, FIXEDPARENT, SENSITIVEDATAORIGIN: made in its TPM, and nowhere else.
const BOUND: u32 = 1 << 1 | 1 << 4 | 1 << 5;
/// RESTRICTED, DECRYPT, SIGN.
const USES: u32 = 1 << 16 | 1 << 17 | 1 << 18;
const RESTRICTED_DECRYPT: u32 = 1 << 16 | 1 << 17;
const RESTRICTED_SIGN: u32 = 1 << 16 | 1 << 18;

/// Why a key is not enrolled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrolError {
    /// The operator's authorities are none.
    #[error("authorities of EK certificates: {0}")]
    Roots(String),
    /// The certificate is not one of a TPM by a maker whom the operator trusts.
    #[error("EK certificate: {0}")]
    Certificate(String),
    /// The EK is not the certificate's, or no endorsement key.
    #[error("EK: {0}")]
    Endorsement(String),
    /// The AK is none that vouches for a TPM.
    #[error("AK: {0}")]
    Attestation(String),
}

impl From<CertError> for EnrolError {
    fn from(error: CertError) -> Self {
        Self::Certificate(error.to_string())
    }
}

/// Who makes TPMs, by the operator's word.
#[derive(Clone, Debug)]
pub struct EkRoots {
    roots: Vec<Cert>,
    /// Count as far as they lead to a root.
    between: Vec<Cert>,
}

/// A key that may be enrolled once its TPM has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eligible {
    /// The TPM's name: SHA-256 of the EK's `SubjectPublicKeyInfo`, hex.
    pub name: String,
    /// The AK, `SubjectPublicKeyInfo`, DER.
    pub ak: Vec<u8>,
    /// Who issued the EK certificate.
    pub issuer: String,
    /// When the EK certificate ends, in seconds since 1970.
    pub until: i64,
    ek: Ek,
    ak_name: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Ek {
    /// `SubjectPublicKeyInfo`.
    Rsa(Vec<u8>),
    /// x and y, 32 bytes each.
    P256(Vec<u8>, Vec<u8>),
}

impl EkRoots {
    /// From PEM: the certificates of makers of TPMs. Those that issued themselves are roots; others are links of chains.
    ///
    /// # Errors
    /// [`EnrolError::Roots`].
    pub fn parse(pem: &[u8]) -> Result<Self, EnrolError> {
        let wrong = |why: String| EnrolError::Roots(why);
        let certs = Cert::several(pem, MOST_ROOTS).map_err(|error| wrong(error.to_string()))?;
        if let Some(leaf) = certs.iter().find(|cert| !cert.is_ca()) {
            return Err(wrong(format!("{} is no certificate authority", leaf.name())));
        }
        let (roots, between): (Vec<_>, Vec<_>) = certs.into_iter().partition(Cert::is_own_issuer);
        match roots.is_empty() {
            true => Err(wrong("there is no root among them: a certificate that issued itself".into())),
            false => Ok(Self { roots, between }),
        }
    }

    /// Checks what a guest says of its keys.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub fn check(&self, candidate: &Candidate, now: i64) -> Result<Eligible, EnrolError> {
        let cert = Cert::from_der(&candidate.ek_certificate)?;
        self.is_ek_certificate(&cert, now)?;
        let ek = endorsement(&candidate.ek_public, cert.key(), || cert.spki().ok())?;
        let (ak, ak_name) = attestation(&candidate.ak_public)?;
        let spki = cert.spki().map_err(|error| EnrolError::Certificate(error.to_string()))?;
        let name = hex(Digest::sha256(&spki).as_bytes());
        Ok(Eligible { name, ak, issuer: cert.issuer(), until: cert.validity().1, ek, ak_name })
    }

    fn is_ek_certificate(&self, cert: &Cert, now: i64) -> Result<(), EnrolError> {
        let usage = cert.extension(EXTENDED_KEY_USAGE).and_then(|der| ExtendedKeyUsage::from_der(der).ok());
        if cert.is_ca() || !usage.is_some_and(|usage| usage.0.contains(&EK_CERTIFICATE)) {
            return Err(EnrolError::Certificate(format!(
                "{} is not one of an endorsement key (extended key usage {EK_CERTIFICATE})",
                cert.name()
            )));
        }
        // Names may be equal and keys not: each issuer of that name is tried. A chain has at most so many links, and each link so many tries.
        let mut links = vec![cert];
        let mut last = None;
        for _ in 0..=LONGEST_CHAIN {
            let mut above: Vec<&Cert> = Vec::new();
            for link in links {
                for (issuer, is_root) in
                    self.roots.iter().map(|root| (root, true)).chain(self.between.iter().map(|cert| (cert, false)))
                {
                    if !link.names_issuer(issuer) {
                        continue;
                    }
                    match link.issued_by_understanding(issuer, now, &[ALTERNATIVE_NAME]) {
                        Ok(()) if is_root => match issuer.usable(now) {
                            Ok(()) => return Ok(()),
                            Err(error) => last = Some(error),
                        },
                        Ok(()) if !above.iter().any(|known| known.der() == issuer.der()) => above.push(issuer),
                        Ok(()) => {}
                        Err(error) => last = Some(error),
                    }
                }
            }
            links = above;
        }
        Err(last.map_or_else(
            || {
                EnrolError::Certificate(format!(
                    "it is issued by {}, which is not among the authorities that the operator trusts (ek_roots), or does not lead to one",
                    cert.issuer()
                ))
            },
            EnrolError::from,
        ))
    }
}

/// The AK and its name, if its public area is that of a key that vouches for its TPM.
fn attestation(area: &[u8]) -> Result<(Vec<u8>, Vec<u8>), EnrolError> {
    let wrong = |why: &str| EnrolError::Attestation(why.to_owned());
    let key = response::public_key(area).map_err(|error| wrong(&error.to_string()))?;
    let (algorithm, attributes) = head(area).ok_or_else(|| wrong("its public area is none"))?;
    if algorithm != ALG_SHA256 {
        return Err(wrong("its name is not made by SHA-256"));
    }
    if attributes & USES != RESTRICTED_SIGN || attributes & BOUND != BOUND {
        return Err(wrong("it is not one that was made in its TPM, stays there, and signs only what the TPM says"));
    }
    let name = [&ALG_SHA256[..], Digest::sha256(area).as_bytes()].concat();
    Ok((spki(&key).map_err(|error| wrong(&error.to_string()))?, name))
}

/// For a fuzzer: bytes as public areas.
pub(crate) fn parse_areas(bytes: &[u8]) {
    let _ = attestation(bytes).is_ok();
    for key in [Key::P256(vec![4; 65]), Key::Rsa(vec![0x30, 0])] {
        let _ = endorsement(bytes, &key, || Some(Vec::new())).is_ok();
    }
}

/// The name's hash function and the attributes of a public area.
fn head(area: &[u8]) -> Option<([u8; 2], u32)> {
    let (_, rest) = area.split_first_chunk::<2>()?;
    let (algorithm, rest) = rest.split_first_chunk::<2>()?;
    Some((*algorithm, u32::from_be_bytes(*rest.first_chunk::<4>()?)))
}

/// The EK, if its public area is that of an endorsement key by the templates L-1 and L-2, and its key the certificate's.
fn endorsement(area: &[u8], key: &Key, spki_of: impl FnOnce() -> Option<Vec<u8>>) -> Result<Ek, EnrolError> {
    let wrong = |why: &str| EnrolError::Endorsement(why.to_owned());
    let (algorithm, attributes) = head(area).ok_or_else(|| wrong("its public area is none"))?;
    // ADMINWITHPOLICY beside what binds it; used by its policy and not by a password.
    if algorithm != ALG_SHA256
        || attributes & USES != RESTRICTED_DECRYPT
        || attributes & (BOUND | 1 << 7 | 1 << 6) != BOUND | 1 << 7
    {
        return Err(wrong("it is not made by the TCG's templates L-1 (RSA 2048) and L-2 (P-256)"));
    }
    let start = area.get(..8).unwrap_or_default();
    let template = |kind: [u8; 2], rest: &[u8]| {
        let policy = [&[0, 32], &EK_POLICY[..]].concat();
        // AES-128-CFB, no scheme.
        [start, &policy, &[0, 6, 0, 128, 0, 0x43, 0, 0x10], rest]
            .concat()
            .strip_prefix(&kind)
            .map(|rest| [&kind[..], rest].concat())
    };
    let differs = || wrong("its public area is not that of the certificate's key");
    match key {
        Key::Rsa(_) => {
            let template = template([0, 1], &[8, 0, 0, 0, 0, 0]).ok_or_else(differs)?;
            let modulus = response::modulus(area, &template).map_err(|error| wrong(&error.to_string()))?;
            let own = spki(&PublicKey::Rsa(modulus.to_vec(), 65_537)).map_err(|_| differs())?;
            let spki = spki_of().ok_or_else(differs)?;
            if Key::from_spki(&own).as_ref() == Some(key) { Ok(Ek::Rsa(spki)) } else { Err(differs()) }
        }
        Key::P256(point) => {
            let template = template([0, 0x23], &[0, 3, 0, 0x10]).ok_or_else(differs)?;
            let (x, y) = response::point(area, &template).map_err(|error| wrong(&error.to_string()))?;
            let padded = |number: &[u8]| Some([&vec![0; usize::checked_sub(32, number.len())?][..], number].concat());
            let (px, py) = padded(x).zip(padded(y)).ok_or_else(differs)?;
            match *point == [&[4][..], &px, &py].concat() {
                true => Ok(Ek::P256(px, py)),
                false => Err(differs()),
            }
        }
        Key::P384(_) => Err(wrong("its key is none of those that are enrolled (RSA 2048, P-256)")),
    }
}

impl Eligible {
    /// Hides a secret so that only the TPM with this EK and this AK gives it: `TPM2B_ID_OBJECT` and `TPM2B_ENCRYPTED_SECRET`, both without
    /// their lengths.
    ///
    /// # Errors
    /// [`EnrolError::Endorsement`]: the key is none that can be encrypted to.
    pub fn challenge(&self, secret: &[u8; 32]) -> Result<(Vec<u8>, Vec<u8>), EnrolError> {
        let unusable = || EnrolError::Endorsement("nothing can be encrypted to it".into());
        let (seed, encrypted) = self.seed().ok_or_else(unusable)?;
        let credential = self.credential(&seed, secret).ok_or_else(unusable)?;
        Ok((credential, encrypted))
    }

    fn seed(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        match &self.ek {
            Ek::Rsa(spki) => {
                let mut seed = [0; 32];
                aws_lc_rs::rand::fill(&mut seed).ok()?;
                let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(spki).ok()?).ok()?;
                let mut encrypted = vec![0; key.ciphertext_size()];
                let label = Some(&b"IDENTITY\0"[..]);
                let length = key.encrypt(&OAEP_SHA256_MGF1SHA256, &seed, &mut encrypted, label).ok()?.len();
                encrypted.truncate(length);
                Some((seed.to_vec(), encrypted))
            }
            Ek::P256(x, y) => {
                let rng = aws_lc_rs::rand::SystemRandom::new();
                let ours = agreement::EphemeralPrivateKey::generate(&agreement::ECDH_P256, &rng).ok()?;
                let public = ours.compute_public_key().ok()?;
                let (our_x, our_y) = public.as_ref().get(1..)?.split_at_checked(32)?;
                let theirs = [&[4][..], x, y].concat();
                let theirs = agreement::UnparsedPublicKey::new(&agreement::ECDH_P256, theirs);
                let seed = agreement::agree_ephemeral(ours, &theirs, (), |z| {
                    let message = [&[0, 0, 0, 1], z, b"IDENTITY\0", our_x, x].concat();
                    Ok(Digest::of(Algorithm::Sha256, &message).as_bytes().to_vec())
                });
                let sized = |number: &[u8]| [&[0, 32][..], number].concat();
                Some((seed.ok()?, [sized(our_x), sized(our_y)].concat()))
            }
        }
    }

    fn credential(&self, seed: &[u8], secret: &[u8; 32]) -> Option<Vec<u8>> {
        let storage = kdfa(seed, b"STORAGE\0", &self.ak_name, 128);
        let mut identity = [&[0, 32][..], secret].concat();
        let key = UnboundCipherKey::new(&AES_128, storage.get(..16)?).ok()?;
        let zeros = EncryptionContext::Iv128(FixedLength::from([0; 16]));
        EncryptingKey::cfb128(key).ok()?.less_safe_encrypt(&mut identity, zeros).ok()?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &kdfa(seed, b"INTEGRITY\0", &[], 256));
        let integrity = hmac::sign(&key, &[&identity[..], &self.ak_name].concat());
        Some([&[0, 32], integrity.as_ref(), &identity].concat())
    }
}

/// KDFa with HMAC-SHA256, of 256 bits at most.
fn kdfa(key: &[u8], label: &[u8], context: &[u8], bits: u32) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, &[&[0, 0, 0, 1], label, context, &bits.to_be_bytes()].concat()).as_ref().to_vec()
}
