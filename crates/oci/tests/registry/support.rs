//! What the tests of this folder share.

use std::{
    io::Read as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use nacre_core::{Digest, Progress, Task};
use nacre_oci::{
    manifest::{Descriptor, media},
    reference::ImageRef,
    registry::{Client, ClientConfig, CredentialStore, DockerSink, DockerSource, FromEnv, ProxyConfig, RegistriesConf},
    source::{ImageSource as _, TransportError},
};

/// A configuration that waits little, takes nothing from the machine, and speaks plain HTTP.
pub(crate) fn quick() -> ClientConfig {
    ClientConfig {
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(500),
        response_timeout: Duration::from_secs(5),
        retries: 3,
        first_backoff: Duration::from_millis(2),
        longest_backoff: Duration::from_millis(10),
        insecure: true,
        system_roots: false,
        certs_dirs: Vec::new(),
        proxy: ProxyConfig { from_env: FromEnv(false), ..ProxyConfig::default() },
        ..ClientConfig::default()
    }
}

/// Remembers the notes.
#[derive(Default)]
pub(crate) struct Notes(Mutex<Vec<String>>);

impl Notes {
    pub(crate) fn all(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

impl Progress for Notes {
    fn begin(&self, _name: &str, _total: Option<u64>) -> Box<dyn Task> {
        Box::new(nacre_core::NoProgress)
    }

    fn note(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

pub(crate) fn client(config: ClientConfig) -> Client {
    client_with(config, "", CredentialStore::anonymous()).0
}

pub(crate) fn client_with(config: ClientConfig, conf: &str, credentials: CredentialStore) -> (Client, Arc<Notes>) {
    let notes = Arc::new(Notes::default());
    let conf = RegistriesConf::parse(conf.as_bytes()).unwrap();
    (Client::new(config, conf, credentials, notes.clone()).unwrap(), notes)
}

pub(crate) fn source(client: &Client, name: &str) -> DockerSource {
    DockerSource::new(client, &name.parse::<ImageRef>().unwrap()).unwrap()
}

pub(crate) fn sink(client: &Client, name: &str) -> DockerSink {
    DockerSink::new(client, &name.parse::<ImageRef>().unwrap()).unwrap()
}

/// Bytes that do not repeat, the same each time.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

pub(crate) fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor::of(media::OCI_LAYER, bytes)
}

/// Reads a blob to its end, as a pull does; errors of opening and of reading alike.
pub(crate) fn fetch(source: &DockerSource, descriptor: &Descriptor) -> Result<Vec<u8>, TransportError> {
    let mut bytes = Vec::new();
    match source.blob(descriptor)?.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.downcast::<TransportError>().unwrap()),
    }
}

/// A small manifest.
pub(crate) fn manifest() -> Vec<u8> {
    let config = Descriptor::of(media::OCI_CONFIG, b"{}");
    let value = serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": [],
    });
    value.to_string().into_bytes()
}

pub(crate) fn sha(bytes: &[u8]) -> Digest {
    Digest::sha256(bytes)
}
