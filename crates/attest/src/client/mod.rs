//! The guest's side of the exchange: attest to a broker, fetch secrets, know the time.
//!
//! ```text
//! auth ─▶ evidence ─▶ attest ─▶ token (cached) ─▶ GET resource ─▶ JWE opened with the TEE key
//! ```
//!
//! Channel: a secret must come from a broker that the host cannot impersonate. The JWE only keeps it from being read; it would not keep
//! a false broker from handing out false keys, policies or times. So `https` is required, verified by the certificate that the
//! configuration pins (which lies in the measured init data, so that a host that swaps it changes the evidence) or by the system's
//! roots; plain `http` is refused but to a loopback address or where [`BrokerConfig::allow_http`] says so. Proxies of the
//! environment are not used and redirects are not followed.
//!
//! | file | what |
//! |---|---|
//! | `http` | the channel |
//! | `succession` | from the token key that is pinned to the one that signs |
//! | `lease` | resources that are lent, their renewal |
//! | `agent` | renews leases on time, and says when one has ended |
//! | `tenancy` | what a guest's parts were lent, for as long as they need it |
//! | `enrol` | the attestation key of a TPM, enrolled |
//! | `anchor` | the broker as a place that a host cannot turn back |
//!
//! The TEE key is made anew for every attestation, lives in guest memory only, and is bound into the evidence with the nonce.

mod agent;
mod anchor;
mod enrol;
mod http;
mod lease;
mod succession;
mod tenancy;
mod time;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_core::{
    Clock, KeySource, KeySourceError, ResourcePath, ResourceUri, SecretBytes, TrustedTime,
    jose::{JoseError, Jwk, PrivateKey, PublicKey, b64},
};
use serde_json::Value;

use crate::{
    ear::{Ear, EarError},
    eventlog::{runtime::RuntimeLog, story::Happening},
    evidence::{Attester, AttesterError, hex},
    rcar::{
        Attestation, Challenge, CompositeEvidence, ErrorBody, InitDataMessage, LONGEST_CHALLENGE, LONGEST_TOKEN,
        MessageError, Request, RuntimeData, TokenReply, report_data,
    },
};
pub use agent::{Agent, LeaseEnd, Needed};
pub use anchor::BrokerAnchor;
pub use enrol::enrol;
pub use http::{Call, Credential, Reply, Transport};
pub use lease::{Borrowed, Lease};
pub use succession::successor;
pub use tenancy::{Tenancy, Tenure};
use time::BootTime;

/// Bytes of an encrypted resource at most.
const LONGEST_RESOURCE: usize = 16 * 1024 * 1024;
const JSON: &str = "application/json";
/// A token is renewed this long before it ends.
const RENEW_BEFORE: Duration = Duration::from_secs(30);

/// Why the broker gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration cannot be right.
    #[error("broker configuration: {0}")]
    Config(String),
    /// The broker cannot be reached.
    #[error("broker {url}: {source} (is it running, does its name resolve, is its certificate the pinned one?)")]
    Network {
        /// Where.
        url: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// The broker said no.
    #[error("broker refused {step}: {kind} (HTTP {status}): {detail}")]
    Refused {
        /// What was asked.
        step: &'static str,
        /// The HTTP status.
        status: u16,
        /// The kind of error that it names.
        kind: String,
        /// What it says.
        detail: String,
    },
    /// A message that is none.
    #[error("broker's answer to {step}: {source}")]
    Message {
        /// What was asked.
        step: &'static str,
        /// What is wrong.
        source: MessageError,
    },
    /// An answer that cannot be used.
    #[error("broker's answer to {step}: {why}")]
    Answer {
        /// What was asked.
        step: &'static str,
        /// What is wrong with the answer.
        why: String,
    },
    /// No session cookie came with the challenge.
    #[error(
        "broker's answer to auth carries no session cookie: it is not a key broker, or something between drops cookies"
    )]
    NoSession,
    /// No evidence could be made.
    #[error(transparent)]
    Evidence(#[from] AttesterError),
    /// The token is not the pinned broker's.
    #[error("{0}: is the pinned token key this broker's?")]
    Token(#[from] EarError),
    /// The token was made for somebody else, or for another session.
    #[error("attestation token is not of this session: its {0} is another one")]
    ForeignToken(&'static str),
    /// Tokens are signed by a key that the pinned one does not lead to.
    #[error(
        "attestation tokens are signed by another key than the pinned one, and it does not say who follows it ({0}): was the broker made anew? pin its new token.pub"
    )]
    Succession(String),
    /// A lease has ended.
    #[error("the lease of {path} has ended: {why}; what it was for has to be given up")]
    LeaseEnded {
        /// Which resource.
        path: ResourcePath,
        /// Why.
        why: String,
    },
    /// The resource does not open with our TEE key.
    #[error("resource {path}: {source}")]
    Decrypt {
        /// Which one.
        path: ResourcePath,
        /// Why.
        source: JoseError,
    },
    /// A TEE key could not be used.
    #[error("TEE key: {0}")]
    TeeKey(JoseError),
    /// The URI names a broker that is not ours.
    #[error("'{uri}' is a resource of another broker than {url}, which this guest is configured with")]
    OtherBroker {
        /// What was asked for.
        uri: Box<ResourceUri>,
        /// Our broker.
        url: String,
    },
}

