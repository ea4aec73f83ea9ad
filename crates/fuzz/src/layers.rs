//! Layers: tars, their compression, and what the guest's services are sent.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use nacre_oci::{
    layer::decompress_all,
    manifest::Compression,
    unpack::{Applier, DevicePolicy, Limits, UnpackOptions, tar::parse_all},
};

/// Limits that an input of some kilobytes can reach.
fn limits() -> Limits {
    Limits {
        entries: 200,
        layer_bytes: 1 << 20,
        file_bytes: 1 << 20,
        name_bytes: 4096,
        link_bytes: 4096,
        depth: 20,
        expansion_free_bytes: 1 << 20,
        zstd_window_bytes: 1 << 20,
        ..Limits::default()
    }
}

/// However the bytes are cut into pieces, the same comes out.
pub(crate) fn tar(bytes: &[u8]) {
    let whole = parse_all(bytes, bytes.len(), &limits());
    let pieces = parse_all(bytes, 7, &limits());
    assert_eq!(whole.is_ok(), pieces.is_ok());
    if let (Ok((whole, _)), Ok((pieces, _))) = (whole, pieces) {
        assert_eq!(whole.len(), pieces.len());
    }
}

/// Whatever the tar says, nothing appears beside the directory that it is applied to.
pub(crate) fn apply(bytes: &[u8]) {
    let Ok(place) = tempfile::tempdir() else { return };
    let root = place.path().join("root");
    if std::fs::create_dir(&root).is_err() {
        return;
    }
    let Ok(fd) = File::open(&root) else { return };
    let options = UnpackOptions { limits: limits(), devices: DevicePolicy::Skip, ..UnpackOptions::default() };
    if let Ok(mut applier) = Applier::new(OwnedFd::from(fd), options)
        && applier.feed(bytes).is_ok()
    {
        let _ = applier.finish();
    }
    assert_eq!(names(place.path()), ["root"], "the layer left its directory");
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

pub(crate) fn tars() -> Vec<Vec<u8>> {
    let header = |name: &str, kind: u8, link: &str, size: usize| {
        let mut header = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| {
            for (slot, byte) in header.iter_mut().skip(at).zip(bytes) {
                *slot = *byte;
            }
        };
        put(0, name.as_bytes());
        put(100, b"0000755\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"14000000000\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        let text = format!("{sum:06o}\0 ");
        for (slot, byte) in header.iter_mut().skip(148).zip(text.as_bytes()) {
            *slot = *byte;
        }
        header
    };
    let entry = |name: &str, kind: u8, link: &str, content: &[u8]| {
        let mut bytes = header(name, kind, link, content.len()).to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    };
    let pax = |records: &[(&str, &str)]| {
        let record = |(key, value): &(&str, &str)| {
            let rest = key.len() + value.len() + 3;
            let length = rest + if rest + 2 > 99 { 3 } else { 2 };
            format!("{length} {key}={value}\n")
        };
        records.iter().map(record).collect::<String>().into_bytes()
    };
    let end = vec![0u8; 1024];
    let entries: Vec<Vec<u8>> = vec![
        entry("dir/", b'5', "", b""),
        entry("dir/file", b'0', "", b"content"),
        entry("link", b'2', "dir/file", b""),
        entry("up", b'2', "..", b""),
        entry("up/x", b'0', "", b"through a link"),
        entry("hard", b'1', "dir/file", b""),
        entry("../out", b'0', "", b"x"),
        entry("/abs", b'0', "", b"x"),
        entry("dir/.wh.file", b'0', "", b""),
        entry("dir/.wh..wh..opq", b'0', "", b""),
        entry("dev", b'3', "", b""),
        entry("fifo", b'6', "", b""),
        entry(
            "././@PaxHeader",
            b'x',
            "",
            &pax(&[("path", "long/name"), ("mtime", "1.5"), ("SCHILY.xattr.user.a", "b")]),
        ),
        entry("short", b'0', "", b"y"),
        entry("././@LongLink", b'L', "", b"gnu/long/name\0"),
        entry("gnu", b'0', "", b"z"),
        entry("sparse", b'S', "", b""),
    ];
    let mut seeds: Vec<Vec<u8>> = entries.iter().map(|entry| [entry.as_slice(), &end].concat()).collect();
    seeds.push([entries.concat(), end].concat());
    seeds
}

/// The first byte chooses the compression.
pub(crate) fn decompress(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let compression = match which % 3 {
        0 => Compression::None,
        1 => Compression::Gzip,
        _ => Compression::Zstd,
    };
    let whole = decompress_all(compression, bytes, bytes.len(), &limits());
    let pieces = decompress_all(compression, bytes, 3, &limits());
    assert_eq!(whole.is_ok(), pieces.is_ok());
}

pub(crate) fn compressed() -> Vec<Vec<u8>> {
    let gzip: &[u8] = &[
        1, 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 7, 0, 0x86, 0xa6, 0x10, 0x36, 5, 0, 0, 0,
    ];
    let zstd: &[u8] =
        &[2, 0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x00, 0x29, 0, 0, b'h', b'e', b'l', b'l', b'o', 0x29, 0x5c, 0x8f, 0x20];
    let twice = [gzip, &gzip[1..]].concat();
    vec![gzip.to_vec(), zstd.to_vec(), twice, b"\0hello".to_vec()]
}

pub(crate) fn services(bytes: &[u8]) {
    nacre_guest::services::fuzz_message(bytes);
    let passwd = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let group = bytes.get(passwd.len() + 1..).unwrap_or_default();
    for user in ["", "app", "app:staff", "7:9", "4294967296"] {
        let _ = nacre_guest::bundle::resolve_user(user, passwd, group);
    }
    let _ = nacre_guest::config::Config::parse(bytes, "fuzz");
}

pub(crate) fn requests() -> Vec<Vec<u8>> {
    vec![
        b"\x0a\x05image\x12\x02/b".to_vec(),
        b"root:x:0:0:root:/root:/bin/sh\napp:x:7:9::/:\n\0staff:x:20:app,root\n".to_vec(),
        b"root = '/x'\n[trust]\npolicy = 'init-data:policy.json'\n[image.limits]\nentries = 5\n".to_vec(),
    ]
}
