//! VQA-RAD (<https://osf.io/89kps/>; Lau et al., Scientific Data 5, 2018): `VQA_RAD Dataset Public.json` (fields `qid`, `phrase_type`, `image_name`,
//! `image_organ`, `question`, `question_type`, `answer`, `answer_type`), images in `VQA_RAD Image Folder/`.
//!
//! A `phrase_type` that starts with `test` is the published test set, the rest is train. Known faults: answers that are numbers, trailing
//! blanks and tabs (`CLOSED `), and test images that are also in train, which the report lists as leaks.

use serde_json::Value;

use super::ImportError;
use super::item::{Found, Item};
use super::source::text_of;

const FOLDERS: [&str; 3] = ["VQA_RAD Image Folder", "images", ""];

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let file = found.source.root.join("VQA_RAD Dataset Public.json");
    for (row, q) in found.source.json_rows(&file)?.into_iter().enumerate() {
        let get = |key: &str| text_of(q.get(key).unwrap_or(&Value::Null));
        let (question, answer, name) = (get("question"), get("answer"), get("image_name"));
        if question.is_empty() || answer.is_empty() {
            found.leave_out(&file, row, &name, "it has no question or no answer");
            continue;
        }
        let image = match found.source.image(&FOLDERS, &name) {
            Ok(image) => image,
            Err(reason) => {
                found.leave_out(&file, row, &name, reason);
                continue;
            }
        };
        let mut item = Item {
            id: format!("vqa-rad-{}", get("qid")),
            image,
            file: file.clone(),
            row,
            question: Some(question),
            answer,
            split: if get("phrase_type").starts_with("test") { "test" } else { "train" }.to_owned(),
            text_only: true,
            ..Item::default()
        };
        item.extra.insert("answer_type".to_owned(), get("answer_type").to_lowercase().into());
        item.extra.insert("question_type".to_owned(), get("question_type").into());
        item.extra.insert("organ".to_owned(), get("image_organ").into());
        found.items.push(item);
    }
    Ok(())
}
