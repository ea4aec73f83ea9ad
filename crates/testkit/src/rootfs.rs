//! A root filesystem that programs run in, made of this machine's.

use std::{path::Path, process::Command};

use crate::programs::run;

/// Programs of the tiny root filesystem.
const PROGRAMS: [&str; 8] = ["sh", "cat", "id", "ls", "sleep", "env", "touch", "stat"];

/// Fills a directory with a shell and a few programs of this machine, in `/bin`, with the libraries that they need, and with
/// `/etc/passwd` and `/etc/group` that know `root` and `app` (1000:1000, also in `extra`, 2000).
pub fn tiny_rootfs(root: &Path) {
    let copy = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    };
    for program in PROGRAMS {
        let path = ["/bin", "/usr/bin"]
            .map(|dir| Path::new(dir).join(program))
            .into_iter()
            .find(|path| path.exists())
            .unwrap();
        copy(&path.canonicalize().unwrap(), &root.join("bin").join(program));
        let libraries = String::from_utf8(run(Command::new("ldd").arg(&path)).stdout).unwrap();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            copy(Path::new(library), &root.join(library.trim_start_matches('/')));
        }
    }
    std::fs::create_dir_all(root.join("etc")).unwrap();
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/home/app:/bin/sh\n";
    std::fs::write(root.join("etc/passwd"), passwd).unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n").unwrap();
}
