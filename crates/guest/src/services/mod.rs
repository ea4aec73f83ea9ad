//! What the guest offers to its other programs, as the confidential data hub's clients call it: ttrpc on a unix socket.
//!
//! | service | method | request → reply |
//! |---|---|---|
//! | `api.ImagePullService` | `PullImage` | image_url = 1, bundle_path = 2 → manifest_digest = 1 |
//! | `api.GetResourceService` | `GetResource` | ResourcePath = 1 → Resource = 1 |
//! | `keyprovider.KeyProviderService` | `UnWrapKey` | JSON = 1 → JSON = 1 |
//!
//! Whoever may open the socket is trusted with what it answers: it lies in a directory of root's, mode 0700.

mod client;
mod message;

use std::{
    collections::HashMap,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use nacre_core::SecretBytes;
use ttrpc::{Code, MethodHandler, Request, Response, TtrpcContext};

pub use client::{CallError, ServicesClient};
use message::Message;

#[doc(hidden)]
pub use message::fuzz as fuzz_message;

/// What the services do for their callers. Errors are texts: they go to another program.
pub trait Guest: Send + Sync {
    /// Pulls an image and makes a bundle of it; gives the manifest's digest.
    ///
    /// # Errors
    /// Why not, in full.
    fn pull_image(&self, image: &str, bundle: &Path) -> Result<String, String>;

    /// Releases a broker's resource, `kbs:///repository/type/tag` or without the scheme.
    ///
    /// # Errors
    /// Why not, in full.
    fn resource(&self, path: &str) -> Result<SecretBytes, String>;

    /// Unwraps the key of an encrypted layer: `annotation` is the wrapped key, the answer ocicrypt's private options.
    ///
    /// # Errors
    /// Why not, in full.
    fn unwrap_key(&self, annotation: &[u8]) -> Result<SecretBytes, String>;
}

/// Why the services do not run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The socket's place cannot be used.
    #[error("{path}: {what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The socket, or its directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Something that is no socket lies in its place.
    #[error("{path} is there and is no socket")]
    NotASocket {
        /// The socket.
        path: PathBuf,
    },
    /// ttrpc could not start.
    #[error("{path}: serve: {source}")]
    Serve {
        /// The socket.
        path: PathBuf,
        /// Its complaint.
        source: ttrpc::Error,
    },
}

/// Serves until the value is dropped.
pub struct Services {
    server: Option<ttrpc::Server>,
    socket: PathBuf,
}

impl Services {
    /// Listens at a unix socket; one that a former process left there is replaced.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn start(socket: &Path, guest: Arc<dyn Guest>) -> Result<Self, ServiceError> {
        let dir = prepare(socket)?;
        let serve = |source| ServiceError::Serve { path: socket.into(), source };
        let failed = |what| move |source| ServiceError::Socket { what, path: socket.into(), source };
        // It is bound where nobody else can open it, and takes its place when it is closed to others.
        let private = Private::make(dir).map_err(failed("bind"))?;
        let bound = private.0.join("s");
        let mut server = ttrpc::Server::new()
            .bind(&format!("unix://{}", bound.display()))
            .map_err(serve)?
            .register_service(methods(&guest));
        std::fs::set_permissions(&bound, std::fs::Permissions::from_mode(0o600)).map_err(failed("close to others"))?;
        std::fs::rename(&bound, socket).map_err(failed("put in its place"))?;
        server.start().map_err(serve)?;
        Ok(Self { server: Some(server), socket: socket.into() })
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
            // A socket that nobody listens at says less than none. Where it is gone already, that is as well.
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// A directory of our own for a moment.
struct Private(PathBuf);

impl Private {
    fn make(dir: &Path) -> std::io::Result<Self> {
        let path = dir.join(format!(".nacre-{}", std::process::id()));
        // A former process of this number may have been killed here.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Makes the socket's directory, and makes sure that nothing but a former process's socket is in its place.
fn prepare(socket: &Path) -> Result<&Path, ServiceError> {
    let dir = match socket.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    if !dir.exists() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| ServiceError::Socket {
            what: "make the socket's directory",
            path: dir.into(),
            source,
        })?;
    }
    match std::fs::symlink_metadata(socket) {
        Ok(metadata) if !metadata.file_type().is_socket() => Err(ServiceError::NotASocket { path: socket.into() }),
        _ => Ok(dir),
    }
}

const PULL_IMAGE: (&str, &str) = ("api.ImagePullService", "PullImage");
const GET_RESOURCE: (&str, &str) = ("api.GetResourceService", "GetResource");
const UNWRAP_KEY: (&str, &str) = ("keyprovider.KeyProviderService", "UnWrapKey");

type Action = fn(&dyn Guest, &Message) -> Result<SecretBytes, String>;

struct Method {
    guest: Arc<dyn Guest>,
    action: Action,
}

impl MethodHandler for Method {
    fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<()> {
        let answer = Message::decode(&request.payload).and_then(|message| (self.action)(self.guest.as_ref(), &message));
        let mut response = Response::new();
        match answer {
            Ok(field) => {
                response.set_status(ttrpc::get_status(Code::OK, ""));
                response.payload = message::encode(field.expose());
            }
            Err(reason) => {
                tracing::warn!(service = request.service, method = request.method, "{reason}");
                response.set_status(ttrpc::get_status(Code::INTERNAL, reason));
            }
        }
        context.respond(context.mh.stream_id, response)
    }
}

fn methods(guest: &Arc<dyn Guest>) -> HashMap<String, Box<dyn MethodHandler + Send + Sync>> {
    let table: [((&str, &str), Action); 3] = [
        (PULL_IMAGE, |guest, message| {
            let digest = guest.pull_image(message.string(1)?, Path::new(message.string(2)?))?;
            Ok(SecretBytes::new(digest.into_bytes()))
        }),
        (GET_RESOURCE, |guest, message| guest.resource(message.string(1)?)),
        (UNWRAP_KEY, |guest, message| unwrap_key(guest, message.bytes(1))),
    ];
    let method = |((service, name), action): ((&str, &str), Action)| {
        let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Method { guest: guest.clone(), action });
        (format!("/{service}/{name}"), method)
    };
    table.into_iter().map(method).collect()
}

