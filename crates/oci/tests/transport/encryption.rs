//! skopeo and we decrypt what the other one encrypted.

use std::{path::Path, process::Command};

use nacre_oci::{
    copy::{CopyOptions, EncryptLayers},
    crypt::{Keyring, Recipients},
    manifest::Manifest,
};
use nacre_testkit::{require, run};

use super::{copy_plain, copy_with, image, manifest};

struct Keys {
    private: String,
    public: String,
}

/// A new key pair; EC keys make ECDH-ES recipients, RSA keys RSA-OAEP ones.
fn keys(scratch: &Path, kind: &[&str]) -> Option<Keys> {
    let openssl = require("openssl")?;
    let at = |name: String| scratch.join(name).display().to_string();
    let (private, public) = (at(format!("{}.pem", kind[0])), at(format!("{}.pub", kind[0])));
    run(Command::new(&openssl).args(["genpkey", "-out", &private, "-algorithm"]).args(kind));
    run(Command::new(&openssl).args(["pkey", "-in", &private, "-pubout", "-out", &public]));
    Some(Keys { private, public })
}

fn layers(location: &str) -> Vec<(String, nacre_core::Digest)> {
    let layers = Manifest::parse(&manifest(location)).unwrap().layers;
    layers.into_iter().map(|layer| (layer.media_type, layer.digest)).collect()
}

#[test]
fn what_skopeo_encrypts_a_copy_decrypts_and_the_other_way_round() {
    let Some(skopeo) = require("skopeo") else { return };
    let skopeo = |arguments: &[&str]| run(Command::new(&skopeo).args(["--insecure-policy", "copy"]).args(arguments));
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).display().to_string();
    image().write_layout(&scratch.path().join("made"), "v1");
    let made = format!("oci:{}:v1", at("made"));
    let plain = format!("docker-archive:{}:team/app:1", at("plain.tar"));
    copy_plain(&made, &plain).unwrap();
    for kind in [["RSA", "-pkeyopt", "rsa_keygen_bits:2048"], ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]] {
        let Some(keys) = keys(scratch.path(), &kind) else { return };
        let (ring, strange) = (Keyring::from_args([&keys.private]).unwrap(), Keyring::new());
        let decrypt = CopyOptions { decrypt: Some(&ring), ..CopyOptions::default() };
        let kind = kind[0];
        let recipient = format!("jwe:{}", keys.public);

        let theirs = format!("oci:{}:v1", at(&format!("theirs-{kind}")));
        skopeo(&["--encryption-key", &recipient, &made, &theirs]);
        let out = format!("oci:{}:v1", at(&format!("out-{kind}")));
        copy_with(&theirs, &out, &decrypt).unwrap();
        assert_eq!(layers(&out), layers(&made));
        let without = CopyOptions { decrypt: Some(&strange), ..CopyOptions::default() };
        let error = copy_with(&theirs, &format!("oci:{}", at("none")), &without).unwrap_err().to_string();
        assert!(error.contains("no private key was given"), "{error}");
        assert!(!scratch.path().join("none").exists());

        // skopeo compresses plain tars while it encrypts them, and records the diff_id instead of the blob's digest.
        let compressed = format!("oci:{}:v1", at(&format!("compressed-{kind}")));
        skopeo(&["--encryption-key", &recipient, &plain, &compressed]);
        let tar = format!("docker-archive:{}:team/app:1", at(&format!("{kind}.tar")));
        copy_with(&compressed, &tar, &decrypt).unwrap();
        assert_eq!(layers(&tar), layers(&plain));
        let gzip = format!("dir:{}", at(&format!("gzip-{kind}")));
        copy_with(&compressed, &gzip, &decrypt).unwrap();
        assert!(layers(&gzip).iter().all(|(media_type, _)| media_type.ends_with("tar+gzip")));

        let recipients = Recipients::from_args([&recipient]).unwrap();
        let which = EncryptLayers::Some(vec![0, -1]);
        let encrypt = CopyOptions { encrypt: Some((&recipients, &which)), ..CopyOptions::default() };
        let ours = format!("oci-archive:{}:v1", at(&format!("ours-{kind}.tar")));
        copy_with(&made, &ours, &encrypt).unwrap();
        let back = format!("oci:{}:v1", at(&format!("back-{kind}")));
        skopeo(&["--decryption-key", &keys.private, &ours, &back]);
        assert_eq!(layers(&back), layers(&made));
    }
}
