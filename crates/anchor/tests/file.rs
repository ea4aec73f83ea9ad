//! Anchors in files.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{fs, os::unix::fs::symlink, path::Path, process::Command, thread};

use nacre_anchor::FileAnchor;
use nacre_core::{Anchor as _, AnchorError, AnchorState};

fn state(sequence: u64) -> AnchorState {
    AnchorState { disk: [7; 16], fence: 1, sequence, root: [3; 32] }
}

fn anchor(dir: &Path) -> FileAnchor {
    FileAnchor::new(&dir.join("anchor")).unwrap()
}

#[test]
fn a_state_is_kept_and_moved_on() {
    let dir = tempfile::tempdir().unwrap();
    let anchor = anchor(dir.path());
    assert_eq!(anchor.read().unwrap(), None);
    anchor.advance(None, &state(1)).unwrap();
    anchor.advance(Some(&state(1)), &state(2)).unwrap();
    assert_eq!(FileAnchor::new(&dir.path().join("anchor")).unwrap().read().unwrap(), Some(state(2)));
    assert_eq!(fs::metadata(dir.path().join("anchor")).unwrap().len(), 112);
    anchor.forget().unwrap();
    anchor.forget().unwrap();
    assert_eq!(anchor.read().unwrap(), None);
}

#[test]
fn who_believes_something_else_is_fenced() {
    let dir = tempfile::tempdir().unwrap();
    let anchor = anchor(dir.path());
    anchor.advance(None, &state(1)).unwrap();
    for expected in [None, Some(state(0)), Some(AnchorState { fence: 2, ..state(1) })] {
        let error = anchor.advance(expected.as_ref(), &state(9)).unwrap_err();
        assert!(matches!(error, AnchorError::Fenced { found_fence: 1, found_sequence: 1, .. }), "{error}");
    }
    assert_eq!(anchor.read().unwrap(), Some(state(1)));
    // Gone is not the same as never there.
    fs::remove_file(dir.path().join("anchor")).unwrap();
    assert!(matches!(anchor.advance(Some(&state(1)), &state(2)), Err(AnchorError::Untrusted { .. })));
    assert!(!dir.path().join("anchor").exists());
}

#[test]
fn damage_and_tricks_are_errors_not_absence() {
    let dir = tempfile::tempdir().unwrap();
    let (anchor, path) = (anchor(dir.path()), dir.path().join("anchor"));
    for bytes in [&b""[..], b"x", &[0; 112], &[0xff; 4096]] {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(anchor.read(), Err(AnchorError::Untrusted { .. })), "{} bytes", bytes.len());
        assert!(anchor.advance(None, &state(1)).is_err());
        assert_eq!(fs::read(&path).unwrap(), bytes, "what is damaged is not written over");
    }
    fs::remove_file(&path).unwrap();
    symlink("elsewhere", &path).unwrap();
    assert!(matches!(anchor.read(), Err(AnchorError::Failed { .. })));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(anchor.read(), Err(AnchorError::Untrusted { .. })));
    fs::remove_dir(&path).unwrap();
    // A pipe would wait for ever.
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert!(matches!(anchor.read(), Err(AnchorError::Untrusted { .. })));
    // A directory that is not mounted says nothing about what is in it.
    let absent = FileAnchor::new(&dir.path().join("absent/anchor")).unwrap();
    assert!(matches!(absent.read(), Err(AnchorError::Failed { .. })));
}

#[test]
fn one_of_many_wins_each_step() {
    let dir = tempfile::tempdir().unwrap();
    anchor(dir.path()).advance(None, &state(0)).unwrap();
    let wins = thread::scope(|scope| {
        let threads: Vec<_> = (1..=4_u64)
            .map(|who| {
                let anchor = anchor(dir.path());
                scope.spawn(move || {
                    let (mut wins, mut tries) = (0_u64, 0);
                    while tries < 30 {
                        tries += 1;
                        let now = anchor.read().unwrap().unwrap();
                        let next = AnchorState { fence: who, sequence: now.sequence + 1, ..now };
                        match anchor.advance(Some(&now), &next) {
                            Ok(()) => wins += 1,
                            Err(AnchorError::Fenced { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                    wins
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<u64>()
    });
    assert_eq!(anchor(dir.path()).read().unwrap().unwrap().sequence, wins);
}

#[test]
fn what_a_killed_writer_left_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let anchor = anchor(dir.path());
    anchor.advance(None, &state(1)).unwrap();
    fs::write(dir.path().join(".anchor.new"), b"half").unwrap();
    assert_eq!(anchor.read().unwrap(), Some(state(1)));
    anchor.advance(Some(&state(1)), &state(2)).unwrap();
    assert_eq!(anchor.read().unwrap(), Some(state(2)));
}
