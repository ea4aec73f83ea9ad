//! The few commands that an anchor needs, over one open transport and one session.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use nacre_core::{SecretArray, SecretBytes};
use ring::digest;
use zeroize::Zeroizing;

use super::{
    NvIndex, TpmAddress, content,
    keys::Keys,
    response::{self, NvPublic, Response, WireError},
    session::{self, Command, Handle, Request, Session, Writer},
    transport::Transport,
};

/// AUTHWRITE, WRITEALL, AUTHREAD, NO_DA: read and written by its authValue only, as a whole, without the lockout of guessers.
const ATTRIBUTES: u32 = 1 << 2 | 1 << 12 | 1 << 18 | 1 << 25;
/// The TPM sets it with the first write.
const WRITTEN: u32 = 1 << 29;
const ALG_SHA256: u16 = 0x000b;
const RH_OWNER: u32 = 0x4000_0001;
/// How long a TPM may say that it is busy, or that writes come too often.
const BUSY_PATIENCE: Duration = Duration::from_secs(30);
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Where the handles of HMAC sessions begin, and the most that a TPM has loaded.
const FIRST_SESSION: u32 = 0x0200_0000;
const SESSIONS: u32 = 64;

const RC_HANDLE: u32 = 0x08b;
const RC_AUTH_FAIL: u32 = 0x08e;
const RC_BAD_AUTH: u32 = 0x0a2;
const RC_INITIALIZE: u32 = 0x100;
const RC_NV_SPACE: u32 = 0x14b;
const RC_NV_DEFINED: u32 = 0x14c;
const RC_SESSION_MEMORY: u32 = 0x903;
const RC_SESSION_HANDLES: u32 = 0x905;
const RC_LOCKOUT: u32 = 0x921;
/// YIELDED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE: it was not done, and is to be tried again.
const RC_BUSY: [u32; 5] = [0x908, 0x90a, 0x920, 0x922, 0x923];

/// Why a TPM did not do what an anchor asked for.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// It cannot be reached.
    #[error("cannot {action} {address}: {source}")]
    Transport {
        /// What was tried.
        action: &'static str,
        /// Where.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its response is none.
    #[error("{command}: {source}")]
    Malformed {
        /// The command.
        command: &'static str,
        /// What is wrong.
        #[source]
        source: WireError,
    },
    /// Somebody else answered, or the answer was changed on its way.
    #[error("{command}: the response was not made by the TPM for this command (its HMAC does not match)")]
    Forged {
        /// The command.
        command: &'static str,
    },
    /// The index does not know our key.
    #[error(
        "{command}: the TPM does not accept this disk's key (0x{code:03x}): the index is another disk's, or somebody defined it anew"
    )]
    NotOurs {
        /// The command.
        command: &'static str,
        /// The TPM's code.
        code: u32,
    },
    /// It said no.
    #[error("{command}: the TPM answered 0x{code:03x}{}", meaning(*.code))]
    Refused {
        /// The command.
        command: &'static str,
        /// The TPM's code.
        code: u32,
    },
}

impl TpmError {
    /// Whether somebody may have interfered, rather than something failed.
    pub(super) fn is_distrust(&self) -> bool {
        matches!(self, Self::Malformed { .. } | Self::Forged { .. } | Self::NotOurs { .. })
    }
}

/// A code without the number of the handle, session or parameter that it is about.
fn kind(code: u32) -> u32 {
    if code & 0x80 == 0 { code } else { code & 0x0bf }
}

fn meaning(code: u32) -> &'static str {
    match kind(code) {
        RC_AUTH_FAIL | RC_BAD_AUTH => ": the owner authorization is not the right one (owner-file=…)",
        RC_INITIALIZE => ": it was not started up; the firmware does that, and swtpm with --flags startup-clear",
        RC_NV_SPACE => ": it has no room for another index; remove one (tpm2_nvundefine)",
        RC_NV_DEFINED => ": the index is there already; somebody defined it at this moment",
        RC_SESSION_MEMORY | RC_SESSION_HANDLES => ": other programs hold all of its sessions; use /dev/tpmrm0",
        RC_LOCKOUT => ": it is locked after wrong authorizations",
        code if RC_BUSY.contains(&code) => ": it stayed busy",
        _ => "",
    }
}

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

/// A TPM, held alone.
pub(super) struct Tpm {
    transport: Transport,
    session: Option<Session>,
}

impl Tpm {
    pub(super) fn open(address: &TpmAddress) -> Result<Self, TpmError> {
        Ok(Self { transport: Transport::open(address)?, session: None })
    }

    /// Gives the session back.
    pub(super) fn end(mut self) {
        if let Some(session) = self.session.take() {
            self.flush(session.handle);
        }
    }

    /// A session that stays only takes room, and that is made where it is missing: nobody needs to know.
    fn flush(&mut self, handle: u32) {
        let command = session::plain(session::FLUSH_CONTEXT, &handle.to_be_bytes());
        if let Err(error) = self.transport.exchange(&command) {
            tracing::debug!(%error, "a session of the TPM was not given back");
        }
    }

