//! Exit codes: from the error that happened to the number that scripts act on.

use nacre_anchor::SpecError;
use nacre_attest::{client::ClientError, eventlog::LogError, evidence::EvidenceError};
use nacre_broker::{BrokerError, MasterKeyError};
use nacre_core::{AnchorError, BlockError, KeySourceError, UriError};
use nacre_disk::DiskError;
use nacre_export::{
    kernel::{NoDevice, StartError},
    nbd::NbdError,
};
use nacre_guest::{
    bundle::ComposeError, config::ConfigError, images::PullError, lazy::LazyError, service::ServiceError,
    services::CallError, store::StoreError,
};
use nacre_lazy::{artifact::ArtifactError, frames::FrameError, image::OpenError};
use nacre_lazyd::Problem;
use nacre_objectstore::ObjectStoreError;
use nacre_oci::{
    copy::CopyError,
    crypt::{Attempt, CryptError, SchemeError},
    layer::LayerError,
    manifest::ManifestError,
    reference::ReferenceError,
    source::TransportError,
    trust::TrustError,
};
use nacre_tpm::seal::SealError;
use nacre_verify::{CacheError, ImportError};

use crate::{
    commands::disk::{self, Refused},
    output::Exit,
};

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
            ServiceError::Compose(error) => class(error),
            ServiceError::Lazy(error) => class(error),
            ServiceError::File { .. } => Some(Exit::Io),
            ServiceError::Config(_) | ServiceError::Uri(_) | ServiceError::Platform(_) | ServiceError::Reference(_) => {
                Some(Exit::Usage)
            }
            _ => None,
        };
    }
    if error.is::<EvidenceError>() || error.is::<LogError>() {
        return Some(Exit::NotTrusted);
    }
    if let Some(error) = error.downcast_ref::<ImportError>() {
        return Some(match error {
            ImportError::Unknown(_) => Exit::Usage,
            ImportError::Older { .. } => Exit::Conflict,
            ImportError::Cache(_) => Exit::Io,
        });
    }
    if error.is::<CacheError>() {
        return Some(Exit::Io);
    }
    if let Some(error) = error.downcast_ref::<PullError>() {
        return match error {
            PullError::Transport(error) => class(error),
            PullError::Store(error) => class(error),
            PullError::Layer { source, .. } => class(source),
            PullError::Key { source, .. } => class(source),
            PullError::Manifest(error) => class(error),
            PullError::Trust(error) => class(error),
            PullError::Stack { .. } | PullError::IndexDepth { .. } | PullError::Event(_) => Some(Exit::NotTrusted),
            PullError::LazyKey(error) => class(error),
            PullError::Reference(_) | PullError::Lazy(_) => Some(Exit::Usage),
            PullError::TooManyLayers { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref::<LazyError>() {
        return match error {
            LazyError::Pull(error) => class(error),
            LazyError::Artifact(error) => class(error),
            LazyError::Open(OpenError::Local(_)) | LazyError::Io { .. } | LazyError::Fuse(_) | LazyError::Erofs(_) => {
                Some(Exit::Io)
            }
            LazyError::Open(OpenError::Frames(FrameError::Io(_))) => Some(Exit::Io),
            LazyError::Grant(_) => None,
            LazyError::NoIndex { tried, .. } if tried.is_empty() => Some(Exit::NotFound),
            LazyError::NoIndex { .. }
            | LazyError::Index(_)
            | LazyError::Open(_)
            | LazyError::Check(_)
            | LazyError::Device { .. }
            | LazyError::Config(_) => Some(Exit::NotTrusted),
        };
    }
    if let Some(error) = error.downcast_ref::<ArtifactError>() {
        return match error {
            ArtifactError::Key(error) => class(error),
            ArtifactError::Kind { .. } => Some(Exit::Usage),
            _ => Some(Exit::NotTrusted),
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
            StoreError::NoImage { .. } | StoreError::NoLayer { .. } | StoreError::NoBundle { .. } => {
                Some(Exit::NotFound)
            }
            StoreError::Ambiguous { .. } => Some(Exit::Usage),
            StoreError::InUse { .. } => Some(Exit::Conflict),
            StoreError::Io { .. } => Some(Exit::Io),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<KeySourceError>() {
        return Some(key_source(error));
    }
    if let Some(CallError::Unreachable { .. }) = error.downcast_ref::<CallError>() {
        return Some(Exit::Io);
    }
    if let Some(error) = error.downcast_ref::<CryptError>() {
        return Some(crypt(error));
    }
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return Some(client(error));
    }
    if let Some(error) = error.downcast_ref::<BrokerError>() {
        return match error {
            BrokerError::Running(_) | BrokerError::Exists(_) => Some(Exit::Conflict),
            BrokerError::Io { .. } | BrokerError::Listen { .. } | BrokerError::Storage(_) => Some(Exit::Io),
            BrokerError::Sealed(_) | BrokerError::Damaged { .. } | BrokerError::OtherMasterKey { .. } => {
                Some(Exit::NotTrusted)
            }
            BrokerError::Invalid(_) | BrokerError::Policy(_) => Some(Exit::Usage),
            BrokerError::Master(error) => Some(master_key(error)),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<ComposeError>() {
        return Some(if matches!(error, ComposeError::InUse(_)) { Exit::Conflict } else { Exit::Io });
    }
    if let Some(error) = error.downcast_ref::<ConfigError>() {
        return Some(if matches!(error, ConfigError::Read { .. }) { Exit::Io } else { Exit::Usage });
    }
    if let Some(error) = error.downcast_ref::<DiskError>() {
        return secure_disk(error);
    }
    if let Some(error) = error.downcast_ref::<BlockError>() {
        return block(error);
    }
    if let Some(error) = error.downcast_ref::<AnchorError>() {
        return Some(anchor(error));
    }
    if let Some(error) = error.downcast_ref::<nacre_sys::block::StoreError>() {
        return block_store(error);
    }
    if let Some(error) = error.downcast_ref::<ObjectStoreError>() {
        return Some(match error {
            ObjectStoreError::Location { .. } => Exit::Usage,
            ObjectStoreError::NotAStore { .. } => Exit::NotFound,
            ObjectStoreError::Exists(_) | ObjectStoreError::InUse(_) => Exit::Conflict,
            ObjectStoreError::Request { .. } | ObjectStoreError::Threads(_) => Exit::Io,
        });
    }
    if let Some(error) = error.downcast_ref::<NbdError>() {
        return Some(match error {
            NbdError::Listen { .. } | NbdError::Start(_) => Exit::Io,
            NbdError::NoAddress | NbdError::Name(_) | NbdError::Tls(_) => Exit::Usage,
        });
    }
    if let Some(error) = error.downcast_ref::<StartError>() {
        return Some(if disk::is_usage(error) { Exit::Usage } else { Exit::Io });
    }
    if error.is::<NoDevice>() {
        return Some(Exit::Io);
    }
    if let Some(error) = error.downcast_ref::<Refused>() {
        return Some(error.exit());
    }
    if let Some(error) = error.downcast_ref::<Problem>() {
        return Some(match error {
            Problem::InUse(_) => Exit::Conflict,
            Problem::Missing(_) => Exit::NotFound,
            Problem::Usage(_) => Exit::Usage,
            Problem::Refused { exit, .. } => Exit::of_code(*exit),
        });
    }
    if error.is::<Damaged>() {
        return Some(Exit::NotTrusted);
    }
    if error.is::<InUse>() {
        return Some(Exit::Conflict);
    }
    if error.is::<Missing>() {
        return Some(Exit::NotFound);
    }
    if error.is::<Usage>() || error.is::<ReferenceError>() || error.is::<UriError>() || error.is::<SpecError>() {
        return Some(Exit::Usage);
    }
    if let Some(error) = error.downcast_ref::<TrustError>() {
        // Where the signatures are could not be asked: another time it may do.
        return Some(if error.is_refusal() { Exit::NotTrusted } else { Exit::Io });
    }
    if let Some(error) = error.downcast_ref::<CopyError>() {
        return match error {
            CopyError::Transport(error) => transport(error),
            CopyError::Crypt { source, .. } => Some(crypt(source)),
            CopyError::Manifest { .. } | CopyError::Stream { .. } | CopyError::Bomb => Some(Exit::NotTrusted),
            CopyError::Unsupported(_) | CopyError::SignaturesLost { .. } => Some(Exit::Usage),
            _ => None,
        };
    }
    if error.is::<ManifestError>() {
        return Some(Exit::NotTrusted);
    }
    error.is::<std::io::Error>().then_some(Exit::Io)
}

/// Something that was named is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Missing(pub(crate) String);

/// Arguments that cannot be meant together, or are none.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Somebody else has it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct InUse(pub(crate) String);

/// A check found that something is not what was written.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Damaged(pub(crate) String);

fn secure_disk(error: &DiskError) -> Option<Exit> {
    if error.is_integrity() {
        return Some(Exit::NotTrusted);
    }
    match error {
        DiskError::NoDisk { .. } => Some(Exit::NotFound),
        DiskError::NotEmpty { .. } => Some(Exit::Conflict),
        DiskError::BadKey { .. } | DiskError::Setting(_) => Some(Exit::Usage),
        DiskError::Anchor(error) => Some(anchor(error)),
        DiskError::Block(error) => block(error),
        _ => None,
    }
}

fn block(error: &BlockError) -> Option<Exit> {
    match error {
        BlockError::Integrity { .. } => Some(Exit::NotTrusted),
        BlockError::Fenced(_) => Some(Exit::Conflict),
        BlockError::Io { .. } | BlockError::NoSpace(_) | BlockError::ReadOnly(_) => Some(Exit::Io),
        BlockError::OutOfRange { .. } | BlockError::Unsupported(_) => None,
    }
}

fn anchor(error: &AnchorError) -> Exit {
    match error {
        AnchorError::Fenced { .. } => Exit::Conflict,
        AnchorError::Untrusted { .. } => Exit::NotTrusted,
        AnchorError::Failed { .. } => Exit::Io,
    }
}

fn block_store(error: &nacre_sys::block::StoreError) -> Option<Exit> {
    use nacre_sys::block::StoreError;
    match error {
        StoreError::InUse(_) | StoreError::Exists(_) => Some(Exit::Conflict),
        StoreError::NotAStore { .. } | StoreError::Size { .. } => Some(Exit::Usage),
        StoreError::Io { .. } => Some(Exit::Io),
        StoreError::Fill { source, .. } => block(source),
    }
}

fn key_source(error: &KeySourceError) -> Exit {
    match error {
        KeySourceError::NotFound { .. } => Exit::NotFound,
        KeySourceError::Denied { .. } => Exit::NotTrusted,
        // No answer is a matter of the network; a refused attestation is none.
        KeySourceError::Failed { source, .. } => source.downcast_ref::<ClientError>().map_or(Exit::Io, client),
    }
}

/// A device that fails, or one that says that what it should open is not its own.
fn master_key(error: &MasterKeyError) -> Exit {
    match error {
        MasterKeyError::Device { source, .. } => match source.downcast_ref::<SealError>() {
            Some(SealError::Tpm(error)) if !error.is_distrust() => Exit::Io,
            Some(_) => Exit::NotTrusted,
            None => Exit::Io,
        },
        MasterKeyError::Wrong { .. } => Exit::NotTrusted,
    }
}

fn client(error: &ClientError) -> Exit {
    match error {
        ClientError::Network { .. } | ClientError::Refused { status: 500.., .. } => Exit::Io,
        ClientError::Refused { status: 404, .. } => Exit::NotFound,
        ClientError::Refused { status: 400, .. } | ClientError::Config(_) => Exit::Usage,
        _ => Exit::NotTrusted,
    }
}

fn crypt(error: &CryptError) -> Exit {
    match error {
        // A key that could not be asked for may be had another time; one that was refused, not.
        CryptError::NoKey(attempts) => {
            let unreachable = |attempt: &Attempt| match &attempt.error {
                SchemeError::KeySource(error) => key_source(error) == Exit::Io,
                SchemeError::ProviderTimeout { .. } => true,
                _ => false,
            };
            if attempts.iter().any(unreachable) { Exit::Io } else { Exit::NotTrusted }
        }
        CryptError::KeyArgument { .. } | CryptError::ProviderConfig { .. } | CryptError::NoRecipients => Exit::Usage,
        _ => Exit::NotTrusted,
    }
}

fn transport(error: &TransportError) -> Option<Exit> {
    match error {
        TransportError::NotFound { .. } => Some(Exit::NotFound),
        TransportError::DigestMismatch { .. } | TransportError::Manifest { .. } | TransportError::TooLarge { .. } => {
            Some(Exit::NotTrusted)
        }
        TransportError::Config { .. } | TransportError::Unsupported { .. } => Some(Exit::Usage),
        _ => Some(Exit::Io),
    }
}
