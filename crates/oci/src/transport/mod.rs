//! Images in directories and archives: `oci:`, `oci-archive:`, `docker-archive:` and `dir:`, each as an [`ImageSource`] and as an
//! [`ImageSink`].
//!
//! Nothing is unpacked: an archive is read in place by an index of its entries. What is written becomes visible by one rename when
//! it is complete and durable; a copy that fails leaves nothing, and one that is killed leaves a `.nacre-tmp-…` that the next copy
//! to the same place removes.

mod dir;
mod docker_archive;
mod files;
mod layout;
mod oci_archive;
mod oci_dir;
mod tar;
mod tar_writer;

pub use docker_archive::{SavedImage, parse_saved};
pub use layout::parse_index;
pub use tar::{TarError, TarIndex};

use crate::{
    reference::Location,
    registry::{Client, DockerSink, DockerSource},
    source::{ImageSink, ImageSource, TransportError},
};

/// Opens an image for reading, wherever it is.
///
/// # Errors
/// [`TransportError`]
pub fn open_source(location: &Location, client: &Client) -> Result<Box<dyn ImageSource>, TransportError> {
    match location {
        Location::Docker(reference) => Ok(Box::new(DockerSource::new(client, reference)?)),
        _ => open_local_source(location),
    }
}

/// Opens a place for writing an image to it.
///
/// # Errors
/// [`TransportError`]
pub fn open_sink(location: &Location, client: &Client) -> Result<Box<dyn ImageSink>, TransportError> {
    match location {
        Location::Docker(reference) => Ok(Box::new(DockerSink::new(client, reference)?)),
        _ => open_local_sink(location),
    }
}

/// Opens an image in a directory or an archive for reading.
///
/// # Errors
/// [`TransportError`]; `Unsupported` for a registry.
pub fn open_local_source(location: &Location) -> Result<Box<dyn ImageSource>, TransportError> {
    Ok(match location {
        Location::OciDir { path, name } => Box::new(oci_dir::open_source(path, name.as_deref())?),
        Location::OciArchive { path, name } => Box::new(oci_archive::open_source(path, name.as_deref())?),
        Location::DockerArchive { path, reference } => {
            Box::new(docker_archive::DockerArchiveSource::open(path, reference.as_ref())?)
        }
        Location::Dir(path) => Box::new(dir::DirSource::open(path)?),
        Location::Docker(_) => return Err(not_local(location)),
    })
}

/// Opens a directory or an archive for writing an image to it.
///
/// # Errors
/// [`TransportError`]; `Unsupported` for a registry.
pub fn open_local_sink(location: &Location) -> Result<Box<dyn ImageSink>, TransportError> {
    Ok(match location {
        Location::OciDir { path, name } => Box::new(oci_dir::OciDirSink::create(path, name.as_deref())?),
        Location::OciArchive { path, name } => Box::new(oci_archive::OciArchiveSink::create(path, name.as_deref())?),
        Location::DockerArchive { path, reference } => {
            Box::new(docker_archive::DockerArchiveSink::create(path, reference.as_ref())?)
        }
        Location::Dir(path) => Box::new(dir::DirSink::create(path)?),
        Location::Docker(_) => return Err(not_local(location)),
    })
}

fn not_local(location: &Location) -> TransportError {
    TransportError::Unsupported {
        what: "being opened as a directory or an archive".into(),
        place: location.to_string(),
    }
}