    /// The index, if there is one by that number.
    pub(super) fn find(&mut self, index: NvIndex) -> Result<Option<Found>, TpmError> {
        let command = session::NV_READ_PUBLIC;
        match self.plain(command, &index.number().to_be_bytes()) {
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
        };
        self.authorized(request, owner.expose())?;
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
        };
        self.authorized(request, owner.expose()).map(|_| ())
    }

    /// The whole content of an index that was checked.
    pub(super) fn read(&mut self, index: NvIndex, found: &Found, keys: &Keys) -> Result<Vec<u8>, TpmError> {
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
    ) -> Result<Found, TpmError> {
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
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let handle = || Handle { handle: index.number(), name: &found.0.name };
        let request = Request { command, handles: [handle(), handle()], count: 2, hidden: None, parameters };
        self.authorized(request, auth.expose()).map_err(|error| match error {
            TpmError::Refused { command, code } if matches!(kind(code), RC_AUTH_FAIL | RC_BAD_AUTH) => {
                TpmError::NotOurs { command, code }
            }
            error => error,
        })
    }

    /// Carries out a command with authorization; gives the parameters of the answer, which the TPM vouched for.
    fn authorized(&mut self, request: Request<'_>, auth: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let command = request.command;
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.start()?,
        };
        let sent = session.authorize(request, auth);
        let result = self.patient(command, &sent.bytes).and_then(|bytes| {
            match response::parse(&bytes).map_err(|error| malformed(command, error))? {
                Response::Sessions { parameters, nonce, attributes, hmac } => {
                    let verified = session.verify(&sent, parameters, nonce, attributes, hmac);
                    verified.map_err(|_| TpmError::Forged { command: command.name })?;
                    Ok(Zeroizing::new(parameters.to_vec()))
                }
                Response::Plain(_) => Err(TpmError::Forged { command: command.name }),
                Response::Refused(code) => Err(TpmError::Refused { command: command.name, code }),
            }
        });
        // Also after an error, for `end` to give it back.
        self.session = Some(session);
        result
    }

    fn start(&mut self) -> Result<Session, TpmError> {
        let command = session::START_AUTH_SESSION;
        let full = |code| matches!(code, RC_SESSION_MEMORY | RC_SESSION_HANDLES);
        let body = match self.sent(command, &session::start()) {
            Err(TpmError::Refused { code, .. }) if full(code) => {
                self.flush_left_over()?;
                self.sent(command, &session::start())?
            }
            result => result?,
        };
        Session::started(&body).map_err(|error| malformed(command, error))
    }

    /// Without a resource manager, processes that were killed leave sessions behind, and three are all that a TPM has room for. We hold
    /// the TPM alone, so nobody uses those that are loaded now.
    fn flush_left_over(&mut self) -> Result<(), TpmError> {
        let command = session::GET_CAPABILITY;
        let body = Writer::default().long(1).long(FIRST_SESSION).long(SESSIONS).done();
        let body = self.plain(command, &body)?;
        let handles = response::handles(&body).map_err(|error| malformed(command, error))?;
        for handle in handles.into_iter().filter(|handle| handle >> 24 == FIRST_SESSION >> 24) {
            self.flush(handle);
        }
        Ok(())
    }

    /// Carries out a command without authorization; gives the body of the answer, which anybody may have given.
    fn plain(&mut self, command: Command, body: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        self.sent(command, &session::plain(command, body))
    }

    fn sent(&mut self, command: Command, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let bytes = self.patient(command, bytes)?;
        match response::parse(&bytes).map_err(|error| malformed(command, error))? {
            Response::Plain(body) => Ok(Zeroizing::new(body.to_vec())),
            Response::Sessions { .. } => Err(malformed(command, WireError::Wrong("tag"))),
            Response::Refused(code) => Err(TpmError::Refused { command: command.name, code }),
        }
    }

    /// Sends a command, again while the TPM says that it is busy: then it did nothing, and nonces stay as they were.
    fn patient(&mut self, command: Command, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let begin = Instant::now();
        loop {
            let answer = self.transport.exchange(bytes)?;
            match response::parse(&answer).map_err(|error| malformed(command, error))? {
                Response::Refused(code) if RC_BUSY.contains(&code) && begin.elapsed() < BUSY_PATIENCE => {
                    thread::sleep(BUSY_PAUSE);
                }
                _ => return Ok(answer),
            }
        }
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

fn malformed(command: Command, source: WireError) -> TpmError {
    TpmError::Malformed { command: command.name, source }
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

    #[test]
    fn codes_are_told_apart() {
        assert_eq!(kind(0x18b), RC_HANDLE);
        assert_eq!(kind(0x98e), RC_AUTH_FAIL);
        assert_eq!(kind(0x9a2), RC_BAD_AUTH);
        assert_eq!(kind(0x903), RC_SESSION_MEMORY);
        let refused = |code| TpmError::Refused { command: "TPM2_X", code }.to_string();
        assert!(refused(0x100).contains("startup-clear"));
        assert_eq!(refused(0x123), "TPM2_X: the TPM answered 0x123");
    }
}
