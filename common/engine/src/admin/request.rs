//! One request, from its line to its fields.

use serde_json::{Map, Value, json};

use super::{MAX_LINE, VERSION};

/// What is wrong with a request, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum RequestError {
    #[error("the line is longer than {MAX_LINE} bytes: send one JSON object and a line end")]
    Long,
    #[error("not JSON ({0}): send one JSON object and a line end")]
    Json(String),
    #[error("not a JSON object: send one with \"version\" and \"request\"")]
    NotAnObject,
    #[error("version {0} is not spoken here: use {VERSION}")]
    Version(String),
    #[error("missing key {0:?}")]
    Missing(&'static str),
    #[error("{key:?} must be {what}, not {value}")]
    Type {
        key: String,
        what: &'static str,
        value: String,
    },
    #[error("unknown key {0:?}: leave it out")]
    Unknown(String),
}

/// A request whose fields are yet to be taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    name: String,
    fields: Map<String, Value>,
}

impl Request {
    /// A request without fields.
    pub fn new(name: &str) -> Self {
        Request {
            name: name.to_owned(),
            fields: Map::new(),
        }
    }

    /// The same with a field.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(key.to_owned(), value.into());
        self
    }

    pub(super) fn parse(line: &[u8]) -> Result<Self, RequestError> {
        let value =
            serde_json::from_slice(line).map_err(|error| RequestError::Json(error.to_string()))?;
        let Value::Object(fields) = value else {
            return Err(RequestError::NotAnObject);
        };
        let mut request = Request {
            name: String::new(),
            fields,
        };
        match request.fields.remove("version") {
            None => return Err(RequestError::Missing("version")),
            Some(version) if version == json!(VERSION) => {}
            Some(version) => return Err(RequestError::Version(version.to_string())),
        }
        request.name = request.string("request")?;
        Ok(request)
    }

    pub(super) fn line(&self) -> String {
        let mut fields = self.fields.clone();
        fields.insert("version".to_owned(), json!(VERSION));
        fields.insert("request".to_owned(), json!(self.name));
        format!("{}\n", Value::Object(fields))
    }

    /// What is asked for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes a field that must be there and be a string.
    pub fn string(&mut self, key: &'static str) -> Result<String, RequestError> {
        match self.fields.remove(key) {
            None => Err(RequestError::Missing(key)),
            Some(Value::String(string)) => Ok(string),
            Some(other) => Err(RequestError::Type {
                key: key.to_owned(),
                what: "a string",
                value: other.to_string(),
            }),
        }
    }

    /// There must be no other fields.
    pub fn end(self) -> Result<(), RequestError> {
        match self.fields.into_iter().next() {
            None => Ok(()),
            Some((key, _)) => Err(RequestError::Unknown(key)),
        }
    }
}
