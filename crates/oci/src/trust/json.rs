//! Strict JSON, for documents that decide about trust: no key twice in an object at any depth (two readers could each believe
//! another one), no field that nobody reads, types as they are written.
//!
//! The nesting is limited by `serde_json` (128); the size is the caller's to limit, before.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Number;

/// A JSON value whose objects have each key once, in the order of the document.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

/// What is wrong with a document, and where in it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum JsonError {
    #[error("not valid JSON: {0}")]
    Syntax(String),
    #[error("{at}: {problem}")]
    Content { at: String, problem: String },
}

impl JsonError {
    pub(crate) fn at(at: &str, problem: impl Into<String>) -> Self {
        Self::Content { at: at.into(), problem: problem.into() }
    }
}

impl Json {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        serde_json::from_slice(bytes).map_err(|error| JsonError::Syntax(error.to_string()))
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
            Self::Object(_) => "an object",
        }
    }

    fn expected<T>(&self, at: &str, what: &str) -> Result<T, JsonError> {
        Err(JsonError::at(at, format!("expected {what}, found {}", self.kind())))
    }

    pub(crate) fn into_string(self, at: &str) -> Result<String, JsonError> {
        match self {
            Self::String(text) => Ok(text),
            other => other.expected(at, "a string"),
        }
    }

    pub(crate) fn into_array(self, at: &str) -> Result<Vec<Json>, JsonError> {
        match self {
            Self::Array(items) => Ok(items),
            other => other.expected(at, "an array"),
        }
    }

    pub(crate) fn into_object(self, at: &str) -> Result<Vec<(String, Json)>, JsonError> {
        match self {
            Self::Object(fields) => Ok(fields),
            other => other.expected(at, "an object"),
        }
    }

    pub(crate) fn into_integer(self, at: &str) -> Result<i64, JsonError> {
        match self {
            Self::Number(number) => {
                number.as_i64().ok_or_else(|| JsonError::at(at, format!("{number} is not an integer of 64 bits")))
            }
            other => other.expected(at, "an integer"),
        }
    }

    /// The fields of an object, to be taken one by one.
    pub(crate) fn into_fields(self, at: &str) -> Result<Fields, JsonError> {
        Ok(Fields { at: at.into(), fields: self.into_object(at)? })
    }
}

/// The fields of an object that nobody has read yet.
pub(crate) struct Fields {
    at: String,
    fields: Vec<(String, Json)>,
}

impl Fields {
    /// Where a field of this name is, for messages.
    pub(crate) fn place(&self, name: &str) -> String {
        if self.at.is_empty() { name.into() } else { format!("{}.{name}", self.at) }
    }

    /// The object's own place.
    pub(crate) fn at(&self) -> &str {
        &self.at
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Json> {
        let position = self.fields.iter().position(|(key, _)| key == name)?;
        Some(self.fields.swap_remove(position).1)
    }

    pub(crate) fn required(&mut self, name: &str) -> Result<Json, JsonError> {
        self.take(name).ok_or_else(|| JsonError::at(&self.place(name), "is missing"))
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<String, JsonError> {
        let place = self.place(name);
        self.required(name)?.into_string(&place)
    }

    pub(crate) fn optional_string(&mut self, name: &str) -> Result<Option<String>, JsonError> {
        let place = self.place(name);
        self.take(name).map(|value| value.into_string(&place)).transpose()
    }

    pub(crate) fn optional_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, JsonError> {
        let place = self.place(name);
        let Some(value) = self.take(name) else { return Ok(None) };
        value.into_array(&place)?.into_iter().map(|item| item.into_string(&place)).collect::<Result<_, _>>().map(Some)
    }

    pub(crate) fn fields(&mut self, name: &str) -> Result<Fields, JsonError> {
        let place = self.place(name);
        self.required(name)?.into_fields(&place)
    }

    /// Refuses what nobody read.
    pub(crate) fn finish(self) -> Result<(), JsonError> {
        match self.fields.first() {
            Some((name, _)) => Err(JsonError::at(&self.place(name), "is not a known field here")),
            None => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Json, E> {
        Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields: Vec<(String, Json)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("key {key:?} is there twice")));
            }
            let value = map.next_value()?;
            fields.push((key, value));
        }
        Ok(Json::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_be_there_once_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"x":[{"a":1,"b":2,"a":3}]}"#, r#"{"a":1,"\u0061":2}"#] {
            let error = Json::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("\"a\" is there twice"), "{error}");
        }
        assert!(Json::parse(br#"[{"a":1},{"a":1}]"#).is_ok());
    }

    #[test]
    fn what_nobody_reads_is_refused() {
        let mut fields = Json::parse(br#"{"a":"x","b":1}"#).unwrap().into_fields("top").unwrap();
        assert_eq!(fields.string("a").unwrap(), "x");
        assert_eq!(fields.finish().unwrap_err().to_string(), "top.b: is not a known field here");
    }

    #[test]
    fn depth_and_trailing_text_are_refused() {
        assert!(Json::parse("[".repeat(100_000).as_bytes()).is_err());
        assert!(Json::parse(b"{} {}").is_err());
        assert!(Json::parse(b"").is_err());
        assert!(
            Json::parse(b"{\"a\":1.5}")
                .unwrap()
                .into_fields("")
                .unwrap()
                .required("a")
                .unwrap()
                .into_integer("a")
                .is_err()
        );
    }
}
