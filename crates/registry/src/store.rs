//! What the registry keeps: named byte strings, in memory or as files.
//!
//! Layout (paths below the directory, or keys in memory):
//!
//! ```text
//! blobs/<algorithm>/<hex>                            a blob's or a manifest's bytes
//! repositories/<name>/_manifests/<algorithm>/<hex>   the media type of a manifest of that repository
//! repositories/<name>/_tags/<tag>                    the digest that the tag points to
//! uploads/<id>                                       an upload that has not ended
//! ```
//!
//! Blobs are shared by all repositories: this is no registry for tenants that must not see each other's.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_core::{Digest, Hasher};

use crate::{http::Content, lock};

pub(crate) enum Store {
    Memory(Mutex<BTreeMap<String, Arc<Vec<u8>>>>),
    Directory { root: PathBuf, counter: AtomicU64 },
}

/// An upload that has begun.
pub(crate) enum Upload {
    Memory(Vec<u8>),
    File { file: File, path: PathBuf, length: u64 },
}

impl Upload {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }

    pub(crate) fn append(&mut self, body: &mut dyn Read) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => body.read_to_end(bytes).map(drop),
            Self::File { file, length, .. } => {
                *length += io::copy(body, file)?;
                Ok(())
            }
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Self::File { path, .. } = self {
            let _ = fs::remove_file(path); // already gone where the upload was committed
        }
    }
}

fn blob_key(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

impl Store {
    pub(crate) fn memory() -> Self {
        Self::Memory(Mutex::default())
    }

    pub(crate) fn directory(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root.join("uploads"))?;
        Ok(Self::Directory { root: root.to_owned(), counter: AtomicU64::new(0) })
    }

    fn get(&self, key: &str) -> io::Result<Option<Content>> {
        match self {
            Self::Memory(entries) => Ok(lock(entries).get(key).cloned().map(Content::memory)),
            Self::Directory { root, .. } => match File::open(root.join(key)) {
                Ok(file) => Content::file(file).map(Some),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let mut upload = self.start_upload()?;
        upload.append(&mut &*bytes)?;
        self.finish(upload, key)
    }

    /// The last part of each key below `prefix`, in order.
    fn list(&self, prefix: &str) -> io::Result<Vec<String>> {
        match self {
            Self::Memory(entries) => Ok(lock(entries)
                .range(prefix.to_owned()..)
                .map_while(|(key, _)| key.strip_prefix(prefix))
                .map(str::to_owned)
                .collect()),
            Self::Directory { root, .. } => match fs::read_dir(root.join(prefix)) {
                Ok(entries) => {
                    let mut names = entries
                        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                        .collect::<io::Result<Vec<_>>>()?;
                    names.sort();
                    Ok(names)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(error) => Err(error),
            },
        }
    }

    pub(crate) fn start_upload(&self) -> io::Result<Upload> {
        match self {
            Self::Memory(_) => Ok(Upload::Memory(Vec::new())),
            Self::Directory { root, counter } => {
                let name = format!("{}-{}", std::process::id(), counter.fetch_add(1, Ordering::Relaxed));
                let path = root.join("uploads").join(name);
                let file = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
                Ok(Upload::File { file, path, length: 0 })
            }
        }
    }

    fn finish(&self, mut upload: Upload, key: &str) -> io::Result<()> {
        match (self, &mut upload) {
            (Self::Memory(entries), Upload::Memory(bytes)) => {
                lock(entries).insert(key.to_owned(), Arc::new(std::mem::take(bytes)));
                Ok(())
            }
            (Self::Directory { root, .. }, Upload::File { file, path, .. }) => {
                file.flush()?;
                let target = root.join(key);
                if let Some(parent) = target.parent() {
                    fs::create_dir_all(parent)?;
                }
                fs::rename(path, target)
            }
            _ => Err(io::Error::other("the upload is another store's")),
        }
    }

    /// Ends an upload as a blob. What came has to have the digest: otherwise nothing stays, and `false` comes back.
    pub(crate) fn finish_blob(&self, mut upload: Upload, digest: &Digest) -> io::Result<bool> {
        let mut hasher = Hasher::new(digest.algorithm());
        match &mut upload {
            Upload::Memory(bytes) => hasher.update(bytes),
            Upload::File { file, .. } => {
                let mut content = Content::file(file.try_clone()?)?;
                let mut buffer = vec![0; 256 << 10];
                loop {
                    let count = content.read(&mut buffer)?;
                    if count == 0 {
                        break;
                    }
                    hasher.update(buffer.split_at(count).0);
                }
            }
        }
        if hasher.finish() != *digest {
            return Ok(false);
        }
        self.finish(upload, &blob_key(digest)).map(|()| true)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> io::Result<Option<Content>> {
        self.get(&blob_key(digest))
    }

    /// Stores a blob under a digest that the caller answers for (tests store wrong ones on purpose).
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        self.put(&blob_key(digest), bytes)
    }

    pub(crate) fn put_manifest(
        &self,
        repository: &str,
        digest: &Digest,
        media_type: &str,
        bytes: &[u8],
    ) -> io::Result<()> {
        self.put_blob(digest, bytes)?;
        let (algorithm, hex) = (digest.algorithm().name(), digest.hex());
        self.put(&format!("repositories/{repository}/_manifests/{algorithm}/{hex}"), media_type.as_bytes())
    }

    pub(crate) fn put_tag(&self, repository: &str, tag: &str, digest: &Digest) -> io::Result<()> {
        self.put(&format!("repositories/{repository}/_tags/{tag}"), digest.to_string().as_bytes())
    }

    pub(crate) fn tag(&self, repository: &str, tag: &str) -> io::Result<Option<Digest>> {
        let Some(content) = self.get(&format!("repositories/{repository}/_tags/{tag}"))? else { return Ok(None) };
        Ok(String::from_utf8_lossy(&content.into_vec()?).parse().ok())
    }

    pub(crate) fn tags(&self, repository: &str) -> io::Result<Vec<String>> {
        self.list(&format!("repositories/{repository}/_tags/"))
    }

    /// A manifest of the repository: its media type and its bytes.
    pub(crate) fn manifest(&self, repository: &str, digest: &Digest) -> io::Result<Option<(String, Content)>> {
        let (algorithm, hex) = (digest.algorithm().name(), digest.hex());
        let Some(kind) = self.get(&format!("repositories/{repository}/_manifests/{algorithm}/{hex}"))? else {
            return Ok(None);
        };
        let kind = String::from_utf8_lossy(&kind.into_vec()?).into_owned();
        Ok(self.blob(digest)?.map(|content| (kind, content)))
    }

    /// The digests of the repository's SHA-256 manifests.
    pub(crate) fn manifests(&self, repository: &str) -> io::Result<Vec<Digest>> {
        let names = self.list(&format!("repositories/{repository}/_manifests/sha256/"))?;
        Ok(names.iter().filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
    }
}
