//! The broker's directory.
//!
//! ```text
//! broker.toml    settings
//! broker.redb    the database, unless it is elsewhere
//! master.key     32 bytes that seal the resources          0600
//! token.pub      who signs attestation tokens: what guests pin; the private half is in the database
//! tls.key        EC P-256                                  0600      tls.crt     its self-signed certificate: what guests pin
//! admin.key      EC P-256, the administrator's: move it away  0600   admin.pub   what the broker knows of it
//! ```
//!
//! `broker.toml` comes last, when everything else is on disk, so that a directory with one is complete.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use nacre_core::{
    SecretArray,
    jose::{PrivateKey, PublicKey},
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{BrokerError, MasterKey, master::FileKey};

pub(crate) const DATABASE: &str = "broker.redb";
pub(crate) const SETTINGS: &str = "broker.toml";
const MASTER: &str = "master.key";
const TOKEN_KEY: &str = "token.key";
const TOKEN_PUB: &str = "token.pub";
const TLS_KEY: &str = "tls.key";
const TLS_CERT: &str = "tls.crt";
pub(crate) const ADMIN_KEY: &str = "admin.key";
const ADMIN_PUB: &str = "admin.pub";

/// What `broker.toml` says.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The broker's name, the issuer of its tokens.
    pub name: String,
    /// Whether guests that only simulate a TEE get tokens and resources. For demos and tests.
    pub allow_simulated: bool,
    /// How long a token is good.
    pub token_lifetime_seconds: u32,
    /// How long a session is good.
    pub session_lifetime_seconds: u32,
    /// Sessions at a time; the oldest goes when there are more.
    pub most_sessions: usize,
    /// Whether reference values come in signed documents only.
    pub signed_references_only: bool,
    /// Calls of one address a second; 0: any number.
    pub calls_per_second: u32,
    /// Calls that are worked on at a time; more are told to come back.
    pub most_calls: usize,
    /// Guests of which it is kept what was found, of those that attested and of those that were refused each; the oldest goes when there are more.
    pub most_guests: usize,
    /// Whether the console is served, at `/console/`.
    pub console: bool,
    /// Versions of a resource that are kept, the current one among them.
    pub resource_versions: usize,
    /// Where the master key is: `file:PATH`, `pkcs11:…`, `tpm:…`. Paths are relative to the directory.
    pub master_key: String,
    /// The file with the certificates of who makes TPMs, PEM: whose attestation keys may be enrolled. Without it, none are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ek_roots: Option<PathBuf>,
    /// The database that replicas share, `postgresql://…`; a file of the directory where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// The file with the database's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database_password_file: Option<PathBuf>,
    /// The file with the certificates of who signs the database's; the system's roots where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database_ca: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "nacre-broker".into(),
            allow_simulated: false,
            token_lifetime_seconds: 300,
            session_lifetime_seconds: 300,
            most_sessions: 10_000,
            signed_references_only: false,
            calls_per_second: 200,
            most_calls: 64,
            most_guests: 10_000,
            console: true,
            resource_versions: 3,
            master_key: format!("file:{MASTER}"),
            ek_roots: None,
            database: None,
            database_password_file: None,
            database_ca: None,
        }
    }
}

