//! AMD SEV-SNP: an attestation report, signed by a chip's key (VCEK) or a provider's (VLEK), whose certificate AMD signs.
//!
//! ```text
//! ARK ─▶ ASK ─▶ VCEK (chip, TCB) ─▶ report        ARK ─▶ ASVK ─▶ VLEK (provider, TCB) ─▶ report
//! ```
//!
//! Checked, in this order: the report's form; the certificate (from the evidence, or from the cache), its issuer by the product, both
//! certificates' time, AMD's revocation list; that the certificate is for the TCB that the report names and, of a VCEK, for its chip; the
//! report's signature; the rules. The ARK, ASK and ASVK of evidence are ignored: ours count.

mod roots;

use std::sync::Arc;

use aws_lc_rs::signature::ECDSA_P384_SHA384_FIXED;
use der::{Decode as _, asn1::ObjectIdentifier};
use nacre_attest::{
    evidence::{Claims, EvidenceError, Expected, Verifier, hex},
    snp_report::{Product, SnpReport, Tcb},
};
use nacre_core::Verified;
use serde_json::{Value, json};

pub use roots::{AmdRoots, RootsError};

use crate::{
    cache::Cache,
    checked::{Genuine, InitField},
    rules::SnpRules,
    x509::{Cert, CertError, Crl, Key},
};

/// The TEE's name in the protocol.
pub const TEE: &str = "snp";

const SPL_BOOTLOADER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.1");
const SPL_TEE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.2");
const SPL_SNP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.3");
const SPL_MICROCODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.8");
const SPL_FMC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.9");
const CHIP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.4");
/// ECDSA with P-384 and SHA-384.
const ALGORITHM: u32 = 1;

const POLICY_SMT: u64 = 1 << 16;
const POLICY_MIGRATE: u64 = 1 << 18;
const POLICY_DEBUG: u64 = 1 << 19;
const POLICY_SINGLE_SOCKET: u64 = 1 << 20;
const PLATFORM_SMT: u64 = 1;
const PLATFORM_TSME: u64 = 1 << 1;

/// Which kind of key signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vcek,
    Vlek,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Vcek => "VCEK",
            Self::Vlek => "VLEK",
        }
    }
}

fn malformed(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Malformed { tee: TEE, why: why.into() }
}

fn refused(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Refused { tee: TEE, why: why.into() }
}

fn certificate(error: CertError) -> EvidenceError {
    EvidenceError::Certificate { tee: TEE, what: error.what, why: error.why }
}

fn collateral(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Collateral { tee: TEE, why: why.into() }
}

/// Checks SNP evidence.
#[derive(Clone, Debug)]
pub struct SnpVerifier {
    roots: Arc<AmdRoots>,
    cache: Arc<Cache>,
    rules: SnpRules,
}

impl SnpVerifier {
    /// A verifier that trusts these roots.
    pub fn new(roots: Arc<AmdRoots>, cache: Arc<Cache>, rules: SnpRules) -> Self {
        Self { roots, cache, rules }
    }

