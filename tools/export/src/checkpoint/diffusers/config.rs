//! The `config.json` of a network, as far as its weights do not tell.

use std::path::Path;

use serde_json::Value;

use super::super::{CheckpointError, file_name, folder};

/// Longest `config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A network's `config.json`.
pub(super) struct Config(Value);

impl Config {
    pub(super) fn read(path: &Path) -> Result<Config, CheckpointError> {
        let refuse = |problem: String| CheckpointError::Entry {
            entry: file_name(path),
            problem,
        };
        let text = folder::read_text(path, MAX_CONFIG_BYTES)?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|error| refuse(format!("expected a JSON object, found: {error}")))?;
        if json.is_object() {
            Ok(Config(json))
        } else {
            Err(refuse("expected a JSON object, found another value".into()))
        }
    }

    /// What is wrong where a field is there and is not one of these.
    pub(super) fn differs(&self, field: &str, expected: &[&str]) -> Option<String> {
        let found = match self.0.get(field) {
            None | Some(Value::Null) => return None,
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        (!expected.contains(&found.as_str())).then(|| {
            format!(
                "config.json: {field}: expected {}, found {found}",
                expected.join(" or ")
            )
        })
    }

    /// A number, or one for each block.
    pub(super) fn numbers(&self, field: &str) -> Option<Vec<u64>> {
        match self.0.get(field)? {
            Value::Array(items) => items.iter().map(Value::as_u64).collect(),
            number => number.as_u64().map(|number| vec![number]),
        }
    }
}

/// Refuses a pipeline that is not SDXL's.
pub(super) fn pipeline(path: &Path) -> Result<(), CheckpointError> {
    let config = Config::read(path)?;
    let found = match config.0.get("_class_name") {
        Some(Value::String(name)) if name.starts_with("StableDiffusionXL") => return Ok(()),
        Some(other) => other.to_string(),
        None => "none".into(),
    };
    Err(CheckpointError::Entry {
        entry: "_class_name".into(),
        problem: format!("expected StableDiffusionXLPipeline, found {found}"),
    })
}
