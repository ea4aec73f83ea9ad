//! Programs of others that the tests use, and the Debian packages that have them.

use std::process::Command;

use anyhow::Result;

use crate::run::{find, run};

/// A program that shows whether the package is there, and the package.
const PACKAGES: &[(&str, &str)] = &[
    ("docker-registry", "docker-registry"),
    ("skopeo", "skopeo"),
    ("umoci", "umoci"),
    ("buildah", "buildah"),
    ("runc", "runc"),
    ("crun", "crun"),
    ("softhsm2-util", "softhsm2"),
    ("pkcs11-tool", "opensc"),
    ("gpg", "gnupg"),
    ("gpgv", "gpgv"),
    ("openssl", "openssl"),
    ("zstd", "zstd"),
    ("pigz", "pigz"),
    ("setfattr", "attr"),
    ("getfacl", "acl"),
    ("unshare", "util-linux"),
    ("setcap", "libcap2-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("fio", "fio"),
];

/// Installs the packages whose programs are missing, as root on Debian; elsewhere says which they are, and the tests that need
/// them will skip.
pub(crate) fn install() -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !root || find("apt-get").is_none() {
        eprintln!("missing programs of the packages {}: their tests will skip themselves", missing.join(", "));
        return Ok(());
    }
    eprintln!("installing {}", missing.join(", "));
    let apt = |arguments: &[&str]| {
        run(Command::new("apt-get")
            .args(["-qq", "-o", "Dpkg::Use-Pty=0"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    // An outdated index still has most packages; and one that cannot be had should not lose the others.
    let _ = apt(&["update"]);
    if apt(&[&["install", "-y", "--no-install-recommends"], missing.as_slice()].concat()).is_err() {
        for package in missing {
            if let Err(error) = apt(&["install", "-y", "--no-install-recommends", package]) {
                eprintln!("{package} could not be installed: {error}");
            }
        }
    }
    Ok(())
}
