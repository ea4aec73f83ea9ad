//! Images that skopeo encrypts and signs, in Debian's docker-registry behind TLS and a password, are pulled and run; images that we
//! encrypt and sign there are decrypted and verified by skopeo; what is not as it must be is refused and leaves nothing.
//!
//! Debian's skopeo is built without sigstore, so openssl is the peer for cosign's signatures; it knows no key providers either, so of
//! those only the program is not ours.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_testkit::{Compression, DockerRegistry, DockerRegistryOptions, Entry, Image, Layer, Tls, require, run};
use serde_json::{Value, json};

use crate::support::{Gpg, Place, assert_refused, runnable, said};

/// A key provider's program, which "wraps" by turning the letters by thirteen.
const PROVIDER: &str = r#"input=$(cat)
case $input in
*'"op":"keywrap"'*) results=keywrapresults; from=optsdata; to=annotation ;;
*) results=keyunwrapresults; from=annotation; to=optsdata ;;
esac
value=$(printf %s "$input" | sed "s/.*\"$from\":\"\([^\"]*\)\".*/\1/" | base64 -d | tr A-Za-z N-ZA-Mn-za-m | base64 -w0)
printf '{"%s":{"%s":"%s"}}' "$results" "$to" "$value""#;

/// The scheme that Debian's skopeo does not have.
const PROVIDED: &str = "provider";

/// How layers are encrypted: skopeo's `--encryption-key`, and the `--decryption-key`s that open them.
struct Scheme {
    name: &'static str,
    recipient: String,
    keys: Vec<String>,
}

/// A layer in each compression.
fn small() -> Image {
    let file = |name: &str| Layer::of([Entry::file(name, name.repeat(1000))]);
    Image::builder()
        .layer_of(file("gzip"), Compression::Gzip)
        .layer_of(file("zstd"), Compression::Zstd)
        .layer_of(file("other"), Compression::Gzip)
        .build()
}

/// The registry, the keys of everybody, and an image.
struct Scene {
    place: Place,
    registry: DockerRegistry,
    tls: Tls,
    gpg: Gpg,
    image: Image,
}

impl Scene {
    fn new() -> Option<Self> {
        let (_skopeo, openssl, tls) = (require("skopeo")?, require("openssl")?, Tls::new()?);
        let registry = DockerRegistry::start(&DockerRegistryOptions { basic_auth: true, tls: Some(&tls) })?;
        let (place, gpg) = (Place::new(), Gpg::new()?);
        for arguments in [
            "req -x509 -newkey rsa:2048 -nodes -keyout rsa.pem -out rsa.crt -days 30 -subj /CN=nacre-test/O=Nacre",
            "pkey -in rsa.pem -pubout -out rsa.pub",
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ec.pem",
            "pkey -in ec.pem -pubout -out ec.pub",
        ] {
            run(place.program(&openssl).args(arguments.split(' ')));
        }
        fs::write(place.at("gpg.secret"), gpg.run(&["--export-secret-keys"])).unwrap();
        fs::write(place.at("gpg.public"), gpg.run(&["--export"])).unwrap();
        let password = STANDARD.encode(format!("{}:{}", DockerRegistry::USER, DockerRegistry::PASSWORD));
        place.write("auth.json", json!({"auths": {registry.host(): {"auth": password}}}).to_string());
        let provider = json!({"cmd": {"path": "/bin/sh", "args": ["-c", PROVIDER]}});
        place.write("providers.json", json!({"key-providers": {"turn": provider}}).to_string());
        fs::create_dir(place.at("registries.d")).unwrap();
        let lookaside = format!("file://{}", place.text("lookaside"));
        place.write("registries.d/test.yaml", format!("default-docker:\n  sigstore: {lookaside}\n"));
        let image = small();
        image.write_layout(&place.at("layout"), "v1");
        let scene = Self { place, registry, tls, gpg, image };
        let by_gpg = json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": scene.place.text("gpg.public")});
        scene.policy("policy.json", &by_gpg);
        Some(scene)
    }

