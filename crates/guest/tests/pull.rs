//! Pulling into a store: what is fetched, what is refused, and that nothing of what was refused is there afterwards.
#![expect(clippy::unwrap_used, reason = "a test's helpers may fail it")]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_core::{Digest, NoProgress};
use nacre_guest::{
    config::Config,
    images::{PullError, PulledImage},
    service::{ImageService, ServiceError},
    store::{LayerId, Marks, Store},
};
use nacre_registry::{Fault, Registry};
use nacre_testkit::{BuiltLayer, Compression, Entry, Image, Layer, SmallDisk};
use serde_json::json;

/// A guest without a policy, for tests of everything else.
struct Guest {
    dir: tempfile::TempDir,
    registry: Registry,
    config: Config,
}

impl Guest {
    fn new() -> Option<Self> {
        if !nacre_testkit::root() {
            return None;
        }
        let registry = Registry::memory().unwrap();
        let mut config = Config::default();
        config.trust.insecure_policy = true;
        config.trust.admission.plain_unsigned = true;
        config.registry.insecure_registries = vec![registry.host()];
        config.registry.retries = 1;
        config.registry.first_backoff = Duration::from_millis(10);
        Some(Self { dir: tempfile::tempdir().unwrap(), registry, config })
    }

    fn store_at(&self, root: &Path) -> Store {
        Store::open(root, Marks::Trusted, true).unwrap()
    }

    fn service_at(&self, root: &Path) -> ImageService {
        ImageService::new(&self.config, self.store_at(root), Arc::new(NoProgress)).unwrap()
    }

    fn service(&self) -> ImageService {
        self.service_at(&self.dir.path().join("store"))
    }

    fn name(&self, tag: &str) -> String {
        format!("docker://{}/t/app:{tag}", self.registry.host())
    }

    fn push(&self, image: &Image, tag: &str) {
        image.push(&self.registry, "t/app", tag);
    }

    fn pull(&self, tag: &str) -> Result<PulledImage, ServiceError> {
        self.service().pull(&self.name(tag))
    }

    /// No layer, no image, no staging directory.
    fn assert_empty(&self) {
        for place in ["layers", "images", "refs", "staging"] {
            let left: Vec<_> =
                std::fs::read_dir(self.dir.path().join("store").join(place)).unwrap().flatten().collect();
            assert!(left.is_empty(), "{place}: {left:?}");
        }
    }

    fn assert_refused(&self, tag: &str, words: &[&str]) -> String {
        let error = self.pull(tag).expect_err("the image is refused").to_string();
        for word in words {
            assert!(error.contains(word), "'{word}' is not in: {error}");
        }
        self.assert_empty();
        error
    }
}

/// Bytes that do not compress.
fn noise(count: usize) -> Vec<u8> {
    nacre_testkit::Rng::new(7).bytes(count)
}

fn file(pulled: &PulledImage, layer: usize, path: &str) -> String {
    std::fs::read_to_string(pulled.layers[layer].path().join(path)).unwrap()
}

#[test]
fn an_image_is_fetched_once() {
    let Some(guest) = Guest::new() else { return };
    guest.push(&Image::builder().layer([Entry::file("a", "1")]).layer([Entry::file("b", "2")]).build(), "1");
    let first = guest.pull("1").unwrap();
    assert_eq!((first.fetched, first.layers.len()), (2, 2));
    assert_eq!(file(&first, 1, "b"), "2");
    drop(first);
    guest.registry.clear_log();
    let second = guest.pull("1").unwrap();
    assert_eq!(second.fetched, 0);
    assert_eq!(
        guest.registry.requests().iter().filter(|request| request.path != "/v2/").count(),
        1,
        "one request: the manifest"
    );
}

#[test]
fn layers_are_shared_between_images() {
    let Some(guest) = Guest::new() else { return };
    let base = [Entry::file("base", "b")];
    guest.push(&Image::builder().layer(base.clone()).layer([Entry::file("x", "1")]).build(), "1");
    guest.push(&Image::builder().layer(base).layer([Entry::file("x", "2")]).build(), "2");
    guest.pull("1").unwrap();
    let second = guest.pull("2").unwrap();
    assert_eq!(second.fetched, 1);
    assert_eq!(file(&second, 1, "x"), "2");
}

