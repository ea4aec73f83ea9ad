//! Sizes as people write them.

use std::{fmt, str::FromStr};

/// A number of bytes: `4096`, `512M`, `10G`, `1.5T`; the letters are powers of 1024, as of qemu, and may be followed by `iB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

const UNITS: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text.get(number.len()..).unwrap_or_default();
        let shift = match unit {
            "" | "B" => 0,
            _ => shift(unit).ok_or_else(|| {
                format!("{unit:?} is no unit: K, M, G, T, P and E are powers of 1024, and KiB, MiB, … the same")
            })?,
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits =
            |text: &str| !text.is_empty() && text.len() <= 19 && text.bytes().all(|digit| digit.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 9 {
            return Err(format!("{text:?} is no size: write it as in 512M, 10G or 1.5T"));
        }
        let parse = |text: &str| text.parse::<u128>().unwrap_or(u128::MAX >> 64);
        let divisor = 10_u128.pow(u32::try_from(part.len()).unwrap_or(9));
        let bytes = ((parse(whole) << shift) * divisor + (parse(part) << shift)) / divisor;
        u64::try_from(bytes).map(Self).map_err(|_| format!("{text:?} is too large"))
    }
}

fn shift(unit: &str) -> Option<u32> {
    let mut letters = unit.chars();
    let letter = letters.next()?.to_ascii_uppercase();
    let known = matches!(letters.as_str(), "" | "iB");
    UNITS.iter().find(|(name, _)| known && *name == letter).map(|(_, shift)| *shift)
}

impl fmt::Display for Size {
    /// Exactly, in the largest unit that has no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("1.5T", 3 << 39),
            ("0.5KiB", 512),
            ("2TiB", 2 << 40),
            ("15.999999999E", 18_446_744_072_556_630_111),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1e9",
            "1GB",
            "1Gb",
            "1 G",
            "1.",
            ".5",
            "1..2",
            "1KK",
            "16E",
            "0x10",
            "1é",
            "1.0000000001G",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_exactly() {
        for text in ["0", "4095", "4K", "1536M", "10G", "64T"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }
}
