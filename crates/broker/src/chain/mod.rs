//! The chain of trust of one guest, stage by stage: what was expected, what was found, and what that is worth.
//!
//! ```text
//! session ─▶ hardware ─▶ firmware and program ─▶ configuration ─▶ images ─▶ volumes ─▶ keys ─▶ workload
//! ```
//!
//! It is made of the record of an appraisal ([`crate::store::guests`]) and of the audit log, when somebody looks. A stage that a trust claim is about has
//! the verdict of the claim, which the appraisal policy gave; its checks say why, as far as what the policy asked for says it. What is
//! shown comes from guests: whoever shows it must not take it for more than text.
//!
//! | module | what |
//! |---|---|
//! | `facts` | what is shown of each TEE's claims, and which reference value each is compared with |
//! | `story` | images, volumes, keys and workloads, from the event log and the audit log |
//! | `refusal` | what a guest that was refused is shown with |

mod facts;
mod refusal;
mod story;

use nacre_attest::ear::Status;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use facts::{counterpart, is_of_another};
pub(crate) use refusal::{Refusal, Refused};

use crate::{
    AuditEntry,
    store::guests::{Attested, Expectation, GuestRecord, Outcome},
};

/// Values of a reference value that are shown.
const MOST_VALUES: usize = 8;
/// Characters of anything that is shown.
const LONGEST_TEXT: usize = 400;

/// A stage of the chain.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StageId {
    /// The nonce, the TEE key, and what binds the evidence to both.
    Session,
    /// The TEE and its TCB.
    Hardware,
    /// What was booted: firmware, kernel, or the program itself; the boot log.
    Firmware,
    /// Init data and the image policy, debugging, privilege.
    Configuration,
    /// The images that were admitted.
    Images,
    /// The volumes that were opened.
    Volumes,
    /// The keys that were released.
    Keys,
    /// The containers that were started.
    Workload,
}

impl StageId {
    /// All of them, in their order.
    pub const ALL: [Self; 8] = [
        Self::Session,
        Self::Hardware,
        Self::Firmware,
        Self::Configuration,
        Self::Images,
        Self::Volumes,
        Self::Keys,
        Self::Workload,
    ];

    /// Its title for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Session => "Session",
            Self::Hardware => "Hardware and TCB",
            Self::Firmware => "Firmware and boot log",
            Self::Configuration => "Init data and policy",
            Self::Images => "Images admitted",
            Self::Volumes => "Volumes opened",
            Self::Keys => "Keys released",
            Self::Workload => "Workload",
        }
    }

    /// The trust claim that is about it.
    fn claim(self) -> Option<&'static str> {
        match self {
            Self::Hardware => Some("hardware"),
            Self::Firmware => Some("executables"),
            Self::Configuration => Some("configuration"),
            Self::Images => Some("file-system"),
            Self::Volumes => Some("storage-opaque"),
            Self::Session | Self::Keys | Self::Workload => None,
        }
    }
}

/// What a check or a stage came to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it is expected.
    Passed,
    /// Nothing is expected, or nothing is known.
    NotChecked,
    /// Not as it is expected.
    Failed,
}

impl Verdict {
    /// Its name for people: `not checked`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::NotChecked => "not checked",
            Self::Failed => "failed",
        }
    }

    fn of(passed: bool) -> Self {
        if passed { Self::Passed } else { Self::Failed }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is.
    pub what: String,
    /// What it may be, any of these.
    pub expected: Vec<String>,
    /// How many more values would be good.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub more: usize,
    /// What it is.
    pub found: Option<String>,
    /// What that comes to.
    pub verdict: Verdict,
    /// Who expects it: a reference value, a policy, a rule.
    pub by: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// A trust claim of an appraisal.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct TrustClaim {
    /// Its name: `executables`.
    pub name: String,
    /// Its value, as AR4SI has them.
    pub value: i8,
    /// What tier that is: `affirming`.
    pub tier: String,
}

/// A stage of a guest's chain.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Stage {
    /// Which.
    pub id: StageId,
    /// Its title for people.
    pub title: String,
    /// What it comes to.
    pub verdict: Verdict,
    /// Why, in a sentence.
    pub why: String,
    /// The trust claim that is about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<TrustClaim>,
    /// What was looked at.
    pub checks: Vec<Check>,
}

/// A guest in a list.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct GuestSummary {
    /// Its name here: `a17`.
    pub id: String,
    /// When it was appraised, in seconds since 1970.
    pub time: i64,
    /// The TEE.
    pub tee: String,
    /// The thumbprint of its TEE key; of one that was refused, by its own word.
    pub guest: String,
    /// What it measured; empty for one that was refused.
    pub measurement: String,
    /// Whether it only simulates a TEE.
    pub simulated: bool,
    /// The worst tier of its claims, or `refused`.
    pub verdict: String,
    /// Its trust claims that say something.
    pub claims: Vec<TrustClaim>,
    /// The policy that appraised it.
    pub policy: String,
    /// The repositories that it had asked for keys of when it attested.
    pub tenants: Vec<String>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// A guest with its chain.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct GuestChain {
    /// The guest.
    #[serde(flatten)]
    pub guest: GuestSummary,
    /// The number of the audit entry of its attestation.
    pub audit: u64,
    /// Until when its token is good, in seconds since 1970.
    pub expires: Option<i64>,
    /// Whether its evidence was too long to be kept whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
    /// Its stages, in their order.
    pub chain: Vec<Stage>,
}

/// A text that is short enough to be shown.
fn short(text: &str) -> String {
    match text.char_indices().nth(LONGEST_TEXT) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
    }
}

/// A JSON value as people read it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => short(text),
        other => short(&other.to_string()),
    }
}

