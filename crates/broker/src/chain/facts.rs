//! What is shown of each TEE's claims, and what each is compared with.
//!
//! The names of reference values and the values that are good by themselves are those of the shipped appraisal policy
//! (`policies/attestation_cpu.rego`); another policy may ask for others, which are shown as far as it asked for them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Check, Found, StageId, Verdict, short, shown};

/// What something is compared with.
enum By {
    /// A reference value.
    Reference(&'static str),
    /// What is good by itself.
    Good(Good),
    /// Nothing: it is only shown.
    Shown,
}

enum Good {
    Text(&'static str),
    False,
    Zero,
}

type Fact = (StageId, &'static str, &'static str, By);

use By::{Reference, Shown};
use StageId::{Configuration, Firmware, Hardware};

const OFF: By = By::Good(Good::False);
const ZERO: By = By::Good(Good::Zero);
const INTEL: By = By::Good(Good::Text("939a7233f79c4ca9940a0db3957f0607"));
const UP_TO_DATE: By = By::Good(Good::Text("UpToDate"));
const IN_TIME: By = By::Good(Good::Text("0"));

const SIM: &[Fact] = &[
    (Hardware, "Security version", "/svn", Reference("sim.svn")),
    (Firmware, "Program", "/measurement", Reference("sim.measurement")),
    (Configuration, "Debugging", "/debug", OFF),
    (Configuration, "Init data", "/init_data", Reference("sim.init_data")),
];

const SAMPLE: &[Fact] = &[(Hardware, "Security version", "/svn", Reference("sample.svn"))];

const SNP: &[Fact] = &[
    (Hardware, "Product", "/product", Shown),
    (Hardware, "Chip", "/chip_id", Shown),
    (Hardware, "Certificate of the chip's key", "/signing_key", Shown),
    (Hardware, "Certificate ends", "/certificate_expires", Shown),
    (Hardware, "Bootloader", "/reported_tcb_bootloader", Reference("snp_bootloader")),
    (Hardware, "Microcode", "/reported_tcb_microcode", Reference("snp_microcode")),
    (Hardware, "SNP firmware", "/reported_tcb_snp", Reference("snp_snp_svn")),
    (Hardware, "TEE", "/reported_tcb_tee", Reference("snp_tee_svn")),
    (Firmware, "Launch measurement", "/measurement", Reference("snp_launch_measurement")),
    (Configuration, "Debugging", "/policy_debug_allowed", OFF),
    (Configuration, "Migration agent", "/policy_migrate_ma", OFF),
    (Configuration, "Privilege level (VMPL)", "/vmpl", ZERO),
    (Configuration, "Init data", "/init_data", Reference("snp_init_data")),
];

const TDX: &[Fact] = &[
    (Hardware, "Platform (FMSPC)", "/fmspc", Shown),
    (Hardware, "Type of TEE", "/quote/header/tee_type", By::Good(Good::Text("81000000"))),
    (Hardware, "Quoting enclave's vendor", "/quote/header/vendor_id", INTEL),
    (Hardware, "TCB status", "/tcb_status", UP_TO_DATE),
    (Hardware, "TCB date", "/tcb_date", Shown),
    (Hardware, "Advisories", "/advisory_ids", Shown),
    (Hardware, "Collateral past its time", "/collateral_expiration_status", IN_TIME),
    (Firmware, "Firmware (MRTD)", "/quote/body/mr_td", Reference("mr_td")),
    (Firmware, "Configuration of the firmware (RTMR 0)", "/quote/body/rtmr_0", Shown),
    (Firmware, "Kernel (RTMR 1)", "/quote/body/rtmr_1", Reference("rtmr_1")),
    (Firmware, "Command line and initrd (RTMR 2)", "/quote/body/rtmr_2", Reference("rtmr_2")),
    (Configuration, "Debugging", "/td_attributes/debug", OFF),
    (Configuration, "Extended features (XFAM)", "/quote/body/xfam", Reference("xfam")),
    (Configuration, "Init data", "/init_data", Reference("tdx_init_data")),
];

const SGX: &[Fact] = &[
    (Hardware, "Platform (FMSPC)", "/fmspc", Shown),
    (Hardware, "Quoting enclave's vendor", "/header/vendor_id", INTEL),
    (Hardware, "TCB status", "/tcb_status", UP_TO_DATE),
    (Hardware, "TCB date", "/tcb_date", Shown),
    (Hardware, "Advisories", "/advisory_ids", Shown),
    (Hardware, "Collateral past its time", "/collateral_expiration_status", IN_TIME),
    (Firmware, "Enclave (MRENCLAVE)", "/body/mr_enclave", Reference("sgx_mr_enclave")),
    (Firmware, "Signer (MRSIGNER)", "/body/mr_signer", Reference("sgx_mr_signer")),
    (Firmware, "Product", "/body/isv_prod_id", Reference("sgx_isv_prod_id")),
    (Firmware, "Security version", "/body/isv_svn", Reference("sgx_isv_svn")),
    (Configuration, "Debugging", "/debug", OFF),
    (Configuration, "Init data (CONFIGID)", "/init_data", Reference("sgx_config_id")),
];

const TPM: &[Fact] = &[
    (Hardware, "Attestation key", "/ak_public", Reference("trusted_aks")),
    (Hardware, "TPM firmware", "/firmware_version", Shown),
    (Configuration, "Init data (PCR 8)", "/init_data", Reference("tpm_init_data")),
];

fn facts(tee: &str) -> &'static [Fact] {
    match tee {
        "sim" => SIM,
        "sample" => SAMPLE,
        "snp" => SNP,
        "tdx" => TDX,
        "sgx" => SGX,
        "tpm" => TPM,
        _ => &[],
    }
}

/// Whether a reference value is one that the shipped policy compares with claims of another TEE: it looks some of them up all the same.
pub(crate) fn is_of_another(tee: &str, reference: &str) -> bool {
    let names = |of: &str| {
        let is_one = |(.., by): &Fact| matches!(by, Reference(name) if *name == reference);
        facts(of).iter().any(is_one) || (of == "tpm" && reference.starts_with("tpm_pcr"))
    };
    !names(tee) && ["sim", "sample", "snp", "tdx", "sgx", "tpm"].into_iter().any(names)
}

/// Where in the claims a reference value's counterpart is: for whoever keeps some of its values, so that the one that was found is among them.
pub(crate) fn counterpart<'a>(tee: &str, claims: &'a Value, reference: &str) -> Option<&'a Value> {
    if let Some(pcr) = reference.strip_prefix("tpm_pcr").filter(|_| tee == "tpm") {
        return claims.get(format!("pcr{pcr}"));
    }
    let fact = facts(tee).iter().find(|(.., by)| matches!(by, Reference(name) if *name == reference))?;
    claims.pointer(fact.2)
}

