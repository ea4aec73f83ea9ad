//! Attestation keys of TPMs, enrolled by who made the TPM (swtpm with EK certificates of swtpm_localca's), and attempts to enrol others.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{path::PathBuf, sync::Arc};

use common::{Rig, SECRET, path};
use nacre_attest::{
    attesters::tpm::{Ak, TpmAttester, TpmOptions, address},
    client::{BrokerClient, ClientError, Credential, Reply, enrol},
    enrolment::{Candidate, Challenge},
    rcar::{ErrorBody, Request},
};
use nacre_broker::{Broker, InitOptions, Settings, Transport};
use nacre_testkit::{Swtpm, TpmMaker, run};

/// A broker that trusts a maker of TPMs.
struct Scene {
    rig: Rig,
    _roots: tempfile::TempDir,
}

impl Scene {
    fn trusting(maker: &TpmMaker) -> Self {
        let roots = tempfile::tempdir().unwrap();
        let file = roots.path().join("ek-roots.pem");
        std::fs::write(&file, maker.authorities()).unwrap();
        Self { rig: Rig::with(settings(file), Transport::Tls), _roots: roots }
    }

    fn post(&self, path: &str, body: &[u8]) -> Reply {
        self.rig.wire().post(path, Credential::None, body)
    }

    fn begin(&self, candidate: &Candidate) -> Result<Challenge, String> {
        let reply = self.post("/kbs/v0/enrolment", &candidate.to_json());
        if reply.status == 200 { Ok(Challenge::parse(&reply.body).unwrap()) } else { Err(said(&reply)) }
    }

    fn finish(&self, challenge: &Challenge, candidate: &Candidate, answer: &[u8]) -> Result<(), String> {
        let candidate = Candidate { answer: Some(answer.to_vec()), ..candidate.clone() };
        let reply = self.post(&format!("/kbs/v0/enrolment/{}", challenge.enrolment), &candidate.to_json());
        if reply.status == 200 { Ok(()) } else { Err(said(&reply)) }
    }
}

fn settings(file: PathBuf) -> Settings {
    Settings { allow_simulated: true, ek_roots: Some(file), ..Settings::default() }
}

fn said(reply: &Reply) -> String {
    let error = ErrorBody::parse(&reply.body).unwrap();
    format!("{} {}: {}", reply.status, error.variant(), error.detail)
}

fn attester(tpm: &Swtpm) -> Arc<TpmAttester> {
    let options = TpmOptions {
        address: address(&tpm.address()),
        ak: Ak::Primary,
        firmware_log: tpm.state().join("no-firmware-log"),
        log_dir: tpm.state().to_owned(),
    };
    Arc::new(TpmAttester::new(&options, None).unwrap())
}

fn hardware(rig: &Rig, attester: &Arc<TpmAttester>) -> serde_json::Value {
    let client = BrokerClient::new(rig.config(), attester.clone()).unwrap();
    let attested = client.attest().unwrap();
    serde_json::to_value(&attested.claims().unwrap().submods["cpu0"].vector).unwrap()["hardware"].clone()
}

#[test]
fn a_tpm_of_a_trusted_maker_is_enrolled_by_itself_and_gets_keys() {
    let Some(maker) = TpmMaker::new() else { return };
    let Some(tpm) = Swtpm::made_by(&maker) else { return };
    let (scene, attester) = (Scene::trusting(&maker), attester(&tpm));
    let rig = &scene.rig;
    assert_eq!(hardware(rig, &attester), 97);
    let name = enrol(&rig.config(), &attester).unwrap().name;
    assert_eq!(hardware(rig, &attester), 2);
    rig.broker.add_reference_value("tpm_pcr07", vec!["00".repeat(32).into()], None).unwrap();
    let client = || BrokerClient::new(rig.config(), attester.clone()).unwrap();
    assert_eq!(client().get(&path("default/key/1")).unwrap().expose(), SECRET);
    // Again is nothing else; it is listed, and outlives a restart of the broker as everything of its database.
    assert_eq!(enrol(&rig.config(), &attester).unwrap().name, name);
    let listed = rig.broker.enrolments().unwrap();
    assert_eq!((listed.len(), &listed[0].name, listed[0].issuer.as_str()), (1, &name, "swtpm-localca"));
    assert_eq!(listed[0].ak, attester.ak_public().unwrap());
    assert!(rig.broker.audit(0, 100).unwrap().iter().any(|entry| entry.event == "attestation key enrolled"));
    // Revoked, it gets nothing, and does not help itself.
    assert!(!rig.broker.revoke_enrolment("none", false).unwrap());
    assert!(rig.broker.revoke_enrolment(&name, false).unwrap());
    assert_eq!(hardware(rig, &attester), 97);
    assert!(client().get(&path("default/key/1")).is_err());
    let error = enrol(&rig.config(), &attester).unwrap_err();
    assert!(error.to_string().contains("revoked"), "{error}");
    assert!(rig.broker.enrolments().unwrap()[0].revoked.is_some());
    assert!(rig.broker.revoke_enrolment(&name, true).unwrap());
    enrol(&rig.config(), &attester).unwrap();
    assert_eq!(hardware(rig, &attester), 2);
}

