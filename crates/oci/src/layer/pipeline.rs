//! The threads of a layer and the buffers between them.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use nacre_core::{Digest, Hasher, Task};

use super::{LayerError, LayerPlan, decompress::DecompressError, decompress::Decompressor, is_plain};
use crate::{
    crypt::LayerDecryptor,
    manifest::Compression,
    unpack::{AppliedLayer, Applier, UnpackError},
};

/// Bytes of a buffer between reading and decompressing, and how many there are.
const BLOB_BUFFER: (usize, usize) = (128 << 10, 6);
/// Bytes of a buffer between decompressing and unpacking, and how many there are.
const TAR_BUFFER: (usize, usize) = (256 << 10, 8);

/// What came out.
pub(super) struct Found {
    pub(super) layer: AppliedLayer,
    pub(super) diff_id: Digest,
}

/// A buffer and how much of it is filled.
struct Filled {
    buffer: Vec<u8>,
    length: usize,
}

impl Filled {
    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }
}

/// The end of a pipe that fills buffers.
struct Producer {
    empty: Receiver<Vec<u8>>,
    full: SyncSender<Filled>,
}

/// The end of a pipe that empties them.
struct Consumer {
    full: Receiver<Filled>,
    empty: SyncSender<Vec<u8>>,
}

/// The other end is gone.
struct Gone;

fn pipe((size, count): (usize, usize)) -> (Producer, Consumer) {
    let (full_in, full_out) = sync_channel(count);
    let (empty_in, empty_out) = sync_channel(count);
    for _ in 0..count {
        // There is room for all of them.
        let _ = empty_in.try_send(vec![0; size]);
    }
    (Producer { empty: empty_out, full: full_in }, Consumer { full: full_out, empty: empty_in })
}

impl Producer {
    fn buffer(&self) -> Result<Vec<u8>, Gone> {
        self.empty.recv().map_err(|_| Gone)
    }

    fn send(&self, buffer: Vec<u8>, length: usize) -> Result<(), Gone> {
        self.full.send(Filled { buffer, length }).map_err(|_| Gone)
    }
}

impl Consumer {
    /// `None` at the end.
    fn next(&self) -> Option<Filled> {
        self.full.recv().ok()
    }

    fn give_back(&self, filled: Filled) {
        let _ = self.empty.try_send(filled.buffer);
    }

    /// Lets the producer go on to its end without looking at what it makes.
    fn drain(&self) {
        while let Some(filled) = self.next() {
            self.give_back(filled);
        }
    }
}

pub(super) fn run<R: Read + Send>(
    stream: R,
    plan: &LayerPlan<'_>,
    decryptor: Option<LayerDecryptor>,
    root: OwnedFd,
    progress: &dyn Task,
) -> Result<Found, LayerError> {
    let digest = plan.descriptor.digest;
    let applier = Applier::new(root, plan.options.clone()).map_err(|source| LayerError::Unpack { digest, source })?;
    let give_up = AtomicBool::new(false);
    let (blob_in, blob_out) = pipe(if is_compressed(plan) { BLOB_BUFFER } else { TAR_BUFFER });
    thread::scope(|scope| {
        let spawned = |source| LayerError::Thread { digest, source };
        let give_up = &give_up;
        let reader = thread::Builder::new()
            .name("layer-read".into())
            .spawn_scoped(scope, move || read(stream, plan, decryptor, &blob_in, progress, give_up))
            .map_err(spawned)?;
        let (decompressed, applied) = if is_compressed(plan) {
            let (tar_in, tar_out) = pipe(TAR_BUFFER);
            let decompressor = thread::Builder::new()
                .name("layer-inflate".into())
                .spawn_scoped(scope, move || decompress(plan, &blob_out, &tar_in, give_up))
                .map_err(spawned)?;
            let applied = apply(applier, &tar_out, None, give_up);
            drop(tar_out);
            (joined(decompressor.join()), applied)
        } else {
            let hasher = (!is_plain(plan)).then(|| Hasher::new(plan.diff_id.algorithm()));
            let applied = apply(applier, &blob_out, hasher, give_up);
            blob_out.drain();
            (Ok(None), applied)
        };
        let applied = applied.map_err(|source| LayerError::Unpack { digest, source });
        // The first of these that went wrong is what is wrong; what follows it only saw the consequences.
        joined(reader.join())?;
        let decompressed = decompressed?;
        let (layer, hashed) = applied?;
        Ok(Found { layer, diff_id: decompressed.or(hashed).unwrap_or(digest) })
    })
}

fn is_compressed(plan: &LayerPlan<'_>) -> bool {
    plan.layer_type.compression != Compression::None
}

