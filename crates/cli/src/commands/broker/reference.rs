//! `nacre broker reference`: what guests are expected to measure.

use std::collections::BTreeMap;

use anyhow::Context as _;
use nacre_broker::{ReferenceDocument, ReferenceValue, Signer, is_corim};
use nacre_core::jose::PrivateKey;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Admin, read};
use crate::{
    args::broker::{ReferenceCommand, SignerCommand},
    exit::{Missing, Usage},
    output,
};

fn time(flag: &str, text: &str) -> anyhow::Result<i64> {
    Ok(OffsetDateTime::parse(text, &Rfc3339).with_context(|| format!("{flag} '{text}'"))?.unix_timestamp())
}

fn show_time(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// A value of the command line, which has no types: what reads as a number or a truth value is that as well, since evidence has both.
fn meant(text: &str) -> impl Iterator<Item = Value> {
    let typed = match text {
        "true" | "false" => Some(Value::Bool(text == "true")),
        // As it would be written: digits with zeros before them are an identifier.
        number => number.parse::<i64>().ok().filter(|value| value.to_string() == number).map(Value::from),
    };
    std::iter::once(Value::from(text)).chain(typed)
}

pub(super) fn reference(command: &ReferenceCommand) -> anyhow::Result<()> {
    match command {
        ReferenceCommand::Set { name, values, expires, at } => {
            let values: Vec<Value> = values.iter().flat_map(|text| meant(text)).collect();
            let expires = expires.as_deref().map(|text| time("--expires", text)).transpose()?;
            match Admin::of(at)? {
                Admin::Local(broker) => Ok(broker.add_reference_value(name, values, expires)?),
                Admin::Remote(client) => Ok(client.add_reference_value(name, &values, expires)?),
            }
        }
        ReferenceCommand::Show { name, at } => {
            let values: Option<Vec<Value>> = match Admin::of(at)? {
                Admin::Local(broker) => broker.reference_value(name)?.map(|reference| reference.values),
                Admin::Remote(client) => client.reference_value(name)?,
            };
            output::json(&values.ok_or_else(|| Missing(format!("{name}: no reference value of this name")))?)
        }
        ReferenceCommand::Ls { json, at } => {
            let found = match Admin::of(at)? {
                Admin::Local(broker) => broker.references()?,
                Admin::Remote(client) => client.references()?,
            };
            if *json {
                return output::json(&found);
            }
            let row = |(name, value): (&String, &ReferenceValue)| {
                vec![name.clone(), value.values.len().to_string(), show_time(value.expires), value.issuer.clone()]
            };
            let rows: Vec<Vec<String>> = found.iter().map(row).collect();
            Ok(output::table(&["NAME", "VALUES", "EXPIRES", "SIGNER"], &rows)?)
        }
        ReferenceCommand::Rm { name, at } => {
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_reference(name)? {
                        return Err(Missing(format!("{name}: no reference value of this name")).into());
                    }
                }
                Admin::Remote(client) => client.delete_reference(name)?,
            }
            Ok(())
        }
        ReferenceCommand::Sign { values, key, issuer, serial, expires, revoke } => {
            let mut named: BTreeMap<String, Vec<Value>> = BTreeMap::new();
            for value in values {
                let (name, value) = value.split_once('=').ok_or_else(|| Usage(format!("{value}: write NAME=VALUE")))?;
                named.entry(name.to_owned()).or_default().extend(meant(value));
            }
            let now = u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or_default();
            let expires = time("--expires", expires)?;
            let document = ReferenceDocument::new(issuer, serial.unwrap_or(now), expires, named, revoke.clone());
            let key = PrivateKey::from_bytes(read(key)?.expose()).with_context(|| format!("{}", key.display()))?;
            Ok(output::line(document.sign(&key)?)?)
        }
        ReferenceCommand::Import { file, at } => {
            let bytes = read(file)?;
            if is_corim(bytes.expose()) {
                return match Admin::of(at)? {
                    Admin::Local(broker) => Ok(broker.import_corim(bytes.expose()).map(drop)?),
                    Admin::Remote(client) => Ok(client.import_corim(bytes.expose())?),
                };
            }
            let text = std::str::from_utf8(bytes.expose()).with_context(|| format!("{}: no text", file.display()))?;
            match Admin::of(at)? {
                Admin::Local(broker) => broker.import_references(text.trim()).map(drop)?,
                Admin::Remote(client) => client.import_references(text.trim())?,
            }
            Ok(())
        }
        ReferenceCommand::Signer(command) => signer(command),
    }
}

fn signer(command: &SignerCommand) -> anyhow::Result<()> {
    match command {
        SignerCommand::Add { name, key, prefix, at } => {
            let pem = read(key)?;
            let pem =
                std::str::from_utf8(pem.expose()).with_context(|| format!("{}: not a PEM file", key.display()))?;
            let signer = Signer { name: name.clone(), key: pem.to_owned(), prefix: prefix.clone(), serial: 0 };
            match Admin::of(at)? {
                Admin::Local(broker) => Ok(broker.set_signer(&signer)?),
                Admin::Remote(client) => Ok(client.set_signer(&signer)?),
            }
        }
        SignerCommand::Ls { json, at } => {
            let found = match Admin::of(at)? {
                Admin::Local(broker) => broker.signers()?,
                Admin::Remote(client) => client.signers()?,
            };
            if *json {
                return output::json(&found);
            }
            let row = |signer: &Signer| vec![signer.name.clone(), signer.prefix.clone(), signer.serial.to_string()];
            let rows: Vec<Vec<String>> = found.iter().map(row).collect();
            Ok(output::table(&["NAME", "PREFIX", "SERIAL"], &rows)?)
        }
        SignerCommand::Rm { name, values, at } => {
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_signer(name, *values)? {
                        return Err(Missing(format!("{name}: no such signer")).into());
                    }
                }
                Admin::Remote(client) => client.delete_signer(name, *values)?,
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_is_meant_as_what_evidence_may_have() {
        for (text, values) in [
            ("3", vec![json!("3"), json!(3)]),
            ("-1", vec![json!("-1"), json!(-1)]),
            ("true", vec![json!("true"), json!(true)]),
            ("0012", vec![json!("0012")]),
            ("12345678901234567890123456789012", vec![json!("12345678901234567890123456789012")]),
            ("1e3", vec![json!("1e3")]),
            ("ab", vec![json!("ab")]),
            ("", vec![json!("")]),
        ] {
            assert_eq!(meant(text).collect::<Vec<_>>(), values, "{text}");
        }
    }
}