/// `{"op":"keyunwrap","keyunwrapparams":{"annotation":"<base64>"}}` → `{"keyunwrapresults":{"optsdata":[…]}}`
fn unwrap_key(guest: &dyn Guest, json: &[u8]) -> Result<SecretBytes, String> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    #[derive(serde::Deserialize)]
    struct Input {
        op: String,
        keyunwrapparams: Params,
    }
    #[derive(serde::Deserialize)]
    struct Params {
        annotation: String,
    }
    let input: Input = serde_json::from_slice(json).map_err(|error| format!("key provider request: {error}"))?;
    if input.op != "keyunwrap" {
        return Err(format!("key provider operation '{:.40}': only keyunwrap is served", input.op));
    }
    let annotation = STANDARD
        .decode(&input.keyunwrapparams.annotation)
        .map_err(|error| format!("key provider request: annotation: {error}"))?;
    let options = guest.unwrap_key(&annotation)?;
    // An array of numbers, which every peer reads. One allocation, so that no copy of the key stays behind.
    let mut out = Vec::with_capacity(options.len() * 4 + 64);
    out.extend_from_slice(br#"{"keyunwrapresults":{"optsdata":["#);
    for (position, byte) in options.expose().iter().enumerate() {
        use std::io::Write as _;
        let written = if position == 0 { write!(out, "{byte}") } else { write!(out, ",{byte}") };
        debug_assert!(written.is_ok(), "writing to a vector does not fail");
    }
    out.extend_from_slice(b"]}}");
    Ok(SecretBytes::new(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake;

    impl Guest for Fake {
        fn pull_image(&self, image: &str, bundle: &Path) -> Result<String, String> {
            if image == "bad" { Err("signature: no".into()) } else { Ok(format!("{image} at {}", bundle.display())) }
        }

        fn resource(&self, path: &str) -> Result<SecretBytes, String> {
            Ok(SecretBytes::new(path.as_bytes().to_vec()))
        }

        fn unwrap_key(&self, annotation: &[u8]) -> Result<SecretBytes, String> {
            Ok(SecretBytes::new(annotation.to_vec()))
        }
    }

    fn call(client: &ttrpc::Client, service: &str, method: &str, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        let mut request = Request::new();
        request.service = service.into();
        request.method = method.into();
        request.payload = payload;
        request.timeout_nano = 5_000_000_000;
        client.request(request).map(|response| response.payload).map_err(|error| error.to_string())
    }

    #[test]
    fn clients_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/cdh.sock");
        for _ in 0..2 {
            let services = Services::start(&socket, Arc::new(Fake)).unwrap();
            let client = ttrpc::Client::connect(&format!("unix://{}", socket.display())).unwrap();
            let mut request = message::encode(b"image");
            request.extend([0x12, 2, b'/', b'b']);
            let answer = call(&client, "api.ImagePullService", "PullImage", request).unwrap();
            assert_eq!(Message::decode(&answer).unwrap().string(1).unwrap(), "image at /b");
            let error = call(&client, "api.ImagePullService", "PullImage", message::encode(b"bad")).unwrap_err();
            assert!(error.contains("signature: no"), "{error}");
            let answer = call(&client, "api.GetResourceService", "GetResource", message::encode(b"a/b/c")).unwrap();
            assert_eq!(Message::decode(&answer).unwrap().bytes(1), b"a/b/c");
            let json = br#"{"op":"keyunwrap","keywrapparams":{},"keyunwrapparams":{"dc":null,"annotation":"AQID"}}"#;
            let answer = call(&client, "keyprovider.KeyProviderService", "UnWrapKey", message::encode(json)).unwrap();
            assert_eq!(
                Message::decode(&answer).unwrap().string(1).unwrap(),
                r#"{"keyunwrapresults":{"optsdata":[1,2,3]}}"#
            );
            for bad in [&b"\xff"[..], b"\x0a\x01{"] {
                assert!(call(&client, "keyprovider.KeyProviderService", "UnWrapKey", bad.to_vec()).is_err());
            }
            drop(services);
            assert_eq!(std::fs::read_dir(dir.path().join("run")).unwrap().count(), 0, "nothing stays");
        }
    }

    #[test]
    fn our_own_client_is_one_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("cdh.sock");
        let error = ServicesClient::connect(&socket).err().unwrap().to_string();
        assert!(error.contains("cdh.sock"), "{error}");
        let _services = Services::start(&socket, Arc::new(Fake)).unwrap();
        let client = ServicesClient::connect(&socket).unwrap();
        assert_eq!(client.pull_image("image", Some(Path::new("/b"))).unwrap(), "image at /b");
        assert_eq!(client.pull_image("image", None).unwrap(), "image at ");
        let error = client.pull_image("bad", None).unwrap_err().to_string();
        assert!(error.contains("signature: no"), "{error}");
        assert_eq!(client.resource("kbs:///a/b/c").unwrap().expose(), b"kbs:///a/b/c");
    }

    #[test]
    fn the_socket_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _services = Services::start(&socket, Arc::new(Fake)).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(names, ["socket"], "where it was bound is gone");
    }

    #[test]
    fn a_file_in_the_sockets_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Services::start(&path, Arc::new(Fake)), Err(ServiceError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
