//! The replay of a log: what registers hold when each event was extended into its own, in the log's order.
//!
//! ```text
//! register = zeros (PCR 0: zeros with the startup locality as last byte; PCRs 17 to 22: all ones), then H(register ‖ digest) an event
//! ```

use std::collections::BTreeMap;

use nacre_core::Hasher;

use super::{
    Bank, Event, LogError,
    tcg::{EV_NO_ACTION, Log},
};
use crate::evidence::hex;

/// Which registers a log is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registers {
    /// A TPM's PCRs, 0 to 23.
    Pcrs,
    /// A TEE's: 0 is the launch measurement, which no event extends, 1 to 4 are RTMR 0 to 3.
    Tee,
}

impl Registers {
    fn start(self, register: u32, bank: Bank, locality: u8) -> Option<Vec<u8>> {
        let byte = match (self, register) {
            (Self::Pcrs, 17..=22) => 0xff,
            (Self::Pcrs, 0..=23) | (Self::Tee, 1..=4) => 0,
            _ => return None,
        };
        let mut value = vec![byte; bank.length()];
        if let (Self::Pcrs, 0, Some(last)) = (self, register, value.last_mut()) {
            *last = locality;
        }
        Some(value)
    }
}

/// What a register holds after one more event.
pub fn extended(bank: Bank, value: &[u8], digest: &[u8]) -> Option<Vec<u8>> {
    let mut hasher = Hasher::new(bank.algorithm()?);
    hasher.update(value);
    hasher.update(digest);
    Some(hasher.finish().as_bytes().to_vec())
}

/// The registers that a log extends, and what they hold after it.
///
/// # Errors
/// [`LogError`]: an event of a register that there is not, or without a digest of this bank.
pub fn replay(log: &Log<'_>, bank: Bank, registers: Registers) -> Result<BTreeMap<u32, Vec<u8>>, LogError> {
    let mut values = BTreeMap::new();
    for (number, event) in log.events.iter().enumerate() {
        if event.kind != EV_NO_ACTION {
            extend(&mut values, number + 1, event, bank, registers, log.locality)?;
        }
    }
    Ok(values)
}

fn extend(
    values: &mut BTreeMap<u32, Vec<u8>>,
    number: usize,
    event: &Event<'_>,
    bank: Bank,
    registers: Registers,
    locality: u8,
) -> Result<(), LogError> {
    let digest = event.digest(bank).ok_or(LogError::NoDigest { event: number, bank })?;
    let before = match values.get(&event.register) {
        Some(value) => value.clone(),
        None => registers.start(event.register, bank, locality).ok_or_else(|| LogError::Malformed {
            event: number,
            why: format!("register {} cannot be extended", event.register),
        })?,
    };
    let after = extended(bank, &before, digest).ok_or(LogError::NoDigest { event: number, bank })?;
    values.insert(event.register, after);
    Ok(())
}

/// Compares a replay with what was measured: each register of `measured` must hold what the replay gives, or its start value where the
/// log has no event of it. Events of other registers are not believed: [`believed`] leaves them out.
///
/// # Errors
/// [`LogError::Replay`] names the first register that differs.
pub fn check(
    log: &Log<'_>,
    bank: Bank,
    registers: Registers,
    measured: &BTreeMap<u32, Vec<u8>>,
) -> Result<(), LogError> {
    let replayed = replay(log, bank, registers)?;
    for (register, value) in measured {
        let expected = replayed.get(register).cloned().or_else(|| registers.start(*register, bank, log.locality));
        if expected.as_ref() != Some(value) {
            return Err(LogError::Replay {
                register: *register,
                replayed: expected.map_or_else(|| "nothing".to_owned(), |value| hex(&value)),
                measured: hex(value),
            });
        }
    }
    Ok(())
}

/// The events of the registers that [`check`] compared.
pub fn believed<'l, 'b>(log: &'l Log<'b>, measured: &'l BTreeMap<u32, Vec<u8>>) -> impl Iterator<Item = &'l Event<'b>> {
    log.events.iter().filter(|event| event.kind != EV_NO_ACTION && measured.contains_key(&event.register))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventlog::{
        aael::{self, RuntimeEvent},
        tcg,
    };

    fn event(content: &str) -> Vec<u8> {
        RuntimeEvent::new("d", "o", content).unwrap().entry(4, Bank::Sha384).unwrap()
    }

    fn log(events: &[&Vec<u8>]) -> Vec<u8> {
        let mut bytes = aael::header(&[Bank::Sha384]);
        events.iter().for_each(|event| bytes.extend_from_slice(event));
        bytes
    }

    fn registers(events: &[&Vec<u8>]) -> BTreeMap<u32, Vec<u8>> {
        let bytes = log(events);
        let mut values = replay(&tcg::parse(&bytes).unwrap(), Bank::Sha384, Registers::Tee).unwrap();
        for register in 1..=4 {
            values.entry(register).or_insert_with(|| vec![0; 48]);
        }
        values
    }

    #[test]
    fn a_log_that_was_reordered_shortened_or_lengthened_is_refused() {
        let (a, b, c) = (event("a"), event("b"), event("c"));
        let measured = registers(&[&a, &b]);
        let verdict =
            |events: &[&Vec<u8>]| check(&tcg::parse(&log(events)).unwrap(), Bank::Sha384, Registers::Tee, &measured);
        verdict(&[&a, &b]).unwrap();
        for wrong in [&[&b, &a][..], &[&a], &[&b], &[], &[&a, &b, &c], &[&a, &b, &b], &[&a, &c]] {
            assert!(matches!(verdict(wrong), Err(LogError::Replay { register: 4, .. })), "{wrong:?}");
        }
        // Moved to another register.
        let elsewhere = RuntimeEvent::new("d", "o", "b").unwrap().entry(3, Bank::Sha384).unwrap();
        assert!(matches!(verdict(&[&a, &elsewhere]), Err(LogError::Replay { register: 3, .. })));
    }

    #[test]
    fn what_cannot_be_replayed_is_refused() {
        let launch = RuntimeEvent::new("d", "o", "x").unwrap().entry(0, Bank::Sha384).unwrap();
        let bytes = log(&[&launch]);
        let parsed = tcg::parse(&bytes).unwrap();
        assert!(matches!(replay(&parsed, Bank::Sha384, Registers::Tee), Err(LogError::Malformed { event: 1, .. })));
        let other = event("x");
        let bytes = log(&[&other]);
        let parsed = tcg::parse(&bytes).unwrap();
        assert!(matches!(replay(&parsed, Bank::Sha256, Registers::Tee), Err(LogError::NoDigest { event: 1, .. })));
    }

    #[test]
    fn events_of_registers_that_were_not_compared_are_not_believed() {
        let (a, b) = (event("a"), RuntimeEvent::new("d", "o", "b").unwrap().entry(3, Bank::Sha384).unwrap());
        let bytes = log(&[&a, &b]);
        let parsed = tcg::parse(&bytes).unwrap();
        let only_four = BTreeMap::from([(4, vec![0; 48])]);
        assert_eq!(believed(&parsed, &only_four).map(|event| event.register).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn pcrs_start_as_the_platform_says() {
        assert_eq!(Registers::Pcrs.start(0, Bank::Sha256, 3).unwrap()[31], 3);
        assert_eq!(Registers::Pcrs.start(17, Bank::Sha256, 3).unwrap(), [0xff; 32]);
        assert_eq!(Registers::Pcrs.start(24, Bank::Sha256, 0), None);
        assert_eq!(Registers::Tee.start(5, Bank::Sha384, 0), None);
    }
}
