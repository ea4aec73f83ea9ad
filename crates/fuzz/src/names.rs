//! Names that people and documents give: images, locations, resources, digests.

use nacre_core::{Digest, ResourcePath, ResourceUri};
use nacre_oci::{
    manifest::Platform,
    reference::{ImageRef, Location},
};

use crate::texts;

/// What parses is printed as something that parses to the same.
pub(crate) fn reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(image) = text.parse::<ImageRef>() {
        assert_eq!(image.to_string().parse::<ImageRef>().as_ref(), Ok(&image), "{text:?}");
        let tagged = image.with_default_tag();
        assert!(tagged.tag().is_some() || tagged.digest().is_some(), "{text:?}");
    }
    if let Ok(location) = text.parse::<Location>() {
        assert_eq!(location.to_string().parse::<Location>().as_ref(), Ok(&location), "{text:?}");
    }
    let _ = text.parse::<Platform>();
}

pub(crate) fn references() -> Vec<Vec<u8>> {
    let digest = Digest::sha256(b"");
    let mut seeds = texts(&[
        "busybox",
        "docker://registry.example:5000/team/app:1.2",
        "localhost/a/b__c-d.e:T_a-g.1",
        "oci:dir/with:colon:tag",
        "oci-archive:/a/b.tar:name",
        "docker-archive:/a.tar:docker.io/library/a:b",
        "dir:/a",
        "[::1]:5000/a",
        "a/..//b:@",
        "linux/arm64/v8",
    ]);
    seeds.push(format!("docker://127.0.0.1:1/a:b@{digest}").into_bytes());
    seeds.push(format!("a@{digest}@{digest}").into_bytes());
    seeds
}

/// Resource names are printed as they are parsed.
pub(crate) fn uri(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(path) = text.parse::<ResourcePath>() {
        assert_eq!(path.to_string().parse::<ResourcePath>().as_ref(), Ok(&path), "{text:?}");
    }
    if let Ok(uri) = text.parse::<ResourceUri>() {
        assert_eq!(uri.to_string().parse::<ResourceUri>().as_ref(), Ok(&uri), "{text:?}");
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
}

pub(crate) fn uris() -> Vec<Vec<u8>> {
    let mut seeds = texts(&[
        "kbs:///default/key/1",
        "kbs://broker:8080/a/b/c",
        "a/b/c",
        "kbs:///a/../c",
        "kbs:////",
        "a/b/c/d",
        "%2e/a/b",
    ]);
    seeds.push(Digest::sha256(b"").to_string().into_bytes());
    seeds
}
