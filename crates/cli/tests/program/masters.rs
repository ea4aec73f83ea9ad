//! A broker whose master key is in a TPM.

use std::fs;

use nacre_testkit::run;

use crate::{
    broker::text,
    support::{Place, said},
};

#[test]
fn a_master_key_is_in_a_tpm_and_opens_nothing_elsewhere() {
    let (Some(mut tpm), Some(second)) = (nacre_testkit::Swtpm::start(), nacre_testkit::Swtpm::start()) else { return };
    let place = Place::new();
    let nacre = |arguments: &[&str]| {
        let mut command = place.nacre("unused", arguments);
        command.args(["--dir", &place.text("broker")]);
        command
    };
    let listed = || text(&mut nacre(&["broker", "resource", "ls"]));
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        let output = nacre(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        words.iter().for_each(|word| assert!(said(&output).contains(word), "'{word}' is not in: {}", said(&output)));
    };
    run(&mut nacre(&["broker", "init", "--master-key", &format!("tpm:{},pcrs=0+7", tpm.address())]));
    assert!(!place.at("broker").join("master.key").exists());
    let secret = place.write("secret", "s3cret");
    run(&mut nacre(&["broker", "resource", "put", "one/key/1", &secret]));
    // A key beside it, for the day when PCRs change.
    let in_tpm = text(&mut nacre(&["broker", "master", "ls"])).trim().trim_end_matches("  (in use)").to_owned();
    assert!(in_tpm.starts_with("tpm:"), "{in_tpm}");
    run(&mut nacre(&["broker", "master", "rotate", "--keep-old", "file:recovery.key"]));
    let settings = place.at("broker").join("broker.toml");
    let by_file = fs::read_to_string(&settings).unwrap();
    let by = |address: &str, pcrs: &str| {
        let by_tpm = by_file.replace("file:recovery.key", &format!("tpm:{address}{pcrs}"));
        fs::write(&settings, by_tpm).unwrap();
    };
    by(&tpm.address(), ",pcrs=0+7");
    assert_eq!(listed(), "one/key/1\n");
    // After a restart of the machine; with other PCRs named; on another machine.
    tpm.power_cycle(|_| {});
    assert_eq!(listed(), "one/key/1\n");
    for (address, pcrs) in [(tpm.address(), ""), (tpm.address(), ",pcrs=7"), (second.address(), ",pcrs=0+7")] {
        by(&address, pcrs);
        refused(&["broker", "resource", "ls"], 3, &["other master keys", &in_tpm]);
    }
    // Another boot loader.
    by(&tpm.address(), ",pcrs=0+7");
    let Some(mut extend) = tpm.tool("tpm2_pcrextend") else { return };
    run(extend.arg(format!("7:sha256={}", "ab".repeat(32))));
    refused(&["broker", "resource", "ls"], 3, &["PCR 7 holds", "seal anew", &in_tpm]);
    // The other key opens it still, and it is sealed anew for what is booted now.
    fs::write(&settings, &by_file).unwrap();
    assert_eq!(listed(), "one/key/1\n");
    run(&mut nacre(&["broker", "master", "rotate", "--keep-old", &format!("tpm:{},pcrs=0+7", tpm.address())]));
    assert_eq!(listed(), "one/key/1\n");
    tpm.stop();
    refused(&["broker", "resource", "ls"], 5, &["cannot open"]);
    for wrong in ["tpm:", "tpm:/dev/null,pcrs=24", "vault:x"] {
        fs::write(&settings, by_file.replace("file:recovery.key", wrong)).unwrap();
        refused(&["broker", "resource", "ls"], 2, &["master_key"]);
    }
}
