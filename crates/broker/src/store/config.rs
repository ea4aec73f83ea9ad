//! What decides: policies, reference values, platforms, administrators. All of it is held in memory, as of a revision that grows with each change.
//!
//! ```text
//! meta        revision           decimal; changed with each row below
//! policies    attestation/<id>   Rego
//!             resource[/<scope>] Rego; the scope is a repository, repository/type or a whole path
//! references  id                 JSON {"values":[…],"expires":seconds since 1970,"issuer"?}
//! platforms   tee/thumbprint     PEM public key
//!             tpm-ek/<name>      JSON [`Enrolment`]
//!             reference-signer/<name>   JSON [`Signer`](crate::reference::Signer)
//! admins      name               JSON [`Administrator`]
//! ```

use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::sim::{self, SimVerifier};
use nacre_core::jose::{Jwk, PublicKey};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AuditEntry, MOST_ROWS, Records, Store, audit, from_json, tokens::TokenKeys};
use crate::{
    BrokerError,
    admin::{Administrator, now},
    enrolment::{Enrolment, MOST_ENROLLED, Recorded},
    policy::Policy,
    storage::{Lane, Table, Tx},
};

/// Where among the platforms TPMs are whose attestation keys were enrolled.
const ENROLLED: &str = "tpm-ek/";
/// Where among the platforms those are who sign reference values.
const SIGNERS: &str = "reference-signer";

/// A reference value: what a measurement is compared with.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceValue {
    /// The values that are good.
    pub values: Vec<Value>,
    /// When they cease to be, in seconds since 1970.
    pub expires: i64,
    /// Who signed the document that they came in; empty where an administrator set them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub issuer: String,
}

/// The configuration as of a revision.
pub(crate) struct Config {
    pub(super) revision: String,
    policies: BTreeMap<String, Arc<Policy>>,
    references: Arc<BTreeMap<String, ReferenceValue>>,
    platforms: BTreeMap<String, String>,
    /// By the TPM's name.
    enrolments: BTreeMap<String, Enrolment>,
    /// The names of TPMs by their AKs.
    enrolled_aks: BTreeMap<String, String>,
    sim: SimVerifier,
    token_keys: TokenKeys,
    admins: Vec<(String, PublicKey, Administrator)>,
}

pub(super) fn revision(tx: &mut Tx<'_>) -> Result<String, BrokerError> {
    let bytes = tx.get(Table::Meta, "revision")?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Says that what is held in memory is out of date.
pub(super) fn touch(tx: &mut Tx<'_>) -> Result<(), BrokerError> {
    let next = revision(tx)?.parse::<u64>().unwrap_or_default() + 1;
    tx.put(Table::Meta, "revision", next.to_string());
    Ok(())
}

fn text(table: Table, key: &str, bytes: &[u8]) -> Result<String, BrokerError> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| BrokerError::Damaged { what: format!("{} {key}", table.name()), why: "not a text".into() })
}

impl Config {
    pub(super) fn load(records: &mut Records<'_, '_>) -> Result<Self, BrokerError> {
        // Reads of a shared storage are no snapshot: what changed in between is read again.
        loop {
            let before = revision(records.tx)?;
            let config = Self::load_once(records, before.clone())?;
            if revision(records.tx)? == before {
                return Ok(config);
            }
        }
    }

