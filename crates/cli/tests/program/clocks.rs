//! Clocks that are wrong: the broker's, a replica's, an administrator's. libfaketime turns them.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use nacre_attest::client::{BrokerConfig, Call, Credential, Transport};
use nacre_testkit::{require, run};

use crate::{
    broker::{Scene, measurement_of_us, text},
    support::said,
};

/// The library that turns a program's clock.
fn library() -> Option<PathBuf> {
    require("faketime")?;
    let found =
        fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    Some(found.into_iter().find(|path| path.exists()).expect("faketime's library"))
}

/// What the broker says of a token.
fn shown(scene: &Scene, token: &str) -> (u16, String) {
    let certificate = fs::read_to_string(scene.place.at("broker/tls.crt")).unwrap();
    let config = BrokerConfig { certificate: Some(certificate), ..BrokerConfig::new(&scene.served.url) };
    let path = format!("/kbs/v0/resource/{}", Scene::KEY);
    let reply = Transport::new(&config).unwrap().call("resource", &path, Credential::Bearer(token), Call::Get, 1 << 20);
    let reply = reply.unwrap();
    (reply.status, String::from_utf8_lossy(&reply.body).into_owned())
}

#[test]
fn clocks_that_are_hours_wrong_cost_nothing_but_what_they_have_to() {
    let Some(library) = library() else { return };
    let turn = |command: &mut Command, by: &str| {
        command.env("LD_PRELOAD", &library).env("FAKETIME", by).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    };
    let mut scene = Scene::new();
    scene.admin(&["reference", "set", "sim.measurement", &measurement_of_us()]);
    let attest = |scene: &Scene| text(&mut scene.guest(&["attest", "token"])).trim().to_owned();
    let right = attest(&scene);
    assert_eq!(shown(&scene, &right).0, 200);
    let list = |scene: &Scene, by: Option<&str>| -> Output {
        let mut command = scene.admin_command(&["resource", "ls"]);
        by.into_iter().for_each(|by| turn(&mut command, by));
        command.output().unwrap()
    };
    // An administrator's clock decides about his tokens, and he is told.
    for by in ["+3h", "-3h"] {
        let output = list(&scene, Some(by));
        assert_ne!(output.status.code(), Some(0), "{by}: {}", said(&output));
        assert!(said(&output).contains("not valid yet"), "{by}: {}", said(&output));
    }
    assert_eq!(list(&scene, Some("+30s")).status.code(), Some(0), "a little is nothing");
    for by in ["+3h", "-3h"] {
        scene.serve_again_with(|command| turn(command, by));
        // A guest believes the broker's time and counts from it by its own boot's clock: what the two say of the day does not matter.
        let wrong = attest(&scene);
        assert_eq!(shown(&scene, &wrong).0, 200, "{by}");
        let output = run(scene
            .guest(&["image", "pull", "--quiet", &scene.image()])
            .args(["--insecure-policy", "--insecure-registry"]));
        assert!(output.status.success());
        // A token of another time is none, and the answer names both.
        let (status, why) = shown(&scene, &right);
        assert!(status == 401 && why.contains("valid from") && why.contains("attest again"), "{by}: {why}");
        scene.serve_again();
        let (status, why) = shown(&scene, &wrong);
        assert!(status == 401 && why.contains("valid from") && why.contains("attest again"), "{by}: {why}");
    }
}
