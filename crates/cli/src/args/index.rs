//! What there is to say about indexes of ordinary images.

use std::path::PathBuf;

use clap::Args;

use super::{RegistryArgs, SignArgs};
use crate::size::Size;

#[derive(Debug, Args)]
pub(crate) struct IndexArgs {
    /// The image, at a registry or in an OCI layout; of several platforms that of --platform
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Put the index beside a copy of the image that is elsewhere [default: beside the image]
    #[arg(long, value_name = "REF")]
    pub(crate) to: Option<String>,
    /// About how much of a layer is read and decompressed for a read of any part of it, from 256K to 4M; less makes the index larger
    #[arg(long, value_name = "SIZE", default_value = "2M")]
    pub(crate) span: Size,
    /// Encrypt the index for a recipient, as skopeo spells it: jwe:PUBLIC.pem, pkcs7:CERT.pem, pgp:NAME, pkcs11:…, provider:NAME[:…]; may be
    /// repeated. That of an encrypted image must be
    #[arg(long, value_name = "KEY")]
    pub(crate) encrypt: Vec<String>,
    /// A key to decrypt layers with; may be repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) decryption_key: Vec<String>,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
    /// Index only what this trust policy lets in [default: no policy; an image is not made trusted by being indexed]
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// Directory of signature storage configurations [default: the user's, then /etc/containers/registries.d]
    #[arg(long, value_name = "DIR")]
    pub(crate) registries_d: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}