    fn load_once(records: &mut Records<'_, '_>, revision: String) -> Result<Self, BrokerError> {
        let (mut policies, mut references, mut platforms) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (key, bytes) in records.list(Table::Policies, "", None, MOST_ROWS)? {
            let policy = Policy::new(text(Table::Policies, &key, bytes.expose())?);
            policies.insert(key, Arc::new(policy));
        }
        for (key, bytes) in records.list(Table::References, "", None, MOST_ROWS)? {
            let value = from_json(Table::References, key.as_bytes(), bytes.expose())?;
            references.insert(key, value);
        }
        for (key, bytes) in records.list(Table::Platforms, "", None, MOST_ROWS)? {
            let pem = text(Table::Platforms, &key, bytes.expose())?;
            platforms.insert(key, pem);
        }
        let mut enrolments = BTreeMap::new();
        for (key, text) in platforms.iter().filter(|(key, _)| key.starts_with(ENROLLED)) {
            let enrolment: Enrolment = from_json(Table::Platforms, key.as_bytes(), text.as_bytes())?;
            enrolments.insert(enrolment.name.clone(), enrolment);
        }
        let enrolled_aks =
            enrolments.values().map(|enrolment| (enrolment.ak.clone(), enrolment.name.clone())).collect();
        let (mut sim, start) = (SimVerifier::new(), format!("{}/", sim::TEE));
        for (_, pem) in platforms.iter().filter(|(key, _)| key.starts_with(&start)) {
            sim.trust(PublicKey::from_pem(pem)?)?;
        }
        let mut admins = Vec::new();
        for (key, bytes) in records.list(Table::Admins, "", None, MOST_ROWS)? {
            let admin: Administrator = from_json(Table::Admins, key.as_bytes(), bytes.expose())?;
            let public = PublicKey::from_pem(&admin.key)?;
            admins.push((Jwk::from_public(&public).thumbprint()?, public, admin));
        }
        let token_keys = TokenKeys::load(records)?;
        Ok(Self {
            revision,
            policies,
            references: Arc::new(references),
            platforms,
            enrolments,
            enrolled_aks,
            sim,
            token_keys,
            admins,
        })
    }

    pub(crate) fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The TPMs that were enrolled.
    pub(crate) fn enrolments(&self) -> impl Iterator<Item = &Enrolment> {
        self.enrolments.values()
    }

    /// A TPM that was enrolled, by its name.
    pub(crate) fn enrolment(&self, name: &str) -> Option<&Enrolment> {
        self.enrolments.get(name)
    }

    /// A TPM that was enrolled, by its AK in base64.
    pub(crate) fn enrolled_ak(&self, ak: &str) -> Option<&Enrolment> {
        self.enrolments.get(self.enrolled_aks.get(ak)?)
    }

    /// All reference values: whether they have expired is for whoever looks one up.
    pub(crate) fn references(&self) -> Arc<BTreeMap<String, ReferenceValue>> {
        self.references.clone()
    }

    /// A reference value that has not expired.
    pub(crate) fn reference(&self, id: &str) -> Option<&ReferenceValue> {
        self.references.get(id).filter(|value| value.expires > now())
    }

    /// The keys that sign tokens.
    pub(crate) fn token_keys(&self) -> &TokenKeys {
        &self.token_keys
    }

    /// The administrators beside the first one, by the thumbprints of their keys.
    pub(crate) fn admins(&self) -> &[(String, PublicKey, Administrator)] {
        &self.admins
    }

    /// The keys of the release policies that there are: `resource[/<scope>]`.
    pub(crate) fn policies(&self) -> impl Iterator<Item = (&str, &str)> {
        self.policies.iter().map(|(key, policy)| (key.as_str(), policy.text()))
    }

    /// Those who may sign reference values, as JSON.
    pub(crate) fn signers(&self) -> impl Iterator<Item = &str> {
        let start = format!("{SIGNERS}/");
        self.platforms.iter().filter(move |(key, _)| key.starts_with(&start)).map(|(_, text)| text.as_str())
    }

    /// What verifies simulated evidence.
    pub(crate) fn sim(&self) -> &SimVerifier {
        &self.sim
    }

    /// The thumbprints of the platforms of a TEE.
    pub(crate) fn platform_names(&self, tee: &str) -> Vec<String> {
        let start = format!("{tee}/");
        self.platforms.keys().filter_map(|key| key.strip_prefix(&start)).map(str::to_owned).collect()
    }
}

impl Store {
    fn configure(
        &self,
        table: Table,
        key: &str,
        value: Option<Vec<u8>>,
        entry: AuditEntry,
    ) -> Result<bool, BrokerError> {
        let key = key.to_owned();
        self.change(entry, move |records| {
            let existed = records.tx.get(table, &key)?.is_some();
            match &value {
                Some(value) => records.put(table, &key, value)?,
                None => drop(records.delete(table, &key)?),
            }
            touch(records.tx)?;
            Ok(existed)
        })
    }

    pub(crate) fn set_policy(&self, key: &str, text: &str, entry: AuditEntry) -> Result<(), BrokerError> {
        self.configure(Table::Policies, key, Some(text.into()), entry).map(drop)
    }

