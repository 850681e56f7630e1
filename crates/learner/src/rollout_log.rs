//! Log of sample rollouts: `rollouts/step-N.jsonl` with all responses of an update's first groups, and the images that
//! the policy saw if no file contains them.

use std::path::Path;

use serde_json::json;
use unveil_core::{AnswerReader, TrainGroup};
use unveil_data::image_store::ImageStore;
use unveil_preprocess::codec::Sizes;

use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};

/// Groups logged per update.
const LOGGED_GROUPS: usize = 2;

/// Writes the responses of the first groups of `batch`, one JSON line each; `reading` parses the answers.
///
/// `boxes` are the ground truth and `predicted` the boxes of the answer, both in pixels of the image `seen`, a path
/// that is absolute or relative to `run`. `attention` has the rows of the tokens that name the class, in the format of
/// R.jsonl, or null. `reference` is the answer of a record with a text answer, else null; text answers have no boxes.
///
/// # Errors
/// Returns [`LearnerError::Io`] or [`LearnerError::Image`] if a file cannot be written, and [`LearnerError::Prepare`]
/// if the processor rejects the size of an image.
pub(crate) fn write(run: &Path, step: u64, batch: &[TrainGroup], data: &Dataset, reading: &AnswerReader) -> Result<()> {
    let folder = run.join("rollouts");
    std::fs::create_dir_all(&folder).map_err(LearnerError::io("create", &folder))?;
    let mut lines = Vec::new();
    for g in batch.iter().take(LOGGED_GROUPS) {
        let record = &g.input.record;
        let original = g.input.image_size;
        let prepare = |source| LearnerError::Prepare { record: record.id.clone(), source };
        let Sizes { resized, .. } = data.preprocessor().sizes(original).map_err(prepare)?;
        let seen = match data.image_file(record) {
            Some(file) => file,
            None => {
                let hash = ImageStore::open(&folder.join("images"))?.put(&g.input.encoded)?.to_string();
                Path::new("rollouts/images").join(&hash[..2]).join(hash)
            }
        };
        for (at, r) in g.responses.iter().enumerate() {
            let b = g.breakdowns.iter().find(|b| b.index == r.index);
            let predicted = if record.is_text() {
                Vec::new()
            } else {
                data.preprocessor().read_answer(reading, &r.text, &Sizes { original, resized }).boxes
            };
            let line = json!({
                "step": step, "id": g.id.record, "pass": g.id.pass, "index": r.index, "text": r.text, "finish": r.finish,
                "category": record.category, "boxes": record.boxes, "predicted": predicted, "image": record.image,
                "seen": seen, "image_size": [original.0, original.1],
                "total": b.and_then(|b| b.total), "components": b.map(|b| &b.components),
                "attention": g.attention.get(at), "reference": record.is_text().then_some(&record.answer),
            });
            lines.extend(line.to_string().into_bytes());
            lines.push(b'\n');
        }
    }
    let path = folder.join(format!("step-{step}.jsonl"));
    unveil_core::write_atomic(&path, &lines).map_err(LearnerError::io("write", &path))
}
