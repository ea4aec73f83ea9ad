//! What the commands do.

pub(crate) mod attest;
pub(crate) mod broker;
pub(crate) mod copy;
pub(crate) mod disk;
pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod index;
pub(crate) mod inspect;
pub(crate) mod lazy;
pub(crate) mod mounts;
pub(crate) mod run;
pub(crate) mod trace;
pub(crate) mod verify;

use nacre_guest::store::{RefRecord, Store, StoreError};
use nacre_oci::reference::Location;

/// The stored image of the first of `locations` that there is, or of what a person typed as a digest.
pub(crate) fn find(store: &Store, locations: &[Location], text: &str) -> Result<RefRecord, StoreError> {
    for location in locations {
        if let Some(name) = store.name(location)? {
            return Ok(name);
        }
    }
    store.find(text, None)
}
