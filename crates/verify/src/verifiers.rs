//! All verifiers of hardware evidence, by the TEE's name.

use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::evidence::Verifier;

use crate::{
    cache::Cache,
    dcap::{DcapVerifier, IntelRoot, RootError},
    rules::Rules,
    snp::{AmdRoots, RootsError, SnpVerifier},
    tpm::TpmVerifier,
};

/// The vendors' roots that are in this crate are none: the build is broken.
#[derive(Debug, thiserror::Error)]
pub enum VendorRootsError {
    /// AMD's.
    #[error(transparent)]
    Amd(#[from] RootsError),
    /// Intel's.
    #[error(transparent)]
    Intel(#[from] RootError),
}

/// Verifiers with the vendors' roots, one cache and one set of rules.
pub struct Verifiers {
    by_tee: BTreeMap<&'static str, Box<dyn Verifier>>,
    cache: Arc<Cache>,
}

impl std::fmt::Debug for Verifiers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifiers").field("tees", &self.names()).field("cache", &self.cache).finish()
    }
}

impl Verifiers {
    /// Those of all TEEs that this crate knows.
    ///
    /// # Errors
    /// [`VendorRootsError`].
    pub fn new(cache: Cache, rules: &Rules) -> Result<Self, VendorRootsError> {
        let (cache, amd, intel) = (Arc::new(cache), Arc::new(AmdRoots::amd()?), Arc::new(IntelRoot::intel()?));
        let all: [Box<dyn Verifier>; 4] = [
            Box::new(SnpVerifier::new(amd, Arc::clone(&cache), rules.snp.clone())),
            Box::new(DcapVerifier::tdx(Arc::clone(&intel), Arc::clone(&cache), rules.dcap.clone())),
            Box::new(DcapVerifier::sgx(intel, Arc::clone(&cache), rules.dcap.clone())),
            Box::new(TpmVerifier::new(rules.tpm.clone())),
        ];
        Ok(Self { by_tee: all.into_iter().map(|verifier| (verifier.tee(), verifier)).collect(), cache })
    }

    /// The verifier of a TEE.
    pub fn get(&self, tee: &str) -> Option<&dyn Verifier> {
        self.by_tee.get(tee).map(AsRef::as_ref)
    }

    /// The names of all TEEs.
    pub fn names(&self) -> Vec<&'static str> {
        self.by_tee.keys().copied().collect()
    }

    /// The cache of collateral.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }
}
