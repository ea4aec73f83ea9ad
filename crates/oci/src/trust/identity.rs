//! `signedIdentity`: which name in a signature is good for which name that was asked for.
//!
//! Semantics are those of containers-policy.json(5). One kind is ours: `matchDigest` accepts whatever name the signature has, or none;
//! it is for sigstore bundles, which sign a digest and no name. Other implementations refuse a policy that has it.

use nacre_core::Digest;

use super::json::{Fields, Json, JsonError};
use crate::reference::{ImageRef, Location};

/// A rule about the name that a signature gives its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SignedIdentity {
    /// The same name, with the same tag or digest.
    MatchExact,
    /// With a tag, the same name and tag; asked for by digest, the same repository. The default.
    MatchRepoDigestOrExact,
    /// The same repository, whatever the tag.
    MatchRepository,
    /// This name, with this tag or digest.
    ExactReference(ImageRef),
    /// This repository, whatever the tag.
    ExactRepository(ImageRef),
    /// `MatchRepoDigestOrExact`, after a prefix of what was asked for was replaced.
    RemapIdentity {
        /// What is replaced, on component boundaries.
        prefix: String,
        /// By what.
        signed_prefix: String,
    },
    /// No rule about the name: the digest is what was signed. Ours; for sigstore bundles.
    MatchDigest,
}

impl SignedIdentity {
    pub(crate) fn parse(value: Option<Json>, at: &str) -> Result<Self, JsonError> {
        let Some(value) = value else { return Ok(Self::MatchRepoDigestOrExact) };
        let mut fields = value.into_fields(at)?;
        let kind = fields.string("type")?;
        let identity = match kind.as_str() {
            "matchExact" => Self::MatchExact,
            "matchRepoDigestOrExact" => Self::MatchRepoDigestOrExact,
            "matchRepository" => Self::MatchRepository,
            "matchDigest" => Self::MatchDigest,
            "exactReference" => {
                let reference = reference(&mut fields, "dockerReference")?;
                if is_name_only(&reference) {
                    return Err(JsonError::at(&fields.place("dockerReference"), "needs a tag or a digest"));
                }
                Self::ExactReference(reference)
            }
            "exactRepository" => {
                let repository = reference(&mut fields, "dockerRepository")?;
                if !is_name_only(&repository) {
                    return Err(JsonError::at(&fields.place("dockerRepository"), "must have no tag and no digest"));
                }
                Self::ExactRepository(repository)
            }
            "remapIdentity" => Self::RemapIdentity {
                prefix: prefix(&mut fields, "prefix")?,
                signed_prefix: prefix(&mut fields, "signedPrefix")?,
            },
            other => return Err(JsonError::at(at, format!("'{other:.60}' is not a known signedIdentity type"))),
        };
        fields.finish()?;
        Ok(identity)
    }

    /// Whether a signature of `signed` is good for `requested`.
    pub(crate) fn accepts(&self, requested: &Location, signed: &ImageRef) -> bool {
        match self {
            Self::MatchDigest => true,
            Self::ExactReference(expected) => expected == signed,
            Self::ExactRepository(expected) => same_repository(expected, signed),
            Self::MatchExact => requested
                .image_ref()
                .is_some_and(|wanted| !is_name_only(wanted) && !is_name_only(signed) && wanted == signed),
            Self::MatchRepoDigestOrExact => requested.image_ref().is_some_and(|wanted| digest_or_exact(wanted, signed)),
            Self::MatchRepository => requested.image_ref().is_some_and(|wanted| same_repository(wanted, signed)),
            Self::RemapIdentity { prefix, signed_prefix } => {
                requested.image_ref().is_some_and(|wanted| match remap(wanted, prefix, signed_prefix) {
                    Some(wanted) => digest_or_exact(&wanted, signed),
                    None => false,
                })
            }
        }
    }

