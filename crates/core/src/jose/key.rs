//! Public and private keys from PEM and DER: SPKI, PKCS#1, PKCS#8, SEC1, and the key of an X.509 certificate.

use std::fmt;

use aws_lc_rs::rsa::{PrivateDecryptingKey, PublicEncryptingKey};
use p256::{
    elliptic_curve::sec1::ToEncodedPoint as _,
    pkcs8::{
        AlgorithmIdentifierRef, DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _,
        EncodePublicKey as _, LineEnding, ObjectIdentifier, PrivateKeyInfo, SubjectPublicKeyInfoRef,
        der::{
            Decode as _, Encode as _, Header, Reader as _, SliceReader, Tagged as _,
            asn1::{AnyRef, BitStringRef, UintRef},
        },
    },
};
use rand_core::OsRng;
use zeroize::Zeroizing;

use super::{JoseError, Jwk, curve::P256PrivateKey, pem};

pub(super) const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
/// Longer than any key file with a chain of certificates.
const LONGEST: usize = 256 * 1024;

/// An RSA public key: what JWK says of it and what aws-lc-rs takes.
#[derive(Clone, PartialEq, Eq)]
pub struct RsaPublicKey {
    /// The modulus, big-endian, no leading zeros.
    pub(super) n: Vec<u8>,
    /// The exponent, likewise.
    pub(super) e: Vec<u8>,
}

/// A key that others may encrypt to or verify with.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublicKey {
    /// NIST P-256.
    P256(p256::PublicKey),
    /// NIST P-384.
    P384(p384::PublicKey),
    /// NIST P-521.
    P521(p521::PublicKey),
    /// RSA of 2048 to 8192 bits.
    Rsa(RsaPublicKey),
}

/// A key that decrypts or signs.
#[non_exhaustive]
pub enum PrivateKey {
    /// NIST P-256.
    P256(P256PrivateKey),
    /// NIST P-384.
    P384(p384::SecretKey),
    /// NIST P-521.
    P521(p521::SecretKey),
    /// RSA, inside aws-lc-rs.
    Rsa(RsaPrivateKey),
}

/// An RSA private key; all that is done with it is done by aws-lc-rs.
pub struct RsaPrivateKey {
    pub(super) key: PrivateDecryptingKey,
    pub(super) public: RsaPublicKey,
}

fn bad_public(why: impl fmt::Display) -> JoseError {
    JoseError::malformed("public key", why.to_string())
}

fn bad_private(why: impl fmt::Display) -> JoseError {
    JoseError::malformed("private key", why.to_string())
}

impl RsaPublicKey {
    /// Checks the size (by aws-lc-rs: 2048 to 8192 bits) and keeps the numbers.
    pub(super) fn new(n: &[u8], e: &[u8]) -> Result<Self, JoseError> {
        let strip = |number: &[u8]| number.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
        let key = Self { n: strip(n), e: strip(e) };
        key.to_aws()?;
        Ok(key)
    }

    fn from_pkcs1(der: &[u8]) -> Result<Self, JoseError> {
        let (n, e) = SliceReader::new(der)
            .and_then(|mut reader| {
                let numbers = reader.sequence(|r| {
                    Ok((UintRef::decode(r)?.as_bytes().to_vec(), UintRef::decode(r)?.as_bytes().to_vec()))
                })?;
                reader.finish(numbers)
            })
            .map_err(bad_public)?;
        Self::new(&n, &e)
    }

    pub(super) fn to_spki(&self) -> Result<Vec<u8>, JoseError> {
        let body = sequence_of_numbers(&[&self.n, &self.e])?;
        SubjectPublicKeyInfoRef {
            algorithm: AlgorithmIdentifierRef { oid: RSA_ENCRYPTION, parameters: Some(AnyRef::NULL) },
            subject_public_key: BitStringRef::from_bytes(&body).map_err(bad_public)?,
        }
        .to_der()
        .map_err(bad_public)
    }

    /// The key as aws-lc-rs takes it, for schemes that are not JOSE's.
    ///
    /// # Errors
    /// [`JoseError::Malformed`], for no key that was read by this module.
    pub fn encrypting_key(&self) -> Result<PublicEncryptingKey, JoseError> {
        self.to_aws()
    }