pub(super) fn session(found: &Found<'_>) -> Vec<Check> {
    let bound = |what: &str, expected: &str, found: Option<&Value>| Check {
        what: what.into(),
        expected: vec![expected.into()],
        more: 0,
        found: found.map(shown),
        verdict: Verdict::of(found.is_some()),
        by: "the protocol".into(),
    };
    let evidence = found.evidence();
    vec![
        bound("Nonce", "this session's, used once", evidence.pointer("/runtime_data_claims/nonce")),
        bound("Report data", "the digest of this nonce and this TEE key", evidence.get("report_data")),
    ]
}

/// The checks of a stage that the TEE's claims are about.
pub(super) fn checks(stage: StageId, found: &Found<'_>) -> (Vec<Check>, String) {
    let mut checks = Vec::new();
    let mut note = String::new();
    if stage == Hardware {
        checks.push(signed(found.tee));
    }
    checks.extend(facts(found.tee).iter().filter(|(of, ..)| *of == stage).map(|fact| of_fact(found, fact)));
    match stage {
        Firmware => {
            checks.extend(pcrs(found));
            checks.push(log(found));
        }
        Configuration => {
            checks.extend(init_data(found));
            checks.extend(super::story::policies(found));
            checks.extend(others(found));
        }
        _ => {}
    }
    if found.evidence().get("nacre.cut").is_some() {
        note.push_str("Its evidence was too long to be kept.");
    }
    (checks, note)
}

fn signed(tee: &str) -> Check {
    let (expected, verdict) = match tee {
        "snp" => ("signed by a key that AMD vouches for", Verdict::Passed),
        "tdx" | "sgx" => ("signed by a key that Intel vouches for, with collateral that Intel signed", Verdict::Passed),
        "tpm" => ("signed by the attestation key below", Verdict::Passed),
        "sim" | "sample" => ("signed by hardware", Verdict::NotChecked),
        _ => ("signed", Verdict::Passed),
    };
    let found = match tee {
        "sim" => "signed by a simulated platform that this broker was told to trust: no hardware protects this guest",
        "sample" => "signed by nobody, and nothing is measured: any program can say it",
        _ => "it is, and verified",
    };
    Check {
        what: "Evidence".into(),
        expected: vec![expected.into()],
        more: 0,
        found: Some(found.into()),
        verdict,
        by: "the verifier, by verify.toml".into(),
    }
}

