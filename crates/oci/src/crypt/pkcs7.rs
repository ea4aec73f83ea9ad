//! Keys wrapped as CMS EnvelopedData (RFC 5652) the way ocicrypt's Go library writes it.
//!
//! ```text
//! ContentInfo    { 1.2.840.113549.1.7.3, [0] EnvelopedData }
//! EnvelopedData  { 0, SET OF { 0, { issuer, serial }, { rsaEncryption }, key },
//!                  { data, { aes128-GCM, primitive SEQUENCE { { [4] nonce, 16 } } }, [0] { OCTET STRING ciphertext ‖ tag } } }
//! ```
//!
//! Three quirks of it: the cipher's parameters lie in a sequence too many, which is marked primitive; the nonce has the context tag 4
//! where RFC 5084 has an OCTET STRING; the content is constructed. Both forms of each are read; its own are written, since it reads
//! no others.
//!
//! The key transport is PKCS #1 v1.5, done by aws-lc-rs in constant time. A padding that is wrong is not told from a content that does
//! not authenticate: an attacker who may ask often must not get Bleichenbacher's oracle. Unauthenticated ciphers (CBC) are refused.

use aws_lc_rs::{
    aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey},
    rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPrivateDecryptingKey},
    rsa::{Pkcs1PrivateDecryptingKey, Pkcs1PublicEncryptingKey},
};
use nacre_core::{
    SecretArray, SecretBytes,
    jose::{PrivateKey, PublicKey},
};
use rand_core::{OsRng, RngCore as _};
use zeroize::Zeroizing;

use super::{
    SchemeError,
    der::{INTEGER, OCTET_STRING, OID, Reader, SEQUENCE, SET, element},
};

/// The most bytes of a packet.
pub const PACKET_LIMIT: usize = 1 << 20;
/// The most recipients of a packet: each may cost a private key operation.
pub const RECIPIENT_LIMIT: usize = 1024;

const CONTEXT_0: u8 = 0xa0;
const CONTEXT_0_PRIMITIVE: u8 = 0x80;
const CONTEXT_4: u8 = 0x84;
const NULL: u8 = 0x05;
const SEQUENCE_PRIMITIVE: u8 = 0x10;
const ENVELOPED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x03];
const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01];
const RSA_ENCRYPTION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const RSAES_OAEP: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x07];
const SHA256: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
const AES_128_GCM_OID: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01, 0x06];
const AES_256_GCM_OID: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01, 0x2e];
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
const WRITTEN_KEY_LEN: usize = 16;

/// A certificate, as far as it says for whom a packet is.
#[derive(Clone)]
pub struct Certificate {
    /// The issuer's name and the serial number, both as DER elements.
    issuer_and_serial: Vec<u8>,
    key: PublicKey,
}

impl Certificate {
    /// Reads a DER certificate with an RSA key. Nothing of it is verified: it is the user's own choice of whom to encrypt for.
    ///
    /// # Errors
    /// [`SchemeError`]: no certificate, or another kind of key.
    pub fn from_der(der: &[u8]) -> Result<Self, SchemeError> {
        let key =
            PublicKey::from_bytes(der).map_err(|error| SchemeError::malformed(format!("the certificate: {error}")))?;
        if !matches!(key, PublicKey::Rsa(_)) {
            return Err(SchemeError::Unsupported(format!(
                "a certificate of a key of the kind {}: PKCS#7 takes RSA",
                key.kind()
            )));
        }
        let issuer_and_serial =
            issuer_and_serial(der).ok_or_else(|| SchemeError::malformed("it is no X.509 certificate"))?;
        Ok(Self { issuer_and_serial, key })
    }
}

/// Skips to the names: version `[0]`, serial, signature algorithm, issuer.
fn issuer_and_serial(der: &[u8]) -> Option<Vec<u8>> {
    let mut body = Reader::new(der).within(SEQUENCE)?.within(SEQUENCE)?;
    if body.peek()? == CONTEXT_0 {
        body.any()?;
    }
    let serial = body.whole()?;
    body.take(SEQUENCE)?;
    let issuer = body.whole()?;
    Some([issuer, serial].concat())
}

