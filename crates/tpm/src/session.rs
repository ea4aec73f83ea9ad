//! Commands, marshalled, and HMAC sessions (TPM 2.0 Library, part 1 §19).
//!
//! ```text
//! tag u16 ‖ size u32 ‖ command u32 ‖ handles ‖ [length u32 ‖ session u32 ‖ nonce ‖ attributes u8 ‖ HMAC] ‖ parameters
//! cpHash = SHA-256(command ‖ names of the handles ‖ parameters)
//! rpHash = SHA-256(code ‖ command ‖ parameters)
//! HMAC   = HMAC-SHA256(authValue, hash ‖ nonce of who speaks ‖ nonce of who listens ‖ attributes)
//! ```
//!
//! Sessions are not bound. The key of the HMAC is the session's key, which is empty unless the session is salted, and the authValue, which is
//! 32 random bytes for an index. Nonces are fresh in each direction, so an answer belongs to one command.
//!
//! A salt is agreed upon with a key that the TPM has (P-256, §24.6.1 and part 1 annex C.6.1), so that only that TPM knows the session's key:
//!
//! ```text
//! salt = KDFe(Z.x, "SECRET", our x, its x)        session's key = KDFa(salt, "ATH", its nonce, ours)
//! ```
//!
//! The first parameter of a command or of its answer can be hidden (XOR obfuscation, §21.2): it is XORed with
//! KDFa(session's key ‖ authValue, "XOR", nonce of who speaks, nonce of who listens).

use nacre_core::SecretBytes;
use ring::{agreement, digest, hmac, rand::SystemRandom};
use zeroize::Zeroizing;

use crate::response::{self, WireError};

/// A command of the TPM.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    code: u32,
    /// As the standard calls it.
    pub name: &'static str,
}

/// Removes an index.
pub const NV_UNDEFINE_SPACE: Command = Command { code: 0x0122, name: "TPM2_NV_UndefineSpace" };
/// Defines an index.
pub const NV_DEFINE_SPACE: Command = Command { code: 0x012a, name: "TPM2_NV_DefineSpace" };
/// Writes an index.
pub const NV_WRITE: Command = Command { code: 0x0137, name: "TPM2_NV_Write" };
/// Reads an index.
pub const NV_READ: Command = Command { code: 0x014e, name: "TPM2_NV_Read" };
/// Forgets a session or an object.
pub const FLUSH_CONTEXT: Command = Command { code: 0x0165, name: "TPM2_FlushContext" };
/// What an index is.
pub const NV_READ_PUBLIC: Command = Command { code: 0x0169, name: "TPM2_NV_ReadPublic" };
/// Starts a session.
pub const START_AUTH_SESSION: Command = Command { code: 0x0176, name: "TPM2_StartAuthSession" };
/// What the TPM has.
pub const GET_CAPABILITY: Command = Command { code: 0x017a, name: "TPM2_GetCapability" };
/// Makes an object below a key.
pub const CREATE: Command = Command { code: 0x0153, name: "TPM2_Create" };
/// Loads what TPM2_Create made.
pub const LOAD: Command = Command { code: 0x0157, name: "TPM2_Load" };
/// Gives a sealed secret.
pub const UNSEAL: Command = Command { code: 0x015e, name: "TPM2_Unseal" };
/// Proves that two keys are of one TPM.
pub const ACTIVATE_CREDENTIAL: Command = Command { code: 0x0147, name: "TPM2_ActivateCredential" };
/// Lets a policy be fulfilled by the authorization of something.
pub const POLICY_SECRET: Command = Command { code: 0x0151, name: "TPM2_PolicySecret" };
/// Lets a policy be fulfilled by what PCRs hold.
pub const POLICY_PCR: Command = Command { code: 0x017f, name: "TPM2_PolicyPCR" };
/// Makes a key from a hierarchy's seed.
pub const CREATE_PRIMARY: Command = Command { code: 0x0131, name: "TPM2_CreatePrimary" };
/// Signs PCRs.
pub const QUOTE: Command = Command { code: 0x0158, name: "TPM2_Quote" };
/// The public half of a key.
pub const READ_PUBLIC: Command = Command { code: 0x0173, name: "TPM2_ReadPublic" };
/// Reads PCRs.
pub const PCR_READ: Command = Command { code: 0x017e, name: "TPM2_PCR_Read" };
/// Extends a PCR.
pub const PCR_EXTEND: Command = Command { code: 0x0182, name: "TPM2_PCR_Extend" };

