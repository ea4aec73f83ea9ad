//! Composition: from layers to a bundle, by a plan that is printed, carried out, and undone if it fails.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nacre_oci::manifest::ImageConfig;
use nacre_sys::fs::FsError;
use nacre_sys::overlay::{Method, Overlay, OverlayError, Writable};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, Machine, Overrides, spec, write_config};
use super::runtime::end_leftovers;

/// Our own directory in a bundle.
pub(super) const PRIVATE: &str = ".nacre";
/// As often is something unmounted from one place: more mounts on top of each other are none of ours.
const UNMOUNT_LIMIT: usize = 16;

/// Why a bundle was not composed, or not taken apart.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// There is a bundle already.
    #[error("{} is a bundle in use: its rootfs is mounted; take it down first", .0.display())]
    InUse(PathBuf),
    /// The bundle's path is not one that can be used.
    #[error("bundle path {} {problem}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A directory cannot be made or removed.
    #[error("cannot {action} {}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The layers cannot be mounted.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A mount cannot be looked at or taken away.
    #[error(transparent)]
    Mount(#[from] FsError),
    /// There is no config for the container.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Where a container's changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpperDir {
    /// In the bundle; they go with it.
    InBundle,
    /// In the directories `upper` and `work` of this directory, made if they are not there; they stay. They must be on one filesystem,
    /// and no other bundle may use them meanwhile.
    At(PathBuf),
    /// Nowhere: the root filesystem is read-only. Runtimes cannot make mount points in it then (`/proc`, `/dev`, …), so the image must
    /// have them; otherwise use [`Overrides::read_only`] with another variant.
    ReadOnly,
}

/// One step of a composition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// Makes a directory, if it is not there. Undone: removed, if it was not.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Gives it the owner and mode of this directory instead.
        like: Option<PathBuf>,
    },
    /// Mounts layers. Undone: unmounted.
    Overlay {
        /// The layers, the bottom one first.
        lower: Vec<PathBuf>,
        /// What is written goes there.
        upper: Option<PathBuf>,
        /// The kernel's scratch directory.
        work: Option<PathBuf>,
        /// Where the mount is.
        target: PathBuf,
        /// An empty directory that is needed for a moment.
        nested: PathBuf,
        /// Whiteouts are in `user.overlay.*`.
        user_xattr: bool,
    },
    /// Writes config.json for what is mounted at `rootfs`. Undone: removed.
    Config {
        /// The bundle.
        bundle: PathBuf,
        /// The root filesystem.
        rootfs: PathBuf,
        /// The image's config.
        image: Box<ImageConfig>,
        /// What is wanted otherwise.
        overrides: Box<Overrides>,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path, mode, .. } => write!(f, "make directory {} (mode {mode:o})", path.display()),
            Self::Overlay { lower, upper, target, .. } => {
                let access = if upper.is_some() { "writable" } else { "read-only" };
                write!(f, "mount {} layers {access} on {}", lower.len(), target.display())
            }
            Self::Config { bundle, .. } => write!(f, "write {}", bundle.join("config.json").display()),
        }
    }
}

/// A composition, before it is carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The bundle.
    pub bundle: PathBuf,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().enumerate().try_for_each(|(number, step)| writeln!(f, "{}. {step}", number + 1))
    }
}

