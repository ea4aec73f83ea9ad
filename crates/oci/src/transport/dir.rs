//! `dir:PATH`: one image as plain files, as skopeo writes it:
//!
//! ```text
//! version               "Directory Transport Version: 1.1\n"
//! manifest.json         the manifest or index
//! <hex>.manifest.json   the manifests of an index, by their digests
//! <hex>                 blobs, by their digests
//! signature-N           signatures of manifest.json, N from 1: simple signing, or cosign's after "\0sigstore-json\n"
//! <hex>-signature-N     those of the manifest of that digest
//! ```
//!
//! A copy writes a directory beside and puts it in the place of the old one, which must be empty or another image of this kind.

use std::{
    collections::BTreeMap,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nacre_core::{Digest, Untrusted};

use super::files::{self, Dir, Extent, TEMP_PREFIX};
use crate::{
    manifest::{Descriptor, MANIFEST_LIMIT, RawManifest},
    reference::Location,
    source::{ImageSink, ImageSource, SignatureStorage, TransportError},
};

const VERSION_FILE: &str = "version";
const VERSION: &str = "Directory Transport Version: 1.1\n";
const VERSION_START: &[u8] = b"Directory Transport Version: 1.";
const MANIFEST_FILE: &str = "manifest.json";
const SIGNATURE_LIMIT: usize = 128;
const SIGNATURE_SIZE: usize = 4 << 20;

/// An image in a directory.
pub(super) struct DirSource {
    location: Location,
    dir: Dir,
}

impl DirSource {
    pub(super) fn open(path: &Path) -> Result<Self, TransportError> {
        let dir = Dir::open(path)?;
        // Other writers of this format leave the version out; where it is, it must be one that we know.
        if let Some(version) = dir.read(VERSION_FILE, 4096)?
            && !version.starts_with(VERSION_START)
        {
            return Err(TransportError::Malformed {
                what: VERSION_FILE.into(),
                place: path.display().to_string(),
                reason: "it is not 'Directory Transport Version: 1.…'".into(),
            });
        }
        Ok(Self { location: Location::Dir(path.into()), dir })
    }

    fn place(&self) -> String {
        self.dir.path().display().to_string()
    }

    fn read(&self, name: &str, what: &str, limit: usize) -> Result<Vec<u8>, TransportError> {
        let missing = || TransportError::NotFound { what: what.into(), place: self.place() };
        self.dir.read(name, limit)?.ok_or_else(missing)
    }

    fn read_manifest(&self, name: &str) -> Result<RawManifest, TransportError> {
        let bytes = self.read(name, name, MANIFEST_LIMIT)?;
        RawManifest::new(bytes, None)
            .map_err(|source| TransportError::Manifest { place: format!("{}, {name}", self.place()), source })
    }
}

impl ImageSource for DirSource {
    fn location(&self) -> &Location {
        &self.location
    }

    fn manifest(&self, digest: Option<&Digest>) -> Result<Untrusted<RawManifest>, TransportError> {
        let Some(digest) = digest else { return self.read_manifest(MANIFEST_FILE).map(Untrusted::new) };
        let found = self.read_manifest(&manifest_name(digest));
        match found {
            // The image's own manifest may be asked for by its digest, too.
            Err(error) if error.is_not_found() => {
                let own = self.read_manifest(MANIFEST_FILE)?;
                if Digest::of(digest.algorithm(), own.bytes()) == *digest {
                    Ok(Untrusted::new(own))
                } else {
                    Err(error)
                }
            }
            found => found.map(Untrusted::new),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, TransportError> {
        let (file, size) = self.dir.file(&descriptor.digest.hex())?.ok_or_else(|| TransportError::NotFound {
            what: format!("blob {}", descriptor.digest),
            place: self.place(),
        })?;
        Extent::whole(file, size).stream(descriptor, &self.place())
    }

    fn read_blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        out: &mut [u8],
        _attempt: u32,
    ) -> Result<(), TransportError> {
        let (file, size) = self.dir.file(&descriptor.digest.hex())?.ok_or_else(|| TransportError::NotFound {
            what: format!("blob {}", descriptor.digest),
            place: self.place(),
        })?;
        Extent::whole(file, size).read_part(descriptor, &self.place(), offset, out)
    }

    fn signatures(&self) -> Option<&dyn SignatureStorage> {
        Some(self)
    }
}

impl SignatureStorage for DirSource {
    fn tagged(&self, _tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        Ok(None)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        self.manifest(Some(digest))
    }

    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        self.read(&descriptor.digest.hex(), &format!("blob {}", descriptor.digest), limit).map(Untrusted::new)
    }

    fn referrers(&self, _subject: &Digest, _artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        Ok(Vec::new())
    }

    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        let own = self.dir.read(MANIFEST_FILE, MANIFEST_LIMIT)?.unwrap_or_default();
        let own = Digest::of(manifest.algorithm(), &own) == *manifest;
        let mut found = Vec::new();
        for number in 1.. {
            let Some(signature) = self.dir.read(&signature_name(manifest, own, number), SIGNATURE_SIZE)? else { break };
            if number > SIGNATURE_LIMIT {
                let what = "the number of signatures".to_owned();
                return Err(TransportError::TooLarge { what, place: self.place(), limit: SIGNATURE_LIMIT as u64 });
            }
            found.push(Untrusted::new(signature));
        }
        Ok(found)
    }

    fn get(&self, url: &str, _limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        Err(TransportError::Unsupported { what: format!("a lookaside server ({url:.200})"), place: self.place() })
    }
}

fn manifest_name(digest: &Digest) -> String {
    format!("{}.manifest.json", digest.hex())
}