#[test]
fn equal_layers_keep_their_topmost_place() {
    let Some(guest) = Guest::new() else { return };
    let (a, b) = ([Entry::file("f", "a")], [Entry::file("f", "b")]);
    guest.push(&Image::builder().layer(a.clone()).layer(b).layer(a).build(), "aba");
    let pulled = guest.pull("aba").unwrap();
    let order: Vec<String> = (0..pulled.layers.len()).map(|layer| file(&pulled, layer, "f")).collect();
    assert_eq!(order, ["b", "a"]);
    assert_eq!(pulled.image.layers.len(), 3, "the record has the image's own list");
}

#[test]
fn all_compressions_and_both_kinds_of_manifest_are_read() {
    let Some(guest) = Guest::new() else { return };
    for (tag, compression) in [("gzip", Compression::Gzip), ("zstd", Compression::Zstd), ("plain", Compression::None)] {
        let image = Image::builder().layer_of(Layer::of([Entry::file("f", tag)]), compression).build();
        guest.push(&image, tag);
        assert_eq!(file(&guest.pull(tag).unwrap(), 0, "f"), tag);
    }
    guest.push(&Image::builder().docker().layer([Entry::file("f", "docker")]).build(), "docker");
    assert_eq!(file(&guest.pull("docker").unwrap(), 0, "f"), "docker");
}

#[test]
fn an_index_is_resolved_to_this_machines_image() {
    let Some(guest) = Guest::new() else { return };
    let image = Image::hello();
    guest.push(&image, "one");
    let other = json!({ "mediaType": image.media_type, "digest": Digest::sha256(b"other"), "size": 7,
        "platform": { "os": "plan9", "architecture": "mips" } });
    let host = nacre_oci::manifest::Platform::host();
    let mine = json!({ "mediaType": image.media_type, "digest": image.digest, "size": image.manifest.len(), "platform": host });
    let index =
        json!({ "schemaVersion": 2, "mediaType": nacre_oci::manifest::media::OCI_INDEX, "manifests": [other, mine] });
    let bytes = index.to_string().into_bytes();
    guest.registry.put_manifest("t/app", Some("index"), nacre_oci::manifest::media::OCI_INDEX, &bytes).unwrap();
    let pulled = guest.pull("index").unwrap();
    assert_eq!(pulled.image.manifest, image.digest);
    drop(pulled);
    // From the store alone, index and all.
    let service = guest.service();
    let name = service.images().store().name(&guest.name("index").parse().unwrap()).unwrap().unwrap();
    assert_eq!(name.chain, [Digest::sha256(&bytes), image.digest]);
    assert_eq!(service.images().open(&name).unwrap().layers.len(), 1);
}

#[test]
fn a_flipped_bit_is_refused_at_every_place() {
    let Some(guest) = Guest::new() else { return };
    let image = Image::builder().layer([Entry::file("f", noise(3000))]).build();
    guest.push(&image, "1");
    let length = image.layers[0].bytes.len() as u64;
    for offset in [0, 1, 9, length / 2, length - 1] {
        guest.registry.set_faults(move |request| match request.is_blob_get() {
            true => Fault::FlipBit(offset),
            false => Fault::Serve,
        });
        // The config is a blob too, and comes first.
        guest.assert_refused("1", &["digest mismatch"]);
    }
    let layer = image.layers[0].digest.to_string();
    guest.registry.set_faults(move |request| match request.path.ends_with(&layer) {
        true => Fault::FlipBit(length - 1),
        false => Fault::Serve,
    });
    guest.assert_refused("1", &["layer 0", "digest mismatch"]);
    guest.registry.set_faults(|request| if request.is_manifest_get() { Fault::FlipBit(200) } else { Fault::Serve });
    assert!(guest.service().pull(&format!("docker://{}/t/app@{}", guest.registry.host(), image.digest)).is_err());
    guest.assert_empty();
}

#[test]
fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let Some(guest) = Guest::new() else { return };
    let layer = Layer::of([Entry::file("f", "x")]);
    let built = BuiltLayer {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        bytes: Compression::Gzip.apply(layer.tar()),
        digest: Digest::sha256(&Compression::Gzip.apply(layer.tar())),
        diff_id: Digest::sha256(b"another tar"),
    };
    guest.push(&Image::builder().stored_layer(built).build(), "diff");
    guest.assert_refused("diff", &["diff_id mismatch"]);
    guest.push(
        &Image::builder().layer([Entry::file("f", "x")]).set_manifest("/layers/0/size", json!(5)).build(),
        "size",
    );
    guest.assert_refused("size", &["5"]);
    guest.push(
        &Image::builder().layer([Entry::file("f", "x")]).set_config("/rootfs/diff_ids", json!([])).build(),
        "none",
    );
    guest.assert_refused("none", &["rootfs.diff_ids", "0 entries"]);
}

