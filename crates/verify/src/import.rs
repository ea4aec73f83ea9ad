//! Filling the cache: what an operator downloaded, recognised by its form.
//!
//! | file | becomes |
//! |---|---|
//! | certificate (DER, PEM) of a VCEK or VLEK | `snp/…/vcek/…`, `snp/…/vlek/…` |
//! | revocation list (DER, PEM) of an ARK, of Intel's root, of a PCK CA | `snp/…/crl`, `dcap/crl/…` |
//! | JSON with all collateral of a quote, as DCAP tools give it (`tcb_info`, `qe_identity`, their issuer chains and signatures, `pck_crl`, `root_ca_crl`) | TCB info, QE identity, two revocation lists |
//! | JSON of Intel's service (`{"tcbInfo", "signature"}`, `{"enclaveIdentity", "signature"}`) | TCB info, QE identity; the issuer chain, which the service sends in a header, is that of the newest other entry in the cache, or Intel's of 2025 |
//!
//! Certificates of authorities, as chains have them, are passed over: a verifier has its own.
//!
//! An import takes apart, and verifies nothing: whatever is in the cache is verified with each use. What is older than what is there is
//! not taken, so that an import cannot bring back what was replaced.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::{
    cache::{Cache, CacheError, LONGEST},
    dcap::{
        collateral::{SignedText, seconds},
        tcb::unhex,
    },
    snp,
    x509::{Cert, CertError, Crl, date},
};

/// What was not imported, and why.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Not collateral that we know.
    #[error(
        "it is no collateral: {0}; VCEKs, VLEKs, revocation lists of AMD and Intel, and JSON of DCAP collateral are"
    )]
    Unknown(String),
    /// What is there is newer.
    #[error("'{name}' of {there} is in the cache already, and this is of {new}")]
    Older {
        /// The entry.
        name: String,
        /// The date of what is there.
        there: String,
        /// The date of what was to be imported.
        new: String,
    },
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// An entry of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// From when it is good, seconds since 1970.
    pub from: i64,
    /// Until when it is good, seconds since 1970.
    pub until: i64,
}

/// JSON with all collateral of a quote.
#[derive(Deserialize)]
struct Whole {
    tcb_info_issuer_chain: String,
    tcb_info: String,
    tcb_info_signature: String,
    qe_identity_issuer_chain: String,
    qe_identity: String,
    qe_identity_signature: String,
    root_ca_crl: String,
    pck_crl: String,
}

/// What Intel's service answers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Served<'a> {
    #[serde(borrow)]
    tcb_info: Option<&'a RawValue>,
    #[serde(borrow)]
    enclave_identity: Option<&'a RawValue>,
    signature: String,
}

fn unknown(why: impl ToString) -> ImportError {
    ImportError::Unknown(why.to_string())
}

/// Imports a file; gives the entries that it became.
///
/// # Errors
/// [`ImportError`]: nothing was imported, or not all of it.
pub fn import(cache: &Cache, bytes: &[u8]) -> Result<Vec<Entry>, ImportError> {
    if bytes.len() > LONGEST {
        return Err(unknown(format!("{} bytes: at most {LONGEST} are accepted", bytes.len())));
    }
    let found = match bytes.trim_ascii_start().first() {
        Some(b'{') => json(cache, bytes)?,
        _ => match certificates(bytes) {
            Ok(certs) if !certs.is_empty() => {
                certs.iter().filter_map(|cert| certificate(cert).transpose()).collect::<Result<_, _>>()?
            }
            Ok(_) => vec![list(bytes)?],
            Err(no_cert) => vec![list(bytes).map_err(|no_list| unknown(format!("{no_cert}; {no_list}")))?],
        },
    };
    let mut entries = Vec::new();
    for (name, bytes) in found {
        let (from, until) = validity(&name, &bytes).ok_or_else(|| unknown(format!("'{name}' has no dates")))?;
        if let Some(there) = cache.get(&name)?.and_then(|there| validity(&name, &there))
            && there.0 > from
        {
            return Err(ImportError::Older { name, there: date(there.0), new: date(from) });
        }
        cache.put(&name, &bytes)?;
        entries.push(Entry { name, from, until });
    }
    Ok(entries)
}

/// All entries, with their times; what is not understood is good from never to never.
///
/// # Errors
/// [`CacheError`].
pub fn entries(cache: &Cache) -> Result<Vec<Entry>, CacheError> {
    let mut entries = Vec::new();
    for name in cache.names()? {
        let bytes = cache.get(&name)?.unwrap_or_default();
        let (from, until) = validity(&name, &bytes).unwrap_or((i64::MAX, i64::MIN));
        entries.push(Entry { name, from, until });
    }
    Ok(entries)
}

/// One certificate in DER, or those of a PEM text.
fn certificates(bytes: &[u8]) -> Result<Vec<Cert>, CertError> {
    match bytes.first() {
        Some(0x30) => Ok(vec![Cert::from_der(bytes)?]),
        _ => Cert::chain(bytes),
    }
}

