//! A gRPC client for one unary call: HTTP/2 with prior knowledge, or over TLS.
//!
//! ```text
//! POST /keyprovider.KeyProviderService/<method>, content-type application/grpc
//! body      compressed u8 (0), length u32 BE, message          the same back, then the trailer grpc-status
//! ```
//!
//! The only async code of this crate. It runs to its end, or to its deadline, on a runtime and a thread of its own.

use std::{future::Future, io, sync::Arc, thread};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, Method, Request, StatusCode};
use nacre_core::SecretBytes;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::{ANSWER_LIMIT, Call, tls, wire};
use crate::crypt::SchemeError;

const PREFIX: usize = 5;
const HEADER_LIMIT: u32 = 16 << 10;

pub(super) fn ask(
    call: &Call<'_>,
    address: &str,
    tls: Option<&tls::Options>,
    method: &str,
    question: &SecretBytes,
) -> Result<SecretBytes, SchemeError> {
    let mut body = Vec::with_capacity(PREFIX + question.len() + 16);
    body.resize(PREFIX, 0);
    wire::put_bytes(&mut body, 1, question.expose());
    let length = u32::try_from(body.len() - PREFIX).map_err(|_| SchemeError::malformed("it is too large for gRPC"))?;
    for (slot, byte) in body.iter_mut().skip(1).zip(length.to_be_bytes()) {
        *slot = byte;
    }
    // A thread of its own: the caller's may belong to another runtime, in which no other can be entered.
    let answer = thread::scope(|scope| {
        scope.spawn(|| run(call, exchange(call, address, tls, method, Bytes::from(body)))).join()
    });
    answer.unwrap_or_else(|_| Err(SchemeError::Library("the gRPC client")))
}

fn run<T>(call: &Call<'_>, work: impl Future<Output = Result<T, SchemeError>>) -> Result<T, SchemeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| call.failed(format!("cannot be asked: {error}")))?;
    let answer = runtime.block_on(async { tokio::time::timeout(call.timeout, work).await });
    // A name look-up that hangs sits in a thread of the runtime: do not wait for it.
    runtime.shutdown_background();
    answer.unwrap_or_else(|_| Err(call.timed_out()))
}

async fn exchange(
    call: &Call<'_>,
    address: &str,
    tls: Option<&tls::Options>,
    method: &str,
    body: Bytes,
) -> Result<SecretBytes, SchemeError> {
    let unreachable = |error: io::Error| call.failed(format!("cannot be reached: {error}"));
    if let Some(path) = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")) {
        let socket = UnixStream::connect(path).await.map_err(unreachable)?;
        return unary(call, socket, "http", "localhost", method, body).await;
    }
    let authority = ["http://", "https://", "tcp://", "dns:///"]
        .iter()
        .find_map(|prefix| address.strip_prefix(prefix))
        .unwrap_or(address)
        .trim_end_matches('/');
    let socket = TcpStream::connect(authority).await.map_err(unreachable)?;
    let Some(options) = tls else { return unary(call, socket, "http", authority, method, body).await };

    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    let name = if options.server_name.is_empty() { host } else { options.server_name.as_str() };
    let name =
        ServerName::try_from(name.to_owned()).map_err(|_| call.failed(format!("has no server name: '{name:.100}'")))?;
    let config = options.client_config().map_err(|problem| call.failed(problem))?;
    let socket = TlsConnector::from(Arc::clone(&config))
        .connect(name, socket)
        .await
        .map_err(|error| call.failed(format!("TLS handshake failed: {error}")))?;
    unary(call, socket, "https", authority, method, body).await
}

async fn unary<S>(
    call: &Call<'_>,
    socket: S,
    scheme: &str,
    authority: &str,
    method: &str,
    body: Bytes,
) -> Result<SecretBytes, SchemeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |error: h2::Error| call.failed(format!("broke off HTTP/2: {error}"));
    let (client, connection) =
        h2::client::Builder::new().max_header_list_size(HEADER_LIMIT).handshake(socket).await.map_err(broken)?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("{scheme}://{authority}/keyprovider.KeyProviderService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", format!("{}m", call.timeout.as_millis().min(99_999_999)))
        .body(())
        .map_err(|error| call.failed(format!("has no valid address: {error}")))?;
    let mut client = client.ready().await.map_err(broken)?;
    let (response, mut stream) = client.send_request(request, false).map_err(broken)?;
    stream.send_data(body, true).map_err(broken)?;
    let (head, mut body) = response.await.map_err(broken)?.into_parts();
    if head.status != StatusCode::OK {
        return Err(call.failed(format!("answered with HTTP status {}", head.status)));
    }
    // An error may come without a body, its status then in the only headers.
    check_status(call, &head.headers)?;
    let message = read_message(call, &mut body).await?;
    if let Some(trailers) = body.trailers().await.map_err(broken)? {
        check_status(call, &trailers)?;
    }
    driver.abort();
    let [0, _, _, _, _, rest @ ..] = message.as_slice() else {
        return Err(call.failed("gave a compressed or cut gRPC message"));
    };
    wire::decode_field_1(rest)
        .map(|bytes| SecretBytes::new(bytes.to_vec()))
        .ok_or_else(|| call.failed("gave a malformed gRPC message"))
}

async fn read_message(call: &Call<'_>, body: &mut RecvStream) -> Result<Zeroizing<Vec<u8>>, SchemeError> {
    let mut message = Zeroizing::new(Vec::with_capacity(64 << 10));
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|error| call.failed(format!("broke off HTTP/2: {error}")))?;
        if message.len() + chunk.len() > ANSWER_LIMIT {
            return Err(call.failed(format!("sent more than {ANSWER_LIMIT} bytes")));
        }
        message.extend_from_slice(&chunk);
        let _ = body.flow_control().release_capacity(chunk.len());
    }
    let announced =
        message.get(1..PREFIX).map(|length| length.iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)));
    match announced {
        Some(length) if length + PREFIX == message.len() => Ok(message),
        // No message at all: the trailers say why.
        None if message.is_empty() => Ok(Zeroizing::new(vec![0; PREFIX])),
        _ => Err(call.failed("gave a cut gRPC message")),
    }
}

fn check_status(call: &Call<'_>, headers: &HeaderMap) -> Result<(), SchemeError> {
    match headers.get("grpc-status").map(|value| value.as_bytes()) {
        None | Some(b"0") => Ok(()),
        Some(code) => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(300).collect::<String>();
            let message = headers.get("grpc-message").map(|value| text(value.as_bytes())).unwrap_or_default();
            Err(call.failed(format!("refused: {message} (gRPC status {})", text(code))))
        }
    }
}
