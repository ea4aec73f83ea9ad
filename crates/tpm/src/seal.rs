//! Secrets that one TPM opens, and only while its PCRs hold what they held: sealed objects below a storage root key.
//!
//! ```text
//! storage root key   TPM2_CreatePrimary, owner hierarchy: P-256, AES-128-CFB, restricted to decryption; the same each time, by the seed
//! sealed object      TPM2_Create below it: the secret, encrypted by the TPM; TPM2_Load and TPM2_Unseal give it back
//! policy             SHA-256(zeros ‖ TPM_CC_PolicyPCR ‖ selection ‖ SHA-256(values)), where there are PCRs
//! ```
//!
//! Secrets go to the TPM and come back hidden, in sessions that are salted with the storage root key: whoever sits on the bus learns none and
//! changes none. Whether the storage root key is the TPM's own, somebody who sits there when a secret is *sealed* can lie about; from then
//! on its name is known, and another key opens no session. A TPM that is cleared has another seed, and so another key.

use std::{collections::BTreeMap, fmt, str::FromStr};

use nacre_core::SecretBytes;
use ring::digest;
use zeroize::Zeroizing;

use crate::{
    Tpm, TpmAddress, TpmError, kind, malformed,
    response::{self, WireError},
    session::{self, Handle, Kind, Request, SaltKey, Session, Writer},
};

/// Bytes of a secret at most: what a TPM seals.
pub const LONGEST: usize = 128;
/// Bytes of an area of a sealed object at most; they have some 200.
const LONGEST_AREA: usize = 1024;
const RH_OWNER: u32 = 0x4000_0001;
const ALG_ECC: u16 = 0x0023;
const ALG_KEYEDHASH: u16 = 0x0008;
const ALG_AES: u16 = 0x0006;
const ALG_CFB: u16 = 0x0043;
const ALG_NULL: u16 = 0x0010;
const ALG_SHA256: u16 = 0x000b;
const P256: u16 = 0x0003;
/// FIXEDTPM, FIXEDPARENT, SENSITIVEDATAORIGIN, USERWITHAUTH, NODA, RESTRICTED, DECRYPT.
const ROOT: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 16 | 1 << 17;
/// FIXEDTPM, FIXEDPARENT, NODA: opened by its policy only.
const SEALED: u32 = 1 << 1 | 1 << 4 | 1 << 10;
const USERWITHAUTH: u32 = 1 << 6;
const CC_POLICY_PCR: u32 = 0x017f;
const PCRS: u32 = 24;
/// The policy does not hold, a value is not the expected one, a PCR changed in between.
const RC_POLICY_FAIL: u32 = 0x09d;
const RC_VALUE: u32 = 0x084;
const RC_PCR_CHANGED: u32 = 0x128;
/// The object has a policy, and only that opens it.
const RC_AUTH_UNAVAILABLE: u32 = 0x12f;

/// Why a secret was not sealed or not opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The TPM, or the way to it.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// Longer than what a TPM seals.
    #[error("{0} bytes are more than the {LONGEST} that a TPM seals")]
    TooLong(usize),
    /// The storage root key is another one.
    #[error(
        "this is another TPM than the one that sealed it, or it was cleared since (its storage root key is {found}, and was {expected}): give back the \
         TPM, or use another key that opens the same"
    )]
    OtherTpm {
        /// Its name, shortened.
        found: String,
        /// The name that it had.
        expected: String,
    },
    /// PCRs hold something else.
    #[error(
        "it opens only while PCRs hold what they held when it was sealed, and {}: boot what was booted then, or use another key that opens the \
         same and seal anew", changed.join(", ")
    )]
    Pcrs {
        /// What each holds and held.
        changed: Vec<String>,
    },
    /// It is not what the TPM gave.
    #[error("what was sealed was changed, or put together of several: {why}; restore it from a copy")]
    Tampered {
        /// How that is seen.
        why: String,
    },
}

/// PCRs, by their numbers, in the SHA-256 bank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pcrs(u32);

impl Pcrs {
    /// Those that are set, of 24 bits.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        (0..PCRS).filter(move |number| self.0 & 1 << number != 0)
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn selection(self) -> Zeroizing<Vec<u8>> {
        let [low, middle, high, _] = self.0.to_le_bytes();
        Writer::default().long(1).short(ALG_SHA256).raw(&[3, low, middle, high]).done()
    }
}

