//! The two sides of a transport: where an image's bytes come from, and where they go.
//!
//! What a source gives is [`Untrusted`], or a stream whose reader must check it: a source checks nothing by itself (a transport that
//! happens to check, such as an archive that is read twice, is still not believed). Signatures come through
//! [`SignatureStorage`], a capability that some sources have.

use std::{io::Read, path::PathBuf};

use nacre_core::{Digest, Untrusted};

use crate::{
    manifest::{Descriptor, ManifestError, RawManifest},
    reference::Location,
};

/// Why a transport did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// There is nothing by that name.
    #[error("{what} not found at {place}")]
    NotFound {
        /// The manifest, blob, tag or file.
        what: String,
        /// Registry, directory or archive.
        place: String,
    },
    /// Credentials are missing or wrong.
    #[error("{place} refused access to {what}: {reason}; log in, or name an auth file with --authfile")]
    Denied {
        /// What was asked for.
        what: String,
        /// Who refused.
        place: String,
        /// Its words.
        reason: String,
    },
    /// Our own configuration forbids to talk to it.
    #[error("{place} is blocked by {rule}")]
    Blocked {
        /// The registry.
        place: String,
        /// The file and its rule.
        rule: String,
    },
    /// The peer could not be reached, stalled, or cut the connection, for all retries.
    #[error("{place}: {what} failed after {attempts} attempts: {reason}")]
    Network {
        /// The request.
        what: String,
        /// The peer.
        place: String,
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        reason: String,
    },
    /// The peer answered something that it must not.
    #[error("{place}: {what}: unexpected answer: {reason}")]
    Protocol {
        /// The request.
        what: String,
        /// The peer.
        place: String,
        /// What was wrong.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The content is larger than it may be, or than it said.
    #[error("{what} at {place} is larger than {limit} bytes")]
    TooLarge {
        /// The manifest, blob or file.
        what: String,
        /// Where it is.
        place: String,
        /// The limit.
        limit: u64,
    },
    /// What was to be written has another digest than its descriptor says.
    #[error("{what}: digest mismatch: expected {expected}, the content has {found}")]
    DigestMismatch {
        /// The blob.
        what: String,
        /// As announced.
        expected: Digest,
        /// As it was.
        found: Digest,
    },
    /// A manifest is not one.
    #[error("{place}: {source}")]
    Manifest {
        /// Where it is.
        place: String,
        /// What is wrong.
        source: ManifestError,
    },
    /// An archive or a directory is not what it should be.
    #[error("{place}: {what} is not valid: {reason}")]
    Malformed {
        /// The file or entry.
        what: String,
        /// The archive or directory.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The content that was to be written could not be read to its end.
    #[error("{what}: reading it failed: {source}")]
    Content {
        /// The blob.
        what: String,
        /// The stream's error.
        source: std::io::Error,
    },
    /// The transport's configuration is not valid.
    #[error("{path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The transport cannot do that.
    #[error("{place} does not support {what}")]
    Unsupported {
        /// The operation.
        what: String,
        /// The transport.
        place: String,
    },
}

impl TransportError {
    /// Whether the answer was that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether it may be otherwise when it is tried again.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Network { .. } | Self::Protocol { .. } | Self::Io { .. })
    }
}

/// Where an image's bytes come from.
pub trait ImageSource: Send + Sync {
    /// The location as it was asked for.
    fn location(&self) -> &Location;

    /// The manifest or index that the location names, or, with a digest, that one of it. At most
    /// [`MANIFEST_LIMIT`](crate::manifest::MANIFEST_LIMIT) bytes. The caller verifies digests with
    /// [`verify_manifest`](crate::manifest::verify_manifest).
    ///
    /// # Errors
    /// [`TransportError`]
    fn manifest(&self, digest: Option<&Digest>) -> Result<Untrusted<RawManifest>, TransportError>;

    /// A stream of a blob's bytes. It ends with an error after `descriptor.size` bytes if there are more, and when there are fewer;
    /// cut connections are resumed within it. The caller hashes what it reads.
    ///
    /// # Errors
    /// [`TransportError`]; those of the stream are `std::io::Error`s that wrap one.
    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, TransportError>;

