//! The text of `config.json`, which each family reads and writes in its own way.

use serde_json::{Map, Value};

use crate::config::VlmConfig;

/// A family's text of `config.json`.
pub(crate) trait ConfigText {
    /// Parses the content of `config.json`.
    fn parse(self, root: &Map<String, Value>) -> Result<VlmConfig, String>;

    /// Returns the content of `config.json`, as transformers reads it.
    fn config_json(self, config: &VlmConfig) -> Value;
}