/// The entry of a VCEK or VLEK; `None` for an authority.
fn certificate(cert: &Cert) -> Result<Option<(String, Vec<u8>)>, ImportError> {
    match snp::cache_name_of(cert) {
        Some(name) => Ok(Some((name, cert.der().to_vec()))),
        None if cert.is_ca() => Ok(None),
        None => Err(unknown(format!("{}, issued by {}, is no VCEK or VLEK", cert.name(), cert.issuer()))),
    }
}

fn list(bytes: &[u8]) -> Result<(String, Vec<u8>), ImportError> {
    let crl = Crl::from_any(bytes).map_err(unknown)?;
    let issuer = crl.issuer();
    let name = match issuer.as_str() {
        "Intel SGX Root CA" => "dcap/crl/root".to_owned(),
        "Intel SGX PCK Platform CA" => "dcap/crl/platform".to_owned(),
        "Intel SGX PCK Processor CA" => "dcap/crl/processor".to_owned(),
        other => match other.strip_prefix("ARK-").and_then(nacre_attest::snp_report::Product::from_name) {
            Some(product) => format!("snp/{}/crl", product.name()),
            None => return Err(unknown(format!("a revocation list of '{other}'"))),
        },
    };
    Ok((name, bytes.to_vec()))
}

fn json(cache: &Cache, bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ImportError> {
    if let Ok(whole) = serde_json::from_slice::<Whole>(bytes) {
        let hex = |text: &str| unhex(text).ok_or_else(|| unknown("a revocation list is not in hex"));
        return Ok(vec![
            signed_text(whole.tcb_info_issuer_chain, &whole.tcb_info, whole.tcb_info_signature)?,
            signed_text(whole.qe_identity_issuer_chain, &whole.qe_identity, whole.qe_identity_signature)?,
            list(&hex(&whole.root_ca_crl)?)?,
            list(&hex(&whole.pck_crl)?)?,
        ]);
    }
    let served: Served<'_> = serde_json::from_slice(bytes).map_err(unknown)?;
    let text = match (served.tcb_info, served.enclave_identity) {
        (Some(text), None) | (None, Some(text)) => text.get(),
        _ => return Err(unknown("one of 'tcbInfo' and 'enclaveIdentity' is expected")),
    };
    Ok(vec![signed_text(chain_of(cache)?, text, served.signature)?])
}

/// The issuer chain of any signed text in the cache, since Intel has one signer at a time; else the one of 2025 to 2032, which is
/// verified as any other.
fn chain_of(cache: &Cache) -> Result<String, ImportError> {
    let mut newest: Option<(i64, String)> = None;
    for entry in entries(cache)? {
        let signed = cache.get(&entry.name)?.and_then(|bytes| serde_json::from_slice::<SignedText>(&bytes).ok());
        if let Some(signed) = signed
            && newest.as_ref().is_none_or(|(from, _)| *from < entry.from)
        {
            newest = Some((entry.from, signed.chain));
        }
    }
    Ok(newest.map_or_else(|| include_str!("../roots/intel-tcb-signing.pem").to_owned(), |(_, chain)| chain))
}

fn signed_text(chain: String, text: &str, signature: String) -> Result<(String, Vec<u8>), ImportError> {
    let value: Value = serde_json::from_str(text).map_err(unknown)?;
    let member = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let name = match member("id") {
        "TDX" => format!("dcap/tcb/tdx/{}", fmspc(member("fmspc"))?),
        "SGX" => format!("dcap/tcb/sgx/{}", fmspc(member("fmspc"))?),
        "TD_QE" => "dcap/qe/tdx".to_owned(),
        "QE" => "dcap/qe/sgx".to_owned(),
        other => return Err(unknown(format!("'{other:.40}' is neither TCB info nor the identity of a QE"))),
    };
    let signed = SignedText { chain, text: text.to_owned(), signature };
    Ok((name, serde_json::to_vec(&signed).map_err(unknown)?))
}

fn fmspc(text: &str) -> Result<String, ImportError> {
    let bytes = unhex(text).filter(|bytes| bytes.len() == 6);
    bytes.map(|bytes| nacre_attest::evidence::hex(&bytes)).ok_or_else(|| unknown("its FMSPC is not 6 bytes in hex"))
}

fn validity(name: &str, bytes: &[u8]) -> Option<(i64, i64)> {
    if name.starts_with("snp/") && !name.ends_with("/crl") {
        return Cert::from_any(bytes).ok().map(|cert| cert.validity());
    }
    if name.ends_with("/crl") || name.starts_with("dcap/crl/") {
        return Crl::from_any(bytes).ok().map(|crl| crl.validity());
    }
    let signed: SignedText = serde_json::from_slice(bytes).ok()?;
    let value: Value = serde_json::from_str(&signed.text).ok()?;
    let member = |name: &str| value.get(name).and_then(Value::as_str).and_then(seconds);
    Some((member("issueDate")?, member("nextUpdate")?))
}
