//! One HTTP exchange: the agents that pool connections, redirects, and the sorting of failures.
//!
//! Redirects are followed here, not by ureq: at most `redirects` of them, never to a URL that was visited, never from https to
//! http, never with a body that cannot be sent twice; `Authorization` goes to the origin that it was made for and no other.

use std::{
    collections::HashMap,
    io::{self, Read},
    sync::Mutex,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use ureq::{Agent, BodyReader, SendBody};
use zeroize::Zeroizing;

use super::{
    config::ClientConfig,
    proxy::ProxyRules,
    retry::{Failure, parse_retry_after},
    tls::{TlsProfile, TlsStore},
    url::Url,
};
use crate::source::TransportError;

/// The most bytes of an answer that says what went wrong.
const ERROR_BODY_LIMIT: u64 = 64 << 10;
/// What is read of an answer that nobody wants, at most.
const LEFTOVER: u64 = 4096;
const LEFTOVER_READS: usize = 8;
/// Bytes of the buffers of one connection, each way.
const BUFFER: usize = 256 << 10;

/// On whose behalf a request is made.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// `host[:port]` of the registry.
    pub(crate) authority: String,
    /// Whether the registry may be spoken to without verified TLS.
    pub(crate) insecure: bool,
}

/// What is sent.
pub(crate) enum Payload<'a> {
    None,
    Bytes(&'a [u8]),
    /// A stream that can be sent once, of that many bytes where it is known.
    Stream(&'a mut dyn Read, Option<u64>),
}

/// A request; `authorization` is dropped on the way to another origin.
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(HeaderName, String)>,
    pub(crate) authorization: Option<&'a str>,
    pub(crate) payload: Payload<'a>,
    /// The URL's host may be spoken to as the registry may: its token server.
    pub(crate) trusted_as_registry: bool,
}

impl<'a> Request<'a> {
    pub(crate) fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            headers: Vec::new(),
            authorization: None,
            payload: Payload::None,
            trusted_as_registry: false,
        }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn payload(mut self, payload: Payload<'a>) -> Self {
        self.payload = payload;
        self
    }
}

/// An answer; its body is read once.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// Where the answer came from, after redirects.
    pub(crate) url: Url,
    pub(crate) body: Body,
}

/// A body on its way in, which fails when it comes too slowly. Only time spent waiting for the peer counts. What little is left when nobody
/// wants more is read all the same, since a connection is used again only when the end of its answer was seen.
pub(crate) struct Body {
    reader: BodyReader<'static>,
    /// Bytes that are still to come, where the peer said how many there are.
    left: Option<u64>,
    /// The span over which `slowest` bytes must come.
    span: Duration,
    slowest: u64,
    waited: Duration,
    came: u64,
}

impl Body {
    fn new(reader: BodyReader<'static>, length: Option<u64>, config: &ClientConfig) -> Self {
        let span = config.stall_timeout;
        let slowest = span.as_secs().max(1).saturating_mul(config.slowest_rate);
        Self { reader, left: length, span, slowest, waited: Duration::ZERO, came: 0 }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.left.is_some_and(|left| left <= LEFTOVER) {
            let mut rest = [0; 4096];
            // As often as it takes for what was announced, and once for its end.
            for _ in 0..LEFTOVER_READS {
                if !matches!(self.reader.read(&mut rest), Ok(1..)) {
                    break;
                }
            }
        }
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let start = Instant::now();
        let count = self.reader.read(buffer)?;
        self.waited += start.elapsed();
        self.came += count as u64;
        self.left = self.left.map(|left| left.saturating_sub(count as u64));
        if self.waited >= self.span {
            if self.came < self.slowest {
                let words = format!("the peer is too slow: {} bytes in {:.1} s", self.came, self.waited.as_secs_f32());
                return Err(io::Error::new(io::ErrorKind::TimedOut, words));
            }
            (self.waited, self.came) = (Duration::ZERO, 0);
        }
        Ok(count)
    }
}

#[derive(PartialEq, Eq, Hash)]
struct AgentKey {
    tls: TlsProfile,
    proxied: Option<ureq::Proxy>,
    upload: bool,
}