impl FromIterator<u32> for Pcrs {
    fn from_iter<T: IntoIterator<Item = u32>>(numbers: T) -> Self {
        Self(numbers.into_iter().filter(|number| *number < PCRS).fold(0, |bits, number| bits | 1 << number))
    }
}

impl FromStr for Pcrs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse::<u32>().ok().filter(|number| *number < PCRS && part != "+");
        let numbers: Option<Vec<u32>> = text.split('+').map(number).collect();
        let numbers =
            numbers.ok_or_else(|| format!("{text:?} are no PCRs: write numbers from 0 to 23, as in 0+2+7"))?;
        Ok(numbers.into_iter().collect())
    }
}

impl fmt::Display for Pcrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.numbers().map(|number| number.to_string()).collect();
        f.write_str(&numbers.join("+"))
    }
}

/// What a TPM sealed: nothing of it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// What PCRs held.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// The object's public area.
    pub public: Vec<u8>,
    /// Its private one, encrypted by the TPM.
    pub private: Vec<u8>,
}

/// A TPM with its storage root key, which stays the same until the TPM is cleared.
#[derive(Debug)]
pub struct Vault {
    address: TpmAddress,
    owner: SecretBytes,
}

impl Vault {
    /// The TPM at an address; `owner` is its owner's authorization, mostly empty.
    pub fn new(address: TpmAddress, owner: SecretBytes) -> Self {
        Self { address, owner }
    }

    /// The name of the storage root key, by which a TPM is known again.
    ///
    /// # Errors
    /// [`SealError::Tpm`].
    pub fn root(&self) -> Result<Vec<u8>, SealError> {
        self.with(|_, root| Ok(root.name.clone()))
    }

    /// Seals a secret, to be opened while these PCRs hold what they hold now.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn seal(&self, secret: &SecretBytes, pcrs: Pcrs) -> Result<Sealed, SealError> {
        let length = secret.expose().len();
        if length > LONGEST {
            return Err(SealError::TooLong(length));
        }
        self.with(|tpm, root| {
            let values = read(tpm, pcrs)?;
            let public = template(&values);
            let mut session = tpm.start(Kind::Hmac, Some(&root.salt))?;
            let request = Request {
                command: session::CREATE,
                handles: [root.handle(), root.handle()],
                count: 1,
                hidden: Some(SecretBytes::new(Writer::default().sized(&[]).sized(secret.expose()).done().to_vec())),
                // Nothing from outside, and no PCRs of its creation.
                parameters: Writer::default().sized(&[&public[..], &[0, 0]].concat()).sized(&[]).long(0).done(),
                reveal: false,
            };
            let answer = tpm.in_session(&mut session, request, &[]);
            tpm.flush(session.handle);
            let answer = answer?;
            let wrong = |error| SealError::Tpm(malformed(session::CREATE, error));
            let (private, made) = response::created(&answer).map_err(wrong)?;
            // What tells it from others comes last.
            if !made.starts_with(&public) {
                return Err(wrong(WireError::Wrong("public area: it is not what was asked for")));
            }
            Ok(Sealed { pcrs: values, public: made.to_vec(), private: private.to_vec() })
        })
    }

    /// Opens what was sealed by the TPM whose storage root key has this name.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn unseal(&self, root_name: &[u8], sealed: &Sealed) -> Result<SecretBytes, SealError> {
        self.with(|tpm, root| {
            if root.name != root_name {
                return Err(SealError::OtherTpm { found: short(&root.name), expected: short(root_name) });
            }
            if sealed.public.len() > LONGEST_AREA || sealed.private.len() > LONGEST_AREA {
                return Err(SealError::Tampered { why: "it is longer than anything that a TPM seals".into() });
            }
            compare(&read(tpm, sealed.pcrs.keys().copied().collect())?, &sealed.pcrs)?;
            let mut session = tpm.start(Kind::Hmac, Some(&root.salt))?;
            let opened = load(tpm, root, &mut session, sealed).and_then(|handle| {
                let secret = open(tpm, root, &mut session, handle, sealed);
                tpm.flush(handle);
                secret
            });
            tpm.flush(session.handle);
            opened
        })
    }

    /// Does something with the TPM, held alone, and its storage root key, loaded.
    fn with<T>(&self, work: impl FnOnce(&mut Tpm, &Root) -> Result<T, SealError>) -> Result<T, SealError> {
        let mut tpm = Tpm::open(&self.address)?;
        tpm.make_room()?;
        let result = self.load_root(&mut tpm).and_then(|root| {
            let result = work(&mut tpm, &root);
            tpm.flush(root.salt.handle);
            result
        });
        tpm.end();
        result
    }

    fn load_root(&self, tpm: &mut Tpm) -> Result<Root, SealError> {
        let command = session::CREATE_PRIMARY;
        let template = root_template();
        let public = Writer::default().raw(&template).sized(&[0; 32]).sized(&[0; 32]).done();
        let sensitive = Writer::default().sized(&[]).sized(&[]).done();
        let mut session = tpm.start(Kind::Hmac, None)?;
        let owner = RH_OWNER.to_be_bytes();
        let handle = || Handle { handle: RH_OWNER, name: &owner };
        let request = Request {
            command,
            handles: [handle(), handle()],
            count: 1,
            hidden: None,
            parameters: Writer::default().sized(&sensitive).sized(&public).sized(&[]).long(0).done(),
            reveal: false,
        };
        let made = tpm.loading(&mut session, request, self.owner.expose());
        tpm.flush(session.handle);
        let (handle, parameters) = made?;
        let area = response::public_area(&parameters).and_then(|area| Ok((area, response::point(area, &template)?)));
        match area {
            Ok((area, (x, y))) => {
                Ok(Root { name: name_of(area), salt: SaltKey { handle, x: x.to_vec(), y: y.to_vec() } })
            }
            Err(error) => {
                tpm.flush(handle);
                Err(malformed(command, error).into())
            }
        }
    }
}

