//! The console: a page for people, of files that are in the program.
//!
//! It is given to anybody, as there is nothing in it; what it shows, it asks for with the token of who signed in, by the calls of [`super::look`] and
//! [`super::admin`]. Its headers are its second wall, behind its own rule that whatever comes from outside becomes text and never markup: nothing runs that
//! is not one of these files (no inline scripts, no strings that become markup: Trusted Types), nothing is sent anywhere else, and nobody frames it.

use axum::{
    Router,
    http::{HeaderName, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};

use super::App;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

macro_rules! file {
    ($name:literal, $type:literal) => {
        (concat!("/console/", $name), $type, include_str!(concat!("../console/", $name)))
    };
}

const PAGE: (&str, &str, &str) = ("/console/", "text/html; charset=utf-8", include_str!("../console/index.html"));
const FILES: [(&str, &str, &str); 10] = [
    PAGE,
    file!("console.css", "text/css; charset=utf-8"),
    file!("mark.svg", "image/svg+xml"),
    file!("main.js", "text/javascript; charset=utf-8"),
    file!("api.js", "text/javascript; charset=utf-8"),
    file!("dom.js", "text/javascript; charset=utf-8"),
    file!("guests.js", "text/javascript; charset=utf-8"),
    file!("guest.js", "text/javascript; charset=utf-8"),
    file!("lists.js", "text/javascript; charset=utf-8"),
    file!("audit.js", "text/javascript; charset=utf-8"),
];

pub(super) fn routes() -> Router<App> {
    let page = Router::new().route("/console", get(|| async { Redirect::permanent("/console/") }));
    FILES.into_iter().fold(page, |router, (path, kind, text)| router.route(path, get(async move || file(kind, text))))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &'static str); 10] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-embedder-policy"), "require-corp"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("permissions-policy"), "camera=(), microphone=(), geolocation=(), clipboard-read=()"),
    ];
    (headers, text).into_response()
}
