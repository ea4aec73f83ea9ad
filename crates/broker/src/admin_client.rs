//! The administrator's client: blocking, over the same checked channel as the guests'.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::client::{BrokerConfig, Call, ClientError, Credential, Transport, accept};
use nacre_core::{
    ResourcePath,
    jose::{PrivateKey, PublicKey, b64},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    Administrator, AuditEntry, AuditHead, Enrolment, GuestChain, GuestList, GuestSummary, Lease, PutOptions,
    References, Resource, Revocation, Signer, admin_token,
};

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";
const LONGEST: usize = 16 * 1024 * 1024;
const TOKEN_SECONDS: u32 = 60;

/// Administers a running broker. A fresh one-minute token is made for every call.
pub struct AdminClient {
    transport: Transport,
    key: PrivateKey,
    broker: PublicKey,
    subject: String,
}

impl AdminClient {
    /// A client. The configuration must pin the broker's token key (`token.pub`), for which the admin tokens are made.
    ///
    /// # Errors
    /// [`ClientError::Config`].
    pub fn new(config: &BrokerConfig, key: PrivateKey, subject: &str) -> Result<Self, ClientError> {
        let broker = config
            .token_key
            .clone()
            .ok_or_else(|| ClientError::Config("an administrator needs the broker's token key (token.pub)".into()))?;
        Ok(Self { transport: Transport::new(config)?, key, broker, subject: subject.into() })
    }

    /// A token for HTTP calls of one's own, good for a minute.
    ///
    /// # Errors
    /// [`ClientError::Config`] for a key that cannot sign.
    pub fn token(&self) -> Result<String, ClientError> {
        admin_token(&self.key, &self.broker, &self.subject, TOKEN_SECONDS)
            .map_err(|e| ClientError::Config(e.to_string()))
    }

    fn call(&self, step: &'static str, path: &str, call: Call<'_>) -> Result<Vec<u8>, ClientError> {
        let token = self.token()?;
        let reply = self.transport.call(step, path, Credential::Bearer(&token), call, LONGEST)?;
        Ok(accept(step, reply)?.body)
    }

    fn post(&self, step: &'static str, path: &str, value: &Value) -> Result<(), ClientError> {
        self.call(step, path, Call::Post(JSON, value.to_string().as_bytes())).map(drop)
    }

    fn get<T: DeserializeOwned>(&self, step: &'static str, path: &str) -> Result<T, ClientError> {
        let body = self.call(step, path, Call::Get)?;
        serde_json::from_slice(&body).map_err(|e| ClientError::Answer { step, why: e.to_string() })
    }

