//! An anchor in an NV index of a TPM 2.0.
//!
//! # What the index is
//! An ordinary NV index of 104 bytes (docs/formats/anchor.md has them) with the attributes AUTHREAD, AUTHWRITE, WRITEALL and NO_DA,
//! and nothing else: neither the owner nor the platform reads or writes it, only who knows its authValue. That, and the key of a
//! MAC over the content, are derived from a key that the caller gives, who derives it from the disk's. The index is defined with the
//! owner's authorization (empty on a TPM that nobody took), and only for that, and to remove it, is the owner needed.
//!
//! # How it is talked to
//! Each operation opens the transport, has it alone until it ends, and uses an HMAC session (SHA-256, unbound, unsalted) with the
//! index's authValue. The TPM's HMAC covers its answer and our fresh nonce; ours covers the command, the name of the index, which is
//! a digest over its public area, and the TPM's fresh nonce. To advance is: read, compare, write, read again.
//!
//! # What who can do
//! - **Who has the disk's store**: nothing. An older copy is an error.
//! - **Who sits between us and the TPM** (bus, socket, driver) can drop, delay and repeat bytes, and answer in the TPM's place. States
//!   and commands cannot be forged, repeated later or applied to another index, since they lack the HMAC of the moment. Errors of
//!   the TPM have no HMAC: so he can stop us, and claim that the index is not there (`None`, which a disk that had an anchor must refuse).
//!   Who sits there *when the index is defined* and knows the owner's authorization (an empty one is known to everybody) reads the
//!   authValue, and can from then on restore states that he recorded; forge new ones he cannot, for want of the MAC's key. Otherwise
//!   the authValue is encrypted under the owner's authorization.
//! - **The TPM's owner** (whoever has the owner authorization) can remove the index, and define another one by its number: the disk
//!   stops. He cannot bring an older state back, as he has neither authValue nor the MAC's key.
//! - **Who can turn back the TPM itself** turns the anchor back, unseen. No attack is known on chips and on TPMs within a TEE (an
//!   SVSM's), but the state of a software TPM is files: whoever copies swtpm's directory back, or is the host of a plain virtual TPM,
//!   undoes what the anchor remembers. Such a TPM protects from everyone but its host.
//!
//! # Limits
//! - One writer: two guests share a TPM only by mistake. The transport is held alone from the comparison to the last read (swtpm serves
//!   one connection at a time, `/dev/tpm0` can be open once, `/dev/tpmrm0` is locked with flock), which keeps apart programs of ours;
//!   a resource manager that mixes commands of several programs into one TPM and knows no lock does not. Who lost such a race is told
//!   by the read at the end, or at the next advance.
//! - NV memory wears out: chips promise some 100,000 writes of an index, and slow down when they come too often. A disk that moves its
//!   anchor on at every flush can reach that in a day; it has settings (a time, or only on close) that leave a window open instead.

mod client;
mod content;
mod keys;

use std::{fmt, str::FromStr, sync::Arc, sync::Mutex};

use nacre_core::{Anchor, AnchorError, AnchorState, SecretArray, SecretBytes};

use client::{Found, Index};
use keys::Keys;
pub use nacre_tpm::{TpmAddress, TpmError, WireError};

use crate::file::compare;

/// The number of an NV index, in the range that the TCG leaves to owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvIndex(u32);

impl NvIndex {
    /// Where nobody says another. One index serves one disk.
    pub const DEFAULT: Self = Self(0x0180_0010);
    const OWNERS: std::ops::RangeInclusive<u32> = 0x0180_0000..=0x01bf_ffff;

    /// The index of that number; `None` outside of 0x01800000 to 0x01bfffff.
    pub fn new(number: u32) -> Option<Self> {
        Self::OWNERS.contains(&number).then_some(Self(number))
    }

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl FromStr for NvIndex {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let number = number.filter(|_| !text.contains('+')).and_then(Self::new);
        number.ok_or_else(|| format!("{text:?} is no NV index of an owner: 0x01800000 to 0x01bfffff"))
    }
}

impl fmt::Display for NvIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

/// An anchor in an NV index of a TPM 2.0.
#[derive(Debug)]
pub struct TpmAnchor {
    address: TpmAddress,
    index: NvIndex,
    keys: Keys,
    owner: SecretBytes,
    /// Threads of this process take turns.
    turn: Mutex<()>,
}

impl TpmAnchor {
    /// The anchor at that index. `key` is the disk's for this purpose and no other; `owner` is the TPM's owner authorization, mostly
    /// empty, for the first state and for [`forget`](Self::forget).
    pub fn new(address: TpmAddress, index: NvIndex, key: &SecretArray<32>, owner: SecretBytes) -> Self {
        Self { address, index, keys: Keys::derive(key), owner, turn: Mutex::new(()) }
    }

