//! Layers that are encrypted or decrypted while they are read.

use std::{
    fmt,
    io::{self, Read},
};

use nacre_core::Digest;

use super::{
    ANNOTATION_PREFIX, CryptError, LayerDecryptor, LayerEncryptor, LayerSecret, PublicOptions, Recipients,
    encrypted_media_type,
};
use crate::manifest::Descriptor;

/// Starts to encrypt a layer. What is encrypted already is refused, not encrypted twice: copy it as it is, or wrap its key for
/// others with [`Recipients::add_to`].
///
/// # Errors
/// [`CryptError`]: it is encrypted, no layer, or there is nobody to encrypt for.
pub fn encrypt_layer<'a, R: Read>(
    layer: &Descriptor,
    plain: R,
    recipients: &'a Recipients,
) -> Result<EncryptingReader<'a, R>, CryptError> {
    let media_type = encrypted_media_type(&layer.media_type)?;
    if recipients.is_empty() {
        return Err(CryptError::NoRecipients);
    }
    let mut layer = layer.clone();
    layer.media_type = media_type;
    layer.annotations.retain(|name, _| !name.starts_with(ANNOTATION_PREFIX));
    layer.urls.clear();
    Ok(EncryptingReader { plain, recipients, layer, encryptor: LayerEncryptor::new()?, ended: false })
}

/// Reads as the ciphertext of a layer, which is as long as the plaintext.
pub struct EncryptingReader<'a, R> {
    plain: R,
    recipients: &'a Recipients,
    layer: Descriptor,
    encryptor: LayerEncryptor,
    ended: bool,
}

impl<R> EncryptingReader<'_, R> {
    /// Wraps the key for the recipients and describes the encrypted layer, whose ciphertext was found to have `digest` and `size`.
    ///
    /// # Errors
    /// [`CryptError`]: the key could not be wrapped, or the reader was not read to its end.
    pub fn finish(self, digest: Digest, size: u64) -> Result<Descriptor, CryptError> {
        if !self.ended {
            return Err(CryptError::Unfinished);
        }
        let (secret, public) = self.encryptor.finish();
        let mut layer = self.layer;
        layer.annotations.extend(self.recipients.seal(&secret, &public)?);
        layer.digest = digest;
        layer.size = size;
        Ok(layer)
    }
}

impl<R: Read> Read for EncryptingReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.plain.read(buffer)?;
        self.ended |= count == 0 && !buffer.is_empty();
        let data =
            buffer.get_mut(..count).ok_or_else(|| io::Error::other("a reader said it read more than it was given"))?;
        self.encryptor.update(data).map_err(io::Error::other)?;
        Ok(count)
    }
}

impl<R> fmt::Debug for EncryptingReader<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EncryptingReader").field("layer", &self.layer.media_type).finish_non_exhaustive()
    }
}

/// Reads as the plaintext of a layer. Its end comes only if the layer was authentic; before it, nothing that was read is to be
/// believed. Errors of the check are [`CryptError`]s within the `io::Error`.
pub struct DecryptingReader<R> {
    ciphertext: R,
    state: State,
}

enum State {
    Reading(Box<LayerDecryptor>),
    Ended,
    Failed,
}

impl<R: Read> DecryptingReader<R> {
    /// Starts to decrypt. `diff_id` is the digest of the uncompressed tar, where the caller checks that
    /// (see [`LayerDecryptor::with_diff_id`]).
    ///
    /// # Errors
    /// [`CryptError`]: the annotations of the layer are malformed.
    pub fn new(
        layer: &Descriptor,
        ciphertext: R,
        secret: &LayerSecret,
        diff_id: Option<&Digest>,
    ) -> Result<Self, CryptError> {
        let mut decryptor = secret.decryptor(&PublicOptions::of(layer)?)?;
        if let Some(diff_id) = diff_id {
            decryptor = decryptor.with_diff_id(diff_id);
        }
        Ok(Self { ciphertext, state: State::Reading(Box::new(decryptor)) })
    }
}

impl<R: Read> Read for DecryptingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        match &mut self.state {
            State::Ended => return Ok(0),
            State::Failed => return Err(io::Error::other("the layer failed its check before")),
            State::Reading(decryptor) => {
                let count = self.ciphertext.read(buffer)?;
                if count > 0 {
                    let data = buffer
                        .get_mut(..count)
                        .ok_or_else(|| io::Error::other("a reader said it read more than it was given"))?;
                    decryptor.update(data).map_err(io::Error::other)?;
                    return Ok(count);
                }
            }
        }
        if let State::Reading(decryptor) = std::mem::replace(&mut self.state, State::Failed) {
            decryptor.finish().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.state = State::Ended;
        }
        Ok(0)
    }
}

