//! What a copy changes when it is asked to, and what it keeps.

use std::{fs, path::Path};

use nacre_core::{Digest, jose::PrivateKey};
use nacre_oci::{
    copy::{
        CopyError, CopyOptions, EncryptLayers, ExistingSignatures, Format, Platforms, Recompress, Sign, SigningKey,
    },
    crypt::{CryptError, Keyring, Recipients},
    manifest::{Compression, Descriptor, Index, Manifest},
    trust::sign::CosignKey,
};
use nacre_testkit::{Entry, Image, Layer};
use serde_json::json;

use super::{copy_plain, copy_with, image, manifest, source, tree};

/// A key, and who has it.
fn keys() -> (Keyring, Recipients) {
    let key = PrivateKey::generate_p256();
    let (mut ring, mut recipients) = (Keyring::new(), Recipients::new());
    ring.add_key_file(key.to_pkcs8_pem().unwrap().as_bytes(), None).unwrap();
    recipients.add_public_key(key.public());
    (ring, recipients)
}

struct Place {
    scratch: tempfile::TempDir,
}

impl Place {
    fn new(image: &Image) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        image.write_layout(&scratch.path().join("made"), "v1");
        Self { scratch }
    }

    fn oci(&self, name: &str) -> String {
        format!("oci:{}:v1", self.scratch.path().join(name).display())
    }

    fn at(&self, transport: &str, name: &str) -> String {
        format!("{transport}:{}", self.scratch.path().join(name).display())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.scratch.path().join(name)
    }
}

fn layers(location: &str) -> Vec<Descriptor> {
    Manifest::parse(&manifest(location)).unwrap().layers
}

fn types(location: &str) -> Vec<String> {
    layers(location)
        .into_iter()
        .map(|layer| layer.media_type.rsplit_once(".v1.").map_or(layer.media_type.clone(), |(_, end)| end.to_owned()))
        .collect()
}

#[test]
fn an_encrypted_copy_decrypts_to_the_same_image() {
    let (ring, recipients) = keys();
    let image = image();
    let place = Place::new(&image);
    let all = EncryptLayers::All;
    let encrypt = CopyOptions { encrypt: Some((&recipients, &all)), ..CopyOptions::default() };
    let copied = copy_with(&place.oci("made"), &place.oci("secret"), &encrypt).unwrap();
    assert!(copied.changed);
    assert_eq!(types(&place.oci("secret")), ["tar+gzip+encrypted"; 3]);
    let config = Manifest::parse(&manifest(&place.oci("secret"))).unwrap().config;
    assert_eq!(config.digest, Digest::sha256(&image.config), "the config stays");
    let stored = tree(&place.path("secret"));
    for layer in &image.layers {
        assert!(!stored.keys().any(|path| path.ends_with(layer.digest.hex())), "no plain layer is there");
    }
    let decrypt = CopyOptions { decrypt: Some(&ring), ..CopyOptions::default() };
    copy_with(&place.oci("secret"), &place.oci("plain"), &decrypt).unwrap();
    assert_eq!(layers(&place.oci("plain")), layers(&place.oci("made")));
    // Without the key it goes along as it is, but not into a docker archive.
    assert!(!copy_plain(&place.oci("secret"), &place.at("dir", "along")).unwrap().changed);
    let error = copy_plain(&place.oci("secret"), &place.at("docker-archive", "x.tar")).unwrap_err().to_string();
    assert!(error.contains("give a decryption key"), "{error}");
    copy_with(&place.oci("secret"), &place.at("docker-archive", "y.tar"), &decrypt).unwrap();
    let diff_ids: Vec<_> = image.layers.iter().map(|layer| layer.diff_id).collect();
    let saved = layers(&place.at("docker-archive", "y.tar"));
    assert_eq!(saved.iter().map(|layer| layer.digest).collect::<Vec<_>>(), diff_ids);
    // From others to others: every layer has a new key.
    let both = CopyOptions { decrypt: Some(&ring), encrypt: Some((&recipients, &all)), ..CopyOptions::default() };
    copy_with(&place.oci("secret"), &place.oci("again"), &both).unwrap();
    assert_eq!(types(&place.oci("again")), ["tar+gzip+encrypted"; 3]);
    assert_ne!(layers(&place.oci("again"))[0].digest, layers(&place.oci("secret"))[0].digest);
}

