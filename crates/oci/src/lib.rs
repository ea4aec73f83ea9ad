//! OCI images: references, registries and other transports, trust policy and signatures, layer encryption, unpacking.
//!
//! Data flows from a [`source`] through [`manifest`] parsing, [`trust`] and [`crypt`] into [`unpack`]; `copy` is the shipping side.
//! This crate knows nothing of brokers, stores or mounts: keys come through [`nacre_core::KeySource`].

#[cfg(feature = "sign")]
pub mod copy;
pub mod crypt;
pub mod layer;
pub mod manifest;
pub mod reference;
pub mod registry;
pub mod source;
pub mod transport;
pub mod trust;
pub mod unpack;
