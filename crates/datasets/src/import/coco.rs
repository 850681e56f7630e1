//! COCO detection files (<https://cocodataset.org/#format-data>).
//!
//! Files: the first layout that exists of `*/_annotations.coco.json` next to the images (Roboflow), `annotations/instances_*.json`,
//! `annotations/*.json`, `*.json`. The split is read from the name of the file, else of its folder.
//!
//! Fields: `images` (`id`, `file_name`, `width`, `height`) become records, `annotations` their boxes: `bbox` is left, top, width, height;
//! without it, the box around the polygons of `segmentation` is used. The label is the name of the category.
//!
//! Left out: crowds (`iscrowd` 1, whose box holds many objects); images with an annotation without a box or with an unlisted category;
//! images without a unique id or outside the folder; files without `annotations` (published for test sets, whose images are not
//! "no finding").

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset, bounding_box};
use super::source::{file_error, four_numbers, json_number, json_text, stem};
use super::split::split_from_name;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let root = dataset.source.root.clone();
    let json_files = |folder: &Path, depth| dataset.source.list_files(folder, &["json"], depth);
    let roboflow = json_files(&root, 2).into_iter().filter(|p| p.ends_with("_annotations.coco.json")).collect();
    let (instances, others): (Vec<_>, Vec<_>) =
        json_files(&root.join("annotations"), 1).into_iter().partition(|p| stem(p).starts_with("instances_"));
    let layouts: [Vec<PathBuf>; 4] = [roboflow, instances, others, json_files(&root, 1)];
    let files = layouts.into_iter().find(|l| !l.is_empty());
    let files = files.ok_or_else(|| {
        dataset.source.dataset_error("no COCO file: none of */_annotations.coco.json, annotations/*.json, *.json")
    })?;
    for file in files {
        let name = stem(&file);
        let folder =
            file.parent().unwrap_or(&root).strip_prefix(&root).unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let set = name.strip_prefix("instances_").unwrap_or(&name).to_owned();
        let split = match split_from_name(&set) {
            "" => split_from_name(&folder),
            split => split,
        };
        let folders = [folder, "images".to_owned(), String::new(), set.clone(), format!("images/{set}")];
        let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
        read_file(dataset, &file, &folders, split)?;
    }
    let left = &dataset.report.left_out;
    if dataset.items.is_empty() && !left.is_empty() && left.iter().all(|l| l.reason == UNLABELLED) {
        return Err(dataset.source.dataset_error("no COCO file with a list \"annotations\""));
    }
    Ok(())
}

/// Reason for leaving out a file that only describes images.
const UNLABELLED: &str = "the file has no annotations";

/// Parses one file; images are searched in `folders`.
pub(super) fn read_file(
    dataset: &mut ParsedDataset,
    file: &Path,
    folders: &[&str],
    split: &str,
) -> Result<(), ImportError> {
    let doc = dataset.source.read_json(file)?;
    if doc.get("annotations").is_none_or(Value::is_null) {
        dataset.leave_out(file, 0, &stem(file), UNLABELLED);
        return Ok(());
    }
    let list = |key: &str| {
        doc.get(key).and_then(Value::as_array).ok_or_else(|| file_error(file, format!("there is no list \"{key}\"")))
    };
    let categories: HashMap<String, String> =
        list("categories")?.iter().map(|c| (json_text(&c["id"]), json_text(&c["name"]))).collect();
    // Index of the draft of each image id, `None` where the image was left out; and drafts that share an id.
    let mut draft_of_id = HashMap::new();
    let mut ambiguous = HashSet::new();
    for (row, image) in list("images")?.iter().enumerate() {
        let id = json_text(&image["id"]);
        let name = json_text(&image["file_name"]);
        if id.is_empty() {
            dataset.leave_out(file, row, &name, "it has no id");
            continue;
        }
        let path = dataset.source.find_image(folders, &name);
        let index = path.is_ok().then_some(dataset.items.len());
        if let Some(other) = draft_of_id.insert(id, index) {
            ambiguous.extend([other, index].into_iter().flatten());
        }
        match path {
            Err(reason) => dataset.leave_out(file, row, &name, reason),
            Ok(path) => {
                let side = |key: &str| image[key].as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0);
                dataset.items.push(DraftRecord {
                    id: stem(Path::new(&name)),
                    image: path,
                    file: file.to_owned(),
                    row,
                    frame: side("width").zip(side("height")),
                    split: split.to_owned(),
                    ..DraftRecord::default()
                });
            }
        }
    }
    for (k, a) in list("annotations")?.iter().enumerate() {
        let label = categories.get(&json_text(&a["category_id"])).cloned().unwrap_or_default();
        if json_text(&a["image_id"]).is_empty() {
            return Err(file_error(file, format!("annotation {k} has no `image_id`, so its image is unknown")));
        }
        let Some(item) = draft_of_id.get(&json_text(&a["image_id"])).and_then(|i| dataset.items.get_mut((*i)?)) else {
            dataset.leave_out(file, k, &label, "its image is not listed or was left out");
            continue;
        };
        let reason = if json_number(&a["iscrowd"]).is_some_and(|v| v != 0.0) || a["iscrowd"] == true {
            item.dropped.push(label.clone());
            "is a crowd"
        } else {
            let coords = four_numbers(&a["bbox"]).map(Coords::corner_and_size).or_else(|| outline(&a["segmentation"]));
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
        dataset.leave_out(file, k, &label, reason);
    }
    // An annotation of a repeated id could belong to any of its images.
    for (k, item) in std::mem::take(&mut dataset.items).into_iter().enumerate() {
        if ambiguous.contains(&k) {
            dataset.leave_out(file, item.row, &item.id, "another image has the same id");
        } else {
            dataset.items.push(item);
        }
    }
    Ok(())
}

/// Returns the box around the polygons of a segmentation, which are lists of alternating x and y.
fn outline(segmentation: &Value) -> Option<Coords> {
    let mut points = Vec::new();
    for polygon in segmentation.as_array()? {
        let numbers: Vec<f32> = polygon.as_array()?.iter().map(json_number).collect::<Option<_>>()?;
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() || pairs.len() < 3 {
            return None;
        }
        points.extend(pairs.iter().map(|[x, y]| (*x, *y)));
    }
    bounding_box(points).map(Coords::Pixels)
}
