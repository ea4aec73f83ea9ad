//! Responses of a TPM, parsed: pure functions over bytes that come from anywhere.
//!
//! # Layout (TPM 2.0 Library, part 1 §18 and part 2; numbers big-endian)
//!
//! ```text
//! tag u16 (0x8001 without sessions, 0x8002 with) ‖ size u32, of all of it ‖ code u32 ‖ body
//! body with sessions: length of parameters u32 ‖ parameters ‖ nonce (u16 length, bytes) ‖ attributes u8 ‖ HMAC (u16 length, bytes)
//! ```
//!
//! Everything has to be used up: bytes that are left over are an error.

/// The most bytes of a response. Ours have some 200; TPMs themselves have 4096 as their limit.
pub const RESPONSE_LIMIT: usize = 4096;
/// Bytes of a header.
pub const HEADER_LEN: usize = 10;

const TAG_PLAIN: u16 = 0x8001;
const TAG_SESSIONS: u16 = 0x8002;
/// How a TPM 1.2 answers, and a TPM 2.0 to what is none of its commands.
const TAG_TPM12: u16 = 0x00c4;
const ALG_SHA256: u16 = 0x000b;

/// Why bytes are no response that we understand.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// They end too early.
    #[error("the response ends within {0}")]
    Short(&'static str),
    /// There are more than there should be.
    #[error("the response goes on after {0}")]
    Long(&'static str),
    /// A field has a value that it cannot have.
    #[error("the response has a wrong {0}")]
    Wrong(&'static str),
    /// A TPM 1.2, which has no such indices.
    #[error("this is a TPM 1.2, or no TPM: a TPM 2.0 is needed")]
    Tpm12,
}

/// A response, taken apart as far as that goes without knowing the command.
#[derive(Debug, PartialEq, Eq)]
pub enum Response<'a> {
    /// It went well, and there were no sessions.
    Plain(&'a [u8]),
    /// It went well; the HMAC is not checked yet. Of commands that give a handle, it comes before the parameters: [`with_handle`].
    Sessions {
        /// The parameters.
        parameters: &'a [u8],
        /// The TPM's new nonce.
        nonce: &'a [u8],
        /// The session's attributes.
        attributes: u8,
        /// Over the parameters and both nonces.
        hmac: &'a [u8],
    },
    /// It did not go well.
    Refused(u32),
}

/// The public area of an NV index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvPublic {
    /// The number.
    pub index: u32,
    /// The attributes, TPMA_NV.
    pub attributes: u32,
    /// The policy; empty where there is none.
    pub policy: Vec<u8>,
    /// Bytes of its content.
    pub size: u16,
    /// The digest that stands for all of it in HMACs, with its algorithm before it; as the TPM says.
    pub name: Vec<u8>,
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(WireError::Short(what))?;
        self.rest = rest;
        Ok(*array)
    }

    fn byte(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(u8::from_be_bytes(self.array(what)?))
    }

    fn short(&mut self, what: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    fn long(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(WireError::Short(what))?;
        self.rest = rest;
        Ok(taken)
    }

    /// What the standard calls TPM2B: a length, and that many bytes.
    fn sized(&mut self, what: &'static str) -> Result<&'a [u8], WireError> {
        let length = self.short(what)?;
        self.take(length.into(), what)
    }

    /// The parameters of an answer that has sessions.
    fn parameters(&mut self) -> Result<&'a [u8], WireError> {
        let length = self.long("the length of its parameters")?;
        let length = usize::try_from(length).map_err(|_| WireError::Wrong("length of its parameters"))?;
        self.take(length, "its parameters")
    }

    /// The parameters, and what the one session says of them.
    fn with_session(mut self) -> Result<Response<'a>, WireError> {
        let parameters = self.parameters()?;
        let nonce = self.sized("the nonce")?;
        let attributes = self.byte("the session's attributes")?;
        let hmac = self.sized("the HMAC")?;
        self.end("the HMAC")?;
        Ok(Response::Sessions { parameters, nonce, attributes, hmac })
    }

    fn end(self, what: &'static str) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Long(what)) }
    }
}

