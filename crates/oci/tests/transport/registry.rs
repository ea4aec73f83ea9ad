//! Copies to and from registries, with signatures that skopeo verifies and makes.

use std::{fs, path::Path, process::Command, sync::Arc};

use nacre_core::{KeySource, KeySourceError, NoProgress, ResourceUri, SecretBytes, SystemClock, jose::PrivateKey};
use nacre_oci::{
    copy::{Copied, CopyError, CopyOptions, EncryptLayers, Sign, SigningKey, Source, copy},
    crypt::Recipients,
    manifest::Manifest,
    registry::{Client, ClientConfig, CredentialStore, RegistriesConf},
    transport::{open_sink, open_source},
    trust::{
        Admitted, LookasideConfig, Policy, TrustContext,
        sign::{CosignKey, GpgKey},
    },
};
use nacre_testkit::{DockerRegistry, DockerRegistryOptions, registry::Registry, require, run};
use serde_json::json;

use super::{image, location, tree};

fn client() -> Client {
    let config = ClientConfig { insecure: true, ..ClientConfig::default() };
    Client::new(config, RegistriesConf::empty(), CredentialStore::anonymous(), Arc::new(NoProgress)).unwrap()
}

fn copied(from: &str, to: &str, options: &CopyOptions<'_>) -> Result<Copied, CopyError> {
    let client = client();
    let source = open_source(&location(from), &client)?;
    let sink = open_sink(&location(to), &client)?;
    copy(&Source::without_policy(source.as_ref())?, sink.as_ref(), options)
}

fn sign<'a>(keys: Vec<SigningKey<'a>>) -> CopyOptions<'a> {
    CopyOptions { sign: Some(Sign { keys, identity: None }), ..CopyOptions::default() }
}

#[test]
fn an_image_goes_through_a_registry_unchanged_and_is_sent_once() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let from = format!("oci:{}:v1", scratch.path().join("made").display());
    let registry = Registry::memory().unwrap();
    let to = format!("docker://{}/team/app:1", registry.host());
    let done = copied(&from, &to, &CopyOptions::default()).unwrap();
    assert_eq!((done.digest, done.changed), (image.digest, false));
    let uploads = || registry.count(|request| request.method == "PUT" && request.path.contains("/blobs/"));
    let sent = uploads();
    let again = copied(&from, &to, &CopyOptions::default()).unwrap();
    assert!(again.images[0].layers.iter().all(|layer| layer.reused));
    assert_eq!(uploads(), sent, "what is there is not sent again");
    let back = format!("dir:{}", scratch.path().join("back").display());
    assert_eq!(copied(&to, &back, &CopyOptions::default()).unwrap().digest, image.digest);
    // By digest, and refused where the digest is another image's.
    let by_digest = format!("docker://{}/team/app@{}", registry.host(), image.digest);
    assert_eq!(copied(&by_digest, &back, &CopyOptions::default()).unwrap().digest, image.digest);
    let other = format!("docker://{}/team/app@{}", registry.host(), nacre_core::Digest::sha256(b"other"));
    assert!(copied(&from, &other, &CopyOptions::default()).unwrap_err().to_string().contains("mismatch"));
}

