//! DCAP quotes, taken apart (Intel SGX ECDSA Quote Library Reference; Intel TDX DCAP Quoting Library API). Numbers little-endian.
//!
//! ```text
//! header  version u16 ‖ key type u16 ‖ TEE u32 ‖ QE SVN u16 ‖ PCE SVN u16 ‖ vendor [16] ‖ user data [20]             48 bytes
//! body    version 3: SGX [384]   version 4: TD 1.0 [584]   version 5: type u16 ‖ size u32 ‖ TD 1.0 [584] or 1.5 [648]
//! then    length u32 ‖ signature data
//! version 3      signature [64] ‖ key [64] ‖ QE report [384] ‖ its signature [64] ‖ u16, authentication data ‖ type u16 ‖ u32, certificates
//! versions 4, 5  signature [64] ‖ key [64] ‖ 6 u16 ‖ u32, (QE report … certificates, as above)
//! ```
//!
//! A quote may be followed by zeros: who hands it over may have a buffer of a fixed size.

/// Bytes of a quote at most: some 5,000 have been seen.
pub(crate) const LONGEST: usize = 64 * 1024;
/// Bytes of an enclave's report.
pub(crate) const ENCLAVE: usize = 384;
const HEADER: usize = 48;
const TD10: usize = 584;
const TD15: usize = 648;
/// ECDSA with P-256.
const KEY_TYPE: u16 = 2;
const TEE_SGX: u32 = 0;
const TEE_TDX: u32 = 0x81;
const INTEL: [u8; 16] =
    [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];
/// A chain of certificates in PEM.
const CERTS_PEM: u16 = 5;
const QE_REPORT: u16 = 6;

/// What a quote is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body<'a> {
    Sgx(&'a [u8; ENCLAVE]),
    /// The report of TDX 1.0, and what 1.5 has beyond it.
    Td(&'a [u8; TD10], Option<&'a [u8; TD15 - TD10]>),
}

/// A quote, taken apart. Nothing of it is verified.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quote<'a> {
    pub(crate) header: &'a [u8; HEADER],
    /// Type and size, of version 5.
    pub(crate) kind: Option<(u16, u32)>,
    pub(crate) body: Body<'a>,
    /// What the signature covers.
    pub(crate) signed: &'a [u8],
    pub(crate) signature: &'a [u8; 64],
    pub(crate) key: &'a [u8; 64],
    pub(crate) qe_report: &'a [u8; ENCLAVE],
    pub(crate) qe_signature: &'a [u8; 64],
    pub(crate) qe_data: &'a [u8],
    /// PEM.
    pub(crate) certs: &'a [u8],
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| format!("it ends within {what}"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<&'a [u8; N], String> {
        let (array, rest) = self.rest.split_first_chunk().ok_or_else(|| format!("it ends within {what}"))?;
        self.rest = rest;
        Ok(array)
    }

    fn short(&mut self, what: &str) -> Result<u16, String> {
        Ok(u16::from_le_bytes(*self.array(what)?))
    }

    fn long(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(*self.array(what)?))
    }

    fn sized(&mut self, what: &str) -> Result<&'a [u8], String> {
        let length = usize::try_from(self.long(what)?).unwrap_or(usize::MAX);
        self.take(length, what)
    }

    fn end(&self, what: &str) -> Result<(), String> {
        if self.rest.is_empty() { Ok(()) } else { Err(format!("there are bytes after {what}")) }
    }
}

/// Takes a quote apart.
pub(crate) fn parse(bytes: &[u8]) -> Result<Quote<'_>, String> {
    if bytes.len() > LONGEST {
        return Err(format!("{} bytes: at most {LONGEST} are accepted", bytes.len()));
    }
    let mut reader = Reader { rest: bytes };
    let header: &[u8; HEADER] = reader.array("the header")?;
    let mut fields = Reader { rest: header };
    let (version, key_type) = (fields.short("the header")?, fields.short("the header")?);
    let tee = fields.long("the header")?;
    fields.long("the header")?;
    let vendor: &[u8; 16] = fields.array("the header")?;
    if key_type != KEY_TYPE {
        return Err(format!("its key type {key_type} is not ECDSA with P-256"));
    }
    if *vendor != INTEL {
        return Err("it is not of Intel's quoting enclave".into());
    }
    let (kind, body) = match (version, tee) {
        (3, TEE_SGX) => (None, Body::Sgx(reader.array("the enclave's report")?)),
        (4, TEE_TDX) => (None, Body::Td(reader.array("the guest's report")?, None)),
        (5, TEE_TDX) => {
            let (kind, size) = (reader.short("the body's type")?, reader.long("the body's size")?);
            let base = reader.array("the guest's report")?;
            let more = match (kind, usize::try_from(size)) {
                (2, Ok(TD10)) => None,
                (3, Ok(TD15)) => Some(reader.array("the guest's report")?),
                _ => return Err(format!("body type {kind} with {size} bytes is not known")),
            };
            (Some((kind, size)), Body::Td(base, more))
        }
        _ => return Err(format!("version {version} of TEE {tee:#x} is not known: SGX 3, TDX 4 and 5 are")),
    };
    let signed = bytes.get(..bytes.len() - reader.rest.len()).unwrap_or_default();
    let mut data = Reader { rest: reader.sized("the signature data")? };
    if reader.rest.iter().any(|byte| *byte != 0) {
        return Err("there are bytes after the signature data".into());
    }
    let (signature, key) = (data.array("the signature")?, data.array("the key")?);
    if version > 3 {
        if data.short("the certification data")? != QE_REPORT {
            return Err("its certification data are no QE report".into());
        }
        let nested = data.sized("the certification data")?;
        data.end("the certification data")?;
        data = Reader { rest: nested };
    }
    let (qe_report, qe_signature) = (data.array("the QE report")?, data.array("the QE report's signature")?);
    let length = data.short("the authentication data")?;
    let qe_data = data.take(length.into(), "the authentication data")?;
    let certs_kind = data.short("the certificates")?;
    if certs_kind != CERTS_PEM {
        return Err(format!("its certificates are of type {certs_kind}, and a chain in PEM (5) is expected"));
    }
    let certs = data.sized("the certificates")?;
    data.end("the certificates")?;
    Ok(Quote { header, kind, body, signed, signature, key, qe_report, qe_signature, qe_data, certs })
}

/// Bytes at an offset that the type of the report proves.
pub(crate) fn at<const LEN: usize>(bytes: &[u8], offset: usize) -> [u8; LEN] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; LEN])
}