impl<R> fmt::Debug for DecryptingReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DecryptingReader(…)")
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::{SecretBytes, jose::PrivateKey};

    use super::*;
    use crate::{
        crypt::{Keyring, is_encrypted, strip_encryption},
        manifest::media,
    };

    fn encrypted(plain: &[u8]) -> (Descriptor, Vec<u8>, Keyring) {
        let key = PrivateKey::generate_p256();
        let mut recipients = Recipients::new();
        recipients.add_public_key(key.public());
        let mut layer = Descriptor::of(media::OCI_LAYER, plain);
        layer.annotations.insert("org.example.mine".into(), "kept".into());
        let mut reader = encrypt_layer(&layer, plain, &recipients).unwrap();
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        let layer = reader.finish(Digest::sha256(&data), data.len() as u64).unwrap();
        let mut ring = Keyring::new();
        let pem = SecretBytes::new(key.to_pkcs8_pem().unwrap().as_bytes().to_vec());
        ring.add_key_file(pem.expose(), None).unwrap();
        (layer, data, ring)
    }

    fn decrypt(layer: &Descriptor, data: &[u8], ring: &Keyring) -> io::Result<Vec<u8>> {
        let secret = ring.unwrap(layer).unwrap();
        let mut reader = DecryptingReader::new(layer, data, &secret, None).unwrap();
        let mut plain = Vec::new();
        let ended = reader.read_to_end(&mut plain);
        assert_eq!(ended.is_err(), reader.read(&mut [0; 4]).is_err(), "an end stays an end, a failure a failure");
        ended.map(|_| plain)
    }

    #[test]
    fn what_is_encrypted_while_it_is_read_decrypts_while_it_is_read() {
        for length in [0, 1, 100_000] {
            let plain = vec![7; length];
            let (layer, data, ring) = encrypted(&plain);
            assert!(is_encrypted(&layer));
            assert_eq!(decrypt(&layer, &data, &ring).unwrap(), plain);
            assert_eq!(strip_encryption(&layer).unwrap().annotations.len(), 1);
        }
    }

    #[test]
    fn a_changed_last_byte_is_an_error_instead_of_the_end() {
        let (layer, mut data, ring) = encrypted(&vec![7; 100_000]);
        *data.last_mut().unwrap() ^= 1;
        let error = decrypt(&layer, &data, &ring).unwrap_err();
        assert!(matches!(error.get_ref().unwrap().downcast_ref(), Some(CryptError::Mac)), "{error}");
        data.pop();
        decrypt(&layer, &data, &ring).unwrap_err();
    }

    #[test]
    fn nothing_is_encrypted_twice_half_or_for_nobody() {
        let (layer, data, _) = encrypted(b"plain");
        let mut recipients = Recipients::new();
        let nobody = encrypt_layer(&Descriptor::of(media::OCI_LAYER, b""), &b""[..], &recipients);
        assert!(matches!(nobody, Err(CryptError::NoRecipients)));
        recipients.add_public_key(PrivateKey::generate_p256().public());
        let twice = encrypt_layer(&layer, data.as_slice(), &recipients);
        assert!(matches!(twice, Err(CryptError::AlreadyEncrypted(_))));
        let half = encrypt_layer(&Descriptor::of(media::OCI_LAYER, b"plain"), &b"plain"[..], &recipients).unwrap();
        assert!(matches!(half.finish(Digest::sha256(b""), 0), Err(CryptError::Unfinished)));
    }

    #[test]
    fn recipients_can_be_added_to_an_encrypted_layer() {
        let (mut layer, data, ring) = encrypted(b"plain");
        let late = PrivateKey::generate_p384();
        let mut recipients = Recipients::new();
        recipients.add_public_key(late.public());
        let secret = ring.unwrap(&layer).unwrap();
        recipients.add_to(&mut layer.annotations, &secret).unwrap();
        let mut late_ring = Keyring::new();
        late_ring.add_key_file(late.to_pkcs8_pem().unwrap().as_bytes(), None).unwrap();
        for ring in [ring, late_ring] {
            assert_eq!(decrypt(&layer, &data, &ring).unwrap(), b"plain");
        }
    }
}
