//! The daemon as the guest's other programs know it: configured by init data, it attests, pulls, mounts, releases and unwraps for them.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use nacre_attest::{initdata::InitData, sim};
use nacre_broker::{Broker, Handle, InitOptions, PutOptions, Revocation, Settings, Transport, serve};
use nacre_core::{
    Algorithm, Digest, KeySource, KeySourceError, NoProgress, ResourceUri, SecretArray, SecretBytes, SystemClock,
    jose::PrivateKey,
};
use nacre_guest::{
    config::INIT_DATA_ENTRY,
    images::{Images, PullOptions, Trust},
    store::{Marks, Store},
};
use nacre_lazy::build::LazyRemake;
use nacre_oci::{
    copy::{self, CopyOptions, EncryptLayers, Source},
    crypt::{Keyring, Recipients, provider::Providers},
    reference::Location,
    registry::{Client, ClientConfig, CredentialStore, DockerSource, RegistriesConf},
    source::ImageSource as _,
    transport::{open_sink, open_source},
    trust::{AdmissionRules, LookasideConfig, Policy},
    unpack::Limits,
};
use nacre_registry::Registry;
use nacre_testkit::{Compression, Entry, Image, Layer, require, root, run, tiny_rootfs};
use serde_json::json;

const KEY: &str = "kbs:///default/image-key/app";
const LAZY_KEY: &str = "kbs:///default/image-key/lazy";
const MESSAGE: &str = "only the guest reads this\n";

/// A broker, a registry with an encrypted image, and a daemon.
struct Scene {
    dir: tempfile::TempDir,
    registry: Registry,
    broker: Arc<Broker>,
    _handle: Handle,
    image: Image,
    client: Client,
    /// That of the lazy image, when it was shipped.
    lazy_key: std::sync::OnceLock<SecretArray<32>>,
}

struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn call(&self, method: &str, fields: &[&[u8]]) -> Result<Vec<u8>, String> {
        let (service, method) = method.split_once('/').unwrap();
        let mut payload = Vec::new();
        for (number, field) in fields.iter().enumerate() {
            payload.push(u8::try_from(number + 1).unwrap() << 3 | 2);
            assert!(field.len() < 1 << 14);
            payload.extend([field.len() & 0x7f | 0x80, field.len() >> 7].map(|byte| u8::try_from(byte).unwrap()));
            payload.extend_from_slice(field);
        }
        let client = ttrpc::Client::connect(&format!("unix://{}", self.socket.display())).map_err(|e| e.to_string())?;
        let mut request = ttrpc::Request::new();
        (request.service, request.method, request.payload) = (service.into(), method.into(), payload);
        request.timeout_nano = 60_000_000_000;
        let answer = client.request(request).map_err(|error| error.to_string())?.payload;
        // One field, number 1; its length takes one byte or two.
        assert_eq!(answer[0], 0x0a);
        Ok(answer[if answer[1] < 0x80 { 2 } else { 3 }..].to_vec())
    }

    /// Ends it by a signal; it must do so in its own way, and leave no socket.
    fn end(mut self) {
        run(Command::new("kill").arg(self.child.id().to_string()));
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.socket.exists());
    }
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let registry = Registry::memory().unwrap();
        let settings = Settings { allow_simulated: true, ..Settings::default() };
        let options = InitOptions { names: vec!["127.0.0.1".into()], settings };
        let broker = Arc::new(Broker::init(&dir.path().join("broker"), &options).unwrap());
        let handle = serve(broker.clone(), ([127, 0, 0, 1], 0).into(), Transport::Tls).unwrap();
        let config = ClientConfig { insecure_registries: vec![registry.host()], ..ClientConfig::default() };
        let client =
            Client::new(config, RegistriesConf::empty(), CredentialStore::anonymous(), Arc::new(NoProgress)).unwrap();
        let scene = Self {
            image: image(dir.path()),
            dir,
            registry,
            broker,
            client,
            lazy_key: std::sync::OnceLock::new(),
            _handle: handle,
        };
        scene.ship();
        scene.measure(&scene._handle.url());
        scene
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self) -> String {
        format!("{}/t/secret:1", self.registry.host())
    }

    /// Encrypts the image for a key of the broker, and puts it into the registry.
    fn ship(&self) {
        self.image.write_layout(&self.at("layout"), "v1");
        let key = SecretArray::<32>::random();
        let uri: ResourceUri = KEY.parse().unwrap();
        self.broker.put_resource(uri.path(), key.expose()).unwrap();
        let mut recipients = Recipients::new();
        recipients.add_broker_key(uri, key);
        let from = Location::OciDir { path: self.at("layout"), name: Some("v1".into()) };
        let source = open_source(&from, &self.client).unwrap();
        let sink = open_sink(&Location::Docker(self.name().parse().unwrap()), &self.client).unwrap();
        let layers = EncryptLayers::All;
        let options = CopyOptions { encrypt: Some((&recipients, &layers)), ..CopyOptions::default() };
        copy::copy(&Source::without_policy(&*source).unwrap(), &*sink, &options).unwrap();
    }

    /// The same image as a lazy one.
    fn ship_lazy(&self, name: &str) {
        let key = SecretArray::<32>::random();
        let uri: ResourceUri = LAZY_KEY.parse().unwrap();
        self.broker.put_resource(uri.path(), key.expose()).unwrap();
        let copy = SecretArray::fill(|slot| slot.copy_from_slice(key.expose()));
        let _ = self.lazy_key.set(copy);
        let mut recipients = Recipients::new();
        recipients.add_broker_key(uri, key);
        let from = Location::OciDir { path: self.at("layout"), name: Some("v1".into()) };
        let source = open_source(&from, &self.client).unwrap();
        let sink = open_sink(&Location::Docker(name.parse().unwrap()), &self.client).unwrap();
        let (layers, threads) = (EncryptLayers::All, 2);
        let remake = LazyRemake {
            domain: None,
            level: 3,
            chunk: 64 << 10,
            threads,
            limits: Limits::default(),
            shared: Vec::new(),
            reports: Mutex::default(),
        };
        let options =
            CopyOptions { encrypt: Some((&recipients, &layers)), remake: Some(&remake), ..CopyOptions::default() };
        copy::copy(&Source::without_policy(&*source).unwrap(), &*sink, &options).unwrap();
    }

    /// Writes init data and a platform key, and tells the broker to expect the daemon with them.
    fn measure(&self, url: &str) {
        let config = toml::toml_of(&[
            (
                "broker",
                json!({
                    "url": url,
                    "certificate": self.broker.certificate_pem(),
                    "token_key": self.broker.token_key().to_pem().unwrap(),
                    "events": self.at("events"),
                }),
            ),
            ("trust", json!({ "policy": "init-data:policy.json" })),
            ("registry", json!({ "insecure_registries": [self.registry.host()] })),
        ]);
        let data = BTreeMap::from([
            (INIT_DATA_ENTRY.to_owned(), config),
            ("policy.json".to_owned(), json!({ "default": [{ "type": "insecureAcceptAnything" }] }).to_string()),
        ]);
        let init_data = InitData::new(Algorithm::Sha384, data).unwrap();
        fs::write(self.at("initdata.toml"), init_data.text()).unwrap();
        let platform = PrivateKey::generate_p256();
        fs::write(self.at("platform.key"), platform.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
        self.broker.add_sim_platform_key(&platform.public()).unwrap();
        let measurement = sim::measure(Path::new(env!("CARGO_BIN_EXE_nacre-guestd"))).unwrap().hex();
        self.broker.add_reference_value("sim.measurement", vec![json!(measurement)], None).unwrap();
        let digest: String = init_data.fit::<48>().iter().map(|byte| format!("{byte:02x}")).collect();
        self.broker.add_reference_value("sim.init_data", vec![json!(digest)], None).unwrap();
    }

    fn start(&self) -> Daemon {
        let socket = self.at("run/cdh.sock");
        // One that was killed left it.
        let _ = fs::remove_file(&socket);
        let mut child = Command::new(env!("CARGO_BIN_EXE_nacre-guestd"))
            .env_remove("NACRE_CONFIG")
            .arg("--init-data")
            .arg(self.at("initdata.toml"))
            .arg("--sim-platform-key")
            .arg(self.at("platform.key"))
            .arg("--root")
            .arg(self.at("store"))
            .arg("--socket")
            .arg(&socket)
            .args(["--log", "warn"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "the daemon does not start");
            thread::sleep(Duration::from_millis(5));
        }
        Daemon { child, socket }
    }

    /// Processes of this store's lazy daemon, `keep` or `serve`.
    fn lazy_daemons(&self, part: &str) -> Vec<u32> {
        let wanted = format!("lazy-daemon\0{part}\0--directory\0{}\0", self.at("store/lazy").display());
        let said = |process: &u32| fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        all.filter(|process| String::from_utf8_lossy(&said(process)).contains(&wanted)).collect()
    }
}

