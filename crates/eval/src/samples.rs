//! Held-out samples. They are prepared once, because they are evaluated many times during a run.

use unveil_core::Record;
use unveil_data::records::RecordFile;
use unveil_engine::PromptInput;
use unveil_preprocess::codec::Sizes;
use unveil_preprocess::preprocessor::Preprocessor;

use crate::EvalError;

/// A held-out record with its prompt.
#[derive(Debug, Clone)]
pub struct EvalSample {
    /// The record.
    pub record: Record,
    /// The image file, for the report.
    pub image: String,
    /// Prompt and image patches.
    pub input: PromptInput,
    /// Original and resized image size.
    pub sizes: Sizes,
    /// Grid of merged image tokens.
    pub grid: unveil_core::Grid,
}

/// Loads the records of `split` (all if empty), at most `limit` (0: all), evenly spread over the file.
///
/// # Errors
/// Returns [`EvalError::Empty`] if there is no such record, [`EvalError::Image`] or [`EvalError::Record`] if one cannot be used.
pub fn load_samples(
    records: &RecordFile,
    split: &str,
    limit: usize,
    preprocessor: &Preprocessor,
) -> Result<Vec<EvalSample>, EvalError> {
    let chosen = select_records(records, split, limit)?;
    chosen.into_iter().map(|record| load_sample(records, record, preprocessor)).collect()
}

/// Loads all usable records of `split` (all if empty); also returns the errors of the others.
///
/// # Errors
/// Returns [`EvalError::Empty`] if there is no such record.
pub fn load_usable_samples(
    records: &RecordFile,
    split: &str,
    preprocessor: &Preprocessor,
) -> Result<(Vec<EvalSample>, Vec<EvalError>), EvalError> {
    let mut samples = Vec::new();
    let mut left_out = Vec::new();
    for record in select_records(records, split, 0)? {
        match load_sample(records, record, preprocessor) {
            Ok(sample) => samples.push(sample),
            Err(why) => left_out.push(why),
        }
    }
    Ok((samples, left_out))
}

fn select_records<'a>(records: &'a RecordFile, split: &str, limit: usize) -> Result<Vec<&'a Record>, EvalError> {
    let all: Vec<&Record> = records.records.iter().filter(|r| split.is_empty() || r.split == split).collect();
    if all.is_empty() {
        return Err(EvalError::Empty { file: records.path.display().to_string(), split: split.to_owned() });
    }
    let keep = if limit == 0 { all.len() } else { limit.min(all.len()) };
    Ok((0..keep).map(|i| all[i * all.len() / keep]).collect())
}

fn load_sample(records: &RecordFile, record: &Record, preprocessor: &Preprocessor) -> Result<EvalSample, EvalError> {
    let root = records.root();
    let image = records.open_image(record)?;
    let failed = |source| EvalError::Record { id: record.id.clone(), source };
    let prepared = preprocessor.prepare(&image, record).map_err(failed)?;
    let path = root.file(record)?;
    Ok(EvalSample {
        record: record.clone(),
        image: std::fs::canonicalize(&path).unwrap_or(path).display().to_string(),
        sizes: prepared.image.sizes(),
        grid: prepared.image.merged,
        input: PromptInput {
            id: record.id.clone(),
            prompt: prepared.prompt,
            patches: prepared.image.patches.into(),
            hashes: Vec::new(),
        },
    })
}