/// A packet, parsed.
pub struct Packet<'a> {
    recipients: Vec<Recipient<'a>>,
    algorithm: &'static Algorithm,
    nonce: [u8; NONCE_LEN],
    content: Vec<u8>,
}

struct Recipient<'a> {
    issuer_and_serial: &'a [u8],
    transport: Transport,
    key: &'a [u8],
}

#[derive(Clone, Copy)]
enum Transport {
    Pkcs1,
    Oaep(&'static OaepAlgorithm),
    /// Of a kind that we do not do; another recipient of the packet may be ours.
    Unknown,
}

impl<'a> Packet<'a> {
    /// Parses the DER.
    ///
    /// # Errors
    /// [`SchemeError`]: malformed, or another cipher.
    pub fn parse(der: &'a [u8]) -> Result<Self, SchemeError> {
        if der.len() > PACKET_LIMIT {
            return Err(SchemeError::malformed(format!(
                "it has {} bytes; at most {PACKET_LIMIT} are allowed",
                der.len()
            )));
        }
        let malformed = || SchemeError::malformed("it is not CMS EnvelopedData in DER");
        let mut outer = Reader::new(der);
        let mut info = outer.within(SEQUENCE).ok_or_else(malformed)?;
        if !outer.is_empty() || info.take(OID).ok_or_else(malformed)? != ENVELOPED_DATA {
            return Err(malformed());
        }
        let mut enveloped =
            info.within(CONTEXT_0).and_then(|mut explicit| explicit.within(SEQUENCE)).ok_or_else(malformed)?;
        enveloped.number().ok_or_else(malformed)?;
        if enveloped.peek() == Some(CONTEXT_0) {
            // originatorInfo, which says nothing that we need.
            enveloped.any();
        }
        let recipients = recipients(enveloped.within(SET).ok_or_else(malformed)?)?;
        let mut content = enveloped.within(SEQUENCE).ok_or_else(malformed)?;
        content.take(OID).ok_or_else(malformed)?;
        let (algorithm, nonce) = cipher(content.within(SEQUENCE).ok_or_else(malformed)?)?;
        let content = match content.any().ok_or_else(malformed)? {
            (CONTEXT_0_PRIMITIVE, bytes) => bytes.to_vec(),
            (CONTEXT_0, parts) => strings(Reader::new(parts)).ok_or_else(malformed)?,
            _ => return Err(malformed()),
        };
        Ok(Self { recipients, algorithm, nonce, content })
    }

    /// Opens the packet with the keys at hand. With certificates, only what is for one of them is tried; without, all of it.
    ///
    /// # Errors
    /// [`SchemeError::NotForUs`]
    pub fn open(&self, keys: &[PrivateKey], certificates: &[Certificate]) -> Result<SecretBytes, SchemeError> {
        let ours = |recipient: &&Recipient<'_>| {
            certificates.is_empty() || certificates.iter().any(|c| c.issuer_and_serial == recipient.issuer_and_serial)
        };
        for recipient in self.recipients.iter().filter(ours) {
            for key in keys {
                if let Some(plain) = self.transport(recipient, key).and_then(|key| self.decrypt(&key)) {
                    return Ok(plain);
                }
            }
        }
        Err(SchemeError::NotForUs(keys.iter().filter(|key| matches!(key, PrivateKey::Rsa(_))).count()))
    }