fn of_fact(of: &Found<'_>, (_, what, at, by): &Fact) -> Check {
    let found = of.claims().pointer(at).filter(|value| !value.is_null());
    let good = |expected: &str, verdict: bool| Check {
        what: (*what).into(),
        expected: vec![expected.into()],
        more: 0,
        found: found.map(shown),
        verdict: if found.is_some() { Verdict::of(verdict) } else { Verdict::NotChecked },
        by: "what the shipped policy wants".into(),
    };
    match by {
        Reference(name) => of.compared(what, name, found),
        By::Good(Good::False) => {
            Check { found: found.map(on_or_off), ..good("off", found == Some(&Value::Bool(false))) }
        }
        By::Good(Good::Zero) => good("0", found.and_then(Value::as_u64) == Some(0)),
        By::Good(Good::Text(text)) => good(text, found.and_then(Value::as_str) == Some(text)),
        Shown => Check { expected: Vec::new(), verdict: Verdict::NotChecked, by: String::new(), ..good("", false) },
    }
}

fn on_or_off(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        other => shown(other),
    }
}

/// PCRs that the policy compared, and those that firmware and boot loader extend.
fn pcrs(found: &Found<'_>) -> Vec<Check> {
    if found.tee != "tpm" {
        return Vec::new();
    }
    let named = |number: &u32| matches!(found.reference(&format!("tpm_pcr{number:02}")), Some(Some(_)));
    (0..24)
        .filter(|number| *number < 8 || named(number))
        .map(|number| {
            let value = found.claims().get(format!("pcr{number:02}"));
            found.compared(&format!("PCR {number}"), &format!("tpm_pcr{number:02}"), value)
        })
        .collect()
}

fn log(found: &Found<'_>) -> Check {
    let expected = vec!["its replay gives the registers that were measured".into()];
    let (text, verdict) = match found.runtime() {
        Some(runtime) => {
            let count = |name: &str| runtime.pointer(&format!("/counts/{name}")).and_then(Value::as_u64).unwrap_or(0);
            let unknown = runtime.get("unknown").and_then(Value::as_u64).unwrap_or(0);
            let text = format!(
                "replayed: {} policies, {} images, {} volumes, {} keys, {} workloads, {unknown} events that are not understood",
                count("policies"),
                count("images"),
                count("volumes"),
                count("keys"),
                count("workloads"),
            );
            (text, if unknown == 0 { Verdict::Passed } else { Verdict::Failed })
        }
        None => ("none was sent".to_owned(), Verdict::NotChecked),
    };
    Check { what: "Event log".into(), expected, more: 0, found: Some(text), verdict, by: "the verifier".into() }
}

fn init_data(found: &Found<'_>) -> Option<Check> {
    let entries = found.evidence().get("init_data_claims")?.as_object()?;
    let names: Vec<&str> = entries.keys().map(String::as_str).collect();
    Some(Check {
        what: "Entries of the init data".into(),
        expected: vec!["the text whose digest was measured".into()],
        more: 0,
        found: Some(short(&names.join(", "))),
        verdict: Verdict::Passed,
        by: "the verifier".into(),
    })
}

/// Reference values that the policy asked for and that none of the facts is compared with.
fn others(found: &Found<'_>) -> Vec<Check> {
    let known: BTreeSet<&str> = facts(found.tee)
        .iter()
        .filter_map(|(.., by)| if let Reference(name) = by { Some(*name) } else { None })
        .chain(["image_policy", "image_digest"])
        .collect();
    let is_other =
        |name: &&String| !(known.contains(name.as_str()) || found.tee == "tpm" && name.starts_with("tpm_pcr"));
    let asked = found.attested.expected.keys().filter(is_other).take(32);
    asked
        .map(|name| {
            let by = "the appraisal policy asked for it, and compared it with what it knows".to_owned();
            let check = found.compared(&format!("Reference value {}", short(name)), name, None);
            Check { verdict: Verdict::NotChecked, by, ..check }
        })
        .collect()
}
