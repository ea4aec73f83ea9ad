//! The enrolment of a TPM's attestation key, from within the guest: the EK certificate that its manufacturer left, and the proof that the
//! attestation key is in that TPM.
//!
//! Endorsement keys are made by the templates L-1 (RSA 2048) and L-2 (P-256) of the TCG's EK Credential Profile, which are the ones that
//! the certificates at 0x01c00002 and 0x01c0000a are about.

use nacre_tpm::{
    RC_HANDLE, Tpm, TpmError, kind, malformed,
    response::{self, WireError},
    session::{self, Kind, Writer},
};

use super::tpm::{RH_ENDORSEMENT, TEE, TpmAttester};
use crate::{
    enrolment::{Candidate, Challenge},
    evidence::AttesterError,
};

/// Bytes of an EK certificate's index at most, and of one read.
const LONGEST_INDEX: u16 = 16 * 1024;
const CHUNK: u16 = 512;
/// PolicySecret of the endorsement hierarchy.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7,
    0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
/// FIXEDTPM, FIXEDPARENT, SENSITIVEDATAORIGIN, ADMINWITHPOLICY, RESTRICTED, DECRYPT.
const EK_ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 16 | 1 << 17;
const RC_FAILURE: u32 = 0x101;
const ALG_RSA: u16 = 0x0001;
const ALG_AES: u16 = 0x0006;
const ALG_SHA256: u16 = 0x000b;
const ALG_NULL: u16 = 0x0010;
const ALG_ECC: u16 = 0x0023;
const ALG_CFB: u16 = 0x0043;
const P256: u16 = 0x0003;

/// A kind of endorsement key, and where its certificate is.
#[derive(Clone, Copy)]
enum Ek {
    Rsa,
    P256,
}

impl Ek {
    const ALL: [Self; 2] = [Self::Rsa, Self::P256];

    fn certificate(self) -> u32 {
        match self {
            Self::Rsa => 0x01c0_0002,
            Self::P256 => 0x01c0_000a,
        }
    }

    /// What TPM2_CreatePrimary is asked for.
    fn template(self) -> Vec<u8> {
        let kind = match self {
            Self::Rsa => ALG_RSA,
            Self::P256 => ALG_ECC,
        };
        let public = Writer::default().short(kind).short(ALG_SHA256).long(EK_ATTRIBUTES).sized(&EK_POLICY);
        let public = public.short(ALG_AES).short(128).short(ALG_CFB).short(ALG_NULL);
        let public = match self {
            Self::Rsa => public.short(2048).long(0).sized(&[0; 256]),
            Self::P256 => public.short(P256).short(ALG_NULL).sized(&[0; 32]).sized(&[0; 32]),
        };
        let sensitive = Writer::default().sized(&[]).sized(&[]).done();
        Writer::default().sized(&sensitive).sized(&public.done()).sized(&[]).long(0).done().to_vec()
    }
}

impl TpmAttester {
    /// What a broker has to know to enrol our attestation key.
    ///
    /// # Errors
    /// [`AttesterError`]: the TPM has no EK certificate that we know.
    pub fn candidate(&self) -> Result<Candidate, AttesterError> {
        let (ek, ek_certificate) = self.certificate()?;
        let (ak_public, ek_public) = self.with_ak(|tpm, _, ak| {
            let (handle, parameters) = tpm.create_primary(RH_ENDORSEMENT, &ek.template())?;
            tpm.flush(handle);
            let ek_public = response::public_area(&parameters);
            Ok((ak.to_vec(), ek_public.map_err(|error| malformed(session::CREATE_PRIMARY, error))?.to_vec()))
        })?;
        Ok(Candidate { ek_certificate, ek_public, ak_public, answer: None })
    }

