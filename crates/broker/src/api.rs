//! The HTTP face of the broker: routes, bodies, cookies, errors. What a call means is [`Broker`]'s.
//!
//! ```text
//! POST /kbs/v0/auth, /attest                       guests
//! GET  /kbs/v0/resource/{repository}/{type}/{tag}  guests: cookie, or Bearer token
//! POST, DELETE the same                            admin
//! GET  /kbs/v0/resources                           admin: the paths
//! POST /kbs/v0/attestation-policy                  admin {type, policy_id, policy}
//! POST, GET /kbs/v0/resource-policy[?scope=…]      admin {policy}
//! POST /kbs/v0/reference-value, GET …/{id}         admin
//! POST /kbs/v0/sim-platform                        admin: a PEM public key
//! GET  /kbs/v0/audit?after=N                       admin
//! GET  /healthz
//! ```
//!
//! Every call is synchronous underneath and runs on a blocking thread; how many do at once is bounded.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, Request, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use nacre_attest::rcar::{LONGEST_ATTESTATION, SESSION_COOKIE, TokenReply};
use nacre_core::{
    ResourcePath,
    jose::{PublicKey, b64},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::{ApiError, Broker, admin, broker::LONGEST_RESOURCE, release::Proof};

/// Calls that are worked on at a time; more are answered with 429.
const MOST_CALLS: usize = 64;
/// A call takes this long at most.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Audit entries in one answer.
const MOST_ENTRIES: usize = 1000;

#[derive(Clone)]
pub(crate) struct App {
    broker: Arc<Broker>,
    calls: Arc<Semaphore>,
    /// Whether cookies may travel only over TLS.
    secure: bool,
}

type Reply = Result<Response, ApiError>;
type Body = Result<Bytes, BytesRejection>;
type Parameters = Query<BTreeMap<String, String>>;

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = json_response(status, &self.body());
        if self.status == 429 {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

pub(crate) fn router(broker: Arc<Broker>, secure: bool) -> Router {
    let app = App { broker, calls: Arc::new(Semaphore::new(MOST_CALLS)), secure };
    let v0 = Router::new()
        .route("/auth", post(auth))
        .route("/attest", post(attest))
        .route("/resource/{repository}/{kind}/{tag}", get(resource).post(put_resource).delete(delete_resource))
        .route("/resources", get(resources))
        .route("/attestation-policy", post(set_attestation_policy))
        .route("/resource-policy", get(resource_policy).post(set_resource_policy))
        .route("/reference-value", post(add_reference_value))
        .route("/reference-value/{id}", get(reference_value))
        .route("/sim-platform", post(add_sim_platform))
        .route("/audit", get(audit))
        .layer(from_fn_with_state(app.clone(), bound));
    Router::new()
        .nest("/kbs/v0", v0)
        .route("/healthz", get(|| async { "ok\n" }))
        .fallback(|| async { ApiError::new(404, "InvalidRequestPath", "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(405, "InvalidRequest", "this path does not take that method")
        })
        .layer(DefaultBodyLimit::max(LONGEST_ATTESTATION.max(LONGEST_RESOURCE)))
        .with_state(app)
}

/// Bounds how many calls there are and how long one takes.
async fn bound(State(app): State<App>, request: Request, next: Next) -> Response {
    let Ok(_permit) = app.calls.clone().try_acquire_owned() else {
        return ApiError::new(429, "TooManyRequests", "the broker is busy: try again").into_response();
    };
    tokio::time::timeout(TIME_LIMIT, next.run(request)).await.unwrap_or_else(|_| {
        ApiError::new(408, "Timeout", format!("the call took longer than {} s", TIME_LIMIT.as_secs())).into_response()
    })
}

/// Runs a synchronous call on a blocking thread.
async fn blocking<T: Send + 'static>(
    app: App,
    call: impl FnOnce(&Broker) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(move || call(&app.broker))
        .await
        .map_err(|_| ApiError::new(500, "InternalError", "the call ended abnormally"))?
}

/// [`blocking`], for an administrator: the token is checked first.
async fn administer<T: Send + 'static>(
    app: App,
    headers: &HeaderMap,
    call: impl FnOnce(&Broker, &str) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let token = bearer(headers).map(str::to_owned);
    blocking(app, move |broker| {
        let subject = admin::check(token.as_deref(), &broker.keys.admin, &broker.token_key())?;
        call(broker, &format!("admin:{subject}"))
    })
    .await
}

fn json_response(status: StatusCode, value: &impl Serialize) -> Response {
    // What is answered is made of strings and JSON values, which always serialise.
    let body = serde_json::to_vec(value).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn ok(value: &impl Serialize) -> Response {
    json_response(StatusCode::OK, value)
}

fn body(body: Body) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| ApiError::new(rejection.status().as_u16(), "InvalidRequest", rejection.body_text()))
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|e| ApiError::bad_request(e.to_string()))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

/// The session id of the Cookie headers.
fn session(headers: &HeaderMap) -> Option<String> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == SESSION_COOKIE)
        .map(|(_, value)| value.to_owned())
}

fn resource_path(segments: &(String, String, String)) -> Result<ResourcePath, ApiError> {
    ResourcePath::new(&segments.0, &segments.1, &segments.2).map_err(|e| ApiError::bad_request(e.to_string()))
}