    pub(super) fn to_aws(&self) -> Result<PublicEncryptingKey, JoseError> {
        PublicEncryptingKey::from_der(&self.to_spki()?).map_err(|_| bad_public("not an RSA key of 2048 to 8192 bits"))
    }
}

/// DER of a SEQUENCE of INTEGERs, each given big-endian and unsigned.
pub(super) fn sequence_of_numbers(numbers: &[&[u8]]) -> Result<Zeroizing<Vec<u8>>, JoseError> {
    let mut body = Zeroizing::new(Vec::new());
    for number in numbers {
        UintRef::new(number).and_then(|n| n.encode_to_vec(&mut body)).map_err(bad_private)?;
    }
    let header = p256::pkcs8::der::Length::try_from(body.len())
        .and_then(|length| Header::new(p256::pkcs8::der::Tag::Sequence, length))
        .and_then(|header| header.to_der())
        .map_err(bad_private)?;
    let mut der = Zeroizing::new(Vec::with_capacity(header.len() + body.len()));
    der.extend_from_slice(&header);
    der.extend_from_slice(&body);
    Ok(der)
}

impl PublicKey {
    /// Reads PEM (SPKI, PKCS#1, certificate), DER (SPKI, PKCS#1, certificate) or a JWK, whichever it is.
    ///
    /// # Errors
    /// [`JoseError`]: none of these, or a kind of key that is not supported.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, JoseError> {
        if bytes.len() > LONGEST {
            return Err(bad_public(format!("{} bytes: at most {LONGEST} are read", bytes.len())));
        }
        if let Some(text) = pem::is_pem(bytes) {
            return Self::from_pem(text);
        }
        if bytes.trim_ascii_start().starts_with(b"{") {
            let jwk: Jwk = serde_json::from_slice(bytes).map_err(|e| JoseError::malformed("JWK", e.to_string()))?;
            return jwk.to_public();
        }
        Self::from_spki(bytes).or_else(|error| {
            RsaPublicKey::from_pkcs1(bytes).map(Self::Rsa).or_else(|_| Self::from_certificate(bytes)).map_err(|_| error)
        })
    }

    /// Reads the first key or certificate of a PEM text.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn from_pem(text: &str) -> Result<Self, JoseError> {
        for block in pem::blocks(text)? {
            match block.label {
                "PUBLIC KEY" => return Self::from_spki(&block.der),
                "RSA PUBLIC KEY" => return RsaPublicKey::from_pkcs1(&block.der).map(Self::Rsa),
                "CERTIFICATE" => return Self::from_certificate(&block.der),
                "EC PARAMETERS" => {}
                label => return Err(JoseError::unsupported("PEM block", label)),
            }
        }
        Err(bad_public("no PEM block in it"))
    }

    /// Reads a DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn from_spki(der: &[u8]) -> Result<Self, JoseError> {
        let info = SubjectPublicKeyInfoRef::try_from(der).map_err(bad_public)?;
        if info.algorithm.oid == RSA_ENCRYPTION {
            let body = info.subject_public_key.as_bytes().ok_or_else(|| bad_public("stray bits"))?;
            return RsaPublicKey::from_pkcs1(body).map(Self::Rsa);
        }
        if info.algorithm.oid != EC_PUBLIC_KEY {
            return Err(JoseError::unsupported("public key algorithm", &info.algorithm.oid.to_string()));
        }
        p256::PublicKey::from_public_key_der(der)
            .map(Self::P256)
            .or_else(|_| p384::PublicKey::from_public_key_der(der).map(Self::P384))
            .or_else(|_| p521::PublicKey::from_public_key_der(der).map(Self::P521))
            .map_err(|_| bad_public("not a point of P-256, P-384 or P-521"))
    }

    /// Takes the key out of a DER X.509 certificate. Nothing of the certificate is verified.
    fn from_certificate(der: &[u8]) -> Result<Self, JoseError> {
        let spki = (|| {
            let mut reader = SliceReader::new(der)?;
            reader.sequence(|certificate| {
                let spki = certificate.sequence(|tbs| {
                    // version [0], when it is there; then serial, signature algorithm, issuer, validity, subject.
                    let first = AnyRef::decode(tbs)?;
                    let before = if first.tag().is_context_specific() { 5 } else { 4 };
                    for _ in 0..before {
                        AnyRef::decode(tbs)?;
                    }
                    let spki = tbs.tlv_bytes()?.to_vec();
                    tbs.read_slice(tbs.remaining_len())?;
                    Ok(spki)
                })?;
                certificate.read_slice(certificate.remaining_len())?;
                Ok(spki)
            })
        })()
        .map_err(bad_public)?;
        Self::from_spki(&spki)
    }

    /// The key as DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`JoseError::Malformed`], for no key that was read by this module.
    pub fn to_spki(&self) -> Result<Vec<u8>, JoseError> {
        let document = match self {
            Self::P256(key) => key.to_public_key_der(),
            Self::P384(key) => key.to_public_key_der(),
            Self::P521(key) => key.to_public_key_der(),
            Self::Rsa(key) => return key.to_spki(),
        };
        Ok(document.map_err(bad_public)?.into_vec())
    }

    /// The key as PEM SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// As [`to_spki`](Self::to_spki).
    pub fn to_pem(&self) -> Result<String, JoseError> {
        use base64::{Engine as _, prelude::BASE64_STANDARD};
        let text = BASE64_STANDARD.encode(self.to_spki()?);
        let mut pem = String::from("-----BEGIN PUBLIC KEY-----\n");
        for line in text.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END PUBLIC KEY-----\n");
        Ok(pem)
    }

    /// The kind of key, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::P256(_) => "EC P-256",
            Self::P384(_) => "EC P-384",
            Self::P521(_) => "EC P-521",
            Self::Rsa(_) => "RSA",
        }
    }

    /// The uncompressed SEC1 point of an EC key.
    pub(super) fn sec1(&self) -> Option<Vec<u8>> {
        match self {
            Self::P256(key) => Some(key.to_encoded_point(false).as_bytes().to_vec()),
            Self::P384(key) => Some(key.to_encoded_point(false).as_bytes().to_vec()),
            Self::P521(key) => Some(key.to_encoded_point(false).as_bytes().to_vec()),
            Self::Rsa(_) => None,
        }
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.kind())
    }
}

