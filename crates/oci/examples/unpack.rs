//! Unpacks layer blobs as a pull does, and says what that took: `unpack [--parallel N] [--encrypt] DIR LAYER…` (`.tar`, `.gz`, `.zst`).
//! DIR must not exist. What a registry would tell (digests, sizes) is computed before the clock starts.
#![expect(clippy::print_stdout, reason = "an example prints")]

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use nacre_core::{Algorithm, Digest, Hasher, NoProgress};
use nacre_oci::{
    crypt::{LayerEncryptor, LayerSecret, PublicOptions},
    layer::{Decompressor, LayerKey, LayerPlan, apply_layer},
    manifest::{Compression, Descriptor, media},
    unpack::{Limits, UnpackOptions},
};

struct Layer {
    path: PathBuf,
    descriptor: Descriptor,
    diff_id: Digest,
    key: Option<(LayerSecret, PublicOptions)>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).peekable();
    let (mut parallel, mut encrypt) = (1, false);
    while let Some(option) = arguments.next_if(|argument| argument.starts_with("--")) {
        match option.as_str() {
            "--parallel" => parallel = arguments.next().ok_or("--parallel N")?.parse()?,
            "--encrypt" => encrypt = true,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let root = PathBuf::from(arguments.next().ok_or("DIR is missing")?);
    std::fs::create_dir(&root)?;
    let layers: Vec<Layer> =
        arguments.map(|path| prepare(Path::new(&path), &root, encrypt)).collect::<Result<_, _>>()?;

    let (start, cpu) = (Instant::now(), processor_time());
    let todo = Mutex::new(layers.iter().enumerate());
    let totals = Mutex::new((0u64, 0u64));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..parallel)
            .map(|_| {
                scope.spawn(|| -> Result<(), Failure> {
                    loop {
                        let Some((index, layer)) = todo.lock().map_err(|_| "a worker failed")?.next() else {
                            return Ok(());
                        };
                        let target = root.join(index.to_string());
                        std::fs::create_dir(&target)?;
                        let options = UnpackOptions::default();
                        let key = layer.key.as_ref().map(|(secret, public)| LayerKey { secret, public });
                        let plan = LayerPlan::new(&layer.descriptor, layer.diff_id, key, &options)?;
                        let target = OwnedFd::from(File::open(&target)?);
                        let applied = apply_layer(File::open(&layer.path)?, &plan, target, &NoProgress)?.into_inner();
                        let mut totals = totals.lock().map_err(|_| "a worker failed")?;
                        totals.0 += applied.entries;
                        totals.1 += applied.tar_bytes;
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked")?)
    })?;
    let unpacked = start.elapsed();
    rustix::fs::syncfs(File::open(&root)?)?;
    let synced = start.elapsed();
    let (entries, bytes) = *totals.lock().map_err(|_| "a worker failed")?;
    println!(
        "{entries} entries, {:.0} MB of tar: unpacked in {:.2} s ({:.0} MB/s), synced after {:.2} s, processor {:.2} s, peak memory {} MiB",
        bytes as f64 / 1e6,
        unpacked.as_secs_f64(),
        bytes as f64 / 1e6 / unpacked.as_secs_f64(),
        synced.as_secs_f64(),
        (processor_time() - cpu).as_secs_f64(),
        peak_memory() >> 10,
    );
    Ok(())
}

fn prepare(path: &Path, root: &Path, encrypt: bool) -> Result<Layer, Failure> {
    let (compression, media_type) = match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => (Compression::Gzip, format!("{}+gzip", media::OCI_LAYER)),
        Some("zst") => (Compression::Zstd, format!("{}+zstd", media::OCI_LAYER)),
        _ => (Compression::None, media::OCI_LAYER.to_owned()),
    };
    let mut decompressor = Decompressor::new(compression, &Limits::default())?;
    let (mut blob, mut tar, mut size) = (Hasher::new(Algorithm::Sha256), Hasher::new(Algorithm::Sha256), 0u64);
    let mut encryptor = encrypt.then(LayerEncryptor::new).transpose()?;
    let encrypted = root.join(format!("{}.blob", path.file_name().unwrap_or_default().display()));
    let mut copy = if encrypt { Some(File::create(&encrypted)?) } else { None };
    let mut file = File::open(path)?;
    let (mut input, mut output) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let length = file.read(&mut input)?;
        if length == 0 {
            break;
        }
        let mut rest = &input[..length];
        loop {
            let (taken, given) = decompressor.run(rest, &mut output)?;
            tar.update(&output[..given]);
            rest = &rest[taken..];
            if given < output.len() {
                break;
            }
        }
        let bytes = &mut input[..length];
        if let (Some(encryptor), Some(copy)) = (&mut encryptor, &mut copy) {
            encryptor.update(bytes)?;
            io::Write::write_all(copy, bytes)?;
        }
        blob.update(bytes);
        size += length as u64;
    }
    let key = encryptor.map(LayerEncryptor::finish);
    let media_type = if encrypt { format!("{media_type}+encrypted") } else { media_type };
    Ok(Layer {
        path: if encrypt { encrypted } else { path.to_owned() },
        descriptor: Descriptor::new(&media_type, blob.finish(), size),
        diff_id: tar.finish(),
        key,
    })
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// KiB.
fn peak_memory() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()
        })
        .unwrap_or_default()
}
