//! Programs of others that the tests use, and the Debian and Python packages that have them.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::run::{find, output, run, target};

/// What the names of packages begin with that are kernels for guests: they have ublk, and the signature of theirs is of no interest.
const KERNEL: &str = "linux-image-6.12.";
const KERNEL_ENDS: [&str; 2] = ["-cloud-amd64-unsigned", "-amd64-unsigned"];

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
    ("taskset", "util-linux"),
    ("nbdkit", "nbdkit"),
    ("pg_ctlcluster", "postgresql"),
    ("swtpm", "swtpm"),
    ("tpm2_nvread", "tpm2-tools"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("losetup", "mount"),
    ("fstrim", "util-linux"),
    ("setpriv", "util-linux"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("nbdinfo", "libnbd-bin"),
    ("nbd-client", "nbd-client"),
    ("qemu-img", "qemu-utils"),
    ("fio", "fio"),
    ("nginx", "nginx-light"),
    ("chromium", "chromium"),
    ("chromedriver", "chromium-driver"),
    ("faketime", "faketime"),
];

/// An S3 that is not ours, from PyPI: Debian has none. Flask is what its server runs on; its own extra for that wants far more.
const MOTO: &[&str] = &["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"];

/// Installs what tests need and what is missing of it, as root on Debian; elsewhere says what is missing, and the tests that need it
/// will skip.
pub(crate) fn install() -> Result<()> {
    install_programs()?;
    if let Err(error) = moto() {
        eprintln!("the S3 emulator moto cannot be had: its tests will skip themselves: {error:#}");
    }
    if find("apt-get").is_some()
        && let Err(error) = guest_kernel()
    {
        eprintln!("there is no kernel for guests, the tests that need one will skip: {error:#}");
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

/// Fetches the kernel that guests of tests boot, once, and unpacks it in the build directory: nothing of it is installed.
fn guest_kernel() -> Result<()> {
    let place = target().join("guest-kernel");
    if place.join("boot").is_dir() {
        return Ok(());
    }
    let mut names = output(Command::new("apt-cache").args(["pkgnames", KERNEL]))?;
    if names.is_empty() {
        let _ = run(Command::new("apt-get").args(["-qq", "update"])); // there is no index yet
        names = output(Command::new("apt-cache").args(["pkgnames", KERNEL]))?;
    }
    let of = |end: &str| {
        names.lines().filter(|name| name.ends_with(end)).max_by_key(|name| version(name)).map(str::to_owned)
    };
    let name = KERNEL_ENDS.iter().find_map(|end| of(end)).context("apt knows no kernel 6.12")?;
    eprintln!("fetching {name} for guests");
    let fetched = target().join("guest-kernel.new");
    let _ = fs::remove_dir_all(&fetched); // of a run that was interrupted
    fs::create_dir_all(&fetched)?;
    run(Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &name])
        .current_dir(&fetched))?;
    let is_package = |path: &Path| path.extension().is_some_and(|extension| extension == "deb");
    let mut files = fs::read_dir(&fetched)?.flatten().map(|entry| entry.path());
    let package = files.find(|path| is_package(path)).context("apt-get downloaded nothing")?;
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&fetched))?;
    fs::remove_file(package)?;
    fs::rename(fetched, &place).with_context(|| format!("cannot put it into {}", place.display()))
}

/// The numbers in a name, to compare.
fn version(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn install_programs() -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let (older, newer) = ("linux-image-6.12.107+deb12-cloud-amd64", "linux-image-6.12.1107+deb12-cloud-amd64");
        assert!(version(older) < version(newer) && version("linux-image-6.12.99+deb12") < version(older));
    }
}
