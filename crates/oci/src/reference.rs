//! Names of images: docker references (`registry.example/team/app:1.2@sha256:…`) and the locations that the tools of the field
//! put in front of them (`docker://`, `oci:`, `oci-archive:`, `docker-archive:`, `dir:`).
//!
//! Grammar: the distribution project's reference grammar; normalisation as skopeo and docker do it (`busybox` is
//! `docker.io/library/busybox:latest`). A name is parsed once, here; everything else takes an [`ImageRef`].

use std::{fmt, path::PathBuf, str::FromStr};

use nacre_core::Digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest repository name (host included) that the grammar allows.
const LONGEST_NAME: usize = 255;
/// The longest tag that the grammar allows.
const LONGEST_TAG: usize = 128;

/// Why a text names no image.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The text is empty, or one part of it is.
    #[error("'{0}': a part of the reference is empty (expected [host[:port]/]path[:tag][@digest])")]
    Empty(String),
    /// The host part is no host.
    #[error("'{0}': not a registry host (expected host or host:port)")]
    Host(String),
    /// A path component is not in the grammar.
    #[error("'{0}': not a repository path: lower-case letters and digits, separated by '.', '_', '__', '-' or '/'")]
    Path(String),
    /// The tag is not in the grammar.
    #[error("'{0}': not a tag: [A-Za-z0-9_] first, then [A-Za-z0-9_.-], at most {LONGEST_TAG} characters")]
    Tag(String),
    /// The digest is none.
    #[error("the digest of the reference: {0}")]
    Digest(#[from] nacre_core::DigestError),
    /// The name is too long.
    #[error("repository name of {0} characters: at most {LONGEST_NAME} are allowed")]
    TooLong(usize),
    /// The transport in front of the colon is unknown.
    #[error("'{0}': unknown transport (docker://, oci:, oci-archive:, docker-archive: and dir: are known)")]
    Transport(String),
    /// The location lacks its path.
    #[error("'{0}': the transport needs a path")]
    NoPath(String),
}

/// A fully qualified image name: registry host, repository path, and a tag, a digest, both or neither.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageRef {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageRef {
    /// The registry, `host[:port]`. Docker Hub is `docker.io`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path at its registry, such as `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, where one was given (or defaulted by [`with_default_tag`](Self::with_default_tag)).
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, where one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `host/path`, without tag and digest.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// The same repository with `:latest`, where there is neither tag nor digest.
    #[must_use]
    pub fn with_default_tag(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some("latest".into());
        }
        self
    }

    /// The same repository with this tag and no digest.
    ///
    /// # Errors
    /// [`ReferenceError::Tag`]
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        check_tag(tag)?;
        Ok(Self { tag: Some(tag.into()), digest: None, ..self.clone() })
    }

    /// The same repository with this digest and no tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The same tag and digest in another repository, `host/path`.
    ///
    /// # Errors
    /// [`ReferenceError`], where `repository` is none.
    pub fn with_repository(&self, repository: &str) -> Result<Self, ReferenceError> {
        let (host, path) = repository.split_once('/').ok_or_else(|| ReferenceError::Empty(repository.into()))?;
        check_host(host)?;
        check_path(path)?;
        check_length(repository)?;
        Ok(Self { host: host.into(), path: path.into(), tag: self.tag.clone(), digest: self.digest })
    }

    /// What a registry's manifest endpoint is asked for: the digest, or else the tag, or else `latest`.
    pub fn manifest_key(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }

    /// Whether the text starts with a registry host, so that it is not a short name for `registries.conf` to resolve.
    pub fn is_qualified(text: &str) -> bool {
        text.split_once('/').is_some_and(|(first, _)| looks_like_host(first))
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    /// Parses and normalises; gives no default tag.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.len() > 2 * LONGEST_NAME + LONGEST_TAG {
            return Err(ReferenceError::TooLong(text.len()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        let name_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest.get(name_start..).and_then(|last| last.split_once(':')) {
            Some((last, tag)) => (rest.get(..name_start + last.len()).unwrap_or_default(), Some(tag)),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let (host, path) = match name.split_once('/') {
            Some((first, path)) if looks_like_host(first) => (first, path.to_owned()),
            Some(_) => ("docker.io", name.to_owned()),
            None if name.is_empty() => return Err(ReferenceError::Empty(text.into())),
            None => ("docker.io", format!("library/{name}")),
        };
        let host = if host == "index.docker.io" { "docker.io" } else { host };
        let path = if host == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path };
        check_host(host)?;
        check_path(&path)?;
        if host.len() + 1 + path.len() > LONGEST_NAME {
            return Err(ReferenceError::TooLong(host.len() + 1 + path.len()));
        }
        Ok(Self { host: host.into(), path, tag: tag.map(str::to_owned), digest })
    }
}

fn looks_like_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_length(name: &str) -> Result<(), ReferenceError> {
    if name.len() > LONGEST_NAME { Err(ReferenceError::TooLong(name.len())) } else { Ok(()) }
}

fn check_host(host: &str) -> Result<(), ReferenceError> {
    let bad = || ReferenceError::Host(host.into());
    if let Some(rest) = host.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
        let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(bad)?) };
        address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        return check_port(port).then_some(()).ok_or_else(bad);
    }
    let (name, port) = match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    (name.split('.').all(label) && check_port(port)).then_some(()).ok_or_else(bad)
}

