//! The HTTP face of the broker: routes, bodies, cookies, errors. What a call means is [`Broker`]'s.
//!
//! ```text
//! POST /kbs/v0/auth, /attest                       guests
//! GET  /kbs/v0/resource/{repository}/{type}/{tag}[?version=N]  guests: cookie, or Bearer token
//! POST, DELETE /kbs/v0/lease/{id}                  guests: renew, give up
//! GET, POST /kbs/v0/anchor/{repository}/{name}     guests: read, compare and swap
//! GET  /kbs/v0/jwks                                anybody
//! POST /kbs/v0/enrolment, /enrolment/{id}          anybody: a TPM's attestation key, where there are EK roots
//!
//! POST, DELETE /kbs/v0/resource/…[?kind=&lease=]   admin
//! POST /kbs/v0/resource-rotation/{repository}/{type}/{tag}     admin
//! GET  /kbs/v0/resources                           admin: what is known of them but values
//! POST /kbs/v0/attestation-policy, GET …/{id}      admin {type, policy_id, policy}
//! POST, GET, DELETE /kbs/v0/resource-policy[?scope=…]      admin {policy}
//! POST /kbs/v0/reference-value, GET, DELETE …/{id} admin; GET /reference-values
//! GET, POST /kbs/v0/reference-signers, DELETE …/{name}[?values=true]   admin
//! POST /kbs/v0/sim-platform                        admin: a PEM public key
//! GET  /kbs/v0/leases, POST /kbs/v0/lease-revocation       admin
//! GET  /kbs/v0/anchors, DELETE /kbs/v0/anchor/…    admin
//! GET  /kbs/v0/enrolments, DELETE …/{name}[?forget=true]    admin
//! GET, POST /kbs/v0/admins, DELETE …/{name}        admin
//! POST /kbs/v0/token-key                           admin: a new one
//! GET  /kbs/v0/audit?after=N, /audit-head[?number=N]       admin
//! GET  /kbs/v0/audit-page?before=N, /audit-check?after=N   admin: for people, the newest first; how far the chain holds
//! GET  /kbs/v0/guests?list=L&before=ID, /guests/{id}       admin: what was found of guests
//! GET  /kbs/v0/whoami                              admin: which role the token has
//! GET  /healthz, /metrics
//! GET  /console/…                                  the page for people
//! ```
//!
//! Every call is synchronous underneath and runs on a blocking thread; how many do at once is bounded.

mod admin;
mod console;
mod guest;
mod look;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Query, Request, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use nacre_attest::rcar::{LONGEST_ATTESTATION, SESSION_COOKIE};
use nacre_core::ResourcePath;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::{
    ApiError, Broker,
    admin::{Actor, Need},
    broker::LONGEST_RESOURCE,
    limit::RateLimit,
    metrics::count,
};

