//! Anchors: what a TPM answers, and how people spell one.

use nacre_anchor::AnchorSpec;
use nacre_tpm::response::{self, Response};

use crate::texts;

/// A response is taken apart by its header and then as each command's; what is found lies within it.
pub(crate) fn tpm_response(bytes: &[u8]) {
    let bodies = match response::parse(bytes) {
        Ok(Response::Plain(body)) => vec![body],
        Ok(Response::Sessions { parameters, nonce, hmac, .. }) => {
            assert!(parameters.len() + nonce.len() + hmac.len() + 19 == bytes.len());
            vec![parameters]
        }
        // Not only what has a good header gets to the bodies' parsers.
        Ok(Response::Refused(_)) | Err(_) => vec![bytes, bytes.get(response::HEADER_LEN..).unwrap_or_default()],
    };
    if let Ok((_, Response::Sessions { parameters, nonce, hmac, .. })) = response::with_handle(bytes) {
        assert_eq!(parameters.len() + nonce.len() + hmac.len() + 23, bytes.len());
    }
    if let Ok(Ok(parameters)) = response::with_two_sessions(bytes) {
        assert!(parameters.len() + 24 <= bytes.len());
    }
    if let Ok(code) = response::code(bytes) {
        assert!(code == 0 || !matches!(response::parse(bytes), Ok(Response::Plain(_))));
    }
    for body in bodies {
        if let Ok(area) = response::public_area(body) {
            let _ = response::public_key(area);
            for template in [&[][..], &[0, 0x23]] {
                if let Ok((x, y)) = response::point(area, template) {
                    assert_eq!(template.len() + x.len() + y.len() + 4, area.len());
                }
                if let Ok(modulus) = response::modulus(area, template) {
                    assert_eq!(template.len() + modulus.len() + 2, area.len());
                }
            }
        }
        if let Ok((private, public)) = response::created(body) {
            assert!(private.len() + public.len() + 16 <= body.len());
        }
        if let Ok(field) = response::one_field(body) {
            assert_eq!(field.len() + 2, body.len());
        }
        if let Ok((message, signature)) = response::quoted(body) {
            assert_eq!(message.len() + signature.len() + 2, body.len());
        }
        if let Ok((bits, values)) = response::pcrs(body) {
            assert_eq!(bits.count_ones() as usize, values.len());
        }
        if let Ok((_, nonce)) = response::started_session(body) {
            assert!(nonce.len() >= 16);
        }
        if let Ok(public) = response::nv_public(body) {
            assert_eq!(public.policy.len() + public.name.len() + 18, body.len());
        }
        if let Ok(content) = response::nv_content(body) {
            assert_eq!(content.len() + 2, body.len());
        }
        if let Ok(handles) = response::handles(body) {
            assert_eq!(handles.len() * 4 + 9, body.len());
        }
    }
}

pub(crate) fn tpm_responses() -> Vec<Vec<u8>> {
    let response = |tag: u16, code: u32, body: &[u8]| {
        let size = u32::try_from(response::HEADER_LEN + body.len()).unwrap_or(u32::MAX);
        [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes(), body].concat()
    };
    let area = [
        &[0, 0x23, 0, 0x0b, 0, 5, 0, 0x72, 0, 0, 0, 0x10, 0, 0x18, 0, 0x0b, 0, 3, 0, 0x10, 0, 32][..],
        &[1; 32],
        &[0, 32],
        &[2; 32],
    ]
    .concat();
    let key = [&[0, 88][..], &area].concat();
    let session = [&[2, 0, 0, 0, 0, 32][..], &[9; 32]].concat();
    let public =
        [&[0, 14, 1, 0x80, 0, 0x10, 0, 0x0b, 0x22, 4, 0x10, 4, 0, 0, 0, 104, 0, 34, 0, 0x0b][..], &[7; 32]].concat();
    let content = [&[0, 0, 0, 106, 0, 104][..], &[1; 104], &[0, 32], &[2; 32], &[1, 0, 32], &[3; 32]].concat();
    vec![
        response(0x8001, 0, &session),
        response(0x8001, 0, &public),
        response(0x8001, 0, &[0, 0, 0, 0, 1, 0, 0, 0, 2, 2, 0, 0, 0, 2, 0, 0, 1]),
        response(0x8002, 0, &content),
        response(0x8002, 0, &[0, 0, 0, 0, 0, 32]),
        // TPM2_CreatePrimary with a P-256 key, TPM2_Quote, TPM2_PCR_Read.
        response(0x8002, 0, &[&[0x80, 0, 0, 0, 0, 0, 0, 90][..], &key, &[0, 0, 1, 0, 0]].concat()),
        response(
            0x8002,
            0,
            &[&[0, 0, 0, 14, 0, 4, 1, 2, 3, 4][..], &[0, 0x18, 0, 0x0b, 0, 1, 1, 0], &[0, 0, 1, 0, 0]].concat(),
        ),
        response(0x8001, 0, &[&[0, 0, 0, 1, 0, 0, 0, 1, 0, 0x0b, 3, 1, 0, 0, 0, 0, 0, 1, 0, 2][..], &[7; 2]].concat()),
        // TPM2_Create, TPM2_Load, TPM2_ActivateCredential.
        response(
            0x8002,
            0,
            &[
                &[0, 0, 0, 23, 0, 1, 7, 0, 2, 0, 8, 0, 1, 1, 0, 1, 2, 0x80, 0x21, 0x40, 0, 0, 1, 0, 1, 9, 5][..],
                &[0, 0, 1, 0, 0],
            ]
            .concat(),
        ),
        response(0x8002, 0, &[0x80, 0, 0, 1, 0, 0, 0, 4, 0, 2, 0, 0x0b, 0, 0, 1, 0, 0]),
        response(0x8002, 0, &[0, 0, 0, 4, 0, 2, 5, 5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]),
        response(0x8001, 0x18b, &[]),
        response(0x00c4, 0x1e, &[]),
    ]
}

/// An anchor is printed as it is parsed.
pub(crate) fn spec(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(spec) = text.parse::<AnchorSpec>() {
        assert_eq!(spec.to_string().parse::<AnchorSpec>().as_ref(), Ok(&spec), "{text:?}");
    }
}

pub(crate) fn specs() -> Vec<Vec<u8>> {
    texts(&[
        "none",
        "file:/a/b",
        "tpm:/dev/tpmrm0",
        "tpm:127.0.0.1:2321,index=0x01800011,owner-file=/a",
        "tpm:[::1]:1,index=0x1",
    ])
}