impl ClientError {
    fn is_transient(&self) -> bool {
        match self {
            Self::Network { .. } => true,
            // 409: the nonce was used by an attempt whose answer got lost.
            Self::Refused { status: 409 | 429 | 500..=599, .. } => true,
            // The broker, or the replica of it that had the session, was started anew in between.
            Self::Refused { step: "attest", kind, .. } => kind == "SessionNotFound",
            _ => false,
        }
    }

    /// Whether trying again gives the same answer: the broker knows who asks, and says no.
    fn is_final(&self) -> bool {
        match self {
            Self::Refused { status: 403 | 404, .. } | Self::ForeignToken(_) | Self::Token(_) => true,
            Self::Refused { step: "attest", status: 401, kind, .. } => kind != "SessionNotFound",
            _ => false,
        }
    }

    /// Whether a new attestation may help. Trustee says 401 to everything, also to what is about the resource and not about who asks.
    fn is_unauthorized(&self) -> bool {
        let about_the_resource = ["PolicyDeny", "PluginInternalError"];
        matches!(self, Self::Refused { status: 401, kind, .. } if !about_the_resource.contains(&kind.as_str()))
    }
}

/// Which broker, and how it is known to be it.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// `https://host[:port]`, without the `/kbs/v0`.
    pub url: String,
    /// The broker's certificate (or its issuer's), PEM; the system's roots where there is none.
    pub certificate: Option<String>,
    /// The public key that the broker's tokens are signed with. Without it, tokens are used but nothing in them is believed: there is
    /// then no trusted time.
    pub token_key: Option<PublicKey>,
    /// Allows `http` to an address that is not loopback: for tests on networks of one's own.
    pub allow_http: bool,
    /// The time limit of one call.
    pub timeout: Duration,
    /// How often a call is tried that failed by the network, a full broker (429) or a broken one (5xx).
    pub attempts: u32,
    /// The first pause between two tries; each further one is twice as long, 5 s at most.
    pub backoff: Duration,
}

impl BrokerConfig {
    /// A broker by its URL, with nothing pinned.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            certificate: None,
            token_key: None,
            allow_http: false,
            timeout: Duration::from_secs(30),
            attempts: 5,
            backoff: Duration::from_millis(200),
        }
    }

    /// Pins the broker's certificate and token key, both PEM, as measured init data carries them.
    ///
    /// # Errors
    /// [`ClientError::Config`] for a token key that is none.
    pub fn pin(mut self, certificate: Option<&str>, token_key: Option<&str>) -> Result<Self, ClientError> {
        self.certificate = certificate.map(str::to_owned);
        self.token_key = token_key
            .map(|pem| PublicKey::from_bytes(pem.as_bytes()))
            .transpose()
            .map_err(|e| ClientError::Config(format!("token key: {e}")))?;
        Ok(self)
    }
}

/// A successful attestation.
pub struct Attested {
    token: String,
    verified: Option<Ear>,
    tee_key: PrivateKey,
    since: BootTime,
    lifetime: Duration,
}

impl Attested {
    /// The token, for programs in the guest that show it to others.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The token's claims, where the broker's token key is pinned and they could be verified.
    pub fn claims(&self) -> Option<&Ear> {
        self.verified.as_ref()
    }

