//! The built-in container runner, for machines without runc, crun and youki.
//!
//! ```text
//! caller ─spawn─▶ supervisor: unshares the namespaces, passes signals on, ends as the container ended
//!                     └─spawn─▶ init: mounts, pivots, drops privileges, and executes the container's program, which is pid 1
//! ```
//! Each dies when the one before it dies, however it dies; with pid 1 everything in the container dies.
//!
//! What it does: the namespaces of the config (pid, mount, ipc, uts, network, cgroup), its mounts, devices, masked and read-only
//! paths, a read-only root, user and groups, capability sets, no_new_privs, resource limits, environment, working directory,
//! host name. The container's program is in a session of its own.
//!
//! What it does not: cgroups (nothing is limited or counted), seccomp filters, a pseudo-terminal (the container has the caller's
//! standard streams), hooks, `exec` into a running container, new user namespaces, and configs with any field that
//! [`crate::spec`] does not have: those are refused. It runs a container in the foreground, and that is all.

mod credentials;
mod init;
mod mounts;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;

use crate::signals::{Busy, Forward, Terminal};
use crate::spec::{NamespaceKind, Spec};
use crate::stage::{NotReady, Stage};
use crate::userns::unshare;

/// Where a stage that failed before the container's program ran says why, in the bundle.
pub const FAILURE_FILE: &str = ".start-failure";
/// The most bytes of a config.json.
const CONFIG_LIMIT: u64 = 8 << 20;
/// How a stage ends that failed.
const STAGE_FAILED: i32 = 125;

/// Why a container did not run.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The config is not one that the runner carries out to the letter.
    #[error("{}: the built-in runner cannot run this config ({problem}); use --runtime runc or crun", path.display())]
    Config {
        /// The config.json.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The program's `main` does not take part.
    #[error(transparent)]
    NotReady(#[from] NotReady),
    /// Another container is being run.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// A process could not be started or waited for.
    #[error("cannot start the container's supervisor")]
    Spawn(#[source] io::Error),
    /// The container's program was never reached.
    #[error("the container did not start: {0}")]
    Start(String),
}

/// Runs the container of a bundle in the foreground and returns its exit code, 128 and the signal's number if a signal ended it.
///
/// # Errors
/// [`ContainerError`]: the config is refused, or something failed before the container's program ran.
pub fn run(bundle: &Path) -> Result<i32, ContainerError> {
    load(bundle)?;
    let failure = bundle.join(FAILURE_FILE);
    _ = fs::remove_file(&failure);
    let status = {
        let forward = Forward::prepare(Terminal::Shared)?;
        let mut supervisor = Stage::Supervisor.command()?;
        supervisor.arg(bundle).arg(std::process::id().to_string());
        let mut child = supervisor.spawn().map_err(ContainerError::Spawn)?;
        forward.to(pid_of(&child));
        child.wait().map_err(ContainerError::Spawn)?
    };
    let message = fs::read_to_string(&failure).unwrap_or_default();
    _ = fs::remove_file(&failure);
    if message.is_empty() { Ok(exit_code(status)) } else { Err(ContainerError::Start(message)) }
}

/// Starts a command in a mount namespace of its own, where `/sys/fs/cgroup/unified` is hidden if it is there: crun does not run at
/// all where version 1 and version 2 of cgroups are mounted side by side with controllers in both.
///
/// # Errors
/// [`NotReady`]
pub fn without_unified_cgroup(program: &Path) -> Result<Command, NotReady> {
    let mut command = Stage::HideCgroup2.command()?;
    command.arg(program);
    Ok(command)
}

/// Whether cgroups of version 1 and 2 are mounted side by side.
pub fn has_hybrid_cgroups() -> bool {
    !crate::fs::is_cgroup2(Path::new("/sys/fs/cgroup")) && crate::fs::is_cgroup2(Path::new(UNIFIED))
}

const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// The exit code that a shell would report for a process that ended so.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(STAGE_FAILED)
}

/// A child's process id, as the kernel's calls take it.
pub fn pid_of(child: &std::process::Child) -> Pid {
    Pid::from_child(child)
}

/// Reads the config of a bundle.
fn load(bundle: &Path) -> Result<Spec, ContainerError> {
    let path = bundle.join("config.json");
    let refuse = |problem: String| ContainerError::Config { path: path.clone(), problem };
    let mut bytes = Vec::new();
    let file = fs::File::open(&path).map_err(|error| refuse(error.to_string()))?;
    file.take(CONFIG_LIMIT).read_to_end(&mut bytes).map_err(|error| refuse(error.to_string()))?;
    let spec: Spec = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
    for needed in [NamespaceKind::Mount, NamespaceKind::Pid] {
        if !spec.linux.namespaces.iter().any(|namespace| namespace.kind == needed) {
            return Err(refuse(format!("it shares the {needed:?} namespace of the machine")));
        }
    }
    if spec.process.args.is_empty() {
        return Err(refuse("process.args is empty".into()));
    }
    Ok(spec)
}

pub(crate) fn supervisor_stage(arguments: &[OsString]) -> i32 {
    let [bundle, parent] = arguments else { return STAGE_FAILED };
    let bundle = Path::new(bundle);
    match supervise(bundle, parent) {
        Ok(status) => exit_code(status),
        Err(message) => {
            // Nothing can be done if even that fails; the exit code still says that it did.
            _ = fs::write(bundle.join(FAILURE_FILE), message);
            STAGE_FAILED
        }
    }
}

fn supervise(bundle: &Path, parent: &OsString) -> Result<ExitStatus, String> {
    let told = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| told("prctl")(e.into()))?;
    let actual = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().to_string());
    if actual.as_deref().is_none_or(|actual| parent != actual) {
        return Err("whoever started it ended meanwhile".into());
    }
    let spec = load(bundle).map_err(|error| error.to_string())?;
    unshare(namespaces(&spec)).map_err(told("new namespaces"))?;
    let executable = protected_executable().map_err(told("read-only view of this program"))?;
    let forward = Forward::prepare(Terminal::Ours).map_err(|error| error.to_string())?;
    let mut child = Stage::Init
        .command_in(&executable)
        .arg(bundle)
        .arg(std::process::id().to_string())
        .spawn()
        .map_err(told("start of the container's first process"))?;
    forward.to(pid_of(&child));
    child.wait().map_err(told("wait for the container"))
}