fn signature_name(manifest: &Digest, own: bool, number: usize) -> String {
    if own { format!("signature-{number}") } else { format!("{}-signature-{number}", manifest.hex()) }
}

/// Whether a file's name is one that this transport gives.
fn is_ours(name: &str) -> bool {
    let is_hex = |text: &str| {
        matches!(text.len(), 64 | 96 | 128) && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    matches!(name, VERSION_FILE | MANIFEST_FILE)
        || is_hex(name)
        || name.strip_suffix(".manifest.json").is_some_and(is_hex)
        || name.strip_prefix("signature-").is_some_and(is_number)
        || name.split_once("-signature-").is_some_and(|(hex, number)| is_hex(hex) && is_number(number))
}

/// Writes an image into a directory.
pub(super) struct DirSink {
    location: Location,
    path: PathBuf,
    parent: Dir,
    name: String,
    temp: Dir,
    temp_name: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    blobs: BTreeMap<Digest, u64>,
    manifests: Vec<RawManifest>,
    signatures: BTreeMap<Digest, Vec<Vec<u8>>>,
    counter: u64,
    committed: bool,
}

impl DirSink {
    pub(super) fn create(path: &Path) -> Result<Self, TransportError> {
        let (parent, name) = files::parent_and_name(path)?;
        let parent = Dir::open(&parent)?;
        check_replaceable(path)?;
        let (temp_name, temp) = parent.make_temp_dir(&format!("{TEMP_PREFIX}{name}-"))?;
        let location = Location::Dir(path.into());
        Ok(Self { location, path: path.into(), parent, name, temp, temp_name, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, own: &RawManifest, state: &State) -> Result<(), TransportError> {
        self.temp.write(VERSION_FILE, VERSION.as_bytes())?;
        self.temp.write(MANIFEST_FILE, own.bytes())?;
        for manifest in state.manifests.iter().filter(|manifest| manifest.digest() != own.digest()) {
            self.temp.write(&manifest_name(manifest.digest()), manifest.bytes())?;
        }
        for (manifest, signatures) in &state.signatures {
            let is_own = Digest::of(manifest.algorithm(), own.bytes()) == *manifest;
            for (number, signature) in (1..).zip(signatures) {
                self.temp.write(&signature_name(manifest, is_own, number), signature)?;
            }
        }
        self.temp.sync()
    }
}

/// Whether a directory may be replaced by an image: it is missing, empty, or holds such an image and nothing else.
fn check_replaceable(path: &Path) -> Result<bool, TransportError> {
    let dir = match Dir::open(path) {
        Ok(dir) => dir,
        Err(error) if error.is_not_found() => return Ok(false),
        Err(error) => return Err(error),
    };
    let names = dir.names()?;
    let strange = names.iter().find(|name| !is_ours(name));
    let version = dir.read(VERSION_FILE, 4096)?;
    if strange.is_none() && (names.is_empty() || version.is_some_and(|version| version.starts_with(VERSION_START))) {
        return Ok(true);
    }
    Err(TransportError::Malformed {
        what: "the directory".into(),
        place: path.display().to_string(),
        reason: format!(
            "it is neither empty nor only an image that may be replaced{}: give another one",
            strange.map(|name| format!(" (it has '{name:.100}')")).unwrap_or_default()
        ),
    })
}

impl ImageSink for DirSink {
    fn location(&self) -> &Location {
        &self.location
    }

    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError> {
        Ok(self.state().blobs.get(&descriptor.digest) == Some(&descriptor.size))
    }

    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError> {
        let number = {
            let mut state = self.state();
            state.counter += 1;
            state.counter
        };
        let partial = format!("partial-{number}");
        let failed = |error| files::io("writing", &self.path, error);
        let file = self.temp.create(&partial)?;
        let (digest, size) = files::store(content, expected, &self.path.display().to_string(), |piece, at| {
            file.write_all_at(piece, at).map_err(failed)
        })
        .and_then(|stored| file.sync_data().map_err(failed).map(|()| stored))
        .inspect_err(|_| drop(self.temp.remove_file(&partial)))?;
        self.temp.rename(&partial, &self.temp, &digest.hex())?;
        self.state().blobs.insert(digest, size);
        Ok((digest, size))
    }

    fn put_manifest(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        let mut state = self.state();
        if !state.manifests.iter().any(|known| known.digest() == manifest.digest()) {
            state.manifests.push(manifest.clone());
        }
        Ok(())
    }

    fn put_tagged(&self, _manifest: &RawManifest, _tag: &str) -> Result<(), TransportError> {
        Err(TransportError::Unsupported {
            what: "cosign's signatures (sign with a GPG key, or copy to docker:// or oci:)".into(),
            place: self.location.to_string(),
        })
    }

    fn put_native_signature(&self, manifest: &Digest, signature: &[u8]) -> Result<(), TransportError> {
        self.state().signatures.entry(*manifest).or_default().push(signature.to_vec());
        Ok(())
    }

    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        let mut state = self.state();
        self.finish(manifest, &state)?;
        if check_replaceable(&self.path)? {
            self.parent.exchange(&self.temp_name, &self.name)?;
            state.committed = true;
            self.parent.sync()?;
            // What was there before has the temporary name now.
            self.parent.remove_flat(&self.temp_name)
        } else {
            self.parent.rename(&self.temp_name, &self.parent, &self.name)?;
            state.committed = true;
            self.parent.sync()
        }
    }
}

impl Drop for DirSink {
    fn drop(&mut self) {
        if !self.state().committed {
            // Nothing more can be done about an error here; the next writer to this place removes what is left.
            let _ = self.parent.remove_flat(&self.temp_name);
        }
    }
}
