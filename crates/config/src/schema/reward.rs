//! The section `[reward]`: components, their weights and normalisation, and the service around them.

use serde::{Deserialize, Serialize};

/// How a component is normalised over its group before weighting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// As it is.
    None,
    /// Divided by the group's maximum; all below epsilon -> 0 (the paper's form).
    Max,
    /// Minus the group's mean, over its standard deviation; 0 when they are all equal.
    Zscore,
}

/// What every component has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ComponentConfig {
    /// Weight in the total; 0 = off (not computed into the total, still logged).
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
}

impl Default for ComponentConfig {
    fn default() -> Self {
        Self { weight: 1.0, normalise: Normalise::None }
    }
}

/// Form of the vision relevance reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionMode {
    /// Softmax over all image tokens, mean over mention tokens, chance-corrected.
    AllTokens,
    /// As printed: softmax over the abnormal patches only, summed; identically the number of mention tokens.
    PaperLiteral,
}

/// Vision relevance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VisionRelevance {
    /// Weight in the total; 0 switches the component off whole, its differentiable term too.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Form.
    pub mode: VisionMode,
    /// Decoder layers whose attention is read, all heads of each (0-based); with `heads` empty too, the layer floor(2L/3).
    pub layers: Vec<usize>,
    /// Single heads that are read besides: `[layer, head]`. Rows are averaged over all that is read.
    pub heads: Vec<[usize; 2]>,
    /// Scale of the differentiable attention term in the learner's loss, times `weight`; 0 = reward only.
    pub gradient: f64,
}

impl Default for VisionRelevance {
    fn default() -> Self {
        Self {
            weight: 0.5,
            normalise: Normalise::None,
            mode: VisionMode::AllTokens,
            layers: Vec::new(),
            heads: Vec::new(),
            gradient: 0.0,
        }
    }
}

/// Reward components and the service around them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// Box agreement: soft F1 over matched IoU.
    pub localization: ComponentConfig,
    /// Attention of the class tokens on the lesion.
    pub vision_relevance: VisionRelevance,
    /// The answer has the form that was asked for.
    pub format: ComponentConfig,
    /// The abnormal class is named right.
    pub category: ComponentConfig,
    /// Epsilon of `normalise = "max"`.
    pub max_eps: f64,
    /// Listen address of `reward serve`; port 0 = any free one.
    pub listen: String,
    /// Where rollout workers find the service (`http://host:port`); empty = the one that `train` starts.
    pub address: String,
    /// Seconds a rollout worker waits for a group's scores before masking them.
    pub deadline_s: f64,
}

impl Default for Reward {
    fn default() -> Self {
        Self {
            localization: ComponentConfig::default(),
            vision_relevance: VisionRelevance::default(),
            format: ComponentConfig { weight: 0.1, ..Default::default() },
            category: ComponentConfig { weight: 0.2, ..Default::default() },
            max_eps: 1e-6,
            listen: "127.0.0.1:0".into(),
            address: String::new(),
            deadline_s: 30.0,
        }
    }
}
