//! COCO detection files (<https://cocodataset.org/#format-data>): `images`, `annotations` with `bbox` as left, top, width, height,
//! `categories`.
//!
//! Layouts, the first that is there: `*/_annotations.coco.json` beside the images (Roboflow), `annotations/instances_*.json`,
//! `annotations/*.json`, `*.json`. The split is what the file or its folder is named after. An annotation without `bbox` gets the box
//! around its polygons. Left out: crowds (`iscrowd` 1, whose box holds many objects), images with an annotation that has no box or an
//! unlisted category, images without an id of their own, images that are named outside the folder; files without `annotations`
//! (published so for test sets, whose images are not "no finding").

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ImportError;
use super::item::{Coords, Found, Item, Object, around};
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
    let left = &found.report.left_out;
    if found.items.is_empty() && !left.is_empty() && left.iter().all(|l| l.reason == UNLABELLED) {
        return Err(found.source.wrong("no COCO file with a list \"annotations\""));
    }
    Ok(())
}

/// The rule for a file that describes images only.
const UNLABELLED: &str = "the file has no annotations";

/// Reads one file; images are looked for in these folders.
pub(super) fn read_file(found: &mut Found, file: &Path, folders: &[&str], split: &str) -> Result<(), ImportError> {
    let doc = found.source.json(file)?;
    if doc.get("annotations").is_none_or(Value::is_null) {
        found.leave_out(file, 0, &stem(file), UNLABELLED);
        return Ok(());
    }
    let list = |key: &str| {
        doc.get(key).and_then(Value::as_array).ok_or_else(|| wrong_file(file, format!("there is no list \"{key}\"")))
    };
    let categories: HashMap<String, String> =
        list("categories")?.iter().map(|c| (text_of(&c["id"]), text_of(&c["name"]))).collect();
    let (mut at, mut twice) = (HashMap::new(), HashSet::new());
    for (row, image) in list("images")?.iter().enumerate() {
        let (id, name) = (text_of(&image["id"]), text_of(&image["file_name"]));
        if id.is_empty() {
            found.leave_out(file, row, &name, "it has no id");
            continue;
        }
        let path = found.source.image(folders, &name);
        let here = path.is_ok().then_some(found.items.len());
        if let Some(other) = at.insert(id, here) {
            twice.extend([other, here].into_iter().flatten());
        }
        match path {
            Err(reason) => found.leave_out(file, row, &name, reason),
            Ok(path) => {
                let side = |key: &str| image[key].as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0);
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
        if text_of(&a["image_id"]).is_empty() {
            return Err(wrong_file(
                file,
                format!("annotation {k} has no `image_id`: which image it belongs to is not known"),
            ));
        }
        let Some(item) = at.get(&text_of(&a["image_id"])).and_then(|i| found.items.get_mut((*i)?)) else {
            found.leave_out(file, k, &label, "its image is not listed or was left out");
            continue;
        };
        let reason = if number(&a["iscrowd"]).is_some_and(|v| v != 0.0) || a["iscrowd"] == true {
            item.dropped.push(label.clone());
            "is a crowd"
        } else {
            let coords = four(&a["bbox"]).map(Coords::corner_and_size).or_else(|| outline(&a["segmentation"]));
            match coords {
                Some(coords) if !label.is_empty() => {
                    item.objects.push(Object { label, coords });
                    continue;
                }
                coords => {
                    item.unread.push(label.clone());
                    if coords.is_none() { "has no box" } else { "its category is not listed" }
                }
            }
        };
        found.leave_out(file, k, &label, reason);
    }
    // Which of them an annotation is of cannot be known.
    for (k, item) in std::mem::take(&mut found.items).into_iter().enumerate() {
        if twice.contains(&k) {
            found.leave_out(file, item.row, &item.id, "its id is that of another image, too");
        } else {
            found.items.push(item);
        }
    }
    Ok(())
}

/// The box around the polygons of a segmentation: lists of x and y in turns.
fn outline(segmentation: &Value) -> Option<Coords> {
    let mut points = Vec::new();
    for polygon in segmentation.as_array()? {
        let numbers: Vec<f32> = polygon.as_array()?.iter().map(number).collect::<Option<_>>()?;
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() || pairs.len() < 3 {
            return None;
        }
        points.extend(pairs.iter().map(|[x, y]| (*x, *y)));
    }
    around(points).map(Coords::Pixels)
}