    /// Writes a policy that wants this of the registry's images, and none of others.
    fn policy(&self, name: &str, requirement: &Value) -> String {
        let docker = json!({self.registry.host(): [requirement]});
        let policy = json!({"default": [{"type": "reject"}], "transports": {"docker": docker}});
        self.place.write(name, policy.to_string())
    }

    fn schemes(&self) -> Vec<Scheme> {
        let at = |name: &str| self.place.text(name);
        let scheme = |name, recipient: String, keys: &[&str]| Scheme {
            name,
            recipient,
            keys: keys.iter().map(|key| if key.contains(':') { (*key).to_owned() } else { at(key) }).collect(),
        };
        vec![
            scheme("jwe-rsa", format!("jwe:{}", at("rsa.pub")), &["rsa.pem"]),
            scheme("jwe-ec", format!("jwe:{}", at("ec.pub")), &["ec.pem"]),
            scheme("pkcs7", format!("pkcs7:{}", at("rsa.crt")), &["rsa.pem", "rsa.crt"]),
            scheme("pgp", format!("pgp:{}", Gpg::ADDRESS), &["gpg.secret"]),
            scheme(PROVIDED, "provider:turn".into(), &["provider:turn"]),
        ]
    }

    fn name(&self, tag: &str) -> String {
        format!("docker://{}/team/app:{tag}", self.registry.host())
    }

    fn layout(&self) -> String {
        format!("oci:{}:v1", self.place.text("layout"))
    }

    fn environment(&self, mut command: Command) -> Command {
        command.env("GNUPGHOME", self.gpg.home()).env("OCICRYPT_KEYPROVIDER_CONFIG", self.place.at("providers.json"));
        command
    }

    /// `skopeo copy`, with its global options before.
    fn skopeo(&self, global: &[&str], side: &str, options: &[&str], from: &str, to: &str) -> Output {
        let mut command = self.environment(self.place.program("skopeo"));
        command.args(global).arg("--registries.d").arg(self.place.at("registries.d")).arg("copy");
        command.arg("--authfile").arg(self.place.at("auth.json"));
        command.arg(format!("--{side}-cert-dir")).arg(self.tls.ca_directory());
        command.args(options).args([from, to]).output().unwrap()
    }

    /// Has skopeo put the image into the registry.
    fn skopeo_pushes(&self, tag: &str, options: &[&str]) {
        let output = self.skopeo(&["--insecure-policy"], "dest", options, &self.layout(), &self.name(tag));
        assert!(output.status.success(), "{tag}: {}", said(&output));
    }

    /// A command of `nacre` that talks to the registry.
    fn nacre(&self, store: &str, command: &[&str], options: &[&str], operands: &[&str]) -> Output {
        let mut nacre = self.environment(self.place.nacre(store, command));
        nacre.args(["--ca", &self.tls.ca().display().to_string(), "--authfile", &self.place.text("auth.json")]);
        nacre.args(["--registries-d", &self.place.text("registries.d")]).args(options).args(operands);
        nacre.output().unwrap()
    }

    /// `nacre image pull` under the policy file, with these keys.
    fn pull(&self, store: &str, policy: &str, keys: &[String], tag: &str) -> Output {
        let policy = self.place.text(policy);
        let mut options = vec!["--policy", &policy];
        options.extend(keys.iter().flat_map(|key| ["--decryption-key", key]));
        self.nacre(store, &["image", "pull"], &options, &[&self.name(tag)])
    }

    /// `nacre image copy` from the layout into the registry.
    fn nacre_pushes(&self, tag: &str, options: &[&str]) {
        let output = self.nacre("none", &["image", "copy"], options, &[&self.layout(), &self.name(tag)]);
        assert!(output.status.success(), "{tag}: {}", said(&output));
    }

