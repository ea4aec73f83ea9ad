//! Debian's docker-registry and skopeo: no auth, basic auth, TLS.

use std::{fs, process::Command};

use nacre_core::SecretBytes;
use nacre_oci::{
    manifest::RawManifest,
    registry::{ClientConfig, CredentialStore},
    source::{ImageSink as _, ImageSource as _, TransportError},
};
use nacre_testkit::{DockerRegistry, DockerRegistryOptions, Tls, require, run};

use crate::support::{client_with, descriptor, fetch, noise, quick, sink, source};

fn alice() -> CredentialStore {
    let password = SecretBytes::new(DockerRegistry::PASSWORD.into());
    CredentialStore::basic(DockerRegistry::USER, password)
}

/// Pushes an image and pulls it again.
fn round_trip(host: &str, config: ClientConfig, credentials: CredentialStore) {
    let (client, _) = client_with(config, "", credentials);
    let name = format!("{host}/team/app:v1");
    let (sink, source) = (sink(&client, &name), source(&client, &name));
    let (small, large) = (noise(2000), noise(9_000_000));
    let config = b"{}";
    for blob in [&small[..], &large, config] {
        sink.put_blob(&mut &blob[..], Some(&descriptor(blob))).unwrap();
        assert!(sink.has_blob(&descriptor(blob)).unwrap());
    }
    let layers = [descriptor(&small), descriptor(&large)];
    let config = nacre_oci::manifest::Descriptor::of(nacre_oci::manifest::media::OCI_CONFIG, config);
    let value = serde_json::json!({
        "schemaVersion": 2, "mediaType": nacre_oci::manifest::media::OCI_MANIFEST, "config": config, "layers": layers,
    });
    let raw = RawManifest::new(value.to_string().into_bytes(), None).unwrap();
    sink.commit(&raw).unwrap();
    sink.put_manifest(&raw).unwrap();
    assert_eq!(source.resolve_digest().unwrap().unwrap().peek(), raw.digest());
    assert_eq!(source.manifest(None).unwrap().peek(), &raw);
    for blob in [&small, &large] {
        assert_eq!(&fetch(&source, &descriptor(blob)).unwrap(), blob);
    }
    let missing = descriptor(b"never sent");
    assert!(!sink.has_blob(&missing).unwrap());
    assert!(fetch(&source, &missing).unwrap_err().is_not_found());
    // It has no referrers API, so the fallback tag is used.
    let storage = source.signatures().unwrap();
    assert_eq!(storage.referrers(raw.digest(), None).unwrap(), []);
    assert_eq!(storage.native(raw.digest()).unwrap().len(), 0);
    assert!(sink.mount_blob(&descriptor(&small).digest, &format!("{host}/team/app").parse().unwrap()).unwrap());
}

#[test]
fn docker_registry_without_auth() {
    let Some(registry) = DockerRegistry::start(&DockerRegistryOptions::default()) else { return };
    for chunk in [0, 2_000_000] {
        round_trip(registry.host(), ClientConfig { upload_chunk: chunk, ..quick() }, CredentialStore::anonymous());
    }
}

#[test]
fn docker_registry_with_basic_auth() {
    let Some(registry) = DockerRegistry::start(&DockerRegistryOptions { basic_auth: true, tls: None }) else { return };
    round_trip(registry.host(), quick(), alice());
    let wrong = CredentialStore::basic(DockerRegistry::USER, SecretBytes::new(b"wrong".to_vec()));
    for store in [CredentialStore::anonymous(), wrong] {
        let (client, _) = client_with(quick(), "", store);
        let error = source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap_err();
        assert!(matches!(error, TransportError::Denied { .. }), "{error}");
    }
}

#[test]
fn docker_registry_with_tls_and_basic_auth() {
    let Some(tls) = Tls::new() else { return };
    let options = DockerRegistryOptions { basic_auth: true, tls: Some(&tls) };
    let Some(registry) = DockerRegistry::start(&options) else { return };
    let secure = ClientConfig { insecure: false, ..quick() };
    // By an extra root, as a file and as text, by certs.d, and unverified.
    round_trip(registry.host(), ClientConfig { extra_roots: vec![tls.ca()], ..secure.clone() }, alice());
    let pem = fs::read_to_string(tls.ca()).unwrap();
    round_trip(registry.host(), ClientConfig { extra_roots_pem: vec![pem], ..secure.clone() }, alice());
    let certs = tempfile::tempdir().unwrap();
    let dir = certs.path().join(registry.host());
    fs::create_dir(&dir).unwrap();
    fs::copy(tls.ca(), dir.join("ca.crt")).unwrap();
    fs::copy(tls.certificate(), dir.join("client.cert")).unwrap();
    fs::copy(tls.key(), dir.join("client.key")).unwrap();
    let by_dir = ClientConfig { certs_dirs: vec!["/nonexistent".into(), certs.path().into()], ..secure.clone() };
    round_trip(registry.host(), by_dir.clone(), alice());
    round_trip(registry.host(), ClientConfig { insecure: true, ..secure.clone() }, alice());

    let refused = |config: ClientConfig, words: &str| {
        let (client, _) = client_with(config, "", alice());
        let error =
            source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(ClientConfig { system_roots: true, ..secure.clone() }, "TLS: invalid peer certificate");
    refused(secure.clone(), "no root certificates");
    let stranger = Tls::new().unwrap();
    refused(ClientConfig { extra_roots: vec![stranger.ca()], ..secure.clone() }, "TLS: invalid peer certificate");
    fs::copy(stranger.key(), dir.join("client.key")).unwrap();
    refused(by_dir.clone(), "does not serve");
    fs::remove_file(dir.join("client.key")).unwrap();
    refused(by_dir.clone(), "no .key file");
    fs::write(dir.join("ca.crt"), "no PEM").unwrap();
    refused(by_dir, "no PEM certificate");
}

#[test]
fn skopeo_and_we_read_each_others_images() {
    let Some(skopeo) = require("skopeo") else { return };
    let Some(registry) = DockerRegistry::start(&DockerRegistryOptions::default()) else { return };
    round_trip(registry.host(), quick(), CredentialStore::anonymous());
    let raw = run(Command::new(&skopeo)
        .args(["inspect", "--raw", "--tls-verify=false"])
        .arg(format!("docker://{}/team/app:v1", registry.host())));
    let (client, _) = client_with(quick(), "", CredentialStore::anonymous());
    let source = source(&client, &format!("{}/team/app:v1", registry.host()));
    assert_eq!(source.manifest(None).unwrap().peek().bytes(), raw.stdout);
    let dir = tempfile::tempdir().unwrap();
    run(Command::new(skopeo)
        .args(["copy", "--src-tls-verify=false", "--insecure-policy"])
        .arg(format!("docker://{}/team/app:v1", registry.host()))
        .arg(format!("dir:{}", dir.path().display())));
    let blob = noise(9_000_000);
    assert_eq!(fs::read(dir.path().join(descriptor(&blob).digest.hex())).unwrap(), blob);
}
