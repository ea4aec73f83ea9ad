//! Rego policies: compiled and evaluated with a time limit, denying by default.
//!
//! `query_reference_value(id)` gives the reference value's list, or null where there is none or it has expired. Anything but a plain result
//! (an error, no value, another type, too long) is a refusal, whose reason the caller sees and logs.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use regorus::utils::limits::ExecutionTimerConfig;
use serde::Serialize;
use serde_json::Value;

use crate::{admin::now, store::ReferenceValue};

/// What attestation policies compute.
pub(crate) const TRUST_CLAIMS: &str = "data.policy.trust_claims";
/// What resource policies compute.
pub(crate) const ALLOW: &str = "data.policy.allow";
/// The appraisal policy of CPU TEEs, and the one that is shipped.
pub(crate) const DEFAULT_CPU: &str = "default_cpu";
pub(crate) const DEFAULT_CPU_TEXT: &str = include_str!("policies/attestation_cpu.rego");
pub(crate) const DEFAULT_RESOURCE_TEXT: &str = include_str!("policies/resource.rego");

/// Bytes of a policy at most.
pub(crate) const LONGEST: usize = 256 * 1024;
/// An evaluation takes a millisecond; one that takes this long is broken or hostile.
const TIME_LIMIT: Duration = Duration::from_secs(2);
const CHECK_EVERY: NonZeroU32 = NonZeroU32::MIN.saturating_add(63);

/// Reference values by their names.
pub type References = BTreeMap<String, ReferenceValue>;

/// Names of reference values that are noted of one evaluation.
const MOST_ASKED: usize = 128;

thread_local! {
    /// The reference values that the evaluation on this thread has asked for, where somebody wants to know.
    static ASKED: RefCell<Option<BTreeSet<String>>> = const { RefCell::new(None) };
}

fn note(id: &str) {
    ASKED.with_borrow_mut(|asked| {
        if let Some(asked) = asked.as_mut().filter(|asked| asked.len() < MOST_ASKED) {
            asked.insert(id.chars().take(200).collect());
        }
    });
}

/// Engines of one policy that are kept, by the data that they were made for.
const MOST_ENGINES: usize = 256;

/// A policy: analysed when it is first asked with some data, and then by copies of that. Analysis takes longer than evaluation.
pub(crate) struct Policy {
    text: String,
    engines: Mutex<HashMap<String, Prepared>>,
}

struct Prepared {
    engine: regorus::Engine,
    /// What it looks reference values up in.
    references: Arc<References>,
}

impl Policy {
    pub(crate) fn new(text: String) -> Self {
        Self { text, engines: Mutex::default() }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Evaluates one rule.
    pub(crate) fn evaluate(
        &self,
        rule: &str,
        input: Value,
        data: Option<Value>,
        references: Arc<References>,
    ) -> Result<Value, String> {
        let mut engine = self.prepared(rule, data, references)?;
        engine.set_input(regorus::Value::from(input));
        ask(&mut engine, rule)
    }

    /// Evaluates the rule of appraisal policies; gives the names of the reference values that it asked for, too.
    pub(crate) fn appraise(
        &self,
        input: Value,
        references: Arc<References>,
    ) -> Result<(Value, BTreeSet<String>), String> {
        let mut engine = self.prepared(TRUST_CLAIMS, None, references)?;
        engine.set_input(regorus::Value::from(input));
        ASKED.set(Some(BTreeSet::new()));
        let claims = ask(&mut engine, TRUST_CLAIMS);
        let asked = ASKED.take().unwrap_or_default();
        Ok((claims?, asked))
    }

    fn prepared(
        &self,
        rule: &str,
        data: Option<Value>,
        references: Arc<References>,
    ) -> Result<regorus::Engine, String> {
        let name = data.as_ref().map(Value::to_string).unwrap_or_default();
        let held = || self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = held().get(&name).filter(|found| Arc::ptr_eq(&found.references, &references)) {
            return Ok(found.engine.clone());
        }
        let mut engine = engine(&self.text)?;
        add_references(&mut engine, references.clone())?;
        if let Some(data) = data {
            engine.add_data(regorus::Value::from(data)).map_err(|e| shorten(&e))?;
        }
        // An evaluation analyses it; what comes of it does not matter.
        engine.set_input(regorus::Value::new_object());
        let _ = engine.eval_rule(rule.to_owned());
        let mut engines = held();
        if engines.len() >= MOST_ENGINES {
            engines.clear();
        }
        engines.insert(name, Prepared { engine: engine.clone(), references });
        Ok(engine)
    }
}

fn ask(engine: &mut regorus::Engine, rule: &str) -> Result<Value, String> {
    match engine.eval_rule(rule.to_owned()).map_err(|e| shorten(&e))? {
        regorus::Value::Undefined => Err(format!("{rule} has no value for this input")),
        value => serde_json::to_value(&value).map_err(|e| e.to_string()),
    }
}

/// Evaluates one rule of a policy that is not kept.
#[cfg(test)]
pub(crate) fn evaluate(
    policy: &str,
    rule: &str,
    input: Value,
    data: Option<Value>,
    references: References,
) -> Result<Value, String> {
    Policy::new(policy.to_owned()).evaluate(rule, input, data, Arc::new(references))
}

/// What an appraisal policy is for: the id of its class, `<tee>_cpu`, goes before the one of all of them.
pub(crate) fn class_of(tee: &str) -> String {
    format!("{tee}_cpu")
}

/// Whether a name is one of an appraisal policy.
pub(crate) fn is_class(id: &str) -> bool {
    id.strip_suffix("_cpu").is_some_and(|tee| {
        (1..=32).contains(&tee.len()) && tee.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    })
}

/// What a policy gave, and how far each of its rules came.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// What the rule gave; `None` where it failed or has no value.
    pub value: Option<Value>,
    /// Why it failed.
    pub error: Option<String>,
    /// The lines of the policy that have code.
    pub lines: Vec<TraceLine>,
}

