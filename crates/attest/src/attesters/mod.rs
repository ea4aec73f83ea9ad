//! Attesters: evidence from the devices of real TEEs, each by files, so that a test can serve them.
//!
//! | module | TEE | device |
//! |---|---|---|
//! | [`snp`], [`tdx`] | SEV-SNP, TDX | `configfs-tsm`: `/sys/kernel/config/tsm/report` ([`tsm`]) |
//! | [`sgx`] | SGX | Gramine's `/dev/attestation` |
//! | [`tpm`] | TPM 2.0 | `/dev/tpmrm0`, or swtpm's socket |
//!
//! `enrol` has a TPM's attestation key enrolled.
//!
//! Init data that the TEE was not started with are an error when the attester is made: nobody would believe them, and what cannot be bound
//! must not be used.

mod enrol;
pub mod sgx;
pub mod snp;
pub mod tdx;
pub mod tpm;
pub mod tsm;

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use crate::{
    evidence::{AttesterError, hex},
    initdata::InitData,
};

/// Where the devices are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// `configfs-tsm`.
    pub tsm: PathBuf,
    /// The measurement registers of a TDX guest, from Linux 6.16 on.
    pub tdx_registers: PathBuf,
    /// The firmware's log of a TDX guest.
    pub ccel: PathBuf,
    /// Gramine's files.
    pub gramine: PathBuf,
    /// The TPM.
    pub tpm: PathBuf,
    /// The firmware's log of a TPM.
    pub tpm_log: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            tsm: "/sys/kernel/config/tsm/report".into(),
            tdx_registers: "/sys/devices/virtual/misc/tdx_guest/measurements".into(),
            ccel: "/sys/firmware/acpi/tables/data/CCEL".into(),
            gramine: "/dev/attestation".into(),
            tpm: "/dev/tpmrm0".into(),
            tpm_log: "/sys/kernel/security/tpm0/binary_bios_measurements".into(),
        }
    }
}

/// Which TEE this is, by the devices that are there: an enclave, a confidential guest, or at last a machine with a TPM, which an enclave's or
/// a guest's host may have, too.
pub fn detect(places: &Places) -> Option<&'static str> {
    if places.gramine.join("user_report_data").exists() {
        return Some(sgx::TEE);
    }
    match tsm::provider(&places.tsm).as_deref() {
        Ok("sev_guest") => return Some(snp::TEE),
        Ok("tdx_guest") => return Some(tdx::TEE),
        _ => {}
    }
    places.tpm.exists().then_some(tpm::TEE)
}

/// Reads a file of a device.
fn read(tee: &'static str, what: &'static str, path: &Path, limit: u64) -> Result<Vec<u8>, AttesterError> {
    let fail = |source| AttesterError::Io { tee, what, path: path.display().to_string(), source };
    let mut bytes = Vec::new();
    fs::File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(fail)?;
    match bytes.len() as u64 > limit {
        true => Err(fail(io::Error::new(io::ErrorKind::InvalidData, "it is longer than it can be"))),
        false => Ok(bytes),
    }
}

/// As [`read`]; `None` where there is no such file.
fn read_if_there(
    tee: &'static str,
    what: &'static str,
    path: &Path,
    limit: u64,
) -> Result<Option<Vec<u8>>, AttesterError> {
    match read(tee, what, path, limit) {
        Err(AttesterError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// Writes a file of a device, at once: such files take a value, not a stream.
fn write(tee: &'static str, what: &'static str, path: &Path, bytes: &[u8]) -> Result<(), AttesterError> {
    let fail = |source| AttesterError::Io { tee, what, path: path.display().to_string(), source };
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(fail)?;
    io::Write::write_all(&mut file, bytes).map_err(fail)
}

/// Whether a TEE's field has the digest of the init data.
fn check_init_data(tee: &'static str, init_data: Option<&InitData>, field: &[u8]) -> Result<(), AttesterError> {
    let Some(init_data) = init_data else { return Ok(()) };
    let expected = init_data.fit::<64>();
    let expected = expected.get(..field.len()).unwrap_or_default();
    match !field.is_empty() && expected == field {
        true => Ok(()),
        false => Err(AttesterError::InitData { tee, given: hex(expected), measured: hex(field) }),
    }
}
