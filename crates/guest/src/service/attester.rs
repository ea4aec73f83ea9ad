//! Which TEE the guest shows evidence of, and where it records what it does.

use std::{os::unix::fs::DirBuilderExt as _, path::PathBuf, sync::Arc};

use nacre_attest::{
    attesters::{
        Places, detect,
        sgx::{self, SgxAttester},
        snp::{self, SnpAttester},
        tdx::{self, TdxAttester},
        tpm::{self, Ak, TpmAttester, TpmOptions},
    },
    eventlog::story::Happening,
    evidence::{Attester, hex},
    initdata::InitData,
    sample::{self, SampleAttester},
    sim::{self, SimAttester, read_platform_key},
};

use super::ServiceError;
use crate::config::BrokerConfig;

/// Where events are recorded in a guest: a directory that ends with the registers.
const EVENTS: &str = "/run/nacre/events";

/// Makes the attester of a configured TEE, or of the one that is there; the event log is opened, and the init data are its first event.
pub(super) fn attester(config: &BrokerConfig, init_data: Option<InitData>) -> Result<Arc<dyn Attester>, ServiceError> {
    let mut places = Places::default();
    if let Some(tpm) = &config.tpm {
        places.tpm = PathBuf::from(tpm);
    }
    let tee = match (&config.tee, &config.sim_platform_key) {
        (Some(tee), _) => tee.as_str(),
        (None, Some(_)) => sim::TEE,
        (None, None) => detect(&places).ok_or_else(|| {
            ServiceError::Config(
                "there is no TEE here (SNP, TDX, SGX below Gramine, a TPM): set broker.tee, or broker.sim_platform_key (--sim-platform-key) for a simulated one".into(),
            )
        })?,
    };
    let attester: Arc<dyn Attester> = match tee {
        sim::TEE => Arc::new(simulated(config, init_data)?),
        sample::TEE => Arc::new(SampleAttester::new(init_data.as_ref())?),
        snp::TEE => Arc::new(SnpAttester::new(places.tsm, init_data)?),
        tdx::TEE => Arc::new(TdxAttester::new(&places, &events(config)?, init_data)?),
        sgx::TEE => Arc::new(SgxAttester::new(places.gramine, init_data)?),
        tpm::TEE => {
            let options = TpmOptions {
                address: tpm::address(&places.tpm.display().to_string()),
                ak: config.tpm_ak.as_deref().map_or(Ok(Ak::Primary), ak)?,
                firmware_log: places.tpm_log,
                log_dir: events(config)?,
            };
            Arc::new(TpmAttester::new(&options, init_data)?)
        }
        other => {
            return Err(ServiceError::Config(format!(
                "broker.tee: '{other}' is none: snp, tdx, sgx, tpm, sim and sample are"
            )));
        }
    };
    if let (Some(log), Some(init_data)) = (attester.runtime_log(), attester.init_data()) {
        log.record(&Happening::InitData { digest: hex(init_data.digest().as_bytes()) })?;
    }
    Ok(attester)
}

fn simulated(config: &BrokerConfig, init_data: Option<InitData>) -> Result<SimAttester, ServiceError> {
    let key = config.sim_platform_key.as_ref();
    let key = key.ok_or_else(|| ServiceError::Config("broker.tee is sim: set broker.sim_platform_key".into()))?;
    let attester = SimAttester::new(read_platform_key(key)?, init_data)?;
    match &config.events {
        Some(_) => Ok(attester.events(&events(config)?)?),
        None => Ok(attester),
    }
}

/// The directory of the event log, made where it is missing.
fn events(config: &BrokerConfig) -> Result<PathBuf, ServiceError> {
    let dir = config.events.clone().unwrap_or_else(|| EVENTS.into());
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|source| ServiceError::File { what: "the event log's directory", path: dir.clone(), source })?;
    Ok(dir)
}

/// A persistent key by its handle.
fn ak(text: &str) -> Result<Ak, ServiceError> {
    let handle = text.strip_prefix("0x").and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let handle = handle.filter(|handle| (0x8100_0000..=0x81ff_ffff).contains(handle));
    let bad =
        || ServiceError::Config(format!("broker.tpm_ak: '{text}' is no persistent handle: 0x81000000 to 0x81ffffff"));
    handle.map(Ak::Persistent).ok_or_else(bad)
}