/// A line of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TraceLine {
    /// Its number, from 1.
    pub number: u32,
    /// Its text.
    pub text: String,
    /// Whether it was evaluated.
    pub reached: bool,
    /// Whether it is the last one that was evaluated of a rule that does not hold: it is false or has no value here.
    pub stopped: bool,
}

/// Evaluates a policy and notes what of it was evaluated, for people who want to know why it refuses. `appraisal`: the rule of appraisal
/// policies, else that of release policies. The limits are those of the broker.
pub fn trace(policy: &str, appraisal: bool, input: Value, data: Option<Value>, references: References) -> Trace {
    let rule = if appraisal { TRUST_CLAIMS } else { ALLOW };
    let prepared = engine(policy).and_then(|mut engine| {
        engine.set_enable_coverage(true);
        add_references(&mut engine, Arc::new(references))?;
        engine.set_input(regorus::Value::from(input));
        data.map_or(Ok(()), |data| engine.add_data(regorus::Value::from(data)).map_err(|e| shorten(&e)))?;
        Ok(engine)
    });
    let mut engine = match prepared {
        Ok(engine) => engine,
        Err(error) => return Trace { value: None, error: Some(error), lines: Vec::new() },
    };
    let (value, error) = match engine.eval_rule(rule.to_owned()) {
        Ok(regorus::Value::Undefined) => (None, Some(format!("{rule} has no value for this input"))),
        Ok(value) => (serde_json::to_value(&value).ok(), None),
        Err(error) => (None, Some(shorten(&error))),
    };
    let report = engine.get_coverage_report().ok().and_then(|report| report.files.into_iter().next());
    let Some(file) = report else { return Trace { value, error, lines: Vec::new() } };
    // Asked for only now: what they evaluate is not part of the answer.
    let lines = lines(policy, &file.covered, &file.not_covered, &mut |name| holds(&mut engine, policy, name));
    Trace { value, error, lines }
}

/// Whether a rule has another value than none, false, or its default.
fn holds(engine: &mut regorus::Engine, policy: &str, name: &str) -> bool {
    let value =
        engine.eval_rule(format!("data.policy.{name}")).ok().filter(|value| *value != regorus::Value::Undefined);
    let value = value.and_then(|value| serde_json::to_value(&value).ok()).filter(|value| *value != Value::Bool(false));
    let start = format!("default {name} := ");
    let default = policy.lines().find_map(|line| serde_json::from_str::<Value>(line.trim().strip_prefix(&start)?).ok());
    value.is_some() && value != default
}

/// The name of the rule that a line begins.
fn rule_name(line: &str) -> Option<&str> {
    let end = line.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(line.len());
    let name = line.get(..end).filter(|name| !name.is_empty())?;
    (!matches!(name, "default" | "import" | "package" | "else")).then_some(name)
}

fn lines(
    policy: &str,
    covered: &BTreeSet<u32>,
    not_covered: &BTreeSet<u32>,
    holds: &mut dyn FnMut(&str) -> bool,
) -> Vec<TraceLine> {
    let mut lines: Vec<TraceLine> = Vec::new();
    // Where in `lines` the body of a rule that does not hold was left last.
    let mut last: Option<usize> = None;
    let mut failed = false;
    let stop = |lines: &mut Vec<TraceLine>, at: Option<usize>| {
        if let Some(line) = at.and_then(|at| lines.get_mut(at)) {
            line.stopped = true;
        }
    };
    for (number, text) in (1..).zip(policy.lines()) {
        if let Some(name) = rule_name(text) {
            stop(&mut lines, last.take());
            failed = text.contains(" if ") && !holds(name);
        }
        if !covered.contains(&number) && !not_covered.contains(&number) {
            continue;
        }
        let reached = covered.contains(&number);
        lines.push(TraceLine { number, text: text.to_owned(), reached, stopped: false });
        if failed && reached {
            last = Some(lines.len() - 1);
        }
    }
    stop(&mut lines, last);
    lines
}

