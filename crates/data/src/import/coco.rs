//! COCO detection files (<https://cocodataset.org/#format-data>): `images`, `annotations` with `bbox` as left, top, width, height,
//! `categories`.
//!
//! Layouts, the first that is there: `*/_annotations.coco.json` beside the images (Roboflow), `annotations/instances_*.json`,
//! `annotations/*.json`, `*.json`. The split is what the file or its folder is named after. Left out: crowds (`iscrowd` 1, whose box
//! holds many objects), annotations without a box, of an unlisted image or category; images that are named outside the folder.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ImportError;
use super::item::{Coords, Found, Item, Object};
use super::source::{four, number, stem, text_of, wrong_file};
use super::split::named;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let below = |folder: &Path, depth| found.source.files(folder, &["json"], depth);
    let roboflow = below(&root, 2).into_iter().filter(|p| p.ends_with("_annotations.coco.json")).collect();
    let (instances, others): (Vec<_>, Vec<_>) =
        below(&root.join("annotations"), 1).into_iter().partition(|p| stem(p).starts_with("instances_"));
    let layouts: [Vec<PathBuf>; 4] = [roboflow, instances, others, below(&root, 1)];
    let files = layouts.into_iter().find(|l| !l.is_empty());
    let files = files.ok_or_else(|| {
        found.source.wrong("no COCO file: none of */_annotations.coco.json, annotations/*.json, *.json")
    })?;
    for file in files {
        let name = stem(&file);
        let folder =
            file.parent().unwrap_or(&root).strip_prefix(&root).unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let set = name.strip_prefix("instances_").unwrap_or(&name).to_owned();
        let split = match named(&set) {
            "" => named(&folder),
            split => split,
        };
        let folders = [folder, "images".to_owned(), String::new(), set.clone(), format!("images/{set}")];
        let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
        read_file(found, &file, &folders, split)?;
    }
    Ok(())
}

/// Reads one file; images are looked for in these folders.
pub(super) fn read_file(found: &mut Found, file: &Path, folders: &[&str], split: &str) -> Result<(), ImportError> {
    let doc = found.source.json(file)?;
    let list = |key: &str| {
        doc.get(key).and_then(Value::as_array).ok_or_else(|| wrong_file(file, format!("there is no list \"{key}\"")))
    };
    let categories: HashMap<String, String> =
        list("categories")?.iter().map(|c| (text_of(&c["id"]), text_of(&c["name"]))).collect();
    let mut at = HashMap::new();
    for (row, image) in list("images")?.iter().enumerate() {
        let name = text_of(&image["file_name"]);
        match found.source.image(folders, &name) {
            Err(reason) => found.leave_out(file, row, &name, reason),
            Ok(path) => {
                let side = |key: &str| image[key].as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0);
                at.insert(text_of(&image["id"]), found.items.len());
                found.items.push(Item {
                    id: stem(Path::new(&name)),
                    image: path,
                    file: file.to_owned(),
                    row,
                    frame: side("width").zip(side("height")),
                    split: split.to_owned(),
                    ..Item::default()
                });
            }
        }
    }
    for (k, a) in list("annotations")?.iter().enumerate() {
        let label = categories.get(&text_of(&a["category_id"])).cloned().unwrap_or_default();
        let reason = if number(&a["iscrowd"]).is_some_and(|v| v != 0.0) || a["iscrowd"] == true {
            "is a crowd"
        } else if label.is_empty() {
            "its category is not listed"
        } else {
            match (four(&a["bbox"]), at.get(&text_of(&a["image_id"])).and_then(|i| found.items.get_mut(*i))) {
                (None, _) => "has no box",
                (_, None) => "its image is not listed or was left out",
                (Some(b), Some(item)) => {
                    item.objects.push(Object { label, coords: Coords::corner_and_size(b) });
                    continue;
                }
            }
        };
        found.leave_out(file, k, &label, reason);
    }
    Ok(())
}
