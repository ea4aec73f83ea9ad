//! The simulated TEE: real measurements, a real signature, and no protection at all.
//!
//! It lets policies, reference values and refusals be seen at work on any machine. It is not a TEE: whoever has the platform key (on a
//! demo machine: everybody with the same user id) can sign any report. So every report, token and message says `simulated`, and a
//! broker releases nothing to it unless it is configured to.
//!
//! Evidence: `{"simulated": true, "report": "<compact JWS, ES256, kid = platform key's thumbprint>", "event_log": base64 or null}` with the
//! claims
//!
//! ```text
//! profile      "nacre-sim-report-2"
//! simulated    true
//! measurement  hex SHA-384 of the guest's executable
//! init_data    hex, 48 bytes: the init data's digest cut or padded; 48 zero bytes without init data
//! report_data  hex, 64 bytes
//! svn          the security version of the guest
//! debug        whether the guest can be looked into
//! register     hex, 48 bytes: what run-time events were extended into, as RTMR 3; zeros without an event log
//! ```

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_core::{
    Algorithm, Digest, Hasher, Verified,
    jose::{Jwk, PrivateKey, PublicKey, sign_compact, verify_compact},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    eventlog::{
        Bank, LogError,
        aael::runtime_events,
        replay::{Registers, extended, replay},
        runtime::{Register, RuntimeLog, RuntimeLogError, joined},
        story::Story,
        tcg,
    },
    evidence::{Attester, AttesterError, Claims, EvidenceError, Expected, Verifier, hex},
    initdata::InitData,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "sim";
/// What everything that is simulated says to people.
pub const NOTICE: &str = "SIMULATED TEE: no hardware protects this guest";
const PROFILE: &str = "nacre-sim-report-2";
/// The register of run-time events, as logs number it.
const REGISTER: u32 = 4;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Report {
    profile: String,
    simulated: bool,
    measurement: String,
    init_data: String,
    report_data: String,
    svn: u32,
    debug: bool,
    register: String,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Evidence {
    simulated: bool,
    report: String,
    #[serde(default)]
    event_log: Option<String>,
}

/// Makes simulated evidence of this process.
pub struct SimAttester {
    platform_key: PrivateKey,
    platform: String,
    measurement: Digest,
    init_data: Option<InitData>,
    svn: u32,
    debug: bool,
    runtime: Option<Arc<RuntimeLog>>,
}

impl SimAttester {
    /// Measures the running executable.
    ///
    /// # Errors
    /// [`AttesterError`]: the executable cannot be read, or the key is not an EC signing key.
    pub fn new(platform_key: PrivateKey, init_data: Option<InitData>) -> Result<Self, AttesterError> {
        Self::measuring(platform_key, init_data, Path::new("/proc/self/exe"))
    }

    /// Measures another file in place of the running executable: for guests that are a program started by this one.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn measuring(
        platform_key: PrivateKey,
        init_data: Option<InitData>,
        executable: &Path,
    ) -> Result<Self, AttesterError> {
        let measurement = measure(executable)?;
        let platform = Jwk::from_public(&platform_key.public()).thumbprint().map_err(|source| AttesterError::Key {
            tee: TEE,
            what: "platform key",
            source,
        })?;
        Ok(Self { platform_key, platform, measurement, init_data, svn: 1, debug: false, runtime: None })
    }

    /// Sets the guest's security version.
    #[must_use]
    pub fn svn(mut self, svn: u32) -> Self {
        self.svn = svn;
        self
    }

    /// Says that the guest can be looked into.
    #[must_use]
    pub fn debug(mut self, debug: bool) -> Self {
        self.debug = debug;
        self
    }

    /// Records run-time events in a directory, which also has the register: of a simulated guest, both are as trusted as the directory.
    ///
    /// # Errors
    /// [`AttesterError::Log`].
    pub fn events(mut self, dir: &Path) -> Result<Self, AttesterError> {
        let register = Box::new(FileRegister { file: dir.join("sim.register") });
        self.runtime = Some(Arc::new(RuntimeLog::open(&dir.join("sim.events"), register, &[0; 48])?));
        Ok(self)
    }

    /// What was measured.
    pub fn measurement(&self) -> Digest {
        self.measurement
    }
}

/// SHA-384 of a file, streamed.
///
/// # Errors
/// [`AttesterError::Io`].
pub fn measure(executable: &Path) -> Result<Digest, AttesterError> {
    let fail = |source| AttesterError::Io {
        tee: TEE,
        what: "the executable to measure",
        path: executable.display().to_string(),
        source,
    };
    let mut file = std::fs::File::open(executable).map_err(fail)?;
    let mut hasher = Hasher::new(Algorithm::Sha384);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let length = file.read(&mut buffer).map_err(fail)?;
        match buffer.get(..length) {
            Some(chunk) if length > 0 => hasher.update(chunk),
            _ => return Ok(hasher.finish()),
        }
    }
}

