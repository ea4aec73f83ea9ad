//! Intel's: root, PCK CA, PCK, TCB signing, TCB info and QE identity, and quotes that they vouch for.

use nacre_core::Digest;
use nacre_verify::{Cache, dcap::IntelRoot, import};
use rcgen::PKCS_ECDSA_P256_SHA256 as P256;
use ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
use serde_json::{Value, json};

use super::{END, Node, START, Wish, rfc3339, tlv};

pub(crate) const FMSPC: [u8; 6] = [0, 1, 2, 3, 4, 5];
pub(crate) const PCK_CA: u64 = 2;
pub(crate) const PCK: u64 = 3;
pub(crate) const SIGNER: u64 = 4;
const QE_SIGNER: [u8; 32] = [0xd1; 32];
const INTEL: [u8; 16] =
    [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];

pub(crate) struct Intel {
    pub(crate) root: Node,
    pub(crate) ca: Node,
    pub(crate) pck: Node,
    pub(crate) signer: Node,
    /// The attestation key of a quoting enclave.
    pub(crate) attestation: Node,
}

/// An object identifier below Intel's extension, DER.
fn oid(below: &[u8]) -> Vec<u8> {
    tlv(6, &[&[0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 1, 13, 1], below].concat())
}

fn entry(below: &[u8], value: &[u8]) -> Vec<u8> {
    tlv(0x30, &[&oid(below), value].concat())
}

/// What a platform's certificate says: CPU SVNs 5 each, PCE SVN 10.
fn platform() -> Vec<u8> {
    let tcb = [entry(&[2, 17], &[2, 1, 10]), entry(&[2, 18], &tlv(4, &[5; 16]))].concat();
    let configuration = [entry(&[7, 1], &[1, 1, 0xff]), entry(&[7, 3], &[1, 1, 0])].concat();
    tlv(
        0x30,
        &[
            entry(&[1], &tlv(4, &[1; 16])),
            entry(&[2], &tlv(0x30, &tcb)),
            entry(&[3], &tlv(4, &[0, 0])),
            entry(&[4], &tlv(4, &FMSPC)),
            entry(&[5], &[10, 1, 1]),
            entry(&[6], &tlv(4, &[6; 16])),
            entry(&[7], &tlv(0x30, &configuration)),
        ]
        .concat(),
    )
}

impl Intel {
    pub(crate) fn new() -> Self {
        let root = Wish::new("Intel SGX Root CA", 1, true).root(&P256);
        let ca = Wish::new("Intel SGX PCK Platform CA", PCK_CA, true).below(&root, &P256);
        let mut wish = Wish::new("Intel SGX PCK Certificate", PCK, false);
        wish.extensions.push((vec![1, 2, 840, 113_741, 1, 13, 1], platform()));
        let pck = wish.below(&ca, &P256);
        let signer = Wish::new("Intel SGX TCB Signing", SIGNER, false).below(&root, &P256);
        let attestation = Wish::new("attestation key", 9, false).root(&P256);
        Self { root, ca, pck, signer, attestation }
    }

    pub(crate) fn trusted(&self) -> IntelRoot {
        IntelRoot::trust(&self.root.der).unwrap()
    }

