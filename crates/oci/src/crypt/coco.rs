//! Keys wrapped with a key that a broker holds: the packet of Confidential Containers' attestation agent, opened and made in process.
//!
//! ```text
//! v1  {"kid":"kbs:///repo/type/tag","wrapped_data":b64,"iv":b64,"wrap_type":"A256GCM"|"A256CTR"}
//! v2  the same and "version":"0.1.0", "provider":"kbs", "provider_settings":{}, "annotations":{}
//! ```
//!
//! A256GCM: `wrapped_data` is ciphertext ‖ 16-byte tag, the iv has 12 bytes, no associated data, a 32-byte key. A256CTR is read for old
//! images and never written: it authenticates nothing by itself; the layer's own MAC and digest then carry all of it.
//!
//! Nonce rule: random 96-bit ivs, so a key-encryption key is good for 2^32 layers.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{KeySource, ResourceUri, SecretArray, SecretBytes, aead};
use rand_core::{OsRng, RngCore as _};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{SchemeError, cipher};

/// The provider's name in the annotation.
pub const PROVIDER: &str = "attestation-agent";
/// The most bytes of a packet.
pub const PACKET_LIMIT: usize = 256 << 10;

const VERSION: &str = "0.1.0";

/// A packet, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    kid: ResourceUri,
    wrapped: Vec<u8>,
    iv: Iv,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Iv {
    Gcm([u8; aead::NONCE_LEN]),
    Ctr([u8; 16]),
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    provider: Option<String>,
    kid: String,
    wrapped_data: String,
    #[serde(default)]
    iv: Option<String>,
    #[serde(default)]
    wrap_type: Option<String>,
}

#[derive(Serialize)]
struct WrittenDocument<'a> {
    kid: &'a ResourceUri,
    wrapped_data: String,
    iv: String,
    wrap_type: &'static str,
}

impl Packet {
    /// Parses a packet of either version.
    ///
    /// # Errors
    /// [`SchemeError`]: malformed, or another provider, version or algorithm.
    pub fn parse(json: &[u8]) -> Result<Self, SchemeError> {
        if json.len() > PACKET_LIMIT {
            let problem = format!("it has {} bytes; at most {PACKET_LIMIT} are allowed", json.len());
            return Err(SchemeError::malformed(problem));
        }
        let document: Document = serde_json::from_slice(json)
            .map_err(|error| SchemeError::malformed(format!("it is not valid JSON: {error}")))?;
        if let Some(version) = document.version.filter(|version| version != VERSION) {
            return Err(SchemeError::Unsupported(format!("packet version '{version:.60}'")));
        }
        if let Some(provider) = document.provider.filter(|provider| provider != "kbs") {
            return Err(SchemeError::Unsupported(format!("the key management service '{provider:.60}'")));
        }
        let wrapped = STANDARD
            .decode(&document.wrapped_data)
            .map_err(|error| SchemeError::malformed(format!("wrapped_data is not base64: {error}")))?;
        let iv = document.iv.ok_or_else(|| SchemeError::malformed("it has no iv"))?;
        let iv = STANDARD.decode(&iv).map_err(|error| SchemeError::malformed(format!("iv is not base64: {error}")))?;
        let length = iv.len();
        let wrong_length = |_| SchemeError::malformed(format!("the iv has {length} bytes"));
        let iv = match document.wrap_type.as_deref() {
            Some("A256GCM") => Iv::Gcm(iv.try_into().map_err(wrong_length)?),
            Some("A256CTR") => Iv::Ctr(iv.try_into().map_err(wrong_length)?),
            Some(other) => return Err(SchemeError::Unsupported(format!("wrap_type '{other:.60}'"))),
            None => return Err(SchemeError::malformed("it has no wrap_type")),
        };
        let kid = document.kid.parse().map_err(SchemeError::KeyName)?;
        Ok(Self { kid, wrapped, iv })
    }

    /// The name of the key-encryption key.
    pub fn key_id(&self) -> &ResourceUri {
        &self.kid
    }

    /// Has the key-encryption key released and opens the packet with it.
    ///
    /// # Errors
    /// [`SchemeError`]: the key is refused or has a wrong length, or it does not open the packet.
    pub fn unwrap(&self, source: &dyn KeySource) -> Result<SecretBytes, SchemeError> {
        let key = source.fetch(&self.kid).map_err(SchemeError::KeySource)?;
        let found = key.len();
        let key = key.to_array().ok_or_else(|| SchemeError::KeyLength { uri: self.kid.clone(), found })?;
        self.open(&key)
    }

    /// Opens the packet with the key-encryption key.
    ///
    /// # Errors
    /// [`SchemeError::NotForUs`]
    pub fn open(&self, key: &SecretArray<32>) -> Result<SecretBytes, SchemeError> {
        let mut data = Zeroizing::new(self.wrapped.clone());
        match &self.iv {
            Iv::Gcm(iv) => {
                let opened = aead::AeadKey::new(key).open(*iv, b"", &mut data).map_err(|_| SchemeError::NotForUs(1))?;
                Ok(SecretBytes::new(opened.to_vec()))
            }
            Iv::Ctr(iv) => {
                cipher::apply_ctr(key, *iv, &mut data).map_err(|_| SchemeError::Library("AES-256-CTR"))?;
                Ok(SecretBytes::new(data.to_vec()))
            }
        }
    }
}

