//! Intel TDX and SGX: quotes of DCAP, signed by a quoting enclave, which a platform's key signs, whose certificate Intel signs.
//!
//! ```text
//! root ─▶ PCK CA ─▶ PCK (platform) ─▶ QE report ─▶ attestation key ─▶ quote
//! root ─▶ TCB signing ─▶ TCB info (platform's versions), QE identity          root, PCK CA ─▶ revocation lists
//! ```
//!
//! Checked, in this order: the quote's form and what the rules say of its guest; the root, the authority and the platform's certificate, each in its time, each by a
//! revocation list in its time; the QE report by the platform's key, the attestation key by the QE report, the quote by the attestation
//! key; TCB info and QE identity, their signer and their time; the platform's and the enclave's TCB level by the rules; the TDX module; of TDX
//! the event log, by its replay.

mod claims;
pub(crate) mod collateral;
mod pck;
pub(crate) mod quote;
pub(crate) mod tcb;

use std::sync::Arc;

use aws_lc_rs::signature::ECDSA_P256_SHA256_FIXED;
use nacre_attest::evidence::{Claims, EvidenceError, Expected, Verifier, hex};
use nacre_core::{Digest, Verified};
use serde_json::{Map, Value};

use self::{
    collateral::Context,
    quote::{Body, Quote, at},
    tcb::{Status, Verdict},
};
use crate::{
    cache::Cache,
    checked::{Genuine, InitField},
    logs,
    rules::DcapRules,
    x509::{Cert, Key, date},
};

/// TDX's name in the protocol.
pub const TDX: &str = "tdx";
/// SGX's name in the protocol.
pub const SGX: &str = "sgx";

/// Bits of a guest's attributes that let the host look in, or that are not known yet: bit 0 is debug, 4 to 6 profiling.
const TD_UNDER_DEBUG: u64 = 0xff;
const TD_SERVICE: u64 = 1 << 17;
const TD_SEPT_VE_DISABLE: u64 = 1 << 28;
const TD_MIGRATABLE: u64 = 1 << 29;
/// Bits of guests' attributes that have no meaning yet.
const TD_RESERVED: u64 = 0x3fff_ffff_0780_ff00;
const SGX_INIT: u8 = 1;
const SGX_DEBUG: u8 = 2;
const DAY: i64 = 86_400;

/// A root of trust that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the root of DCAP: {0}")]
pub struct RootError(String);

/// The root that verifiers of DCAP quotes trust.
#[derive(Clone, Debug)]
pub struct IntelRoot(Cert);

impl IntelRoot {
    /// Intel's own: `roots/intel-sgx-root.pem`, as <https://certificates.trustedservices.intel.com/IntelSGXRootCA.der> has it.
    ///
    /// # Errors
    /// [`RootError`]: none, with the root that this crate has.
    pub fn intel() -> Result<Self, RootError> {
        Self::trust(include_bytes!("../../roots/intel-sgx-root.pem"))
    }

    /// Another root: DER or PEM.
    ///
    /// # Errors
    /// [`RootError`]: it is no certificate that signs itself.
    pub fn trust(cert: &[u8]) -> Result<Self, RootError> {
        let cert = Cert::from_any(cert).map_err(|error| RootError(error.to_string()))?;
        cert.issued_by(&cert, cert.validity().0, None).map_err(|error| RootError(error.to_string()))?;
        Ok(Self(cert))
    }
}

/// Checks TDX or SGX quotes.
#[derive(Clone, Debug)]
pub struct DcapVerifier {
    tee: &'static str,
    root: Arc<IntelRoot>,
    cache: Arc<Cache>,
    rules: DcapRules,
}

impl DcapVerifier {
    /// A verifier of TDX quotes, versions 4 and 5.
    pub fn tdx(root: Arc<IntelRoot>, cache: Arc<Cache>, rules: DcapRules) -> Self {
        Self { tee: TDX, root, cache, rules }
    }