#[test]
fn signatures_at_registries_with_and_without_a_referrers_api_are_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let from = format!("oci:{}:v1", scratch.path().join("made").display());
    let key = CosignKey::generate();
    for registry in [Registry::memory().unwrap(), Registry::builder().without_referrers().start().unwrap()] {
        let to = format!("docker://{}/team/app:1", registry.host());
        let options = sign(vec![SigningKey::Cosign(&key), SigningKey::Bundle(&key)]);
        assert_eq!(copied(&from, &to, &options).unwrap().signatures_made, 2);
        let next = format!("docker://{}/other/app:2", registry.host());
        assert_eq!(copied(&to, &next, &CopyOptions::default()).unwrap().signatures_kept, 2);
        let layout = format!("oci:{}:v1", scratch.path().join(format!("kept{}", registry.address().port())).display());
        assert_eq!(copied(&next, &layout, &CopyOptions::default()).unwrap().signatures_kept, 2);
        // Signing adds to what is there.
        let second = CosignKey::generate();
        copied(&from, &to, &sign(vec![SigningKey::Cosign(&second)])).unwrap();
        assert_eq!(copied(&to, &next, &CopyOptions::default()).unwrap().signatures_kept, 3);
    }
    // Where the registry stores GPG signatures itself, they go there and come back.
    let registry = Registry::builder().with_signature_extension().start().unwrap();
    let dir = scratch.path().join("dir");
    copied(&from, &format!("dir:{}", dir.display()), &CopyOptions::default()).unwrap();
    fs::write(dir.join("signature-1"), "\u{90}signature").unwrap();
    let to = format!("docker://{}/team/app:1", registry.host());
    assert_eq!(copied(&format!("dir:{}", dir.display()), &to, &CopyOptions::default()).unwrap().signatures_kept, 1);
    let back = scratch.path().join("back");
    assert_eq!(copied(&to, &format!("dir:{}", back.display()), &CopyOptions::default()).unwrap().signatures_kept, 1);
    assert_eq!(tree(&back), tree(&dir));
}

/// What skopeo is run with: a policy that wants a signature for everything in the registry, and where signatures are.
struct Verifier<'a> {
    skopeo: std::path::PathBuf,
    scratch: &'a Path,
}

impl Verifier<'_> {
    fn new<'a>(scratch: &'a Path, host: &str, requirement: &serde_json::Value) -> Option<Verifier<'a>> {
        let skopeo = require("skopeo")?;
        let policy = json!({
            "default": [{ "type": "reject" }],
            "transports": {
                "docker": { host: [requirement] },
                "oci": { "": [{ "type": "insecureAcceptAnything" }] },
                "dir": { "": [{ "type": "insecureAcceptAnything" }] },
            },
        });
        fs::write(scratch.join("policy.json"), policy.to_string()).unwrap();
        let lookaside = scratch.join("lookaside");
        let settings = format!(
            "docker:\n  {host}:\n    lookaside: file://{0}\n    lookaside-staging: file://{0}\n",
            lookaside.display()
        );
        fs::create_dir_all(scratch.join("registries.d")).unwrap();
        fs::write(scratch.join("registries.d/test.yaml"), settings).unwrap();
        Some(Verifier { skopeo, scratch })
    }

    fn skopeo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.skopeo);
        command.arg("--policy").arg(self.scratch.join("policy.json"));
        command.arg("--registries.d").arg(self.scratch.join("registries.d"));
        command.args(arguments).env("GNUPGHOME", self.scratch.join("gnupg"));
        command
    }

    fn accepts(&self, name: &str) -> bool {
        let to = format!("dir:{}", self.scratch.join("verified").display());
        let output = self.skopeo(&["copy", "--src-tls-verify=false", name, &to]).output().unwrap();
        output.status.success()
    }
}

struct NoKeys;

impl KeySource for NoKeys {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        Err(KeySourceError::NotFound { uri: uri.clone(), source_name: "the test".into() })
    }
}

/// The admission of an image that has to have a cosign signature by a key.
fn admitted(name: &str, public: &Path) -> Option<Admitted> {
    let policy = json!({ "default": [{
        "type": "sigstoreSigned", "keyPath": public, "signedIdentity": { "type": "matchRepository" },
    }] });
    let source = open_source(&location(name), &client()).unwrap();
    let manifest = source.manifest(None).unwrap();
    let context = TrustContext {
        policy: &Policy::parse(policy.to_string().as_bytes(), "test").unwrap(),
        requested: &location(name),
        chain: &[manifest.peek()],
        storage: source.signatures(),
        lookaside: &LookasideConfig::default(),
        keys: &NoKeys,
        clock: &SystemClock,
    };
    context.evaluate().ok()
}

