//! The program under test, and a place for it that has nothing of this machine's settings.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nacre_testkit::{Compression, Entry, Image, Layer, run, tiny_rootfs};
use serde_json::Value;

/// A directory on a disk, with a home and a store for each name.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        // The system's temporary directory may be in memory, where no store is wanted.
        let place = Self { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() };
        fs::create_dir(place.at("home")).unwrap();
        place
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The path as text, for arguments.
    pub(crate) fn text(&self, name: &str) -> String {
        self.at(name).display().to_string()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.at(name), content).unwrap();
        self.text(name)
    }

    /// A program in this place's home, so that no configuration of the machine's user is read.
    pub(crate) fn program(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("HOME", self.at("home")).current_dir(self.dir.path());
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "GNUPGHOME"] {
            command.env_remove(name);
        }
        command
    }

    /// `nacre` with a store of this name.
    pub(crate) fn nacre(&self, store: &str, arguments: &[&str]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_nacre"));
        for name in ["NACRE_CONFIG", "NACRE_POLICY", "NACRE_BROKER", "NACRE_LOG", "CONTAINERS_REGISTRIES_CONF"] {
            command.env_remove(name);
        }
        command.env("NACRE_ROOT", self.at(store)).args(["--log", "error"]).args(arguments);
        command
    }

    /// Nothing of any image is in the store.
    #[track_caller]
    pub(crate) fn assert_empty(&self, store: &str) {
        let listed = run(&mut self.nacre(store, &["image", "ls", "--json"])).stdout;
        assert_eq!(serde_json::from_slice::<Value>(&listed).unwrap(), serde_json::json!([]));
        for part in ["layers", "images", "refs", "bundles"] {
            let left: Vec<_> = fs::read_dir(self.at(store).join(part)).into_iter().flatten().collect();
            assert!(left.is_empty(), "{store}/{part}: {left:?}");
        }
    }
}

/// A bundle of `nacre image pull --bundle`, unmounted at the end.
pub(crate) struct Bundle<'a> {
    place: &'a Place,
    store: &'static str,
    path: PathBuf,
}

impl<'a> Bundle<'a> {
    pub(crate) const STORE: &'static str = "store";

    pub(crate) fn pull(place: &'a Place, name: &str, image: &str) -> Self {
        let path = place.at(name);
        let bundle = path.display().to_string();
        let options = ["--insecure-policy", "--allow-unsigned", "--bundle", &bundle];
        run(place.nacre(Self::STORE, &["image", "pull", image]).args(options));
        Self { place, store: Self::STORE, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        let _ = self.place.nacre(self.store, &["image", "umount"]).arg(&self.path).output();
    }
}

/// What a program said, both ways.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// It was refused as not trusted, for a reason that says all of `parts`.
#[track_caller]
pub(crate) fn assert_refused(output: &Output, parts: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    for part in parts {
        assert!(said.contains(part), "'{part}' is not in: {said}");
    }
}

/// A small system as an archive: what programs run in.
pub(crate) fn system(place: &Place) -> Layer {
    let root = place.at("system");
    tiny_rootfs(&root);
    let output = run(Command::new("tar").arg("-C").arg(&root).args(["--owner=0", "--group=0", "-cf", "-", "."]));
    fs::remove_dir_all(root).unwrap();
    Layer::raw(output.stdout)
}

/// An image that runs: layers in each compression, the small system first. `sh -c` runs `script`.
pub(crate) fn runnable(place: &Place, script: &str) -> Image {
    Image::builder()
        .layer_of(system(place), Compression::Gzip)
        .layer_of(Layer::of([Entry::file("second", "zstd\n")]), Compression::Zstd)
        .layer([Entry::dir("work").owner(1000, 1000), Entry::file("third", "gzip\n")])
        .run("Env", serde_json::json!(["PATH=/bin", "GREETING=hello"]))
        .run("Cmd", serde_json::json!(["sh", "-c", script]))
        .build()
}

/// GnuPG with a home of its own.
pub(crate) struct Gpg {
    home: tempfile::TempDir,
}

impl Gpg {
    pub(crate) const ADDRESS: &str = "nacre@example.com";

    /// With an RSA key (skopeo knows no others for encryption) that signs, and a subkey for encryption.
    pub(crate) fn new() -> Option<Self> {
        nacre_testkit::require("gpg")?;
        // The agent's socket needs a short path.
        let gpg = Self { home: tempfile::tempdir().unwrap() };
        fs::set_permissions(gpg.home(), fs::Permissions::from_mode(0o700)).unwrap();
        gpg.run(&["--quick-gen-key", &format!("Nacre Test <{}>", Self::ADDRESS), "rsa2048", "sign", "never"]);
        gpg.run(&["--quick-add-key", &gpg.fingerprint(), "rsa2048", "encr", "never"]);
        Some(gpg)
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Vec<u8> {
        let mut command = Command::new("gpg");
        command.env("GNUPGHOME", self.home()).args(["--batch", "--yes", "--quiet", "--no-tty"]);
        run(command.args(["--pinentry-mode", "loopback", "--passphrase", ""]).args(arguments)).stdout
    }

    pub(crate) fn fingerprint(&self) -> String {
        let listing = String::from_utf8(self.run(&["--with-colons", "--list-keys"])).unwrap();
        let line = listing.lines().find(|line| line.starts_with("fpr")).unwrap();
        line.split(':').nth(9).unwrap().to_owned()
    }
}

impl Drop for Gpg {
    /// Ends the agent that gpg started for this home.
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").env("GNUPGHOME", self.home()).args(["--kill", "all"]).output();
    }
}