    /// Checks evidence of the protocol: `{"attestation_report": object or base64, "cert_chain": [{"cert_type", "data"}] or null}`.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    pub fn genuine(&self, evidence: &Value, now: i64) -> Result<Genuine, EvidenceError> {
        let report = evidence.get("attestation_report").ok_or_else(|| malformed("there is no 'attestation_report'"))?;
        let report = match report {
            Value::String(text) => {
                let bytes = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, text);
                SnpReport::from_bytes(&bytes.map_err(|error| malformed(format!("attestation_report: {error}")))?)
            }
            object => SnpReport::from_json(object),
        };
        let report = report.map_err(|error| malformed(error.to_string()))?;
        let certs = certs_of(evidence.get("cert_chain"))?;
        self.report(&report, &certs, now)
    }

    /// Checks a report with certificates that came with it: DER or PEM; those that are no VCEK or VLEK are ignored.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    pub fn report(&self, report: &SnpReport, certs: &[Vec<u8>], now: i64) -> Result<Genuine, EvidenceError> {
        if report.signature_algorithm() != ALGORITHM {
            return Err(malformed(format!("signature algorithm {} is not ECDSA P-384", report.signature_algorithm())));
        }
        let kind = match (report.keys() >> 2) & 7 {
            0 => Kind::Vcek,
            1 => Kind::Vlek,
            _ => return Err(refused("the report is not signed: its signing key is 'none'")),
        };
        let cert = self.key_certificate(report, kind, certs)?;
        let product = self.vouched(&cert, kind, report, now)?;
        let tcb = Tcb::from_bytes(*report.reported_tcb(), product);
        is_for(&cert, kind, report, tcb, product)?;
        signature(report, &cert)?;
        self.judge(report, tcb, product)?;
        Ok(Genuine {
            tee: TEE,
            claims: claims(report, product, kind, &cert),
            logs: Value::Null,
            report_data: report.report_data().to_vec(),
            init_data: InitField::Field(report.host_data().to_vec()),
            measurement: hex(report.measurement()),
        })
    }

    /// The certificate of the key that signed: one that came with the report, or one of the cache.
    fn key_certificate(&self, report: &SnpReport, kind: Kind, certs: &[Vec<u8>]) -> Result<Cert, EvidenceError> {
        for bytes in certs {
            let cert = Cert::from_any(bytes).map_err(certificate)?;
            if cert.name() == format!("SEV-{}", kind.name()) {
                return Ok(cert);
            }
        }
        let products = match report.cpuid() {
            Some((family, model, _)) => Product::of_cpuid(family, model).into_iter().collect(),
            None => Product::ALL.to_vec(),
        };
        for product in products {
            let tcb = Tcb::from_bytes(*report.reported_tcb(), product);
            let name = cache_name(product, kind, report.chip_id(), tcb);
            if let Some(bytes) = self.cache.get(&name).map_err(|error| collateral(error.to_string()))? {
                return Cert::from_any(&bytes).map_err(certificate);
            }
        }
        Err(collateral(format!(
            "the evidence has no {}, and there is none in the cache for chip {} and its reported TCB",
            kind.name(),
            hex(report.chip_id())
        )))
    }

    /// Which product's authority vouches for a certificate now.
    fn vouched(&self, cert: &Cert, kind: Kind, report: &SnpReport, now: i64) -> Result<Product, EvidenceError> {
        let issuer = cert.issuer();
        let prefix = match kind {
            Kind::Vcek => "SEV-",
            Kind::Vlek => "SEV-VLEK-",
        };
        let roots = issuer.strip_prefix(prefix).and_then(Product::from_name).and_then(|product| self.roots.of(product));
        let roots = roots.ok_or_else(|| EvidenceError::UnknownPlatform {
            tee: TEE,
            platform: format!("{} issued by '{issuer}'", kind.name()),
        })?;
        if let Some((family, model, _)) = report.cpuid()
            && Product::of_cpuid(family, model) != Some(roots.product)
        {
            return Err(refused(format!(
                "the report is of a processor of family {family:#x}, model {model:#x}, and its certificate is for {}",
                roots.product.name()
            )));
        }
        let authority = match kind {
            Kind::Vcek => &roots.ask,
            Kind::Vlek => &roots.asvk,
        };
        let crl = self.cache.get(&format!("snp/{}/crl", roots.product.name()));
        let crl = crl.map_err(|error| collateral(error.to_string()))?;
        let crl =
            crl.map(|bytes| Crl::from_any(&bytes)?.verify(&roots.ark, now, 0)).transpose().map_err(certificate)?;
        if crl.is_none() && self.rules.require_crl {
            return Err(collateral(format!("there is no revocation list of {}", roots.ark.name())));
        }
        roots.ark.usable(now).map_err(certificate)?;
        // That the ARK signed it was checked when it was trusted.
        authority.usable(now).map_err(certificate)?;
        authority.not_revoked(&roots.ark, crl.as_ref()).map_err(certificate)?;
        cert.issued_by(authority, now, None).map_err(certificate)?;
        Ok(roots.product)
    }

    fn judge(&self, report: &SnpReport, tcb: Tcb, product: Product) -> Result<(), EvidenceError> {
        let rules = &self.rules;
        let policy = report.policy();
        if policy & POLICY_DEBUG != 0 && !rules.debug {
            return Err(refused("its policy lets the host debug the guest"));
        }
        if report.vmpl() > rules.most_vmpl {
            return Err(refused(format!(
                "it was asked for at VMPL {}, and {} is the most",
                report.vmpl(),
                rules.most_vmpl
            )));
        }
        if policy & POLICY_MIGRATE != 0 && !rules.migration_agent {
            return Err(refused("its policy lets a migration agent move the guest"));
        }
        if policy & POLICY_SINGLE_SOCKET == 0 && rules.single_socket {
            return Err(refused("its policy does not demand a single socket"));
        }
        if report.platform() & PLATFORM_SMT != 0 && !rules.smt {
            return Err(refused("hyperthreads are on at its platform"));
        }
        if let Some(least) = rules.least.get(product.name()) {
            let least = Tcb {
                fmc: tcb.fmc.map(|_| least.fmc),
                bootloader: least.bootloader,
                tee: least.tee,
                snp: least.snp,
                microcode: least.microcode,
            };
            if !tcb.at_least(&least) {
                let (found, least) = (tcb.to_json(), least.to_json());
                return Err(refused(format!("its TCB is {found}, and {least} is the least for {}", product.name())));
            }
        }
        Ok(())
    }
}

