//! The knobs of the registry client, as a TOML table or made by a program.

use std::{io, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How the registry client behaves. Every field has a default; durations are seconds, with fractions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// The longest that name resolution plus connecting and the TLS handshake may take. Default 15 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub connect_timeout: Duration,
    /// The longest silence of a peer, while its answer is awaited and while a body is read or written. Default 30 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub stall_timeout: Duration,
    /// The longest that a peer may take from the end of a request to the end of its answer's headers, and, for a registry that
    /// stores an upload, the longest silence. Default 120 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub response_timeout: Duration,
    /// The fewest bytes a second, over any `stall_timeout` spent reading, below which a body counts as stalled. Default 256 B/s.
    pub slowest_rate: u64,
    /// How often a request is repeated that failed for a reason that may pass. Default 4, at most 20.
    pub retries: u32,
    /// The same for a mirror, behind which there is another registry to ask. Default 1, at most 20.
    pub mirror_retries: u32,
    /// The pause before the first repetition; it doubles each time, and each is shortened at random by up to a half. Default 0.25 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub first_backoff: Duration,
    /// The longest of these pauses. Default 15 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub longest_backoff: Duration,
    /// The longest `Retry-After` of a registry that is obeyed; a longer one fails the request. Default 60 s.
    #[serde(deserialize_with = "seconds", serialize_with = "to_seconds")]
    pub longest_retry_after: Duration,
    /// How many redirects of one request are followed. Default 8.
    pub redirects: usize,
    /// How many idle connections are kept to one host. Default 8.
    pub idle_connections: usize,
    /// Registries that may be spoken to without verified TLS or by plain HTTP, as in `registries.conf`: `host[:port]`,
    /// optionally with a path, or `*.domain`. Default none, loopback included.
    pub insecure_registries: Vec<String>,
    /// Takes every registry that an image is named at for insecure (`--insecure-registry`). Default false.
    pub insecure: bool,
    /// Files of PEM certificates that are trusted besides the system's.
    pub extra_roots: Vec<PathBuf>,
    /// The same, as PEM text.
    pub extra_roots_pem: Vec<String>,
    /// Whether the system's root certificates are trusted (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others). Default true.
    pub system_roots: bool,
    /// Directories of `containers-certs.d(5)`: `<host:port>/{*.crt,*.cert,*.key}`; the first that has the host counts.
    /// Default `~/.config/containers/certs.d`, `/etc/containers/certs.d`, `/etc/docker/certs.d`.
    pub certs_dirs: Vec<PathBuf>,
    /// A cache of the node, peer-to-peer or not, that blobs are asked of before any registry: `http[s]://host[:port]`. It is told which
    /// registry has them as Dragonfly's and Spegel's want it: by `X-Dragonfly-Registry`, and by `ns` in the query. It gets the
    /// credentials that the credential files have for its own host, and no others. Default none.
    pub node_cache: Option<String>,
    /// The proxies. Default: those of the environment.
    pub proxy: ProxyConfig,
    /// The bytes of one piece of an upload, each of which is held in memory and repeated when it fails; 0 sends a blob in one
    /// request, which is not repeated. For registries behind proxies that limit a request's size. Default 0.
    pub upload_chunk: usize,
    /// The `User-Agent`. Default `nacre/<version>`.
    pub user_agent: String,
}

/// Which proxy a request takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyConfig {
    /// Takes what is not set here from `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` (or in lower case). Default true.
    pub from_env: FromEnv,
    /// The proxy of `https` requests, `http://[user:password@]host:port`.
    pub https: Option<String>,
    /// The proxy of `http` requests. It is spoken to by CONNECT too.
    pub http: Option<String>,
    /// Who is reached directly: `host`, `host:port`, `.suffix`, `*.suffix`, an address, a network (`10.0.0.0/8`), or `*`.
    pub no_proxy: Vec<String>,
}

/// A switch that is on by default.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FromEnv(pub bool);

impl Default for FromEnv {
    fn default() -> Self {
        Self(true)
    }
}

