//! VGG Image Annotator (<https://www.robots.ox.ac.uk/~vgg/software/via/>), versions 1 and 2.
//!
//! Files: all `*.json` and `*.csv`, at most one folder deep: annotations as JSON, a saved project (`_via_img_metadata`), or CSV (`filename`,
//! …, `region_shape_attributes`, `region_attributes`). Images are in the folder itself, in `images/`, `train/` or `val/`. The
//! split is read from the path of the file.
//!
//! Fields: each image becomes a record, each region a box: rectangles as they are, polygons, polylines, circles and ellipses by the box
//! around them. The label is the attribute `label`, `class`, `name`, `type` or `category`, else the only attribute; of checkbox options,
//! those that are true.
//!
//! Left out: images with a point, a shape without numbers, or a region without a label.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset, bounding_box};
use super::source::{file_error, json_number, json_text, stem};

const FOLDERS: [&str; 4] = ["", "images", "train", "val"];
const LABELS: [&str; 5] = ["label", "class", "name", "type", "category"];

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let root = dataset.source.root.clone();
    let files = dataset.source.list_files(&root, &["json", "csv"], 2);
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no *.json or *.csv"));
    }
    for file in files {
        let split =
            super::split::split_from_name(&file.strip_prefix(&root).unwrap_or(&file).to_string_lossy()).to_owned();
        let regions = match file.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
            true => from_csv(dataset, &file)?,
            false => from_json(dataset, &file)?,
        };
        for (row, (name, regions)) in regions.into_iter().enumerate() {
            let image = match dataset.source.find_image(&FOLDERS, &name) {
                Ok(image) => image,
                Err(reason) => {
                    dataset.leave_out(&file, row, &name, reason);
                    continue;
                }
            };
            let id = stem(Path::new(&name));
            let mut item =
                DraftRecord { id, image, file: file.clone(), row, split: split.clone(), ..DraftRecord::default() };
            for (k, (shape, attributes)) in regions.iter().enumerate() {
                match (label(attributes), extent(shape)) {
                    (Some(label), Ok(c)) => item.objects.push(Object { label, coords: Coords::Pixels(c) }),
                    (label, extent) => {
                        let reason =
                            label.as_ref().map_or("the region has no label", |_| extent.err().unwrap_or_default());
                        dataset.leave_out(&file, k, &name, reason);
                        item.unread.push(label.unwrap_or_default());
                    }
                }
            }
            dataset.items.push(item);
        }
    }
    Ok(())
}

/// Shape and attributes of the regions, by image name.
type Regions = BTreeMap<String, Vec<(Value, Value)>>;

fn from_json(dataset: &ParsedDataset, file: &Path) -> Result<Regions, ImportError> {
    let doc = dataset.source.read_json(file)?;
    let images = doc.get("_via_img_metadata").unwrap_or(&doc);
    let images =
        images.as_object().ok_or_else(|| file_error(file, "not a VIA file: no object of images".to_owned()))?;
    let mut out = Regions::new();
    for image in images.values() {
        let name = image.get("filename").map(json_text).filter(|n| !n.is_empty());
        let name = name.ok_or_else(|| file_error(file, "not a VIA file: an image without `filename`".to_owned()))?;
        // Version 1 writes an object with the keys "0", "1", …; version 2 a list.
        let regions: Vec<&Value> = match &image["regions"] {
            Value::Array(list) => list.iter().collect(),
            Value::Object(map) => map.values().collect(),
            // Unknown form: a region without a shape, which leaves the image out.
            other => vec![other],
        };
        let each = regions.into_iter().map(|r| (r["shape_attributes"].clone(), r["region_attributes"].clone()));
        out.entry(name).or_default().extend(each);
    }
    Ok(out)
}

fn from_csv(dataset: &ParsedDataset, file: &Path) -> Result<Regions, ImportError> {
    let table = dataset.source.read_csv(file)?;
    // Version 1 writes `#filename`.
    let name = table.find("#filename").map_or_else(|| table.column("filename"), Ok)?;
    let shape = table.column("region_shape_attributes")?;
    let attributes = table.column("region_attributes")?;
    let count = table.find("region_count");
    let mut out = Regions::new();
    for row in &table.rows {
        let json = |column: usize| serde_json::from_str(row.get(column).unwrap_or_default()).unwrap_or(Value::Null);
        let regions = out.entry(row.get(name).unwrap_or_default().to_owned()).or_default();
        // An image without regions has one row with empty attributes.
        let written = row.get(shape).unwrap_or_default();
        let shape: Value = json(shape);
        let no_region = written.is_empty() || shape.as_object().is_some_and(Map::is_empty);
        if !no_region || count.is_some_and(|c| row.get(c).and_then(|n| n.parse().ok()).is_some_and(|n: f32| n > 0.0)) {
            regions.push((shape, json(attributes)));
        }
    }
    Ok(out)
}

/// Returns the box around a shape, or the reason for leaving it out.
fn extent(shape: &Value) -> Result<[f32; 4], &'static str> {
    const NO_NUMBERS: &str = "the shape has no numbers";
    let get = |key: &str| json_number(&shape[key]).ok_or(NO_NUMBERS);
    match shape["name"].as_str().unwrap_or_default() {
        "rect" => {
            let x = get("x")?;
            let y = get("y")?;
            Ok([x, y, x + get("width")?, y + get("height")?])
        }
        "polygon" | "polyline" => {
            let list = |key: &str| -> Option<Vec<f32>> { shape[key].as_array()?.iter().map(json_number).collect() };
            let (xs, ys) = list("all_points_x").zip(list("all_points_y")).ok_or(NO_NUMBERS)?;
            bounding_box(xs.into_iter().zip(ys)).ok_or(NO_NUMBERS)
        }
        "circle" => {
            let x = get("cx")?;
            let y = get("cy")?;
            let r = get("r")?;
            Ok([x - r, y - r, x + r, y + r])
        }
        "ellipse" => {
            let x = get("cx")?;
            let y = get("cy")?;
            let a = get("rx")?;
            let b = get("ry")?;
            // Half the width of an ellipse rotated by theta is sqrt((a cos)^2 + (b sin)^2).
            let (sin, cos) = json_number(&shape["theta"]).unwrap_or(0.0).sin_cos();
            let w = (a * cos).hypot(b * sin);
            let h = (a * sin).hypot(b * cos);
            Ok([x - w, y - h, x + w, y + h])
        }
        "point" => Err("a point is not a box"),
        _ => Err("the shape is unknown"),
    }
}

/// Returns the label of a region; `None` if there is none or it is ambiguous.
fn label(attributes: &Value) -> Option<String> {
    let map: &Map<String, Value> = attributes.as_object()?;
    let only = || map.values().next().filter(|_| map.len() == 1);
    let value = LABELS.iter().find_map(|k| map.get(*k)).or_else(only)?;
    let words = match value {
        Value::Object(options) => {
            options.iter().filter(|(_, on)| **on == true).map(|(k, _)| k.trim()).collect::<Vec<_>>().join(", ")
        }
        other => json_text(other),
    };
    Some(words).filter(|w| !w.is_empty())
}
