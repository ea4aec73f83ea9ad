//! The administrator's tokens: short-lived ES256 JWT by the key that `init` made.
//!
//! Claims: `aud` = the thumbprint of the broker's token key, so that a token for one broker is worth nothing at another; `sub`, who asks,
//! for the audit log; `iat` and `exp`, at most an hour apart.

use nacre_core::jose::{Jwk, PrivateKey, PublicKey, sign_compact, verify_compact};
use serde::{Deserialize, Serialize};

use crate::{ApiError, BrokerError};

/// A token lives this long at most.
const LONGEST: i64 = 3600;
/// Clocks may differ by this much.
const SKEW: i64 = 60;

#[derive(Deserialize, Serialize)]
struct Claims {
    aud: String,
    sub: String,
    iat: i64,
    exp: i64,
}

pub(crate) fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// Makes a token for the broker whose token key is `broker`, good for `lifetime` seconds.
///
/// # Errors
/// [`BrokerError`] for keys that cannot be used, and for a lifetime over an hour.
pub fn admin_token(key: &PrivateKey, broker: &PublicKey, subject: &str, lifetime: u32) -> Result<String, BrokerError> {
    if i64::from(lifetime) > LONGEST {
        return Err(BrokerError::Invalid(format!("an admin token lives {LONGEST} seconds at most")));
    }
    let iat = now();
    let aud = Jwk::from_public(broker).thumbprint()?;
    Ok(sign_compact(key, None, &Claims { aud, sub: subject.into(), iat, exp: iat + i64::from(lifetime) })?)
}

/// Checks a token; gives who asks.
pub(crate) fn check(token: Option<&str>, admin: &PublicKey, broker: &PublicKey) -> Result<String, ApiError> {
    let refuse = |why: &str| ApiError::new(401, "AdminAuthAccess", format!("admin access denied: {why}"));
    let token = token.ok_or_else(|| refuse("an Authorization: Bearer token by the administrator's key is needed"))?;
    let claims = verify_compact(token, admin).map_err(|e| refuse(&e.to_string()))?.into_inner();
    let claims: Claims = serde_json::from_value(claims).map_err(|e| refuse(&e.to_string()))?;
    let aud = Jwk::from_public(broker).thumbprint().map_err(|e| refuse(&e.to_string()))?;
    if claims.aud != aud {
        return Err(refuse("the token is for another broker"));
    }
    let now = now();
    if claims.iat > now + SKEW || claims.exp <= now || claims.exp - claims.iat > LONGEST {
        return Err(refuse("the token has expired, is not valid yet, or lives too long: make a new one"));
    }
    Ok(claims.sub.chars().take(100).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_administrators_fresh_token_for_this_broker_holds() {
        let (admin, broker, other) =
            (PrivateKey::generate_p256(), PrivateKey::generate_p256().public(), PrivateKey::generate_p256());
        let token = admin_token(&admin, &broker, "me", 60).unwrap();
        assert_eq!(check(Some(&token), &admin.public(), &broker).unwrap(), "me");
        assert!(admin_token(&admin, &broker, "me", 3601).is_err());
        let claims = |aud: &PublicKey, iat: i64, exp: i64| {
            let aud = Jwk::from_public(aud).thumbprint().unwrap();
            sign_compact(&admin, None, &Claims { aud, sub: "me".into(), iat, exp }).unwrap()
        };
        for bad in [
            None,
            Some(""),
            Some("a.b.c"),
            Some(&*admin_token(&other, &broker, "me", 60).unwrap()),
            Some(&*admin_token(&admin, &other.public(), "me", 60).unwrap()),
            Some(&*claims(&broker, now() - 120, now() - 60)),
            Some(&*claims(&broker, now() + 600, now() + 700)),
            Some(&*claims(&broker, now() - 10, now() + 4000)),
            Some(&*sign_compact(&admin, None, &serde_json::json!({"sub": "me"})).unwrap()),
        ] {
            assert_eq!(check(bad, &admin.public(), &broker).unwrap_err().status, 401, "{bad:?}");
        }
    }
}
