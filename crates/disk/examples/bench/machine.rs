//! The machine: cores, processor time, memory, numbers.

use std::{fs, time::Duration};

use rustix::thread::{CpuSet, Pid, sched_setaffinity};

use crate::Result;

/// Keeps all threads of this process, and those that they start, on the first `cores` cores.
pub(crate) fn pin(cores: usize) -> Result<()> {
    let mut set = CpuSet::new();
    (0..cores).for_each(|core| set.set(core));
    for thread in fs::read_dir("/proc/self/task")? {
        let id: i32 = thread?.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(id), &set)?;
    }
    Ok(())
}

/// The processor time of this process.
pub(crate) fn cpu_time() -> Result<Duration> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}

/// The most memory that this process has had so far, in MiB.
pub(crate) fn peak_mib() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// Bytes that nothing compresses.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut rng = Rng(0x9e37_79b9);
    (0..length / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// Xorshift.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
