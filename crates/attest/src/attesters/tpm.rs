//! TPM 2.0: quotes by an attestation key (AK), the firmware's log, and PCR 14 for run-time events.
//!
//! The AK is a persistent one that somebody enrolled, or a primary key of the endorsement hierarchy, made from the TPM's seed by a fixed
//! template (P-256, restricted to signing), so that it is the same each time. Its public half is what a broker is told to trust.
//!
//! Init data are extended into PCR 8, as other guests' agents do, once: a PCR that holds something else is refused.

use std::{path::Path, path::PathBuf, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_tpm::{
    Tpm, TpmAddress, TpmError, malformed,
    response::{self, PublicKey},
    session::{self, Writer},
};
use serde_json::{Value, json};

use super::read_if_there;
use crate::{
    eventlog::{
        Bank, LONGEST, LogError, aael,
        replay::{Registers, extended, replay},
        runtime::{Register, RuntimeLog, RuntimeLogError, joined},
        tcg,
    },
    evidence::{Attester, AttesterError, hex},
    initdata::InitData,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "tpm";
/// Where run-time events go: what the boot loader's shim has there is in the firmware's log.
const EVENTS_PCR: u32 = 14;
const INIT_DATA_PCR: u32 = 8;
const PCRS: u32 = 24;
/// PCRs of one TPM2_PCR_Read: a TPM gives eight digests at most.
const AT_ONCE: u32 = 8;
pub(super) const RH_ENDORSEMENT: u32 = 0x4000_000b;
const ALG_NULL: u16 = 0x0010;
const ALG_SHA256: u16 = 0x000b;
const ALG_ECC: u16 = 0x0023;
const ALG_ECDSA: u16 = 0x0018;
const P256: u16 = 0x0003;
/// FIXEDTPM, FIXEDPARENT, SENSITIVEDATAORIGIN, USERWITHAUTH, RESTRICTED, SIGN.
const AK_ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 18;
/// Bytes of the report data that a quote carries.
const EXTRA: usize = 32;

/// Which key signs quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ak {
    /// A persistent key, by its handle (0x81000000 on), with an empty password.
    Persistent(u32),
    /// A primary key of the endorsement hierarchy, which has an empty password.
    Primary,
}

/// What a TPM attester is made of.
#[derive(Clone, Debug)]
pub struct TpmOptions {
    /// The TPM.
    pub address: TpmAddress,
    /// The key.
    pub ak: Ak,
    /// The firmware's log.
    pub firmware_log: PathBuf,
    /// Where the event log is kept: a directory that ends with the PCRs.
    pub log_dir: PathBuf,
}

/// Makes evidence of this machine.
#[derive(Debug)]
pub struct TpmAttester {
    address: TpmAddress,
    ak: Ak,
    /// The firmware's log, and what we extended beside run-time events.
    log: Vec<u8>,
    runtime: Arc<RuntimeLog>,
    init_data: Option<InitData>,
}

impl TpmAttester {
    /// Binds the init data and opens the event log.
    ///
    /// # Errors
    /// [`AttesterError`]: no TPM, other init data than those that it was bound to before, an event log that is not that of the PCR.
    pub fn new(options: &TpmOptions, init_data: Option<InitData>) -> Result<Self, AttesterError> {
        let firmware = read_if_there(TEE, "the firmware's log", &options.firmware_log, LONGEST as u64)?;
        let fail = |error: LogError| AttesterError::Log(RuntimeLogError::Log(error));
        let mut log = joined(firmware.as_deref(), Bank::Sha256, &[]).map_err(fail)?;
        let values = replay(&tcg::parse(&log).map_err(fail)?, Bank::Sha256, Registers::Pcrs).map_err(fail)?;
        let base = |pcr: u32| values.get(&pcr).cloned().unwrap_or_else(|| vec![0; 32]);
        if let Some(init_data) = &init_data {
            let digest: [u8; 32] = init_data.fit();
            bind_init_data(&options.address, &base(INIT_DATA_PCR), &digest)?;
            // The register has the digest itself, as other agents extend it; the data say what it is.
            log.extend(aael::entry(INIT_DATA_PCR, Bank::Sha256, &digest, b"init data"));
        }
        let pcr = Pcr { address: options.address.clone(), number: EVENTS_PCR };
        let runtime = RuntimeLog::open(&options.log_dir.join("tpm.events"), Box::new(pcr), &base(EVENTS_PCR))?;
        let attester =
            Self { address: options.address.clone(), ak: options.ak, log, runtime: Arc::new(runtime), init_data };
        attester.with_ak(|_, _, _| Ok(()))?;
        Ok(attester)
    }

    /// The public half of the key, `SubjectPublicKeyInfo` in base64: what a broker's reference value `trusted_aks` names.
    ///
    /// # Errors
    /// [`AttesterError`].
    pub fn ak_public(&self) -> Result<String, AttesterError> {
        self.with_ak(|_, _, area| Ok(BASE64_STANDARD.encode(spki(&key_of(area)?)?)))
    }

    pub(super) fn address(&self) -> &TpmAddress {
        &self.address
    }

    /// Does something with the key, its handle and its public area, in the TPM, which is held alone meanwhile.
    pub(super) fn with_ak<T>(
        &self,
        work: impl FnOnce(&mut Tpm, u32, &[u8]) -> Result<T, AttesterError>,
    ) -> Result<T, AttesterError> {
        let mut tpm = Tpm::open(&self.address)?;
        let result = match self.ak {
            Ak::Persistent(handle) => {
                let command = session::READ_PUBLIC;
                let body = tpm.plain(command, &handle.to_be_bytes())?;
                let area = response::public_area(&body).map_err(|error| malformed(command, error))?;
                key_of(area)?;
                work(&mut tpm, handle, area)
            }
            Ak::Primary => {
                let (handle, parameters) = tpm.create_primary(RH_ENDORSEMENT, &ak_template())?;
                let result = response::public_area(&parameters)
                    .map_err(|error| malformed(session::CREATE_PRIMARY, error).into())
                    .and_then(|area| key_of(area).and_then(|_| work(&mut tpm, handle, area)));
                tpm.flush(handle);
                result
            }
        };
        tpm.end();
        result
    }

    fn quote(&self, extra: &[u8]) -> Result<Value, AttesterError> {
        self.with_ak(|tpm, handle, area| {
            let pcrs = read_pcrs(tpm)?;
            let selection = Writer::default().long(1).short(ALG_SHA256).raw(&[3, 0xff, 0xff, 0xff]).done();
            let parameters = Writer::default().sized(extra).short(ALG_NULL).raw(&selection).done();
            let answer = tpm.by_empty_password(session::QUOTE, handle, &parameters)?;
            let (message, signature) = response::quoted(&answer).map_err(|error| malformed(session::QUOTE, error))?;
            Ok(json!({
                "ak_public": BASE64_STANDARD.encode(spki(&key_of(area)?)?),
                "tpm_quote": {
                    "message": BASE64_STANDARD.encode(message),
                    "signature": BASE64_STANDARD.encode(signature),
                    "pcrs": pcrs.iter().map(|value| hex(value)).collect::<Vec<_>>(),
                },
            }))
        })
    }
}

impl Attester for TpmAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        let extra = report_data.get(..EXTRA).unwrap_or_default();
        // Nobody records an event meanwhile: the log and the quote are of one moment.
        self.runtime.with_entries(|entries| {
            let mut evidence = self.quote(extra)?;
            evidence["event_log"] = BASE64_STANDARD.encode([&self.log[..], entries].concat()).into();
            Ok(evidence)
        })
    }

    fn init_data(&self) -> Option<&InitData> {
        self.init_data.as_ref()
    }

    fn enrols(&self) -> Option<&Self> {
        Some(self)
    }

    fn runtime_log(&self) -> Option<&Arc<RuntimeLog>> {
        Some(&self.runtime)
    }
}

