//! The collateral of one quote, from the cache, with all its signatures and times checked.

use aws_lc_rs::signature::ECDSA_P256_SHA256_FIXED;
use base64::Engine as _;
use nacre_attest::evidence::{EvidenceError, hex};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    pck::Platform,
    tcb::{Identity, TcbInfo, unhex},
};
use crate::{
    cache::Cache,
    x509::{Cert, CertError, Crl, VerifiedCrl, in_time},
};

/// Who signs TCB info and identities, below the root.
const SIGNER: &str = "Intel SGX TCB Signing";

/// A text of Intel's with its signature, as the cache has it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SignedText {
    /// The signer's certificate and the root's, PEM.
    pub(crate) chain: String,
    /// The JSON, byte by byte as it was signed.
    pub(crate) text: String,
    /// r and s, hex.
    pub(crate) signature: String,
}

/// Who verifies, by which rules, when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    pub(crate) tee: &'static str,
    pub(crate) cache: &'a Cache,
    pub(crate) root: &'a Cert,
    pub(crate) now: i64,
    /// Seconds for which collateral still counts after its time.
    pub(crate) grace: i64,
}

/// Collateral that was checked.
#[derive(Debug)]
pub(crate) struct Collateral {
    pub(crate) tcb: TcbInfo,
    pub(crate) identity: Identity,
    /// When the first of it ends.
    pub(crate) until: i64,
}

impl Context<'_> {
    pub(crate) fn certificate(&self, error: CertError) -> EvidenceError {
        EvidenceError::Certificate { tee: self.tee, what: error.what, why: error.why }
    }

    pub(crate) fn missing(&self, why: impl Into<String>) -> EvidenceError {
        EvidenceError::Collateral { tee: self.tee, why: why.into() }
    }

    fn entry(&self, name: &str, what: &str) -> Result<Vec<u8>, EvidenceError> {
        let entry = self.cache.get(name).map_err(|error| self.missing(error.to_string()))?;
        entry.ok_or_else(|| self.missing(format!("there is no {what} in the cache ({name})")))
    }

    /// A revocation list of an authority's, and when it ends.
    pub(crate) fn crl(&self, of: &str, issuer: &Cert) -> Result<(VerifiedCrl, i64), EvidenceError> {
        let what = format!("revocation list of {}", issuer.name());
        let bytes = self.entry(&format!("dcap/crl/{of}"), &what)?;
        let crl = Crl::from_any(&bytes).map_err(|error| self.certificate(error))?;
        let until = crl.validity().1;
        if in_time((i64::MIN, until.saturating_add(self.grace)), self.now).is_err() {
            return Err(self.missing(format!("the {what} expired {}", crate::x509::date(until))));
        }
        Ok((crl.verify(issuer, self.now, self.grace).map_err(|error| self.certificate(error))?, until))
    }

    /// TCB info and the quoting enclave's identity for a platform.
    pub(crate) fn collateral(
        &self,
        platform: &Platform,
        tdx: bool,
        root_crl: &VerifiedCrl,
    ) -> Result<Collateral, EvidenceError> {
        let kind = if tdx { "tdx" } else { "sgx" };
        let fmspc = hex(&platform.fmspc);
        let text = self.text(&format!("dcap/tcb/{kind}/{fmspc}"), &format!("TCB info of FMSPC {fmspc}"), root_crl)?;
        let tcb = TcbInfo::parse(&text).map_err(|why| self.missing(why))?;
        let text = self.text(&format!("dcap/qe/{kind}"), "identity of the quoting enclave", root_crl)?;
        let identity = Identity::parse(&text).map_err(|why| self.missing(why))?;
        let mut until = i64::MAX;
        for (what, from, to) in [
            ("TCB info", &tcb.issue_date, &tcb.next_update),
            ("the QE identity", &identity.issue_date, &identity.next_update),
        ] {
            let (from, to) =
                seconds(from).zip(seconds(to)).ok_or_else(|| self.missing(format!("{what} has no dates")))?;
            in_time((from, to.saturating_add(self.grace)), self.now)
                .map_err(|why| self.missing(format!("{what}: {why}")))?;
            until = until.min(to);
        }
        Ok(Collateral { tcb, identity, until })
    }

    /// A text of Intel's, whose signature was checked.
    fn text(&self, name: &str, what: &str, root_crl: &VerifiedCrl) -> Result<String, EvidenceError> {
        let bytes = self.entry(name, what)?;
        let bad = |why: &str| EvidenceError::Certificate { tee: self.tee, what: what.into(), why: why.into() };
        let signed: SignedText = serde_json::from_slice(&bytes).map_err(|error| bad(&error.to_string()))?;
        let chain = Cert::chain(signed.chain.as_bytes()).map_err(|error| self.certificate(error))?;
        let signer = chain.first().filter(|signer| signer.name() == SIGNER);
        let signer = signer.ok_or_else(|| bad("it is not signed by Intel's key for TCB info"))?;
        signer.issued_by(self.root, self.now, Some(root_crl)).map_err(|error| self.certificate(error))?;
        let signature = unhex(&signed.signature).ok_or_else(|| bad("its signature is not in hex"))?;
        match signer.key().verifies(&ECDSA_P256_SHA256_FIXED, signed.text.as_bytes(), &signature) {
            true => Ok(signed.text),
            false => Err(bad("its signature does not hold")),
        }
    }
}

pub(crate) fn seconds(date: &str) -> Option<i64> {
    OffsetDateTime::parse(date, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

/// Base64 of evidence, bounded.
pub(crate) fn base64(text: &str, limit: usize) -> Result<Vec<u8>, String> {
    if text.len() > limit / 3 * 4 + 8 {
        return Err(format!("it is longer than {limit} bytes"));
    }
    base64::prelude::BASE64_STANDARD.decode(text).map_err(|error| error.to_string())
}
