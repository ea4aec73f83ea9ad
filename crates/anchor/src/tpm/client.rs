//! The few commands that an anchor needs, over one open transport and one session.

use nacre_core::{SecretArray, SecretBytes};
use nacre_tpm::{
    RC_AUTH_FAIL, RC_BAD_AUTH, RC_HANDLE, Tpm, TpmAddress, TpmError, kind, malformed,
    response::{self, NvPublic},
    session::{self, Command, Handle, Request, Writer},
};
use ring::digest;
use zeroize::Zeroizing;

use super::{Failure, NvIndex, content, keys::Keys};

/// AUTHWRITE, WRITEALL, AUTHREAD, NO_DA: read and written by its authValue only, as a whole, without the lockout of guessers.
const ATTRIBUTES: u32 = 1 << 2 | 1 << 12 | 1 << 18 | 1 << 25;
/// The TPM sets it with the first write.
const WRITTEN: u32 = 1 << 29;
const ALG_SHA256: u16 = 0x000b;
const RH_OWNER: u32 = 0x4000_0001;

/// An index that is there.
#[derive(Debug)]
pub(super) struct Found(NvPublic);

impl Found {
    /// Whether it was written since it was defined.
    pub(super) fn is_written(&self) -> bool {
        self.0.attributes & WRITTEN != 0
    }

    /// Whether it is as we define it; the error says what is wrong.
    pub(super) fn check(&self, index: NvIndex) -> Result<(), &'static str> {
        let NvPublic { attributes, policy, size, name, .. } = &self.0;
        if self.0.index != index.number() {
            return Err("the TPM answers with another index");
        }
        if *size != content::LEN {
            return Err("it has another size than an anchor's: somebody else defined it");
        }
        if attributes & !WRITTEN != ATTRIBUTES || !policy.is_empty() {
            return Err("it has other attributes than an anchor's: others may write it, somebody defined it anew");
        }
        if *name != name_of(index, *attributes) {
            return Err("its name is not the digest of its public area: the response was changed");
        }
        Ok(())
    }
}

/// The public area of our index.
fn public(index: NvIndex, attributes: u32) -> Zeroizing<Vec<u8>> {
    Writer::default().long(index.number()).short(ALG_SHA256).long(attributes).sized(&[]).short(content::LEN).done()
}

fn name_of(index: NvIndex, attributes: u32) -> Vec<u8> {
    let digest = digest::digest(&digest::SHA256, &public(index, attributes));
    [&ALG_SHA256.to_be_bytes()[..], digest.as_ref()].concat()
}

/// A TPM, held alone, for its NV indices.
pub(super) struct Index(Tpm);

impl Index {
    pub(super) fn open(address: &TpmAddress) -> Result<Self, TpmError> {
        Tpm::open(address).map(Self)
    }

    /// Gives the session back.
    pub(super) fn end(self) {
        self.0.end();
    }

