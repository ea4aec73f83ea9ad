//! Signed reference documents: reference values that come from whoever builds what guests run, rather than from an administrator's hand.
//!
//! A document is a compact JWS (ES256) whose header's `kid` is the thumbprint of the signer's key:
//!
//! ```text
//! {"profile": "nacre-reference-1", "iss": signer's name, "serial": grows with each document of the signer's, "iat", "exp": seconds since 1970,
//!  "values": {id: [values], …}, "revoked": [id, …]}
//! ```
//!
//! Values end with the document. A signer is known by name and key, and may be held to ids that begin so. A document older than the last one of its
//! signer is refused, so that nobody can bring values back that were revoked. A CoRIM ([`crate::corim`]) is taken by the same rules.

use std::collections::BTreeMap;

use nacre_core::{
    Verified,
    jose::{Jwk, PrivateKey, PublicKey, sign_compact, verify_compact},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Broker, BrokerError, ReferenceValue,
    admin::{self, now},
    broker::{LOCAL, MOST_VALUES, entry},
    corim,
};

/// The type of a message that carries a signed document.
pub(crate) const SIGNED: &str = "nacre-signed";
/// The type of a message that carries a signed manifest, in base64.
pub(crate) const CORIM: &str = "corim";
const PROFILE: &str = "nacre-reference-1";
/// Bytes of a document at most.
pub(crate) const LONGEST: usize = 1024 * 1024;
/// Values that a document names at most.
pub(crate) const MOST_IDS: usize = 4096;
/// Clocks may differ by this much.
const SKEW: i64 = 60;

/// Who may sign reference values.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Signer {
    /// Its name, as its documents have it.
    pub name: String,
    /// Its public key, PEM.
    pub key: String,
    /// It may only set values whose names begin so.
    #[serde(default)]
    pub prefix: String,
    /// The serial of its last document.
    #[serde(default)]
    pub serial: u64,
}

/// A signed reference document.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceDocument {
    profile: String,
    iss: String,
    serial: u64,
    iat: i64,
    exp: i64,
    values: BTreeMap<String, Vec<Value>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revoked: Vec<String>,
}

