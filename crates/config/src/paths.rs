//! Locations of the files of a run, so that roles that are started separately find each other's files.

use std::path::PathBuf;

use crate::schema::{Config, DataKind};

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

    /// Returns the path or URL of the log and checkpoints of stage 2.
    pub fn checkpoint_url(&self) -> String {
        if self.checkpoint.url.is_empty() { self.run.dir.clone() } else { self.checkpoint.url.clone() }
    }

    /// Returns the path or URL of the log and checkpoints of stage 1.
    pub fn sft_checkpoint_url(&self) -> String {
        format!("{}/sft", self.checkpoint_url().trim_end_matches('/'))
    }
}
