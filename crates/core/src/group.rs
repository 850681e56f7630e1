//! Groups and responses, as sent from the engine to the learner.

use serde::{Deserialize, Serialize};

/// Version of the weights: 0 at the start of stage 2, plus one per update.
pub type WeightVersion = u64;

/// Identifies one prompt in one pass over the data; unique within a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GroupId {
    /// Pass over the data, from 0.
    pub pass: u64,
    /// Position in that pass's order, from 0.
    pub position: u64,
    /// Id of the record.
    pub record: String,
}

/// Returns record ids by pass in order; a batch may span the end of a pass.
pub fn records_by_pass(groups: &[GroupId]) -> Vec<(u64, Vec<String>)> {
    let mut out: Vec<(u64, Vec<String>)> = Vec::new();
    for g in groups {
        match out.last_mut() {
            Some((pass, ids)) if *pass == g.pass => ids.push(g.record.clone()),
            _ => out.push((g.pass, vec![g.record.clone()])),
        }
    }
    out
}

/// Sampling settings. `top_k`, `top_p` and `min_p` are applied in this order to the tempered distribution, as in Hugging Face
/// transformers; they limit which tokens can be drawn and do not change the recorded log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Responses per prompt.
    pub n: usize,
    /// Temperature; 0 is greedy decoding.
    pub temperature: f64,
    /// Samples from the k most probable tokens only; 0 disables the filter.
    pub top_k: usize,
    /// Samples from the smallest set of most probable tokens that reaches this probability; 1 disables the filter.
    pub top_p: f64,
    /// Samples only tokens with at least this fraction of the most probable token's probability; 0 disables the filter.
    pub min_p: f64,
    /// Maximum response length in tokens, including the end token.
    pub max_new_tokens: usize,
    /// Seed of the run; the random numbers of a response depend on (seed, group, index, position) only.
    pub seed: u64,
    /// Distribution whose log-probabilities are recorded.
    pub logprobs: LogprobKind,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens: 64,
            seed: 0,
            logprobs: LogprobKind::Tempered,
        }
    }
}

/// Distribution whose log-probabilities are recorded, always without the banned tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogprobKind {
    /// The sampled distribution: logits divided by the temperature (a temperature of 0 counts as 1).
    #[default]
    Tempered,
    /// The model's distribution at temperature 1.
    Untempered,
}

impl LogprobKind {
    /// Returns the temperature of the recorded distribution.
    pub fn temperature(self, sampling_temperature: f64) -> f64 {
        match self {
            Self::Tempered if sampling_temperature > 0.0 => sampling_temperature,
            _ => 1.0,
        }
    }
}

/// Reason for the end of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The end token was produced.
    Stop,
    /// The maximum length was reached.
    Length,
    /// The caller cancelled it.
    Cancelled,
}

/// One generated response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Position within the group.
    pub index: usize,
    /// Token ids, end token included when it was produced.
    pub tokens: Vec<u32>,
    /// Text without special tokens.
    pub text: String,
    /// Log-probability of each token under the weights that generated it.
    pub logprobs: Vec<f32>,
    /// Weight version that generated each token.
    pub versions: Vec<WeightVersion>,
    /// Reason for the end of the response.
    pub finish: Finish,
}
