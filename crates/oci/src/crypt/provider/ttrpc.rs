//! A ttrpc client for one unary call over a unix socket.
//!
//! ```text
//! frame     length u32 BE, stream u32 BE (odd from a client), type u8 (1 request, 2 response), flags u8, data
//! Request   1 service, 2 method, 3 payload, 4 timeout in ns
//! Response  1 Status { 1 code, 2 message }, 2 payload
//! ```
//!
//! Written here since the call must end by its deadline whatever the peer does, and needs nothing else of a ttrpc library.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use nacre_core::SecretBytes;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use zeroize::Zeroizing;

use super::{
    ANSWER_LIMIT, Call,
    wire::{Value, decode_field_1, fields, put_bytes, put_number},
};
use crate::crypt::SchemeError;

const SERVICE: &[u8] = b"keyprovider.KeyProviderService";
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const STREAM: u32 = 1;

pub(super) fn ask(
    call: &Call<'_>,
    address: &str,
    method: &str,
    question: &SecretBytes,
) -> Result<SecretBytes, SchemeError> {
    let deadline = Instant::now() + call.timeout;
    let mut socket = open(call, address, deadline)?;
    let frame = request(call, method, question)?;
    let fail = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => call.timed_out(),
        _ => call.failed(format!("cut the connection: {error}")),
    };
    socket.set_write_timeout(Some(left(call, deadline)?)).map_err(fail)?;
    socket.write_all(&frame).map_err(fail)?;
    loop {
        let mut header = [0; HEADER];
        read_exact(call, &mut socket, &mut header, deadline)?;
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _] = header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > ANSWER_LIMIT {
            return Err(
                call.failed(format!("announced an answer of {length} bytes; at most {ANSWER_LIMIT} are allowed"))
            );
        }
        let mut data = Zeroizing::new(vec![0; length]);
        read_exact(call, &mut socket, &mut data, deadline)?;
        // Frames of other streams or kinds are not ours to judge.
        if kind == RESPONSE && u32::from_be_bytes([s0, s1, s2, s3]) == STREAM {
            return response(&data).map_err(|problem| call.failed(problem));
        }
    }
}

fn open(call: &Call<'_>, address: &str, deadline: Instant) -> Result<UnixStream, SchemeError> {
    let path = address
        .strip_prefix("unix://")
        .or_else(|| address.strip_prefix("unix:"))
        .or_else(|| address.starts_with('/').then_some(address))
        .ok_or_else(|| {
            SchemeError::Unsupported(format!("the ttrpc address '{address:.100}': expected unix://<path>"))
        })?;
    let fail = |error: rustix::io::Errno| match error {
        rustix::io::Errno::AGAIN | rustix::io::Errno::TIMEDOUT => call.timed_out(),
        _ => call.failed(format!("cannot be reached: {error}")),
    };
    let target = match path.strip_prefix('@') {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
        None => SocketAddrUnix::new(path),
    };
    let target = target.map_err(fail)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(fail)?;
    // Bounds connecting too, which blocks while the backlog of a peer that does not accept is full.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left(call, deadline)?)).map_err(fail)?;
    connect(&socket, &target).map_err(fail)?;
    Ok(socket.into())
}

fn request(call: &Call<'_>, method: &str, question: &SecretBytes) -> Result<Zeroizing<Vec<u8>>, SchemeError> {
    // With room for all, so that the question is not left behind where smaller allocations were.
    let room = question.len() + 256;
    let mut payload = Zeroizing::new(Vec::with_capacity(room));
    put_bytes(&mut payload, 1, question.expose());
    let mut body = Zeroizing::new(Vec::with_capacity(room));
    put_bytes(&mut body, 1, SERVICE);
    put_bytes(&mut body, 2, method.as_bytes());
    put_bytes(&mut body, 3, &payload);
    put_number(&mut body, 4, u64::try_from(call.timeout.as_nanos()).unwrap_or(u64::MAX));
    let length = u32::try_from(body.len()).map_err(|_| SchemeError::malformed("it is too large for ttrpc"))?;
    let mut frame = Zeroizing::new(Vec::with_capacity(room));
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&STREAM.to_be_bytes());
    frame.extend_from_slice(&[REQUEST, 0]);
    frame.extend_from_slice(&body);
    Ok(frame)
}

fn response(data: &[u8]) -> Result<SecretBytes, String> {
    let malformed = || "gave a malformed ttrpc response".to_owned();
    let mut payload: &[u8] = &[];
    for (number, value) in fields(data).ok_or_else(malformed)? {
        let Value::Bytes(range) = value else { continue };
        let bytes = data.get(range).ok_or_else(malformed)?;
        match number {
            1 => status(bytes)?,
            2 => payload = bytes,
            _ => {}
        }
    }
    decode_field_1(payload).map(|bytes| SecretBytes::new(bytes.to_vec())).ok_or_else(malformed)
}

fn status(bytes: &[u8]) -> Result<(), String> {
    let mut code = 0;
    let mut message = String::new();
    for (number, value) in fields(bytes).ok_or("gave a malformed ttrpc status")? {
        match (number, value) {
            (1, Value::Number(number)) => code = number,
            (2, Value::Bytes(range)) => {
                message = String::from_utf8_lossy(bytes.get(range).unwrap_or_default()).chars().take(300).collect();
            }
            _ => {}
        }
    }
    if code == 0 { Ok(()) } else { Err(format!("refused: {message} (code {code})")) }
}

fn left(call: &Call<'_>, deadline: Instant) -> Result<Duration, SchemeError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(call.timed_out()) } else { Ok(left) }
}

/// Fills the buffer before the deadline, also from a peer that sends a byte now and then.
fn read_exact(
    call: &Call<'_>,
    socket: &mut UnixStream,
    mut buffer: &mut [u8],
    deadline: Instant,
) -> Result<(), SchemeError> {
    while !buffer.is_empty() {
        let cut = |error: std::io::Error| call.failed(format!("cut the connection: {error}"));
        socket.set_read_timeout(Some(left(call, deadline)?)).map_err(cut)?;
        match socket.read(buffer) {
            Ok(0) => return Err(call.failed("cut the connection")),
            Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => return Err(call.timed_out()),
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(cut(error)),
            },
        }
    }
    Ok(())
}
