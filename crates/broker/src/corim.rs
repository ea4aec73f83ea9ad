//! CoRIM (draft-ietf-rats-corim): signed manifests of reference values in CBOR, as vendors and build systems make them.
//!
//! ```text
//! 18([protected: bstr {1: alg, 3: content type, 4: kid, 8: bstr {0: {0: signer's name}, 1: validity} or 15: {1: iss, 4: exp, 5: nbf}},
//!     unprotected, payload: bstr, signature])
//! payload  501({0: id, 1: [+ 506(bstr {1: tag identity, 4: {0: [+ [environment, [+ {0: key, 1: values}]]]}})], 3: profile, 4: validity})
//! values   {1: svn, 2: [+ [algorithm, digest]], 4: raw value, 14: {register => [+ [algorithm, digest]]}}
//! ```
//!
//! A measurement's key is the name of a reference value, a text; numbered registers get their number, in two digits, after it. What would make a value
//! hold for fewer guests than all (an instance, a group, a mask, whom it is authorized by), or for more than it names (a least SVN), or that nobody here
//! knows, refuses the manifest: a part of what a signer said is not what it said. Triples that are no reference values are left out, and counted.
//!
//! A manifest has no serial number. That it begins later than the last document of its signer stands in for one, so it has to say when it begins; its
//! values end with it, so it has to say when that is.

use std::collections::BTreeMap;

use nacre_core::{
    Untrusted, Verified,
    jose::{Jwk, PublicKey, b64, verify_signature},
};
use serde_json::Value;

use crate::{
    BrokerError,
    broker::MOST_VALUES,
    cbor::{Item, Map, to_be_signed},
    reference::{LONGEST, MOST_IDS, is_name},
};

/// The profile of manifests whose keys are names of reference values; one without a profile is read as one of it.
pub(crate) const PROFILE: &str = "tag:github.com,2026:nacre-storage/nacre#corim-1";
const CONTENT_TYPES: [&str; 2] = ["application/rim+cbor", "application/corim-unsigned+cbor"];
const ES256: i64 = -7;
const ES384: i64 = -35;
/// The longest raw value.
const LONGEST_RAW: usize = 1024;

fn invalid(why: impl std::fmt::Display) -> BrokerError {
    BrokerError::Invalid(format!("CoRIM: {why}"))
}

/// What a manifest says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Corim {
    /// The signer, by its own word.
    pub(crate) signer: String,
    pub(crate) not_before: i64,
    pub(crate) expires: i64,
    pub(crate) values: BTreeMap<String, Vec<Value>>,
    /// Triples that are no reference values.
    pub(crate) left_out: usize,
}

/// A manifest that is signed by whom its header names, which nobody has checked yet.
pub(crate) struct Signed<'a> {
    protected: &'a [u8],
    payload: &'a [u8],
    signature: &'a [u8],
    algorithm: i64,
    kid: &'a [u8],
    signer: String,
    validity: Validity,
}

#[derive(Clone, Copy, Default)]
struct Validity {
    not_before: Option<i64>,
    not_after: Option<i64>,
}

/// Whether bytes begin as a manifest does, and no text: the tags 18, 500 and 502.
pub(crate) fn is_one(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xd2]) || bytes.starts_with(&[0xd9, 0x01, 0xf4]) || bytes.starts_with(&[0xd9, 0x01, 0xf6])
}

fn nested<'a>(bytes: &'a [u8], what: &str) -> Result<Item<'a>, BrokerError> {
    Item::read(bytes).map_err(|why| invalid(format!("{what}: {why}")))
}

fn map<'m, 'a>(item: &'m Item<'a>, what: &str) -> Result<Map<'m, 'a>, BrokerError> {
    item.map().ok_or_else(|| invalid(format!("{what}: no map")))
}

fn array<'m, 'a>(item: Option<&'m Item<'a>>, what: &str) -> Result<&'m [Item<'a>], BrokerError> {
    item.and_then(Item::array).filter(|items| !items.is_empty()).ok_or_else(|| invalid(format!("{what}: no list")))
}

