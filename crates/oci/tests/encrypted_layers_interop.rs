//! What skopeo encrypts, we decrypt, and the other way round; each scheme of wrapping, each compression.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::Digest;
use nacre_oci::{
    crypt::{DecryptingReader, Keyring, Recipients, encrypt_layer, is_encrypted},
    manifest::{Descriptor, Manifest, RawManifest},
};
use nacre_testkit::{Compression, Entry, Image, Layer, require, run};

/// Keys that are made once, and their directory.
struct Keys {
    directory: tempfile::TempDir,
}

impl Keys {
    fn get() -> Option<&'static Self> {
        static KEYS: OnceLock<Option<Keys>> = OnceLock::new();
        KEYS.get_or_init(|| {
            let openssl = require("openssl")?;
            let keys = Self { directory: tempfile::tempdir().unwrap() };
            for arguments in [
                "req -x509 -newkey rsa:2048 -nodes -keyout rsa.pem -out rsa.crt -days 30 -subj /CN=nacre-test/O=Nacre",
                "pkey -in rsa.pem -pubout -out rsa.pub",
                "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ec.pem",
                "pkey -in ec.pem -pubout -out ec.pub",
                "pkcs8 -topk8 -in rsa.pem -out locked.pem -passout pass:s3cret",
                "rsa -in rsa.pem -traditional -aes256 -passout pass:s3cret -out traditional.pem",
                "req -x509 -newkey rsa:2048 -nodes -keyout other.pem -out other.crt -days 30 -subj /CN=other",
            ] {
                run(Command::new(&openssl).args(arguments.split(' ')).current_dir(keys.directory.path()));
            }
            Some(keys)
        })
        .as_ref()
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

/// A GnuPG home with a key; its agent ends with it.
struct Gpg(tempfile::TempDir, &'static str);

impl Gpg {
    const NAME: &str = "Nacre Test";
    const ADDRESS: &str = "nacre@example.com";
    fn new(algorithm: &str, passphrase: &'static str) -> Option<Self> {
        require("gpg")?;
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        let gpg = Self(tempfile::Builder::new().prefix("gpg").permissions(private).tempdir().unwrap(), passphrase);
        let user = format!("{} <{}>", Self::NAME, Self::ADDRESS);
        gpg.run(&["--quick-gen-key", &user, algorithm, "default", "never"]);
        Some(gpg)
    }

    fn run(&self, arguments: &[&str]) -> Vec<u8> {
        let mut command = Command::new("gpg");
        command
            .env("GNUPGHOME", self.0.path())
            .args(["--batch", "--pinentry-mode", "loopback", "--passphrase", self.1])
            .args(arguments);
        run(&mut command).stdout
    }

    fn fingerprint(&self) -> String {
        let listing = String::from_utf8(self.run(&["--list-keys", "--with-colons"])).unwrap();
        listing.lines().find_map(|line| line.strip_prefix("fpr:::::::::")).unwrap().trim_end_matches(':').to_owned()
    }

    fn add_subkey(&self, algorithm: &str) {
        self.run(&["--quick-add-key", &self.fingerprint(), algorithm, "encr", "never"]);
    }

    fn secret_file(&self) -> PathBuf {
        let path = self.0.path().join("secret.gpg");
        fs::write(&path, self.run(&["--export-secret-keys"])).unwrap();
        path
    }
}

impl Drop for Gpg {
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").env("GNUPGHOME", self.0.path()).args(["--kill", "gpg-agent"]).status();
    }
}

fn image() -> Image {
    let file = |name: &str| Layer::of([Entry::file(name, name.repeat(5000))]);
    Image::builder()
        .layer_of(file("gzip"), Compression::Gzip)
        .layer_of(file("zstd"), Compression::Zstd)
        .layer_of(file("plain"), Compression::None)
        .build()
}

fn blob(layout: &Path, digest: &Digest) -> Vec<u8> {
    fs::read(layout.join("blobs/sha256").join(digest.hex())).unwrap()
}

fn manifest(layout: &Path) -> Manifest {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    Manifest::parse(&RawManifest::new(blob(layout, &digest), None).unwrap()).unwrap()
}

fn decrypt(layer: &Descriptor, data: &[u8], ring: &Keyring, diff_id: Option<&Digest>) -> Vec<u8> {
    let secret = ring.unwrap(layer).unwrap();
    let mut plain = Vec::new();
    DecryptingReader::new(layer, data, &secret, diff_id).unwrap().read_to_end(&mut plain).unwrap();
    plain
}

type Environment<'a> = [(&'a str, &'a Path)];

fn skopeo(from: &str, to: &str, arguments: &[&str], environment: &Environment<'_>) -> Option<Output> {
    let mut command = Command::new(require("skopeo")?);
    command.args(["copy", "--insecure-policy"]).args(arguments).args([from, to]).envs(environment.iter().copied());
    Some(command.output().unwrap())
}

fn layout(directory: &Path) -> String {
    format!("oci:{}:v1", directory.display())
}

fn options<'a>(name: &'a str, values: &[&'a str]) -> Vec<&'a str> {
    values.iter().flat_map(|value| [name, value]).collect()
}

/// Has skopeo encrypt an image and opens it.
fn skopeo_encrypts(recipients: &[&str], environment: &Environment<'_>, ring: &Keyring) {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    let image = image();
    image.write_layout(&from, "v1");
    let arguments = options("--encryption-key", recipients);
    let Some(output) = skopeo(&layout(&from), &layout(&to), &arguments, environment) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let layers = manifest(&to).layers;
    assert_eq!(layers.len(), 3);
    for (layer, original) in layers.iter().zip(&image.layers) {
        assert!(is_encrypted(layer), "{}", layer.media_type);
        let data = blob(&to, &layer.digest);
        if original.bytes.starts_with(b"plain") {
            // It compresses a plain tar while it encrypts; the digest that it records then is the tar's.
            assert_eq!(layer.media_type, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
            assert_eq!(ring.unwrap(layer).unwrap().digest(), &original.diff_id);
            assert!(decrypt(layer, &data, ring, Some(&original.diff_id)).starts_with(&[0x1f, 0x8b]));
        } else {
            assert_eq!(layer.media_type, format!("{}+encrypted", original.media_type));
            assert_eq!(decrypt(layer, &data, ring, None), original.bytes, "{}", layer.media_type);
        }
    }
}

/// Encrypts an image and has skopeo open it, with the keys and not without.
fn skopeo_decrypts(recipients: &Recipients, keys: &[&str], environment: &Environment<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let (from, to, none) = (directory.path().join("from"), directory.path().join("to"), directory.path().join("none"));
    let image = image();
    write_encrypted(&image, recipients, &from);
    let arguments = options("--decryption-key", keys);
    let Some(output) = skopeo(&layout(&from), &layout(&to), &arguments, environment) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (layer, original) in manifest(&to).layers.iter().zip(&image.layers) {
        assert!(!is_encrypted(layer));
        assert_eq!((&layer.media_type, &layer.digest), (&original.media_type, &original.digest));
    }
    let wrong = Keys::get().unwrap().path("other.pem");
    let output = skopeo(&layout(&from), &layout(&none), &["--decryption-key", &wrong], &[]).unwrap();
    assert!(!output.status.success());
}

fn write_encrypted(image: &Image, recipients: &Recipients, directory: &Path) {
    let mut manifest: Manifest = serde_json::from_slice(&image.manifest).unwrap();
    let mut encrypted = image.clone();
    for (number, layer) in manifest.layers.iter_mut().enumerate() {
        let mut reader = encrypt_layer(layer, image.layers[number].bytes.as_slice(), recipients).unwrap();
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        *layer = reader.finish(Digest::sha256(&data), data.len() as u64).unwrap();
        encrypted.layers[number].bytes = data;
    }
    encrypted.manifest = serde_json::to_vec(&manifest).unwrap();
    encrypted.digest = Digest::sha256(&encrypted.manifest);
    encrypted.write_layout(directory, "v1");
}

fn ring(keys: &[&str]) -> Keyring {
    let mut ring = Keyring::new();
    keys.iter().for_each(|key| ring.add_arg(key.parse().unwrap()).unwrap());
    ring
}

fn recipients(arguments: &[&str]) -> Recipients {
    let mut recipients = Recipients::new();
    arguments.iter().for_each(|argument| recipients.add_arg(argument.parse().unwrap()).unwrap());
    recipients
}

#[test]
fn jwe_with_rsa_and_ec_keys() {
    let Some(keys) = Keys::get() else { return };
    let arguments = ["rsa.pub", "ec.pub"].map(|name| format!("jwe:{}", keys.path(name)));
    let arguments = arguments.each_ref().map(String::as_str);
    for name in ["rsa.pem", "ec.pem"] {
        let key = keys.path(name);
        skopeo_encrypts(&arguments, &[], &ring(&[&key]));
        skopeo_decrypts(&recipients(&arguments), &[&key], &[]);
    }
    skopeo_encrypts(&arguments[..1], &[], &ring(&[&keys.path("other.pem"), &keys.path("rsa.pem")]));
    skopeo_decrypts(&recipients(&arguments[..1]), &[&keys.path("rsa.pem")], &[]);
    skopeo_decrypts(&recipients(&arguments[1..]), &[&keys.path("ec.pem")], &[]);
}

#[test]
fn jwe_with_json_web_keys_of_another_library() {
    let (Some(fixtures), Some(_)) = (nacre_testkit::shared("fixtures/ocicrypt"), Keys::get()) else { return };
    let argument = format!("jwe:{}", fixtures.join("RSA_public.jwk").display());
    let key = fixtures.join("RSA_private.jwk").display().to_string();
    skopeo_encrypts(&[&argument], &[], &ring(&[&key]));
    skopeo_decrypts(&recipients(&[&argument]), &[&key], &[]);
}

#[test]
fn key_files_with_passphrases() {
    let Some(keys) = Keys::get() else { return };
    let argument = format!("jwe:{}", keys.path("rsa.pub"));
    let traditional = format!("{}:pass=s3cret", keys.path("traditional.pem"));
    skopeo_encrypts(&[&argument], &[], &ring(&[&traditional]));
    skopeo_encrypts(&[&argument], &[], &ring(&[&format!("{}:s3cret", keys.path("locked.pem"))]));
    for bad in ["locked.pem", "traditional.pem", "locked.pem:pass=wr0ng", "traditional.pem:pass=wr0ng", "rsa.pub"] {
        let error = Keyring::new().add_arg(keys.path(bad).parse().unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("key argument") && !error.contains("wr0ng"), "{error}");
    }
}

#[test]
fn pkcs7_with_a_key_and_a_certificate() {
    let Some(keys) = Keys::get() else { return };
    let arguments = ["other.crt", "rsa.crt"].map(|name| format!("pkcs7:{}", keys.path(name)));
    let arguments = arguments.each_ref().map(String::as_str);
    let (key, certificate) = (keys.path("rsa.pem"), keys.path("rsa.crt"));
    skopeo_encrypts(&arguments, &[], &ring(&[&key, &certificate]));
    skopeo_encrypts(&arguments[1..], &[], &ring(&[&key]));
    skopeo_decrypts(&recipients(&arguments[1..]), &[&key, &certificate], &[]);
    skopeo_decrypts(&recipients(&arguments), &[&key, &certificate], &[]);
}

#[test]
fn pgp_with_rsa_keys_of_gnupg() {
    let (Some(gpg), Some(_)) = (Gpg::new("rsa2048", ""), Keys::get()) else { return };
    let at_home = || Recipients::new().with_gnupg_home(gpg.0.path().into());
    let address: Result<_, _> = format!("pgp:{}", Gpg::ADDRESS).parse();
    assert!(at_home().add_arg(address.unwrap()).is_err(), "so far it can only sign");
    gpg.add_subkey("rsa2048");
    let secret = gpg.secret_file().display().to_string();
    for name in [Gpg::NAME, Gpg::ADDRESS] {
        let argument = format!("pgp:{name}");
        skopeo_encrypts(&[&argument], &[("GNUPGHOME", gpg.0.path())], &ring(&[&secret]));
        let mut recipients = at_home();
        recipients.add_arg(argument.parse().unwrap()).unwrap();
        skopeo_decrypts(&recipients, &[&secret], &[]);
    }
    for name in ["Nacre", "example.com", "nobody@example.com", &gpg.fingerprint()] {
        let error = at_home().add_arg(format!("pgp:{name}").parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("GnuPG's key ring has nobody"), "{error}");
    }
}

/// skopeo's OpenPGP library knows no elliptic curves: GnuPG itself is the peer.
#[test]
fn pgp_with_elliptic_curves_of_gnupg() {
    let Some(gpg) = Gpg::new("ed25519", "s3cret") else { return };
    gpg.add_subkey("cv25519");
    let path = gpg.secret_file().display().to_string();
    for (bad, problem) in [(path.clone(), "passphrase as <file>"), (format!("{path}:pass=wr0ng"), "does not unlock")] {
        let error = Keyring::new().add_arg(bad.parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains(problem) && !error.contains("wr0ng"), "{error}");
    }
    let mut recipients = Recipients::new();
    recipients.add_pgp(&gpg.run(&["--armor", "--export"])).unwrap();
    let plain = Descriptor::of("application/vnd.oci.image.layer.v1.tar", b"");
    let mut reader = encrypt_layer(&plain, &b""[..], &recipients).unwrap();
    reader.read_to_end(&mut Vec::new()).unwrap();
    let mut layer = reader.finish(Digest::sha256(b""), 0).unwrap();
    let ring = ring(&[&format!("{path}:pass=s3cret")]);
    decrypt(&layer, b"", &ring, None);

    let name = "org.opencontainers.image.enc.keys.pgp";
    let (ours, private, theirs) =
        (gpg.0.path().join("ours"), gpg.0.path().join("private"), gpg.0.path().join("theirs"));
    fs::write(&ours, STANDARD.decode(&layer.annotations[name]).unwrap()).unwrap();
    let json = gpg.run(&["--decrypt", &ours.display().to_string()]);
    assert!(json.starts_with(b"{\"symkey\":"));
    fs::write(&private, json).unwrap();
    let encrypt = ["--trust-model", "always", "--recipient", Gpg::ADDRESS, "--output", &theirs.display().to_string()];
    for compression in ["zlib", "uncompressed"] {
        let _ = fs::remove_file(&theirs);
        let private = private.display().to_string();
        gpg.run(&[&encrypt[..], &["--compress-algo", compression, "--encrypt", &private]].concat());
        layer.annotations.insert(name.into(), STANDARD.encode(fs::read(&theirs).unwrap()));
        decrypt(&layer, b"", &ring, None);
    }
}

/// An empty layer, encrypted.
fn empty_layer(recipients: &Recipients) -> Descriptor {
    let plain = Descriptor::of("application/vnd.oci.image.layer.v1.tar", b"");
    let mut reader = encrypt_layer(&plain, &b""[..], recipients).unwrap();
    reader.read_to_end(&mut Vec::new()).unwrap();
    reader.finish(Digest::sha256(b""), 0).unwrap()
}

#[test]
fn packets_that_are_cut_or_changed_never_open_as_something_else() {
    let Some(keys) = Keys::get() else { return };
    for (scheme, recipient, key) in [("jwe", "ec.pub", "ec.pem"), ("pkcs7", "rsa.crt", "rsa.pem")] {
        let layer = empty_layer(&recipients(&[&format!("{scheme}:{}", keys.path(recipient))]));
        let ring = ring(&[&keys.path(key)]);
        let digest = *ring.unwrap(&layer).unwrap().digest();
        let name = format!("org.opencontainers.image.enc.keys.{scheme}");
        let packet = STANDARD.decode(&layer.annotations[&name]).unwrap();
        let open = |packet: &[u8]| {
            let mut layer = layer.clone();
            layer.annotations.insert(name.clone(), STANDARD.encode(packet));
            ring.unwrap(&layer)
        };
        for length in 0..packet.len() {
            assert!(open(&packet[..length]).is_err(), "{scheme} cut to {length}");
        }
        for at in 0..packet.len() {
            let mut changed = packet.clone();
            changed[at] ^= 1 << (at % 8);
            // Some bytes say nothing that matters.
            assert!(open(&changed).is_ok_and(|secret| *secret.digest() == digest) || open(&changed).is_err());
        }
    }
}

#[test]
fn a_thousand_recipients() {
    let Some(keys) = Keys::get() else { return };
    let mut many = recipients(&[]);
    let other = nacre_core::jose::PrivateKey::generate_p256().public();
    (0..999).for_each(|_| many.add_public_key(other.clone()));
    many.add_arg(format!("jwe:{}", keys.path("ec.pub")).parse().unwrap()).unwrap();
    ring(&[&keys.path("ec.pem")]).unwrap(&empty_layer(&many)).unwrap();
}

/// The module takes its configuration from the environment, so the test runs itself once more in another one.
#[test]
fn pkcs11_with_a_key_in_softhsm() {
    const INNER: &str = "NACRE_TEST_SOFTHSM_KEY_FILE";
    let Some(keys) = Keys::get() else { return };
    if let Some(file) = std::env::var_os(INNER) {
        let file = PathBuf::from(file).display().to_string();
        for recipient in [keys.path("rsa.pub"), file.clone()] {
            // The public half of this key is not that of the token, so only the token's own may open.
            let layer = empty_layer(&recipients(&[&format!("pkcs11:{recipient}")]));
            assert_eq!(ring(&[&file]).unwrap(&layer).is_ok(), recipient == file);
        }
        return;
    }
    let (Some(softhsm), module) = (require("softhsm2-util"), Path::new("/usr/lib/softhsm/libsofthsm2.so")) else {
        return;
    };
    if !module.exists() {
        return nacre_testkit::skip("libsofthsm2.so is not where Debian has it");
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("tokens")).unwrap();
    fs::write(at("conf"), format!("directories.tokendir = {}\n", at("tokens").display())).unwrap();
    let util = |arguments: &str| {
        run(Command::new(&softhsm).env("SOFTHSM2_CONF", at("conf")).args(arguments.split(' ')));
    };
    util("--init-token --free --label nacre --pin 1234 --so-pin 1234");
    util(&format!("--import {} --token nacre --label key --id a1 --pin 1234", keys.path("rsa.pem")));
    let uri = format!("pkcs11:token=nacre;object=key;id=%a1?module-path={}&pin-value=1234", module.display());
    let yaml = format!("pkcs11:\n  uri: {uri}\nmodule:\n  env:\n    SOFTHSM2_CONF: {}\n", at("conf").display());
    fs::write(at("key.yaml"), yaml).unwrap();
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "pkcs11_with_a_key_in_softhsm"]).env("SOFTHSM2_CONF", at("conf"));
    again.env(INNER, at("key.yaml")).env("OCICRYPT_OAEP_HASHALG", "sha1");
    run(&mut again);
}
