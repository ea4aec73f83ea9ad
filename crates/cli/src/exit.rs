//! Exit codes: from the error that happened to the number that scripts act on.

use nacre_attest::client::ClientError;
use nacre_core::KeySourceError;
use nacre_guest::{images::PullError, service::ServiceError, services::CallError, store::StoreError};
use nacre_oci::{
    crypt::CryptError, layer::LayerError, manifest::ManifestError, source::TransportError, trust::TrustError,
};

use crate::output::Exit;

/// The exit code of an error: that of the most telling of its causes.
pub(crate) fn of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(class).unwrap_or(Exit::Other)
}

fn class(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    // Transparent variants hide their source from the chain, so they are looked into here.
    if let Some(error) = error.downcast_ref::<ServiceError>() {
        return match error {
            ServiceError::Pull(error) => class(error),
            ServiceError::Transport(error) => class(error),
            ServiceError::Store(error) => class(error),
            ServiceError::Key(error) => class(error),
            ServiceError::Broker(error) => class(error),
            ServiceError::Crypt(error) => class(error),
            ServiceError::File { .. } => Some(Exit::Io),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<PullError>() {
        return match error {
            PullError::Transport(error) => class(error),
            PullError::Store(error) => class(error),
            PullError::Layer { source, .. } => class(source),
            PullError::Key { source, .. } => class(source),
            PullError::Manifest(error) => class(error),
            PullError::Trust(error) => class(error),
            PullError::Stack { .. } | PullError::IndexDepth { .. } => Some(Exit::NotTrusted),
            PullError::Reference(_) | PullError::TooManyLayers { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref::<LayerError>() {
        return Some(if error.is_integrity() { Exit::NotTrusted } else { Exit::Io });
    }
    if let Some(error) = error.downcast_ref::<TransportError>() {
        return transport(error);
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return match error {
            StoreError::NoImage { .. } | StoreError::NoLayer { .. } => Some(Exit::NotFound),
            StoreError::InUse { .. } => Some(Exit::Conflict),
            StoreError::Io { .. } => Some(Exit::Io),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<KeySourceError>() {
        return Some(match error {
            KeySourceError::NotFound { .. } => Exit::NotFound,
            KeySourceError::Denied { .. } => Exit::NotTrusted,
            KeySourceError::Failed { .. } => Exit::Io,
        });
    }
    if let Some(CallError::Unreachable { .. }) = error.downcast_ref::<CallError>() {
        return Some(Exit::Io);
    }
    if let Some(ClientError::Network { .. }) = error.downcast_ref::<ClientError>() {
        return Some(Exit::Io);
    }
    if let Some(error) = error.downcast_ref::<TrustError>() {
        // Where the signatures are could not be asked: another time it may do.
        return Some(if error.is_refusal() { Exit::NotTrusted } else { Exit::Io });
    }
    if error.is::<ManifestError>() || error.is::<CryptError>() || error.is::<ClientError>() {
        return Some(Exit::NotTrusted);
    }
    error.is::<std::io::Error>().then_some(Exit::Io)
}

fn transport(error: &TransportError) -> Option<Exit> {
    match error {
        TransportError::NotFound { .. } => Some(Exit::NotFound),
        TransportError::DigestMismatch { .. } | TransportError::Manifest { .. } | TransportError::TooLarge { .. } => {
            Some(Exit::NotTrusted)
        }
        TransportError::Config { .. } | TransportError::Unsupported { .. } => None,
        _ => Some(Exit::Io),
    }
}
