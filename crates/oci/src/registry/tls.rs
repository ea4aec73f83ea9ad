//! What TLS trusts for which host: the system's roots, extra ones, and the directories of `containers-certs.d(5)`.
//!
//! A profile is made for a pair of hosts: the one that is connected to, and the registry on whose behalf (they differ for token
//! servers and redirects). The registry's own CA counts for both, its client certificate is shown to the registry alone, and
//! verification is off only where the caller says so for the host that is connected to.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig, TlsProvider};

use super::config::ClientConfig;
use crate::source::TransportError;

/// The most bytes of a certificate or key file.
const FILE_LIMIT: u64 = 16 << 20;
/// The most files of one certs.d directory.
const FILES_LIMIT: usize = 256;

/// Which trust a connection needs; equal profiles share connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct TlsProfile {
    /// Do not verify at all.
    pub(crate) insecure: bool,
    /// The certs.d directory whose `*.crt` are trusted too.
    pub(crate) authorities: Option<PathBuf>,
    /// Whether that directory's client certificate is shown.
    pub(crate) client_certificate: bool,
}

pub(crate) struct TlsStore {
    system_roots: bool,
    extra_roots: Vec<PathBuf>,
    extra_roots_pem: Vec<String>,
    certs_dirs: Vec<PathBuf>,
    roots: OnceLock<Vec<Certificate<'static>>>,
}

impl TlsStore {
    pub(crate) fn new(config: &ClientConfig) -> Self {
        Self {
            system_roots: config.system_roots,
            extra_roots: config.extra_roots.clone(),
            extra_roots_pem: config.extra_roots_pem.clone(),
            certs_dirs: config.certs_dirs.clone(),
            roots: OnceLock::new(),
        }
    }

    /// The certs.d directory of a registry, where there is one. `docker.io` stands for the host that serves it.
    pub(crate) fn host_dir(&self, authority: &str) -> Option<PathBuf> {
        let names: &[&str] =
            if authority == super::DOCKER_HUB_HOST { &[authority, super::DOCKER_HUB_NAME] } else { &[authority] };
        let all = self.certs_dirs.iter().flat_map(|dir| names.iter().map(move |name| dir.join(name)));
        all.into_iter().find(|dir| dir.is_dir())
    }

    /// ureq's settings for a profile.
    pub(crate) fn config(&self, profile: &TlsProfile) -> Result<TlsConfig, TransportError> {
        let builder = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .disable_verification(profile.insecure);
        let (mut roots, mut client) = (Vec::new(), None);
        if !profile.insecure {
            roots.extend(self.roots()?.iter().cloned());
        }
        if let Some(dir) = &profile.authorities {
            let files = DirFiles::list(dir)?;
            for file in files.authorities.iter().filter(|_| !profile.insecure) {
                roots.extend(certificates(file)?);
            }
            if profile.client_certificate {
                client = files.client()?;
            }
        }
        if roots.is_empty() && !profile.insecure {
            return Err(TransportError::Config {
                path: PathBuf::from("TLS trust"),
                reason: "there are no root certificates: install ca-certificates, or name some by extra_roots".into(),
            });
        }
        Ok(builder.root_certs(RootCerts::new_with_certs(&roots)).client_cert(client).build())
    }

    /// The roots that every host is judged by; read once.
    fn roots(&self) -> Result<&[Certificate<'static>], TransportError> {
        if let Some(roots) = self.roots.get() {
            return Ok(roots);
        }
        let mut roots = Vec::new();
        if self.system_roots {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                tracing::warn!(%error, "a system root certificate is not usable");
            }
            roots.extend(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()));
        }
        for path in &self.extra_roots {
            roots.extend(certificates(path)?);
        }
        for text in &self.extra_roots_pem {
            roots.extend(parse_certificates(Path::new("extra_roots_pem"), text.as_bytes())?);
        }
        Ok(self.roots.get_or_init(|| roots))
    }
}

/// The files of one certs.d directory.
struct DirFiles {
    authorities: Vec<PathBuf>,
    certificates: Vec<PathBuf>,
    keys: Vec<PathBuf>,
}

impl DirFiles {
    fn list(dir: &Path) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Io { what: "listing certificates", path: dir.into(), source };
        let mut files = Self { authorities: Vec::new(), certificates: Vec::new(), keys: Vec::new() };
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)?.take(FILES_LIMIT) {
            names.push(entry.map_err(failed)?.path());
        }
        names.sort();
        for path in names {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => files.authorities.push(path),
                Some("cert") => files.certificates.push(path),
                Some("key") => files.keys.push(path),
                _ => {}
            }
        }
        Ok(files)
    }

    /// The first `NAME.cert` with its `NAME.key`; one without the other is a mistake worth an error.
    fn client(&self) -> Result<Option<ClientCert>, TransportError> {
        if let Some(key) = self.keys.iter().find(|key| !self.certificates.contains(&key.with_extension("cert"))) {
            return Err(config_error(key, "there is no .cert file beside this key"));
        }
        let Some(path) = self.certificates.first() else { return Ok(None) };
        let key_path = path.with_extension("key");
        if !self.keys.contains(&key_path) {
            return Err(config_error(path, "there is no .key file beside this client certificate"));
        }
        let chain = certificates(path)?;
        let pem = zeroize::Zeroizing::new(read(&key_path)?);
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| config_error(&key_path, &error.to_string()))?;
        // ureq takes a certificate that does not fit its key for a bug of ours, so look first.
        let der = chain.iter().map(|one| CertificateDer::from(one.der().to_vec())).collect();
        rustls::sign::CertifiedKey::from_der(der, key, &rustls::crypto::ring::default_provider())
            .map_err(|error| config_error(&key_path, &format!("does not serve {}: {error}", path.display())))?;
        let key = PrivateKey::from_pem(&pem).map_err(|error| config_error(&key_path, &error.to_string()))?;
        Ok(Some(ClientCert::new_with_certs(&chain, key)))
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, TransportError> {
    parse_certificates(path, &read(path)?)
}

fn parse_certificates(path: &Path, pem: &[u8]) -> Result<Vec<Certificate<'static>>, TransportError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let parsed = parsed.map_err(|error| config_error(path, &format!("is not PEM: {error}")))?;
    if parsed.is_empty() {
        return Err(config_error(path, "has no PEM certificate"));
    }
    // rustls would pass over a root that it cannot use; the user would then wonder.
    let mut store = rustls::RootCertStore::empty();
    for certificate in &parsed {
        store
            .add(certificate.clone())
            .map_err(|error| config_error(path, &format!("has an unusable certificate: {error}")))?;
    }
    Ok(parsed.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

fn read(path: &Path) -> Result<Vec<u8>, TransportError> {
    super::files::read_limited(path, "reading", FILE_LIMIT)
}

fn config_error(path: &Path, reason: &str) -> TransportError {
    TransportError::Config { path: path.into(), reason: reason.into() }
}
