//! Keys and certificates that a policy names: a file, a broker's resource, or data in the policy itself.
//!
//! A policy says `keyPath: "kbs:///default/image-keys/cosign"` as well as `keyPath: "/etc/keys/cosign.pub"`; nothing else differs.
//! What is read here is trusted because the policy names it, and read anew for each evaluation.

use std::{fmt, io::Read as _, path::PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{KeySource, KeySourceError, ResourceUri};

use super::json::{Fields, JsonError};

/// The most bytes of one keyring, key or set of certificates.
pub const MATERIAL_LIMIT: usize = 4 << 20;
/// The most sources that one field may list.
const SOURCES_LIMIT: usize = 64;

/// Where a key or certificate is.
#[derive(Clone, PartialEq, Eq)]
pub enum Material {
    /// A file of this machine.
    File(PathBuf),
    /// A resource of the key broker.
    Resource(ResourceUri),
    /// The data itself.
    Inline(Vec<u8>),
}

impl fmt::Display for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Resource(uri) => write!(f, "{uri}"),
            Self::Inline(data) => write!(f, "the policy's own {} bytes of key data", data.len()),
        }
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a key or certificate that a policy names could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// The file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The broker did not release it.
    #[error(transparent)]
    Resource(#[from] KeySourceError),
    /// There is more of it than keys need.
    #[error("{0} is larger than {MATERIAL_LIMIT} bytes")]
    TooLarge(String),
}

impl Material {
    pub(crate) fn path(text: &str, at: &str) -> Result<Self, JsonError> {
        if text.is_empty() {
            return Err(JsonError::at(at, "is empty"));
        }
        if text.starts_with("kbs://") || text.starts_with("kbs+") {
            let uri = text.parse().map_err(|error: nacre_core::UriError| JsonError::at(at, error.to_string()))?;
            return Ok(Self::Resource(uri));
        }
        Ok(Self::File(PathBuf::from(text.strip_prefix("file://").unwrap_or(text))))
    }

    pub(crate) fn data(text: &str, at: &str) -> Result<Self, JsonError> {
        let data = STANDARD.decode(text).map_err(|error| JsonError::at(at, format!("is not base64: {error}")))?;
        if data.is_empty() {
            return Err(JsonError::at(at, "is empty"));
        }
        Ok(Self::Inline(data))
    }

    /// Reads it.
    pub(crate) fn load(&self, keys: &dyn KeySource) -> Result<Vec<u8>, MaterialError> {
        let bytes = match self {
            Self::Inline(data) => data.clone(),
            Self::Resource(uri) => keys.fetch(uri)?.expose().to_vec(),
            Self::File(path) => {
                let mut bytes = Vec::new();
                std::fs::File::open(path)
                    .and_then(|file| file.take(MATERIAL_LIMIT as u64 + 1).read_to_end(&mut bytes))
                    .map_err(|source| MaterialError::Io { path: path.clone(), source })?;
                bytes
            }
        };
        if bytes.len() > MATERIAL_LIMIT { Err(MaterialError::TooLarge(self.to_string())) } else { Ok(bytes) }
    }
}

/// The names under which an object may have the same thing: one file, several files, one datum, several data.
pub(crate) struct SourceNames {
    pub(crate) path: &'static str,
    pub(crate) paths: Option<&'static str>,
    pub(crate) data: &'static str,
    pub(crate) datas: Option<&'static str>,
}

/// Takes at most one of the fields; `None` where none is there.
pub(crate) fn take_sources(fields: &mut Fields, names: &SourceNames) -> Result<Option<Vec<Material>>, JsonError> {
    let mut found: Vec<(&str, Vec<Material>)> = Vec::new();
    let place = fields.place(names.path);
    if let Some(text) = fields.optional_string(names.path)? {
        found.push((names.path, vec![Material::path(&text, &place)?]));
    }
    let place = fields.place(names.data);
    if let Some(text) = fields.optional_string(names.data)? {
        found.push((names.data, vec![Material::data(&text, &place)?]));
    }
    for (name, parse) in [(names.paths, Material::path as fn(&str, &str) -> _), (names.datas, Material::data)] {
        let Some(name) = name else { continue };
        let place = fields.place(name);
        let Some(texts) = fields.optional_strings(name)? else { continue };
        if texts.is_empty() || texts.len() > SOURCES_LIMIT {
            return Err(JsonError::at(
                &place,
                format!("has {} entries; 1 to {SOURCES_LIMIT} are allowed", texts.len()),
            ));
        }
        found.push((name, texts.iter().map(|text| parse(text, &place)).collect::<Result<_, _>>()?));
    }
    match found.len() {
        0 | 1 => Ok(found.pop().map(|(_, sources)| sources)),
        _ => {
            let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
            Err(JsonError::at(fields.at(), format!("{} are all there; one of them is allowed", names.join(", "))))
        }
    }
}
