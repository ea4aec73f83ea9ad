//! SGX below Gramine: `/dev/attestation`. An enclave has no register for events, so there is no event log.
//!
//! ```text
//! attestation_type  "dcap"          user_report_data  64 bytes, written          quote  read after it
//! ```

use std::{path::PathBuf, sync::Mutex, sync::PoisonError};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{check_init_data, read, write};
use crate::{
    evidence::{Attester, AttesterError},
    initdata::InitData,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "sgx";
/// Bytes of a quote at most.
const LONGEST: u64 = 64 * 1024;
/// Where CONFIGID and the report data are in a quote of version 3.
const CONFIGID: usize = 48 + 192;
const REPORT_DATA: usize = 48 + 320;

/// Makes evidence of this enclave.
#[derive(Debug)]
pub struct SgxAttester {
    root: PathBuf,
    init_data: Option<InitData>,
    /// The files are one for the whole process: what one thread writes, another's quote would have.
    turn: Mutex<()>,
}

impl SgxAttester {
    /// Takes a quote, to see that there are any and that the enclave was started with these init data.
    ///
    /// # Errors
    /// [`AttesterError`].
    pub fn new(root: PathBuf, init_data: Option<InitData>) -> Result<Self, AttesterError> {
        let kind = read(TEE, "the kind of attestation", &root.join("attestation_type"), 64)?;
        let kind = String::from_utf8_lossy(&kind).trim_end().to_owned();
        if kind != "dcap" {
            let why = format!(
                "this enclave attests by '{kind}': sgx.remote_attestation = \"dcap\" in its manifest is needed"
            );
            return Err(AttesterError::Refused { tee: TEE, why });
        }
        let attester = Self { root, init_data, turn: Mutex::default() };
        let quote = attester.quote(&[0; 64])?;
        let field = quote.get(CONFIGID..).and_then(|rest| rest.get(..64)).unwrap_or_default();
        check_init_data(TEE, attester.init_data.as_ref(), field)?;
        Ok(attester)
    }

    fn quote(&self, report_data: &[u8; 64]) -> Result<Vec<u8>, AttesterError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        write(TEE, "the report data", &self.root.join("user_report_data"), report_data)?;
        let quote = read(TEE, "the quote", &self.root.join("quote"), LONGEST)?;
        match quote.get(REPORT_DATA..).and_then(|rest| rest.get(..64)) == Some(&report_data[..]) {
            true => Ok(quote),
            false => Err(AttesterError::Refused {
                tee: TEE,
                why: "the quote has other report data than were asked for".into(),
            }),
        }
    }
}

impl Attester for SgxAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        Ok(json!({"quote": BASE64_STANDARD.encode(self.quote(report_data)?)}))
    }

    fn init_data(&self) -> Option<&InitData> {
        self.init_data.as_ref()
    }
}