fn check_port(port: Option<&str>) -> bool {
    port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

fn check_path(path: &str) -> Result<(), ReferenceError> {
    if path.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err(ReferenceError::Path(path.chars().take(300).collect()))
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let mut rest = component;
    loop {
        let word = rest.bytes().take_while(|b| b.is_ascii_lowercase() || b.is_ascii_digit()).count();
        if word == 0 {
            return false;
        }
        rest = rest.get(word..).unwrap_or_default();
        if rest.is_empty() {
            return true;
        }
        let separator = match rest.as_bytes() {
            [b'_', b'_', ..] => 2,
            [b'.' | b'_', ..] => 1,
            [b'-', ..] => rest.bytes().take_while(|b| *b == b'-').count(),
            _ => return false,
        };
        rest = rest.get(separator..).unwrap_or_default();
    }
}

fn check_tag(tag: &str) -> Result<(), ReferenceError> {
    let mut bytes = tag.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if first && rest && tag.len() <= LONGEST_TAG {
        Ok(())
    } else {
        Err(ReferenceError::Tag(tag.chars().take(200).collect()))
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ImageRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ImageRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where an image is, or is to go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Location {
    /// `docker://REF`: a registry.
    Docker(ImageRef),
    /// `oci:DIR[:NAME]`: an OCI image layout; the name is the `org.opencontainers.image.ref.name` annotation.
    OciDir {
        /// The layout's directory.
        path: PathBuf,
        /// The image's name in it; `None` where it holds one image.
        name: Option<String>,
    },
    /// `oci-archive:FILE[:NAME]`: an OCI image layout in a tar file.
    OciArchive {
        /// The tar file.
        path: PathBuf,
        /// The image's name in it; `None` where it holds one image.
        name: Option<String>,
    },
    /// `docker-archive:FILE[:REF]`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        path: PathBuf,
        /// The image's name in it; `None` where it holds one image.
        reference: Option<ImageRef>,
    },
    /// `dir:PATH`: manifest, blobs and signatures as plain files.
    Dir(PathBuf),
}

impl Location {
    /// The transport's name, as policy.json spells it.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Docker(_) => "docker",
            Self::OciDir { .. } => "oci",
            Self::OciArchive { .. } => "oci-archive",
            Self::DockerArchive { .. } => "docker-archive",
            Self::Dir(_) => "dir",
        }
    }

    /// The docker reference, where the location has one: signatures name images by it.
    pub fn image_ref(&self) -> Option<&ImageRef> {
        match self {
            Self::Docker(reference) => Some(reference),
            Self::DockerArchive { reference, .. } => reference.as_ref(),
            _ => None,
        }
    }

    /// Whether the text names a transport; where not, it is a name for `registries.conf` to resolve.
    pub fn has_transport(text: &str) -> bool {
        ["docker://", "oci:", "oci-archive:", "docker-archive:", "dir:"].iter().any(|prefix| text.starts_with(prefix))
    }
}

