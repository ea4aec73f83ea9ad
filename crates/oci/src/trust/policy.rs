//! policy.json, containers-policy.json(5): what must be true of an image before it is used.
//!
//! ```text
//! {"default": [REQUIREMENT…], "transports": {TRANSPORT: {SCOPE: [REQUIREMENT…]}}}
//! ```
//!
//! Parsing is strict, since a misspelt rule must not become a missing one: unknown fields, keys that are there twice, empty lists of
//! requirements and scopes that could never match are refused, and so is the whole policy. Every requirement of the one scope that
//! applies must hold ([`Policy::lookup`]).

use std::{collections::BTreeMap, sync::Arc};

use super::{
    identity::SignedIdentity,
    json::{Fields, Json, JsonError},
    material::{Material, SourceNames, take_sources},
    scope,
};
use crate::reference::Location;

/// The most bytes of a policy.
pub const POLICY_LIMIT: usize = 4 << 20;
/// The most requirements in a list.
const REQUIREMENTS_LIMIT: usize = 64;

/// Why bytes are no policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// It is larger than [`POLICY_LIMIT`].
    #[error("{file}: policy of {size} bytes; at most {POLICY_LIMIT} are allowed")]
    TooLarge {
        /// The policy's name.
        file: String,
        /// Its size.
        size: usize,
    },
    /// It says something that it must not.
    #[error("{file}: {problem}")]
    Invalid {
        /// The policy's name.
        file: String,
        /// What, and where in it.
        problem: String,
    },
}

/// A requirement of a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Holds always, and says nothing about the image.
    InsecureAcceptAnything,
    /// Holds never.
    Reject,
    /// A GPG simple signature.
    SignedBy(SignedBy),
    /// A cosign or sigstore signature.
    SigstoreSigned(Box<SigstoreSigned>),
}

impl Requirement {
    /// As `type` spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InsecureAcceptAnything => "insecureAcceptAnything",
            Self::Reject => "reject",
            Self::SignedBy(_) => "signedBy",
            Self::SigstoreSigned(_) => "sigstoreSigned",
        }
    }
}

/// `signedBy`: one signature by any key of the keyrings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedBy {
    /// Keyrings.
    pub keyrings: Vec<Material>,
    /// What name it must be for.
    pub identity: SignedIdentity,
}

/// `sigstoreSigned`: one signature by what `authority` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigstoreSigned {
    /// Whose signatures are good.
    pub authority: Authority,
    /// Public keys of transparency logs, one of which must have seen the signature; empty where none need.
    pub rekor: Vec<Material>,
    /// What name it must be for.
    pub identity: SignedIdentity,
}

/// Whose sigstore signatures are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// Any of these public keys.
    Keys(Vec<Material>),
    /// A short-lived certificate of a Fulcio CA.
    Fulcio {
        /// CA certificates.
        ca: Material,
        /// Who identified the signer.
        oidc_issuer: String,
        /// The signer.
        subject_email: String,
    },
    /// A certificate of another CA.
    Pki {
        /// Root certificates.
        roots: Material,
        /// Intermediate certificates.
        intermediates: Option<Material>,
        /// The e-mail address that the certificate must have.
        subject_email: Option<String>,
        /// The host name that the certificate must have.
        subject_hostname: Option<String>,
    },
}

/// A parsed policy.
#[derive(Clone, Debug)]
pub struct Policy {
    name: Arc<str>,
    default: Vec<Requirement>,
    transports: BTreeMap<String, BTreeMap<String, Vec<Requirement>>>,
}

/// The part of a policy that applies to an image.
#[derive(Clone, Copy, Debug)]
pub struct Applicable<'a> {
    /// All of them must hold; never empty.
    pub requirements: &'a [Requirement],
    /// The transport, and the scope in it; `None` for the default.
    pub scope: Option<(&'a str, &'a str)>,
}

impl Applicable<'_> {
    /// The rule's place in the policy, for messages.
    pub fn place(&self) -> String {
        match self.scope {
            Some((transport, scope)) => format!("transports.{transport}[{scope:?}]"),
            None => "default".into(),
        }
    }
}

