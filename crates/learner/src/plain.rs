//! A group as plain data without its pixels: what lies in a dump and what ranks send each other. Knows no file and no socket.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use unveil_core::{Breakdown, Finish, Grid, GroupId, Record, Response};
use unveil_model::{GridThw, Prompt};

use crate::batch::{GroupInput, TrainGroup};

#[derive(Serialize, Deserialize)]
pub(crate) struct Group {
    pub id: GroupId,
    /// Who made it.
    #[serde(default)]
    worker: String,
    pub record: Record,
    /// Width and height in pixels.
    image_size: (u32, u32),
    /// Token ids, image placeholders expanded.
    prompt: Vec<u32>,
    /// Patches of each image by time, height and width.
    pub grids: Vec<GridThw>,
    /// Rows and columns of merged image tokens.
    merged: (usize, usize),
    pub responses: Vec<Answer>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Answer {
    index: usize,
    tokens: Vec<u32>,
    text: String,
    /// Bytes of the text that each token covers.
    spans: Vec<(usize, usize)>,
    /// Under the weights that made the tokens; all digits, so that programs that read fp64 see the same numbers.
    logprobs: Vec<f64>,
    versions: Vec<u64>,
    finish: Finish,
    /// Of the value head before the update; none without one, or where the response is masked.
    pub values: Option<Vec<f64>>,
    reward: Option<f64>,
    masked: bool,
    breakdown: Option<Breakdown>,
}

impl Group {
    pub fn new(g: &TrainGroup, values: Option<&Vec<Vec<f64>>>) -> Self {
        let answer = |(i, r): (usize, &Response)| {
            let breakdown = g.breakdowns.iter().find(|b| b.index == r.index).cloned();
            let reward = breakdown.as_ref().and_then(|b| b.total);
            Answer {
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
            responses: g.responses.iter().enumerate().map(answer).collect(),
        }
    }

    pub fn check(&self) -> Result<(), String> {
        for r in &self.responses {
            let n = r.tokens.len();
            let lists = [("logprobs", r.logprobs.len()), ("versions", r.versions.len()), ("spans", r.spans.len())];
            let with_values = r.values.as_ref().map(|v| ("values", v.len()));
            if let Some((name, found)) = lists.into_iter().chain(with_values).find(|(_, len)| *len != n) {
                return Err(format!("response {} has {n} tokens but {found} `{name}`", r.index));
            }
            if r.masked != r.reward.is_none() {
                return Err(format!("response {}: `masked` is {}, its reward says otherwise", r.index, r.masked));
            }
        }
        Ok(())
    }

    pub fn into_train(self, patches: Vec<f32>) -> TrainGroup {
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
        for a in self.responses {
            let components = a.breakdown.map(|b| b.components).unwrap_or_default();
            out.breakdowns.push(Breakdown { id: record.clone(), index: a.index, total: a.reward, components });
            out.spans.push(a.spans);
            out.responses.push(Response {
                index: a.index,
                tokens: a.tokens,
                text: a.text,
                logprobs: a.logprobs.into_iter().map(|v| v as f32).collect(),
                versions: a.versions,
                finish: a.finish,
            });
        }
        out
    }
}
