//! Data types of weights.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Data type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit floating point (4 bytes per weight).
    #[default]
    Float32,
    /// bfloat16 (2 bytes per weight).
    Bfloat16,
}
