//! SLAKE (<https://huggingface.co/datasets/BoKelvin/SLAKE>; Liu et al., ISBI 2021).
//!
//! Files: `train.json`, `validate.json` or `validation.json`, `test.json`; images and boxes in `imgs/xmlabN/{source.jpg,detection.json}`.
//!
//! Fields: each question (`qid`, `img_name`, `question`, `answer`) in English or Chinese becomes a text record; `q_lang`, `location`,
//! `content_type` and `answer_type` are kept as the keys `language`, `organ`, `question_type` and `answer_type`. Each image with boxes also
//! becomes one grounding record with the objects of `detection.json`, a list of `{"Liver": [x, y, width, height]}` in pixels.
//!
//! Left out: questions without text or answer; the grounding record of an image with a box that is not four numbers or has no name.
//!
//! Source of the layout of `detection.json`: a published file, `[{"Atelectasis": [212.0, 587.0, 247.0, 201.0]}]`, whose last number cannot be
//! a bottom edge (<https://huggingface.co/datasets/MiniMedMind/SLAKE_en/blob/main/images/xmlab169/detection.json>), and FiftyOne's card of
//! the data set: "organ bounding boxes (absolute coordinates)" (<https://docs.voxel51.com/dataset_zoo/datasets_hf/slake.html>).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{four_numbers, json_text};
use super::split::split_from_name;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("What is there, and where?");
    let root = dataset.source.root.clone();
    let files = ["train", "validate", "validation", "test"].map(|n| root.join(format!("{n}.json")));
    let files: Vec<PathBuf> = files.into_iter().filter(|f| f.is_file()).collect();
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no train.json, validate.json, validation.json or test.json"));
    }
    let mut images: BTreeMap<PathBuf, (String, String)> = BTreeMap::new();
    for file in files {
        let split = split_from_name(&super::source::stem(&file));
        for (row, q) in dataset.source.read_json_rows(&file)?.into_iter().enumerate() {
            let get = |key: &str| json_text(q.get(key).unwrap_or(&Value::Null));
            let question = get("question");
            let answer = get("answer");
            let name = get("img_name");
            if question.is_empty() || answer.is_empty() {
                dataset.leave_out(&file, row, &name, "it has no question or no answer");
                continue;
            }
            let image = match dataset.source.find_image(&["imgs"], &name) {
                Ok(image) => image,
                Err(reason) => {
                    dataset.leave_out(&file, row, &name, reason);
                    continue;
                }
            };
            images.entry(image.clone()).or_insert((get("modality"), split.to_owned()));
            let mut item = DraftRecord {
                id: format!("slake-{}", get("qid")),
                image,
                file: file.clone(),
                row,
                question: Some(question),
                answer,
                modality: get("modality"),
                split: split.to_owned(),
                text_only: true,
                ..DraftRecord::default()
            };
            for (key, field) in [("language", "q_lang"), ("organ", "location"), ("question_type", "content_type")] {
                item.extra.insert(key.to_owned(), get(field).into());
            }
            item.extra.insert("answer_type".to_owned(), get("answer_type").to_lowercase().into());
            dataset.items.push(item);
        }
    }
    for (image, (modality, split)) in images {
        let file = image.with_file_name("detection.json");
        if !file.is_file() {
            continue;
        }
        let mut objects = Vec::new();
        let mut unread = Vec::new();
        for (k, entry) in dataset.source.read_json_rows(&file)?.iter().enumerate() {
            let Some(entry) = entry.as_object() else {
                dataset.leave_out(&file, k, "", "it is not an object of boxes");
                unread.push(String::new());
                continue;
            };
            for (label, c) in entry {
                let label = label.trim().to_owned();
                match four_numbers(c) {
                    Some(c) => objects.push(Object { label, coords: Coords::corner_and_size(c) }),
                    None => {
                        dataset.leave_out(&file, k, &label, "its box is not four numbers");
                        unread.push(label);
                    }
                }
            }
        }
        if objects.is_empty() && unread.is_empty() {
            continue;
        }
        let id = image.parent().map(super::source::stem).unwrap_or_default();
        dataset.items.push(DraftRecord { id, image, file, objects, unread, modality, split, ..DraftRecord::default() });
    }
    Ok(())
}
