//! GPG simple signing: a binary OpenPGP message that holds the payload and one signature of it.
//!
//! ```text
//! [compressed {] one-pass signature, literal data, signature [}]
//! ```
//!
//! Exactly these packets, once each: a second signature or trailing data could be what another reader believes. Armor is refused, as
//! containers-signature(5) says. Only the keys of the rule's keyrings count; see [`super::gpg_key`] for when a key is good.

use std::io::{Cursor, Read as _};

use flate2::bufread::{DeflateDecoder, ZlibDecoder};
use nacre_core::Clock;
use pgp::{
    armor::Dearmor,
    composed::{Deserializable as _, SignedPublicKey},
    crypto::hash::HashAlgorithm,
    packet::{CompressedData, Packet, PacketParser, Signature, SignatureType},
    ser::Serialize as _,
    types::KeyDetails as _,
};

use super::{error::SignatureError, gpg_key, payload::SIGNATURE_LIMIT};

/// The most keys of a keyring.
const KEYS_LIMIT: usize = 1024;
/// The most packets of a keyring.
const PACKETS_LIMIT: usize = 64 * KEYS_LIMIT;

/// The public keys of a rule.
pub struct Keyring {
    keys: Vec<SignedPublicKey>,
    /// Wherever they stood: a revocation certificate that was appended to a keyring must not be lost.
    revocations: Vec<Signature>,
}

/// Who made a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpgSigner {
    /// The primary key's fingerprint, upper-case hex.
    pub fingerprint: String,
    /// The signing key's fingerprint: the same, or a subkey's.
    pub signing_key: String,
}

impl Keyring {
    /// Reads a keyring, binary or armored, as `gpg --export` writes it.
    ///
    /// # Errors
    /// What is wrong with it; a keyring without a usable key is wrong too.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let bytes = dearmor(bytes)?;
        // GnuPG's own keyrings have trust packets between the others; they are about its owner's opinion, not about the keys.
        let packets = PacketParser::new(Cursor::new(bytes.as_slice())).take(PACKETS_LIMIT);
        let packets = packets.filter(|packet| !matches!(packet, Ok(Packet::Trust(_))));
        let keys = SignedPublicKey::from_packets(packets.peekable());
        let revocations = PacketParser::new(Cursor::new(bytes.as_slice()))
            .take(PACKETS_LIMIT)
            .filter_map(|packet| match packet {
                Ok(Packet::Signature(signature)) => Some(signature),
                _ => None,
            })
            .filter(|signature| signature.typ() == Some(SignatureType::KeyRevocation))
            .collect();
        let mut usable = Vec::new();
        let mut complaint = None;
        for key in keys.take(KEYS_LIMIT + 1) {
            match key {
                Ok(key) => usable.push(key),
                // A key of a kind that we cannot use does not spoil the others.
                Err(error) => complaint = Some(error.to_string()),
            }
        }
        if usable.len() > KEYS_LIMIT {
            return Err(format!("more than {KEYS_LIMIT} keys"));
        }
        match (usable.is_empty(), complaint) {
            (false, _) => Ok(Self { keys: usable, revocations }),
            (true, Some(complaint)) => Err(format!("no usable OpenPGP key: {complaint}")),
            (true, None) => Err("no OpenPGP key in it".into()),
        }
    }

    /// Adds the keys of another keyring.
    pub fn append(&mut self, other: Self) {
        self.keys.extend(other.keys);
        self.revocations.extend(other.revocations);
    }

    /// Checks a signed message and gives what was signed, and by whom.
    ///
    /// # Errors
    /// [`SignatureError`]
    pub fn verify(&self, message: &[u8], clock: &dyn Clock) -> Result<(Vec<u8>, GpgSigner), SignatureError> {
        let SignedMessage { payload, signature } = SignedMessage::parse(message)?;
        check_hash(&signature)?;
        if signature.typ() != Some(SignatureType::Binary) {
            return Err(SignatureError::malformed("OpenPGP signature", "not over binary data"));
        }
        let mut failure = None;
        for key in &self.keys {
            for component in gpg_key::components(key) {
                if !gpg_key::names(&signature, component) {
                    continue;
                }
                match component.verify(&signature, &payload) {
                    Ok(()) => {
                        gpg_key::check(key, component, &self.revocations, clock)?;
                        gpg_key::check_signature(&signature, component, clock)?;
                        let signer = GpgSigner {
                            fingerprint: gpg_key::hex(&key.primary_key.fingerprint()),
                            signing_key: component.fingerprint(),
                        };
                        return Ok((payload, signer));
                    }
                    Err(error) => failure = Some(error),
                }
            }
        }
        Err(failure.unwrap_or_else(|| SignatureError::UnknownKey { signer: gpg_key::issuer(&signature) }))
    }
}

