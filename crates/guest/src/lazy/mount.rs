//! A lazy image that is mounted, and how it goes from one process to another.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use nacre_sys::{
    erofs as mounts,
    fuse::{Handover, Options as FuseOptions, Parameters, Session},
};
use serde::{Deserialize, Serialize};

use super::{Front, LazyError, LazyImage, device, io_error, tree};

/// Reads that are answered at once; most wait for the network.
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);
/// What `mount` shows behind `fuse.`.
pub const SUBTYPE: &str = "nacre";

/// What serves an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Served {
    /// The kernel's EROFS, over a data device of ours.
    Erofs,
    /// A FUSE filesystem of ours.
    Fuse,
}

impl Served {
    /// As people know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        }
    }
}

/// What another process needs, beside the grant, to go on with a mount: whoever holds the two files keeps it alive.
pub struct Kept {
    /// The FUSE connection.
    pub device: OwnedFd,
    /// The metadata file, locked.
    pub metadata: OwnedFd,
    /// The rest.
    pub record: KeptRecord,
}

/// The part of [`Kept`] that is text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptRecord {
    /// The name of its directory.
    pub place: String,
    /// Where it is mounted, or is about to be.
    pub target: PathBuf,
    /// What serves it.
    pub served: Served,
    /// What was agreed with the kernel.
    pub parameters: Parameters,
}

/// A mounted lazy image, served by threads of this process. Dropping it unmounts it.
pub struct LazyMount {
    // Dropped in this order: nobody gets at it any more, then nobody serves it, then its files go.
    tree: Tree,
    session: Session,
    /// The image.
    pub image: LazyImage,
    served: Served,
}

/// The kernel's EROFS on the target; FUSE is the session's.
struct Tree {
    target: PathBuf,
    /// The source of the mount lies there.
    place: PathBuf,
    armed: bool,
}

impl Tree {
    /// Whether it is what is mounted on the target.
    fn is_ours(&self) -> bool {
        let here = |mount: &nacre_sys::fs::MountEntry| mount.target == self.target;
        let mounts = nacre_sys::fs::mounts().unwrap_or_default();
        mounts.iter().rfind(|mount| here(mount)).is_some_and(|mount| mount.source.starts_with(&self.place))
    }

    fn unmount(&mut self) -> Result<(), LazyError> {
        if std::mem::take(&mut self.armed) && self.is_ours() {
            let unmounted = nacre_sys::fs::unmount(&self.target);
            unmounted.map_err(|error| io_error("unmount", &self.target)(io::Error::other(error)))?;
        }
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!("{error}");
        }
    }
}

impl LazyMount {
    /// Mounts an image on a directory. `keep` is called when it is served and not yet to be seen: from then on another process can go on
    /// with it.
    pub(super) fn new(
        image: LazyImage,
        target: &Path,
        front: Front,
        keep: &mut dyn FnMut(Kept) -> io::Result<()>,
    ) -> Result<Self, LazyError> {
        let target = std::fs::canonicalize(target).map_err(io_error("find the mount point", target))?;
        let served = match front {
            Front::Erofs => Served::Erofs,
            Front::Fuse => Served::Fuse,
            Front::Best => match mounts::support(image.place.path()) {
                Ok(()) => Served::Erofs,
                Err(error) => {
                    tracing::info!("{error}; the image is served by FUSE");
                    Served::Fuse
                }
            },
        };
        let session = match served {
            Served::Erofs => serve_device(&image)?,
            Served::Fuse => {
                let options = FuseOptions { nosuid: false, ..options(&image) };
                Session::mount(&target, &options, Arc::new(tree(&image)?))?
            }
        };
        let tree = Tree { target, place: image.place.path().to_owned(), armed: false };
        let mut mount = Self { tree, session, image, served };
        let kept = mount.kept().map_err(io_error("duplicate the descriptors of", mount.target()))?;
        keep(kept).map_err(io_error("hand to its keeper", mount.target()))?;
        if served == Served::Erofs {
            let file = mount.image.place.device().join(device::NAME);
            let metadata = mount.image.place.metadata();
            mounts::mount(&metadata, &[&file], mount.target(), &mounts::Options::default())?;
            mount.tree.armed = true;
        }
        mount.image.follow_trace();
        Ok(mount)
    }

