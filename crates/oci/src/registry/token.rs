//! How a registry lets us in: nothing, basic, or the token flow of the distribution project (`GET realm?service&scope` with the
//! credentials as basic, or an OAuth2 `POST` with an identity token).
//!
//! What a registry wants is learnt from its first 401 and kept. Tokens are kept per scope until shortly before they expire; two
//! threads that need the same one fetch it once.
//!
//! A challenge names the token server, so whoever can answer for the registry can have the registry's credentials sent anywhere:
//! they go to an https realm with a verified certificate, or to any realm of a registry that was declared insecure.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::Engine as _;
use http::{HeaderMap, Method, header};
use nacre_core::SecretBytes;
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    auth_file::Credentials,
    challenge::{Challenge, parse_challenges},
    credentials::CredentialStore,
    exchange::{Http, Payload, Peer, Request, Response, printable},
    retry::Failure,
    url::{Url, encode},
};

/// The most bytes of a token server's answer.
const ANSWER_LIMIT: u64 = 1 << 20;
/// The longest token; it goes into a header.
const TOKEN_LIMIT: usize = 64 << 10;
/// How long a token is good that does not say; the distribution specification's word.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// The longest life that is believed.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long before its end a token is replaced.
const MARGIN: Duration = Duration::from_secs(5);
/// The most tokens that are kept for one registry.
const TOKENS_LIMIT: usize = 1024;

/// What access is wanted to which repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    /// The repository's path; empty for the registry as such.
    pub(crate) repository: String,
    pub(crate) push: bool,
    /// A repository that blobs are to be mounted from.
    pub(crate) mount_from: Option<String>,
}

impl Scope {
    pub(crate) fn pull(repository: &str) -> Self {
        Self { repository: repository.to_owned(), push: false, mount_from: None }
    }

    fn texts(&self) -> Vec<String> {
        let mut texts = Vec::new();
        if !self.repository.is_empty() {
            let actions = if self.push { "pull,push" } else { "pull" };
            texts.push(format!("repository:{}:{actions}", self.repository));
        }
        texts.extend(self.mount_from.iter().map(|from| format!("repository:{from}:pull")));
        texts
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Wanted {
    Basic,
    Bearer { realm: Url, service: Option<String>, scope: Option<String> },
}

/// An `Authorization` header's value.
pub(crate) struct Authorization {
    pub(crate) value: Zeroizing<String>,
    /// Just fetched, so that a refusal is final.
    pub(crate) fresh: bool,
}

struct Token {
    value: Arc<Zeroizing<String>>,
    until: Instant,
}

type Slot = Arc<Mutex<Option<Token>>>;

/// What is known about getting into one registry.
#[derive(Default)]
pub(crate) struct Gate {
    wanted: Mutex<Option<Wanted>>,
    tokens: Mutex<HashMap<Scope, Slot>>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.token.zeroize();
        self.access_token.zeroize();
    }
}

impl Gate {
    /// Learns from a 401 what the registry wants; forgets the token that it did not take.
    pub(crate) fn learn(
        &self,
        url: &Url,
        headers: &HeaderMap,
        scope: &Scope,
        used: Option<&Authorization>,
    ) -> Result<(), Failure> {
        let challenges: Vec<Challenge> = headers
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .take(16)
            .flat_map(|value| parse_challenges(value.as_bytes()))
            .collect();
        let find = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let wanted = if let Some(bearer) = find("bearer") {
            let realm = bearer
                .get("realm")
                .ok_or_else(|| Failure::Protocol(format!("{url}: a Bearer challenge without realm")))?;
            let realm =
                url.join(realm).map_err(|why| Failure::Protocol(format!("{url}: the token server is {why}")))?;
            let short = |name: &str| bearer.get(name).filter(|text| text.len() <= 2048).map(str::to_owned);
            Wanted::Bearer { realm, service: short("service"), scope: short("scope") }
        } else if find("basic").is_some() {
            Wanted::Basic
        } else {
            let schemes: Vec<&str> = challenges.iter().map(|challenge| challenge.scheme.as_str()).take(8).collect();
            let reason = format!(
                "{url}: it wants authentication by '{}', not by Basic or Bearer",
                printable(&schemes.join(", "), 100)
            );
            return Err(Failure::Denied(reason));
        };
        *lock(&self.wanted) = Some(wanted);
        // Only the token that was refused: another thread may have fetched a new one meanwhile.
        let slot = lock(&self.tokens).get(scope).cloned();
        if let (Some(slot), Some(used)) = (slot, used.and_then(|used| used.value.strip_prefix("Bearer "))) {
            let mut slot = lock(&slot);
            if slot.as_ref().is_some_and(|token| token.value.as_str() == used) {
                *slot = None;
            }
        }
        Ok(())
    }

