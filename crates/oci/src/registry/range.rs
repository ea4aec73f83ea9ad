//! A part of a blob, by `Range`: what is read lazily. Each endpoint is tried once; who asks decides how long to go on. An attempt after
//! one that gave wrong bytes begins at the next endpoint.

use std::io::Read as _;

use http::{Method, header};

use super::{
    blob::{self, parse_content_range},
    exchange::{Response, describe_io},
    remote::{Remote, RequestParts},
    retry::Failure,
    source::Endpoints,
};
use crate::{manifest::Descriptor, source::TransportError};

/// Fills `out` with a blob's bytes from `offset` on.
pub(super) fn read(
    endpoints: &Endpoints,
    descriptor: &Descriptor,
    offset: u64,
    out: &mut [u8],
    attempt: u32,
) -> Result<(), TransportError> {
    let mut order = endpoints.order();
    let first = attempt as usize % order.len().max(1);
    order.rotate_left(first);
    let what = format!("blob {}", descriptor.digest);
    let mut errors = Vec::new();
    for index in order {
        let remote = endpoints.remote(index);
        let Err(failure) = request(remote, descriptor, offset, out) else { return Ok(()) };
        if failure.is_transient() {
            endpoints.mark_broken(index);
        }
        tracing::debug!("{}: {what}: {}", remote.place(), failure.reason());
        errors.push((remote.endpoint.mirror, failure.into_error(&what, &remote.place(), attempt + 1)));
    }
    // The registry's word is the last one; a mirror need not have the blob.
    let primary = errors.iter().position(|(mirror, _)| !mirror).unwrap_or_default();
    Err(errors.swap_remove(primary).1)
}

fn request(remote: &Remote, descriptor: &Descriptor, offset: u64, out: &mut [u8]) -> Result<(), Failure> {
    if out.is_empty() {
        return Ok(());
    }
    let url = remote.url(&format!("blobs/{}", descriptor.digest))?;
    let last = offset + out.len() as u64 - 1;
    let mut response = remote.send(&remote.pull_scope(), &mut || {
        RequestParts::new(Method::GET, &url).header(header::RANGE, format!("bytes={offset}-{last}"))
    })?;
    match response.status {
        206 => check_range(&response, descriptor, offset, last)?,
        // A server, or a cache before it, that knows no ranges: what comes before is thrown away.
        200 => {
            blob::check_type(descriptor, &response)?;
            skip(&mut response, offset)?;
        }
        _ => return Err(response.into_failure()),
    }
    response
        .body
        .read_exact(out)
        .map_err(|error| Failure::Network(format!("{}: {}", response.url, describe_io(&error))))
}

fn check_range(response: &Response, descriptor: &Descriptor, offset: u64, last: u64) -> Result<(), Failure> {
    blob::check_type(descriptor, response)?;
    let text = response.headers.get(header::CONTENT_RANGE).map(header::HeaderValue::as_bytes).unwrap_or_default();
    let right = parse_content_range(text).is_some_and(|range| {
        range.start == offset && range.end == last && range.total.is_none_or(|total| total == descriptor.size)
    });
    if right {
        return Ok(());
    }
    let text = super::exchange::printable(&String::from_utf8_lossy(text), 80);
    let size = descriptor.size;
    let reason =
        format!("{}: Content-Range '{text}', but bytes {offset}-{last} of {size} were asked for", response.url);
    Err(Failure::Protocol(reason))
}

fn skip(response: &mut Response, offset: u64) -> Result<(), Failure> {
    let skipped = std::io::copy(&mut (&mut response.body).take(offset), &mut std::io::sink());
    match skipped {
        Ok(count) if count == offset => Ok(()),
        Ok(count) => Err(Failure::Network(format!("{}: the blob ended at byte {count}", response.url))),
        Err(error) => Err(Failure::Network(format!("{}: {}", response.url, describe_io(&error)))),
    }
}
