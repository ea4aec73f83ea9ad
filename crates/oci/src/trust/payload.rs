//! The signed statement of simple signing, of GPG and of cosign, containers-signature(5):
//!
//! ```text
//! {"critical":{"type":T,"image":{"docker-manifest-digest":D},"identity":{"docker-reference":R}},
//!  "optional":{"creator":string,"timestamp":integer,…}|null}
//! ```
//!
//! Everything in `critical` must be understood and nothing may be missing; `optional` decides nothing. Parsed only after the signature
//! over these bytes held.

use nacre_core::Digest;

use super::{
    error::SignatureError,
    json::{Json, JsonError},
};
use crate::reference::ImageRef;

/// The most bytes of a signature, or of a payload.
pub const SIGNATURE_LIMIT: usize = 4 << 20;
/// The most signatures of an image, for each way that they are stored.
pub const SIGNATURES_LIMIT: usize = 128;

/// What makes the statement: each kind of signature has its own type, so that none passes for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadType {
    /// GPG simple signing.
    Gpg,
    /// cosign.
    Cosign,
}

impl PayloadType {
    fn name(self) -> &'static str {
        match self {
            Self::Gpg => "atomic container signature",
            Self::Cosign => "cosign container image signature",
        }
    }
}

/// What a signature says: this image has this name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The manifest or index.
    pub digest: Digest,
    /// The name.
    pub reference: ImageRef,
}

impl Payload {
    /// Parses a payload of the given type.
    ///
    /// # Errors
    /// [`SignatureError::Malformed`]
    pub fn parse(bytes: &[u8], kind: PayloadType) -> Result<Self, SignatureError> {
        if bytes.len() > SIGNATURE_LIMIT {
            return Err(SignatureError::malformed("payload", format!("larger than {SIGNATURE_LIMIT} bytes")));
        }
        Self::from_json(bytes, kind).map_err(|error| SignatureError::malformed("payload", error))
    }

    fn from_json(bytes: &[u8], kind: PayloadType) -> Result<Self, JsonError> {
        let mut top = Json::parse(bytes)?.into_fields("")?;
        let mut critical = top.fields("critical")?;
        match top.required("optional")? {
            Json::Null => {}
            optional => check_optional(optional)?,
        }
        top.finish()?;
        let found = critical.string("type")?;
        if found != kind.name() {
            return Err(JsonError::at("critical.type", format!("is '{found:.60}', not '{}'", kind.name())));
        }
        let mut image = critical.fields("image")?;
        let mut identity = critical.fields("identity")?;
        critical.finish()?;
        let digest = image.string("docker-manifest-digest")?;
        image.finish()?;
        let reference = identity.string("docker-reference")?;
        identity.finish()?;
        Ok(Self {
            digest: digest.parse().map_err(|error: nacre_core::DigestError| {
                JsonError::at("critical.image.docker-manifest-digest", error.to_string())
            })?,
            reference: reference.parse().map_err(|error: crate::reference::ReferenceError| {
                JsonError::at("critical.identity.docker-reference", error.to_string())
            })?,
        })
    }

    /// The bytes to sign, as skopeo and cosign write them: sorted keys, no white space.
    #[cfg(feature = "sign")]
    pub(crate) fn encode(&self, kind: PayloadType, optional: &serde_json::Value) -> Vec<u8> {
        let payload = serde_json::json!({
            "critical": {
                "identity": {"docker-reference": self.reference.to_string()},
                "image": {"docker-manifest-digest": self.digest.to_string()},
                "type": kind.name(),
            },
            "optional": optional,
        });
        payload.to_string().into_bytes()
    }
}

fn check_optional(optional: Json) -> Result<(), JsonError> {
    let mut optional = optional.into_fields("optional")?;
    optional.optional_string("creator")?;
    if let Some(timestamp) = optional.take("timestamp") {
        match timestamp {
            Json::Number(number) if number.as_f64().is_some_and(|value| value.fract() == 0.0) => {}
            _ => return Err(JsonError::at("optional.timestamp", "is not an integer")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    fn gpg(text: &str) -> Result<Payload, SignatureError> {
        Payload::parse(text.replace("DIGEST", D).as_bytes(), PayloadType::Gpg)
    }

    const GOOD: &str = r#"{"critical":{"type":"atomic container signature","image":{"docker-manifest-digest":"DIGEST"},"identity":{"docker-reference":"r.example/a:1"}},"optional":{"creator":"x","timestamp":1458239713,"else":[1]}}"#;

    #[test]
    fn a_payload_of_the_right_type_is_read() {
        let payload = gpg(GOOD).unwrap();
        assert_eq!((payload.digest.to_string().as_str(), payload.reference.to_string().as_str()), (D, "r.example/a:1"));
        assert!(gpg(&GOOD.replace(r#"{"creator":"x","timestamp":1458239713,"else":[1]}"#, "null")).is_ok());
        assert!(gpg(&GOOD.replace("1458239713", "1458239713.0")).is_ok());
    }

    #[test]
    fn one_kind_does_not_pass_for_the_other() {
        let text = GOOD.replace("DIGEST", D);
        assert!(
            Payload::parse(text.as_bytes(), PayloadType::Cosign).unwrap_err().to_string().contains("critical.type")
        );
        let text = text.replace("atomic container signature", "cosign container image signature");
        assert!(Payload::parse(text.as_bytes(), PayloadType::Cosign).is_ok());
        assert!(Payload::parse(text.as_bytes(), PayloadType::Gpg).is_err());
    }

    #[test]
    fn malformed_payloads_are_refused() {
        for (from, to) in [
            ("{\"critical", "\u{feff}{\"critical"),
            ("\"critical\"", "\"Critical\""),
            ("\"optional\":", "\"optional\":{},\"optional\":"),
            ("\"optional\":", "\"extra\":1,\"optional\":"),
            ("\"type\":", "\"type\":\"atomic container signature\",\"type\":"),
            ("\"type\":", "\"new\":1,\"type\":"),
            ("\"docker-manifest-digest\":\"DIGEST\"", ""),
            ("\"docker-manifest-digest\":\"DIGEST\"", "\"docker-manifest-digest\":\"DIGEST\",\"x\":1"),
            ("\"DIGEST\"", "\"sha256:00\""),
            ("\"DIGEST\"", "\"md5:00000000000000000000000000000000\""),
            ("\"DIGEST\"", "1"),
            ("\"r.example/a:1\"", "\"\""),
            ("\"r.example/a:1\"", "\"R.example/A:1:2\""),
            ("\"r.example/a:1\"", "\"r.example/a:1\",\"x\":2"),
            ("1458239713", "1.5"),
            ("1458239713", "\"1\""),
            ("\"x\",", "3,"),
            (",\"optional\"", ",\"x\""),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD);
            assert!(gpg(&text).is_err(), "{text}");
        }
        assert!(gpg("").is_err());
        assert!(gpg(&format!("{GOOD} x")).is_err());
    }
}
