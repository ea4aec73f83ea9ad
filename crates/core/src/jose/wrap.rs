//! How a content encryption key (CEK, 32 bytes) is wrapped for one recipient (RFC 7518 §4.3, §4.6).
//!
//! ECDH-ES+A*KW: a key agreed between an ephemeral key and the recipient's wraps the CEK by AES-KW (RFC 3394).
//! RSA-OAEP (SHA-1) and RSA-OAEP-256 encrypt it.

use aes_kw::{KekAes128, KekAes192, KekAes256};
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPrivateDecryptingKey, OaepPublicEncryptingKey,
};
use rand_core::OsRng;
use zeroize::Zeroizing;

use super::{JoseError, Jwk, PrivateKey, PublicKey, curve::P256PrivateKey, kdf::concat_kdf, key::RsaPrivateKey};

/// A content encryption key.
pub(super) type Cek = Zeroizing<[u8; 32]>;

/// The key management algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// `ECDH-ES+A128KW`: only to decrypt.
    EcdhEsA128Kw,
    /// `ECDH-ES+A192KW`: only to decrypt.
    EcdhEsA192Kw,
    /// `ECDH-ES+A256KW`.
    EcdhEsA256Kw,
    /// `RSA-OAEP`: SHA-1 in OAEP, whose collisions do not matter there; what other programs of the field write.
    RsaOaep,
    /// `RSA-OAEP-256`.
    RsaOaep256,
}

impl KeyAlgorithm {
    /// The name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdhEsA128Kw => "ECDH-ES+A128KW",
            Self::EcdhEsA192Kw => "ECDH-ES+A192KW",
            Self::EcdhEsA256Kw => "ECDH-ES+A256KW",
            Self::RsaOaep => "RSA-OAEP",
            Self::RsaOaep256 => "RSA-OAEP-256",
        }
    }

    /// The algorithm of a name.
    ///
    /// # Errors
    /// [`JoseError::Unsupported`].
    pub fn from_name(name: &str) -> Result<Self, JoseError> {
        [Self::EcdhEsA128Kw, Self::EcdhEsA192Kw, Self::EcdhEsA256Kw, Self::RsaOaep, Self::RsaOaep256]
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| JoseError::unsupported("key algorithm", name))
    }

    fn oaep(self) -> Option<&'static OaepAlgorithm> {
        match self {
            Self::RsaOaep => Some(&OAEP_SHA1_MGF1SHA1),
            Self::RsaOaep256 => Some(&OAEP_SHA256_MGF1SHA256),
            _ => None,
        }
    }

    fn mismatch(self, key: &'static str) -> JoseError {
        JoseError::AlgorithmMismatch { algorithm: self.name().into(), key }
    }
}

/// What a header says of a wrapped key.
pub(super) struct Wrapped<'a> {
    pub(super) algorithm: KeyAlgorithm,
    pub(super) epk: Option<&'a Jwk>,
    pub(super) apu: &'a [u8],
    pub(super) apv: &'a [u8],
    pub(super) encrypted_key: &'a [u8],
}

/// Wraps `cek`; gives the encrypted key and, for ECDH, the ephemeral public key.
pub(super) fn wrap(key: &PublicKey, algorithm: KeyAlgorithm, cek: &Cek) -> Result<(Vec<u8>, Option<Jwk>), JoseError> {
    if let (PublicKey::Rsa(rsa), Some(oaep)) = (key, algorithm.oaep()) {
        let rsa = OaepPublicEncryptingKey::new(rsa.to_aws()?).map_err(|_| JoseError::Crypto("RSA-OAEP key"))?;
        let mut out = vec![0; rsa.ciphertext_size()];
        let length =
            rsa.encrypt(oaep, &**cek, &mut out, None).map_err(|_| JoseError::Crypto("RSA-OAEP encryption"))?.len();
        out.truncate(length);
        return Ok((out, None));
    }
    if algorithm != KeyAlgorithm::EcdhEsA256Kw {
        return Err(algorithm.mismatch(key.kind()));
    }
    let ephemeral = match key {
        PublicKey::P256(_) => PrivateKey::P256(P256PrivateKey::generate()?),
        PublicKey::P384(_) => PrivateKey::P384(p384::SecretKey::random(&mut OsRng)),
        PublicKey::P521(_) => PrivateKey::P521(p521::SecretKey::random(&mut OsRng)),
        PublicKey::Rsa(_) => return Err(algorithm.mismatch(key.kind())),
    };
    let z = agree(&ephemeral, key).ok_or(JoseError::Crypto("ECDH"))?;
    let mut kek = Zeroizing::new([0; 32]);
    concat_kdf(&z, algorithm.name(), b"", b"", &mut *kek);
    let wrapped = KekAes256::from(*kek).wrap_vec(&**cek).map_err(|_| JoseError::Crypto("AES key wrap"))?;
    Ok((wrapped, Some(Jwk::from_public(&ephemeral.public()))))
}