#[test]
fn a_tpm_of_another_maker_or_without_a_certificate_is_not_enrolled() {
    let (Some(maker), Some(other)) = (TpmMaker::new(), TpmMaker::new()) else { return };
    let scene = Scene::trusting(&maker);
    // Both makers have the same names: what counts is who signed.
    let Some(software) = Swtpm::made_by(&other) else { return };
    let error = enrol(&scene.rig.config(), &attester(&software)).unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 403, .. }), "{error}");
    assert!(error.to_string().contains("signature is not"), "{error}");
    let Some(bare) = Swtpm::start() else { return };
    let error = enrol(&scene.rig.config(), &attester(&bare)).unwrap_err();
    assert!(error.to_string().contains("no EK certificate"), "{error}");
    assert!(scene.rig.broker.enrolments().unwrap().is_empty());
    assert!(scene.rig.broker.audit(0, 100).unwrap().iter().any(|entry| entry.event == "enrolment refused"));
}

#[test]
fn an_enrolment_is_for_one_tpm_one_key_and_one_time() {
    let Some(maker) = TpmMaker::new() else { return };
    let (Some(tpm), Some(second)) = (Swtpm::made_by(&maker), Swtpm::made_by(&maker)) else { return };
    let scene = Scene::trusting(&maker);
    let (first, other) = (attester(&tpm), attester(&second));
    let candidate = first.candidate().unwrap();
    // Another answer, and then the right one, which comes too late.
    let challenge = scene.begin(&candidate).unwrap();
    let answer = first.activate(&challenge).unwrap();
    assert!(scene.finish(&challenge, &candidate, &[0; 32]).unwrap_err().contains("403"));
    assert!(scene.finish(&challenge, &candidate, &answer).is_err());
    // The secret of one candidate does not do for another one.
    let challenge = scene.begin(&candidate).unwrap();
    let answer = first.activate(&challenge).unwrap();
    let theirs = Candidate { ak_public: other.candidate().unwrap().ak_public, ..candidate.clone() };
    assert!(scene.finish(&challenge, &theirs, &answer).unwrap_err().contains("403"));
    assert!(scene.finish(&challenge, &candidate, &answer).is_err(), "spent");
    // A key of another TPM, or of none, beside this EK: no TPM gives the secret.
    let challenge = scene.begin(&theirs).unwrap();
    for attester in [&first, &other] {
        let error = attester.activate(&challenge).unwrap_err();
        assert!(error.to_string().contains("another TPM or another key"), "{error}");
    }
    // A replay of all that went well.
    let challenge = scene.begin(&candidate).unwrap();
    let answer = first.activate(&challenge).unwrap();
    scene.finish(&challenge, &candidate, &answer).unwrap();
    assert!(scene.finish(&challenge, &candidate, &answer).is_err());
    // Sessions of the two protocols are not each other's.
    let challenge = scene.begin(&candidate).unwrap();
    let wire = scene.rig.wire();
    assert_ne!(wire.post("/kbs/v0/attest", Credential::Session(&challenge.enrolment), b"{}").status, 200);
    let auth = wire.post("/kbs/v0/auth", Credential::None, &serde_json::to_vec(&Request::new("tpm")).unwrap());
    let session = Challenge { enrolment: auth.session.unwrap(), ..challenge };
    assert!(scene.finish(&session, &candidate, &[1; 32]).unwrap_err().contains("403"));
    assert_eq!(scene.rig.broker.enrolments().unwrap().len(), 1);
}