/// What TPM2_CreatePrimary is asked for: no secrets of ours, the template, nothing outside, no PCRs.
fn ak_template() -> Vec<u8> {
    let public = Writer::default()
        .short(ALG_ECC)
        .short(ALG_SHA256)
        .long(AK_ATTRIBUTES)
        .sized(&[])
        .short(ALG_NULL)
        .short(ALG_ECDSA)
        .short(ALG_SHA256)
        .short(P256)
        .short(ALG_NULL)
        .sized(&[])
        .sized(&[])
        .done();
    let sensitive = Writer::default().sized(&[]).sized(&[]).done();
    Writer::default().sized(&sensitive).sized(&public).sized(&[]).long(0).done().to_vec()
}

fn key_of(area: &[u8]) -> Result<PublicKey, AttesterError> {
    Ok(response::public_key(area).map_err(|error| malformed(session::READ_PUBLIC, error))?)
}

/// A key as `SubjectPublicKeyInfo`, DER.
///
/// # Errors
/// [`AttesterError::Refused`]: of another kind than RSA, P-256 and P-384.
pub fn spki(key: &PublicKey) -> Result<Vec<u8>, AttesterError> {
    const P256_OIDS: &[u8] = &[6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    const P384_OIDS: &[u8] = &[6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0x22];
    const RSA_OIDS: &[u8] = &[6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
    let unknown =
        || AttesterError::Refused { tee: TEE, why: "the attestation key is of a kind that is not known".into() };
    let (algorithm, bits) = match key {
        PublicKey::Ecc(curve, x, y) => {
            let (oids, length) = match curve {
                3 => (P256_OIDS, 32),
                4 => (P384_OIDS, 48),
                _ => return Err(unknown()),
            };
            let padded =
                |number: &[u8]| Some([&vec![0; usize::checked_sub(length, number.len())?][..], number].concat());
            let (x, y) = padded(x).zip(padded(y)).ok_or_else(unknown)?;
            (oids, [&[4][..], &x, &y].concat())
        }
        PublicKey::Rsa(modulus, exponent) => {
            let exponent = exponent.to_be_bytes();
            let start = exponent.iter().position(|byte| *byte != 0).unwrap_or(exponent.len());
            let numbers = [integer(modulus), integer(exponent.get(start..).unwrap_or_default())].concat();
            (RSA_OIDS, tlv(0x30, &numbers))
        }
    };
    Ok(tlv(0x30, &[tlv(0x30, algorithm), tlv(3, &[&[0][..], &bits].concat())].concat()))
}

/// DER: an INTEGER that is not negative.
fn integer(bytes: &[u8]) -> Vec<u8> {
    match bytes.first() {
        Some(0x80..) => tlv(2, &[&[0][..], bytes].concat()),
        _ => tlv(2, bytes),
    }
}

/// DER: tag, length, content.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let [.., high, low] = length.to_be_bytes();
    let head = match length {
        0..=0x7f => vec![tag, low],
        0x80..=0xff => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&head[..], content].concat()
}

fn read_pcrs(tpm: &mut Tpm) -> Result<Vec<Vec<u8>>, AttesterError> {
    let mut values = Vec::new();
    for first in (0..PCRS).step_by(8) {
        let bits: u32 = 0xff << first;
        let [low, middle, high, _] = bits.to_le_bytes();
        let body = Writer::default().long(1).short(ALG_SHA256).raw(&[3, low, middle, high]).done();
        let answer = tpm.plain(session::PCR_READ, &body)?;
        let (found, digests) = response::pcrs(&answer).map_err(|error| malformed(session::PCR_READ, error))?;
        if found != bits || digests.iter().any(|digest| digest.len() != 32) {
            let why = format!(
                "it does not give PCRs {first} to {} of its SHA-256 bank: is that bank on?",
                first + AT_ONCE - 1
            );
            return Err(AttesterError::Refused { tee: TEE, why });
        }
        values.extend(digests.into_iter().map(<[u8]>::to_vec));
    }
    Ok(values)
}

fn pcr(tpm: &mut Tpm, number: u32) -> Result<Vec<u8>, AttesterError> {
    let at = usize::try_from(number).unwrap_or(usize::MAX);
    let missing = || AttesterError::Refused { tee: TEE, why: format!("there is no PCR {number}") };
    read_pcrs(tpm)?.into_iter().nth(at).ok_or_else(missing)
}

/// Extends the SHA-256 bank, and looks whether it was.
fn extend(tpm: &mut Tpm, number: u32, digest: &[u8]) -> Result<(), AttesterError> {
    let before = pcr(tpm, number)?;
    let parameters = Writer::default().long(1).short(ALG_SHA256).raw(digest).done();
    tpm.by_empty_password(session::PCR_EXTEND, number, &parameters)?;
    match extended(Bank::Sha256, &before, digest) == Some(pcr(tpm, number)?) {
        true => Ok(()),
        false => Err(AttesterError::Refused {
            tee: TEE,
            why: format!("PCR {number} does not hold what was extended into it"),
        }),
    }
}

fn bind_init_data(address: &TpmAddress, base: &[u8], digest: &[u8; 32]) -> Result<(), AttesterError> {
    let mut tpm = Tpm::open(address)?;
    let found = pcr(&mut tpm, INIT_DATA_PCR)?;
    let bound = extended(Bank::Sha256, base, digest).unwrap_or_default();
    let result = match found {
        found if found == bound => Ok(()),
        found if found == base => extend(&mut tpm, INIT_DATA_PCR, digest),
        found => Err(AttesterError::InitData { tee: TEE, given: hex(&bound), measured: hex(&found) }),
    };
    tpm.end();
    result
}

/// A PCR that run-time events go to.
struct Pcr {
    address: TpmAddress,
    number: u32,
}

impl Pcr {
    fn with<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&mut Tpm) -> Result<T, AttesterError>,
    ) -> Result<T, RuntimeLogError> {
        let result = Tpm::open(&self.address).map_err(TpmError::into).and_then(|mut tpm| {
            let result = work(&mut tpm);
            tpm.end();
            result
        });
        result.map_err(|error: AttesterError| RuntimeLogError::Register {
            tee: TEE,
            register: self.number,
            action,
            why: error.to_string(),
        })
    }
}

impl Register for Pcr {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn number(&self) -> u32 {
        self.number
    }

    fn bank(&self) -> Bank {
        Bank::Sha256
    }

    fn read(&self) -> Result<Vec<u8>, RuntimeLogError> {
        self.with("read it", |tpm| pcr(tpm, self.number))
    }

    fn extend(&self, digest: &[u8]) -> Result<(), RuntimeLogError> {
        self.with("extend it", |tpm| extend(tpm, self.number, digest))
    }
}

/// An address by how people write it: a path, or `host:port` of swtpm.
pub fn address(text: &str) -> TpmAddress {
    match text.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() && !text.starts_with('/') => TpmAddress::Tcp(text.to_owned()),
        _ => TpmAddress::Path(Path::new(text).to_owned()),
    }
}