fn known(map: Map<'_, '_>, keys: &[i64], what: &str) -> Result<(), BrokerError> {
    match map.other_than(keys) {
        None => Ok(()),
        Some(key) => Err(invalid(format!("{what}: member {} is not understood here", name_of(key)))),
    }
}

fn name_of(key: &Item<'_>) -> String {
    match key {
        Item::Int(number) => number.to_string(),
        Item::Text(text) => format!("'{text:.60}'"),
        _ => "of another kind".into(),
    }
}

/// Seconds since 1970, with their tag or, in CWT claims, without.
fn time(item: Option<&Item<'_>>, what: &str) -> Result<Option<i64>, BrokerError> {
    let Some(item) = item else { return Ok(None) };
    let seconds = item.tagged(1).unwrap_or(item).int();
    seconds.map(Some).ok_or_else(|| invalid(format!("{what}: no whole number of seconds since 1970")))
}

impl Validity {
    fn of(item: Option<&Item<'_>>, what: &str) -> Result<Self, BrokerError> {
        let Some(item) = item else { return Ok(Self::default()) };
        let map = map(item, what)?;
        Ok(Self { not_before: time(map.get(0), what)?, not_after: time(map.get(1), what)? })
    }
}

impl<'a> Signed<'a> {
    /// Reads the envelope.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, BrokerError> {
        if bytes.len() > LONGEST {
            return Err(invalid(format!("{} bytes: at most {LONGEST} are read", bytes.len())));
        }
        let item = nested(bytes, "the manifest")?;
        let mut item = &item;
        // Earlier drafts put it into two more tags.
        for tag in [500, 502] {
            item = item.tagged(tag).unwrap_or(item);
        }
        let parts = item.tagged(18).and_then(Item::array).and_then(|parts| <&[Item<'_>; 4]>::try_from(parts).ok());
        let Some([protected, unprotected, payload, signature]) = parts else {
            return Err(invalid("it is not signed: a COSE_Sign1 (tag 18) of four parts is read"));
        };
        let (Some(protected), Some(signature)) = (protected.bytes(), signature.bytes()) else {
            return Err(invalid("the signature or what it protects is no byte string"));
        };
        let payload = payload.bytes().ok_or_else(|| invalid("its payload is elsewhere: it has to be in it"))?;
        let header = nested(protected, "protected header")?;
        let header = map(&header, "protected header")?;
        if header.get(2).is_some() {
            return Err(invalid("protected header: critical members (crit) are not understood here"));
        }
        let content = header.get(3).and_then(Item::text).unwrap_or_default();
        if !CONTENT_TYPES.contains(&content) {
            return Err(invalid(format!("its content type is '{content:.60}' and not {}", CONTENT_TYPES.join(" or "))));
        }
        let algorithm = header.get(1).and_then(Item::int).ok_or_else(|| invalid("its header names no algorithm"))?;
        let loose = map(unprotected, "unprotected header")?;
        let kid = header.get(4).or(loose.get(4)).and_then(Item::bytes);
        let kid = kid.ok_or_else(|| invalid("its header names no key (kid)"))?;
        let (signer, validity) = Self::meta(header)?;
        Ok(Self { protected, payload, signature, algorithm, kid, signer, validity })
    }

    /// Who signed, and for how long: by the draft's own map, or by CWT claims.
    fn meta(header: Map<'_, '_>) -> Result<(String, Validity), BrokerError> {
        if let Some(bytes) = header.get(8) {
            let bytes = bytes.bytes().ok_or_else(|| invalid("corim-meta: no byte string"))?;
            let meta = nested(bytes, "corim-meta")?;
            let meta = map(&meta, "corim-meta")?;
            let signer = meta.get(0).and_then(Item::map).and_then(|signer| signer.get(0)?.text());
            let signer = signer.ok_or_else(|| invalid("corim-meta: it does not say who signed"))?;
            return Ok((signer.to_owned(), Validity::of(meta.get(1), "corim-meta, validity")?));
        }
        let claims = header.get(15).and_then(Item::map);
        let claims = claims.ok_or_else(|| invalid("its header has neither corim-meta nor CWT claims"))?;
        let signer = claims.get(1).and_then(Item::text).ok_or_else(|| invalid("CWT claims: no issuer"))?;
        let validity = Validity { not_before: time(claims.get(5), "nbf")?, not_after: time(claims.get(4), "exp")? };
        Ok((signer.to_owned(), validity))
    }

    /// Whether the header names this key: by its thumbprint, as a text or as 32 bytes.
    pub(crate) fn names(&self, key: &PublicKey) -> bool {
        let Ok(thumbprint) = Jwk::from_public(key).thumbprint() else { return false };
        self.kid == thumbprint.as_bytes() || b64::decode(&thumbprint).is_ok_and(|bytes| bytes == self.kid)
    }

    /// Verifies the signature by a key, and reads what it signs.
    pub(crate) fn verify(&self, key: &PublicKey) -> Result<Verified<Corim>, BrokerError> {
        let expected = match key.kind() {
            "EC P-256" => ES256,
            "EC P-384" => ES384,
            other => return Err(invalid(format!("a key of kind {other} signs no manifest"))),
        };
        if self.algorithm != expected {
            return Err(invalid(format!("its algorithm is {} and the key's {expected}", self.algorithm)));
        }
        Untrusted::new(self).verify_into(|signed| {
            verify_signature(key, &to_be_signed(signed.protected, signed.payload), signed.signature)
                .map_err(invalid)?;
            signed.content()
        })
    }

    /// What it says, whoever signed it.
    pub(crate) fn content(&self) -> Result<Corim, BrokerError> {
        let payload = nested(self.payload, "payload")?;
        let payload = payload.tagged(500).unwrap_or(&payload);
        let corim = payload.tagged(501).ok_or_else(|| invalid("its payload is no manifest (tag 501)"))?;
        let corim = map(corim, "corim-map")?;
        known(corim, &[0, 1, 2, 3, 4, 5], "corim-map")?;
        if let Some(profile) = corim.get(3) {
            let text = profile.tagged(32).unwrap_or(profile).text();
            if text != Some(PROFILE) {
                let found = text.map_or_else(|| "of another kind".to_owned(), |text| format!("'{text:.100}'"));
                return Err(invalid(format!("its profile is {found}; {PROFILE} is read, and none")));
            }
        }
        let inner = Validity::of(corim.get(4), "validity")?;
        let not_before = [self.validity.not_before, inner.not_before].into_iter().flatten().max();
        let expires = [self.validity.not_after, inner.not_after].into_iter().flatten().min();
        let not_before = not_before.ok_or_else(|| {
            invalid("it does not say since when it is valid (not-before), and so cannot be told from an older one")
        })?;
        let expires = expires.ok_or_else(|| invalid("it does not say until when it is valid (not-after)"))?;
        let mut content =
            Corim { signer: self.signer.clone(), not_before, expires, values: BTreeMap::new(), left_out: 0 };
        for tag in array(corim.get(1), "tags")? {
            let bytes = tag.tagged(506).and_then(Item::bytes);
            let bytes = bytes.ok_or_else(|| invalid("a tag that is no CoMID (506): others are not read"))?;
            let comid = nested(bytes, "CoMID")?;
            content.add(map(&comid, "CoMID")?)?;
        }
        Ok(content)
    }
}

impl Corim {
    fn add(&mut self, comid: Map<'_, '_>) -> Result<(), BrokerError> {
        known(comid, &[0, 1, 2, 3, 4], "CoMID")?;
        let triples = comid.get(4).ok_or_else(|| invalid("CoMID: no triples"))?;
        for (kind, records) in map(triples, "triples")?.members() {
            let records = array(Some(records), "triples")?;
            if kind.int() != Some(0) {
                self.left_out += records.len();
                continue;
            }
            for record in records {
                let Some([environment, measurements]) = record.array() else {
                    return Err(invalid("a reference triple that is no pair"));
                };
                known(map(environment, "environment")?, &[0], "environment")?;
                for measurement in array(Some(measurements), "measurements")? {
                    self.measurement(map(measurement, "measurement")?)?;
                }
            }
        }
        Ok(())
    }

