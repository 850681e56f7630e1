//! What goes into the engine and what comes out: host data, no tensors.

use std::sync::Arc;

use unveil_core::{Attention, Finish, Grid, Sampling, WeightVersion};
use unveil_model::Prompt;

/// One prompt with its images.
#[derive(Debug, Clone)]
pub struct GroupInput {
    /// Named in errors.
    pub id: String,
    /// Token ids with image placeholders already expanded, and the grid of each image.
    pub prompt: Prompt,
    /// Flattened patches of all images of the prompt in order: `sum(t*h*w) x patch length`, row-major.
    pub patches: Arc<Vec<f32>>,
    /// What each image's patches were made from, by content: an image that was seen under the present weights is not encoded
    /// again. Empty = not known.
    pub hashes: Vec<[u8; 32]>,
}

/// Tells of a response's tokens, one after another, whether it ends with the one just given. Made anew for each response.
pub type StopRule = Arc<dyn Fn() -> Box<dyn FnMut(u32) -> bool + Send> + Send + Sync>;

/// One group to generate.
#[derive(Clone)]
pub struct GroupRequest {
    /// Prompt and image.
    pub input: GroupInput,
    /// Together with the seed, the key of its random numbers ([`crate::random::group_key`]).
    pub key: u64,
    /// Responses, temperature, filters, length cap, seed.
    pub sampling: Sampling,
    /// Ends responses besides the end token; such a response finishes with `stop`.
    pub stop: Option<StopRule>,
}

/// Attention of response tokens over the image tokens of their prompt. Row `i` belongs to response token `i`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionRows {
    /// Image tokens: values per row.
    pub cells: usize,
    /// Rows one after another; each sums to 1.
    pub values: Vec<f32>,
}

impl AttentionRows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len().checked_div(self.cells).unwrap_or(0)
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row of response token `i`.
    pub fn row(&self, i: usize) -> Option<&[f32]> {
        self.values.chunks_exact(self.cells.max(1)).nth(i)
    }

    /// As the domain type, when `grid` has as many cells as the rows have values.
    pub fn to_attention(&self, grid: Grid) -> Option<Attention> {
        (self.cells > 0 && grid.tokens() == self.cells).then(|| Attention {
            grid: [grid.rows, grid.cols],
            tokens: (0..self.len()).collect(),
            rows: self.values.chunks_exact(self.cells).map(<[f32]>::to_vec).collect(),
        })
    }
}

/// One generated response, before it is turned into text.
#[derive(Debug, Clone, PartialEq)]
pub struct RawResponse {
    /// Position within the group.
    pub index: usize,
    /// Token ids, end token included when it was produced.
    pub tokens: Vec<u32>,
    /// Log-probability of each token (fp32) in the distribution that the request names, without the banned tokens.
    pub logprobs: Vec<f32>,
    /// Weight version that made each token; from one to the next they differ where weights were swapped in between.
    pub versions: Vec<WeightVersion>,
    /// Why it ended.
    pub finish: Finish,
    /// Rows of all tokens but an end token (which is never fed back), when capture is on and the prompt has an image.
    pub attention: Option<AttentionRows>,
}

/// The responses of one group, by index.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupOutput {
    /// n responses.
    pub responses: Vec<RawResponse>,
}

impl GroupOutput {
    /// n responses that were cancelled before their first token.
    pub(crate) fn nothing(n: usize) -> Self {
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

/// Responses to score under the present weights.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// Prompt and image.
    pub input: GroupInput,
    /// Token ids of each response, taken verbatim; may be empty.
    pub responses: Vec<Vec<u32>>,
}

/// Teacher-forced result of one response.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scored {
    /// Log-probability of each token; minus infinity for a banned one.
    pub logprobs: Vec<f32>,
    /// The most probable token at each position (banned ones left out).
    pub greedy: Vec<u32>,
    /// A row per token, when capture is on and the prompt has an image.
    pub attention: Option<AttentionRows>,
}
