//! The server's certificate, and whose certificates clients have to have.

use std::sync::Arc;

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

use super::NbdError;

/// TLS for a server.
#[derive(Clone)]
pub struct Tls {
    pub(super) config: Arc<ServerConfig>,
    pub(super) required: bool,
}

impl Tls {
    /// From PEM: the certificate and those above it, its key, and, where only clients with a certificate are to be served, the
    /// authorities that sign those. Nothing is answered before a client has asked for TLS, unless [`optional`](Self::optional).
    ///
    /// # Errors
    /// [`NbdError::Tls`]
    pub fn from_pem(chain: &[u8], key: &[u8], client_authorities: Option<&[u8]>) -> Result<Self, NbdError> {
        let fail = |what: &'static str| move |error: &dyn std::fmt::Display| NbdError::Tls(format!("{what}: {error}"));
        let certificates = |pem: &[u8], what| {
            let list = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
            let list = list.map_err(|error| fail(what)(&error))?;
            if list.is_empty() { Err(fail(what)(&"there is none in the PEM")) } else { Ok(list) }
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| fail("protocol versions")(&error))?;
        let builder = match client_authorities {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(pem, "the authorities of clients")? {
                    roots.add(certificate).map_err(|error| fail("an authority of clients")(&error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| fail("the authorities of clients")(&error))?)
            }
        };
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| fail("the server's key")(&error))?;
        let chain = certificates(chain, "the server's certificate")?;
        let config = builder.with_single_cert(chain, key);
        let config = config.map_err(|error| fail("the server's certificate and key")(&error))?;
        Ok(Self { config: Arc::new(config), required: true })
    }

    /// Clients may do without TLS.
    #[must_use]
    pub fn optional(self) -> Self {
        Self { required: false, ..self }
    }
}
