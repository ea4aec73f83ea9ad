//! The wrapped keys in a descriptor's annotations.
//!
//! ```text
//! org.opencontainers.image.enc.keys.{jwe|pkcs7|pgp|pkcs11|provider.<name>} = <b64 packet>[,<b64 packet>]…
//! ```

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{Attempt, CryptError, KEYS_ANNOTATION_PREFIX, SchemeError};
use crate::manifest::Descriptor;

/// The most bytes of one annotation of wrapped keys.
pub const ANNOTATION_LIMIT: usize = 1 << 20;
/// The most wrapped keys of a layer, over all schemes: each costs a private key operation for each of our keys.
pub const PACKET_LIMIT: usize = 1024;

/// How a key is wrapped; by this, and not by a look at the packet, the opener is chosen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// JSON Web Encryption.
    Jwe,
    /// CMS EnvelopedData.
    Pkcs7,
    /// An OpenPGP message.
    Pgp,
    /// RSA-OAEP for a key in a token.
    Pkcs11,
    /// Whatever the key provider of this name makes.
    Provider(String),
}

impl Scheme {
    /// Reads what follows [`KEYS_ANNOTATION_PREFIX`].
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "jwe" => Some(Self::Jwe),
            "pkcs7" => Some(Self::Pkcs7),
            "pgp" => Some(Self::Pgp),
            "pkcs11" => Some(Self::Pkcs11),
            _ => text.strip_prefix("provider.").filter(|name| !name.is_empty()).map(|name| Self::Provider(name.into())),
        }
    }

    /// The name of its annotation.
    pub fn annotation(&self) -> String {
        format!("{KEYS_ANNOTATION_PREFIX}{self}")
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jwe => f.write_str("jwe"),
            Self::Pkcs7 => f.write_str("pkcs7"),
            Self::Pgp => f.write_str("pgp"),
            Self::Pkcs11 => f.write_str("pkcs11"),
            Self::Provider(name) => write!(f, "provider.{name}"),
        }
    }
}

/// The wrapped keys of one scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapping {
    /// How they are wrapped.
    pub scheme: Scheme,
    /// Each a wrapped PRIV.
    pub packets: Vec<Vec<u8>>,
}

/// Reads the wrapped keys of a layer, those that need no service first, and says what could not be read.
///
/// # Errors
/// [`CryptError::Annotation`]: more or larger ones than the limits.
pub fn wrappings(descriptor: &Descriptor) -> Result<(Vec<Wrapping>, Vec<Attempt>), CryptError> {
    let mut found = Vec::new();
    let mut unreadable = Vec::new();
    let mut count = 0;
    for (name, text) in &descriptor.annotations {
        let Some(suffix) = name.strip_prefix(KEYS_ANNOTATION_PREFIX) else { continue };
        let limit = |problem: String| CryptError::Annotation { name: name.chars().take(200).collect(), problem };
        if text.len() > ANNOTATION_LIMIT {
            return Err(limit(format!("has {} bytes; at most {ANNOTATION_LIMIT} are allowed", text.len())));
        }
        count += text.bytes().filter(|byte| *byte == b',').count() + 1;
        if count > PACKET_LIMIT {
            return Err(limit(format!("the layer has more than {PACKET_LIMIT} wrapped keys")));
        }
        // An empty annotation is as good as none to peers.
        if text.is_empty() {
            continue;
        }
        let Some(scheme) = Scheme::parse(suffix) else {
            let scheme: String = suffix.chars().take(60).collect();
            unreadable.push(Attempt { error: SchemeError::Unsupported(format!("the scheme '{scheme}'")), scheme });
            continue;
        };
        let mut packets = Vec::new();
        for packet in text.split(',') {
            match STANDARD.decode(packet) {
                Ok(packet) if !packet.is_empty() => packets.push(packet),
                Ok(_) => unreadable
                    .push(Attempt { scheme: scheme.to_string(), error: SchemeError::malformed("it is empty") }),
                Err(error) => unreadable.push(Attempt {
                    scheme: scheme.to_string(),
                    error: SchemeError::malformed(format!("it is not base64: {error}")),
                }),
            }
        }
        found.push(Wrapping { scheme, packets });
    }
    found.sort_by(|a, b| a.scheme.cmp(&b.scheme));
    Ok((found, unreadable))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::media;

    fn layer(annotations: &[(&str, &str)]) -> Descriptor {
        let mut layer = Descriptor::of(media::OCI_LAYER, b"");
        for (name, value) in annotations {
            layer.annotations.insert(format!("{KEYS_ANNOTATION_PREFIX}{name}"), (*value).to_owned());
        }
        layer
    }

    #[test]
    fn wrapped_keys_are_found_by_scheme() {
        let mut layer = layer(&[
            ("provider.a.b", "AQ=="),
            ("pgp", "Ag==,Aw=="),
            ("jwe", "BA=="),
            ("pkcs7", ""),
            ("provider.", "BQ=="),
        ]);
        layer.annotations.insert("org.example.keys.jwe".into(), "BQ==".into());
        let (found, unreadable) = wrappings(&layer).unwrap();
        assert_eq!(
            found,
            [
                Wrapping { scheme: Scheme::Jwe, packets: vec![vec![4]] },
                Wrapping { scheme: Scheme::Pgp, packets: vec![vec![2], vec![3]] },
                Wrapping { scheme: Scheme::Provider("a.b".into()), packets: vec![vec![1]] },
            ]
        );
        assert_eq!(unreadable.len(), 1);
        assert_eq!(found[2].scheme.annotation(), "org.opencontainers.image.enc.keys.provider.a.b");
    }

    #[test]
    fn what_is_not_base64_does_not_hide_its_neighbours() {
        for bad in ["!", "AQ", "AQ==\n", "A Q==", "é"] {
            let (found, unreadable) = wrappings(&layer(&[("jwe", &format!("{bad},AQ==,,"))])).unwrap();
            assert_eq!(found[0].packets, [[1]]);
            assert_eq!(unreadable.len(), 3, "{bad}");
        }
    }

    #[test]
    fn too_many_or_too_large_ones_are_refused() {
        let many = vec!["AQ=="; PACKET_LIMIT].join(",");
        assert_eq!(wrappings(&layer(&[("jwe", &many)])).unwrap().0[0].packets.len(), PACKET_LIMIT);
        for bad in [layer(&[("jwe", &many), ("pgp", "AQ==")]), layer(&[("x", &"A".repeat(ANNOTATION_LIMIT + 4))])] {
            assert!(matches!(wrappings(&bad), Err(CryptError::Annotation { .. })));
        }
    }
}
