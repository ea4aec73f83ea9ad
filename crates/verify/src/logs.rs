//! Event logs of evidence: replayed against what the hardware signed, then put into claims.

use std::collections::BTreeMap;

use nacre_attest::eventlog::{
    Bank, LogError,
    aael::runtime_events,
    replay::{Registers, believed, check},
    story::Story,
    tcg,
};
use serde_json::json;

use crate::checked::Genuine;

/// What the hardware signed, as a log is compared with it.
pub(crate) struct Measured {
    bank: Bank,
    registers: Registers,
    values: BTreeMap<u32, Vec<u8>>,
}

/// RTMRs.
pub(crate) fn tee(values: BTreeMap<u32, Vec<u8>>) -> Measured {
    Measured { bank: Bank::Sha384, registers: Registers::Tee, values }
}

/// PCRs of the SHA-256 bank.
pub(crate) fn pcrs(values: BTreeMap<u32, Vec<u8>>) -> Measured {
    Measured { bank: Bank::Sha256, registers: Registers::Pcrs, values }
}

/// Replays a log and adds what it says: the story of run-time events to the claims (`runtime`), all believed events to the logs
/// (`uefi_event_logs`).
pub(crate) fn add(genuine: &mut Genuine, log: &[u8], measured: Measured) -> Result<(), LogError> {
    let log = tcg::parse(log)?;
    check(&log, measured.bank, measured.registers, &measured.values)?;
    let story = Story::of(&runtime_events(believed(&log, &measured.values)));
    let events: Vec<_> = believed(&log, &measured.values).map(|event| event.to_json()).collect();
    genuine.claims["runtime"] = story.summary();
    genuine.logs = json!({"uefi_event_logs": events, "runtime": story.to_json()});
    Ok(())
}