    /// The content key; a random one where the padding was wrong, so that this is found out by the content, if at all.
    fn transport(&self, recipient: &Recipient<'_>, key: &PrivateKey) -> Option<SecretBytes> {
        let PrivateKey::Rsa(key) = key else { return None };
        let key = key.decrypting_key().clone();
        if recipient.key.len() != key.key_size_bytes() {
            return None;
        }
        let length = self.algorithm.key_len();
        let mut out = Zeroizing::new(vec![0; key.key_size_bytes()]);
        let found = match recipient.transport {
            Transport::Pkcs1 => {
                let key = Pkcs1PrivateDecryptingKey::new(key).ok()?;
                key.decrypt(recipient.key, &mut out).ok().map(|plain| plain.len())
            }
            Transport::Oaep(algorithm) => {
                let key = OaepPrivateDecryptingKey::new(key).ok()?;
                key.decrypt(algorithm, recipient.key, &mut out, None).ok().map(|plain| plain.len())
            }
            Transport::Unknown => return None,
        };
        out.truncate(length);
        if found != Some(length) {
            OsRng.fill_bytes(&mut out);
        }
        Some(SecretBytes::new(std::mem::take(&mut *out)))
    }

    fn decrypt(&self, key: &SecretBytes) -> Option<SecretBytes> {
        let key = LessSafeKey::new(UnboundKey::new(self.algorithm, key.expose()).ok()?);
        let mut data = Zeroizing::new(self.content.clone());
        let plain = key.open_in_place(Nonce::assume_unique_for_key(self.nonce), Aad::empty(), &mut data).ok()?;
        Some(SecretBytes::new(plain.to_vec()))
    }
}

