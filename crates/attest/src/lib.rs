//! Attestation: what a guest says of itself, how that is checked, and how the two ends talk about it.
//!
//! | module | what |
//! |---|---|
//! | [`rcar`] | the messages of the key broker protocol 0.x (Request, Challenge, Attestation, Response) and the report data binding |
//! | [`initdata`] | the configuration that a guest is started with and measured by |
//! | [`evidence`] | the ports [`Attester`](evidence::Attester) and [`Verifier`](evidence::Verifier), and what verified evidence says |
//! | [`eventlog`] | event logs of firmware and of run time: parsed, replayed, written |
//! | [`snp_report`] | the report of SEV-SNP, in bytes and in JSON |
//! | [`attesters`] | evidence from the devices of real TEEs |
//! | [`sim`] | the simulated TEE, for demos and tests |
//! | [`enrolment`] | the messages by which a TPM's attestation key becomes a known one |
//! | [`sample`] | what Trustee's programs say where there is no TEE, for trying one side against theirs |
//! | [`ear`] | attestation results: EAR tokens |
//! | [`client`] | the guest's side: attest, fetch keys, know the time |
//! | [`offline`] | keys from files, for development |
//!
//! Invariants: nothing here decides a policy; evidence counts only as [`nacre_core::Verified`]; the TEE key never leaves memory; whatever
//! is simulated says so in its evidence, its token and its messages. Formats: `docs/formats/attestation.md`.

pub mod attesters;
pub mod client;
pub mod ear;
pub mod enrolment;
pub mod eventlog;
pub mod evidence;
pub mod initdata;
pub mod jcs;
pub mod offline;
pub mod rcar;
pub mod sample;
pub mod sim;
pub mod snp_report;
