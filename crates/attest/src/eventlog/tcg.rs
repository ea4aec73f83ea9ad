//! The crypto-agile event log (TCG PC Client Platform Firmware Profile 1.06, §10; CCEL: UEFI 2.11, §38.4). Numbers little-endian.
//!
//! ```text
//! header  register u32 ‖ type u32 = EV_NO_ACTION ‖ SHA-1 digest, 20 zeros ‖ size u32 ‖ Spec ID event
//!         Spec ID event: "Spec ID Event03\0" ‖ class u32 ‖ minor, major, errata, uintn u8 ‖ n u32 ‖ n × (alg u16 ‖ bytes u16)
//!                        ‖ size u8 ‖ vendor's bytes
//! events  register u32 ‖ type u32 ‖ count u32 ‖ count × (alg u16 ‖ digest) ‖ size u32 ‖ data
//! ```
//!
//! The header has the form of the old SHA-1 log, so that old readers understand it; a log that goes on in that form has SHA-1 digests
//! only, and is refused. An ACPI table has the log in an area that is larger: what is left is all ones or all zeros, and nothing else.

use serde_json::{Value, json};

use super::{Bank, Event, LONGEST, LONGEST_EVENT, LogError, MOST_EVENTS, aael::RuntimeEvent};

/// The type of events that extend nothing.
pub const EV_NO_ACTION: u32 = 0x3;
/// The type of tagged events, which run-time events are.
pub const EV_EVENT_TAG: u32 = 0x6;
const EV_SEPARATOR: u32 = 0x4;
const SPEC_ID: &[u8; 16] = b"Spec ID Event03\0";
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";
/// Hash functions that a log may have.
const MOST_BANKS: usize = 8;

/// A log, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log<'a> {
    /// The hash functions that each event has a digest of.
    pub banks: Vec<Bank>,
    /// The events after the header.
    pub events: Vec<Event<'a>>,
    /// The locality of the TPM's startup, which PCR 0 begins with; 0 mostly.
    pub locality: u8,
}

struct Reader<'a> {
    rest: &'a [u8],
    event: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], LogError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(LogError::Short { what, event: self.event })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], LogError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(LogError::Short { what, event: self.event })?;
        self.rest = rest;
        Ok(*array)
    }

    fn byte(&mut self, what: &'static str) -> Result<u8, LogError> {
        Ok(u8::from_le_bytes(self.array(what)?))
    }

    fn short(&mut self, what: &'static str) -> Result<u16, LogError> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    fn long(&mut self, what: &'static str) -> Result<u32, LogError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn sized(&mut self, what: &'static str) -> Result<&'a [u8], LogError> {
        let length = usize::try_from(self.long(what)?).unwrap_or(usize::MAX);
        if length > LONGEST_EVENT {
            return Err(LogError::TooMuch { what: "bytes of an event", found: length, limit: LONGEST_EVENT });
        }
        self.take(length, what)
    }

    fn wrong(&self, why: impl Into<String>) -> LogError {
        LogError::Malformed { event: self.event, why: why.into() }
    }

    /// Whether only the filling of the area is left.
    fn at_end(&self) -> bool {
        let all = |byte: u8| self.rest.iter().all(|found| *found == byte);
        all(0xff) || all(0)
    }
}

/// Takes a log apart.
///
/// # Errors
/// [`LogError`]
pub fn parse(bytes: &[u8]) -> Result<Log<'_>, LogError> {
    if bytes.len() > LONGEST {
        return Err(LogError::TooMuch { what: "bytes of a log", found: bytes.len(), limit: LONGEST });
    }
    let mut reader = Reader { rest: bytes, event: 0 };
    let banks = header(&mut reader)?;
    let mut log = Log { banks, events: Vec::new(), locality: 0 };
    while !reader.at_end() {
        reader.event += 1;
        if reader.event > MOST_EVENTS {
            return Err(LogError::TooMuch { what: "events", found: reader.event, limit: MOST_EVENTS });
        }
        let event = event(&mut reader, &log.banks)?;
        if event.kind == EV_NO_ACTION
            && let Some([locality]) = event.data.strip_prefix(STARTUP_LOCALITY)
        {
            if event.register != 0 || log.events.iter().any(|event| event.register == 0 && event.kind != EV_NO_ACTION) {
                return Err(reader.wrong("a startup locality that is not at the begin of PCR 0"));
            }
            log.locality = *locality;
        }
        log.events.push(event);
    }
    Ok(log)
}

/// How many bytes of an area the log in it has, without the filling.
///
/// # Errors
/// [`LogError`]
pub fn length(bytes: &[u8]) -> Result<usize, LogError> {
    let log = parse(bytes)?;
    let mut reader = Reader { rest: bytes, event: 0 };
    header(&mut reader)?;
    for _ in &log.events {
        event(&mut reader, &log.banks)?;
    }
    Ok(bytes.len() - reader.rest.len())
}