/// Reads a platform key from a PEM file.
///
/// # Errors
/// [`AttesterError`]: the file cannot be read or holds no EC key.
pub fn read_platform_key(path: &Path) -> Result<PrivateKey, AttesterError> {
    let bytes = std::fs::read(path).map(zeroize::Zeroizing::new).map_err(|source| AttesterError::Io {
        tee: TEE,
        what: "the platform key",
        path: PathBuf::from(path).display().to_string(),
        source,
    })?;
    PrivateKey::from_bytes(&bytes).map_err(|source| AttesterError::Key { tee: TEE, what: "platform key", source })
}

impl Attester for SimAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        let (register, log) = match &self.runtime {
            None => (vec![0; 48], None),
            Some(runtime) => {
                let log = runtime
                    .with_entries(|entries| joined(None, Bank::Sha384, entries).map_err(RuntimeLogError::Log))?;
                // By the log that is sent, so that both are of one moment; that it is the register's, the log's writer sees to.
                let registers = tcg::parse(&log).and_then(|log| replay(&log, Bank::Sha384, Registers::Tee));
                let mut registers = registers.map_err(RuntimeLogError::Log)?;
                let value = registers.remove(&REGISTER).unwrap_or_else(|| vec![0; 48]);
                (value, Some(BASE64_STANDARD.encode(log)))
            }
        };
        let report = Report {
            profile: PROFILE.into(),
            simulated: true,
            measurement: self.measurement.hex(),
            init_data: hex(&self.init_data.as_ref().map_or([0; 48], InitData::fit::<48>)),
            report_data: hex(report_data),
            svn: self.svn,
            debug: self.debug,
            register: hex(&register),
        };
        let report = sign_compact(&self.platform_key, Some(&self.platform), &report)
            .map_err(|source| AttesterError::Key { tee: TEE, what: "platform key", source })?;
        Ok(json!({"simulated": true, "report": report, "event_log": log}))
    }

    fn runtime_log(&self) -> Option<&Arc<RuntimeLog>> {
        self.runtime.as_ref()
    }

    fn init_data(&self) -> Option<&InitData> {
        self.init_data.as_ref()
    }

    fn simulated(&self) -> bool {
        true
    }
}

/// Checks simulated evidence by a list of platform keys.
#[derive(Debug, Default)]
pub struct SimVerifier {
    platforms: Vec<(String, PublicKey)>,
}

impl SimVerifier {
    /// A verifier that trusts nobody yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts a platform.
    ///
    /// # Errors
    /// What is no key has no thumbprint.
    pub fn trust(&mut self, key: PublicKey) -> Result<(), nacre_core::jose::JoseError> {
        let name = Jwk::from_public(&key).thumbprint()?;
        self.platforms.push((name, key));
        Ok(())
    }
}

fn malformed(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Malformed { tee: TEE, why: why.into() }
}

/// The `kid` of a token that nothing has verified: only to choose the key.
fn key_name(token: &str) -> Option<String> {
    let header = nacre_core::jose::b64::decode(token.split('.').next()?).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    Some(header.get("kid")?.as_str()?.chars().take(64).collect())
}

