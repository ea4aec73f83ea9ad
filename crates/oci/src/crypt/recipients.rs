//! The side that encrypts: whom a layer's key is wrapped for.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{ResourceUri, SecretArray, SecretBytes, jose::PublicKey};

use super::{
    CryptError, KEYS_ANNOTATION_PREFIX, LayerSecret, PUBOPTS_ANNOTATION, PublicOptions, SchemeError,
    annotations::Scheme,
    args::{self, RecipientArg},
    coco, jwe, keyfile, pgp, pkcs7, pkcs11,
    provider::{Providers, Question},
};

/// As many recipients as readers of a JWE take; more go into another one.
const JWE_RECIPIENTS: usize = 64;

/// Everybody who shall be able to decrypt. A layer key is wrapped for all of them or for none.
#[derive(Default)]
pub struct Recipients {
    jwe: Vec<PublicKey>,
    pkcs7: Vec<pkcs7::Certificate>,
    pgp: Vec<pgp::Certificate>,
    pkcs11: Vec<pkcs11::Recipient>,
    broker: Vec<(ResourceUri, SecretArray<32>)>,
    providers: Providers,
    provider_arguments: BTreeMap<String, Vec<String>>,
    gnupg_home: Option<PathBuf>,
}

impl Recipients {
    /// Nobody yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Those whom `--encryption-key` arguments name, with the key providers of the environment.
    ///
    /// # Errors
    /// [`CryptError`]: an argument or what it names is not valid.
    pub fn from_args<S: AsRef<str>>(arguments: impl IntoIterator<Item = S>) -> Result<Self, CryptError> {
        let mut recipients = Self::new().with_providers(Providers::from_env()?);
        for argument in arguments {
            recipients.add_arg(argument.as_ref().parse()?)?;
        }
        Ok(recipients)
    }

    /// Adds whom one argument names.
    ///
    /// # Errors
    /// [`CryptError::KeyArgument`]: the file cannot be read or holds no such key, or the provider is not there.
    pub fn add_arg(&mut self, argument: RecipientArg) -> Result<(), CryptError> {
        match argument {
            RecipientArg::Jwe(path) => self.jwe.push(public_key(&path)?),
            RecipientArg::Pkcs7(path) => {
                let certificates = certificates(&path)?;
                self.pkcs7.extend(certificates);
            }
            RecipientArg::Pgp(recipient) => {
                let found = pgp::certificates_of_gpg(&recipient, self.gnupg_home.as_deref())
                    .map_err(|error| args::bad_key(&recipient, error))?;
                self.pgp.extend(found);
            }
            RecipientArg::Pkcs11(path) => self.pkcs11.push(token_recipient(&path)?),
            RecipientArg::Provider(name, argument) => self.add_provider(name, argument)?,
        }
        Ok(())
    }

    fn add_provider(&mut self, name: String, argument: Option<String>) -> Result<(), CryptError> {
        if name == coco::PROVIDER
            && let Some(key) = argument.as_deref().map(broker_key).transpose()?.flatten()
        {
            self.broker.push(key);
            return Ok(());
        }
        if !self.providers.has(&name) {
            let problem = format!("no key provider of this name is configured in {}", super::provider::CONFIG_VARIABLE);
            return Err(args::bad_key(format!("provider:{name}"), problem));
        }
        self.provider_arguments.entry(name).or_default().extend(argument);
        Ok(())
    }

    /// Adds the holder of a private key.
    pub fn add_public_key(&mut self, key: PublicKey) {
        self.jwe.push(key);
    }

    /// Adds those to whom the broker releases the key-encryption key that it calls `kid`.
    pub fn add_broker_key(&mut self, kid: ResourceUri, key: SecretArray<32>) {
        self.broker.push((kid, key));
    }