/// Opens a wrapped key; `None` when this private key does not open it, for whatever reason.
pub(super) fn unwrap(key: &PrivateKey, wrapped: &Wrapped<'_>) -> Option<Cek> {
    if let PrivateKey::Rsa(rsa) = key {
        return unwrap_rsa(rsa, wrapped);
    }
    if wrapped.algorithm.oaep().is_some() {
        return None;
    }
    let epk = wrapped.epk?.to_public().ok()?;
    let z = agree(key, &epk)?;
    // 32 bytes and the integrity block of 8.
    if wrapped.encrypted_key.len() != 40 {
        return None;
    }
    let mut cek = Zeroizing::new([0; 32]);
    let name = wrapped.algorithm.name();
    let mut kek = Zeroizing::new([0; 32]);
    match wrapped.algorithm {
        KeyAlgorithm::EcdhEsA256Kw => {
            concat_kdf(&z, name, wrapped.apu, wrapped.apv, &mut *kek);
            KekAes256::from(*kek).unwrap(wrapped.encrypted_key, &mut *cek).ok()?;
        }
        KeyAlgorithm::EcdhEsA192Kw => {
            let short = kek.first_chunk_mut::<24>()?;
            concat_kdf(&z, name, wrapped.apu, wrapped.apv, short);
            KekAes192::from(*short).unwrap(wrapped.encrypted_key, &mut *cek).ok()?;
        }
        KeyAlgorithm::EcdhEsA128Kw => {
            let short = kek.first_chunk_mut::<16>()?;
            concat_kdf(&z, name, wrapped.apu, wrapped.apv, short);
            KekAes128::from(*short).unwrap(wrapped.encrypted_key, &mut *cek).ok()?;
        }
        KeyAlgorithm::RsaOaep | KeyAlgorithm::RsaOaep256 => return None,
    }
    Some(cek)
}

fn unwrap_rsa(rsa: &RsaPrivateKey, wrapped: &Wrapped<'_>) -> Option<Cek> {
    let oaep = wrapped.algorithm.oaep()?;
    if wrapped.encrypted_key.len() != rsa.key.key_size_bytes() {
        return None;
    }
    let key = OaepPrivateDecryptingKey::new(rsa.key.clone()).ok()?;
    let mut out = Zeroizing::new(vec![0; key.min_output_size()]);
    let plain = key.decrypt(oaep, wrapped.encrypted_key, &mut out, None).ok()?;
    let plain: &[u8; 32] = (&*plain).try_into().ok()?;
    let mut cek = Zeroizing::new([0; 32]);
    cek.copy_from_slice(plain);
    Some(cek)
}

/// The shared secret Z: the x coordinate, in the field's full length. `None` for keys of different curves.
fn agree(private: &PrivateKey, public: &PublicKey) -> Option<Zeroizing<Vec<u8>>> {
    let z = match (private, public) {
        (PrivateKey::P256(private), PublicKey::P256(public)) => return private.agree(public),
        (PrivateKey::P384(private), PublicKey::P384(public)) => {
            p384::ecdh::diffie_hellman(private.to_nonzero_scalar(), public.as_affine()).raw_secret_bytes().to_vec()
        }
        (PrivateKey::P521(private), PublicKey::P521(public)) => {
            p521::ecdh::diffie_hellman(private.to_nonzero_scalar(), public.as_affine()).raw_secret_bytes().to_vec()
        }
        _ => return None,
    };
    Some(Zeroizing::new(z))
}
