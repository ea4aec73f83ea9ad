//! What administrators do beyond policies and reference values: versions, leases, anchors, other administrators, token keys, the log's head.

use nacre_core::{
    AnchorState, ResourcePath, SecretArray, SecretBytes,
    jose::{Jwk, PublicKey},
};
use serde_json::Value;

use crate::{
    AuditHead, Broker, BrokerError, GuestChain, GuestList, GuestSummary, Lease, PutOptions, Resource, Revocation,
    admin::Administrator,
    broker::{LOCAL, LONGEST_RESOURCE, entry},
    chain, files,
    store::{
        Page,
        guests::{GuestId, Outcome},
    },
};

/// Administrators beside the first one.
const MOST_ADMINS: usize = 1000;
/// A lease has to be longer than the calls that renew it.
const SHORTEST_LEASE: u32 = 5;
const LONGEST_LEASE: u32 = 30 * 86_400;

/// Guests that are listed at a time.
const MOST_GUESTS: usize = 1000;
/// Audit entries that are looked at for what was released to one guest.
const MOST_AUDIT_LOOKED_AT: usize = 10_000;

impl Broker {
    /// Keeps a value as the new current version of a resource; gives its number.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for a value that is too long or not of its kind, and for a lease that is too short or too long.
    pub fn put_resource_with(
        &self,
        path: &ResourcePath,
        value: &[u8],
        options: PutOptions,
    ) -> Result<u32, BrokerError> {
        self.put_resource_as(LOCAL, path, value, options)
    }

    pub(crate) fn put_resource_as(
        &self,
        actor: &str,
        path: &ResourcePath,
        value: &[u8],
        options: PutOptions,
    ) -> Result<u32, BrokerError> {
        if value.len() > LONGEST_RESOURCE {
            return Err(BrokerError::Invalid(format!(
                "resource of {} bytes: at most {LONGEST_RESOURCE} are kept",
                value.len()
            )));
        }
        if let Some(seconds @ 1..) = options.lease_seconds
            && !(SHORTEST_LEASE..=LONGEST_LEASE).contains(&seconds)
        {
            return Err(BrokerError::Invalid(format!(
                "a lease of {seconds} s: {SHORTEST_LEASE} to {LONGEST_LEASE}, or 0 for none"
            )));
        }
        let value = SecretBytes::new(value.to_vec());
        let entry = entry("resource set", actor, path.to_string());
        self.store.put_resource(path, value, options, self.settings.resource_versions, entry)
    }

    /// Makes a new current version of a key, of random bytes, as long as the one before; gives its number.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] where there is none, or it is no key.
    pub fn rotate_resource(&self, path: &ResourcePath) -> Result<u32, BrokerError> {
        self.rotate_resource_as(LOCAL, path)
    }

    pub(crate) fn rotate_resource_as(&self, actor: &str, path: &ResourcePath) -> Result<u32, BrokerError> {
        let found = self.store.resource(path, None)?;
        let (resource, value) =
            found.ok_or_else(|| BrokerError::Invalid(format!("there is no resource {path} to rotate")))?;
        if !resource.kind.is_key() {
            return Err(BrokerError::Invalid(format!(
                "{path} is of kind {}: only keys are made of random bytes; put its new value instead",
                resource.kind.name()
            )));
        }
        let mut random = Vec::with_capacity(64);
        while random.len() < value.len() {
            random.extend_from_slice(SecretArray::<32>::random().expose());
        }
        random.truncate(value.len());
        let entry = entry("resource rotated", actor, path.to_string());
        let keep = self.settings.resource_versions;
        self.store.put_resource(path, SecretBytes::new(random), PutOptions::default(), keep, entry)
    }

