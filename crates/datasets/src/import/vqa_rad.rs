//! VQA-RAD (<https://osf.io/89kps/>; Lau et al., Scientific Data 5, 2018).
//!
//! Files: `VQA_RAD Dataset Public.json`; images in `VQA_RAD Image Folder/`, `images/` or the folder itself.
//!
//! Fields: each question (`qid`, `image_name`, `question`, `answer`) becomes a text record; `answer_type`, `question_type` and
//! `image_organ` are kept as the keys `answer_type`, `question_type` and `organ`. A `phrase_type` that starts with `test` marks the
//! published test set, the rest is train.
//!
//! Known problems: answers that are numbers, trailing blanks and tabs (`CLOSED `), and test images that are also in train, which the report
//! lists as leaks.

use serde_json::Value;

use super::ImportError;
use super::draft::{DraftRecord, ParsedDataset};
use super::source::json_text;

const FOLDERS: [&str; 3] = ["VQA_RAD Image Folder", "images", ""];

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let file = dataset.source.root.join("VQA_RAD Dataset Public.json");
    for (row, q) in dataset.source.read_json_rows(&file)?.into_iter().enumerate() {
        let get = |key: &str| json_text(q.get(key).unwrap_or(&Value::Null));
        let question = get("question");
        let answer = get("answer");
        let name = get("image_name");
        if question.is_empty() || answer.is_empty() {
            dataset.leave_out(&file, row, &name, "it has no question or no answer");
            continue;
        }
        let image = match dataset.source.find_image(&FOLDERS, &name) {
            Ok(image) => image,
            Err(reason) => {
                dataset.leave_out(&file, row, &name, reason);
                continue;
            }
        };
        let mut item = DraftRecord {
            id: format!("vqa-rad-{}", get("qid")),
            image,
            file: file.clone(),
            row,
            question: Some(question),
            answer,
            split: if get("phrase_type").starts_with("test") { "test" } else { "train" }.to_owned(),
            text_only: true,
            ..DraftRecord::default()
        };
        item.extra.insert("answer_type".to_owned(), get("answer_type").to_lowercase().into());
        item.extra.insert("question_type".to_owned(), get("question_type").into());
        item.extra.insert("organ".to_owned(), get("image_organ").into());
        dataset.items.push(item);
    }
    Ok(())
}
