//! Preparation of a run's data: synthesised or imported once into `<run>/data`, and checked before training.

use std::path::{Path, PathBuf};

use unveil_config::Config;
use unveil_config::schema::DataKind;
use unveil_data::image_root::PathPolicy;
use unveil_data::records::{RecordFile, RecordsError};

use crate::check::{self, CheckError};
use crate::import::{self, ClassFilter, Format, ImportError, ImportOptions};
use crate::synth::{self, SynthError, SynthSpec};

/// File in `<run>/data` that records which images an earlier start found intact.
const IMAGES_FILE: &str = "images.json";

/// Why the data of a run cannot be created or used.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The folder of the record file cannot be created.
    #[error("cannot create {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The synthetic records cannot be generated.
    #[error(transparent)]
    Synth(#[from] SynthError),
    /// The data set cannot be imported.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The record file cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A record cannot be trained on.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// A split of the run has no record.
    #[error("{file} has no record of split `{split}` (data.{key})")]
    EmptySplit {
        /// The record file.
        file: PathBuf,
        /// Name of the split.
        split: String,
        /// Configuration key that names the split.
        key: &'static str,
    },
}

/// Creates the record file of a run if it does not exist, and returns it unless it cannot be trained on. Progress lines go to `note`.
///
/// # Errors
/// Returns [`PrepareError`] if the data cannot be created or used.
pub fn prepare_data(config: &Config, note: &dyn Fn(&str)) -> Result<RecordFile, PrepareError> {
    let records = config.records();
    if !records.exists() {
        let folder = records.parent().unwrap_or(Path::new("."));
        match config.data.kind {
            DataKind::Synth => {
                let s = &config.data.synth;
                let spec = SynthSpec {
                    seed: s.seed,
                    train: s.train,
                    val: s.val,
                    test: s.test,
                    size: s.size,
                    ..SynthSpec::default()
                };
                note(&format!("data: generating {} synthetic images", spec.n()));
                synth::generate(&spec, folder, |_, _| ())?;
            }
            DataKind::Voc => {
                let options = ImportOptions {
                    class: Some(ClassFilter {
                        class: config.data.class.clone(),
                        category: if config.data.category.is_empty() {
                            config.data.class.clone()
                        } else {
                            config.data.category.clone()
                        },
                    }),
                    question: Some(config.data.question.clone()),
                    ..ImportOptions::default()
                };
                std::fs::create_dir_all(folder)
                    .map_err(|source| PrepareError::Folder { path: folder.to_owned(), source })?;
                let report = import::import(Format::Voc, Path::new(&config.data.root), &records, &options)?;
                note(&format!("data: {} images, {} boxes imported", report.records, report.boxes));
                for left in &report.left_out {
                    note(&format!("data: left out {} object {}: {}", left.file, left.object, left.reason));
                }
            }
            DataKind::Jsonl => {}
        }
    }
    let file = RecordFile::load_with(&records, PathPolicy::new(config.data.outside))?;
    let seen = check::require_valid(&file, Some(&config.run_dir().join("data").join(IMAGES_FILE)))?;
    note(&format!("data: {} images decoded, {} unchanged since an earlier run", seen.decoded, seen.cached));
    for slip in &seen.misspelled_keys {
        note(&format!("warning: {slip}"));
    }
    let count = |split: &str| file.records.iter().filter(|r| r.split == split).count();
    let d = &config.data;
    for (key, split) in [("train_split", &d.train_split), ("val_split", &d.val_split), ("test_split", &d.test_split)] {
        if count(split) == 0 {
            return Err(PrepareError::EmptySplit { file: records, split: split.clone(), key });
        }
    }
    note(&format!("data: {} train, {} val, {} test", count(&d.train_split), count(&d.val_split), count(&d.test_split)));
    Ok(file)
}
