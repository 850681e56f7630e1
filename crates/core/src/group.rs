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

/// How responses are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Responses per prompt.
    pub n: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Length cap in tokens, end token included.
    pub max_new_tokens: usize,
    /// Run seed; the random numbers of a response are a function of (seed, group, index, position) alone.
    pub seed: u64,
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
