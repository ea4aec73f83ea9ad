//! The demo's props: registry, broker, shipped images, and guests that are started.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::Context as _;
use nacre_attest::{initdata::InitData, sim};
use nacre_broker::{Broker, Handle, InitOptions, Settings, Transport, serve};
use nacre_core::{Algorithm, Digest, NoProgress, SecretArray, jose::PrivateKey};
use nacre_guest::{config::INIT_DATA_ENTRY, store::memory_filesystem};
use nacre_oci::{
    copy::{self, CopiedImage, CopyOptions, EncryptLayers, Sign, SigningKey, Source},
    crypt::Recipients,
    reference::{ImageRef, Location},
    registry::{Client, ClientConfig, CredentialStore, RegistriesConf},
    transport::{open_sink, open_source},
    trust::sign::CosignKey,
};
use nacre_registry::Registry;
use serde_json::json;

use super::{guest::Report, rootfs};

/// The tag of the image as it should be.
pub(super) const SIGNED: &str = "1.0";
/// The tag of the one that nobody signed.
pub(super) const UNSIGNED: &str = "unsigned";
/// The broker's name of the image key.
pub(super) const KEY_ID: &str = "kbs:///demo/image-key/1";
const REPOSITORY: &str = "demo/app";

/// Everything that the demo needs.
pub(super) struct Stage {
    dir: Place,
    registry: Registry,
    broker: Arc<Broker>,
    handle: Handle,
    shipped: CopiedImage,
    signer: String,
    measurement: String,
    init_data_digest: String,
}

enum Place {
    Temporary(tempfile::TempDir),
    Named(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Named(path) => path,
        }
    }
}

/// How a guest ended.
pub(super) enum Outcome {
    /// The container ran to its end.
    Ran { report: Report, output: String },
    /// It never did.
    Refused { error: String, code: Option<i32> },
}

impl Outcome {
    /// What the container printed.
    pub(super) fn output(&self) -> &str {
        match self {
            Self::Ran { output, .. } => output,
            Self::Refused { .. } => "",
        }
    }
}

