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