    fn is_fresh(&self) -> bool {
        self.since.elapsed() + RENEW_BEFORE < self.lifetime
    }
}

impl fmt::Debug for Attested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attested").field("status", &self.verified.as_ref().map(Ear::status)).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    attested: Option<Arc<Attested>>,
    /// The latest signed time and the boot time before which it cannot have been signed.
    time: Option<(time::Seconds, BootTime)>,
}

/// A guest's broker.
pub struct BrokerClient {
    config: BrokerConfig,
    transport: Transport,
    attester: Arc<dyn Attester>,
    state: Mutex<State>,
    /// Held during an attestation, so that threads that need a token wait for one instead of each making their own.
    attesting: Mutex<()>,
}

impl BrokerClient {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// [`ClientError::Config`]: the URL, the certificate, or a channel that the host could impersonate.
    pub fn new(config: BrokerConfig, attester: Arc<dyn Attester>) -> Result<Self, ClientError> {
        let transport = Transport::new(&config)?;
        Ok(Self { config, transport, attester, state: Mutex::default(), attesting: Mutex::default() })
    }

    /// The broker's URL.
    pub fn url(&self) -> &str {
        self.transport.url()
    }

    /// Whether the guest only simulates a TEE; whatever shows an attestation shows this too.
    pub fn simulated(&self) -> bool {
        self.attester.simulated()
    }