/// The connections of a client.
pub(crate) struct Http {
    config: ClientConfig,
    proxies: ProxyRules,
    tls: TlsStore,
    agents: Mutex<HashMap<AgentKey, Agent>>,
}

impl Http {
    pub(crate) fn new(config: ClientConfig) -> Result<Self, TransportError> {
        Ok(Self {
            proxies: ProxyRules::new(&config.proxy, |name| std::env::var(name).ok())?,
            tls: TlsStore::new(&config),
            agents: Mutex::default(),
            config,
        })
    }

    pub(crate) fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// Sends a request and follows its redirects. Any final status is an answer.
    pub(crate) fn send(&self, peer: &Peer, request: Request<'_>) -> Result<Response, Failure> {
        let Request { method, mut url, headers, mut authorization, mut payload, trusted_as_registry } = request;
        let mut visited = vec![url.clone()];
        loop {
            let origin = url.clone();
            let response =
                self.exchange(peer, &method, &url, &headers, authorization, &mut payload, trusted_as_registry)?;
            if !matches!(response.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = response.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
            let location = location
                .ok_or_else(|| Failure::Protocol(format!("{url}: status {} without a Location", response.status)))?;
            let bad = |why: &str| Failure::Protocol(format!("{url} redirects to {why}"));
            let next = url.join(location).map_err(|why| bad(&why))?;
            if url.is_https() && !next.is_https() {
                return Err(bad(&format!("{next}: not followed from https to plain http")));
            }
            if visited.contains(&next) {
                return Err(bad(&format!("{next}, where it came from: a loop")));
            }
            if visited.len() > self.config.redirects {
                return Err(bad(&format!("{next}: more than {} redirects", self.config.redirects)));
            }
            let repeatable = match payload {
                Payload::None => true,
                // A body may hold a token, which is for that origin as the header is.
                Payload::Bytes(_) => matches!(response.status, 307 | 308) && next.same_origin(&origin),
                Payload::Stream(..) => false,
            };
            if !repeatable {
                return Err(bad(&format!("{next}: a request with content is not repeated elsewhere")));
            }
            if !next.same_origin(&origin) {
                authorization = None;
            }
            tracing::debug!(from = %url, to = %next, "redirect");
            visited.push(next.clone());
            url = next;
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one request, some of which change from hop to hop")]
    fn exchange(
        &self,
        peer: &Peer,
        method: &Method,
        url: &Url,
        headers: &[(HeaderName, String)],
        authorization: Option<&str>,
        payload: &mut Payload<'_>,
        trusted_as_registry: bool,
    ) -> Result<Response, Failure> {
        let upload = !matches!(payload, Payload::None);
        let agent = self.agent(peer, url, upload, trusted_as_registry)?;
        let mut builder = http::Request::builder().method(method.clone()).uri(url.to_request());
        for (name, value) in headers {
            builder = builder.header(name, value.as_str());
        }
        if let Some(authorization) = authorization {
            let mut value = HeaderValue::from_str(authorization)
                .map_err(|_| Failure::Denied("the credentials have characters that no header can carry".into()))?;
            value.set_sensitive(true);
            builder = builder.header(header::AUTHORIZATION, value);
        }
        let bad = |error: http::Error| Failure::Protocol(format!("{url}: {error}"));
        let result = match payload {
            Payload::None => agent.run(builder.body(()).map_err(bad)?),
            Payload::Bytes(bytes) => agent.run(builder.body(*bytes).map_err(bad)?),
            Payload::Stream(content, length) => {
                if let Some(length) = length {
                    builder = builder.header(header::CONTENT_LENGTH, length.to_string());
                }
                let mut content = Outgoing { content: *content, left: *length, failed: None };
                let result = agent.run(builder.body(SendBody::from_reader(&mut content)).map_err(bad)?);
                if let Some(failed) = content.failed {
                    return Err(Failure::Content(failed));
                }
                result
            }
        };
        let response = result.map_err(|error| sort(url, &error))?;
        let (parts, body) = response.into_parts();
        if let Some(encoding) = parts.headers.get(header::CONTENT_ENCODING).filter(|value| *value != "identity") {
            return Err(Failure::Protocol(format!("{url}: content encoding {encoding:?}, which was not asked for")));
        }
        let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let body = Body::new(body.into_with_config().limit(u64::MAX).reader(), length, &self.config);
        Ok(Response { status: parts.status.as_u16(), headers: parts.headers, url: url.clone(), body })
    }

    fn agent(&self, peer: &Peer, url: &Url, upload: bool, trusted_as_registry: bool) -> Result<Agent, Failure> {
        let proxy = self.proxies.choose(url);
        let tls = self.profile(peer, url, trusted_as_registry);
        let key = AgentKey { tls, proxied: proxy.cloned(), upload };
        let mut agents = self.agents.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(agent) = agents.get(&key) {
            return Ok(agent.clone());
        }
        let config = &self.config;
        let mut builder = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(key.proxied.clone())
            .user_agent(config.user_agent.as_str())
            .accept("")
            .accept_encoding("")
            .input_buffer_size(BUFFER)
            .output_buffer_size(BUFFER)
            .max_idle_connections(config.idle_connections.saturating_mul(4))
            .max_idle_connections_per_host(config.idle_connections)
            .timeout_resolve(Some(config.connect_timeout))
            .timeout_connect(Some(config.connect_timeout))
            .timeout_recv_response(Some(config.response_timeout))
            .timeout_per_read(Some(if upload { config.response_timeout } else { config.stall_timeout }))
            .timeout_per_write(Some(config.stall_timeout));
        if url.is_https() {
            builder = builder.tls_config(self.tls.config(&key.tls)?);
        }
        let agent = Agent::new_with_config(builder.build());
        agents.insert(key, agent.clone());
        Ok(agent)
    }

    fn profile(&self, peer: &Peer, url: &Url, trusted_as_registry: bool) -> TlsProfile {
        if !url.is_https() {
            return TlsProfile::default();
        }
        let authority = url.authority();
        let own = same_authority(&authority, &peer.authority);
        let insecure = peer.insecure && (own || trusted_as_registry);
        // A host's own directory, or else the authorities of the registry that sent us there.
        match self.tls.host_dir(&authority) {
            Some(dir) => TlsProfile { insecure, authorities: Some(dir), client_certificate: true },
            None => {
                let authorities = self.tls.host_dir(&peer.authority);
                TlsProfile { insecure, authorities, client_certificate: own }
            }
        }
    }
}

fn same_authority(a: &str, b: &str) -> bool {
    let cut = |text: &str| text.strip_suffix(":443").unwrap_or(text).to_ascii_lowercase();
    cut(a) == cut(b)
}

/// A body on its way out, which ends exactly where it was announced to, and remembers that reading it failed.
struct Outgoing<'a> {
    content: &'a mut dyn Read,
    left: Option<u64>,
    failed: Option<io::Error>,
}

impl Read for Outgoing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.left.map_or(buffer.len(), |left| buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
        let Some(window) = buffer.get_mut(..most).filter(|window| !window.is_empty()) else { return Ok(0) };
        let result = loop {
            match self.content.read(window) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // ureq would wait for the rest for ever.
                Ok(0) if self.left.is_some_and(|left| left > 0) => {
                    break Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the content is shorter than announced"));
                }
                other => break other,
            }
        };
        match result {
            Ok(count) => {
                self.left = self.left.map(|left| left.saturating_sub(count as u64));
                Ok(count)
            }
            Err(error) => {
                self.failed = Some(error);
                Err(io::Error::other("the content could not be read"))
            }
        }
    }
}

