//! `nacre broker master`, and master keys in tokens; those in TPMs are in `vault`.

use std::sync::Arc;

use nacre_broker::{Broker, BrokerError, MasterKey, MasterKeyError};
use nacre_core::{Digest, SecretArray, SecretBytes};
use nacre_oci::crypt::pkcs11::{Hash, Packet, Recipient, TokenKey, wrap};

use super::vault::InTpm;
use crate::{args::broker::MasterCommand, output};

/// Opens a master key that is no file.
pub(super) fn open(name: &str) -> Result<Arc<dyn MasterKey>, BrokerError> {
    match name.split_once(':') {
        Some(("pkcs11", _)) => Ok(Arc::new(InToken::new(name)?)),
        Some(("tpm", _)) => Ok(Arc::new(InTpm::new(name)?)),
        _ => Err(BrokerError::Invalid(format!(
            "master_key = '{name:.100}': write file:PATH, pkcs11:URI or tpm:WHERE[,pcrs=0+2+7][,owner-file=PATH]"
        ))),
    }
}

pub(super) fn master(command: &MasterCommand) -> anyhow::Result<()> {
    match command {
        MasterCommand::Ls { dir } => {
            let broker = Broker::open_with(&dir.dir, &open)?;
            let used = broker.master_in_use();
            for name in broker.masters()? {
                output::line(format_args!("{name}{}", if name == used { "  (in use)" } else { "" }))?;
            }
            Ok(())
        }
        MasterCommand::Rotate { to, keep_old, reseal, dir } => {
            Ok(Broker::open_with(&dir.dir, &open)?.rotate_master(to, &open, *keep_old, *reseal)?)
        }
        MasterCommand::Forget { name, dir } => Ok(Broker::open_with(&dir.dir, &open)?.forget_master(name)?),
    }
}

/// An RSA key in a PKCS#11 token: the private half never leaves it. OAEP with SHA-256, or what `OCICRYPT_OAEP_HASHALG` says for tokens that only
/// know SHA-1.
struct InToken {
    uri: String,
    id: String,
}

impl InToken {
    fn new(uri: &str) -> Result<Self, BrokerError> {
        TokenKey::parse(uri).map_err(|e| BrokerError::Invalid(format!("master_key: {e}")))?;
        // Its name is of what tells the key from others, so that another PIN or module is the same key.
        let path = uri.split('?').next().unwrap_or(uri);
        let mut parts: Vec<&str> = path.trim_start_matches("pkcs11:").split(';').collect();
        parts.retain(|part| ["token=", "object=", "id=", "serial="].iter().any(|name| part.starts_with(name)));
        parts.sort_unstable();
        Ok(Self { uri: uri.to_owned(), id: format!("pkcs11:{}", Digest::sha256(parts.join(";").as_bytes()).short()) })
    }

    fn fail(&self, what: &'static str) -> impl Fn(nacre_oci::crypt::SchemeError) -> MasterKeyError {
        let key = self.describe();
        move |source| MasterKeyError::Device { key: key.clone(), what, source: Arc::new(source) }
    }

    fn key(&self, what: &'static str) -> Result<TokenKey, MasterKeyError> {
        TokenKey::parse(&self.uri).map_err(self.fail(what))
    }
}

impl MasterKey for InToken {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn describe(&self) -> String {
        // Without the query: there may be a PIN in it.
        format!("master key {} ({})", self.id, self.uri.split('?').next().unwrap_or_default())
    }

    fn wrap(&self, label: &str, key: &SecretArray<32>) -> Result<Vec<u8>, MasterKeyError> {
        // The label goes in too: RSA-OAEP as tokens do it has no other place for it.
        let mut bytes = key.expose().to_vec();
        bytes.extend_from_slice(Digest::sha256(label.as_bytes()).as_bytes());
        let hash = Hash::from_env().map_err(self.fail("read the setting of its hash"))?;
        let recipient = Recipient::Token(self.key("read its URI")?);
        wrap(&SecretBytes::new(bytes), &[recipient], hash).map_err(self.fail("encrypt a data key"))
    }

    fn unwrap(&self, label: &str, wrapped: &[u8]) -> Result<SecretArray<32>, MasterKeyError> {
        let packet = Packet::parse(wrapped).map_err(self.fail("read a wrapped data key"))?;
        let plain = packet.open(&[self.key("read its URI")?]).map_err(self.fail("decrypt a data key"))?;
        let wrong = || MasterKeyError::Wrong { key: self.describe() };
        let (key, bound) = plain.expose().split_first_chunk::<32>().ok_or_else(wrong)?;
        if bound != Digest::sha256(label.as_bytes()).as_bytes() {
            return Err(wrong());
        }
        Ok(SecretArray::fill(|slot| slot.copy_from_slice(key)))
    }
}