    /// The header for a request; `None` while the registry has asked for nothing.
    pub(crate) fn authorization(
        &self,
        http: &Http,
        peer: &Peer,
        credentials: &CredentialStore,
        host: &str,
        scope: &Scope,
    ) -> Result<Option<Authorization>, Failure> {
        let wanted = lock(&self.wanted).clone();
        match wanted {
            None => Ok(None),
            Some(Wanted::Basic) => {
                let value = credentials.with(host, &scope.repository, basic_header)??;
                let value = value.ok_or_else(|| {
                    Failure::Denied(format!("it wants a name and a password, and {}", credentials.looked_at()))
                })?;
                Ok(Some(Authorization { value, fresh: true }))
            }
            Some(Wanted::Bearer { realm, service, scope: asked }) => {
                let slot = {
                    let mut tokens = lock(&self.tokens);
                    if tokens.len() >= TOKENS_LIMIT {
                        tokens.clear();
                    }
                    tokens.entry(scope.clone()).or_default().clone()
                };
                let mut slot = lock(&slot);
                if let Some(token) = slot.as_ref().filter(|token| token.until > Instant::now() + MARGIN) {
                    let value = Zeroizing::new(format!("Bearer {}", token.value.as_str()));
                    return Ok(Some(Authorization { value, fresh: false }));
                }
                let mut scopes = scope.texts();
                for text in asked.iter().flat_map(|text| text.split(' ')).filter(|text| !text.is_empty()) {
                    if !scopes.iter().any(|own| covers(own, text)) {
                        scopes.push(text.to_owned());
                    }
                }
                let flow = Flow { http, peer, realm: &realm, service: service.as_deref(), scopes: &scopes };
                let token = credentials.with(host, &scope.repository, |found| flow.fetch(found))??;
                let value = Zeroizing::new(format!("Bearer {}", token.value.as_str()));
                *slot = Some(token);
                Ok(Some(Authorization { value, fresh: true }))
            }
        }
    }
}

/// Whether our own scope holds all that a challenge asks for.
fn covers(own: &str, asked: &str) -> bool {
    match (own.rsplit_once(':'), asked.rsplit_once(':')) {
        (Some((name, actions)), Some((asked_name, asked_actions))) => {
            name == asked_name && asked_actions.split(',').all(|action| actions.split(',').any(|own| own == action))
        }
        _ => false,
    }
}

fn basic_header(credentials: Option<&Credentials>) -> Result<Option<Zeroizing<String>>, Failure> {
    match credentials {
        Some(Credentials::Basic { user, password }) => Ok(Some(basic(user, password))),
        Some(_) => Err(Failure::Denied("it wants a name and a password, and there is only a token for it".into())),
        None => Ok(None),
    }
}

fn basic(user: &str, password: &SecretBytes) -> Zeroizing<String> {
    let mut pair = Zeroizing::new(Vec::with_capacity(user.len() + 1 + password.len()));
    pair.extend_from_slice(user.as_bytes());
    pair.push(b':');
    pair.extend_from_slice(password.expose());
    let encoded = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(pair.as_slice()));
    Zeroizing::new(format!("Basic {}", encoded.as_str()))
}

/// One visit to a token server.
struct Flow<'a> {
    http: &'a Http,
    peer: &'a Peer,
    realm: &'a Url,
    service: Option<&'a str>,
    scopes: &'a [String],
}

