//! What a checkpoint of a stage says beside its tensors, its files, and whether it fits what is trained now.

use std::path::Path;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tch::Kind;
use unveil_checkpoint::{Object, Reader};
use unveil_config::Config;
use unveil_model::Vlm;

use crate::error::{LearnerError, Result};
use crate::lora::{self, ADAPTER, Base};
use crate::setup::CRITIC;
use crate::snapshot::{MODEL, Stand};

/// What a checkpoint says beside the tensors. Nothing else is state of a learner: rates and random numbers are functions of step and
/// seed, and what judges and scorers have cached lies with the reward service, which answers alike without it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// `sft` or `rl`.
    pub stage: String,
    /// Run seed.
    pub seed: u64,
    /// Counters, weight of KL.
    #[serde(flatten)]
    pub stand: Stand,
    /// Where the run stands in its data, with the groups in flight, which are leased again; stage 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experience: Option<unveil_experience::Snapshot>,
    /// The best evaluation so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Images (stage 1) or responses (stage 2) so far: where the metrics stand.
    pub seen: u64,
    /// The adapters, where adapters are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<SavedAdapters>,
    /// The configuration by key.
    pub config: Vec<(String, String)>,
}

/// What adapters are and what they lie beside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedAdapters {
    pub rank: i64,
    /// Rank, alpha, scaling, in words.
    pub spec: String,
    /// BLAKE3 of the model that they lie beside.
    pub base: String,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Best {
    /// After how many updates.
    pub step: u64,
    /// Its score.
    pub score: f64,
}

impl Meta {
    /// Of a stage of `config` that stands at `stand`.
    pub fn new(stage: &str, config: &Config, stand: Stand, seen: u64) -> Self {
        let (stage, seed) = (stage.to_owned(), config.run.seed);
        let config = unveil_config::entries(config);
        Self { stage, seed, stand, experience: None, best: None, seen, adapters: None, config }
    }

    /// Reads that of a checkpoint of `stage`, made with `seed`.
    pub fn read(reader: &Reader, stage: &str, seed: u64) -> Result<Self> {
        let step = reader.info().step;
        let fault = |what: String| LearnerError::State { step, what };
        let meta: Self = serde_json::from_value(reader.manifest().meta.clone())
            .map_err(|e| fault(format!("its description is not readable: {e}")))?;
        if meta.stage != stage {
            return Err(fault(format!(
                "it is of stage `{}`, not `{stage}`: give each stage a prefix of its own",
                meta.stage
            )));
        }
        if meta.seed != seed {
            let was = meta.seed;
            return Err(fault(format!(
                "it was made with run.seed {was}, now {seed}: use the same seed, or run.resume = \"never\""
            )));
        }
        Ok(meta)
    }

    /// Whether a checkpoint is of models like `vlm` (with adapters on `base`, where it has some) and, where there is one, a critic.
    pub fn fits(&self, reader: &Reader, vlm: &Vlm, base: Option<&Base>, critic: bool) -> Result<()> {
        let fault = |what: String| Err(LearnerError::State { step: reader.info().step, what });
        let weights = || reader.manifest().tensors.iter().filter(|t| t.kind == "weight");
        if critic && !weights().any(|t| t.name.starts_with(CRITIC)) {
            return fault(
                "it has no critic of its own, but learner.critic is \"separate\": use \"shared\", or run.resume = \"never\""
                    .into(),
            );
        }
        match (&self.adapters, vlm.adapters(), base) {
            (None, None, _) => Ok(()),
            (None, Some(_), _) => fault(
                "it holds whole weights, but learner.lora.rank is above 0: set it to 0, or run.resume = \"never\""
                    .into(),
            ),
            (Some(saved), None, _) => {
                fault(format!("they are adapters of rank {}, but learner.lora.rank is 0: set it", saved.rank))
            }
            (Some(saved), Some(own), base) => {
                let now = lora::told(own.spec());
                if saved.spec != now {
                    return fault(lora::differ(&saved.spec, &now));
                }
                if let Some(b) = base.filter(|b| b.hash != saved.base) {
                    return fault(format!(
                        "its adapters belong to the model with BLAKE3 {}, but {} has {}: start from that model, or run.resume = \"never\"",
                        saved.base,
                        b.dir.display(),
                        b.hash
                    ));
                }
                let names: Vec<String> =
                    own.named_parameters().iter().map(|(n, _)| unveil_model::Adapters::stored_name(n)).collect();
                let stored: Vec<&str> = weights().filter(|t| t.part == ADAPTER).map(|t| t.name.as_str()).collect();
                let only = |what: &str, name: &str| {
                    let name =
                        name.strip_prefix("base_model.model.").map_or_else(|| name.into(), unveil_model::own_name);
                    fault(format!("the adapters do not fit learner.lora.targets: `{name}` is only {what}"))
                };
                if let Some(name) = stored.iter().find(|n| !names.iter().any(|own| own == *n)) {
                    return only("there", name);
                }
                match names.iter().find(|n| !stored.contains(&n.as_str())) {
                    Some(name) => only("here", name),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Files of a model directory that training leaves as they are: tokenizer, processor, chat template.
pub(crate) struct StaticFiles(Vec<(String, Bytes)>);

impl StaticFiles {
    /// Reads them from `dir`; weights and what the model writes itself are left out.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in unveil_model::companions(dir)? {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let bytes = std::fs::read(&path).map_err(LearnerError::io(&path))?;
            files.push((format!("{MODEL}/{name}"), Bytes::from(bytes)));
        }
        Ok(Self(files))
    }

    /// The objects of a checkpoint that hold no tensors: what makes the weights a model directory, or adapters ones that peft reads.
    pub fn objects(&self, vlm: &Vlm, base: Option<&Base>) -> Result<Vec<Object>> {
        let named = match base {
            Some(base) => lora::config_file(vlm, &base.dir)?.into_iter().collect(),
            None => {
                let scratch = tempfile::tempdir().map_err(LearnerError::io("temporary directory"))?;
                let mut config = vlm.config().clone();
                // Checkpoints hold weights to their last digit.
                config.dtype = Kind::Float;
                config.save(scratch.path())?;
                let mut named = self.0.clone();
                for name in ["config.json", "generation_config.json"] {
                    let path = scratch.path().join(name);
                    let bytes = std::fs::read(&path).map_err(LearnerError::io(&path))?;
                    named.push((format!("{MODEL}/{name}"), bytes.into()));
                }
                named
            }
        };
        Ok(named.into_iter().map(|(name, bytes)| Object { name, bytes, layout: None }).collect())
    }
}

impl SavedAdapters {
    /// Those of `vlm` on `base`.
    pub fn of(vlm: &Vlm, base: Option<&Base>) -> Option<Self> {
        let (spec, base) = (vlm.adapters()?.spec(), base?.hash.clone());
        Some(Self { rank: spec.rank, spec: lora::told(spec), base })
    }
}