    /// The only signature in the lookaside.
    fn signature(&self) -> PathBuf {
        let images: Vec<_> = fs::read_dir(self.place.at("lookaside/team")).unwrap().collect();
        let [Ok(image)] = images.as_slice() else { panic!("{images:?}") };
        image.path().join("signature-1")
    }
}

#[test]
fn we_pull_and_run_what_skopeo_encrypts_and_signs() {
    let Some(scene) = Scene::new() else { return };
    let fingerprint = scene.gpg.fingerprint();
    for scheme in scene.schemes() {
        let name = scheme.name;
        if name == PROVIDED {
            continue;
        }
        scene.skopeo_pushes(name, &["--encryption-key", &scheme.recipient, "--sign-by", &fingerprint]);
        let store = format!("store-{name}");
        let output = scene.pull(&store, "policy.json", &[], name);
        assert_refused(&output, &[]);
        scene.place.assert_empty(&store);
        let output = scene.pull(&store, "policy.json", &scheme.keys, name);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    if !nacre_testkit::root() {
        return;
    }
    runnable(&scene.place, "echo ran; cat /second /third; exit 42").write_layout(&scene.place.at("layout"), "runs");
    let from = format!("oci:{}:runs", scene.place.text("layout"));
    let recipient = format!("jwe:{}", scene.place.text("ec.pub"));
    let options = ["--encryption-key", &recipient, "--sign-by", &fingerprint];
    let output = scene.skopeo(&["--insecure-policy"], "dest", &options, &from, &scene.name("runs"));
    assert!(output.status.success(), "{}", said(&output));
    let (policy, key) = (scene.place.text("policy.json"), scene.place.text("ec.pem"));
    let options = ["--policy", &policy, "--decryption-key", &key, "--quiet"];
    for runtime in ["builtin", "runc", "crun"].into_iter().filter(|name| *name == "builtin" || require(name).is_some())
    {
        let options = [&options[..], &["--runtime", runtime]].concat();
        let output = scene.nacre("store", &["run"], &options, &[&scene.name("runs")]);
        assert_eq!((output.status.code(), said(&output)), (Some(42), "ran\nzstd\ngzip\n".into()), "{runtime}");
    }
    let image = run(&mut scene.place.nacre("store", &["image", "ls", "--json"])).stdout;
    let image: Value = serde_json::from_slice(&image).unwrap();
    assert!(image[0]["admitted"].as_str().is_some_and(|text| text.contains(&policy)), "{image}");
    let output = scene.nacre("store", &["image", "verify"], &["--policy", &policy], &[&scene.name("runs")]);
    assert!(output.status.success() && said(&output).contains(&fingerprint), "{}", said(&output));
}

#[test]
fn skopeo_decrypts_and_verifies_what_we_encrypt_and_sign() {
    let Some(scene) = Scene::new() else { return };
    let sign = format!("gpg:{}", scene.place.text("gpg.secret"));
    for scheme in scene.schemes() {
        let name = scheme.name;
        scene.nacre_pushes(name, &["--encrypt", &scheme.recipient, "--sign", &sign]);
        let output = scene.pull(&format!("store-{name}"), "policy.json", &scheme.keys, name);
        assert!(output.status.success(), "{name}: {}", said(&output));
        if name == PROVIDED {
            eprintln!(
                "NOTE: Debian's skopeo knows no key providers: only we decrypt what a provider's program wrapped"
            );
            continue;
        }
        let policy = scene.place.text("policy.json");
        let to = format!("oci:{}:v1", scene.place.text(&format!("decrypted-{name}")));
        let keys = scheme.keys.iter().flat_map(|key| ["--decryption-key", key]);
        // A layout has no place for signatures; they are verified all the same.
        let keys: Vec<&str> = keys.chain(["--remove-signatures"]).collect();
        let output = scene.skopeo(&["--policy", &policy], "src", &keys, &scene.name(name), &to);
        assert!(output.status.success(), "{name}: {}", said(&output));
        for layer in &scene.image.layers {
            let path = format!("decrypted-{name}/blobs/sha256/{}", layer.digest.hex());
            assert_eq!(fs::read(scene.place.at(&path)).unwrap(), layer.bytes, "{name}");
        }
    }
    // skopeo refuses what we did not sign, and what somebody else did.
    scene.nacre_pushes("unsigned", &[]);
    let policy = scene.place.text("policy.json");
    let to = format!("oci:{}:v1", scene.place.text("unsigned"));
    let output = scene.skopeo(&["--policy", &policy], "src", &[], &scene.name("unsigned"), &to);
    assert!(!output.status.success() && said(&output).contains("signature"), "{}", said(&output));
}

#[test]
fn openssl_verifies_our_cosign_signatures_and_so_do_we() {
    let Some(scene) = Scene::new() else { return };
    eprintln!("NOTE: Debian's skopeo is built without sigstore: openssl verifies cosign's signatures instead");
    let key = scene.place.text("ec.pem");
    let requirement = |path: &str| json!({"type": "sigstoreSigned", "keyPath": scene.place.text(path)});
    scene.policy("cosign.json", &requirement("ec.pub"));
    scene.policy("other.json", &requirement("rsa.pub"));
    let recipient = format!("jwe:{}", scene.place.text("rsa.pub"));
    scene.nacre_pushes("tagged", &["--encrypt", &recipient, "--sign", &key]);
    scene.nacre_pushes("bundle", &["--sign", &key, "--sign-bundle"]);
    for tag in ["tagged", "bundle"] {
        let keys = [scene.place.text("rsa.pem")];
        let output = scene.pull(&format!("other-{tag}"), "other.json", &keys, tag);
        assert_refused(&output, &["other.json"]);
        scene.place.assert_empty(&format!("other-{tag}"));
        let output = scene.pull(&format!("store-{tag}"), "cosign.json", &keys, tag);
        assert!(output.status.success(), "{tag}: {}", said(&output));
    }
    // The signature as a program of others gets it: its tag, fetched by skopeo.
    let digest = run(&mut scene.place.nacre("store-tagged", &["image", "ls", "--json"])).stdout;
    let digest: Value = serde_json::from_slice(&digest).unwrap();
    let tag = format!("{}.sig", digest[0]["manifest"].as_str().unwrap().replace(':', "-"));
    let to = format!("dir:{}", scene.place.text("signature"));
    let output = scene.skopeo(&["--insecure-policy"], "src", &[], &scene.name(&tag), &to);
    assert!(output.status.success(), "{}", said(&output));
    let manifest: Value =
        serde_json::from_slice(&fs::read(scene.place.at("signature/manifest.json")).unwrap()).unwrap();
    let layer = &manifest["layers"][0];
    let signature = layer["annotations"]["dev.cosignproject.cosign/signature"].as_str().unwrap();
    let signature = scene.place.write("raw", STANDARD.decode(signature).unwrap());
    let payload = scene.place.at("signature").join(layer["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    let public = scene.place.text("ec.pub");
    let mut openssl = scene.place.program("openssl");
    run(openssl.args(["dgst", "-sha256", "-verify", &public, "-signature", &signature]).arg(payload));
}

#[test]
fn what_cannot_be_trusted_is_refused_and_leaves_nothing() {
    let Some(scene) = Scene::new() else { return };
    let fingerprint = scene.gpg.fingerprint();
    let recipient = format!("jwe:{}", scene.place.text("ec.pub"));
    let (right, wrong) = ([scene.place.text("ec.pem")], [scene.place.text("rsa.pem")]);
    scene.skopeo_pushes("unsigned", &["--encryption-key", &recipient]);
    let output = scene.pull("store", "policy.json", &right, "unsigned");
    assert_refused(&output, &["team/app:unsigned", "policy.json", "signature"]);
    scene.place.assert_empty("store");

    scene.skopeo_pushes("signed", &["--encryption-key", &recipient, "--sign-by", &fingerprint]);
    let output = scene.pull("store", "policy.json", &wrong, "signed");
    assert_refused(&output, &["jwe", "key"]);
    scene.place.assert_empty("store");

    // The signature of another name, of another image, by nobody that is known, and changed ones.
    let signature = scene.signature();
    let good = fs::read(&signature).unwrap();
    let other = Gpg::new().unwrap();
    fs::write(scene.place.at("other.public"), other.run(&["--export"])).unwrap();
    let of_other = json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": scene.place.text("other.public")});
    scene.policy("other.json", &of_other);
    let output = scene.pull("store", "other.json", &right, "signed");
    assert_refused(&output, &["other.json", &fingerprint]);
    scene.place.assert_empty("store");
    for at in [good.len() / 2, good.len() - 1] {
        let mut changed = good.clone();
        changed[at] ^= 1;
        fs::write(&signature, changed).unwrap();
        let output = scene.pull("store", "policy.json", &right, "signed");
        assert_refused(&output, &["policy.json", "signature 1"]);
        scene.place.assert_empty("store");
    }
    fs::write(&signature, &good).unwrap();
    let options = ["--encryption-key", &recipient, "--sign-by", &fingerprint, "--sign-identity", "other.example/x:y"];
    scene.skopeo_pushes("renamed", &options);
    let output = scene.pull("store", "policy.json", &right, "renamed");
    assert_refused(&output, &["other.example/x:y"]);
    scene.place.assert_empty("store");

    // The blob of a layer, changed where the registry keeps it.
    let output = scene.pull("good", "policy.json", &right, "signed");
    assert!(output.status.success(), "{}", said(&output));
    let listed = run(&mut scene.place.nacre("good", &["image", "inspect", "--json", &scene.name("signed")])).stdout;
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    let digest = listed["manifest_document"]["layers"][1]["digest"].as_str().unwrap();
    let hex = digest.trim_start_matches("sha256:");
    let blob = format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]);
    let blob = scene.registry.data().join(blob);
    let mut bytes = fs::read(&blob).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&blob, bytes).unwrap();
    let output = scene.pull("store", "policy.json", &right, "signed");
    assert_refused(&output, &["digest"]);
    // Its other layers are as their digests say and may stay for the next attempt; no image is made of them.
    let changed = scene.image.layers[1].diff_id.hex();
    assert!(!scene.place.at(&format!("store/layers/sha256-{changed}")).exists());
    run(&mut scene.place.nacre("store", &["image", "gc"]));
    scene.place.assert_empty("store");
}

