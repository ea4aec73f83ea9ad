//! The container's first process, from the start of the stage to the execution of the container's program.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Access, AtFlags, Mode, OFlags};
use rustix::mount::MountPropagationFlags;
use rustix::process::Signal;

use super::credentials::{self, Sets};
use super::mounts::{self, StepError, step};
use crate::beneath::Root;
use crate::spec::{NamespaceKind, Process, Spec};

/// Where programs are looked for if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error(transparent)]
    Step(#[from] StepError),
    #[error("{0}")]
    Config(String),
    #[error("program '{program}' {problem}")]
    Program { program: String, problem: String },
}

/// Becomes the container's program; returns only if that fails.
pub(crate) fn run(spec: &Spec, bundle: &Path, supervisor: &Path) -> InitError {
    match try_run(spec, bundle, supervisor) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_run(spec: &Spec, bundle: &Path, supervisor: &Path) -> Result<Infallible, InitError> {
    // Everything of the config that can be refused is, before anything is done.
    let sets = Sets::parse(&spec.process.capabilities).map_err(InitError::Config)?;
    let environment = environment(&spec.process)?;
    die_with_supervisor()?;
    // Our parent is in another pid namespace, so its id says nothing; its directory in /proc does, as long as it is open.
    let supervisor = Path::new("/proc").join(supervisor);
    let supervisor = Root::open(&supervisor).map_err(step("open", &supervisor))?;
    rustix::process::setsid().map_err(|e| step("start a session in", "the container")(e.into()))?;
    if let Some(name) = &spec.hostname
        && spec.linux.namespaces.iter().any(|namespace| namespace.kind == NamespaceKind::Uts)
    {
        rustix::system::sethostname(name.as_bytes()).map_err(|e| step("set host name", name)(e.into()))?;
    }
    let rootfs = bundle.join(&spec.root.path);
    enter_root(spec, &rootfs)?;
    credentials::limit(&spec.process).map_err(InitError::Config)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    credentials::drop_to(&spec.process.user, &sets)
        .map_err(step("become user", format!("{}:{}", spec.process.user.uid, spec.process.user.gid)))?;
    if spec.process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).map_err(|e| step("set", "no_new_privs")(e.into()))?;
    }
    // Changing ids cleared it; had the supervisor died meanwhile, its directory would be empty.
    die_with_supervisor()?;
    if supervisor.open_at(Path::new("stat"), OFlags::RDONLY).and_then(|fd| read_some(fd.into())).is_err() {
        return Err(InitError::Config("its supervisor ended".into()));
    }
    drop(supervisor);
    execute(&spec.process, &environment)
}

fn enter_root(spec: &Spec, rootfs: &Path) -> Result<(), InitError> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| step("make private", "/")(e.into()))?;
    rustix::mount::mount_bind_recursive(rootfs, rootfs).map_err(|e| step("bind", rootfs)(e.into()))?;
    mounts::build(spec, rootfs)?;
    mounts::pivot(rootfs).map_err(step("change the root to", rootfs))?;
    Ok(())
}

fn die_with_supervisor() -> Result<(), StepError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| step("tie its life to", "its supervisor")(e.into()))
}

fn read_some(mut file: File) -> io::Result<()> {
    let read = io::Read::read(&mut file, &mut [0; 16])?;
    if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn environment(process: &Process) -> Result<Vec<(&str, &str)>, InitError> {
    process
        .env
        .iter()
        .map(|entry| {
            entry
                .split_once('=')
                .filter(|(name, value)| !name.is_empty() && !name.contains('\0') && !value.contains('\0'))
                .ok_or_else(|| InitError::Config(format!("environment entry '{entry:.100}' is not NAME=value")))
        })
        .collect()
}

/// Executes the program. Neither the working directory nor the program may be reached by a link of `/proc` to something that we
/// have open (CVE-2024-21626), and nothing that we have open, or were given, survives the execution.
fn execute(process: &Process, environment: &[(&str, &str)]) -> Result<Infallible, InitError> {
    let root = Root::open(Path::new("/")).map_err(step("open", "/"))?;
    let directory = root
        .open_at(Path::new(&process.cwd), OFlags::RDONLY | OFlags::DIRECTORY)
        .or_else(|_| root.open_at(Path::new(&process.cwd), OFlags::PATH | OFlags::DIRECTORY))
        .map_err(step("open working directory", &process.cwd))?;
    rustix::process::fchdir(&directory).map_err(|e| step("enter working directory", &process.cwd)(e.into()))?;
    drop(directory);
    let path = environment.iter().rev().find(|(name, _)| *name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path);
    let (program, arguments) =
        process.args.split_first().ok_or_else(|| InitError::Config("process.args is empty".into()))?;
    let file = find_program(&root, program, path, &process.cwd)?;
    drop(root);
    close_on_exec().map_err(step("close", "inherited files"))?;
    let mut command = Command::new(file);
    command.arg0(program).args(arguments).env_clear().envs(environment.iter().copied());
    Err(InitError::Program { program: program.clone(), problem: format!("cannot be executed: {}", command.exec()) })
}

fn find_program(root: &Root, program: &str, path: &str, cwd: &str) -> Result<PathBuf, InitError> {
    let candidates: Vec<PathBuf> = if program.contains('/') {
        vec![Path::new(cwd).join(program)]
    } else {
        path.split(':').map(|directory| Path::new(cwd).join(directory).join(program)).collect()
    };
    let mut problem = if program.contains('/') {
        "is not in the image".to_owned()
    } else {
        format!("is not in the image's PATH ({path})")
    };
    for candidate in candidates {
        match root.open_at(&candidate, OFlags::PATH) {
            Ok(file) => {
                let stat = rustix::fs::fstat(&file).map_err(|e| step("look at", &candidate)(e.into()))?;
                let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
                let executable = rustix::fs::accessat(root, &candidate, Access::EXEC_OK, AtFlags::EACCESS).is_ok();
                if is_file && executable {
                    return Ok(candidate);
                }
                problem = format!("is at {}, but is no file that may be executed", candidate.display());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => problem = format!("cannot be opened at {}: {error}", candidate.display()),
        }
    }
    Err(InitError::Program { program: program.to_owned(), problem })
}

fn close_on_exec() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: no file is closed: each descriptor above the standard streams only gets the flag to be closed at execve.
    #[expect(unsafe_code, reason = "rustix has no close_range")]
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
