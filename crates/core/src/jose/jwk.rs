//! JSON Web Keys (RFC 7517, RFC 7518 §6) and their thumbprints (RFC 7638).
//!
//! Members that we do not use (`use`, `x5c`, …) are ignored, as the specification demands; `alg` is kept, because Trustee's clients
//! send it and the binding of evidence covers the key as it was sent.

use std::fmt;

use p256::elliptic_curve::sec1::FromEncodedPoint as _;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::{
    JoseError, PrivateKey, PublicKey, b64,
    curve::P256PrivateKey,
    key::{RsaPublicKey, sequence_of_numbers},
};

/// A key as JSON. Whether it is a key is known after [`to_public`](Self::to_public) or [`to_private`](Self::to_private).
#[derive(Clone, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Jwk {
    /// `EC` or `RSA`.
    pub kty: String,
    /// The curve: `P-256`, `P-384`, `P-521`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crv: Option<String>,
    /// The algorithm that the key is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alg: Option<String>,
    /// The key's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<String>,
    /// An EC key's x, base64url of the field's length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<String>,
    /// An EC key's y.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub y: Option<String>,
    /// An RSA key's modulus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<String>,
    /// An RSA key's exponent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub e: Option<String>,
    #[serde(default, skip_serializing)]
    d: Secret,
    #[serde(default, skip_serializing)]
    p: Secret,
    #[serde(default, skip_serializing)]
    q: Secret,
    #[serde(default, skip_serializing)]
    dp: Secret,
    #[serde(default, skip_serializing)]
    dq: Secret,
    #[serde(default, skip_serializing)]
    qi: Secret,
}

/// A member of a private key: never written, never printed, zeroized.
#[derive(Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
struct Secret(Option<String>);

impl Secret {
    fn decode(&self, name: &str) -> Result<Zeroizing<Vec<u8>>, JoseError> {
        b64::decode_secret(self.0.as_deref().ok_or_else(|| bad(format!("no member '{name}'")))?)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn bad(why: impl Into<String>) -> JoseError {
    JoseError::malformed("JWK", why)
}

impl Jwk {
    /// The JWK of a public key, without optional members.
    pub fn from_public(key: &PublicKey) -> Self {
        if let PublicKey::Rsa(rsa) = key {
            return Self {
                kty: "RSA".into(),
                n: Some(b64::encode(&rsa.n)),
                e: Some(b64::encode(&rsa.e)),
                ..Self::default()
            };
        }
        let crv = match key {
            PublicKey::P256(_) => "P-256",
            PublicKey::P384(_) => "P-384",
            _ => "P-521",
        };
        // Uncompressed SEC1: 0x04 ‖ x ‖ y.
        let point = key.sec1().unwrap_or_default();
        let (x, y) = point.get(1..).map(|xy| xy.split_at(xy.len() / 2)).unwrap_or_default();
        Self {
            kty: "EC".into(),
            crv: Some(crv.into()),
            x: Some(b64::encode(x)),
            y: Some(b64::encode(y)),
            ..Self::default()
        }
    }

    /// The JWK of an EC point whose coordinates are base64url already.
    pub(super) fn ec(crv: &str, x: &str, y: &str) -> Self {
        Self { kty: "EC".into(), crv: Some(crv.into()), x: Some(x.into()), y: Some(y.into()), ..Self::default() }
    }

    fn member<'a>(value: Option<&'a String>, name: &str) -> Result<&'a str, JoseError> {
        value.map(String::as_str).ok_or_else(|| bad(format!("no member '{name}'")))
    }

