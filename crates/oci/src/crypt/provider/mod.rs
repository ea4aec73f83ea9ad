//! Key providers: programs and services that wrap and unwrap layer keys, as `OCICRYPT_KEYPROVIDER_CONFIG` names them.
//!
//! ```text
//! {"key-providers":{"NAME":{"cmd":{"path":"…","args":[]} | "grpc":"host:port" | "ttrpc":"unix:///…",
//!   "grpc-tls":{"root-ca-file","cert-file","key-file","server-name","insecure-skip-verify"}}}}
//! ```
//!
//! A provider is asked with one JSON document and answers with one: on stdin and stdout, or in field 1 of the request and the response of
//! `keyprovider.KeyProviderService/{WrapKey,UnWrapKey}`. Byte strings within are base64 from Go peers and arrays of numbers from Rust
//! peers; both are accepted.
//!
//! Invariants: a provider gets [`TIMEOUT`] and may answer [`ANSWER_LIMIT`] bytes; one that hangs is killed (a program) or abandoned
//! (a service), never waited for. It is told its own arguments, not the user's other keys.

mod cmd;
mod grpc;
mod message;
mod tls;
mod ttrpc;
mod wire;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::SecretBytes;
use serde::Deserialize;

pub(crate) use self::cmd::{Exit, Run, run};
#[doc(hidden)]
pub use self::{message::parse_answer, wire::decode_field_1};
use super::{CryptError, SchemeError};

/// How long a provider may take for one answer.
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// The most bytes of an answer.
pub const ANSWER_LIMIT: usize = 4 << 20;
/// The environment variable that names the configuration.
pub const CONFIG_VARIABLE: &str = "OCICRYPT_KEYPROVIDER_CONFIG";

const CONFIG_LIMIT: u64 = 1 << 20;

/// The key providers that are configured.
#[derive(Clone, Debug)]
pub struct Providers {
    by_name: BTreeMap<String, Endpoint>,
    timeout: Duration,
}

impl Default for Providers {
    fn default() -> Self {
        Self { by_name: BTreeMap::new(), timeout: TIMEOUT }
    }
}

/// Where a provider is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Endpoint {
    Cmd {
        path: PathBuf,
        args: Vec<String>,
    },
    Grpc {
        address: String,
        tls: Option<tls::Options>,
    },
    Ttrpc(String),
    /// Names that a peer's configuration may have, but that we have no way to reach; an error only when it is asked.
    Unknown(String),
}

#[derive(Deserialize)]
struct ConfigDocument {
    #[serde(rename = "key-providers", default)]
    key_providers: Option<BTreeMap<String, ProviderDocument>>,
}

#[derive(Deserialize)]
struct ProviderDocument {
    #[serde(default)]
    cmd: Option<CmdDocument>,
    #[serde(default)]
    grpc: Option<String>,
    #[serde(default)]
    ttrpc: Option<String>,
    #[serde(default)]
    native: Option<String>,
    #[serde(rename = "grpc-tls", default)]
    grpc_tls: Option<tls::Options>,
}

#[derive(Deserialize)]
struct CmdDocument {
    #[serde(default)]
    path: String,
    #[serde(default)]
    args: Option<Vec<String>>,
}

