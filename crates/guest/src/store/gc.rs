//! Removal: names by request; images without a name with them; layers without an image by `gc`.

use nacre_core::Digest;

use super::{LayerId, Lock, RefRecord, Store, StoreError, images::image_name, record};

/// What [`Store::remove`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The name that is gone.
    pub name: String,
    /// The image, where that was its last name.
    pub image: Option<Digest>,
}

/// What [`Store::collect`] freed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers that no image had any more.
    pub layers: Vec<LayerId>,
    /// The bytes of file content in them.
    pub bytes: u64,
    /// Staging directories of processes that were killed.
    pub staging: usize,
    /// Layers that no image has, but that somebody uses right now.
    pub busy: usize,
}

/// What [`Store::retire_layer`] did.
enum Retired {
    /// Somebody uses it right now.
    Busy,
    /// An image has it after all.
    Used,
    /// It is out of sight, in its staging directory.
    Yes { lock: Lock, bytes: u64 },
}

impl Store {
    /// Removes a name, and the image with its last name.
    ///
    /// # Errors
    /// [`StoreError::InUse`] where a mounted bundle needs the image, and those of the files.
    pub fn remove(&self, name: &RefRecord) -> Result<Removed, StoreError> {
        let _lock = self.lock_names()?;
        let last = !self.names()?.iter().any(|other| other.manifest == name.manifest && other.name != name.name);
        if last && let Some(bundle) = self.bundles()?.into_iter().find(|bundle| bundle.manifest == name.manifest) {
            let user = format!("the bundle {}", bundle.path.display());
            return Err(StoreError::InUse { name: name.name.clone(), user });
        }
        record::remove(&self.ref_path(&name.name))?;
        if last {
            let dir = self.image_dir(&name.manifest);
            // The record first: without it the rest is no image.
            record::remove(&dir.join("image.json"))?;
            record::remove_tree(&dir)?;
        }
        Ok(Removed { name: name.name.clone(), image: last.then_some(name.manifest) })
    }

