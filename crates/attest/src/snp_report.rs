//! The attestation report of AMD SEV-SNP (SEV Secure Nested Paging Firmware ABI, 56860, §7.3), versions 2 to 5. Numbers little-endian.
//!
//! ```text
//! 0x000 version u32, guest SVN u32, policy u64     0x140 report id [32], of the migration agent [32]
//! 0x010 family id [16], image id [16]              0x180 reported TCB [8]
//! 0x030 VMPL u32, signature algorithm u32          0x188 CPUID family, model, stepping u8 (from version 3)
//! 0x038 current TCB [8], platform u64              0x1a0 chip id [64], committed TCB [8]
//! 0x048 keys u32                                   0x1e8 current build, minor, major u8; 0x1ec committed
//! 0x050 report data [64], measurement [48]         0x1f0 launch TCB [8], mitigations u64, u64 (from version 5)
//! 0x0c0 host data [32]                             0x2a0 signature over all before: r [72], s [72], little-endian
//! 0x0e0 id key's digest [48], author's [48]        0x4a0 end
//! ```
//!
//! In the protocol's evidence the report is a JSON object of these fields; [`SnpReport::to_json`] and [`SnpReport::from_json`] convert,
//! byte by byte, since the signature is over the bytes.

use serde_json::{Value, json};

/// Bytes of a report.
pub const LENGTH: usize = 0x4a0;
/// Bytes that the signature covers.
pub const SIGNED: usize = 0x2a0;

/// Why bytes or JSON are no report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnpReportError {
    /// Another number of bytes.
    #[error("a report has {LENGTH} bytes, and this has {0}")]
    Length(usize),
    /// A version that we do not know.
    #[error("report version {0} is not known: 2 to 5 are")]
    Version(u32),
    /// A JSON member that is missing or none.
    #[error("the report's '{0}' is missing, or has another form than it should")]
    Field(&'static str),
}

/// The line of processors, which decides who signs and how TCB versions are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Product {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004 and 8004.
    Genoa,
    /// EPYC 9005.
    Turin,
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Milan, Self::Genoa, Self::Turin];

    /// By CPUID family and model, as reports from version 3 on have them.
    pub fn of_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x1f) => Some(Self::Turin),
            _ => None,
        }
    }

    /// As AMD spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        }
    }

    /// By AMD's spelling.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|product| product.name() == name)
    }
}

/// A TCB version, taken apart: security versions of the firmware's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcb {
    /// The FMC; Turin only.
    pub fmc: Option<u8>,
    /// The bootloader.
    pub bootloader: u8,
    /// The TEE (PSP operating system).
    pub tee: u8,
    /// The SNP firmware.
    pub snp: u8,
    /// The microcode.
    pub microcode: u8,
}

impl Tcb {
    /// Takes eight bytes apart.
    pub fn from_bytes(bytes: [u8; 8], product: Product) -> Self {
        match (product, bytes) {
            (Product::Turin, [fmc, bootloader, tee, snp, _, _, _, microcode]) => {
                Self { fmc: Some(fmc), bootloader, tee, snp, microcode }
            }
            (_, [bootloader, tee, _, _, _, _, snp, microcode]) => Self { fmc: None, bootloader, tee, snp, microcode },
        }
    }

    fn to_bytes(self) -> [u8; 8] {
        let Self { fmc, bootloader, tee, snp, microcode } = self;
        match fmc {
            Some(fmc) => [fmc, bootloader, tee, snp, 0, 0, 0, microcode],
            None => [bootloader, tee, 0, 0, 0, 0, snp, microcode],
        }
    }

    /// Whether each part is at least another's.
    pub fn at_least(&self, least: &Self) -> bool {
        self.fmc >= least.fmc
            && self.bootloader >= least.bootloader
            && self.tee >= least.tee
            && self.snp >= least.snp
            && self.microcode >= least.microcode
    }

    /// As policies see it.
    pub fn to_json(self) -> Value {
        json!({"fmc": self.fmc, "bootloader": self.bootloader, "tee": self.tee, "snp": self.snp, "microcode": self.microcode})
    }
}

/// A report's bytes, of a version that we know. Nothing in it is verified.
#[derive(Clone, PartialEq, Eq)]
pub struct SnpReport(Box<[u8; LENGTH]>);

