//! Metadata and companion files of a stage's checkpoints, and the check that a checkpoint fits the model being trained.

use std::path::Path;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tch::Kind;
use unveil_checkpoint::{Object, Reader};
use unveil_config::Config;
use unveil_model::Vlm;
use unveil_trainer::lora::{self, BaseModel};
use unveil_trainer::{CRITIC_PREFIX, TrainerProgress};

use crate::error::{LearnerError, Result};
use crate::snapshot::{ADAPTER, MODEL};

/// State of a learner besides its tensors. Nothing else needs saving: learning rates and random numbers are functions
/// of step and seed, and caches of judges and scorers belong to the reward service, which answers the same without
/// them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CheckpointMeta {
    /// `sft` or `rl`.
    pub stage: String,
    /// Seed of the run.
    pub seed: u64,
    /// Counters and the KL coefficient.
    #[serde(flatten)]
    pub progress: TrainerProgress,
    /// Position in the data, with the groups in flight, which are leased again; stage 2 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experience: Option<unveil_experience::ExperienceSnapshot>,
    /// Best evaluation so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<BestCheckpoint>,
    /// Number of images (stage 1) or responses (stage 2) so far, for the metrics.
    pub seen: u64,
    /// Adapters; `None` in full fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<SavedAdapters>,
    /// Configuration as pairs of key and value.
    pub config: Vec<(String, String)>,
}

/// Adapters of a checkpoint and the model that they belong to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedAdapters {
    pub rank: i64,
    /// Rank, alpha and scaling as text.
    pub spec: String,
    /// BLAKE3 of the base model.
    pub base: String,
}

/// Best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct BestCheckpoint {
    /// Number of updates at that evaluation.
    pub step: u64,
    /// Score of that evaluation.
    pub score: f64,
}

impl CheckpointMeta {
    /// Creates the metadata of a stage from its configuration and the progress of its trainer.
    pub(crate) fn new(stage: &str, config: &Config, progress: TrainerProgress) -> Self {
        let stage = stage.to_owned();
        let seed = config.run.seed;
        let config = unveil_config::entries(config);
        Self { stage, seed, progress, experience: None, best: None, seen: 0, adapters: None, config }
    }

    /// Reads the metadata of a checkpoint and checks its stage and seed.
    pub(crate) fn read(reader: &Reader, stage: &str, seed: u64) -> Result<Self> {
        let step = reader.info().step;
        let error = |what: String| LearnerError::CheckpointState { step, what };
        let meta: Self = serde_json::from_value(reader.manifest().meta.clone())
            .map_err(|e| error(format!("its metadata cannot be decoded: {e}")))?;
        if meta.stage != stage {
            return Err(error(format!(
                "it belongs to stage `{}`, not `{stage}`: give each stage its own prefix",
                meta.stage
            )));
        }
        if meta.seed != seed {
            let saved_seed = meta.seed;
            return Err(error(format!(
                "it was saved with run.seed {saved_seed}, now {seed}: use the same seed, or run.resume = \"never\""
            )));
        }
        Ok(meta)
    }

