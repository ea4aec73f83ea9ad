//! What runs in the guest: image store, pulls, bundles, the services for the guest's other programs.

pub mod bundle;
pub mod config;
pub mod images;
pub mod lazy;
pub mod service;
pub mod services;
pub mod store;
