//! Batches on disk, whole: everything that enters an update but the weights, so that the update can be made again, here or by
//! another program. A dump is a directory of `batch.json` (groups and settings) and `batch.safetensors` (pixels).

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;
use unveil_algo::KlController;
use unveil_config::Config;
use unveil_model::{read_safetensors, write_safetensors};

use crate::batch::TrainGroup;
use crate::error::{LearnerError, Result};
use crate::optim::lr_at;
use crate::plain::Group;
use crate::step::{Counters, Learner, Values};

/// Counted up when the layout changes.
const FORMAT: u32 = 2;
const TEXT: &str = "batch.json";
const PIXELS: &str = "batch.safetensors";

#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    /// Where the learner stood before the update.
    counters: Counters,
    /// The weight of KL to the reference and how it changes.
    kl: KlController,
    /// What enters the loss; for other programs, replay takes its own configuration.
    settings: Value,
    groups: Vec<Group>,
}

/// Where the learner stood before an update.
pub(crate) struct Start {
    pub counters: Counters,
    pub kl: KlController,
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
        kl: learner.kl_controller(),
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
    unveil_core::write_atomic(&path, &text).map_err(LearnerError::io(&path))
}

/// The groups of a dump, for a model whose patches have `patch_len` numbers.
///
/// # Errors
/// Names the file, and the group or response that does not fit.
pub fn load(dir: &Path, patch_len: i64) -> Result<Vec<TrainGroup>> {
    Ok(read(dir, patch_len)?.0)
}

/// Reads a dump: the groups, the values of its responses, and where the learner stood.
///
/// # Errors
/// Names the file, and the group or response that does not fit.
pub(crate) fn read(dir: &Path, patch_len: i64) -> Result<(Vec<TrainGroup>, Values, Start)> {
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
    Ok((groups, values, Start { counters: file.counters, kl: file.kl }))
}
