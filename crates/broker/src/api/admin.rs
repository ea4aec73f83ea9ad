//! What administrators call.

use std::collections::BTreeMap;

use axum::{
    extract::{Path, Query, State},
    http::HeaderMap,
};
use nacre_core::jose::{PublicKey, b64};
use serde::Deserialize;
use serde_json::json;

use super::{App, Body, Parameters, Reply, administer, body, ok, parse, resource_path};
use crate::{
    ApiError, AuditHead, PutOptions, ResourceKind, Revocation, Signer,
    admin::{Administrator, Need},
    store::Page,
};

/// Audit entries in one answer.
const MOST_ENTRIES: usize = 1000;

/// The repository of a policy's scope; empty for all of them.
fn repository(scope: &str) -> &str {
    scope.split('/').next().unwrap_or_default()
}

fn change_policy(scope: &str) -> Need<'_> {
    match repository(scope) {
        "" => Need::ChangeAll,
        repository => Need::Change(repository),
    }
}

fn policy_text(encoded: &str) -> Result<String, ApiError> {
    let bytes =
        b64::decode(encoded.trim_end_matches('=')).map_err(|e| ApiError::bad_request(format!("policy: {e}")))?;
    String::from_utf8(bytes).map_err(|_| ApiError::bad_request("policy: not UTF-8"))
}

fn put_options(query: &BTreeMap<String, String>) -> Result<PutOptions, ApiError> {
    let kind = query.get("kind").map(|name| ResourceKind::from_name(name)).transpose()?;
    let lease = query.get("lease").map(|text| text.parse::<u32>()).transpose();
    Ok(PutOptions { kind, lease_seconds: lease.map_err(|_| ApiError::bad_request("lease: a number of seconds"))? })
}

pub(super) async fn put_resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    Query(query): Parameters,
    headers: HeaderMap,
    bytes: Body,
) -> Reply {
    let (path, options, bytes) = (resource_path(&segments)?, put_options(&query)?, body(bytes)?);
    let version = administer(app, &headers, Need::Change(&segments.0), move |broker, actor| {
        Ok(broker.put_resource_as(&actor.name, &path, &bytes, options)?)
    })
    .await?;
    Ok(ok(&json!({"version": version})))
}

pub(super) async fn rotate_resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let path = resource_path(&segments)?;
    let version = administer(app, &headers, Need::Change(&segments.0), move |broker, actor| {
        Ok(broker.rotate_resource_as(&actor.name, &path)?)
    })
    .await?;
    Ok(ok(&json!({"version": version})))
}

