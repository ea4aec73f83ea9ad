//! Verifiers of hardware evidence: offline, with collateral from a [`Cache`] and the time as an argument.
//!
//! | module | what |
//! |---|---|
//! | [`snp`] | AMD SEV-SNP: reports by VCEK and VLEK |
//! | [`dcap`] | Intel TDX and SGX: quotes by DCAP |
//! | [`tpm`] | TPM 2.0: quotes, PCRs, event logs |
//! | [`Rules`] | what evidence has to be like, beside being genuine; strict by default |
//! | [`Cache`] | collateral: certificates, revocation lists, TCB info |
//! | [`import()`], [`entries()`] | how an operator fills the cache, and sees what is in it |
//! | [`Verifiers`] | all of them, by the TEE's name |
//! | `x509` | certificates and revocation lists |
//! | [`Genuine`] | evidence that is genuine, before it is bound to a session |
//!
//! Invariants: no network, no clock; what is missing, expired, revoked or not understood is a refusal; roots of trust are arguments, and
//! the vendors' own are in this crate; collateral is verified where it is used, so that nobody has to trust the cache.
//! The guest does not have this crate: it makes evidence, and checks none.

mod cache;
mod checked;
pub mod dcap;
#[doc(hidden)]
pub mod fuzzing;
mod import;
mod logs;
mod rules;
pub mod snp;
pub mod tpm;
mod verifiers;
mod x509;

pub use cache::{Cache, CacheError};
pub use checked::Genuine;
pub use import::{Entry, ImportError, entries, import};
pub use rules::{DcapRules, LeastTcb, Rules, SnpRules, TpmRules};
pub use verifiers::{VendorRootsError, Verifiers};