/// How long the response is that begins with this header.
///
/// # Errors
/// [`WireError`]: shorter than a header, or longer than [`RESPONSE_LIMIT`].
pub fn length(header: &[u8; HEADER_LEN]) -> Result<usize, WireError> {
    let mut reader = Reader { rest: header };
    reader.short("its header")?;
    let size = reader.long("its header")?;
    usize::try_from(size)
        .ok()
        .filter(|size| (HEADER_LEN..=RESPONSE_LIMIT).contains(size))
        .ok_or(WireError::Wrong("length"))
}

/// Takes a response apart.
///
/// # Errors
/// [`WireError`]
pub fn parse(bytes: &[u8]) -> Result<Response<'_>, WireError> {
    let header = bytes.first_chunk::<HEADER_LEN>().ok_or(WireError::Short("its header"))?;
    let size = length(header)?;
    let mut reader = Reader { rest: bytes };
    let tag = reader.short("its header")?;
    reader.long("its header")?;
    let code = reader.long("its header")?;
    match size {
        size if size > bytes.len() => return Err(WireError::Short("its body")),
        size if size < bytes.len() => return Err(WireError::Long("its end")),
        _ => {}
    }
    match (tag, code) {
        (TAG_TPM12, _) => Err(WireError::Tpm12),
        (TAG_PLAIN, 0) => Ok(Response::Plain(reader.rest)),
        (TAG_PLAIN, code) => reader.end("an error").map(|()| Response::Refused(code)),
        (TAG_SESSIONS, 0) => reader.with_session(),
        _ => Err(WireError::Wrong("tag")),
    }
}

/// The code of a response, by its header alone; 0 where all went well.
///
/// # Errors
/// [`WireError`]
pub fn code(bytes: &[u8]) -> Result<u32, WireError> {
    let header = bytes.first_chunk::<HEADER_LEN>().ok_or(WireError::Short("its header"))?;
    length(header)?;
    let mut reader = Reader { rest: header };
    let tag = reader.short("its header")?;
    reader.long("its header")?;
    match tag {
        TAG_TPM12 => Err(WireError::Tpm12),
        _ => reader.long("its header"),
    }
}

/// Takes the response to a command apart that gives a handle and has sessions: the handle, and the rest as [`parse`] gives it. What went
/// wrong has no handle, and 0 for it.
///
/// # Errors
/// [`WireError`]
pub fn with_handle(bytes: &[u8]) -> Result<(u32, Response<'_>), WireError> {
    if code(bytes)? != 0 {
        return Ok((0, parse(bytes)?));
    }
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(WireError::Short("its header"))?;
    if length(header)? != bytes.len() {
        return Err(WireError::Wrong("length"));
    }
    if header.first_chunk() != Some(&TAG_SESSIONS.to_be_bytes()) {
        return Err(WireError::Wrong("tag"));
    }
    let mut reader = Reader { rest };
    let handle = reader.long("the handle")?;
    Ok((handle, reader.with_session()?))
}

/// Takes the response to a command apart that had two sessions, whose HMACs are not looked at: the parameters.
///
/// # Errors
/// [`WireError`]
pub fn with_two_sessions(bytes: &[u8]) -> Result<Result<&[u8], u32>, WireError> {
    match code(bytes)? {
        0 => {}
        code => return parse(bytes).map(|_| Err(code)),
    }
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(WireError::Short("its header"))?;
    if length(header)? != bytes.len() {
        return Err(WireError::Wrong("length"));
    }
    let mut reader = Reader { rest };
    let parameters = reader.parameters()?;
    for _ in 0..2 {
        reader.sized("the nonce")?;
        reader.byte("the session's attributes")?;
        reader.sized("the HMAC")?;
    }
    reader.end("the HMAC")?;
    Ok(Ok(parameters))
}

