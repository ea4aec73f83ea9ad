//! Keys of a lazy image, and what each is for.
//!
//! A *domain secret* belongs to whoever builds, and to nobody who reads: it makes each chunk's key from the chunk's own content,
//! so that equal content of one domain is stored once. Whoever reads has the *metadata key*, which opens the metadata and the
//! table, and finds the keys of the image's own chunks there. So a guest that was broken into knows what is in its image, and
//! can test no guess about another's.
//!
//! Nonces: a chunk's key seals one payload, since it is made of that payload's digest, so its nonce is zero. The metadata key is
//! made of the digest of all that it seals, and frames and leaves are counted; with a trace, an image has a key of its own.

use nacre_core::{SecretArray, aead::NONCE_LEN};
use ring::hmac;

use crate::format::{DIGEST, Method};

/// What equal content is recognised by: all images that were built with one secret share chunks.
pub struct Domain(hmac::Key);

/// Opens the metadata and the table of one image.
pub struct MetadataKey(SecretArray<32>);

impl Domain {
    /// The domain of a secret.
    pub fn new(secret: &SecretArray<32>) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.expose()))
    }

    /// A domain of its own, for one build: nothing is shared with any other image, and nothing can be compared.
    pub fn random() -> Self {
        Self::new(&SecretArray::random())
    }

    /// The key of a chunk whose payload, as it is sealed, has this SHA-256.
    pub(crate) fn chunk_key(&self, method: Method, payload: &[u8; DIGEST]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(b"nacre lazy 1 chunk");
        context.update(&[method.code()]);
        context.update(payload);
        into_array(&context.sign())
    }

    /// The key of an image whose metadata stream and table have these SHA-256s. What the compressor makes of equal streams may differ by its
    /// version and its level: those are a part of it, since a key and a nonce are for one message.
    #[cfg(feature = "build")]
    pub(crate) fn metadata_key(&self, stream: &[u8; DIGEST], table: &[u8; DIGEST]) -> MetadataKey {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(b"nacre lazy 1 metadata");
        compressor(&mut context);
        context.update(stream);
        context.update(table);
        let tag = context.sign();
        MetadataKey(SecretArray::fill(|slot| slot.copy_from_slice(tag.as_ref())))
    }

    /// What content-defined cuts depend on beside the content, so that the sizes of chunks tell nothing to who knows the content.
    #[cfg(feature = "build")]
    pub(crate) fn cut_seed(&self) -> u64 {
        let tag = hmac::sign(&self.0, b"nacre lazy 1 cuts");
        let mut seed = [0; 8];
        seed.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(seed)
    }
}

/// What frames depend on beside what is in them.
#[cfg(feature = "build")]
fn compressor(context: &mut hmac::Context) {
    context.update(&zstd::zstd_safe::version_number().to_le_bytes());
    context.update(&crate::build::metadata::LEVEL.to_le_bytes());
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Domain(…)")
    }
}

impl MetadataKey {
    /// A key that was unwrapped.
    pub fn new(key: SecretArray<32>) -> Self {
        Self(key)
    }

    /// The key, to be wrapped for recipients.
    pub fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }

    /// The key of the same image with a trace of this SHA-256; of the compressor as well, as [`Domain::metadata_key`] is.
    #[cfg(feature = "build")]
    pub(crate) fn traced(&self, trace: &[u8; DIGEST]) -> Self {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, self.0.expose()));
        context.update(b"nacre lazy 1 trace");
        compressor(&mut context);
        context.update(trace);
        let tag = context.sign();
        Self(SecretArray::fill(|slot| slot.copy_from_slice(tag.as_ref())))
    }

    /// The key of frames, or of leaves.
    pub(crate) fn derive(&self, part: Part) -> SecretArray<32> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.0.expose());
        let label: &[u8] = match part {
            Part::Frames => b"nacre lazy 1 frames",
            Part::Leaves => b"nacre lazy 1 leaves",
            Part::Windows => b"nacre lazy 1 windows",
        };
        let tag = hmac::sign(&key, label);
        SecretArray::fill(|slot| slot.copy_from_slice(tag.as_ref()))
    }
}

impl std::fmt::Debug for MetadataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetadataKey(…)")
    }
}

/// What a derived key seals.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Frames,
    Leaves,
    /// Windows of an index.
    Windows,
}

/// The nonce of a frame or a leaf: its number.
pub(crate) fn counter(number: u64) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&number.to_be_bytes());
    nonce
}

fn into_array(tag: &hmac::Tag) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(tag.as_ref());
    bytes
}

#[cfg(all(test, feature = "build"))]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_domain_content_and_purpose() {
        let secret = |byte| SecretArray::<32>::fill(|slot| slot.fill(byte));
        let (a, b) = (Domain::new(&secret(1)), Domain::new(&secret(2)));
        let keys = [
            a.chunk_key(Method::Raw, &[1; 32]),
            a.chunk_key(Method::Zstd, &[1; 32]),
            a.chunk_key(Method::Raw, &[2; 32]),
            b.chunk_key(Method::Raw, &[1; 32]),
            *a.metadata_key(&[1; 32], &[2; 32]).expose(),
            *a.metadata_key(&[2; 32], &[1; 32]).expose(),
            *a.metadata_key(&[1; 32], &[2; 32]).derive(Part::Frames).expose(),
            *a.metadata_key(&[1; 32], &[2; 32]).derive(Part::Leaves).expose(),
            *a.metadata_key(&[1; 32], &[2; 32]).traced(&[3; 32]).expose(),
            *a.metadata_key(&[1; 32], &[2; 32]).traced(&[4; 32]).expose(),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[..at].contains(key));
        }
        assert_eq!(a.chunk_key(Method::Raw, &[1; 32]), Domain::new(&secret(1)).chunk_key(Method::Raw, &[1; 32]));
        assert_ne!(a.cut_seed(), b.cut_seed());
        assert_ne!(Domain::random().cut_seed(), Domain::random().cut_seed());
        assert_eq!(format!("{a:?} {:?}", MetadataKey::new(secret(7))), "Domain(…) MetadataKey(…)");
    }
}