impl Policy {
    /// Parses policy.json. `name` is how messages call it: the file, or the resource that it came from.
    ///
    /// # Errors
    /// [`PolicyError`]
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, PolicyError> {
        if bytes.len() > POLICY_LIMIT {
            return Err(PolicyError::TooLarge { file: name.into(), size: bytes.len() });
        }
        Json::parse(bytes)
            .and_then(|json| Self::from_json(json, name))
            .map_err(|error| PolicyError::Invalid { file: name.into(), problem: error.to_string() })
    }

    /// No policy at all: every image is accepted, signed or not. It must be asked for by this name, and says so in the log each time
    /// it decides.
    pub fn insecure_accept_anything() -> Self {
        Self {
            name: "no policy (insecure: accepts anything)".into(),
            default: vec![Requirement::InsecureAcceptAnything],
            transports: BTreeMap::new(),
        }
    }

    /// A policy that accepts nothing: what applies where no policy is configured.
    pub fn reject_everything() -> Self {
        Self {
            name: "the built-in policy (no policy is configured)".into(),
            default: vec![Requirement::Reject],
            transports: BTreeMap::new(),
        }
    }

    /// How messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The requirements for an image: those of the most specific scope of its transport, else the transport's `""`, else `default`.
    pub fn lookup(&self, requested: &Location) -> Applicable<'_> {
        if let Some((transport, scopes)) = self.transports.get_key_value(requested.transport()) {
            for candidate in scope::candidates(requested) {
                if let Some((scope, requirements)) = scopes.get_key_value(candidate.as_str()) {
                    return Applicable { requirements, scope: Some((transport, scope)) };
                }
            }
        }
        Applicable { requirements: &self.default, scope: None }
    }

    fn from_json(json: Json, name: &str) -> Result<Self, JsonError> {
        let mut fields = json.into_fields("")?;
        let default = requirements(fields.required("default")?, "default")?;
        let mut transports = BTreeMap::new();
        if let Some(value) = fields.take("transports") {
            for (transport, scopes) in value.into_object("transports")? {
                let at = format!("transports.{transport:.60}");
                let mut parsed = BTreeMap::new();
                for (scope, list) in scopes.into_object(&at)? {
                    let at = format!("{at}[{scope:?}]");
                    scope::validate(&transport, &scope).map_err(|problem| JsonError::at(&at, problem))?;
                    parsed.insert(scope, requirements(list, &at)?);
                }
                transports.insert(transport, parsed);
            }
        }
        fields.finish()?;
        Ok(Self { name: name.into(), default, transports })
    }
}

fn requirements(value: Json, at: &str) -> Result<Vec<Requirement>, JsonError> {
    let items = value.into_array(at)?;
    if items.is_empty() || items.len() > REQUIREMENTS_LIMIT {
        let problem = format!(
            "has {} requirements; 1 to {REQUIREMENTS_LIMIT} are allowed (to accept anything, say insecureAcceptAnything)",
            items.len()
        );
        return Err(JsonError::at(at, problem));
    }
    items.into_iter().enumerate().map(|(number, item)| requirement(item, &format!("{at}[{number}]"))).collect()
}

fn requirement(value: Json, at: &str) -> Result<Requirement, JsonError> {
    let mut fields = value.into_fields(at)?;
    let kind = fields.string("type")?;
    let requirement = match kind.as_str() {
        "insecureAcceptAnything" => Requirement::InsecureAcceptAnything,
        "reject" => Requirement::Reject,
        "signedBy" => Requirement::SignedBy(signed_by(&mut fields)?),
        "sigstoreSigned" => Requirement::SigstoreSigned(Box::new(sigstore_signed(&mut fields)?)),
        other => return Err(JsonError::at(at, format!("'{other:.60}' is not a known requirement type"))),
    };
    fields.finish()?;
    Ok(requirement)
}

fn identity(fields: &mut Fields) -> Result<SignedIdentity, JsonError> {
    let place = fields.place("signedIdentity");
    SignedIdentity::parse(fields.take("signedIdentity"), &place)
}