    /// A verifier of SGX quotes, version 3.
    pub fn sgx(root: Arc<IntelRoot>, cache: Arc<Cache>, rules: DcapRules) -> Self {
        Self { tee: SGX, root, cache, rules }
    }

    /// Checks evidence of the protocol: `{"quote": base64, "cc_eventlog": base64 or null}`; SGX has no log.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    pub fn genuine(&self, evidence: &Value, now: i64) -> Result<Genuine, EvidenceError> {
        let quote =
            evidence.get("quote").and_then(Value::as_str).ok_or_else(|| self.malformed("there is no 'quote'"))?;
        let quote = collateral::base64(quote, quote::LONGEST).map_err(|why| self.malformed(format!("quote: {why}")))?;
        let log = match evidence.get("cc_eventlog") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => {
                let log = collateral::base64(text, nacre_attest::eventlog::LONGEST);
                Some(log.map_err(|why| self.malformed(format!("cc_eventlog: {why}")))?)
            }
            Some(_) => return Err(self.malformed("'cc_eventlog' is no text")),
        };
        self.quote(&quote, log.as_deref(), now)
    }

    /// Checks a quote, and an event log by it.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    pub fn quote(&self, bytes: &[u8], log: Option<&[u8]>, now: i64) -> Result<Genuine, EvidenceError> {
        let quote = quote::parse(bytes).map_err(|why| self.malformed(format!("quote: {why}")))?;
        let tdx = matches!(quote.body, Body::Td(..));
        if tdx != (self.tee == TDX) {
            return Err(self.malformed("the quote is of another TEE"));
        }
        self.judge(&quote)?;
        let context = Context {
            tee: self.tee,
            cache: &self.cache,
            root: &self.root.0,
            now,
            grace: i64::from(self.rules.stale_collateral_days) * DAY,
        };
        let (root_crl, root_until) = context.crl("root", context.root)?;
        context.root.issued_by(context.root, now, Some(&root_crl)).map_err(|error| context.certificate(error))?;
        let (pck, pck_until) = self.platform_certificate(&context, &quote, &root_crl)?;
        self.signatures(&quote, &pck)?;
        let platform = pck::platform(&pck);
        let platform = platform.ok_or_else(|| self.wrong(pck.name(), "it does not say what its platform is"))?;
        let collateral = context.collateral(&platform, tdx, &root_crl)?;
        let verdict = self.verdict(&quote, &platform, &collateral)?;
        let evaluation = collateral.tcb.tcb_evaluation_data_number.min(collateral.identity.tcb_evaluation_data_number);
        self.judge_platform(&verdict, evaluation)?;

        let mut claims = claims::claims(&quote, &platform);
        let until = collateral.until.min(root_until).min(pck_until);
        claims.insert("tcb_status".into(), verdict.status.name().into());
        claims.insert("tcb_date".into(), verdict.date.into());
        claims.insert("advisory_ids".into(), verdict.advisories.into());
        claims.insert("tcb_eval_num".into(), evaluation.into());
        claims.insert("earliest_expiration_date".into(), date(until).into());
        claims.insert("collateral_expiration_status".into(), if now <= until { "0" } else { "1" }.into());
        self.finish(&quote, claims, log)
    }

    fn finish(
        &self,
        quote: &Quote<'_>,
        claims: Map<String, Value>,
        log: Option<&[u8]>,
    ) -> Result<Genuine, EvidenceError> {
        let mut genuine = match quote.body {
            Body::Td(td, _) => Genuine {
                tee: TDX,
                claims: Value::Object(claims),
                logs: Value::Null,
                report_data: at::<64>(td, 520).to_vec(),
                init_data: InitField::Field(at::<48>(td, 184).to_vec()),
                measurement: hex(&at::<48>(td, 136)),
            },
            Body::Sgx(report) => Genuine {
                tee: SGX,
                claims: Value::Object(claims),
                logs: Value::Null,
                report_data: at::<64>(report, 320).to_vec(),
                init_data: InitField::Field(at::<64>(report, 192).to_vec()),
                measurement: hex(&at::<32>(report, 64)),
            },
        };
        match (quote.body, log) {
            (Body::Td(td, _), Some(log)) => {
                let measured = (1..=4).zip(td.get(328..520).unwrap_or_default().chunks(48));
                let measured = measured.map(|(register, value)| (register, value.to_vec())).collect();
                logs::add(&mut genuine, log, logs::tee(measured))
                    .map_err(|source| EvidenceError::EventLog { tee: TDX, source })?;
            }
            (Body::Sgx(_), Some(_)) => return Err(self.malformed("an event log, which SGX does not measure")),
            (_, None) => {}
        }
        Ok(genuine)
    }

    /// The certificate of the platform's key, vouched for now, and when its revocation list ends.
    fn platform_certificate(
        &self,
        context: &Context<'_>,
        quote: &Quote<'_>,
        root_crl: &crate::x509::VerifiedCrl,
    ) -> Result<(Cert, i64), EvidenceError> {
        let chain = Cert::chain(quote.certs).map_err(|error| context.certificate(error))?;
        let mut chain = chain.into_iter();
        let (Some(pck), Some(authority)) = (chain.next(), chain.next()) else {
            return Err(self.malformed("the quote has no chain of certificates"));
        };
        let list = match authority.name().as_str() {
            "Intel SGX PCK Platform CA" => "platform",
            "Intel SGX PCK Processor CA" => "processor",
            other => {
                return Err(EvidenceError::UnknownPlatform { tee: self.tee, platform: format!("issued by '{other}'") });
            }
        };
        let fail = |error| context.certificate(error);
        authority.issued_by(context.root, context.now, Some(root_crl)).map_err(fail)?;
        let (crl, until) = context.crl(list, &authority)?;
        pck.issued_by(&authority, context.now, Some(&crl)).map_err(fail)?;
        Ok((pck, until))
    }

    /// From the platform's key to the quote.
    fn signatures(&self, quote: &Quote<'_>, pck: &Cert) -> Result<(), EvidenceError> {
        let Key::P256(_) = pck.key() else { return Err(self.wrong(pck.name(), "its key is not P-256")) };
        if !pck.key().verifies(&ECDSA_P256_SHA256_FIXED, quote.qe_report, quote.qe_signature) {
            return Err(self.wrong("the QE report's signature", "it is not that of the platform's key"));
        }
        let bound = Digest::sha256(&[&quote.key[..], quote.qe_data].concat());
        let found: [u8; 64] = at(quote.qe_report, 320);
        if found.strip_prefix(bound.as_bytes()) != Some(&[0; 32][..]) {
            return Err(self.wrong("the attestation key", "the QE report is not about it"));
        }
        let key = Key::P256([&[4], &quote.key[..]].concat());
        match key.verifies(&ECDSA_P256_SHA256_FIXED, quote.signed, quote.signature) {
            true => Ok(()),
            false => Err(self.wrong("the quote's signature", "it is not that of the attestation key")),
        }
    }

    /// What Intel says of the platform, the quoting enclave and the TDX module together.
    fn verdict(
        &self,
        quote: &Quote<'_>,
        platform: &pck::Platform,
        collateral: &collateral::Collateral,
    ) -> Result<Verdict, EvidenceError> {
        let refused = |why: String| self.refused(why);
        let tdx = matches!(quote.body, Body::Td(..));
        collateral.tcb.is_for(platform, tdx).map_err(|why| EvidenceError::Collateral { tee: self.tee, why })?;
        let enclave = collateral.identity.verdict(quote.qe_report, tdx).map_err(refused)?;
        let Body::Td(td, more) = quote.body else {
            return Ok(collateral.tcb.verdict(platform, None).map_err(refused)?.with_part(enclave));
        };
        collateral.tcb.check_module(td).map_err(refused)?;
        let launch = collateral.tcb.verdict(platform, Some(&at(td, 0))).map_err(refused)?;
        let launch = launch.with_part(enclave.clone());
        match more {
            None => Ok(launch),
            Some(more) => {
                let current = collateral.tcb.verdict(platform, Some(&at(more, 0))).map_err(refused)?;
                Ok(launch.with_current(current.with_part(enclave)))
            }
        }
    }

    /// What the quote says of its guest, by the rules: whoever is refused here need not be genuine to be refused.
    fn judge(&self, quote: &Quote<'_>) -> Result<(), EvidenceError> {
        let report = match quote.body {
            Body::Td(td, more) => return self.judge_guest(u64::from_le_bytes(at(td, 120)), more),
            Body::Sgx(report) => report,
        };
        let [flags] = at::<1>(report, 48);
        if flags & SGX_INIT == 0 {
            return Err(self.refused("the enclave was not initialised"));
        }
        match flags & SGX_DEBUG != 0 && !self.rules.debug {
            true => Err(self.refused("it is a debug enclave: the host can look into it")),
            false => Ok(()),
        }
    }

    fn judge_platform(&self, verdict: &Verdict, evaluation: u32) -> Result<(), EvidenceError> {
        let rules = &self.rules;
        let status = verdict.status.name();
        // The platform's keys are known to others: no rule makes that good.
        if verdict.status == Status::Revoked || !rules.statuses.iter().any(|admitted| admitted == status) {
            let advisories = match verdict.advisories.join(", ") {
                none if none.is_empty() => String::new(),
                some => format!("; see {some}"),
            };
            let admitted = rules.statuses.join(", ");
            return Err(self.refused(format!("its TCB status is {status}, and {admitted} is admitted{advisories}")));
        }
        if let Some(open) = rules.refused_advisories.iter().find(|id| verdict.advisories.contains(id)) {
            return Err(self.refused(format!("its platform is affected by {open}")));
        }
        if evaluation < rules.least_evaluation {
            let why = format!("collateral of evaluation {evaluation}, and {} is the least", rules.least_evaluation);
            return Err(EvidenceError::Collateral { tee: self.tee, why });
        }
        Ok(())
    }

    fn judge_guest(&self, attributes: u64, more: Option<&[u8; 64]>) -> Result<(), EvidenceError> {
        let rules = &self.rules;
        if attributes & TD_UNDER_DEBUG != 0 && !rules.debug {
            return Err(self.refused("it is a debug guest: the host can look into it"));
        }
        if attributes & TD_RESERVED != 0 {
            return Err(self.refused(format!("its attributes {attributes:#018x} have bits that are not known")));
        }
        if attributes & TD_SEPT_VE_DISABLE == 0 {
            return Err(self.refused("the host may inject exceptions for its pages (SEPT_VE_DISABLE is off)"));
        }
        if attributes & TD_MIGRATABLE != 0 && !rules.migratable {
            return Err(self.refused("a migration TD may move it"));
        }
        let serviced = attributes & TD_SERVICE != 0 || more.is_some_and(|more| at::<48>(more, 16) != [0; 48]);
        match serviced && !rules.service_td {
            true => Err(self.refused("it has a service TD")),
            false => Ok(()),
        }
    }

    fn malformed(&self, why: impl Into<String>) -> EvidenceError {
        EvidenceError::Malformed { tee: self.tee, why: why.into() }
    }

    fn wrong(&self, what: impl Into<String>, why: impl Into<String>) -> EvidenceError {
        EvidenceError::Certificate { tee: self.tee, what: what.into(), why: why.into() }
    }

    fn refused(&self, why: impl Into<String>) -> EvidenceError {
        EvidenceError::Refused { tee: self.tee, why: why.into() }
    }
}

impl Verifier for DcapVerifier {
    fn tee(&self) -> &'static str {
        self.tee
    }

    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        self.genuine(evidence, expected.now)?.bound(expected)
    }
}
