//! TCB info and the quoting enclave's identity: what Intel publishes, and what it says of a platform (Intel TDX and SGX PCS API v4).
//!
//! The level of a platform is the first, from the highest on, each of whose security versions it has. Of a TDX platform, the first two
//! TDX components are the module's, and judged by the identity of the module's major version, where that is not 0.

use nacre_attest::evidence::hex;
use serde::Deserialize;

use super::{pck::Platform, quote::at};

/// Levels and identities of a document at most.
const MOST: usize = 256;

/// A TCB status, from good to bad as far as they can be compared.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub(crate) enum Status {
    UpToDate,
    #[serde(rename = "SWHardeningNeeded")]
    SwHardeningNeeded,
    ConfigurationNeeded,
    #[serde(rename = "ConfigurationAndSWHardeningNeeded")]
    ConfigurationAndSwHardeningNeeded,
    OutOfDate,
    OutOfDateConfigurationNeeded,
    Revoked,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::UpToDate => "UpToDate",
            Self::SwHardeningNeeded => "SWHardeningNeeded",
            Self::ConfigurationNeeded => "ConfigurationNeeded",
            Self::ConfigurationAndSwHardeningNeeded => "ConfigurationAndSWHardeningNeeded",
            Self::OutOfDate => "OutOfDate",
            Self::OutOfDateConfigurationNeeded => "OutOfDateConfigurationNeeded",
            Self::Revoked => "Revoked",
        }
    }

    /// Together with the status of a part (the quoting enclave, the TDX module): only what is out of date or revoked counts there.
    pub(crate) fn with_part(self, part: Self) -> Self {
        match (self, part) {
            (Self::Revoked, _) | (_, Self::Revoked) => Self::Revoked,
            (Self::UpToDate | Self::SwHardeningNeeded, Self::OutOfDate | Self::OutOfDateConfigurationNeeded) => {
                Self::OutOfDate
            }
            (
                Self::ConfigurationNeeded | Self::ConfigurationAndSwHardeningNeeded,
                Self::OutOfDate | Self::OutOfDateConfigurationNeeded,
            ) => Self::OutOfDateConfigurationNeeded,
            (status, _) => status,
        }
    }

    fn is_out_of_date(self) -> bool {
        matches!(self, Self::OutOfDate | Self::OutOfDateConfigurationNeeded | Self::Revoked)
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Component {
    svn: u8,
}

#[derive(Clone, Debug, Deserialize)]
struct LevelTcb {
    sgxtcbcomponents: [Component; 16],
    pcesvn: u16,
    #[serde(default)]
    tdxtcbcomponents: Option<[Component; 16]>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Level {
    tcb: LevelTcb,
    tcb_date: String,
    tcb_status: Status,
    #[serde(rename = "advisoryIDs", default)]
    advisories: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct PartTcb {
    isvsvn: u16,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PartLevel {
    tcb: PartTcb,
    tcb_date: String,
    tcb_status: Status,
    #[serde(rename = "advisoryIDs", default)]
    advisories: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Module {
    mrsigner: String,
    attributes: String,
    attributes_mask: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ModuleIdentity {
    id: String,
    #[serde(flatten)]
    module: Module,
    tcb_levels: Vec<PartLevel>,
}

/// TCB info, without its signature.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TcbInfo {
    pub(crate) id: String,
    pub(crate) version: u32,
    pub(crate) issue_date: String,
    pub(crate) next_update: String,
    pub(crate) fmspc: String,
    pub(crate) pce_id: String,
    #[serde(default)]
    pub(crate) tcb_evaluation_data_number: u32,
    tcb_levels: Vec<Level>,
    #[serde(default)]
    tdx_module: Option<Module>,
    #[serde(default)]
    tdx_module_identities: Vec<ModuleIdentity>,
}

/// The quoting enclave's identity, without its signature.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) version: u32,
    pub(crate) issue_date: String,
    pub(crate) next_update: String,
    #[serde(default)]
    pub(crate) tcb_evaluation_data_number: u32,
    miscselect: String,
    miscselect_mask: String,
    attributes: String,
    attributes_mask: String,
    mrsigner: String,
    isvprodid: u16,
    tcb_levels: Vec<PartLevel>,
}

/// What Intel says of a platform, or of a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) status: Status,
    /// The date of the level, RFC 3339.
    pub(crate) date: String,
    pub(crate) advisories: Vec<String>,
}

impl Verdict {
    /// Together with a part's.
    pub(crate) fn with_part(mut self, part: Self) -> Self {
        self.status = self.status.with_part(part.status);
        // RFC 3339 in UTC sorts as text.
        if part.date < self.date {
            self.date = part.date;
        }
        for advisory in part.advisories {
            if !self.advisories.contains(&advisory) {
                self.advisories.push(advisory);
            }
        }
        self
    }

    /// Together with that of the TCB which a guest has after an update that kept it running: no better than either. A guest that was
    /// launched on a TCB that is out of date has to be launched anew.
    pub(crate) fn with_current(self, current: Self) -> Self {
        match (self.status.is_out_of_date(), current.status.is_out_of_date()) {
            (false, true) => Self { status: current.status, ..current },
            _ if current.status == Status::Revoked => Self { status: Status::Revoked, ..self },
            _ => self,
        }
    }
}

/// The bytes of a hexadecimal text of exactly that length.
fn bytes<const N: usize>(text: &str, what: &str) -> Result<[u8; N], String> {
    unhex(text).and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| format!("its {what} is not {N} bytes in hex"))
}

pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

fn masked<const N: usize>(value: [u8; N], mask: [u8; N]) -> [u8; N] {
    let mut out = value;
    out.iter_mut().zip(mask).for_each(|(byte, mask)| *byte &= mask);
    out
}

/// The first level, from the highest on, that a part's security version reaches.
fn part_level(levels: &[PartLevel], svn: u16, what: &str) -> Result<Verdict, String> {
    let reached = levels.iter().filter(|level| level.tcb.isvsvn <= svn).max_by_key(|level| level.tcb.isvsvn);
    let level = reached.ok_or_else(|| format!("{what} has security version {svn}, which is below every level"))?;
    Ok(Verdict { status: level.tcb_status, date: level.tcb_date.clone(), advisories: level.advisories.clone() })
}

impl TcbInfo {
    /// From the text that was signed.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut info: Self = serde_json::from_str(text).map_err(|error| format!("TCB info: {error}"))?;
        if info.tcb_levels.len() > MOST || info.tdx_module_identities.len() > MOST {
            return Err(format!("TCB info has more than {MOST} levels"));
        }
        // Nobody promises an order.
        info.tcb_levels.sort_by(|a, b| {
            let key = |level: &Level| {
                (
                    level.tcb.sgxtcbcomponents,
                    level.tcb.pcesvn,
                    level.tcb.tdxtcbcomponents.unwrap_or([Component { svn: 0 }; 16]),
                )
            };
            key(b).cmp(&key(a))
        });
        Ok(info)
    }

    /// Whether it is for that platform.
    pub(crate) fn is_for(&self, platform: &Platform, tdx: bool) -> Result<(), String> {
        let (id, least) = if tdx { ("TDX", 3) } else { ("SGX", 2) };
        if self.id != id || self.version < least {
            return Err(format!("TCB info is for '{:.20}', version {}", self.id, self.version));
        }
        if bytes::<6>(&self.fmspc, "FMSPC")? != platform.fmspc || bytes::<2>(&self.pce_id, "PCE id")? != platform.pce_id
        {
            return Err(format!(
                "TCB info is for FMSPC {:.20}, and the platform's is {}",
                self.fmspc,
                hex(&platform.fmspc)
            ));
        }
        Ok(())
    }

    /// What it says of a platform; `tdx` is a guest's TEE TCB SVN.
    pub(crate) fn verdict(&self, platform: &Platform, tdx: Option<&[u8; 16]>) -> Result<Verdict, String> {
        let reaches = |have: &[u8], need: &[Component]| have.iter().zip(need).all(|(have, need)| *have >= need.svn);
        let reached = self.tcb_levels.iter().find(|level| {
            let sgx = reaches(&platform.cpu_svn, &level.tcb.sgxtcbcomponents) && platform.pce_svn >= level.tcb.pcesvn;
            sgx && match (tdx, &level.tcb.tdxtcbcomponents) {
                (None, _) => true,
                (Some(_), None) => false,
                // The first two are the module's.
                (Some(have @ [_, 1..=u8::MAX, ..]), Some(need)) => {
                    reaches(have.get(2..).unwrap_or_default(), need.get(2..).unwrap_or_default())
                }
                (Some(have), Some(need)) => reaches(have, need),
            }
        });
        let level = reached.ok_or("the platform is below every level of TCB info")?;
        let verdict =
            Verdict { status: level.tcb_status, date: level.tcb_date.clone(), advisories: level.advisories.clone() };
        match tdx {
            Some([svn, 1..=u8::MAX, ..]) => {
                let identity = self.module(tdx)?.ok_or("TCB info does not know the TDX module's version")?;
                Ok(verdict.with_part(part_level(&identity.tcb_levels, (*svn).into(), "the TDX module")?))
            }
            _ => Ok(verdict),
        }
    }

    fn module(&self, tdx: Option<&[u8; 16]>) -> Result<Option<&ModuleIdentity>, String> {
        let Some([_, version @ 1..=u8::MAX, ..]) = tdx else { return Ok(None) };
        let id = format!("TDX_{version:02X}");
        let mut found = self.tdx_module_identities.iter().filter(|identity| identity.id.eq_ignore_ascii_case(&id));
        match (found.next(), found.next()) {
            (Some(identity), None) => Ok(Some(identity)),
            _ => Err(format!("TCB info has no identity of the TDX module {id}")),
        }
    }

    /// Whether a guest's TDX module is Intel's: its signer and attributes.
    pub(crate) fn check_module(&self, td: &[u8]) -> Result<(), String> {
        let svn: [u8; 16] = at(td, 0);
        let module = match self.module(Some(&svn))? {
            Some(identity) => &identity.module,
            None => self.tdx_module.as_ref().ok_or("TCB info does not say what the TDX module is")?,
        };
        let signer: [u8; 48] = at(td, 64);
        let attributes: [u8; 8] = at(td, 112);
        let mask = bytes(&module.attributes_mask, "attributes' mask")?;
        if bytes::<48>(&module.mrsigner, "module signer")? != signer {
            return Err("the TDX module is not signed by whom it should be".into());
        }
        // What the mask leaves out has to be zero.
        if masked(bytes(&module.attributes, "module attributes")?, mask) != attributes {
            return Err("the TDX module has other attributes than it should".into());
        }
        Ok(())
    }
}

impl Identity {
    /// From the text that was signed.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let identity: Self = serde_json::from_str(text).map_err(|error| format!("QE identity: {error}"))?;
        if identity.tcb_levels.len() > MOST {
            return Err(format!("QE identity has more than {MOST} levels"));
        }
        Ok(identity)
    }

    /// Whether a quoting enclave's report is of this enclave, and what Intel says of it.
    pub(crate) fn verdict(&self, report: &[u8], tdx: bool) -> Result<Verdict, String> {
        let expected = if tdx { "TD_QE" } else { "QE" };
        if self.id != expected || !(2..=3).contains(&self.version) {
            return Err(format!(
                "QE identity is of '{:.20}', version {}, and {expected} is needed",
                self.id, self.version
            ));
        }
        let mask = bytes::<4>(&self.miscselect_mask, "miscselect's mask")?;
        if masked(at(report, 16), mask) != masked(bytes(&self.miscselect, "miscselect")?, mask) {
            return Err("the quoting enclave has another miscselect than it should".into());
        }
        let mask = bytes::<16>(&self.attributes_mask, "attributes' mask")?;
        if masked(at(report, 48), mask) != masked(bytes(&self.attributes, "attributes")?, mask) {
            return Err("the quoting enclave has other attributes than it should".into());
        }
        if at::<32>(report, 128) != bytes(&self.mrsigner, "signer")? {
            return Err("the quoting enclave is not signed by whom it should be".into());
        }
        if u16::from_le_bytes(at(report, 256)) != self.isvprodid {
            return Err("the quoting enclave is another product than it should be".into());
        }
        part_level(&self.tcb_levels, u16::from_le_bytes(at(report, 258)), "the quoting enclave")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_can_only_make_it_worse() {
        use Status::*;
        for (status, part, together) in [
            (UpToDate, UpToDate, UpToDate),
            (UpToDate, OutOfDate, OutOfDate),
            (SwHardeningNeeded, OutOfDate, OutOfDate),
            (ConfigurationNeeded, OutOfDate, OutOfDateConfigurationNeeded),
            (ConfigurationAndSwHardeningNeeded, OutOfDate, OutOfDateConfigurationNeeded),
            (UpToDate, Revoked, Revoked),
            (Revoked, UpToDate, Revoked),
            (OutOfDate, UpToDate, OutOfDate),
            (ConfigurationNeeded, UpToDate, ConfigurationNeeded),
        ] {
            assert_eq!(status.with_part(part), together, "{status:?} {part:?}");
        }
        let verdict = |status| Verdict { status, date: "2025".into(), advisories: vec![] };
        assert_eq!(verdict(OutOfDate).with_current(verdict(UpToDate)).status, OutOfDate);
        assert_eq!(verdict(UpToDate).with_current(verdict(OutOfDate)).status, OutOfDate);
        assert_eq!(verdict(OutOfDate).with_current(verdict(Revoked)).status, Revoked);
        assert_eq!(verdict(UpToDate).with_current(verdict(UpToDate)).status, UpToDate);
    }

    #[test]
    fn hexadecimal_is_two_digits_a_byte() {
        assert_eq!(unhex("00fF").unwrap(), [0, 255]);
        for bad in ["0", "0x", "+1", "zz", "é"] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }
}
