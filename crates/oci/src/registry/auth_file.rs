//! `containers-auth.json(5)` and Docker's `config.json`: which credentials are for which registry or namespace.
//!
//! ```json
//! {"auths": {"host[:port][/namespace]": {"auth": base64("user:password"), "identitytoken": "…", "registrytoken": "…"}},
//!  "credHelpers": {"host": "helper"}, "credsStore": "helper"}
//! ```
//! Keys of old Docker versions (`https://index.docker.io/v1/`) name their host. The longest key that is a prefix of the
//! repository, on path boundaries, wins.

use std::collections::BTreeMap;

use base64::Engine as _;
use nacre_core::SecretBytes;
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

/// The most bytes of an auth file.
pub(crate) const AUTH_FILE_LIMIT: u64 = 4 << 20;

/// What proves to a registry who we are.
#[derive(Debug)]
pub enum Credentials {
    /// A name and a password.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: SecretBytes,
    },
    /// An OAuth2 refresh token, which buys access tokens.
    IdentityToken(SecretBytes),
    /// A bearer token, which is sent as it is.
    RegistryToken(SecretBytes),
}

/// A parsed auth file.
#[derive(Debug, Default)]
pub struct AuthFile {
    auths: BTreeMap<String, Credentials>,
    helpers: BTreeMap<String, String>,
    store: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawFile {
    #[serde(default)]
    auths: Option<BTreeMap<String, Option<RawEntry>>>,
    #[serde(default, rename = "credHelpers")]
    helpers: Option<BTreeMap<String, String>>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawEntry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
    #[serde(default)]
    registrytoken: Option<String>,
}

impl Drop for RawEntry {
    fn drop(&mut self) {
        for secret in [&mut self.auth, &mut self.password, &mut self.identitytoken, &mut self.registrytoken] {
            secret.zeroize();
        }
    }
}

/// Where an auth file sends one who asks for a repository's credentials.
#[derive(Debug)]
pub(crate) enum Found<'a> {
    Credentials(&'a Credentials),
    /// A helper program, by the name after `docker-credential-`.
    Helper(&'a str),
}

impl AuthFile {
    /// Parses a file.
    ///
    /// # Errors
    /// What is wrong with it, without any of its values.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > AUTH_FILE_LIMIT {
            return Err(format!("has {} bytes; at most {AUTH_FILE_LIMIT} are allowed", bytes.len()));
        }
        if bytes.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        // serde takes a list for a struct, too.
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err("is not an auth file: it is no JSON object".into());
        }
        // serde's messages may quote values, which are secrets here: only the place is kept.
        let raw: RawFile = serde_json::from_slice(bytes).map_err(|error| {
            format!(
                "is not an auth file: malformed JSON or a field of a wrong type at line {} column {}",
                error.line(),
                error.column()
            )
        })?;
        let mut file = Self { store: raw.store.filter(|name| !name.is_empty()), ..Self::default() };
        for (key, entry) in raw.auths.unwrap_or_default() {
            let Some(entry) = entry else { continue };
            if let Some(credentials) = credentials(&entry).map_err(|why| format!("auths[{key:.100}]: {why}"))? {
                file.auths.insert(normalise(&key), credentials);
            }
        }
        for (key, helper) in raw.helpers.unwrap_or_default() {
            if !helper.is_empty() {
                file.helpers.insert(normalise(&key), helper);
            }
        }
        Ok(file)
    }

    /// What the file says about `host/path`.
    pub(crate) fn find(&self, host: &str, path: &str) -> Option<Found<'_>> {
        let host = normalise(host);
        if let Some(helper) = self.helpers.get(&host) {
            return Some(Found::Helper(helper));
        }
        let full = if path.is_empty() { host } else { format!("{host}/{path}") };
        let mut key = full.as_str();
        loop {
            if let Some(credentials) = self.auths.get(key) {
                return Some(Found::Credentials(credentials));
            }
            match key.rsplit_once('/') {
                Some((parent, _)) => key = parent,
                None => return self.store.as_deref().map(Found::Helper),
            }
        }
    }
}

fn credentials(entry: &RawEntry) -> Result<Option<Credentials>, &'static str> {
    let secret = |text: &Option<String>| {
        text.as_deref().filter(|text| !text.is_empty()).map(|text| SecretBytes::new(text.into()))
    };
    if let Some(token) = secret(&entry.identitytoken) {
        return Ok(Some(Credentials::IdentityToken(token)));
    }
    if let Some(token) = secret(&entry.registrytoken) {
        return Ok(Some(Credentials::RegistryToken(token)));
    }
    if let Some(text) = entry.auth.as_deref().map(str::trim).filter(|text| !text.is_empty()) {
        let decoded = base64::engine::general_purpose::STANDARD.decode(text);
        let decoded = Zeroizing::new(decoded.map_err(|_| "auth is not base64")?);
        // Docker pads with zeros.
        let end = decoded.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        let colon = decoded.iter().position(|b| *b == b':').ok_or("auth is not base64 of user:password")?;
        let (user, rest) =
            decoded.get(..end.max(colon + 1)).and_then(|all| all.split_at_checked(colon)).ok_or("auth is empty")?;
        let user = std::str::from_utf8(user).map_err(|_| "the user's name is not UTF-8")?;
        if user.is_empty() {
            return Err("auth has no user name");
        }
        let password = SecretBytes::new(rest.get(1..).unwrap_or_default().to_vec());
        return Ok(Some(Credentials::Basic { user: user.to_owned(), password }));
    }
    match (entry.username.as_deref().filter(|user| !user.is_empty()), secret(&entry.password)) {
        (Some(user), Some(password)) => Ok(Some(Credentials::Basic { user: user.to_owned(), password })),
        _ => Ok(None),
    }
}