fn recipients(mut set: Reader<'_>) -> Result<Vec<Recipient<'_>>, SchemeError> {
    let mut found = Vec::new();
    while !set.is_empty() {
        if found.len() == RECIPIENT_LIMIT {
            return Err(SchemeError::malformed(format!("it has more than {RECIPIENT_LIMIT} recipients")));
        }
        // Other kinds of recipients than those of key transport have context tags.
        let (tag, content) = set.any().ok_or_else(|| SchemeError::malformed("a recipient is not DER"))?;
        if tag == SEQUENCE {
            found.push(
                recipient(Reader::new(content)).ok_or_else(|| SchemeError::malformed("a recipient is malformed"))?,
            );
        }
    }
    Ok(found)
}

fn recipient(mut fields: Reader<'_>) -> Option<Recipient<'_>> {
    fields.number()?;
    // A subject key identifier ([0]) matches no certificate here; it is tried where no certificate was given.
    let (tag, id) = fields.any()?;
    let mut algorithm = fields.within(SEQUENCE)?;
    let transport = match algorithm.take(OID)? {
        RSA_ENCRYPTION => Transport::Pkcs1,
        RSAES_OAEP => oaep(algorithm).map_or(Transport::Unknown, Transport::Oaep),
        _ => Transport::Unknown,
    };
    let key = fields.take(OCTET_STRING)?;
    Some(Recipient { issuer_and_serial: if tag == SEQUENCE { id } else { &[] }, transport, key })
}

/// `RSAES-OAEP-params`: SHA-1 throughout where they are absent or empty; SHA-256 throughout; no other mix.
fn oaep(mut algorithm: Reader<'_>) -> Option<&'static OaepAlgorithm> {
    if algorithm.is_empty() || algorithm.peek() == Some(NULL) {
        return Some(&OAEP_SHA1_MGF1SHA1);
    }
    let mut parameters = algorithm.within(SEQUENCE)?;
    if parameters.is_empty() {
        return Some(&OAEP_SHA1_MGF1SHA1);
    }
    let hash = parameters.within(0xa0)?.within(SEQUENCE)?.take(OID)?;
    let mut mask = parameters.within(0xa1)?.within(SEQUENCE)?;
    mask.take(OID)?;
    let mask = mask.within(SEQUENCE)?.take(OID)?;
    (hash == SHA256 && mask == SHA256 && parameters.is_empty()).then_some(&OAEP_SHA256_MGF1SHA256)
}

fn cipher(mut algorithm: Reader<'_>) -> Result<(&'static Algorithm, [u8; NONCE_LEN]), SchemeError> {
    let malformed = || SchemeError::malformed("its cipher's parameters are malformed");
    let cipher = match algorithm.take(OID).ok_or_else(malformed)? {
        AES_128_GCM_OID => &AES_128_GCM,
        AES_256_GCM_OID => &AES_256_GCM,
        _ => return Err(SchemeError::Unsupported("a content cipher other than AES-GCM".into())),
    };
    if algorithm.peek() == Some(SEQUENCE_PRIMITIVE) {
        algorithm = algorithm.within(SEQUENCE_PRIMITIVE).ok_or_else(malformed)?;
    }
    let mut parameters = algorithm.within(SEQUENCE).ok_or_else(malformed)?;
    let nonce = match parameters.any() {
        Some((CONTEXT_4 | OCTET_STRING, nonce)) => nonce.try_into().map_err(|_| malformed())?,
        _ => return Err(malformed()),
    };
    // RFC 5084: a tag of twelve bytes where none is said. Short tags are easier to forge.
    if parameters.number() != Some(TAG_LEN as u64) {
        return Err(SchemeError::Unsupported("an AES-GCM tag of other than 16 bytes".into()));
    }
    Ok((cipher, nonce))
}

/// The strings that a constructed string is made of.
fn strings(mut parts: Reader<'_>) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    while !parts.is_empty() {
        whole.extend_from_slice(parts.take(OCTET_STRING)?);
    }
    Some(whole)
}

/// Wraps a PRIV document for all recipients in one packet.
///
/// # Errors
/// [`SchemeError::Library`]
pub fn wrap(private: &SecretBytes, recipients: &[Certificate]) -> Result<Vec<u8>, SchemeError> {
    let key = SecretArray::<WRITTEN_KEY_LEN>::random();
    let mut set = Vec::new();
    for certificate in recipients {
        set.push(recipient_info(certificate, &key)?);
    }
    // DER sorts the elements of a set.
    set.sort();
    let set: Vec<&[u8]> = set.iter().map(Vec::as_slice).collect();

    let mut nonce = [0; NONCE_LEN];
    OsRng.fill_bytes(&mut nonce);
    let failed = |_| SchemeError::Library("AES-128-GCM");
    let gcm = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key.expose()).map_err(failed)?);
    let mut data = Zeroizing::new(Vec::with_capacity(private.len() + TAG_LEN));
    data.extend_from_slice(private.expose());
    gcm.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut *data).map_err(failed)?;

    let parameters = element(SEQUENCE, &[&element(CONTEXT_4, &[&nonce]), &element(INTEGER, &[&[16]])]);
    let algorithm =
        element(SEQUENCE, &[&element(OID, &[AES_128_GCM_OID]), &element(SEQUENCE_PRIMITIVE, &[&parameters])]);
    let content = element(CONTEXT_0, &[&element(OCTET_STRING, &[&data])]);
    let content = element(SEQUENCE, &[&element(OID, &[DATA]), &algorithm, &content]);
    let enveloped = element(SEQUENCE, &[&element(INTEGER, &[&[0]]), &element(SET, &set), &content]);
    Ok(element(SEQUENCE, &[&element(OID, &[ENVELOPED_DATA]), &element(CONTEXT_0, &[&enveloped])]))
}

fn recipient_info(certificate: &Certificate, key: &SecretArray<WRITTEN_KEY_LEN>) -> Result<Vec<u8>, SchemeError> {
    let failed = || SchemeError::Library("RSA key transport");
    let PublicKey::Rsa(public) = &certificate.key else { return Err(failed()) };
    let public = public.encrypting_key().map_err(|_| failed())?;
    let public = Pkcs1PublicEncryptingKey::new(public).map_err(|_| failed())?;
    let mut wrapped = vec![0; public.ciphertext_size()];
    let length = public.encrypt(key.expose(), &mut wrapped).map_err(|_| failed())?.len();
    wrapped.truncate(length);
    Ok(element(
        SEQUENCE,
        &[
            &element(INTEGER, &[&[0]]),
            &element(SEQUENCE, &[&certificate.issuer_and_serial]),
            // Peers write no parameters; they compare the identifier alone.
            &element(SEQUENCE, &[&element(OID, &[RSA_ENCRYPTION])]),
            &element(OCTET_STRING, &[&wrapped]),
        ],
    ))
}
