//! The key broker: it appraises guests and releases secrets to those that a policy trusts.
//!
//! | module | what |
//! |---|---|
//! | [`Broker`] | the broker itself: sessions, appraisal, release; everything an administrator does. Synchronous, knows no HTTP |
//! | `files` | its directory: keys, certificate, settings, database |
//! | `storage` | the port to the database: tables and serializable transactions, in a file (redb) or in PostgreSQL |
//! | `store` | what is kept there: sealed records of resources, policies, reference values, platforms, sessions; the audit log |
//! | [`MasterKey`] | what wraps the keys that seal the records |
//! | `policy` | Rego, bounded in time, denying by default |
//! | `reference` | signed documents of reference values |
//! | `corim`, `cbor` | the same as CoRIM manifests |
//! | `verifiers` | which TEEs are verified, by which rules, with which collateral |
//! | `admin` | the administrator's tokens |
//! | `enrolment` | attestation keys of TPMs, enrolled by who made the TPM |
//! | `chain` | the chain of trust of one guest, for people |
//! | [`server`] | the HTTP service under `/kbs/v0` |
//! | [`AdminClient`] | the administrator's client |
//!
//! Invariants: nothing is released without a token of this broker, a policy that says so, and an entry in the audit log that is on disk
//! before the answer leaves; a nonce works once, whatever became of the attempt; an evaluation that fails, errs or takes too long
//! is a refusal; what is simulated is released to only where the settings allow it, and is marked everywhere.
//! Formats: `docs/formats/attestation.md`.

mod admin;
mod admin_client;
mod administer;
mod api;
mod appraise;
mod broker;
mod cbor;
mod chain;
mod corim;
mod enrolment;
mod error;
mod files;
pub mod fuzzing;
mod limit;
mod master;
mod metrics;
mod policy;
mod reference;
mod release;
pub mod server;
mod storage;
mod store;
mod tokens;
mod verifiers;

pub use admin::{Administrator, Role, admin_token};
pub use admin_client::{AdminClient, AnchorInfo, ResourceScope};
pub use broker::{Broker, InitOptions};
pub use chain::{Check, GuestChain, GuestSummary, Stage, StageId, TrustClaim, Verdict};
pub use enrolment::Enrolment;
pub use error::{ApiError, BrokerError};
pub use files::{OpenMaster, Settings};
pub use master::{MasterKey, MasterKeyError};
pub use policy::{References, Trace, TraceLine, trace};
pub use reference::{ReferenceDocument, Signer, is_corim};
pub use server::{Handle, Transport, serve};
pub use storage::StorageError;
pub use store::{
    AuditEntry, ReferenceValue,
    audit::AuditHead,
    guests::GuestList,
    leases::{Lease, Revocation},
    resources::{PutOptions, Resource, ResourceKind},
};
pub use verifiers::collateral_dir;
