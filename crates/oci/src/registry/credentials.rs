//! Where credentials come from: given by the caller, or the auth files and helpers of the user.

use std::path::{Path, PathBuf};

use nacre_core::SecretBytes;

use super::{
    auth_file::{AUTH_FILE_LIMIT, AuthFile, Credentials, Found},
    files, helper,
};
use crate::source::TransportError;

/// What a client may prove itself with.
#[derive(Debug, Default)]
pub struct CredentialStore {
    /// For every registry, before all files.
    fixed: Option<Credentials>,
    /// In order of precedence, each with its path or other name.
    files: Vec<(PathBuf, AuthFile)>,
    helpers: bool,
    helper_time: Option<std::time::Duration>,
}

impl CredentialStore {
    /// No credentials: every registry is asked anonymously.
    pub fn anonymous() -> Self {
        Self::default()
    }

    /// The user's own: `authfile`, or else `$REGISTRY_AUTH_FILE`, or else, in this order,
    /// `$XDG_RUNTIME_DIR/containers/auth.json`, `$XDG_CONFIG_HOME/containers/auth.json` (`~/.config`) and
    /// `$DOCKER_CONFIG/config.json` (`~/.docker`), of which the first that knows the registry counts. Helpers may be run.
    ///
    /// # Errors
    /// [`TransportError`]: a file cannot be read or is none, or the one that was named is not there.
    pub fn system(authfile: Option<&Path>) -> Result<Self, TransportError> {
        let mut store = Self { helpers: true, ..Self::default() };
        if let Some(path) = authfile.map(Path::to_path_buf).or_else(|| files::env_path("REGISTRY_AUTH_FILE")) {
            let bytes = files::read_limited(&path, "reading credentials", AUTH_FILE_LIMIT)?;
            store.add(path, bytes)?;
            return Ok(store);
        }
        let home = files::env_path("HOME");
        let docker = files::env_path("DOCKER_CONFIG").or_else(|| home.map(|home| home.join(".docker")));
        let candidates = [
            files::env_path("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
            files::config_home().map(|dir| dir.join("containers/auth.json")),
            docker.map(|dir| dir.join("config.json")),
        ];
        for path in candidates.into_iter().flatten() {
            if let Some(bytes) = files::read_if_there(&path, "reading credentials", AUTH_FILE_LIMIT)? {
                store.add(path, bytes)?;
            }
        }
        Ok(store)
    }

    /// The auth files that were found, in order of precedence: those that [`from_files`](Self::from_files) of another process takes.
    pub fn files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(path, _)| path.clone()).collect()
    }

    /// These auth files; one that has gone meanwhile has no credentials. Helpers may be run.
    ///
    /// # Errors
    /// [`TransportError`]: a file cannot be read or is none.
    pub fn from_files(paths: &[PathBuf]) -> Result<Self, TransportError> {
        let mut store = Self { helpers: true, ..Self::default() };
        for path in paths {
            if let Some(bytes) = files::read_if_there(path, "reading credentials", AUTH_FILE_LIMIT)? {
                store.add(path.clone(), bytes)?;
            }
        }
        Ok(store)
    }

    /// An auth file that the caller has, such as one that a key broker released; `name` is for messages. No helper is run.
    ///
    /// # Errors
    /// [`TransportError::Config`]: it is none.
    pub fn from_bytes(name: &str, auth_file: &SecretBytes) -> Result<Self, TransportError> {
        let mut store = Self::default();
        let parsed = AuthFile::parse(auth_file.expose())
            .map_err(|reason| TransportError::Config { path: name.into(), reason })?;
        store.files.push((name.into(), parsed));
        Ok(store)
    }

    /// One name and password for whatever registry is asked (`--creds`).
    pub fn basic(user: &str, password: SecretBytes) -> Self {
        Self { fixed: Some(Credentials::Basic { user: user.to_owned(), password }), ..Self::default() }
    }

    /// How long a credential helper may run. Default 30 s.
    #[must_use]
    pub fn with_helper_time(mut self, limit: std::time::Duration) -> Self {
        self.helper_time = Some(limit);
        self
    }

    fn add(&mut self, path: PathBuf, bytes: Vec<u8>) -> Result<(), TransportError> {
        let bytes = zeroize::Zeroizing::new(bytes);
        match AuthFile::parse(&bytes) {
            Ok(file) => {
                self.files.push((path, file));
                Ok(())
            }
            Err(reason) => Err(TransportError::Config { path, reason }),
        }
    }

    /// Calls `use_them` with the credentials for a repository, or with `None` where there are none.
    pub(crate) fn with<T>(
        &self,
        host: &str,
        path: &str,
        use_them: impl FnOnce(Option<&Credentials>) -> T,
    ) -> Result<T, TransportError> {
        if self.fixed.is_some() {
            return Ok(use_them(self.fixed.as_ref()));
        }
        for (file, parsed) in &self.files {
            match parsed.find(host, path) {
                Some(Found::Credentials(credentials)) => return Ok(use_them(Some(credentials))),
                Some(Found::Helper(name)) if self.helpers => {
                    let server = if host == super::DOCKER_HUB_NAME { "https://index.docker.io/v1/" } else { host };
                    let limit = self.helper_time.unwrap_or(helper::TIME_LIMIT);
                    let found = helper::ask(name, server, limit)
                        .map_err(|reason| TransportError::Config { path: file.clone(), reason })?;
                    if found.is_some() {
                        return Ok(use_them(found.as_ref()));
                    }
                }
                Some(Found::Helper(name)) => {
                    tracing::warn!(file = %file.display(), name, "a credential helper is named, but none is run here");
                }
                None => {}
            }
        }
        Ok(use_them(None))
    }

    /// Where was looked, for messages.
    pub(crate) fn looked_at(&self) -> String {
        let names: Vec<String> = self.files.iter().map(|(path, _)| path.display().to_string()).collect();
        if names.is_empty() { "no auth file was found".into() } else { format!("none for it in {}", names.join(", ")) }
    }
}
