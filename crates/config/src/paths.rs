//! Locations of the files of a run, so that roles that are started separately find each other's files.

use std::path::PathBuf;

use crate::schema::{Config, DataKind};

/// Prefix of the log and checkpoints of stage 1.
pub const SFT_PREFIX: &str = "sft";

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

    /// Returns the directory of the best model of stage 2.
    pub fn final_model(&self) -> PathBuf {
        self.run_dir().join("model")
    }

    /// Returns the path or URL of the log and checkpoints under `prefix` of the run: stage 2 has the empty prefix, stage 1 [`SFT_PREFIX`].
    pub fn checkpoint_url(&self, prefix: &str) -> String {
        let base = if self.checkpoint.url.is_empty() { &self.run.dir } else { &self.checkpoint.url };
        if prefix.is_empty() { base.clone() } else { format!("{}/{prefix}", base.trim_end_matches('/')) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