    /// Sets a resource.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn put_resource(&self, path: &ResourcePath, value: &[u8]) -> Result<(), ClientError> {
        self.call("set resource", &format!("/kbs/v0/resource/{path}"), Call::Post(BYTES, value)).map(drop)
    }

    /// Sets a resource of a kind, lent for so long; gives its version.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn put_resource_with(
        &self,
        path: &ResourcePath,
        value: &[u8],
        options: PutOptions,
    ) -> Result<u32, ClientError> {
        let kind = options.kind.map(|kind| format!("kind={}", kind.name()));
        let lease = options.lease_seconds.map(|seconds| format!("lease={seconds}"));
        let query: Vec<String> = kind.into_iter().chain(lease).collect();
        let target = format!("/kbs/v0/resource/{path}?{}", query.join("&"));
        self.post_for("set resource", &target, Call::Post(BYTES, value), "version")
    }

    /// Makes a new version of a key; gives its number.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn rotate_resource(&self, path: &ResourcePath) -> Result<u32, ClientError> {
        let target = format!("/kbs/v0/resource-rotation/{path}");
        self.post_for("rotate resource", &target, Call::Post(JSON, b"{}"), "version")
    }

    /// One member of an answer.
    fn post_for<T: DeserializeOwned>(
        &self,
        step: &'static str,
        path: &str,
        call: Call<'_>,
        member: &str,
    ) -> Result<T, ClientError> {
        let fail = |why: String| ClientError::Answer { step, why };
        let body = self.call(step, path, call)?;
        let mut answer: Value = serde_json::from_slice(&body).map_err(|e| fail(e.to_string()))?;
        let value = answer.get_mut(member).map(Value::take).unwrap_or_default();
        serde_json::from_value(value).map_err(|e| fail(format!("{member}: {e}")))
    }

    /// The leases that there are.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn leases(&self) -> Result<Vec<Lease>, ClientError> {
        self.get("list leases", "/kbs/v0/leases")
    }

    /// Revokes leases; gives how many.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn revoke(&self, revocation: &Revocation) -> Result<usize, ClientError> {
        let body = match revocation {
            Revocation::Lease(name) => json!({"lease": name}),
            Revocation::Resource(path) => json!({"resource": path}),
            Revocation::Measurement(measurement) => json!({"measurement": measurement}),
        };
        let call = body.to_string();
        self.post_for("revoke leases", "/kbs/v0/lease-revocation", Call::Post(JSON, call.as_bytes()), "revoked")
    }

    /// The anchors of volumes: name, fence, sequence.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn anchors(&self) -> Result<Vec<AnchorInfo>, ClientError> {
        self.get("list anchors", "/kbs/v0/anchors")
    }

    /// Removes an anchor by its `repository/name`.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_anchor(&self, name: &str) -> Result<(), ClientError> {
        self.call("delete anchor", &format!("/kbs/v0/anchor/{name}"), Call::Delete).map(drop)
    }

    /// The TPMs whose attestation key is known.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn enrolments(&self) -> Result<Vec<Enrolment>, ClientError> {
        self.get("list enrolments", "/kbs/v0/enrolments")
    }

    /// Lets the attestation key of a TPM count no more, or forgets the TPM.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn revoke_enrolment(&self, name: &str, forget: bool) -> Result<(), ClientError> {
        let query = if forget { "?forget=true" } else { "" };
        self.call("revoke an enrolment", &format!("/kbs/v0/enrolments/{name}{query}"), Call::Delete).map(drop)
    }

    /// The administrators beside the first one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn admins(&self) -> Result<Vec<Administrator>, ClientError> {
        self.get("list administrators", "/kbs/v0/admins")
    }

    /// Lets somebody else administer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_admin(&self, admin: &Administrator) -> Result<(), ClientError> {
        self.post("set administrator", "/kbs/v0/admins", &json!(admin))
    }

    /// Lets somebody administer no more.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_admin(&self, name: &str) -> Result<(), ClientError> {
        self.call("remove administrator", &format!("/kbs/v0/admins/{name}"), Call::Delete).map(drop)
    }

    /// Makes a new key sign tokens; gives it, PEM.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn rotate_token_key(&self) -> Result<String, ClientError> {
        self.post_for("rotate token key", "/kbs/v0/token-key", Call::Post(JSON, b"{}"), "token_key")
    }

    /// Removes the release policy of exactly a scope.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_resource_policy(&self, scope: &ResourceScope<'_>) -> Result<(), ClientError> {
        self.call("delete resource policy", &scope.path(), Call::Delete).map(drop)
    }

    /// The last entry of the audit log, or entry `number`: its number and hash.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn audit_head(&self, number: Option<u64>) -> Result<AuditHead, ClientError> {
        let query = number.map(|number| format!("?number={number}")).unwrap_or_default();
        self.get("audit head", &format!("/kbs/v0/audit-head{query}"))
    }

    /// Removes a resource.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_resource(&self, path: &ResourcePath) -> Result<(), ClientError> {
        self.call("delete resource", &format!("/kbs/v0/resource/{path}"), Call::Delete).map(drop)
    }

    /// What is known of all resources but their values.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn resources(&self) -> Result<Vec<Resource>, ClientError> {
        self.get("list resources", "/kbs/v0/resources")
    }

    /// Sets an appraisal policy.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_attestation_policy(&self, id: &str, text: &str) -> Result<(), ClientError> {
        let body = json!({"type": "rego", "policy_id": id, "policy": b64::encode(text)});
        self.post("set attestation policy", "/kbs/v0/attestation-policy", &body)
    }

    /// Sets the release policy of a scope; the empty one is all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_resource_policy(&self, scope: &ResourceScope<'_>, text: &str) -> Result<(), ClientError> {
        self.post("set resource policy", &scope.path(), &json!({"policy": b64::encode(text)}))
    }

    /// The release policy of exactly a scope.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn resource_policy(&self, scope: &ResourceScope<'_>) -> Result<String, ClientError> {
        let answer: Value = self.get("get resource policy", &scope.path())?;
        policy_of(&answer)
            .ok_or_else(|| ClientError::Answer { step: "get resource policy", why: "no policy in it".into() })
    }

    /// Sets a reference value, until `expires` (seconds since 1970) or for a year.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn add_reference_value(&self, id: &str, values: &[Value], expires: Option<i64>) -> Result<(), ClientError> {
        let payload = BASE64_STANDARD.encode(json!({id: values}).to_string());
        let body = json!({"version": "0.1.0", "type": "sample", "payload": payload, "expires": expires});
        self.post("set reference value", "/kbs/v0/reference-value", &body)
    }

    /// The values of a reference value; `None` where there is none of that name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reference_value(&self, id: &str) -> Result<Option<Vec<Value>>, ClientError> {
        self.get("get reference value", &format!("/kbs/v0/reference-value/{id}"))
    }

    /// All reference values, those that have expired too.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn references(&self) -> Result<References, ClientError> {
        self.get("list reference values", "/kbs/v0/reference-values")
    }

    /// Revokes a reference value.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_reference(&self, id: &str) -> Result<(), ClientError> {
        self.call("revoke reference value", &format!("/kbs/v0/reference-value/{id}"), Call::Delete).map(drop)
    }

    /// Takes a signed reference document.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn import_references(&self, document: &str) -> Result<(), ClientError> {
        let body = json!({"version": "0.1.0", "type": crate::reference::SIGNED, "payload": document});
        self.post("take reference document", "/kbs/v0/reference-value", &body)
    }

    /// Takes a signed CoRIM.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn import_corim(&self, bytes: &[u8]) -> Result<(), ClientError> {
        let payload = BASE64_STANDARD.encode(bytes);
        let body = json!({"version": "0.1.0", "type": crate::reference::CORIM, "payload": payload});
        self.post("take CoRIM", "/kbs/v0/reference-value", &body)
    }

    /// Those who may sign reference values.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn signers(&self) -> Result<Vec<Signer>, ClientError> {
        self.get("list signers", "/kbs/v0/reference-signers")
    }

    /// Lets somebody sign reference values.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_signer(&self, signer: &Signer) -> Result<(), ClientError> {
        self.post("set signer", "/kbs/v0/reference-signers", &json!(signer))
    }

    /// Lets somebody sign no more, and with `values` removes what they signed.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn delete_signer(&self, name: &str, values: bool) -> Result<(), ClientError> {
        let path = format!("/kbs/v0/reference-signers/{name}?values={values}");
        self.call("remove signer", &path, Call::Delete).map(drop)
    }

    /// An appraisal policy by its id.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn attestation_policy(&self, id: &str) -> Result<String, ClientError> {
        let answer: Value = self.get("get attestation policy", &format!("/kbs/v0/attestation-policy/{id}"))?;
        policy_of(&answer)
            .ok_or_else(|| ClientError::Answer { step: "get attestation policy", why: "no policy in it".into() })
    }

    /// Trusts a simulated platform.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn add_sim_platform_key(&self, key: &PublicKey) -> Result<(), ClientError> {
        let pem = key.to_pem().map_err(|e| ClientError::Config(e.to_string()))?;
        self.call("trust platform", "/kbs/v0/sim-platform", Call::Post("application/x-pem-file", pem.as_bytes()))
            .map(drop)
    }

    /// Guests that attested or were refused, the newest first; before the one named `before`, `most` at most.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn guests(&self, list: GuestList, before: Option<&str>, most: usize) -> Result<Vec<GuestSummary>, ClientError> {
        let before = before.map(|id| format!("&before={id}")).unwrap_or_default();
        self.get("list guests", &format!("/kbs/v0/guests?list={}&most={most}{before}", list.name()))
    }

    /// A guest by its name, with its chain of trust.
    ///
    /// # Errors
    /// [`ClientError`], 404 among them.
    pub fn guest_chain(&self, id: &str) -> Result<GuestChain, ClientError> {
        self.get("show guest", &format!("/kbs/v0/guests/{id}"))
    }

    /// The audit log after an entry's number, at most 1000 entries.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn audit(&self, after: u64) -> Result<Vec<AuditEntry>, ClientError> {
        self.get("audit", &format!("/kbs/v0/audit?after={after}"))
    }
}

