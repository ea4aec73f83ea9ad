//! What guests call.

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::IntoResponse as _,
};
use nacre_attest::rcar::{
    AdvanceMessage, AnchorMessage, AnchorRefusal, ErrorBody, LEASE_HEADER, LEASE_SECONDS_HEADER, LeaseReply,
    SESSION_COOKIE, TokenReply, VERSION_HEADER,
};
use nacre_core::ResourcePath;
use serde_json::json;

use super::{App, Body, Parameters, Reply, bearer, blocking, body, ok, resource_path, session};
use crate::{ApiError, release::Proof, store::anchors::Advance};

pub(super) async fn auth(State(app): State<App>, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    let secure = if app.secure { "; Secure" } else { "" };
    let age = app.broker.sessions.lifetime().as_secs();
    // A session in memory waits for nothing; one that replicas share does.
    let (opened, challenge) = if app.broker.store.is_shared() {
        blocking(app, move |broker| broker.auth(&bytes)).await?
    } else {
        app.broker.auth(&bytes)?
    };
    let cookie =
        format!("{SESSION_COOKIE}={}; Path=/kbs/v0; Max-Age={age}; HttpOnly; SameSite=Strict{secure}", opened.id);
    Ok(([(header::SET_COOKIE, cookie)], ok(&challenge)).into_response())
}

pub(super) async fn attest(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let session = session(&headers).ok_or_else(|| {
        ApiError::new(401, "SessionNotFound", format!("no {SESSION_COOKIE} cookie: start with /kbs/v0/auth"))
    })?;
    let bytes = body(bytes)?;
    let token = blocking(app, move |broker| broker.attest(&session, &bytes)).await?;
    Ok(ok(&TokenReply { token }))
}

/// What a guest shows: a token, or the cookie of a session that attested.
fn proof(headers: &HeaderMap) -> Result<Proof, ApiError> {
    match (bearer(headers), session(headers)) {
        (Some(token), _) => Ok(Proof::Token(token.to_owned())),
        (None, Some(id)) => Ok(Proof::Session(id)),
        (None, None) => Err(ApiError::new(
            401,
            "TokenNotFound",
            "neither a session nor an attestation token: start with /kbs/v0/auth",
        )),
    }
}

pub(super) async fn resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Reply {
    let (path, proof) = (resource_path(&segments)?, proof(&headers)?);
    let released = blocking(app, move |broker| broker.release(&proof, &path, &query)).await?;
    let mut response = ([(header::CONTENT_TYPE, "application/json")], released.jwe).into_response();
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, released.version.into());
    // An id of a lease is base64url.
    if let Some((id, seconds)) = released.lease
        && let Ok(id) = HeaderValue::from_str(&id)
    {
        headers.insert(LEASE_HEADER, id);
        headers.insert(LEASE_SECONDS_HEADER, seconds.into());
    }
    Ok(response)
}

pub(super) async fn renew(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let proof = proof(&headers)?;
    let seconds = blocking(app, move |broker| broker.renew(&proof, &id)).await?;
    Ok(ok(&LeaseReply { seconds }))
}

pub(super) async fn give_up(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let proof = proof(&headers)?;
    blocking(app, move |broker| broker.give_up(&proof, &id)).await?;
    Ok(ok(&json!({})))
}

fn anchor_path(segments: &(String, String)) -> Result<ResourcePath, ApiError> {
    ResourcePath::new(&segments.0, "anchor", &segments.1).map_err(|e| ApiError::bad_request(e.to_string()))
}

pub(super) async fn anchor(
    State(app): State<App>,
    Path(segments): Path<(String, String)>,
    headers: HeaderMap,
) -> Reply {
    let (path, proof) = (anchor_path(&segments)?, proof(&headers)?);
    let state = blocking(app, move |broker| broker.anchor(&proof, &path)).await?;
    Ok(ok(&AnchorMessage::of(state.as_ref())))
}

pub(super) async fn advance(
    State(app): State<App>,
    Path(segments): Path<(String, String)>,
    headers: HeaderMap,
    bytes: Body,
) -> Reply {
    let (path, proof, bytes) = (anchor_path(&segments)?, proof(&headers)?, body(bytes)?);
    let (expected, next) = AdvanceMessage::parse(&bytes).map_err(|e| ApiError::bad_request(e.to_string()))?;
    let advance = blocking(app, move |broker| broker.advance(&proof, &path, expected, next)).await?;
    let refused = |variant, detail: &str, found| {
        let error = ErrorBody::new(variant, detail);
        let body = AnchorRefusal { kind: error.kind, detail: error.detail, state: AnchorMessage::of(found).state };
        Ok(super::json_response(StatusCode::CONFLICT, &body))
    };
    match advance {
        Advance::Done => Ok(ok(&json!({}))),
        Advance::Fenced(found) => refused(
            "AnchorFenced",
            "the anchor holds another state than was expected: somebody else moved it on",
            found.as_ref(),
        ),
        Advance::Backwards => refused(
            "AnchorBackwards",
            "the new state does not follow from the one that is there: of another volume, or an earlier one; an administrator can remove the anchor",
            expected.as_ref(),
        ),
    }
}

pub(super) async fn jwks(State(app): State<App>) -> Reply {
    let keys = blocking(app, |broker| Ok(broker.jwks()?)).await?;
    Ok(ok(&keys))
}

pub(super) async fn begin_enrolment(State(app): State<App>, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    let challenge = blocking(app, move |broker| broker.begin_enrolment(&bytes)).await?;
    Ok(ok(&challenge.to_json()))
}

pub(super) async fn finish_enrolment(State(app): State<App>, Path(id): Path<String>, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    let enrolled = blocking(app, move |broker| broker.finish_enrolment(&id, &bytes)).await?;
    Ok(ok(&enrolled))
}