/// The first field of TPM2_CreatePrimary's parameters and of TPM2_ReadPublic's answer: the public area of a key. What follows is of no
/// interest: names and tickets of the TPM's own.
///
/// # Errors
/// [`WireError`]
pub fn public_area(parameters: &[u8]) -> Result<&[u8], WireError> {
    Reader { rest: parameters }.sized("the public area")
}

/// The public half of a key that signs, as it is in a `TPMT_PUBLIC`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicKey {
    /// The modulus, and the exponent.
    Rsa(Vec<u8>, u32),
    /// The curve (3: P-256, 4: P-384), x, y.
    Ecc(u16, Vec<u8>, Vec<u8>),
}

/// Takes a public area apart: of a restricted signing key with a scheme, as attestation keys are.
///
/// # Errors
/// [`WireError`]: it is another kind of object.
pub fn public_key(area: &[u8]) -> Result<PublicKey, WireError> {
    const WHAT: &str = "the public area";
    const NULL: u16 = 0x0010;
    let mut reader = Reader { rest: area };
    let kind = reader.short(WHAT)?;
    reader.short(WHAT)?;
    let attributes = reader.long(WHAT)?;
    reader.sized(WHAT)?;
    // RESTRICTED and SIGN_ENCRYPT, not DECRYPT: it signs what the TPM itself made, and nothing else.
    if attributes & (1 << 16 | 1 << 17 | 1 << 18) != 1 << 16 | 1 << 18 {
        return Err(WireError::Wrong("key: an attestation key is a restricted signing key"));
    }
    if reader.short(WHAT)? != NULL {
        return Err(WireError::Wrong("symmetric algorithm of a signing key"));
    }
    if reader.short(WHAT)? != NULL {
        reader.short(WHAT)?;
    }
    let key = match kind {
        0x0001 => {
            reader.short(WHAT)?;
            let exponent = match reader.long(WHAT)? {
                0 => 65_537,
                exponent => exponent,
            };
            PublicKey::Rsa(reader.sized(WHAT)?.to_vec(), exponent)
        }
        0x0023 => {
            let curve = reader.short(WHAT)?;
            if reader.short(WHAT)? != NULL {
                reader.short(WHAT)?;
            }
            PublicKey::Ecc(curve, reader.sized(WHAT)?.to_vec(), reader.sized(WHAT)?.to_vec())
        }
        _ => return Err(WireError::Wrong("kind of key")),
    };
    reader.end(WHAT)?;
    Ok(key)
}

/// The parameters of the answer to TPM2_Quote: what was signed, and the signature.
///
/// # Errors
/// [`WireError`]
pub fn quoted(parameters: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let mut reader = Reader { rest: parameters };
    let message = reader.sized("the quote")?;
    if reader.rest.is_empty() {
        return Err(WireError::Short("the signature"));
    }
    Ok((message, reader.rest))
}

/// The body of the answer to TPM2_PCR_Read of one bank: which PCRs it has, as bits, and their values in order.
///
/// # Errors
/// [`WireError`]
pub fn pcrs(body: &[u8]) -> Result<(u32, Vec<&[u8]>), WireError> {
    const WHAT: &str = "the PCRs";
    let mut reader = Reader { rest: body };
    reader.long(WHAT)?;
    if reader.long(WHAT)? != 1 {
        return Err(WireError::Wrong("number of banks"));
    }
    reader.short(WHAT)?;
    let bits = match reader.byte(WHAT)? {
        3 => {
            let [low, middle, high] = reader.array(WHAT)?;
            u32::from_le_bytes([low, middle, high, 0])
        }
        _ => return Err(WireError::Wrong("selection of PCRs")),
    };
    let count = reader.long(WHAT)?;
    // They lie within a response, which is small.
    let values = (0..count).map(|_| reader.sized(WHAT)).collect::<Result<Vec<_>, WireError>>()?;
    reader.end(WHAT)?;
    match usize::try_from(bits.count_ones()) == Ok(values.len()) {
        true => Ok((bits, values)),
        false => Err(WireError::Wrong("number of PCRs")),
    }
}

