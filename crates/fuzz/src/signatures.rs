//! Policies, signatures, and what is signed or encrypted with JOSE.

use nacre_core::{
    Digest,
    jose::{self, Jwe},
};
use nacre_oci::{
    reference::{ImageRef, Location},
    trust::{Bundle, LookasideConfig, Payload, PayloadType, Policy, Promise, SignedMessage},
};

use crate::texts;

pub(crate) fn policy(bytes: &[u8]) {
    let Ok(policy) = Policy::parse(bytes, "policy.json") else { return };
    for requested in ["docker://registry.example/team/app:1", "oci:/a/b:c", "docker-archive:/a.tar:a:b", "dir:/a"] {
        if let Ok(location) = requested.parse::<Location>() {
            let _ = policy.lookup(&location).place();
        }
    }
}

pub(crate) fn policies() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"default":[{"type":"reject"}]}"#,
        r#"{"default":[{"type":"insecureAcceptAnything"}],"transports":{"docker":{"registry.example/team":[{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k.gpg","signedIdentity":{"type":"matchRepoDigestOrExact"}}],"*.example":[{"type":"reject"}]}}}"#,
        r#"{"default":[{"type":"sigstoreSigned","keyPath":"/k.pub","signedIdentity":{"type":"remapIdentity","prefix":"a.example","signedPrefix":"b.example"}}]}"#,
        r#"{"default":[{"type":"sigstoreSigned","keyData":"LS0t","rekorPublicKeyPath":"/r.pub","signedIdentity":{"type":"exactReference","dockerReference":"a.example/b:c"}}],"transports":{"oci":{"/a":[{"type":"reject"}]},"dir":{"":[{"type":"reject"}]}}}"#,
        r#"{"default":[{"type":"sigstoreSigned","fulcio":{"caPath":"/ca","oidcIssuer":"https://i","subjectEmail":"a@b"},"rekorPublicKeyData":"LS0t"}]}"#,
        r#"{"default":[{"type":"reject"},{"type":"reject","x":1}],"default":[]}"#,
        r#"{"default":[]}"#,
    ])
}

pub(crate) fn lookaside(bytes: &[u8]) {
    let mut config = LookasideConfig::default();
    if config.add("a.yaml", bytes).is_err() || config.add("b.yaml", bytes).is_err() {
        return;
    }
    if let Ok(image) = "registry.example/team/app:1".parse::<ImageRef>() {
        let manifest = Digest::sha256(b"");
        let _ = (config.read_url(&image, &manifest, 1), config.write_url(&image, &manifest, 1));
        let _ = config.use_sigstore_attachments(&image);
    }
}

pub(crate) fn lookasides() -> Vec<Vec<u8>> {
    let bomb = (0..9).fold("a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, n| {
        let line = format!("a{}: &a{} [{}]\n", n + 1, n + 1, vec![format!("*a{n}"); 9].join(","));
        text + &line
    });
    let mut seeds = texts(&[
        "default-docker:\n  lookaside: https://l.example/sigstore\n",
        "docker:\n  registry.example/team:\n    lookaside: file:///a\n    lookaside-staging: file:///b\n    use-sigstore-attachments: true\n",
        "# nothing\n",
        "docker: {a.example: {sigstore: 'http://x/y?z'}}\n",
        "docker: &a {b: *a}\n",
    ]);
    seeds.push(bomb.into_bytes());
    seeds
}

pub(crate) fn payload(bytes: &[u8]) {
    let _ = Payload::parse(bytes, PayloadType::Gpg);
    let _ = Payload::parse(bytes, PayloadType::Cosign);
}

