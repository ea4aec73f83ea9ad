//! Event logs: what was measured into the registers of a TEE or a TPM, event by event.
//!
//! | module | what |
//! |---|---|
//! | [`tcg`] | the crypto-agile log of the TCG, as firmware leaves it (CCEL, `binary_bios_measurements`): parsed |
//! | [`replay`] | what registers hold after a log: the only thing that makes a log believable |
//! | [`aael`] | run-time events of confidential containers, which are entries of the same log |
//! | [`story`] | what the run-time events of a guest say together: its policy, images, volumes, keys, workloads |
//! | [`runtime`] | the writer of run-time events in a guest: write-ahead, into a file and a register |
//!
//! A log is a claim of whoever sends it. Only when its replay gives what the hardware signed is it what was measured; and even then the
//! *data* of an event is as good as its digest: what is not the hash of the data says nothing about it ([`Event::data_is_measured`]).
//! Layouts, byte by byte: `docs/formats/event-log.md`.

pub mod aael;
pub mod replay;
pub mod runtime;
pub mod story;
pub mod tcg;

use nacre_core::{Algorithm, Digest};
use serde_json::{Value, json};

/// Bytes of a log at most: a firmware log has some 64 KiB, and run-time events some hundred bytes each.
pub const LONGEST: usize = 2 << 20;
/// Events of a log at most.
pub const MOST_EVENTS: usize = 16 * 1024;
/// Bytes of one event's data at most.
pub const LONGEST_EVENT: usize = 1 << 20;

/// Why a log is none, or is not what was measured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// More than its limit.
    #[error("{what}: {found}, and at most {limit} are accepted")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much may be.
        limit: usize,
    },
    /// It ends within something.
    #[error("it ends within {what} of event {event}")]
    Short {
        /// Within what.
        what: &'static str,
        /// The number of the event, the header being 0.
        event: usize,
    },
    /// A field has a value that it cannot have.
    #[error("event {event}: {why}")]
    Malformed {
        /// The number of the event, the header being 0.
        event: usize,
        /// What is wrong.
        why: String,
    },
    /// An event has no digest in the bank that is to be replayed.
    #[error("event {event} has no {bank} digest")]
    NoDigest {
        /// The number of the event.
        event: usize,
        /// The bank.
        bank: Bank,
    },
    /// The replay gives another value than the register has: events were dropped, added, changed or reordered.
    #[error(
        "its replay gives {replayed} for register {register}, and the measured value is {measured}: events were dropped, added, changed or reordered"
    )]
    Replay {
        /// The register.
        register: u32,
        /// What the replay gives, hex.
        replayed: String,
        /// What was measured, hex.
        measured: String,
    },
    /// A run-time event is none.
    #[error("run-time event: {0}")]
    Event(String),
}

/// A hash function of a log, by its number in the TCG's registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bank {
    /// Only carried along: nothing is believed for its sake.
    Sha1,
    /// TPM PCRs.
    Sha256,
    /// RTMRs, and TPM PCRs.
    Sha384,
    /// Some TPMs.
    Sha512,
    /// Only carried along.
    Sm3,
}

impl Bank {
    /// By its number (`TPM_ALG_ID`).
    pub fn from_id(id: u16) -> Option<Self> {
        Some(match id {
            0x0004 => Self::Sha1,
            0x000b => Self::Sha256,
            0x000c => Self::Sha384,
            0x000d => Self::Sha512,
            0x0012 => Self::Sm3,
            _ => return None,
        })
    }

    /// Its number (`TPM_ALG_ID`).
    pub fn id(self) -> u16 {
        match self {
            Self::Sha1 => 0x0004,
            Self::Sha256 => 0x000b,
            Self::Sha384 => 0x000c,
            Self::Sha512 => 0x000d,
            Self::Sm3 => 0x0012,
        }
    }

    /// Bytes of a digest.
    pub fn length(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The hash function, where it is one that we compute.
    pub fn algorithm(self) -> Option<Algorithm> {
        match self {
            Self::Sha1 | Self::Sm3 => None,
            Self::Sha256 => Some(Algorithm::Sha256),
            Self::Sha384 => Some(Algorithm::Sha384),
            Self::Sha512 => Some(Algorithm::Sha512),
        }
    }

    /// The name that policies see.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA-1",
            Self::Sha256 => "SHA-256",
            Self::Sha384 => "SHA-384",
            Self::Sha512 => "SHA-512",
            Self::Sm3 => "SM3",
        }
    }
}

impl std::fmt::Display for Bank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An event of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The PCR of a TPM; of a TEE, 0 for the launch measurement and n + 1 for RTMR n.
    pub register: u32,
    /// Its type, of the TCG's registry.
    pub kind: u32,
    /// What the register was extended with, by bank.
    pub digests: Vec<(Bank, &'a [u8])>,
    /// What the firmware wanted to say. Whether it is measured is up to the type and the firmware.
    pub data: &'a [u8],
}

impl Event<'_> {
    /// The digest of a bank.
    pub fn digest(&self, bank: Bank) -> Option<&[u8]> {
        self.digests.iter().find(|(of, _)| *of == bank).map(|(_, digest)| *digest)
    }

    /// Whether every digest that we can compute is the hash of the data, so that what was measured says what the data say.
    pub fn data_is_measured(&self) -> bool {
        let mut computed =
            self.digests.iter().filter_map(|(bank, digest)| Some((bank.algorithm()?, digest))).peekable();
        computed.peek().is_some()
            && computed.all(|(algorithm, digest)| Digest::of(algorithm, self.data).as_bytes() == *digest)
    }

    /// As policies see it, in the form that other brokers give to events.
    pub fn to_json(&self) -> Value {
        let digests: Vec<Value> = self
            .digests
            .iter()
            .map(|(bank, digest)| json!({"alg": bank.name(), "digest": crate::evidence::hex(digest)}))
            .collect();
        json!({
            "index": self.register,
            "type_name": tcg::kind_name(self.kind),
            "digests": digests,
            "digest_matches_event": self.data_is_measured(),
            "event": base64::Engine::encode(&base64::prelude::BASE64_STANDARD, self.data),
            "details": tcg::details(self),
        })
    }
}
