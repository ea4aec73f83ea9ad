//! SEV-SNP: reports by `configfs-tsm`, with the certificates that the host has put beside them.
//!
//! ```text
//! certificates (GHCB specification 2.03, §4.1.8.1): n × (GUID [16] ‖ offset u32 ‖ bytes u32), 24 zeros, then what the entries point to
//! ```

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{check_init_data, tsm};
use crate::{
    evidence::{Attester, AttesterError},
    initdata::InitData,
    snp_report::SnpReport,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "snp";
const PROVIDER: &str = "sev_guest";
/// 63da758d-e664-4564-adc5-f4b93be8accd, with the first three parts little-endian, as UEFI writes GUIDs. Hosts write them as text does, too.
const VCEK: [u8; 16] = [0x8d, 0x75, 0xda, 0x63, 0x64, 0xe6, 0x64, 0x45, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd];
/// a8074bc2-a25a-483e-aae6-39c045a0b8a1.
const VLEK: [u8; 16] = [0xc2, 0x4b, 0x07, 0xa8, 0x5a, 0xa2, 0x3e, 0x48, 0xaa, 0xe6, 0x39, 0xc0, 0x45, 0xa0, 0xb8, 0xa1];
/// Entries of the table at most.
const MOST: usize = 64;

/// Makes evidence of this SNP guest.
#[derive(Debug)]
pub struct SnpAttester {
    tsm: PathBuf,
    init_data: Option<InitData>,
}

impl SnpAttester {
    /// Takes a report, to see that there are any and that the guest was started with these init data.
    ///
    /// # Errors
    /// [`AttesterError`].
    pub fn new(tsm: PathBuf, init_data: Option<InitData>) -> Result<Self, AttesterError> {
        let attester = Self { tsm, init_data };
        let (report, _) = attester.report(&[0; 64])?;
        check_init_data(TEE, attester.init_data.as_ref(), report.host_data())?;
        Ok(attester)
    }

    fn report(&self, report_data: &[u8; 64]) -> Result<(SnpReport, Vec<u8>), AttesterError> {
        let tsm::Report { report, beside } = tsm::report(TEE, &self.tsm, PROVIDER, report_data)?;
        let report = SnpReport::from_bytes(&report);
        let report = report.map_err(|error| AttesterError::Refused { tee: TEE, why: error.to_string() })?;
        Ok((report, beside))
    }
}

impl Attester for SnpAttester {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError> {
        let (report, beside) = self.report(report_data)?;
        let chain = match certificates(&beside) {
            certs if certs.is_empty() => Value::Null,
            certs => certs.iter().map(|(kind, data)| json!({"cert_type": kind, "data": data})).collect(),
        };
        Ok(json!({"attestation_report": report.to_json(), "cert_chain": chain}))
    }

    fn init_data(&self) -> Option<&InitData> {
        self.init_data.as_ref()
    }
}

/// The VCEK and VLEK of a host's table. The host may put anything there, and a verifier believes none of it: what is no table is none.
fn certificates(table: &[u8]) -> Vec<(&'static str, &[u8])> {
    let mut certs = Vec::new();
    for entry in table.as_chunks::<24>().0.iter().take(MOST) {
        let [guid @ .., _, _, _, _, _, _, _, _] = entry;
        let [.., o0, o1, o2, o3, l0, l1, l2, l3] = *entry;
        let (offset, length) = (u32::from_le_bytes([o0, o1, o2, o3]), u32::from_le_bytes([l0, l1, l2, l3]));
        let kind = match *guid {
            guid if guid == VCEK || guid == as_text(VCEK) => "VCEK",
            guid if guid == VLEK || guid == as_text(VLEK) => "VLEK",
            guid if guid == [0; 16] => break,
            _ => continue,
        };
        let bounds = usize::try_from(offset).ok().zip(usize::try_from(length).ok());
        let cert = bounds.and_then(|(offset, length)| table.get(offset..)?.get(..length));
        certs.extend(cert.map(|cert| (kind, cert)));
    }
    certs
}

/// A GUID in the order of its text.
const fn as_text(guid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = guid;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_found_in_whatever_a_host_gives() {
        let entry = |guid: [u8; 16], offset: u32, length: u32| {
            [&guid[..], &offset.to_le_bytes(), &length.to_le_bytes()].concat()
        };
        let table =
            [entry([1; 16], 0, 9), entry(VCEK, 96, 3), entry(VLEK, 99, 2), vec![0; 24], b"abcde".to_vec()].concat();
        assert_eq!(certificates(&table), [("VCEK", &b"abc"[..]), ("VLEK", &b"de"[..])]);
        let mut text = table.clone();
        text[24..28].reverse();
        text[28..30].reverse();
        text[30..32].reverse();
        assert_eq!(certificates(&text), certificates(&table));
        assert_eq!(certificates(&[]), []);
        assert_eq!(certificates(&entry(VCEK, u32::MAX, u32::MAX)), []);
        assert_eq!(certificates(&table[..30]), []);
    }
}
