//! `containers-registries.conf(5)`, version 2: which endpoints serve an image's name.
//!
//! One `[[registry]]` table applies to a name, that of the longest matching prefix. Prefixes match on component boundaries, with
//! the host as it is written, port included; `*.domain` matches the hosts below it. Drop-ins are read after the main file, in the
//! order of their names: a table of the same prefix replaces the earlier one, other settings override.
//!
//! Unknown keys of a registry or a mirror are refused, since one may be a misspelt `blocked`; unknown settings of the whole file
//! are only logged. Version 1 files (`[registries.search]`) are refused.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{files, prefix::Prefix};
use crate::{reference::ImageRef, source::TransportError};

/// The most bytes of one file.
const FILE_LIMIT: u64 = 1 << 20;
/// The most drop-in files of one directory.
const DROP_INS_LIMIT: usize = 256;
/// The most registries, and mirrors of each, of one file.
const TABLES_LIMIT: usize = 4096;

/// Where an image is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The physical name: host and repository, with the tag and digest of the name that was asked for.
    pub reference: ImageRef,
    /// Whether the host may be spoken to without verified TLS.
    pub insecure: bool,
    /// Whether it is a mirror, behind which there is another endpoint.
    pub mirror: bool,
    /// Of a node's cache, which is asked for blobs only: the origin of the registry that it is to fetch from.
    pub upstream: Option<String>,
}

impl Endpoint {
    /// The origin of a registry as it is named to a node's cache.
    pub(super) fn origin(&self) -> String {
        let host = self.reference.host();
        let host = if host == super::DOCKER_HUB_NAME { "index.docker.io" } else { host };
        format!("{}://{host}", if self.insecure { "http" } else { "https" })
    }
}

/// What to do with a name without a registry that several registries may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShortNameMode {
    /// Refuse it, unless there is one search registry only.
    Enforcing,
    /// Try all of the search registries in order.
    #[default]
    Permissive,
    /// The same.
    Disabled,
}

