//! `oci:DIR[:NAME]`: an OCI image layout in a directory.
//!
//! A copy writes its blobs into `.nacre-tmp-<random>/` of the layout, with the name that they will have, and `commit` moves them
//! to `blobs/` and then replaces `index.json`. So a copy that fails or is killed adds nothing to the layout, two copies at once do
//! not see each other's blobs before they are complete, and an index never names a blob that is not there.

use std::{
    collections::BTreeMap,
    io::Read,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nacre_core::{Digest, Untrusted};

use super::{
    files::{self, Dir, Extent, TEMP_PREFIX},
    layout::{self, Additions, INDEX_FILE, LAYOUT_FILE, LAYOUT_VERSION, LayoutFiles, LayoutSource},
};
use crate::{
    manifest::{Descriptor, MANIFEST_LIMIT, RawManifest},
    reference::Location,
    source::{ImageSink, SignatureStorage, TransportError},
};

/// A layout's directory.
pub(super) struct DirFiles(Dir);

impl DirFiles {
    fn blob(dir: &Dir, digest: &Digest) -> Result<Option<Extent>, TransportError> {
        let Some(blobs) = dir.subdir("blobs")? else { return Ok(None) };
        let Some(blobs) = blobs.subdir(digest.algorithm().name())? else { return Ok(None) };
        Ok(blobs.file(&digest.hex())?.map(|(file, size)| Extent::whole(file, size)))
    }
}

impl LayoutFiles for DirFiles {
    fn place(&self) -> String {
        self.0.path().display().to_string()
    }

    fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        self.0.read(name, limit)
    }

    fn blob(&self, digest: &Digest) -> Result<Option<Extent>, TransportError> {
        Self::blob(&self.0, digest)
    }
}

/// Opens an image of a layout for reading.
pub(super) fn open_source(path: &Path, name: Option<&str>) -> Result<LayoutSource<DirFiles>, TransportError> {
    let location = Location::OciDir { path: path.into(), name: name.map(str::to_owned) };
    LayoutSource::open(location, name.map(str::to_owned), DirFiles(Dir::open(path)?))
}

/// Writes an image into a layout.
pub(super) struct OciDirSink {
    location: Location,
    name: Option<String>,
    dir: Dir,
    created: bool,
    temp: Dir,
    temp_name: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Complete blobs in the temporary directory, and their sizes.
    blobs: BTreeMap<Digest, u64>,
    additions: Additions,
    committed: bool,
    counter: u64,
}

