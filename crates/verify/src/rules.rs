//! What evidence has to be like, beside being genuine. The defaults are strict; a file of an operator may loosen or tighten them.
//!
//! ```toml
//! [snp]
//! debug = false                 # the host may look into such guests
//! most_vmpl = 0                 # the least privileged level that may attest
//! migration_agent = false       # another guest may have the memory
//! single_socket = false         # demand it
//! smt = true                    # admit platforms with hyperthreads on
//! require_crl = false           # refuse without AMD's revocation list; one that is in the cache always counts
//! [snp.least.Milan]             # the least TCB of a product
//! bootloader = 4
//! [dcap]                        # TDX and SGX
//! debug = false
//! statuses = ["UpToDate"]       # TCB statuses that are admitted; "Revoked" never is
//! refused_advisories = []       # advisories that must not be open
//! least_evaluation = 0          # the least tcbEvaluationDataNumber of collateral
//! service_td = false
//! migratable = false
//! stale_collateral_days = 0     # for how long collateral and CRLs still count after their time
//! [tpm]
//! pcrs = [0, 1, 2, 3, 4, 5, 6, 7]   # the PCRs that a quote must cover
//! require_log = false           # refuse quotes without an event log
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;

/// All rules.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// For SNP.
    pub snp: SnpRules,
    /// For TDX and SGX.
    pub dcap: DcapRules,
    /// For TPMs.
    pub tpm: TpmRules,
}

/// Rules for SNP.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct SnpRules {
    /// Whether guests are admitted that the host may look into.
    pub debug: bool,
    /// The least privileged level that may attest: with 0, only the guest's most privileged part.
    pub most_vmpl: u32,
    /// Whether guests are admitted that a migration agent may move.
    pub migration_agent: bool,
    /// Whether the guest's owner must have demanded one socket.
    pub single_socket: bool,
    /// Whether platforms with hyperthreads on are admitted.
    pub smt: bool,
    /// Whether evidence is refused where there is no revocation list in the cache.
    pub require_crl: bool,
    /// The least TCB, by product: `Milan`, `Genoa`, `Turin`.
    pub least: BTreeMap<String, LeastTcb>,
}

impl Default for SnpRules {
    fn default() -> Self {
        Self {
            debug: false,
            most_vmpl: 0,
            migration_agent: false,
            single_socket: false,
            smt: true,
            require_crl: false,
            least: BTreeMap::new(),
        }
    }
}

/// The least security versions of a platform's firmware.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct LeastTcb {
    /// Turin only.
    pub fmc: u8,
    /// The bootloader.
    pub bootloader: u8,
    /// The TEE.
    pub tee: u8,
    /// The SNP firmware.
    pub snp: u8,
    /// The microcode.
    pub microcode: u8,
}

/// Rules for TDX and SGX.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct DcapRules {
    /// Whether guests and enclaves are admitted that the host may look into.
    pub debug: bool,
    /// TCB statuses that are admitted, as Intel spells them. `Revoked` is refused whatever stands here.
    pub statuses: Vec<String>,
    /// Advisories that a platform must not be affected by.
    pub refused_advisories: Vec<String>,
    /// The least `tcbEvaluationDataNumber` that collateral may have.
    pub least_evaluation: u32,
    /// Whether guests with service TDs are admitted.
    pub service_td: bool,
    /// Whether guests are admitted that a migration TD may move.
    pub migratable: bool,
    /// Days for which TCB info, QE identities and revocation lists still count after their time.
    pub stale_collateral_days: u16,
}

impl Default for DcapRules {
    fn default() -> Self {
        Self {
            debug: false,
            statuses: vec!["UpToDate".into()],
            refused_advisories: Vec::new(),
            least_evaluation: 0,
            service_td: false,
            migratable: false,
            stale_collateral_days: 0,
        }
    }
}

/// Rules for TPMs.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct TpmRules {
    /// The PCRs that a quote must cover.
    pub pcrs: Vec<u32>,
    /// Whether quotes without an event log are refused.
    pub require_log: bool,
}

impl Default for TpmRules {
    fn default() -> Self {
        Self { pcrs: (0..8).collect(), require_log: false }
    }
}
