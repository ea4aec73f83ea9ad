//! Where an image is and how it is asked for, such that another process can go on asking.

use std::{
    fmt, fs,
    io::Read as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use nacre_core::{Digest, NoProgress, SecretBytes};
use nacre_lazy::{
    artifact::ImageBlobs,
    source::{BlobId, Blobs, SourceError},
};
use nacre_oci::{
    manifest::Descriptor,
    reference::Location,
    registry::{Client, ClientConfig, CredentialStore, DockerSource, RegistriesConf},
    source::{ImageSource, TransportError},
    transport::open_local_source,
};
use serde::{Deserialize, Serialize};

/// The most bytes of a file of credentials that are looked at to see whether it is another one.
const AUTH_FILE_LIMIT: u64 = 4 << 20;

/// How registries are spoken to: nothing in it depends on a process's environment or directory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connection {
    /// The client's settings, [settled](ClientConfig::settled).
    pub client: ClientConfig,
    /// registries.conf, as it was read.
    pub registries: RegistriesConf,
    /// Files of credentials, read again by whoever asks. Helpers that they name run in that process's environment.
    pub auth_files: Vec<PathBuf>,
}

/// An image's place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// A location with an absolute path, as text.
    pub location: String,
    /// How it is reached, where it is at a registry.
    pub connection: Connection,
}

impl Origin {
    /// That of a location.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn new(location: &Location, connection: &Connection) -> std::io::Result<Self> {
        let mut location = location.clone();
        match &mut location {
            Location::Docker(_) => {}
            Location::OciDir { path, .. }
            | Location::OciArchive { path, .. }
            | Location::DockerArchive { path, .. }
            | Location::Dir(path) => *path = std::path::absolute(&*path)?,
        }
        Ok(Self { location: location.to_string(), connection: connection.clone() })
    }
}

/// What tells clients apart.
#[derive(PartialEq)]
struct Kind {
    connection: Connection,
    /// Of the files, whose content may change.
    auth: Vec<Option<Digest>>,
    /// Of credentials that a broker released.
    released: Option<Digest>,
}

/// The registry clients of a process: images that are asked for in the same way share one, with its connections and tokens.
#[derive(Default)]
pub struct Clients(Mutex<Vec<(Kind, Weak<Client>)>>);

impl Clients {
    /// The client of a connection. `released` are credentials that take the place of the files.
    ///
    /// # Errors
    /// [`TransportError`]
    pub fn of(&self, connection: &Connection, released: Option<&SecretBytes>) -> Result<Arc<Client>, TransportError> {
        let auth = connection.auth_files.iter().map(|path| {
            let mut bytes = zeroize::Zeroizing::new(Vec::new());
            fs::File::open(path).and_then(|file| file.take(AUTH_FILE_LIMIT).read_to_end(&mut bytes)).ok()?;
            Some(Digest::sha256(&bytes))
        });
        let released_digest = released.map(|released| Digest::sha256(released.expose()));
        let kind = Kind { connection: connection.clone(), auth: auth.collect(), released: released_digest };
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|(_, client)| client.strong_count() > 0);
        if let Some(client) = clients.iter().find(|(known, _)| *known == kind).and_then(|(_, client)| client.upgrade())
        {
            return Ok(client);
        }
        let credentials = match released {
            Some(released) => CredentialStore::from_bytes("released credentials", released)?,
            None => CredentialStore::from_files(&connection.auth_files)?,
        };
        let (config, registries) = (connection.client.clone(), connection.registries.clone());
        let client = Arc::new(Client::new(config, registries, credentials, Arc::new(NoProgress))?);
        clients.push((kind, Arc::downgrade(&client)));
        Ok(client)
    }
}

/// The blobs of an image whose place may not be reachable yet: it is tried with each read.
pub(super) struct LateBlobs {
    pub(super) origin: Origin,
    pub(super) released: Option<SecretBytes>,
    pub(super) clients: Arc<Clients>,
    pub(super) descriptors: Vec<Descriptor>,
    opened: Mutex<Option<Opened>>,
}

#[derive(Clone)]
struct Opened {
    source: Arc<dyn ImageSource>,
    blobs: Arc<ImageBlobs>,
    /// Kept, so that others who ask in the same way find it.
    _client: Option<Arc<Client>>,
}

impl LateBlobs {
    pub(super) fn new(
        origin: Origin,
        released: Option<SecretBytes>,
        clients: Arc<Clients>,
        descriptors: Vec<Descriptor>,
    ) -> Self {
        Self { origin, released, clients, descriptors, opened: Mutex::default() }
    }

    fn opened(&self) -> Result<Opened, TransportError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = &*opened {
            return Ok(opened.clone());
        }
        let wrong = |reason: String| TransportError::Config { path: self.origin.location.clone().into(), reason };
        let location: Location = self.origin.location.parse().map_err(|error| wrong(format!("{error}")))?;
        let (source, client): (Arc<dyn ImageSource>, _) = match &location {
            Location::Docker(reference) => {
                let client = self.clients.of(&self.origin.connection, self.released.as_ref())?;
                (Arc::new(DockerSource::new(&client, reference)?), Some(client))
            }
            local => (Arc::from(open_local_source(local)?), None),
        };
        let blobs = Arc::new(ImageBlobs::of(Arc::clone(&source), &self.descriptors));
        Ok(opened.insert(Opened { source, blobs, _client: client }).clone())
    }

    /// Where the image is.
    pub(super) fn source(&self) -> Result<Arc<dyn ImageSource>, TransportError> {
        Ok(self.opened()?.source)
    }
}

impl fmt::Debug for LateBlobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LateBlobs({})", self.origin.location)
    }
}

impl Blobs for LateBlobs {
    fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8], attempt: u32) -> Result<(), SourceError> {
        let opened = self.opened().map_err(|error| SourceError {
            blob: *blob,
            range: offset..offset + out.len() as u64,
            reason: error.to_string(),
            temporary: true,
        })?;
        opened.blobs.read(blob, offset, out, attempt)
    }
}
