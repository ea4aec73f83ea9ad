//! AMD's roots of trust: for each product the ARK, which signs itself, the ASK, which signs chips' certificates (VCEK), and the ASVK, which
//! signs providers' (VLEK).
//!
//! `roots/amd-<product>.pem` are as AMD's key distribution service gives them: `/vcek/v1/<Product>/cert_chain` and `/vlek/v1/<Product>/cert_chain`
//! of kdsintf.amd.com.

use nacre_attest::snp_report::Product;

use crate::x509::Cert;

/// The keys of one product, verified among themselves.
#[derive(Clone, Debug)]
pub(crate) struct ProductRoots {
    pub(crate) product: Product,
    pub(crate) ark: Cert,
    pub(crate) ask: Cert,
    pub(crate) asvk: Cert,
}

/// Roots of trust that are none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the roots of {product}: {why}")]
pub struct RootsError {
    product: &'static str,
    why: String,
}

/// The roots that a verifier of SNP evidence trusts.
#[derive(Clone, Debug, Default)]
pub struct AmdRoots(pub(crate) Vec<ProductRoots>);

impl AmdRoots {
    /// AMD's own.
    ///
    /// # Errors
    /// [`RootsError`]: none, with the roots that this crate has.
    pub fn amd() -> Result<Self, RootsError> {
        let mut roots = Self::default();
        for (product, pem) in [
            (Product::Milan, include_str!("../../roots/amd-milan.pem")),
            (Product::Genoa, include_str!("../../roots/amd-genoa.pem")),
            (Product::Turin, include_str!("../../roots/amd-turin.pem")),
        ] {
            roots.trust(product, pem)?;
        }
        Ok(roots)
    }

    /// Trusts the ASK, ARK and ASVK of a PEM text, in this order, for a product.
    ///
    /// # Errors
    /// [`RootsError`]: they do not sign each other.
    pub fn trust(&mut self, product: Product, pem: &str) -> Result<(), RootsError> {
        let bad = |why: String| RootsError { product: product.name(), why };
        let chain = Cert::chain(pem.as_bytes()).map_err(|error| bad(error.to_string()))?;
        let [ask, ark, asvk] = <[Cert; 3]>::try_from(chain).map_err(|_| bad("three are expected".into()))?;
        // Their time is judged with each report; here it is their own, so that a root that expired is named where it is used.
        for (cert, issuer) in [(&ark, &ark), (&ask, &ark), (&asvk, &ark)] {
            cert.issued_by(issuer, cert.validity().0, None).map_err(|error| bad(error.to_string()))?;
        }
        self.0.retain(|roots| roots.product != product);
        self.0.push(ProductRoots { product, ark, ask, asvk });
        Ok(())
    }

    pub(crate) fn of(&self, product: Product) -> Option<&ProductRoots> {
        self.0.iter().find(|roots| roots.product == product)
    }
}