    fn measurement(&mut self, measurement: Map<'_, '_>) -> Result<(), BrokerError> {
        known(measurement, &[0, 1], "measurement")?;
        let name = measurement.get(0).and_then(Item::text);
        let name = name.ok_or_else(|| invalid("a measurement whose key is no text: the name of a reference value"))?;
        let values = measurement.get(1).ok_or_else(|| invalid(format!("'{name:.100}': no values")))?;
        let values = map(values, name)?;
        // Version and name are for people; whatever else is there has to be read.
        known(values, &[0, 1, 2, 4, 11, 14], name)?;
        let mut found = Vec::new();
        if let Some(svn) = values.get(1) {
            let number = svn.tagged(552).unwrap_or(svn).int().filter(|number| *number >= 0);
            let number =
                number.ok_or_else(|| invalid(format!("'{name:.100}': an SVN that is not one exact number")))?;
            found.push(number.into());
        }
        if let Some(digests) = values.get(2) {
            found.extend(digests_of(digests, name)?);
        }
        if let Some(raw) = values.get(4) {
            let bytes = raw.tagged(560).unwrap_or(raw).bytes().filter(|bytes| bytes.len() <= LONGEST_RAW);
            let bytes = bytes.ok_or_else(|| {
                invalid(format!("'{name:.100}': a raw value that is no byte string of {LONGEST_RAW} bytes at most"))
            })?;
            found.push(nacre_attest::evidence::hex(bytes).into());
        }
        let registers = values.get(14);
        // All of a measurement have to hold; the values of a name are alternatives.
        match [1, 2, 4, 14].into_iter().filter(|key| values.get(*key).is_some()).count() {
            1 => {}
            0 => return Err(invalid(format!("'{name:.100}': neither digests nor an SVN, a raw value or registers"))),
            _ => {
                return Err(invalid(format!(
                    "'{name:.100}': more than one of digests, SVN, raw value and registers: give each a key of its own"
                )));
            }
        }
        if !found.is_empty() {
            self.set(name, found)?;
        }
        if let Some(registers) = registers {
            for (register, digests) in map(registers, name)?.members() {
                let full = match register {
                    Item::Int(number @ 0..=99) => format!("{name}{number:02}"),
                    Item::Text(text) => (*text).to_owned(),
                    other => return Err(invalid(format!("'{name:.100}': a register {}", name_of(other)))),
                };
                let digests = digests_of(digests, &full)?;
                self.set(&full, digests)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, found: Vec<Value>) -> Result<(), BrokerError> {
        if !is_name(name) {
            return Err(invalid(format!("'{name:.100}' is no name of a reference value")));
        }
        let values = self.values.entry(name.to_owned()).or_default();
        for value in found {
            if !values.contains(&value) {
                values.push(value);
            }
        }
        if values.len() > MOST_VALUES || self.values.len() > MOST_IDS {
            return Err(invalid(format!("at most {MOST_IDS} names with {MOST_VALUES} values each are read")));
        }
        Ok(())
    }
}

fn digests_of(item: &Item<'_>, name: &str) -> Result<Vec<Value>, BrokerError> {
    let digests = array(Some(item), name)?.iter().map(|digest| {
        let Some([algorithm, value]) = digest.array() else {
            return Err(invalid(format!("'{name:.100}': a digest that is no pair")));
        };
        // By the registry of named information, number or name.
        let length = match (algorithm.int(), algorithm.text()) {
            (Some(1), _) | (_, Some("sha-256")) => 32,
            (Some(7), _) | (_, Some("sha-384")) => 48,
            (Some(8), _) | (_, Some("sha-512")) => 64,
            _ => return Err(invalid(format!("'{name:.100}': a digest that is none of SHA-256, SHA-384, SHA-512"))),
        };
        let bytes = value.bytes().filter(|bytes| bytes.len() == length);
        let bytes = bytes.ok_or_else(|| invalid(format!("'{name:.100}': a digest that has not {length} bytes")))?;
        Ok(nacre_attest::evidence::hex(bytes).into())
    });
    digests.collect()
}
