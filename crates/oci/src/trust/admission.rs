//! Which of the four kinds of image may run: encrypted or plain, signed or unsigned.
//!
//! | | signed | unsigned |
//! |---|---|---|
//! | encrypted | always | `encrypted_unsigned`, default true |
//! | plain | `plain_signed`, default true | `plain_unsigned`, default false |
//!
//! An image is encrypted when all of its layers are. A mix is legal only when the image is signed, and counts as plain, since a part of
//! it can be read by anybody. The signature is that which the policy demanded and checked: one that nobody asked for does not count.

use serde::{Deserialize, Serialize};

use super::{error::TrustError, evaluate::Admitted};
use crate::manifest::Manifest;

/// Which kinds of image may run, besides encrypted and signed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdmissionRules {
    /// All layers are encrypted, nobody signed: whoever has the key made the layers, but config and command are not vouched for.
    pub encrypted_unsigned: bool,
    /// Signed, and at least one layer is not encrypted.
    pub plain_signed: bool,
    /// Neither.
    pub plain_unsigned: bool,
}

impl Default for AdmissionRules {
    fn default() -> Self {
        Self { encrypted_unsigned: true, plain_signed: true, plain_unsigned: false }
    }
}

/// How much of an image is encrypted, by its manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// All layers.
    pub layers: usize,
    /// Those of an encrypted media type.
    pub encrypted_layers: usize,
}

impl Encryption {
    /// Counts the layers of a manifest.
    pub fn of(manifest: &Manifest) -> Self {
        let encrypted = manifest.layers.iter().filter(|layer| layer.media_type.ends_with("+encrypted"));
        Self { layers: manifest.layers.len(), encrypted_layers: encrypted.count() }
    }
}

/// One of the four kinds, and the mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All layers encrypted, signed.
    EncryptedSigned,
    /// All layers encrypted, not signed.
    EncryptedUnsigned,
    /// Some layers encrypted, signed.
    MixedSigned,
    /// No layer encrypted, signed.
    PlainSigned,
    /// No layer encrypted, not signed.
    PlainUnsigned,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::EncryptedSigned => "encrypted and signed",
            Self::EncryptedUnsigned => "encrypted and unsigned",
            Self::MixedSigned => "partly encrypted and signed",
            Self::PlainSigned => "plain and signed",
            Self::PlainUnsigned => "plain and unsigned",
        })
    }
}

/// Proof that an image may be unpacked and run. Only [`AdmissionRules::admit`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Admission {
    admitted: Admitted,
    kind: Kind,
}

impl Admission {
    /// The policy's decision.
    pub fn admitted(&self) -> &Admitted {
        &self.admitted
    }

    /// The digest of the image's manifest: nothing else may be unpacked under this admission.
    pub fn manifest(&self) -> &nacre_core::Digest {
        self.admitted.manifest()
    }

    /// What kind of image it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl AdmissionRules {
    /// Decides whether an image that the policy lets in may run.
    ///
    /// # Errors
    /// [`TrustError::Kind`] and [`TrustError::UnsignedMix`], which name the setting; [`TrustError::Chain`] for an index, which is no
    /// image.
    pub fn admit(&self, admitted: Admitted) -> Result<Admission, TrustError> {
        let image = || admitted.image().to_owned();
        let Some(Encryption { layers, encrypted_layers: encrypted }) = admitted.encryption() else {
            let problem = "it is an index; one of its images must be chosen".into();
            return Err(TrustError::Chain { image: image(), problem });
        };
        let (kind, allowed, setting) = match (admitted.is_signed(), encrypted > 0, encrypted >= layers) {
            (true, true, true) => (Kind::EncryptedSigned, true, ""),
            (true, true, false) => (Kind::MixedSigned, self.plain_signed, "plain_signed"),
            (true, false, _) => (Kind::PlainSigned, self.plain_signed, "plain_signed"),
            (false, true, true) => (Kind::EncryptedUnsigned, self.encrypted_unsigned, "encrypted_unsigned"),
            (false, true, false) => return Err(TrustError::UnsignedMix { image: image(), layers, encrypted }),
            (false, false, _) => (Kind::PlainUnsigned, self.plain_unsigned, "plain_unsigned"),
        };
        if !allowed {
            return Err(TrustError::Kind { image: image(), kind, setting });
        }
        tracing::info!(image = admitted.image(), manifest = %admitted.manifest(), %kind, rule = admitted.rule(), "admitted");
        Ok(Admission { admitted, kind })
    }
}