const TAG_PLAIN: u16 = 0x8001;
const TAG_SESSIONS: u16 = 0x8002;
const RH_NULL: u32 = 0x4000_0007;
/// A password in place of a session.
const RS_PW: u32 = 0x4000_0009;
const ALG_XOR: u16 = 0x000a;
const ALG_SHA256: u16 = 0x000b;
const NONCE_LEN: usize = 32;
/// The session goes on after the command.
const CONTINUE: u8 = 0x01;
/// The command's first parameter is hidden.
const DECRYPT: u8 = 0x20;
/// The answer's first parameter is hidden.
const ENCRYPT: u8 = 0x40;

/// Numbers and byte strings as a TPM wants them.
#[derive(Default)]
pub struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    /// One byte.
    pub fn byte(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    /// Two bytes.
    pub fn short(self, value: u16) -> Self {
        self.raw(&value.to_be_bytes())
    }

    /// Four bytes.
    pub fn long(self, value: u32) -> Self {
        self.raw(&value.to_be_bytes())
    }

    /// Bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A length, and that many bytes. All that we send is a few hundred bytes at most.
    pub fn sized(self, bytes: &[u8]) -> Self {
        let Ok(length) = u16::try_from(bytes.len()) else { unreachable!("no field of ours has 64 KiB") };
        self.short(length).raw(bytes)
    }

    /// All of it.
    pub fn done(self) -> Zeroizing<Vec<u8>> {
        self.0
    }
}

/// A command without authorization.
pub fn plain(command: Command, body: &[u8]) -> Zeroizing<Vec<u8>> {
    framed(TAG_PLAIN, command, body)
}

fn framed(tag: u16, command: Command, body: &[u8]) -> Zeroizing<Vec<u8>> {
    let Ok(length) = u32::try_from(response::HEADER_LEN + body.len()) else {
        unreachable!("no command of ours has 4 GiB")
    };
    Writer::default().short(tag).long(length).long(command.code).raw(body).done()
}

/// A command that somebody without a password authorizes: of an empty hierarchy, or of a PCR. `handle` is what he is asked for.
pub fn by_empty_password(command: Command, handle: u32, parameters: &[u8]) -> Zeroizing<Vec<u8>> {
    let area = Writer::default().long(RS_PW).sized(&[]).byte(0).sized(&[]).done();
    let Ok(length) = u32::try_from(area.len()) else { unreachable!("the area of one password is small") };
    framed(TAG_SESSIONS, command, &Writer::default().long(handle).long(length).raw(&area).raw(parameters).done())
}

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Authorization by a secret.
    Hmac = 0,
    /// Authorization by a policy.
    Policy = 1,
}

/// A key of the TPM's that a salt is agreed upon with: P-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaltKey {
    /// Its handle.
    pub handle: u32,
    /// The point.
    pub x: Vec<u8>,
    /// The point.
    pub y: Vec<u8>,
}

/// A session that is about to start.
pub struct Starting {
    /// What is sent.
    pub bytes: Zeroizing<Vec<u8>>,
    nonce: [u8; NONCE_LEN],
    salt: Zeroizing<Vec<u8>>,
}

/// The command that starts a session, salted where there is a key for that.
///
/// # Errors
/// [`WireError`]: the key is no point of P-256.
pub fn start(kind: Kind, salted: Option<&SaltKey>) -> Result<Starting, WireError> {
    let nonce = nonce();
    let (key, salt, secret) = match salted {
        Some(key) => {
            let (salt, secret) = salt(key)?;
            (key.handle, salt, secret)
        }
        None => (RH_NULL, Zeroizing::default(), Zeroizing::default()),
    };
    let body = Writer::default().long(key).long(RH_NULL).sized(&nonce).sized(&secret).byte(kind as u8);
    let bytes = plain(START_AUTH_SESSION, &body.short(ALG_XOR).short(ALG_SHA256).short(ALG_SHA256).done());
    Ok(Starting { bytes, nonce, salt })
}

