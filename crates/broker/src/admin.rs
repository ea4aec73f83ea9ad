//! Administrators: their tokens, short-lived ES256 JWT, and what each of them may do.
//!
//! Claims: `aud` = the thumbprint of one of the broker's token keys, so that a token for one broker is worth nothing at another; `sub`, who asks,
//! for the audit log; `iat` and `exp`, at most an hour apart. The header's `kid` is the thumbprint of the administrator's key; without it, the
//! key is the one that `init` made, which may do everything.

use nacre_core::jose::{Jwk, PrivateKey, PublicKey, b64, sign_compact, verify_compact};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// What an administrator may do.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything, other administrators included.
    Admin,
    /// Resources, release policies, leases and anchors; without a repository of its own, appraisal policies, reference values and platforms, too.
    Operator,
    /// Looks at everything but values: audit log, lists, policies.
    Auditor,
}

impl Role {
    /// Its name: `operator`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::Auditor => "auditor",
        }
    }
}

/// An administrator whom the broker knows beside the first one.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Administrator {
    /// Who it is, for the audit log.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Its tenant: the one repository that it may do it in. `None`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// Its public key, PEM.
    pub key: String,
}

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need<'a> {
    /// Looks at what belongs to a repository, or to all of them.
    Read(Option<&'a str>),
    /// Looks at what is its own, which the call picks out.
    ReadOwn,
    /// Changes what belongs to a repository.
    Change(&'a str),
    /// Changes what holds for all repositories.
    ChangeAll,
    /// Decides who administers.
    Administer,
}

/// Whoever asks, and was recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Actor {
    /// For the audit log.
    pub(crate) name: String,
    role: Role,
    repository: Option<String>,
}

/// Whoever asks, as it is told itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Whoami {
    name: String,
    role: Role,
    repository: Option<String>,
    /// Whether it may look at what belongs to no repository: guests, the audit log.
    reads_all: bool,
}

impl Actor {
    pub(crate) fn whoami(&self) -> Whoami {
        Whoami {
            name: self.name.clone(),
            role: self.role,
            repository: self.repository.clone(),
            reads_all: self.may(Need::Read(None)).is_ok(),
        }
    }

    /// The paths that it may look at begin so.
    pub(crate) fn prefix(&self) -> String {
        self.repository.as_ref().map(|repository| format!("{repository}/")).unwrap_or_default()
    }

    pub(crate) fn may(&self, need: Need<'_>) -> Result<(), ApiError> {
        let fits = match need {
            Need::ReadOwn => true,
            Need::Read(None) => self.repository.is_none(),
            Need::Read(Some(repository)) => self.repository.as_deref().is_none_or(|own| own == repository),
            Need::Change(repository) => {
                self.role != Role::Auditor && self.repository.as_deref().is_none_or(|own| own == repository)
            }
            Need::ChangeAll => self.role != Role::Auditor && self.repository.is_none(),
            Need::Administer => self.role == Role::Admin && self.repository.is_none(),
        };
        let own = self.repository.as_deref().map(|own| format!(" of repository {own}")).unwrap_or_default();
        if fits {
            return Ok(());
        }
        Err(ApiError::new(
            403,
            "AdminRole",
            format!("{} is {}{own}: this call is for others", self.name, self.role.name()),
        ))
    }
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
    let kid = Jwk::from_public(&key.public()).thumbprint()?;
    let claims = Claims { aud, sub: subject.into(), iat, exp: iat + i64::from(lifetime) };
    Ok(sign_compact(key, Some(&kid), &claims)?)
}

/// The thumbprint that a token's header names, unverified: only to find the key.
pub(crate) fn key_id(token: &str) -> Option<String> {
    let header = b64::decode(token.split('.').next()?).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    Some(header.get("kid")?.as_str()?.to_owned())
}

/// Checks a token; gives who asks. `known` are the administrators beside the first one, `brokers` the thumbprints that a token may be for.
pub(crate) fn check<'a>(
    token: Option<&str>,
    first: &PublicKey,
    mut known: impl Iterator<Item = &'a (String, PublicKey, Administrator)>,
    brokers: &[String],
) -> Result<Actor, ApiError> {
    let refuse = |why: &str| ApiError::new(401, "AdminAuthAccess", format!("admin access denied: {why}"));
    let token = token.ok_or_else(|| refuse("an Authorization: Bearer token by an administrator's key is needed"))?;
    let kid = key_id(token);
    let found = kid.as_ref().and_then(|kid| known.find(|(thumbprint, ..)| thumbprint == kid));
    let key = found.map_or(first, |(_, key, _)| key);
    let claims = verify_compact(token, key).map_err(|e| refuse(&e.to_string()))?.into_inner();
    let claims: Claims = serde_json::from_value(claims).map_err(|e| refuse(&e.to_string()))?;
    if !brokers.contains(&claims.aud) {
        return Err(refuse("the token is for another broker"));
    }
    let now = now();
    if claims.iat > now + SKEW || claims.exp <= now || claims.exp - claims.iat > LONGEST {
        return Err(refuse("the token has expired, is not valid yet, or lives too long: make a new one"));
    }
    let subject: String = claims.sub.chars().filter(|c| !c.is_control()).take(100).collect();
    Ok(match found {
        None => Actor { name: format!("admin:{subject}"), role: Role::Admin, repository: None },
        Some((_, _, administrator)) => Actor {
            name: format!("{}:{}", administrator.role.name(), administrator.name),
            role: administrator.role,
            repository: administrator.repository.clone(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_administrators_fresh_token_for_this_broker_holds() {
        let (admin, broker, other) =
            (PrivateKey::generate_p256(), PrivateKey::generate_p256().public(), PrivateKey::generate_p256());
        let here = [Jwk::from_public(&broker).thumbprint().unwrap()];
        let check = |token: Option<&str>| check(token, &admin.public(), [].iter(), &here);
        let token = admin_token(&admin, &broker, "me", 60).unwrap();
        assert_eq!(check(Some(&token)).unwrap().name, "admin:me");
        assert!(admin_token(&admin, &broker, "me", 3601).is_err());
        let claims = |aud: &PublicKey, iat: i64, exp: i64| {
            let aud = Jwk::from_public(aud).thumbprint().unwrap();
            sign_compact(&admin, None, &Claims { aud, sub: "me".into(), iat, exp }).unwrap()
        };
        assert!(check(Some(&claims(&broker, now(), now() + 9))).is_ok());
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
            assert_eq!(check(bad).unwrap_err().status, 401, "{bad:?}");
        }
    }

    #[test]
    fn a_role_and_a_repository_are_the_limits() {
        let actor = |role, repository: Option<&str>| Actor {
            name: "x".into(),
            role,
            repository: repository.map(str::to_owned),
        };
        let may = |role, repository, need| actor(role, repository).may(need).is_ok();
        for need in [Need::Read(None), Need::Change("a"), Need::ChangeAll, Need::Administer] {
            assert!(may(Role::Admin, None, need));
            assert_eq!(may(Role::Operator, None, need), need != Need::Administer);
            assert_eq!(may(Role::Auditor, None, need), need == Need::Read(None));
            assert_eq!(may(Role::Operator, Some("a"), need), need == Need::Change("a"));
            assert!(!may(Role::Operator, Some("b"), need));
        }
        assert!(
            may(Role::Auditor, Some("a"), Need::Read(Some("a")))
                && !may(Role::Auditor, Some("a"), Need::Read(Some("b")))
        );
        // One of a repository is none of everything, even as admin.
        assert!(!may(Role::Admin, Some("a"), Need::Administer));
    }
}
