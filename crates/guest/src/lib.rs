//! What runs in the guest: image store, composition, bundles, the attestation agent.

pub mod bundle;