    /// The public key, checked: the point is on its curve, the modulus has a sensible size.
    ///
    /// # Errors
    /// [`JoseError`]: a member is missing or wrong, or the kind of key is not supported.
    pub fn to_public(&self) -> Result<PublicKey, JoseError> {
        match self.kty.as_str() {
            "EC" => {
                let x = b64::decode(Self::member(self.x.as_ref(), "x")?)?;
                let y = b64::decode(Self::member(self.y.as_ref(), "y")?)?;
                match Self::member(self.crv.as_ref(), "crv")? {
                    "P-256" => {
                        let point =
                            p256::EncodedPoint::from_affine_coordinates(&field(&x)?.into(), &field(&y)?.into(), false);
                        Option::from(p256::PublicKey::from_encoded_point(&point)).map(PublicKey::P256)
                    }
                    "P-384" => {
                        let point =
                            p384::EncodedPoint::from_affine_coordinates(&field(&x)?.into(), &field(&y)?.into(), false);
                        Option::from(p384::PublicKey::from_encoded_point(&point)).map(PublicKey::P384)
                    }
                    "P-521" => {
                        let (x, y) = (field::<66>(&x)?, field::<66>(&y)?);
                        let point = p521::EncodedPoint::from_affine_coordinates(
                            p521::FieldBytes::from_slice(&x),
                            p521::FieldBytes::from_slice(&y),
                            false,
                        );
                        Option::from(p521::PublicKey::from_encoded_point(&point)).map(PublicKey::P521)
                    }
                    other => return Err(JoseError::unsupported("curve", other)),
                }
                .ok_or_else(|| bad("the point is not on its curve"))
            }
            "RSA" => {
                let n = b64::decode(Self::member(self.n.as_ref(), "n")?)?;
                let e = b64::decode(Self::member(self.e.as_ref(), "e")?)?;
                RsaPublicKey::new(&n, &e).map(PublicKey::Rsa)
            }
            other => Err(JoseError::unsupported("key type", other)),
        }
    }

    /// The private key. An RSA key needs its CRT members.
    ///
    /// # Errors
    /// [`JoseError`]: a member is missing or wrong, the halves do not belong together, or the kind of key is not supported.
    pub fn to_private(&self) -> Result<PrivateKey, JoseError> {
        let d = self.d.decode("d")?;
        let key = match self.kty.as_str() {
            "EC" => match Self::member(self.crv.as_ref(), "crv")? {
                "P-256" if d.len() == 32 => match p256::SecretKey::from_slice(&d) {
                    Ok(key) => Some(PrivateKey::P256(P256PrivateKey::new(key)?)),
                    Err(_) => None,
                },
                "P-384" if d.len() == 48 => p384::SecretKey::from_slice(&d).ok().map(PrivateKey::P384),
                "P-521" if d.len() == 66 => p521::SecretKey::from_slice(&d).ok().map(PrivateKey::P521),
                "P-256" | "P-384" | "P-521" => None,
                other => return Err(JoseError::unsupported("curve", other)),
            }
            .ok_or_else(|| bad("'d' is not a private key of the curve"))?,
            "RSA" => {
                let n = b64::decode(Self::member(self.n.as_ref(), "n")?)?;
                let e = b64::decode(Self::member(self.e.as_ref(), "e")?)?;
                let (p, q) = (self.p.decode("p")?, self.q.decode("q")?);
                let (dp, dq, qi) = (self.dp.decode("dp")?, self.dq.decode("dq")?, self.qi.decode("qi")?);
                // RFC 8017 A.1.2: version 0, n, e, d, p, q, dP, dQ, qInv.
                let pkcs1 = sequence_of_numbers(&[&[0], &n, &e, &d, &p, &q, &dp, &dq, &qi])?;
                PrivateKey::from_pkcs1(&pkcs1)?
            }
            other => return Err(JoseError::unsupported("key type", other)),
        };
        if self.to_public()? != key.public() {
            return Err(bad("the private and the public half do not belong together"));
        }
        Ok(key)
    }

    /// RFC 7638: base64url of SHA-256 over the required members in lexical order.
    ///
    /// # Errors
    /// As [`to_public`](Self::to_public).
    pub fn thumbprint(&self) -> Result<String, JoseError> {
        let canonical = Self::from_public(&self.to_public()?);
        let get = |member: &Option<String>| member.clone().unwrap_or_default();
        // All of them are base64url or curve names, so that nothing needs escaping.
        let text = if canonical.kty == "RSA" {
            format!(r#"{{"e":"{}","kty":"RSA","n":"{}"}}"#, get(&canonical.e), get(&canonical.n))
        } else {
            format!(
                r#"{{"crv":"{}","kty":"EC","x":"{}","y":"{}"}}"#,
                get(&canonical.crv),
                get(&canonical.x),
                get(&canonical.y)
            )
        };
        Ok(b64::encode(ring::digest::digest(&ring::digest::SHA256, text.as_bytes())))
    }
}

/// RFC 7518 §6.2.1.2: a coordinate has the field's full length.
fn field<const N: usize>(bytes: &[u8]) -> Result<[u8; N], JoseError> {
    bytes.try_into().map_err(|_| bad(format!("a coordinate of {} bytes instead of {N}", bytes.len())))
}

impl fmt::Debug for Jwk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwk")
            .field("kty", &self.kty)
            .field("crv", &self.crv)
            .field("kid", &self.kid)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwk(text: &str) -> Jwk {
        serde_json::from_str(text).unwrap()
    }