impl FromStr for Location {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let (transport, rest) = text.split_once(':').ok_or_else(|| ReferenceError::Transport(text.into()))?;
        if transport == "docker" {
            let name = rest.strip_prefix("//").ok_or_else(|| ReferenceError::Transport(text.into()))?;
            return Ok(Self::Docker(name.parse::<ImageRef>()?.with_default_tag()));
        }
        let (path, name) = match rest.split_once(':') {
            Some((path, name)) => (path, Some(name)),
            None => (rest, None),
        };
        let path = if path.is_empty() { Err(ReferenceError::NoPath(text.into())) } else { Ok(PathBuf::from(path)) };
        let name = name.filter(|name| !name.is_empty());
        match transport {
            "oci" => Ok(Self::OciDir { path: path?, name: name.map(str::to_owned) }),
            "oci-archive" => Ok(Self::OciArchive { path: path?, name: name.map(str::to_owned) }),
            "docker-archive" => {
                let reference =
                    name.map(|name| name.parse::<ImageRef>().map(ImageRef::with_default_tag)).transpose()?;
                Ok(Self::DockerArchive { path: path?, reference })
            }
            "dir" if rest.is_empty() => Err(ReferenceError::NoPath(text.into())),
            "dir" => Ok(Self::Dir(PathBuf::from(rest))),
            _ => Err(ReferenceError::Transport(text.into())),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Docker(reference) => write!(f, "docker://{reference}"),
            Self::OciDir { path, name } | Self::OciArchive { path, name } => {
                write!(f, "{}:{}", self.transport(), path.display())?;
                name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
            }
            Self::DockerArchive { path, reference } => {
                write!(f, "docker-archive:{}", path.display())?;
                reference.as_ref().map_or(Ok(()), |reference| write!(f, ":{reference}"))
            }
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, ReferenceError> {
        text.parse::<ImageRef>().map(|reference| reference.to_string())
    }

    #[test]
    fn names_are_normalised() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("docker.io/busybox", "docker.io/library/busybox"),
            ("index.docker.io/a/b", "docker.io/a/b"),
            ("user/app", "docker.io/user/app"),
            ("localhost/app", "localhost/app"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("[::1]:5000/app", "[::1]:5000/app"),
            ("r.example/a__b/c-d.e---f", "r.example/a__b/c-d.e---f"),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        let both = format!("r.example/a:v1@{digest}");
        assert_eq!(parse(&both).unwrap(), both);
        assert_eq!(both.parse::<ImageRef>().unwrap().manifest_key(), digest);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = format!("r.example/{}", "a".repeat(250));
        for text in [
            "",
            ":",
            "@",
            "/",
            "a/",
            "/a",
            "a//b",
            "UPPER",
            "r.example/Upper",
            "a:",
            "a:b:c",
            "a@sha256:0",
            "a..b",
            "a_",
            "a___b",
            "-a",
            "r.example:99999/a",
            "r.example:x/a",
            "r..example/a",
            "-r.example/a",
            "[::1/a",
            "[::1]x/a",
            "r.example/../a",
            "r.example/a:.x",
            "r.example/é",
            long.as_str(),
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn locations_print_as_they_parse() {
        for text in [
            "docker://r.example/a:v1",
            "oci:/tmp/layout:v1",
            "oci:layout",
            "oci-archive:/tmp/a.tar:x",
            "docker-archive:/tmp/a.tar:r.example/a:v1",
            "dir:/tmp/a:b",
        ] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        for text in ["", "oci", "oci:", "dir:", "docker:busybox", "ftp://x", "docker-archive::x"] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
