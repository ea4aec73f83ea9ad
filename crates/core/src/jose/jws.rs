//! Compact JWS with JSON claims (RFC 7515, RFC 7519): ES256 and ES384.
//!
//! The algorithm is the key's: P-256 signs ES256, P-384 signs ES384, other keys do not sign. A header must name that algorithm; keys
//! that it carries or points to (`jwk`, `jku`, `x5c`, `x5u`) are never looked at; `crit` refuses the token. Times (`exp`, `nbf`) are the
//! caller's to judge, who knows which clock to trust.

use p256::{
    ecdsa::signature::{Signer as _, Verifier as _},
    elliptic_curve::sec1::ToEncodedPoint as _,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{JoseError, PrivateKey, PublicKey, b64};
use crate::Verified;

/// Bytes of a token that are read at most.
const LONGEST: usize = 1024 * 1024;

#[derive(Deserialize, Serialize)]
struct Header {
    alg: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typ: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crit: Option<Value>,
}

fn bad(why: impl Into<String>) -> JoseError {
    JoseError::malformed("JWS", why)
}

fn algorithm_of(kind: &'static str) -> Result<&'static str, JoseError> {
    match kind {
        "EC P-256" => Ok("ES256"),
        "EC P-384" => Ok("ES384"),
        _ => Err(JoseError::AlgorithmMismatch { algorithm: "ES256 or ES384".into(), key: kind }),
    }
}

/// Signs claims; `kid` names the key in the header.
///
/// # Errors
/// [`JoseError`]: the key is not for signing, or the claims do not serialise.
pub fn sign_compact(key: &PrivateKey, kid: Option<&str>, claims: &impl Serialize) -> Result<String, JoseError> {
    let header = Header {
        alg: algorithm_of(key.kind())?.into(),
        typ: Some("JWT".into()),
        kid: kid.map(str::to_owned),
        crit: None,
    };
    let header = serde_json::to_vec(&header).map_err(|e| bad(e.to_string()))?;
    let claims = serde_json::to_vec(claims).map_err(|e| bad(e.to_string()))?;
    let message = format!("{}.{}", b64::encode(header), b64::encode(claims));
    let signature = match key {
        PrivateKey::P256(key) => b64::encode(key.sign(message.as_bytes())?),
        PrivateKey::P384(key) => {
            let signature: p384::ecdsa::Signature = p384::ecdsa::SigningKey::from(key).sign(message.as_bytes());
            b64::encode(signature.to_bytes())
        }
        other => return Err(JoseError::AlgorithmMismatch { algorithm: "ES256".into(), key: other.kind() }),
    };
    Ok(format!("{message}.{signature}"))
}

/// Verifies a token by `key` and gives its claims.
///
/// # Errors
/// [`JoseError`]: not a token, another algorithm than the key's, or a signature that is not the key's.
pub fn verify_compact(token: &str, key: &PublicKey) -> Result<Verified<Value>, JoseError> {
    if token.len() > LONGEST {
        return Err(bad(format!("{} bytes: at most {LONGEST} are read", token.len())));
    }
    let parts: Vec<&str> = token.splitn(4, '.').collect();
    let [header, claims, signature] = parts.as_slice() else {
        return Err(bad("not three parts with dots between"));
    };
    let parsed: Header = serde_json::from_slice(&b64::decode(header)?).map_err(|e| bad(format!("header: {e}")))?;
    let expected = algorithm_of(key.kind())?;
    if parsed.alg != expected {
        return Err(JoseError::AlgorithmMismatch { algorithm: parsed.alg.chars().take(40).collect(), key: key.kind() });
    }
    if parsed.crit.is_some() {
        return Err(JoseError::unsupported("JWS header member", "crit"));
    }
    let signature = b64::decode(signature)?;
    let message = format!("{header}.{claims}");
    let claims = b64::decode(claims)?;
    crate::Untrusted::new(claims).verify_into(|claims| {
        verify_signature(key, message.as_bytes(), &signature)?;
        serde_json::from_slice(&claims).map_err(|e| bad(format!("claims: {e}")))
    })
}

/// Verifies a signature, two numbers one after the other, of a message as it is: for envelopes that are no JWS.
///
/// # Errors
/// [`JoseError`]: a key that does not sign, or a signature that is not its.
pub fn verify_signature(key: &PublicKey, message: &[u8], signature: &[u8]) -> Result<(), JoseError> {
    let verified = match key {
        // ring's is several times as fast, and a broker does little else.
        PublicKey::P256(key) => {
            let key = key.to_encoded_point(false);
            return ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, key.as_bytes())
                .verify(message, signature)
                .map_err(|_| JoseError::BadSignature);
        }
        PublicKey::P384(key) => p384::ecdsa::Signature::from_slice(signature)
            .and_then(|signature| p384::ecdsa::VerifyingKey::from(key).verify(message, &signature)),
        other => return Err(JoseError::AlgorithmMismatch { algorithm: "ES256".into(), key: other.kind() }),
    };
    verified.map_err(|_| JoseError::BadSignature)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jose::Jwk;

    /// RFC 7515 appendix A.3.
    #[test]
    fn rfc7515_es256() {
        let jwk: Jwk = serde_json::from_str(
            r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#,
        )
        .unwrap();
        let token = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
        let claims = verify_compact(token, &jwk.to_public().unwrap()).unwrap();
        assert_eq!(claims.get()["iss"], "joe");
    }

    #[test]
    fn forged_tokens_are_refused() {
        let key = PrivateKey::generate_p256();
        let token = sign_compact(&key, Some("k"), &serde_json::json!({"sub": "x"})).unwrap();
        assert_eq!(verify_compact(&token, &key.public()).unwrap().get()["sub"], "x");
        let (head, rest) = token.split_once('.').unwrap();
        let (body, signature) = rest.split_once('.').unwrap();
        let header = |json: &str| format!("{}.{body}.{signature}", b64::encode(json));
        for bad in [
            String::new(),
            head.into(),
            format!("{head}.{body}"),
            format!("{head}.{body}."),
            format!("{token}."),
            format!("{token}.x"),
            format!("{head}..{signature}"),
            format!("{head}.{}.{signature}", b64::encode(r#"{"sub":"y"}"#)),
            format!("{head}.{body}.{}", b64::encode([0; 64])),
            format!("{head}.{body}.{}", &signature[..signature.len() - 4]),
            format!("{token}="),
            header(r#"{"alg":"none"}"#),
            header(r#"{"alg":"HS256"}"#),
            header(r#"{"alg":"ES384"}"#),
            header(r#"{"alg":"ES256","crit":["exp"]}"#),
            header(r#"{"alg":"ES256","alg":"ES256"}"#),
            header(r#"{"alg":["ES256"]}"#),
            header("{}"),
            "é.é.é".into(),
        ] {
            assert!(verify_compact(&bad, &key.public()).is_err(), "{bad}");
        }
        assert_eq!(verify_compact(&token, &PrivateKey::generate_p256().public()), Err(JoseError::BadSignature));
        assert!(verify_compact(&token, &PrivateKey::generate_p384().public()).is_err());
        assert!(sign_compact(&PrivateKey::generate_p521(), None, &1).is_err());
        let es384 = PrivateKey::generate_p384();
        let token = sign_compact(&es384, None, &serde_json::json!({"sub": "z"})).unwrap();
        assert_eq!(verify_compact(&token, &es384.public()).unwrap().get()["sub"], "z");
    }
}
