//! The JSON documents that key providers are asked with and answer with.
//!
//! ```text
//! Wrap   {"op":"keywrap","keywrapparams":{"ec":EC,"optsdata":"<b64 PRIV>"},"keyunwrapparams":{"dc":null,"annotation":null}}
//!        → {"keywrapresults":{"annotation":BYTES}}
//! Unwrap {"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":{"dc":DC,"annotation":"<b64 packet>"}}
//!        → {"keyunwrapresults":{"optsdata":BYTES}}
//! ```
//!
//! EC and DC are `{"Parameters":{NAME:[b64…]}}`, and EC also has a DecryptConfig of that form.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::SecretBytes;
use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use super::{Question, parameters};

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    keywrapresults: Option<WrapResults>,
    #[serde(default)]
    keyunwrapresults: Option<UnwrapResults>,
}

#[derive(Deserialize)]
struct WrapResults {
    #[serde(default)]
    annotation: Option<Bytes>,
}

#[derive(Deserialize)]
struct UnwrapResults {
    #[serde(default)]
    optsdata: Option<Bytes>,
}

/// The document that asks a provider.
pub(super) fn question(name: &str, arguments: &[String], question: Question<'_>) -> SecretBytes {
    // Written by hand, since the key must go into one allocation that is zeroized.
    let parameters = parameters(name, arguments);
    let mut out = Vec::new();
    match question {
        Question::Wrap(private) => {
            let ec =
                serde_json::json!({ "Parameters": parameters["Parameters"], "DecryptConfig": { "Parameters": null } });
            let head = format!(r#"{{"op":"keywrap","keywrapparams":{{"ec":{ec},"optsdata":""#);
            let tail = r#""},"keyunwrapparams":{"dc":null,"annotation":null}}"#;
            let key = Zeroizing::new(STANDARD.encode(private.expose()));
            out.reserve_exact(head.len() + key.len() + tail.len());
            for part in [head.as_str(), key.as_str(), tail] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        Question::Unwrap(packet) => {
            let packet = STANDARD.encode(packet);
            let params = format!(r#"{{"dc":{parameters},"annotation":"{packet}"}}"#);
            out.extend_from_slice(
                format!(
                    r#"{{"op":"keyunwrap","keywrapparams":{{"ec":null,"optsdata":null}},"keyunwrapparams":{params}}}"#
                )
                .as_bytes(),
            );
        }
    }
    SecretBytes::new(out)
}

/// Takes the result out of a provider's answer to `wrap` or to unwrap.
///
/// # Errors
/// What is wrong with it; nothing of it is quoted, since it may be a key.
pub fn parse_answer(json: &[u8], wrap: bool) -> Result<SecretBytes, String> {
    let answer: Answer = serde_json::from_slice(json).map_err(|error| {
        format!("gave an answer that is not what the protocol says (line {}, column {})", error.line(), error.column())
    })?;
    let bytes = if wrap {
        answer.keywrapresults.and_then(|results| results.annotation)
    } else {
        answer.keyunwrapresults.and_then(|results| results.optsdata)
    };
    match bytes {
        Some(Bytes(bytes)) if !bytes.is_empty() => Ok(bytes),
        _ => Err("gave an answer without a result".into()),
    }
}

/// Bytes as base64 text or as an array of numbers.
struct Bytes(SecretBytes);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64, or an array of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                let bytes = STANDARD.decode(text).map_err(|_| E::custom("not base64"))?;
                Ok(Bytes(SecretBytes::new(bytes)))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Bytes, A::Error> {
                // One that grows leaves copies behind: take room for any key at once.
                let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
                while let Some(byte) = items.next_element::<u8>()? {
                    bytes.push(byte);
                }
                Ok(Bytes(SecretBytes::new(bytes.to_vec())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_what_peers_parse() {
        let private = SecretBytes::new(b"PRIV".to_vec());
        let json: serde_json::Value =
            serde_json::from_slice(question("p", &["a=b".into()], Question::Wrap(&private)).expose()).unwrap();
        assert_eq!(json["op"], "keywrap");
        assert_eq!(json["keywrapparams"]["optsdata"], STANDARD.encode("PRIV"));
        assert_eq!(json["keywrapparams"]["ec"]["Parameters"]["p"][0], STANDARD.encode("a=b"));
        let json: serde_json::Value =
            serde_json::from_slice(question("p", &[], Question::Unwrap(b"x")).expose()).unwrap();
        assert_eq!(json["op"], "keyunwrap");
        assert_eq!(json["keyunwrapparams"]["annotation"], STANDARD.encode("x"));
        assert_eq!(json["keyunwrapparams"]["dc"]["Parameters"]["p"][0], STANDARD.encode("Enabled"));
    }

    #[test]
    fn answers_of_both_kinds_of_peer_are_read() {
        for (json, wrap) in [
            (r#"{"keywrapresults":{"annotation":"AQID"},"keyunwrapresults":{"optsdata":null}}"#, true),
            (r#"{"keywrapresults":{"annotation":[1,2,3]}}"#, true),
            (r#"{"keyunwrapresults":{"optsdata":[1,2,3]},"keywrapresults":null}"#, false),
            (r#"{"keyunwrapresults":{"optsdata":"AQID"},"more":1}"#, false),
        ] {
            assert_eq!(parse_answer(json.as_bytes(), wrap).unwrap().expose(), [1, 2, 3]);
            parse_answer(json.as_bytes(), !wrap).unwrap_err();
        }
    }

    #[test]
    fn malformed_answers_are_refused_and_not_quoted() {
        for json in [
            "",
            "{}",
            "[]",
            "null",
            "oops",
            r#"{"keyunwrapresults":{}}"#,
            r#"{"keyunwrapresults":{"optsdata":""}}"#,
            r#"{"keyunwrapresults":{"optsdata":[]}}"#,
            r#"{"keyunwrapresults":{"optsdata":[256]}}"#,
            r#"{"keyunwrapresults":{"optsdata":[-1]}}"#,
            r#"{"keyunwrapresults":{"optsdata":["AQID"]}}"#,
            r#"{"keyunwrapresults":{"optsdata":"secret!"}}"#,
            r#"{"keyunwrapresults":{"optsdata":{"secret":1}}}"#,
            r#"{"keyunwrapresults":{"optsdata":"AQID"}}{}"#,
            r#"{"keyunwrapresults":"secret"}"#,
        ] {
            let error = parse_answer(json.as_bytes(), false).expect_err(json);
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
