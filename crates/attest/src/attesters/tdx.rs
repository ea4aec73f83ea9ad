//! TDX: quotes by `configfs-tsm`, the firmware's log (CCEL), and RTMR 3 for run-time events, by the files that Linux has from 6.16 on.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{Places, check_init_data, read, read_if_there, tsm, write};
use crate::{
    eventlog::{
        Bank, LONGEST,
        replay::{Registers, replay},
        runtime::{Register, RuntimeLog, RuntimeLogError, joined},
        tcg,
    },
    evidence::{Attester, AttesterError},
    initdata::InitData,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "tdx";
const PROVIDER: &str = "tdx_guest";
/// RTMR 3, as logs number it.
const REGISTER: u32 = 4;
/// Where a quote's body is, by its version, and MRCONFIGID in it.
const BODY_V4: usize = 48;
const BODY_V5: usize = 54;
const MRCONFIGID: usize = 184;

/// Makes evidence of this TDX guest.
#[derive(Debug)]
pub struct TdxAttester {
    tsm: PathBuf,
    firmware_log: Option<Vec<u8>>,
    runtime: Option<Arc<RuntimeLog>>,
    init_data: Option<InitData>,
}

impl TdxAttester {
    /// Takes a quote, to see that there are any and that the guest was started with these init data; opens the event log in a directory,
    /// where the kernel lets run-time events be measured.
    ///
    /// # Errors
    /// [`AttesterError`].
    pub fn new(places: &Places, log_dir: &Path, init_data: Option<InitData>) -> Result<Self, AttesterError> {
        let firmware_log = read_if_there(TEE, "the firmware's log", &places.ccel, LONGEST as u64)?;
        let quote = tsm::report(TEE, &places.tsm, PROVIDER, &[0; 64])?.report;
        let body = match quote.first() {
            Some(4) => BODY_V4,
            Some(5) => BODY_V5,
            _ => return Err(AttesterError::Refused { tee: TEE, why: "a quote of a version that is not known".into() }),
        };
        let field = quote.get(body + MRCONFIGID..).and_then(|rest| rest.get(..48)).unwrap_or_default();
        check_init_data(TEE, init_data.as_ref(), field)?;
        let file = places.tdx_registers.join("rtmr3:sha384");
        let runtime = match file.exists() {
            true => {
                let base = base(firmware_log.as_deref()).map_err(RuntimeLogError::Log)?;
                let log = RuntimeLog::open(&log_dir.join("tdx.events"), Box::new(Rtmr { file }), &base)?;
                Some(Arc::new(log))
            }
            false => {
                tracing::warn!(
                    "this kernel does not let run-time events be measured (Linux 6.16 does): there is no event log"
                );
                None
            }
        };
        Ok(Self { tsm: places.tsm.clone(), firmware_log, runtime, init_data })
    }
}

/// What the register holds after the firmware's log: zeros, as a rule.
fn base(firmware: Option<&[u8]>) -> Result<Vec<u8>, crate::eventlog::LogError> {
    let Some(firmware) = firmware else { return Ok(vec![0; Bank::Sha384.length()]) };
    let mut values = replay(&tcg::parse(firmware)?, Bank::Sha384, Registers::Tee)?;
    Ok(values.remove(&REGISTER).unwrap_or_else(|| vec![0; Bank::Sha384.length()]))
}

impl Attester for TdxAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        let firmware = self.firmware_log.as_deref();
        let evidence = |log: Option<Vec<u8>>| -> Result<Value, AttesterError> {
            let quote = BASE64_STANDARD.encode(tsm::report(TEE, &self.tsm, PROVIDER, report_data)?.report);
            Ok(json!({"quote": quote, "cc_eventlog": log.map(|log| BASE64_STANDARD.encode(log))}))
        };
        let log = |entries: &[u8]| joined(firmware, Bank::Sha384, entries).map_err(RuntimeLogError::Log);
        match (&self.runtime, firmware) {
            // Nobody records an event meanwhile: the log and the quote are of one moment.
            (Some(runtime), _) => runtime.with_entries(|entries| evidence(Some(log(entries)?))),
            (None, Some(_)) => evidence(Some(log(&[])?)),
            (None, None) => evidence(None),
        }
    }

    fn init_data(&self) -> Option<&InitData> {
        self.init_data.as_ref()
    }

    fn runtime_log(&self) -> Option<&Arc<RuntimeLog>> {
        self.runtime.as_ref()
    }
}

/// RTMR 3, by the kernel's file: what is written there is extended.
struct Rtmr {
    file: PathBuf,
}

impl Register for Rtmr {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn number(&self) -> u32 {
        REGISTER
    }

    fn bank(&self) -> Bank {
        Bank::Sha384
    }

    fn read(&self) -> Result<Vec<u8>, RuntimeLogError> {
        read(TEE, "RTMR 3", &self.file, 48).map_err(|error| failed("read it", &error))
    }

    fn extend(&self, digest: &[u8]) -> Result<(), RuntimeLogError> {
        write(TEE, "RTMR 3", &self.file, digest).map_err(|error| failed("extend it", &error))
    }
}

fn failed(action: &'static str, error: &AttesterError) -> RuntimeLogError {
    RuntimeLogError::Register { tee: TEE, register: REGISTER, action, why: error.to_string() }
}