/// The VCEKs and VLEKs that came with a report.
fn certs_of(chain: Option<&Value>) -> Result<Vec<Vec<u8>>, EvidenceError> {
    let chain = match chain {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(chain) => chain.as_array().ok_or_else(|| malformed("'cert_chain' is no list"))?,
    };
    if chain.len() > 16 {
        return Err(malformed("'cert_chain' has more than 16 certificates"));
    }
    let mut certs = Vec::new();
    for entry in chain {
        // ARK, ASK, CRL and what else a host's table has are of no interest: ours count.
        if !matches!(entry.get("cert_type").and_then(Value::as_str), Some("VCEK" | "VLEK")) {
            continue;
        }
        let data = entry.get("data").and_then(Value::as_array).filter(|data| data.len() <= crate::x509::LONGEST_CERT);
        let bytes = data.and_then(|data| data.iter().map(|byte| u8::try_from(byte.as_u64()?).ok()).collect());
        certs.push(bytes.ok_or_else(|| malformed("a certificate in 'cert_chain' is no list of bytes"))?);
    }
    Ok(certs)
}

/// An extension with a number: the security version of a part.
fn spl(cert: &Cert, oid: ObjectIdentifier) -> Option<u8> {
    u8::from_der(cert.extension(oid)?).ok()
}

fn tcb_of(cert: &Cert, product: Product) -> Option<Tcb> {
    Some(Tcb {
        fmc: match product {
            Product::Turin => Some(spl(cert, SPL_FMC)?),
            _ => None,
        },
        bootloader: spl(cert, SPL_BOOTLOADER)?,
        tee: spl(cert, SPL_TEE)?,
        snp: spl(cert, SPL_SNP)?,
        microcode: spl(cert, SPL_MICROCODE)?,
    })
}

/// The chip of a VCEK: 64 bytes, 8 of Turin's; bare in older certificates, in an OCTET STRING in newer ones.
fn chip_of(cert: &Cert) -> Option<&[u8]> {
    let bytes = cert.extension(CHIP)?;
    match bytes {
        [0x04, length, chip @ ..] if usize::from(*length) == chip.len() && matches!(chip.len(), 8 | 64) => Some(chip),
        chip if matches!(chip.len(), 8 | 64) => Some(chip),
        _ => None,
    }
}

/// Whether a certificate is for the chip and the TCB of a report.
fn is_for(cert: &Cert, kind: Kind, report: &SnpReport, tcb: Tcb, product: Product) -> Result<(), EvidenceError> {
    let fail = |why: String| Err(EvidenceError::Certificate { tee: TEE, what: cert.name(), why });
    let Some(of) = tcb_of(cert, product) else { return fail("it does not say which TCB it is for".into()) };
    if of != tcb {
        return fail(format!("it is for TCB {}, and the report is of TCB {}", of.to_json(), tcb.to_json()));
    }
    if kind == Kind::Vlek {
        return Ok(());
    }
    let Some(chip) = chip_of(cert) else { return fail("it does not say which chip it is of".into()) };
    let (same, rest) = report.chip_id().split_at_checked(chip.len()).unwrap_or_default();
    if same != chip || rest.iter().any(|byte| *byte != 0) {
        return fail(format!("it is of chip {}, and the report is of chip {}", hex(chip), hex(report.chip_id())));
    }
    Ok(())
}