impl Plan {
    /// Plans a bundle of layers, the bottom one first, for a container of an image. Nothing is done, and nothing looked at.
    ///
    /// # Errors
    /// [`ComposeError::Path`]: the bundle's path is not absolute.
    pub fn new(
        bundle: &Path,
        layers: &[PathBuf],
        upper: &UpperDir,
        image: &ImageConfig,
        overrides: &Overrides,
        user_xattr: bool,
    ) -> Result<Self, ComposeError> {
        if !bundle.is_absolute() {
            return Err(ComposeError::Path { path: bundle.to_owned(), problem: "is not absolute" });
        }
        let directory = |path: &Path, mode| Step::Directory { path: path.to_owned(), mode, like: None };
        let private = bundle.join(PRIVATE);
        let (rootfs, empty, nested) = (bundle.join("rootfs"), private.join("empty"), private.join("nested"));
        // Others may not look into what the container writes, nor past its root.
        let mut steps = vec![directory(bundle, 0o711), directory(&rootfs, 0o755), directory(&private, 0o700)];
        steps.extend([directory(&empty, 0o755), directory(&nested, 0o755)]);
        let writable = match upper {
            UpperDir::InBundle => Some(private.clone()),
            UpperDir::At(path) => {
                steps.push(directory(path, 0o700));
                Some(path.clone())
            }
            UpperDir::ReadOnly => None,
        };
        let (upper, work) = writable.map(|path| (path.join("upper"), path.join("work"))).unzip();
        if let (Some(upper), Some(work)) = (&upper, &work) {
            // The root of the mount has the upper directory's owner and mode, so it must be as the image has it.
            steps.push(Step::Directory { path: upper.clone(), mode: 0o755, like: layers.last().cloned() });
            steps.push(directory(work, 0o700));
        }
        // The kernel wants a layer below a writable one, and two if there is none.
        let missing = (if upper.is_some() { 1 } else { 2usize }).saturating_sub(layers.len());
        let mut lower: Vec<PathBuf> = Vec::with_capacity(layers.len() + missing);
        for number in 0..missing {
            let path = empty.join(number.to_string());
            steps.push(directory(&path, 0o755));
            lower.push(path);
        }
        lower.extend_from_slice(layers);
        steps.push(Step::Overlay { lower, upper, work, target: rootfs.clone(), nested, user_xattr });
        let (image, overrides) = (Box::new(image.clone()), Box::new(overrides.clone()));
        steps.push(Step::Config { bundle: bundle.to_owned(), rootfs, image, overrides });
        Ok(Self { bundle: bundle.to_owned(), steps })
    }

    /// Carries the plan out.
    ///
    /// # Errors
    /// [`ComposeError`]: the step that failed; those before it are undone, in reverse.
    pub fn carry_out(&self) -> Result<Composition, ComposeError> {
        if nacre_sys::fs::is_mount_point(&self.bundle.join("rootfs"))? {
            return Err(ComposeError::InUse(self.bundle.clone()));
        }
        let mut done = Vec::new();
        for step in &self.steps {
            match carry_out(step) {
                Ok(undo) => done.push(undo),
                Err(error) => {
                    tracing::debug!(%step, %error, "composition failed; undoing it");
                    undo_all(done);
                    return Err(error);
                }
            }
        }
        Ok(Composition { bundle: self.bundle.clone(), rootfs: self.bundle.join("rootfs"), done })
    }
}

/// A bundle that is there. It stays when this is dropped; [`Composition::undo`] or [`teardown`] end it.
#[derive(Debug)]
pub struct Composition {
    bundle: PathBuf,
    rootfs: PathBuf,
    done: Vec<Undo>,
}

impl Composition {
    /// The bundle's directory.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Where its root filesystem is mounted.
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// Undoes every step in reverse, as if one more had failed: what there was before stays, what was made goes.
    pub fn undo(self) {
        undo_all(self.done);
    }
}

#[derive(Debug)]
enum Undo {
    Nothing,
    RemoveDirectory(PathBuf),
    Unmount(PathBuf),
    RemoveFile(PathBuf),
}

fn carry_out(step: &Step) -> Result<Undo, ComposeError> {
    match step {
        Step::Directory { path, mode, like } => make_directory(path, *mode, like.as_deref()),
        Step::Overlay { lower, upper, work, target, nested, user_xattr } => {
            let writable = upper.as_deref().zip(work.as_deref()).map(|(upper, work)| Writable { upper, work });
            let user_xattr = *user_xattr;
            Overlay { lower, writable, target, scratch: nested, user_xattr, method: Method::Probe }.mount()?;
            Ok(Undo::Unmount(target.clone()))
        }
        Step::Config { bundle, rootfs, image, overrides } => {
            write_config(bundle, &spec(image, overrides, rootfs, &Machine::current()?)?)?;
            Ok(Undo::RemoveFile(bundle.join("config.json")))
        }
    }
}