fn namespaces(spec: &Spec) -> UnshareFlags {
    spec.linux.namespaces.iter().fold(UnshareFlags::empty(), |flags, namespace| {
        flags
            | match namespace.kind {
                NamespaceKind::Pid => UnshareFlags::NEWPID,
                NamespaceKind::Network => UnshareFlags::NEWNET,
                NamespaceKind::Mount => UnshareFlags::NEWNS,
                NamespaceKind::Ipc => UnshareFlags::NEWIPC,
                NamespaceKind::Uts => UnshareFlags::NEWUTS,
                NamespaceKind::Cgroup => UnshareFlags::NEWCGROUP,
            }
    })
}

/// Binds this program read-only over itself, in the new mount namespace, and names it. A program in the container that gets hold of
/// the one it was started by (`#!/proc/self/exe`, CVE-2019-5736) has one then that it cannot overwrite.
fn protected_executable() -> io::Result<PathBuf> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let path = fs::read_link("/proc/self/exe")?;
    rustix::mount::mount_bind(&path, &path)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | mounts::flags_in_force(&path)?;
    rustix::mount::mount_remount(&path, flags, "")?;
    Ok(path)
}

pub(crate) fn init_stage(arguments: &[OsString]) -> i32 {
    let [bundle, supervisor] = arguments else { return STAGE_FAILED };
    let bundle = Path::new(bundle);
    // Opened now: the path leads nowhere once the root has changed.
    let failure = fs::OpenOptions::new().create(true).append(true).open(bundle.join(FAILURE_FILE));
    let message = match load(bundle) {
        Ok(spec) => init::run(&spec, bundle, Path::new(supervisor)).to_string(),
        Err(error) => error.to_string(),
    };
    if let Ok(mut file) = failure {
        _ = io::Write::write_all(&mut file, message.as_bytes());
    }
    STAGE_FAILED
}

pub(crate) fn hide_cgroup2_stage(arguments: &[OsString]) -> i32 {
    use std::os::unix::process::CommandExt;

    let Some((program, rest)) = arguments.split_first() else { return STAGE_FAILED };
    let hide = || -> io::Result<()> {
        unshare(UnshareFlags::NEWNS)?;
        rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        if has_hybrid_cgroups() {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount("tmpfs", UNIFIED, "tmpfs", flags, None)?;
        }
        Ok(())
    };
    if let Err(error) = hide() {
        crate::userns::report("cannot hide cgroup version 2 from the runtime", &error);
        return STAGE_FAILED;
    }
    let error = Command::new(program).args(rest).exec();
    crate::userns::report(&program.to_string_lossy(), &error);
    STAGE_FAILED
}