    /// The guest's event log, where its TEE has a register for it.
    pub fn runtime_log(&self) -> Option<&Arc<RuntimeLog>> {
        self.attester.runtime_log()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current attestation; a new one where there is none or it ends soon.
    ///
    /// # Errors
    /// [`ClientError`] says which step failed.
    pub fn attest(&self) -> Result<Arc<Attested>, ClientError> {
        self.attest_unless(|attested| attested.is_fresh())
    }

    /// A new attestation, whatever there is.
    fn attest_anew(&self) -> Result<Arc<Attested>, ClientError> {
        self.attest_unless(|_| false)
    }

    fn attest_unless(&self, good: impl Fn(&Arc<Attested>) -> bool) -> Result<Arc<Attested>, ClientError> {
        let _one_at_a_time = self.attesting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(attested) = self.state().attested.as_ref().filter(|attested| good(attested)) {
            return Ok(attested.clone());
        }
        let attested = Arc::new(self.retry(|| self.handshake())?);
        let mut state = self.state();
        if let Some(ear) = &attested.verified {
            // A broker whose clock was turned back does not turn ours back.
            let signed = (time::Seconds(ear.iat), attested.since);
            if state.time.is_none_or(|earlier| signed.0.plus(signed.1.elapsed()) > earlier.0.plus(earlier.1.elapsed()))
            {
                state.time = Some(signed);
            }
        }
        state.attested = Some(attested.clone());
        Ok(attested)
    }

    fn retry<T>(&self, mut call: impl FnMut() -> Result<T, ClientError>) -> Result<T, ClientError> {
        let mut pause = self.config.backoff;
        let mut attempt = 1;
        loop {
            match call() {
                Err(error) if error.is_transient() && attempt < self.config.attempts => {
                    tracing::warn!(%error, attempt, "broker call failed, trying again");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(5));
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    fn handshake(&self) -> Result<Attested, ClientError> {
        let request = json_bytes(&Request::new(self.attester.tee()));
        let reply = self.transport.call(
            "auth",
            "/kbs/v0/auth",
            Credential::None,
            Call::Post(JSON, &request),
            LONGEST_CHALLENGE,
        )?;
        let reply = accept("auth", reply)?;
        let session = reply.session.ok_or(ClientError::NoSession)?;
        let challenge =
            Challenge::parse(&reply.body).map_err(|source| ClientError::Message { step: "auth", source })?;

        let tee_key = PrivateKey::generate_p256();
        let mut jwk = Jwk::from_public(&tee_key.public());
        jwk.alg = Some("ECDH-ES+A256KW".into());
        let tee_pubkey = serde_json::to_value(&jwk).unwrap_or_default();
        let runtime_data = RuntimeData { nonce: challenge.nonce, tee_pubkey };
        let bound = report_data(&runtime_data, "").map_err(|source| ClientError::Message { step: "auth", source })?;
        let attestation = Attestation {
            init_data: self
                .attester
                .init_data()
                .map(|init| InitDataMessage { format: "toml".into(), body: init.text().to_owned() }),
            runtime_data: runtime_data.clone(),
            tee_evidence: CompositeEvidence {
                primary_evidence: self.attester.evidence(&bound)?,
                additional_evidence: String::new(),
            },
        };
        // The time is signed after this instant; counting from it can only make our time late by the length of the call, never early.
        let since = BootTime::now();
        let body = json_bytes(&attestation);
        let reply = self.transport.call(
            "attest",
            "/kbs/v0/attest",
            Credential::Session(&session),
            Call::Post(JSON, &body),
            LONGEST_TOKEN,
        )?;
        let reply = accept("attest", reply)?;
        let token =
            TokenReply::parse(&reply.body).map_err(|source| ClientError::Message { step: "attest", source })?.token;
        let verified = match &self.config.token_key {
            Some(key) => Some(self.check_token(&token, key, &runtime_data, &bound)?),
            None => None,
        };
        let lifetime = verified.as_ref().map_or_else(|| claimed_lifetime(&token), |ear| seconds(ear.exp - ear.iat));
        Ok(Attested { token, verified, tee_key, since, lifetime })
    }

    /// Signed by the pinned key, and about this very session: a token of another guest or of an earlier boot says nothing here.
    fn check_token(
        &self,
        token: &str,
        key: &PublicKey,
        runtime: &RuntimeData,
        bound: &[u8; 64],
    ) -> Result<Ear, ClientError> {
        // A broker that has a newer key proves that the pinned one was followed by it.
        let followed = self.follow(token, key)?;
        let ear = Ear::verify(token, followed.as_ref().unwrap_or(key))?.into_inner();
        if ear.tee_pubkey() != Some(&runtime.tee_pubkey) {
            return Err(ClientError::ForeignToken("TEE key"));
        }
        let evidence = ear.submods.get("cpu0").map(|module| &module.evidence);
        let said = evidence.and_then(|evidence| evidence.get("report_data")).and_then(Value::as_str);
        if !said.is_some_and(|said| is_report_data(said, bound)) {
            return Err(ClientError::ForeignToken("report data"));
        }
        if ear.is_simulation() != self.attester.simulated() {
            return Err(ClientError::ForeignToken("mark of simulation"));
        }
        Ok(ear)
    }

    /// What is asked for is measured first.
    fn measure_key(&self, path: &ResourcePath) -> Result<(), ClientError> {
        let Some(log) = self.runtime_log() else { return Ok(()) };
        Ok(log.record(&Happening::KeyReleased { resource: path.to_string() }).map_err(AttesterError::Log)?)
    }

    /// Fetches a resource; attests first where that is needed, and once more when the broker does not know the token any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get(&self, path: &ResourcePath) -> Result<SecretBytes, ClientError> {
        self.measure_key(path)?;
        self.with_attestation(|attested| self.get_with(attested, path))
    }

    fn get_with(&self, attested: &Arc<Attested>, path: &ResourcePath) -> Result<SecretBytes, ClientError> {
        let borrowed = self.borrow_with(attested, path, None)?;
        note_lease(path, &borrowed);
        Ok(borrowed.secret)
    }
}

impl fmt::Debug for BrokerClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerClient").field("url", &self.url()).finish_non_exhaustive()
    }
}

fn json_bytes(value: &impl serde::Serialize) -> Vec<u8> {
    // Strings, maps with string keys and JSON values always serialise.
    serde_json::to_vec(value).unwrap_or_default()
}

fn seconds(number: i64) -> Duration {
    Duration::from_secs(u64::try_from(number).unwrap_or_default())
}

/// Whether a token's report data is ours: hex of all of it, or, as Trustee writes that of its `sample` TEE, base64 of the SHA-384 alone.
fn is_report_data(said: &str, bound: &[u8; 64]) -> bool {
    let hash = bound.split_at_checked(48).filter(|(_, rest)| rest.iter().all(|byte| *byte == 0));
    said == hex(bound) || hash.is_some_and(|(hash, _)| said == BASE64_STANDARD.encode(hash))
}

/// How long a token says that it lives: only to renew it in time, so it need not be verified.
fn claimed_lifetime(token: &str) -> Duration {
    let claims = token.split('.').nth(1).and_then(|part| b64::decode(part).ok());
    let claims: Option<Value> = claims.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let number = |name: &str| claims.as_ref()?.get(name)?.as_i64();
    match (number("exp"), number("iat").or_else(|| number("nbf"))) {
        (Some(exp), Some(iat)) => seconds(exp.saturating_sub(iat)),
        _ => Duration::from_secs(60),
    }
}

/// Makes an error of every answer but 200.
///
/// # Errors
/// [`ClientError::Refused`] with what the broker says.
pub fn accept(step: &'static str, reply: Reply) -> Result<Reply, ClientError> {
    if reply.status == 200 {
        return Ok(reply);
    }
    let error = ErrorBody::parse(&reply.body);
    let kind = error.as_ref().map_or("no error body", ErrorBody::variant).chars().take(80).collect();
    let detail =
        error.map_or_else(|| "the answer is not a key broker's".into(), |e| e.detail.chars().take(1000).collect());
    Err(ClientError::Refused { step, status: reply.status, kind, detail })
}

impl BrokerClient {
    /// What a URI names, with its lease.
    fn borrow_by_name(&self, uri: &ResourceUri) -> Result<Borrowed, KeySourceError> {
        let source_name = format!("the key broker {}", self.url());
        let failed = |error: ClientError| KeySourceError::Failed {
            uri: uri.clone(),
            source_name: source_name.clone(),
            source: Box::new(error),
        };
        if uri.host().is_some_and(|host| !self.transport.is_host(host)) {
            return Err(failed(ClientError::OtherBroker { uri: Box::new(uri.clone()), url: self.url().to_owned() }));
        }
        if uri.plugin().is_some_and(|plugin| plugin != "resource") || uri.query().is_some() {
            return Err(KeySourceError::NotFound { uri: uri.clone(), source_name });
        }
        self.borrow(uri.path(), None).map_err(|error| match error {
            ClientError::Refused { status: 404, step: "resource", .. } => {
                KeySourceError::NotFound { uri: uri.clone(), source_name: source_name.clone() }
            }
            ClientError::Refused { status, step: "resource", kind, detail }
                if status == 403 || (status == 401 && kind == "PolicyDeny") =>
            {
                KeySourceError::Denied { uri: uri.clone(), source_name: source_name.clone(), reason: detail }
            }
            other => failed(other),
        })
    }
}

impl KeySource for BrokerClient {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        let borrowed = self.borrow_by_name(uri)?;
        note_lease(uri.path(), &borrowed);
        Ok(borrowed.secret)
    }
}