fn signed_by(fields: &mut Fields) -> Result<SignedBy, JsonError> {
    let key_type = fields.string("keyType")?;
    if key_type != "GPGKeys" {
        let problem = format!("'{key_type:.60}' is not a known keyType (GPGKeys is)");
        return Err(JsonError::at(&fields.place("keyType"), problem));
    }
    let names = SourceNames { path: "keyPath", paths: Some("keyPaths"), data: "keyData", datas: None };
    let keyrings = take_sources(fields, &names)?
        .ok_or_else(|| JsonError::at(fields.at(), "one of keyPath, keyPaths and keyData must be there"))?;
    Ok(SignedBy { keyrings, identity: identity(fields)? })
}

fn sigstore_signed(fields: &mut Fields) -> Result<SigstoreSigned, JsonError> {
    let names = SourceNames { path: "keyPath", paths: Some("keyPaths"), data: "keyData", datas: Some("keyDatas") };
    let keys = take_sources(fields, &names)?;
    let names = SourceNames {
        path: "rekorPublicKeyPath",
        paths: Some("rekorPublicKeyPaths"),
        data: "rekorPublicKeyData",
        datas: Some("rekorPublicKeyDatas"),
    };
    let rekor = take_sources(fields, &names)?.unwrap_or_default();
    let place = fields.place("fulcio");
    let fulcio = fields.take("fulcio").map(|value| value.into_fields(&place).and_then(parse_fulcio)).transpose()?;
    let place = fields.place("pki");
    let pki = fields.take("pki").map(|value| value.into_fields(&place).and_then(parse_pki)).transpose()?;
    let authority = match (keys, fulcio, pki) {
        (Some(keys), None, None) => Authority::Keys(keys),
        (None, Some(fulcio), None) if !rekor.is_empty() => fulcio,
        (None, Some(_), None) => {
            return Err(JsonError::at(
                fields.at(),
                "fulcio needs a rekorPublicKey: only the log tells when it was signed",
            ));
        }
        (None, None, Some(pki)) if rekor.is_empty() => pki,
        (None, None, Some(_)) => return Err(JsonError::at(fields.at(), "pki and a rekorPublicKey cannot be combined")),
        _ => {
            let problem = "exactly one of keyPath, keyPaths, keyData, keyDatas, fulcio and pki must be there";
            return Err(JsonError::at(fields.at(), problem));
        }
    };
    Ok(SigstoreSigned { authority, rekor, identity: identity(fields)? })
}

fn parse_fulcio(mut fields: Fields) -> Result<Authority, JsonError> {
    let names = SourceNames { path: "caPath", paths: None, data: "caData", datas: None };
    let ca = one(take_sources(&mut fields, &names)?)
        .ok_or_else(|| JsonError::at(fields.at(), "one of caPath and caData must be there"))?;
    let (oidc_issuer, subject_email) = (fields.string("oidcIssuer")?, fields.string("subjectEmail")?);
    if oidc_issuer.is_empty() || subject_email.is_empty() {
        return Err(JsonError::at(fields.at(), "oidcIssuer and subjectEmail must not be empty"));
    }
    fields.finish()?;
    Ok(Authority::Fulcio { ca, oidc_issuer, subject_email })
}

fn parse_pki(mut fields: Fields) -> Result<Authority, JsonError> {
    let names = SourceNames { path: "caRootsPath", paths: None, data: "caRootsData", datas: None };
    let roots = one(take_sources(&mut fields, &names)?)
        .ok_or_else(|| JsonError::at(fields.at(), "one of caRootsPath and caRootsData must be there"))?;
    let names = SourceNames { path: "caIntermediatesPath", paths: None, data: "caIntermediatesData", datas: None };
    let intermediates = one(take_sources(&mut fields, &names)?);
    let subject_email = fields.optional_string("subjectEmail")?;
    let subject_hostname = fields.optional_string("subjectHostname")?;
    let empty = |text: &Option<String>| text.as_deref().is_some_and(str::is_empty);
    if empty(&subject_email) || empty(&subject_hostname) || (subject_email.is_none() && subject_hostname.is_none()) {
        return Err(JsonError::at(fields.at(), "subjectEmail or subjectHostname must be there and not empty"));
    }
    fields.finish()?;
    Ok(Authority::Pki { roots, intermediates, subject_email, subject_hostname })
}

fn one(sources: Option<Vec<Material>>) -> Option<Material> {
    sources.and_then(|mut sources| sources.pop())
}