    /// Fills `out` with the blob's bytes from `offset` on, for whoever reads an image before it is there. It is tried once; `attempt`
    /// counts from 0, so that a source of several places can ask another one. The caller verifies what it reads.
    ///
    /// # Errors
    /// [`TransportError`]; `Unsupported` where the transport can only be read from its beginning
    fn read_blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        out: &mut [u8],
        attempt: u32,
    ) -> Result<(), TransportError> {
        let _ = (descriptor, offset, out, attempt);
        Err(TransportError::Unsupported { what: "reading parts of a blob".into(), place: self.location().to_string() })
    }

    /// Signatures stored beside the image, where the transport has any.
    fn signatures(&self) -> Option<&dyn SignatureStorage>;
}

/// Where signatures are found. Nothing that comes from here was checked.
pub trait SignatureStorage: Send + Sync {
    /// The manifest of another tag of the image's repository (cosign's `sha256-<hex>.sig`); `None` where there is none.
    ///
    /// # Errors
    /// [`TransportError`], but not `NotFound`
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError>;

    /// A manifest of the image's repository by digest.
    ///
    /// # Errors
    /// [`TransportError`]
    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError>;

    /// A whole small blob of at most `limit` bytes.
    ///
    /// # Errors
    /// [`TransportError`]
    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError>;

    /// Descriptors of the manifests whose subject is `subject`, from the referrers API, or from the fallback tag
    /// `sha256-<hex>` where the registry has no such API. At most 1024 come back.
    ///
    /// # Errors
    /// [`TransportError`]
    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError>;

    /// Simple-signing signatures that the transport itself stores: `signature-N` of a directory, a registry's X-R-S-S extension.
    /// At most 128 of at most 4 MiB each.
    ///
    /// # Errors
    /// [`TransportError`]
    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError>;

    /// A file of a lookaside server by `http://`, `https://` or `file://` URL, of at most `limit` bytes; `None` where there is none.
    ///
    /// # Errors
    /// [`TransportError`], but not `NotFound`
    fn get(&self, url: &str, limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError>;
}

/// Where an image goes.
pub trait ImageSink: Send + Sync {
    /// The location as it was asked for.
    fn location(&self) -> &Location;

    /// Whether the blob is already there, so that it need not be sent.
    ///
    /// # Errors
    /// [`TransportError`]
    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError>;

    /// Writes a blob whose digest is not known before it is read (it is being encrypted or compressed), or is known and then
    /// checked. `expected` is the descriptor where it is known. Nothing stays of a blob that failed.
    ///
    /// # Errors
    /// [`TransportError`], with [`TransportError::DigestMismatch`] for content that is not `expected`.
    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError>;

    /// The manifest of a tag of the same repository as it is there now, where the transport can tell: what a signature is added to.
    ///
    /// # Errors
    /// [`TransportError`], but not `NotFound`
    fn tagged(&self, _tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        Ok(None)
    }

    /// Writes a manifest or index that the location's name shall not point to (a platform's manifest, an artifact).
    ///
    /// # Errors
    /// [`TransportError`]
    fn put_manifest(&self, manifest: &RawManifest) -> Result<(), TransportError>;

    /// Writes a manifest under another tag of the same repository (cosign's signature tag, the referrers fallback).
    ///
    /// # Errors
    /// [`TransportError`], `Unsupported` where the transport has no tags.
    fn put_tagged(&self, manifest: &RawManifest, tag: &str) -> Result<(), TransportError>;

    /// Stores a simple-signing signature of `manifest` beside the image, where the transport itself stores any.
    ///
    /// # Errors
    /// [`TransportError`], `Unsupported` where it stores none.
    fn put_native_signature(&self, manifest: &Digest, signature: &[u8]) -> Result<(), TransportError>;

    /// Writes an artifact about another manifest of the same place, last of all, in place of [`commit`](Self::commit): no name points to
    /// it, but who asks for that manifest's referrers finds it. After it returns, it is there, durably.
    ///
    /// # Errors
    /// [`TransportError`], `Unsupported` where nobody could ask
    fn attach(&self, _artifact: &RawManifest) -> Result<(), TransportError> {
        let what = "artifacts beside an image (registries and OCI layouts do)".into();
        Err(TransportError::Unsupported { what, place: self.location().to_string() })
    }

    /// Writes the manifest or index that the location's name points to from now on, last of all; after it returns, the image is
    /// there, durably.
    ///
    /// # Errors
    /// [`TransportError`]
    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError>;
}