#[test]
fn layers_to_encrypt_are_chosen_by_number() {
    let (_, recipients) = keys();
    let place = Place::new(&image());
    for (which, expected) in [
        (vec![0], ["tar+gzip+encrypted", "tar+gzip", "tar+gzip"]),
        (vec![-1], ["tar+gzip", "tar+gzip", "tar+gzip+encrypted"]),
        (vec![1, -3], ["tar+gzip+encrypted", "tar+gzip+encrypted", "tar+gzip"]),
    ] {
        let which = EncryptLayers::Some(which);
        let options = CopyOptions { encrypt: Some((&recipients, &which)), ..CopyOptions::default() };
        copy_with(&place.oci("made"), &place.oci("out"), &options).unwrap();
        assert_eq!(types(&place.oci("out")), expected);
    }
    for bad in [3, -4, i64::MIN, i64::MAX] {
        let which = EncryptLayers::Some(vec![bad]);
        let options = CopyOptions { encrypt: Some((&recipients, &which)), ..CopyOptions::default() };
        let error = copy_with(&place.oci("made"), &place.oci("none"), &options).unwrap_err().to_string();
        assert!(error.contains("has 3 layers"), "{error}");
        assert!(!place.path("none").exists());
    }
}

#[test]
fn a_layer_that_does_not_decrypt_leaves_nothing() {
    let (ring, recipients) = keys();
    let place = Place::new(&image());
    let all = EncryptLayers::All;
    let encrypt = CopyOptions { encrypt: Some((&recipients, &all)), ..CopyOptions::default() };
    copy_with(&place.oci("made"), &place.oci("secret"), &encrypt).unwrap();
    // The MAC of another layer, in an image that is consistent otherwise.
    let mut bad = Manifest::parse(&manifest(&place.oci("secret"))).unwrap();
    let pubopts = "org.opencontainers.image.enc.pubopts";
    let other = bad.layers[1].annotations[pubopts].clone();
    bad.layers[0].annotations.insert(pubopts.into(), other);
    let bytes = serde_json::to_vec(&bad).unwrap();
    fs::write(place.path("secret/blobs/sha256").join(Digest::sha256(&bytes).hex()), &bytes).unwrap();
    let mut index = Index::parse(
        &nacre_oci::manifest::RawManifest::new(fs::read(place.path("secret/index.json")).unwrap(), None).unwrap(),
    )
    .unwrap();
    index.manifests[0].digest = Digest::sha256(&bytes);
    index.manifests[0].size = bytes.len() as u64;
    fs::write(place.path("secret/index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    let decrypt = CopyOptions { decrypt: Some(&ring), ..CopyOptions::default() };
    for to in
        [place.oci("out"), place.at("dir", "out"), place.at("oci-archive", "out"), place.at("docker-archive", "out")]
    {
        let error = copy_with(&place.oci("secret"), &to, &decrypt).unwrap_err();
        assert!(matches!(error, CopyError::Crypt { source: CryptError::Mac, .. }), "{error:?}");
        assert_eq!(fs::read_dir(place.scratch.path()).unwrap().count(), 2, "{to}");
    }
}

#[test]
fn layers_are_recompressed_and_formats_converted() {
    let (_, recipients) = keys();
    let place = Place::new(&image());
    let with = |to: Compression, format| CopyOptions {
        compression: Some(Recompress { to, level: Some(3) }),
        format,
        ..CopyOptions::default()
    };
    let diff_ids = |location: &str| {
        let config = Manifest::parse(&manifest(location)).unwrap().config;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut source(location).unwrap().blob(&config).unwrap(), &mut bytes).unwrap();
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()["rootfs"].clone()
    };
    copy_with(&place.oci("made"), &place.oci("zstd"), &with(Compression::Zstd, None)).unwrap();
    assert_eq!(types(&place.oci("zstd")), ["tar+zstd"; 3]);
    copy_with(&place.oci("zstd"), &place.oci("tar"), &with(Compression::None, None)).unwrap();
    assert_eq!(types(&place.oci("tar")), ["tar"; 3]);
    copy_with(&place.oci("tar"), &place.oci("gzip"), &with(Compression::Gzip, Some(Format::Docker))).unwrap();
    assert_eq!(manifest(&place.oci("gzip")).media_type(), "application/vnd.docker.distribution.manifest.v2+json");
    for place_of in ["zstd", "tar", "gzip"] {
        assert_eq!(diff_ids(&place.oci(place_of)), diff_ids(&place.oci("made")));
    }
    // The same options make the same bytes.
    copy_with(&place.oci("tar"), &place.oci("twice"), &with(Compression::Gzip, Some(Format::Docker))).unwrap();
    assert_eq!(manifest(&place.oci("twice")).bytes(), manifest(&place.oci("gzip")).bytes());
    let error = copy_with(&place.oci("made"), &place.oci("no"), &with(Compression::Zstd, Some(Format::Docker)));
    assert!(error.unwrap_err().to_string().contains("use the OCI format"));
    let all = EncryptLayers::All;
    let options =
        CopyOptions { format: Some(Format::Docker), encrypt: Some((&recipients, &all)), ..CopyOptions::default() };
    let error = copy_with(&place.oci("made"), &place.oci("no"), &options).unwrap_err().to_string();
    assert!(error.contains("no encrypted layers"), "{error}");
}

#[test]
fn a_bomb_and_a_wrong_diff_id_stop_a_recompressing_copy() {
    let zeros = Layer::of([Entry::file("zeros", vec![0; 8 << 20])]);
    let bomb = Image::builder().layer_of(zeros, nacre_testkit::Compression::Gzip).build();
    let place = Place::new(&bomb);
    let options = CopyOptions {
        compression: Some(Recompress { to: Compression::Zstd, level: None }),
        layer_limit: 1 << 20,
        ..CopyOptions::default()
    };
    let error = copy_with(&place.oci("made"), &place.oci("out"), &options).unwrap_err();
    assert!(matches!(error, CopyError::Bomb), "{error:?}");
    let wrong = Image::builder()
        .layer([Entry::file("a", "a")])
        .set_config("/rootfs/diff_ids", json!([Digest::sha256(b"other")]))
        .build();
    let place = Place::new(&wrong);
    let options = CopyOptions { layer_limit: 1 << 30, ..options };
    let error = copy_with(&place.oci("made"), &place.oci("out"), &options).unwrap_err().to_string();
    assert!(error.contains("the uncompressed layer: digest mismatch"), "{error}");
    assert!(!place.path("out").exists());
}

/// Puts an index of two images under the tag `v1`.
fn write_index(directory: &Path) -> Digest {
    let mut manifests = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let image = Image::builder().layer([Entry::file("arch", architecture)]).build();
        image.write_layout(directory, architecture);
        let platform = json!({ "os": "linux", "architecture": architecture });
        manifests.push(json!({
            "mediaType": image.media_type, "digest": image.digest, "size": image.manifest.len(), "platform": platform,
        }));
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests }).to_string();
    let digest = Digest::sha256(index.as_bytes());
    fs::write(directory.join("blobs/sha256").join(digest.hex()), &index).unwrap();
    let entry = json!({
        "mediaType": media_type, "digest": digest, "size": index.len(),
        "annotations": { "org.opencontainers.image.ref.name": "v1" },
    });
    fs::write(directory.join("index.json"), json!({ "schemaVersion": 2, "manifests": [entry] }).to_string()).unwrap();
    digest
}

