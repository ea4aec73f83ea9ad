//! Lazy images of a configured guest: pulled by name, and mounted by whoever mounts them.

use std::{num::NonZeroU64, path::PathBuf, sync::Arc, time::Duration};

use nacre_attest::client::Tenure;
use nacre_core::{Digest, SecretArray, SecretBytes};
use nacre_lazy::{artifact::is_lazy, keys::MetadataKey, pace::LEAST_RATE};
use nacre_oci::{manifest::ImageConfig, reference::Location, source::ImageSource};

use super::{ImageService, ServiceError, absolute};
use crate::{
    bundle::Overrides,
    config::LazyConfig,
    images::{AdmittedLazy, LazyAccess, PullError, PulledImage},
    lazy::{Front, Grant, LazyError, LazyImage, LazyOptions, LazyStore, Origin},
    store::{BundleRecord, ImageRecord, LazyRecord, OwnBundle, Store, StoreError},
};

/// What another process mounts a lazy image by.
pub struct Granted {
    /// What it is given.
    pub grant: Grant,
    /// Where the image's keys were lent to this process.
    pub lent: Option<Arc<Tenure>>,
    /// Where the daemon finds what it needs first, of an ordinary image: to be kept until it is mounted.
    pub opened: Option<LazyImage>,
}

impl ImageService {
    /// Does something with the first of a name's locations that has a lazy image.
    pub(super) fn at_first<T>(
        &self,
        text: &str,
        action: impl Fn(&Location) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let locations = self.locations(text)?;
        let last = locations.len().saturating_sub(1);
        for (position, location) in locations.iter().enumerate() {
            match action(location) {
                Err(ServiceError::Lazy(LazyError::Pull(PullError::Transport(error))))
                    if error.is_not_found() && position < last => {}
                result => return result,
            }
        }
        Err(ServiceError::Config(format!("'{text}' has no registry to search")))
    }

    pub(super) fn pull_lazy(&self, text: &str, location: &Location) -> Result<PulledImage, ServiceError> {
        let admitted = self.images.admit_lazy_named(&*self.source(location)?).map_err(LazyError::Pull)?;
        let AdmittedLazy { raw, manifest, admission, name } = admitted;
        let access = self.images.lazy_access(location.clone(), raw, &manifest)?;
        let store = self.images.store();
        let there = store.image_metadata(&name.manifest).is_some() && store.put_name(&name)?;
        if !there {
            let opened = self.own.store()?.granted(&self.grant(text, &access)?, &self.clients)?;
            let sizes = LazyRecord {
                content_bytes: opened.reader.content_bytes(),
                stored_bytes: opened.reader.blobs().iter().map(|blob| blob.size).sum(),
            };
            let image = ImageRecord {
                manifest: name.manifest,
                media_type: access.manifest.media_type().to_owned(),
                layers: Vec::new(),
                stack: Vec::new(),
                root: None,
                config: opened.config.clone(),
                lazy: Some(sizes),
            };
            let (config, metadata) = (&opened.config_bytes, opened.metadata_blob());
            store.put_lazy_image(&image, &access.manifest, config, &name, &metadata)?;
        }
        let missing = || StoreError::NoImage { name: name.name.clone(), path: store.root().into() };
        let image = store.image(&name.manifest)?.ok_or_else(missing)?;
        Ok(PulledImage { image, admission, layers: Vec::new(), fetched: usize::from(!there), lazy: Some(access) })
    }

    /// What somebody mounts an image by that was admitted, and whose key was released, in this call.
    fn grant(&self, reference: &str, access: &LazyAccess) -> Result<Grant, ServiceError> {
        let here = |source| ServiceError::File { what: "the image", path: access.location.to_string().into(), source };
        let key = access.key.as_ref();
        Ok(Grant {
            reference: reference.to_owned(),
            key: key.map(|key| MetadataKey::new(SecretArray::fill(|slot| slot.copy_from_slice(key.expose())))),
            origin: Origin::new(&access.location, &self.connection).map_err(here)?,
            released: self.released.as_ref().map(|released| SecretBytes::new(released.expose().to_vec())),
            metadata: self.images.store().image_metadata(access.manifest.digest()),
            manifest: access.manifest.clone(),
            index: None,
        })
    }

