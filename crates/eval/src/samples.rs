//! Held-out samples, prepared once: the same images are evaluated many times during a run.

use unveil_core::Record;
use unveil_data::codec::Sizes;
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_engine::GroupInput;
use unveil_model::Prompt;

use crate::EvalError;

/// One held-out record with its prompt.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The record.
    pub record: Record,
    /// The image file, for the report.
    pub image: String,
    /// Prompt and patches.
    pub input: GroupInput,
    /// Original and resized size.
    pub sizes: Sizes,
    /// Merged token grid.
    pub grid: unveil_core::Grid,
}

/// Loads the records of `split` (all when empty), at most `limit` (0 = all), evenly spread over the file.
pub fn load_samples(
    records: &RecordFile,
    split: &str,
    limit: usize,
    question: &str,
    preparer: &Preparer,
) -> Result<Vec<Sample>, EvalError> {
    let chosen: Vec<&Record> = records.records.iter().filter(|r| split.is_empty() || r.split == split).collect();
    if chosen.is_empty() {
        return Err(EvalError::Empty { file: records.path.display().to_string(), split: split.to_owned() });
    }
    let root = records.root();
    let keep = if limit == 0 { chosen.len() } else { limit.min(chosen.len()) };
    (0..keep)
        .map(|i| {
            let record = chosen[i * chosen.len() / keep];
            let image = records.open_image(record)?;
            let asked = if record.question.is_empty() { question } else { &record.question };
            let prepared = preparer.prepare(&image, asked)?;
            let prompt = Prompt { tokens: prepared.prompt.ids, grids: vec![prepared.image.grid_thw.map(|v| v as i64)] };
            let path = root.file(record)?;
            Ok(Sample {
                record: record.clone(),
                image: std::fs::canonicalize(&path).unwrap_or(path).display().to_string(),
                sizes: prepared.image.sizes(),
                grid: prepared.image.merged,
                input: GroupInput {
                    id: record.id.clone(),
                    prompt,
                    patches: prepared.image.patches.into(),
                    hashes: Vec::new(),
                },
            })
        })
        .collect()
}