impl std::fmt::Debug for SnpReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnpReport").field("version", &self.version()).finish_non_exhaustive()
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $at:literal, [u8; $length:literal];)*) => {
        $($(#[$doc])* pub fn $name(&self) -> &[u8; $length] { self.at::<$at, $length>() })*
    };
}

impl SnpReport {
    /// Takes bytes for a report.
    ///
    /// # Errors
    /// [`SnpReportError`]
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnpReportError> {
        let bytes: &[u8; LENGTH] = bytes.try_into().map_err(|_| SnpReportError::Length(bytes.len()))?;
        let report = Self(Box::new(*bytes));
        match report.version() {
            2..=5 => Ok(report),
            version => Err(SnpReportError::Version(version)),
        }
    }

    /// All bytes.
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// The bytes that the signature covers.
    pub fn signed(&self) -> &[u8] {
        self.at::<0, SIGNED>()
    }

    fn at<const AT: usize, const LEN: usize>(&self) -> &[u8; LEN] {
        const { assert!(AT + LEN <= LENGTH) };
        // The assertion above is the proof.
        self.0.get(AT..AT + LEN).and_then(|slice| slice.first_chunk()).unwrap_or(&[0; LEN])
    }

    fn long<const AT: usize>(&self) -> u32 {
        u32::from_le_bytes(*self.at::<AT, 4>())
    }

    fn quad<const AT: usize>(&self) -> u64 {
        u64::from_le_bytes(*self.at::<AT, 8>())
    }

    /// The version of the layout.
    pub fn version(&self) -> u32 {
        self.long::<0>()
    }

    /// The guest's security version.
    pub fn guest_svn(&self) -> u32 {
        self.long::<4>()
    }

    /// What the guest's owner allows: bits.
    pub fn policy(&self) -> u64 {
        self.quad::<8>()
    }

    /// The privilege level that the report was asked for at.
    pub fn vmpl(&self) -> u32 {
        self.long::<0x30>()
    }

    /// 1 is ECDSA P-384 with SHA-384.
    pub fn signature_algorithm(&self) -> u32 {
        self.long::<0x34>()
    }

    /// What is on at the platform: bits.
    pub fn platform(&self) -> u64 {
        self.quad::<0x40>()
    }

    /// Which key signed: bits.
    pub fn keys(&self) -> u32 {
        self.long::<0x48>()
    }

    /// The CPUID family, model and stepping; from version 3 on.
    pub fn cpuid(&self) -> Option<(u8, u8, u8)> {
        let [family, model, stepping] = *self.at::<0x188, 3>();
        (self.version() >= 3).then_some((family, model, stepping))
    }

    fields! {
        /// Who made the guest, by its owner's word.
        family_id: 0x10, [u8; 16];
        /// Which image it is, by its owner's word.
        image_id: 0x20, [u8; 16];
        /// The TCB now.
        current_tcb: 0x38, [u8; 8];
        /// What the guest had signed.
        report_data: 0x50, [u8; 64];
        /// Of the guest's memory at launch.
        measurement: 0x90, [u8; 48];
        /// What the host passed at launch: the init data's digest.
        host_data: 0xc0, [u8; 32];
        /// Of the key that signed the guest's identity.
        id_key_digest: 0xe0, [u8; 48];
        /// Of the key that certified that one.
        author_key_digest: 0x110, [u8; 48];
        /// This guest's, until it ends.
        report_id: 0x140, [u8; 32];
        /// Its migration agent's.
        report_id_ma: 0x160, [u8; 32];
        /// The TCB that the signing key is derived from.
        reported_tcb: 0x180, [u8; 8];
        /// The chip; zeros where it is masked.
        chip_id: 0x1a0, [u8; 64];
        /// The TCB below which the firmware cannot be turned back.
        committed_tcb: 0x1e0, [u8; 8];
        /// The TCB when the guest was launched.
        launch_tcb: 0x1f0, [u8; 8];
        /// The first half of the signature, little-endian.
        signature_r: 0x2a0, [u8; 72];
        /// The second half.
        signature_s: 0x2e8, [u8; 72];
    }

    /// Whether Turin's TCB layout is used, by the report's word alone: for version 2, which has no CPUID, by the eight bytes of Turin's
    /// chip ids.
    fn layout(&self) -> Product {
        match self.cpuid() {
            Some((family, model, _)) => Product::of_cpuid(family, model).unwrap_or(Product::Genoa),
            None if self.chip_id().iter().skip(8).all(|byte| *byte == 0) && self.chip_id() != &[0; 64] => {
                Product::Turin
            }
            None => Product::Genoa,
        }
    }

    /// The object that the protocol's evidence has.
    pub fn to_json(&self) -> Value {
        let layout = self.layout();
        let tcb = |bytes: &[u8; 8]| Tcb::from_bytes(*bytes, layout).to_json();
        let version = |bytes: &[u8; 3]| {
            let [build, minor, major] = *bytes;
            json!({"major": major, "minor": minor, "build": build})
        };
        let cpuid = self.cpuid();
        let mitigations = |value: u64| (self.version() >= 5).then_some(value);
        json!({
            "version": self.version(), "guest_svn": self.guest_svn(), "policy": self.policy(),
            "family_id": self.family_id()[..], "image_id": self.image_id()[..], "vmpl": self.vmpl(),
            "sig_algo": self.signature_algorithm(), "current_tcb": tcb(self.current_tcb()),
            "plat_info": self.platform(), "key_info": self.keys(), "report_data": self.report_data()[..],
            "measurement": self.measurement()[..], "host_data": self.host_data()[..],
            "id_key_digest": self.id_key_digest()[..], "author_key_digest": self.author_key_digest()[..],
            "report_id": self.report_id()[..], "report_id_ma": self.report_id_ma()[..],
            "reported_tcb": tcb(self.reported_tcb()), "cpuid_fam_id": cpuid.map(|id| id.0),
            "cpuid_mod_id": cpuid.map(|id| id.1), "cpuid_step": cpuid.map(|id| id.2), "chip_id": self.chip_id()[..],
            "committed_tcb": tcb(self.committed_tcb()), "current": version(self.at::<0x1e8, 3>()),
            "committed": version(self.at::<0x1ec, 3>()), "launch_tcb": tcb(self.launch_tcb()),
            "launch_mit_vector": mitigations(self.quad::<0x1f8>()),
            "current_mit_vector": mitigations(self.quad::<0x200>()),
            "signature": {"r": self.signature_r()[..], "s": self.signature_s()[..]},
        })
    }

    /// Puts a report together from the object of the protocol's evidence. What the object has no member for is zero; where the hardware
    /// had something else there, the signature does not hold.
    ///
    /// # Errors
    /// [`SnpReportError`]
    pub fn from_json(value: &Value) -> Result<Self, SnpReportError> {
        let mut writer = Writer { bytes: Box::new([0; LENGTH]), object: value };
        for (name, at) in [("version", 0), ("guest_svn", 4), ("vmpl", 0x30), ("sig_algo", 0x34), ("key_info", 0x48)] {
            let value = writer.number(name)?;
            writer.put(at, &u32::try_from(value).map_err(|_| SnpReportError::Field(name))?.to_le_bytes());
        }
        for (name, at) in [("policy", 8), ("plat_info", 0x40)] {
            let value = writer.number(name)?;
            writer.put(at, &value.to_le_bytes());
        }
        for (name, at, length) in [
            ("family_id", 0x10, 16),
            ("image_id", 0x20, 16),
            ("report_data", 0x50, 64),
            ("measurement", 0x90, 48),
            ("host_data", 0xc0, 32),
            ("id_key_digest", 0xe0, 48),
            ("author_key_digest", 0x110, 48),
            ("report_id", 0x140, 32),
            ("report_id_ma", 0x160, 32),
            ("chip_id", 0x1a0, 64),
        ] {
            let bytes = bytes_of(value.get(name), length).ok_or(SnpReportError::Field(name))?;
            writer.put(at, &bytes);
        }
        for (name, at) in
            [("current_tcb", 0x38), ("reported_tcb", 0x180), ("committed_tcb", 0x1e0), ("launch_tcb", 0x1f0)]
        {
            let tcb = value.get(name).and_then(tcb_of).ok_or(SnpReportError::Field(name))?;
            writer.put(at, &tcb.to_bytes());
        }
        for (name, at) in [("current", 0x1e8), ("committed", 0x1ec)] {
            let part = |part: &str| byte_of(value.get(name)?.get(part)?);
            let bytes = (|| Some([part("build")?, part("minor")?, part("major")?]))();
            writer.put(at, &bytes.ok_or(SnpReportError::Field(name))?);
        }
        for (name, at) in [("cpuid_fam_id", 0x188), ("cpuid_mod_id", 0x189), ("cpuid_step", 0x18a)] {
            writer.optional(name, at, |value| Some([byte_of(value)?].to_vec()))?;
        }
        for (name, at) in [("launch_mit_vector", 0x1f8), ("current_mit_vector", 0x200)] {
            writer.optional(name, at, |value| Some(value.as_u64()?.to_le_bytes().to_vec()))?;
        }
        for (name, at) in [("r", 0x2a0), ("s", 0x2e8)] {
            let half = value.get("signature").and_then(|signature| bytes_of(signature.get(name), 72));
            writer.put(at, &half.ok_or(SnpReportError::Field("signature"))?);
        }
        Self::from_bytes(&writer.bytes[..])
    }
}

struct Writer<'v> {
    bytes: Box<[u8; LENGTH]>,
    object: &'v Value,
}

