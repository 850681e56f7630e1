//! Batch dumps: everything that enters an update except the weights, so that the update can be repeated here or by another program. A
//! dump is a directory of `batch.json` (groups and settings) and `batch.safetensors` (pixels).

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;
use unveil_algo::KlController;
use unveil_config::Config;
use unveil_core::TrainGroup;
use unveil_model::{read_safetensors, write_safetensors};

use crate::error::{Result, TrainerError};
use crate::learning_rate::lr_at;
use crate::step::{Counters, PolicyTrainer, ValuesByGroup};
use crate::wire::GroupDump;

/// Version of the format, incremented with every change.
const FORMAT_VERSION: u32 = 2;
const BATCH_FILE: &str = "batch.json";
const PIXELS_FILE: &str = "batch.safetensors";

#[derive(Serialize, Deserialize)]
struct BatchFile {
    format: u32,
    /// Counters of the trainer before the update.
    counters: Counters,
    /// Controller of the KL coefficient before the update.
    kl: KlController,
    /// Settings that enter the loss, for other programs; replay reads its own configuration instead.
    settings: Value,
    groups: Vec<GroupDump>,
}

/// State of the trainer before the dumped update.
pub(crate) struct DumpedState {
    pub counters: Counters,
    pub kl: KlController,
}

/// Writes the batch that `trainer` is about to train on to `dir`, which may exist.
///
/// # Errors
/// Returns [`TrainerError::Io`] if a file cannot be written, or an error of the model if the inputs do not fit it.
pub fn write(dir: &Path, config: &Config, trainer: &PolicyTrainer, groups: &[TrainGroup]) -> Result<()> {
    let values = trainer.compute_values(groups)?;
    let s = trainer.settings();
    let counters = trainer.counters();
    let settings = json!({
        "learner": config.learner, "reward": config.reward, "seed": s.seed, "temperature": s.temperature, "banned": s.banned,
        "attention_layers": s.attention.layers(), "lr": lr_at(&s.optimizer, counters.step, s.total_steps),
    });
    let file = BatchFile {
        format: FORMAT_VERSION,
        counters,
        kl: trainer.kl_controller(),
        settings,
        groups: groups.iter().map(|g| GroupDump::new(g, values.get(&g.id))).collect(),
    };
    std::fs::create_dir_all(dir).map_err(TrainerError::io(dir))?;
    let patch_len = trainer.vlm().config().vision.patch_len();
    let mut pixels = Vec::new();
    for (i, g) in groups.iter().enumerate() {
        pixels.push((format!("{i:04}.pixel_values"), Tensor::f_from_slice(&g.input.patches)?.f_view([-1, patch_len])?));
        let grids: Vec<i64> = g.input.prompt.grids.iter().flatten().copied().collect();
        pixels.push((format!("{i:04}.image_grid_thw"), Tensor::f_from_slice(&grids)?.f_view([-1, 3])?));
    }
    write_safetensors(&dir.join(PIXELS_FILE), &pixels)?;
    let path = dir.join(BATCH_FILE);
    let text = serde_json::to_vec(&file).map_err(|e| TrainerError::Dump { path: path.clone(), what: e.to_string() })?;
    unveil_core::write_atomic(&path, &text).map_err(TrainerError::io(&path))
}

/// Loads the groups of a dump, for a model whose patches have `patch_len` values.
///
/// # Errors
/// Returns [`TrainerError::Dump`] naming the file, and the group or response that does not fit, or [`TrainerError::Io`].
pub fn load(dir: &Path, patch_len: i64) -> Result<Vec<TrainGroup>> {
    Ok(read(dir, patch_len)?.0)
}

/// Reads a dump: the groups, the values of their responses, and the state of the trainer.
///
/// # Errors
/// See [`load`].
pub(crate) fn read(dir: &Path, patch_len: i64) -> Result<(Vec<TrainGroup>, ValuesByGroup, DumpedState)> {
    let path = dir.join(BATCH_FILE);
    let invalid = |what: String| TrainerError::Dump { path: path.clone(), what };
    let text = std::fs::read(&path).map_err(TrainerError::io(&path))?;
    let file: BatchFile = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
    if file.format != FORMAT_VERSION {
        return Err(invalid(format!("format {} is not {FORMAT_VERSION}, which this version reads", file.format)));
    }
    let pixels: HashMap<String, Tensor> = read_safetensors(&dir.join(PIXELS_FILE))?.into_iter().collect();
    let mut values = ValuesByGroup::new();
    let mut groups = Vec::with_capacity(file.groups.len());
    for (i, group) in file.groups.into_iter().enumerate() {
        let record = group.record.id.clone();
        let invalid = |what: String| invalid(format!("group {i} (record \"{record}\"): {what}"));
        let patches: i64 = group.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let name = format!("{i:04}.pixel_values");
        let values_of_patches = pixels.get(&name).ok_or_else(|| invalid(format!("{PIXELS_FILE} has no `{name}`")))?;
        if values_of_patches.size() != [patches, patch_len] {
            let size = values_of_patches.size();
            return Err(invalid(format!("`{name}` has shape {size:?}, but its grids need [{patches}, {patch_len}]")));
        }
        group.validate().map_err(invalid)?;
        let by_response = group.responses.iter().map(|r| r.values.clone().unwrap_or_default()).collect();
        if group.responses.iter().any(|r| r.values.is_some()) {
            values.insert(group.id.clone(), by_response);
        }
        groups.push(group.into_train_group(Vec::<f32>::try_from(values_of_patches.reshape([-1]))?));
    }
    Ok((groups, values, DumpedState { counters: file.counters, kl: file.kl }))
}
