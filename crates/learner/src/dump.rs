//! Batches on disk, whole: everything that enters an update but the weights, so that the update can be made again, here or by
//! another program. A dump is a directory of `batch.json` (groups and settings) and `batch.safetensors` (pixels).

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;
use unveil_config::Config;
use unveil_core::{Breakdown, Finish, Grid, GroupId, Record, Response};
use unveil_model::{GridThw, Prompt, read_safetensors, write_safetensors};

use crate::batch::{GroupInput, TrainGroup};
use crate::error::{LearnerError, Result};
use crate::optim::lr_at;
use crate::step::{Counters, Learner, Values};

/// Counted up when the layout changes.
const FORMAT: u32 = 1;
const TEXT: &str = "batch.json";
const PIXELS: &str = "batch.safetensors";

#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    /// Where the learner stood before the update.
    counters: Counters,
    /// What enters the loss; for other programs, replay takes its own configuration.
    settings: Value,
    groups: Vec<Group>,
}

#[derive(Serialize, Deserialize)]
struct Group {
    id: GroupId,
    record: Record,
    /// Width and height in pixels.
    image_size: (u32, u32),
    /// Token ids, image placeholders expanded.
    prompt: Vec<u32>,
    /// Patches of each image by time, height and width.
    grids: Vec<GridThw>,
    /// Rows and columns of merged image tokens.
    merged: (usize, usize),
    responses: Vec<Answer>,
}

#[derive(Serialize, Deserialize)]
struct Answer {
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
    values: Option<Vec<f64>>,
    reward: Option<f64>,
    masked: bool,
    breakdown: Option<Breakdown>,
}

/// Writes the batch that `learner` is about to take to `dir`, which may exist.
///
/// # Errors
/// A file that cannot be written, inputs that do not fit the model.
pub fn write(dir: &Path, config: &Config, learner: &Learner, groups: &[TrainGroup]) -> Result<()> {
    let values = learner.values(groups)?;
    let s = learner.settings();
    let counters = learner.counters();
    let settings = json!({
        "learner": config.learner, "reward": config.reward, "seed": s.seed, "temperature": s.temperature, "banned": s.banned,
        "attention_layers": s.attention.named(), "lr": lr_at(&s.optimizer, counters.step, s.total_steps),
    });
    let file = File {
        format: FORMAT,
        counters,
        settings,
        groups: groups.iter().map(|g| Group::new(g, values.get(&g.id))).collect(),
    };
    std::fs::create_dir_all(dir).map_err(LearnerError::io(dir))?;
    let patch_len = learner.vlm().config().vision.patch_len();
    let mut pixels = Vec::new();
    for (i, g) in groups.iter().enumerate() {
        pixels.push((format!("{i:04}.pixel_values"), Tensor::f_from_slice(&g.input.patches)?.f_view([-1, patch_len])?));
        let grids: Vec<i64> = g.input.prompt.grids.iter().flatten().copied().collect();
        pixels.push((format!("{i:04}.image_grid_thw"), Tensor::f_from_slice(&grids)?.f_view([-1, 3])?));
    }
    write_safetensors(&dir.join(PIXELS), &pixels)?;
    let path = dir.join(TEXT);
    let text = serde_json::to_vec(&file).map_err(|e| LearnerError::Dump { path: path.clone(), what: e.to_string() })?;
    std::fs::write(&path, text).map_err(LearnerError::io(&path))
}

/// Reads a dump: the groups, the values of its responses, and where the learner stood.
///
/// # Errors
/// Names the file, and the group or response that does not fit.
pub(crate) fn read(dir: &Path, patch_len: i64) -> Result<(Vec<TrainGroup>, Values, Counters)> {
    let path = dir.join(TEXT);
    let fault = |what: String| LearnerError::Dump { path: path.clone(), what };
    let text = std::fs::read(&path).map_err(LearnerError::io(&path))?;
    let file: File = serde_json::from_slice(&text).map_err(|e| fault(e.to_string()))?;
    if file.format != FORMAT {
        return Err(fault(format!("format {} is not {FORMAT}, which this version reads", file.format)));
    }
    let pixels: HashMap<String, Tensor> = read_safetensors(&dir.join(PIXELS))?.into_iter().collect();
    let mut values = Values::new();
    let mut groups = Vec::with_capacity(file.groups.len());
    for (i, group) in file.groups.into_iter().enumerate() {
        let record = group.record.id.clone();
        let fault = |what: String| fault(format!("group {i} (record \"{record}\"): {what}"));
        let patches: i64 = group.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let name = format!("{i:04}.pixel_values");
        let found = pixels.get(&name).ok_or_else(|| fault(format!("{PIXELS} has no `{name}`")))?;
        if found.size() != [patches, patch_len] {
            let size = found.size();
            return Err(fault(format!("`{name}` has shape {size:?}, its grids need [{patches}, {patch_len}]")));
        }
        group.check().map_err(fault)?;
        let by_response = group.responses.iter().map(|r| r.values.clone().unwrap_or_default()).collect();
        if group.responses.iter().any(|r| r.values.is_some()) {
            values.insert(group.id.clone(), by_response);
        }
        groups.push(group.into_train(Vec::<f32>::try_from(found.reshape([-1]))?));
    }
    Ok((groups, values, file.counters))
}

impl Group {
    fn new(g: &TrainGroup, values: Option<&Vec<Vec<f64>>>) -> Self {
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
            record: g.input.record.clone(),
            image_size: g.input.image_size,
            prompt: g.input.prompt.tokens.clone(),
            grids: g.input.prompt.grids.clone(),
            merged: (g.input.merged.rows, g.input.merged.cols),
            responses: g.responses.iter().enumerate().map(answer).collect(),
        }
    }

    fn check(&self) -> Result<(), String> {
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

    fn into_train(self, patches: Vec<f32>) -> TrainGroup {
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
