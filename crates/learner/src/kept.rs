//! What a run keeps of its rollouts for people: `rollouts/step-N.jsonl`, all responses of an update's first groups, and the images
//! that the policy saw where no file holds them.
//!
//! Must not know: how the update was made.

use std::path::Path;

use serde_json::json;
use unveil_core::Reading;
use unveil_data::codec::Sizes;
use unveil_data::store::ImageStore;

use crate::batch::TrainGroup;
use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};

/// Groups whose responses are kept per update.
const GROUPS: usize = 2;

/// Writes the responses of the first groups of `batch`, one JSON line each; answers are read as `reading` says.
///
/// `boxes` are true, `predicted` the answer's, both in pixels of the image `seen`: a path relative to `run`, or absolute. `attention`
/// holds the rows of the tokens that name the class, in the form of R.jsonl; null where there are none. `reference` is the answer of a
/// record that is answered in text, else null; such answers have no boxes.
///
/// # Errors
/// A file cannot be written, an image has a size that the processor refuses.
pub(crate) fn write(run: &Path, step: u64, batch: &[TrainGroup], data: &Dataset, reading: &Reading) -> Result<()> {
    let folder = run.join("rollouts");
    std::fs::create_dir_all(&folder).map_err(LearnerError::io(&folder))?;
    let mut lines = Vec::new();
    for g in batch.iter().take(GROUPS) {
        let (record, original) = (&g.input.record, g.input.image_size);
        let prepare = |source| LearnerError::Prepare { record: record.id.clone(), source };
        let Sizes { resized, .. } = data.preparer().sizes(original).map_err(prepare)?;
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
                data.preparer().read_answer(reading, &r.text, &Sizes { original, resized }).boxes
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
    unveil_core::write_atomic(&path, &lines).map_err(LearnerError::io(&path))
}
