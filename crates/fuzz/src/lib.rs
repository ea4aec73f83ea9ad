//! Development only: what is fuzzed.
//!
//! A [`Target`] is a function that takes any bytes, and must neither panic, nor hang, nor fill the memory. Two things run it: the
//! programs of `fuzz/` under libFuzzer (`cargo xtask fuzz NAME`), and this crate's own tests, which mutate the seeds for some seconds
//! with a generator that is the same in each run ([`smoke`]).
//!
//! A new parser of untrusted bytes gets an entry in [`TARGETS`], a test in `tests/smoke.rs` and a file in `fuzz/fuzz_targets`; a test
//! sees to it that none of them is forgotten.

mod anchors;
mod attestation;
mod disks;
mod encryption;
mod evidence;
mod images;
mod indexes;
mod layers;
mod lazy;
mod names;
mod nbd;
mod registries;
mod signatures;
pub mod smoke;

/// Something that takes bytes from anywhere.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// Takes the bytes.
    pub run: fn(&[u8]),
    /// Inputs to begin with: good ones, and bad ones that are nearly good.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "reference", run: names::reference, seeds: names::references },
    Target { name: "uri", run: names::uri, seeds: names::uris },
    Target { name: "manifest", run: images::manifest, seeds: images::manifests },
    Target { name: "config", run: images::config, seeds: images::configs },
    Target { name: "archive", run: images::archive, seeds: images::archives },
    Target { name: "layout", run: images::layout, seeds: images::layouts },
    Target { name: "policy", run: signatures::policy, seeds: signatures::policies },
    Target { name: "lookaside", run: signatures::lookaside, seeds: signatures::lookasides },
    Target { name: "payload", run: signatures::payload, seeds: signatures::payloads },
    Target { name: "bundle", run: signatures::bundle, seeds: signatures::bundles },
    Target { name: "openpgp", run: signatures::openpgp, seeds: signatures::openpgps },
    Target { name: "jose", run: signatures::jose, seeds: signatures::joses },
    Target { name: "encryption", run: encryption::encryption, seeds: encryption::encryptions },
    Target { name: "packet", run: encryption::packet, seeds: encryption::packets },
    Target { name: "registries_conf", run: registries::conf, seeds: registries::confs },
    Target { name: "auth_file", run: registries::auth_file, seeds: registries::auth_files },
    Target { name: "headers", run: registries::headers, seeds: registries::header_values },
    Target { name: "url", run: registries::url, seeds: registries::urls },
    Target { name: "broker", run: attestation::broker, seeds: attestation::brokers },
    Target {
        name: "reference_document",
        run: attestation::reference_document,
        seeds: attestation::reference_documents,
    },
    Target { name: "corim", run: attestation::corim, seeds: attestation::corims },
    Target { name: "init_data", run: attestation::init_data, seeds: attestation::init_datas },
    Target { name: "tar", run: layers::tar, seeds: layers::tars },
    Target { name: "apply", run: layers::apply, seeds: layers::tars },
    Target { name: "decompress", run: layers::decompress, seeds: layers::compressed },
    Target { name: "services", run: layers::services, seeds: layers::requests },
    Target { name: "token", run: attestation::token, seeds: attestation::tokens },
    Target { name: "tpm_response", run: anchors::tpm_response, seeds: anchors::tpm_responses },
    Target { name: "anchor_spec", run: anchors::spec, seeds: anchors::specs },
    Target { name: "superblock", run: disks::superblock, seeds: disks::numbers },
    Target { name: "checkpoint", run: disks::checkpoint, seeds: disks::numbers },
    Target { name: "journal", run: disks::journal, seeds: disks::numbers },
    Target { name: "index_node", run: disks::index_node, seeds: disks::numbers },
    Target { name: "disk_image", run: disks::image, seeds: disks::images },
    Target { name: "nbd_option", run: nbd::options, seeds: nbd::handshakes },
    Target { name: "nbd_request", run: nbd::requests, seeds: nbd::request_seeds },
    Target { name: "erofs_check", run: lazy::erofs, seeds: lazy::erofs_images },
    Target { name: "lazy_metadata", run: lazy::metadata, seeds: lazy::metadata_blobs },
    Target { name: "lazy_leaf", run: lazy::leaf, seeds: lazy::leaves },
    Target { name: "lazy_index", run: indexes::metadata, seeds: indexes::metadata_blobs },
    Target { name: "lazy_page", run: indexes::page, seeds: indexes::pages },
    Target { name: "lazy_span", run: nacre_lazy::index::fuzzing::span, seeds: indexes::spans },
    Target { name: "event_log", run: evidence::event_log, seeds: evidence::event_logs },
    Target { name: "snp_evidence", run: evidence::snp_evidence, seeds: evidence::snp_evidences },
    Target { name: "quote", run: evidence::quote, seeds: evidence::quotes },
    Target { name: "tpm_evidence", run: evidence::tpm_evidence, seeds: evidence::tpm_evidences },
    Target { name: "enrolment", run: evidence::enrolment, seeds: evidence::enrolments },
    Target { name: "collateral", run: evidence::collateral, seeds: evidence::collaterals },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Runs the target of that name, for the programs of `fuzz/`; nothing happens where there is none.
pub fn run(name: &str, data: &[u8]) {
    if let Some(target) = target(name) {
        (target.run)(data);
    }
}

/// Seeds from texts.
fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