    /// Goes on with what another process served, which must not serve it any more.
    pub(super) fn resume(image: LazyImage, kept: Kept) -> Result<Self, LazyError> {
        let Kept { device, record, .. } = kept;
        let handover = Handover { device, parameters: record.parameters };
        let session = match record.served {
            Served::Erofs => Session::resume(&handover, THREADS, device::filesystem(Arc::clone(&image.reader)))?,
            Served::Fuse => Session::resume(&handover, THREADS, Arc::new(tree(&image)?))?,
        };
        let armed = record.served == Served::Erofs;
        let tree = Tree { target: record.target, place: image.place.path().to_owned(), armed };
        Ok(Self { tree, session, image, served: record.served })
    }

    fn kept(&self) -> io::Result<Kept> {
        let record = KeptRecord {
            place: self.image.place.name(),
            target: self.tree.target.clone(),
            served: self.served,
            parameters: self.session.parameters().clone(),
        };
        Ok(Kept { device: self.session.keep()?, metadata: self.image.place.erofs.try_clone()?.into(), record })
    }

    /// Stops serving and leaves everything mounted, for who has what `keep` got. Takes as long as the slowest answer.
    pub fn hand_over(self) {
        let Self { mut tree, image, session, .. } = self;
        tree.armed = false;
        drop(session.hand_over());
        image.place.leave();
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.tree.target
    }

    /// What serves it.
    pub fn served(&self) -> Served {
        self.served
    }

    /// Whether it is still mounted; somebody else may have unmounted it.
    pub fn is_mounted(&self) -> bool {
        match self.served {
            Served::Erofs => !self.session.is_ended() && nacre_sys::fs::is_mount_point(self.target()).unwrap_or(false),
            Served::Fuse => !self.session.is_ended(),
        }
    }

    /// Whether nobody has anything of it any more.
    pub fn is_ended(&self) -> bool {
        self.session.is_ended()
    }

    /// Takes it out of the tree, in use or not. Who has files of it open keeps them for as long as this lives; [`is_ended`](Self::is_ended)
    /// tells when the last of them has gone.
    ///
    /// # Errors
    /// [`LazyError`]; it then stays mounted and served.
    pub fn detach(&mut self) -> Result<(), LazyError> {
        self.tree.unmount()?;
        if self.session.is_ended() {
            self.session.wait();
            return Ok(());
        }
        match self.session.detach() {
            Ok(()) => Ok(()),
            // Somebody else unmounted it, and files of it are open.
            Err(error) if self.served == Served::Fuse && !self.tree.is_ours() => {
                tracing::debug!("{error}");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Unmounts it and serves it no more.
    ///
    /// # Errors
    /// It could not be unmounted; it then stays mounted and served, and comes back.
    pub fn unmount(mut self) -> Result<(), (Box<Self>, LazyError)> {
        let unmounted = match self.served {
            // The kernel lets go of the data device a moment after the last reader, so that it may seem to be in use.
            Served::Erofs => self.detach(),
            Served::Fuse if self.session.is_ended() => self.detach(),
            Served::Fuse => self.session.unmount().map_err(LazyError::from),
        };
        match unmounted {
            Ok(()) => Ok(()),
            Err(error) => Err((Box::new(self), error)),
        }
    }
}

fn options(image: &LazyImage) -> FuseOptions {
    let name = image.place.path().display().to_string();
    FuseOptions { name, subtype: SUBTYPE.into(), threads: THREADS, ..FuseOptions::default() }
}

/// The data device, which nobody but the kernel needs to see.
fn serve_device(image: &LazyImage) -> Result<Session, LazyError> {
    let path = image.place.device();
    std::fs::create_dir(&path).map_err(io_error("make the directory", &path))?;
    let options = FuseOptions { allow_other: false, ..options(image) };
    Ok(Session::mount(&path, &options, device::filesystem(Arc::clone(&image.reader)))?)
}

fn tree(image: &LazyImage) -> Result<tree::TreeFs, LazyError> {
    Ok(tree::TreeFs { reader: Arc::clone(&image.reader), image: image.tree()? })
}