impl Verifier for SimVerifier {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        let evidence: Evidence = serde_json::from_value(evidence.clone()).map_err(|e| malformed(e.to_string()))?;
        let platform = key_name(&evidence.report).ok_or_else(|| malformed("the report names no platform key"))?;
        let (_, key) = self
            .platforms
            .iter()
            .find(|(name, _)| *name == platform)
            .ok_or_else(|| EvidenceError::UnknownPlatform { tee: TEE, platform: platform.clone() })?;
        let report =
            verify_compact(&evidence.report, key).map_err(|source| EvidenceError::Signature { tee: TEE, source })?;
        nacre_core::Untrusted::new(report.into_inner()).verify_into(|report| {
            let report: Report = serde_json::from_value(report).map_err(|e| malformed(e.to_string()))?;
            if report.profile != PROFILE || !report.simulated || !evidence.simulated {
                return Err(malformed(format!("not a report of profile {PROFILE}")));
            }
            let bound = hex(expected.report_data);
            if report.report_data != bound {
                return Err(EvidenceError::ReportData { tee: TEE, found: report.report_data, expected: bound });
            }
            if let Some(init_data) = expected.init_data {
                let sent = hex(&init_data.fit::<48>());
                if sent != report.init_data {
                    return Err(EvidenceError::InitData { tee: TEE, sent, measured: report.init_data });
                }
            }
            if report.measurement.len() != 96 || report.init_data.len() != 96 || report.register.len() != 96 {
                return Err(malformed("a digest that is not 48 bytes"));
            }
            let story = evidence.event_log.as_deref().map(|log| told(log, &report.register)).transpose()?;
            let mut claims = Claims {
                tee: TEE,
                claims: json!({
                    "simulated": true,
                    "measurement": report.measurement,
                    "init_data": report.init_data,
                    "report_data": report.report_data,
                    "svn": report.svn,
                    "debug": report.debug,
                    "platform": platform,
                }),
                logs: Value::Null,
                report_data: report.report_data,
                init_data: report.init_data,
                measurement: report.measurement,
                simulated: true,
            };
            if let Some(story) = story {
                claims.claims["runtime"] = story.summary();
                claims.logs = json!({"runtime": story.to_json()});
            }
            Ok(claims)
        })
    }
}

/// What a log says, if it is the register's.
fn told(log: &str, register: &str) -> Result<Story, EvidenceError> {
    let bytes = BASE64_STANDARD.decode(log).map_err(|error| malformed(format!("event_log: {error}")))?;
    let fail = |source| EvidenceError::EventLog { tee: TEE, source };
    let log = tcg::parse(&bytes).map_err(fail)?;
    let replayed = replay(&log, Bank::Sha384, Registers::Tee).map_err(fail)?;
    let value = replayed.get(&REGISTER).map_or_else(|| hex(&[0; 48]), |value| hex(value));
    if value != register || replayed.len() > usize::from(replayed.contains_key(&REGISTER)) {
        return Err(fail(LogError::Replay { register: REGISTER, replayed: value, measured: register.to_owned() }));
    }
    Ok(Story::of(&runtime_events(log.events.iter())))
}

/// The register of a simulated guest: 48 bytes in a file, replaced as a whole.
struct FileRegister {
    file: PathBuf,
}

impl FileRegister {
    fn failed(action: &'static str) -> impl Fn(std::io::Error) -> RuntimeLogError {
        move |error| RuntimeLogError::Register { tee: TEE, register: REGISTER, action, why: error.to_string() }
    }
}

impl Register for FileRegister {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn number(&self) -> u32 {
        REGISTER
    }

    fn bank(&self) -> Bank {
        Bank::Sha384
    }

    fn read(&self) -> Result<Vec<u8>, RuntimeLogError> {
        match std::fs::read(&self.file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(vec![0; 48]),
            result => result.map_err(Self::failed("read it")),
        }
    }

