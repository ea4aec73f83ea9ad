//! What an image is made of: manifests, indexes, configs, archives and layouts.

use nacre_core::{Digest, Untrusted};
use nacre_oci::{
    manifest::{Descriptor, ImageConfig, Index, Manifest, Platform, RawManifest, media},
    transport::{TarIndex, parse_index, parse_saved},
};

use crate::texts;

const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

pub(crate) fn manifest(bytes: &[u8]) {
    for served_as in [None, Some(media::OCI_MANIFEST), Some(media::DOCKER_LIST), Some("text/html; charset=utf-8")] {
        let Ok(raw) = RawManifest::new(bytes.to_vec(), served_as) else { continue };
        assert_eq!(raw.bytes(), bytes);
        let image = Manifest::parse(&raw);
        let index = Index::parse(&raw);
        assert!(image.is_err() || index.is_err(), "both a manifest and an index");
        if let Ok(index) = index {
            let _ = index.choose(&Platform::host());
        }
    }
}

pub(crate) fn manifests() -> Vec<Vec<u8>> {
    let (manifest, index, docker) = (media::OCI_MANIFEST, media::OCI_INDEX, media::DOCKER_MANIFEST);
    let blob = |kind: &str| format!(r#"{{"mediaType":"{kind}","digest":"{EMPTY}","size":0}}"#);
    let (config, layer) = (blob(media::OCI_CONFIG), blob("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"));
    let mut seeds = vec![
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{manifest}","config":{config},"layers":[{layer},{layer}],"annotations":{{"a":"b"}}}}"#
        ),
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":null}}"#),
        format!(r#"{{"schemaVersion":2,"mediaType":"{docker}","config":{config},"layers":[]}}"#),
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{index}","manifests":[{{"mediaType":"{manifest}","digest":"{EMPTY}","size":7,"platform":{{"architecture":"amd64","os":"linux","variant":"v1"}}}}]}}"#
        ),
        format!(r#"{{"schemaVersion":2,"manifests":[],"layers":[],"config":{config}}}"#),
        format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":[{{"digest":"{EMPTY}","size":18446744073709551615}}]}}"#
        ),
    ];
    seeds.push(format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#, vec![layer; 300].join(",")));
    seeds.into_iter().map(String::into_bytes).collect()
}

/// The first byte says how many layers the manifest has; the rest is the config, with its right digest.
pub(crate) fn config(bytes: &[u8]) {
    let Some((&count, bytes)) = bytes.split_first() else { return };
    let manifest = Manifest {
        schema_version: 2,
        media_type: None,
        artifact_type: None,
        config: Descriptor::of(media::OCI_CONFIG, bytes),
        layers: vec![Descriptor::of(media::OCI_LAYER, b""); usize::from(count)],
        subject: None,
        annotations: Default::default(),
    };
    if let Ok(config) = ImageConfig::verify(Untrusted::new(bytes.to_vec()), &manifest) {
        assert_eq!(config.get().rootfs.diff_ids.len(), usize::from(count));
    }
    let another = Manifest { config: Descriptor::new(media::OCI_CONFIG, Digest::sha256(b"other"), 5), ..manifest };
    assert!(bytes == b"other" || ImageConfig::verify(Untrusted::new(bytes.to_vec()), &another).is_err());
}

pub(crate) fn configs() -> Vec<Vec<u8>> {
    let full = format!(
        r#"{{"architecture":"amd64","os":"linux","created":"2026-01-01T00:00:00Z","config":{{"User":"1000:1000","Env":["A=b"],"Entrypoint":["/a"],"Cmd":null,"WorkingDir":"/w","Labels":{{"a":"b"}},"StopSignal":"SIGTERM","Volumes":{{"/v":{{}}}},"ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{EMPTY}"]}},"history":[{{"created_by":"x","empty_layer":true}}]}}"#
    );
    let mut seeds = texts(&["\0{}", "\0{\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}"]);
    seeds.push(format!("\u{1}{full}").into_bytes());
    seeds.push(format!("\u{2}{full}").into_bytes());
    seeds
}

pub(crate) fn archive(bytes: &[u8]) {
    let Ok(index) = TarIndex::of_bytes(bytes) else { return };
    for name in ["manifest.json", "index.json", "a", "link"] {
        if let Ok(Some((offset, size))) = index.find(name) {
            assert!(
                offset.checked_add(size).is_some_and(|end| end <= bytes.len() as u64),
                "{name}: outside of the archive"
            );
        }
    }
}

pub(crate) fn archives() -> Vec<Vec<u8>> {
    let entry = |name: &str, kind: u8, link: &str, content: &[u8]| {
        let mut header = vec![0; 512];
        let mut put =
            |at: usize, bytes: &[u8]| header.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        put(0, name.as_bytes());
        put(100, b"0000644\0");
        put(124, format!("{:011o}\0", content.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()).for_each(|(to, from)| *to = from);
        header.extend_from_slice(content);
        header.resize(header.len().next_multiple_of(512), 0);
        header
    };
    let file = entry("manifest.json", b'0', "", b"[]");
    let end = vec![0; 1024];
    vec![
        [file.clone(), entry("link", b'2', "manifest.json", b""), end.clone()].concat(),
        [entry("x", b'x', "", b"17 path=long/name\n"), file.clone(), end.clone()].concat(),
        [entry("././@LongLink", b'L', "", b"long/name\0"), file.clone(), end.clone()].concat(),
        [file.clone(), file.clone(), end.clone()].concat(),
        [entry("link", b'1', "link", b""), entry("../a", b'0', "", b""), end].concat(),
        file,
    ]
}

pub(crate) fn layout(bytes: &[u8]) {
    let _ = parse_index(bytes.to_vec());
    let _ = parse_saved(bytes);
}

pub(crate) fn layouts() -> Vec<Vec<u8>> {
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{EMPTY}","size":0,"annotations":{{"org.opencontainers.image.ref.name":"t"}}}}]}}"#,
        media::OCI_MANIFEST
    );
    let saved = r#"[{"Config":"a.json","RepoTags":["docker.io/library/a:b"],"Layers":["l/layer.tar"]}]"#;
    texts(&[&index, saved, "[]", "[{}]", r#"[{"Config":"../a","RepoTags":null,"Layers":["/x"]}]"#])
}
