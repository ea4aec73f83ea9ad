//! As much DER as CMS and encrypted key files need: one element after the other, definite lengths only.
//!
//! Written here, since what peers write is not always DER (an unsorted set, a constructed string), which stricter parsers refuse.

pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const OID: u8 = 0x06;
pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;

/// Reads elements off a slice.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// The tag of the next element, where there is one.
    pub(crate) fn peek(self) -> Option<u8> {
        self.0.first().copied()
    }

    /// The next element: its tag, and its content.
    pub(crate) fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        // Tags of more than one byte do not occur in what we read.
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x84 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (digits.iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, content))
    }

    /// The content of the next element, which has to have this tag.
    pub(crate) fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        match self.any()? {
            (found, content) if found == tag => Some(content),
            _ => None,
        }
    }

    /// What is in the next element, which has to have this tag.
    pub(crate) fn within(&mut self, tag: u8) -> Option<Self> {
        self.take(tag).map(Self)
    }

    /// The next element with its header, as bytes.
    pub(crate) fn whole(&mut self) -> Option<&'a [u8]> {
        let before = self.0;
        self.any()?;
        before.get(..before.len() - self.0.len())
    }

    /// The next element as a small number.
    pub(crate) fn number(&mut self) -> Option<u64> {
        let digits = self.take(INTEGER)?;
        if digits.is_empty() || digits.len() > 8 || digits.first()? & 0x80 != 0 {
            return None;
        }
        Some(digits.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }
}

/// Writes an element.
pub(crate) fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 8);
    out.push(tag);
    let digits = (length as u64).to_be_bytes();
    let digits: Vec<u8> = digits.into_iter().skip_while(|byte| *byte == 0).collect();
    match digits.as_slice() {
        [] => out.push(0),
        [short @ 0..=0x7f] => out.push(*short),
        long => {
            // At most eight digits, of those of a u64.
            out.push(u8::try_from(long.len()).map_or(0x88, |count| 0x80 | count));
            out.extend_from_slice(long);
        }
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for length in [0, 1, 127, 128, 255, 256, 70_000] {
            let content = vec![9; length];
            let bytes = element(SEQUENCE, &[&element(OCTET_STRING, &[&content]), &element(INTEGER, &[&[7]])]);
            let mut outer = Reader::new(&bytes);
            let mut inner = outer.within(SEQUENCE).unwrap();
            assert!(outer.is_empty());
            assert_eq!(inner.take(OCTET_STRING).unwrap(), content);
            assert_eq!(inner.number(), Some(7));
            assert_eq!(Reader::new(&bytes).whole().unwrap(), bytes);
            for cut in 0..bytes.len() {
                assert!(Reader::new(&bytes[..cut]).any().is_none());
            }
        }
    }

    #[test]
    fn other_encodings_are_refused() {
        for bad in [
            &[0x30, 0x80, 0, 0][..],
            &[0x1f, 0x01, 0],
            &[0x30, 0x85, 0, 0, 0, 0, 1, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert!(Reader::new(bad).any().is_none(), "{bad:?}");
        }
        assert_eq!(Reader::new(&[INTEGER, 1, 0x80]).number(), None);
        assert_eq!(Reader::new(&[INTEGER, 0]).number(), None);
    }
}
