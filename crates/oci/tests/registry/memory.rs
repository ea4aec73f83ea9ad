//! A blob passes through; it is not kept.

use std::{
    fs,
    io::{Read as _, Write as _},
    process::Command,
    time::Instant,
};

use nacre_oci::source::ImageSource as _;

use crate::{
    script::Script,
    support::{client, descriptor, quick, source},
};

const SIZE: u64 = 256 << 20;

/// The process's peak memory in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Seconds of processor time of this thread.
fn processor() -> f64 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11..=12].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
}

#[test]
fn a_large_blob_is_not_held_in_memory() {
    // In a process of its own, since the tests beside it use memory too.
    if std::env::var_os("NACRE_TEST_MEMORY").is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "memory::a_large_blob_is_not_held_in_memory", "--nocapture"]);
        let output = nacre_testkit::run(command.env("NACRE_TEST_MEMORY", "1"));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let script = Script::new(|_, stream| {
        let piece = vec![7; 1 << 20];
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n");
        for _ in 0..SIZE >> 20 {
            let _ = stream.write_all(&piece);
        }
    });
    let client = client(quick());
    let source = source(&client, &format!("{}/a:b", script.host));
    let mut large = descriptor(b"");
    large.size = SIZE;
    let before = peak();
    let (start, busy) = (Instant::now(), processor());
    let mut stream = source.blob(&large).unwrap();
    let (mut piece, mut count) = (vec![0; 256 << 10], 0);
    loop {
        match stream.read(&mut piece).unwrap() {
            0 => break,
            some => count += some as u64,
        }
    }
    assert_eq!(count, SIZE);
    let grown = peak() - before;
    eprintln!(
        "{SIZE} bytes in {:?}, {:.2} s of processor time, {grown} KiB of memory",
        start.elapsed(),
        processor() - busy
    );
    assert!(grown < 16 << 10, "{grown} KiB");
}
