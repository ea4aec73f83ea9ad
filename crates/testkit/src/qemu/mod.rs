//! A virtual machine with another kernel than this machine's: what it has not got, ublk and the NBD client above all, is tested there.
//!
//! The machine is QEMU's, emulated in software, so that it runs where there is no virtualisation; it boots in some ten seconds. Its kernel is
//! a Debian package, unpacked by `cargo xtask test` in `target/guest-kernel`. Everything else is an initramfs that is put together here: a
//! shell (busybox), the modules that were asked for, programs of this machine with their libraries, and a script. Whatever the script prints
//! comes out of the serial console; its end is a line with its exit status.
//!
//! One boot is slow, so a test program boots once and does all of its work there.

mod cpio;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use self::cpio::Archive;
use crate::{require, run, skip};

/// The line that ends the console's output, before the exit status.
const END: &str = "NACRE-GUEST-END";

/// What `/init` does: it mounts what programs expect, loads the modules in their order, and runs the script.
const INIT: &str = "#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module || echo cannot load $module; done
sh /script
echo NACRE-GUEST-END $?
poweroff -f
";

/// A guest that is being put together.
#[derive(Debug)]
pub struct Guest {
    kernel: PathBuf,
    modules: PathBuf,
    archive: Archive,
    libraries: BTreeSet<PathBuf>,
    loaded: Vec<String>,
}

/// What a guest said, and how its script ended.
#[derive(Debug)]
pub struct Said {
    /// All of its console.
    pub console: String,
    /// The script's exit status; `None` where the guest died or took too long.
    pub status: Option<i32>,
    /// How long it ran, from the start of QEMU to its end.
    pub took: Duration,
}

impl Guest {
    /// An empty guest; `None`, after a loud skip, where QEMU, busybox or the kernel are missing.
    pub fn new() -> Option<Self> {
        require("qemu-system-x86_64")?;
        require("xz")?;
        let busybox = require("busybox")?;
        let Some((kernel, modules)) = kernel() else {
            skip(&format!("there is no kernel for a guest in {} (cargo xtask test fetches it)", directory().display()));
            return None;
        };
        let archive = Archive::default();
        let mut guest = Self { kernel, modules, archive, libraries: BTreeSet::new(), loaded: Vec::new() };
        for directory in ["bin", "dev", "proc", "sys", "tmp", "modules", "etc", "mnt"] {
            guest.archive.directory(directory);
        }
        guest.archive.file("bin/busybox", 0o755, &fs::read(busybox).unwrap());
        let list = run(Command::new("busybox").arg("--list")).stdout;
        for applet in String::from_utf8(list).unwrap().lines().filter(|applet| *applet != "busybox") {
            guest.archive.link(&format!("bin/{applet}"), "busybox");
        }
        guest.archive.file("init", 0o755, INIT.as_bytes());
        Some(guest)
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.archive.file(path.trim_start_matches('/'), mode, content);
    }

    /// Adds a program of this machine as `path`, without what is for debuggers only, and the libraries that it is linked with.
    pub fn program(&mut self, path: &str, source: &Path) {
        let directory = tempfile::tempdir().unwrap();
        let stripped = directory.path().join("program");
        let strip = Command::new("strip").arg("-o").arg(&stripped).arg(source).output();
        let small = strip.is_ok_and(|output| output.status.success());
        self.file(path, 0o755, &fs::read(if small { &stripped } else { source }).unwrap());
        let output = Command::new("ldd").arg(source).output().unwrap();
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`; of a static one, an error.
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let path = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(path) = path.filter(|path| self.libraries.insert(PathBuf::from(path))) {
                self.archive.file(path.trim_start_matches('/'), 0o755, &fs::read(path).unwrap());
            }
        }
    }

    /// Adds an installed program as `/usr/bin/NAME`; whether it is installed. The guest's shell prefers its own where it has one of that name,
    /// and has to be given the path.
    pub fn installed(&mut self, name: &str) -> bool {
        let Some(path) = require(name) else { return false };
        self.program(&format!("usr/bin/{name}"), &path);
        true
    }

    /// Adds a module of the kernel and those that it needs, to be loaded before the script runs. What is built in need not be.
    pub fn module(&mut self, name: &str) {
        let name = name.replace('-', "_");
        if self.loaded.contains(&name) {
            return;
        }
        let Some(path) = find_module(&self.modules, &name) else { return };
        let content = if path.extension().is_some_and(|extension| extension == "xz") {
            run(Command::new("xz").arg("-dc").arg(&path)).stdout
        } else {
            fs::read(&path).unwrap()
        };
        for needed in needed_by(&content) {
            self.module(&needed);
        }
        self.archive.file(&format!("modules/{name}.ko"), 0o644, &content);
        self.loaded.push(name);
    }

    /// Boots it and runs the script, for no longer than `limit`.
    pub fn run(mut self, script: &str, limit: Duration) -> Said {
        let order: String = self.loaded.iter().map(|name| format!("{name}.ko\n")).collect();
        self.archive.file("modules/order", 0o644, order.as_bytes());
        self.archive.file("script", 0o644, script.as_bytes());
        let directory = tempfile::tempdir().unwrap();
        let initramfs = directory.path().join("initramfs");
        fs::write(&initramfs, self.archive.finish()).unwrap();
        let began = Instant::now();
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "1024"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let (send, receive) = mpsc::channel();
        let output = child.stdout.take().unwrap();
        // It ends when QEMU does.
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let _ = send.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned());
            }
        });
        let (mut console, mut status) = (String::new(), None);
        while let Ok(line) = receive.recv_timeout(limit.saturating_sub(began.elapsed())) {
            let _ = writeln!(std::io::stdout(), "guest: {line}");
            if let Some(code) = line.strip_prefix(END) {
                status = code.trim().parse().ok();
                break;
            }
            console.push_str(&line);
            console.push('\n');
        }
        let _ = child.kill();
        child.wait().unwrap();
        reader.join().unwrap();
        Said { console, status, took: began.elapsed() }
    }
}

/// Where the kernel's package is unpacked.
fn directory() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |path| workspace.join(path));
    target.join("guest-kernel")
}

/// The kernel and the directory of its modules.
fn kernel() -> Option<(PathBuf, PathBuf)> {
    let only = |path: PathBuf, prefix: &str| {
        let entries = fs::read_dir(path).ok()?.flatten().map(|entry| entry.path());
        let mut found =
            entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
        found.next()
    };
    Some((only(directory().join("boot"), "vmlinuz-")?, only(directory().join("lib/modules"), "")?))
}

fn find_module(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            if let Some(found) = find_module(&path, name) {
                return Some(found);
            }
            continue;
        }
        let file = entry.file_name().to_string_lossy().replace('-', "_");
        if file.strip_suffix(".xz").unwrap_or(&file).strip_suffix(".ko").is_some_and(|stem| stem == name) {
            return Some(path);
        }
    }
    None
}

/// What a module says that it needs: `depends=a,b` in its section of texts that end with a zero byte.
fn needed_by(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let list = module.iter().skip(at + key.len()).take_while(|byte| **byte != 0).copied().collect();
    let list = String::from_utf8(list).unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