/// Wraps a PRIV document with the key-encryption key that `kid` names, as A256GCM in a packet of version 1, which all readers know.
pub fn wrap(kid: &ResourceUri, key: &SecretArray<32>, private: &SecretBytes) -> Vec<u8> {
    let mut iv = [0; aead::NONCE_LEN];
    OsRng.fill_bytes(&mut iv);
    // With room for the tag, so that the plaintext is not left behind where a smaller allocation was.
    let mut data = Zeroizing::new(Vec::with_capacity(private.len() + aead::TAG_LEN));
    data.extend_from_slice(private.expose());
    aead::AeadKey::new(key).seal(iv, b"", &mut data);
    let document =
        WrittenDocument { kid, wrapped_data: STANDARD.encode(&*data), iv: STANDARD.encode(iv), wrap_type: "A256GCM" };
    // Strings and a URI that is one: nothing in it can fail to be written.
    serde_json::to_vec(&document).unwrap_or_else(|_| unreachable!("strings are valid JSON"))
}

#[cfg(test)]
mod tests {
    use nacre_core::KeySourceError;
    use serde_json::json;

    use super::*;
    use crate::crypt::LayerSecret;

    struct Shelf(Vec<(&'static str, Vec<u8>)>);

    impl KeySource for Shelf {
        fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
            (self.0.iter().find(|(name, _)| *name == uri.to_string()))
                .map(|(_, key)| SecretBytes::new(key.clone()))
                .ok_or_else(|| KeySourceError::NotFound { uri: uri.clone(), source_name: "the shelf".into() })
        }
    }

    const KID: &str = "kbs:///default/key/1";

    fn packet() -> serde_json::Value {
        let key = SecretArray::fill(|slot| slot.fill(5));
        let private = SecretBytes::new(b"{\"symkey\":\"x\"}".to_vec());
        serde_json::from_slice(&wrap(&KID.parse().unwrap(), &key, &private)).unwrap()
    }

    fn open(packet: &serde_json::Value) -> Result<SecretBytes, SchemeError> {
        Packet::parse(packet.to_string().as_bytes())?.unwrap(&Shelf(vec![
            (KID, vec![5; 32]),
            ("kbs:///default/key/2", vec![6; 32]),
            ("kbs:///default/key/short", vec![5; 31]),
        ]))
    }

    #[test]
    fn both_versions_open() {
        let mut packet = packet();
        assert_eq!(open(&packet).unwrap().expose(), b"{\"symkey\":\"x\"}");
        for (name, value) in [
            ("version", json!("0.1.0")),
            ("provider", json!("kbs")),
            ("provider_settings", json!({})),
            ("annotations", json!({ "a": 1 })),
        ] {
            packet[name] = value;
        }
        open(&packet).unwrap();
    }

    #[test]
    fn malformed_and_foreign_packets_are_refused() {
        let good = packet();
        let with = |name: &str, value: serde_json::Value| {
            let mut packet = good.clone();
            packet[name] = value;
            open(&packet).expect_err(name)
        };
        for (name, value) in [
            ("kid", json!("")),
            ("kid", json!("default/key/1")),
            ("kid", json!("kbs:///default/../1")),
            ("kid", json!("kbs:///default/key/missing")),
            ("kid", json!("kbs:///default/key/2")),
            ("kid", json!("kbs:///default/key/short")),
            ("kid", json!(null)),
            ("wrapped_data", json!("")),
            ("wrapped_data", json!("AAAA")),
            ("wrapped_data", json!("!")),
            ("wrapped_data", good["iv"].clone()),
            ("wrapped_data", json!([1, 2, 3])),
            ("iv", json!("")),
            ("iv", json!(STANDARD.encode([0; 11]))),
            ("iv", json!(STANDARD.encode([0; 12]))),
            ("iv", json!(STANDARD.encode([0; 16]))),
            ("iv", json!(null)),
            ("wrap_type", json!("A256CTR")),
            ("wrap_type", json!("a256gcm")),
            ("wrap_type", json!(null)),
            ("version", json!("0.2.0")),
            ("provider", json!("aliyun")),
        ] {
            let error = with(name, value.clone());
            assert!(error.to_string().len() < 400, "{name} {value}: {error}");
        }
        assert!(matches!(with("kid", json!("kbs:///default/key/short")), SchemeError::KeyLength { found: 31, .. }));
        assert!(matches!(with("kid", json!("kbs:///default/key/2")), SchemeError::NotForUs(1)));
        let text = good.to_string();
        for length in 0..text.len() {
            assert!(Packet::parse(&text.as_bytes()[..length]).is_err());
        }
        assert!(Packet::parse(&vec![b' '; PACKET_LIMIT + 1]).is_err());
        assert!(Packet::parse("[".repeat(PACKET_LIMIT).as_bytes()).is_err());
    }

    #[test]
    fn counter_mode_is_read() {
        let key = SecretArray::fill(|slot| slot.fill(5));
        let mut data = b"secret".to_vec();
        cipher::apply_ctr(&key, [1; 16], &mut data).unwrap();
        let packet = json!({
            "kid": KID, "wrapped_data": STANDARD.encode(data), "iv": STANDARD.encode([1; 16]), "wrap_type": "A256CTR",
        });
        assert_eq!(open(&packet).unwrap().expose(), b"secret");
    }

    #[test]
    fn the_sample_of_the_guest_components_opens() {
        let Some(path) = nacre_testkit::shared("fixtures/ocicrypt/sample_kbc_annotation.json") else { return };
        let packet = Packet::parse(&std::fs::read(path).unwrap()).unwrap();
        let hex = "d99b7705b0ba7a168295b3a3367270b0dd9b371bf514ca8b9ba7f0a33711daea";
        let key = (0..32).map(|at| u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).unwrap()).collect();
        let private = packet.unwrap(&Shelf(vec![(KID, key)])).unwrap();
        LayerSecret::parse(&private).unwrap();
    }
}