    /// Whether a signature that names no image at all is good for `requested`: only where the rule asks for none, or where the
    /// content itself was asked for by its digest, so that the name has nothing left to decide.
    pub(crate) fn accepts_unnamed(&self, requested: &Location) -> bool {
        match self {
            Self::MatchDigest => true,
            Self::MatchRepoDigestOrExact | Self::MatchRepository => {
                requested.image_ref().is_some_and(|wanted| wanted.digest().is_some())
            }
            Self::MatchExact | Self::ExactReference(_) | Self::ExactRepository(_) | Self::RemapIdentity { .. } => false,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::MatchExact => "matchExact",
            Self::MatchRepoDigestOrExact => "matchRepoDigestOrExact",
            Self::MatchRepository => "matchRepository",
            Self::ExactReference(_) => "exactReference",
            Self::ExactRepository(_) => "exactRepository",
            Self::RemapIdentity { .. } => "remapIdentity",
            Self::MatchDigest => "matchDigest",
        }
    }
}

fn is_name_only(reference: &ImageRef) -> bool {
    reference.tag().is_none() && reference.digest().is_none()
}

fn same_repository(a: &ImageRef, b: &ImageRef) -> bool {
    a.host() == b.host() && a.path() == b.path()
}

/// That the digest of `wanted` is the image's was checked with the manifest; here only names are compared. A name with both tag and
/// digest carries a tag, which must then be the signed one.
fn digest_or_exact(wanted: &ImageRef, signed: &ImageRef) -> bool {
    if is_name_only(signed) || !same_repository(wanted, signed) {
        return false;
    }
    match (wanted.tag(), wanted.digest()) {
        (Some(tag), None) => signed.tag() == Some(tag) && signed.digest().is_none(),
        (Some(tag), Some(digest)) => signed.tag() == Some(tag) && signed.digest().is_none_or(|d: &Digest| d == digest),
        (None, Some(_)) => true,
        (None, None) => false,
    }
}

/// `None` where the remapped name is not a name.
fn remap(wanted: &ImageRef, prefix: &str, signed_prefix: &str) -> Option<ImageRef> {
    let repository = wanted.repository();
    match repository.strip_prefix(prefix) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            wanted.with_repository(&format!("{signed_prefix}{rest}")).ok()
        }
        _ => Some(wanted.clone()),
    }
}

fn reference(fields: &mut Fields, name: &str) -> Result<ImageRef, JsonError> {
    let text = fields.string(name)?;
    text.parse()
        .map_err(|error: crate::reference::ReferenceError| JsonError::at(&fields.place(name), error.to_string()))
}