#[test]
fn an_index_is_copied_whole_or_one_platform_of_it() {
    let (ring, recipients) = keys();
    let scratch = tempfile::tempdir().unwrap();
    let place = Place { scratch };
    let digest = write_index(&place.path("made"));
    let all = || CopyOptions { platforms: Platforms::All, ..CopyOptions::default() };
    for to in [place.oci("all"), place.at("dir", "all-dir"), place.at("oci-archive", "all.tar")] {
        let copied = copy_with(&place.oci("made"), &to, &all()).unwrap();
        assert_eq!((copied.digest, copied.images.len()), (digest, 2));
        let back = copy_with(&to, &place.at("dir", "back"), &all()).unwrap();
        assert_eq!(back.digest, digest, "{to}");
    }
    let one = CopyOptions { platforms: Platforms::One("linux/arm64".parse().unwrap()), ..CopyOptions::default() };
    let copied = copy_with(&place.oci("made"), &place.oci("one"), &one).unwrap();
    assert_eq!(copied.images.len(), 1);
    assert!(!manifest(&place.oci("one")).is_index());
    let error = copy_with(&place.oci("made"), &place.at("docker-archive", "x.tar"), &all()).unwrap_err().to_string();
    assert!(error.contains("choose a platform"), "{error}");
    let none = CopyOptions { platforms: Platforms::One("linux/s390x".parse().unwrap()), ..CopyOptions::default() };
    let error = copy_with(&place.oci("made"), &place.oci("none"), &none).unwrap_err().to_string();
    assert!(error.contains("linux/amd64, linux/arm64"), "{error}");

    let which = EncryptLayers::All;
    let secret = CopyOptions { encrypt: Some((&recipients, &which)), ..all() };
    let copied = copy_with(&place.oci("made"), &place.oci("secret"), &secret).unwrap();
    let index = Index::parse(&manifest(&place.oci("secret"))).unwrap();
    assert_eq!(
        index.manifests.iter().map(|m| m.digest).collect::<Vec<_>>(),
        copied.images.iter().map(|i| i.to).collect::<Vec<_>>()
    );
    assert_eq!(index.manifests[1].platform.as_ref().unwrap().architecture, "arm64");
    let decrypt = CopyOptions {
        decrypt: Some(&ring),
        platforms: Platforms::One("linux/arm64".parse().unwrap()),
        ..CopyOptions::default()
    };
    copy_with(&place.oci("secret"), &place.oci("plain"), &decrypt).unwrap();
    assert_eq!(layers(&place.oci("plain")), layers(&place.oci("one")));
}

