//! What a TPM signs, and its signature, taken apart (TPM 2.0 Library, part 2, §10.12 and §11.3). Numbers big-endian.
//!
//! ```text
//! quote      0xff544347 ‖ 0x8018 u16 ‖ signer TPM2B ‖ extra data TPM2B ‖ clock u64 ‖ resets u32 ‖ restarts u32 ‖ safe u8 ‖ firmware u64
//!            ‖ n u32 ‖ n × (hash u16 ‖ bytes u8 ‖ bits) ‖ digest of the PCRs TPM2B
//! signature  RSASSA 0x14 or RSAPSS 0x16 u16 ‖ hash u16 ‖ TPM2B          ECDSA 0x18 u16 ‖ hash u16 ‖ r TPM2B ‖ s TPM2B
//! ```

const MAGIC: u32 = 0xff54_4347;
const ST_ATTEST_QUOTE: u16 = 0x8018;
const ALG_SHA256: u16 = 0x000b;
const ALG_SHA384: u16 = 0x000c;
/// PCR banks of a quote at most.
const MOST_BANKS: u32 = 8;
/// PCRs of a TPM.
pub(crate) const PCRS: u32 = 24;

/// Of a PCR selection: the hash function, and which PCRs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) hash: u16,
    pub(crate) pcrs: Vec<u32>,
}

/// A quote, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Quote<'a> {
    pub(crate) extra: &'a [u8],
    pub(crate) resets: u32,
    pub(crate) restarts: u32,
    pub(crate) firmware: u64,
    pub(crate) selections: Vec<Selection>,
    pub(crate) digest: &'a [u8],
}

/// The hash function of a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha256,
    Sha384,
}

/// A signature, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signature<'a> {
    RsaSsa(Hash, &'a [u8]),
    RsaPss(Hash, &'a [u8]),
    Ecdsa(Hash, &'a [u8], &'a [u8]),
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let (array, rest) = self.rest.split_first_chunk().ok_or_else(|| format!("it ends within {what}"))?;
        self.rest = rest;
        Ok(*array)
    }

    fn byte(&mut self, what: &str) -> Result<u8, String> {
        Ok(u8::from_be_bytes(self.array(what)?))
    }

    fn short(&mut self, what: &str) -> Result<u16, String> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    fn long(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| format!("it ends within {what}"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn sized(&mut self, what: &str) -> Result<&'a [u8], String> {
        let length = self.short(what)?;
        self.take(length.into(), what)
    }

    fn end(&self) -> Result<(), String> {
        if self.rest.is_empty() { Ok(()) } else { Err("it goes on after its end".into()) }
    }
}

/// Takes a quote apart.
pub(crate) fn quote(bytes: &[u8]) -> Result<Quote<'_>, String> {
    let mut reader = Reader { rest: bytes };
    if reader.long("the magic number")? != MAGIC {
        return Err("no TPM made it: its magic number is another one".into());
    }
    if reader.short("the type")? != ST_ATTEST_QUOTE {
        return Err("it is no quote, but another attestation of a TPM".into());
    }
    reader.sized("the signer")?;
    let extra = reader.sized("the extra data")?;
    reader.array::<8>("the clock")?;
    let (resets, restarts) = (reader.long("the resets")?, reader.long("the restarts")?);
    reader.byte("the clock")?;
    let firmware = u64::from_be_bytes(reader.array("the firmware's version")?);
    let count = reader.long("the number of banks")?;
    if count > MOST_BANKS {
        return Err(format!("{count} banks of PCRs, and at most {MOST_BANKS} are accepted"));
    }
    let mut selections = Vec::new();
    for _ in 0..count {
        let hash = reader.short("a bank")?;
        let length = reader.byte("a selection")?;
        let bits = reader.take(length.into(), "a selection")?;
        let is_set = |pcr: &u32| {
            let byte = usize::try_from(pcr / 8).ok().and_then(|at| bits.get(at));
            byte.is_some_and(|byte| byte >> (pcr % 8) & 1 == 1)
        };
        if bits.iter().skip(3).any(|byte| *byte != 0) {
            return Err(format!("it selects PCRs from {PCRS} on, which no TPM has"));
        }
        selections.push(Selection { hash, pcrs: (0..PCRS).filter(is_set).collect() });
    }
    let digest = reader.sized("the digest of the PCRs")?;
    reader.end()?;
    Ok(Quote { extra, resets, restarts, firmware, selections, digest })
}

/// Takes a signature apart.
pub(crate) fn signature(bytes: &[u8]) -> Result<Signature<'_>, String> {
    let mut reader = Reader { rest: bytes };
    let scheme = reader.short("the scheme")?;
    let hash = match reader.short("the hash function")? {
        ALG_SHA256 => Hash::Sha256,
        ALG_SHA384 => Hash::Sha384,
        other => return Err(format!("hash function {other:#06x} is not accepted: SHA-256 and SHA-384 are")),
    };
    let signature = match scheme {
        0x0014 => Signature::RsaSsa(hash, reader.sized("the signature")?),
        0x0016 => Signature::RsaPss(hash, reader.sized("the signature")?),
        0x0018 => Signature::Ecdsa(hash, reader.sized("r")?, reader.sized("s")?),
        other => return Err(format!("scheme {other:#06x} is not accepted: RSASSA, RSAPSS and ECDSA are")),
    };
    reader.end()?;
    Ok(signature)
}
