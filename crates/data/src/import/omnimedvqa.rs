//! OmniMedVQA (<https://huggingface.co/datasets/foreverbeliever/OmniMedVQA>; Hu et al., CVPR 2024): `QA_information/{Open,Restricted}-access/*.json`,
//! arrays of `question_id`, `question`, `question_type`, `gt_answer`, `option_A` … `option_D`, `image_path`, `modality_type`, `dataset`.
//!
//! A question may have two to four options. One entry is known to say `modality` for `modality_type`. No splits are published. Left out:
//! questions whose answer is none of their options, images that are not there (those of the restricted part are not distributed).

use serde_json::Value;

use super::ImportError;
use super::choices::{self, Choices, NO_CHOICE};
use super::item::{Found, Item};
use super::source::text_of;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let files = found.source.files(&found.source.root.join("QA_information"), &["json"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no QA_information/Open-access/*.json"));
    }
    for file in files {
        for (row, q) in found.source.json_rows(&file)?.into_iter().enumerate() {
            let get = |key: &str| text_of(q.get(key).unwrap_or(&Value::Null));
            let options: Choices =
                ('A'..='D').map(|l| (l, get(&format!("option_{l}")))).filter(|(_, text)| !text.is_empty()).collect();
            let modality = Some(get("modality_type")).filter(|m| !m.is_empty()).unwrap_or_else(|| get("modality"));
            let mut item = Item { id: get("question_id"), file: file.clone(), row, modality, ..Item::default() };
            if item.id.is_empty() {
                item.id = format!("{}-{row}", super::source::stem(&file));
            }
            for key in ["question_type", "dataset"] {
                item.extra.insert(key.to_owned(), get(key).into());
            }
            let made = found.source.image(&[""], &get("image_path")).and_then(|image| {
                item.image = image;
                let right = choices::letter_of(&options, &get("gt_answer")).ok_or(NO_CHOICE)?;
                choices::ask(&mut item, &get("question"), &options, right)
            });
            match made {
                Ok(()) => found.items.push(item),
                Err(reason) => found.leave_out(&file, row, &get("question_id"), reason),
            }
        }
    }
    Ok(())
}
