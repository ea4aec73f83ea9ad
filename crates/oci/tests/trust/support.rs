//! A signature storage in memory, a clock that stands still, GPG in a directory of its own.

use std::{
    collections::HashMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Clock, Digest, KeySource, KeySourceError, ResourceUri, SecretBytes, TrustedTime, Untrusted};
use nacre_oci::{
    manifest::{Descriptor, RawManifest, media},
    reference::{ImageRef, Location},
    source::{SignatureStorage, TransportError},
    trust::{
        Admitted, LookasideConfig, Policy, TrustContext, TrustError,
        sign::{BundleArtifact, CosignSignature},
    },
};
use nacre_testkit::run;
use time::OffsetDateTime;

/// 2026-01-01T00:00:00Z.
pub(crate) const NEW_YEAR: i64 = 1_767_225_600;

/// A clock that stands still, or has no time.
pub(crate) struct Fixed(pub(crate) Option<i64>);

impl Clock for Fixed {
    fn now(&self) -> Option<TrustedTime> {
        let now = OffsetDateTime::from_unix_timestamp(self.0?).unwrap();
        Some(TrustedTime { now, source: "the test's clock" })
    }
}

/// Resources by their URI.
#[derive(Default)]
pub(crate) struct Resources(pub(crate) HashMap<String, Vec<u8>>);

impl KeySource for Resources {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        let missing = || KeySourceError::NotFound { uri: uri.clone(), source_name: "the test".into() };
        self.0.get(&uri.to_string()).map(|bytes| SecretBytes::new(bytes.clone())).ok_or_else(missing)
    }
}

/// A signature storage in memory.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) tags: HashMap<String, RawManifest>,
    pub(crate) manifests: HashMap<Digest, RawManifest>,
    pub(crate) blobs: HashMap<Digest, Vec<u8>>,
    pub(crate) referrers: HashMap<Digest, Vec<Descriptor>>,
    pub(crate) native: HashMap<Digest, Vec<Vec<u8>>>,
    pub(crate) files: HashMap<String, Vec<u8>>,
    pub(crate) broken: bool,
}

impl Store {
    fn working(&self) -> Result<(), TransportError> {
        match self.broken {
            true => Err(TransportError::Network {
                what: "GET".into(),
                place: "the test".into(),
                attempts: 3,
                reason: "cut".into(),
            }),
            false => Ok(()),
        }
    }

    /// Puts cosign signatures where cosign puts them.
    pub(crate) fn put_cosign(&mut self, signatures: &[CosignSignature]) {
        let layers: Vec<&Descriptor> = signatures.iter().map(|signature| &signature.layer).collect();
        for signature in signatures {
            self.blobs.insert(signature.layer.digest, signature.payload.clone());
        }
        let config = Descriptor::of(media::OCI_CONFIG, b"{}");
        let json = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
        let manifest = RawManifest::new(json.to_string().into_bytes(), None).unwrap();
        self.tags.insert(signatures.first().unwrap().tag.clone(), manifest);
    }

    /// Puts a bundle among the referrers of its image.
    pub(crate) fn put_bundle(&mut self, image: &RawManifest, artifact: BundleArtifact) {
        for (descriptor, bytes) in artifact.blobs {
            self.blobs.insert(descriptor.digest, bytes);
        }
        self.referrers.entry(*image.digest()).or_default().push(artifact.descriptor);
        self.manifests.insert(*artifact.manifest.digest(), artifact.manifest);
    }
}

impl SignatureStorage for Store {
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        self.working()?;
        Ok(self.tags.get(tag).cloned().map(Untrusted::new))
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        let missing = || TransportError::NotFound { what: digest.to_string(), place: "the test".into() };
        self.manifests.get(digest).cloned().map(Untrusted::new).ok_or_else(missing)
    }

    fn small_blob(&self, descriptor: &Descriptor, _limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        let missing = || TransportError::NotFound { what: descriptor.digest.to_string(), place: "the test".into() };
        self.blobs.get(&descriptor.digest).cloned().map(Untrusted::new).ok_or_else(missing)
    }

    fn referrers(&self, subject: &Digest, _kind: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        self.working()?;
        Ok(self.referrers.get(subject).cloned().unwrap_or_default())
    }

    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        self.working()?;
        Ok(self.native.get(manifest).into_iter().flatten().cloned().map(Untrusted::new).collect())
    }

    fn get(&self, url: &str, _limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        self.working()?;
        Ok(self.files.get(url).cloned().map(Untrusted::new))
    }
}

/// A manifest with one layer of the given type.
pub(crate) fn manifest_of(layers: &[&str]) -> RawManifest {
    let layers: Vec<Descriptor> =
        layers.iter().enumerate().map(|(n, kind)| Descriptor::of(kind, n.to_string().as_bytes())).collect();
    let config = Descriptor::of(media::OCI_CONFIG, b"{}");
    let json = serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": layers,
    });
    RawManifest::new(json.to_string().into_bytes(), None).unwrap()
}

/// A plain image.
pub(crate) fn plain() -> RawManifest {
    manifest_of(&[media::OCI_LAYER])
}

/// An index with these manifests.
pub(crate) fn index_of(manifests: &[&RawManifest]) -> RawManifest {
    let entries: Vec<Descriptor> = manifests.iter().map(|manifest| manifest.descriptor()).collect();
    let json = serde_json::json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": entries});
    RawManifest::new(json.to_string().into_bytes(), None).unwrap()
}