impl PrivateKey {
    /// A new P-256 key.
    ///
    /// # Panics
    /// Where aws-lc has no memory left.
    #[expect(clippy::expect_used, reason = "a scalar of the curve is a key of the curve")]
    pub fn generate_p256() -> Self {
        Self::P256(P256PrivateKey::generate().expect("a random scalar of P-256"))
    }

    /// A new P-384 key.
    pub fn generate_p384() -> Self {
        Self::P384(p384::SecretKey::random(&mut OsRng))
    }

    /// A new P-521 key.
    pub fn generate_p521() -> Self {
        Self::P521(p521::SecretKey::random(&mut OsRng))
    }

    /// Reads PEM or DER (PKCS#8, SEC1, PKCS#1) or a private JWK, whichever it is.
    ///
    /// # Errors
    /// [`JoseError`]: none of these, encrypted, or a kind of key that is not supported.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, JoseError> {
        if bytes.len() > LONGEST {
            return Err(bad_private(format!("{} bytes: at most {LONGEST} are read", bytes.len())));
        }
        if let Some(text) = pem::is_pem(bytes) {
            return Self::from_pem(text);
        }
        if bytes.trim_ascii_start().starts_with(b"{") {
            let jwk: Jwk = serde_json::from_slice(bytes).map_err(|e| JoseError::malformed("JWK", e.to_string()))?;
            return jwk.to_private();
        }
        Self::from_pkcs8(bytes)
            .or_else(|error| Self::from_sec1(bytes).or_else(|_| Self::from_pkcs1(bytes)).map_err(|_| error))
    }

    /// Reads the first private key of a PEM text.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn from_pem(text: &str) -> Result<Self, JoseError> {
        for block in pem::blocks(text)? {
            match block.label {
                "PRIVATE KEY" => return Self::from_pkcs8(&block.der),
                "EC PRIVATE KEY" => return Self::from_sec1(&block.der),
                "RSA PRIVATE KEY" => return Self::from_pkcs1(&block.der),
                "ENCRYPTED PRIVATE KEY" => return Err(JoseError::EncryptedKey),
                "EC PARAMETERS" | "CERTIFICATE" => {}
                label => return Err(JoseError::unsupported("PEM block", label)),
            }
        }
        Err(bad_private("no private key block in it"))
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, JoseError> {
        let info = PrivateKeyInfo::try_from(der).map_err(bad_private)?;
        if info.algorithm.oid == RSA_ENCRYPTION {
            let key = PrivateDecryptingKey::from_pkcs8(der)
                .map_err(|_| bad_private("not a consistent RSA key of 2048 to 8192 bits"))?;
            return RsaPrivateKey::new(key).map(Self::Rsa);
        }
        if info.algorithm.oid != EC_PUBLIC_KEY {
            return Err(JoseError::unsupported("private key algorithm", &info.algorithm.oid.to_string()));
        }
        if let Ok(key) = p256::SecretKey::from_pkcs8_der(der) {
            return P256PrivateKey::new(key).map(Self::P256);
        }
        p384::SecretKey::from_pkcs8_der(der)
            .map(Self::P384)
            .or_else(|_| p521::SecretKey::from_pkcs8_der(der).map(Self::P521))
            .map_err(|_| bad_private("not a key of P-256, P-384 or P-521"))
    }

    fn from_sec1(der: &[u8]) -> Result<Self, JoseError> {
        if let Ok(key) = p256::SecretKey::from_sec1_der(der) {
            return P256PrivateKey::new(key).map(Self::P256);
        }
        p384::SecretKey::from_sec1_der(der)
            .map(Self::P384)
            .or_else(|_| p521::SecretKey::from_sec1_der(der).map(Self::P521))
            .map_err(|_| bad_private("not a SEC1 key of P-256, P-384 or P-521"))
    }

    pub(super) fn from_pkcs1(der: &[u8]) -> Result<Self, JoseError> {
        let algorithm = AlgorithmIdentifierRef { oid: RSA_ENCRYPTION, parameters: Some(AnyRef::NULL) };
        let info = PrivateKeyInfo::new(algorithm, der);
        let wrapped = Zeroizing::new(info.to_der().map_err(bad_private)?);
        Self::from_pkcs8(&wrapped)
    }

    /// The key as PEM PKCS#8, to be kept in a file that only its owner can read.
    ///
    /// # Errors
    /// [`JoseError::Unsupported`] for RSA, whose keys are never written.
    pub fn to_pkcs8_pem(&self) -> Result<Zeroizing<String>, JoseError> {
        let pem = match self {
            Self::P256(key) => key.secret().to_pkcs8_pem(LineEnding::LF),
            Self::P384(key) => key.to_pkcs8_pem(LineEnding::LF),
            Self::P521(key) => key.to_pkcs8_pem(LineEnding::LF),
            Self::Rsa(_) => return Err(JoseError::unsupported("export of a private key", "RSA")),
        };
        pem.map_err(bad_private)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        match self {
            Self::P256(key) => PublicKey::P256(*key.public()),
            Self::P384(key) => PublicKey::P384(key.public_key()),
            Self::P521(key) => PublicKey::P521(key.public_key()),
            Self::Rsa(key) => PublicKey::Rsa(key.public.clone()),
        }
    }

    /// The kind of key, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::P256(_) => "EC P-256",
            Self::P384(_) => "EC P-384",
            Self::P521(_) => "EC P-521",
            Self::Rsa(_) => "RSA",
        }
    }
}

impl RsaPrivateKey {
    /// The key as aws-lc-rs holds it, for schemes that are not JOSE's.
    pub fn decrypting_key(&self) -> &PrivateDecryptingKey {
        &self.key
    }

    fn new(key: PrivateDecryptingKey) -> Result<Self, JoseError> {
        use aws_lc_rs::encoding::AsDer as _;
        let spki = key.public_key().as_der().map_err(|_| JoseError::Crypto("RSA public key export"))?;
        match PublicKey::from_spki(spki.as_ref())? {
            PublicKey::Rsa(public) => Ok(Self { key, public }),
            _ => Err(JoseError::Crypto("RSA public key export")),
        }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({}, …)", self.kind())
    }
}
