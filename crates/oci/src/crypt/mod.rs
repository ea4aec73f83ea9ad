//! Layer encryption as ocicrypt does it, both ways.
//!
//! A layer is encrypted with a key of its own, AES-256-CTR then HMAC-SHA256 ([`cipher`]); that key, in a small JSON document, is
//! wrapped for each recipient into annotations of the layer's descriptor. The formats are in `docs/formats/encrypted-layers.md`.
//!
//! Invariants: the MAC is known to hold only at the end of the stream, so whatever was unpacked before
//! [`LayerDecryptor::finish`] is not to become visible; a wrapped key is only ever opened by the scheme, and the provider,
//! that its annotation names.

pub mod annotations;
pub mod args;
pub mod cipher;
pub mod coco;
mod der;
mod error;
mod jwe;
mod keyfile;
mod keyring;
pub mod pgp;
pub mod pkcs11;
pub mod pkcs7;
pub mod provider;
mod reader;
mod recipients;

pub use cipher::{LayerDecryptor, LayerEncryptor, LayerParts, LayerSecret, PublicOptions};
pub use error::{Attempt, CryptError, SchemeError};
pub use keyring::Keyring;
pub use reader::{DecryptingReader, EncryptingReader, encrypt_layer};
pub use recipients::Recipients;

use crate::manifest::{Compression, Descriptor, LayerType, ManifestError, media};

/// What encryption appends to a layer's media type.
pub const ENCRYPTED_SUFFIX: &str = "+encrypted";
/// The annotation that holds the public options.
pub const PUBOPTS_ANNOTATION: &str = "org.opencontainers.image.enc.pubopts";
/// What the annotations of all wrapped keys start with; the scheme follows.
pub const KEYS_ANNOTATION_PREFIX: &str = "org.opencontainers.image.enc.keys.";
/// What all annotations of encryption start with; a decrypted layer has none of them.
pub const ANNOTATION_PREFIX: &str = "org.opencontainers.image.enc.";

/// Whether a layer's media type says that it is encrypted.
pub fn is_encrypted(descriptor: &Descriptor) -> bool {
    descriptor.media_type.ends_with(ENCRYPTED_SUFFIX)
}

/// The media type of a layer after encryption. Docker's types become OCI's, since only those have encrypted forms.
///
/// # Errors
/// [`CryptError::AlreadyEncrypted`], or [`CryptError::NotALayer`]
pub fn encrypted_media_type(media_type: &str) -> Result<String, CryptError> {
    let kind = LayerType::parse(media_type).map_err(|source| not_a_layer(media_type, source))?;
    if kind.encrypted {
        return Err(CryptError::AlreadyEncrypted(media_type.into()));
    }
    if media_type.starts_with(media::OCI_LAYER) || media_type.starts_with(media::OCI_LAYER_NONDISTRIBUTABLE) {
        return Ok(format!("{media_type}{ENCRYPTED_SUFFIX}"));
    }
    let compression = match kind.compression {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    Ok(format!("{}{compression}{ENCRYPTED_SUFFIX}", media::OCI_LAYER))
}

/// The descriptor's media type and annotations after decryption; digest and size are still those of the ciphertext.
///
/// # Errors
/// [`CryptError::NotEncrypted`]
pub fn strip_encryption(descriptor: &Descriptor) -> Result<Descriptor, CryptError> {
    let Some(media_type) = descriptor.media_type.strip_suffix(ENCRYPTED_SUFFIX) else {
        return Err(CryptError::NotEncrypted(descriptor.media_type.clone()));
    };
    let mut plain = descriptor.clone();
    plain.media_type = media_type.into();
    plain.annotations.retain(|name, _| !name.starts_with(ANNOTATION_PREFIX));
    Ok(plain)
}

fn not_a_layer(media_type: &str, source: ManifestError) -> CryptError {
    CryptError::NotALayer { media_type: media_type.chars().take(200).collect(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_gain_and_lose_the_suffix() {
        for (plain, encrypted) in [
            (media::OCI_LAYER, "application/vnd.oci.image.layer.v1.tar+encrypted"),
            ("application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
            ("application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.layer.v1.tar+zstd+encrypted"),
            (
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip+encrypted",
            ),
            (media::DOCKER_LAYER_GZIP, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
        ] {
            assert_eq!(encrypted_media_type(plain).unwrap(), encrypted);
            assert!(LayerType::parse(encrypted).unwrap().encrypted);
            assert!(matches!(encrypted_media_type(encrypted), Err(CryptError::AlreadyEncrypted(_))));
        }
        assert!(matches!(encrypted_media_type("text/plain"), Err(CryptError::NotALayer { .. })));

        let mut layer = Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", b"");
        assert!(is_encrypted(&layer));
        layer.annotations.insert(PUBOPTS_ANNOTATION.into(), "x".into());
        layer.annotations.insert("org.example.mine".into(), "y".into());
        let plain = strip_encryption(&layer).unwrap();
        assert_eq!(plain.media_type, "application/vnd.oci.image.layer.v1.tar+gzip");
        assert_eq!(plain.annotations.into_keys().collect::<Vec<_>>(), ["org.example.mine"]);
        layer.media_type = media::OCI_LAYER.into();
        assert!(matches!(strip_encryption(&layer), Err(CryptError::NotEncrypted(_))));
    }
}