/// The storage root key, loaded.
struct Root {
    name: Vec<u8>,
    salt: SaltKey,
}

impl Root {
    fn handle(&self) -> Handle<'_> {
        Handle { handle: self.salt.handle, name: &self.name }
    }
}

fn root_template() -> Zeroizing<Vec<u8>> {
    let key = Writer::default().short(ALG_ECC).short(ALG_SHA256).long(ROOT).sized(&[]);
    let key = key.short(ALG_AES).short(128).short(ALG_CFB);
    // No scheme; the curve; no derivation.
    key.short(ALG_NULL).short(P256).short(ALG_NULL).done()
}

/// The public area of a sealed object, but for what the TPM adds.
fn template(pcrs: &BTreeMap<u32, Vec<u8>>) -> Vec<u8> {
    let (attributes, policy) = match pcrs.is_empty() {
        true => (SEALED | USERWITHAUTH, Vec::new()),
        false => (SEALED, policy(pcrs)),
    };
    let public = Writer::default().short(ALG_KEYEDHASH).short(ALG_SHA256).long(attributes).sized(&policy);
    public.short(ALG_NULL).done().to_vec()
}

fn policy(pcrs: &BTreeMap<u32, Vec<u8>>) -> Vec<u8> {
    let selection = pcrs.keys().copied().collect::<Pcrs>().selection();
    let message = [&[0; 32], &CC_POLICY_PCR.to_be_bytes()[..], &selection, &values_digest(pcrs)].concat();
    digest::digest(&digest::SHA256, &message).as_ref().to_vec()
}

fn values_digest(pcrs: &BTreeMap<u32, Vec<u8>>) -> Vec<u8> {
    let values: Vec<u8> = pcrs.values().flatten().copied().collect();
    digest::digest(&digest::SHA256, &values).as_ref().to_vec()
}

/// The digest that stands for an object in HMACs, with its algorithm before it.
pub fn name_of(public: &[u8]) -> Vec<u8> {
    [&ALG_SHA256.to_be_bytes()[..], digest::digest(&digest::SHA256, public).as_ref()].concat()
}