impl std::fmt::Debug for AdminClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminClient").field("url", &self.transport.url()).finish_non_exhaustive()
    }
}

fn policy_of(answer: &Value) -> Option<String> {
    let bytes = b64::decode(answer.get("policy").and_then(Value::as_str).unwrap_or_default());
    bytes.ok().and_then(|bytes| String::from_utf8(bytes).ok())
}

/// How far a volume has come, by its anchor.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct AnchorInfo {
    /// `repository/name`.
    pub name: String,
    /// Counts who took it over.
    pub fence: u64,
    /// Counts what was committed.
    pub sequence: u64,
}

/// What a release policy is for. The most specific one decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceScope<'a> {
    /// All resources that have no policy of their own.
    All,
    /// A repository's.
    Repository(&'a str),
    /// One resource.
    Resource(&'a ResourcePath),
    /// As it is spelled: nothing, a repository, `repository/type` or a whole path.
    Named(&'a str),
}

impl ResourceScope<'_> {
    fn path(&self) -> String {
        match self {
            Self::All | Self::Named("") => "/kbs/v0/resource-policy".into(),
            Self::Repository(name) | Self::Named(name) => format!("/kbs/v0/resource-policy?scope={name}"),
            Self::Resource(path) => format!("/kbs/v0/resource-policy?scope={path}"),
        }
    }
}
