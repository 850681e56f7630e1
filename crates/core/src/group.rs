//! Groups and responses as they travel from the engine to the learner.

use serde::{Deserialize, Serialize};

/// Number of a set of weights; the weights that stage 2 starts from are version 0, each update adds one.
pub type WeightVersion = u64;

/// One prompt's turn in one pass over the data: unique within a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GroupId {
    /// Pass over the data, from 0.
    pub pass: u64,
    /// Position in that pass's order, from 0.
    pub position: u64,
    /// The record's id.
    pub record: String,
}

/// How responses are sampled. `top_k`, `top_p` and `min_p` are applied in this order to the tempered distribution, as in
/// Hugging Face transformers; they decide what can be drawn, not what is recorded as its log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Responses per prompt.
    pub n: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Only the k most probable tokens; 0 = all.
    pub top_k: usize,
    /// Only the most probable tokens that together reach this probability; 1 = all.
    pub top_p: f64,
    /// Only tokens with at least this share of the most probable token's probability; 0 = all.
    pub min_p: f64,
    /// Length cap in tokens, end token included.
    pub max_new_tokens: usize,
    /// Run seed; the random numbers of a response are a function of (seed, group, index, position) alone.
    pub seed: u64,
    /// Which distribution log-probabilities are of.
    pub logprobs: Logprobs,
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
            logprobs: Logprobs::Tempered,
        }
    }
}

/// Which distribution recorded log-probabilities are of, always without the banned tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Logprobs {
    /// The one that was sampled from: logits divided by the temperature (a temperature of 0 counts as 1).
    #[default]
    Tempered,
    /// The model's own: temperature 1.
    Untempered,
}

impl Logprobs {
    /// The temperature of the recorded distribution.
    pub fn temperature(self, sampled_at: f64) -> f64 {
        match self {
            Self::Tempered if sampled_at > 0.0 => sampled_at,
            _ => 1.0,
        }
    }
}

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The end token was produced.
    Stop,
    /// The length cap was reached.
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
    /// Log-probability of each token under the weights that made it.
    pub logprobs: Vec<f32>,
    /// Weight version that made each token.
    pub versions: Vec<WeightVersion>,
    /// Why it ended.
    pub finish: Finish,
}
