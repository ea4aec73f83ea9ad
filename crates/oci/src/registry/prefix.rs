//! A prefix of image names, as `registries.conf` has them: `host[:port][/path…][:tag|@digest]` or `*.domain`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::url::split_authority;
use crate::reference::ImageRef;

/// The longest prefix.
const LONGEST: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Prefix(String);

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).map_err(|why| format!("'{text:.200}' {why}"))
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.0
    }
}

impl Prefix {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return Err("must have no scheme".into());
        }
        let text = text.trim_end_matches('/');
        let host = text.split('/').next().unwrap_or_default();
        if text.is_empty() || text.len() > LONGEST {
            return Err(format!("is empty or longer than {LONGEST} bytes"));
        }
        if let Some(domain) = text.strip_prefix("*.") {
            if host != text || domain.contains('*') || split_authority(domain).is_err() {
                return Err("is no wildcard: *.domain, without a path, is one".into());
            }
            return Ok(Self(text.to_owned()));
        }
        let sane = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@[]".contains(&b);
        if !text.bytes().all(sane) || text.contains("//") || text.split('/').any(|part| part == "..") {
            return Err("is no name of a registry, namespace or repository".into());
        }
        let host = host.split('@').next().unwrap_or(host);
        split_authority(host).map_err(|_| "does not start with a registry's host".to_owned())?;
        Ok(Self(text.to_owned()))
    }

    pub(crate) fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// What of a name is behind this prefix: starts with `/`, `:` or `@`, or is empty. `None` where the prefix is none of it.
    pub(crate) fn strip(&self, reference: &ImageRef) -> Option<String> {
        let full = reference.to_string();
        if let Some(domain) = self.0.strip_prefix('*') {
            let host = reference.host();
            let below = host.len() > domain.len() && host.ends_with(domain);
            return below.then(|| full.get(host.len()..).unwrap_or_default().to_owned());
        }
        let rest = full.strip_prefix(self.0.as_str())?;
        // `example.com` is not a prefix of `example.com:5000/app`: that is another registry.
        let in_host = self.0.len() < reference.host().len();
        let boundary = rest.is_empty() || rest.starts_with(['/', ':', '@']);
        (boundary && !in_host).then(|| rest.to_owned())
    }

    /// The name that this location and the rest of another name make.
    pub(crate) fn join(&self, rest: &str) -> Option<ImageRef> {
        let text = format!("{}{rest}", self.0);
        // Where the location's host could be taken for a path at Docker Hub, the name is not what was meant.
        ImageRef::is_qualified(&text).then(|| text.parse().ok()).flatten()
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
