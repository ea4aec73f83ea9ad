//! The JSON Canonicalization Scheme (RFC 8785), for values without fractions: what is hashed into report data.

use serde_json::Value;

/// Nesting at most; serde_json itself reads no more than 128.
const DEEPEST: usize = 64;
/// The largest integer that every JSON implementation keeps.
const LARGEST: u64 = (1 << 53) - 1;

/// Why a value has no canonical form here.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum JcsError {
    /// A number with a fraction, or beyond 2^53.
    #[error("number that is no integer within ±(2^53-1)")]
    Number,
    /// Nested too deeply.
    #[error("JSON nested more than {DEEPEST} levels deep")]
    TooDeep,
}

/// The canonical bytes of a value.
///
/// # Errors
/// [`JcsError`] for what has none here.
pub fn canonical(value: &Value) -> Result<Vec<u8>, JcsError> {
    let mut out = String::new();
    write(value, 0, &mut out)?;
    Ok(out.into_bytes())
}

fn write(value: &Value, depth: usize, out: &mut String) -> Result<(), JcsError> {
    if depth > DEEPEST {
        return Err(JcsError::TooDeep);
    }
    match value {
        Value::Number(number) => {
            if number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs)).is_none_or(|n| n > LARGEST) {
                return Err(JcsError::Number);
            }
            out.push_str(&number.to_string());
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write(item, depth + 1, out)?;
            }
            out.push(']');
        }
        Value::Object(members) => {
            // §3.2.3: members are sorted by UTF-16 code units, which is not the order of UTF-8 bytes.
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by(|(a, _), (b, _)| a.encode_utf16().cmp(b.encode_utf16()));
            out.push('{');
            for (index, (name, member)) in members.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                // serde_json escapes strings as §3.2.2.2 demands.
                out.push_str(&Value::String(name.clone()).to_string());
                out.push(':');
                write(member, depth + 1, out)?;
            }
            out.push('}');
        }
        Value::Null | Value::Bool(_) | Value::String(_) => out.push_str(&value.to_string()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8785 §3.2.3 and §3.2.2.2.
    #[test]
    fn rfc8785_sorting_and_strings() {
        let value: Value = serde_json::from_str(
            r#"{"\u20ac":"Euro Sign","\r":"Carriage Return","\ufb33":"Hebrew Letter Dalet With Dagesh","1":"One","\ud83d\ude00":"Emoji: Grinning Face","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis"}"#,
        )
        .unwrap();
        let text = String::from_utf8(canonical(&value).unwrap()).unwrap();
        let order: Vec<usize> = ["Carriage", "One", "Control", "Latin", "Euro", "Emoji", "Hebrew"]
            .iter()
            .map(|name| text.find(name).unwrap())
            .collect();
        assert!(order.is_sorted(), "{text}");
        let strings: Value = serde_json::from_str(r#""\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/""#).unwrap();
        assert_eq!(canonical(&strings).unwrap(), "\"€$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"".as_bytes());
    }

    #[test]
    fn what_has_no_one_form_is_refused() {
        for text in ["1.5", "1e400", "9007199254740992", "-9007199254740992", "[0.1]"] {
            if let Ok(value) = serde_json::from_str::<Value>(text) {
                assert_eq!(canonical(&value), Err(JcsError::Number), "{text}");
            }
        }
        assert_eq!(
            canonical(&serde_json::json!({"b": [1, -2, null, true], "a": {}})).unwrap(),
            br#"{"a":{},"b":[1,-2,null,true]}"#
        );
        let deep: Value = serde_json::from_str(&format!("{}{}", "[".repeat(100), "]".repeat(100))).unwrap();
        assert_eq!(canonical(&deep), Err(JcsError::TooDeep));
    }
}
