//! Stages: how the program starts itself again as a helper.
//!
//! Some things must be done by a process with one thread, by a child in other namespaces, or by one that outlives an `unshare`. For each
//! there is a stage: the same program, started by a name in `argv[0]` that no person uses. [`enter`] sees the name, does the stage's
//! work and never returns. A stage has no privilege that its starter lacks, so anybody may start one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by [`enter`]: starting ourselves again is safe.
static READY: AtomicBool = AtomicBool::new(false);

/// The program cannot start itself again.
#[derive(Debug, thiserror::Error)]
#[error("this program cannot start itself as a helper: its main function does not call nacre_sys::stage::enter")]
pub struct NotReady;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Probes whether user namespaces work.
    Probe,
    /// Enters a user namespace and becomes the program again.
    UserNamespace,
    /// Writes the id maps of the process that entered one.
    IdMaps,
    /// Supervises a container.
    Supervisor,
    /// Becomes the container's first process.
    Init,
    /// Runs a command in a mount namespace where `/sys/fs/cgroup/unified` is hidden.
    HideCgroup2,
}

impl Stage {
    const ALL: [Self; 6] =
        [Self::Probe, Self::UserNamespace, Self::IdMaps, Self::Supervisor, Self::Init, Self::HideCgroup2];

    fn name(self) -> &'static str {
        match self {
            Self::Probe => "nacre-stage:probe",
            Self::UserNamespace => "nacre-stage:userns",
            Self::IdMaps => "nacre-stage:idmaps",
            Self::Supervisor => "nacre-stage:supervisor",
            Self::Init => "nacre-stage:init",
            Self::HideCgroup2 => "nacre-stage:hide-cgroup2",
        }
    }

    /// A command that starts this stage.
    pub(crate) fn command(self) -> Result<Command, NotReady> {
        if !READY.load(Ordering::Relaxed) {
            return Err(NotReady);
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg0(self.name());
        Ok(command)
    }

    /// As [`Stage::command`], in an executable that is named.
    pub(crate) fn command_in(self, executable: &std::path::Path) -> Command {
        let mut command = Command::new(executable);
        command.arg0(self.name());
        command
    }
}

/// Does the work of a stage and never returns, if the program was started as one. Every binary calls this first in `main`, before
/// there are threads.
pub fn enter() {
    READY.store(true, Ordering::Relaxed);
    let mut arguments = std::env::args_os();
    let Some(name) = arguments.next() else { return };
    let Some(stage) = Stage::ALL.into_iter().find(|stage| name == stage.name()) else { return };
    let arguments: Vec<OsString> = arguments.collect();
    let code = match stage {
        Stage::Probe => crate::userns::probe_stage(),
        Stage::UserNamespace => crate::userns::enter_stage(&arguments),
        Stage::IdMaps => crate::userns::id_maps_stage(&arguments),
        Stage::Supervisor => crate::container::supervisor_stage(&arguments),
        Stage::Init => crate::container::init_stage(&arguments),
        Stage::HideCgroup2 => crate::container::hide_cgroup2_stage(&arguments),
    };
    std::process::exit(code);
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_program_that_does_not_call_enter_is_not_started_again() {
        assert!(super::Stage::Probe.command().is_err());
    }
}