pub(super) async fn delete_resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let path = resource_path(&segments)?;
    administer(app, &headers, Need::Change(&segments.0), move |broker, actor| {
        match broker.delete_resource_as(&actor.name, &path)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "ResourceNotFound", format!("there is no resource {path}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn resources(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let page = Page::of(&query)?;
    let list =
        administer(
            app,
            &headers,
            Need::ReadOwn,
            move |broker, actor| Ok(broker.resource_page(&actor.prefix(), &page)?),
        )
        .await?;
    Ok(ok(&list))
}

pub(super) async fn leases(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let page = Page::of(&query)?;
    let list =
        administer(app, &headers, Need::ReadOwn, move |broker, actor| Ok(broker.lease_page(&actor.prefix(), &page)?))
            .await?;
    Ok(ok(&list))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum RevocationMessage {
    Lease(String),
    Resource(String),
    Measurement(String),
}

pub(super) async fn revoke(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    let count = administer(app, &headers, Need::ReadOwn, move |broker, actor| {
        actor.may(Need::Change(actor.prefix().trim_end_matches('/')))?;
        let revocation = match parse(&bytes)? {
            RevocationMessage::Lease(name) => Revocation::Lease(name),
            RevocationMessage::Resource(path) => Revocation::Resource(path),
            RevocationMessage::Measurement(measurement) => Revocation::Measurement(measurement),
        };
        Ok(broker.revoke_as(&actor.name, &revocation, &actor.prefix())?)
    })
    .await?;
    Ok(ok(&json!({"revoked": count})))
}

pub(super) async fn anchors(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, Need::ReadOwn, |broker, actor| Ok(broker.anchors(&actor.prefix())?)).await?;
    let list: Vec<_> = list
        .iter()
        .map(|(name, state)| json!({"name": name, "fence": state.fence, "sequence": state.sequence}))
        .collect();
    Ok(ok(&list))
}

pub(super) async fn delete_anchor(
    State(app): State<App>,
    Path((repository, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Reply {
    let key = format!("{repository}/{name}");
    administer(app, &headers, Need::Change(&repository), move |broker, actor| {
        match broker.delete_anchor_as(&actor.name, &key)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "AnchorNotFound", format!("there is no anchor {key}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn enrolments(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, Need::Read(None), |broker, _| Ok(broker.enrolments()?)).await?;
    Ok(ok(&list))
}

pub(super) async fn revoke_enrolment(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Reply {
    let forget = query.get("forget").is_some_and(|text| text == "true");
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        match broker.revoke_enrolment_as(&actor.name, &name, forget)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "EnrolmentNotFound", format!("there is no TPM {name:.64}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn admins(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, Need::Read(None), |broker, _| Ok(broker.admins()?)).await?;
    Ok(ok(&list))
}

pub(super) async fn set_admin(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, Need::Administer, move |broker, actor| {
        Ok(broker.set_admin_as(&actor.name, &parse::<Administrator>(&bytes)?)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn delete_admin(State(app): State<App>, Path(name): Path<String>, headers: HeaderMap) -> Reply {
    administer(app, &headers, Need::Administer, move |broker, actor| {
        match broker.delete_admin_as(&actor.name, &name)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "AdminNotFound", format!("there is no administrator {name}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn rotate_token_key(State(app): State<App>, headers: HeaderMap) -> Reply {
    let pem = administer(app, &headers, Need::Administer, |broker, actor| {
        Ok(broker.rotate_token_key_as(&actor.name)?.to_pem().map_err(crate::BrokerError::from)?)
    })
    .await?;
    Ok(ok(&json!({"token_key": pem})))
}

pub(super) async fn audit_head(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let number = query.get("number").map(|text| text.parse::<u64>()).transpose();
    let number = number.map_err(|_| ApiError::bad_request("number: a number"))?;
    let head = administer(app, &headers, Need::Read(None), move |broker, _| {
        let Some(number) = number else { return Ok(broker.audit_head()?) };
        let hash = broker.audit_hash(number)?;
        let missing = || ApiError::new(404, "AuditEntryNotFound", format!("there is no audit entry {number}"));
        Ok(AuditHead { number, hash: hash.ok_or_else(missing)? })
    })
    .await?;
    Ok(ok(&head))
}

#[derive(Deserialize)]
struct AttestationPolicy {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    policy_id: String,
    policy: String,
}

pub(super) async fn set_attestation_policy(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        let message: AttestationPolicy = parse(&bytes)?;
        if message.kind.is_some_and(|kind| kind != "rego") {
            return Err(ApiError::bad_request("policies are of type rego"));
        }
        Ok(broker.set_attestation_policy_as(&actor.name, &message.policy_id, &policy_text(&message.policy)?)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

#[derive(Deserialize)]
struct ResourcePolicy {
    policy: String,
}

fn scope(query: &BTreeMap<String, String>) -> String {
    query.get("scope").cloned().unwrap_or_default()
}

pub(super) async fn set_resource_policy(
    State(app): State<App>,
    Query(query): Parameters,
    headers: HeaderMap,
    bytes: Body,
) -> Reply {
    let (bytes, scope) = (body(bytes)?, scope(&query));
    let scope_of = scope.clone();
    administer(app, &headers, change_policy(&scope_of), move |broker, actor| {
        let message: ResourcePolicy = parse(&bytes)?;
        Ok(broker.set_resource_policy_as(&actor.name, &scope, &policy_text(&message.policy)?)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn resource_policy(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let scope = scope(&query);
    let own = scope.clone();
    let repository = repository(&own);
    let text =
        administer(app, &headers, Need::Read((!repository.is_empty()).then_some(repository)), move |broker, _| {
            broker
                .resource_policy(&scope)?
                .ok_or_else(|| ApiError::new(404, "PolicyNotFound", "this scope has no policy of its own"))
        })
        .await?;
    Ok(ok(&json!({"policy": b64::encode(text)})))
}

pub(super) async fn delete_resource_policy(
    State(app): State<App>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Reply {
    let scope = scope(&query);
    let own = scope.clone();
    administer(app, &headers, change_policy(&own), move |broker, actor| {
        match broker.delete_resource_policy_as(&actor.name, &scope)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "PolicyNotFound", "this scope has no policy of its own")),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn add_reference_value(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        Ok(broker.add_reference_message(&actor.name, &bytes)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn reference_value(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let value = administer(app, &headers, Need::Read(None), move |broker, _| Ok(broker.reference_value(&id)?)).await?;
    Ok(ok(&value.map(|reference| reference.values)))
}

pub(super) async fn references(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, Need::Read(None), |broker, _| Ok(broker.references()?)).await?;
    Ok(ok(&list))
}

pub(super) async fn delete_reference(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        match broker.delete_reference_as(&actor.name, &id)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "ReferenceNotFound", format!("there is no reference value {id}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn signers(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, Need::Read(None), |broker, _| Ok(broker.signers()?)).await?;
    Ok(ok(&list))
}

pub(super) async fn set_signer(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        Ok(broker.set_signer_as(&actor.name, &parse::<Signer>(&bytes)?)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn delete_signer(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Reply {
    let values = query.get("values").is_some_and(|text| text == "true");
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        match broker.delete_signer_as(&actor.name, &name, values)? {
            true => Ok(()),
            false => Err(ApiError::new(404, "SignerNotFound", format!("there is no signer {name}"))),
        }
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn attestation_policy(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let text = administer(app, &headers, Need::Read(None), move |broker, _| {
        broker
            .attestation_policy(&id)?
            .ok_or_else(|| ApiError::new(404, "PolicyNotFound", format!("there is no attestation policy {id}")))
    })
    .await?;
    Ok(ok(&json!({"policy": b64::encode(text)})))
}

pub(super) async fn add_sim_platform(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, Need::ChangeAll, move |broker, actor| {
        let key = PublicKey::from_bytes(&bytes).map_err(|e| ApiError::bad_request(e.to_string()))?;
        Ok(broker.add_sim_platform_key_as(&actor.name, &key)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

pub(super) async fn audit(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let after =
        query.get("after").map_or(Ok(0), |text| text.parse()).map_err(|_| ApiError::bad_request("after: a number"))?;
    let entries =
        administer(app, &headers, Need::Read(None), move |broker, _| Ok(broker.audit(after, MOST_ENTRIES)?)).await?;
    Ok(ok(&entries))
}
