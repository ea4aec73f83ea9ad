//! How much a layer may be.

use std::{
    fs,
    io::{self, Read},
};

use nacre_core::{Digest, NoProgress};
use nacre_oci::{
    layer::{LayerPlan, apply_layer},
    manifest::Descriptor,
    unpack::{Limits, UnpackOptions},
};
use nacre_testkit::{Compression, Entry, Layer};

use super::{TAR, apply, apply_blob, open};

#[test]
fn every_limit_is_named_by_its_error() {
    let limits = |change: fn(&mut Limits)| {
        let mut options = UnpackOptions::default();
        change(&mut options.limits);
        options
    };
    let many: Vec<Entry> = (0..20).map(|index| Entry::file(format!("f{index}"), "x")).collect();
    for (name, options, entries) in [
        ("entries", limits(|limits| limits.entries = 19), many.clone()),
        ("layer_bytes", limits(|limits| limits.layer_bytes = 5000), many),
        ("file_bytes", limits(|limits| limits.file_bytes = 3), vec![Entry::file("f", "1234")]),
        ("file_bytes", limits(|limits| limits.file_bytes = 99), vec![Entry::sparse("f", 100, &[])]),
        ("name_bytes", limits(|limits| limits.name_bytes = 120), vec![Entry::file("n".repeat(121), "")]),
        ("name_bytes", limits(|limits| limits.name_bytes = 120), vec![Entry::file("n".repeat(121), "").gnu()]),
        ("link_bytes", limits(|limits| limits.link_bytes = 120), vec![Entry::symlink("l", "n".repeat(121))]),
        ("depth", limits(|limits| limits.depth = 3), vec![Entry::file("a/b/c/d", "")]),
        (
            "pax_bytes",
            limits(|limits| limits.pax_bytes = 100),
            vec![Entry::file("a", "").pax("comment", "c".repeat(100))],
        ),
        (
            "xattrs",
            limits(|limits| limits.xattrs = 1),
            vec![Entry::file("a", "").xattr("user.a", "").xattr("user.b", "")],
        ),
        ("xattr_bytes", limits(|limits| limits.xattr_bytes = 4), vec![Entry::file("a", "").xattr("user.a", "12345")]),
        (
            "sparse_segments",
            limits(|limits| limits.sparse_segments = 1),
            vec![Entry::sparse("s", 9, &[(0, b"a"), (5, b"b")])],
        ),
        ("record_bytes", limits(|limits| limits.record_bytes = 200), vec![Entry::file("a/b/c/d/e/f", "")]),
    ] {
        let error = apply(Layer::of(entries).tar(), &options).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("'{name}'")), "expected {name}: {error}");
    }
}

/// A tar of entries without end.
struct Endless {
    index: u64,
    block: Vec<u8>,
    at: usize,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            let names = self.index..self.index + 512;
            let tar = Layer::of(names.map(|index| Entry::file(format!(".wh..wh.{index}"), "")));
            self.block = tar.tar()[..tar.tar().len() - 1024].to_vec();
            (self.index, self.at) = (self.index + 512, 0);
        }
        let length = buffer.len().min(self.block.len() - self.at);
        buffer[..length].copy_from_slice(&self.block[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

#[test]
fn millions_of_entries_stop_at_the_limit() {
    let options = UnpackOptions { limits: Limits { entries: 50_000, ..Limits::default() }, ..UnpackOptions::default() };
    let descriptor = Descriptor::new(TAR, Digest::sha256(b""), 10_000_000 * 512);
    let plan = LayerPlan::new(&descriptor, Digest::sha256(b""), None, &options).unwrap();
    let target = tempfile::tempdir().unwrap();
    let stream = Endless { index: 0, block: Vec::new(), at: 0 };
    let error = apply_layer(stream, &plan, open(target.path()), &NoProgress).unwrap_err().to_string();
    assert!(error.contains("'entries'") && error.contains("50001"), "{error}");
}

#[test]
fn bombs_stop_at_the_limit() {
    let zeros = vec![0u8; 32 << 20];
    let options = UnpackOptions {
        limits: Limits { expansion: 100, expansion_free_bytes: 1 << 20, ..Limits::default() },
        ..UnpackOptions::default()
    };
    let target = tempfile::tempdir().unwrap();
    for (compression, suffix) in [(Compression::Gzip, "+gzip"), (Compression::Zstd, "+zstd")] {
        let tar = Layer::of([Entry::file("zeros", zeros.clone())]);
        let blob = compression.apply(tar.tar());
        let error =
            apply_blob(&format!("{TAR}{suffix}"), &blob, tar.tar(), &options, target.path()).unwrap_err().to_string();
        assert!(error.contains("'expansion'"), "{error}");
        fs::remove_file(target.path().join("zeros")).unwrap();
    }
    // A frame header that asks for a window of 128 MiB: magic, descriptor, window.
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88, 0x01, 0x00, 0x00];
    let error = apply_blob(&format!("{TAR}+zstd"), &frame, b"", &options, target.path()).unwrap_err().to_string();
    assert!(error.contains("'zstd_window_bytes'"), "{error}");
}
