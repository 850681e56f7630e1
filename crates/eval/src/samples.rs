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
///
/// # Errors
/// There is no such record, or one cannot be used.
pub fn load_samples(
    records: &RecordFile,
    split: &str,
    limit: usize,
    question: &str,
    preparer: &Preparer,
) -> Result<Vec<Sample>, EvalError> {
    let chosen = chosen(records, split, limit)?;
    chosen.into_iter().map(|record| load(records, record, question, preparer)).collect()
}

/// [`load_samples`] of all records of `split` that can be used, and why the others cannot.
///
/// # Errors
/// There is no such record.
pub fn load_usable(
    records: &RecordFile,
    split: &str,
    question: &str,
    preparer: &Preparer,
) -> Result<(Vec<Sample>, Vec<EvalError>), EvalError> {
    let (mut samples, mut left_out) = (Vec::new(), Vec::new());
    for record in chosen(records, split, 0)? {
        match load(records, record, question, preparer) {
            Ok(sample) => samples.push(sample),
            Err(why) => left_out.push(why),
        }
    }
    Ok((samples, left_out))
}

fn chosen<'a>(records: &'a RecordFile, split: &str, limit: usize) -> Result<Vec<&'a Record>, EvalError> {
    let all: Vec<&Record> = records.records.iter().filter(|r| split.is_empty() || r.split == split).collect();
    if all.is_empty() {
        return Err(EvalError::Empty { file: records.path.display().to_string(), split: split.to_owned() });
    }
    let keep = if limit == 0 { all.len() } else { limit.min(all.len()) };
    Ok((0..keep).map(|i| all[i * all.len() / keep]).collect())
}

fn load(records: &RecordFile, record: &Record, question: &str, preparer: &Preparer) -> Result<Sample, EvalError> {
    let (root, image) = (records.root(), records.open_image(record)?);
    let asked = if record.question.is_empty() { question } else { &record.question };
    let failed = |source| EvalError::Record { id: record.id.clone(), source };
    let prepared = preparer.prepare(&image, asked).map_err(failed)?;
    let prompt = Prompt { tokens: prepared.prompt.ids, grids: vec![prepared.image.grid_thw.map(|v| v as i64)] };
    let path = root.file(record)?;
    Ok(Sample {
        record: record.clone(),
        image: std::fs::canonicalize(&path).unwrap_or(path).display().to_string(),
        sizes: prepared.image.sizes(),
        grid: prepared.image.merged,
        input: GroupInput { id: record.id.clone(), prompt, patches: prepared.image.patches.into(), hashes: Vec::new() },
    })
}
