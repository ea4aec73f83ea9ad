//! What a client of registries reads: its configuration, its auth file, and where a registry sends it.

use nacre_oci::registry::{
    AuthFile, RegistriesConf, fuzzing, parse_challenges, parse_content_range, parse_retry_after,
};

use crate::texts;

pub(crate) fn conf(bytes: &[u8]) {
    if RegistriesConf::parse(bytes).is_err() {
        return;
    }
    for name in ["docker.io/library/busybox:1", "registry.example/team/app:1", "a.b.example:5000/x@sha256:"] {
        fuzzing::resolve(bytes, name);
    }
}

pub(crate) fn confs() -> Vec<Vec<u8>> {
    texts(&[
        "unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"enforcing\"\n[aliases]\n\"busybox\" = \"registry.example/busybox\"\n",
        "[[registry]]\nprefix = \"*.example\"\nlocation = \"m.example\"\nblocked = false\ninsecure = true\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"a.example:5000/x\"\ninsecure = true\npull-from-mirror = \"tag-only\"\n",
        "[[registry]]\nlocation = \"registry.example/team\"\nblocked = true\n",
        "[registries.search]\nregistries = [\"a\"]\n",
        "[[registry]]\nprefix = \"*.\"\n[[registry]]\nprefix = \"*.\"\n",
        "a = [[[[[[[[[[1]]]]]]]]]]\n",
    ])
}

pub(crate) fn auth_file(bytes: &[u8]) {
    let _ = AuthFile::parse(bytes);
}

pub(crate) fn auth_files() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"auths":{"registry.example/team":{"auth":"YWxpY2U6czNjcmV0"},"https://index.docker.io/v1/":{"identitytoken":"x","auth":"YTpi"}}}"#,
        r#"{"auths":{"r.example":{"username":"a","password":"b"}},"credHelpers":{"r.example":"pass"},"credsStore":"desktop"}"#,
        r#"{"auths":{"r.example":{"auth":"!!"},"x":null}}"#,
        r#"{"credHelpers":{"r.example":"../../bin/sh"}}"#,
    ])
}

/// Values of headers.
pub(crate) fn headers(bytes: &[u8]) {
    let _ = parse_challenges(bytes);
    let _ = parse_content_range(bytes);
    let _ = std::str::from_utf8(bytes).map(parse_retry_after);
}

pub(crate) fn header_values() -> Vec<Vec<u8>> {
    texts(&[
        "Bearer realm=\"https://a.example/token\",service=\"a\",scope=\"repository:a:pull,push\"",
        "Basic realm=\"a\\\"b\", Bearer realm=x",
        "Basic,,, Basic realm=\"",
        "bytes 0-99/100",
        "bytes */100",
        "bytes 99-0/18446744073709551616",
        "120",
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sun, 99 Nov 9999999999 08:49:37 GMT",
    ])
}

/// A base URL, a line feed, and a `Location`.
pub(crate) fn url(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (base, location) = text.split_once('\n').unwrap_or((text, "/v2/a/blobs/uploads/1"));
    fuzzing::url(base, location);
}

pub(crate) fn urls() -> Vec<Vec<u8>> {
    texts(&[
        "https://registry.example:5000/v2/\n/v2/a/blobs/uploads/1?x=y",
        "http://127.0.0.1:1\n//other.example/a",
        "https://a@b.example/%2f..\n../../x#y",
        "http://[::1]:65536/\nfile:///etc/passwd",
        "https://\nhttps:///",
    ])
}
