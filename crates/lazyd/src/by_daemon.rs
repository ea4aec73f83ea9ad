//! Having the daemon mount what this process admitted.

use std::{error::Error, fs, os::fd::AsFd as _, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::Context as _;
use nacre_guest::lazy::{Front, Grant, LazyOptions, Mounter};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::{
    Problem, Program, Station,
    protocol::{MountRequest, Mounted, Request},
};

/// Has the daemon mount an image that this process admitted; the daemon is started where none runs. A mount that is `bound` ends with this
/// process, as one does whose keys were lent to it.
///
/// # Errors
/// What the daemon says, as [`Problem::Refused`], or why it cannot be asked.
pub fn ask_to_mount(
    program: &Program,
    mut grant: Grant,
    request: MountRequest,
    bound: bool,
) -> anyhow::Result<Mounted> {
    grant.settle(|name| std::env::var(name).ok()).context("how the registry is spoken to")?;
    let grant = grant.to_file()?;
    let own = (bound || request.lent)
        .then(|| pidfd_open(getpid(), PidfdFlags::empty()))
        .transpose()
        .context("this process")?;
    let files: Vec<_> = std::iter::once(grant.as_fd()).chain(own.iter().map(|own| own.as_fd())).collect();
    let daemon = Station::here(&request.options.directory)?.started(program)?;
    Ok(serde_json::from_value(daemon.ask(&Request::Mount(request), &files)?)?)
}

/// Has the daemon mount the lazy images of bundles.
#[derive(Debug)]
pub struct ByDaemon {
    /// How the daemon is started.
    pub program: Program,
    /// How the images are read.
    pub options: LazyOptions,
    /// How they become filesystems.
    pub front: Front,
    /// Whether they end with this process.
    pub bound: bool,
}

impl Mounter for ByDaemon {
    fn mount(&self, grant: Grant, target: &Path, lent: bool) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mounting = || {
            let seen = fs::metadata(target)?;
            let request = MountRequest {
                target: Some(target.to_owned()),
                seen: Some((seen.dev(), seen.ino())),
                front: self.front,
                options: self.options.clone(),
                complete: false,
                lent,
            };
            ask_to_mount(&self.program, grant, request, self.bound)
        };
        // With its exit code, which the error itself would lose here.
        let refused = |error: anyhow::Error| Problem::Refused {
            message: format!("{error:#}"),
            exit: (self.program.exit)(&error),
        };
        mounting().map(drop).map_err(|error| refused(error).into())
    }

    fn cut(&self, target: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
        let cutting = || {
            let target = fs::canonicalize(target)?;
            match Station::here(&self.options.directory)?.connected()? {
                Some(daemon) => daemon.ask(&Request::Cut { target }, &[]).map(drop),
                // Where none runs, nobody reads it.
                None => Ok(()),
            }
        };
        cutting().map_err(|error: anyhow::Error| format!("{error:#}").into())
    }
}