    /// How lazy images are read, by the configuration.
    pub fn lazy_options(&self) -> &LazyOptions {
        self.own.options()
    }

    /// How they become filesystems.
    pub fn lazy_front(&self) -> Front {
        self.own.front()
    }

    /// Opens a lazy image: the first of a name's locations that has one.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn open_lazy(&self, store: &LazyStore, text: &str) -> Result<LazyImage, ServiceError> {
        self.at_first(text, |location| Ok(store.image(&self.images, Arc::from(self.source(location)?))?))
    }

    /// Admits a lazy image, or an ordinary one and its index, and unwraps its key, for a process that mounts it without asking for either: the
    /// first of a name's locations that has one. For a process of another environment, the grant is to be [settled](Grant::settle). An ordinary
    /// image is opened for it, and to be kept until it is mounted.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn grant_lazy(&self, text: &str) -> Result<Granted, ServiceError> {
        self.at_first(text, |location| {
            let source: Arc<dyn ImageSource> = Arc::from(self.source(location)?);
            let admitted = self.images.admit_lazy_named(&*source).map_err(LazyError::Pull)?;
            if is_lazy(&admitted.manifest) {
                let access = self.images.lazy_access(location.clone(), admitted.raw, &admitted.manifest)?;
                let grant = self.grant(text, &access)?;
                return Ok(Granted { grant, lent: access.lent, opened: None });
            }
            let access =
                LazyAccess { location: location.clone(), manifest: admitted.raw.clone(), key: None, lent: None };
            let (store, grant) = (self.own.store()?, self.grant(text, &access)?);
            let (grant, image) = store.grant_by_index(&self.images, &source, admitted, grant)?;
            Ok(Granted { grant, lent: image.lent.clone(), opened: Some(image) })
        })
    }

    /// Makes a bundle of a mounted lazy image in the store's own directory, as [`mount_own_bundle`](Self::mount_own_bundle) does.
    ///
    /// # Errors
    /// [`ServiceError`]; then nothing of it is left.
    pub fn mount_lazy_bundle(
        &self,
        manifest: &Digest,
        mounted: &std::path::Path,
        config: &ImageConfig,
        overrides: &Overrides,
    ) -> Result<OwnBundle, ServiceError> {
        let own = self.images.store().add_own_bundle(*manifest, Vec::new(), None)?;
        self.compose(own.record(), &[mounted.to_owned()], config, overrides)?;
        Ok(own)
    }

    /// Mounts a lazy image below a bundle, with which it goes.
    pub(super) fn mount_lower(&self, access: &LazyAccess, record: &BundleRecord) -> Result<PathBuf, ServiceError> {
        let lower = self.images.store().bundle_lower(&record.id);
        let made = std::fs::create_dir(&lower);
        made.map_err(|source| ServiceError::File { what: "the lazy image's place", path: lower.clone(), source })?;
        let grant = self.grant(&access.location.to_string(), access)?;
        self.mounter.mount(grant, &lower, access.lent.is_some()).map_err(ServiceError::Mount)?;
        if let Some(tenure) = &access.lent {
            let (mounter, here, target) = (self.mounter.clone(), lower.clone(), lower.clone());
            let end = move |why: &str| {
                tracing::error!("{}: {why}; the image is taken away", target.display());
                if let Err(error) = mounter.cut(&target) {
                    tracing::error!("{}: {error}", target.display());
                }
            };
            tenure.give_to(move || nacre_sys::fs::is_mount_point(&here).unwrap_or(true), end);
        }
        Ok(lower)
    }
}

pub(super) fn options(store: &Store, config: &LazyConfig) -> Result<LazyOptions, ServiceError> {
    let directory = store.root().join("lazy");
    let cache = match &config.cache {
        Some(cache) => absolute(cache)?,
        None => directory.join("chunks"),
    };
    let patience = Duration::from_secs(config.patience);
    let bandwidth = NonZeroU64::new(config.bandwidth);
    if bandwidth.is_some_and(|rate| rate < LEAST_RATE) {
        let problem =
            format!("a bandwidth of {} bytes a second: at least {LEAST_RATE}, or 0 for no limit", config.bandwidth);
        return Err(ServiceError::Config(problem));
    }
    Ok(LazyOptions { directory, cache, cache_limit: config.cache_limit, patience, bandwidth })
}