    /// Removes the index, whoever defined it, for a disk that is made anew; nothing happens where there is none.
    ///
    /// # Errors
    /// [`AnchorError`]
    pub fn forget(&self) -> Result<(), AnchorError> {
        self.with(|tpm| match tpm.find(self.index)? {
            None => Ok(()),
            Some(found) => Ok(tpm.undefine(self.index, &found, &self.owner)?),
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Index) -> Result<T, Failure>) -> Result<T, AnchorError> {
        // A thread that died held nothing that could be half done: what counts is in the TPM.
        let _turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let result = Index::open(&self.address).map_err(Failure::Tpm).and_then(|mut tpm| {
            let result = work(&mut tpm);
            tpm.end();
            result
        });
        let anchor = self.describe();
        result.map_err(|failure| match failure {
            Failure::Anchor(error) => error,
            Failure::Content(what) => AnchorError::Untrusted { anchor, what: what.into() },
            Failure::NotOurs { command, code } => AnchorError::Untrusted {
                anchor,
                what: format!(
                    "{command}: the TPM does not accept this disk's key (0x{code:03x}): the index is another disk's, or somebody defined it anew"
                ),
            },
            Failure::Tpm(error) if error.is_distrust() => AnchorError::Untrusted { anchor, what: error.to_string() },
            Failure::Tpm(error) => {
                AnchorError::Failed { anchor, what: "the TPM did not do it".into(), source: Arc::new(error) }
            }
        })
    }

    /// The index, and what it holds; `None` where it is not there, or was never written.
    fn read_with(&self, tpm: &mut Index) -> Result<(Option<Found>, Option<AnchorState>), Failure> {
        let Some(found) = tpm.find(self.index)? else { return Ok((None, None)) };
        found.check(self.index).map_err(Failure::Content)?;
        let state = match found.is_written() {
            true => Some(self.content(tpm, &found)?),
            false => None,
        };
        Ok((Some(found), state))
    }

    fn content(&self, tpm: &mut Index, found: &Found) -> Result<AnchorState, Failure> {
        let bytes = tpm.read(self.index, found, &self.keys)?;
        content::open(&bytes, self.index, &self.keys).map_err(Failure::Content)
    }

    fn advance_with(&self, tpm: &mut Index, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), Failure> {
        let (found, state) = self.read_with(tpm)?;
        compare(expected, state.as_ref(), &self.describe()).map_err(Failure::Anchor)?;
        let found = match found {
            Some(found) => found,
            None => tpm.define(self.index, &self.keys, &self.owner)?,
        };
        let written = tpm.write(self.index, &found, &self.keys, &content::seal(next, self.index, &self.keys))?;
        let now = self.content(tpm, &written)?;
        compare(Some(next), Some(&now), &self.describe()).map_err(Failure::Anchor)
    }
}

/// What ends an operation early.
enum Failure {
    /// The TPM, or the way to it.
    Tpm(TpmError),
    /// The index does not know our key.
    NotOurs {
        /// The command.
        command: &'static str,
        /// The TPM's code.
        code: u32,
    },
    /// What the index is or holds.
    Content(&'static str),
    /// What was found is not what was expected.
    Anchor(AnchorError),
}

impl From<TpmError> for Failure {
    fn from(error: TpmError) -> Self {
        Self::Tpm(error)
    }
}

impl Anchor for TpmAnchor {
    fn read(&self) -> Result<Option<AnchorState>, AnchorError> {
        self.with(|tpm| Ok(self.read_with(tpm)?.1))
    }

    fn advance(&self, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), AnchorError> {
        self.with(|tpm| self.advance_with(tpm, expected, next))
    }

    fn describe(&self) -> String {
        format!("TPM {}, NV index {}", self.address, self.index)
    }

    fn promise(&self) -> String {
        format!(
            "an older copy of the disk is refused, as long as nobody can turn back the TPM at {} itself: the host of a software TPM \
             (swtpm, a plain virtual TPM) can, a chip and a TPM within a TEE resist; the TPM's owner can stop the disk by removing the \
             index, and who reads the TPM's bus can stop it too, but neither can bring back a state",
            self.address
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_the_owners() {
        assert_eq!("0x01800010".parse(), Ok(NvIndex::DEFAULT));
        assert_eq!("0x1800010".parse(), Ok(NvIndex::DEFAULT));
        assert_eq!(NvIndex::DEFAULT.to_string(), "0x01800010");
        for bad in
            ["", "0x", "01800010", "25165840", "0x01c00002", "0x017fffff", "0x101800010", "0x+1800010", "0x01800010 "]
        {
            assert!(bad.parse::<NvIndex>().is_err(), "{bad}");
        }
    }
}