    /// The index, if there is one by that number.
    pub(super) fn find(&mut self, index: NvIndex) -> Result<Option<Found>, TpmError> {
        let command = session::NV_READ_PUBLIC;
        match self.0.plain(command, &index.number().to_be_bytes()) {
            Ok(body) => {
                let public = response::nv_public(&body).map_err(|error| malformed(command, error))?;
                Ok(Some(Found(public)))
            }
            Err(TpmError::Refused { code, .. }) if kind(code) == RC_HANDLE => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Defines the index, with the owner's authorization.
    pub(super) fn define(&mut self, index: NvIndex, keys: &Keys, owner: &SecretBytes) -> Result<Found, TpmError> {
        let public = public(index, ATTRIBUTES);
        let request = Request {
            command: session::NV_DEFINE_SPACE,
            handles: [owner_handle(), owner_handle()],
            count: 1,
            hidden: Some(SecretBytes::new(keys.auth.expose().to_vec())),
            parameters: Writer::default().sized(&public).done(),
            reveal: false,
        };
        self.0.authorized(request, owner.expose())?;
        Ok(found(index, ATTRIBUTES))
    }

    /// Removes the index, with the owner's authorization.
    pub(super) fn undefine(&mut self, index: NvIndex, found: &Found, owner: &SecretBytes) -> Result<(), TpmError> {
        let request = Request {
            command: session::NV_UNDEFINE_SPACE,
            handles: [owner_handle(), Handle { handle: index.number(), name: &found.0.name }],
            count: 2,
            hidden: None,
            parameters: Zeroizing::default(),
            reveal: false,
        };
        self.0.authorized(request, owner.expose()).map(|_| ())
    }

    /// The whole content of an index that was checked.
    pub(super) fn read(&mut self, index: NvIndex, found: &Found, keys: &Keys) -> Result<Vec<u8>, Failure> {
        let parameters = Writer::default().short(content::LEN).short(0).done();
        let command = session::NV_READ;
        let answer = self.with_index(command, index, found, &keys.auth, parameters)?;
        Ok(response::nv_content(&answer).map_err(|error| malformed(command, error))?.to_vec())
    }

    /// Writes the whole content of an index that was checked; gives the index as it is thereafter.
    pub(super) fn write(
        &mut self,
        index: NvIndex,
        before: &Found,
        keys: &Keys,
        content: &[u8],
    ) -> Result<Found, Failure> {
        let parameters = Writer::default().sized(content).short(0).done();
        self.with_index(session::NV_WRITE, index, before, &keys.auth, parameters)?;
        Ok(found(index, ATTRIBUTES | WRITTEN))
    }

    fn with_index(
        &mut self,
        command: Command,
        index: NvIndex,
        found: &Found,
        auth: &SecretArray<32>,
        parameters: Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let handle = || Handle { handle: index.number(), name: &found.0.name };
        let request =
            Request { command, handles: [handle(), handle()], count: 2, hidden: None, parameters, reveal: false };
        self.0.authorized(request, auth.expose()).map_err(|error| match error {
            TpmError::Refused { command, code } if matches!(kind(code), RC_AUTH_FAIL | RC_BAD_AUTH) => {
                Failure::NotOurs { command, code }
            }
            error => Failure::Tpm(error),
        })
    }
}

fn found(index: NvIndex, attributes: u32) -> Found {
    let name = name_of(index, attributes);
    Found(NvPublic { index: index.number(), attributes, policy: Vec::new(), size: content::LEN, name })
}

fn owner_handle() -> Handle<'static> {
    const NAME: [u8; 4] = RH_OWNER.to_be_bytes();
    Handle { handle: RH_OWNER, name: &NAME }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_index_is_used() {
        for attributes in [ATTRIBUTES, ATTRIBUTES | WRITTEN] {
            found(NvIndex::DEFAULT, attributes).check(NvIndex::DEFAULT).unwrap();
        }
        // Who else might write: the platform, the owner, a policy.
        for more in [1, 1 << 1, 1 << 3, 1 << 14, 1 << 16, 1 << 17, 1 << 27] {
            assert!(found(NvIndex::DEFAULT, ATTRIBUTES | more).check(NvIndex::DEFAULT).is_err(), "{more:#x}");
        }
        assert!(found(NvIndex::DEFAULT, ATTRIBUTES & !4).check(NvIndex::DEFAULT).is_err());
        assert!(found(NvIndex::new(0x0180_0011).unwrap(), ATTRIBUTES).check(NvIndex::DEFAULT).is_err());
        let change = |change: &dyn Fn(&mut NvPublic)| {
            let mut found = found(NvIndex::DEFAULT, ATTRIBUTES);
            change(&mut found.0);
            found.check(NvIndex::DEFAULT)
        };
        assert!(change(&|public| public.size += 1).is_err());
        assert!(change(&|public| public.policy = vec![0; 32]).is_err());
        assert!(change(&|public| public.name[5] ^= 1).is_err());
    }
}
