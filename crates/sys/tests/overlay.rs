//! Overlay mounts of few and of many layers show what the layers say, and nothing stays mounted.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nacre_sys::overlay::{MAX_LAYERS, Method, Overlay, OverlayError, Writable};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        // /tmp may itself be something that overlays cannot stack on; the build directory is where stores are in these tests.
        nacre_testkit::root().then(|| Self { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() })
    }

    fn make(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Layer `n` writes its number to `top`, adds `own-n`, and hides `own-(n-1)` if n is odd.
    fn layers(&self, count: usize) -> Vec<PathBuf> {
        (0..count)
            .map(|number| {
                let layer = self.make(format!("layers/{number}"));
                fs::write(layer.join("top"), number.to_string()).unwrap();
                fs::write(layer.join(format!("own-{number}")), "").unwrap();
                if number % 2 == 1 {
                    whiteout(&layer.join(format!("own-{}", number - 1)));
                }
                layer
            })
            .collect()
    }
}

fn whiteout(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        nacre_sys::fs::unmount(&self.0).unwrap();
    }
}

fn mount(place: &Place, lower: &[PathBuf], writable: bool, method: Method) -> Result<Mounted, OverlayError> {
    let target = place.make("target");
    let (upper, work, scratch) = (place.make("upper"), place.make("work"), place.make("scratch"));
    let writable = writable.then_some(Writable { upper: &upper, work: &work });
    let overlay = Overlay { lower, writable, target: &target, scratch: &scratch, user_xattr: false, method };
    let result = overlay.mount();
    assert!(!nacre_sys::fs::is_mount_point(&scratch).unwrap(), "the nested overlay is still to be seen");
    assert_eq!(nacre_sys::fs::is_mount_point(&target).unwrap(), result.is_ok());
    result.map(|()| Mounted(target))
}

fn check_precedence(root: &Path, count: usize) {
    assert_eq!(fs::read_to_string(root.join("top")).unwrap(), (count - 1).to_string());
    let mut found: Vec<usize> = fs::read_dir(root)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("own-")?.parse().ok())
        .collect();
    found.sort_unstable();
    let expected: Vec<usize> = (0..count).filter(|number| number % 2 == 1 || number + 1 == count).collect();
    assert_eq!(found, expected, "{count} layers");
}

