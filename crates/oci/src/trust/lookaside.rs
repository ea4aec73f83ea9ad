//! registries.d, containers-registries.d(5): where GPG signatures of a registry's images are, and whether cosign's are looked for.
//!
//! ```text
//! default-docker: {lookaside: URL, lookaside-staging: URL, use-sigstore-attachments: bool}
//! docker: {NAMESPACE: {…the same…}}
//! ```
//!
//! `sigstore` and `sigstore-staging` are the old names. All `*.yaml` files of the directory count together; what two of them define
//! differently is an error. Namespaces are those of policy.json's docker scopes; per setting, the most specific one that has it decides.
//!
//! A signature is at `<base>/<repository path>@sha256=<hex>/signature-<N>`, N from 1.

use std::{collections::BTreeMap, io::Read as _, path::Path};

use nacre_core::Digest;
use serde::Deserialize;

use super::scope;
use crate::{reference::ImageRef, source::TransportError};

/// The most bytes of one file.
const FILE_LIMIT: usize = 1 << 20;
/// The most files of the directory, and namespaces of all of them.
const ENTRIES_LIMIT: usize = 10_000;

/// The merged configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LookasideConfig {
    default: Option<Namespace>,
    namespaces: BTreeMap<String, Namespace>,
    sources: BTreeMap<String, String>,
    built_in: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Namespace {
    lookaside: Option<String>,
    lookaside_staging: Option<String>,
    sigstore: Option<String>,
    sigstore_staging: Option<String>,
    use_sigstore_attachments: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    default_docker: Option<Namespace>,
    docker: Option<BTreeMap<String, Namespace>>,
}

impl Namespace {
    fn read(&self) -> Option<&str> {
        self.lookaside.as_deref().or(self.sigstore.as_deref()).filter(|url| !url.is_empty())
    }

    fn write(&self) -> Option<&str> {
        let staging = self.lookaside_staging.as_deref().or(self.sigstore_staging.as_deref());
        staging.filter(|url| !url.is_empty()).or_else(|| self.read())
    }

    fn check(&self) -> Result<(), String> {
        let urls = [&self.lookaside, &self.lookaside_staging, &self.sigstore, &self.sigstore_staging];
        for url in urls.into_iter().flatten().filter(|url| !url.is_empty()) {
            check_url(url)?;
        }
        Ok(())
    }
}

fn check_url(url: &str) -> Result<(), String> {
    let known = ["http://", "https://", "file:///"].iter().any(|scheme| url.starts_with(scheme));
    let plain =
        url.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'"' | b'<' | b'>' | b'\\'));
    if known && plain {
        Ok(())
    } else {
        Err(format!("'{url:.200}' is not a lookaside URL (http://, https:// or file:///, without query)"))
    }
}

impl LookasideConfig {
    /// Adds one file's content. Pure; for fuzzing too.
    ///
    /// # Errors
    /// [`TransportError::Config`], naming the file and what is wrong, or which two files contradict each other.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), TransportError> {
        self.try_add(name, bytes).map_err(|reason| TransportError::Config { path: name.into(), reason })
    }

    fn try_add(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() > FILE_LIMIT {
            return Err(format!("larger than {FILE_LIMIT} bytes"));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
        // A file of comments alone is an empty document, as the one that Debian installs.
        let file: Option<File> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let file = file.unwrap_or_default();
        if let Some(default) = file.default_docker {
            default.check()?;
            self.define("default-docker", name, self.default.as_ref().is_some_and(|known| *known == default))?;
            self.default = Some(default);
        }
        for (namespace, settings) in file.docker.unwrap_or_default() {
            settings.check().map_err(|problem| format!("docker.{namespace:.200}: {problem}"))?;
            let same = self.namespaces.get(&namespace).is_some_and(|known| *known == settings);
            self.define(&format!("docker.{namespace}"), name, same)?;
            self.namespaces.insert(namespace, settings);
        }
        if self.sources.len() > ENTRIES_LIMIT { Err(format!("more than {ENTRIES_LIMIT} namespaces")) } else { Ok(()) }
    }

    fn define(&mut self, what: &str, file: &str, same: bool) -> Result<(), String> {
        match self.sources.insert(what.into(), file.into()) {
            Some(other) if !same => Err(format!("'{what}' is already defined in {other}")),
            _ => Ok(()),
        }
    }

    /// Reads all `*.yaml` files of a directory; a directory that is not there is an empty configuration.
    ///
    /// # Errors
    /// [`TransportError`]: a file cannot be read, is not valid, or two define the same thing differently.
    pub fn load_dir(dir: &Path) -> Result<Self, TransportError> {
        let io = |path: &Path, source| TransportError::Io { what: "read registries.d", path: path.into(), source };
        let mut config = Self::default();
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(config),
            Err(source) => return Err(io(dir, source)),
        };
        let mut files = Vec::new();
        for entry in entries.take(ENTRIES_LIMIT) {
            let path = entry.map_err(|source| io(dir, source))?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                files.push(path);
            }
        }
        files.sort();
        for path in files {
            let mut bytes = Vec::new();
            std::fs::File::open(&path)
                .and_then(|file| file.take(FILE_LIMIT as u64 + 1).read_to_end(&mut bytes))
                .map_err(|source| io(&path, source))?;
            config.add(&path.to_string_lossy(), &bytes)?;
        }
        Ok(config)
    }

    /// A base for images that no file says anything about (`file:///var/lib/containers/sigstore` for root, as skopeo has it).
    ///
    /// # Errors
    /// [`TransportError::Config`]: it is no base URL.
    pub fn with_built_in(mut self, url: &str) -> Result<Self, TransportError> {
        check_url(url).map_err(|reason| TransportError::Config { path: "built-in lookaside".into(), reason })?;
        self.built_in = Some(url.into());
        Ok(self)
    }

    fn setting<'a, T>(&'a self, image: &ImageRef, get: impl Fn(&'a Namespace) -> Option<T>) -> Option<T> {
        scope::of_reference(image)
            .iter()
            .filter_map(|name| self.namespaces.get(name))
            .chain(&self.default)
            .find_map(get)
    }

    /// Where the image's signature number `number` (from 1) is; `None` where no lookaside is configured.
    pub fn read_url(&self, image: &ImageRef, manifest: &Digest, number: usize) -> Option<String> {
        let base = self.setting(image, Namespace::read).or(self.built_in.as_deref())?;
        Some(signature_url(base, image, manifest, number))
    }

    /// Where the image's signature number `number` (from 1) is written to.
    pub fn write_url(&self, image: &ImageRef, manifest: &Digest, number: usize) -> Option<String> {
        let base = self.setting(image, Namespace::write).or(self.built_in.as_deref())?;
        Some(signature_url(base, image, manifest, number))
    }

    /// Whether cosign's signatures of the image are looked for and written; `None` where no file says so.
    pub fn use_sigstore_attachments(&self, image: &ImageRef) -> Option<bool> {
        self.setting(image, |namespace| namespace.use_sigstore_attachments)
    }
}

