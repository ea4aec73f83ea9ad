//! What runs a bundle: runc, crun or youki, or the built-in runner where there is none.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nacre_sys::container::{self, ContainerError, exit_code, pid_of};
use nacre_sys::signals::{Busy, Forward, Terminal};
use serde::Deserialize;

use super::compose::PRIVATE;

/// Where system programs are that an ordinary user's PATH does not name.
const SYSTEM_PATHS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Names the runtime's program, in its state directory.
const PROGRAM_FILE: &str = "program";
const ID_PREFIX: &str = "nacre-";
/// The most bytes of a runtime's log that are read.
const LOG_LIMIT: u64 = 1 << 20;

/// Why a bundle was not run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime that was asked for is not there.
    #[error(
        "there is no container runtime '{0}' (neither a program on PATH nor a file); try runc, crun, youki or builtin"
    )]
    NotFound(String),
    /// Its processes or its files failed us.
    #[error("cannot {action} with {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The runtime, or its directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The runtime did not run the container.
    #[error("{runtime} did not run the container: {message}")]
    Failed {
        /// Which runtime.
        runtime: String,
        /// What it says.
        message: String,
    },
    /// Another container is being run by this process.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The built-in runner did not run the container.
    #[error(transparent)]
    BuiltIn(#[from] ContainerError),
}

/// The runtimes that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// runc, or what has its command line.
    Runc,
    /// crun.
    Crun,
    /// youki.
    Youki,
    /// Our own: [`nacre_sys::container`].
    BuiltIn,
}

/// A runtime that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    kind: Kind,
    path: PathBuf,
}

impl Runtime {
    /// Finds the runtime: the one asked for by name (`runc`, `crun`, `youki`, `builtin`) or path; otherwise the first of runc, crun and
    /// youki that is installed and can work here; otherwise the built-in one.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`]: the one that was asked for is not there.
    pub fn find(choice: Option<&str>) -> Result<Self, RuntimeError> {
        match choice {
            Some("builtin") => Ok(Self::built_in()),
            Some(name) => {
                let path = if name.contains('/') { executable(Path::new(name)) } else { on_path(name) };
                let path = path.ok_or_else(|| RuntimeError::NotFound(name.chars().take(200).collect()))?;
                Ok(Self { kind: kind_of(&path), path })
            }
            None => {
                let cgroups = cgroups_can_be_made();
                let usable = |name| on_path(name).map(|path| Self { kind: kind_of(&path), path });
                let found = ["runc", "crun", "youki"].into_iter().filter_map(usable);
                // crun alone does without cgroups.
                let found = found.into_iter().find(|runtime| cgroups || runtime.kind == Kind::Crun);
                Ok(found.unwrap_or_else(Self::built_in))
            }
        }
    }

    fn built_in() -> Self {
        Self { kind: Kind::BuiltIn, path: "builtin".into() }
    }

    /// Which kind of runtime it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its program, or `builtin`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a bundle in the foreground, with the standard streams of this process, and returns the exit code of its program, 128 and the
    /// signal's number if a signal ended it. SIGTERM and its like are passed on meanwhile. The container is gone afterwards; the bundle
    /// stays.
    ///
    /// # Errors
    /// [`RuntimeError`]: the container's program did not run.
    pub fn run(&self, bundle: &Path) -> Result<i32, RuntimeError> {
        if self.kind == Kind::BuiltIn {
            return Ok(container::run(bundle)?);
        }
        let state = bundle.join(PRIVATE).join("runtime");
        fs::create_dir_all(&state).map_err(|e| self.io("make a state directory", &state, e))?;
        // Whoever takes the bundle apart after we were killed must know whom to ask for the container.
        fs::write(state.join(PROGRAM_FILE), self.path.as_os_str().as_bytes())
            .map_err(|e| self.io("write to a state directory", &state, e))?;
        let result = self.run_in(bundle, &state);
        if let Err(error) = fs::remove_dir_all(&state) {
            tracing::warn!(path = %state.display(), %error, "a runtime's state stays");
        }
        result
    }

    fn run_in(&self, bundle: &Path, state: &Path) -> Result<i32, RuntimeError> {
        let id = container_id();
        let log = state.join("log");
        let status = {
            let forward = Forward::prepare(Terminal::Shared)?;
            let mut command = self.command(state, &log)?;
            command.args(["run", "--bundle"]).arg(bundle).arg(&id);
            let mut child = command.spawn().map_err(|e| self.io("run a container", &self.path, e))?;
            forward.to(pid_of(&child));
            child.wait().map_err(|e| self.io("wait for a container", &self.path, e))?
        };
        // It deletes the container itself, unless it was killed.
        self.delete_all(state);
        // The exit code of a runtime that failed may be one of a container, too: only its log tells.
        match (status.success(), last_error(&log)) {
            (false, Some(message)) => Err(RuntimeError::Failed { runtime: self.path.display().to_string(), message }),
            _ => Ok(exit_code(status)),
        }
    }