    /// Adds the holders of OpenPGP keys, by their certificates.
    ///
    /// # Errors
    /// [`CryptError::KeyArgument`]: there is no certificate that can be encrypted to.
    pub fn add_pgp(&mut self, certificates: &[u8]) -> Result<(), CryptError> {
        let found =
            pgp::Certificate::parse(certificates).map_err(|error| args::bad_key("OpenPGP certificate", error))?;
        self.pgp.extend(found);
        Ok(())
    }

    /// Sets where GnuPG's key ring is, if not where GnuPG itself looks for it.
    #[must_use]
    pub fn with_gnupg_home(mut self, home: PathBuf) -> Self {
        self.gnupg_home = Some(home);
        self
    }

    /// Sets the key providers that may be asked.
    #[must_use]
    pub fn with_providers(mut self, providers: Providers) -> Self {
        self.providers = providers;
        self
    }

    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.jwe.is_empty()
            && self.pkcs7.is_empty()
            && self.pgp.is_empty()
            && self.pkcs11.is_empty()
            && self.broker.is_empty()
            && self.provider_arguments.is_empty()
    }

    /// Wraps a layer's key for everybody: the annotations of an encrypted layer.
    ///
    /// # Errors
    /// [`CryptError::NoRecipients`] or [`CryptError::Wrap`]
    pub fn seal(&self, secret: &LayerSecret, public: &PublicOptions) -> Result<BTreeMap<String, String>, CryptError> {
        let mut annotations = self.wrap(secret)?;
        annotations.insert(PUBOPTS_ANNOTATION.into(), public.to_annotation());
        Ok(annotations)
    }

    /// Wraps the key of a layer that is encrypted already for everybody too: its ciphertext stays, its annotations grow.
    ///
    /// # Errors
    /// [`CryptError::NoRecipients`] or [`CryptError::Wrap`]
    pub fn add_to(&self, annotations: &mut BTreeMap<String, String>, secret: &LayerSecret) -> Result<(), CryptError> {
        for (name, packets) in self.wrap(secret)? {
            let all = annotations.entry(name).or_default();
            if !all.is_empty() {
                all.push(',');
            }
            all.push_str(&packets);
        }
        Ok(())
    }

    fn wrap(&self, secret: &LayerSecret) -> Result<BTreeMap<String, String>, CryptError> {
        if self.is_empty() {
            return Err(CryptError::NoRecipients);
        }
        let private = secret.to_json();
        let mut annotations = Packets(BTreeMap::new());
        for recipients in self.jwe.chunks(JWE_RECIPIENTS) {
            annotations.add(&Scheme::Jwe, jwe::wrap(&private, recipients))?;
        }
        if !self.pkcs7.is_empty() {
            annotations.add(&Scheme::Pkcs7, pkcs7::wrap(&private, &self.pkcs7))?;
        }
        if !self.pgp.is_empty() {
            annotations.add(&Scheme::Pgp, pgp::wrap(&private, &self.pgp))?;
        }
        if !self.pkcs11.is_empty() {
            let packet = pkcs11::Hash::from_env().and_then(|hash| pkcs11::wrap(&private, &self.pkcs11, hash));
            annotations.add(&Scheme::Pkcs11, packet)?;
        }
        let broker = Scheme::Provider(coco::PROVIDER.into());
        for (kid, key) in &self.broker {
            annotations.add(&broker, Ok(coco::wrap(kid, key, &private)))?;
        }
        for (name, arguments) in &self.provider_arguments {
            let packet = self.providers.ask(name, arguments, Question::Wrap(&private));
            annotations.add(&Scheme::Provider(name.clone()), packet.map(|packet| packet.expose().to_vec()))?;
        }
        Ok(annotations.0)
    }
}

struct Packets(BTreeMap<String, String>);

impl Packets {
    fn add(&mut self, scheme: &Scheme, packet: Result<Vec<u8>, SchemeError>) -> Result<(), CryptError> {
        let packet = packet.map_err(|source| CryptError::Wrap { recipient: scheme.to_string(), source })?;
        let all = self.0.entry(format!("{KEYS_ANNOTATION_PREFIX}{scheme}")).or_default();
        if !all.is_empty() {
            all.push(',');
        }
        STANDARD.encode_string(packet, all);
        Ok(())
    }
}