    /// The secret of a challenge, which the TPM gives only where the attestation key is in it beside the EK that it was made for.
    ///
    /// # Errors
    /// [`AttesterError`]: it was made for others, or changed.
    pub fn activate(&self, challenge: &Challenge) -> Result<Vec<u8>, AttesterError> {
        let (ek, _) = self.certificate()?;
        let parameters = Writer::default().sized(&challenge.credential).sized(&challenge.secret).done();
        self.with_ak(|tpm, ak, _| {
            let (handle, _) = tpm.create_primary(RH_ENDORSEMENT, &ek.template())?;
            let secret = activate(tpm, [ak, handle], &parameters);
            tpm.flush(handle);
            secret
        })
    }

    fn certificate(&self) -> Result<(Ek, Vec<u8>), AttesterError> {
        let mut tpm = Tpm::open(self.address())?;
        let found = Ek::ALL.into_iter().find_map(|ek| match read_index(&mut tpm, ek.certificate()) {
            Ok(Some(bytes)) => Some(Ok((ek, der(&bytes).to_vec()))),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        });
        tpm.end();
        let none = "the TPM has no EK certificate (NV indices 0x01c00002 and 0x01c0000a): whose attestation key this is, an operator has to say (reference value trusted_aks)";
        found.unwrap_or_else(|| Err(AttesterError::Refused { tee: TEE, why: none.into() }))
    }
}

fn activate(tpm: &mut Tpm, keys: [u32; 2], parameters: &[u8]) -> Result<Vec<u8>, AttesterError> {
    let command = session::ACTIVATE_CREDENTIAL;
    let policy = tpm.start(Kind::Policy, None)?;
    let answer = tpm
        .policy_secret(RH_ENDORSEMENT, &policy)
        .and_then(|()| tpm.by_password_and_policy(command, keys, &policy, parameters));
    tpm.flush(policy.handle);
    match answer {
        Ok(answer) => Ok(response::one_field(&answer).map_err(|error| malformed(command, error))?.to_vec()),
        // About a parameter: the challenge. Some TPMs say no more than that they failed, when it does not decrypt.
        Err(TpmError::Refused { code, .. }) if code & 0x0c0 == 0x0c0 || code == RC_FAILURE => {
            Err(AttesterError::Refused {
                tee: TEE,
                why: format!("the broker's challenge is for another TPM or another key, or was changed (0x{code:03x})"),
            })
        }
        Err(error) => Err(error.into()),
    }
}

/// The content of an NV index that anybody may read; `None` where there is none.
fn read_index(tpm: &mut Tpm, index: u32) -> Result<Option<Vec<u8>>, AttesterError> {
    let wrong = |error: WireError| malformed(session::NV_READ_PUBLIC, error);
    let size = match tpm.plain(session::NV_READ_PUBLIC, &index.to_be_bytes()) {
        Ok(body) => response::nv_public(&body).map_err(wrong)?.size,
        Err(TpmError::Refused { code, .. }) if kind(code) == RC_HANDLE => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if size > LONGEST_INDEX {
        return Err(wrong(WireError::Wrong("size of the EK certificate's index")).into());
    }
    let mut content = Vec::new();
    for offset in (0..size).step_by(CHUNK.into()) {
        let length = CHUNK.min(size - offset);
        let parameters = Writer::default().short(length).short(offset).done();
        let answer = tpm.by_empty_password_about(session::NV_READ, index, index, &parameters)?;
        let part = response::nv_content(&answer).map_err(|error| malformed(session::NV_READ, error))?;
        if part.len() != usize::from(length) {
            return Err(malformed(session::NV_READ, WireError::Wrong("length of the content")).into());
        }
        content.extend_from_slice(part);
    }
    Ok(Some(content))
}

/// A certificate without what fills its index up.
fn der(bytes: &[u8]) -> &[u8] {
    match bytes {
        [0x30, 0x82, high, low, ..] => bytes.get(..4 + usize::from(u16::from_be_bytes([*high, *low]))).unwrap_or(bytes),
        _ => bytes,
    }
}