/// The keys that a running broker holds. The administrator's private key is not among them.
pub(crate) struct Keys {
    /// What guests pin: the public key of who signed tokens when the directory was made, or since the last rotation here.
    pub(crate) token: PublicKey,
    /// The private half, in a directory of format 1, or one that is new.
    pub(crate) first_token: Option<PrivateKey>,
    pub(crate) admin: PublicKey,
    pub(crate) tls_key_pem: Zeroizing<String>,
    pub(crate) tls_cert_pem: String,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> BrokerError {
    let path = path.to_owned();
    move |source| BrokerError::Io { path, source }
}

fn write(dir: &Path, name: &str, bytes: &[u8], secret: bool) -> Result<(), BrokerError> {
    let path = dir.join(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(if secret { 0o600 } else { 0o644 })
        .open(&path)
        .map_err(io(&path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io(&path))
}

fn read(dir: &Path, name: &str) -> Result<(PathBuf, Zeroizing<Vec<u8>>), BrokerError> {
    let path = dir.join(name);
    let bytes = fs::read(&path).map(Zeroizing::new).map_err(io(&path))?;
    Ok((path, bytes))
}

fn text(path: PathBuf, bytes: &[u8]) -> Result<String, BrokerError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| BrokerError::BadFile { path, why: "not a text".into() })
}

/// Opens a master key by its name in the settings.
pub type OpenMaster<'a> = dyn Fn(&str) -> Result<Arc<dyn MasterKey>, BrokerError> + 'a;

/// No other master keys than files.
pub(crate) fn only_files(name: &str) -> Result<Arc<dyn MasterKey>, BrokerError> {
    Err(BrokerError::Invalid(format!("master_key = '{name:.100}': this program reads file:PATH only")))
}

/// Opens the master key that the settings name.
pub(crate) fn open_master(
    dir: &Path,
    settings: &Settings,
    masters: &OpenMaster<'_>,
) -> Result<Arc<dyn MasterKey>, BrokerError> {
    let Some(name) = settings.master_key.strip_prefix("file:") else { return masters(&settings.master_key) };
    let (path, master) = read(dir, name)?;
    let key = SecretArray::try_fill(|slot| {
        if master.len() != slot.len() {
            let why = format!("{} bytes instead of 32", master.len());
            return Err(BrokerError::BadFile { path: path.clone(), why });
        }
        slot.copy_from_slice(&master);
        Ok(())
    })?;
    Ok(Arc::new(FileKey::new(path, &key)))
}

/// Makes the file of a master key, where it is one and not there yet.
pub(crate) fn make_master(dir: &Path, settings: &Settings) -> Result<(), BrokerError> {
    match settings.master_key.strip_prefix("file:") {
        Some(name) if !dir.join(name).exists() => write(dir, name, SecretArray::<32>::random().expose(), true),
        _ => Ok(()),
    }
}

/// Removes the first token key, which the database has by now.
pub(crate) fn remove_token_key(dir: &Path) -> Result<(), BrokerError> {
    let path = dir.join(TOKEN_KEY);
    fs::remove_file(&path).map_err(io(&path))
}

/// Writes what guests pin from now on.
pub(crate) fn write_token_key(dir: &Path, key: &PublicKey) -> Result<(), BrokerError> {
    replace(dir, TOKEN_PUB, key.to_pem()?.as_bytes())
}

fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), BrokerError> {
    let (path, new) = (dir.join(name), format!("{name}.new"));
    let _ = fs::remove_file(dir.join(&new)); // of a try that was cut
    write(dir, &new, bytes, false)?;
    fs::rename(dir.join(&new), &path).map_err(io(&path))?;
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir))
}

/// Writes another value of a setting that is a text, and leaves everything else of the file as it is.
pub(crate) fn replace_setting(dir: &Path, name: &str, value: &str) -> Result<(), BrokerError> {
    let (path, bytes) = read(dir, SETTINGS)?;
    let text = text(path, &bytes)?;
    let line = format!("{name} = {}", toml::Value::String(value.to_owned()));
    let is_it =
        |text: &&str| text.trim_start().strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with('='));
    let mut lines: Vec<&str> = text.lines().filter(|text| !is_it(text)).collect();
    lines.insert(0, &line);
    replace(dir, SETTINGS, (lines.join("\n") + "\n").as_bytes())
}

/// Makes the directory and its keys. `names` are the host names and addresses that the certificate is for.
pub(crate) fn create(dir: &Path, names: &[String], settings: &Settings) -> Result<(), BrokerError> {
    fs::create_dir_all(dir).map_err(io(dir))?;
    if fs::read_dir(dir).map_err(io(dir))?.next().is_some() {
        return Err(BrokerError::Exists(dir.to_owned()));
    }
    make_master(dir, settings)?;
    for (private, public) in [(TOKEN_KEY, TOKEN_PUB), (ADMIN_KEY, ADMIN_PUB)] {
        let key = PrivateKey::generate_p256();
        write(dir, private, key.to_pkcs8_pem()?.as_bytes(), true)?;
        write(dir, public, key.public().to_pem()?.as_bytes(), false)?;
    }
    let (key, certificate) = self_signed(names)?;
    write(dir, TLS_KEY, key.as_bytes(), true)?;
    write(dir, TLS_CERT, certificate.as_bytes(), false)
}