impl Writer<'_> {
    fn number(&self, name: &'static str) -> Result<u64, SnpReportError> {
        self.object.get(name).and_then(Value::as_u64).ok_or(SnpReportError::Field(name))
    }

    fn optional(
        &mut self,
        name: &'static str,
        at: usize,
        read: impl Fn(&Value) -> Option<Vec<u8>>,
    ) -> Result<(), SnpReportError> {
        match self.object.get(name) {
            None | Some(Value::Null) => {}
            Some(value) => self.put(at, &read(value).ok_or(SnpReportError::Field(name))?),
        }
        Ok(())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *slot = *byte;
        }
    }
}

fn byte_of(value: &Value) -> Option<u8> {
    u8::try_from(value.as_u64()?).ok()
}

fn bytes_of(value: Option<&Value>, length: usize) -> Option<Vec<u8>> {
    let list = value?.as_array().filter(|list| list.len() == length)?;
    list.iter().map(byte_of).collect()
}

fn tcb_of(value: &Value) -> Option<Tcb> {
    let part = |name: &str| byte_of(value.get(name)?);
    let fmc = match value.get("fmc") {
        None | Some(Value::Null) => None,
        Some(fmc) => Some(byte_of(fmc)?),
    };
    Some(Tcb {
        fmc,
        bootloader: part("bootloader")?,
        tee: part("tee")?,
        snp: part("snp")?,
        microcode: part("microcode")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report in which every byte that JSON carries has another value than its neighbours.
    fn report(version: u32, family: u8) -> SnpReport {
        let mut bytes = [0; LENGTH];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(at % 251).unwrap();
        }
        bytes[..4].copy_from_slice(&version.to_le_bytes());
        let mut zero = vec![0x4c..0x50, 0x18b..0x1a0, 0x1eb..0x1ec, 0x1ef..0x1f0, 0x208..0x2a0, 0x330..LENGTH];
        if version < 5 {
            zero.push(0x1f8..0x208);
        }
        if version < 3 {
            zero.push(0x188..0x18b);
        } else {
            bytes[0x188..0x18a].copy_from_slice(&[family, 1]);
        }
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            zero.push(if family == 0x1a { at + 4..at + 7 } else { at + 2..at + 6 });
        }
        zero.into_iter().flatten().for_each(|at| bytes[at] = 0);
        SnpReport::from_bytes(&bytes).unwrap()
    }

    #[test]
    fn reports_survive_json() {
        for (version, family) in [(2, 0x19), (3, 0x19), (4, 0x19), (5, 0x19), (3, 0x1a), (5, 0x1a)] {
            let report = report(version, family);
            assert_eq!(SnpReport::from_json(&report.to_json()).unwrap(), report, "{version} {family:x}");
        }
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let good = report(3, 0x19);
        for length in [0, 1, SIGNED, LENGTH - 1] {
            assert!(SnpReport::from_bytes(&good.as_bytes()[..length]).is_err());
        }
        assert!(SnpReport::from_bytes(&[0; LENGTH + 1]).is_err());
        for version in [0, 1, 6, u32::MAX] {
            let mut bytes = *good.as_bytes();
            bytes[..4].copy_from_slice(&version.to_le_bytes());
            assert_eq!(SnpReport::from_bytes(&bytes), Err(SnpReportError::Version(version)));
        }
        let json = good.to_json();
        for name in json.as_object().unwrap().keys() {
            let mut without = json.clone();
            without[name] = "x".into();
            assert!(SnpReport::from_json(&without).is_err(), "{name}");
        }
        let mut long = json.clone();
        long["chip_id"].as_array_mut().unwrap().push(0.into());
        assert!(SnpReport::from_json(&long).is_err());
    }
}
