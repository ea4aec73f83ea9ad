//! `nacre attest verify`: the verdict on evidence of any TEE, offline. `nacre attest log`: an event log, as people and scripts read it.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nacre_attest::{
    eventlog::{aael::RuntimeEvent, tcg},
    evidence::{EvidenceError, Expected, Verifier as _, hex, is_simulation},
    sample::{self, SampleVerifier},
    sim::{self, SimVerifier},
    snp_report::{self, SnpReport},
};
use nacre_core::jose::PublicKey;
use nacre_verify::{
    Cache, Genuine, Rules,
    dcap::{self, DcapVerifier, IntelRoot},
    import,
    snp::{self, AmdRoots, SnpVerifier},
    tpm::{self, TpmVerifier},
};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    args::{EvidenceArgs, TeeName},
    commands::attest::{bytes_of_hex, read_init_data},
    output,
};

/// Bytes of a file of evidence, collateral or rules at most.
const LONGEST: u64 = 8 << 20;

pub(crate) fn verify(args: &EvidenceArgs) -> anyhow::Result<()> {
    let now = match &args.time {
        None => OffsetDateTime::now_utc(),
        Some(text) => OffsetDateTime::parse(text, &Rfc3339)
            .with_context(|| format!("--time {text}: a time as 2025-06-25T00:00:00Z is expected"))?,
    };
    let report_data = args.report_data.as_deref().map(bytes_of_hex).transpose()?;
    let init_data = args.init_data.as_deref().map(read_init_data).transpose()?;
    let evidence = read(&args.quote)?;
    let now = now.unix_timestamp();
    if is_simulation(args.tee.name()) {
        let report_data = report_data.with_context(|| {
            format!("--tee {}: say what it has to be bound to (--report-data HEX)", args.tee.name())
        })?;
        let expected = Expected { report_data: &report_data, init_data: init_data.as_ref(), now };
        return simulated(args, &evidence, &expected);
    }
    let genuine = genuine(args, &evidence, now)?;
    let (logs, found) = (genuine.logs().clone(), hex(genuine.report_data()));
    let (claims, bound) = match report_data {
        Some(report_data) => {
            let expected = Expected { report_data: &report_data, init_data: init_data.as_ref(), now };
            (genuine.bound(&expected)?.into_inner().claims, true)
        }
        None => {
            anyhow::ensure!(init_data.is_none(), "--init-data: say also what it is bound to (--report-data HEX)");
            (genuine.claims().clone(), false)
        }
    };
    let mut out =
        json!({"tee": args.tee.name(), "verified": true, "bound": bound, "report_data": found, "claims": claims});
    if let Value::Object(logs) = logs
        && let Value::Object(out) = &mut out
    {
        out.extend(logs);
    }
    output::json(&out)
}

fn genuine(args: &EvidenceArgs, evidence: &[u8], now: i64) -> anyhow::Result<Genuine> {
    let rules = match &args.rules {
        None => Rules::default(),
        Some(path) => {
            let text = String::from_utf8(read(path)?).with_context(|| format!("{}", path.display()))?;
            toml::from_str(&text).with_context(|| format!("{}: rules", path.display()))?
        }
    };
    let cache = match &args.collateral_dir {
        Some(dir) => Cache::directory(dir),
        None => Cache::memory(),
    };
    for path in &args.collateral {
        import(&cache, &read(path)?).with_context(|| format!("{}", path.display()))?;
    }
    let cache = Arc::new(cache);
    let log = args.log.as_deref().map(read).transpose()?;
    let as_json = || serde_json::from_slice::<Value>(evidence).ok();
    Ok(match args.tee {
        TeeName::Snp => {
            let verifier = SnpVerifier::new(Arc::new(AmdRoots::amd()?), cache, rules.snp);
            match as_json() {
                Some(evidence) => verifier.genuine(&evidence, now)?,
                None => {
                    anyhow::ensure!(log.is_none(), "--log: SNP has no register for events");
                    let report = evidence.get(..snp_report::LENGTH).unwrap_or(evidence);
                    let why = |error: snp_report::SnpReportError| malformed(snp::TEE, &error);
                    verifier.report(&SnpReport::from_bytes(report).map_err(why)?, &[], now)?
                }
            }
        }
        TeeName::Tdx | TeeName::Sgx => {
            let root = Arc::new(IntelRoot::intel()?);
            let verifier = match args.tee {
                TeeName::Tdx => DcapVerifier::tdx(root, cache, rules.dcap),
                _ => DcapVerifier::sgx(root, cache, rules.dcap),
            };
            match as_json() {
                Some(evidence) => verifier.genuine(&evidence, now)?,
                None => verifier.quote(evidence, log.as_deref(), now)?,
            }
        }
        TeeName::Tpm => {
            let evidence = serde_json::from_slice(evidence).map_err(|error| malformed(tpm::TEE, &error))?;
            TpmVerifier::new(rules.tpm).genuine(&evidence)?
        }
        TeeName::Sim | TeeName::Sample => anyhow::bail!("simulated evidence is no hardware's"),
    })
}

