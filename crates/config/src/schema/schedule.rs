//! Learning-rate schedule and the rates of groups of parameters: parts of the sections `optimizer`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Course of the learning rate after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Constant, then falling linearly.
    #[default]
    Linear,
    /// Constant, then falling along half a cosine wave; with `decay = 1`, from the end of the warm-up.
    Cosine,
    /// Constant.
    Constant,
}

/// Parameters with a learning rate that differs from `lr`; the schedule is the same. A parameter belongs to the first group that selects it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Parameters of the group: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub parameters: Vec<String>,
    /// Peak learning rate of the group, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub lr: f64,
}
