//! SLAKE (<https://huggingface.co/datasets/BoKelvin/SLAKE>; Liu et al., ISBI 2021): `train.json`, `validate.json` or `validation.json`,
//! `test.json` (fields `qid`, `img_name`, `question`, `answer`, `q_lang`, `modality`, `location`, `answer_type`), images and boxes in
//! `imgs/xmlabN/{source.jpg,detection.json}`.
//!
//! Questions in English and Chinese become records with the key `language`; and each image with boxes becomes one record more, of the
//! objects in `detection.json`: a list of `{"Liver": [x, y, width, height]}` in pixels. An image with a box that is not four numbers
//! or has no name gets no such record.
//!
//! Source of that layout: a published file, `[{"Atelectasis": [212.0, 587.0, 247.0, 201.0]}]`, whose last number cannot be a bottom edge
//! (<https://huggingface.co/datasets/MiniMedMind/SLAKE_en/blob/main/images/xmlab169/detection.json>), and FiftyOne's card of the set:
//! "organ bounding boxes (absolute coordinates)" (<https://docs.voxel51.com/dataset_zoo/datasets_hf/slake.html>).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::ImportError;
use super::item::{Coords, Found, Item, Object};
use super::source::{four, text_of};
use super::split::named;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    found.question = Some("What is there, and where?");
    let root = found.source.root.clone();
    let files = ["train", "validate", "validation", "test"].map(|n| root.join(format!("{n}.json")));
    let files: Vec<PathBuf> = files.into_iter().filter(|f| f.is_file()).collect();
    if files.is_empty() {
        return Err(found.source.wrong("no train.json, validate.json, validation.json or test.json"));
    }
    let mut images: BTreeMap<PathBuf, (String, String)> = BTreeMap::new();
    for file in files {
        let split = named(&super::source::stem(&file));
        for (row, q) in found.source.json_rows(&file)?.into_iter().enumerate() {
            let get = |key: &str| text_of(q.get(key).unwrap_or(&Value::Null));
            let (question, answer, name) = (get("question"), get("answer"), get("img_name"));
            if question.is_empty() || answer.is_empty() {
                found.leave_out(&file, row, &name, "it has no question or no answer");
                continue;
            }
            let image = match found.source.image(&["imgs"], &name) {
                Ok(image) => image,
                Err(reason) => {
                    found.leave_out(&file, row, &name, reason);
                    continue;
                }
            };
            images.entry(image.clone()).or_insert((get("modality"), split.to_owned()));
            let mut item = Item {
                id: format!("slake-{}", get("qid")),
                image,
                file: file.clone(),
                row,
                question: Some(question),
                answer,
                modality: get("modality"),
                split: split.to_owned(),
                text_only: true,
                ..Item::default()
            };
            for (key, field) in [("language", "q_lang"), ("organ", "location"), ("question_type", "content_type")] {
                item.extra.insert(key.to_owned(), get(field).into());
            }
            item.extra.insert("answer_type".to_owned(), get("answer_type").to_lowercase().into());
            found.items.push(item);
        }
    }
    for (image, (modality, split)) in images {
        let file = image.with_file_name("detection.json");
        if !file.is_file() {
            continue;
        }
        let (mut objects, mut unread) = (Vec::new(), Vec::new());
        for (k, entry) in found.source.json_rows(&file)?.iter().enumerate() {
            let Some(entry) = entry.as_object() else {
                found.leave_out(&file, k, "", "it is no object of boxes");
                unread.push(String::new());
                continue;
            };
            for (label, c) in entry {
                let label = label.trim().to_owned();
                match four(c) {
                    Some(c) => objects.push(Object { label, coords: Coords::corner_and_size(c) }),
                    None => {
                        found.leave_out(&file, k, &label, "its box is not four numbers");
                        unread.push(label);
                    }
                }
            }
        }
        if objects.is_empty() && unread.is_empty() {
            continue;
        }
        let id = image.parent().map(super::source::stem).unwrap_or_default();
        found.items.push(Item { id, image, file, objects, unread, modality, split, ..Item::default() });
    }
    Ok(())
}
