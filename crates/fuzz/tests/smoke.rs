//! A few seconds for each target.

use std::{collections::BTreeSet, fs, path::Path};

use nacre_fuzz::{TARGETS, smoke::smoke};

macro_rules! smoke {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { smoke(nacre_fuzz::target(stringify!($name)).unwrap()); })*
        const TESTED: &[&str] = &[$(stringify!($name)),*];
    };
}

smoke!(
    reference,
    uri,
    manifest,
    config,
    archive,
    layout,
    policy,
    lookaside,
    payload,
    bundle,
    openpgp,
    jose,
    registries_conf,
    auth_file,
    url,
    broker,
    reference_document,
    corim,
    init_data,
    token,
    headers,
    encryption,
    packet,
    tar,
    apply,
    decompress,
    services,
    tpm_response,
    anchor_spec,
    superblock,
    checkpoint,
    journal,
    index_node,
    disk_image,
    nbd_option,
    nbd_request,
    erofs_check,
    lazy_metadata,
    lazy_leaf,
    lazy_index,
    lazy_page,
    lazy_span,
    event_log,
    snp_evidence,
    quote,
    tpm_evidence,
    enrolment,
    collateral,
);

#[test]
fn no_target_is_forgotten() {
    let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names.len(), TARGETS.len());
    assert_eq!(names, TESTED.iter().map(|name| (*name).to_owned()).collect());
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/fuzz_targets");
    let programs = fs::read_dir(programs).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .contains(&format!("\"{}\"", path.file_stem().unwrap().to_str().unwrap()))
        );
        path.file_stem().unwrap().to_str().unwrap().to_owned()
    });
    assert_eq!(names, programs.collect());
}