/// Whether a text can name a reference value.
pub(crate) fn is_name(id: &str) -> bool {
    (1..=200).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Whether a file is a CoRIM, and no document of ours: it begins with one of its tags.
pub fn is_corim(bytes: &[u8]) -> bool {
    corim::is_one(bytes)
}

fn invalid(why: impl std::fmt::Display) -> BrokerError {
    BrokerError::Invalid(format!("reference document: {why}"))
}

impl ReferenceDocument {
    /// A document that is made now and ends at `expires`.
    pub fn new(
        issuer: &str,
        serial: u64,
        expires: i64,
        values: BTreeMap<String, Vec<Value>>,
        revoked: Vec<String>,
    ) -> Self {
        Self { profile: PROFILE.into(), iss: issuer.into(), serial, iat: now(), exp: expires, values, revoked }
    }

    /// Signs it.
    ///
    /// # Errors
    /// [`BrokerError::Key`] for a key that cannot.
    pub fn sign(&self, key: &PrivateKey) -> Result<String, BrokerError> {
        let kid = Jwk::from_public(&key.public()).thumbprint()?;
        Ok(sign_compact(key, Some(&kid), self)?)
    }

    /// Verifies a document by the key of its signer.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`]: not its signature, no document, or out of bounds.
    pub fn verify(text: &str, key: &PublicKey) -> Result<Verified<Self>, BrokerError> {
        if text.len() > LONGEST {
            return Err(invalid(format!("{} bytes: at most {LONGEST} are read", text.len())));
        }
        let claims = verify_compact(text.trim(), key).map_err(invalid)?.into_inner();
        nacre_core::Untrusted::new(claims).verify_into(|claims| {
            let document: Self = serde_json::from_value(claims).map_err(invalid)?;
            let ids = document.values.keys().chain(&document.revoked);
            if document.profile != PROFILE {
                return Err(invalid(format!("its profile is '{:.40}' and not {PROFILE}", document.profile)));
            }
            if document.values.len() + document.revoked.len() > MOST_IDS
                || document.values.values().any(|values| values.len() > MOST_VALUES)
            {
                return Err(invalid(format!("at most {MOST_IDS} names with {MOST_VALUES} values each are read")));
            }
            if let Some(bad) = ids.clone().find(|id| !is_name(id)) {
                return Err(invalid(format!("'{bad:.100}' is no name of a reference value")));
            }
            Ok(document)
        })
    }
}

impl Broker {
    /// Lets somebody sign reference values.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for a name or a key that is none.
    pub fn set_signer(&self, signer: &Signer) -> Result<(), BrokerError> {
        self.set_signer_as(LOCAL, signer)
    }

    pub(crate) fn set_signer_as(&self, actor: &str, signer: &Signer) -> Result<(), BrokerError> {
        if nacre_core::ResourcePath::new(&signer.name, "x", "x").is_err() || signer.name.len() > 100 {
            return Err(BrokerError::Invalid(format!(
                "signer '{:.100}': names are 1 to 100 letters, digits, '_', '-' and '.'",
                signer.name
            )));
        }
        PublicKey::from_pem(&signer.key)?;
        let known = self.signers()?.into_iter().find(|known| known.name == signer.name);
        // The same name with another key goes on where it was: documents before that stay old.
        let serial = known.map_or(0, |known| known.serial).max(signer.serial);
        let text = serde_json::to_vec(&Signer { serial, ..signer.clone() }).map_err(invalid)?;
        let entry = entry("reference signer set", actor, signer.name.clone());
        self.store.set_signer(&signer.name, Some(text), entry).map(drop)
    }

    /// Those who may sign reference values.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn signers(&self) -> Result<Vec<Signer>, BrokerError> {
        let config = self.store.config()?;
        config.signers().map(|text| serde_json::from_str(text).map_err(invalid)).collect()
    }

    /// Lets somebody sign no more, and with `values` removes what they signed; says whether they could.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn delete_signer(&self, name: &str, values: bool) -> Result<bool, BrokerError> {
        self.delete_signer_as(LOCAL, name, values)
    }

    pub(crate) fn delete_signer_as(&self, actor: &str, name: &str, values: bool) -> Result<bool, BrokerError> {
        let existed = self.store.set_signer(name, None, entry("reference signer removed", actor, name.to_owned()))?;
        if values {
            for (id, _) in self.references()?.into_iter().filter(|(_, value)| value.issuer == name) {
                self.delete_reference_as(actor, &id)?;
            }
        }
        Ok(existed)
    }

    /// All reference values, those that have expired too.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn references(&self) -> Result<BTreeMap<String, ReferenceValue>, BrokerError> {
        Ok((*self.store.config()?.references()).clone())
    }

    /// Revokes a reference value; says whether there was one.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn delete_reference(&self, id: &str) -> Result<bool, BrokerError> {
        self.delete_reference_as(LOCAL, id)
    }

    pub(crate) fn delete_reference_as(&self, actor: &str, id: &str) -> Result<bool, BrokerError> {
        self.store.delete_reference(id, entry("reference value removed", actor, id.to_owned()))
    }

    /// Takes a signed document; gives the names of the values that it set and revoked.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] says what is wrong with it: its signer, its time, its serial, a name.
    pub fn import_references(&self, document: &str) -> Result<Vec<String>, BrokerError> {
        self.import_references_as(LOCAL, document)
    }

    pub(crate) fn import_references_as(&self, actor: &str, document: &str) -> Result<Vec<String>, BrokerError> {
        let kid = admin::key_id(document).ok_or_else(|| invalid("its header names no key (kid)"))?;
        let is_its = |key: &PublicKey| Jwk::from_public(key).thumbprint().is_ok_and(|name| name == kid);
        let (signer, key) = self.signer_of(is_its)?;
        let document = ReferenceDocument::verify(document, &key)?.into_inner();
        if document.iss != signer.name {
            return Err(invalid(format!("it is '{:.100}\'s and signed by {}", document.iss, signer.name)));
        }
        let said = Said {
            serial: document.serial,
            begins: document.iat,
            expires: document.exp,
            values: document.values,
            revoked: document.revoked,
            about: String::new(),
        };
        self.take(actor, &signer, said)
    }

    /// Takes a signed CoRIM; gives the names of the values that it set.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] says what is wrong with it: its form, its signer, its time, a name.
    pub fn import_corim(&self, bytes: &[u8]) -> Result<Vec<String>, BrokerError> {
        self.import_corim_as(LOCAL, bytes)
    }

    pub(crate) fn import_corim_as(&self, actor: &str, bytes: &[u8]) -> Result<Vec<String>, BrokerError> {
        let signed = corim::Signed::read(bytes)?;
        let (signer, key) = self.signer_of(|key| signed.names(key))?;
        let manifest = signed.verify(&key)?.into_inner();
        let begins = manifest.not_before;
        let name: String = manifest.signer.chars().filter(|c| !c.is_control()).take(100).collect();
        let left_out = match manifest.left_out {
            0 => String::new(),
            count => format!(", {count} triples that are no reference values left out"),
        };
        let said = Said {
            serial: u64::try_from(begins).map_err(|_| invalid("it begins before 1970"))?,
            begins,
            expires: manifest.expires,
            values: manifest.values,
            revoked: Vec::new(),
            about: format!(", CoRIM of '{name}'{left_out}"),
        };
        self.take(actor, &signer, said)
    }

    /// The signer with a key, and the key.
    fn signer_of(&self, is_its: impl Fn(&PublicKey) -> bool) -> Result<(Signer, PublicKey), BrokerError> {
        let found = self.signers()?.into_iter().find_map(|signer| {
            let key = PublicKey::from_pem(&signer.key).ok().filter(|key| is_its(key))?;
            Some((signer, key))
        });
        found.ok_or_else(|| invalid("nobody whom this broker knows signed it: add its signer"))
    }

    fn take(&self, actor: &str, signer: &Signer, said: Said) -> Result<Vec<String>, BrokerError> {
        let now = now();
        if said.begins > now + SKEW || said.expires <= now {
            return Err(invalid("it has expired, or is not valid yet"));
        }
        if said.serial <= signer.serial {
            return Err(invalid(format!(
                "its serial is {}, and the last one of {} was {}: it is an older one",
                said.serial, signer.name, signer.serial
            )));
        }
        let ids: Vec<String> = said.values.keys().chain(&said.revoked).cloned().collect();
        if let Some(foreign) = ids.iter().find(|id| !id.starts_with(&signer.prefix)) {
            return Err(invalid(format!(
                "{} may not set {foreign}: only what begins with {}",
                signer.name, signer.prefix
            )));
        }
        let value = |values| ReferenceValue { values, expires: said.expires, issuer: signer.name.clone() };
        let mut values: Vec<_> = said.values.into_iter().map(|(id, values)| (id, Some(value(values)))).collect();
        values.extend(said.revoked.into_iter().map(|id| (id, None)));
        let mut entry = entry("reference document taken", actor, signer.name.clone());
        entry.detail = format!("serial {}, {} values{}", said.serial, values.len(), said.about);
        let text = |signer: &Signer| serde_json::to_vec(signer).map_err(invalid);
        let after = text(&Signer { serial: said.serial, ..signer.clone() })?;
        match self.store.import_references(&signer.name, text(signer)?, after, values, entry)? {
            true => Ok(ids),
            false => Err(invalid("another document of its signer was taken at the same time: try again")),
        }
    }
}

/// What a document says, of either kind.
struct Said {
    serial: u64,
    begins: i64,
    expires: i64,
    values: BTreeMap<String, Vec<Value>>,
    revoked: Vec<String>,
    /// What else the audit log has of it.
    about: String,
}