    /// Checks that a checkpoint fits `vlm`, its adapters on `base` if it has any, and the critic if there is one.
    pub(crate) fn check_fits(&self, reader: &Reader, vlm: &Vlm, base: Option<&BaseModel>, critic: bool) -> Result<()> {
        let mismatch = |what: String| Err(LearnerError::CheckpointState { step: reader.info().step, what });
        let weights = || reader.manifest().tensors.iter().filter(|t| t.kind == "weight");
        if critic && !weights().any(|t| t.name.starts_with(CRITIC_PREFIX)) {
            return mismatch(
                "it has no separate critic, but learner.critic is \"separate\": use \"shared\", or run.resume = \"never\""
                    .into(),
            );
        }
        let section = if self.stage == "sft" { "sft" } else { "learner" };
        match (&self.adapters, vlm.adapters(), base) {
            (None, None, _) => Ok(()),
            (None, Some(_), _) => mismatch(format!(
                "it contains whole weights, but {section}.lora.rank is above 0: set it to 0, or run.resume = \"never\""
            )),
            (Some(saved), None, _) => {
                mismatch(format!("it contains adapters of rank {}, but {section}.lora.rank is 0: set it", saved.rank))
            }
            (Some(saved), Some(adapters), base) => {
                let spec = lora::describe(adapters.spec());
                if saved.spec != spec {
                    return mismatch(lora::mismatch(section, &saved.spec, &spec));
                }
                if let Some(b) = base.filter(|b| b.hash != saved.base) {
                    return mismatch(format!(
                        "its adapters belong to the model with BLAKE3 {}, but {} has {}: start from that model, or run.resume = \"never\"",
                        saved.base,
                        b.dir.display(),
                        b.hash
                    ));
                }
                let names: Vec<String> =
                    adapters.saved_tensors().map(|(n, _)| unveil_model::Adapters::peft_name(n)).collect();
                let stored: Vec<&str> = weights().filter(|t| t.artifact == ADAPTER).map(|t| t.name.as_str()).collect();
                let unmatched = |place: &str, name: &str| {
                    let name = name
                        .strip_prefix("base_model.model.")
                        .map_or_else(|| name.into(), unveil_model::canonical_name);
                    mismatch(format!("the adapters do not match {section}.lora.targets: `{name}` is only in {place}"))
                };
                if let Some(name) = stored.iter().find(|n| !names.iter().any(|name| name == *n)) {
                    return unmatched("the checkpoint", name);
                }
                match names.iter().find(|n| !stored.contains(&n.as_str())) {
                    Some(name) => unmatched("the model", name),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Files of a model directory that training does not change: tokenizer, processor, chat template.
pub(crate) struct StaticFiles(Vec<(String, Bytes)>);

impl StaticFiles {
    /// Reads the files from `dir`, except weights and the files that the model writes itself.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in unveil_model::companion_files(dir)? {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let bytes = std::fs::read(&path).map_err(LearnerError::io("read", &path))?;
            files.push((format!("{MODEL}/{name}"), Bytes::from(bytes)));
        }
        Ok(Self(files))
    }

    /// Returns the objects of a checkpoint that contain no tensors: the files that complete a model directory, or an
    /// adapter directory that peft can load.
    pub(crate) fn objects(&self, vlm: &Vlm, base: Option<&BaseModel>) -> Result<Vec<Object>> {
        let named = match base {
            Some(base) => adapter_config_file(vlm, &base.dir)?.into_iter().collect(),
            None => {
                let scratch = tempfile::tempdir().map_err(LearnerError::io("create", "a temporary directory"))?;
                let mut config = vlm.config().clone();
                // Checkpoints contain fp32 master weights.
                config.dtype = Kind::Float;
                config.save(scratch.path())?;
                let mut named = self.0.clone();
                for name in ["config.json", "generation_config.json"] {
                    let path = scratch.path().join(name);
                    let bytes = std::fs::read(&path).map_err(LearnerError::io("read", &path))?;
                    named.push((format!("{MODEL}/{name}"), bytes.into()));
                }
                named
            }
        };
        Ok(named.into_iter().map(|(name, bytes)| Object { name, bytes, layout: None }).collect())
    }
}

/// Returns the checkpoint file that describes the adapters: its name and contents. `None` without adapters.
fn adapter_config_file(vlm: &Vlm, base: &Path) -> Result<Option<(String, Bytes)>> {
    let Some(adapters) = vlm.adapters() else { return Ok(None) };
    let scratch = tempfile::tempdir().map_err(LearnerError::io("create", "a temporary directory"))?;
    adapters.save_config(scratch.path(), &base.to_string_lossy())?;
    let path = scratch.path().join("adapter_config.json");
    let bytes = std::fs::read(&path).map_err(LearnerError::io("read", &path))?;
    Ok(Some((format!("{ADAPTER}/adapter_config.json"), bytes.into())))
}

impl SavedAdapters {
    /// Describes the adapters of `vlm` on `base`; `None` if there are no adapters.
    pub(crate) fn new(vlm: &Vlm, base: Option<&BaseModel>) -> Option<Self> {
        let spec = vlm.adapters()?.spec();
        let base = base?.hash.clone();
        Some(Self { rank: spec.rank, spec: lora::describe(spec), base })
    }
}