#[test]
fn keys_that_are_not_a_tpms_own_are_refused() {
    let Some(maker) = TpmMaker::new() else { return };
    let Some(tpm) = Swtpm::made_by(&maker) else { return };
    let scene = Scene::trusting(&maker);
    let good = attester(&tpm).candidate().unwrap();
    let refused = |candidate: &Candidate, words: &str| {
        let error = scene.begin(candidate).unwrap_err();
        assert!(error.contains(words), "'{words}' is not in: {error}");
    };
    // FIXEDTPM, FIXEDPARENT, SENSITIVEDATAORIGIN, RESTRICTED: without one of them, software may have it, or it signs anything.
    for bit in [1_u32, 4, 5, 16] {
        for (ak, words) in [(true, "AK"), (false, "EK")] {
            let mut candidate = good.clone();
            let area = if ak { &mut candidate.ak_public } else { &mut candidate.ek_public };
            let byte = 7 - usize::try_from(bit / 8).unwrap();
            area[byte] ^= 1 << (bit % 8);
            refused(&candidate, words);
        }
    }
    // Another key, another policy, another hash than the certificate's and the template's.
    for at in [0, 3, 12, 60, good.ek_public.len() - 1] {
        let mut candidate = good.clone();
        candidate.ek_public[at] ^= 1;
        refused(&candidate, "EK");
    }
    let mut other_hash = good.clone();
    other_hash.ak_public[3] = 0x0c;
    refused(&other_hash, "AK");
    // The EK as an AK, and the other way round.
    refused(&Candidate { ak_public: good.ek_public.clone(), ..good.clone() }, "AK");
    refused(&Candidate { ek_public: good.ak_public.clone(), ..good.clone() }, "EK");
    // Certificates: each changed byte, cut, of an authority.
    for at in (0..good.ek_certificate.len()).step_by(7) {
        let mut candidate = good.clone();
        candidate.ek_certificate[at] ^= 1;
        assert!(scene.begin(&candidate).is_err(), "byte {at}");
    }
    refused(&Candidate { ek_certificate: good.ek_certificate[..500].to_vec(), ..good.clone() }, "certificate");
    let issuer = maker.authorities();
    let body: String = issuer.rsplit("-----BEGIN CERTIFICATE-----").next().unwrap().lines().collect();
    let der = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, body.split('-').next().unwrap()).unwrap();
    refused(&Candidate { ek_certificate: der, ..good.clone() }, "not one of an endorsement key");
    for (body, status) in [(&b"{}"[..], 400), (&[b' '; 40_000], 413)] {
        assert_eq!(scene.post("/kbs/v0/enrolment", body).status, status);
    }
    scene.begin(&good).unwrap();
}

#[test]
fn an_elliptic_endorsement_key_is_as_good_as_an_rsa_one() {
    let (Some(maker), Some(tpm)) = (TpmMaker::new(), Swtpm::start()) else { return };
    let at = |name: &str| tpm.state().join(name).display().to_string();
    let tool = |program: &str, arguments: &[&str]| run(tpm.tool(program).unwrap().args(arguments));
    if tpm.tool("tpm2_createek").is_none() {
        return;
    }
    tool("tpm2_createek", &["-c", &at("ek"), "-G", "ecc", "-u", &at("ek.pub")]);
    tool("tpm2_flushcontext", &["-t"]);
    let public = std::fs::read(at("ek.pub")).unwrap();
    let hex = |bytes: &[u8]| nacre_attest::evidence::hex(bytes);
    let point = &public[public.len() - 68..];
    let der = maker.certify(&format!("x={},y={},id=secp256r1", hex(&point[2..34]), hex(&point[36..])));
    std::fs::write(at("ek.der"), &der).unwrap();
    // The index is larger than what is in it, as many are.
    let size = (der.len() + 100).to_string();
    tool("tpm2_nvdefine", &["0x01c0000a", "-C", "o", "-s", &size, "-a", "ownerwrite|ownerread|authread|no_da"]);
    std::fs::write(at("index"), [&der[..], &[0xff; 100]].concat()).unwrap();
    tool("tpm2_nvwrite", &["0x01c0000a", "-C", "o", "-i", &at("index")]);
    let (scene, attester) = (Scene::trusting(&maker), attester(&tpm));
    enrol(&scene.rig.config(), &attester).unwrap();
    assert_eq!(hardware(&scene.rig, &attester), 2);
}

#[test]
fn a_broker_enrols_nobody_unless_it_is_told_whom_to_trust() {
    let Some(maker) = TpmMaker::new() else { return };
    let Some(tpm) = Swtpm::made_by(&maker) else { return };
    let error = enrol(&Rig::new().config(), &attester(&tpm)).unwrap_err();
    assert!(error.to_string().contains("ek_roots"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let root = maker.authorities();
    let (first, _) = root.split_at(root.find("-----END CERTIFICATE-----").unwrap());
    let leaf = maker.certify(&"cd".repeat(256));
    let leaf = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, leaf);
    let leaf = format!("-----BEGIN CERTIFICATE-----\n{leaf}\n-----END CERTIFICATE-----\n");
    for (number, (text, words)) in [
        ("", "no root"),
        ("x", "no root"),
        (first, "ends within"),
        (&(root.clone() + &leaf), "no certificate authority"),
    ]
    .into_iter()
    .enumerate()
    {
        let file = directory.path().join("roots.pem");
        std::fs::write(&file, text).unwrap();
        let options = InitOptions { settings: settings(file), ..InitOptions::default() };
        let error = Broker::init(&directory.path().join(number.to_string()), &options).err().unwrap();
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    let missing = InitOptions { settings: settings("none.pem".into()), ..InitOptions::default() };
    assert!(Broker::init(&directory.path().join("missing"), &missing).is_err());
}