/// A thread's result; its panic is ours.
fn joined<T>(result: thread::Result<T>) -> T {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Reads the blob to its end and checks it. Stops without an error when nobody wants the rest.
fn read<R: Read>(
    mut stream: R,
    plan: &LayerPlan<'_>,
    mut decryptor: Option<LayerDecryptor>,
    out: &Producer,
    progress: &dyn Task,
    give_up: &AtomicBool,
) -> Result<(), LayerError> {
    let digest = plan.descriptor.digest;
    let mut hasher = Hasher::new(digest.algorithm());
    let mut found = 0u64;
    loop {
        let Ok(mut buffer) = out.buffer() else { return Ok(()) };
        if give_up.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (length, error) = fill(&mut stream, &mut buffer);
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        found += length as u64;
        if found > plan.descriptor.size {
            return Err(LayerError::Size { digest, expected: plan.descriptor.size, found });
        }
        hasher.update(bytes);
        if let Some(decryptor) = &mut decryptor {
            decryptor.update(bytes).map_err(|source| LayerError::Decrypt { digest, source })?;
        }
        progress.advance(length as u64);
        if let Some(source) = error {
            return Err(LayerError::Read { digest, source });
        }
        if length == 0 {
            break;
        }
        if out.send(buffer, length).is_err() {
            return Ok(());
        }
    }
    if found != plan.descriptor.size {
        return Err(LayerError::Size { digest, expected: plan.descriptor.size, found });
    }
    let found = hasher.finish();
    if found != digest {
        return Err(LayerError::Digest { expected: digest, found });
    }
    decryptor.map_or(Ok(()), LayerDecryptor::finish).map_err(|source| LayerError::Decrypt { digest, source })
}

/// Fills a buffer as far as the stream goes; gives the error that ended it, if it was one.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut length = 0;
    while let Some(room) = buffer.get_mut(length..).filter(|room| !room.is_empty()) {
        match stream.read(room) {
            Ok(0) => break,
            Ok(more) => length += more.min(room.len()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (length, Some(error)),
        }
    }
    (length, None)
}

/// Decompresses to the end; gives the digest of what came out, or `None` where nobody wanted all of it.
fn decompress(
    plan: &LayerPlan<'_>,
    blob: &Consumer,
    out: &Producer,
    give_up: &AtomicBool,
) -> Result<Option<Digest>, LayerError> {
    let digest = plan.descriptor.digest;
    match decompress_all(plan, blob, out) {
        Ok(found) => {
            if found.is_none() && !give_up.load(Ordering::Relaxed) {
                blob.drain();
            }
            Ok(found)
        }
        Err(DecompressError::Limit(source)) => {
            give_up.store(true, Ordering::Relaxed);
            Err(LayerError::Limit { digest, source })
        }
        // The reader stopped early since unpacking failed: that the blob ends in the middle is a consequence.
        Err(DecompressError::Corrupt(_)) if give_up.load(Ordering::Relaxed) => Ok(None),
        Err(DecompressError::Corrupt(reason)) => {
            blob.drain();
            let format = if plan.layer_type.compression == Compression::Gzip { "gzip" } else { "zstd" };
            Err(LayerError::Corrupt { digest, format, reason })
        }
    }
}

fn decompress_all(plan: &LayerPlan<'_>, blob: &Consumer, out: &Producer) -> Result<Option<Digest>, DecompressError> {
    let mut decompressor = Decompressor::new(plan.layer_type.compression, &plan.options.limits)?;
    let mut hasher = Hasher::new(plan.diff_id.algorithm());
    let Ok(mut buffer) = out.buffer() else { return Ok(None) };
    let mut length = 0;
    while let Some(filled) = blob.next() {
        let mut input = filled.bytes();
        loop {
            let room = buffer.get_mut(length..).unwrap_or_default();
            let wanted = room.len();
            let (taken, given) = decompressor.run(input, room)?;
            hasher.update(room.get(..given).unwrap_or_default());
            input = input.get(taken..).unwrap_or_default();
            length += given;
            if given < wanted {
                break;
            }
            let Ok(next) = out.send(buffer, length).and_then(|()| out.buffer()) else { return Ok(None) };
            (buffer, length) = (next, 0);
        }
        blob.give_back(filled);
    }
    decompressor.finish()?;
    if length > 0 && out.send(buffer, length).is_err() {
        return Ok(None);
    }
    Ok(Some(hasher.finish()))
}

/// Applies the tar to its end.
fn apply(
    mut applier: Applier,
    tar: &Consumer,
    mut hasher: Option<Hasher>,
    give_up: &AtomicBool,
) -> Result<(AppliedLayer, Option<Digest>), UnpackError> {
    let result = (|| {
        while let Some(filled) = tar.next() {
            if let Some(hasher) = &mut hasher {
                hasher.update(filled.bytes());
            }
            applier.feed(filled.bytes())?;
            tar.give_back(filled);
        }
        applier.finish()
    })();
    match result {
        Ok(layer) => Ok((layer, hasher.map(Hasher::finish))),
        Err(error) => {
            // A tar that makes no sense may be the consequence of a wrong blob or key, which the rest of the blob will tell.
            if !matches!(error, UnpackError::Tar { .. }) {
                give_up.store(true, Ordering::Relaxed);
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::NoProgress;
    use nacre_testkit::{Compression as Compress, Rng};

    use super::*;
    use crate::{manifest::Descriptor, unpack::UnpackOptions};

    const FORMATS: [(Compress, &str); 2] = [(Compress::Gzip, "+gzip"), (Compress::Zstd, "+zstd")];

    /// Bytes that take some buffers, compressed.
    fn blob(compress: Compress, suffix: &str) -> (Digest, Descriptor, Vec<u8>) {
        let tar = Rng::new(1).bytes(2 << 20);
        let blob = compress.apply(&tar);
        let descriptor = Descriptor::of(format!("application/vnd.oci.image.layer.v1.tar{suffix}").as_str(), &blob);
        (Digest::sha256(&tar), descriptor, blob)
    }

    /// What the decompressor says of these bytes, after which the blob just ends, and all of whose output is wanted.
    fn decompressed(plan: &LayerPlan<'_>, bytes: &[u8], give_up: bool) -> Result<Option<Digest>, LayerError> {
        let give_up = AtomicBool::new(give_up);
        let ((blob_in, blob_out), (tar_in, tar_out)) = (pipe(BLOB_BUFFER), pipe(TAR_BUFFER));
        thread::scope(|scope| {
            scope.spawn(move || {
                for part in bytes.chunks(BLOB_BUFFER.0) {
                    let Ok(mut buffer) = blob_in.buffer() else { return };
                    buffer[..part.len()].copy_from_slice(part);
                    if blob_in.send(buffer, part.len()).is_err() {
                        return;
                    }
                }
            });
            scope.spawn(move || tar_out.drain());
            // Both ends go with its end, so that neither thread waits for it.
            let (blob_out, tar_in) = (blob_out, tar_in);
            decompress(plan, &blob_out, &tar_in, &give_up)
        })
    }

    #[test]
    fn a_decompressor_that_is_told_to_give_up_calls_nothing_corrupt() {
        for (compress, suffix) in FORMATS {
            let (tar, descriptor, blob) = blob(compress, suffix);
            let options = UnpackOptions::default();
            let plan = LayerPlan::new(&descriptor, tar, None, &options).unwrap();
            // Wherever the reader stopped: before the first byte, in the header, in the data, before the checksum.
            for length in [0, 1, 5, 1000, BLOB_BUFFER.0, 1 << 20, blob.len() - 4, blob.len() - 1] {
                let cut = &blob[..length];
                assert!(matches!(decompressed(&plan, cut, true), Ok(None)), "{suffix}, {length}");
                // Where nobody gave up, it is.
                assert!(
                    matches!(decompressed(&plan, cut, false), Err(LayerError::Corrupt { .. })),
                    "{suffix}, {length}"
                );
            }
            // What came in whole is what it is, and says so.
            for give_up in [false, true] {
                assert_eq!(decompressed(&plan, &blob, give_up).unwrap(), Some(tar), "{suffix}");
            }
        }
    }

    /// A blob during whose second read the disk gets full: the unpacker gives up then.
    struct UntilFull<'a> {
        blob: &'a [u8],
        reads: usize,
        give_up: &'a AtomicBool,
    }

    impl Read for UntilFull<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.reads += 1;
            if self.reads == 2 {
                self.give_up.store(true, Ordering::Relaxed);
            }
            self.blob.read(buffer)
        }
    }

    #[test]
    fn when_unpacking_fails_reader_and_decompressor_end_without_an_error_of_their_own() {
        for (compress, suffix) in FORMATS {
            let (tar, descriptor, blob) = blob(compress, suffix);
            let options = UnpackOptions::default();
            let plan = LayerPlan::new(&descriptor, tar, None, &options).unwrap();
            let give_up = AtomicBool::new(false);
            let ((blob_in, blob_out), (tar_in, tar_out)) = (pipe(BLOB_BUFFER), pipe(TAR_BUFFER));
            let stream = UntilFull { blob: &blob, reads: 0, give_up: &give_up };
            let (read, decompressed) = thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    let blob_in = blob_in;
                    read(stream, &plan, None, &blob_in, &NoProgress, &give_up)
                });
                // The unpacker still takes what comes, so that nothing but the blob's end stops the decompressor.
                scope.spawn(move || tar_out.drain());
                let decompressed = decompress(&plan, &blob_out, &tar_in, &give_up);
                drop((blob_out, tar_in));
                (reader.join().unwrap(), decompressed)
            });
            read.unwrap();
            assert!(matches!(decompressed, Ok(None)), "{suffix}: {decompressed:?}");
        }
    }
}
