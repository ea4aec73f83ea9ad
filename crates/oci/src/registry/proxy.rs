//! Which proxy a request takes: `ProxyConfig`, then `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` as curl reads them.
//!
//! Proxies are `http://` ones and are spoken to by CONNECT, for plain HTTP requests too: what passes them is then what we wrote.
//! The loopback addresses and `localhost` never take a proxy, as in Go's programs.

use std::{net::IpAddr, path::PathBuf};

use super::{config::ProxyConfig, url::Url};
use crate::source::TransportError;

pub(crate) struct ProxyRules {
    https: Option<ureq::Proxy>,
    http: Option<ureq::Proxy>,
    direct: Vec<Direct>,
}

/// One entry of `no_proxy`.
#[derive(Debug, PartialEq)]
enum Direct {
    All,
    /// The domain and what is below it.
    Domain(String, Option<u16>),
    Network(IpAddr, u8),
}

impl ProxyRules {
    pub(crate) fn new(config: &ProxyConfig, env: impl Fn(&str) -> Option<String>) -> Result<Self, TransportError> {
        let found = if config.from_env.0 { from_environment(&env) } else { ProxyConfig::default() };
        let https = config.https.clone().or(found.https);
        let http = config.http.clone().or(found.http);
        let entries = config.no_proxy.iter().chain(&found.no_proxy);
        let direct = entries.filter_map(|entry| parse_direct(entry)).collect();
        Ok(Self {
            https: https.map(|text| parse_proxy(&text)).transpose()?,
            http: http.map(|text| parse_proxy(&text)).transpose()?,
            direct,
        })
    }

    /// The proxy for a URL; `None` is a direct connection.
    pub(crate) fn choose(&self, url: &Url) -> Option<&ureq::Proxy> {
        let proxy = if url.is_https() { &self.https } else { &self.http };
        proxy.as_ref().filter(|_| !self.is_direct(url.host(), url.port()))
    }

    fn is_direct(&self, host: &str, port: u16) -> bool {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return true;
        }
        self.direct.iter().any(|entry| match entry {
            Direct::All => true,
            Direct::Domain(domain, only) => {
                only.is_none_or(|only| only == port)
                    && host.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            Direct::Network(network, bits) => address.is_some_and(|address| contains(*network, *bits, address)),
        })
    }
}

/// What the variables say.
pub(super) fn from_environment(get: &impl Fn(&str) -> Option<String>) -> ProxyConfig {
    let env = |names: &[&str]| names.iter().find_map(|name| get(name)).filter(|value| !value.is_empty());
    let list = env(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
    ProxyConfig {
        https: env(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
        // An upper-case HTTP_PROXY is set by whoever sends a `Proxy:` header to a CGI program, but this is none.
        http: env(&["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"]),
        no_proxy: list.split([',', ' ']).filter(|entry| !entry.is_empty()).map(str::to_owned).collect(),
        ..ProxyConfig::default()
    }
}

fn parse_proxy(text: &str) -> Result<ureq::Proxy, TransportError> {
    let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    // The text may hold a password, so no message repeats it.
    let bad = |reason: &str| TransportError::Config { path: PathBuf::from("the proxy setting"), reason: reason.into() };
    let proxy = ureq::Proxy::new(&text).map_err(|_| bad("is no URL of a proxy (http://[user:password@]host:port)"))?;
    if proxy.protocol() != ureq::ProxyProtocol::Http {
        return Err(bad("names a proxy of another kind; only http:// proxies are supported"));
    }
    Ok(proxy)
}

fn parse_direct(entry: &str) -> Option<Direct> {
    let entry = entry.trim().to_ascii_lowercase();
    if entry.is_empty() {
        return None;
    }
    if entry == "*" {
        return Some(Direct::All);
    }
    if let Some((network, bits)) = entry.split_once('/') {
        let network: IpAddr = network.parse().ok()?;
        let bits: u8 = bits.parse().ok()?;
        return (bits <= width(network)).then_some(Direct::Network(network, bits));
    }
    if let Ok(address) = entry.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Some(Direct::Network(address, width(address)));
    }
    let (domain, port) = match entry.split_once(':') {
        Some((domain, port)) => (domain, Some(port.parse().ok()?)),
        None => (entry.as_str(), None),
    };
    let domain = domain.trim_start_matches('*').trim_start_matches('.');
    (!domain.is_empty()).then(|| Direct::Domain(domain.to_owned(), port))
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let shift = 32 - u32::from(bits.min(32));
            let cut = |a: std::net::Ipv4Addr| u32::from(a).checked_shr(shift).unwrap_or(0);
            cut(network) == cut(address)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let shift = 128 - u32::from(bits.min(128));
            let cut = |a: std::net::Ipv6Addr| u128::from(a).checked_shr(shift).unwrap_or(0);
            cut(network) == cut(address)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(no_proxy: &str) -> ProxyRules {
        let no_proxy = no_proxy.to_owned();
        let env = move |name: &str| match name {
            "HTTPS_PROXY" => Some("http://user:hunter2@proxy:3128".to_owned()),
            "NO_PROXY" => Some(no_proxy.clone()),
            _ => None,
        };
        ProxyRules::new(&ProxyConfig::default(), env).unwrap()
    }

    #[test]
    fn no_proxy_knows_hosts_suffixes_and_networks() {
        let rules =
            rules("r.example, .corp.example,*.lab.example:8443 10.0.0.0/8,192.0.2.7,fd00::/8,bad/99,0.0.0.0/33");
        for (url, proxied) in [
            ("https://other.example/", true),
            ("https://r.example/", false),
            ("https://sub.r.example/", false),
            ("https://xr.example/", true),
            ("https://a.corp.example:5000/", false),
            ("https://a.lab.example:8443/", false),
            ("https://a.lab.example/", true),
            ("https://10.1.2.3/", false),
            ("https://11.1.2.3/", true),
            ("https://192.0.2.7:5000/", false),
            ("https://192.0.2.8/", true),
            ("https://[fd12::1]/", false),
            ("https://[fe80::1]/", true),
            ("https://localhost:5000/", false),
            ("https://127.0.0.2/", false),
            ("https://[::1]/", false),
            ("http://other.example/", false),
        ] {
            assert_eq!(rules.choose(&Url::parse(url).unwrap()).is_some(), proxied, "{url}");
        }
        assert!(
            ProxyRules::new(&ProxyConfig::default(), |n| (n == "NO_PROXY").then(|| "*".into()))
                .unwrap()
                .is_direct("x", 1)
        );
    }

    #[test]
    fn other_proxies_are_refused_without_their_password() {
        for text in ["https://u:hunter2@p", "socks5://u:hunter2@p", "http://u:hunter2@"] {
            let config = ProxyConfig { https: Some(text.into()), ..ProxyConfig::default() };
            let error = ProxyRules::new(&config, |_| None).err().unwrap().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        let off = ProxyConfig { from_env: super::super::config::FromEnv(false), ..ProxyConfig::default() };
        assert!(ProxyRules::new(&off, |_| Some("http://p".into())).unwrap().https.is_none());
    }
}