/// Whether a text can serve as a policy with such a rule.
pub(crate) fn check(policy: &str, rule: &str) -> Result<(), String> {
    if policy.len() > LONGEST {
        return Err(format!("{} bytes: at most {LONGEST} are accepted", policy.len()));
    }
    let mut engine = engine(policy)?;
    add_references(&mut engine, Arc::default())?;
    engine.set_input(regorus::Value::new_object());
    engine.eval_rule(rule.to_owned()).map(drop).map_err(|e| format!("{rule}: {}", shorten(&e)))
}

fn engine(policy: &str) -> Result<regorus::Engine, String> {
    let mut engine = regorus::Engine::new();
    engine.set_execution_timer_config(ExecutionTimerConfig { limit: TIME_LIMIT, check_interval: CHECK_EVERY });
    let package = engine.add_policy("policy.rego".into(), policy.to_owned()).map_err(|e| shorten(&e))?;
    if package != "data.policy" {
        return Err(format!("its package is '{package}' and must be 'policy'"));
    }
    Ok(engine)
}

fn add_references(engine: &mut regorus::Engine, references: Arc<References>) -> Result<(), String> {
    let query = move |parameters: Vec<regorus::Value>| {
        let id = parameters.first().and_then(|id| id.as_string().ok()).map(ToString::to_string).unwrap_or_default();
        note(&id);
        Ok(match references.get(&id).filter(|reference| reference.expires > now()) {
            Some(reference) => regorus::Value::from(Value::Array(reference.values.clone())),
            None => regorus::Value::Null,
        })
    };
    engine.add_extension("query_reference_value".into(), 1, Box::new(query)).map_err(|e| shorten(&e))
}

