//! What Intel's certificate of a platform's key (PCK) says of the platform: an extension with a tree of object identifiers.
//!
//! ```text
//! 1.2.840.113741.1.13.1  SEQUENCE OF SEQUENCE { oid, value }
//!   .2  TCB: SEQUENCE OF { .2.17 PCE SVN INTEGER, .2.18 CPU SVN OCTET STRING [16], components }
//!   .4  FMSPC OCTET STRING [6]     .5  type ENUMERATED     .6  platform instance OCTET STRING [16]
//!   .7  configuration: SEQUENCE OF { .7.1 dynamic, .7.2 cached keys, .7.3 SMT: BOOLEAN }
//! ```

use der::{
    Decode as _, Reader as _, SliceReader, Tag, Tagged as _,
    asn1::{AnyRef, ObjectIdentifier, OctetStringRef},
};

use crate::x509::Cert;

const SGX: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1");
const TCB: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.2");
const PCE_SVN: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.2.17");
const CPU_SVN: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.2.18");
const PCE_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.3");
const FMSPC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.4");
const TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.5");
const INSTANCE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.6");
const CONFIGURATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.7");
const DYNAMIC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.7.1");
const CACHED_KEYS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.7.2");
const SMT: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1.7.3");
/// Entries of a tree at most.
const MOST: usize = 64;

/// A platform, by its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) fmspc: [u8; 6],
    pub(crate) pce_id: [u8; 2],
    pub(crate) cpu_svn: [u8; 16],
    pub(crate) pce_svn: u16,
    /// 0 standard, 1 scalable, 2 scalable with integrity.
    pub(crate) kind: u8,
    pub(crate) instance: Option<[u8; 16]>,
    pub(crate) dynamic: Option<bool>,
    pub(crate) cached_keys: Option<bool>,
    pub(crate) smt: Option<bool>,
}

/// The entries of a tree.
fn entries(der: &[u8]) -> der::Result<Vec<(ObjectIdentifier, AnyRef<'_>)>> {
    let mut outer = SliceReader::new(der)?;
    let entries = outer.sequence(|reader| {
        let mut entries = Vec::new();
        while !reader.is_finished() {
            if entries.len() == MOST {
                return Err(Tag::Sequence.length_error());
            }
            entries.push(reader.sequence(|entry| Ok((ObjectIdentifier::decode(entry)?, AnyRef::decode(entry)?)))?);
        }
        Ok(entries)
    })?;
    outer.finish(entries)
}

/// The one entry of that name.
fn find<'e, 'd>(entries: &'e [(ObjectIdentifier, AnyRef<'d>)], oid: ObjectIdentifier) -> Option<&'e AnyRef<'d>> {
    let mut found = entries.iter().filter(|(of, _)| *of == oid);
    found.next().filter(|_| found.next().is_none()).map(|(_, value)| value)
}

/// A value's DER, to be taken apart as a tree of its own.
fn tree(value: &AnyRef<'_>) -> Option<Vec<u8>> {
    (value.tag() == Tag::Sequence).then(|| der::Encode::to_der(value).ok())?
}

fn octets<const N: usize>(value: &AnyRef<'_>) -> Option<[u8; N]> {
    value.decode_as::<OctetStringRef<'_>>().ok()?.as_bytes().try_into().ok()
}

/// Reads a platform's certificate; `None` where it is none.
pub(crate) fn platform(cert: &Cert) -> Option<Platform> {
    let top = entries(cert.extension(SGX)?).ok()?;
    let tcb = tree(find(&top, TCB)?)?;
    let tcb = entries(&tcb).ok()?;
    let configuration = match find(&top, CONFIGURATION) {
        Some(value) => tree(value)?,
        None => vec![0x30, 0],
    };
    let configuration = entries(&configuration).ok()?;
    let flag = |oid| match find(&configuration, oid) {
        None => Some(None),
        Some(value) => Some(Some(value.decode_as::<bool>().ok()?)),
    };
    let kind = find(&top, TYPE)?;
    let kind = match (kind.tag(), kind.value()) {
        (Tag::Enumerated, [kind]) => *kind,
        _ => return None,
    };
    Some(Platform {
        fmspc: octets(find(&top, FMSPC)?)?,
        pce_id: octets(find(&top, PCE_ID)?)?,
        cpu_svn: octets(find(&tcb, CPU_SVN)?)?,
        pce_svn: find(&tcb, PCE_SVN)?.decode_as().ok()?,
        kind,
        instance: match find(&top, INSTANCE) {
            Some(value) => Some(octets(value)?),
            None => None,
        },
        dynamic: flag(DYNAMIC)?,
        cached_keys: flag(CACHED_KEYS)?,
        smt: flag(SMT)?,
    })
}
