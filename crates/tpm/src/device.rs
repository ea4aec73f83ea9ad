//! A TPM, held alone: commands, with the patience that chips need, and a session that is made when it is needed first.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use crate::{
    TpmAddress,
    response::{self, Response, WireError},
    session::{self, Authorized, Command, Kind, Request, SaltKey, Session, Writer},
    transport::Transport,
};

/// How long a TPM may say that it is busy, or that writes come too often.
const BUSY_PATIENCE: Duration = Duration::from_secs(30);
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Where the handles of HMAC sessions begin, and the most that a TPM has loaded.
const FIRST_SESSION: u32 = 0x0200_0000;
const SESSIONS: u32 = 64;
/// Where the handles of loaded objects begin.
const FIRST_OBJECT: u32 = 0x8000_0000;

/// There is nothing by that handle.
pub const RC_HANDLE: u32 = 0x08b;
/// The authorization is not the right one.
pub const RC_AUTH_FAIL: u32 = 0x08e;
/// The authorization is not the right one, of something without lockout.
pub const RC_BAD_AUTH: u32 = 0x0a2;
const RC_INITIALIZE: u32 = 0x100;
const RC_NV_SPACE: u32 = 0x14b;
const RC_NV_DEFINED: u32 = 0x14c;
const RC_OBJECT_MEMORY: u32 = 0x902;
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
        RC_OBJECT_MEMORY => ": other programs hold all of its room for objects; use /dev/tpmrm0",
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
    /// The objects that we loaded.
    objects: Vec<u32>,
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
        Ok(Self { transport: Transport::open(address)?, session: None, objects: Vec::new() })
    }

    /// Gives the session back.
    pub fn end(mut self) {
        if let Some(session) = self.session.take() {
            self.flush(session.handle);
        }
    }

    /// Forgets a session or an object. One that stays only takes room, and that is made where it is missing: nobody needs to know.
    pub fn flush(&mut self, handle: u32) {
        self.objects.retain(|object| *object != handle);
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
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.start(Kind::Hmac, None)?,
        };
        let result = self.in_session(&mut session, request, auth);
        // Also after an error, for `end` to give it back.
        self.session = Some(session);
        result
    }

    /// Carries out a command with authorization in a session; gives the parameters of the answer, which the TPM vouched for.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn in_session(
        &mut self,
        session: &mut Session,
        request: Request<'_>,
        auth: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let command = request.command;
        let sent = session.authorize(request, auth);
        let bytes = self.patient(command, &sent.bytes)?;
        verified(session, &sent, command, response::parse(&bytes).map_err(|error| malformed(command, error))?)
    }

    /// As [`in_session`](Self::in_session), of a command that loads an object: gives its handle too, to be [flushed](Self::flush). It is the
    /// one thing that the TPM does not vouch for.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn loading(
        &mut self,
        session: &mut Session,
        request: Request<'_>,
        auth: &[u8],
    ) -> Result<(u32, Zeroizing<Vec<u8>>), TpmError> {
        let command = request.command;
        let sent = session.authorize(request, auth);
        let bytes = self.patient(command, &sent.bytes)?;
        let (handle, answer) = response::with_handle(&bytes).map_err(|error| malformed(command, error))?;
        let parameters = verified(session, &sent, command, answer)?;
        self.objects.push(handle);
        Ok((handle, parameters))
    }

    /// Starts a session of one's own, to be [flushed](Self::flush).
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn start(&mut self, kind: Kind, salted: Option<&SaltKey>) -> Result<Session, TpmError> {
        let command = session::START_AUTH_SESSION;
        let starting = session::start(kind, salted).map_err(|error| malformed(command, error))?;
        let full = |code| matches!(code, RC_SESSION_MEMORY | RC_SESSION_HANDLES);
        let body = match self.sent(command, &starting.bytes) {
            Err(TpmError::Refused { code, .. }) if full(code) => {
                self.flush_left_over(FIRST_SESSION)?;
                self.sent(command, &starting.bytes)?
            }
            result => result?,
        };
        Session::started(&starting, &body).map_err(|error| malformed(command, error))
    }

    /// Makes room for objects: what others left behind is forgotten.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn make_room(&mut self) -> Result<(), TpmError> {
        self.flush_left_over(FIRST_OBJECT)
    }

    /// Without a resource manager, processes that were killed leave sessions and objects behind, and three of each are all that a TPM has room
    /// for. We hold the TPM alone, so nobody uses those that are loaded now and are not ours.
    fn flush_left_over(&mut self, first: u32) -> Result<(), TpmError> {
        let command = session::GET_CAPABILITY;
        let body = Writer::default().long(1).long(first).long(SESSIONS).done();
        let body = self.plain(command, &body)?;
        let handles = response::handles(&body).map_err(|error| malformed(command, error))?;
        for handle in handles.into_iter().filter(|handle| handle >> 24 == first >> 24) {
            if !self.objects.contains(&handle) {
                self.flush(handle);
            }
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

    /// As [`by_empty_password`](Self::by_empty_password), of a command that is about another handle too.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn by_empty_password_about(
        &mut self,
        command: Command,
        handle: u32,
        about: u32,
        parameters: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let bytes = session::by_empty_password_about(command, handle, about, parameters);
        let answer = self.patient(command, &bytes)?;
        match response::parse(&answer).map_err(|error| malformed(command, error))? {
            Response::Sessions { parameters, .. } => Ok(Zeroizing::new(parameters.to_vec())),
            Response::Plain(_) => Err(malformed(command, WireError::Wrong("tag"))),
            Response::Refused(code) => Err(TpmError::Refused { command: command.name, code }),
        }
    }

    /// Carries out a command that an empty password and a policy authorize; gives the parameters of the answer, which anybody may have given.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn by_password_and_policy(
        &mut self,
        command: Command,
        handles: [u32; 2],
        policy: &Session,
        parameters: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let bytes = session::by_password_and_policy(command, handles, policy, parameters);
        let answer = self.patient(command, &bytes)?;
        match response::with_two_sessions(&answer).map_err(|error| malformed(command, error))? {
            Ok(parameters) => Ok(Zeroizing::new(parameters.to_vec())),
            Err(code) => Err(TpmError::Refused { command: command.name, code }),
        }
    }

    /// Lets a policy know that the authorization of a hierarchy, an empty password, was given.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn policy_secret(&mut self, hierarchy: u32, policy: &Session) -> Result<(), TpmError> {
        let command = session::POLICY_SECRET;
        // No nonce, no hash of a command, no reference, no end.
        let parameters = Writer::default().sized(&[]).sized(&[]).sized(&[]).long(0).done();
        self.by_empty_password_about(command, hierarchy, policy.handle, &parameters).map(drop)
    }

    /// Makes a primary key of a hierarchy with an empty password; gives its handle, to be [flushed](Self::flush), and the parameters of
    /// the answer.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn create_primary(&mut self, hierarchy: u32, parameters: &[u8]) -> Result<(u32, Vec<u8>), TpmError> {
        let command = session::CREATE_PRIMARY;
        let bytes = session::by_empty_password(command, hierarchy, parameters);
        let mut answer = self.patient(command, &bytes)?;
        if response::code(&answer) == Ok(RC_OBJECT_MEMORY) {
            self.flush_left_over(FIRST_OBJECT)?;
            answer = self.patient(command, &bytes)?;
        }
        match response::with_handle(&answer).map_err(|error| malformed(command, error))? {
            (_, Response::Refused(code)) => Err(TpmError::Refused { command: command.name, code }),
            (_, Response::Plain(_)) => Err(malformed(command, WireError::Wrong("tag"))),
            (handle, Response::Sessions { parameters, .. }) => {
                self.objects.push(handle);
                Ok((handle, parameters.to_vec()))
            }
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
            let code = response::code(&answer).map_err(|error| malformed(command, error))?;
            if !RC_BUSY.contains(&code) || begin.elapsed() >= BUSY_PATIENCE {
                return Ok(answer);
            }
            thread::sleep(BUSY_PAUSE);
        }
    }
}

/// The parameters of an answer that the TPM gave to that very command.
fn verified(
    session: &mut Session,
    sent: &Authorized,
    command: Command,
    answer: Response<'_>,
) -> Result<Zeroizing<Vec<u8>>, TpmError> {
    match answer {
        Response::Sessions { parameters, nonce, attributes, hmac } => session
            .verify(sent, parameters, nonce, attributes, hmac)
            .map_err(|_| TpmError::Forged { command: command.name }),
        Response::Plain(_) => Err(TpmError::Forged { command: command.name }),
        Response::Refused(code) => Err(TpmError::Refused { command: command.name, code }),
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