impl Flow<'_> {
    fn fetch(&self, credentials: Option<&Credentials>) -> Result<Token, Failure> {
        if let Some(Credentials::RegistryToken(token)) = credentials {
            let text = std::str::from_utf8(token.expose()).unwrap_or_default();
            return usable(text, Some(LONGEST_LIFE))
                .map_err(|why| Failure::Denied(format!("the registry token {why}")));
        }
        if credentials.is_some() && !self.realm.is_https() && !self.peer.insecure {
            let reason = format!("its token server {} is not https: credentials are not sent there", self.realm);
            return Err(Failure::Denied(reason));
        }
        let answer = match credentials {
            Some(Credentials::IdentityToken(token)) => self.post(token)?,
            Some(Credentials::Basic { user, password }) => self.get(Some(user), Some(&basic(user, password)))?,
            _ => self.get(None, None)?,
        };
        self.read(answer, credentials.is_some())
    }

    fn get(&self, account: Option<&str>, authorization: Option<&Zeroizing<String>>) -> Result<Response, Failure> {
        let mut url = self.realm.clone();
        for (name, value) in [("account", account), ("service", self.service)] {
            if let Some(value) = value {
                url = url.with_query(name, value);
            }
        }
        for scope in self.scopes {
            url = url.with_query("scope", scope);
        }
        let mut request = Request::new(Method::GET, url);
        request.trusted_as_registry = true;
        request.authorization = authorization.map(|value| value.as_str());
        self.http.send(self.peer, request)
    }

    fn post(&self, identity: &SecretBytes) -> Result<Response, Failure> {
        let identity = std::str::from_utf8(identity.expose())
            .map_err(|_| Failure::Denied("the identity token is not text".into()))?;
        let identity = Zeroizing::new(encode(identity));
        let form = Zeroizing::new(format!(
            "grant_type=refresh_token&client_id=nacre&service={}&scope={}&refresh_token={}",
            encode(self.service.unwrap_or_default()),
            encode(&self.scopes.join(" ")),
            identity.as_str()
        ));
        let mut request = Request::new(Method::POST, self.realm.clone())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .payload(Payload::Bytes(form.as_bytes()));
        request.trusted_as_registry = true;
        self.http.send(self.peer, request)
    }

    fn read(&self, response: Response, with_credentials: bool) -> Result<Token, Failure> {
        let realm = self.realm;
        if response.status != 200 {
            return Err(match response.into_failure() {
                Failure::Denied(reason) | Failure::Protocol(reason) if with_credentials => {
                    Failure::Denied(format!("its token server did not take the credentials: {reason}"))
                }
                Failure::Denied(reason) => {
                    Failure::Denied(format!("its token server gives no anonymous token: {reason}"))
                }
                Failure::NotFound => Failure::Protocol(format!("the token server {realm} answers 404")),
                other => other,
            });
        }
        if response.is_html() {
            return Err(Failure::Protocol(format!("the token server {realm} answered with an HTML page")));
        }
        let bytes = Zeroizing::new(response.read_body(ANSWER_LIMIT).map_err(|failure| match failure {
            Failure::TooLarge(limit) => {
                Failure::Protocol(format!("the answer of the token server {realm} is larger than {limit} bytes"))
            }
            other => other,
        })?);
        let bad = |why: &str| Failure::Protocol(format!("the token server {realm}: {why}"));
        let answer: Answer =
            serde_json::from_slice(&bytes).map_err(|_| bad("its answer is not the JSON of a token"))?;
        let text = [&answer.token, &answer.access_token].into_iter().flatten().find(|text| !text.is_empty());
        let text = text.ok_or_else(|| bad("its answer has no token"))?;
        let life = answer.expires_in.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        usable(text, life).map_err(|why| bad(&format!("its token {why}")))
    }
}

fn usable(text: &str, life: Option<Duration>) -> Result<Token, &'static str> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("is empty or has characters that no header can carry");
    }
    if text.len() > TOKEN_LIMIT {
        return Err("is longer than 64 KiB");
    }
    let life = life.unwrap_or(DEFAULT_LIFE).clamp(DEFAULT_LIFE, LONGEST_LIFE);
    Ok(Token { value: Arc::new(Zeroizing::new(text.to_owned())), until: Instant::now() + life })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_cover_challenges_that_ask_for_less() {
        assert!(covers("repository:a:pull,push", "repository:a:pull"));
        assert!(!covers("repository:a:pull", "repository:a:pull,push"));
        assert!(!covers("repository:a:pull", "repository:b:pull"));
        assert!(!covers("repository:a:pull", "junk"));
    }

    #[test]
    fn tokens_that_no_header_can_carry_are_refused() {
        for text in ["", "a b", "a\r\nX: y", "é", &"x".repeat(TOKEN_LIMIT + 1)] {
            assert!(usable(text, None).is_err());
        }
        let forever = usable("t", Some(Duration::MAX)).unwrap();
        assert!(forever.until <= Instant::now() + LONGEST_LIFE);
    }
}