    /// What is known of resources whose paths begin so.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resource_list(&self, prefix: &str) -> Result<Vec<Resource>, BrokerError> {
        self.resource_page(prefix, &Page::ALL)
    }

    pub(crate) fn resource_page(&self, prefix: &str, page: &Page) -> Result<Vec<Resource>, BrokerError> {
        self.store.resources(prefix, page)
    }

    /// The leases of resources whose paths begin so.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn leases(&self, prefix: &str) -> Result<Vec<Lease>, BrokerError> {
        self.lease_page(prefix, &Page::ALL)
    }

    pub(crate) fn lease_page(&self, prefix: &str, page: &Page) -> Result<Vec<Lease>, BrokerError> {
        self.store.leases(prefix, page)
    }

    /// Revokes leases; gives how many. Their guests are told when they renew, so within the time of a lease.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn revoke(&self, revocation: &Revocation) -> Result<usize, BrokerError> {
        self.revoke_as(LOCAL, revocation, "")
    }

    pub(crate) fn revoke_as(&self, actor: &str, revocation: &Revocation, prefix: &str) -> Result<usize, BrokerError> {
        let subject = match revocation {
            Revocation::Lease(name) | Revocation::Resource(name) | Revocation::Measurement(name) => name.clone(),
        };
        self.store.revoke(revocation, prefix, entry("leases revoked", actor, subject))
    }

    /// The anchors of volumes, by `repository/name`.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn anchors(&self, prefix: &str) -> Result<Vec<(String, AnchorState)>, BrokerError> {
        self.store.anchors(prefix)
    }

    /// Removes an anchor, for a volume that is made anew; says whether there was one.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn delete_anchor(&self, name: &str) -> Result<bool, BrokerError> {
        self.delete_anchor_as(LOCAL, name)
    }

    pub(crate) fn delete_anchor_as(&self, actor: &str, name: &str) -> Result<bool, BrokerError> {
        self.store.delete_anchor(name, entry("anchor deleted", actor, name.to_owned()))
    }

    /// Lets somebody else administer.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for a name, a repository or a key that is none, or is another's.
    pub fn set_admin(&self, admin: &Administrator) -> Result<(), BrokerError> {
        self.set_admin_as(LOCAL, admin)
    }

    pub(crate) fn set_admin_as(&self, actor: &str, admin: &Administrator) -> Result<(), BrokerError> {
        let segment = |text: &str| ResourcePath::new(text, "x", "x").is_ok() && text.len() <= 100;
        if !segment(&admin.name) || !admin.repository.as_deref().is_none_or(segment) {
            return Err(BrokerError::Invalid(format!(
                "administrator '{:.100}': names and repositories are 1 to 100 letters, digits, '_', '-' and '.'",
                admin.name
            )));
        }
        let thumbprint = Jwk::from_public(&PublicKey::from_pem(&admin.key)?).thumbprint()?;
        let (config, first) = (self.store.config()?, Jwk::from_public(&self.keys.admin).thumbprint()?);
        let taken = config.admins().iter().any(|(of, _, other)| *of == thumbprint && other.name != admin.name);
        if taken || thumbprint == first {
            return Err(BrokerError::Invalid("this key is another administrator's: each has its own".into()));
        }
        if config.admins().len() >= MOST_ADMINS {
            return Err(BrokerError::Invalid(format!("there are {MOST_ADMINS} administrators already")));
        }
        let mut entry = entry("administrator set", actor, admin.name.clone());
        entry.detail = format!("{} of {}", admin.role.name(), admin.repository.as_deref().unwrap_or("everything"));
        self.store.set_admin(admin, entry)
    }

    /// The administrators beside the first one.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn admins(&self) -> Result<Vec<Administrator>, BrokerError> {
        Ok(self.store.config()?.admins().iter().map(|(_, _, admin)| admin.clone()).collect())
    }

    /// Lets somebody administer no more; says whether it could.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn delete_admin(&self, name: &str) -> Result<bool, BrokerError> {
        self.delete_admin_as(LOCAL, name)
    }

    pub(crate) fn delete_admin_as(&self, actor: &str, name: &str) -> Result<bool, BrokerError> {
        self.store.delete_admin(name, entry("administrator removed", actor, name.to_owned()))
    }

    /// An appraisal policy by its id.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn attestation_policy(&self, id: &str) -> Result<Option<String>, BrokerError> {
        Ok(self.store.config()?.policy(&format!("attestation/{id}")).map(|policy| policy.text().to_owned()))
    }

    /// Removes the release policy of a scope, so that the next wider one decides; says whether there was one.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for the policy of all resources, which is replaced and never removed.
    pub fn delete_resource_policy(&self, scope: &str) -> Result<bool, BrokerError> {
        self.delete_resource_policy_as(LOCAL, scope)
    }

    pub(crate) fn delete_resource_policy_as(&self, actor: &str, scope: &str) -> Result<bool, BrokerError> {
        if scope.is_empty() {
            return Err(BrokerError::Invalid("the policy of all resources is replaced, never removed".into()));
        }
        let key = crate::broker::resource_policy_key(scope)?;
        self.store.delete_policy(&key, entry("resource policy deleted", actor, scope.to_owned()))
    }

    /// The scopes that have a release policy of their own.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resource_policy_scopes(&self) -> Result<Vec<String>, BrokerError> {
        let config = self.store.config()?;
        let scopes = config.policies().filter_map(|(key, _)| key.strip_prefix("resource"));
        Ok(scopes.map(|scope| scope.trim_start_matches('/').to_owned()).collect())
    }

    /// Makes a new key sign tokens. Tokens by the old one hold until they end; guests that pinned it follow its succession.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn rotate_token_key(&self) -> Result<PublicKey, BrokerError> {
        self.rotate_token_key_as(LOCAL)
    }

    pub(crate) fn rotate_token_key_as(&self, actor: &str) -> Result<PublicKey, BrokerError> {
        let overlap = i64::from(self.settings.token_lifetime_seconds);
        let key = self.store.rotate_token_key(overlap, entry("token key rotated", actor, String::new()))?;
        files::write_token_key(&self.dir, &key)?;
        Ok(key)
    }

    /// The key that signs tokens now.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn current_token_key(&self) -> Result<PublicKey, BrokerError> {
        Ok(self.store.config()?.token_keys().current())
    }

    /// The keys whose tokens hold, as a JWK set.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn jwks(&self) -> Result<Value, BrokerError> {
        self.store.config()?.token_keys().jwks()
    }

    /// The last entry of the audit log. Who keeps it elsewhere sees later whether the log up to it was changed.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn audit_head(&self) -> Result<AuditHead, BrokerError> {
        self.store.audit_head()
    }

    /// The hash of an entry of the audit log as it is stored.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn audit_hash(&self, number: u64) -> Result<Option<String>, BrokerError> {
        self.store.audit_hash(number)
    }

    /// Guests that attested or were refused, the newest first; before the one named `before`, `most` at most.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for a `before` that is no guest of the list.
    pub fn guests(&self, list: GuestList, before: Option<&str>, most: usize) -> Result<Vec<GuestSummary>, BrokerError> {
        let before = before.map(|text| {
            let id = GuestId::parse(text).filter(|id| id.list == list);
            id.map(|id| id.number).ok_or_else(|| {
                BrokerError::Invalid(format!("'{text:.40}' is the name of no guest of the list '{}'", list.name()))
            })
        });
        let found = self.store.guests(list, before.transpose()?, most.min(MOST_GUESTS))?;
        Ok(found.iter().map(|(id, _, record)| chain::summary(id.to_string(), record)).collect())
    }

    /// A guest by its name, as [`guests`](Self::guests) has it, with its chain of trust; `None` where it is not kept, or not any more.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn guest_chain(&self, id: &str) -> Result<Option<GuestChain>, BrokerError> {
        let Some(id) = GuestId::parse(id) else { return Ok(None) };
        let Some((audit, record)) = self.store.guest(id)? else { return Ok(None) };
        let (events, whole) = match &record.outcome {
            Outcome::Attested(attested) => {
                self.store.audit_of(&record.guest, audit, attested.ear.exp, MOST_AUDIT_LOOKED_AT)?
            }
            Outcome::Refused(_) => (Vec::new(), true),
        };
        Ok(Some(chain::chain(id.to_string(), audit, &record, &events, whole)))
    }

    /// The counters, as Prometheus reads them.
    pub fn metrics(&self) -> String {
        self.metrics.text(self.sessions.count().ok(), self.audit_head().ok().map(|head| head.number))
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn probe(&self) -> Result<(), BrokerError> {
        self.store.probe()
    }
}
