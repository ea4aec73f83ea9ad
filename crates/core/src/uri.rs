//! Names of broker resources: `kbs:///repository/type/tag`, as Trustee's clients spell them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not a resource's name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum UriError {
    /// The scheme is not `kbs` or `kbs+<plugin>`.
    #[error("'{0}' is not a resource URI: it must start with kbs:// or kbs+<plugin>://")]
    Scheme(String),
    /// The path has not three segments.
    #[error("'{0}' is not a resource path: expected <repository>/<type>/<tag>")]
    Segments(String),
    /// A segment has a character that it must not have.
    #[error("'{0}' is not a resource path segment: [A-Za-z0-9_-] first, then [A-Za-z0-9_.-], at most 255 characters")]
    Segment(String),
    /// The host part is not `host[:port]`.
    #[error("'{0}' is not a broker address: expected host[:port]")]
    Host(String),
    /// The whole is longer than anything sensible.
    #[error("resource URI of {0} characters: at most 2048 are allowed")]
    TooLong(usize),
}

/// `repository/type/tag` of a resource at a broker. Each segment is `[A-Za-z0-9_-][A-Za-z0-9_.-]*`, so a path can never climb.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourcePath {
    repository: String,
    kind: String,
    tag: String,
}

impl ResourcePath {
    /// Makes a path of its three segments.
    ///
    /// # Errors
    /// [`UriError::Segment`] for a segment that is none.
    pub fn new(repository: &str, kind: &str, tag: &str) -> Result<Self, UriError> {
        for segment in [repository, kind, tag] {
            check_segment(segment)?;
        }
        Ok(Self { repository: repository.into(), kind: kind.into(), tag: tag.into() })
    }

    /// The first segment.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The second segment, the resource's type.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The third segment.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl FromStr for ResourcePath {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if text.len() > 2048 {
            return Err(UriError::TooLong(text.len()));
        }
        let mut segments = text.split('/');
        match (segments.next(), segments.next(), segments.next(), segments.next()) {
            (Some(repository), Some(kind), Some(tag), None) => Self::new(repository, kind, tag),
            _ => Err(UriError::Segments(text.into())),
        }
    }
}

impl fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.repository, self.kind, self.tag)
    }
}

fn check_segment(segment: &str) -> Result<(), UriError> {
    let mut bytes = segment.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    if first && rest && segment.len() <= 255 {
        Ok(())
    } else {
        Err(UriError::Segment(segment.chars().take(300).collect()))
    }
}

/// `kbs[+plugin]://[host[:port]]/repository/type/tag[?query]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResourceUri {
    plugin: Option<String>,
    host: Option<String>,
    path: ResourcePath,
    query: Option<String>,
}

impl ResourceUri {
    /// A resource of the broker that the guest is configured with.
    pub fn from_path(path: ResourcePath) -> Self {
        Self { plugin: None, host: None, path, query: None }
    }

    /// The broker's plugin; `None` is the plain resource store.
    pub fn plugin(&self) -> Option<&str> {
        self.plugin.as_deref()
    }

    /// The broker's address, where the URI names one.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// The resource's path.
    pub fn path(&self) -> &ResourcePath {
        &self.path
    }

    /// The query, without its question mark.
    pub fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }
}

impl FromStr for ResourceUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if text.len() > 2048 {
            return Err(UriError::TooLong(text.len()));
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UriError::Scheme(text.into()))?;
        let plugin = match scheme.strip_prefix("kbs") {
            Some("") => None,
            Some(tail) => match tail.strip_prefix('+') {
                Some(name) if check_segment(name).is_ok() => Some(name.to_owned()),
                _ => return Err(UriError::Scheme(text.into())),
            },
            None => return Err(UriError::Scheme(text.into())),
        };
        let (host, rest) = rest.split_once('/').ok_or_else(|| UriError::Segments(text.into()))?;
        if !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']')) {
            return Err(UriError::Host(host.into()));
        }
        let (path, query) = match rest.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (rest, None),
        };
        if query.is_some_and(|query| {
            !query.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'#' | b'"' | b'<' | b'>'))
        }) {
            return Err(UriError::Segment(query.unwrap_or_default().into()));
        }
        Ok(Self {
            plugin,
            host: (!host.is_empty()).then(|| host.to_owned()),
            path: path.parse()?,
            query: query.map(str::to_owned),
        })
    }
}

impl fmt::Display for ResourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kbs")?;
        if let Some(plugin) = &self.plugin {
            write!(f, "+{plugin}")?;
        }
        write!(f, "://{}/{}", self.host.as_deref().unwrap_or_default(), self.path)?;
        if let Some(query) = &self.query {
            write!(f, "?{query}")?;
        }
        Ok(())
    }
}

impl Serialize for ResourceUri {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ResourceUri {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_back() {
        for text in [
            "kbs:///default/key/1",
            "kbs://broker.example:8080/a/b/c",
            "kbs+vault:///a/b/c?version=2",
            "kbs://[::1]:80/-/_/0.x",
        ] {
            assert_eq!(text.parse::<ResourceUri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn tricks_are_refused() {
        for text in [
            "",
            "kbs",
            "kbs:/a/b/c",
            "http:///a/b/c",
            "kbsx:///a/b/c",
            "kbs+:///a/b/c",
            "kbs:///a/b",
            "kbs:///a/b/c/d",
            "kbs:///../b/c",
            "kbs:///a//c",
            "kbs:///a/b/.c",
            "kbs:///a/b/c%2f",
            "kbs:///a/b/é",
            "kbs://user@host/a/b/c",
            "kbs:///a/b/c?x\ny",
        ] {
            assert!(text.parse::<ResourceUri>().is_err(), "{text}");
        }
        assert_eq!(format!("kbs:///{}/b/c", "a".repeat(4000)).parse::<ResourceUri>(), Err(UriError::TooLong(4011)));
    }
}