fn short(name: &[u8]) -> String {
    name.iter().skip(2).take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// What PCRs hold; as many calls as the TPM needs.
fn read(tpm: &mut Tpm, pcrs: Pcrs) -> Result<BTreeMap<u32, Vec<u8>>, SealError> {
    let wrong = |error| SealError::Tpm(malformed(session::PCR_READ, error));
    let mut values = BTreeMap::new();
    let mut left = pcrs;
    while !left.is_empty() {
        let answer = tpm.plain(session::PCR_READ, &left.selection())?;
        let (found, digests) = response::pcrs(&answer).map_err(wrong)?;
        let found: Vec<u32> = Pcrs(found & left.0).numbers().collect();
        if found.is_empty() || found.len() != digests.len() || digests.iter().any(|value| value.len() != 32) {
            return Err(wrong(WireError::Wrong("selection of PCRs: does the TPM have a SHA-256 bank?")));
        }
        left.0 &= !Pcrs::from_iter(found.iter().copied()).0;
        values.extend(found.into_iter().zip(digests.into_iter().map(<[u8]>::to_vec)));
    }
    Ok(values)
}

fn compare(now: &BTreeMap<u32, Vec<u8>>, then: &BTreeMap<u32, Vec<u8>>) -> Result<(), SealError> {
    let start = |value: &[u8]| value.iter().take(6).map(|byte| format!("{byte:02x}")).collect::<String>();
    let changed: Vec<String> = now
        .iter()
        .filter_map(|(number, now)| Some((number, now, then.get(number).filter(|then| *then != now)?)))
        .map(|(number, now, then)| format!("PCR {number} holds {}… and held {}…", start(now), start(then)))
        .collect();
    if changed.is_empty() { Ok(()) } else { Err(SealError::Pcrs { changed }) }
}

fn load(tpm: &mut Tpm, root: &Root, session: &mut Session, sealed: &Sealed) -> Result<u32, SealError> {
    let request = Request {
        command: session::LOAD,
        handles: [root.handle(), root.handle()],
        count: 1,
        hidden: None,
        parameters: Writer::default().sized(&sealed.private).sized(&sealed.public).done(),
        reveal: false,
    };
    match tpm.loading(session, request, &[]) {
        Ok((handle, parameters)) => {
            if response::one_field(&parameters) == Ok(&name_of(&sealed.public)) {
                return Ok(handle);
            }
            tpm.flush(handle);
            Err(TpmError::Forged { command: session::LOAD.name }.into())
        }
        // About a parameter: what is sealed, and nothing else that we sent.
        Err(TpmError::Refused { code, .. }) if code & 0x0c0 == 0x0c0 => {
            Err(SealError::Tampered { why: format!("the TPM does not take it (0x{code:03x})") })
        }
        Err(error) => Err(error.into()),
    }
}

fn open(
    tpm: &mut Tpm,
    root: &Root,
    session: &mut Session,
    handle: u32,
    sealed: &Sealed,
) -> Result<SecretBytes, SealError> {
    let name = name_of(&sealed.public);
    let object = || Handle { handle, name: &name };
    let request = Request {
        command: session::UNSEAL,
        handles: [object(), object()],
        count: 1,
        hidden: None,
        parameters: Zeroizing::default(),
        reveal: true,
    };
    let answer = match sealed.pcrs.is_empty() {
        true => tpm.in_session(session, request, &[]),
        false => {
            let mut policy = tpm.start(Kind::Policy, Some(&root.salt))?;
            let selection = sealed.pcrs.keys().copied().collect::<Pcrs>().selection();
            let body = Writer::default().long(policy.handle).sized(&values_digest(&sealed.pcrs)).raw(&selection).done();
            let agreed = tpm.plain(session::POLICY_PCR, &body);
            let answer = agreed.and_then(|_| tpm.in_session(&mut policy, request, &[]));
            tpm.flush(policy.handle);
            answer
        }
    };
    match answer {
        Ok(parameters) => {
            let secret = response::one_field(&parameters).map_err(|error| malformed(session::UNSEAL, error))?;
            Ok(SecretBytes::new(secret.to_vec()))
        }
        Err(TpmError::Refused { code: RC_AUTH_UNAVAILABLE, .. }) => {
            Err(SealError::Tampered { why: "it was sealed for PCRs, and those are not written down".into() })
        }
        Err(TpmError::Refused { code, .. }) if matches!(kind(code), RC_POLICY_FAIL | RC_VALUE | RC_PCR_CHANGED) => {
            Err(SealError::Pcrs {
                changed: vec![
                    "the TPM says that they do not (they changed at this moment, or what was written down of them did)"
                        .into(),
                ],
            })
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pcrs_are_spelled_like_this() {
        for text in ["0", "7", "0+2+7", "0+1+2+3+4+5+6+7+8+9+10+11+12+13+14+15+16+17+18+19+20+21+22+23"] {
            assert_eq!(text.parse::<Pcrs>().unwrap().to_string(), text);
        }
        assert_eq!("7+0+7".parse::<Pcrs>().unwrap().to_string(), "0+7");
        for text in ["", "+", "24", "0+", "0,7", "-1", "0x1", " 1"] {
            assert!(text.parse::<Pcrs>().is_err(), "{text}");
        }
        assert_eq!(*Pcrs::from_iter([0, 9]).selection(), [0, 0, 0, 1, 0, 0x0b, 3, 1, 2, 0]);
    }
}