impl OciDirSink {
    pub(super) fn create(path: &Path, name: Option<&str>) -> Result<Self, TransportError> {
        let location = Location::OciDir { path: path.into(), name: name.map(str::to_owned) };
        let (dir, created) = Dir::open_or_create(path)?;
        // Another copy may be publishing the first image of this layout.
        let lock = dir.lock()?;
        match dir.read(LAYOUT_FILE, 4096)? {
            Some(version) => layout::check_version(&version, &path.display().to_string())?,
            None if dir.names()?.iter().all(|name| name.starts_with(TEMP_PREFIX)) => {}
            None => {
                return Err(TransportError::Malformed {
                    what: "the directory".into(),
                    place: path.display().to_string(),
                    reason: "it is neither empty nor an OCI layout: give another one".into(),
                });
            }
        }
        drop(lock);
        let (temp_name, temp) = dir.make_temp_dir(TEMP_PREFIX)?;
        Ok(Self { location, name: name.map(str::to_owned), dir, created, temp, temp_name, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_bytes(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        let descriptor = manifest.descriptor();
        if !self.has_blob(&descriptor)? {
            self.put_blob(&mut manifest.bytes(), Some(&descriptor))?;
        }
        Ok(())
    }

    /// Makes all of it visible and durable.
    fn finish(&self, state: &mut State) -> Result<(), TransportError> {
        let _lock = self.dir.lock()?;
        self.publish(state)?;
        state.committed = true;
        self.dir.remove_flat(&self.temp_name)?;
        self.dir.sync()?;
        if self.created {
            let (parent, _) = files::parent_and_name(self.dir.path())?;
            Dir::open(&parent)?.sync()?;
        }
        Ok(())
    }

    /// Moves the blobs to their places, under the layout's lock.
    fn publish(&self, state: &State) -> Result<(), TransportError> {
        let blobs = self.dir.make_subdir("blobs")?;
        let mut algorithms = BTreeMap::new();
        for digest in state.blobs.keys() {
            let name = digest.algorithm().name();
            if !algorithms.contains_key(name) {
                algorithms.insert(name, blobs.make_subdir(name)?);
            }
            if let Some(dir) = algorithms.get(name) {
                self.temp.rename(&file_name(digest), dir, &digest.hex())?;
            }
        }
        for dir in algorithms.values() {
            dir.sync()?;
        }
        blobs.sync()?;
        if self.dir.read(LAYOUT_FILE, 4096)?.is_none() {
            self.temp.write(LAYOUT_FILE, LAYOUT_VERSION)?;
            self.temp.rename(LAYOUT_FILE, &self.dir, LAYOUT_FILE)?;
        }
        let existing = self.dir.read(INDEX_FILE, MANIFEST_LIMIT)?;
        let index = state.additions.apply(existing.as_deref(), &self.dir.path().display().to_string())?;
        self.temp.write(INDEX_FILE, &index)?;
        // The blobs' names are durable before a name in the index leads to them.
        self.dir.sync()?;
        self.temp.rename(INDEX_FILE, &self.dir, INDEX_FILE)
    }
}

/// A blob's name in the temporary directory.
fn file_name(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm().name(), digest.hex())
}

impl ImageSink for OciDirSink {
    fn location(&self) -> &Location {
        &self.location
    }

    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError> {
        if self.state().blobs.get(&descriptor.digest) == Some(&descriptor.size) {
            return Ok(true);
        }
        Ok(DirFiles::blob(&self.dir, &descriptor.digest)?.is_some_and(|found| found.size == descriptor.size))
    }

    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError> {
        use std::os::unix::fs::FileExt as _;
        let number = {
            let mut state = self.state();
            state.counter += 1;
            state.counter
        };
        let partial = format!("partial-{number}");
        let path = self.temp.path().join(&partial);
        let failed = |error| files::io("writing", &path, error);
        let file = self.temp.create(&partial)?;
        let stored = files::store(content, expected, &self.dir.path().display().to_string(), |piece, at| {
            file.write_all_at(piece, at).map_err(failed)
        });
        let (digest, size) = stored
            // Its bytes are durable before it has a name that says what it is.
            .and_then(|stored| file.sync_data().map_err(failed).map(|()| stored))
            .inspect_err(|_| drop(self.temp.remove_file(&partial)))?;
        self.temp.rename(&partial, &self.temp, &file_name(&digest))?;
        self.state().blobs.insert(digest, size);
        Ok((digest, size))
    }

    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        if let Some(staged) = self.state().additions.find(tag) {
            return Ok(Some(staged));
        }
        match open_source(self.dir.path(), None) {
            Ok(source) => source.tagged(tag),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn put_manifest(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        self.state().additions.manifest(manifest);
        Ok(())
    }

    fn put_tagged(&self, manifest: &RawManifest, tag: &str) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        self.state().additions.named(manifest, Some(tag));
        Ok(())
    }

    fn put_native_signature(&self, _manifest: &Digest, _signature: &[u8]) -> Result<(), TransportError> {
        Err(TransportError::Unsupported {
            what: "simple-signing signatures (sign with a cosign key instead)".into(),
            place: self.location.to_string(),
        })
    }

    fn attach(&self, artifact: &RawManifest) -> Result<(), TransportError> {
        self.put_manifest(artifact)?;
        self.finish(&mut self.state())
    }

    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put_bytes(manifest)?;
        let mut state = self.state();
        state.additions.named(manifest, self.name.as_deref());
        self.finish(&mut state)
    }
}

impl Drop for OciDirSink {
    fn drop(&mut self) {
        if self.state().committed {
            return;
        }
        // Nothing more can be done about errors here; the next writer to this place removes what is left.
        let _ = self.dir.remove_flat(&self.temp_name);
        if self.created {
            let _ = rustix::fs::rmdir(self.dir.path());
        }
    }
}
