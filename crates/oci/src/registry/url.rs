//! Absolute `http` and `https` URLs, as far as a registry client needs them: joining `Location` headers, comparing origins.
//!
//! Invariants: no user information, no fragment, only visible ASCII, at most [`LONGEST`] bytes; so a URL can be written into a
//! request line as it is. Printing leaves the query out: signed download URLs carry their credentials there.

use std::fmt;

/// The longest URL that is followed.
const LONGEST: usize = 16 << 10;

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Url {
    https: bool,
    host: String,
    port: u16,
    target: String,
}

impl Url {
    /// Parses an absolute URL; the error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("a URL of {} bytes (at most {LONGEST} are followed)", text.len()));
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("a URL with characters that must not be in one".into());
        }
        let (scheme, rest) = text.split_once("://").ok_or("a URL without scheme")?;
        let https = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(format!("a URL of scheme '{scheme:.20}' (http and https are followed)")),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let (host, port) = split_authority(authority)?;
        let target = target.split('#').next().unwrap_or_default();
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        Ok(Self { https, host, port: port.unwrap_or(if https { 443 } else { 80 }), target })
    }

    /// The URL of `target` (path and query, from a slash on) at `authority` (`host[:port]`).
    pub(crate) fn at(https: bool, authority: &str, target: &str) -> Result<Self, String> {
        Self::parse(&format!("{}://{authority}{target}", if https { "https" } else { "http" }))
    }

    /// What a `Location` header of an answer from this URL means.
    pub(crate) fn join(&self, location: &str) -> Result<Self, String> {
        let scheme_end = location.find("://");
        if scheme_end.is_some_and(|end| location.bytes().take(end).all(|b| b.is_ascii_alphanumeric())) {
            return Self::parse(location);
        }
        let scheme = if self.https { "https" } else { "http" };
        if location.starts_with("//") {
            return Self::parse(&format!("{scheme}:{location}"));
        }
        let origin = format!("{scheme}://{}", self.authority());
        if location.starts_with('/') {
            return Self::parse(&format!("{origin}{location}"));
        }
        let path = self.path();
        if location.is_empty() || location.starts_with('?') {
            return Self::parse(&format!("{origin}{path}{location}"));
        }
        let directory = path.rfind('/').and_then(|slash| path.get(..=slash)).unwrap_or("/");
        Self::parse(&format!("{origin}{directory}{location}"))
    }

    /// The same URL with one more query parameter; `value` is percent-encoded.
    pub(crate) fn with_query(&self, name: &str, value: &str) -> Self {
        let mut url = self.clone();
        url.target.push(if url.target.contains('?') { '&' } else { '?' });
        url.target.push_str(name);
        url.target.push('=');
        url.target.push_str(&encode(value));
        url
    }

    pub(crate) fn is_https(&self) -> bool {
        self.https
    }

    /// The host, lower case, an IPv6 address in brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// `host[:port]`, without the scheme's own port.
    pub(crate) fn authority(&self) -> String {
        match (self.https, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// Whether credentials for one may be sent to the other: same scheme, host and port.
    pub(crate) fn same_origin(&self, other: &Self) -> bool {
        self.https == other.https && self.host == other.host && self.port == other.port
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("/")
    }

    /// The whole URL, query included: for the request, never for a message.
    pub(crate) fn to_request(&self) -> String {
        format!("{}://{}{}", if self.https { "https" } else { "http" }, self.authority(), self.target)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path())?;
        if self.target.contains('?') { f.write_str("?…") } else { Ok(()) }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Splits `host[:port]`.
pub(crate) fn split_authority(authority: &str) -> Result<(String, Option<u16>), String> {
    let bad = |why: &str| format!("a URL whose host is {why}");
    if authority.contains('@') {
        return Err(bad("preceded by user information"));
    }
    let (host, port) = if authority.starts_with('[') {
        let end = authority.find(']').ok_or_else(|| bad("an unfinished IPv6 address"))?;
        let (host, rest) = authority.split_at(end + 1);
        let address = host.trim_start_matches('[').trim_end_matches(']');
        address.parse::<std::net::Ipv6Addr>().map_err(|_| bad("no IPv6 address"))?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err(bad("followed by something that is no port")),
        }
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'[' | b']' | b':');
    if host.is_empty() || host.len() > 255 || !host.bytes().all(valid) {
        return Err(bad("empty or has characters that no host has"));
    }
    let port = match port {
        None => None,
        Some(text) if text.bytes().all(|b| b.is_ascii_digit()) => {
            Some(text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| bad("followed by no valid port"))?)
        }
        Some(_) => return Err(bad("followed by no valid port")),
    };
    Ok((host.to_ascii_lowercase(), port))
}

/// Percent-encodes a query value (RFC 3986 unreserved characters and the separators that registries expect to see stay).
pub(crate) fn encode(text: &str) -> String {
    use fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b':') {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined() {
        let base = Url::parse("https://R.example:443/v2/a/blobs/uploads/?x=1").unwrap();
        for (location, expected) in [
            ("https://cdn.example/blob?sig=1", "https://cdn.example/blob?sig=1"),
            ("HTTP://cdn.example:80", "http://cdn.example/"),
            ("//cdn.example:8443/x", "https://cdn.example:8443/x"),
            ("/v2/a/b#c", "https://r.example/v2/a/b"),
            ("uuid?_state=1", "https://r.example/v2/a/blobs/uploads/uuid?_state=1"),
            ("?y=http://z", "https://r.example/v2/a/blobs/uploads/?y=http://z"),
            ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ] {
            assert_eq!(base.join(location).unwrap().to_request(), expected, "{location}");
        }
        assert_eq!(
            base.with_query("digest", "sha256:0 &").to_request(),
            "https://r.example/v2/a/blobs/uploads/?x=1&digest=sha256:0%20%26"
        );
        assert_eq!(base.to_string(), "https://r.example/v2/a/blobs/uploads/?…");
    }

    #[test]
    fn what_is_no_url_is_refused() {
        let long = format!("http://a/{}", "x".repeat(LONGEST));
        for text in [
            "",
            "a",
            "ftp://a/",
            "file:///etc/passwd",
            "http://",
            "http:///x",
            "http://user:pw@a/",
            "http://a b/",
            "http://a/\r\nX: y",
            "http://a:0/",
            "http://a:99999/",
            "http://a:x/",
            "http://a:+1/",
            "http://[::1/",
            "http://[::1]x/",
            "http://[zz]/",
            "http://é/",
            long.as_str(),
        ] {
            assert!(Url::parse(text).is_err(), "{text:.40}");
        }
    }
}
