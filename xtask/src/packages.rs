//! Programs of others that the tests use, and the Debian and Python packages that have them.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::run::{find, run, target};

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
    ("losetup", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
];

/// An S3 that is not ours, from PyPI: Debian has none. Flask is what its server runs on; its own extra for that wants far more.
const MOTO: &[&str] = &["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"];

/// Installs what tests need and what is missing of it.
pub(crate) fn install() -> Result<()> {
    debian()?;
    if let Err(error) = moto() {
        eprintln!("the S3 emulator moto cannot be had: its tests will skip themselves: {error:#}");
    }
    Ok(())
}

/// Makes the virtual environment of the S3 emulator, below the target directory.
fn moto() -> Result<()> {
    let place = target().join("moto");
    if place.join("bin/moto_server").is_file() {
        return Ok(());
    }
    let python = find("python3").context("python3 is not installed")?;
    eprintln!("installing {} into {}", MOTO.join(", "), place.display());
    run(Command::new(python).args(["-m", "venv"]).arg(&place))?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    run(Command::new(place.join("bin/python3")).args(pip).args(MOTO))
}

/// Installs the packages whose programs are missing, as root on Debian; elsewhere says which they are, and the tests that need
/// them will skip.
fn debian() -> Result<()> {
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