/// What is particular to an ECC key that was made by `template`: its point. The template is the public area up to there.
///
/// # Errors
/// [`WireError`]: it is not of that template.
pub fn point<'a>(area: &'a [u8], template: &[u8]) -> Result<(&'a [u8], &'a [u8]), WireError> {
    let rest = area.strip_prefix(template).ok_or(WireError::Wrong("public area: it is not what was asked for"))?;
    let mut reader = Reader { rest };
    let point = (reader.sized("the public area")?, reader.sized("the public area")?);
    reader.end("the public area")?;
    Ok(point)
}

/// What is particular to an RSA key that was made by `template`: its modulus.
///
/// # Errors
/// [`WireError`]: it is not of that template.
pub fn modulus<'a>(area: &'a [u8], template: &[u8]) -> Result<&'a [u8], WireError> {
    let rest = area.strip_prefix(template).ok_or(WireError::Wrong("public area: it is not what was asked for"))?;
    let mut reader = Reader { rest };
    let modulus = reader.sized("the public area")?;
    reader.end("the public area")?;
    Ok(modulus)
}

/// The parameters of the answer to TPM2_Create: the private area, encrypted by the parent, and the public one. What follows is about how
/// the object came to be.
///
/// # Errors
/// [`WireError`]
pub fn created(parameters: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let mut reader = Reader { rest: parameters };
    let made = (reader.sized("the private area")?, reader.sized("the public area")?);
    reader.sized("the creation data")?;
    reader.sized("the creation hash")?;
    reader.short("the creation ticket")?;
    reader.long("the creation ticket")?;
    reader.sized("the creation ticket")?;
    reader.end("the creation ticket")?;
    Ok(made)
}

/// The parameters of an answer that are one field of bytes: the name of TPM2_Load, the secrets of TPM2_Unseal and TPM2_ActivateCredential.
///
/// # Errors
/// [`WireError`]
pub fn one_field(parameters: &[u8]) -> Result<&[u8], WireError> {
    let mut reader = Reader { rest: parameters };
    let field = reader.sized("its only field")?;
    reader.end("its only field")?;
    Ok(field)
}

/// The body of the answer to TPM2_StartAuthSession: the session, and the TPM's nonce.
///
/// # Errors
/// [`WireError`]
pub fn started_session(body: &[u8]) -> Result<(u32, &[u8]), WireError> {
    let mut reader = Reader { rest: body };
    let handle = reader.long("the session")?;
    let nonce = reader.sized("the nonce")?;
    reader.end("the nonce")?;
    // 0x02: HMAC sessions; 0x03: policies. 16 bytes is the least that the standard lets a nonce have.
    if !matches!(handle >> 24, 0x02 | 0x03) || nonce.len() < 16 {
        return Err(WireError::Wrong("session"));
    }
    Ok((handle, nonce))
}

/// The body of the answer to TPM2_NV_ReadPublic.
///
/// # Errors
/// [`WireError`]
pub fn nv_public(body: &[u8]) -> Result<NvPublic, WireError> {
    let mut reader = Reader { rest: body };
    let mut public = Reader { rest: reader.sized("the public area")? };
    let name = reader.sized("the name")?;
    reader.end("the name")?;
    let index = public.long("the public area")?;
    if public.short("the public area")? != ALG_SHA256 {
        return Err(WireError::Wrong("digest algorithm of the index"));
    }
    let attributes = public.long("the public area")?;
    let policy = public.sized("the public area")?;
    let size = public.short("the public area")?;
    public.end("the public area")?;
    Ok(NvPublic { index, attributes, policy: policy.to_vec(), size, name: name.to_vec() })
}

/// The parameters of the answer to TPM2_NV_Read: the content.
///
/// # Errors
/// [`WireError`]
pub fn nv_content(parameters: &[u8]) -> Result<&[u8], WireError> {
    let mut reader = Reader { rest: parameters };
    let content = reader.sized("the content")?;
    reader.end("the content")?;
    Ok(content)
}