    /// RFC 7517 appendix A.2.
    const EC: &str = r#"{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
        "y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","d":"870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE","use":"enc","kid":"1"}"#;

    #[test]
    fn a_private_key_reads_and_its_secrets_stay_inside() {
        let key = jwk(EC);
        let private = key.to_private().unwrap();
        assert_eq!(private.public(), key.to_public().unwrap());
        assert!(!serde_json::to_string(&key).unwrap().contains("870MB"));
        assert!(!format!("{key:?} {private:?}").contains("870MB"));
        let again = PrivateKey::from_bytes(private.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
        assert_eq!(again.public(), private.public());
    }

    /// RFC 7638 §3.1.
    #[test]
    fn rfc7638_thumbprint() {
        let key = jwk(
            r#"{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB","alg":"RS256","kid":"2011-04-29"}"#,
        );
        assert_eq!(key.thumbprint().unwrap(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }

    #[test]
    fn every_curve_goes_to_json_and_back() {
        for key in [PrivateKey::generate_p256(), PrivateKey::generate_p384(), PrivateKey::generate_p521()] {
            let public = key.public();
            let text = serde_json::to_string(&Jwk::from_public(&public)).unwrap();
            assert_eq!(jwk(&text).to_public().unwrap(), public);
            assert_eq!(PublicKey::from_bytes(text.as_bytes()).unwrap(), public);
            assert_eq!(PublicKey::from_bytes(public.to_pem().unwrap().as_bytes()).unwrap(), public);
            assert_eq!(PublicKey::from_bytes(&public.to_spki().unwrap()).unwrap(), public);
            let private = PrivateKey::from_bytes(key.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
            assert_eq!(private.public(), public);
        }
    }

    #[test]
    fn malformed_keys_are_refused() {
        let good = jwk(EC);
        let change = |f: fn(&mut Jwk)| {
            let mut key = good.clone();
            f(&mut key);
            key
        };
        let cases: [(&str, Jwk); 9] = [
            ("kty", change(|k| k.kty = "oct".into())),
            ("crv", change(|k| k.crv = Some("secp256k1".into()))),
            ("no crv", change(|k| k.crv = None)),
            ("no y", change(|k| k.y = None)),
            ("off the curve", change(|k| k.y.clone_from(&k.x))),
            ("short", change(|k| k.x = Some("AQAB".into()))),
            ("padded", change(|k| k.x = k.x.take().map(|x| x + "="))),
            ("other curve", change(|k| k.crv = Some("P-384".into()))),
            ("rsa members", change(|k| k.kty = "RSA".into())),
        ];
        for (name, key) in cases {
            assert!(key.to_public().is_err(), "{name}");
            assert!(key.to_private().is_err(), "{name}");
        }
        assert!(change(|k| k.d = Secret(None)).to_private().is_err());
        assert!(change(|k| k.d = Secret(Some("AA".into()))).to_private().is_err());
        // A private half that belongs to another public key.
        let other = Jwk::from_public(&PrivateKey::generate_p256().public());
        assert!(Jwk { d: good.d.clone(), ..other }.to_private().is_err());
        for text in [
            "",
            "{}",
            "[]",
            r#"{"kty":1}"#,
            r#"{"kty":"EC","kty":"EC"}"#,
            "-----BEGIN PUBLIC KEY-----",
            "\x30\x03\x02\x01\x01",
        ] {
            assert!(PublicKey::from_bytes(text.as_bytes()).is_err(), "{text}");
            assert!(PrivateKey::from_bytes(text.as_bytes()).is_err(), "{text}");
        }
    }
}
