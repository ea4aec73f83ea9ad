//! The last step of a build: the EROFS image, the key, the table, the metadata blob.

use std::{
    fs::File,
    io::{self, BufWriter, Read as _, Seek as _, Write},
};

use ring::digest::{Context, SHA256};
use zerocopy::{IntoBytes as _, little_endian as le};

use super::{BuildError, Builder, Built};
use crate::{
    chunk::sha256,
    erofs::{WriteOptions, write as write_erofs},
    format::{BLOCK, BlobEntry, CONFIG_LIMIT, DIGEST, LEAVES_LIMIT, LeafEntry, Summary},
    frames::FrameWriter,
    keys::MetadataKey,
    table,
};

/// zstd's level for metadata: it is small, and every start waits for it.
pub(crate) const LEVEL: i32 = 9;
/// The tag of the EROFS image's device.
const TAG: &str = "data";

pub(super) fn write<E>(builder: Builder<'_>, config: &[u8]) -> Result<Built, BuildError<E>> {
    let Builder { options, tree, device, mut stored, content_bytes, mut report } = builder;
    if config.len() > CONFIG_LIMIT as usize {
        return Err(BuildError::Large("its config has more than 4 MiB"));
    }
    let blobs = stored.number().ok_or(BuildError::Blobs)?;
    let table_hash = sha256(stored.entries.as_bytes());
    let blocks =
        u32::try_from(device.bytes() / BLOCK).map_err(|_| BuildError::Large("its files have more than 16 TiB"))?;
    let (mut erofs, erofs_bytes, erofs_hash) = {
        let mut spool = Hashing { to: BufWriter::new(temporary()?), hash: Context::new(&SHA256) };
        // The UUID says what the files are, and no more than the rest of the image does.
        let uuid = uuid(&table_hash);
        let write = WriteOptions { uuid, device_tag: TAG, device_blocks: blocks };
        let written = write_erofs(&tree, &write, &mut spool)?;
        let file = spool.to.into_inner().map_err(|error| BuildError::Spool(error.into_error()))?;
        (file, written.bytes, spool.hash.finish())
    };
    drop(tree);

    let leaves = stored.entries.len().div_ceil(crate::format::LEAF_ENTRIES);
    let summary = Summary {
        device_bytes: device.bytes().into(),
        erofs_bytes: erofs_bytes.into(),
        content_bytes: content_bytes.into(),
        chunks: (stored.entries.len() as u64).into(),
        blobs: u32::try_from(blobs.len()).unwrap_or(u32::MAX).into(),
        leaves: u32::try_from(leaves).ok().filter(|leaves| *leaves <= LEAVES_LIMIT).unwrap_or(u32::MAX).into(),
        config_bytes: u32::try_from(config.len()).unwrap_or(u32::MAX).into(),
        trace: 0.into(),
        reserved: [0; 16],
    };
    summary.check().map_err(|_| BuildError::Large("its table or its metadata is beyond the format's limits"))?;
    let named: Vec<BlobEntry> =
        blobs.iter().map(|blob| BlobEntry { digest: blob.digest, size: blob.size.into() }).collect();

    let mut head = Context::new(&SHA256);
    for part in [summary.as_bytes(), named.as_bytes(), &sha256(config), erofs_hash.as_ref()] {
        head.update(part);
    }
    let mut stream_hash = [0; DIGEST];
    stream_hash.copy_from_slice(head.finish().as_ref());
    let key = options.domain.map(|domain| domain.metadata_key(&stream_hash, &table_hash));

    let (sealed, leaves) = table::seal(&stored.entries, key.as_ref());
    let mut table = temporary()?;
    table.write_all(&sealed).and_then(|()| table.rewind()).map_err(BuildError::Spool)?;
    let sections = Sections { summary: &summary, blobs: &named, leaves: &leaves, config, trace: &[] };
    let metadata = write_sections(&sections, &mut erofs, key.as_ref()).map_err(BuildError::Spool)?;

    report.content_bytes = content_bytes;
    (report.new_chunks, report.new_bytes, report.shared_bytes) =
        (stored.new_chunks, stored.new_bytes, stored.shared_bytes);
    report.table_bytes = sealed.len() as u64;
    report.metadata_bytes = metadata.metadata().map_err(BuildError::Spool)?.len();
    Ok(Built { metadata, table, blobs, key, report })
}

/// What a metadata blob says, but for the EROFS image.
pub(super) struct Sections<'a> {
    pub(super) summary: &'a Summary,
    pub(super) blobs: &'a [BlobEntry],
    pub(super) leaves: &'a [LeafEntry],
    pub(super) config: &'a [u8],
    pub(super) trace: &'a [le::U64],
}

/// Writes a metadata blob; the EROFS image comes from the beginning of a file.
pub(super) fn write_sections(sections: &Sections<'_>, erofs: &mut File, key: Option<&MetadataKey>) -> io::Result<File> {
    let mut frames = FrameWriter::new(BufWriter::new(tempfile::tempfile()?), key, LEVEL)?;
    let Sections { summary, blobs, leaves, config, trace } = sections;
    for part in [summary.as_bytes(), blobs.as_bytes(), leaves.as_bytes(), config, trace.as_bytes()] {
        frames.write_all(part)?;
    }
    erofs.rewind()?;
    let length = summary.erofs_bytes.get();
    if io::copy(&mut erofs.take(length), &mut frames)? != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut file = frames.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok(file)
}

fn temporary<E>() -> Result<File, BuildError<E>> {
    tempfile::tempfile().map_err(BuildError::Spool)
}

/// A UUID of version 8 (RFC 9562): of the content.
fn uuid(hash: &[u8; DIGEST]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.iter_mut().zip(hash).for_each(|(to, from)| *to = *from);
    uuid[6] = uuid[6] & 0x0F | 0x80;
    uuid[8] = uuid[8] & 0x3F | 0x80;
    uuid
}

struct Hashing<W> {
    to: W,
    hash: Context,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.to.write(bytes)?;
        self.hash.update(bytes.get(..length).unwrap_or_default());
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
