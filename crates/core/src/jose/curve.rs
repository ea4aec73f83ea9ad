//! P-256 private keys. A broker does little else than sign, agree and make keys of this curve, and aws-lc's assembly does it in an eighth
//! of the time of portable code; both take constant time.

use std::sync::OnceLock;

use aws_lc_rs::{
    agreement::{ECDH_P256, UnparsedPublicKey, agree},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use p256::elliptic_curve::sec1::ToEncodedPoint as _;
use rand_core::OsRng;
use zeroize::Zeroizing;

use super::JoseError;

/// A P-256 private key with its public half.
pub struct P256PrivateKey {
    secret: p256::SecretKey,
    public: p256::PublicKey,
    agreement: aws_lc_rs::agreement::PrivateKey,
    /// Made when the key first signs.
    signing: OnceLock<EcdsaKeyPair>,
}

impl P256PrivateKey {
    pub(super) fn generate() -> Result<Self, JoseError> {
        Self::new(p256::SecretKey::random(&mut OsRng))
    }

    pub(super) fn new(secret: p256::SecretKey) -> Result<Self, JoseError> {
        let failed = || JoseError::Crypto("P-256 key");
        let scalar = Zeroizing::new(<[u8; 32]>::from(secret.to_bytes()));
        let agreement =
            aws_lc_rs::agreement::PrivateKey::from_private_key(&ECDH_P256, &*scalar).map_err(|_| failed())?;
        let point = agreement.compute_public_key().map_err(|_| failed())?;
        let public = p256::PublicKey::from_sec1_bytes(point.as_ref()).map_err(|_| failed())?;
        Ok(Self { secret, public, agreement, signing: OnceLock::new() })
    }

    pub(super) fn secret(&self) -> &p256::SecretKey {
        &self.secret
    }

    pub(super) fn public(&self) -> &p256::PublicKey {
        &self.public
    }

    /// ES256: the two numbers, 32 bytes each.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, JoseError> {
        let failed = || JoseError::Crypto("ECDSA");
        let pair = match self.signing.get() {
            Some(pair) => pair,
            None => {
                let scalar = Zeroizing::new(<[u8; 32]>::from(self.secret.to_bytes()));
                let pair = EcdsaKeyPair::from_private_key_and_public_key(
                    &ECDSA_P256_SHA256_FIXED_SIGNING,
                    &*scalar,
                    self.public.to_encoded_point(false).as_bytes(),
                )
                .map_err(|_| failed())?;
                self.signing.get_or_init(|| pair)
            }
        };
        let signature = pair.sign(&SystemRandom::new(), message).map_err(|_| failed())?;
        Ok(signature.as_ref().to_vec())
    }

    /// ECDH: the x coordinate of the shared point, 32 bytes.
    pub(super) fn agree(&self, public: &p256::PublicKey) -> Option<Zeroizing<Vec<u8>>> {
        let point = public.to_encoded_point(false);
        let peer = UnparsedPublicKey::new(&ECDH_P256, point.as_bytes());
        agree(&self.agreement, peer, (), |z| Ok(Zeroizing::new(z.to_vec()))).ok()
    }
}