    /// Removes what nothing refers to: layers, staging directories of killed processes, bundles of earlier boots, images without a
    /// name.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn collect(&self) -> Result<Collected, StoreError> {
        self.remove_stale_bundles()?;
        self.remove_nameless_images()?;
        let mut collected = Collected::default();
        self.remove_stale_staging(&mut collected)?;
        let used = self.used_layers()?;
        for name in record::list(&self.path(&["layers"]))? {
            let Some(id) = LayerId::from_file_name(&name).filter(|id| !used.contains(id)) else { continue };
            match self.retire_layer(&id)? {
                Retired::Busy => collected.busy += 1,
                Retired::Used => {}
                Retired::Yes { lock, bytes } => {
                    record::remove_tree(&self.staging_dir(&id))?;
                    lock.remove();
                    collected.bytes += bytes;
                    collected.layers.push(id);
                }
            }
        }
        Ok(collected)
    }

    fn remove_stale_staging(&self, collected: &mut Collected) -> Result<(), StoreError> {
        for name in record::list(&self.path(&["staging"]))? {
            let Some(id) = LayerId::from_file_name(&name) else { continue };
            let Some(lock) = Lock::try_exclusive(&self.layer_lock(&id))? else { continue };
            record::remove_tree(&self.staging_dir(&id))?;
            collected.staging += 1;
            if !self.layer_dir(&id).exists() {
                lock.remove();
            }
        }
        Ok(())
    }

    /// Takes a layer that nobody uses out of sight, by one rename; a kill from there on leaves a staging directory.
    fn retire_layer(&self, id: &LayerId) -> Result<Retired, StoreError> {
        // Whoever made a layer lets go of it for a moment while it becomes visible; this is not that moment.
        let _retiring = Lock::exclusive(&self.retiring_lock())?;
        let Some(lock) = Lock::try_exclusive(&self.layer_lock(id))? else { return Ok(Retired::Busy) };
        // An image that has it may have come between our look and the lock; its pull held the layer until its record was there.
        if self.used_layers()?.contains(id) {
            return Ok(Retired::Used);
        }
        let (layer, staging) = (self.layer_dir(id), self.staging_dir(id));
        if !layer.exists() {
            // Another collector was faster.
            return Ok(Retired::Used);
        }
        let bytes = self.layer_record(id)?.map_or(0, |layer| layer.applied.content_bytes);
        record::remove_tree(&staging)?;
        std::fs::rename(&layer, &staging).map_err(super::io_error("retire layer", layer))?;
        Ok(Retired::Yes { lock, bytes })
    }

    fn remove_nameless_images(&self) -> Result<(), StoreError> {
        let _lock = self.lock_names()?;
        let named: Vec<Digest> = self.names()?.into_iter().map(|name| name.manifest).collect();
        let mounted: Vec<Digest> = self.bundles()?.into_iter().map(|bundle| bundle.manifest).collect();
        let dir = self.path(&["images"]);
        // Records are written under the lock that we hold, so what is not finished never will be.
        record::remove_unfinished(&self.path(&["refs"]))?;
        for name in record::list(&dir)? {
            record::remove_unfinished(&dir.join(&name))?;
            if image_name(&name).is_some_and(|digest| !named.contains(&digest) && !mounted.contains(&digest)) {
                record::remove_tree(&dir.join(name))?;
            }
        }
        Ok(())
    }

    fn used_layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let mut used: Vec<LayerId> = Vec::new();
        for image in self.images()? {
            used.extend(image.layers.iter().map(|layer| layer.id));
            used.extend(image.stack);
        }
        used.extend(self.bundles()?.into_iter().flat_map(|bundle| bundle.layers));
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Acquired, ImageRecord, LayerRecord, Marks};
    use super::*;
    use nacre_oci::{
        manifest::{ImageConfig, RawManifest},
        unpack::AppliedLayer,
    };

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Marks::Trusted, true).unwrap();
        (dir, store)
    }

    fn add_layer(store: &Store, content: &str) -> LayerId {
        let id = LayerId::Content(Digest::sha256(content.as_bytes()));
        let Acquired::Missing(staging) = store.acquire(&id).unwrap() else { panic!("the layer is there") };
        std::fs::write(staging.fs_dir().join("file"), content).unwrap();
        let applied = AppliedLayer { content_bytes: content.len() as u64, ..AppliedLayer::default() };
        let layer = LayerRecord { id, applied, created: String::new() };
        store.commit_layers(vec![(staging, layer)]).unwrap();
        id
    }

    fn add_image(store: &Store, name: &str, layers: &[LayerId]) -> RefRecord {
        let stack = layers.to_vec();
        let layers = Vec::new();
        let json = format!(r#"{{"schemaVersion":2,"config":{{}},"layers":[],"annotations":{{"name":"{name}"}}}}"#);
        let raw = RawManifest::new(json.into_bytes(), None).unwrap();
        let manifest = *raw.digest();
        let image = ImageRecord {
            manifest,
            media_type: String::new(),
            layers,
            stack,
            root: None,
            config: ImageConfig::default(),
            lazy: None,
        };
        let name = RefRecord {
            name: format!("docker://r.example/{name}:latest"),
            manifest,
            chain: vec![manifest],
            indexes: Vec::new(),
            pulled: String::new(),
            admitted: String::new(),
            signatures: serde_json::Value::Null,
        };
        store.put_image(&image, &raw, b"{}", &name).unwrap();
        name
    }

    #[test]
    fn layers_live_as_long_as_an_image_has_them() {
        let (_dir, store) = store();
        let (shared, own, orphan) =
            (add_layer(&store, "shared"), add_layer(&store, "own"), add_layer(&store, "orphan"));
        let one = add_image(&store, "one", &[shared, own]);
        let two = add_image(&store, "two", &[shared]);
        let collected = store.collect().unwrap();
        assert_eq!((collected.layers, collected.bytes), (vec![orphan], 6));
        assert_eq!(store.remove(&one).unwrap().image, Some(one.manifest));
        assert_eq!(store.collect().unwrap().layers, vec![own]);
        assert!(store.layer(&shared).unwrap().is_some());
        store.remove(&two).unwrap();
        assert_eq!(store.collect().unwrap().layers, vec![shared]);
        assert_eq!(store.collect().unwrap(), Collected::default());
    }

    #[test]
    fn a_layer_in_use_is_not_collected() {
        let (_dir, store) = store();
        let diff_id = add_layer(&store, "busy");
        let guard = store.layer(&diff_id).unwrap().unwrap();
        let collected = store.collect().unwrap();
        assert_eq!((collected.layers.len(), collected.busy), (0, 1));
        assert!(guard.path().join("file").exists());
        drop(guard);
        assert_eq!(store.collect().unwrap().layers, vec![diff_id]);
    }

    #[test]
    fn a_failed_or_killed_layer_leaves_nothing() {
        let (_dir, store) = store();
        let diff_id = LayerId::Content(Digest::sha256(b"x"));
        let Acquired::Missing(staging) = store.acquire(&diff_id).unwrap() else { panic!() };
        std::fs::write(staging.fs_dir().join("half"), "made").unwrap();
        drop(staging);
        assert!(!store.staging_dir(&diff_id).exists());
        // A killed process leaves its directory, but not its lock.
        std::fs::create_dir_all(store.staging_dir(&diff_id).join("fs")).unwrap();
        std::fs::write(store.staging_dir(&diff_id).join("fs/half"), "made").unwrap();
        let Acquired::Missing(staging) = store.acquire(&diff_id).unwrap() else { panic!() };
        assert!(!staging.fs_dir().join("half").exists());
        std::mem::forget(staging);
        assert_eq!(store.collect().unwrap().staging, 0, "the forgotten lock is still held");
    }

    #[test]
    fn one_makes_a_layer_and_the_others_wait_for_it() {
        let (_dir, store) = store();
        let id = LayerId::Content(Digest::sha256(b"popular"));
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| match store.acquire(&id).unwrap() {
                    Acquired::Present(guard) => assert!(guard.path().join("file").exists()),
                    Acquired::Missing(staging) => {
                        made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        std::fs::write(staging.fs_dir().join("file"), "x").unwrap();
                        let layer = LayerRecord { id, applied: AppliedLayer::default(), created: String::new() };
                        store.commit_layers(vec![(staging, layer)]).unwrap();
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn records_that_were_never_finished_are_collected() {
        let (dir, store) = store();
        let one = add_image(&store, "one", &[]);
        let unfinished = [dir.path().join("refs/.new-0123"), store.image_dir(&one.manifest).join(".new-0123")];
        for path in &unfinished {
            std::fs::write(path, "{").unwrap();
        }
        store.collect().unwrap();
        assert!(unfinished.iter().all(|path| !path.exists()));
        assert!(store.image(&one.manifest).unwrap().is_some() && store.names().unwrap() == [one]);
    }

    #[test]
    fn names_are_found_as_people_type_them() {
        let (_dir, store) = store();
        let one = add_image(&store, "one", &[]);
        let hex = one.manifest.hex();
        assert_eq!(store.find(&hex[..8], None).unwrap().name, one.name);
        assert_eq!(store.find("", Some(&one.name.parse().unwrap())).unwrap().name, one.name);
        assert!(matches!(store.find(&hex[..5], None), Err(StoreError::NoImage { .. })));
        assert!(matches!(store.find("../../etc", None), Err(StoreError::NoImage { .. })));
    }
}
