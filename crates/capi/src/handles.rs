//! What the functions of the header do, without pointers.

use std::{
    collections::VecDeque,
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nacre_core::NoProgress;
use nacre_guest::{
    config::Config,
    lazy::{LazyImage, LazyStore},
    service::ImageService,
    store::{Marks, Store as ImageStore},
};
use nacre_lazy::{
    erofs::{FileType, Inode},
    files::Files,
};
use rustix::io::Errno;

use crate::failure::{Failure, Outcome};

/// Entries of a directory that are read at once.
const LISTED: usize = 256;

/// What the options say.
pub(crate) struct Options<'a> {
    pub(crate) directory: &'a [u8],
    pub(crate) config: Option<&'a [u8]>,
    pub(crate) cache: Option<&'a [u8]>,
    pub(crate) cache_limit: u64,
    pub(crate) patience: u32,
}

/// `nacre_store`
pub(crate) struct Store {
    service: ImageService,
    lazy: LazyStore,
}

impl Store {
    pub(crate) fn open(options: &Options<'_>) -> Outcome<Self> {
        let config = options.config.map(|text| Config::parse(text, "the configuration")).transpose()?;
        let mut config = config.unwrap_or_default();
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        if options.directory.is_empty() {
            return Err(Failure::invalid("options.directory is empty: name a directory for the images' metadata"));
        }
        if let Some(cache) = options.cache {
            config.lazy.cache = Some(path(cache));
        }
        if options.cache_limit != 0 {
            config.lazy.cache_limit = options.cache_limit;
        }
        if options.patience != 0 {
            config.lazy.patience = options.patience.into();
        }
        let store = ImageStore::open(&path(options.directory), Marks::User, config.allow_tmpfs)?;
        let service = ImageService::new(&config, store, Arc::new(NoProgress))?;
        let lazy = LazyStore::open(service.lazy_options().clone())?;
        Ok(Self { service, lazy })
    }

    pub(crate) fn image(&self, reference: &[u8]) -> Outcome<OpenImage> {
        let text = std::str::from_utf8(reference).map_err(|_| Failure::invalid("the image's name is not UTF-8"))?;
        let image = self.service.open_lazy(&self.lazy, text)?;
        let files = image.files()?;
        let config = serde_json::to_vec(&image.config).map_err(|error| Failure::new(Errno::IO, error.to_string()))?;
        let terminated = |bytes: Vec<u8>| CString::new(bytes).map_err(|error| Failure::invalid(error.to_string()));
        let (config, digest) = (terminated(config)?, terminated(image.manifest.to_string().into_bytes())?);
        image.follow_trace();
        Ok(OpenImage { files, config, digest, _image: image })
    }
}

/// `nacre_image`
pub(crate) struct OpenImage {
    files: Files,
    pub(crate) config: CString,
    pub(crate) digest: CString,
    /// Its metadata file goes with it.
    _image: LazyImage,
}

impl OpenImage {
    /// What a path leads to.
    pub(crate) fn find(&self, path: &[u8], follow: bool) -> Outcome<Inode> {
        self.files.find(path, follow).map_err(|error| Failure::from(error).about(path))
    }

    /// The target of a link.
    pub(crate) fn read_link(&self, path: &[u8]) -> Outcome<Vec<u8>> {
        let link = self.find(path, false)?;
        self.files.read_link(&link).map_err(|error| Failure::from(error).about(path))
    }

    /// The value of an attribute.
    pub(crate) fn xattr(&self, path: &[u8], name: &[u8], follow: bool) -> Outcome<Vec<u8>> {
        let inode = self.find(path, follow)?;
        self.files.xattr(&inode, name).map_err(|error| Failure::from(error).about(path))
    }

    /// The names of all attributes, a zero after each.
    pub(crate) fn xattr_names(&self, path: &[u8], follow: bool) -> Outcome<Vec<u8>> {
        let inode = self.find(path, follow)?;
        let names = self.files.xattr_names(&inode).map_err(|error| Failure::from(error).about(path))?;
        Ok(names.into_iter().flat_map(|name| name.into_iter().chain([0])).collect())
    }
}

/// `nacre_file`
pub(crate) struct OpenFile {
    image: Arc<OpenImage>,
    pub(crate) inode: Inode,
    position: Mutex<u64>,
}

impl OpenFile {
    pub(crate) fn open(image: &Arc<OpenImage>, path: &[u8]) -> Outcome<Self> {
        let inode = image.find(path, true)?;
        // What it is, is said where it is opened, and not at its first read.
        image.files.read(&inode, 0, &mut []).map_err(|error| Failure::from(error).about(path))?;
        Ok(Self { image: Arc::clone(image), inode, position: Mutex::new(0) })
    }

    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> Outcome<usize> {
        Ok(self.image.files.read(&self.inode, offset, out)?)
    }

    pub(crate) fn read(&self, out: &mut [u8]) -> Outcome<usize> {
        let mut position = lock(&self.position);
        let length = self.read_at(*position, out)?;
        *position += length as u64;
        Ok(length)
    }
}

/// An entry of a directory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) nid: u64,
    pub(crate) file_type: FileType,
    pub(crate) name: Vec<u8>,
}

/// `nacre_dir`
pub(crate) struct OpenDir {
    image: Arc<OpenImage>,
    inode: Inode,
    listing: Mutex<Listing>,
}

/// How far a directory was read.
#[derive(Default)]
struct Listing {
    next: u64,
    read: VecDeque<Entry>,
}

impl OpenDir {
    pub(crate) fn open(image: &Arc<OpenImage>, path: &[u8]) -> Outcome<Self> {
        let inode = image.find(path, true)?;
        image.files.list(&inode, 0, |_| false).map_err(|error| Failure::from(error).about(path))?;
        Ok(Self { image: Arc::clone(image), inode, listing: Mutex::default() })
    }

    pub(crate) fn next(&self) -> Outcome<Option<Entry>> {
        let mut listing = lock(&self.listing);
        let Listing { next, read } = &mut *listing;
        if read.is_empty() {
            self.image.files.list(&self.inode, *next, |entry| {
                read.push_back(Entry { nid: entry.nid, file_type: entry.file_type, name: entry.name.to_vec() });
                *next = entry.next;
                read.len() < LISTED
            })?;
        }
        Ok(read.pop_front())
    }

    pub(crate) fn rewind(&self) {
        *lock(&self.listing) = Listing::default();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