fn shorten(error: &impl ToString) -> String {
    error.to_string().chars().take(500).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn references(entries: &[(&str, Value)]) -> References {
        entries
            .iter()
            .map(|(id, value)| {
                ((*id).into(), ReferenceValue { values: vec![value.clone()], expires: i64::MAX, issuer: String::new() })
            })
            .collect()
    }

    fn claims(input: Value, entries: &[(&str, Value)]) -> (i64, i64, i64) {
        let result = evaluate(DEFAULT_CPU_TEXT, TRUST_CLAIMS, input, None, references(entries)).unwrap();
        let get = |name: &str| result[name].as_i64().unwrap();
        (get("executables"), get("hardware"), get("configuration"))
    }

    #[test]
    fn the_default_appraisal_recognises_what_reference_values_name() {
        let sim = |debug: bool| json!({"sim": {"simulated": true, "measurement": "aa", "init_data": "bb", "svn": 2, "debug": debug}});
        let measured = ("sim.measurement", json!("aa"));
        assert_eq!(claims(json!({}), &[]), (33, 97, 36));
        assert_eq!(claims(sim(false), &[]), (33, 2, 3));
        assert_eq!(claims(sim(false), std::slice::from_ref(&measured)), (3, 2, 3));
        assert_eq!(claims(sim(true), std::slice::from_ref(&measured)), (3, 2, 36));
        assert_eq!(claims(sim(false), &[measured.clone(), ("sim.init_data", json!("bb"))]), (3, 2, 2));
        assert_eq!(claims(sim(false), &[measured.clone(), ("sim.init_data", json!("cc"))]), (3, 2, 36));
        assert_eq!(claims(sim(false), &[measured.clone(), ("sim.svn", json!(3))]), (3, 97, 3));
        assert_eq!(claims(sim(false), &[("sim.measurement", json!("ab"))]), (33, 2, 3));
        let sample = json!({"sample": {"simulated": true, "svn": "1"}});
        assert_eq!(claims(sample.clone(), &[]), (33, 97, 36));
        assert_eq!(claims(sample.clone(), &[measured, ("sample.svn", json!("2"))]), (33, 97, 36));
        assert_eq!(claims(sample, &[("sample.svn", json!("1"))]), (3, 2, 2));
    }

    #[test]
    fn an_appraisal_says_which_reference_values_it_asked_for() {
        let policy = Policy::new(DEFAULT_CPU_TEXT.into());
        let references = Arc::new(references(&[("sim.measurement", json!("aa"))]));
        let asked = |input: Value| policy.appraise(input, references.clone()).unwrap().1;
        let sim = json!({"sim": {"simulated": true, "measurement": "aa", "init_data": "bb", "svn": 2, "debug": false}});
        let named = |asked: &BTreeSet<String>| {
            ["sim.init_data", "sim.measurement", "sim.svn", "image_policy"].map(|name| asked.contains(name))
        };
        let first = asked(sim.clone());
        assert_eq!(named(&first), [true, true, true, false]);
        // Nothing of one evaluation is left for the next.
        assert_eq!(named(&asked(json!({}))), [false, true, false, false]);
        assert_eq!(asked(sim), first);
        assert_eq!(ASKED.take(), None);
    }

    #[test]
    fn the_default_release_is_to_affirmed_guests_only() {
        let allow = |modules: Value| {
            evaluate(
                DEFAULT_RESOURCE_TEXT,
                ALLOW,
                json!({"submods": modules}),
                Some(json!({"plugin": "resource"})),
                References::new(),
            )
        };
        let module = |status: &str, executables: i64| json!({"ear.status": status, "ear.trustworthiness-vector": {"executables": executables, "hardware": 2, "configuration": 3}});
        assert_eq!(allow(json!({"cpu0": module("affirming", 3)})).unwrap(), true);
        for denied in [
            json!({}),
            json!(null),
            json!({"cpu0": {}}),
            json!({"cpu0": module("contraindicated", 3)}),
            json!({"cpu0": module("warning", 3)}),
            json!({"cpu0": module("none", 3)}),
            json!({"cpu0": module("affirming", 0)}),
            json!({"cpu0": module("affirming", 3), "gpu0": module("contraindicated", 3)}),
        ] {
            // Nonsense may also make it fail, which denies as well.
            assert_eq!(allow(denied.clone()).unwrap_or(Value::Bool(false)), false, "{denied}");
        }
    }

    #[test]
    fn broken_policies_are_not_accepted() {
        assert!(check(DEFAULT_CPU_TEXT, TRUST_CLAIMS).is_ok());
        assert!(check(DEFAULT_RESOURCE_TEXT, ALLOW).is_ok());
        for bad in [
            "",
            "allow := true",
            "package other\nallow := true",
            "package policy\nallowed := true",
            "package policy\nallow := ",
            "package policy\nallow := true if { http.send({}) }",
            "package policy\nallow := true if { x := unknown(1) }",
        ] {
            assert!(check(bad, ALLOW).is_err(), "{bad}");
        }
        assert!(check(&format!("{DEFAULT_RESOURCE_TEXT}\n{}", "# x\n".repeat(LONGEST)), ALLOW).is_err());
    }

    #[test]
    fn a_trace_says_which_line_said_no() {
        let policy = "package policy\nimport rego.v1\ndefault allow := false\nallow if {\n  input.a == 1\n  input.b == 2\n  input.c == 3\n}\n";
        let trace = |input: Value| trace(policy, false, input, None, References::new());
        let stopped = |input: Value| {
            let trace = trace(input);
            (trace.value, trace.lines.iter().filter(|line| line.stopped).map(|line| line.number).collect::<Vec<_>>())
        };
        assert_eq!(stopped(json!({"a": 1, "b": 9, "c": 3})), (Some(false.into()), vec![6]));
        assert_eq!(stopped(json!({"a": 1, "b": 2, "c": 9})), (Some(false.into()), vec![7]));
        assert_eq!(stopped(json!({"a": 1, "b": 2, "c": 3})), (Some(true.into()), vec![]));
        let failed = super::trace("package policy\nallow := ", false, json!({}), None, References::new());
        assert!(failed.value.is_none() && failed.error.is_some());
        // The one that is shipped, on a guest that is not recognised.
        let input =
            json!({"sim": {"simulated": true, "measurement": "aa", "init_data": "bb", "svn": 2, "debug": true}});
        let shipped =
            super::trace(DEFAULT_CPU_TEXT, true, input, None, references(&[("sim.measurement", json!("ab"))]));
        assert_eq!(shipped.value.unwrap()["executables"], 33);
        assert!(
            shipped.lines.iter().any(|line| line.stopped && line.text.contains("input.sim.debug == false")),
            "{:?}",
            shipped.lines
        );
    }

    #[test]
    fn a_policy_that_runs_away_is_stopped() {
        let policy = "package policy\nimport rego.v1\nallow if { some x in numbers.range(1, 3000); some y in numbers.range(1, 3000); some z in numbers.range(1, 3000); x + y + z == input.never }";
        let start = std::time::Instant::now();
        assert!(evaluate(policy, ALLOW, json!({"never": 0}), None, References::new()).is_err());
        assert!(start.elapsed() < TIME_LIMIT * 5, "{:?}", start.elapsed());
    }
}