fn trusted(name: &str, public: &Path) -> bool {
    admitted(name, public).is_some()
}

#[test]
fn cosign_signatures_verify_with_openssl_and_survive_copies() {
    let (Some(openssl), Some(skopeo)) = (require("openssl"), require("skopeo")) else { return };
    let Some(registry) = DockerRegistry::start(&DockerRegistryOptions::default()) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let (key, other) = (CosignKey::generate(), CosignKey::generate());
    let public = at("cosign.pub");
    fs::write(&public, key.public_pem().unwrap()).unwrap();
    let image = image();
    image.write_layout(&at("made"), "v1");
    let from = format!("oci:{}:v1", at("made").display());
    let name = |name: &str| format!("docker://{}/team/{name}:1", registry.host());
    copied(&from, &name("unsigned"), &CopyOptions::default()).unwrap();
    copied(&from, &name("other"), &sign(vec![SigningKey::Cosign(&other)])).unwrap();
    copied(&from, &name("signed"), &sign(vec![SigningKey::Cosign(&key)])).unwrap();
    assert!(!trusted(&name("unsigned"), &public));
    assert!(!trusted(&name("other"), &public));
    assert!(trusted(&name("signed"), &public));
    copied(&from, &name("other"), &sign(vec![SigningKey::Cosign(&key)])).unwrap();
    assert!(trusted(&name("other"), &public), "the second signature is found behind the first");

    // What was admitted is what is copied, even if the tag leads elsewhere by then.
    let admission = admitted(&name("signed"), &public).unwrap();
    let away = nacre_testkit::Image::hello();
    away.write_layout(&at("away"), "v1");
    copied(&format!("oci:{}:v1", at("away").display()), &name("signed"), &CopyOptions::default()).unwrap();
    let source = open_source(&location(&name("signed")), &client()).unwrap();
    let sink = open_sink(&location(&format!("dir:{}", at("admitted").display())), &client()).unwrap();
    let done =
        copy(&Source::admitted(source.as_ref(), &admission).unwrap(), sink.as_ref(), &CopyOptions::default()).unwrap();
    assert_eq!(done.digest, image.digest);
    copied(&from, &name("signed"), &CopyOptions::default()).unwrap();

    // skopeo reads the artifact as any image; openssl verifies what is in it.
    let artifact = format!("docker://{}/team/signed:sha256-{}.sig", registry.host(), image.digest.hex());
    let to = format!("dir:{}", at("artifact").display());
    run(Command::new(&skopeo).args(["--insecure-policy", "copy", "--src-tls-verify=false", &artifact, &to]));
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(at("artifact/manifest.json")).unwrap()).unwrap();
    let layer = &manifest["layers"][0];
    let signature = layer["annotations"]["dev.cosignproject.cosign/signature"].as_str().unwrap();
    fs::write(at("signature.b64"), signature).unwrap();
    run(Command::new(&openssl)
        .args(["base64", "-d", "-A", "-in"])
        .arg(at("signature.b64"))
        .arg("-out")
        .arg(at("signature")));
    let payload = at("artifact").join(layer["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap());
    run(Command::new(&openssl)
        .args(["dgst", "-sha256", "-verify"])
        .arg(&public)
        .arg("-signature")
        .arg(at("signature"))
        .arg(payload));

    // (Debian's skopeo neither makes nor verifies such signatures: "sigstore disabled".) They survive two copies.
    let signed = name("signed");
    let layout = format!("oci:{}:v1", at("kept").display());
    assert_eq!(copied(&signed, &layout, &CopyOptions::default()).unwrap().signatures_kept, 1);
    assert!(trusted(&signed, &public));
    fs::remove_dir_all(registry.data().join("docker/registry/v2/repositories/team/signed")).unwrap();
    assert_eq!(copied(&layout, &signed, &CopyOptions::default()).unwrap().signatures_kept, 1);
    assert!(trusted(&signed, &public), "what came back is what was signed");
}

#[test]
fn skopeo_verifies_our_gpg_signatures_in_a_lookaside_and_in_a_directory() {
    let (Some(gpg), Some(registry)) = (require("gpg"), DockerRegistry::start(&DockerRegistryOptions::default())) else {
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().join("gnupg");
    fs::create_dir(&home).unwrap();
    run(Command::new("chmod").arg("700").arg(&home));
    let gpg = |arguments: &[&str]| {
        let common = ["--batch", "--pinentry-mode", "loopback", "--passphrase", ""];
        run(Command::new(&gpg).env("GNUPGHOME", &home).args(common).args(arguments)).stdout
    };
    gpg(&["--quick-gen-key", "Test <test@example.org>", "rsa2048", "sign", "never"]);
    let public = scratch.path().join("gpg.pub");
    fs::write(&public, gpg(&["--export"])).unwrap();
    let secret = gpg(&["--export-secret-keys"]);
    run(Command::new("gpgconf").env("GNUPGHOME", &home).args(["--kill", "all"]));
    let key = GpgKey::read(&secret, None, None).unwrap();

    let requirement = json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": public });
    let Some(verifier) = Verifier::new(scratch.path(), registry.host(), &requirement) else { return };
    let lookaside = LookasideConfig::load_dir(&scratch.path().join("registries.d")).unwrap();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let from = format!("oci:{}:v1", scratch.path().join("made").display());
    let to = format!("docker://{}/team/app:1", registry.host());
    copied(&from, &to, &CopyOptions::default()).unwrap();
    assert!(!verifier.accepts(&to));
    let options = || CopyOptions { lookaside: Some(&lookaside), ..sign(vec![SigningKey::Gpg(&key)]) };
    copied(&from, &to, &options()).unwrap();
    assert!(verifier.accepts(&to));
    assert_eq!(tree(&scratch.path().join("lookaside")).len(), 1);
    // Encrypted and signed by us, skopeo verifies and decrypts it.
    let reader = PrivateKey::generate_p256();
    let mut recipients = Recipients::new();
    recipients.add_public_key(reader.public());
    let pem = scratch.path().join("key.pem");
    fs::write(&pem, reader.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
    let all = EncryptLayers::All;
    let secret = format!("docker://{}/team/secret:1", registry.host());
    copied(&from, &secret, &CopyOptions { encrypt: Some((&recipients, &all)), ..options() }).unwrap();
    assert!(verifier.accepts(&secret));
    let plain = format!("oci:{}:v1", scratch.path().join("plain").display());
    run(verifier
        .skopeo(&["copy", "--remove-signatures", "--src-tls-verify=false", &secret, &plain, "--decryption-key"])
        .arg(&pem));
    let digests = |location: &str| {
        let layers = Manifest::parse(&super::manifest(location)).unwrap().layers;
        layers.into_iter().map(|layer| layer.digest).collect::<Vec<_>>()
    };
    assert_eq!(digests(&plain), digests(&from));
    // Another copy finds it there and keeps it, in a directory and at another name, whose identity it then is not.
    let dir = scratch.path().join("dir");
    let keep = || CopyOptions { lookaside: Some(&lookaside), ..CopyOptions::default() };
    assert_eq!(copied(&to, &format!("dir:{}", dir.display()), &keep()).unwrap().signatures_kept, 1);
    assert!(dir.join("signature-1").exists());
    let other = format!("docker://{}/team/other:1", registry.host());
    assert_eq!(copied(&format!("dir:{}", dir.display()), &other, &keep()).unwrap().signatures_kept, 1);
    assert!(!verifier.accepts(&other), "it is signed as team/app");
    // Without a place for it, nothing is pretended.
    let error = copied(&from, &to, &sign(vec![SigningKey::Gpg(&key)])).unwrap_err().to_string();
    assert!(error.contains("does not support simple-signing"), "{error}");
    run(Command::new("gpgconf").env("GNUPGHOME", &home).args(["--kill", "all"]));
}
