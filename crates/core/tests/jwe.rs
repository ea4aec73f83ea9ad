//! JWE against the RFC's vector, through every serialisation, and against everything that was done to it on the way.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::process::Command;

use nacre_core::jose::{JoseError, Jwe, Jwk, KeyAlgorithm, PrivateKey, PublicKey, Recipient, b64, encrypt};

/// RFC 7516 appendix A.1: RSA-OAEP and A256GCM.
const RFC_KEY: &str = concat!(
    r#"{"kty":"RSA","n":"oahUIoWw0K0usKNuOR6H4wkf4oBUXHTxRvgb48E-BVvxkeDNjbC4he8rUWcJoZmds2h7M70imEVhRU5djINXtqllXI4DFqcI1DgjT9LewND8MW2Krf3Spsk_ZkoFnilakGygTwpZ3uesH-PFABNIUYpOiN15dsQRkgr0vEhxN92i2asbOenSZeyaxziK72UwxrrKoExv6kc5twXTq4h-QChLOln0_mtUZwfsRaMStPs6mS6XrgxnxbWhojf663tuEQueGC-FCMfra36C9knDFGzKsNa7LZK2djYgyD3JR_MB_4NUJW_TqOQtwHYbxevoJArm-L5StowjzGy-_bq6Gw","e":"AQAB","#,
    r#""d":"kLdtIj6GbDks_ApCSTYQtelcNttlKiOyPzMrXHeI-yk1F7-kpDxY4-WY5NWV5KntaEeXS1j82E375xxhWMHXyvjYecPT9fpwR_M9gV8n9Hrh2anTpTD93Dt62ypW3yDsJzBnTnrYu1iwWRgBKrEYY46qAZIrA2xAwnm2X7uGR1hghkqDp0Vqj3kbSCz1XyfCs6_LehBwtxHIyh8Ripy40p24moOAbgxVw3rxT_vlt3UVe4WO3JkJOzlpUf-KTVI2Ptgm-dARxTEtE-id-4OJr0h-K-VFs3VSndVTIznSxfyrj8ILL6MG_Uv8YAu7VILSB3lOW085-4qE3DzgrTjgyQ","#,
    r#""p":"1r52Xk46c-LsfB5P442p7atdPUrxQSy4mti_tZI3Mgf2EuFVbUoDBvaRQ-SWxkbkmoEzL7JXroSBjSrK3YIQgYdMgyAEPTPjXv_hI2_1eTSPVZfzL0lffNn03IXqWF5MDFuoUYE0hzb2vhrlN_rKrbfDIwUbTrjjgieRbwC6Cl0","#,
    r#""q":"wLb35x7hmQWZsWJmB_vle87ihgZ19S8lBEROLIsZG4ayZVe9Hi9gDVCOBmUDdaDYVTSNx_8Fyw1YYa9XGrGnDew00J28cRUoeBB_jKI1oma0Orv1T9aXIWxKwd4gvxFImOWr3QRL9KEBRzk2RatUBnmDZJTIAfwTs0g68UZHvtc","#,
    r#""dp":"ZK-YwE7diUh0qR1tR7w8WHtolDx3MZ_OTowiFvgfeQ3SiresXjm9gZ5KLhMXvo-uz-KUJWDxS5pFQ_M0evdo1dKiRTjVw_x4NyqyXPM5nULPkcpU827rnpZzAJKpdhWAgqrXGKAECQH0Xt4taznjnd_zVpAmZZq60WPMBMfKcuE","#,
    r#""dq":"Dq0gfgJ1DdFGXiLvQEZnuKEN0UUmsJBxkjydc3j4ZYdBiMRAy86x0vHCjywcMlYYg4yoC4YZa9hNVcsjqA3FeiL19rk8g6Qn29Tt0cj8qqyFpz9vNDBUfCAiJVeESOjJDZPYHdHY8v1b-o-Z2X5tvLx-TCekf7oxyeKDUqKWjis","#,
    r#""qi":"VIMpMYbPf47dT1w_zDUXfPimsSegnMOA1zTaX7aGk_8urY6R8-ZW1FxU7AlWAyLWybqq6t16VFd7hQd0y6flUK4SlOydB61gwanOsXGOAOv82cHq0E3eL4HrtZkUuKvnPrMnsUUFlfUdybVzxyjz9JF_XyaY14ardLSjf4L_FNY"}"#
);
const RFC_JWE: &str = "eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.OKOawDo13gRp2ojaHV7LFpZcgV7T6DVZKTyKOMTYUmKoTCVJRgckCL9kiMT03JGeipsEdY3mx_etLbbWSrFr05kLzcSr4qKAq7YN7e9jwQRb23nfa6c9d-StnImGyFDbSv04uVuxIp5Zms1gNxKKK2Da14B8S4rzVRltdYwam_lDp5XnZAYpQdb76FdIKLaVmqgfwX7XWRxv2322i-vDxRfqNzo_tETKzpVLzfiwQyeyPGLBIO56YJ7eObdv0je81860ppamavo35UgoRdbYaBcoh9QcfylQr66oc6vFWXRcZ_ZT2LawVCWTIy3brGPi6UklfCpIMfIjf7iGdXKHzg.48V1_ALb6US04U3b.5eym8TW_c8SuK0ltJ3rpYIzOeDQz7TALvtu6UG9oMo4vpzs9tX_EFShS8iB7j6jiSdiwkIr3ajwQzaBtQD_A.XFBoMYUZodetZdvTiFvSkQ";