impl Stage {
    /// Sets up registry and broker, builds and ships the images.
    pub(super) fn set(dir: Option<&Path>, allow_tmpfs: bool) -> anyhow::Result<Self> {
        let dir = match dir {
            Some(path) => {
                fs::create_dir(path)
                    .with_context(|| format!("{}: make the demo's directory (a new one)", path.display()))?;
                Place::Named(path.canonicalize()?)
            }
            None => {
                let parent = temporary_directory(allow_tmpfs);
                Place::Temporary(tempfile::Builder::new().prefix("nacre-demo-").tempdir_in(parent)?)
            }
        };
        let path = dir.path();
        // A container's own root may belong to another user than its host directories.
        fs::set_permissions(path, fs::Permissions::from_mode(0o711))?;
        fs::create_dir(path.join("guest"))?;
        rootfs::write_layout(&path.join("layout"))?;

        let registry = Registry::memory().context("start the registry")?;
        let settings = Settings { allow_simulated: true, ..Settings::default() };
        let options = InitOptions { names: vec!["127.0.0.1".into()], settings };
        let broker = Arc::new(Broker::init(&path.join("broker"), &options)?);
        let handle = serve(broker.clone(), ([127, 0, 0, 1], 0).into(), Transport::Tls)?;

        let image_key = SecretArray::<32>::random();
        let key_uri: nacre_core::ResourceUri = KEY_ID.parse()?;
        broker.put_resource(key_uri.path(), image_key.expose())?;
        let cosign = CosignKey::generate();
        let mut recipients = Recipients::new();
        recipients.add_broker_key(key_uri, image_key);
        let shipped = ship(path, &registry, SIGNED, &recipients, Some(&cosign))?;
        ship(path, &registry, UNSIGNED, &recipients, None)?;

        let public = cosign.public_pem()?;
        let init_data = init_data(&registry, &broker, &handle, &public, allow_tmpfs)?;
        fs::write(path.join("guest/initdata.toml"), init_data.text())?;
        let platform = PrivateKey::generate_p256();
        write_secret(&path.join("guest/platform.key"), platform.to_pkcs8_pem()?.as_bytes())?;
        broker.add_sim_platform_key(&platform.public())?;
        let measurement = sim::measure(Path::new("/proc/self/exe"))?.hex();
        let init_data_digest = hex(&init_data.fit::<48>());
        broker.add_reference_value("sim.measurement", vec![json!(measurement)], None)?;
        broker.add_reference_value("sim.init_data", vec![json!(init_data_digest)], None)?;
        let signer = format!("public key {}", Digest::sha256(public.as_bytes()).short());
        Ok(Self { dir, registry, broker, handle, shipped, signer, measurement, init_data_digest })
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(super) fn broker(&self) -> &Broker {
        &self.broker
    }

    pub(super) fn broker_url(&self) -> String {
        self.handle.url()
    }

    pub(super) fn shipped(&self) -> &CopiedImage {
        &self.shipped
    }

    pub(super) fn signer(&self) -> &str {
        &self.signer
    }

    pub(super) fn measurement(&self) -> &str {
        &self.measurement
    }

    pub(super) fn init_data_digest(&self) -> &str {
        &self.init_data_digest
    }

    /// The image's name under a tag.
    pub(super) fn reference(&self, tag: &str) -> String {
        format!("docker://{}/{REPOSITORY}:{tag}", self.registry.host())
    }

    /// The program that the broker expects.
    pub(super) fn guest_program(&self) -> PathBuf {
        "/proc/self/exe".into()
    }

    /// The same program, with a byte more behind its end: it works as before, but is not what the broker expects.
    pub(super) fn altered_program(&self) -> anyhow::Result<PathBuf> {
        let path = self.dir.path().join("guest/altered");
        let mut program = fs::read("/proc/self/exe")?;
        program.push(0);
        fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(&path)?.write_all(&program)?;
        Ok(path)
    }

    /// Starts a guest with a store of its own, and waits for its end.
    pub(super) fn run_guest(&self, program: &Path, tag: &str) -> anyhow::Result<Outcome> {
        let dir = self.dir.path().join("guest");
        let report = dir.join("report.json");
        if report.exists() {
            fs::remove_file(&report)?;
        }
        let output = Command::new(program)
            .args(["--log", "error", "demo-guest", "--guest-init-data"])
            .arg(dir.join("initdata.toml"))
            .arg("--platform-key")
            .arg(dir.join("platform.key"))
            .arg("--report")
            .arg(&report)
            .arg(self.reference(tag))
            .stdin(Stdio::null())
            .output()
            .context("start the guest")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() {
            let report = serde_json::from_slice(&fs::read(&report)?)?;
            return Ok(Outcome::Ran { report, output: text(&output.stdout) });
        }
        let error = text(&output.stderr);
        let error = error.strip_prefix("nacre: ").unwrap_or(&error).to_owned();
        Ok(Outcome::Refused { error, code: output.status.code() })
    }

    /// Changes one bit in the middle of the top layer's blob.
    pub(super) fn flip_bit(&self) -> anyhow::Result<()> {
        let layer = self.shipped.layers.last().context("the image has layers")?.to;
        let mut blob = self.registry.blob(&layer)?.context("the registry has the layer")?;
        let middle = blob.len() / 2;
        if let Some(byte) = blob.get_mut(middle) {
            *byte ^= 1;
        }
        Ok(self.registry.replace_blob(&layer, &blob)?)
    }

    /// Undoes it.
    pub(super) fn mend(&self) -> anyhow::Result<()> {
        // It is its own inverse.
        self.flip_bit()
    }

    /// Stops everything, and removes it unless it is to be kept; gives the place where it then is.
    pub(super) fn clear(self, keep: bool) -> anyhow::Result<Option<PathBuf>> {
        self.handle.shutdown();
        match (self.dir, keep) {
            (Place::Temporary(dir), true) => Ok(Some(dir.keep())),
            (Place::Named(path), true) => Ok(Some(path)),
            (Place::Temporary(dir), false) => {
                dir.close()?;
                Ok(None)
            }
            (Place::Named(path), false) => {
                fs::remove_dir_all(path)?;
                Ok(None)
            }
        }
    }
}

/// The system's temporary directory, or where that lies in memory, the one that does not: images do not belong in memory.
fn temporary_directory(allow_tmpfs: bool) -> PathBuf {
    let usual = std::env::temp_dir();
    let in_memory = |dir: &Path| memory_filesystem(dir).is_ok_and(|filesystem| filesystem.is_some());
    let other = Path::new("/var/tmp");
    if !allow_tmpfs && in_memory(&usual) && other.is_dir() && !in_memory(other) { other.into() } else { usual }
}

/// Copies the built image to the registry, encrypted, and signed where there is a key.
fn ship(
    dir: &Path,
    registry: &Registry,
    tag: &str,
    recipients: &Recipients,
    key: Option<&CosignKey>,
) -> anyhow::Result<CopiedImage> {
    let config = ClientConfig { insecure_registries: vec![registry.host()], ..ClientConfig::default() };
    let client = Client::new(config, RegistriesConf::empty(), CredentialStore::anonymous(), Arc::new(NoProgress))?;
    let from = Location::OciDir { path: dir.join("layout"), name: Some("app".into()) };
    let to: ImageRef = format!("{}/{REPOSITORY}:{tag}", registry.host()).parse()?;
    let source = open_source(&from, &client)?;
    let sink = open_sink(&Location::Docker(to), &client)?;
    let layers = EncryptLayers::All;
    let options = CopyOptions {
        encrypt: Some((recipients, &layers)),
        sign: key.map(|key| Sign { keys: vec![SigningKey::Cosign(key)], identity: None }),
        ..CopyOptions::default()
    };
    let copied = copy::copy(&Source::without_policy(&*source)?, &*sink, &options)?;
    copied.images.into_iter().next().context("one image was copied")
}

/// What the guest is measured by: its configuration, with the broker's certificate and token key, and the policy.
fn init_data(
    registry: &Registry,
    broker: &Broker,
    handle: &Handle,
    cosign: &str,
    allow_tmpfs: bool,
) -> anyhow::Result<InitData> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut config = toml::Table::new();
    let table = |pairs: Vec<(&str, toml::Value)>| -> toml::Value {
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<toml::Table>().into()
    };
    let broker = vec![
        ("url", handle.url().into()),
        ("certificate", broker.certificate_pem().into()),
        ("token_key", broker.token_key().to_pem()?.into()),
    ];
    config.insert("allow_tmpfs".into(), allow_tmpfs.into());
    config.insert("broker".into(), table(broker));
    config.insert("trust".into(), table(vec![("policy", "init-data:policy.json".into())]));
    config.insert("registry".into(), table(vec![("insecure_registries", vec![registry.host()].into())]));
    let requirement = json!({ "type": "sigstoreSigned", "keyData": STANDARD.encode(cosign) });
    let policy = json!({
        "default": [{ "type": "reject" }],
        "transports": { "docker": { format!("{}/{REPOSITORY}", registry.host()): [requirement] } },
    });
    let data = BTreeMap::from([
        (INIT_DATA_ENTRY.to_owned(), toml::to_string(&config)?),
        ("policy.json".to_owned(), serde_json::to_string_pretty(&policy)?),
    ]);
    Ok(InitData::new(Algorithm::Sha384, data)?)
}

fn write_secret(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(bytes)?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
