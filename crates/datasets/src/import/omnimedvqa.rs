//! OmniMedVQA (<https://huggingface.co/datasets/foreverbeliever/OmniMedVQA>; Hu et al., CVPR 2024).
//!
//! Files: `QA_information/{Open,Restricted}-access/*.json`, arrays of questions; images at `image_path` below the folder. No splits are
//! published.
//!
//! Fields: `question` and the options `option_A` … `option_D` (two to four) become the question, the option equal to `gt_answer` the answer;
//! `question_id` is the id, `modality_type` the modality (one entry is known to say `modality` instead); `question_type` and `dataset` are
//! kept as keys.
//!
//! Left out: questions whose answer is none of their options, and images that do not exist (those of the restricted part are not
//! distributed).

use serde_json::Value;

use super::ImportError;
use super::choices::{self, Choices, NO_CHOICE};
use super::draft::{DraftRecord, ParsedDataset};
use super::source::json_text;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let files = dataset.source.list_files(&dataset.source.root.join("QA_information"), &["json"], 2);
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no QA_information/Open-access/*.json"));
    }
    for file in files {
        for (row, q) in dataset.source.read_json_rows(&file)?.into_iter().enumerate() {
            let get = |key: &str| json_text(q.get(key).unwrap_or(&Value::Null));
            let options: Choices =
                ('A'..='D').map(|l| (l, get(&format!("option_{l}")))).filter(|(_, text)| !text.is_empty()).collect();
            let modality = Some(get("modality_type")).filter(|m| !m.is_empty()).unwrap_or_else(|| get("modality"));
            let mut item =
                DraftRecord { id: get("question_id"), file: file.clone(), row, modality, ..DraftRecord::default() };
            if item.id.is_empty() {
                item.id = format!("{}-{row}", super::source::stem(&file));
            }
            for key in ["question_type", "dataset"] {
                item.extra.insert(key.to_owned(), get(key).into());
            }
            let result = dataset.source.find_image(&[""], &get("image_path")).and_then(|image| {
                item.image = image;
                let right = choices::letter_of(&options, &get("gt_answer")).ok_or(NO_CHOICE)?;
                choices::set_question(&mut item, &get("question"), &options, right)
            });
            match result {
                Ok(()) => dataset.items.push(item),
                Err(reason) => dataset.leave_out(&file, row, &get("question_id"), reason),
            }
        }
    }
    Ok(())
}