fn rsa() -> PrivateKey {
    PrivateKey::from_bytes(RFC_KEY.as_bytes()).unwrap()
}

fn opens(jwe: &Jwe, keys: &[PrivateKey]) -> bool {
    jwe.decrypt(keys).is_ok_and(|plain| plain.expose() == b"secret")
}

#[test]
fn rfc7516_appendix_a1_decrypts() {
    let jwe = Jwe::parse(RFC_JWE.as_bytes()).unwrap();
    let plain = jwe.decrypt(&[PrivateKey::generate_p256(), rsa()]).unwrap();
    assert_eq!(plain.expose(), b"The true sign of intelligence is not knowledge but imagination.");
    assert_eq!(jwe.to_compact().unwrap(), RFC_JWE);
}

#[test]
fn every_key_kind_round_trips_in_every_form() {
    for (key, algorithm) in [
        (PrivateKey::generate_p256(), KeyAlgorithm::EcdhEsA256Kw),
        (PrivateKey::generate_p384(), KeyAlgorithm::EcdhEsA256Kw),
        (PrivateKey::generate_p521(), KeyAlgorithm::EcdhEsA256Kw),
        (rsa(), KeyAlgorithm::RsaOaep),
        (rsa(), KeyAlgorithm::RsaOaep256),
    ] {
        let jwe = encrypt(b"secret", &[Recipient::new(&key.public()).algorithm(algorithm).kid("name")]).unwrap();
        let keys = [key];
        assert!(opens(&jwe, &keys));
        assert_eq!(Jwe::parse(jwe.to_json().as_bytes()).unwrap(), jwe);
        assert_eq!(Jwe::parse(jwe.to_compact().unwrap().as_bytes()).unwrap(), jwe);
        assert!(matches!(
            jwe.decrypt(&[PrivateKey::generate_p256(), PrivateKey::generate_p521()]),
            Err(JoseError::NoKeyFits { keys: 2, recipients: 1 })
        ));
    }
}

