//! `oci-archive:FILE[:NAME]`: an OCI image layout in a tar file. It is written anew each time, and takes the place of what was
//! there; blobs come first, `oci-layout` and `index.json` last.

use std::{
    io::Read,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nacre_core::{Digest, Untrusted};

use super::{
    files::Extent,
    layout::{Additions, INDEX_FILE, LAYOUT_FILE, LAYOUT_VERSION, LayoutFiles, LayoutSource},
    tar::TarFile,
    tar_writer::TarWriter,
};
use crate::{
    manifest::{Descriptor, RawManifest},
    reference::Location,
    source::{ImageSink, TransportError},
};

impl LayoutFiles for TarFile {
    fn place(&self) -> String {
        self.place().to_owned()
    }

    fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        self.read(name, limit)
    }

    fn blob(&self, digest: &Digest) -> Result<Option<Extent>, TransportError> {
        self.find(&blob_name(digest))
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// Opens an image of an archive for reading.
pub(super) fn open_source(path: &Path, name: Option<&str>) -> Result<LayoutSource<TarFile>, TransportError> {
    let location = Location::OciArchive { path: path.into(), name: name.map(str::to_owned) };
    LayoutSource::open(location, name.map(str::to_owned), TarFile::open(path)?)
}

/// Writes an archive of one image.
pub(super) struct OciArchiveSink {
    location: Location,
    name: Option<String>,
    writer: TarWriter,
    additions: Mutex<Additions>,
}

impl OciArchiveSink {
    pub(super) fn create(path: &Path, name: Option<&str>) -> Result<Self, TransportError> {
        let writer = TarWriter::create(path)?;
        writer.put_file("blobs/", b"")?;
        writer.put_file("blobs/sha256/", b"")?;
        Ok(Self {
            location: Location::OciArchive { path: path.into(), name: name.map(str::to_owned) },
            name: name.map(str::to_owned),
            writer,
            additions: Mutex::default(),
        })
    }

    fn additions(&self) -> MutexGuard<'_, Additions> {
        self.additions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_bytes(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put_blob(&mut manifest.bytes(), Some(&manifest.descriptor())).map(drop)
    }
}

impl ImageSink for OciArchiveSink {
    fn location(&self) -> &Location {
        &self.location
    }

    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError> {
        Ok(self.writer.blob(&descriptor.digest) == Some(descriptor.size))
    }

    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError> {
        self.writer.put_blob(content, expected, blob_name)
    }

    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        Ok(self.additions().find(tag))
    }

    fn put_manifest(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        self.additions().manifest(manifest);
        Ok(())
    }

    fn put_tagged(&self, manifest: &RawManifest, tag: &str) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        self.additions().named(manifest, Some(tag));
        Ok(())
    }

    fn put_native_signature(&self, _manifest: &Digest, _signature: &[u8]) -> Result<(), TransportError> {
        Err(TransportError::Unsupported {
            what: "simple-signing signatures (sign with a cosign key instead)".into(),
            place: self.location.to_string(),
        })
    }

    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        let mut additions = self.additions();
        additions.named(manifest, self.name.as_deref());
        let index = additions.apply(None, &self.writer.place())?;
        self.writer.put_file(LAYOUT_FILE, LAYOUT_VERSION)?;
        self.writer.put_file(INDEX_FILE, &index)?;
        self.writer.commit()
    }
}
