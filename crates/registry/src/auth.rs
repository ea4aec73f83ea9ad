//! Who may do what: basic authentication, or bearer tokens from the registry's own `/token`.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;

use crate::http::{Request, Response, parameter, parameters};

/// How the registry knows its users. The default is that everybody may do everything.
#[derive(Clone, Default)]
pub enum Auth {
    /// Not at all.
    #[default]
    None,
    /// `Authorization: Basic` on each request.
    Basic(Credentials),
    /// A token from `/token`, which wants the credentials.
    Bearer {
        /// Whom the token service knows.
        credentials: Credentials,
        /// Whether it also gives tokens to pull to people that it does not know.
        anonymous_pull: bool,
        /// For how long a token is good.
        lifetime: Duration,
    },
}

/// A user and the password.
#[derive(Clone)]
pub struct Credentials {
    user: String,
    password: String,
}

impl Credentials {
    /// A user and the password.
    pub fn new(user: &str, password: &str) -> Self {
        Self { user: user.to_owned(), password: password.to_owned() }
    }

    fn match_basic(&self, request: &Request) -> bool {
        let sent = request.header("authorization").and_then(|value| value.strip_prefix("Basic "));
        sent.and_then(|text| BASE64_STANDARD.decode(text.trim()).ok())
            .is_some_and(|bytes| bytes == format!("{}:{}", self.user, self.password).into_bytes())
    }

    /// What `identitytoken` in an auth file holds, to be sent as `refresh_token`.
    pub fn identity_token(&self) -> String {
        BASE64_STANDARD.encode(format!("identity {} {}", self.user, self.password))
    }
}

#[derive(Default)]
pub(crate) struct Tokens(HashMap<String, (Instant, Vec<String>)>);

/// What a request needs: the repository and `pull` or `push`.
pub(crate) struct Need<'a> {
    pub(crate) repository: Option<&'a str>,
    pub(crate) write: bool,
}

impl Auth {
    /// `Some` is the refusal.
    pub(crate) fn refuse(&self, tokens: &Tokens, request: &Request, need: &Need<'_>, base: &str) -> Option<Response> {
        let denied = |challenge: String| {
            Some(Response::error(401, "UNAUTHORIZED", "authentication required").with("WWW-Authenticate", challenge))
        };
        match self {
            Self::None => None,
            Self::Basic(credentials) => {
                if credentials.match_basic(request) {
                    return None;
                }
                denied("Basic realm=\"nacre\"".to_owned())
            }
            Self::Bearer { .. } => {
                let action = if need.write { "push" } else { "pull" };
                let wanted = need.repository.map(|name| format!("repository:{name}:{action}"));
                let sent = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
                if let Some((ends, scopes)) = sent.and_then(|token| tokens.0.get(token.trim()))
                    && *ends > Instant::now()
                    && wanted.as_ref().is_none_or(|wanted| scopes.contains(wanted))
                {
                    return None;
                }
                let scope = match need.repository {
                    Some(name) if need.write => format!(",scope=\"repository:{name}:pull,push\""),
                    Some(name) => format!(",scope=\"repository:{name}:pull\""),
                    None => String::new(),
                };
                denied(format!("Bearer realm=\"{base}/token\",service=\"nacre\"{scope}"))
            }
        }
    }

    /// Answers `/token`: `form` is the body of a POST (OAuth 2), empty for GET.
    pub(crate) fn token(&self, tokens: &mut Tokens, request: &Request, form: &str) -> Response {
        let Self::Bearer { credentials, anonymous_pull, lifetime } = self else {
            return Response::error(404, "NOT_FOUND", "this registry has no token service");
        };
        let by_form = match parameter(form, "grant_type").as_deref() {
            Some("refresh_token") => parameter(form, "refresh_token") == Some(credentials.identity_token()),
            Some("password") => {
                parameter(form, "username").as_ref() == Some(&credentials.user)
                    && parameter(form, "password").as_ref() == Some(&credentials.password)
            }
            _ => false,
        };
        let known = by_form || credentials.match_basic(request);
        if !known && (request.header("authorization").is_some() || !form.is_empty() || !anonymous_pull) {
            return Response::error(401, "UNAUTHORIZED", "unknown user or wrong password");
        }
        let source = if form.is_empty() { request.query.as_str() } else { form };
        let asked =
            parameters(source, "scope").flat_map(|scopes| scopes.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let mut granted = Vec::new();
        for scope in asked {
            let Some((resource, actions)) = scope.rsplit_once(':') else { continue };
            for action in actions.split(',').filter(|action| known || *action == "pull") {
                granted.push(format!("{resource}:{action}"));
            }
        }
        let random = || RandomState::new().hash_one(tokens.0.len());
        let token = format!("{:016x}{:016x}", random(), random());
        tokens.0.insert(token.clone(), (Instant::now() + *lifetime, granted));
        Response::json(200, &json!({ "token": token, "access_token": token, "expires_in": lifetime.as_secs() }))
    }
}