fn policy_text(encoded: &str) -> Result<String, ApiError> {
    let bytes =
        b64::decode(encoded.trim_end_matches('=')).map_err(|e| ApiError::bad_request(format!("policy: {e}")))?;
    String::from_utf8(bytes).map_err(|_| ApiError::bad_request("policy: not UTF-8"))
}

async fn auth(State(app): State<App>, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    let secure = if app.secure { "; Secure" } else { "" };
    let (opened, challenge, age) = blocking(app, move |broker| {
        let (opened, challenge) = broker.auth(&bytes)?;
        Ok((opened, challenge, broker.sessions.lifetime().as_secs()))
    })
    .await?;
    let cookie =
        format!("{SESSION_COOKIE}={}; Path=/kbs/v0; Max-Age={age}; HttpOnly; SameSite=Strict{secure}", opened.id);
    Ok(([(header::SET_COOKIE, cookie)], ok(&challenge)).into_response())
}

async fn attest(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let session = session(&headers).ok_or_else(|| {
        ApiError::new(401, "SessionNotFound", format!("no {SESSION_COOKIE} cookie: start with /kbs/v0/auth"))
    })?;
    let bytes = body(bytes)?;
    let token = blocking(app, move |broker| broker.attest(&session, &bytes)).await?;
    Ok(ok(&TokenReply { token }))
}

async fn resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Reply {
    let path = resource_path(&segments)?;
    let proof = match (bearer(&headers), session(&headers)) {
        (Some(token), _) => Proof::Token(token.to_owned()),
        (None, Some(id)) => Proof::Session(id),
        (None, None) => {
            return Err(ApiError::new(
                401,
                "TokenNotFound",
                "neither a session nor an attestation token: start with /kbs/v0/auth",
            ));
        }
    };
    let jwe = blocking(app, move |broker| broker.release(&proof, &path, &json!(query))).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], jwe).into_response())
}

async fn put_resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    headers: HeaderMap,
    bytes: Body,
) -> Reply {
    let path = resource_path(&segments)?;
    let bytes = body(bytes)?;
    administer(app, &headers, move |broker, actor| Ok(broker.put_resource_as(actor, &path, &bytes)?)).await?;
    Ok(ok(&json!({})))
}

async fn delete_resource(
    State(app): State<App>,
    Path(segments): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let path = resource_path(&segments)?;
    administer(app, &headers, move |broker, actor| match broker.delete_resource_as(actor, &path)? {
        true => Ok(()),
        false => Err(ApiError::new(404, "ResourceNotFound", format!("there is no resource {path}"))),
    })
    .await?;
    Ok(ok(&json!({})))
}

async fn resources(State(app): State<App>, headers: HeaderMap) -> Reply {
    let list = administer(app, &headers, |broker, _| Ok(broker.resources()?)).await?;
    Ok(ok(&list))
}

#[derive(Deserialize)]
struct AttestationPolicy {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    policy_id: String,
    policy: String,
}

async fn set_attestation_policy(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, move |broker, actor| {
        let message: AttestationPolicy = parse(&bytes)?;
        if message.kind.is_some_and(|kind| kind != "rego") {
            return Err(ApiError::bad_request("policies are of type rego"));
        }
        Ok(broker.set_attestation_policy_as(actor, &message.policy_id, &policy_text(&message.policy)?)?)
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

async fn set_resource_policy(
    State(app): State<App>,
    Query(query): Parameters,
    headers: HeaderMap,
    bytes: Body,
) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, move |broker, actor| {
        let message: ResourcePolicy = parse(&bytes)?;
        Ok(broker.set_resource_policy_as(actor, &scope(&query), &policy_text(&message.policy)?)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

async fn resource_policy(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let text = administer(app, &headers, move |broker, _| {
        broker
            .resource_policy(&scope(&query))?
            .ok_or_else(|| ApiError::new(404, "PolicyNotFound", "this scope has no policy of its own"))
    })
    .await?;
    Ok(ok(&json!({"policy": b64::encode(text)})))
}

async fn add_reference_value(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, move |broker, actor| Ok(broker.add_reference_message(actor, &bytes)?)).await?;
    Ok(ok(&json!({})))
}

async fn reference_value(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Reply {
    let value = administer(app, &headers, move |broker, _| Ok(broker.reference_value(&id)?)).await?;
    Ok(ok(&value.map(|reference| reference.values)))
}

async fn add_sim_platform(State(app): State<App>, headers: HeaderMap, bytes: Body) -> Reply {
    let bytes = body(bytes)?;
    administer(app, &headers, move |broker, actor| {
        let key = PublicKey::from_bytes(&bytes).map_err(|e| ApiError::bad_request(e.to_string()))?;
        Ok(broker.add_sim_platform_key_as(actor, &key)?)
    })
    .await?;
    Ok(ok(&json!({})))
}

async fn audit(State(app): State<App>, Query(query): Parameters, headers: HeaderMap) -> Reply {
    let after =
        query.get("after").map_or(Ok(0), |text| text.parse()).map_err(|_| ApiError::bad_request("after: a number"))?;
    let entries = administer(app, &headers, move |broker, _| Ok(broker.audit(after, MOST_ENTRIES)?)).await?;
    Ok(ok(&entries))
}