/// A salt, and our half of how the TPM comes to it.
fn salt(key: &SaltKey) -> Result<(Secret, Secret), WireError> {
    let wrong = || WireError::Wrong("key: it is no point of P-256");
    let ours = agreement::EphemeralPrivateKey::generate(&agreement::ECDH_P256, &SystemRandom::new());
    let Ok(ours) = ours else { unreachable!("the system has random numbers") };
    let Ok(public) = ours.compute_public_key() else { unreachable!("a private key has a public half") };
    let (x, y) = public.as_ref().get(1..).and_then(|point| point.split_at_checked(32)).ok_or_else(wrong)?;
    let padded = |number: &[u8]| Some([&vec![0; usize::checked_sub(32, number.len())?][..], number].concat());
    let (theirs_x, theirs_y) = padded(&key.x).zip(padded(&key.y)).ok_or_else(wrong)?;
    let theirs = agreement::UnparsedPublicKey::new(&agreement::ECDH_P256, [&[4][..], &theirs_x, &theirs_y].concat());
    let salt = agreement::agree_ephemeral(ours, &theirs, |z| kdfe(z, b"SECRET\0", x, &key.x)).map_err(|_| wrong())?;
    Ok((salt, Writer::default().sized(x).sized(y).done()))
}

/// KDFe with SHA-256, of as many bits.
fn kdfe(z: &[u8], label: &[u8], ours: &[u8], theirs: &[u8]) -> Zeroizing<Vec<u8>> {
    let hash = digest::digest(&digest::SHA256, &Zeroizing::new([&[0, 0, 0, 1], z, label, ours, theirs].concat()));
    Zeroizing::new(hash.as_ref().to_vec())
}

/// KDFa with HMAC-SHA256, of 256 bits.
fn kdfa(key: &[u8], label: &[u8], newer: &[u8], older: &[u8]) -> Zeroizing<Vec<u8>> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let message = [&[0, 0, 0, 1], label, newer, older, &256_u32.to_be_bytes()].concat();
    Zeroizing::new(hmac::sign(&key, &message).as_ref().to_vec())
}

/// A command with a password that is empty for its first handle, and a policy session, which needs no HMAC, for its second one.
pub fn by_password_and_policy(
    command: Command,
    handles: [u32; 2],
    policy: &Session,
    parameters: &[u8],
) -> Zeroizing<Vec<u8>> {
    let area = Writer::default().long(RS_PW).sized(&[]).byte(0).sized(&[]);
    let area = area.long(policy.handle).sized(&[]).byte(CONTINUE).sized(&[]).done();
    let Ok(length) = u32::try_from(area.len()) else { unreachable!("the area of two sessions is small") };
    let [first, second] = handles;
    let body = Writer::default().long(first).long(second).long(length).raw(&area).raw(parameters).done();
    framed(TAG_SESSIONS, command, &body)
}

/// A command that an empty password authorizes and that is about another handle too, as a policy.
pub fn by_empty_password_about(command: Command, handle: u32, about: u32, parameters: &[u8]) -> Zeroizing<Vec<u8>> {
    let area = Writer::default().long(RS_PW).sized(&[]).byte(0).sized(&[]).done();
    let Ok(length) = u32::try_from(area.len()) else { unreachable!("the area of one password is small") };
    let body = Writer::default().long(handle).long(about).long(length).raw(&area).raw(parameters).done();
    framed(TAG_SESSIONS, command, &body)
}

fn nonce() -> [u8; NONCE_LEN] {
    use rand_core::RngCore as _;
    let mut nonce = [0; NONCE_LEN];
    rand_core::OsRng.fill_bytes(&mut nonce);
    nonce
}

/// What a command acts on, and the name that stands for it in HMACs.
pub struct Handle<'a> {
    /// Its number.
    pub handle: u32,
    /// Its name: of what the TPM has a public area, the digest of that; otherwise its number.
    pub name: &'a [u8],
}