impl Default for ClientConfig {
    fn default() -> Self {
        let mut certs_dirs = Vec::new();
        if let Some(home) = std::env::var_os("HOME").filter(|home| !home.is_empty()) {
            certs_dirs.push(PathBuf::from(home).join(".config/containers/certs.d"));
        }
        certs_dirs.extend(["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from));
        Self {
            connect_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
            response_timeout: Duration::from_secs(120),
            slowest_rate: 256,
            retries: 4,
            mirror_retries: 1,
            first_backoff: Duration::from_millis(250),
            longest_backoff: Duration::from_secs(15),
            longest_retry_after: Duration::from_secs(60),
            redirects: 8,
            idle_connections: 8,
            insecure_registries: Vec::new(),
            insecure: false,
            extra_roots: Vec::new(),
            extra_roots_pem: Vec::new(),
            system_roots: true,
            certs_dirs,
            node_cache: None,
            proxy: ProxyConfig::default(),
            upload_chunk: 0,
            user_agent: concat!("nacre/", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

impl ClientConfig {
    /// With all that it would take from this process's directory and environment written out (`get` gives a variable), so that another
    /// process does the same by it.
    ///
    /// # Errors
    /// The working directory or the directory of certificates cannot be read.
    pub fn settled(mut self, get: impl Fn(&str) -> Option<String>) -> io::Result<Self> {
        if self.proxy.from_env.0 {
            let found = super::proxy::from_environment(&get);
            let proxy = &mut self.proxy;
            proxy.https = proxy.https.take().or(found.https);
            proxy.http = proxy.http.take().or(found.http);
            proxy.no_proxy.extend(found.no_proxy);
            proxy.from_env = FromEnv(false);
        }
        // What these name replaces the system's certificates, in every program that knows them.
        let set = |name| get(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let (file, directory) = (set("SSL_CERT_FILE"), set("SSL_CERT_DIR"));
        if self.system_roots && (file.is_some() || directory.is_some()) {
            self.system_roots = false;
            self.extra_roots.extend(file);
            for directory in directory.iter().flat_map(std::env::split_paths) {
                for entry in std::fs::read_dir(directory)? {
                    let path = entry?.path();
                    self.extra_roots.extend(path.is_file().then_some(path));
                }
            }
        }
        for path in self.extra_roots.iter_mut().chain(&mut self.certs_dirs) {
            *path = std::path::absolute(&*path)?;
        }
        Ok(self)
    }
}

fn to_seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| (Duration::from_millis(1)..=Duration::from_secs(86_400)).contains(duration))
        .ok_or_else(|| {
            serde::de::Error::custom(format!("{seconds} is no duration: 0.001 to 86400 seconds are allowed"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_sets_what_it_names() {
        let config: ClientConfig = toml::from_str(
            "stall_timeout = 2.5\nretries = 1\n[proxy]\nhttps = 'http://p:3128'\nno_proxy = ['.example']\n",
        )
        .unwrap();
        assert_eq!(config.stall_timeout, Duration::from_millis(2500));
        assert_eq!(config.retries, 1);
        assert!(config.proxy.from_env.0);
        assert_eq!(config.response_timeout, ClientConfig::default().response_timeout);
        assert_eq!(toml::from_str::<ClientConfig>("").unwrap(), ClientConfig::default());
    }

    #[test]
    fn a_settled_configuration_needs_no_environment_and_survives_as_json() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("root.pem"), "").unwrap();
        let certificates = directory.path().display().to_string();
        let environment = |name: &str| match name {
            "https_proxy" => Some("http://p:3128".to_owned()),
            "NO_PROXY" => Some("a.example, .b.example".to_owned()),
            "SSL_CERT_FILE" => Some("one.pem".to_owned()),
            "SSL_CERT_DIR" => Some(certificates.clone()),
            _ => None,
        };
        let config = ClientConfig { first_backoff: Duration::from_millis(250), ..ClientConfig::default() };
        let settled = config.settled(environment).unwrap();
        let proxy = &settled.proxy;
        assert_eq!((proxy.https.as_deref(), proxy.http.as_deref()), (Some("http://p:3128"), None));
        assert_eq!((proxy.no_proxy.len(), proxy.from_env.0, settled.system_roots), (2, false, false));
        assert_eq!(settled.extra_roots, [std::path::absolute("one.pem").unwrap(), directory.path().join("root.pem")]);
        let json = serde_json::to_vec(&settled).unwrap();
        assert_eq!(serde_json::from_slice::<ClientConfig>(&json).unwrap(), settled);
        assert_eq!(settled.clone().settled(environment).unwrap(), settled);
    }

    #[test]
    fn unknown_keys_and_absurd_values_are_refused() {
        for text in [
            "stal_timeout = 1.0",
            "stall_timeout = -1.0",
            "stall_timeout = nan",
            "stall_timeout = 1e300",
            "retries = -1",
            "proxy.x = 1",
        ] {
            assert!(toml::from_str::<ClientConfig>(text).is_err(), "{text}");
        }
    }
}
