//! From the token key that is pinned to the one that signs.
//!
//! A broker's key set (`GET /kbs/v0/jwks`) has, for each key but the first, a statement by the key before it that this one follows:
//! `nacre.succession`, an ES256 JWS with the claims `nacre.token-key` (the new key, a JWK) and `sub` (its RFC 7638 thumbprint), whose `kid` is the
//! thumbprint of the key that signs it. Nothing else of the set is believed. Whoever has an old key could name a false successor: a key that
//! was stolen is replaced by pinning, not by succession.

use nacre_core::jose::{Jwk, PublicKey, b64, verify_compact};
use serde_json::Value;

use super::{BrokerClient, Call, ClientError, Credential, accept};

/// Bytes of a key set at most.
const LONGEST_SET: usize = 256 * 1024;
/// Keys that may follow each other.
const MOST: usize = 64;

impl BrokerClient {
    /// The key that signed a token, where it is not the pinned one itself but follows it.
    pub(super) fn follow(&self, token: &str, pinned: &PublicKey) -> Result<Option<PublicKey>, ClientError> {
        let Some(wanted) = key_id(token) else { return Ok(None) };
        let thumbprint = |key: &PublicKey| Jwk::from_public(key).thumbprint().unwrap_or_default();
        if wanted == thumbprint(pinned) {
            return Ok(None);
        }
        let reply = self.transport.call("jwks", "/kbs/v0/jwks", Credential::None, Call::Get, LONGEST_SET)?;
        let body = accept("jwks", reply).map_err(|e| ClientError::Succession(e.to_string()))?.body;
        successor(&body, pinned, &wanted).map(Some)
    }
}

/// The thumbprint that a JWS's header names.
fn key_id(token: &str) -> Option<String> {
    let header = b64::decode(token.split('.').next()?).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    Some(header.get("kid")?.as_str()?.to_owned())
}

/// The key of a thumbprint, found from `pinned` by the statements of a key set.
///
/// # Errors
/// [`ClientError::Succession`] says where the chain ends.
pub fn successor(set: &[u8], pinned: &PublicKey, wanted: &str) -> Result<PublicKey, ClientError> {
    let fail = |why: &str| ClientError::Succession(why.to_owned());
    if set.len() > LONGEST_SET {
        return Err(fail("its key set is too long"));
    }
    let set: Value = serde_json::from_slice(set).map_err(|_| fail("its key set is no JSON"))?;
    let keys = set.get("keys").and_then(Value::as_array).ok_or_else(|| fail("its key set has no keys"))?;
    let statements: Vec<&str> =
        keys.iter().take(MOST).filter_map(|key| key.get("nacre.succession")?.as_str()).collect();
    let mut current = pinned.clone();
    for _ in 0..MOST {
        let name = Jwk::from_public(&current).thumbprint().map_err(|e| fail(&e.to_string()))?;
        if name == wanted {
            return Ok(current);
        }
        let statement = statements.iter().find(|statement| key_id(statement).as_deref() == Some(&name));
        let statement = statement.ok_or_else(|| fail("no statement of who follows it"))?;
        let claims = verify_compact(statement, &current).map_err(|e| fail(&e.to_string()))?.into_inner();
        let next: Jwk = claims
            .get("nacre.token-key")
            .and_then(|key| serde_json::from_value(key.clone()).ok())
            .ok_or_else(|| fail("a statement without a key"))?;
        current = next.to_public().map_err(|e| fail(&e.to_string()))?;
    }
    Err(fail("too many keys follow each other"))
}

#[cfg(test)]
mod tests {
    use nacre_core::jose::{PrivateKey, sign_compact};
    use serde_json::json;

    use super::*;

    fn name(key: &PrivateKey) -> String {
        Jwk::from_public(&key.public()).thumbprint().unwrap()
    }

    fn statement(before: &PrivateKey, next: &PrivateKey) -> Value {
        let claims = json!({"nacre.token-key": Jwk::from_public(&next.public()), "sub": name(next)});
        json!({"kid": name(next), "nacre.succession": sign_compact(before, Some(&name(before)), &claims).unwrap()})
    }

    #[test]
    fn only_keys_that_the_pinned_one_leads_to_are_found() {
        let [a, b, c, other] = [(); 4].map(|()| PrivateKey::generate_p256());
        let set = |keys: Vec<Value>| serde_json::to_vec(&json!({"keys": keys})).unwrap();
        let good = set(vec![statement(&b, &c), statement(&a, &b), json!({"kid": name(&a)})]);
        assert_eq!(successor(&good, &a.public(), &name(&c)).unwrap(), c.public());
        assert_eq!(successor(&good, &b.public(), &name(&c)).unwrap(), c.public());
        assert_eq!(successor(&good, &a.public(), &name(&a)).unwrap(), a.public());
        // A statement that the key before did not make: named after it, but signed by somebody else.
        let claims = json!({"nacre.token-key": Jwk::from_public(&other.public())});
        let forged = json!({"nacre.succession": sign_compact(&other, Some(&name(&a)), &claims).unwrap()});
        for (set, pinned, wanted) in [
            (good.clone(), &c, &a),
            (good.clone(), &a, &other),
            (set(vec![forged]), &a, &other),
            (set(vec![statement(&a, &b), statement(&b, &a)]), &a, &c),
            (set(vec![]), &a, &b),
            (b"{}".to_vec(), &a, &b),
            (b"".to_vec(), &a, &b),
        ] {
            assert!(successor(&set, &pinned.public(), &name(wanted)).is_err());
        }
    }
}