/// Bytes that are forgotten after their use.
type Secret = Zeroizing<Vec<u8>>;

/// What is sent: the handles (the first one is the one whose authorization is needed), and the parameters.
pub struct Request<'a> {
    /// Which command.
    pub command: Command,
    /// What it acts on.
    pub handles: [Handle<'a>; 2],
    /// How many of the handles count.
    pub count: usize,
    /// The first parameter, where it has to be hidden: its bytes without their length.
    pub hidden: Option<SecretBytes>,
    /// The parameters, but for the hidden one.
    pub parameters: Zeroizing<Vec<u8>>,
    /// Whether the first parameter of the answer has to be hidden.
    pub reveal: bool,
}

/// A session that the TPM has.
pub struct Session {
    /// Its number.
    pub handle: u32,
    /// The TPM's last nonce.
    nonce: Vec<u8>,
    /// Empty where it is not salted.
    key: Zeroizing<Vec<u8>>,
}

/// A command that was authorized, and what its answer will be checked with.
pub struct Authorized {
    /// What is sent.
    pub bytes: Zeroizing<Vec<u8>>,
    command: Command,
    nonce: [u8; NONCE_LEN],
    key: hmac::Key,
    reveal: bool,
}

impl Session {
    /// What the TPM answered to [`start`].
    ///
    /// # Errors
    /// [`WireError`].
    pub fn started(starting: &Starting, body: &[u8]) -> Result<Self, WireError> {
        let (handle, nonce) = response::started_session(body)?;
        let key = match starting.salt.is_empty() {
            true => Zeroizing::default(),
            false => kdfa(&starting.salt, b"ATH\0", nonce, &starting.nonce),
        };
        Ok(Self { handle, nonce: nonce.to_vec(), key })
    }

    /// Authorizes a command by who knows `auth`.
    pub fn authorize(&self, request: Request<'_>, auth: &[u8]) -> Authorized {
        let nonce = nonce();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &Zeroizing::new([&self.key[..], auth].concat()));
        let mut attributes = if request.reveal { CONTINUE | ENCRYPT } else { CONTINUE };
        let mut parameters = Writer::default();
        if let Some(hidden) = request.hidden {
            attributes |= DECRYPT;
            parameters = parameters.sized(&xor(&key, &nonce, &self.nonce, hidden.expose()));
        }
        let parameters = parameters.raw(&request.parameters).done();
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(&request.command.code.to_be_bytes());
        let mut body = Writer::default();
        for Handle { handle, name } in request.handles.iter().take(request.count) {
            hash.update(name);
            body = body.long(*handle);
        }
        hash.update(&parameters);
        let tag = tag(&key, hash.finish().as_ref(), &nonce, &self.nonce, attributes);
        let area = Writer::default().long(self.handle).sized(&nonce).byte(attributes).sized(tag.as_ref()).done();
        let Ok(length) = u32::try_from(area.len()) else { unreachable!("the area of one session is small") };
        let body = body.long(length).raw(&area).raw(&parameters).done();
        let (command, reveal) = (request.command, request.reveal);
        Authorized { bytes: framed(TAG_SESSIONS, command, &body), command, nonce, key, reveal }
    }

    /// Whether the TPM answered to that very command; then the session goes on with its new nonce. Gives the parameters of the answer, the
    /// first one as it is where it was hidden.
    ///
    /// # Errors
    /// [`Forged`].
    pub fn verify(
        &mut self,
        sent: &Authorized,
        parameters: &[u8],
        nonce: &[u8],
        attributes: u8,
        tag: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Forged> {
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(&[0; 4]);
        hash.update(&sent.command.code.to_be_bytes());
        hash.update(parameters);
        let message = [hash.finish().as_ref(), nonce, &sent.nonce, &[attributes]].concat();
        hmac::verify(&sent.key, &message, tag).map_err(|_| Forged)?;
        self.nonce = nonce.to_vec();
        let mut parameters = Zeroizing::new(parameters.to_vec());
        if sent.reveal {
            // A field with its length, which is not hidden.
            let (length, rest) = parameters.split_first_chunk_mut::<2>().ok_or(Forged)?;
            let hidden = rest.get_mut(..usize::from(u16::from_be_bytes(*length))).ok_or(Forged)?;
            let plain = xor(&sent.key, nonce, &sent.nonce, hidden);
            hidden.copy_from_slice(&plain);
        }
        Ok(parameters)
    }
}

