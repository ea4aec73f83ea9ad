//! What a guest did: from its event log, as the token carries it, and from the audit log.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Check, Found, Verdict, date, short, shown};
use crate::AuditEntry;

/// Tenants of a guest that are listed.
const MOST_TENANTS: usize = 8;
/// Events of the audit log that are shown.
const MOST_EVENTS: usize = 100;
/// What keeps a volume's content from its host.
const PROTECTIONS: [&str; 5] = ["disk", "fs", "luks2", "lazy", "verity"];

const NO_LOG: &str = "There is no event log, so nothing of it is known.";

fn list<'a>(found: &'a Found<'_>, name: &str) -> &'a [Value] {
    found.runtime().and_then(|runtime| runtime.get(name)?.as_array()).map_or(&[], Vec::as_slice)
}

/// That not all of a kind were kept, or that there is nothing to tell.
fn note(found: &Found<'_>, name: &str, none: &str) -> String {
    let Some(runtime) = found.runtime() else { return NO_LOG.into() };
    let count = runtime.pointer(&format!("/counts/{name}")).and_then(Value::as_u64).unwrap_or(0);
    let kept = list(found, name).len() as u64;
    match count {
        0 => none.into(),
        _ if count > kept => format!("There were {count}; the last {kept} are shown."),
        _ => String::new(),
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The repositories of the keys that a guest had asked for.
pub(super) fn tenants(found: &Found<'_>) -> Vec<String> {
    let keys = list(found, "keys").iter().filter_map(Value::as_str);
    let names: BTreeSet<String> = keys.filter_map(|path| path.split('/').next()).map(short).collect();
    names.into_iter().take(MOST_TENANTS).collect()
}

/// The image policies that were used.
pub(super) fn policies(found: &Found<'_>) -> Vec<Check> {
    list(found, "policies").iter().map(|digest| found.compared("Image policy", "image_policy", Some(digest))).collect()
}

pub(super) fn images(found: &Found<'_>) -> (Vec<Check>, String) {
    let checks = list(found, "images").iter().map(|image| {
        let signers: Vec<&str> = image
            .get("signers")
            .and_then(Value::as_array)
            .map(|signers| signers.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let vouched = match signers.as_slice() {
            [] => "nobody vouched for it".to_owned(),
            signers => short(&format!("vouched for by {}", signers.join(", "))),
        };
        let check = found.compared(&short(text(image, "image")), "image_digest", image.get("digest"));
        let by = match check.expected.as_slice() {
            [] => format!("admitted by the image policy; {vouched}"),
            _ => format!("{}; {vouched}", check.by),
        };
        Check { by, ..check }
    });
    (checks.collect(), note(found, "images", "No image was admitted when it attested."))
}

pub(super) fn volumes(found: &Found<'_>) -> (Vec<Check>, String) {
    let checks = list(found, "volumes").iter().map(|volume| {
        let (protection, anchor, root) = (text(volume, "protection"), text(volume, "anchor"), text(volume, "root"));
        let root = if root.is_empty() { String::new() } else { format!(", root {root}") };
        Check {
            what: short(text(volume, "id")),
            expected: vec![format!("protected by one of {}", PROTECTIONS.join(", "))],
            more: 0,
            found: Some(short(&format!("{protection}, anchored by {anchor}{root}"))),
            verdict: Verdict::of(PROTECTIONS.contains(&protection)),
            by: "what the shipped policy wants".into(),
        }
    });
    (checks.collect(), note(found, "volumes", "No volume was opened when it attested."))
}

/// What was asked for before the attestation, by the event log, and what the broker released after it.
pub(super) fn keys(found: &Found<'_>, events: &[AuditEntry], whole: bool) -> (Vec<Check>, String) {
    let asked = list(found, "keys").iter().map(|path| Check {
        what: shown(path),
        expected: Vec::new(),
        more: 0,
        found: Some("asked for before this attestation".into()),
        verdict: Verdict::NotChecked,
        by: "the event log".into(),
    });
    let of_log = events.iter().take(MOST_EVENTS).map(|entry| {
        let refused = entry.event.contains("refused");
        let detail = if entry.detail.is_empty() { String::new() } else { format!(": {}", entry.detail) };
        Check {
            what: short(&entry.subject),
            expected: if entry.policy.is_empty() {
                Vec::new()
            } else {
                vec!["a release that the policy allows".into()]
            },
            more: 0,
            found: Some(short(&format!("{} {}{detail}", entry.event, date(entry.time)))),
            verdict: Verdict::of(!refused),
            by: match entry.policy.as_str() {
                "" => format!("audit entry {}", entry.number),
                policy => format!("release policy {policy}, audit entry {}", entry.number),
            },
        }
    });
    let checks: Vec<Check> = asked.chain(of_log).collect();
    let mut note = String::new();
    if checks.is_empty() {
        note.push_str("It has asked for nothing with this attestation.");
    }
    if !whole || events.len() > MOST_EVENTS {
        note.push_str("There may be more: the audit log has all of it.");
    }
    (checks, note)
}

/// Whether what was started is what was admitted.
pub(super) fn workload(found: &Found<'_>) -> (Vec<Check>, String) {
    let admitted: Vec<&str> = list(found, "images").iter().map(|image| text(image, "digest")).collect();
    let all = found.runtime().and_then(|runtime| runtime.pointer("/counts/images")?.as_u64());
    let checks = list(found, "workloads").iter().map(|workload| {
        let digest = text(workload, "digest");
        let known = admitted.contains(&digest);
        // Of many images, the token has the last ones only.
        let cut = all.is_some_and(|all| all > admitted.len() as u64);
        Check {
            what: short(text(workload, "id")),
            expected: admitted.iter().map(|digest| short(digest)).collect(),
            more: 0,
            found: Some(short(digest)),
            verdict: if !known && cut { Verdict::NotChecked } else { Verdict::of(known) },
            by: "an image that was admitted".into(),
        }
    });
    (checks.collect(), note(found, "workloads", "No container was started when it attested."))
}
