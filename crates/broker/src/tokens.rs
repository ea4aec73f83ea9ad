//! Tokens that this replica issued or verified a while ago: who shows one again is known by its SHA-256, and no signature is computed again.
//!
//! What can change since is asked each time, by [`Broker::guest`](crate::Broker): whether the key that signed it is in use, and the time.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use nacre_core::Digest;

use crate::release::Guest;

/// Guests of a generation; the one before is kept, too.
const MOST: usize = 2048;

/// Guests by their tokens, the last few thousand of them.
#[derive(Default)]
pub(crate) struct KnownTokens(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<Digest, Guest>,
    old: HashMap<Digest, Guest>,
}

impl KnownTokens {
    pub(crate) fn get(&self, token: &str) -> Option<Guest> {
        let digest = Digest::sha256(token.as_bytes());
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.young.get(&digest).or_else(|| held.old.get(&digest)).cloned()
    }

    pub(crate) fn keep(&self, token: &str, guest: Guest) {
        let digest = Digest::sha256(token.as_bytes());
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.young.len() >= MOST {
            held.old = std::mem::take(&mut held.young);
        }
        held.young.insert(digest, guest);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nacre_attest::ear::{Appraisal, Ear, PROFILE, TrustVector, VerifierId};
    use nacre_core::jose::{Jwk, PrivateKey};
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_few_thousand_are_known() {
        let key = serde_json::to_value(Jwk::from_public(&PrivateKey::generate_p256().public())).unwrap();
        let vector = TrustVector::default();
        let module = Appraisal {
            status: vector.status(),
            vector,
            policy_id: "default".into(),
            evidence: json!({"runtime_data_claims": {"tee-pubkey": key}}),
        };
        let ear = Ear {
            eat_profile: PROFILE.into(),
            iat: 1,
            nbf: Some(1),
            exp: 2,
            iss: "broker".into(),
            verifier: VerifierId { build: "b".into(), developer: "d".into() },
            submods: [("cpu0".to_owned(), module)].into(),
            simulated: false,
        };
        let guest = Guest::new(Arc::new(ear)).unwrap();
        let known = KnownTokens::default();
        assert!(known.get("0").is_none());
        for number in 0..3 * MOST {
            known.keep(&number.to_string(), guest.clone());
        }
        let found = (0..3 * MOST).filter(|number| known.get(&number.to_string()).is_some()).collect::<Vec<_>>();
        assert_eq!(found, (MOST..3 * MOST).collect::<Vec<_>>());
    }
}
