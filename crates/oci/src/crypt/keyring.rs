//! The side that decrypts: the keys at hand, and the search for one that opens a layer's wrapped keys.

use std::{collections::BTreeMap, fmt, sync::Arc};

use nacre_core::{KeySource, SecretBytes, jose::PrivateKey};

use super::{
    Attempt, CryptError, LayerSecret, PUBOPTS_ANNOTATION, SchemeError,
    annotations::{Scheme, Wrapping, wrappings},
    args::{self, DecryptionArg},
    coco, is_encrypted, jwe,
    keyfile::{self, Key},
    pgp, pkcs7, pkcs11,
    provider::{Providers, Question},
};
use crate::manifest::Descriptor;

/// Keys and services that may open the layers of an image. Shared by all threads that decrypt.
#[derive(Default)]
pub struct Keyring {
    private: Vec<PrivateKey>,
    certificates: Vec<pkcs7::Certificate>,
    pgp: Vec<pgp::SecretRing>,
    tokens: Vec<pkcs11::TokenKey>,
    providers: Providers,
    provider_arguments: BTreeMap<String, Vec<String>>,
    broker: Option<Arc<dyn KeySource>>,
}

impl Keyring {
    /// A ring without keys.
    pub fn new() -> Self {
        Self::default()
    }

    /// A ring with the keys that `--decryption-key` arguments name, and the key providers of the environment.
    ///
    /// # Errors
    /// [`CryptError`]: an argument or what it names is not valid.
    pub fn from_args<S: AsRef<str>>(arguments: impl IntoIterator<Item = S>) -> Result<Self, CryptError> {
        let mut ring = Self::new().with_providers(Providers::from_env()?);
        for argument in arguments {
            ring.add_arg(argument.as_ref().parse()?)?;
        }
        Ok(ring)
    }

    /// Adds what one argument names.
    ///
    /// # Errors
    /// [`CryptError::KeyArgument`]: the file cannot be read, or there is no key in it.
    pub fn add_arg(&mut self, argument: DecryptionArg) -> Result<(), CryptError> {
        match argument {
            DecryptionArg::Provider(name, argument) => {
                self.provider_arguments.entry(name).or_default().extend(argument);
            }
            DecryptionArg::File(path, passphrase) => {
                let bytes = args::read_key_file(&path)?;
                let keys = keyfile::parse(&bytes, passphrase.as_ref())
                    .map_err(|problem| args::bad_key(path.display(), problem))?;
                keys.into_iter().for_each(|key| self.add(key));
            }
        }
        Ok(())
    }

    /// Adds the keys of a key file's content.
    ///
    /// # Errors
    /// [`CryptError::KeyArgument`]: there is no key in it.
    pub fn add_key_file(&mut self, bytes: &[u8], passphrase: Option<&SecretBytes>) -> Result<(), CryptError> {
        let keys = keyfile::parse(bytes, passphrase).map_err(|problem| args::bad_key("key file", problem))?;
        keys.into_iter().for_each(|key| self.add(key));
        Ok(())
    }

    fn add(&mut self, key: Key) {
        match key {
            Key::Private(key) => self.private.push(*key),
            Key::Certificate(certificate) => self.certificates.push(*certificate),
            Key::Pgp(ring) => self.pgp.push(ring),
            Key::Token(key) => self.tokens.push(key),
        }
    }

    /// Sets the key providers that may be asked.
    #[must_use]
    pub fn with_providers(mut self, providers: Providers) -> Self {
        self.providers = providers;
        self
    }

    /// Sets who releases the key-encryption keys that Confidential Containers' packets name. Such packets are then opened in this
    /// process, and a key provider of that name is not asked: what the broker refuses must not be had elsewhere.
    #[must_use]
    pub fn with_broker(mut self, broker: Arc<dyn KeySource>) -> Self {
        self.broker = Some(broker);
        self
    }

    /// Finds a wrapped key of the layer that one of our keys opens. Keys at hand are tried before services; each wrapped key is
    /// tried by its own scheme alone.
    ///
    /// # Errors
    /// [`CryptError::NoKey`] with every attempt, or what is wrong with the annotations.
    pub fn unwrap(&self, layer: &Descriptor) -> Result<LayerSecret, CryptError> {
        if !is_encrypted(layer) {
            return Err(CryptError::NotEncrypted(layer.media_type.chars().take(200).collect()));
        }
        // Before anyone is asked for a key that would be of no use.
        if !layer.annotations.contains_key(PUBOPTS_ANNOTATION) {
            return Err(CryptError::Annotation { name: PUBOPTS_ANNOTATION.into(), problem: "is missing".into() });
        }
        let (found, mut attempts) = wrappings(layer)?;
        for wrapping in &found {
            let scheme = wrapping.scheme.to_string();
            if let Some(error) = self.nothing_for(wrapping) {
                attempts.push(Attempt { scheme, error });
                continue;
            }
            for packet in &wrapping.packets {
                let opened = self.open(&wrapping.scheme, packet).and_then(|private| {
                    LayerSecret::parse(&private).map_err(|error| SchemeError::Opened(Box::new(error)))
                });
                match opened {
                    Ok(secret) => return Ok(secret),
                    Err(error) => {
                        // A service that hangs once is not waited for a thousand times.
                        let hangs = matches!(error, SchemeError::ProviderTimeout { .. });
                        attempts.push(Attempt { scheme: scheme.clone(), error });
                        if hangs {
                            break;
                        }
                    }
                }
            }
        }
        Err(CryptError::NoKey(attempts))
    }

    /// Why there is nothing to try on a scheme's packets at all.
    fn nothing_for(&self, wrapping: &Wrapping) -> Option<SchemeError> {
        let problem = match &wrapping.scheme {
            Scheme::Jwe if self.private.is_empty() => "no private key was given",
            Scheme::Pkcs7 if self.private.is_empty() => "no private key was given",
            Scheme::Pgp if self.pgp.is_empty() => "no OpenPGP secret key was given",
            Scheme::Pkcs11 if self.tokens.is_empty() => "no PKCS#11 key was given",
            _ => return None,
        };
        Some(SchemeError::NoKey(problem.into()))
    }

    fn open(&self, scheme: &Scheme, packet: &[u8]) -> Result<SecretBytes, SchemeError> {
        match (scheme, &self.broker) {
            (Scheme::Jwe, _) => jwe::open(packet, &self.private),
            (Scheme::Pkcs7, _) => pkcs7::Packet::parse(packet)?.open(&self.private, &self.certificates),
            (Scheme::Pgp, _) => pgp::open(packet, &self.pgp),
            (Scheme::Pkcs11, _) => pkcs11::Packet::parse(packet)?.open(&self.tokens),
            (Scheme::Provider(name), Some(broker)) if name == coco::PROVIDER => {
                coco::Packet::parse(packet)?.unwrap(broker.as_ref())
            }
            (Scheme::Provider(name), _) => {
                let arguments = self.provider_arguments.get(name).map(Vec::as_slice).unwrap_or_default();
                self.providers.ask(name, arguments, Question::Unwrap(packet))
            }
        }
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring")
            .field("private", &self.private.len())
            .field("certificates", &self.certificates.len())
            .field("pgp", &self.pgp.len())
            .field("tokens", &self.tokens.len())
            .field("broker", &self.broker.is_some())
            .finish_non_exhaustive()
    }
}