/// One entry and what comes after it; `None` where no whole entry is left.
///
/// # Errors
/// [`LogError`]: it is whole, and no entry of this bank.
pub fn parse_entry(bytes: &[u8], bank: Bank) -> Result<Option<(Event<'_>, &[u8])>, LogError> {
    let mut reader = Reader { rest: bytes, event: 1 };
    match event(&mut reader, &[bank]) {
        Ok(event) => Ok(Some((event, reader.rest))),
        Err(LogError::Short { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The header; gives the banks.
fn header(reader: &mut Reader<'_>) -> Result<Vec<Bank>, LogError> {
    reader.long("the register")?;
    let kind = reader.long("the type")?;
    let digest: [u8; 20] = reader.array("the digest")?;
    let size = usize::try_from(reader.long("the size")?).unwrap_or(usize::MAX);
    let data = reader.take(size, "the Spec ID event")?;
    if kind != EV_NO_ACTION || digest != [0; 20] {
        return Err(reader.wrong("it does not begin with a Spec ID event; logs with SHA-1 digests only are refused"));
    }
    let mut spec = Reader { rest: data, event: 0 };
    if spec.array::<16>("the signature")? != *SPEC_ID {
        return Err(spec.wrong("the signature is not 'Spec ID Event03': logs with SHA-1 digests only are refused"));
    }
    spec.long("the class")?;
    spec.array::<4>("the version")?;
    let count = usize::try_from(spec.long("the number of hash functions")?).unwrap_or(usize::MAX);
    if !(1..=MOST_BANKS).contains(&count) {
        return Err(spec.wrong(format!("{count} hash functions; 1 to {MOST_BANKS} are accepted")));
    }
    let mut banks = Vec::with_capacity(count);
    for _ in 0..count {
        let id = spec.short("a hash function")?;
        let length = spec.short("a digest's length")?;
        let bank = Bank::from_id(id).filter(|bank| bank.length() == usize::from(length));
        let bank = bank.ok_or_else(|| spec.wrong(format!("hash function {id:#x} with {length} bytes is not known")))?;
        if banks.contains(&bank) {
            return Err(spec.wrong(format!("{bank} is named twice")));
        }
        banks.push(bank);
    }
    let vendor = spec.byte("the vendor's size")?;
    spec.take(vendor.into(), "the vendor's bytes")?;
    if !spec.rest.is_empty() {
        return Err(spec.wrong("the Spec ID event goes on after its end"));
    }
    Ok(banks)
}

fn event<'a>(reader: &mut Reader<'a>, banks: &[Bank]) -> Result<Event<'a>, LogError> {
    let register = reader.long("the register")?;
    let kind = reader.long("the type")?;
    let count = usize::try_from(reader.long("the number of digests")?).unwrap_or(usize::MAX);
    // The profile demands a digest of each hash function. Run-time events of others have only the one that is extended.
    if !(1..=banks.len().max(1)).contains(&count) {
        return Err(reader.wrong(format!("{count} digests; the log has {} hash functions", banks.len())));
    }
    let mut digests: Vec<(Bank, &[u8])> = Vec::with_capacity(count);
    for _ in 0..count {
        let id = reader.short("a hash function")?;
        let bank = Bank::from_id(id).filter(|bank| banks.contains(bank));
        let bank = bank.ok_or_else(|| reader.wrong(format!("hash function {id:#x} is not one of the log's")))?;
        if digests.iter().any(|(of, _)| *of == bank) {
            return Err(reader.wrong(format!("two {bank} digests")));
        }
        digests.push((bank, reader.take(bank.length(), "a digest")?));
    }
    let data = reader.sized("the data")?;
    Ok(Event { register, kind, digests, data })
}

/// The name of a type, as the TCG spells it; `UNKNOWN` where it has none.
pub fn kind_name(kind: u32) -> &'static str {
    match kind {
        0x0 => "EV_PREBOOT_CERT",
        0x1 => "EV_POST_CODE",
        0x2 => "EV_UNUSED",
        EV_NO_ACTION => "EV_NO_ACTION",
        EV_SEPARATOR => "EV_SEPARATOR",
        0x5 => "EV_ACTION",
        EV_EVENT_TAG => "EV_EVENT_TAG",
        0x7 => "EV_S_CRTM_CONTENTS",
        0x8 => "EV_S_CRTM_VERSION",
        0x9 => "EV_CPU_MICROCODE",
        0xa => "EV_PLATFORM_CONFIG_FLAGS",
        0xb => "EV_TABLE_OF_DEVICES",
        0xc => "EV_COMPACT_HASH",
        0xd => "EV_IPL",
        0xe => "EV_IPL_PARTITION_DATA",
        0xf => "EV_NONHOST_CODE",
        0x10 => "EV_NONHOST_CONFIG",
        0x11 => "EV_NONHOST_INFO",
        0x12 => "EV_OMIT_BOOT_DEVICE_EVENTS",
        0x8000_0001 => "EV_EFI_VARIABLE_DRIVER_CONFIG",
        0x8000_0002 => "EV_EFI_VARIABLE_BOOT",
        0x8000_0003 => "EV_EFI_BOOT_SERVICES_APPLICATION",
        0x8000_0004 => "EV_EFI_BOOT_SERVICES_DRIVER",
        0x8000_0005 => "EV_EFI_RUNTIME_SERVICES_DRIVER",
        0x8000_0006 => "EV_EFI_GPT_EVENT",
        0x8000_0007 => "EV_EFI_ACTION",
        0x8000_0008 => "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        0x8000_0009 => "EV_EFI_HANDOFF_TABLES",
        0x8000_000a => "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000_000b => "EV_EFI_HANDOFF_TABLES2",
        0x8000_000c => "EV_EFI_VARIABLE_BOOT2",
        0x8000_0010 => "EV_EFI_HCRTM_EVENT",
        0x8000_00e0 => "EV_EFI_VARIABLE_AUTHORITY",
        0x8000_00e1 => "EV_EFI_SPDM_FIRMWARE_BLOB",
        0x8000_00e2 => "EV_EFI_SPDM_FIRMWARE_CONFIG",
        _ => "UNKNOWN",
    }
}

/// What the data of an event say, as far as policies ask: `{"string": …}` for texts, `unicode_name` for variables, `device_paths` with the
/// file's name for programs that were started, and what a run-time event says. It is what the log says; what was measured is the digest.
pub(super) fn details(event: &Event<'_>) -> Value {
    if let Ok(event) = RuntimeEvent::from_data(event.data) {
        let text = event.line();
        let RuntimeEvent { domain, operation, content } = event;
        let content = serde_json::from_str(&content).unwrap_or(Value::String(content));
        let data = json!({"domain": domain, "operation": operation, "content": content});
        return json!({"string": text, "unicode_name": "AAEL", "data": data});
    }
    match event.kind {
        0x1 | 0xa | 0xd | 0x8000_0007 => text(event.data),
        EV_EVENT_TAG => event.data.get(8..).map_or_else(|| json!({}), text),
        // Both begin with a length of one byte.
        0x8000_000a | 0x8000_000b => {
            let name = event.data.split_first().and_then(|(length, rest)| rest.get(..usize::from(*length)));
            name.map_or_else(|| json!({}), text)
        }
        0x8000_0001 | 0x8000_0002 | 0x8000_000c | 0x8000_00e0 => variable_name(event.data).map_or_else(
            || json!({}),
            |name| json!({"unicode_name_length": name.encode_utf16().count(), "unicode_name": name}),
        ),
        0x8000_0003..=0x8000_0005 => json!({"device_paths": file_paths(event.data)}),
        _ => json!({}),
    }
}

/// A text up to its end or its first zero byte: what follows there is whatever the firmware had in its buffer.
fn text(data: &[u8]) -> Value {
    let text = data.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(text).map_or_else(|_| json!({}), |text| json!({"string": text}))
}

fn utf16(bytes: &[u8]) -> Option<String> {
    let (units, []) = bytes.as_chunks::<2>() else { return None };
    String::from_utf16(&units.iter().map(|unit| u16::from_le_bytes(*unit)).collect::<Vec<_>>()).ok()
}

/// `UEFI_VARIABLE_DATA`: GUID ‖ characters of the name u64 ‖ bytes of the data u64 ‖ name, UTF-16 ‖ data.
fn variable_name(data: &[u8]) -> Option<String> {
    let length = u64::from_le_bytes(*data.get(16..24)?.first_chunk()?);
    let bytes = usize::try_from(length).ok()?.checked_mul(2)?;
    utf16(data.get(32..)?.get(..bytes)?)
}

/// The file names (`File(…)`) in the device path of `UEFI_IMAGE_LOAD_EVENT`: four u64, the last one is the path's length, then the path:
/// nodes of type u8 ‖ subtype u8 ‖ length u16 ‖ data, where 4 and 4 is a file and 0x7f the end.
fn file_paths(data: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = data.get(32..).unwrap_or_default();
    while let Some(([kind, subtype, low, high], _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let Some(node) = rest.get(4..length) else { break };
        if (*kind, *subtype) == (4, 4)
            && let Some(name) = utf16(node)
        {
            names.push(format!("File({})", name.trim_end_matches('\0')));
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    names
}
