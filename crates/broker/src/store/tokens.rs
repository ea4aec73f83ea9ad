//! The keys that sign attestation tokens: one that signs, and those before it, whose tokens hold until they end.
//!
//! ```text
//! keys  token/<thumbprint>          JSON [`TokenKey`]
//! keys  token-secret/<thumbprint>   PKCS #8 PEM, of the one that signs
//! ```
//!
//! A new key comes with a succession: a JWS by the key before it that names it. A guest that pinned an older key follows successions to the one
//! that signs. Private halves are removed when their key is followed.

use nacre_core::jose::{Jwk, PrivateKey, PublicKey, sign_compact};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{AuditEntry, MOST_ROWS, Records, Store, audit, config::touch, from_json};
use crate::{
    BrokerError,
    admin::now,
    storage::{Lane, Table},
};

#[derive(Clone, Deserialize, Serialize)]
struct TokenKey {
    /// PEM.
    public: String,
    created: i64,
    /// Until when tokens by it hold; `None` for the one that signs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<i64>,
    /// That the key before it is followed by this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    succession: Option<String>,
}

/// The keys, as of a revision of the configuration.
pub(crate) struct TokenKeys {
    signer: PrivateKey,
    known: Vec<Known>,
}

struct Known {
    thumbprint: String,
    key: PublicKey,
    created: i64,
    until: Option<i64>,
    succession: Option<String>,
}

impl TokenKeys {
    pub(super) fn load(records: &mut Records<'_, '_>) -> Result<Self, BrokerError> {
        let (mut signer, mut known) = (None, Vec::new());
        for (name, bytes) in records.list(Table::Keys, "token/", None, MOST_ROWS)? {
            let row: TokenKey = from_json(Table::Keys, name.as_bytes(), bytes.expose())?;
            if row.until.is_none() {
                signer = Some(private(records, &name)?);
            }
            known.push(Known {
                thumbprint: name.trim_start_matches("token/").to_owned(),
                key: PublicKey::from_pem(&row.public)?,
                created: row.created,
                until: row.until,
                succession: row.succession,
            });
        }
        known.sort_by_key(|known| std::cmp::Reverse((known.until.is_none(), known.created)));
        let signer =
            signer.ok_or_else(|| BrokerError::Damaged { what: "its token keys".into(), why: "none signs".into() })?;
        Ok(Self { signer, known })
    }

    /// The key that signs.
    pub(crate) fn signer(&self) -> &PrivateKey {
        &self.signer
    }

    /// Its public half.
    pub(crate) fn current(&self) -> PublicKey {
        self.signer.public()
    }

    /// The key of a thumbprint, while its tokens hold.
    pub(crate) fn by_id(&self, thumbprint: &str) -> Option<&PublicKey> {
        let now = now();
        let holds = |known: &&Known| known.thumbprint == thumbprint && known.until.is_none_or(|until| until > now);
        self.known.iter().find(holds).map(|known| &known.key)
    }

    /// The names by which administrators may know this broker: all of its token keys, since a change of keys must not lock them out.
    pub(crate) fn thumbprints(&self) -> Vec<String> {
        self.known.iter().map(|known| known.thumbprint.clone()).collect()
    }

    /// The keys as a JWK set (RFC 7517), the one that signs first; what follows on which is in `nacre.succession`.
    pub(crate) fn jwks(&self) -> Result<Value, BrokerError> {
        let keys = self.known.iter().map(|known| {
            let mut jwk = serde_json::to_value(Jwk::from_public(&known.key)).unwrap_or_default();
            jwk["kid"] = known.thumbprint.clone().into();
            jwk["use"] = "sig".into();
            jwk["alg"] = "ES256".into();
            if let Some(succession) = &known.succession {
                jwk["nacre.succession"] = succession.clone().into();
            }
            if let Some(until) = known.until {
                jwk["exp"] = until.into();
            }
            jwk
        });
        Ok(json!({"keys": keys.collect::<Vec<_>>()}))
    }
}

fn secret(name: &str) -> String {
    format!("token-secret/{}", name.trim_start_matches("token/"))
}

fn private(records: &mut Records<'_, '_>, name: &str) -> Result<PrivateKey, BrokerError> {
    let missing =
        || BrokerError::Damaged { what: format!("token key {name}"), why: "its private half is missing".into() };
    let bytes = records.get(Table::Keys, secret(name))?.ok_or_else(missing)?;
    Ok(PrivateKey::from_bytes(bytes.expose())?)
}

fn put(records: &mut Records<'_, '_>, name: &str, row: &TokenKey, key: &PrivateKey) -> Result<(), BrokerError> {
    records.put(Table::Keys, secret(name), key.to_pkcs8_pem()?.as_bytes())?;
    records.put_json(Table::Keys, name, row)
}

fn row(key: &PrivateKey, succession: Option<String>) -> Result<(String, TokenKey), BrokerError> {
    let public = key.public();
    let name = format!("token/{}", Jwk::from_public(&public).thumbprint()?);
    Ok((name, TokenKey { public: public.to_pem()?, created: now(), until: None, succession }))
}

impl Store {
    /// Keeps the first token key, unless there is one.
    pub(crate) fn keep_token_key(&self, key: PrivateKey) -> Result<(), BrokerError> {
        if !self.view(|records| Ok(records.tx.list(Table::Keys, "token/", None, 1)?.is_empty()))? {
            return Ok(());
        }
        let (name, row) = row(&key, None)?;
        self.update(Lane::Log, move |records| {
            if records.tx.list(Table::Keys, "token/", None, 1)?.is_empty() {
                put(records, &name, &row, &key)?;
                touch(records.tx)?;
            }
            Ok(())
        })
    }

    /// Makes a new key sign; tokens by the old one hold for another `overlap` seconds.
    pub(crate) fn rotate_token_key(&self, overlap: i64, entry: AuditEntry) -> Result<PublicKey, BrokerError> {
        let new = PrivateKey::generate_p256();
        let public = new.public();
        self.update(Lane::Log, move |records| {
            let (mut next, mut old) = (row(&new, None)?, None);
            for (name, bytes) in records.list(Table::Keys, "token/", None, MOST_ROWS)? {
                let mut known: TokenKey = from_json(Table::Keys, name.as_bytes(), bytes.expose())?;
                if known.until.is_some() {
                    continue;
                }
                let statement = json!({
                    "nacre.token-key": Jwk::from_public(&new.public()),
                    "sub": next.0.trim_start_matches("token/"),
                    "iat": now(),
                });
                let before = private(records, &name)?;
                let kid = name.trim_start_matches("token/");
                next.1.succession = Some(sign_compact(&before, Some(kid), &statement)?);
                records.tx.delete(Table::Keys, secret(&name));
                known.until = Some(now() + overlap);
                old = Some((name, known));
            }
            let (name, known) =
                old.ok_or_else(|| BrokerError::Damaged { what: "its token keys".into(), why: "none signs".into() })?;
            records.put_json(Table::Keys, name, &known)?;
            put(records, &next.0, &next.1, &new)?;
            touch(records.tx)?;
            let mut entry = entry.clone();
            entry.subject = next.0.trim_start_matches("token/").to_owned();
            audit::append(records.tx, entry).map(drop)
        })?;
        Ok(public)
    }
}
