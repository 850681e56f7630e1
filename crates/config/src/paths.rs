//! Where the files of a run lie. One place, so that roles started apart find each other's files.

use std::path::PathBuf;

use crate::schema::{Config, DataKind};

impl Config {
    /// The run directory.
    pub fn run_dir(&self) -> PathBuf {
        PathBuf::from(&self.run.dir)
    }

    /// The record file that training and evaluation read.
    pub fn records(&self) -> PathBuf {
        match self.data.kind {
            DataKind::Jsonl => PathBuf::from(&self.data.root),
            DataKind::Synth | DataKind::Voc => self.run_dir().join("data").join("records.jsonl"),
        }
    }

    /// The model that stage 1 starts from.
    pub fn initial_model(&self) -> PathBuf {
        if self.model.dir.is_empty() { self.run_dir().join("model-init") } else { PathBuf::from(&self.model.dir) }
    }

    /// The model that stage 1 made, and stage 2 starts from.
    pub fn stage1_model(&self) -> PathBuf {
        if self.sft.steps == 0 { self.initial_model() } else { self.run_dir().join("stage1") }
    }

    /// The best model of stage 2.
    pub fn final_model(&self) -> PathBuf {
        self.run_dir().join("model")
    }

    /// Path or URL of stage 2's log and checkpoints.
    pub fn checkpoint_url(&self) -> String {
        if self.checkpoint.url.is_empty() { self.run.dir.clone() } else { self.checkpoint.url.clone() }
    }

    /// Path or URL of stage 1's log and checkpoints.
    pub fn sft_checkpoint_url(&self) -> String {
        format!("{}/sft", self.checkpoint_url().trim_end_matches('/'))
    }
}
