//! Kvasir-SEG (<https://datasets.simula.no/kvasir-seg/>; Jha et al., MMM 2020), polyps in endoscopy.
//!
//! Files: `kavsir_bboxes.json` (so spelt), images `images/NAME.jpg`, and optional lists `train.txt`, `val.txt` and `test.txt` (one name per
//! line), which give the split.
//!
//! Fields: by image name, `height` and `width` are the frame, and each entry of `bbox` (`label`, `xmin`, `ymin`, `xmax`, `ymax`) is a box.
//!
//! Left out: images without a box, and images with a box that lacks a number.

use std::collections::BTreeMap;

use serde_json::Value;

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{file_error, json_number, json_text};

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("What is abnormal, and where?");
    let root = dataset.source.root.clone();
    let file = ["kavsir_bboxes.json", "kvasir_bboxes.json"].map(|n| root.join(n));
    let file = file.iter().find(|p| p.is_file()).unwrap_or(&file[0]).clone();
    let mut splits: BTreeMap<String, &str> = BTreeMap::new();
    for split in ["train", "val", "test"] {
        let list = root.join(format!("{split}.txt"));
        if list.is_file() {
            splits.extend(
                dataset.source.read_text(&list)?.lines().map(|l| (l.trim().trim_end_matches(".jpg").to_owned(), split)),
            );
        }
    }
    let doc = dataset.source.read_json(&file)?;
    let images = doc.as_object().ok_or_else(|| file_error(&file, "not an object of images".to_owned()))?;
    for (row, (name, image)) in images.iter().enumerate() {
        let path = match dataset.source.find_image(&["images"], &format!("{name}.jpg")) {
            Ok(path) => path,
            Err(reason) => {
                dataset.leave_out(&file, row, name, reason);
                continue;
            }
        };
        let mut objects = Vec::new();
        let mut unread = Vec::new();
        for (k, b) in image["bbox"].as_array().into_iter().flatten().enumerate() {
            let four: Option<Vec<f32>> = ["xmin", "ymin", "xmax", "ymax"].iter().map(|s| json_number(&b[*s])).collect();
            // The data set has one class, which a box without a label gets.
            let label = Some(json_text(&b["label"])).filter(|l| !l.is_empty()).unwrap_or_else(|| "polyp".to_owned());
            match four.as_deref().and_then(|c| <[f32; 4]>::try_from(c).ok()) {
                Some(c) => objects.push(Object { label, coords: Coords::Pixels(c) }),
                None => {
                    dataset.leave_out(&file, k, name, "its box is not four numbers");
                    unread.push(label);
                }
            }
        }
        if objects.is_empty() {
            // Every image of the data set shows a polyp.
            dataset.leave_out(&file, row, name, "has no box");
            continue;
        }
        let side = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        dataset.items.push(DraftRecord {
            id: name.clone(),
            image: path,
            file: file.clone(),
            row,
            objects,
            unread,
            frame: side(&image["width"]).zip(side(&image["height"])),
            modality: "endoscopy".to_owned(),
            split: splits.get(name).copied().unwrap_or_default().to_owned(),
            ..DraftRecord::default()
        });
    }
    Ok(())
}