/// What is asked of a provider.
#[derive(Clone, Copy)]
pub(crate) enum Question<'a> {
    /// To wrap this PRIV document.
    Wrap(&'a SecretBytes),
    /// To unwrap this packet.
    Unwrap(&'a [u8]),
}

impl Providers {
    /// Reads the file that [`CONFIG_VARIABLE`] names; none where the variable is not set. Unlike peers we do not take a missing file
    /// for an empty one.
    ///
    /// # Errors
    /// [`CryptError::ProviderConfig`]
    pub fn from_env() -> Result<Self, CryptError> {
        match std::env::var_os(CONFIG_VARIABLE) {
            Some(path) if !path.is_empty() => Self::from_file(Path::new(&path)),
            _ => Ok(Self::default()),
        }
    }

    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`CryptError::ProviderConfig`]
    pub fn from_file(path: &Path) -> Result<Self, CryptError> {
        let bad = |problem: String| CryptError::ProviderConfig { path: path.display().to_string(), problem };
        let json = super::args::read_limited(path, CONFIG_LIMIT).map_err(|error| bad(error.to_string()))?;
        Self::parse(&json).map_err(bad)
    }

    /// Parses a configuration.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let document: ConfigDocument =
            serde_json::from_slice(json).map_err(|error| format!("not valid JSON: {error}"))?;
        let mut providers = Self::default();
        for (name, provider) in document.key_providers.unwrap_or_default() {
            // The same order as peers: a program before a service.
            let endpoint = match provider {
                ProviderDocument { cmd: Some(cmd), .. } if !cmd.path.is_empty() => {
                    Endpoint::Cmd { path: cmd.path.into(), args: cmd.args.unwrap_or_default() }
                }
                ProviderDocument { cmd: Some(_), .. } => return Err(format!("provider '{name}': cmd has no path")),
                ProviderDocument { grpc: Some(address), grpc_tls: tls, .. } => Endpoint::Grpc { address, tls },
                ProviderDocument { ttrpc: Some(address), .. } => Endpoint::Ttrpc(address),
                ProviderDocument { native: Some(what), .. } => Endpoint::Unknown(format!("native {what}")),
                _ => return Err(format!("provider '{name}' has none of cmd, grpc and ttrpc")),
            };
            providers.by_name.insert(name, endpoint);
        }
        Ok(providers)
    }

    /// Gives the providers another time limit than [`TIMEOUT`].
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Whether there is a provider of this name.
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Asks a provider; `arguments` are what the user wrote after its name.
    pub(crate) fn ask(
        &self,
        name: &str,
        arguments: &[String],
        question: Question<'_>,
    ) -> Result<SecretBytes, SchemeError> {
        let endpoint = self.by_name.get(name).ok_or_else(|| {
            SchemeError::NoKey(format!(
                "no key provider '{name:.100}' is configured (the file is named by {CONFIG_VARIABLE})"
            ))
        })?;
        let call = Call { provider: name, endpoint: endpoint.describe(), timeout: self.timeout };
        let request = message::question(name, arguments, question);
        let answer = match endpoint {
            Endpoint::Cmd { path, args } => ask_program(&call, path, args, &request),
            Endpoint::Grpc { address, tls } => grpc::ask(&call, address, tls.as_ref(), question.method(), &request),
            Endpoint::Ttrpc(address) => ttrpc::ask(&call, address, question.method(), &request),
            Endpoint::Unknown(what) => {
                Err(SchemeError::Unsupported(format!("a key provider of the kind '{what:.60}'")))
            }
        }?;
        parse_answer(answer.expose(), question.is_wrap()).map_err(|problem| call.failed(problem))
    }
}

impl Endpoint {
    fn describe(&self) -> String {
        match self {
            Self::Cmd { path, .. } => path.display().to_string(),
            Self::Grpc { address, .. } => format!("grpc {address}"),
            Self::Ttrpc(address) => format!("ttrpc {address}"),
            Self::Unknown(what) => what.clone(),
        }
    }
}

impl Question<'_> {
    fn method(self) -> &'static str {
        if self.is_wrap() { "WrapKey" } else { "UnWrapKey" }
    }

    fn is_wrap(self) -> bool {
        matches!(self, Self::Wrap(_))
    }
}

/// One question to one provider: whom errors name, and how long it may take.
struct Call<'a> {
    provider: &'a str,
    endpoint: String,
    timeout: Duration,
}