/// A host, a namespace, or a repository, fully expanded.
fn prefix(fields: &mut Fields, name: &str) -> Result<String, JsonError> {
    let text = fields.string(name)?;
    // A host alone may be without a dot, which only a port tells from the first part of a path.
    let probe = match (text.contains('/'), text.contains(':')) {
        (true, _) => text.clone(),
        (false, true) => format!("{text}/x"),
        (false, false) => format!("{text}:1/x"),
    };
    match probe.parse::<ImageRef>() {
        Ok(reference) if is_name_only(&reference) && reference.repository() == probe => Ok(text),
        _ => Err(JsonError::at(
            &fields.place(name),
            format!("'{text:.100}' is not a registry host, namespace or repository in its full form"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> Result<SignedIdentity, JsonError> {
        SignedIdentity::parse(Some(Json::parse(text.as_bytes())?), "signedIdentity")
    }

    fn accepts(rule: &str, requested: &str, signed: &str) -> bool {
        let requested: Location = requested.parse().unwrap();
        identity(rule).unwrap().accepts(&requested, &signed.parse().unwrap())
    }

    const D: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    #[test]
    fn names_match_as_the_policy_says() {
        let d = format!("docker://r.example/a/b@{D}");
        let td = format!("docker://r.example/a/b:v1@{D}");
        let default = r#"{"type":"matchRepoDigestOrExact"}"#;
        let exact = r#"{"type":"matchExact"}"#;
        let repo = r#"{"type":"matchRepository"}"#;
        for (rule, requested, signed, good) in [
            (default, "docker://r.example/a/b:v1", "r.example/a/b:v1", true),
            (default, "docker://r.example/a/b:v1", "r.example/a/b:v2", false),
            (default, "docker://r.example/a/b:v1", "r.example/a/b", false),
            (default, "docker://r.example/a/b:v1", "r.example/a/bb:v1", false),
            (default, "docker://busybox", "docker.io/library/busybox:latest", true),
            (default, d.as_str(), "r.example/a/b:v9", true),
            (default, d.as_str(), "r.example/a/b", false),
            (default, d.as_str(), "r.example/a/c:v1", false),
            (default, td.as_str(), "r.example/a/b:v1", true),
            (default, td.as_str(), "r.example/a/b:v2", false),
            (default, "oci:/x", "r.example/a/b:v1", false),
            (exact, "docker://r.example/a/b:v1", "r.example/a/b:v1", true),
            (exact, d.as_str(), "r.example/a/b:v1", false),
            (repo, "docker://r.example/a/b:v1", "r.example/a/b:v2", true),
            (repo, "docker://r.example/a/b:v1", "r.example/a/b", true),
            (repo, "docker://r.example/a/b:v1", "r.example/a/c:v1", false),
            (repo, "dir:/x", "r.example/a/b:v1", false),
        ] {
            assert_eq!(accepts(rule, requested, signed), good, "{rule} {requested} {signed}");
        }
    }

    #[test]
    fn fixed_and_remapped_names() {
        let exact = r#"{"type":"exactReference","dockerReference":"v.example/p:1"}"#;
        assert!(accepts(exact, "oci:/x", "v.example/p:1"));
        assert!(!accepts(exact, "docker://v.example/p:2", "v.example/p:2"));
        let repo = r#"{"type":"exactRepository","dockerRepository":"v.example/p"}"#;
        assert!(accepts(repo, "dir:/x", "v.example/p:7"));
        assert!(!accepts(repo, "dir:/x", "v.example/p/q:7"));
        let remap = r#"{"type":"remapIdentity","prefix":"mirror:5000/v","signedPrefix":"v.example"}"#;
        assert!(accepts(remap, "docker://mirror:5000/v/a/b:1", "v.example/a/b:1"));
        assert!(!accepts(remap, "docker://mirror:5000/v/a/b:1", "mirror:5000/v/a/b:1"));
        assert!(!accepts(remap, "docker://mirror:5000/vv/a:1", "v.examplev/a:1"));
        assert!(accepts(remap, "docker://mirror:5000/vv/a:1", "mirror:5000/vv/a:1"));
    }

    #[test]
    fn an_unnamed_signature_needs_a_rule_or_a_digest() {
        let tagged: Location = "docker://r.example/a:v1".parse().unwrap();
        let pinned: Location = format!("docker://r.example/a@{D}").parse().unwrap();
        for (rule, by_tag, by_digest) in [
            (r#"{"type":"matchRepository"}"#, false, true),
            (r#"{"type":"matchRepoDigestOrExact"}"#, false, true),
            (r#"{"type":"matchExact"}"#, false, false),
            (r#"{"type":"exactRepository","dockerRepository":"r.example/a"}"#, false, false),
            (r#"{"type":"matchDigest"}"#, true, true),
        ] {
            let identity = identity(rule).unwrap();
            assert_eq!(
                (identity.accepts_unnamed(&tagged), identity.accepts_unnamed(&pinned)),
                (by_tag, by_digest),
                "{rule}"
            );
        }
    }

    #[test]
    fn rules_that_are_none_are_refused() {
        for text in [
            "{}",
            "[]",
            "null",
            r#"{"type":"matchAnything"}"#,
            r#"{"type":"matchExact","x":1}"#,
            r#"{"type":"exactReference"}"#,
            r#"{"type":"exactReference","dockerReference":"v.example/p"}"#,
            r#"{"type":"exactReference","dockerReference":"UPPER"}"#,
            r#"{"type":"exactRepository","dockerRepository":"v.example/p:1"}"#,
            r#"{"type":"remapIdentity","prefix":"a.example"}"#,
            r#"{"type":"remapIdentity","prefix":"","signedPrefix":"b.example"}"#,
            r#"{"type":"remapIdentity","prefix":"a.example/","signedPrefix":"b.example"}"#,
            r#"{"type":"remapIdentity","prefix":"busybox","signedPrefix":"b.example/x:1"}"#,
        ] {
            assert!(identity(text).is_err(), "{text}");
        }
    }
}