/// Writes the settings, which makes the directory complete: all names in it are on disk when this returns.
pub(crate) fn write_settings(dir: &Path, settings: &Settings) -> Result<(), BrokerError> {
    let sync = || fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir));
    let settings = toml::to_string(settings).map_err(|e| BrokerError::Invalid(e.to_string()))?;
    sync()?;
    write(dir, SETTINGS, settings.as_bytes(), false)?;
    sync()
}

/// A certificate that does not expire: guests pin it and cannot tell the time before they have attested.
fn self_signed(names: &[String]) -> Result<(Zeroizing<String>, String), BrokerError> {
    let fail = |e: rcgen::Error| BrokerError::Tls(e.to_string());
    let mut names = names.to_vec();
    for always in ["localhost", "127.0.0.1", "::1"] {
        if !names.iter().any(|name| name == always) {
            names.push(always.into());
        }
    }
    let key = rcgen::KeyPair::generate().map_err(fail)?;
    let mut params = rcgen::CertificateParams::new(names).map_err(fail)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "nacre key broker");
    let certificate = params.self_signed(&key).map_err(fail)?;
    Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
}

pub(crate) fn read_settings(dir: &Path) -> Result<Settings, BrokerError> {
    let (path, bytes) = read(dir, SETTINGS)?;
    let text = text(path.clone(), &bytes)?;
    let settings: Settings =
        toml::from_str(&text).map_err(|e| BrokerError::BadFile { path: path.clone(), why: e.to_string() })?;
    match check_settings(&settings) {
        Err(why) => Err(BrokerError::BadFile { path, why }),
        Ok(()) => Ok(settings),
    }
}

/// Says which setting cannot be.
pub(crate) fn check_settings(settings: &Settings) -> Result<(), String> {
    let bounds = [
        ("token_lifetime_seconds", (1..=86_400).contains(&settings.token_lifetime_seconds)),
        ("session_lifetime_seconds", (1..=86_400).contains(&settings.session_lifetime_seconds)),
        ("most_sessions", (1..=1_000_000).contains(&settings.most_sessions)),
        ("calls_per_second", settings.calls_per_second <= 1_000_000),
        ("most_calls", (1..=1024).contains(&settings.most_calls)),
        ("most_guests", settings.most_guests <= 100_000),
        ("resource_versions", (1..=1000).contains(&settings.resource_versions)),
    ];
    match bounds.iter().find(|(_, fine)| !fine) {
        Some((name, _)) => Err(format!("{name} is out of range")),
        None => Ok(()),
    }
}

pub(crate) fn read_keys(dir: &Path) -> Result<Keys, BrokerError> {
    let bad_key =
        |path: PathBuf| move |e: nacre_core::jose::JoseError| BrokerError::BadFile { path, why: e.to_string() };
    let (path, token) = read(dir, TOKEN_PUB)?;
    let token = PublicKey::from_bytes(&token).map_err(bad_key(path))?;
    let first_token = match dir.join(TOKEN_KEY).exists() {
        false => None,
        true => {
            let (path, key) = read(dir, TOKEN_KEY)?;
            Some(PrivateKey::from_bytes(&key).map_err(bad_key(path))?)
        }
    };
    let (path, admin) = read(dir, ADMIN_PUB)?;
    let admin = PublicKey::from_bytes(&admin).map_err(bad_key(path))?;
    let (path, key) = read(dir, TLS_KEY)?;
    let tls_key_pem = Zeroizing::new(text(path, &key)?);
    let (path, certificate) = read(dir, TLS_CERT)?;
    Ok(Keys { token, first_token, admin, tls_key_pem, tls_cert_pem: text(path, &certificate)? })
}
