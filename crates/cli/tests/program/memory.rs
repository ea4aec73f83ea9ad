//! A pull's memory is bounded, whatever the image's size.

use std::{fs, process::Stdio};

use nacre_testkit::{Compression, Entry, Image, Layer, Rng, root};

use crate::support::Place;

/// The goal for every pull (100 MiB).
const MOST_KIB: u64 = 100 << 10;

/// Pulls a layout, and gives the peak of the process's resident memory in KiB.
fn peak_of_pull(place: &Place, image: &str) -> u64 {
    let mut command =
        place.nacre("store", &["image", "pull", "--quiet", "--insecure-policy", "--allow-unsigned", image]);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    // The kernel keeps the peak, so a look shortly before the end is enough; a process that has ended has none.
    let mut peak = 0;
    let status = loop {
        let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let value = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(value.unwrap_or(0));
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    assert!(status.success() && peak > 0);
    peak
}

#[test]
fn sixty_four_layers_take_less_than_100_mib() {
    if !root() {
        return;
    }
    let place = Place::new();
    let mut image = Image::builder();
    for number in 0..64 {
        let noise = Rng::new(number + 1).bytes(300_000);
        let compression = if number % 2 == 0 { Compression::Gzip } else { Compression::Zstd };
        image = image.layer_of(Layer::of([Entry::file(format!("f{number}"), noise)]), compression);
    }
    image.build().write_layout(&place.at("layout"), "many");
    let peak = peak_of_pull(&place, &format!("oci:{}:many", place.text("layout")));
    eprintln!("64 layers: {peak} KiB");
    assert!(peak < MOST_KIB, "{peak} KiB");
}

#[test]
fn a_layer_of_300_mb_takes_less_than_100_mib() {
    if !root() {
        return;
    }
    let place = Place::new();
    // Noise that repeats at a distance which is too far for the compressor.
    let content = Rng::new(1).bytes(10_000_000).repeat(30);
    let image = Image::builder().layer_of(Layer::of([Entry::file("large", content)]), Compression::Zstd).build();
    assert!(image.layers[0].bytes.len() > 290_000_000);
    image.write_layout(&place.at("layout"), "large");
    drop(image);
    let peak = peak_of_pull(&place, &format!("oci:{}:large", place.text("layout")));
    eprintln!("300 MB: {peak} KiB");
    assert!(peak < MOST_KIB, "{peak} KiB");
}