    /// Kills and deletes every container of a state directory.
    fn delete_all(&self, state: &Path) {
        let entries = fs::read_dir(state).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.file_name());
        for id in entries.filter(|name| name.as_encoded_bytes().starts_with(ID_PREFIX.as_bytes())) {
            let deletion = self.command(state, &state.join("log")).map_err(io::Error::other).and_then(|mut command| {
                command.args(["delete", "--force"]).arg(&id);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
            });
            tracing::debug!(?deletion, ?id, "deleted what the runtime left");
        }
    }

    fn command(&self, state: &Path, log: &Path) -> Result<Command, RuntimeError> {
        if self.kind != Kind::Crun {
            let mut command = Command::new(&self.path);
            command.arg("--root").arg(state).arg("--log").arg(log).args(["--log-format", "json"]);
            return Ok(command);
        }
        let hybrid = container::has_hybrid_cgroups();
        let mut command = if hybrid {
            container::without_unified_cgroup(&self.path).map_err(ContainerError::from)?
        } else {
            Command::new(&self.path)
        };
        let mut log_option = OsString::from("--log=file:");
        log_option.push(log);
        command.arg("--root").arg(state).arg(log_option).arg("--log-format=json");
        if hybrid || !cgroups_can_be_made() {
            command.arg("--cgroup-manager=disabled");
        }
        Ok(command)
    }

    fn io(&self, action: &'static str, path: &Path, source: io::Error) -> RuntimeError {
        RuntimeError::Io { action, path: path.to_owned(), source }
    }
}

/// Ends the containers of a bundle that outlived whoever ran them: runc and crun let them live on when they are killed.
pub(super) fn end_leftovers(bundle: &Path) {
    let state = bundle.join(PRIVATE).join("runtime");
    let Ok(path) = fs::read(state.join(PROGRAM_FILE)) else { return };
    let path = PathBuf::from(OsString::from_vec(path));
    Runtime { kind: kind_of(&path), path }.delete_all(&state);
}

fn kind_of(path: &Path) -> Kind {
    // A link tells more than its name: Debian's `oci-runtime` is one.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match name {
        name if name.contains("crun") => Kind::Crun,
        name if name.contains("youki") => Kind::Youki,
        _ => Kind::Runc,
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        // An empty entry would mean the working directory, which may be anybody's.
        .filter(|directory| directory.is_absolute())
        .chain(SYSTEM_PATHS.map(PathBuf::from))
        .find_map(|directory| executable(&directory.join(name)))
}

fn executable(path: &Path) -> Option<PathBuf> {
    let ok = path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    ok.then(|| std::path::absolute(path).ok()).flatten()
}

/// Whether a runtime can make a cgroup for its container, or does without by itself, as runc does in a user namespace.
fn cgroups_can_be_made() -> bool {
    let writable = |path: &Path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
    if super::config::Machine::current().is_ok_and(|machine| machine.is_rootless()) {
        return true;
    }
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return writable(root);
    }
    // Version 1: a directory for each controller, of which runtimes need this one for the devices.
    writable(&root.join("devices"))
}

fn container_id() -> String {
    let mut random = [0; 8];
    // Ids only tell the containers of one state directory apart, which is the bundle's own.
    let length = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    tracing::trace!(length, "container id");
    format!("{ID_PREFIX}{:016x}", u64::from_le_bytes(random))
}

fn last_error(log: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(log).ok()?.take(LOG_LIMIT).read_to_end(&mut bytes).ok()?;
    parse_last_error(&bytes)
}

/// The message of the last line of level `error` in a runtime's JSON log.
fn parse_last_error(log: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let lines = log.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    let mut errors = lines.filter(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"));
    let last = errors.next_back()?;
    Some(last.msg.chars().take(2000).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_are_known_by_their_names() {
        assert_eq!(kind_of(Path::new("/no such/usr/bin/crun")), Kind::Crun);
        assert_eq!(kind_of(Path::new("/no such/opt/youki-0.5")), Kind::Youki);
        assert_eq!(kind_of(Path::new("/no such/usr/sbin/runc")), Kind::Runc);
        assert_eq!(Runtime::find(Some("builtin")).unwrap().kind(), Kind::BuiltIn);
        for absent in ["no-such-runtime", "/no/such/runtime", "/etc/passwd", "/"] {
            assert!(Runtime::find(Some(absent)).unwrap_err().to_string().contains(absent));
        }
    }

    #[test]
    fn the_last_error_of_a_log_is_found() {
        let log = b"garbage\n{\"level\":\"error\",\"msg\":\"one\"}\n{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"two\"}\n{";
        assert_eq!(parse_last_error(log).as_deref(), Some("two"));
        assert_eq!(parse_last_error(b"{\"level\":\"warning\",\"msg\":\"w\"}"), None);
        assert_eq!(parse_last_error(b""), None);
    }
}
