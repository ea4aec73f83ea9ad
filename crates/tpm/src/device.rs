//! A TPM, held alone: commands, with the patience that chips need, and a session that is made when it is needed first.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use crate::{
    TpmAddress,
    response::{self, Response, WireError},
    session::{self, Command, Request, Session, Writer},
    transport::Transport,
};

/// How long a TPM may say that it is busy, or that writes come too often.
const BUSY_PATIENCE: Duration = Duration::from_secs(30);
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Where the handles of HMAC sessions begin, and the most that a TPM has loaded.
const FIRST_SESSION: u32 = 0x0200_0000;
const SESSIONS: u32 = 64;

/// There is nothing by that handle.
pub const RC_HANDLE: u32 = 0x08b;
/// The authorization is not the right one.
pub const RC_AUTH_FAIL: u32 = 0x08e;
/// The authorization is not the right one, of something without lockout.
pub const RC_BAD_AUTH: u32 = 0x0a2;
const RC_INITIALIZE: u32 = 0x100;
const RC_NV_SPACE: u32 = 0x14b;
const RC_NV_DEFINED: u32 = 0x14c;
const RC_SESSION_MEMORY: u32 = 0x903;
const RC_SESSION_HANDLES: u32 = 0x905;
const RC_LOCKOUT: u32 = 0x921;
/// YIELDED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE: it was not done, and is to be tried again.
const RC_BUSY: [u32; 5] = [0x908, 0x90a, 0x920, 0x922, 0x923];

/// Why a TPM did not do what it was asked for.
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
    pub fn is_distrust(&self) -> bool {
        matches!(self, Self::Malformed { .. } | Self::Forged { .. })
    }
}

/// A code without the number of the handle, session or parameter that it is about.
pub fn kind(code: u32) -> u32 {
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

/// A TPM, held alone.
pub struct Tpm {
    transport: Transport,
    session: Option<Session>,
}

impl std::fmt::Debug for Tpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tpm").finish_non_exhaustive()
    }
}

impl Tpm {
    /// Opens the way to a TPM, and waits for its turn.
    ///
    /// # Errors
    /// [`TpmError::Transport`].
    pub fn open(address: &TpmAddress) -> Result<Self, TpmError> {
        Ok(Self { transport: Transport::open(address)?, session: None })
    }

    /// Gives the session back.
    pub fn end(mut self) {
        if let Some(session) = self.session.take() {
            self.flush(session.handle);
        }
    }

    /// Forgets a session or an object. One that stays only takes room, and that is made where it is missing: nobody needs to know.
    pub fn flush(&mut self, handle: u32) {
        let command = session::plain(session::FLUSH_CONTEXT, &handle.to_be_bytes());
        if let Err(error) = self.transport.exchange(&command) {
            tracing::debug!(%error, "a session or an object of the TPM was not given back");
        }
    }

    /// Carries out a command with authorization; gives the parameters of the answer, which the TPM vouched for.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn authorized(&mut self, request: Request<'_>, auth: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
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
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn plain(&mut self, command: Command, body: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        self.sent(command, &session::plain(command, body))
    }

    /// Carries out a command that an empty password authorizes; gives the parameters of the answer, which anybody may have given.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn by_empty_password(
        &mut self,
        command: Command,
        handle: u32,
        parameters: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let bytes = self.patient(command, &session::by_empty_password(command, handle, parameters))?;
        match response::parse(&bytes).map_err(|error| malformed(command, error))? {
            Response::Sessions { parameters, .. } => Ok(Zeroizing::new(parameters.to_vec())),
            Response::Plain(_) => Err(malformed(command, WireError::Wrong("tag"))),
            Response::Refused(code) => Err(TpmError::Refused { command: command.name, code }),
        }
    }

    /// Makes a primary key of a hierarchy with an empty password; gives its handle, to be [flushed](Self::flush), and the parameters of
    /// the answer.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn create_primary(&mut self, hierarchy: u32, parameters: &[u8]) -> Result<(u32, Vec<u8>), TpmError> {
        let command = session::CREATE_PRIMARY;
        let bytes = self.transport.exchange(&session::by_empty_password(command, hierarchy, parameters))?;
        match response::with_handle(&bytes).map_err(|error| malformed(command, error))? {
            Ok((handle, parameters)) => Ok((handle, parameters.to_vec())),
            Err(code) => Err(TpmError::Refused { command: command.name, code }),
        }
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

/// An answer that is none.
pub fn malformed(command: Command, source: WireError) -> TpmError {
    TpmError::Malformed { command: command.name, source }
}

#[cfg(test)]
mod tests {
    use super::*;

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