/// The body of the answer to TPM2_GetCapability for handles.
///
/// # Errors
/// [`WireError`]
pub fn handles(body: &[u8]) -> Result<Vec<u32>, WireError> {
    let mut reader = Reader { rest: body };
    reader.byte("the list of handles")?;
    if reader.long("the list of handles")? != 1 {
        return Err(WireError::Wrong("capability"));
    }
    let count = reader.long("the list of handles")?;
    // The list lies within a response, which is small: no count can ask for much.
    let list = (0..count).map(|_| reader.long("the list of handles")).collect::<Result<Vec<u32>, WireError>>()?;
    reader.end("the list of handles")?;
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(tag: u16, code: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(HEADER_LEN + body.len()).unwrap();
        [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes(), body].concat()
    }

    #[test]
    fn responses_are_taken_apart() {
        assert_eq!(parse(&response(0x8001, 0, b"body")), Ok(Response::Plain(b"body")));
        assert_eq!(parse(&response(0x8001, 0x18b, b"")), Ok(Response::Refused(0x18b)));
        let body = [&[0, 0, 0, 2, 8, 9][..], &[0, 1, 7], &[1], &[0, 2, 5, 6]].concat();
        let good = response(0x8002, 0, &body);
        assert_eq!(
            parse(&good),
            Ok(Response::Sessions { parameters: &[8, 9], nonce: &[7], attributes: 1, hmac: &[5, 6] })
        );
        for length in 0..good.len() {
            assert!(parse(&good[..length]).is_err(), "{length}");
            // Also where the size is right for what is there.
            let body = &body[..length.min(body.len() - 1)];
            assert!(parse(&response(0x8002, 0, body)).is_err(), "{length}");
        }
    }

    #[test]
    fn what_is_no_response_is_refused() {
        assert_eq!(parse(&response(0x00c4, 0x1e, b"")), Err(WireError::Tpm12));
        assert_eq!(parse(&response(0x8003, 0, b"")), Err(WireError::Wrong("tag")));
        assert_eq!(parse(&response(0x8002, 5, b"")), Err(WireError::Wrong("tag")));
        assert_eq!(parse(&response(0x8001, 5, b"x")), Err(WireError::Long("an error")));
        assert_eq!(parse(&[response(0x8001, 0, b""), vec![0]].concat()), Err(WireError::Long("its end")));
        let huge = [&[0x80, 1][..], &u32::MAX.to_be_bytes(), &[0; 4]].concat();
        assert_eq!(parse(&huge), Err(WireError::Wrong("length")));
        let long = response(0x8002, 0, &[&u32::MAX.to_be_bytes()[..], &[0; 9]].concat());
        assert_eq!(parse(&long), Err(WireError::Short("its parameters")));
    }

    #[test]
    fn bodies_are_checked() {
        let session = [&[2, 0, 0, 0, 0, 16][..], &[9; 16]].concat();
        assert_eq!(started_session(&session), Ok((0x0200_0000, &[9; 16][..])));
        assert!(started_session(&[&[4][..], &session[1..]].concat()).is_err());
        assert!(started_session(&[2, 0, 0, 0, 0, 1, 9]).is_err());
        assert!(handles(&[0, 0, 0, 0, 1, 255, 255, 255, 255, 0]).is_err());
        assert_eq!(handles(&[0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0, 5]), Ok(vec![0x0200_0005]));
        assert!(handles(&[0, 0, 0, 0, 2, 0, 0, 0, 0]).is_err());
        assert!(nv_content(&[0, 2, 1]).is_err());
        assert!(nv_content(&[0, 0, 1]).is_err());
        let public = [1, 0x80, 0, 0x10, 0, 0x0b, 2, 4, 0, 4, 0, 0, 0, 104];
        let body = [&[0, 14][..], &public, &[0, 1, 7]].concat();
        assert_eq!(nv_public(&body).unwrap().attributes, 0x0204_0004);
        let mut sha384 = body.clone();
        sha384[7] = 0x0c;
        assert!(nv_public(&sha384).is_err());
        for length in 0..body.len() {
            assert!(nv_public(&body[..length]).is_err());
        }
    }
}