    /// TCB info in which the platform is up to date, with a level below it that is out of date.
    pub(crate) fn tcb_info(&self, tdx: bool) -> Value {
        let level = |svn: u8, status: &str| {
            let components = vec![json!({"svn": svn}); 16];
            let mut tcb = json!({"sgxtcbcomponents": components, "pcesvn": 10});
            if tdx {
                tcb["tdxtcbcomponents"] = components.into();
            }
            json!({"tcb": tcb, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": status, "advisoryIDs": []})
        };
        let mut info = json!({
            "id": if tdx { "TDX" } else { "SGX" }, "version": 3, "issueDate": rfc3339(START), "nextUpdate": rfc3339(END),
            "fmspc": "000102030405", "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 20,
            // Out of order, as nobody promises one.
            "tcbLevels": [level(1, "OutOfDate"), level(5, "UpToDate"), level(6, "UpToDate")],
        });
        if tdx {
            let module =
                json!({"mrsigner": "00".repeat(48), "attributes": "00".repeat(8), "attributesMask": "ff".repeat(8)});
            info["tdxModule"] = module.clone();
            let mut identity = module;
            identity["id"] = "TDX_03".into();
            identity["tcbLevels"] = json!([
                {"tcb": {"isvsvn": 7}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"},
                {"tcb": {"isvsvn": 2}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "OutOfDate"},
            ]);
            info["tdxModuleIdentities"] = json!([identity]);
        }
        info
    }

    pub(crate) fn identity(&self, tdx: bool) -> Value {
        json!({
            "id": if tdx { "TD_QE" } else { "QE" }, "version": 2, "issueDate": rfc3339(START), "nextUpdate": rfc3339(END),
            "tcbEvaluationDataNumber": 20, "miscselect": "00000000", "miscselectMask": "ffffffff",
            "attributes": "11000000000000000000000000000000", "attributesMask": "fbffffffffffffff0000000000000000",
            "mrsigner": "d1".repeat(32), "isvprodid": 2,
            "tcbLevels": [
                {"tcb": {"isvsvn": 4}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"},
                {"tcb": {"isvsvn": 1}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "OutOfDate"},
            ],
        })
    }

    /// All collateral, as tools hand it over.
    pub(crate) fn collateral(&self, tcb_info: &Value, identity: &Value) -> Value {
        let chain = [&*self.signer.pem, &self.root.pem].concat();
        let (tcb_info, identity) = (tcb_info.to_string(), identity.to_string());
        let sign = |text: &str| hex(&self.signer.sign(&ECDSA_P256_SHA256_FIXED_SIGNING, text.as_bytes()));
        json!({
            "tcb_info_issuer_chain": chain, "tcb_info_signature": sign(&tcb_info), "tcb_info": tcb_info,
            "qe_identity_issuer_chain": chain, "qe_identity_signature": sign(&identity), "qe_identity": identity,
            "root_ca_crl": hex(&self.root.crl(&[], START, END)), "pck_crl": hex(&self.ca.crl(&[], START, END)),
            "pck_crl_issuer_chain": "",
        })
    }

    /// A cache with collateral in which everything is fine.
    pub(crate) fn cache(&self, tdx: bool) -> Cache {
        let cache = Cache::memory();
        import(&cache, self.collateral(&self.tcb_info(tdx), &self.identity(tdx)).to_string().as_bytes()).unwrap();
        cache
    }

    /// A quote of a body.
    pub(crate) fn quote(&self, version: u16, body: &[u8]) -> Vec<u8> {
        self.quote_with(version, body, &qe_report())
    }

    /// A quote of a body, by a quoting enclave with that report; the attestation key is put into it.
    pub(crate) fn quote_with(&self, version: u16, body: &[u8], qe_report: &[u8; 384]) -> Vec<u8> {
        let tee: u32 = if version == 3 { 0 } else { 0x81 };
        let header =
            [&version.to_le_bytes()[..], &2_u16.to_le_bytes(), &tee.to_le_bytes(), &[0; 4], &INTEL, &[0; 20]].concat();
        let signed = match version {
            5 => {
                let kind: u16 = if body.len() == 584 { 2 } else { 3 };
                let size = u32::try_from(body.len()).unwrap();
                [&header[..], &kind.to_le_bytes(), &size.to_le_bytes(), body].concat()
            }
            _ => [&header[..], body].concat(),
        };
        let fixed = &ECDSA_P256_SHA256_FIXED_SIGNING;
        // The uncompressed point, without the byte that says so.
        let key = &self.attestation.key.public_key_raw()[1..];
        let qe_data = [0x55; 32];
        let mut qe_report = *qe_report;
        qe_report[320..352].copy_from_slice(Digest::sha256(&[key, &qe_data].concat()).as_bytes());
        let certs = [&*self.pck.pem, &self.ca.pem, &self.root.pem, "\0"].concat();
        let sized = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_le_bytes()[..], bytes].concat();
        let certified = [
            &qe_report[..],
            &self.pck.sign(fixed, &qe_report),
            &32_u16.to_le_bytes(),
            &qe_data,
            &5_u16.to_le_bytes(),
            &sized(certs.as_bytes()),
        ]
        .concat();
        let mut data = [&self.attestation.sign(fixed, &signed)[..], key].concat();
        match version {
            3 => data.extend(certified),
            _ => data.extend([&6_u16.to_le_bytes()[..], &sized(&certified)].concat()),
        }
        [signed, sized(&data)].concat()
    }
}

/// The report of a quoting enclave that the identity is of.
pub(crate) fn qe_report() -> [u8; 384] {
    let mut report = [0; 384];
    report[48] = 0x15;
    report[128..160].copy_from_slice(&QE_SIGNER);
    report[256..258].copy_from_slice(&2_u16.to_le_bytes());
    report[258..260].copy_from_slice(&4_u16.to_le_bytes());
    report
}

/// A guest without faults: module version 3, all of its versions those of the level that is up to date.
pub(crate) fn guest() -> Vec<u8> {
    let mut body = vec![0; 584];
    body[..16].copy_from_slice(&[7, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]);
    body[120..128].copy_from_slice(&(1_u64 << 28).to_le_bytes());
    body[136..184].copy_from_slice(&[9; 48]);
    body[520..584].copy_from_slice(&[5; 64]);
    body
}

/// An enclave without faults.
pub(crate) fn enclave() -> Vec<u8> {
    let mut body = vec![0; 384];
    body[48] = 5;
    body[64..96].copy_from_slice(&[9; 32]);
    body[320..384].copy_from_slice(&[5; 64]);
    body
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    nacre_attest::evidence::hex(bytes)
}
