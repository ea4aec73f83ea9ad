//! `nacre attest`, and the collateral of verifiers: what there is.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::BrokerArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum AttestCommand {
    /// Print the evidence of this guest, of the TEE that is there
    Evidence {
        /// Which TEE this is [default: the one that is there]
        #[arg(long)]
        tee: Option<TeeName>,
        /// The platform key of the simulated TEE, where there is no other
        #[arg(long, value_name = "FILE")]
        sim_platform_key: Option<PathBuf>,
        /// The TPM: a device, swtpm's socket, or host:port
        #[arg(long, value_name = "TPM")]
        tpm: Option<String>,
        /// The TPM's attestation key, by its persistent handle [default: a primary key, made from the TPM's seed]
        #[arg(long, value_name = "HANDLE")]
        tpm_ak: Option<String>,
        /// The directory of the event log [default: /run/nacre/events; of a simulated TEE, no log]
        #[arg(long, value_name = "DIR")]
        events: Option<PathBuf>,
        /// The guest's init data, which the evidence binds
        #[arg(long, value_name = "FILE")]
        init_data: Option<PathBuf>,
        /// Up to 64 bytes to bind, in hex
        #[arg(long, value_name = "HEX", default_value = "")]
        report_data: String,
    },
    /// Attest to a broker and print its token
    Token {
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// Have the attestation key of this guest's TPM enrolled at a broker, by the TPM's EK certificate; prints the TPM's name there
    Enrol {
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// Verify evidence of any TEE, offline; prints what it says, and ends with 3 where it does not hold
    Verify(EvidenceArgs),
    /// Print an event log: firmware's (CCEL, binary_bios_measurements) with what was added at run time; verifies nothing
    Log {
        /// The log
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a platform key for simulated TEEs; prints the public key, which brokers are told to trust
    SimKey {
        /// The file for the private key
        file: PathBuf,
    },
    /// Print the measurement that a simulated TEE takes of a program: the reference value sim.measurement
    Measure {
        /// The program
        file: PathBuf,
    },
    /// Print the digest of init data as simulated evidence has it: the reference value sim.init_data
    InitData {
        /// The init data
        file: PathBuf,
    },
}

/// A kind of TEE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TeeName {
    /// AMD SEV-SNP
    Snp,
    /// Intel TDX
    Tdx,
    /// Intel SGX, by DCAP
    Sgx,
    /// A TPM 2.0
    Tpm,
    /// A simulated one
    Sim,
    /// What Trustee's programs say where there is no TEE: neither measured nor signed
    Sample,
}

#[derive(Debug, Args)]
pub(crate) struct EvidenceArgs {
    /// What it is evidence of
    #[arg(long)]
    pub(crate) tee: TeeName,
    /// The evidence: a report or quote as the hardware makes it, or the JSON that guests send
    #[arg(long, value_name = "FILE")]
    pub(crate) quote: PathBuf,
    /// What the vendor publishes for it: VCEK or VLEK, revocation lists, DCAP collateral; of simulated ones, the platform's public key;
    /// may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) collateral: Vec<PathBuf>,
    /// A directory that broker collateral import filled
    #[arg(long, value_name = "DIR")]
    pub(crate) collateral_dir: Option<PathBuf>,
    /// The time that validity is judged by [default: now]
    #[arg(long, value_name = "RFC3339")]
    pub(crate) time: Option<String>,
    /// Rules that differ from the strict defaults, TOML as in a broker's verify.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) rules: Option<PathBuf>,
    /// An event log, which has to give what the quote has
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Up to 64 bytes that it has to be bound to, in hex
    #[arg(long, value_name = "HEX")]
    pub(crate) report_data: Option<String>,
    /// The init data that it has to be bound to
    #[arg(long, value_name = "FILE")]
    pub(crate) init_data: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CollateralCommand {
    /// Put downloaded files into a broker's cache, also while it runs; what they are is recognised
    Import {
        /// The files
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The broker's directory
        #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
        dir: PathBuf,
    },
    /// List what is in a broker's cache, and until when it is good
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The broker's directory
        #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
        dir: PathBuf,
    },
}