/// What an exchange that gave no answer means.
fn sort(url: &Url, error: &ureq::Error) -> Failure {
    let tls = match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()),
        _ => None,
    };
    if let Some(tls) = tls {
        return Failure::Protocol(format!("{url}: TLS: {tls}"));
    }
    let reason = format!("{url}: {}", describe(error));
    match error {
        ureq::Error::Io(_)
        | ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_) => Failure::Network(reason),
        _ => Failure::Protocol(reason),
    }
}

fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => describe_io(error),
        ureq::Error::Timeout(ureq::Timeout::PerRead | ureq::Timeout::PerWrite) => {
            "the peer stalled: nothing came for the stall time limit".into()
        }
        ureq::Error::Timeout(which) => format!("time limit ({which})"),
        ureq::Error::HostNotFound => "the host's name cannot be resolved".into(),
        ureq::Error::ConnectProxyFailed(reason) => format!("the proxy did not connect: {}", printable(reason, 200)),
        other => printable(&other.to_string(), 300),
    }
}

/// What an I/O error of a connection or a body means, for people.
pub(crate) fn describe_io(error: &io::Error) -> String {
    if let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
        return describe(inner);
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection was cut".into(),
        _ => error.to_string(),
    }
}

impl Response {
    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header("content-length").and_then(|text| text.trim().parse().ok())
    }

    /// Whether the answer is a web page: a captive portal's, a proxy's, a web server's that is no registry.
    pub(crate) fn is_html(&self) -> bool {
        self.header("content-type").is_some_and(|text| text.trim_start().to_ascii_lowercase().starts_with("text/html"))
    }

    /// Reads the whole body of at most `limit` bytes.
    pub(crate) fn read_body(mut self, limit: u64) -> Result<Vec<u8>, Failure> {
        if self.content_length().is_some_and(|length| length > limit) {
            return Err(Failure::TooLarge(limit));
        }
        let mut bytes = Vec::new();
        let result = (&mut self.body).take(limit.saturating_add(1)).read_to_end(&mut bytes);
        result.map_err(|error| Failure::Network(format!("{}: {}", self.url, describe_io(&error))))?;
        if bytes.len() as u64 > limit { Err(Failure::TooLarge(limit)) } else { Ok(bytes) }
    }

    /// What a status that is no success means for something that was to be stored: a 404 is then about what it needs.
    pub(crate) fn into_refusal(self) -> Failure {
        if self.status != 404 {
            return self.into_failure();
        }
        let url = self.url.clone();
        Failure::Protocol(format!("{url}: status 404: {}", self.error_words()))
    }

    /// What a status that is no success means.
    pub(crate) fn into_failure(self) -> Failure {
        let (status, url) = (self.status, self.url.clone());
        let retry_after = self.header("retry-after").and_then(parse_retry_after);
        let words = self.error_words();
        let reason = if words.is_empty() {
            format!("{url}: status {status}")
        } else {
            format!("{url}: status {status}: {words}")
        };
        let reason = match retry_after {
            Some(after) => format!("{reason} (Retry-After: {} s)", after.as_secs()),
            None => reason,
        };
        match status {
            404 => Failure::NotFound,
            401 | 403 => Failure::Denied(reason),
            408 | 425 | 429 | 500 | 502..=504 => Failure::Busy { reason, retry_after },
            _ => Failure::Protocol(reason),
        }
    }

    /// The peer's words: the messages of the distribution specification's error document, or the start of a text.
    fn error_words(self) -> String {
        let html = self.is_html();
        let bytes = Zeroizing::new(self.read_body(ERROR_BODY_LIMIT).unwrap_or_default());
        let list = serde_json::from_slice::<serde_json::Value>(&bytes).ok();
        let messages = list.as_ref().and_then(|list| list.get("errors")?.as_array()).map(|errors| {
            let text = |error: &serde_json::Value, name: &str| {
                error.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned()
            };
            let words =
                errors.iter().take(4).map(|error| format!("{} {}", text(error, "code"), text(error, "message")));
            words.collect::<Vec<_>>().join("; ")
        });
        match messages {
            Some(messages) => printable(messages.trim(), 400),
            None if html => "an HTML page".into(),
            None => printable(String::from_utf8_lossy(&bytes).trim(), 200),
        }
    }
}

/// Foreign text for a message: no control characters, not long.
pub(crate) fn printable(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Sleeps, and says so in the log.
pub(crate) fn pause(what: &str, failure: &Failure, pause: Duration) {
    tracing::debug!(what, reason = failure.reason(), ?pause, "waiting before another attempt");
    std::thread::sleep(pause);
}