/// The packets of all armored blocks, or of a binary keyring as they are.
fn dearmor(bytes: &[u8]) -> Result<Vec<u8>, String> {
    const BEGIN: &str = "-----BEGIN PGP";
    const END: &str = "-----END PGP";
    if bytes.first().is_some_and(|first| first & 0x80 != 0) {
        return Ok(bytes.to_vec());
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "neither binary nor armored OpenPGP".to_owned())?;
    let mut packets = Vec::new();
    for block in text.split(BEGIN).skip(1).take(KEYS_LIMIT) {
        // People put words between the blocks, and gpg before each.
        let end = block.find(END).map_or("", |end| block.split_at(end).1);
        let tail = end.lines().next().map_or(0, str::len);
        let block = block.get(..block.len() - end.len() + tail).unwrap_or(block);
        Dearmor::new(Cursor::new(format!("{BEGIN}{block}\n")))
            .read_to_end(&mut packets)
            .map_err(|error| format!("armored OpenPGP: {:.200}", error.to_string()))?;
    }
    Ok(packets)
}

fn check_hash(signature: &Signature) -> Result<(), SignatureError> {
    match signature.hash_alg() {
        Some(
            HashAlgorithm::Sha256
            | HashAlgorithm::Sha384
            | HashAlgorithm::Sha512
            | HashAlgorithm::Sha3_256
            | HashAlgorithm::Sha3_512,
        ) => Ok(()),
        Some(other) => Err(SignatureError::WeakHash(other.to_string())),
        None => Err(SignatureError::malformed("OpenPGP signature", "of an unknown version")),
    }
}

/// A message with one signature, of which nothing was checked yet.
#[derive(Debug)]
pub struct SignedMessage {
    payload: Vec<u8>,
    signature: Signature,
}

impl SignedMessage {
    /// Takes a message apart. Pure; for fuzzing too.
    ///
    /// # Errors
    /// [`SignatureError::Malformed`]
    pub fn parse(message: &[u8]) -> Result<Self, SignatureError> {
        if message.len() > SIGNATURE_LIMIT {
            return Err(malformed(format!("larger than {SIGNATURE_LIMIT} bytes")));
        }
        match message.first() {
            None => return Err(malformed("empty")),
            Some(first) if first & 0x80 == 0 => {
                return Err(malformed("not a binary OpenPGP message (armor is not accepted)"));
            }
            Some(_) => {}
        }
        let mut packets = packets(message)?;
        if let [Packet::CompressedData(compressed)] = packets.as_slice() {
            packets = self::packets(&inflate(compressed)?)?;
        }
        let [Packet::OnePassSignature(announced), Packet::LiteralData(literal), Packet::Signature(signature)] =
            packets.as_slice()
        else {
            return Err(malformed("not exactly a one-pass signature, literal data and a signature"));
        };
        if !announced.matches(signature) {
            return Err(malformed("the signature is another one than the message announced"));
        }
        Ok(Self { payload: literal.data().to_vec(), signature: signature.clone() })
    }
}

/// Decompresses within the limit, and refuses what stands after the end of the compressed data, where nobody would look.
fn inflate(packet: &CompressedData) -> Result<Vec<u8>, SignatureError> {
    let body = packet.to_bytes().map_err(malformed)?;
    let (algorithm, mut data) = body.split_first().ok_or_else(|| malformed("empty compressed data"))?;
    let mut inner = Vec::new();
    let limit = SIGNATURE_LIMIT as u64 + 1;
    match algorithm {
        0 => inner.extend_from_slice(std::mem::take(&mut data)),
        1 => drop(DeflateDecoder::new(&mut data).take(limit).read_to_end(&mut inner).map_err(malformed)?),
        2 => drop(ZlibDecoder::new(&mut data).take(limit).read_to_end(&mut inner).map_err(malformed)?),
        other => return Err(malformed(format!("compression {other} is not supported (ZIP and ZLIB are)"))),
    }
    if inner.len() > SIGNATURE_LIMIT {
        return Err(malformed(format!("larger than {SIGNATURE_LIMIT} bytes when decompressed")));
    }
    if data.is_empty() { Ok(inner) } else { Err(malformed("something follows the compressed data")) }
}

fn packets(bytes: &[u8]) -> Result<Vec<Packet>, SignatureError> {
    const MOST: usize = 4;
    let mut packets = Vec::new();
    for packet in PacketParser::new(Cursor::new(bytes)).take(MOST) {
        packets.push(packet.map_err(malformed)?);
    }
    Ok(packets)
}

fn malformed(problem: impl std::fmt::Display) -> SignatureError {
    SignatureError::malformed("OpenPGP message", problem)
}