impl Call<'_> {
    fn failed(&self, problem: impl Into<String>) -> SchemeError {
        SchemeError::Provider {
            provider: self.provider.into(),
            endpoint: self.endpoint.clone(),
            problem: problem.into(),
        }
    }

    fn timed_out(&self) -> SchemeError {
        SchemeError::ProviderTimeout {
            provider: self.provider.into(),
            endpoint: self.endpoint.clone(),
            seconds: self.timeout.as_secs(),
        }
    }
}

fn ask_program(
    call: &Call<'_>,
    path: &Path,
    args: &[String],
    request: &SecretBytes,
) -> Result<SecretBytes, SchemeError> {
    let args: Vec<&std::ffi::OsStr> = args.iter().map(std::ffi::OsStr::new).collect();
    let run_it =
        Run { program: path, args: &args, stdin: request.expose(), limit: ANSWER_LIMIT, timeout: call.timeout };
    match run(run_it) {
        Ok(Exit::Success(answer)) => Ok(answer),
        Ok(Exit::Failure { status, stderr }) => Err(call.failed(format!("ended with {status}: {stderr}"))),
        Ok(Exit::TimedOut) => Err(call.timed_out()),
        Ok(Exit::TooLarge) => Err(call.failed(format!("wrote more than {ANSWER_LIMIT} bytes"))),
        Err(error) => Err(call.failed(format!("could not be run: {error}"))),
    }
}

/// The arguments of one provider as peers expect them: `{"Parameters":{NAME:[b64…]}}`.
fn parameters(name: &str, arguments: &[String]) -> serde_json::Value {
    // Peers write this word where the user gave no argument.
    let values: Vec<String> = if arguments.is_empty() {
        vec![STANDARD.encode("Enabled")]
    } else {
        arguments.iter().map(|argument| STANDARD.encode(argument)).collect()
    };
    serde_json::json!({ "Parameters": { name: values } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_of_peers_are_read() {
        let json = br#"{"key-providers":{
            "p1":{"cmd":{"path":"/usr/lib/keyprovider-wrapkey","args":[]}}, "p2":{"grpc":"localhost:32223"},
            "p3":{"native":"attestation_agent"}, "p4":{"ttrpc":"unix:///tmp/keyprovider.sock"},
            "p5":{"grpc":"h:1","grpc-tls":{"root-ca-file":"ca.pem","server-name":"n"}}, "p6":{"cmd":{"path":"x","args":null}}}}"#;
        let providers = Providers::parse(json).unwrap();
        assert_eq!(providers.by_name.len(), 6);
        assert!(providers.has("p1") && !providers.has("p7"));
        let packet = Question::Unwrap(b"x");
        assert!(matches!(providers.ask("p3", &[], packet), Err(SchemeError::Unsupported(_))));
        assert!(matches!(providers.ask("p7", &[], packet), Err(SchemeError::NoKey(_))));
        assert!(matches!(providers.ask("p1", &[], packet), Err(SchemeError::Provider { .. })));
        for empty in ["{}", r#"{"key-providers":null}"#, r#"{"key-providers":{}}"#] {
            assert!(Providers::parse(empty.as_bytes()).unwrap().by_name.is_empty());
        }
    }

    #[test]
    fn malformed_configurations_are_refused() {
        for bad in [
            "",
            "7",
            "null",
            r#"{"key-providers":[]}"#,
            r#"{"key-providers":{"p":{}}}"#,
            r#"{"key-providers":{"p":{"cmd":{}}}}"#,
            r#"{"key-providers":{"p":{"cmd":{"path":""}}}}"#,
            r#"{"key-providers":{"p":{"cmd":{"path":"x","args":"y"}}}}"#,
            r#"{"key-providers":{"p":{"grpc":7}}}"#,
            r#"{"key-providers":{"p":null}}"#,
        ] {
            Providers::parse(bad.as_bytes()).expect_err(bad);
        }
        let missing = Path::new("/nonexistent/ocicrypt.conf");
        assert!(matches!(Providers::from_file(missing), Err(CryptError::ProviderConfig { .. })));
    }
}
