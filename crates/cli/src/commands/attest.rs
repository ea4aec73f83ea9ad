//! `nacre attest`: evidence, tokens, and what simulated TEEs need.

use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use anyhow::Context as _;
use nacre_attest::{initdata::InitData, sim::measure};
use nacre_core::jose::PrivateKey;
use nacre_guest::{config::BrokerConfig, service::attester_of};

use crate::{
    args::{AttestCommand, Global},
    commands::verify,
    output,
    setup::Setup,
};

pub(crate) fn attest(global: &Global, command: &AttestCommand) -> anyhow::Result<()> {
    match command {
        AttestCommand::Evidence { tee, sim_platform_key, tpm, tpm_ak, events, init_data, report_data } => {
            let config = BrokerConfig {
                tee: tee.map(|tee| tee.name().to_owned()),
                sim_platform_key: sim_platform_key.clone(),
                tpm: tpm.clone(),
                tpm_ak: tpm_ak.clone(),
                events: events.clone(),
                init_data: init_data.clone(),
                ..BrokerConfig::new("")
            };
            output::json(&attester_of(&config)?.evidence(&bytes_of_hex(report_data)?)?)
        }
        AttestCommand::Token { broker } => {
            let mut setup = Setup::new(global, false)?;
            setup.add_broker(broker)?;
            let broker = setup.config.broker.as_ref().context("name the broker: --broker URL")?;
            Ok(output::line(nacre_guest::service::connect(broker)?.attest()?.token())?)
        }
        AttestCommand::Enrol { broker } => {
            let mut setup = Setup::new(global, false)?;
            setup.add_broker(broker)?;
            let broker = setup.config.broker.as_ref().context("name the broker: --broker URL")?;
            Ok(output::line(nacre_guest::service::enrol(broker)?.name)?)
        }
        AttestCommand::SimKey { file } => {
            let key = PrivateKey::generate_p256();
            let mut out = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(file)
                .with_context(|| format!("{}: write the platform key", file.display()))?;
            out.write_all(key.to_pkcs8_pem()?.as_bytes())?;
            out.sync_all()?;
            Ok(output::line(key.public().to_pem()?.trim_end())?)
        }
        AttestCommand::Verify(args) => verify::verify(args),
        AttestCommand::Log { file, json } => verify::log(file, *json),
        AttestCommand::Measure { file } => Ok(output::line(measure(file)?.hex())?),
        AttestCommand::InitData { file } => {
            let digest = read_init_data(file)?.fit::<48>();
            Ok(output::line(digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())?)
        }
    }
}

pub(crate) fn read_init_data(path: &Path) -> anyhow::Result<InitData> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: init data", path.display()))?;
    Ok(InitData::parse(&text)?)
}

pub(crate) fn bytes_of_hex(text: &str) -> anyhow::Result<[u8; 64]> {
    anyhow::ensure!(
        text.len() <= 128 && text.len().is_multiple_of(2) && text.bytes().all(|digit| digit.is_ascii_hexdigit()),
        "--report-data: up to 64 bytes in hex are expected"
    );
    let mut data = [0; 64];
    for (slot, pair) in data.iter_mut().zip(text.as_bytes().chunks(2)) {
        *slot = u8::from_str_radix(std::str::from_utf8(pair)?, 16)?;
    }
    Ok(data)
}