pub(crate) fn payloads() -> Vec<Vec<u8>> {
    let digest = Digest::sha256(b"");
    let make = |kind: &str, optional: &str| {
        format!(
            r#"{{"critical":{{"type":"{kind}","image":{{"docker-manifest-digest":"{digest}"}},"identity":{{"docker-reference":"registry.example/a:b"}}}},"optional":{optional}}}"#
        )
    };
    let (gpg, cosign) = ("atomic container signature", "cosign container image signature");
    let all = [
        make(gpg, r#"{"creator":"x","timestamp":1}"#),
        make(cosign, "null"),
        make(cosign, "{}"),
        make(gpg, "{},\"critical\":{}"),
    ];
    all.map(String::into_bytes).to_vec()
}

pub(crate) fn bundle(bytes: &[u8]) {
    let _ = Bundle::parse(bytes);
    let _ = Promise::parse(bytes);
}

pub(crate) fn bundles() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"},"tlogEntries":[]},"messageSignature":{"messageDigest":{"algorithm":"SHA2_256","digest":"AAAA"},"signature":"MEUCIQ=="}}"#,
        r#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"certificate":{"rawBytes":"MIIB"},"tlogEntries":[{"logIndex":"1","logId":{"keyId":"AA=="},"integratedTime":"1","inclusionPromise":{"signedEntryTimestamp":"AA=="},"canonicalizedBody":"e30="}]},"dsseEnvelope":{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"AA=="}]}}"#,
        r#"{"SignedEntryTimestamp":"AA==","Payload":{"body":"e30=","integratedTime":1,"logIndex":1,"logID":"aa"}}"#,
    ])
}

pub(crate) fn openpgp(bytes: &[u8]) {
    let _ = SignedMessage::parse(bytes);
    let _ = nacre_oci::trust::Keyring::parse(bytes);
}

pub(crate) fn openpgps() -> Vec<Vec<u8>> {
    // One-pass signature, literal data, signature: packets of new and old format, with wrong and indefinite lengths.
    let one_pass = b"\xc4\x0d\x03\x00\x08\x01\x11\x22\x33\x44\x55\x66\x77\x88\x01".to_vec();
    let literal = b"\xcb\x0bb\x00\0\0\0\0hello".to_vec();
    let signature = b"\xc2\x20\x04\x00\x01\x08\x00\x06\x05\x02\x5f\x00\x00\x00\x00\x0a\x09\x10\x11\x22\x33\x44\x55\x66\x77\x88\xab\xcd\x00\x08\xff\x00\x00\x00".to_vec();
    let key = b"\x98\x33\x04\x5f\x00\x00\x00\x16\x09\x2b\x06\x01\x04\x01\xda\x47\x0f\x01\x01\x07\x40\xaa\xaa\xaa\xaa"
        .to_vec();
    vec![
        [one_pass.clone(), literal.clone(), signature.clone()].concat(),
        [b"\xa3\x02".to_vec(), literal.clone()].concat(),
        b"\xcb\xff\xff\xff\xff\xffb\0".to_vec(),
        b"\xcb\xe5b\0\0\0".to_vec(),
        [key, b"\xb4\x05alice".to_vec(), signature].concat(),
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDMEXw==\n=AAAA\n-----END PGP PUBLIC KEY BLOCK-----\n".to_vec(),
        b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nx\n".to_vec(),
        [one_pass, literal].concat(),
    ]
}

pub(crate) fn jose(bytes: &[u8]) {
    if let Ok(jwe) = Jwe::parse(bytes) {
        let _ = Jwe::parse(jwe.to_json().as_bytes());
        let _ = jwe.decrypt(&[]);
    }
    let _ = jose::PublicKey::from_bytes(bytes);
    let _ = jose::PrivateKey::from_bytes(bytes);
    if let Ok(jwk) = serde_json::from_slice::<jose::Jwk>(bytes) {
        let _ = (jwk.to_public().is_ok(), jwk.to_private().is_ok(), jwk.thumbprint().is_ok());
    }
}

pub(crate) fn joses() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"protected":"eyJlbmMiOiJBMjU2R0NNIn0","header":{"alg":"RSA-OAEP"},"encrypted_key":"AAAA","iv":"AAAAAAAAAAAAAAAA","ciphertext":"AAAA","tag":"AAAAAAAAAAAAAAAAAAAAAA"}"#,
        r#"{"protected":"eyJlbmMiOiJBMjU2R0NNIn0","recipients":[{"header":{"alg":"ECDH-ES+A256KW","epk":{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}},"encrypted_key":"AAAA"}],"iv":"AA","ciphertext":"","tag":"AA"}"#,
        "eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.AAAA.AAAAAAAAAAAAAAAA.AAAA.AAAAAAAAAAAAAAAAAAAAAA",
        r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#,
        r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#,
        "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n",
        "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIA==\n-----END EC PRIVATE KEY-----\n",
    ])
}