fn malformed(tee: &'static str, error: &impl ToString) -> EvidenceError {
    EvidenceError::Malformed { tee, why: error.to_string() }
}

/// Of simulated platforms, the collateral is their public key; of a sample of nothing, there is none.
fn simulated(args: &EvidenceArgs, evidence: &[u8], expected: &Expected<'_>) -> anyhow::Result<()> {
    let tee = args.tee.name();
    let evidence = serde_json::from_slice(evidence).map_err(|error| malformed(tee, &error))?;
    let claims = if args.tee == TeeName::Sample {
        anyhow::ensure!(args.collateral.is_empty(), "--collateral: nobody vouches for {tee} evidence");
        SampleVerifier.verify(&evidence, expected)?.into_inner()
    } else {
        let mut verifier = SimVerifier::new();
        for path in &args.collateral {
            verifier.trust(PublicKey::from_bytes(&read(path)?).with_context(|| format!("{}", path.display()))?)?;
        }
        verifier.verify(&evidence, expected)?.into_inner()
    };
    output::json(&json!({
        "tee": tee, "verified": true, "bound": true, "simulated": true,
        "report_data": claims.report_data, "claims": claims.claims,
    }))
}

/// An event log: what it says, and of run-time events the line. Nothing of it is verified.
pub(crate) fn log(file: &Path, as_json: bool) -> anyhow::Result<()> {
    let bytes = read(file)?;
    let log = tcg::parse(&bytes).with_context(|| format!("{}", file.display()))?;
    if as_json {
        return output::json(&log.events.iter().map(|event| event.to_json()).collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = log
        .events
        .iter()
        .map(|event| {
            let said = match RuntimeEvent::from_data(event.data) {
                Ok(event) => event.line(),
                Err(_) => {
                    let details = event.to_json();
                    let text = ["string", "unicode_name"].iter().find_map(|name| details["details"][name].as_str());
                    text.unwrap_or_default().to_owned()
                }
            };
            let digest = event.digests.last().map(|(_, digest)| hex(digest)).unwrap_or_default();
            let short = digest.chars().take(16).collect();
            // What is written to a terminal must not steer it.
            let said = said.chars().take(100).map(|c| if c.is_control() { '?' } else { c }).collect();
            vec![event.register.to_string(), tcg::kind_name(event.kind).into(), short, said]
        })
        .collect();
    Ok(output::table(&["REGISTER", "TYPE", "DIGEST", "WHAT"], &rows)?)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(|| format!("{}", path.display()))?;
    file.take(LONGEST + 1).read_to_end(&mut bytes).with_context(|| format!("{}", path.display()))?;
    anyhow::ensure!(bytes.len() as u64 <= LONGEST, "{}: more than {LONGEST} bytes", path.display());
    Ok(bytes)
}

/// `nacre broker collateral import`.
pub(crate) fn import_collateral(dir: &Path, files: &[PathBuf]) -> anyhow::Result<()> {
    let cache = Cache::directory(nacre_broker::collateral_dir(dir));
    for file in files {
        for entry in import(&cache, &read(file)?).with_context(|| format!("{}", file.display()))? {
            output::line(format_args!("{} until {}", entry.name, day(entry.until)))?;
        }
    }
    Ok(())
}

/// `nacre broker collateral ls`.
pub(crate) fn list_collateral(dir: &Path, as_json: bool) -> anyhow::Result<()> {
    let entries = nacre_verify::entries(&Cache::directory(nacre_broker::collateral_dir(dir)))?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let state = |from: i64, until: i64| match (from <= now, now <= until) {
        (true, true) => "valid",
        (true, false) => "expired",
        (false, true) => "not yet valid",
        (false, false) => "not understood",
    };
    if as_json {
        let entries: Vec<Value> = entries
            .iter()
            .map(|entry| {
                let (from, until) = (day(entry.from), day(entry.until));
                json!({"name": entry.name, "from": from, "until": until, "state": state(entry.from, entry.until)})
            })
            .collect();
        return output::json(&entries);
    }
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|entry| {
            let state = state(entry.from, entry.until).to_owned();
            vec![entry.name.clone(), day(entry.from), day(entry.until), state]
        })
        .collect();
    Ok(output::table(&["NAME", "FROM", "UNTIL", "STATE"], &rows)?)
}

fn day(seconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok());
    time.unwrap_or_else(|| "-".to_owned())
}

impl TeeName {
    /// Its name in the protocol.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Snp => snp::TEE,
            Self::Tdx => dcap::TDX,
            Self::Sgx => dcap::SGX,
            Self::Tpm => tpm::TEE,
            Self::Sim => sim::TEE,
            Self::Sample => sample::TEE,
        }
    }
}