fn signature_url(base: &str, image: &ImageRef, manifest: &Digest, number: usize) -> String {
    let base = base.trim_end_matches('/');
    format!("{base}/{}@{}={}/signature-{number}", image.path(), manifest.algorithm().name(), manifest.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(files: &[&str]) -> Result<LookasideConfig, TransportError> {
        let mut config = LookasideConfig::default();
        for (number, text) in files.iter().enumerate() {
            config.add(&format!("{number}.yaml"), text.as_bytes())?;
        }
        Ok(config)
    }

    fn read(config: &LookasideConfig, image: &str) -> Option<String> {
        config.read_url(&image.parse().unwrap(), &Digest::sha256(b""), 3)
    }

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn the_most_specific_namespace_that_says_it_decides() {
        let config = config(&[
            "default-docker:\n  sigstore: file:///default/\n",
            "docker:\n  r.example:\n    lookaside: https://s.example/all\n  r.example/team:\n    use-sigstore-attachments: true\n  \
             r.example/team/app:\n    sigstore: http://old.example\n    lookaside-staging: file:///staging\n",
        ])
        .unwrap();
        let url = |base: &str, path: &str| Some(format!("{base}/{path}@sha256={EMPTY}/signature-3"));
        assert_eq!(read(&config, "r.example/team/app:1"), url("http://old.example", "team/app"));
        assert_eq!(read(&config, "r.example/team/other:1"), url("https://s.example/all", "team/other"));
        assert_eq!(read(&config, "busybox"), url("file:///default", "library/busybox"));
        let image = "r.example/team/app:1".parse().unwrap();
        assert_eq!(config.write_url(&image, &Digest::sha256(b""), 3), url("file:///staging", "team/app"));
        assert_eq!(config.use_sigstore_attachments(&image), Some(true));
        assert_eq!(config.use_sigstore_attachments(&"busybox".parse().unwrap()), None);
        assert_eq!(read(&LookasideConfig::default(), "busybox"), None);
    }

    #[test]
    fn a_file_of_comments_is_empty() {
        assert_eq!(config(&["# nothing\n", ""]).unwrap(), LookasideConfig::default());
    }

    #[test]
    fn what_is_wrong_is_refused_by_name() {
        let default = "default-docker:\n  sigstore: file:///a\n";
        assert!(config(&[default, default]).is_ok());
        let error = config(&[default, &default.replace("/a", "/b")]).unwrap_err().to_string();
        assert!(error.contains("1.yaml") && error.contains("0.yaml"), "{error}");
        for text in [
            "default-docker:\n  lookasides: file:///a\n",
            "default-docker:\n  lookaside: ftp://a\n",
            "default-docker:\n  lookaside: file://a\n",
            "default-docker:\n  lookaside: http://a/?x\n",
            "docker: [1]\n",
            "docker:\n  a:\n    lookaside: http://a\n  a:\n    lookaside: http://b\n",
            "other: {}\n",
            "- x\n",
            ": :\n\t",
        ] {
            assert!(config(&[text]).is_err(), "{text}");
        }
    }
}
