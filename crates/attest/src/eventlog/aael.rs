//! Run-time events (AAEL): lines `<Domain> <Operation> <Content>`, as tagged entries of a crypto-agile log.
//!
//! ```text
//! data   0x4141454c u32 ‖ bytes of the text u32 ‖ text        little-endian
//! entry  register u32 ‖ 6 u32 ‖ 1 u32 ‖ alg u16 ‖ H(data) ‖ bytes of the data u32 ‖ data
//! ```

use super::{Bank, Event, LONGEST_EVENT, LogError, tcg};

const MAGIC: u32 = 0x4141_454c;
/// Bytes of an event's text at most, when we write it.
pub const LONGEST_TEXT: usize = 64 * 1024;

/// A run-time event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// Who defines what the operation means.
    pub domain: String,
    /// What happened.
    pub operation: String,
    /// To what: for our own operations, RFC 8785 JSON.
    pub content: String,
}

impl RuntimeEvent {
    /// An event.
    ///
    /// # Errors
    /// [`LogError::Event`]: empty, with white space in a name, a control character anywhere, or too long.
    pub fn new(domain: &str, operation: &str, content: &str) -> Result<Self, LogError> {
        let name = |name: &str| !name.is_empty() && !name.chars().any(|c| c.is_whitespace() || c.is_control());
        if !name(domain) || !name(operation) {
            return Err(LogError::Event("domain and operation are words without white space".into()));
        }
        if content.is_empty() || content.chars().any(char::is_control) {
            return Err(LogError::Event("the content is a text without control characters".into()));
        }
        let length = domain.len() + operation.len() + content.len() + 2;
        if length > LONGEST_TEXT {
            let (what, limit) = ("bytes of a run-time event", LONGEST_TEXT);
            return Err(LogError::TooMuch { what, found: length, limit });
        }
        Ok(Self { domain: domain.into(), operation: operation.into(), content: content.into() })
    }

    /// The line.
    pub fn line(&self) -> String {
        format!("{} {} {}", self.domain, self.operation, self.content)
    }

    /// Reads the data of an entry.
    ///
    /// # Errors
    /// [`LogError::Event`]: these are no data of a run-time event.
    pub fn from_data(data: &[u8]) -> Result<Self, LogError> {
        let bad = |why: &str| LogError::Event(why.into());
        let (magic, rest) = data.split_first_chunk::<4>().ok_or_else(|| bad("too short"))?;
        let (length, text) = rest.split_first_chunk::<4>().ok_or_else(|| bad("too short"))?;
        if u32::from_le_bytes(*magic) != MAGIC {
            return Err(bad("not tagged as one"));
        }
        if usize::try_from(u32::from_le_bytes(*length)) != Ok(text.len()) {
            return Err(bad("its length is not that of its text"));
        }
        let text = std::str::from_utf8(text).map_err(|_| bad("not UTF-8"))?;
        let mut words = text.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some(domain), Some(operation), Some(content)) => Self::new(domain, operation, content),
            _ => Err(bad("not '<Domain> <Operation> <Content>'")),
        }
    }

    /// The data of its entry.
    pub fn data(&self) -> Vec<u8> {
        let text = self.line();
        // `new` bounds the text.
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        [&MAGIC.to_le_bytes(), &length.to_le_bytes(), text.as_bytes()].concat()
    }

    /// What the register is extended with.
    ///
    /// # Errors
    /// [`LogError::NoDigest`]: not a bank that we compute.
    pub fn digest(&self, bank: Bank) -> Result<Vec<u8>, LogError> {
        let algorithm = bank.algorithm().ok_or(LogError::NoDigest { event: 0, bank })?;
        Ok(nacre_core::Digest::of(algorithm, &self.data()).as_bytes().to_vec())
    }

    /// Its entry in the log.
    ///
    /// # Errors
    /// As [`digest`](Self::digest).
    pub fn entry(&self, register: u32, bank: Bank) -> Result<Vec<u8>, LogError> {
        Ok(entry(register, bank, &self.digest(bank)?, &self.data()))
    }
}

/// An entry of the log with one digest, which need not be that of the data.
pub fn entry(register: u32, bank: Bank, digest: &[u8], data: &[u8]) -> Vec<u8> {
    debug_assert!(digest.len() == bank.length() && data.len() <= LONGEST_EVENT);
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let (register, kind, one) = (register.to_le_bytes(), tcg::EV_EVENT_TAG.to_le_bytes(), 1_u32.to_le_bytes());
    [&register, &kind, &one, &bank.id().to_le_bytes()[..], digest, &length.to_le_bytes(), data].concat()
}

/// The header of a log with these banks: for guests whose firmware left none.
pub fn header(banks: &[Bank]) -> Vec<u8> {
    let mut spec = b"Spec ID Event03\0".to_vec();
    spec.extend_from_slice(&[0, 0, 0, 0, 0, 2, 0, 2]); // class 0; version 2.0, errata 0; 64-bit
    spec.extend_from_slice(&u32::try_from(banks.len()).unwrap_or(u32::MAX).to_le_bytes());
    for bank in banks {
        spec.extend_from_slice(&bank.id().to_le_bytes());
        spec.extend_from_slice(&u16::try_from(bank.length()).unwrap_or(u16::MAX).to_le_bytes());
    }
    spec.push(0);
    let size = u32::try_from(spec.len()).unwrap_or(u32::MAX).to_le_bytes();
    [&[0; 4], &tcg::EV_NO_ACTION.to_le_bytes()[..], &[0; 20], &size, &spec].concat()
}

/// The run-time events among events whose registers were compared: only those whose data were measured.
pub fn runtime_events<'e>(events: impl Iterator<Item = &'e Event<'e>>) -> Vec<RuntimeEvent> {
    let tagged = events.filter(|event| event.kind == tcg::EV_EVENT_TAG && event.data_is_measured());
    tagged.filter_map(|event| RuntimeEvent::from_data(event.data).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_and_nonsense_does_not() {
        let event = RuntimeEvent::new("github.com/confidential-containers", "PullImage", r#"{"a": "b c"}"#).unwrap();
        assert_eq!(RuntimeEvent::from_data(&event.data()).unwrap(), event);
        let log = [header(&[Bank::Sha384]), event.entry(4, Bank::Sha384).unwrap()].concat();
        let parsed = tcg::parse(&log).unwrap();
        assert!(parsed.events[0].data_is_measured());
        assert_eq!(runtime_events(parsed.events.iter()), std::slice::from_ref(&event));
        for (domain, operation, content) in
            [("", "o", "c"), ("d d", "o", "c"), ("d", "o\t", "c"), ("d", "o", ""), ("d", "o", "a\nb"), ("d", "", "c")]
        {
            assert!(RuntimeEvent::new(domain, operation, content).is_err());
        }
        assert!(RuntimeEvent::new("d", "o", &"x".repeat(LONGEST_TEXT)).is_err());
        let data = event.data();
        for length in 0..data.len() {
            assert!(RuntimeEvent::from_data(&data[..length]).is_err());
        }
        assert!(RuntimeEvent::from_data(&[&data[..], b"x"].concat()).is_err());
    }

    #[test]
    fn data_that_were_not_measured_are_no_event() {
        let event = RuntimeEvent::new("d", "o", "what was measured").unwrap();
        let other = RuntimeEvent::new("d", "o", "what is claimed").unwrap();
        let forged = entry(4, Bank::Sha384, &event.digest(Bank::Sha384).unwrap(), &other.data());
        let log = [header(&[Bank::Sha384]), forged].concat();
        assert_eq!(runtime_events(tcg::parse(&log).unwrap().events.iter()), []);
    }
}
