//! What is stacked to mount an image: its layers, each once, and between them what a layer needs of those below it.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nacre_oci::unpack::{AppliedLayer, WhiteoutMode, adjust_layer};
use rustix::fs::{Mode, OFlags};

use super::{PullError, now};
use crate::store::{Acquired, LayerGuard, LayerId, LayerRecord, Marks, Staging, Store, StoreError};

/// A mountable stack.
#[derive(Debug)]
pub(super) struct Stack {
    /// All directories of it, the bottom first.
    pub(super) guards: Vec<LayerGuard>,
    /// The layer whose root directory is the image's.
    pub(super) root: Option<LayerId>,
}

impl Stack {
    pub(super) fn ids(&self) -> Vec<LayerId> {
        self.guards.iter().map(|guard| *guard.id()).collect()
    }
}

/// Stacks layers (bottom first, each once), and makes what is missing between them.
pub(super) fn build(store: &Store, layers: Vec<LayerGuard>) -> Result<Stack, PullError> {
    let mut stack = Stack { guards: Vec::new(), root: None };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for layer in layers {
        let id = *layer.id();
        let applied =
            store.layer_record(&id)?.ok_or_else(|| StoreError::NoLayer { id, path: store.root().into() })?.applied;
        if applied.hides_lower {
            stack.guards.clear();
            fds.clear();
        }
        if applied.root {
            stack.root = Some(id);
        }
        let fd = open_dir(&layer)?;
        stack.guards.push(layer);
        let between = match applied.needs_adjustment() {
            true => adjustment(store, &stack, &fds, &fd, &applied)?,
            false => None,
        };
        fds.push(fd);
        if let Some(guard) = between {
            fds.push(open_dir(&guard)?);
            stack.guards.push(guard);
        }
    }
    Ok(stack)
}

fn adjustment(
    store: &Store,
    stack: &Stack,
    below: &[OwnedFd],
    layer: &OwnedFd,
    applied: &AppliedLayer,
) -> Result<Option<LayerGuard>, PullError> {
    let id = LayerId::derived(&stack.ids());
    let staging = match store.acquire(&id)? {
        Acquired::Present(guard) => return Ok(Some(guard)),
        Acquired::Missing(staging) => staging,
    };
    let out = open_staging(&staging)?;
    let below: Vec<BorrowedFd<'_>> = below.iter().rev().map(|fd| fd.as_fd()).collect();
    let mode = match store.marks() {
        Marks::Trusted => WhiteoutMode::Trusted,
        Marks::User => WhiteoutMode::User,
    };
    let needed = adjust_layer(&below, layer.as_fd(), applied, out.as_fd(), mode)
        .map_err(|source| PullError::Stack { id: stack.guards.last().map_or(id, |guard| *guard.id()), source })?;
    if !needed {
        return Ok(None);
    }
    let record = LayerRecord { id, applied: AppliedLayer::default(), created: now() };
    Ok(store.commit_layers(vec![(staging, record)])?.pop())
}

fn open_dir(guard: &LayerGuard) -> Result<OwnedFd, StoreError> {
    open(guard.path())
}

fn open_staging(staging: &Staging) -> Result<OwnedFd, StoreError> {
    open(&staging.fs_dir())
}

fn open(path: &std::path::Path) -> Result<OwnedFd, StoreError> {
    rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| StoreError::Io { what: "open the layer", path: path.into(), source: errno.into() })
}
