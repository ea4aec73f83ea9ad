//! `sample`: what Trustee's programs say where there is no TEE, so that each side can be tried against the other's programs.
//!
//! Nothing is measured and nothing is signed: anybody can write such evidence. It protects even less than [`sim`](crate::sim), whose reports are at
//! least signed by a platform that somebody named. So it passes the same gate and wears the same mark, and it is recognised by nothing but a
//! reference value.
//!
//! ```text
//! {"svn": text, "report_data": base64 of the SHA-384 that the session demands, 48 bytes}
//! ```
//!
//! There is no place for the digest of init data. What cannot be bound must not be used: init data beside it are an error on both sides.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_core::{Untrusted, Verified};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    evidence::{Attester, AttesterError, Claims, EvidenceError, Expected, Verifier, hex},
    initdata::InitData,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "sample";
/// What our attester says of itself, as Trustee's does.
const SVN: &str = "1";
/// Bytes of report data: a SHA-384, without the zeros after it.
const BOUND: usize = 48;
/// Bytes of the security version's text at most.
const LONGEST_SVN: usize = 64;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Evidence {
    svn: String,
    report_data: String,
}

/// Makes evidence of nothing.
#[derive(Debug)]
pub struct SampleAttester(());

impl SampleAttester {
    /// An attester of a guest without init data.
    ///
    /// # Errors
    /// [`AttesterError::Refused`] where there are init data, which nothing here could be bound to.
    pub fn new(init_data: Option<&InitData>) -> Result<Self, AttesterError> {
        match init_data {
            None => Ok(Self(())),
            Some(_) => Err(AttesterError::Refused {
                tee: TEE,
                why: "its evidence is bound to no init data: start this guest without them, or with another TEE".into(),
            }),
        }
    }
}

impl Attester for SampleAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        match report_data.split_at_checked(BOUND) {
            Some((bound, rest)) if rest.iter().all(|byte| *byte == 0) => {
                Ok(json!({"svn": SVN, "report_data": BASE64_STANDARD.encode(bound)}))
            }
            _ => Err(AttesterError::Refused {
                tee: TEE,
                why: format!("its evidence has room for {BOUND} bytes of report data; bind no more"),
            }),
        }
    }

    fn init_data(&self) -> Option<&InitData> {
        None
    }

    fn simulated(&self) -> bool {
        true
    }
}

/// Checks that such evidence is of this session. There is nothing else in it to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct SampleVerifier;

fn malformed(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Malformed { tee: TEE, why: why.into() }
}

impl Verifier for SampleVerifier {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        Untrusted::new(evidence).verify_into(|evidence| {
            let evidence = Evidence::deserialize(evidence).map_err(|e| malformed(e.to_string()))?;
            if !(1..=LONGEST_SVN).contains(&evidence.svn.len()) || !evidence.svn.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(malformed(format!("svn is a text of 1 to {LONGEST_SVN} visible ASCII characters")));
            }
            if evidence.report_data.len() > 2 * BOUND {
                return Err(malformed(format!("report_data is base64 of {BOUND} bytes")));
            }
            let found = BASE64_STANDARD
                .decode(&evidence.report_data)
                .map_err(|error| malformed(format!("report_data: {error}")))?;
            let mut report_data = [0; 64];
            let fits = report_data.split_at_mut_checked(BOUND).filter(|(bound, _)| bound.len() == found.len());
            let (bound, _) = fits.ok_or_else(|| malformed(format!("report_data is base64 of {BOUND} bytes")))?;
            bound.copy_from_slice(&found);
            if report_data != *expected.report_data {
                let (found, expected) = (hex(&report_data), hex(expected.report_data));
                return Err(EvidenceError::ReportData { tee: TEE, found, expected });
            }
            if let Some(init_data) = expected.init_data {
                let sent = hex(&init_data.fit::<48>());
                return Err(EvidenceError::InitData {
                    tee: TEE,
                    sent,
                    measured: "none: it has no place for any".into(),
                });
            }
            let report_data = hex(&report_data);
            Ok(Claims {
                tee: TEE,
                claims: json!({"simulated": true, "svn": evidence.svn, "report_data": report_data}),
                logs: Value::Null,
                report_data,
                init_data: String::new(),
                measurement: String::new(),
                simulated: true,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::Algorithm;

    use super::*;

    fn bound() -> [u8; 64] {
        let mut bound = [7; 64];
        bound[BOUND..].fill(0);
        bound
    }

    fn verify(evidence: &Value, report_data: &[u8; 64]) -> Result<Claims, EvidenceError> {
        let expected = Expected { report_data, init_data: None, now: 0 };
        SampleVerifier.verify(evidence, &expected).map(Verified::into_inner)
    }

    #[test]
    fn sample_evidence_is_of_its_session_only_and_marked() {
        let attester = SampleAttester::new(None).unwrap();
        let evidence = attester.evidence(&bound()).unwrap();
        let claims = verify(&evidence, &bound()).unwrap();
        assert!(claims.simulated && attester.simulated());
        assert_eq!(claims.claims["simulated"], true);
        assert_eq!((claims.claims["svn"].as_str(), claims.report_data), (Some("1"), hex(&bound())));
        assert!(matches!(verify(&evidence, &[7; 64]), Err(EvidenceError::ReportData { .. })));
        assert!(matches!(verify(&evidence, &[0; 64]), Err(EvidenceError::ReportData { .. })));
        // More than it has room for.
        assert!(matches!(attester.evidence(&[7; 64]), Err(AttesterError::Refused { .. })));
    }

    #[test]
    fn what_is_no_sample_evidence_is_refused() {
        let right = BASE64_STANDARD.encode([7; BOUND]);
        assert!(verify(&json!({"svn": "1", "report_data": right}), &bound()).is_ok());
        for bad in [
            json!(null),
            json!([]),
            json!({"svn": "1"}),
            json!({"report_data": right}),
            json!({"svn": 1, "report_data": right}),
            json!({"svn": "", "report_data": right}),
            json!({"svn": "1\n", "report_data": right}),
            json!({"svn": "1".repeat(LONGEST_SVN + 1), "report_data": right}),
            json!({"svn": "1", "report_data": ""}),
            json!({"svn": "1", "report_data": "*"}),
            json!({"svn": "1", "report_data": right.trim_end_matches('=').to_owned() + "AAAA"}),
            json!({"svn": "1", "report_data": BASE64_STANDARD.encode([7; 47])}),
            // Longer than it is, with the zeros that other TEEs have.
            json!({"svn": "1", "report_data": BASE64_STANDARD.encode(bound())}),
            json!({"svn": "1", "report_data": "A".repeat(1 << 16)}),
            json!({"svn": "1", "report_data": right, "launch_digest": "abcde"}),
        ] {
            assert!(matches!(verify(&bad, &bound()), Err(EvidenceError::Malformed { .. })), "{bad}");
        }
    }

    #[test]
    fn sample_evidence_takes_no_init_data() {
        let init = InitData::new(Algorithm::Sha384, [("a".into(), "b".into())].into()).unwrap();
        assert!(SampleAttester::new(Some(&init)).unwrap_err().to_string().contains("init data"));
        let evidence = SampleAttester::new(None).unwrap().evidence(&bound()).unwrap();
        let expected = Expected { report_data: &bound(), init_data: Some(&init), now: 0 };
        assert!(matches!(SampleVerifier.verify(&evidence, &expected), Err(EvidenceError::InitData { .. })));
    }
}
