//! Signatures at a registry that is not ours: GPG's in the lookaside where skopeo puts them, cosign's under their tag, bundles among
//! the referrers.

use std::{collections::BTreeMap, fs, process::Command, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::NoProgress;
use nacre_oci::{
    manifest::{Descriptor, Manifest, RawManifest, media},
    reference::ImageRef,
    registry::{Client, ClientConfig, CredentialStore, DockerSink, DockerSource, RegistriesConf},
    source::{ImageSink as _, ImageSource as _},
    trust::{Admitted, LookasideConfig, Policy, Scheme, TrustContext, TrustError, sign::CosignKey},
};
use nacre_testkit::{DockerRegistry, DockerRegistryOptions, Image, require, run};

use crate::support::{Fixed, Gpg, NEW_YEAR, Resources, signed_by};

fn client(host: &str) -> Client {
    let config = ClientConfig { insecure_registries: vec![host.into()], ..ClientConfig::default() };
    Client::new(config, RegistriesConf::empty(), CredentialStore::anonymous(), Arc::new(NoProgress)).unwrap()
}

fn evaluate(
    client: &Client,
    name: &ImageRef,
    requirement: &serde_json::Value,
    lookaside: &LookasideConfig,
) -> Result<Admitted, TrustError> {
    let source = DockerSource::new(client, name).unwrap();
    let manifest = source.manifest(None).unwrap();
    let policy = serde_json::json!({"default": [requirement]}).to_string();
    TrustContext {
        policy: &Policy::parse(policy.as_bytes(), "p.json").unwrap(),
        requested: source.location(),
        chain: &[manifest.peek()],
        storage: source.signatures(),
        lookaside,
        keys: &Resources::default(),
        clock: &Fixed(Some(NEW_YEAR)),
    }
    .evaluate()
}

#[test]
fn what_skopeo_signs_while_it_copies_is_found_in_the_lookaside() {
    let (Some(gpg), Some(registry)) = (Gpg::new(), DockerRegistry::start(&DockerRegistryOptions::default())) else {
        return;
    };
    let Some(skopeo) = require("skopeo") else { return };
    let fingerprint = gpg.generate("a@x", "never", None);
    let at = |name: &str| gpg.home().join(name);
    Image::hello().write_layout(&at("layout"), "v1");
    fs::create_dir(at("registries.d")).unwrap();
    let staging = at("lookaside").display().to_string();
    let yaml = format!(
        "docker:\n  {}/team:\n    lookaside-staging: file://{staging}\n    lookaside: file://{staging}\n",
        registry.host()
    );
    fs::write(at("registries.d/a.yaml"), yaml).unwrap();
    let name = format!("{}/team/app:v1", registry.host());
    let mut command = Command::new(skopeo);
    command.env("GNUPGHOME", gpg.home()).arg("--insecure-policy").arg("--registries.d").arg(at("registries.d"));
    command.args(["copy", "--dest-tls-verify=false", "--sign-by", &fingerprint]);
    run(command.arg(format!("oci:{}:v1", at("layout").display())).arg(format!("docker://{name}")));
    let lookaside = LookasideConfig::load_dir(&at("registries.d")).unwrap();
    let name: ImageRef = name.parse().unwrap();
    let client = client(registry.host());
    let admitted = evaluate(&client, &name, &signed_by(&gpg.export()), &lookaside).unwrap();
    assert_eq!(admitted.signers()[0].who, fingerprint);
    assert_eq!(admitted.signers()[0].reference.as_ref(), Some(&name));
    let error = evaluate(&client, &name, &signed_by(&gpg.export()), &LookasideConfig::default()).unwrap_err();
    assert!(error.to_string().contains("no lookaside is configured"), "{error}");
}

#[test]
fn cosign_signatures_and_bundles_are_found_at_a_registry() {
    let Some(registry) = DockerRegistry::start(&DockerRegistryOptions::default()) else { return };
    let client = client(registry.host());
    let name: ImageRef = format!("{}/app:v1", registry.host()).parse().unwrap();
    let sink = DockerSink::new(&client, &name).unwrap();
    let image = Image::hello();
    for blob in [&image.config, &image.layers[0].bytes] {
        sink.put_blob(&mut blob.as_slice(), None).unwrap();
    }
    let manifest = RawManifest::new(image.manifest.clone(), Some(image.media_type)).unwrap();
    sink.commit(&manifest).unwrap();
    let none = LookasideConfig::default();

    let key = CosignKey::generate();
    let rule = |key: &CosignKey| serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(key.public_pem().unwrap())});
    let error = evaluate(&client, &name, &rule(&key), &none).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("no sigstore signature"), "{error}");

    let bundle = key.bundle(&manifest, &name).unwrap();
    for (descriptor, bytes) in &bundle.blobs {
        sink.put_blob(&mut bytes.as_slice(), Some(descriptor)).unwrap();
    }
    sink.put_manifest(&bundle.manifest).unwrap();
    assert_eq!(evaluate(&client, &name, &rule(&key), &none).unwrap().signers()[0].scheme, Scheme::Bundle);

    let other = CosignKey::generate();
    let signature = other.sign(manifest.digest(), &name).unwrap();
    sink.put_blob(&mut signature.payload.as_slice(), Some(&signature.layer)).unwrap();
    let config = Descriptor::of(media::OCI_CONFIG, b"{}");
    sink.put_blob(&mut b"{}".as_slice(), Some(&config)).unwrap();
    let artifact = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: None,
        config,
        layers: vec![signature.layer],
        subject: None,
        annotations: BTreeMap::new(),
    };
    let artifact = RawManifest::new(serde_json::to_vec(&artifact).unwrap(), None).unwrap();
    sink.put_tagged(&artifact, &signature.tag).unwrap();
    assert_eq!(evaluate(&client, &name, &rule(&other), &none).unwrap().signers()[0].scheme, Scheme::Cosign);
    assert!(evaluate(&client, &name, &rule(&CosignKey::generate()), &none).is_err());
}