fn public_key(path: &Path) -> Result<PublicKey, CryptError> {
    let bytes = args::read_key_file(path)?;
    PublicKey::from_bytes(&bytes).map_err(|error| args::bad_key(path.display(), error))
}

fn certificates(path: &Path) -> Result<Vec<pkcs7::Certificate>, CryptError> {
    let bad = |problem: String| args::bad_key(path.display(), problem);
    let bytes = args::read_key_file(path)?;
    let certificates = match std::str::from_utf8(&bytes) {
        Ok(text) => keyfile::certificates_of_pem(text).map_err(bad)?,
        Err(_) => vec![bytes.to_vec()],
    };
    // Of a chain, the first is the recipient's; the others are its issuers'.
    let first = certificates.first().ok_or_else(|| bad("there is no certificate in it".into()))?;
    let certificate = pkcs7::Certificate::from_der(first).map_err(|error| bad(error.to_string()))?;
    Ok(vec![certificate])
}

fn token_recipient(path: &Path) -> Result<pkcs11::Recipient, CryptError> {
    let bytes = args::read_key_file(path)?;
    if let Some(text) = std::str::from_utf8(&bytes).ok().filter(|text| text.contains("pkcs11:")) {
        let key = pkcs11::TokenKey::parse(text).map_err(|error| args::bad_key(path.display(), error))?;
        return Ok(pkcs11::Recipient::Token(key));
    }
    let key = PublicKey::from_bytes(&bytes).map_err(|error| args::bad_key(path.display(), error))?;
    Ok(pkcs11::Recipient::Public(key))
}

/// `keyid=kbs:///…::keypath=…::algorithm=A256GCM`: done in this process. `None` where no key file is named: that takes the provider.
fn broker_key(text: &str) -> Result<Option<(ResourceUri, SecretArray<32>)>, CryptError> {
    let bad = |problem: String| args::bad_key(format!("provider:{}:{text}", coco::PROVIDER), problem);
    let mut fields = BTreeMap::new();
    for field in text.split("::") {
        let (name, value) = field.split_once('=').ok_or_else(|| bad(format!("'{field}' is not name=value")))?;
        if !matches!(name, "keyid" | "keypath" | "algorithm" | "sample") {
            return Err(bad(format!("'{name}' is none of keyid, keypath, algorithm and sample")));
        }
        if fields.insert(name, value).is_some() {
            return Err(bad(format!("{name} is there twice")));
        }
    }
    if fields.get("sample") == Some(&"true") {
        return Err(bad("the sample key is public: nothing is encrypted with it".into()));
    }
    if let Some(other) = fields.get("algorithm").filter(|name| **name != "A256GCM") {
        return Err(bad(format!("the algorithm '{other}' is not written: only A256GCM authenticates the key")));
    }
    let Some(path) = fields.get("keypath") else { return Ok(None) };
    let kid = fields.get("keyid").ok_or_else(|| bad("keyid=kbs:///<repository>/<type>/<tag> is missing".into()))?;
    let kid = kid.parse().map_err(|error| bad(format!("{error}")))?;
    let bytes = args::read_key_file(Path::new(path)).map(|mut bytes| SecretBytes::new(std::mem::take(&mut *bytes)))?;
    let found = bytes.len();
    let key = bytes.to_array().ok_or_else(|| bad(format!("{path} has {found} bytes; a key has 32")))?;
    Ok(Some((kid, key)))
}

impl fmt::Debug for Recipients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recipients")
            .field("jwe", &self.jwe.len())
            .field("pkcs7", &self.pkcs7.len())
            .field("pgp", &self.pgp.len())
            .field("pkcs11", &self.pkcs11.len())
            .field("broker", &self.broker.iter().map(|(kid, _)| kid).collect::<Vec<_>>())
            .field("providers", &self.provider_arguments.keys())
            .finish_non_exhaustive()
    }
}
