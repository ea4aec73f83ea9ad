//! Why a layer was not encrypted or decrypted.

use nacre_core::{Digest, KeySourceError, ResourceUri, UriError};

use crate::manifest::ManifestError;

/// Why a layer was not encrypted or decrypted.
#[derive(Debug, thiserror::Error)]
pub enum CryptError {
    /// The media type has no `+encrypted`.
    #[error("layer of type '{0}' is not encrypted")]
    NotEncrypted(String),
    /// The media type says that it is encrypted already.
    #[error("layer of type '{0}' is encrypted already: it is not encrypted a second time")]
    AlreadyEncrypted(String),
    /// The media type is no layer's.
    #[error("'{media_type}' cannot be encrypted")]
    NotALayer {
        /// The type.
        media_type: String,
        /// Why not.
        source: ManifestError,
    },
    /// An annotation of the layer is missing, too large or malformed.
    #[error("annotation {name}: {problem}")]
    Annotation {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A key was unwrapped, but what came out is not the document that it should be. Nothing of it is shown, since it is secret.
    #[error("the unwrapped layer key is not valid: {0}")]
    PrivateOptions(String),
    /// The ciphertext is not what was encrypted.
    #[error(
        "layer authentication failed: the HMAC of the ciphertext does not match: it was changed, or the key is wrong"
    )]
    Mac,
    /// The ciphertext is genuine, but what it decrypts to is not what was encrypted (another nonce, or a key of another layer).
    #[error("decrypted layer: digest mismatch: its encryptor recorded {expected}, the content has {found}")]
    Digest {
        /// As the encryptor recorded it.
        expected: Digest,
        /// As it was.
        found: Digest,
    },
    /// None of the wrapped keys could be opened.
    #[error("the layer's key could not be unwrapped: {}", list(.0))]
    NoKey(Vec<Attempt>),
    /// The key could not be wrapped for one of the recipients; then it is wrapped for none.
    #[error("the layer's key could not be wrapped for {recipient}")]
    Wrap {
        /// The scheme, and the recipient where there is one of it.
        recipient: String,
        /// Why not.
        source: SchemeError,
    },
    /// The end of the layer was not seen, so its MAC is not known.
    #[error("the layer was not encrypted to its end")]
    Unfinished,
    /// There is nobody to encrypt for.
    #[error("no recipient: name at least one key to encrypt for")]
    NoRecipients,
    /// A key argument is not one, or the file that it names is not. Passphrases in it are not shown.
    #[error("key argument '{argument}': {problem}")]
    KeyArgument {
        /// The argument up to a passphrase.
        argument: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The configuration of the key providers is not valid.
    #[error("key providers of {path}: {problem}")]
    ProviderConfig {
        /// The file, or where else it came from.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The cipher itself refused, which it has no reason to.
    #[error("AES-256-CTR failed in the cryptographic library")]
    Cipher,
}

/// One wrapped key that was tried, or that nothing could be tried on.
#[derive(Debug)]
pub struct Attempt {
    /// `jwe`, `pkcs7`, `pgp`, `pkcs11` or `provider.<name>`.
    pub scheme: String,
    /// Why it did not open.
    pub error: SchemeError,
}

/// Why one scheme did not wrap or unwrap a key.
#[derive(Debug, thiserror::Error)]
pub enum SchemeError {
    /// We have nothing to try.
    #[error("{0}")]
    NoKey(String),
    /// The wrapped key is not what its scheme says.
    #[error("the wrapped key is malformed: {0}")]
    Malformed(String),
    /// The wrapped key is of a kind that we do not read, or are not to write.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// None of our keys opens it, or it was changed. Deliberately without details.
    #[error("it is not for any of the {0} keys at hand, or was changed")]
    NotForUs(usize),
    /// It opened, but what came out is no layer key.
    #[error("{0}")]
    Opened(Box<CryptError>),
    /// The key-encryption key was not released.
    #[error("the key-encryption key: {}", with_causes(.0))]
    KeySource(KeySourceError),
    /// The key-encryption key has a wrong length.
    #[error("the key-encryption key {uri} has {found} bytes; 32 are needed")]
    KeyLength {
        /// The key.
        uri: ResourceUri,
        /// Its length.
        found: usize,
    },
    /// The name of the key-encryption key is none.
    #[error("the key-encryption key's name: {0}")]
    KeyName(UriError),
    /// A program or service did not do its part.
    #[error("key provider '{provider}' ({endpoint}) {problem}")]
    Provider {
        /// Its name in the configuration.
        provider: String,
        /// The program or the address.
        endpoint: String,
        /// What happened.
        problem: String,
    },
    /// A program or service did not answer in time.
    #[error("key provider '{provider}' ({endpoint}) gave no answer within {seconds} s")]
    ProviderTimeout {
        /// Its name in the configuration.
        provider: String,
        /// The program or the address.
        endpoint: String,
        /// The limit.
        seconds: u64,
    },
    /// The token or its module refused.
    #[error("PKCS#11 token: {0}")]
    Token(String),
    /// A cryptographic library refused for no reason of the input.
    #[error("{0} failed in the cryptographic library")]
    Library(&'static str),
}

impl SchemeError {
    pub(crate) fn malformed(problem: impl Into<String>) -> Self {
        Self::Malformed(problem.into())
    }
}

/// An error with its causes: in a list of attempts, nobody follows the sources of each.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn list(attempts: &[Attempt]) -> String {
    const SHOWN: usize = 16;
    if attempts.is_empty() {
        return "its annotations hold no wrapped key".into();
    }
    let mut text = (attempts.iter().take(SHOWN))
        .map(|attempt| format!("{}: {}", attempt.scheme, attempt.error))
        .collect::<Vec<_>>()
        .join("; ");
    if attempts.len() > SHOWN {
        text.push_str(&format!("; and {} more", attempts.len() - SHOWN));
    }
    text
}
