//! Locations of the files of a run, so that roles that are started separately find each other's files.

use std::path::PathBuf;

use crate::schema::{Config, DataKind};

/// Prefix of the log and checkpoints of the first phase of stage 1.
const SFT_PREFIX: &str = "sft";

/// Prefixes of the logs and checkpoints of the phases of stage 1, in order; there are no more phases.
pub const SFT_PREFIXES: [&str; 8] = [
    SFT_PREFIX,
    "sft/phase-2",
    "sft/phase-3",
    "sft/phase-4",
    "sft/phase-5",
    "sft/phase-6",
    "sft/phase-7",
    "sft/phase-8",
];

impl Config {
    /// Returns the run directory.
    pub fn run_dir(&self) -> PathBuf {
        PathBuf::from(&self.run.dir)
    }

    /// Returns the record file for training and evaluation.
    pub fn records(&self) -> PathBuf {
        match self.data.kind {
            DataKind::Jsonl => PathBuf::from(&self.data.root),
            DataKind::Synth | DataKind::Voc => self.run_dir().join("data").join("records.jsonl"),
        }
    }

    /// Returns the directory of the model that stage 1 starts from.
    pub fn initial_model(&self) -> PathBuf {
        if self.model.dir.is_empty() { self.run_dir().join("model-init") } else { PathBuf::from(&self.model.dir) }
    }

    /// Returns the directory of the model that stage 1 produces and stage 2 starts from.
    pub fn stage1_model(&self) -> PathBuf {
        if self.sft.steps == 0 { self.initial_model() } else { self.run_dir().join("stage1") }
    }

    /// Returns the directory of the adapters that stage 1 produces, if it trains some.
    pub fn stage1_adapter(&self) -> PathBuf {
        self.run_dir().join("stage1-adapter")
    }

    /// Returns the directory of the model that stage 2 loads: that of stage 1, or the initial one if stage 2 continues its adapters.
    pub fn stage2_base(&self) -> PathBuf {
        if self.learner.lora.continue_sft { self.initial_model() } else { self.stage1_model() }
    }

    /// Returns the directory of the best model of stage 2.
    pub fn final_model(&self) -> PathBuf {
        self.run_dir().join("model")
    }

    /// Returns the path or URL of the log and checkpoints under `prefix` of the run: stage 2 has the empty prefix, stage 1 those of
    /// [`SFT_PREFIXES`].
    pub fn checkpoint_url(&self, prefix: &str) -> String {
        let base = if self.checkpoint.url.is_empty() { &self.run.dir } else { &self.checkpoint.url };
        if prefix.is_empty() { base.clone() } else { format!("{}/{prefix}", base.trim_end_matches('/')) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_2_starts_from_the_model_that_its_adapters_belong_to() {
        let mut config = Config::default();
        assert_eq!(config.stage2_base(), config.stage1_model());
        config.learner.lora.continue_sft = true;
        assert_eq!(config.stage2_base(), config.initial_model());
    }

    #[test]
    fn checkpoints_are_in_the_run_directory_or_at_the_url() {
        let mut config = Config::default();
        config.run.dir = "runs/a".into();
        assert_eq!(config.checkpoint_url(""), "runs/a");
        assert_eq!(config.checkpoint_url(SFT_PREFIX), "runs/a/sft");
        config.checkpoint.url = "s3://bucket/a/".into();
        assert_eq!(config.checkpoint_url(""), "s3://bucket/a/");
        assert_eq!(config.checkpoint_url(SFT_PREFIX), "s3://bucket/a/sft");
    }
}