fn signed(keys: Vec<SigningKey<'_>>) -> CopyOptions<'_> {
    CopyOptions {
        sign: Some(Sign { keys, identity: Some("registry.example/team/app:1".parse().unwrap()) }),
        ..CopyOptions::default()
    }
}

fn attachments(location: &str, image: &Digest) -> usize {
    let source = source(location).unwrap();
    let tagged = source.signatures().unwrap().tagged(&format!("sha256-{}.sig", image.hex())).unwrap();
    tagged.map_or(0, |raw| Manifest::parse(raw.peek()).unwrap().layers.len())
}

#[test]
fn signatures_are_made_added_kept_and_never_lost_silently() {
    let image = image();
    let place = Place::new(&image);
    let [one, two, three] = [CosignKey::generate(), CosignKey::generate(), CosignKey::generate()];
    let keys = || vec![SigningKey::Cosign(&one), SigningKey::Bundle(&one)];
    let copied = copy_with(&place.oci("made"), &place.oci("signed"), &signed(keys())).unwrap();
    assert_eq!((copied.signatures_made, copied.signatures_kept), (2, 0));
    assert_eq!(attachments(&place.oci("signed"), &image.digest), 1);
    let referrers =
        |location: &str| source(location).unwrap().signatures().unwrap().referrers(&image.digest, None).unwrap().len();
    assert_eq!(referrers(&place.oci("signed")), 1);
    // Signatures come along, and others are added to them.
    let copied = copy_with(&place.oci("signed"), &place.oci("both"), &signed(vec![SigningKey::Cosign(&two)])).unwrap();
    assert_eq!((copied.signatures_made, copied.signatures_kept), (1, 2));
    assert_eq!(attachments(&place.oci("both"), &image.digest), 2);
    copy_with(&place.oci("made"), &place.oci("both"), &signed(vec![SigningKey::Cosign(&three)])).unwrap();
    assert_eq!(attachments(&place.oci("both"), &image.digest), 3, "what the destination has is kept");
    let archive = place.at("oci-archive", "both.tar");
    assert_eq!(copy_plain(&place.oci("signed"), &archive).unwrap().signatures_kept, 2);
    assert_eq!((attachments(&archive, &image.digest), referrers(&archive)), (1, 1));
    assert_eq!(manifest(&place.oci("both")).digest(), &image.digest, "the image is the one that a name means");

    // What changes the manifest makes signatures worthless, and some places store none.
    let zstd = |signatures| CopyOptions {
        compression: Some(Recompress { to: Compression::Zstd, level: None }),
        signatures,
        ..CopyOptions::default()
    };
    let error = copy_with(&place.oci("signed"), &place.oci("z"), &zstd(ExistingSignatures::Keep)).unwrap_err();
    assert!(error.to_string().contains("--remove-signatures"), "{error}");
    let copied = copy_with(&place.oci("signed"), &place.oci("z"), &zstd(ExistingSignatures::Remove)).unwrap();
    assert_eq!(copied.signatures_kept, 0);
    assert_eq!(attachments(&place.oci("z"), &copied.digest), 0);
    let error = copy_plain(&place.oci("signed"), &place.at("docker-archive", "d.tar")).unwrap_err();
    assert!(matches!(error, CopyError::SignaturesLost { .. }), "{error}");
    let error = copy_plain(&place.oci("signed"), &place.at("dir", "d")).unwrap_err();
    assert!(error.to_string().contains("stores no sigstore bundles"), "{error}");
    // Who signs has to say what; docker archives have a name but no place.
    let nameless = CopyOptions { sign: Some(Sign { keys: keys(), identity: None }), ..CopyOptions::default() };
    let error = copy_with(&place.oci("made"), &place.oci("n"), &nameless).unwrap_err().to_string();
    assert!(error.contains("--sign-identity"), "{error}");
    assert!(!place.path("n").exists() && !place.path("d").exists());
}

#[test]
fn cosign_signatures_go_through_a_directory_and_back() {
    let image = image();
    let place = Place::new(&image);
    let key = CosignKey::generate();
    let dir = place.at("dir", "signed");
    copy_with(&place.oci("made"), &dir, &signed(vec![SigningKey::Cosign(&key)])).unwrap();
    assert!(fs::read(place.path("signed/signature-1")).unwrap().starts_with(b"\0sigstore-json\n"));
    assert_eq!(copy_plain(&dir, &place.at("dir", "again")).unwrap().signatures_kept, 1);
    assert_eq!(tree(&place.path("again")), tree(&place.path("signed")));
    assert_eq!(copy_plain(&dir, &place.oci("layout")).unwrap().signatures_kept, 1);
    assert_eq!(attachments(&place.oci("layout"), &image.digest), 1);
    assert_eq!(copy_plain(&place.oci("layout"), &place.at("dir", "back")).unwrap().signatures_kept, 1);
    assert_eq!(tree(&place.path("back")), tree(&place.path("signed")));
}