#[test]
fn any_number_of_layers_that_the_kernel_stacks_is_mounted() {
    let Some(place) = Place::new() else { return };
    let layers = place.layers(MAX_LAYERS + 1);
    for count in [1, 2, 130, 500, 501, 700, MAX_LAYERS] {
        let lower = &layers[..count];
        let mounted = mount(&place, lower, true, Method::Probe).unwrap();
        check_precedence(&mounted.0, count);
        fs::write(mounted.0.join("written"), "x").unwrap();
        drop(mounted);
        assert_eq!(fs::read_to_string(place.dir.path().join("upper/written")).unwrap(), "x");
        if count > 1 {
            let mounted = mount(&place, lower, false, Method::Probe).unwrap();
            check_precedence(&mounted.0, count);
            let refused = fs::write(mounted.0.join("written"), "x").unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
    }
    let error = mount(&place, &layers, true, Method::Probe).err().unwrap();
    assert!(
        matches!(error, OverlayError::TooMany { found, limit: MAX_LAYERS, .. } if found == MAX_LAYERS + 1),
        "{error}"
    );
}

#[test]
fn older_kernels_get_a_page_of_layers_and_as_many_again() {
    let Some(place) = Place::new() else { return };
    let layers = place.layers(400);
    for count in [1, 2, 200, 201, 399] {
        let mounted = mount(&place, &layers[..count], true, Method::Classic).unwrap();
        check_precedence(&mounted.0, count);
    }
    assert!(matches!(mount(&place, &layers, true, Method::Classic), Err(OverlayError::TooMany { limit: 399, .. })));
}

#[test]
fn directories_that_replace_and_files_that_go_are_honoured_across_the_nested_mount() {
    let Some(place) = Place::new() else { return };
    let mut layers = place.layers(600);
    // In the bottom layer, to be hidden by the top one and by one that is nested.
    for name in ["replaced", "gone-early", "gone-late"] {
        fs::create_dir(layers[0].join(name)).unwrap();
        fs::write(layers[0].join(name).join("old"), "").unwrap();
    }
    whiteout(&layers[3].join("gone-early"));
    whiteout(&layers[599].join("gone-late"));
    let replacement = layers[598].join("replaced");
    fs::create_dir(&replacement).unwrap();
    fs::write(replacement.join("new"), "").unwrap();
    rustix::fs::setxattr(&replacement, "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    for count in [600, 599] {
        layers.truncate(count);
        let mounted = mount(&place, &layers, false, Method::Probe).unwrap();
        assert!(mounted.0.join("replaced/new").exists() && !mounted.0.join("replaced/old").exists());
        assert!(!mounted.0.join("gone-early").exists());
        assert_eq!(mounted.0.join("gone-late").exists(), count == 599);
    }
}

#[test]
fn redirects_that_a_layer_asks_for_are_not_followed() {
    let Some(place) = Place::new() else { return };
    let layers = place.layers(2);
    fs::create_dir(layers[0].join("private")).unwrap();
    fs::write(layers[0].join("private/file"), "").unwrap();
    fs::create_dir(layers[1].join("public")).unwrap();
    rustix::fs::setxattr(layers[1].join("public"), "trusted.overlay.redirect", b"/private", XattrFlags::empty())
        .unwrap();
    for method in [Method::Probe, Method::Classic] {
        let mounted = mount(&place, &layers, false, method).unwrap();
        assert!(!mounted.0.join("public/file").exists());
    }
}

#[test]
fn names_are_meant_exactly() {
    let Some(place) = Place::new() else { return };
    let odd = [":", "a:b,c\\d", "lowerdir=x,upperdir=y", " spaces\tand\nlines ", "\\072", "%s;$(x)", "ünï"];
    let mut layers: Vec<PathBuf> = odd.iter().map(|name| place.make(Path::new("odd").join(name))).collect();
    layers.push(place.make(Path::new(std::ffi::OsStr::from_bytes(b"odd/\xff\xfe"))));
    // Deeper than the 256 bytes of a mount option.
    layers.push(place.make(format!("{0}/{0}/{0}", "long".repeat(50))));
    for (number, layer) in layers.iter().enumerate() {
        fs::write(layer.join(format!("file-{number}")), "").unwrap();
    }
    for method in [Method::Probe, Method::Classic] {
        for upper in ["up:per,x\\y", "up per"] {
            let (target, upper, work) = (place.make("ta:r,g\\et"), place.make(upper), place.make("wo:r,k\\"));
            let overlay = Overlay {
                lower: &layers,
                writable: Some(Writable { upper: &upper, work: &work }),
                target: &target,
                scratch: &place.make("scratch"),
                user_xattr: false,
                method,
            };
            overlay.mount().unwrap();
            let mounted = Mounted(target);
            for number in 0..layers.len() {
                assert!(mounted.0.join(format!("file-{number}")).exists(), "{number}");
            }
        }
    }
}

#[test]
fn what_cannot_be_mounted_is_named() {
    let Some(place) = Place::new() else { return };
    let mut layers = place.layers(2);
    let error =
        |layers: &[PathBuf], writable| mount(&place, layers, writable, Method::Probe).err().unwrap().to_string();
    assert!(error(&layers[..1], false).contains("at least 2"));
    assert!(error(&[], true).contains("at least 1"));
    layers.push(place.dir.path().join("absent"));
    assert!(error(&layers, true).contains("absent"));
    // A link is no layer, wherever it leads.
    layers.pop();
    let link = place.dir.path().join("link");
    std::os::unix::fs::symlink(&layers[0], &link).unwrap();
    layers.push(link);
    assert!(error(&layers, true).contains("link"));
    // The kernel's own words are in the error.
    layers.pop();
    layers.push(PathBuf::from("/proc/self"));
    assert!(error(&layers, true).contains("/proc/self"));
    layers.pop();
    layers.push(place.make("upper"));
    let error = error(&layers, true);
    assert!(error.contains("overlay of 3 layers"), "{error}");
}