/// The answer was not given by the TPM, or not to this command.
#[derive(Debug)]
pub struct Forged;

fn tag(key: &hmac::Key, hash: &[u8], speaker: &[u8], listener: &[u8], attributes: u8) -> hmac::Tag {
    hmac::sign(key, &[hash, speaker, listener, &[attributes]].concat())
}

/// `data` XOR KDFa(key, "XOR", newer, older): SP 800-108 in counter mode with HMAC-SHA256.
fn xor(key: &hmac::Key, newer: &[u8], older: &[u8], data: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(data.len()));
    let Ok(bits) = u32::try_from(data.len() * 8) else { unreachable!("no parameter of ours has 512 MiB") };
    for (counter, part) in (1_u32..).zip(data.chunks(digest::SHA256_OUTPUT_LEN)) {
        let message = [&counter.to_be_bytes()[..], b"XOR\0", newer, older, &bits.to_be_bytes()].concat();
        let mask = hmac::sign(key, &message);
        out.extend(part.iter().zip(mask.as_ref()).map(|(byte, mask)| byte ^ mask));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_framed() {
        let bytes = plain(NV_READ_PUBLIC, &Writer::default().long(0x0180_0010).done());
        assert_eq!(&**bytes, [0x80, 1, 0, 0, 0, 14, 0, 0, 1, 0x69, 1, 0x80, 0, 0x10]);
        assert_eq!(&**Writer::default().byte(1).short(2).sized(b"ab").done(), [1, 0, 2, 0, 2, b'a', b'b']);
    }

    #[test]
    fn hiding_twice_shows() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"auth");
        let data: Vec<u8> = (0..70).collect();
        let hidden = xor(&key, b"newer", b"older", &data);
        assert_ne!(*hidden, data);
        assert_eq!(*xor(&key, b"newer", b"older", &hidden), data);
    }

    #[test]
    fn an_answer_to_another_command_is_forged() {
        let mut session = Session { handle: 0x0200_0000, nonce: vec![1; 32], key: Zeroizing::default() };
        let request = || Request {
            command: NV_READ,
            handles: [Handle { handle: 1, name: b"n" }, Handle { handle: 1, name: b"n" }],
            count: 2,
            hidden: None,
            parameters: Zeroizing::new(vec![]),
            reveal: false,
        };
        let sent = session.authorize(request(), b"auth");
        let answer = |sent: &Authorized, parameters: &[u8], attributes: u8| {
            let hash = [&[0; 4][..], &NV_READ.code.to_be_bytes(), parameters].concat();
            let hash = digest::digest(&digest::SHA256, &hash);
            tag(&hmac::Key::new(hmac::HMAC_SHA256, b"auth"), hash.as_ref(), &[2; 32], &sent.nonce, attributes)
        };
        let good = answer(&sent, b"p", 1);
        assert!(session.verify(&sent, b"q", &[2; 32], 1, good.as_ref()).is_err(), "other parameters");
        assert!(session.verify(&sent, b"p", &[3; 32], 1, good.as_ref()).is_err(), "another nonce");
        assert!(session.verify(&sent, b"p", &[2; 32], 0, good.as_ref()).is_err(), "other attributes");
        assert!(session.verify(&sent, b"p", &[2; 32], 1, &good.as_ref()[..31]).is_err(), "a short HMAC");
        assert!(
            session.verify(&session.authorize(request(), b"auth"), b"p", &[2; 32], 1, good.as_ref()).is_err(),
            "replay"
        );
        session.verify(&sent, b"p", &[2; 32], 1, good.as_ref()).unwrap();
        assert_eq!(session.nonce, [2; 32]);
    }
}
