//! What people look at, in the console and by the command line: guests with their chains of trust, the audit log from its end.

use std::collections::BTreeMap;

use axum::{
    extract::{Path, Query, State},
    http::HeaderMap,
};
use serde_json::json;

use super::{App, Parameters, Reply, administer, ok};
use crate::{ApiError, BrokerError, GuestList, admin::Need};

/// Guests and audit entries in one answer at most.
const MOST: usize = 200;
/// Those where nobody says how many.
const SOME: usize = 50;
/// Entries that are checked in one call.
const CHECKED_AT_ONCE: usize = 5000;

fn most(query: &BTreeMap<String, String>) -> Result<usize, ApiError> {
    let most = query.get("most").map_or(Ok(SOME), |text| text.parse::<usize>()).ok();
    most.filter(|most| (1..=MOST).contains(most))
        .ok_or_else(|| ApiError::bad_request(format!("most: a number from 1 to {MOST}")))
}

fn number(query: &BTreeMap<String, String>, name: &str) -> Result<Option<u64>, ApiError> {
    let number = query.get(name).map(|text| text.parse::<u64>()).transpose();
    number.map_err(|_| ApiError::bad_request(format!("{name}: a number")))
}

pub(super) async fn whoami(State(app): State<App>, headers: HeaderMap) -> Reply {
    let who = administer(app, &headers, Need::ReadOwn, |_, actor| Ok(actor.whoami())).await?;
    Ok(ok(&who))
}

pub(super) async fn guests(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let list = match query.get("list").map(String::as_str) {
        None | Some("attested") => GuestList::Attested,
        Some("refused") => GuestList::Refused,
        Some(_) => return Err(ApiError::bad_request("list: attested or refused")),
    };
    let (most, before) = (most(&query)?, query.get("before").cloned());
    let guests = administer(app, &headers, Need::Read(None), move |broker, _| {
        Ok(broker.guests(list, before.as_deref(), most)?)
    })
    .await?;
    Ok(ok(&guests))
}

pub(super) async fn guest(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let chain = administer(app, &headers, Need::Read(None), move |broker, _| {
        let gone = format!("there is no guest {id:.40}, or it is not kept any more");
        broker.guest_chain(&id)?.ok_or_else(|| ApiError::new(404, "GuestNotFound", gone))
    })
    .await?;
    Ok(ok(&chain))
}

/// A damaged log is an answer here, not a failure: whoever looks has to see it.
fn held<T>(result: Result<T, BrokerError>) -> Result<Result<T, String>, ApiError> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(BrokerError::Damaged { what, why }) => {
            tracing::error!(what, why, "the audit log was changed");
            Ok(Err(format!("{what}: {why}")))
        }
        Err(other) => Err(other.into()),
    }
}

pub(super) async fn audit_page(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let (most, before) = (most(&query)?, number(&query, "before")?);
    let page = administer(app, &headers, Need::Read(None), move |broker, _| {
        let head = broker.audit_head()?;
        let end = before.unwrap_or(u64::MAX).min(head.number.saturating_add(1));
        let after = end.saturating_sub(1).saturating_sub(most as u64);
        let wanted = usize::try_from(end.saturating_sub(1).saturating_sub(after)).unwrap_or_default();
        let entries = held(if wanted == 0 { Ok(Vec::new()) } else { broker.audit(after, wanted) })?;
        let (damage, mut entries) = match entries {
            Ok(entries) => (None, entries),
            Err(why) => (Some(why), Vec::new()),
        };
        entries.reverse();
        let next = (after > 0).then_some(after + 1);
        Ok(json!({"entries": entries, "head": head, "verified": damage.is_none(), "damage": damage, "next": next}))
    })
    .await?;
    Ok(ok(&page))
}

pub(super) async fn audit_check(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let after = number(&query, "after")?.unwrap_or(0);
    let checked = administer(app, &headers, Need::Read(None), move |broker, _| {
        let entries = held(broker.audit(after, CHECKED_AT_ONCE))?;
        let last = broker.audit_head()?.number;
        Ok(match entries {
            Err(damage) => json!({"verified": false, "damage": damage, "checked": after, "last": last, "more": false}),
            Ok(entries) => {
                let checked = entries.last().map_or(after, |entry| entry.number);
                let more = entries.len() == CHECKED_AT_ONCE;
                json!({"verified": true, "damage": null, "checked": checked, "last": last, "more": more})
            }
        })
    })
    .await?;
    Ok(ok(&checked))
}
