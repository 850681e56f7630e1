//! Requests and results of the engine: host data, no tensors.

use std::sync::Arc;

use unveil_core::{Attention, Finish, Grid, Prompt, Sampling, WeightVersion};

/// A prompt with its images.
#[derive(Debug, Clone)]
pub struct PromptInput {
    /// The group's id, for error messages.
    pub id: String,
    /// Token ids with image placeholders already expanded, and the grid of each image.
    pub prompt: Prompt,
    /// Patches of all images of the prompt, in order: `[sum(t*h*w), patch length]`, row-major.
    pub patches: Arc<Vec<f32>>,
    /// Content hash of each image: an image whose features are cached for the current weights is not encoded again. Empty: unknown.
    pub hashes: Vec<[u8; 32]>,
}

/// Creates, for each response, a function that is called with one token after another and returns whether the response ends with it.
pub type StopRule = Arc<dyn Fn() -> Box<dyn FnMut(u32) -> bool + Send> + Send + Sync>;

/// A group to generate.
#[derive(Clone)]
pub struct GroupRequest {
    /// Prompt and images.
    pub input: PromptInput,
    /// Key of the group's random numbers, together with the seed ([`crate::random::group_key`]).
    pub key: u64,
    /// Number of responses, temperature, filters, length limit, seed.
    pub sampling: Sampling,
    /// Stop condition in addition to the end token; such a response finishes with `stop`.
    pub stop: Option<StopRule>,
}

impl std::fmt::Debug for GroupRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("GroupRequest");
        out.field("id", &self.input.id)
            .field("key", &self.key)
            .field("sampling", &self.sampling)
            .finish_non_exhaustive()
    }
}

/// Attention of response tokens over the image tokens of their prompt. Row `i` is that of response token `i`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionRows {
    /// Number of image tokens, the length of a row.
    pub cells: usize,
    /// Concatenated rows; each sums to 1.
    pub values: Vec<f32>,
}

impl AttentionRows {
    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.values.len().checked_div(self.cells).unwrap_or(0)
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the row of response token `i`.
    pub fn row(&self, i: usize) -> Option<&[f32]> {
        self.values.chunks_exact(self.cells.max(1)).nth(i)
    }

    /// Converts to the domain type; `None` if the number of cells of `grid` differs from the length of a row.
    pub fn to_attention(&self, grid: Grid) -> Option<Attention> {
        (self.cells > 0 && grid.tokens() == self.cells).then(|| Attention {
            grid: [grid.rows, grid.cols],
            tokens: (0..self.len()).collect(),
            rows: self.values.chunks_exact(self.cells).map(<[f32]>::to_vec).collect(),
        })
    }
}

/// A generated response, before decoding to text.
#[derive(Debug, Clone, PartialEq)]
pub struct RawResponse {
    /// Index in the group.
    pub index: usize,
    /// Token ids, end token included when it was produced.
    pub tokens: Vec<u32>,
    /// Log-probability of each token (fp32) in the requested distribution, without the banned tokens.
    pub logprobs: Vec<f32>,
    /// Weight version that generated each token; it changes within a response if weights were swapped meanwhile.
    pub versions: Vec<WeightVersion>,
    /// Why the response ended.
    pub finish: Finish,
    /// Rows of all tokens except an end token (which is never fed back); `None` without capture or without an image.
    pub attention: Option<AttentionRows>,
}

/// The responses of a group, by index.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupOutput {
    /// The n responses.
    pub responses: Vec<RawResponse>,
}

impl GroupOutput {
    /// Returns n responses that were cancelled before their first token.
    pub(crate) fn cancelled(n: usize) -> Self {
        let response = |index| RawResponse {
            index,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            versions: Vec::new(),
            finish: Finish::Cancelled,
            attention: None,
        };
        Self { responses: (0..n).map(response).collect() }
    }
}

/// Responses to score with the current weights.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// Prompt and images.
    pub input: PromptInput,
    /// Token ids of each response, used verbatim; may be empty.
    pub responses: Vec<Vec<u32>>,
}

/// Teacher-forced result of one response.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoredResponse {
    /// Log-probability of each token; minus infinity for banned ones.
    pub logprobs: Vec<f32>,
    /// The most probable token at each position, without banned ones.
    pub greedy: Vec<u32>,
    /// A row per token; `None` without capture or without an image.
    pub attention: Option<AttentionRows>,
}