/// A registry's configuration, merged of all files. Its serialised form is for other processes of this program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RegistriesConf {
    registries: Vec<Registry>,
    search: Vec<String>,
    search_from: Option<PathBuf>,
    aliases: BTreeMap<String, ImageRef>,
    mode: Option<ShortNameMode>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Registry {
    prefix: Prefix,
    location: Option<Prefix>,
    insecure: bool,
    blocked: bool,
    by_digest_only: bool,
    mirrors: Vec<Mirror>,
    from: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Mirror {
    location: Prefix,
    insecure: bool,
    pull: Pull,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Pull {
    #[default]
    #[serde(alias = "")]
    All,
    DigestOnly,
    TagOnly,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawFile {
    #[serde(default)]
    registry: Vec<RawRegistry>,
    unqualified_search_registries: Option<Vec<String>>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    short_name_mode: Option<String>,
    #[serde(rename = "credential-helpers")]
    _credential_helpers: Option<Vec<String>>,
    #[serde(flatten)]
    other: BTreeMap<String, toml::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawRegistry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<RawMirror>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawMirror {
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: Option<Pull>,
}

impl RegistriesConf {
    /// No configuration: every name is its own endpoint, and there are no short names.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The machine's configuration: `file`, or else `$CONTAINERS_REGISTRIES_CONF`, or else
    /// `$XDG_CONFIG_HOME/containers/registries.conf` where it is there and `/etc/containers/registries.conf` where it is not;
    /// and, unless a file was named, the drop-ins of `registries.conf.d` in `/etc/containers` and then in the user's directory.
    ///
    /// # Errors
    /// [`TransportError`]: a file cannot be read or is not valid, or the one that was named is not there.
    pub fn system(file: Option<&Path>) -> Result<Self, TransportError> {
        let mut conf = Self::default();
        if let Some(path) = file.map(Path::to_path_buf).or_else(|| files::env_path("CONTAINERS_REGISTRIES_CONF")) {
            conf.add(&path, &files::read_limited(&path, "reading registries.conf", FILE_LIMIT)?)?;
            return Ok(conf);
        }
        let etc = PathBuf::from("/etc/containers");
        let user = files::config_home().map(|home| home.join("containers"));
        for dir in user.iter().chain([&etc]) {
            let path = dir.join("registries.conf");
            if let Some(bytes) = files::read_if_there(&path, "reading registries.conf", FILE_LIMIT)? {
                conf.add(&path, &bytes)?;
                break;
            }
        }
        for dir in [&etc].into_iter().chain(&user) {
            conf.add_drop_ins(&dir.join("registries.conf.d"))?;
        }
        Ok(conf)
    }

    /// Adds the `*.conf` files of a directory, in the order of their names; one that is not there has none.
    ///
    /// # Errors
    /// [`TransportError`]: a file cannot be read or is not valid.
    pub fn add_drop_ins(&mut self, dir: &Path) -> Result<(), TransportError> {
        let failed = |source| TransportError::Io { what: "listing drop-ins", path: dir.into(), source };
        let entries = match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed)?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "conf") {
                paths.push(path);
            }
        }
        if paths.len() > DROP_INS_LIMIT {
            let reason = format!("has {} files; at most {DROP_INS_LIMIT} are read", paths.len());
            return Err(TransportError::Config { path: dir.into(), reason });
        }
        paths.sort();
        paths.iter().try_for_each(|path| self.add(path, &files::read_limited(path, "reading a drop-in", FILE_LIMIT)?))
    }

    /// Adds one file, which overrides what was there; `path` is for messages.
    ///
    /// # Errors
    /// [`TransportError::Config`]: it is not valid.
    pub fn add(&mut self, path: &Path, bytes: &[u8]) -> Result<(), TransportError> {
        self.merge(path, bytes).map_err(|reason| TransportError::Config { path: path.into(), reason })
    }

    /// Parses one file, for tests and fuzzing.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut conf = Self::default();
        conf.merge(Path::new("registries.conf"), bytes)?;
        Ok(conf)
    }

    fn merge(&mut self, path: &Path, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() as u64 > FILE_LIMIT {
            return Err(format!("has {} bytes; at most {FILE_LIMIT} are read", bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
        let raw: RawFile = toml::from_str(text).map_err(|error| format!("is not valid: {error}"))?;
        if raw.other.contains_key("registries") {
            return Err("is a version 1 file ([registries.search], .insecure, .block), which is not supported: write \
                        unqualified-search-registries and [[registry]] tables (containers-registries.conf(5))"
                .into());
        }
        for key in raw.other.keys() {
            tracing::warn!(file = %path.display(), key, "unknown setting of registries.conf");
        }
        if raw.registry.len() > TABLES_LIMIT || raw.registry.iter().any(|table| table.mirror.len() > TABLES_LIMIT) {
            return Err(format!("has more than {TABLES_LIMIT} registries or mirrors"));
        }
        let mut tables: Vec<Registry> = Vec::new();
        for table in raw.registry {
            let table = Registry::new(table, path)?;
            if let Some(other) = tables.iter().find(|other| other.prefix == table.prefix) {
                if *other != table {
                    return Err(format!("has two different [[registry]] tables for '{}'", table.prefix));
                }
                continue;
            }
            tables.push(table);
        }
        for (name, value) in &raw.aliases {
            self.add_alias(name, value)?;
        }
        self.registries.retain(|old| !tables.iter().any(|new| new.prefix == old.prefix));
        self.registries.extend(tables);
        if let Some(search) = raw.unqualified_search_registries {
            for registry in &search {
                format!("{registry}/x")
                    .parse::<ImageRef>()
                    .map_err(|error| format!("unqualified-search-registries: {error}"))?;
            }
            (self.search, self.search_from) = (search, Some(path.into()));
        }
        match raw.short_name_mode.as_deref() {
            None | Some("") => {}
            Some("enforcing") => self.mode = Some(ShortNameMode::Enforcing),
            Some("permissive") => self.mode = Some(ShortNameMode::Permissive),
            Some("disabled") => self.mode = Some(ShortNameMode::Disabled),
            Some(other) => {
                return Err(format!("short-name-mode '{other:.40}' is none of enforcing, permissive, disabled"));
            }
        }
        Ok(())
    }

    fn add_alias(&mut self, name: &str, value: &str) -> Result<(), String> {
        let bad = |why: &str| format!("aliases: '{name:.100}' = '{value:.300}': {why}");
        let short: ImageRef = name.parse().map_err(|error| bad(&format!("{error}")))?;
        if ImageRef::is_qualified(name) || short.tag().is_some() || short.digest().is_some() {
            return Err(bad("the alias must be a short name, without registry, tag or digest"));
        }
        if value.is_empty() {
            self.aliases.remove(name);
            return Ok(());
        }
        let target: ImageRef = value.parse().map_err(|error| bad(&format!("{error}")))?;
        if !ImageRef::is_qualified(value) || target.tag().is_some() || target.digest().is_some() {
            return Err(bad("the value must name a registry and a repository, without tag or digest"));
        }
        self.aliases.insert(name.to_owned(), target);
        Ok(())
    }

    /// The names that a name without transport may mean, in order: itself where it has a registry, else its alias, else the one
    /// in each search registry.
    ///
    /// # Errors
    /// [`TransportError::Config`]: it is none, has no meaning, or is ambiguous in enforcing mode.
    pub fn candidates(&self, name: &str) -> Result<Vec<ImageRef>, TransportError> {
        let file = || self.search_from.clone().unwrap_or_else(|| PathBuf::from("registries.conf"));
        let bad = |reason: String| TransportError::Config { path: file(), reason };
        let parsed: ImageRef = name.parse().map_err(|error| bad(format!("{error}")))?;
        if ImageRef::is_qualified(name) {
            return Ok(vec![parsed]);
        }
        let bare = name.split('@').next().unwrap_or(name);
        let bare = match bare.rsplit_once(':') {
            Some((bare, _)) => bare,
            None => bare,
        };
        if let Some(target) = self.aliases.get(bare) {
            let found = parsed.with_repository(&target.repository()).map_err(|error| bad(error.to_string()))?;
            return Ok(vec![found]);
        }
        if self.search.is_empty() {
            return Err(bad(format!(
                "'{name}' is a short name, and neither an alias nor unqualified-search-registries give it a registry: name the \
                 registry, as in docker.io/{}",
                parsed.path()
            )));
        }
        if self.search.len() > 1 && self.mode == Some(ShortNameMode::Enforcing) {
            let list = self.search.join(", ");
            return Err(bad(format!("'{name}' is ambiguous in short-name-mode enforcing: it may be in any of {list}")));
        }
        let full = self.search.iter().map(|registry| format!("{registry}/{name}").parse::<ImageRef>());
        full.collect::<Result<_, _>>().map_err(|error| bad(error.to_string()))
    }

    /// The endpoints to pull from, in the order in which they are to be tried: mirrors, then the primary location.
    ///
    /// # Errors
    /// [`TransportError::Blocked`], and [`TransportError::Config`] for a rewritten name that is none.
    pub fn resolve(&self, reference: &ImageRef) -> Result<Vec<Endpoint>, TransportError> {
        let Some((registry, rest)) = self.find(reference)? else {
            return Ok(vec![Endpoint { reference: reference.clone(), insecure: false, mirror: false, upstream: None }]);
        };
        let rewrite = |location: &Prefix| {
            location.join(&rest).ok_or_else(|| TransportError::Config {
                path: registry.from.clone(),
                reason: format!("location '{location}' makes no valid name of '{reference}'"),
            })
        };
        let by_digest = reference.digest().is_some();
        let mut endpoints = Vec::new();
        for mirror in &registry.mirrors {
            let applies = match mirror.pull {
                Pull::All => by_digest || !registry.by_digest_only,
                Pull::DigestOnly => by_digest,
                Pull::TagOnly => !by_digest,
            };
            if applies {
                let reference = rewrite(&mirror.location)?;
                endpoints.push(Endpoint { reference, insecure: mirror.insecure, mirror: true, upstream: None });
            }
        }
        let primary = registry.location.as_ref().map_or_else(|| Ok(reference.clone()), rewrite)?;
        endpoints.push(Endpoint { reference: primary, insecure: registry.insecure, mirror: false, upstream: None });
        Ok(endpoints)
    }

    /// The endpoint to push to: the name as it is, since mirrors and locations are for reading only.
    ///
    /// # Errors
    /// [`TransportError::Blocked`]
    pub fn resolve_push(&self, reference: &ImageRef) -> Result<Endpoint, TransportError> {
        let insecure = self.find(reference)?.is_some_and(|(registry, _)| registry.insecure);
        Ok(Endpoint { reference: reference.clone(), insecure, mirror: false, upstream: None })
    }

    /// The table for a name, and what of the name is behind the prefix.
    fn find(&self, reference: &ImageRef) -> Result<Option<(&Registry, String)>, TransportError> {
        let matching =
            self.registries.iter().filter_map(|registry| Some((registry, registry.prefix.strip(reference)?)));
        let found = matching.max_by_key(|(registry, _)| registry.prefix.len());
        match found {
            Some((registry, _)) if registry.blocked => Err(TransportError::Blocked {
                place: reference.repository(),
                rule: format!("{}: [[registry]] prefix '{}', blocked = true", registry.from.display(), registry.prefix),
            }),
            other => Ok(other),
        }
    }
}

impl Registry {
    fn new(raw: RawRegistry, path: &Path) -> Result<Self, String> {
        let text = if raw.prefix.is_empty() { &raw.location } else { &raw.prefix };
        if text.is_empty() {
            return Err("has a [[registry]] table with neither prefix nor location".into());
        }
        let prefix = Prefix::parse(text).map_err(|why| format!("prefix '{text:.300}' {why}"))?;
        let location = match raw.location.as_str() {
            // The name as it is. Others demand a location beside mirrors, but files without one are about.
            "" => None,
            text => Some(parse_location(text)?),
        };
        let mut mirrors = Vec::new();
        for mirror in raw.mirror {
            if mirror.pull_from_mirror.is_some_and(|pull| pull != Pull::All) && raw.mirror_by_digest_only {
                return Err(format!(
                    "prefix '{prefix}': pull-from-mirror and mirror-by-digest-only exclude each other"
                ));
            }
            mirrors.push(Mirror {
                location: parse_location(&mirror.location)?,
                insecure: mirror.insecure,
                pull: mirror.pull_from_mirror.unwrap_or_default(),
            });
        }
        let (insecure, blocked, by_digest_only) = (raw.insecure, raw.blocked, raw.mirror_by_digest_only);
        Ok(Self { prefix, location, insecure, blocked, by_digest_only, mirrors, from: path.into() })
    }
}

fn parse_location(text: &str) -> Result<Prefix, String> {
    let location = Prefix::parse(text).map_err(|why| format!("location '{text:.300}' {why}"))?;
    if location.is_wildcard() { Err(format!("location '{location}' must not be a wildcard")) } else { Ok(location) }
}