    fn extend(&self, digest: &[u8]) -> Result<(), RuntimeLogError> {
        let value = extended(Bank::Sha384, &self.read()?, digest)
            .ok_or(RuntimeLogError::Log(LogError::NoDigest { event: 0, bank: Bank::Sha384 }))?;
        let new = self.file.with_extension("new");
        std::fs::write(&new, value).and_then(|()| std::fs::rename(&new, &self.file)).map_err(Self::failed("extend it"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventlog::story::Happening;

    fn attester(key: PrivateKey, init: Option<InitData>) -> SimAttester {
        SimAttester::new(key, init).unwrap()
    }

    #[test]
    fn evidence_is_of_this_very_binary_and_bound() {
        let key = PrivateKey::generate_p256();
        let mut verifier = SimVerifier::new();
        verifier.trust(key.public()).unwrap();
        let init = InitData::new(Algorithm::Sha256, [("a".into(), "b".into())].into()).unwrap();
        let attester = attester(key, Some(init.clone()));
        assert_eq!(attester.measurement(), measure(&std::env::current_exe().unwrap()).unwrap());
        let evidence = attester.evidence(&[7; 64]).unwrap();
        let expected = Expected { report_data: &[7; 64], init_data: Some(&init), now: 0 };
        let claims = verifier.verify(&evidence, &expected).unwrap().into_inner();
        assert_eq!(claims.measurement, attester.measurement().hex());
        assert!(claims.simulated && claims.claims["simulated"] == true);

        assert!(matches!(
            verifier.verify(&evidence, &Expected { report_data: &[8; 64], ..expected }),
            Err(EvidenceError::ReportData { .. })
        ));
        let other = InitData::new(Algorithm::Sha256, [("a".into(), "c".into())].into()).unwrap();
        assert!(matches!(
            verifier.verify(&evidence, &Expected { init_data: Some(&other), ..expected }),
            Err(EvidenceError::InitData { .. })
        ));
        assert!(matches!(SimVerifier::new().verify(&evidence, &expected), Err(EvidenceError::UnknownPlatform { .. })));
    }

    #[test]
    fn forged_evidence_is_refused() {
        let key = PrivateKey::generate_p256();
        let mut verifier = SimVerifier::new();
        verifier.trust(key.public()).unwrap();
        let expected = Expected { report_data: &[7; 64], init_data: None, now: 0 };
        let kid = Jwk::from_public(&key.public()).thumbprint().unwrap();
        let forger = PrivateKey::generate_p256();
        let good = attester(key, None).evidence(&[7; 64]).unwrap();
        let report = json!({"profile": PROFILE, "simulated": true, "measurement": "00".repeat(48), "init_data": "00".repeat(48),
            "report_data": "07".repeat(64), "svn": 1, "debug": false, "register": "00".repeat(48)});
        let forged = sign_compact(&forger, Some(&kid), &report).unwrap();
        let mut cut = good.clone();
        cut["report"] = good["report"].as_str().unwrap().rsplit_once('.').unwrap().0.into();
        let mut unmarked = good;
        unmarked["simulated"] = false.into();
        for bad in [
            json!({}),
            json!(null),
            json!({"simulated": true, "report": ""}),
            json!({"simulated": true, "report": "a.b.c"}),
            json!({"simulated": true, "report": forged}),
            cut,
            unmarked,
        ] {
            assert!(verifier.verify(&bad, &expected).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_simulated_guest_tells_what_it_measured_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let key = PrivateKey::generate_p256();
        let mut verifier = SimVerifier::new();
        verifier.trust(key.public()).unwrap();
        let attester = attester(key, None).events(directory.path()).unwrap();
        let expected = Expected { report_data: &[7; 64], init_data: None, now: 0 };
        let before = attester.evidence(&[7; 64]).unwrap();
        verifier.verify(&before, &expected).unwrap();
        let log = attester.runtime_log().unwrap();
        log.record(&Happening::KeyReleased { resource: "a/b/c".into() }).unwrap();
        let evidence = attester.evidence(&[7; 64]).unwrap();
        let claims = verifier.verify(&evidence, &expected).unwrap().into_inner();
        assert_eq!(claims.claims["runtime"]["keys"], json!(["a/b/c"]));
        assert_eq!(claims.logs["runtime"]["replayed"], true);
        // The log of before with the register of now, and the other way round.
        for (report, log) in [(&evidence, &before), (&before, &evidence)] {
            let mixed = json!({"simulated": true, "report": report["report"], "event_log": log["event_log"]});
            assert!(matches!(verifier.verify(&mixed, &expected), Err(EvidenceError::EventLog { .. })));
        }
        // Left out, it asserts nothing.
        let without = json!({"simulated": true, "report": evidence["report"]});
        assert_eq!(verifier.verify(&without, &expected).unwrap().into_inner().claims.get("runtime"), None);
    }
}