#[test]
fn one_bad_layer_leaves_nothing_of_the_others_but_whole_ones() {
    let Some(guest) = Guest::new() else { return };
    let builder = Image::builder().layer([Entry::file("good", noise(100_000))]);
    guest.push(&builder.layer([Entry::file("../../bad", "x")]).build(), "1");
    let error = guest.pull("1").unwrap_err().to_string();
    assert!(error.contains("layer 1") && error.contains("../../bad"), "{error}");
    let store = guest.store_at(&guest.dir.path().join("store"));
    assert!(store.names().unwrap().is_empty());
    store.collect().unwrap();
    guest.assert_empty();
}

#[test]
fn concurrent_pulls_of_one_image_fetch_it_once() {
    let Some(guest) = Guest::new() else { return };
    let image =
        Image::builder().layer([Entry::file("a", noise(200_000))]).layer([Entry::file("b", noise(50_000))]).build();
    guest.push(&image, "1");
    std::thread::scope(|scope| {
        for _ in 0..6 {
            // A service each, as processes have.
            scope.spawn(|| assert_eq!(guest.pull("1").unwrap().layers.len(), 2));
        }
    });
    for layer in &image.layers {
        let digest = layer.digest.to_string();
        assert_eq!(guest.registry.count(|request| request.is_blob_get() && request.path.ends_with(&digest)), 1);
    }
}

#[test]
fn a_stored_image_is_judged_by_the_policy_of_the_day() {
    let Some(mut guest) = Guest::new() else { return };
    guest.push(&Image::hello(), "1");
    guest.pull("1").unwrap();
    let policy = guest.dir.path().join("policy.json");
    std::fs::write(&policy, r#"{"default":[{"type":"reject"}]}"#).unwrap();
    guest.config.trust.insecure_policy = false;
    guest.config.trust.policy = Some(policy.display().to_string());
    let service = guest.service();
    let name = service.images().store().name(&guest.name("1").parse().unwrap()).unwrap().unwrap();
    for error in [service.images().open(&name).unwrap_err(), service.images().verify_stored(&name).unwrap_err()] {
        assert!(matches!(error, PullError::Trust(_)), "{error}");
        assert!(error.to_string().contains("policy.json"), "{error}");
    }
    assert!(guest.pull("1").is_err());
    guest.config.trust.policy = None;
    guest.config.trust.insecure_policy = true;
    guest.config.trust.admission.plain_unsigned = false;
    let error = guest.pull("1").unwrap_err().to_string();
    assert!(error.contains("plain_unsigned"), "{error}");
}

#[test]
fn a_cut_download_goes_on_and_a_dead_one_ends_in_time() {
    let Some(mut guest) = Guest::new() else { return };
    guest.push(&Image::builder().layer([Entry::file("f", noise(500_000))]).build(), "1");
    guest.registry.set_faults(|request| match request.is_blob_get() && request.attempt == 1 {
        true => Fault::CutAfter(100),
        false => Fault::Serve,
    });
    assert_eq!(guest.pull("1").unwrap().fetched, 1);

    guest.config.registry.stall_timeout = Duration::from_millis(300);
    guest.push(&Image::builder().layer([Entry::file("g", noise(500_000))]).build(), "2");
    guest.registry.set_faults(|request| if request.is_blob_get() { Fault::StallAfter(100) } else { Fault::Serve });
    let start = Instant::now();
    let error = guest.pull("2").unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(10), "{error}");
    assert!(error.contains("stall") || error.contains("nothing") || error.contains("time"), "{error}");
}

#[test]
fn a_full_disk_and_a_read_only_one_are_errors() {
    let Some(guest) = Guest::new() else { return };
    guest.push(&Image::builder().layer([Entry::file("f", noise(4 << 20))]).build(), "1");
    let Some(disk) = SmallDisk::mount(2 << 20) else { return };
    let service = guest.service_at(disk.path());
    let error = service.pull(&guest.name("1")).unwrap_err().to_string();
    assert!(error.contains("full"), "{error}");
    assert_eq!(std::fs::read_dir(disk.path().join("layers")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(disk.path().join("staging")).unwrap().count(), 0);
    // What was there still works, and room makes the same pull work.
    guest.push(&Image::hello(), "small");
    drop(service.pull(&guest.name("small")).unwrap());
    disk.set_read_only(true);
    let error = service.pull(&guest.name("small")).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("read-only"), "{error}");
    disk.set_read_only(false);
}

