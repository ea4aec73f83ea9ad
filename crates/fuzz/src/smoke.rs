//! A fuzz run of some seconds, the same in each run: seeds, hostile inputs that are none of any format's, and mutations of both.
//!
//! A panic fails it with the input's path; so does one input that takes more than [`SLOWEST`], or a process of more than
//! [`LARGEST`] of memory. An input that never ends is printed by a second thread, which then ends the process.

use std::{
    env, fs,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::Target;

/// The most time for one input, in a build without optimisation on a busy machine.
pub const SLOWEST: Duration = Duration::from_secs(10);
/// The most memory in MiB that the process may ever have had.
pub const LARGEST: u64 = 768;
/// The longest input that mutations make.
const LONGEST: usize = 1 << 16;

/// What parsers stumble over, whatever they parse.
const TOKENS: &[&str] = &[
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "9223372036854775808",
    "4294967296",
    "1.5",
    "\"\"",
    "[]",
    "{}",
    "{\"a\":",
    "[[[[[[[[",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "\u{feff}",
    "é",
    "..",
    "../",
    "//",
    ":",
    "@",
    "sha256:",
    "\r\n",
    "-----BEGIN ",
    "*",
    "&a",
    "%00",
    "=",
    ",",
    "\n",
    "\u{1f}\u{8b}",
    "0777777777777",
    "\u{80}",
];

/// Runs a target for `NACRE_FUZZ_SECONDS` seconds, or two.
///
/// # Panics
/// The target panicked, or took too much time or memory.
pub fn smoke(target: &Target) {
    let seconds = env::var("NACRE_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2.0);
    let watch = Watch::start(target.name);
    let mut pool = (target.seeds)();
    pool.extend(hostile());
    for input in &pool {
        watch.run(target, input);
    }
    pool.retain(|input| input.len() <= LONGEST);
    let mut rng = Rng(0x006e_6163_7265);
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut count = 0u64;
    while Instant::now() < end {
        let input = mutate(&mut rng, &pool);
        watch.run(target, &input);
        count += 1;
    }
    assert!(count > 0, "not one input in {seconds} s");
    let peak = peak_mib();
    assert!(peak < LARGEST, "{}: {peak} MiB of memory; at most {LARGEST} are allowed", target.name);
}

/// Inputs that are large, deep, empty, or no text.
pub fn hostile() -> Vec<Vec<u8>> {
    let deep = |open: &str| open.repeat(100_000).into_bytes();
    vec![
        Vec::new(),
        vec![0],
        vec![0; 1 << 16],
        vec![0xff; 1 << 16],
        vec![b'a'; 5 << 20],
        deep("["),
        deep("{\"a\":"),
        deep("- "),
        deep("a:\n "),
        deep("a."),
        deep("/"),
        format!("[{}]", "1,".repeat(500_000)).into_bytes(),
        format!("\"{}\"", "\\u0041".repeat(100_000)).into_bytes(),
        format!("{{{}\"z\":0}}", (0..50_000).map(|n| format!("\"k{n}\":{n},")).collect::<String>()).into_bytes(),
        vec![0xc0, 0x80, 0xed, 0xa0, 0x80],
    ]
}

/// Since when an input runs, and the input.
type Current = Option<(Instant, Vec<u8>)>;

/// What runs now; a second thread looks at it.
struct Watch {
    name: &'static str,
    current: Arc<Mutex<Current>>,
    ended: Arc<AtomicBool>,
}

impl Watch {
    #[expect(clippy::print_stderr, reason = "the process ends, and there is no other way to say why")]
    fn start(name: &'static str) -> Self {
        let watch = Self { name, current: Arc::default(), ended: Arc::default() };
        let (current, ended) = (Arc::clone(&watch.current), Arc::clone(&watch.ended));
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(100));
                let Ok(current) = current.lock() else { return };
                if let Some((start, input)) = current.as_ref()
                    && start.elapsed() > 3 * SLOWEST
                {
                    eprintln!("{name}: does not end; its input is {}", keep(name, input).display());
                    std::process::abort();
                }
            }
        });
        watch
    }

    fn set(&self, value: Current) {
        if let Ok(mut current) = self.current.lock() {
            *current = value;
        }
    }

    fn run(&self, target: &Target, input: &[u8]) {
        let start = Instant::now();
        self.set(Some((start, input.to_vec())));
        let result = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        self.set(None);
        let problem = match result {
            Err(_) => "panicked",
            Ok(()) if start.elapsed() > SLOWEST => "was too slow",
            Ok(()) => return,
        };
        let path = keep(self.name, input);
        assert!(problem.is_empty(), "{} {problem} with the input {}", self.name, path.display());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Writes an input where it can be found.
fn keep(name: &str, input: &[u8]) -> PathBuf {
    let path = env::temp_dir().join(format!("nacre-fuzz-{name}-{}", std::process::id()));
    let _ = fs::write(&path, input);
    path
}

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).map_or(0, |kib| kib >> 10)
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, or 0.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % (end.max(1) as u64)).unwrap_or_default()
    }

    fn byte(&mut self) -> u8 {
        let [byte, ..] = self.next().to_le_bytes();
        byte
    }
}

/// One of the pool with up to eight changes.
fn mutate(rng: &mut Rng, pool: &[Vec<u8>]) -> Vec<u8> {
    let one = |rng: &mut Rng| pool.get(rng.below(pool.len())).cloned().unwrap_or_default();
    let mut input = one(rng);
    for _ in 0..=rng.below(8) {
        let at = rng.below(input.len() + 1);
        let until = (at + rng.below(16)).min(input.len());
        match rng.below(9) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = rng.byte();
                }
            }
            2 => input.truncate(at),
            3 => drop(input.drain(at..until)),
            4 => {
                let piece: Vec<u8> = input.drain(at..until).collect();
                let again = piece.repeat(1 + rng.below(64));
                input.splice(at..at, again);
            }
            5 | 6 => {
                let token = TOKENS.get(rng.below(TOKENS.len())).copied().unwrap_or_default();
                let end = if rng.below(2) == 0 { at } else { until };
                input.splice(at..end, token.bytes());
            }
            7 => {
                let other = one(rng);
                let from = rng.below(other.len() + 1);
                input.splice(at.., other.get(from..).unwrap_or_default().iter().copied());
            }
            _ => {
                let count = rng.below(9);
                let bytes: Vec<u8> = (0..count).map(|_| rng.byte()).collect();
                input.splice(at..at, bytes);
            }
        }
    }
    input.truncate(LONGEST);
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_found_and_one_seed_gives_one_run() {
        let pool = vec![b"{\"a\":1}".to_vec(), b"xyz".to_vec()];
        let run = || {
            let mut rng = Rng(7);
            (0..100).map(|_| mutate(&mut rng, &pool)).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
        let bad = Target { name: "bad", run: |bytes| assert!(bytes.len() < 100), seeds: Vec::new };
        assert!(panic::catch_unwind(|| smoke(&bad)).is_err());
    }
}