    pub(crate) fn set_reference(&self, id: &str, value: &ReferenceValue, entry: AuditEntry) -> Result<(), BrokerError> {
        let text = serde_json::to_vec(value).map_err(|e| BrokerError::Invalid(e.to_string()))?;
        self.configure(Table::References, id, Some(text), entry).map(drop)
    }

    pub(crate) fn delete_policy(&self, key: &str, entry: AuditEntry) -> Result<bool, BrokerError> {
        self.configure(Table::Policies, key, None, entry)
    }

    pub(crate) fn set_admin(&self, admin: &Administrator, entry: AuditEntry) -> Result<(), BrokerError> {
        let text = serde_json::to_vec(admin).map_err(|e| BrokerError::Invalid(e.to_string()))?;
        self.configure(Table::Admins, &admin.name, Some(text), entry).map(drop)
    }

    pub(crate) fn delete_admin(&self, name: &str, entry: AuditEntry) -> Result<bool, BrokerError> {
        self.configure(Table::Admins, name, None, entry)
    }

    pub(crate) fn delete_reference(&self, id: &str, entry: AuditEntry) -> Result<bool, BrokerError> {
        self.configure(Table::References, id, None, entry)
    }

    pub(crate) fn set_signer(
        &self,
        name: &str,
        value: Option<Vec<u8>>,
        entry: AuditEntry,
    ) -> Result<bool, BrokerError> {
        self.configure(Table::Platforms, &format!("{SIGNERS}/{name}"), value, entry)
    }

    /// Keeps the values of a signed document and the signer with its new serial, if the signer is still as it was.
    pub(crate) fn import_references(
        &self,
        name: &str,
        before: Vec<u8>,
        after: Vec<u8>,
        values: Vec<(String, Option<ReferenceValue>)>,
        entry: AuditEntry,
    ) -> Result<bool, BrokerError> {
        let key = format!("{SIGNERS}/{name}");
        self.change(entry, move |records| {
            if records.get(Table::Platforms, &key)?.is_none_or(|found| found.expose() != before) {
                return Ok(false);
            }
            records.put(Table::Platforms, &key, &after)?;
            for (id, value) in &values {
                match value {
                    Some(value) => records.put_json(Table::References, id, value)?,
                    None => drop(records.delete(Table::References, id)?),
                }
            }
            touch(records.tx)?;
            Ok(true)
        })
    }

    /// Keeps the AK of a TPM, in the place of its last one.
    pub(crate) fn enrol(&self, enrolment: &Enrolment, entry: AuditEntry) -> Result<Recorded, BrokerError> {
        let (key, enrolment) = (format!("{ENROLLED}{}", enrolment.name), enrolment.clone());
        self.update(Lane::Log, move |records| {
            match records.get_json::<Enrolment>(Table::Platforms, &key)? {
                Some(known) if known.revoked.is_some() => return Ok(Recorded::Revoked),
                Some(_) => {}
                None => {
                    if records.tx.list(Table::Platforms, ENROLLED, None, MOST_ENROLLED)?.len() >= MOST_ENROLLED {
                        return Ok(Recorded::Full);
                    }
                }
            }
            records.put_json(Table::Platforms, &key, &enrolment)?;
            touch(records.tx)?;
            audit::append(records.tx, entry.clone())?;
            Ok(Recorded::Done)
        })
    }

    /// Marks the AK of a TPM as revoked, or removes it; says whether it was there.
    pub(crate) fn revoke_enrolment(
        &self,
        name: &str,
        forget: bool,
        now: i64,
        entry: AuditEntry,
    ) -> Result<bool, BrokerError> {
        let key = format!("{ENROLLED}{name}");
        self.change(entry, move |records| {
            let Some(mut known) = records.get_json::<Enrolment>(Table::Platforms, &key)? else { return Ok(false) };
            match forget {
                true => drop(records.delete(Table::Platforms, &key)?),
                false => {
                    known.revoked = Some(known.revoked.unwrap_or(now));
                    records.put_json(Table::Platforms, &key, &known)?;
                }
            }
            touch(records.tx)?;
            Ok(true)
        })
    }

    pub(crate) fn add_platform(&self, tee: &str, name: &str, pem: &str, entry: AuditEntry) -> Result<(), BrokerError> {
        self.configure(Table::Platforms, &format!("{tee}/{name}"), Some(pem.into()), entry).map(drop)
    }
}
