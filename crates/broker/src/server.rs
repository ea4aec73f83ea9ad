//! The HTTP server: TLS by default, bounded connections, header and handshake time limits, graceful end.

use std::{net::SocketAddr, sync::Arc, thread::JoinHandle, time::Duration};

use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;

use crate::{Broker, BrokerError, api, metrics::count};

/// Connections at a time; further ones wait to be accepted.
const MOST_CONNECTIONS: usize = 1024;
/// TLS handshake and request head each take this long at most.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// A connection is closed after this long, so that idle ones do not pile up.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// What is being answered when the server ends gets this long.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// How the service is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// TLS with the broker's certificate.
    #[default]
    Tls,
    /// Plain HTTP: behind something that ends TLS, or on loopback.
    PlainHttp,
}

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Handle {
    address: SocketAddr,
    transport: Transport,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// The address that is listened on, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL at which this machine reaches it.
    pub fn url(&self) -> String {
        let scheme = if self.transport == Transport::Tls { "https" } else { "http" };
        let mut address = self.address;
        if address.ip().is_unspecified() {
            let loopback = if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            address.set_ip(loopback);
        }
        format!("{scheme}://{address}")
    }

    /// Lets what is being answered end, and stops.
    pub fn shutdown(mut self) {
        self.stop_and_wait();
    }

    /// Waits until the server ends by itself, which it does only when its thread fails.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn stop_and_wait(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop_and_wait();
    }
}

/// Serves a broker on an address (port 0 takes a free one), on a thread of its own.
///
/// # Errors
/// [`BrokerError`]: the address or the certificate.
pub fn serve(broker: Arc<Broker>, address: SocketAddr, transport: Transport) -> Result<Handle, BrokerError> {
    let listen = |source| BrokerError::Listen { address, source };
    let acceptor = match transport {
        Transport::Tls => Some(acceptor(&broker)?),
        Transport::PlainHttp => {
            tracing::warn!(%address, "the broker serves plain HTTP: whoever is between can answer in its place");
            None
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_name("nacre-broker")
        .enable_all()
        .build()
        .map_err(listen)?;
    let listener = runtime.block_on(TcpListener::bind(address)).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let (stop, stopped) = watch::channel(false);
    let service = api::router(broker.clone(), transport == Transport::Tls);
    let thread = std::thread::Builder::new()
        .name("nacre-broker".into())
        .spawn(move || {
            runtime.block_on(accept(listener, acceptor, service, stopped, broker));
            runtime.shutdown_timeout(DRAIN_TIME);
        })
        .map_err(listen)?;
    Ok(Handle { address, transport, stop, thread: Some(thread) })
}

fn acceptor(broker: &Broker) -> Result<TlsAcceptor, BrokerError> {
    let fail = |e: &dyn std::fmt::Display| BrokerError::Tls(e.to_string());
    let chain = CertificateDer::pem_slice_iter(broker.keys.tls_cert_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| fail(&e))?;
    let key = PrivateKeyDer::from_pem_slice(broker.keys.tls_key_pem.as_bytes()).map_err(|e| fail(&e))?;
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| fail(&e))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| fail(&e))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    service: axum::Router,
    mut stopped: watch::Receiver<bool>,
    broker: Arc<Broker>,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: waiting helps, spinning does not.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = stopped.changed() => break,
        };
        // The limit of calls is an address's, so every call of a connection knows whose it is.
        let service = service.clone().layer(axum::Extension(api::Peer(peer)));
        let (acceptor, stopped, broker) = (acceptor.clone(), stopped.clone(), broker.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = tokio::time::timeout(CONNECTION_TIME, connection(stream, acceptor, service, stopped, broker)).await;
        });
    }
    drop(listener);
    let all = u32::try_from(MOST_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(DRAIN_TIME, places.acquire_many(all)).await;
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    service: axum::Router,
    stopped: watch::Receiver<bool>,
    broker: Arc<Broker>,
) {
    let _ = stream.set_nodelay(true);
    match acceptor {
        None => exchange(stream, service, stopped).await,
        Some(acceptor) => match tokio::time::timeout(HEAD_TIME, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => exchange(stream, service, stopped).await,
            Ok(Err(error)) => {
                count(&broker.metrics.handshakes_failed);
                tracing::debug!(%error, "TLS handshake failed");
            }
            Err(_) => {
                count(&broker.metrics.handshakes_failed);
                tracing::debug!("TLS handshake took too long");
            }
        },
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: axum::Router,
    mut stopped: watch::Receiver<bool>,
) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    let stop = async {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