/// The form in which keys and registries are compared: no scheme, no legacy path, one name for Docker Hub.
fn normalise(key: &str) -> String {
    let key = key.trim();
    let stripped = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    // A key with a scheme is an old one, whose path is the API's.
    let key = stripped.map_or(key, |rest| rest.split('/').next().unwrap_or(rest)).trim_end_matches('/');
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = match host {
        "index.docker.io" | super::DOCKER_HUB_HOST => super::DOCKER_HUB_NAME,
        other => other,
    };
    path.map_or_else(|| host.to_owned(), |path| format!("{host}/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn b64(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    fn user(file: &AuthFile, host: &str, path: &str) -> Option<String> {
        match file.find(host, path)? {
            Found::Credentials(Credentials::Basic { user, .. }) => Some(user.clone()),
            Found::Credentials(other) => Some(format!("{other:?}")),
            Found::Helper(name) => Some(format!("helper {name}")),
        }
    }

    #[test]
    fn the_longest_path_wins_on_boundaries() {
        let text = format!(
            r#"{{"auths":{{"r.example":{{"auth":"{}"}},"r.example/team":{{"auth":"{}"}},"r.example/team/app":{{"auth":"{}"}},
                "https://index.docker.io/v1/":{{"auth":"{}"}},"r.example:5000":{{}},"id.example":{{"identitytoken":"t"}}}},
                "credHelpers":{{"h.example":"pass"}}}}"#,
            b64("host:a"),
            b64("team:a:b"),
            b64("app:"),
            b64("hub:x\0\0")
        );
        let file = AuthFile::parse(text.as_bytes()).unwrap();
        assert_eq!(user(&file, "r.example", "team/app").as_deref(), Some("app"));
        assert_eq!(user(&file, "r.example", "team/app2").as_deref(), Some("team"));
        assert_eq!(user(&file, "r.example", "teamwork/x").as_deref(), Some("host"));
        assert_eq!(user(&file, "r.example", "").as_deref(), Some("host"));
        assert_eq!(user(&file, "docker.io", "library/busybox").as_deref(), Some("hub"));
        assert_eq!(user(&file, "h.example", "x").as_deref(), Some("helper pass"));
        assert_eq!(user(&file, "r.example:5000", "x"), None);
        assert_eq!(user(&file, "id.example", "x").as_deref(), Some("IdentityToken(SecretBytes(…))"));
        let Some(Found::Credentials(Credentials::Basic { password, .. })) = file.find("r.example", "team") else {
            panic!()
        };
        assert_eq!(password.expose(), b"a:b");
        let Some(Found::Credentials(Credentials::Basic { password, .. })) = file.find("docker.io", "x") else {
            panic!()
        };
        assert_eq!(password.expose(), b"x");
        assert!(!format!("{file:?}").contains("a:b"));
    }

    #[test]
    fn a_store_serves_what_has_no_entry() {
        let file = AuthFile::parse(br#"{"auths":{"r.example":{}},"credsStore":"desktop"}"#).unwrap();
        assert_eq!(user(&file, "r.example", "x").as_deref(), Some("helper desktop"));
        assert!(AuthFile::parse(b" \n").unwrap().find("r.example", "x").is_none());
        assert!(AuthFile::parse(b"{}").unwrap().find("r.example", "x").is_none());
        assert!(AuthFile::parse(br#"{"auths":null,"credHelpers":null}"#).unwrap().find("r.example", "x").is_none());
    }

    #[test]
    fn malformed_files_are_refused_without_their_secrets() {
        let nameless = format!(r#"{{"auths":{{"a":{{"auth":"{}"}}}}}}"#, b64(":hunter2"));
        for text in [
            "[",
            "[]",
            "hunter2",
            r#"{"auths":"hunter2"}"#,
            r#"{"auths":{"a":"hunter2"}}"#,
            r#"{"auths":{"a":{"auth":"%hunter2"}}}"#,
            r#"{"auths":{"a":{"auth":"aHVudGVyMg=="}}}"#,
            r#"{"auths":{"a":{"auth":7}}}"#,
            nameless.as_str(),
        ] {
            let error = AuthFile::parse(text.as_bytes()).unwrap_err();
            assert!(!error.contains("hunter2") && !error.contains("aHVudGVyMg"), "{error}");
        }
        assert!(AuthFile::parse(&vec![b' '; 5 << 20]).is_err());
    }
}
