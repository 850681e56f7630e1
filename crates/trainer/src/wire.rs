//! Serialized form of a group without its pixels, for batch dumps and for messages between ranks.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use unveil_core::{Breakdown, Finish, Grid, GridThw, GroupId, GroupInput, Prompt, Record, Response, TrainGroup};

/// A group without its pixels.
#[derive(Serialize, Deserialize, Debug)]
pub struct GroupDump {
    pub(crate) id: GroupId,
    /// Name of the worker that generated it.
    #[serde(default)]
    worker: String,
    pub(crate) record: Record,
    /// Width and height of the image in pixels.
    image_size: (u32, u32),
    /// Token ids with image placeholders expanded.
    prompt: Vec<u32>,
    /// Number of patches of each image along time, height and width.
    pub(crate) grids: Vec<GridThw>,
    /// Rows and columns of the grid of merged image tokens.
    merged: (usize, usize),
    pub(crate) responses: Vec<ResponseDump>,
}

/// A response and its rewards.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct ResponseDump {
    index: usize,
    tokens: Vec<u32>,
    text: String,
    /// Byte range of the text that each token covers.
    spans: Vec<(usize, usize)>,
    /// Under the weights that generated the tokens; written with all digits, so that programs that read fp64 get the same values.
    logprobs: Vec<f64>,
    versions: Vec<u64>,
    finish: Finish,
    /// Values before the update; `None` without a value head, or for a masked response.
    pub values: Option<Vec<f64>>,
    reward: Option<f64>,
    masked: bool,
    breakdown: Option<Breakdown>,
}

impl GroupDump {
    /// Converts a group; `values` are those of its responses before the update.
    pub fn new(g: &TrainGroup, values: Option<&Vec<Vec<f64>>>) -> Self {
        let response = |(i, r): (usize, &Response)| {
            let breakdown = g.breakdowns.iter().find(|b| b.index == r.index).cloned();
            let reward = breakdown.as_ref().and_then(|b| b.total);
            ResponseDump {
                index: r.index,
                tokens: r.tokens.clone(),
                text: r.text.clone(),
                spans: g.spans.get(i).cloned().unwrap_or_default(),
                logprobs: r.logprobs.iter().map(|v| f64::from(*v)).collect(),
                versions: r.versions.clone(),
                finish: r.finish,
                values: values.and_then(|v| v.get(i)).filter(|v| !v.is_empty()).cloned(),
                reward,
                masked: reward.is_none(),
                breakdown,
            }
        };
        Self {
            id: g.id.clone(),
            worker: g.worker.clone(),
            record: g.input.record.clone(),
            image_size: g.input.image_size,
            prompt: g.input.prompt.tokens.clone(),
            grids: g.input.prompt.grids.clone(),
            merged: (g.input.merged.rows, g.input.merged.cols),
            responses: g.responses.iter().enumerate().map(response).collect(),
        }
    }

    /// Checks that all lists of a response have its number of tokens and that `masked` agrees with the reward.
    ///
    /// # Errors
    /// Returns a message that names the response and the field.
    pub fn validate(&self) -> Result<(), String> {
        for r in &self.responses {
            let n = r.tokens.len();
            let lists = [("logprobs", r.logprobs.len()), ("versions", r.versions.len()), ("spans", r.spans.len())];
            let with_values = r.values.as_ref().map(|v| ("values", v.len()));
            if let Some((name, len)) = lists.into_iter().chain(with_values).find(|(_, len)| *len != n) {
                return Err(format!("response {} has {n} tokens but {len} `{name}`", r.index));
            }
            if r.masked != r.reward.is_none() {
                return Err(format!("response {}: `masked` is {}, which contradicts its reward", r.index, r.masked));
            }
        }
        Ok(())
    }

    /// Converts to a group that can be trained on, with the pixels `patches`.
    pub fn into_train_group(self, patches: Vec<f32>) -> TrainGroup {
        let input = GroupInput {
            record: self.record,
            image_size: self.image_size,
            prompt: Prompt { tokens: self.prompt, grids: self.grids },
            patches,
            encoded: Default::default(),
            merged: Grid { rows: self.merged.0, cols: self.merged.1 },
        };
        let record = input.record.id.clone();
        let mut out = TrainGroup {
            id: self.id,
            worker: self.worker,
            input: Arc::new(input),
            responses: Vec::new(),
            spans: Vec::new(),
            breakdowns: Vec::new(),
            attention: Vec::new(),
            generate_ms: 0.0,
            reward_ms: 0.0,
        };
        for r in self.responses {
            let components = r.breakdown.map(|b| b.components).unwrap_or_default();
            out.breakdowns.push(Breakdown { id: record.clone(), index: r.index, total: r.reward, components });
            out.spans.push(r.spans);
            out.responses.push(Response {
                index: r.index,
                tokens: r.tokens,
                text: r.text,
                logprobs: r.logprobs.into_iter().map(|v| v as f32).collect(),
                versions: r.versions,
                finish: r.finish,
            });
        }
        out
    }
}