#[test]
fn several_recipients_each_open_the_general_form() {
    let keys = [PrivateKey::generate_p256(), PrivateKey::generate_p521(), rsa()];
    let publics: Vec<PublicKey> = keys.iter().map(PrivateKey::public).collect();
    let recipients: Vec<Recipient<'_>> = publics.iter().map(Recipient::new).collect();
    let text = encrypt(b"secret", &recipients).unwrap().to_json();
    let jwe = Jwe::parse(text.as_bytes()).unwrap();
    for key in keys {
        assert!(opens(&jwe, &[key]));
    }
    assert!(jwe.to_compact().is_err());
    assert!(text.contains(r#""recipients":["#) && !text.contains(r#"}],"encrypted_key""#));
}

/// Trustee's client parses the protected header and writes it again before it uses it as associated data.
#[test]
fn the_flattened_header_has_the_order_that_the_reference_client_writes() {
    let key = PrivateKey::generate_p256();
    let value: serde_json::Value =
        serde_json::from_str(&encrypt(b"secret", &[Recipient::new(&key.public())]).unwrap().to_json()).unwrap();
    let header = String::from_utf8(b64::decode(value["protected"].as_str().unwrap()).unwrap()).unwrap();
    assert!(
        header.starts_with(r#"{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{"crv":"P-256","kty":"EC","x":""#),
        "{header}"
    );
    let members: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    for member in ["protected", "encrypted_key", "iv", "ciphertext", "tag"] {
        assert!(members.contains(&member));
    }
    assert_eq!(members.len(), 5);
}

#[test]
fn every_changed_part_is_seen() {
    let keys = [PrivateKey::generate_p256()];
    let good: serde_json::Value =
        serde_json::from_str(&encrypt(b"secret", &[Recipient::new(&keys[0].public())]).unwrap().to_json()).unwrap();
    for part in ["encrypted_key", "iv", "ciphertext", "tag"] {
        let bytes = b64::decode(good[part].as_str().unwrap()).unwrap();
        for index in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[index] ^= 1;
            let mut changed = good.clone();
            changed[part] = b64::encode(bad).into();
            assert!(Jwe::parse(changed.to_string().as_bytes()).unwrap().decrypt(&keys).is_err(), "{part} {index}");
        }
        for length in 0..bytes.len() {
            let mut changed = good.clone();
            changed[part] = b64::encode(&bytes[..length]).into();
            let refused = Jwe::parse(changed.to_string().as_bytes()).map_or(true, |jwe| jwe.decrypt(&keys).is_err());
            assert!(refused, "{part} cut to {length}");
        }
    }
    // The same header in other words is another header.
    let header = String::from_utf8(b64::decode(good["protected"].as_str().unwrap()).unwrap()).unwrap();
    let mut changed = good.clone();
    changed["protected"] = b64::encode(header.replace(r#","enc""#, r#", "enc""#)).into();
    assert_eq!(
        Jwe::parse(changed.to_string().as_bytes()).unwrap().decrypt(&keys).unwrap_err(),
        JoseError::ContentTampered
    );
    let mut changed = good;
    changed["aad"] = "eA".into();
    assert!(Jwe::parse(changed.to_string().as_bytes()).unwrap().decrypt(&keys).is_err());
}

#[test]
fn headers_that_are_not_ours_to_accept_are_refused() {
    let epk = serde_json::to_string(&Jwk::from_public(&PrivateKey::generate_p256().public())).unwrap();
    let jwe = |protected: &str, rest: &str| {
        format!(
            r#"{{"protected":"{}","iv":"AAAAAAAAAAAAAAAA","ciphertext":"","tag":"AAAAAAAAAAAAAAAAAAAAAA"{rest}}}"#,
            b64::encode(protected)
        )
    };
    let fine = r#"{"alg":"RSA-OAEP","enc":"A256GCM"}"#;
    assert!(Jwe::parse(jwe(fine, r#","encrypted_key":"AA""#).as_bytes()).is_ok());
    for bad in [
        String::new(),
        "{}".into(),
        "[]".into(),
        "a.b.c.d".into(),
        "a.b.c.d.e.f".into(),
        "....".into(),
        "\u{fffd}".into(),
        jwe("", ""),
        jwe("x", ""),
        jwe("[]", ""),
        jwe(r#"{"alg":"RSA-OAEP"}"#, ""),
        jwe(r#"{"alg":"RSA-OAEP","enc":"A128GCM"}"#, ""),
        jwe(r#"{"alg":"RSA-OAEP","enc":"A256GCM","enc":"A256GCM"}"#, ""),
        jwe(r#"{"alg":"RSA-OAEP","enc":"A256GCM","zip":"DEF"}"#, ""),
        jwe(r#"{"alg":"RSA-OAEP","enc":"A256GCM","crit":["x"]}"#, ""),
        jwe(fine, r#","header":{"alg":"RSA-OAEP"}"#),
        jwe(fine, r#","unprotected":{"enc":"A256GCM"}"#),
        jwe(fine, r#","header":{"crit":["x"]}"#),
        jwe(fine, r#","recipients":[]"#),
        jwe(fine, r#","recipients":[{}],"encrypted_key":"AA""#),
        jwe(fine, &format!(r#","recipients":[{}{{}}]"#, "{},".repeat(64))),
        jwe(fine, r#","encrypted_key":"A===""#),
        jwe(fine, r#","iv":"AAAA""#),
        jwe(&format!(r#"{{"alg":"RSA-OAEP","enc":"A256GCM","pad":"{}"}}"#, "x".repeat(20000)), ""),
    ] {
        assert!(Jwe::parse(bad.as_bytes()).is_err(), "{bad:.200}");
    }
    // Well-formed, but nothing that a key opens: unknown algorithms, a direct key, an epk of another curve, of none, or off the curve.
    let keys = [PrivateKey::generate_p256(), PrivateKey::generate_p384()];
    for alg in ["RSA1_5", "dir", "ECDH-ES", "A256KW", "PBES2-HS256+A128KW", "none"] {
        let text = jwe(&format!(r#"{{"alg":"{alg}","enc":"A256GCM"}}"#), r#","encrypted_key":"""#);
        let error = Jwe::parse(text.as_bytes()).unwrap().decrypt(&keys).unwrap_err();
        assert!(matches!(error, JoseError::Unsupported { .. }), "{alg}: {error}");
    }
    let wrapped = b64::encode([0; 40]);
    for epk in [
        epk.clone(),
        epk.replace("P-256", "P-384"),
        epk.replace("EC", "RSA"),
        r#"{"crv":"P-256","kty":"EC","x":"","y":""}"#.into(),
        format!(r#"{{"crv":"P-256","kty":"EC","x":"{0}","y":"{0}"}}"#, b64::encode([0; 32])),
        format!(r#"{{"crv":"P-256","kty":"EC","x":"{0}","y":"{0}"}}"#, b64::encode([0xff; 32])),
    ] {
        let text = jwe(
            &format!(r#"{{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{epk}}}"#),
            &format!(r#","encrypted_key":"{wrapped}""#),
        );
        assert!(Jwe::parse(text.as_bytes()).unwrap().decrypt(&keys).is_err(), "{epk}");
    }
}

#[test]
fn an_algorithm_that_does_not_go_with_the_key_does_not_encrypt() {
    let (ec, rsa) = (PrivateKey::generate_p256().public(), rsa().public());
    for (key, algorithm) in
        [(&ec, KeyAlgorithm::RsaOaep), (&ec, KeyAlgorithm::EcdhEsA128Kw), (&rsa, KeyAlgorithm::EcdhEsA256Kw)]
    {
        let error = encrypt(b"x", &[Recipient::new(key).algorithm(algorithm)]).unwrap_err();
        assert!(matches!(error, JoseError::AlgorithmMismatch { .. }));
    }
    assert!(encrypt(b"x", &[]).is_err());
    assert!(encrypt(b"x", &vec![Recipient::new(&ec); 65]).is_err());
}

/// Keys and certificates as OpenSSL writes them.
#[test]
fn openssl_keys_and_certificates_read() {
    let dir = std::env::temp_dir().join(format!("nacre-jose-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let openssl = |args: &str| {
        Command::new("openssl")
            .args(args.split_whitespace())
            .current_dir(&dir)
            .output()
            .is_ok_and(|out| out.status.success())
    };
    if nacre_testkit::require("openssl").is_none() {
        return;
    }
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    for (curve, kind) in [("prime256v1", "EC P-256"), ("secp384r1", "EC P-384"), ("secp521r1", "EC P-521")] {
        // With its EC PARAMETERS block in front of the SEC1 key.
        assert!(openssl(&format!("ecparam -name {curve} -genkey -out sec1.pem")));
        assert!(openssl("pkey -in sec1.pem -out pkcs8.pem"));
        assert!(openssl("pkey -in sec1.pem -outform DER -out pkcs8.der"));
        assert!(openssl("pkey -in sec1.pem -pubout -out pub.pem"));
        assert!(openssl("req -x509 -key sec1.pem -subj /CN=x -days 2 -out cert.pem"));
        let public = PublicKey::from_bytes(&read("pub.pem")).unwrap();
        assert_eq!(public.kind(), kind);
        assert_eq!(PublicKey::from_bytes(&read("cert.pem")).unwrap(), public);
        for name in ["sec1.pem", "pkcs8.pem", "pkcs8.der"] {
            assert_eq!(PrivateKey::from_bytes(&read(name)).unwrap().public(), public, "{name}");
        }
    }
    assert!(openssl("genrsa -out rsa.pem 2048"));
    assert!(openssl("rsa -in rsa.pem -traditional -out pkcs1.pem"));
    assert!(openssl("rsa -in rsa.pem -RSAPublicKey_out -out pub1.pem"));
    assert!(openssl("rsa -in rsa.pem -pubout -out pub.pem"));
    assert!(openssl("pkey -in rsa.pem -aes256 -passout pass:x -out encrypted.pem"));
    assert!(openssl("rsa -in rsa.pem -traditional -aes256 -passout pass:x -out encrypted1.pem"));
    let public = PublicKey::from_bytes(&read("pub.pem")).unwrap();
    assert_eq!(PublicKey::from_bytes(&read("pub1.pem")).unwrap(), public);
    for name in ["rsa.pem", "pkcs1.pem"] {
        let key = PrivateKey::from_bytes(&read(name)).unwrap();
        assert_eq!(key.public(), public);
        assert!(opens(&encrypt(b"secret", &[Recipient::new(&public)]).unwrap(), &[key]));
    }
    for name in ["encrypted.pem", "encrypted1.pem"] {
        assert_eq!(PrivateKey::from_bytes(&read(name)).unwrap_err(), JoseError::EncryptedKey, "{name}");
    }
    assert!(openssl("genrsa -out small.pem 1024"));
    assert!(PrivateKey::from_bytes(&read("small.pem")).is_err());
    assert!(openssl("genpkey -algorithm ed25519 -out ed.pem"));
    assert!(matches!(PrivateKey::from_bytes(&read("ed.pem")), Err(JoseError::Unsupported { .. })));
    let _ = std::fs::remove_dir_all(&dir);
}