#[test]
fn a_store_in_memory_must_be_asked_for() {
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let error = Store::open(disk.path(), Marks::Trusted, false).unwrap_err().to_string();
    assert!(error.contains("--allow-tmpfs"), "{error}");
}

#[test]
fn removed_images_leave_nothing_behind() {
    let Some(guest) = Guest::new() else { return };
    guest.push(
        &Image::builder().layer([Entry::file("only/implied/dirs", "x")]).layer([Entry::file("only/y", "y")]).build(),
        "1",
    );
    drop(guest.pull("1").unwrap());
    let store = guest.store_at(&guest.dir.path().join("store"));
    let name = store.names().unwrap().remove(0);
    store.remove(&name).unwrap();
    let collected = store.collect().unwrap();
    assert!(collected.layers.iter().any(|layer| matches!(layer, LayerId::Content(_))));
    guest.assert_empty();
}

#[test]
fn docker_archives_layouts_and_directories_are_pulled_too() {
    let Some(guest) = Guest::new() else { return };
    let layout = guest.dir.path().join("layout");
    Image::hello().write_layout(&layout, "x");
    let pulled = guest.service().pull(&format!("oci:{}:x", layout.display())).unwrap();
    assert_eq!(file(&pulled, 0, "hello"), "hello, world\n");
}

#[test]
fn an_encrypted_layer_needs_its_key_although_it_is_stored() {
    use std::io::Read as _;
    let Some(mut guest) = Guest::new() else { return };
    let key = nacre_core::jose::PrivateKey::generate_p256();
    let path = guest.dir.path().join("key.pem");
    std::fs::write(&path, key.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
    let mut recipients = nacre_oci::crypt::Recipients::new();
    recipients.add_public_key(key.public());

    let layer = Layer::of([Entry::file("secret", "the secret")]);
    let plain = Compression::Zstd.apply(layer.tar());
    let descriptor = nacre_oci::manifest::Descriptor::of("application/vnd.oci.image.layer.v1.tar+zstd", &plain);
    let mut reader = nacre_oci::crypt::encrypt_layer(&descriptor, plain.as_slice(), &recipients).unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    let digest = Digest::sha256(&bytes);
    let descriptor = reader.finish(digest, bytes.len() as u64).unwrap();
    let built = BuiltLayer { media_type: descriptor.media_type, bytes, digest, diff_id: Digest::sha256(layer.tar()) };
    let builder = Image::builder().stored_layer(built).layer([Entry::file("open", "for all")]);
    guest.push(&builder.set_manifest("/layers/0/annotations", json!(descriptor.annotations)).build(), "1");

    guest.config.trust.admission.plain_unsigned = true;
    let error = guest.pull("1").unwrap_err().to_string();
    assert!(error.contains("unsigned") || error.contains("mix"), "a mix must be signed: {error}");
    let only = Image::builder().stored_layer(BuiltLayer {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd+encrypted".into(),
        bytes: guest.registry.blob(&digest).unwrap().unwrap(),
        digest,
        diff_id: Digest::sha256(layer.tar()),
    });
    guest.push(&only.set_manifest("/layers/0/annotations", json!(descriptor.annotations)).build(), "2");
    guest.assert_refused("2", &["layer 0", "key"]);
    guest.config.decryption_keys = vec![path.display().to_string()];
    assert_eq!(file(&guest.pull("2").unwrap(), 0, "secret"), "the secret");
    // The layer is in the store now; who has not the key may not have it.
    guest.config.decryption_keys.clear();
    let error = guest.pull("2").unwrap_err();
    assert!(matches!(error, ServiceError::Pull(PullError::Key { index: 0, .. })), "{error}");
    let service = guest.service();
    let name = service.images().store().names().unwrap().remove(0);
    assert!(matches!(service.images().open(&name), Err(PullError::Key { .. })));
    // Nor may a plain image have it that names its diff_id: it has to bring the layer itself.
    let thief = Image::builder().stored_layer(BuiltLayer {
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        bytes: b"not the layer".to_vec(),
        digest: Digest::sha256(b"not the layer"),
        diff_id: Digest::sha256(layer.tar()),
    });
    guest.push(&thief.build(), "3");
    let error = guest.pull("3").unwrap_err();
    assert!(matches!(error, ServiceError::Pull(PullError::Layer { index: 0, .. })), "{error}");
}
