//! Lazy images that this process mounts and serves itself.

use std::{
    error::Error,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Clients, Front, Grant, LazyError, LazyMount, LazyOptions, LazyStore};

/// Mounts lazy images for bundles.
pub trait Mounter: Send + Sync {
    /// Mounts the image of a grant on a directory. Whoever unmounts it there ends it. Of an image whose key is `lent` to this process, the mount
    /// is [cut](Self::cut) at the latest when this process ends.
    ///
    /// # Errors
    /// Why it is not mounted.
    fn mount(&self, grant: Grant, target: &Path, lent: bool) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Takes an image that is mounted there out of the tree and forgets its keys: who has files of it open can read no more of them than the
    /// kernel has already.
    ///
    /// # Errors
    /// Why it is still there.
    fn cut(&self, target: &Path) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// The mounts of this process: they end with it.
pub struct OwnMounts {
    options: LazyOptions,
    front: Front,
    clients: Arc<Clients>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    store: Option<Arc<LazyStore>>,
    mounts: Vec<LazyMount>,
}

impl OwnMounts {
    /// None yet; the store is opened with the first.
    pub fn new(options: LazyOptions, front: Front, clients: Arc<Clients>) -> Self {
        Self { options, front, clients, state: Mutex::default() }
    }

    /// How they are read.
    pub fn options(&self) -> &LazyOptions {
        &self.options
    }

    /// How they become filesystems.
    pub fn front(&self) -> Front {
        self.front
    }

    /// Where images are opened, all of this process in one.
    ///
    /// # Errors
    /// [`LazyError`]
    pub fn store(&self) -> Result<Arc<LazyStore>, LazyError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = &state.store {
            return Ok(Arc::clone(store));
        }
        let store = Arc::new(LazyStore::open(self.options.clone())?);
        Ok(Arc::clone(state.store.insert(store)))
    }
}

impl Mounter for OwnMounts {
    fn mount(&self, grant: Grant, target: &Path, _lent: bool) -> Result<(), Box<dyn Error + Send + Sync>> {
        let store = self.store()?;
        let mount = store.mount(store.granted(&grant, &self.clients)?, target, self.front)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // What others unmounted meanwhile is served until nobody has a file of it open.
        state.mounts.retain_mut(|old| {
            if !old.is_mounted()
                && let Err(error) = old.detach()
            {
                tracing::debug!("{error}");
            }
            !old.is_ended()
        });
        state.mounts.push(mount);
        Ok(())
    }

    fn cut(&self, target: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
        let target = std::fs::canonicalize(target)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = state.mounts.iter().position(|mount| mount.target() == target) else { return Ok(()) };
        let mut mount = state.mounts.swap_remove(at);
        drop(state);
        let detached = mount.detach();
        // In the tree or not, it is served no more.
        drop(mount);
        Ok(detached?)
    }
}

impl Drop for OwnMounts {
    fn drop(&mut self) {
        for mount in self.state.get_mut().unwrap_or_else(PoisonError::into_inner).mounts.drain(..) {
            if let Err((_, error)) = mount.unmount() {
                tracing::warn!("{error}");
            }
        }
    }
}