/// Whether the key signed the report: r and s are little-endian there, in 72 bytes each.
fn signature(report: &SnpReport, cert: &Cert) -> Result<(), EvidenceError> {
    let fail = || EvidenceError::Certificate {
        tee: TEE,
        what: "the report's signature".into(),
        why: format!("it is not that of {}", cert.name()),
    };
    let mut fixed = [0; 96];
    let (r, s) = fixed.split_at_mut(48);
    for (to, from) in [(r, report.signature_r()), (s, report.signature_s())] {
        let (number, padding) = from.split_at_checked(48).ok_or_else(fail)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(fail());
        }
        to.iter_mut().zip(number.iter().rev()).for_each(|(to, from)| *to = *from);
    }
    let key = cert.key();
    match matches!(key, Key::P384(_)) && key.verifies(&ECDSA_P384_SHA384_FIXED, report.signed(), &fixed) {
        true => Ok(()),
        false => Err(fail()),
    }
}

fn claims(report: &SnpReport, product: Product, kind: Kind, cert: &Cert) -> Value {
    let (policy, platform) = (report.policy(), report.platform());
    let tcb = Tcb::from_bytes(*report.reported_tcb(), product);
    let [minor, major, ..] = policy.to_le_bytes();
    json!({
        "version": report.version(),
        "product": product.name(),
        "signing_key": kind.name(),
        "certificate_expires": crate::x509::date(cert.validity().1),
        "vmpl": report.vmpl(),
        "guest_svn": report.guest_svn(),
        "policy_abi_major": major,
        "policy_abi_minor": minor,
        "policy_smt_allowed": policy & POLICY_SMT != 0,
        "policy_migrate_ma": policy & POLICY_MIGRATE != 0,
        "policy_debug_allowed": policy & POLICY_DEBUG != 0,
        "policy_single_socket": policy & POLICY_SINGLE_SOCKET != 0,
        "reported_tcb_fmc": tcb.fmc,
        "reported_tcb_bootloader": tcb.bootloader,
        "reported_tcb_tee": tcb.tee,
        "reported_tcb_snp": tcb.snp,
        "reported_tcb_microcode": tcb.microcode,
        "platform_tsme_enabled": platform & PLATFORM_TSME != 0,
        "platform_smt_enabled": platform & PLATFORM_SMT != 0,
        "measurement": hex(report.measurement()),
        "report_data": hex(report.report_data()),
        "init_data": hex(report.host_data()),
        "id_key_digest": hex(report.id_key_digest()),
        "author_key_digest": hex(report.author_key_digest()),
        "chip_id": hex(report.chip_id()),
    })
}

/// The name in the cache of a certificate.
fn cache_name(product: Product, kind: Kind, chip: &[u8], tcb: Tcb) -> String {
    let Tcb { fmc, bootloader, tee, snp, microcode } = tcb;
    let mut tcb = format!("bl{bootloader}-tee{tee}-snp{snp}-ucode{microcode}");
    if let Some(fmc) = fmc {
        tcb += &format!("-fmc{fmc}");
    }
    let product_name = product.name();
    match (kind, product) {
        (Kind::Vlek, _) => format!("snp/{product_name}/vlek/{tcb}"),
        (Kind::Vcek, Product::Turin) => {
            format!("snp/{product_name}/vcek/{}/{tcb}", hex(chip.get(..8).unwrap_or_default()))
        }
        (Kind::Vcek, _) => format!("snp/{product_name}/vcek/{}/{tcb}", hex(chip)),
    }
}

/// The name in the cache that a certificate belongs to; `None` where it is no VCEK or VLEK.
pub(crate) fn cache_name_of(cert: &Cert) -> Option<String> {
    let issuer = cert.issuer();
    let (kind, product) = match (cert.name().as_str(), issuer.as_str()) {
        ("SEV-VCEK", issuer) => (Kind::Vcek, issuer.strip_prefix("SEV-")?),
        ("SEV-VLEK", issuer) => (Kind::Vlek, issuer.strip_prefix("SEV-VLEK-")?),
        _ => return None,
    };
    let product = Product::from_name(product)?;
    let chip = match kind {
        Kind::Vcek => chip_of(cert)?,
        Kind::Vlek => &[],
    };
    Some(cache_name(product, kind, chip, tcb_of(cert, product)?))
}

impl Verifier for SnpVerifier {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        self.genuine(evidence, expected.now)?.bound(expected)
    }
}
