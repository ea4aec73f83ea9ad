//! `nacre broker policy test`: a policy on what a guest showed, and why it refuses.

use std::path::Path;

use anyhow::Context as _;
use nacre_broker::{References, ResourceScope, Trace, trace};
use nacre_core::{ResourcePath, jose::b64};
use serde_json::{Value, json};

use super::{Admin, read};
use crate::{
    args::broker::BrokerAt,
    exit::{Damaged, Usage},
    output,
};

/// The claims of a token that nobody verifies here: whoever asks what a policy says of it may make it up.
fn claims(path: &Path) -> anyhow::Result<Value> {
    let bytes = read(path)?;
    let text = std::str::from_utf8(bytes.expose()).with_context(|| format!("{}: no text", path.display()))?.trim();
    let json = match text.starts_with('{') {
        true => text.as_bytes().to_vec(),
        false => {
            let part =
                text.split('.').nth(1).ok_or_else(|| Usage(format!("{}: neither a token nor JSON", path.display())))?;
            b64::decode(part).with_context(|| format!("{}: no token", path.display()))?
        }
    };
    serde_json::from_slice(&json).with_context(|| format!("{}: the claims", path.display()))
}

fn policy_of(admin: &Admin, claims: &Value, resource: Option<&ResourcePath>) -> anyhow::Result<String> {
    let Some(path) = resource else {
        // The TEE of the evidence has a policy of its own, or all have one.
        let evidence = claims.pointer("/submods/cpu0/ear.veraison.annotated-evidence").and_then(Value::as_object);
        let tees = evidence.into_iter().flat_map(|evidence| evidence.keys().cloned()).chain(["default".to_owned()]);
        for id in tees.map(|tee| format!("{tee}_cpu")) {
            let found = match admin {
                Admin::Local(broker) => broker.attestation_policy(&id)?,
                Admin::Remote(client) => client.attestation_policy(&id).ok(),
            };
            if let Some(text) = found {
                return Ok(text);
            }
        }
        anyhow::bail!("the broker has no attestation policy");
    };
    let kind = format!("{}/{}", path.repository(), path.kind());
    for scope in [path.to_string(), kind, path.repository().to_owned(), String::new()] {
        let found = match admin {
            Admin::Local(broker) => broker.resource_policy(&scope)?,
            Admin::Remote(client) => client.resource_policy(&ResourceScope::Named(&scope)).ok(),
        };
        if let Some(text) = found {
            return Ok(text);
        }
    }
    anyhow::bail!("the broker has no resource policy")
}

pub(super) fn test(
    token: &Path,
    resource: Option<&str>,
    policy: Option<&Path>,
    json: bool,
    at: &BrokerAt,
) -> anyhow::Result<()> {
    let (claims, admin) = (claims(token)?, Admin::of(at)?);
    let resource: Option<ResourcePath> = resource.map(str::parse).transpose()?;
    let text = match policy {
        None => policy_of(&admin, &claims, resource.as_ref())?,
        Some(path) => {
            String::from_utf8(read(path)?.expose().to_vec()).with_context(|| format!("{}", path.display()))?
        }
    };
    let references: References = match &admin {
        Admin::Local(broker) => broker.references()?,
        Admin::Remote(client) => client.references()?,
    };
    let found = match &resource {
        Some(path) => {
            let segments = [path.repository(), path.kind(), path.tag()];
            let data = json!({"plugin": "resource", "resource-path": segments, "query": {}});
            trace(&text, false, claims, Some(data), references)
        }
        None => {
            let evidence = claims.pointer("/submods/cpu0/ear.veraison.annotated-evidence").cloned();
            let evidence = evidence.ok_or_else(|| Usage(format!("{}: there is no evidence in it", token.display())))?;
            trace(&text, true, evidence, None, references)
        }
    };
    if json {
        output::json(&found)?;
    } else {
        print(&found)?;
    }
    match (resource.is_some(), &found.value) {
        (false, Some(_)) | (true, Some(Value::Bool(true))) => Ok(()),
        _ => Err(Damaged("the policy refuses: lines with '!' are where its rules stopped".into()).into()),
    }
}

fn print(trace: &Trace) -> std::io::Result<()> {
    for line in &trace.lines {
        let mark = match (line.stopped, line.reached) {
            (true, _) => '!',
            (false, true) => '+',
            (false, false) => ' ',
        };
        output::line(format_args!("{mark} {:>4}  {}", line.number, line.text))?;
    }
    match (&trace.value, &trace.error) {
        (_, Some(error)) => output::line(format_args!("refused: {error}")),
        (Some(value), None) => output::line(format_args!("{value}")),
        (None, None) => output::line("refused"),
    }
}