fn make_directory(path: &Path, mode: u32, like: Option<&Path>) -> Result<Undo, ComposeError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ComposeError::Directory { action, path, source }
    };
    match fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(Undo::Nothing),
        Err(source) => return Err(failed("make directory", path)(source)),
    }
    let undo = || undo_all(vec![Undo::RemoveDirectory(path.to_owned())]);
    let finish = || {
        let (mode, owner) = match like {
            Some(model) => {
                let model = fs::metadata(model).map_err(failed("look at", model))?;
                (model.mode() & 0o7777, Some((model.uid(), model.gid())))
            }
            None => (mode, None),
        };
        if let Some((uid, gid)) = owner {
            chown(path, Some(uid), Some(gid)).map_err(failed("set the owner of", path))?;
        }
        // Again: the umask had a say in it.
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", path))
    };
    finish().inspect_err(|_| undo())?;
    Ok(Undo::RemoveDirectory(path.to_owned()))
}

/// Undoes steps in reverse. If one cannot be, those before it stay: below a mount that stays, nothing may be removed.
fn undo_all(done: Vec<Undo>) {
    for undo in done.into_iter().rev() {
        let result = match &undo {
            Undo::Nothing => Ok(()),
            Undo::RemoveDirectory(path) => fs::remove_dir_all(path),
            Undo::Unmount(path) => unmount_all(path).map_err(io::Error::other),
            Undo::RemoveFile(path) => fs::remove_file(path),
        };
        if let Err(error) = result {
            tracing::warn!(?undo, %error, "a step of a composition cannot be undone; the bundle stays half-made");
            return;
        }
    }
}

fn unmount_all(path: &Path) -> Result<(), FsError> {
    for _ in 0..UNMOUNT_LIMIT {
        if !nacre_sys::fs::is_mount_point(path)? {
            return Ok(());
        }
        nacre_sys::fs::unmount(path)?;
    }
    Ok(())
}

/// How often, and how far apart, [`teardown`] looks for what an orphaned runtime still writes: 2 s in all.
const TIDY_ROUNDS: u32 = 100;
const TIDY_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// Takes a bundle apart: ends a container that outlived whoever ran it, unmounts its root filesystem and removes what a composition made in it, with the changes of its container
/// where those are in the bundle. Files of others stay, and then the directory too. A bundle that is not there, or that somebody
/// began to take apart, is taken apart all the same.
///
/// # Errors
/// [`ComposeError`]: something cannot be unmounted or removed; nothing below a mount is removed.
pub fn teardown(bundle: &Path) -> Result<(), ComposeError> {
    if !bundle.is_absolute() {
        return Err(ComposeError::Path { path: bundle.to_owned(), problem: "is not absolute" });
    }
    let rootfs = bundle.join("rootfs");
    let private = bundle.join(PRIVATE);
    // First what says that the bundle is complete.
    for name in ["config.json", ".config.json.new", nacre_sys::container::FAILURE_FILE] {
        gone("remove", &bundle.join(name), fs::remove_file(bundle.join(name)))?;
    }
    end_leftovers(bundle);
    unmount_all(&rootfs)?;
    unmount_all(&private.join("nested"))?;
    for mounted in [&rootfs, &private.join("nested")] {
        if nacre_sys::fs::is_mount_point(mounted)? {
            return Err(ComposeError::InUse(bundle.to_owned()));
        }
    }
    // A runtime whose caller was killed tidies up after its container in its own time, and may make its state directory once more.
    for _ in 0..TIDY_ROUNDS {
        remove_made(bundle, &rootfs, &private)?;
        if !private.exists() {
            break;
        }
        std::thread::sleep(TIDY_PAUSE);
    }
    Ok(())
}

fn remove_made(bundle: &Path, rootfs: &Path, private: &Path) -> Result<(), ComposeError> {
    match fs::remove_dir_all(private) {
        // Somebody writes there right now.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => return Ok(()),
        result => gone("remove", private, result)?,
    }
    for path in [rootfs, bundle] {
        match fs::remove_dir(path) {
            // Somebody else's files.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => {
                break;
            }
            result => gone("remove", path, result)?,
        }
    }
    Ok(())
}

fn gone(action: &'static str, path: &Path, result: io::Result<()>) -> Result<(), ComposeError> {
    match result {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(ComposeError::Directory { action, path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