/// A call takes this long at most.
const TIME_LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub(crate) struct App {
    broker: Arc<Broker>,
    calls: Arc<Semaphore>,
    rate: Arc<RateLimit>,
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
        if matches!(self.status, 429 | 503) {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

pub(crate) fn router(broker: Arc<Broker>, secure: bool) -> Router {
    let calls = Arc::new(Semaphore::new(broker.settings().most_calls));
    let rate = Arc::new(RateLimit::new(broker.settings().calls_per_second));
    let app = App { broker, calls, rate, secure };
    let v0 = Router::new()
        .route("/auth", post(guest::auth))
        .route("/attest", post(guest::attest))
        .route(
            "/resource/{repository}/{kind}/{tag}",
            get(guest::resource).post(admin::put_resource).delete(admin::delete_resource),
        )
        .route("/lease/{id}", post(guest::renew).delete(guest::give_up))
        .route("/anchor/{repository}/{name}", get(guest::anchor).post(guest::advance).delete(admin::delete_anchor))
        .route("/jwks", get(guest::jwks))
        .route("/enrolment", post(guest::begin_enrolment))
        .route("/enrolment/{id}", post(guest::finish_enrolment))
        .route("/enrolments", get(admin::enrolments))
        .route("/enrolments/{name}", delete(admin::revoke_enrolment))
        .route("/resource-rotation/{repository}/{kind}/{tag}", post(admin::rotate_resource))
        .route("/resources", get(admin::resources))
        .route("/attestation-policy", post(admin::set_attestation_policy))
        .route(
            "/resource-policy",
            get(admin::resource_policy).post(admin::set_resource_policy).delete(admin::delete_resource_policy),
        )
        .route("/reference-value", post(admin::add_reference_value))
        .route("/reference-value/{id}", get(admin::reference_value).delete(admin::delete_reference))
        .route("/reference-values", get(admin::references))
        .route("/reference-signers", get(admin::signers).post(admin::set_signer))
        .route("/reference-signers/{name}", delete(admin::delete_signer))
        .route("/attestation-policy/{id}", get(admin::attestation_policy))
        .route("/sim-platform", post(admin::add_sim_platform))
        .route("/leases", get(admin::leases))
        .route("/lease-revocation", post(admin::revoke))
        .route("/anchors", get(admin::anchors))
        .route("/admins", get(admin::admins).post(admin::set_admin))
        .route("/admins/{name}", delete(admin::delete_admin))
        .route("/token-key", post(admin::rotate_token_key))
        .route("/audit", get(admin::audit))
        .route("/audit-head", get(admin::audit_head))
        .route("/audit-page", get(look::audit_page))
        .route("/audit-check", get(look::audit_check))
        .route("/guests", get(look::guests))
        .route("/guests/{id}", get(look::guest))
        .route("/whoami", get(look::whoami))
        .layer(from_fn_with_state(app.clone(), bound));
    let console = match app.broker.settings().console {
        true => console::routes().layer(from_fn_with_state(app.clone(), bound)),
        false => Router::new(),
    };
    Router::new()
        .nest("/kbs/v0", v0)
        .merge(console)
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .fallback(|| async { ApiError::new(404, "InvalidRequestPath", "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(405, "InvalidRequest", "this path does not take that method")
        })
        .layer(DefaultBodyLimit::max(LONGEST_ATTESTATION.max(LONGEST_RESOURCE)))
        .with_state(app)
}

/// For whoever watches over it: whether it can serve guests.
async fn healthz(State(app): State<App>) -> Result<&'static str, ApiError> {
    blocking(app, |broker| Ok(broker.probe()?)).await?;
    Ok("ok\n")
}

async fn metrics(State(app): State<App>) -> Reply {
    let text = blocking(app, |broker| Ok(broker.metrics())).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// The route of a path, for counters: one of a few names, whatever was asked for.
fn route(path: &str) -> &'static str {
    let first = path.trim_start_matches("/kbs/v0").split('/').nth(1).unwrap_or_default();
    ["auth", "attest", "resource", "lease", "anchor", "jwks", "enrolment", "console"]
        .into_iter()
        .find(|name| *name == first)
        .unwrap_or("admin")
}

/// Bounds how many calls there are, how many come from one address, and how long one takes; counts them.
async fn bound(State(app): State<App>, request: Request, next: Next) -> Response {
    let (start, route) = (Instant::now(), route(request.uri().path()));
    let response = bounded(&app, request, next).await;
    app.broker.metrics.call(route, response.status().as_u16(), start.elapsed());
    response
}

async fn bounded(app: &App, request: Request, next: Next) -> Response {
    let limited = |why: String| {
        count(&app.broker.metrics.limited);
        ApiError::new(429, "TooManyRequests", why).into_response()
    };
    if let Some(Peer(address)) = request.extensions().get::<Peer>()
        && !app.rate.admits(address.ip(), Instant::now())
    {
        let most = app.broker.settings().calls_per_second;
        return limited(format!("more than {most} calls a second from this address: try again later"));
    }
    let Ok(_permit) = app.calls.clone().try_acquire_owned() else {
        return limited("the broker is busy: try again".into());
    };
    tokio::time::timeout(TIME_LIMIT, next.run(request)).await.unwrap_or_else(|_| {
        ApiError::new(408, "Timeout", format!("the call took longer than {} s", TIME_LIMIT.as_secs())).into_response()
    })
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) std::net::SocketAddr);

/// Runs a synchronous call on a blocking thread.
async fn blocking<T: Send + 'static>(
    app: App,
    call: impl FnOnce(&Broker) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(move || call(&app.broker))
        .await
        .map_err(|_| ApiError::new(500, "InternalError", "the call ended abnormally"))?
}

/// [`blocking`], for an administrator: the token is checked first, then whether it may.
async fn administer<T: Send + 'static>(
    app: App,
    headers: &HeaderMap,
    need: Need<'_>,
    call: impl FnOnce(&Broker, &Actor) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let token = bearer(headers).map(str::to_owned);
    let actor = blocking(app.clone(), move |broker| {
        let config = broker.store.config()?;
        crate::admin::check(
            token.as_deref(),
            &broker.keys.admin,
            config.admins().iter(),
            &config.token_keys().thumbprints(),
        )
    })
    .await?;
    actor.may(need)?;
    blocking(app, move |broker| call(broker, &actor)).await
}

fn json_response(status: StatusCode, value: &impl Serialize) -> Response {
    // What is answered is made of strings and JSON values, which always serialise.
    let body = serde_json::to_vec(value).unwrap_or_default();
    // Nobody between keeps it, and no browser takes it for a page.
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, body).into_response()
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
