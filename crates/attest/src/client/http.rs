//! HTTP to the broker: TLS by the pinned certificate, no redirects, no proxies, bounded bodies.

use std::{net::IpAddr, sync::Arc};

use ureq::{
    Agent,
    http::Uri,
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
};

use super::{BrokerConfig, ClientError};
use crate::rcar::{LEASE_HEADER, LEASE_SECONDS_HEADER, SESSION_COOKIE, VERSION_HEADER};

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The session id of a Set-Cookie header, where there is one.
    pub session: Option<String>,
    /// The version of a resource, where the answer says one.
    pub version: Option<u32>,
    /// The id of a lease and its seconds, where there is one.
    pub lease: Option<(String, u32)>,
    /// The body, at most as long as was allowed.
    pub body: Vec<u8>,
}

/// Who asks.
#[derive(Clone, Copy)]
pub enum Credential<'a> {
    /// Nobody yet.
    None,
    /// The guest of a session.
    Session(&'a str),
    /// Whoever holds a token.
    Bearer(&'a str),
}

/// What is done to a path.
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// Reads.
    Get,
    /// Writes a body of a content type.
    Post(&'static str, &'a [u8]),
    /// Removes.
    Delete,
}

/// A checked channel to a broker, for the guest's client and for an administrator's.
pub struct Transport {
    agent: Agent,
    url: String,
    authority: String,
}

impl Transport {
    /// Checks the URL and loads the roots; nothing is sent yet.
    ///
    /// # Errors
    /// [`ClientError::Config`]: the URL, the certificate, or a channel that somebody between could impersonate.
    pub fn new(config: &BrokerConfig) -> Result<Self, ClientError> {
        let url = config.url.trim_end_matches('/');
        let bad = |why: &str| ClientError::Config(format!("'{url:.200}' {why}"));
        let uri: Uri = url.parse().map_err(|_| bad("is not a URL"))?;
        let authority = uri.authority().ok_or_else(|| bad("names no host"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(bad("must be https://host[:port] and nothing more"));
        }
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") if config.allow_http || is_loopback(authority.host()) => {}
            Some("http") => {
                return Err(bad(
                    "is plain http: the host could answer in the broker's place; use https, or allow_http on a network of your own",
                ));
            }
            _ => return Err(bad("must start with https://")),
        }
        let roots = match &config.certificate {
            Some(pem) => RootCerts::new_with_certs(&certificates(pem)?),
            None => RootCerts::new_with_certs(&system_roots()),
        };
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(roots)
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .user_agent(concat!("nacre/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Self { agent, authority: authority.as_str().to_owned(), url: url.to_owned() })
    }

    /// The broker's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether a resource URI's host is this broker's.
    pub fn is_host(&self, host: &str) -> bool {
        host.eq_ignore_ascii_case(&self.authority)
    }

    /// Makes one call. `step` names it in messages.
    ///
    /// # Errors
    /// [`ClientError::Network`], or an answer longer than `limit`.
    pub fn call(
        &self,
        step: &'static str,
        path: &str,
        credential: Credential<'_>,
        call: Call<'_>,
        limit: usize,
    ) -> Result<Reply, ClientError> {
        let url = format!("{}{path}", self.url);
        let header = match credential {
            Credential::None => None,
            Credential::Session(id) => Some(("cookie", format!("{SESSION_COOKIE}={id}"))),
            Credential::Bearer(token) => Some(("authorization", format!("Bearer {token}"))),
        };
        let result = match call {
            Call::Post(content_type, body) => {
                let mut request = self.agent.post(url).content_type(content_type);
                if let Some((name, value)) = header {
                    request = request.header(name, value);
                }
                request.send(body)
            }
            Call::Get | Call::Delete => {
                let mut request = if matches!(call, Call::Get) { self.agent.get(url) } else { self.agent.delete(url) };
                if let Some((name, value)) = header {
                    request = request.header(name, value);
                }
                request.call()
            }
        };
        self.read(step, result, limit)
    }

    fn read(
        &self,
        step: &'static str,
        result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        limit: usize,
    ) -> Result<Reply, ClientError> {
        let fail = |source: ureq::Error| match source {
            ureq::Error::BodyExceedsLimit(_) => ClientError::Answer { step, why: format!("longer than {limit} bytes") },
            source => ClientError::Network { url: self.url.clone(), source: Box::new(source) },
        };
        let mut response = result.map_err(fail)?;
        let status = response.status().as_u16();
        let session =
            response.headers().get_all("set-cookie").iter().find_map(|value| session_of(value.to_str().ok()?));
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let number = |name: &str| header(name).and_then(|text| text.parse::<u32>().ok());
        let version = number(VERSION_HEADER);
        let id = header(LEASE_HEADER).filter(|id| is_base64url(id)).map(str::to_owned);
        let lease = id.zip(number(LEASE_SECONDS_HEADER));
        let body = response.body_mut().with_config().limit(limit as u64).read_to_vec().map_err(fail)?;
        Ok(Reply { status, session, version, lease, body })
    }
}

/// The session id of a Set-Cookie header.
fn session_of(header: &str) -> Option<String> {
    let (name, value) = header.split(';').next()?.split_once('=')?;
    let value = value.trim();
    let fine = (1..=256).contains(&value.len())
        && value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b',' | b';' | b'\\'));
    (name.trim() == SESSION_COOKIE && fine).then(|| value.to_owned())
}

/// Whether it can stand in a path as it is.
fn is_base64url(text: &str) -> bool {
    (1..=256).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn certificates(pem: &str) -> Result<Vec<Certificate<'static>>, ClientError> {
    let bad = |why: String| ClientError::Config(format!("pinned certificate: {why}"));
    let mut found = Vec::new();
    for item in parse_pem(pem.as_bytes()) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| bad(e.to_string()))? {
            found.push(certificate.to_owned());
        }
    }
    if found.is_empty() { Err(bad("no CERTIFICATE block in it".into())) } else { Ok(found) }
}

fn system_roots() -> Vec<Certificate<'static>> {
    let loaded = rustls_native_certs::load_native_certs();
    loaded.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_the_host_could_impersonate_are_refused() {
        let new =
            |url: &str, allow_http| Transport::new(&BrokerConfig { allow_http, ..BrokerConfig::new(url) }).map(|_| ());
        for good in [
            "https://broker.example",
            "https://10.0.0.1:8080",
            "http://127.0.0.1:1",
            "http://[::1]:1",
            "http://localhost",
        ] {
            assert!(new(good, false).is_ok(), "{good}");
        }
        assert!(new("http://broker.example", true).is_ok());
        for bad in [
            "",
            "broker",
            "ftp://broker",
            "http://broker.example",
            "http://127.0.0.1.example",
            "http://localhost.example",
            "http://10.0.0.1",
            "https://user@broker",
            "https://broker/path",
            "https://broker?x=1",
        ] {
            assert!(new(bad, false).is_err(), "{bad}");
        }
        let pinned = |pem: &str| {
            Transport::new(&BrokerConfig { certificate: Some(pem.into()), ..BrokerConfig::new("https://broker") })
                .map(|_| ())
        };
        assert!(pinned("").is_err());
        assert!(pinned("-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n").is_err());
    }

    #[test]
    fn only_a_clean_session_cookie_is_taken() {
        assert_eq!(session_of("kbs-session-id=abc; Path=/; HttpOnly").as_deref(), Some("abc"));
        for bad in
            ["", "kbs-session-id", "kbs-session-id=", "other=abc", "kbs-session-id=a\"b", "x=1; kbs-session-id=abc"]
        {
            assert_eq!(session_of(bad), None, "{bad}");
        }
    }
}
