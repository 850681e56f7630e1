//! Kvasir-SEG (<https://datasets.simula.no/kvasir-seg/>; Jha et al., MMM 2020): `kavsir_bboxes.json` (so spelt) with `height`, `width` and
//! a list `bbox` of `label`, `xmin`, `ymin`, `xmax`, `ymax` by image name; `images/NAME.jpg`.
//!
//! Splits are those of `train.txt` and `val.txt` (names, one a line) where they are there. Left out: images with a box that lacks a
//! number, or without a box.

use std::collections::BTreeMap;

use serde_json::Value;

use super::ImportError;
use super::item::{Coords, Found, Item, Object};
use super::source::{number, text_of, wrong_file};

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    found.question = Some("What is abnormal, and where?");
    let root = found.source.root.clone();
    let file = ["kavsir_bboxes.json", "kvasir_bboxes.json"].map(|n| root.join(n));
    let file = file.iter().find(|p| p.is_file()).unwrap_or(&file[0]).clone();
    let mut splits: BTreeMap<String, &str> = BTreeMap::new();
    for split in ["train", "val", "test"] {
        let list = root.join(format!("{split}.txt"));
        if list.is_file() {
            splits.extend(
                found.source.text(&list)?.lines().map(|l| (l.trim().trim_end_matches(".jpg").to_owned(), split)),
            );
        }
    }
    let doc = found.source.json(&file)?;
    let images = doc.as_object().ok_or_else(|| wrong_file(&file, "not an object of images".to_owned()))?;
    for (row, (name, image)) in images.iter().enumerate() {
        let path = match found.source.image(&["images"], &format!("{name}.jpg")) {
            Ok(path) => path,
            Err(reason) => {
                found.leave_out(&file, row, name, reason);
                continue;
            }
        };
        let (mut objects, mut unread) = (Vec::new(), Vec::new());
        for (k, b) in image["bbox"].as_array().into_iter().flatten().enumerate() {
            let four: Option<Vec<f32>> = ["xmin", "ymin", "xmax", "ymax"].iter().map(|s| number(&b[*s])).collect();
            // The set knows one class, so that a box without a label has it.
            let label = Some(text_of(&b["label"])).filter(|l| !l.is_empty()).unwrap_or_else(|| "polyp".to_owned());
            match four.as_deref().and_then(|c| <[f32; 4]>::try_from(c).ok()) {
                Some(c) => objects.push(Object { label, coords: Coords::Pixels(c) }),
                None => {
                    found.leave_out(&file, k, name, "its box is not four numbers");
                    unread.push(label);
                }
            }
        }
        if objects.is_empty() {
            // Every image of the set shows a polyp.
            found.leave_out(&file, row, name, "has no box");
            continue;
        }
        let side = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        found.items.push(Item {
            id: name.clone(),
            image: path,
            file: file.clone(),
            row,
            objects,
            unread,
            frame: side(&image["width"]).zip(side(&image["height"])),
            modality: "endoscopy".to_owned(),
            split: splits.get(name).copied().unwrap_or_default().to_owned(),
            ..Item::default()
        });
    }
    Ok(())
}
