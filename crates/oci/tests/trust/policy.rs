//! policy.json: what is read, what is refused, and which rule applies to which image.

use nacre_oci::{
    reference::Location,
    trust::{Authority, POLICY_LIMIT, Policy, PolicyError, Requirement, SignedIdentity},
};

use crate::support::Case;

fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse(text.as_bytes(), "p.json")
}

fn with(requirement: &str) -> Result<Policy, PolicyError> {
    parse(&format!(r#"{{"default":[{requirement}]}}"#))
}

#[test]
fn every_requirement_is_read() {
    for text in [
        r#"{"type":"insecureAcceptAnything"}"#,
        r#"{"type":"reject"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPaths":["/k","kbs:///a/b/c"]}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyData":"QUJD","signedIdentity":{"type":"matchExact"}}"#,
        r#"{"type":"sigstoreSigned","keyPath":"kbs:///a/b/c"}"#,
        r#"{"type":"sigstoreSigned","keyPaths":["/a"],"rekorPublicKeyPath":"/r"}"#,
        r#"{"type":"sigstoreSigned","keyData":"QUJD","rekorPublicKeyData":"QUJD"}"#,
        r#"{"type":"sigstoreSigned","keyDatas":["QUJD","QUJD"],"rekorPublicKeyDatas":["QUJD"]}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","oidcIssuer":"i","subjectEmail":"e"},"rekorPublicKeyPaths":["/r"]}"#,
        r#"{"type":"sigstoreSigned","pki":{"caRootsPath":"/c","subjectHostname":"h"}}"#,
        r#"{"type":"sigstoreSigned","pki":{"caRootsData":"QUJD","caIntermediatesPath":"/i","subjectEmail":"e"}}"#,
    ] {
        with(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    let policy = with(r#"{"type":"sigstoreSigned","keyPath":"/k"}"#).unwrap();
    let location: Location = "docker://busybox".parse().unwrap();
    let applicable = policy.lookup(&location);
    let [Requirement::SigstoreSigned(signed)] = applicable.requirements else { panic!("{applicable:?}") };
    assert!(matches!(&signed.authority, Authority::Keys(keys) if keys.len() == 1));
    assert_eq!(signed.identity, SignedIdentity::MatchRepoDigestOrExact);
}

#[test]
fn what_is_no_policy_is_refused() {
    for text in [
        "",
        "{}",
        "[]",
        "null",
        r#"{"default":[]}"#,
        r#"{"default":{}}"#,
        r#"{"default":null}"#,
        r#"{"default":[{"type":"reject"}],"default":[{"type":"insecureAcceptAnything"}]}"#,
        r#"{"default":[{"type":"reject"}],"Transports":{}}"#,
        r#"{"default":[{"type":"reject"}],"transports":[]}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":[]}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[]}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a*":[{"type":"reject"}]}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"dir":{"a":[{"type":"reject"}]}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"unknown":{"a":[{"type":"x"}]}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[{"type":"reject"}],"a":[{"type":"reject"}]}}}"#,
        r#"{"default":[{"type":"reject"}]} x"#,
        r#"{"default":[{"type":"reject"}],}"#,
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with("p.json: "), "{error}");
    }
    let long = " ".repeat(POLICY_LIMIT) + r#"{"default":[{"type":"reject"}]}"#;
    assert!(matches!(parse(&long), Err(PolicyError::TooLarge { .. })));
}

#[test]
fn what_is_no_requirement_is_refused() {
    let many = vec![r#"{"type":"reject"}"#; 65].join(",");
    for text in [
        "1",
        "{}",
        r#"{"type":"accept"}"#,
        r#"{"type":"reject","x":1}"#,
        r#"{"type":"insecureAcceptAnything","signedIdentity":{"type":"matchExact"}}"#,
        r#"{"type":"reject","type":"insecureAcceptAnything"}"#,
        r#"{"type":"signedBy"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys"}"#,
        r#"{"type":"signedBy","keyPath":"/k"}"#,
        r#"{"type":"signedBy","keyType":"X509Certificates","keyPath":"/k"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k","keyData":"QUJD"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":""}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"kbs://bad"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPaths":[]}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPaths":[1]}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPaths":"/k"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyData":"!"}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyData":""}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":null}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyDatas":["QUJD"]}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k","signedIdentity":null}"#,
        r#"{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k","signedIdentity":{"type":"x"}}"#,
        r#"{"type":"sigstoreSigned"}"#,
        r#"{"type":"sigstoreSigned","keyType":"GPGKeys","keyPath":"/k"}"#,
        r#"{"type":"sigstoreSigned","keyPath":"/k","keyPaths":["/k"]}"#,
        r#"{"type":"sigstoreSigned","keyPath":"/k","rekorPublicKeyPath":"/r","rekorPublicKeyData":"QUJD"}"#,
        r#"{"type":"sigstoreSigned","keyPath":"/k","pki":{"caRootsPath":"/c","subjectEmail":"e"}}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","oidcIssuer":"i","subjectEmail":"e"}}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","oidcIssuer":"","subjectEmail":"e"},"rekorPublicKeyPath":"/r"}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","oidcIssuer":"i"},"rekorPublicKeyPath":"/r"}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","caData":"QUJD","oidcIssuer":"i","subjectEmail":"e"},"rekorPublicKeyPath":"/r"}"#,
        r#"{"type":"sigstoreSigned","fulcio":{"caPath":"/c","oidcIssuer":"i","subjectEmail":"e","x":1},"rekorPublicKeyPath":"/r"}"#,
        r#"{"type":"sigstoreSigned","pki":{"caRootsPath":"/c"}}"#,
        r#"{"type":"sigstoreSigned","pki":{"caRootsPath":"/c","subjectEmail":""}}"#,
        r#"{"type":"sigstoreSigned","pki":{"subjectEmail":"e"}}"#,
        r#"{"type":"sigstoreSigned","pki":{"caRootsPath":"/c","subjectEmail":"e"},"rekorPublicKeyPath":"/r"}"#,
        many.as_str(),
    ] {
        assert!(with(text).is_err(), "{text}");
    }
}

#[test]
fn the_most_specific_scope_alone_applies() {
    let scopes = ["r.example:5000/a/b:v1", "r.example:5000/a/b", "r.example:5000/a", "r.example:5000", "*.example", ""];
    let mut docker = serde_json::Map::new();
    for scope in scopes {
        docker.insert(scope.into(), serde_json::json!([{"type": "reject"}]));
    }
    let policy = |docker: &serde_json::Map<String, serde_json::Value>| {
        let json =
            serde_json::json!({"default": [{"type": "insecureAcceptAnything"}], "transports": {"docker": docker}});
        parse(&json.to_string()).unwrap()
    };
    let location: Location = "docker://r.example:5000/a/b:v1".parse().unwrap();
    for scope in scopes {
        let policy = policy(&docker);
        let applicable = policy.lookup(&location);
        assert_eq!(applicable.scope, Some(("docker", scope)));
        docker.remove(scope);
    }
    assert_eq!(policy(&docker).lookup(&location).scope, None);
}

#[test]
fn a_prefix_ends_at_a_component() {
    let text = r#"{"default":[{"type":"reject"}],"transports":{"docker":{
        "r.example/team":[{"type":"insecureAcceptAnything"}],"*.corp.example":[{"type":"insecureAcceptAnything"}]}}}"#;
    let policy = parse(text).unwrap();
    for (image, accepted) in [
        ("docker://r.example/team/app", true),
        ("docker://r.example/team/deep/er/app", true),
        ("docker://r.example/team", true),
        ("docker://r.example/teams/app", false),
        ("docker://r.example/team-evil/app", false),
        ("docker://r.example:443/team/app", false),
        ("docker://r.example.evil.test/team/app", false),
        ("docker://evil.test/r.example/team/app", false),
        ("docker://a.corp.example/x", true),
        ("docker://a.b.corp.example:5000/x", true),
        ("docker://corp.example/x", false),
        ("docker://evilcorp.example/x", false),
        ("docker://corp.example.evil.test/x", false),
        ("oci:/r.example/team", false),
    ] {
        let location: Location = image.parse().unwrap();
        let accepts = policy.lookup(&location).requirements == [Requirement::InsecureAcceptAnything];
        assert_eq!(accepts, accepted, "{image}");
    }
}

#[test]
fn a_refusal_names_the_rule_and_its_file() {
    let mut case = Case::new(&serde_json::json!({"type": "insecureAcceptAnything"}));
    assert!(!case.evaluate().unwrap().is_signed());
    case.policy = r#"{"default":[{"type":"insecureAcceptAnything"}],"transports":{"docker":{"r.example":[
        {"type":"insecureAcceptAnything"},{"type":"reject"}]}}}"#
        .into();
    case.refused(&["docker://r.example/app:v1", "requirement 2 (reject) of transports.docker[\"r.example\"]"]);
}

#[test]
fn the_digest_that_was_asked_for_is_checked_too() {
    let mut case = Case::new(&serde_json::json!({"type": "insecureAcceptAnything"}));
    case.requested = format!("docker://r.example/app@{}", case.image().digest());
    assert!(case.evaluate().is_ok());
    case.requested = format!("docker://r.example/app@{}", nacre_core::Digest::sha256(b"other"));
    assert!(case.evaluate().unwrap_err().to_string().contains("digest mismatch"));
    case.chain.clear();
    assert!(case.evaluate().is_err());
}

#[test]
fn no_policy_must_be_chosen_by_name() {
    let location: Location = "docker://busybox".parse().unwrap();
    assert_eq!(
        Policy::insecure_accept_anything().lookup(&location).requirements,
        [Requirement::InsecureAcceptAnything]
    );
    assert_eq!(Policy::reject_everything().lookup(&location).requirements, [Requirement::Reject]);
}
