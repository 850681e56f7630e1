//! VGG Image Annotator (<https://www.robots.ox.ac.uk/~vgg/software/via/>), versions 1 and 2: annotations as JSON, a saved project
//! (`_via_img_metadata`), or CSV (`filename`, …, `region_shape_attributes`, `region_attributes`). All `*.json` and `*.csv` of the folder.
//!
//! Rectangles are taken as they are; of a polygon, polyline, circle or ellipse, the box around it. Images with a point, a shape
//! without numbers or a region without a label are left out. The label is the attribute `label`, `class`, `name`, `type` or `category`,
//! else the only one there is; of options that are ticked, those that are true.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::ImportError;
use super::item::{Coords, Found, Item, Object, around};
use super::source::{number, stem, text_of, wrong_file};

const FOLDERS: [&str; 4] = ["", "images", "train", "val"];
const LABELS: [&str; 5] = ["label", "class", "name", "type", "category"];

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let files = found.source.files(&root, &["json", "csv"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no *.json or *.csv"));
    }
    for file in files {
        let split = super::split::named(&file.strip_prefix(&root).unwrap_or(&file).to_string_lossy()).to_owned();
        let regions = match file.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
            true => from_csv(found, &file)?,
            false => from_json(found, &file)?,
        };
        for (row, (name, regions)) in regions.into_iter().enumerate() {
            let image = match found.source.image(&FOLDERS, &name) {
                Ok(image) => image,
                Err(reason) => {
                    found.leave_out(&file, row, &name, reason);
                    continue;
                }
            };
            let id = stem(Path::new(&name));
            let mut item = Item { id, image, file: file.clone(), row, split: split.clone(), ..Item::default() };
            for (k, (shape, attributes)) in regions.iter().enumerate() {
                match (label(attributes), extent(shape)) {
                    (Some(label), Ok(c)) => item.objects.push(Object { label, coords: Coords::Pixels(c) }),
                    (label, extent) => {
                        let reason =
                            label.as_ref().map_or("the region has no label", |_| extent.err().unwrap_or_default());
                        found.leave_out(&file, k, &name, reason);
                        item.unread.push(label.unwrap_or_default());
                    }
                }
            }
            found.items.push(item);
        }
    }
    Ok(())
}

/// Regions by image: shape and attributes.
type Regions = BTreeMap<String, Vec<(Value, Value)>>;

fn from_json(found: &Found, file: &Path) -> Result<Regions, ImportError> {
    let doc = found.source.json(file)?;
    let images = doc.get("_via_img_metadata").unwrap_or(&doc);
    let images =
        images.as_object().ok_or_else(|| wrong_file(file, "not a VIA file: no object of images".to_owned()))?;
    let mut out = Regions::new();
    for image in images.values() {
        let name = image.get("filename").map(text_of).filter(|n| !n.is_empty());
        let name = name.ok_or_else(|| wrong_file(file, "not a VIA file: an image without `filename`".to_owned()))?;
        // Version 1 writes an object with the keys "0", "1", …; version 2 a list.
        let regions: Vec<&Value> = match &image["regions"] {
            Value::Array(list) => list.iter().collect(),
            Value::Object(map) => map.values().collect(),
            // No region is known there, so the image is left out.
            odd => vec![odd],
        };
        let each = regions.into_iter().map(|r| (r["shape_attributes"].clone(), r["region_attributes"].clone()));
        out.entry(name).or_default().extend(each);
    }
    Ok(out)
}

fn from_csv(found: &Found, file: &Path) -> Result<Regions, ImportError> {
    let table = found.source.csv(file)?;
    // Version 1 writes `#filename`.
    let name = table.find("#filename").map_or_else(|| table.column("filename"), Ok)?;
    let (shape, attributes) = (table.column("region_shape_attributes")?, table.column("region_attributes")?);
    let count = table.find("region_count");
    let mut out = Regions::new();
    for row in &table.rows {
        let json = |column: usize| serde_json::from_str(row.get(column).unwrap_or_default()).unwrap_or(Value::Null);
        let regions = out.entry(row.get(name).unwrap_or_default().to_owned()).or_default();
        // An image without regions has one row with empty attributes.
        let written = row.get(shape).unwrap_or_default();
        let shape: Value = json(shape);
        let none = written.is_empty() || shape.as_object().is_some_and(Map::is_empty);
        if !none || count.is_some_and(|c| row.get(c).and_then(|n| n.parse().ok()).is_some_and(|n: f32| n > 0.0)) {
            regions.push((shape, json(attributes)));
        }
    }
    Ok(out)
}

/// The box around a shape, or the rule by which it is left out.
fn extent(shape: &Value) -> Result<[f32; 4], &'static str> {
    const NO_NUMBERS: &str = "the shape has no numbers";
    let get = |key: &str| number(&shape[key]).ok_or(NO_NUMBERS);
    match shape["name"].as_str().unwrap_or_default() {
        "rect" => {
            let (x, y) = (get("x")?, get("y")?);
            Ok([x, y, x + get("width")?, y + get("height")?])
        }
        "polygon" | "polyline" => {
            let list = |key: &str| -> Option<Vec<f32>> { shape[key].as_array()?.iter().map(number).collect() };
            let (xs, ys) = list("all_points_x").zip(list("all_points_y")).ok_or(NO_NUMBERS)?;
            around(xs.into_iter().zip(ys)).ok_or(NO_NUMBERS)
        }
        "circle" => {
            let (x, y, r) = (get("cx")?, get("cy")?, get("r")?);
            Ok([x - r, y - r, x + r, y + r])
        }
        "ellipse" => {
            let (x, y, a, b) = (get("cx")?, get("cy")?, get("rx")?, get("ry")?);
            // Of an ellipse turned by theta, half the width is the root of (a cos)^2 + (b sin)^2.
            let (sin, cos) = number(&shape["theta"]).unwrap_or(0.0).sin_cos();
            let (w, h) = ((a * cos).hypot(b * sin), (a * sin).hypot(b * cos));
            Ok([x - w, y - h, x + w, y + h])
        }
        "point" => Err("a point is no box"),
        _ => Err("the shape is not known"),
    }
}

fn label(attributes: &Value) -> Option<String> {
    let map: &Map<String, Value> = attributes.as_object()?;
    let only = || map.values().next().filter(|_| map.len() == 1);
    let value = LABELS.iter().find_map(|k| map.get(*k)).or_else(only)?;
    let words = match value {
        Value::Object(ticked) => {
            ticked.iter().filter(|(_, on)| **on == true).map(|(k, _)| k.trim()).collect::<Vec<_>>().join(", ")
        }
        other => text_of(other),
    };
    Some(words).filter(|w| !w.is_empty())
}