#[test]
fn a_registry_that_we_may_not_or_cannot_talk_to() {
    let Some(scene) = Scene::new() else { return };
    scene.skopeo_pushes("plain", &[]);
    let name = scene.name("plain");
    let pull = |options: &[&str]| {
        let options = [&["image", "pull", "--insecure-policy", "--allow-unsigned"], options].concat();
        let output = scene.place.nacre("store", &options).arg(&name).output().unwrap();
        (output.status.code(), said(&output))
    };
    let (ca, auth) = (scene.tls.ca().display().to_string(), scene.place.text("auth.json"));
    let (code, text) = pull(&["--authfile", &auth]);
    assert!(code == Some(5) && text.contains("certificate"), "{code:?} {text}");
    let (code, text) = pull(&["--ca", &ca]);
    assert!(code == Some(5) && text.contains("a name and a password"), "{code:?} {text}");
    scene.place.assert_empty("store");
    let (code, text) = pull(&["--ca", &ca, "--authfile", &auth]);
    assert_eq!(code, Some(0), "{text}");
    let directory = scene.tls.ca_directory().parent().unwrap().join("certs.d");
    fs::create_dir_all(directory.join(scene.registry.host())).unwrap();
    fs::copy(&ca, directory.join(scene.registry.host()).join("ca.crt")).unwrap();
    let (code, text) = pull(&["--cert-dir", &directory.display().to_string(), "--authfile", &auth]);
    assert_eq!(code, Some(0), "{text}");
}