/// For uses that are over at once.
fn note_lease(path: &ResourcePath, borrowed: &Borrowed) {
    if let Some(lease) = &borrowed.lease {
        tracing::info!(%path, seconds = lease.seconds(), "the broker lends this resource; this use of it does not renew the lease");
    }
}

impl Clock for BrokerClient {
    fn now(&self) -> Option<TrustedTime> {
        let (signed, since) = self.state().time?;
        Some(TrustedTime { now: signed.plus(since.elapsed()).to_time()?, source: "the broker's signed time" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_data_is_hex_or_as_trustee_writes_a_samples() {
        let sent = Attestation::parse(include_bytes!("../../tests/trustee/token-attestation.json")).unwrap();
        let bound = report_data(&sent.runtime_data, "").unwrap();
        // In the token that Trustee's broker made of it.
        let said = "3IJjBOPTBkkzgjHWGFrhD1hIf+F9bVZSfRxLIRceO9WlN4fw/B7dsAX5OEaX/lsF";
        assert!(is_report_data(said, &bound) && is_report_data(&hex(&bound), &bound));
        for other in ["", &said[1..], &hex(&bound[..48]), &BASE64_STANDARD.encode(bound), &hex(&[0; 64])] {
            assert!(!is_report_data(other, &bound), "{other}");
        }
        // Where it is longer than a SHA-384, all of it counts.
        let mut longer = bound;
        longer[63] = 1;
        assert!(!is_report_data(said, &longer) && is_report_data(&hex(&longer), &longer));
    }
}
