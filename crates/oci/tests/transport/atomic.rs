//! A copy that fails leaves the destination as it was.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use nacre_oci::{manifest::Descriptor, transport::open_local_sink};
use nacre_testkit::{Compression, Entry, Image, Layer, Rng, SmallDisk};

use super::{copy_plain, image, location, manifest, tree};

/// An image with a layer of a megabyte that does not compress.
fn large(scratch: &Path) -> String {
    let noise = Rng::new(1).bytes(1 << 20);
    let image = Image::builder().layer_of(Layer::of([Entry::file("noise", noise)]), Compression::Gzip).build();
    image.write_layout(&scratch.join("large"), "v1");
    format!("oci:{}:v1", scratch.join("large").display())
}

fn destinations(directory: &Path) -> [String; 4] {
    let directory = directory.display();
    [
        format!("oci:{directory}/layout:v1"),
        format!("oci-archive:{directory}/oci.tar:v1"),
        format!("docker-archive:{directory}/docker.tar:a:1"),
        format!("dir:{directory}/dir"),
    ]
}

fn names(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let Some(disk) = SmallDisk::mount(512 << 10) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let from = large(scratch.path());
    for to in destinations(disk.path()) {
        let error = copy_plain(&from, &to).unwrap_err().to_string();
        assert!(error.contains("No space left"), "{error}");
        assert!(names(disk.path()).is_empty(), "{to}");
    }
    // An image that is there already survives a copy that does not fit.
    image().write_layout(&scratch.path().join("small"), "v1");
    let small = format!("oci:{}:v1", scratch.path().join("small").display());
    for to in destinations(disk.path()).iter().filter(|to| !to.starts_with("docker")) {
        copy_plain(&small, to).unwrap();
        let before = tree(disk.path());
        copy_plain(&from, to).unwrap_err();
        assert_eq!(tree(disk.path()), before, "{to}");
    }
}

#[test]
fn a_read_only_destination_is_an_error() {
    let Some(disk) = SmallDisk::mount(8 << 20) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let from = large(scratch.path());
    disk.set_read_only(true);
    for to in destinations(disk.path()) {
        let error = copy_plain(&from, &to).unwrap_err().to_string();
        assert!(error.contains("Read-only"), "{error}");
    }
    disk.set_read_only(false);
    assert!(names(disk.path()).is_empty());
}

#[test]
fn directories_and_archives_of_others_are_not_overwritten() {
    let scratch = tempfile::tempdir().unwrap();
    let from = large(scratch.path());
    let precious = scratch.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.txt"), "years of work").unwrap();
    let before = tree(&precious);
    for to in [format!("oci:{}:v1", precious.display()), format!("dir:{}", precious.display())] {
        assert!(copy_plain(&from, &to).unwrap_err().to_string().contains("give another"));
        assert_eq!(tree(&precious), before);
    }
    // An image in a directory takes another one's place, but not where there is something else.
    let dir = scratch.path().join("dir");
    let to = format!("dir:{}", dir.display());
    copy_plain(&from, &to).unwrap();
    image().write_layout(&scratch.path().join("small"), "v1");
    copy_plain(&format!("oci:{}", scratch.path().join("small").display()), &to).unwrap();
    assert_eq!(manifest(&to).digest(), &image().digest);
    assert_eq!(tree(&dir).len(), 2 + 1 + 2, "version, manifest, config, two layers; nothing of the old image");
    fs::write(dir.join("thesis.txt"), "years of work").unwrap();
    assert!(copy_plain(&from, &to).unwrap_err().to_string().contains("thesis.txt"));
    assert_eq!(manifest(&to).digest(), &image().digest);
}

#[test]
fn a_sink_takes_nothing_that_is_not_what_was_announced() {
    let scratch = tempfile::tempdir().unwrap();
    for to in destinations(scratch.path()) {
        let sink = open_local_sink(&location(&to)).unwrap();
        let right = Descriptor::of("application/octet-stream", b"content");
        let wrong = Descriptor { digest: Digest::sha256(b"other"), ..right.clone() };
        assert!(sink.put_blob(&mut b"content".as_slice(), Some(&wrong)).unwrap_err().to_string().contains("mismatch"));
        assert!(sink.put_blob(&mut b"longer content".as_slice(), Some(&right)).is_err());
        assert!(sink.put_blob(&mut b"short".as_slice(), Some(&right)).is_err());
        drop(sink);
        assert!(names(scratch.path()).is_empty(), "{to}");
    }
}

#[test]
fn what_a_killed_copy_left_is_removed_by_the_next_and_a_running_one_is_not() {
    let scratch = tempfile::tempdir().unwrap();
    let from = large(scratch.path());
    let place = scratch.path().join("place");
    fs::create_dir(&place).unwrap();
    for to in destinations(&place) {
        // A sink that is forgotten keeps its lock, as a running copy does; without it, it is a killed one's.
        let name = to.split(':').nth(1).unwrap();
        let running = open_local_sink(&location(&to)).unwrap();
        running.put_blob(&mut b"content".as_slice(), None).unwrap();
        copy_plain(&from, &to).unwrap();
        drop(running);
        let stale = if to.starts_with("oci:") {
            Path::new(name).join(".nacre-tmp-0123456789abcdef")
        } else {
            let base = Path::new(name).file_name().unwrap().to_str().unwrap();
            place.join(format!(".nacre-tmp-{base}-0123456789abcdef"))
        };
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("partial-1"), "half").unwrap();
        if to.starts_with("docker") {
            fs::remove_file(name).unwrap();
        }
        copy_plain(&from, &to).unwrap();
        assert!(!stale.exists(), "{}", stale.display());
    }
    assert_eq!(names(&place).len(), 4);
    assert!(tree(&place).keys().all(|path| !path.to_string_lossy().contains("nacre-tmp")));
}

#[test]
fn two_copies_into_one_layout_at_once_both_arrive() {
    let scratch = tempfile::tempdir().unwrap();
    let from = large(scratch.path());
    let layout = scratch.path().join("layout");
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (from, to) = (from.clone(), format!("oci:{}:name{number}", layout.display()));
            scope.spawn(move || copy_plain(&from, &to).unwrap());
        }
    });
    for number in 0..8 {
        manifest(&format!("oci:{}:name{number}", layout.display()));
    }
    assert!(tree(&layout).keys().all(|path| !path.to_string_lossy().contains("nacre-tmp")));
}