fn tier(value: i8) -> String {
    Status::of(value).name().to_owned()
}

/// The claims of the TEE, and what was expected of them, of a guest that attested.
struct Found<'a> {
    tee: &'a str,
    attested: &'a Attested,
}

impl Found<'_> {
    fn evidence(&self) -> &Value {
        self.attested.ear.submods.values().next().map_or(&Value::Null, |module| &module.evidence)
    }

    fn claims(&self) -> &Value {
        self.evidence().get(self.tee).unwrap_or(&Value::Null)
    }

    fn runtime(&self) -> Option<&Value> {
        self.claims().get("runtime").filter(|runtime| runtime.get("replayed") == Some(&Value::Bool(true)))
    }

    fn claim(&self, name: &str) -> TrustClaim {
        let value = self.attested.ear.submods.values().next().map_or(0, |module| module.vector.get(name));
        TrustClaim { name: name.into(), value, tier: tier(value) }
    }

    /// A check by a reference value: `None` where the policy did not ask for it.
    fn reference(&self, name: &str) -> Option<Option<&Expectation>> {
        self.attested.expected.get(name).map(Option::as_ref)
    }

    /// Compares something with a reference value.
    fn compared(&self, what: &str, name: &str, found: Option<&Value>) -> Check {
        let (expected, more, verdict, by) = match self.reference(name) {
            None => (Vec::new(), 0, Verdict::NotChecked, format!("the policy did not ask for {name}")),
            Some(None) => (Vec::new(), 0, Verdict::NotChecked, format!("there is no reference value {name}")),
            Some(Some(known)) => {
                let values: Vec<String> = known.values.iter().take(MOST_VALUES).map(shown).collect();
                let verdict = Verdict::of(found.is_some_and(|found| known.values.contains(found)));
                let signed =
                    if known.issuer.is_empty() { String::new() } else { format!(", signed by {}", known.issuer) };
                let more = known.count.saturating_sub(values.len());
                (values, more, verdict, format!("reference value {name}{signed}, good until {}", date(known.expires)))
            }
        };
        Check { what: what.into(), expected, more, found: found.map(shown), verdict, by }
    }
}

fn date(seconds: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    let time = time::OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|time| time.format(&format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// A guest as lists show it.
pub(crate) fn summary(id: String, record: &GuestRecord) -> GuestSummary {
    let mut summary = GuestSummary {
        id,
        time: record.time,
        tee: record.tee.clone(),
        guest: record.guest.clone(),
        measurement: short(&record.measurement),
        simulated: record.simulated,
        verdict: "refused".into(),
        claims: Vec::new(),
        policy: String::new(),
        tenants: Vec::new(),
        reason: String::new(),
    };
    match &record.outcome {
        Outcome::Refused(refusal) => summary.reason.clone_from(&refusal.reason),
        Outcome::Attested(attested) => {
            let found = Found { tee: &record.tee, attested };
            summary.verdict = attested.ear.status().name().into();
            summary.claims = nacre_attest::ear::TRUST_CLAIMS
                .iter()
                .map(|name| found.claim(name))
                .filter(|claim| claim.value != 0)
                .collect();
            summary.policy.clone_from(&attested.policy);
            summary.tenants = story::tenants(&found);
        }
    }
    summary
}

/// A guest with its chain. `events` are the audit entries of which it is the actor, after its attestation; `whole` says whether they are all.
pub(crate) fn chain(id: String, audit: u64, record: &GuestRecord, events: &[AuditEntry], whole: bool) -> GuestChain {
    let guest = summary(id, record);
    match &record.outcome {
        Outcome::Refused(refusal) => GuestChain { guest, audit, expires: None, cut: false, chain: refusal.chain() },
        Outcome::Attested(attested) => {
            let found = Found { tee: &record.tee, attested };
            let cut = found.evidence().get("nacre.cut").is_some();
            let chain = StageId::ALL.iter().map(|id| stage(*id, &found, events, whole)).collect();
            GuestChain { guest, audit, expires: Some(attested.ear.exp), cut, chain }
        }
    }
}

fn stage(id: StageId, found: &Found<'_>, events: &[AuditEntry], whole: bool) -> Stage {
    let (checks, note) = match id {
        StageId::Session => (facts::session(found), String::new()),
        StageId::Hardware | StageId::Firmware | StageId::Configuration => facts::checks(id, found),
        StageId::Images => story::images(found),
        StageId::Volumes => story::volumes(found),
        StageId::Keys => story::keys(found, events, whole),
        StageId::Workload => story::workload(found),
    };
    let claim = id.claim().map(|name| found.claim(name));
    let (verdict, why) = match &claim {
        Some(claim) => {
            let verdict = match Status::of(claim.value) {
                Status::None => Verdict::NotChecked,
                Status::Affirming => Verdict::Passed,
                Status::Warning | Status::Contraindicated => Verdict::Failed,
            };
            let by = &found.attested.policy;
            let said = match verdict {
                Verdict::NotChecked => format!("Policy {by} says nothing of it."),
                _ => format!("{} by policy {by}: {} = {}.", capital(&claim.tier), claim.name, claim.value),
            };
            (verdict, said)
        }
        None if checks.iter().any(|check| check.verdict == Verdict::Failed) => {
            (Verdict::Failed, "Something is not as it is expected.".into())
        }
        None if checks.iter().any(|check| check.verdict == Verdict::Passed) => {
            (Verdict::Passed, "Everything that was looked at is as it is expected.".into())
        }
        None => (Verdict::NotChecked, "Nothing is known of it.".into()),
    };
    let why = if note.is_empty() { why } else { format!("{why} {note}") };
    Stage { id, title: id.title().into(), verdict, why, claim, checks }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