fn image(dir: &Path) -> Image {
    let system = dir.join("system");
    tiny_rootfs(&system);
    let tar = run(Command::new("tar").arg("-C").arg(&system).args(["--owner=0", "--group=0", "-cf", "-", "."]));
    Image::builder()
        .layer_of(Layer::raw(tar.stdout), Compression::Zstd)
        .layer([Entry::file("message", MESSAGE)])
        .run("Env", json!(["PATH=/bin"]))
        .run("Cmd", json!(["cat", "/message"]))
        .build()
}

/// This guest has only the key provider.
struct NoBroker;

impl KeySource for NoBroker {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        Err(KeySourceError::NotFound { uri: uri.clone(), source_name: "nobody".into() })
    }
}

mod toml {
    /// A configuration of tables of strings and lists of strings, which TOML writes as JSON does.
    pub(crate) fn toml_of(tables: &[(&str, serde_json::Value)]) -> String {
        let mut text = String::new();
        for (name, table) in tables {
            text.push_str(&format!("[{name}]\n"));
            for (key, value) in table.as_object().unwrap() {
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        text
    }
}

#[test]
fn lazy_images_of_bundles_outlive_the_daemon() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let name = format!("{}/t/lazy:1", scene.registry.host());
    scene.ship_lazy(&name);
    let daemon = scene.start();
    let bundle = scene.at("bundle");
    let path = bundle.display().to_string();
    let pull = |daemon: &Daemon| daemon.call("api.ImagePullService/PullImage", &[name.as_bytes(), path.as_bytes()]);
    assert!(pull(&daemon).unwrap().starts_with(b"sha256:"));
    assert_eq!(fs::read_to_string(bundle.join("rootfs/message")).unwrap(), MESSAGE);
    let released = scene.broker.audit(0, 1000).unwrap();
    assert!(released.iter().any(|entry| entry.event == "released"), "the key is the broker's");
    if let Some(runc) = require("runc") {
        let mut command = Command::new(runc);
        command.arg("--root").arg(scene.at("runc")).args(["run", "--bundle", &path, "nacre-lazy-test"]);
        assert_eq!(String::from_utf8(run(command.stdin(Stdio::null())).stdout).unwrap(), MESSAGE);
    }
    let unmount = || {
        let store = Store::open(&scene.at("store"), Marks::Trusted, true).unwrap();
        nacre_guest::service::ImageService::unmount_bundle(&store, &bundle).unwrap();
    };
    // The bundle outlives the daemon, and what serves its image; the broker is not asked again.
    let asked = scene.broker.audit(0, 1000).unwrap().len();
    drop(daemon);
    let [server] = scene.lazy_daemons("serve")[..] else { panic!("one process serves the image") };
    run(Command::new("kill").args(["-9", &server.to_string()]));
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert_eq!(fs::read_to_string(bundle.join("rootfs/message")).unwrap(), MESSAGE);
    assert_ne!(scene.lazy_daemons("serve"), [server]);
    assert_eq!(scene.broker.audit(0, 1000).unwrap().len(), asked);
    let daemon = scene.start();
    unmount();
    pull(&daemon).unwrap();
    unmount();
    daemon.end();
    // Whoever serves sees it soon.
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_to_string("/proc/self/mounts").unwrap().contains(scene.dir.path().to_str().unwrap()) {
        assert!(Instant::now() < deadline, "something stays mounted");
        thread::sleep(Duration::from_millis(5));
    }
    // It would end by itself, a while after the last mount.
    let [keeper] = scene.lazy_daemons("keep")[..] else { panic!("one process keeps the mounts") };
    run(Command::new("kill").arg(keeper.to_string()));
    while !scene.lazy_daemons("keep").is_empty() {
        assert!(Instant::now() < deadline, "the keeper does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The key of a lazy image is lent: the bundle is read for as long as the guest renews the lease.
#[test]
fn a_lazy_image_is_taken_away_when_the_lease_of_its_key_ends() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let name = format!("{}/t/lazy:1", scene.registry.host());
    scene.ship_lazy(&name);
    let uri: ResourceUri = LAZY_KEY.parse().unwrap();
    let key = scene.broker.put_resource_with(
        uri.path(),
        scene.lazy_key.get().unwrap().expose(),
        PutOptions { lease_seconds: Some(5), ..PutOptions::default() },
    );
    key.unwrap();
    let bundle = scene.at("bundle");
    let path = bundle.display().to_string();
    let pull = |daemon: &Daemon| daemon.call("api.ImagePullService/PullImage", &[name.as_bytes(), path.as_bytes()]);
    let read = || {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        fs::read_to_string(bundle.join("rootfs/message"))
    };
    let gone = |since: Instant| {
        while read().is_ok() {
            assert!(since.elapsed() < Duration::from_secs(6), "the image is still read");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let unmount = || {
        let store = Store::open(&scene.at("store"), Marks::Trusted, true).unwrap();
        nacre_guest::service::ImageService::unmount_bundle(&store, &bundle).unwrap();
    };
    let daemon = scene.start();
    pull(&daemon).unwrap();
    thread::sleep(Duration::from_secs(7));
    assert_eq!(read().unwrap(), MESSAGE, "the lease is renewed");
    scene.broker.revoke(&Revocation::Resource(uri.path().to_string())).unwrap();
    gone(Instant::now());
    unmount();
    // It can be had again, for a guest that is still trusted; a guest that is killed renews nothing.
    pull(&daemon).unwrap();
    assert_eq!(read().unwrap(), MESSAGE);
    drop(daemon);
    gone(Instant::now());
    unmount();
    for keeper in scene.lazy_daemons("keep") {
        run(Command::new("kill").arg(keeper.to_string()));
    }
}

#[test]
fn the_daemon_serves_the_guests_programs() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let daemon = scene.start();

    // Nothing was asked of the broker before something needs a key.
    assert!(scene.broker.audit(0, 1000).unwrap().iter().all(|entry| entry.event != "attested"));
    let secret = daemon.call("api.GetResourceService/GetResource", &[b"kbs:///default/image-key/app"]).unwrap();
    assert_eq!(secret.len(), 32);
    assert_eq!(daemon.call("api.GetResourceService/GetResource", &[b"/default/image-key/app"]).unwrap(), secret);
    for bad in [&b"default/image-key/none"[..], b"not a path", b""] {
        assert!(daemon.call("api.GetResourceService/GetResource", &[bad]).is_err());
    }

    let bundle = scene.at("bundle");
    let path = bundle.display().to_string();
    let digest = daemon.call("api.ImagePullService/PullImage", &[scene.name().as_bytes(), path.as_bytes()]).unwrap();
    assert!(digest.starts_with(b"sha256:"));
    assert_eq!(fs::read_to_string(bundle.join("rootfs/message")).unwrap(), MESSAGE);
    if let Some(runc) = require("runc") {
        let mut command = Command::new(runc);
        command.arg("--root").arg(scene.at("runc")).args(["run", "--bundle", &path, "nacre-daemon-test"]);
        assert_eq!(String::from_utf8(run(command.stdin(Stdio::null())).stdout).unwrap(), MESSAGE);
    }
    let again = daemon.call("api.ImagePullService/PullImage", &[scene.name().as_bytes(), path.as_bytes()]).unwrap_err();
    assert!(again.contains("in use"), "{again}");
    let none = format!("{}/t/none:1", scene.registry.host());
    let error = daemon.call("api.ImagePullService/PullImage", &[none.as_bytes(), path.as_bytes()]).unwrap_err();
    assert!(error.contains("t/none"), "{error}");

    // The bundle outlives the daemon, and is taken down by its path.
    daemon.end();
    let store = Store::open(&scene.at("store"), Marks::Trusted, true).unwrap();
    nacre_guest::service::ImageService::unmount_bundle(&store, &bundle).unwrap();
    assert!(!bundle.exists());
    // A second one starts where the first one ended, and shows what that one did: what it measured decides what it gets.
    let condition = |value: i32| {
        format!(
            "package policy\nimport rego.v1\ndefault allow := false\nallow if {{\n\
             input.submods.cpu0[\"ear.trustworthiness-vector\"][\"file-system\"] == {value}\n\
             some tee in input.submods.cpu0[\"ear.veraison.annotated-evidence\"]\n\
             tee.runtime.workloads[0].digest == {:?}\n}}\n",
            String::from_utf8_lossy(&digest)
        )
    };
    let policy = Digest::sha256(br#"{"default":[{"type":"insecureAcceptAnything"}]}"#).to_string();
    for (expected, value) in [("sha256:another", 32), (policy.as_str(), 2)] {
        scene.broker.add_reference_value("image_policy", vec![json!(expected)], None).unwrap();
        scene.broker.set_resource_policy("default/image-key", &condition(value)).unwrap();
        let daemon = scene.start();
        daemon.call("api.GetResourceService/GetResource", &[KEY.as_bytes()]).unwrap();
        daemon.end();
    }
}

#[test]
fn the_daemon_is_a_key_provider_for_other_programs() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let daemon = scene.start();
    // As `OCICRYPT_KEYPROVIDER_CONFIG` has it.
    let config = json!({ "key-providers": {
        "attestation-agent": { "ttrpc": format!("unix://{}", daemon.socket.display()) },
    } });
    let providers = Providers::parse(config.to_string().as_bytes()).unwrap();
    let trust = Trust {
        policy: Policy::insecure_accept_anything(),
        rules: AdmissionRules::default(),
        lookaside: LookasideConfig::default(),
        keys: Arc::new(NoBroker),
        clock: Arc::new(SystemClock),
    };
    let store = Store::open(&scene.at("other"), Marks::Trusted, true).unwrap();
    let keyring = Keyring::new().with_providers(providers);
    let images = Images::new(store, trust, keyring, PullOptions::default(), Arc::new(NoProgress));
    let source = DockerSource::new(&scene.client, &scene.name().parse().unwrap()).unwrap();
    assert!(source.location().image_ref().is_some());
    let pulled = images.pull(&source).unwrap();
    assert_eq!(fs::read_to_string(pulled.layers.last().unwrap().path().join("message")).unwrap(), MESSAGE);
    for bad in [&b"{}"[..], br#"{"op":"keywrap","keyunwrapparams":{"annotation":""}}"#, b"\xff"] {
        assert!(daemon.call("keyprovider.KeyProviderService/UnWrapKey", &[bad]).is_err());
    }
    daemon.end();
}

#[test]
fn what_the_host_changes_in_the_init_data_costs_the_keys() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let text = fs::read_to_string(scene.at("initdata.toml")).unwrap();
    fs::write(scene.at("initdata.toml"), text.replace("insecureAcceptAnything", "reject")).unwrap();
    let daemon = scene.start();
    let error = daemon.call("api.GetResourceService/GetResource", &[KEY.as_bytes()]).unwrap_err();
    assert!(error.contains("configuration"), "{error}");
    daemon.end();
}