/// One evaluation.
pub(crate) struct Case {
    pub(crate) policy: String,
    pub(crate) requested: String,
    pub(crate) chain: Vec<RawManifest>,
    pub(crate) store: Store,
    pub(crate) lookaside: LookasideConfig,
    pub(crate) keys: Resources,
    pub(crate) now: Option<i64>,
}

impl Case {
    /// A plain image `r.example/app:v1` under a policy of one requirement.
    pub(crate) fn new(requirement: &serde_json::Value) -> Self {
        Self {
            policy: serde_json::json!({"default": [requirement]}).to_string(),
            requested: "docker://r.example/app:v1".into(),
            chain: vec![plain()],
            store: Store::default(),
            lookaside: LookasideConfig::default(),
            keys: Resources::default(),
            now: Some(NEW_YEAR),
        }
    }

    pub(crate) fn image(&self) -> &RawManifest {
        self.chain.last().unwrap()
    }

    pub(crate) fn reference(&self) -> ImageRef {
        self.requested.trim_start_matches("docker://").parse().unwrap()
    }

    /// Stores a GPG signature beside the image.
    pub(crate) fn with_gpg(mut self, signature: Vec<u8>) -> Self {
        let digest = *self.image().digest();
        self.store.native.entry(digest).or_default().push(signature);
        self
    }

    pub(crate) fn evaluate(&self) -> Result<Admitted, TrustError> {
        let policy = Policy::parse(self.policy.as_bytes(), "/etc/test-policy.json").unwrap();
        let requested: Location = self.requested.parse().unwrap();
        let chain: Vec<&RawManifest> = self.chain.iter().collect();
        TrustContext {
            policy: &policy,
            requested: &requested,
            chain: &chain,
            storage: Some(&self.store),
            lookaside: &self.lookaside,
            keys: &self.keys,
            clock: &Fixed(self.now),
        }
        .evaluate()
    }

    /// The refusal, which has to name the policy and contain all of `parts`.
    #[track_caller]
    pub(crate) fn refused(&self, parts: &[&str]) {
        let error = match self.evaluate() {
            Ok(admitted) => panic!("accepted, not refused for {parts:?}: {admitted:?}"),
            Err(error) => error.to_string(),
        };
        for part in parts.iter().chain(&["/etc/test-policy.json"]) {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
}

/// `signedBy` with a keyring.
pub(crate) fn signed_by(keyring: &[u8]) -> serde_json::Value {
    serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyData": STANDARD.encode(keyring)})
}

/// The payload of a signature.
pub(crate) fn payload(kind: &str, digest: &Digest, reference: &str) -> String {
    serde_json::json!({
        "critical": {
            "type": kind,
            "image": {"docker-manifest-digest": digest.to_string()},
            "identity": {"docker-reference": reference},
        },
        "optional": {"creator": "test", "timestamp": 1},
    })
    .to_string()
}

/// The payload of a GPG signature of `r.example/app:v1`.
pub(crate) fn gpg_payload(digest: &Digest) -> String {
    payload("atomic container signature", digest, "r.example/app:v1")
}

/// GnuPG with a home of its own.
pub(crate) struct Gpg {
    program: PathBuf,
    home: tempfile::TempDir,
}

impl Gpg {
    /// `None`, after a loud skip, where gpg is not installed.
    pub(crate) fn new() -> Option<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let program = nacre_testkit::require("gpg")?;
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        // As few rounds as there may be: the passphrases of tests are known to all.
        std::fs::write(home.path().join("gpg-agent.conf"), "s2k-count 65536\n").unwrap();
        Some(Self { program, home })
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("GNUPGHOME", self.home.path()).args(["--batch", "--yes", "--quiet", "--no-tty"]);
        command.args(["--pinentry-mode", "loopback", "--passphrase", ""]);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Vec<u8> {
        run(self.command().args(arguments)).stdout
    }

    /// Feeds standard input.
    pub(crate) fn pipe(&self, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Makes a signing key at a time (`20200101T000000`), or now; gives its fingerprint.
    pub(crate) fn generate(&self, user: &str, lasts: &str, at: Option<&str>) -> String {
        let at = at.map(|at| format!("--faked-system-time={at}"));
        let mut arguments: Vec<&str> = at.iter().map(String::as_str).collect();
        arguments.extend(["--quick-gen-key", user, "ed25519", "sign", lasts]);
        self.run(&arguments);
        self.fingerprint(user)
    }

    pub(crate) fn fingerprint(&self, user: &str) -> String {
        let listing = String::from_utf8(self.run(&["--with-colons", "--list-keys", user])).unwrap();
        let line = listing.lines().find(|line| line.starts_with("fpr")).unwrap();
        line.split(':').nth(9).unwrap().to_owned()
    }

    pub(crate) fn export(&self) -> Vec<u8> {
        self.run(&["--export"])
    }

    /// Signs as skopeo has gpg sign.
    pub(crate) fn sign(&self, key: &str, more: &[&str], payload: &str) -> Vec<u8> {
        let mut arguments = vec!["-u", key];
        arguments.extend(more);
        arguments.push("--sign");
        self.pipe(&arguments, payload.as_bytes())
    }
}

impl Drop for Gpg {
    /// Ends the agent that gpg started for this home.
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").env("GNUPGHOME", self.home.path()).args(["--kill", "all"]).output();
    }
}
