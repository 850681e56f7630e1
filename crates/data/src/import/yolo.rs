//! YOLO folders (<https://docs.ultralytics.com/datasets/detect/>): a text file per image, each line `class x_center y_center width
//! height` as fractions; `data.yaml` with `names` and `train`, `val`, `test`.
//!
//! Without `data.yaml`, classes come from `classes.txt` or `obj.names`. An image without a label file has no object. A path of
//! `data.yaml` that leads outside is taken without its leading `../` (exports of Roboflow are written so). A line of a class and a
//! polygon becomes the box around it; a sixth number (confidence) is ignored. Left out: lines that are no numbers, unknown classes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use yaml_rust2::{Yaml, YamlLoader};

use super::ImportError;
use super::item::{Coords, Found, Item, Object, around};
use super::source::{IMAGES, MISSING, stem, wrong_file};
use super::split::named;

const DEPTH: usize = 6;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    read_as(found, |name| name.to_owned(), |_| String::new())
}

/// Reads the folder; `label` words a class, `unit` names what an image file must not be parted from.
pub(super) fn read_as(
    found: &mut Found,
    label: impl Fn(&str) -> String,
    unit: impl Fn(&str) -> String,
) -> Result<(), ImportError> {
    let (classes, sets) = layout(found)?;
    let root = found.source.root.clone();
    for (split, folders) in sets {
        for image in folders {
            let (file, objects) = labels(found, &image, &classes, &label)?;
            let id = image.strip_prefix(&root).unwrap_or(&image).with_extension("").to_string_lossy().into_owned();
            let (split, patient) = (split.clone(), unit(&stem(&image)));
            found.items.push(Item { id, image, file, objects, split, patient, ..Item::default() });
        }
    }
    if found.items.is_empty() {
        return Err(found.source.wrong("no image: neither in the folders of data.yaml nor below this one"));
    }
    Ok(())
}

type Sets = Vec<(String, Vec<PathBuf>)>;

fn layout(found: &mut Found) -> Result<(BTreeMap<usize, String>, Sets), ImportError> {
    let root = found.source.root.clone();
    let yaml = ["data.yaml", "data.yml"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
    let Some(file) = yaml else {
        let names = ["classes.txt", "obj.names"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
        let names = names.ok_or_else(|| found.source.wrong("no data.yaml, classes.txt or obj.names"))?;
        let text = found.source.text(&names)?;
        let classes =
            text.lines().map(str::trim).map(str::to_owned).enumerate().filter(|(_, n)| !n.is_empty()).collect();
        let mut sets: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for image in found.source.files(&root, &IMAGES, DEPTH) {
            let folder = image.parent().and_then(|p| p.strip_prefix(&root).ok()).unwrap_or(Path::new(""));
            sets.entry(named(&folder.to_string_lossy()).to_owned()).or_default().push(image);
        }
        return Ok((classes, sets.into_iter().collect()));
    };
    let docs = YamlLoader::load_from_str(&found.source.text(&file)?)
        .map_err(|e| wrong_file(&file, format!("not YAML: {e}")))?;
    let doc = docs.first().ok_or_else(|| wrong_file(&file, "the file is empty".to_owned()))?;
    let classes: BTreeMap<usize, String> = match &doc["names"] {
        Yaml::Array(list) => list.iter().filter_map(word).enumerate().collect(),
        Yaml::Hash(map) => map.iter().filter_map(|(k, v)| Some((word(k)?.parse().ok()?, word(v)?))).collect(),
        _ => return Err(wrong_file(&file, "there is no list or map `names`".to_owned())),
    };
    let base = doc["path"].as_str().and_then(|p| found.source.inside(&root, p)).filter(|p| p.is_dir()).unwrap_or(root);
    let mut sets = Vec::new();
    for split in ["train", "val", "test"] {
        let listed: Vec<String> = match &doc[split] {
            Yaml::Array(list) => list.iter().filter_map(word).collect(),
            one => word(one).into_iter().collect(),
        };
        let mut images = Vec::new();
        for entry in listed {
            match folder(found, &base, &entry) {
                None => found.leave_out(&file, 0, &entry, "its folder is missing or outside"),
                Some(path) if path.is_dir() => images.extend(found.source.files(&path, &IMAGES, DEPTH)),
                Some(list) => images.extend(listed_images(found, &base, &list)?),
            }
        }
        sets.push((split.to_owned(), images));
    }
    Ok((classes, sets))
}

/// The images that a text file lists, one a line.
fn listed_images(found: &mut Found, base: &Path, list: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let mut images = Vec::new();
    for (row, line) in found.source.text(list)?.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        match folder(found, base, line.trim()).filter(|p| p.is_file()) {
            Some(image) => images.push(image),
            None => found.leave_out(list, row, line.trim(), MISSING),
        }
    }
    Ok(images)
}

/// A path of `data.yaml`; one that is not there is also tried without leading `../`. Roboflow writes `val: ../valid/images`.
fn folder(found: &Found, base: &Path, entry: &str) -> Option<PathBuf> {
    let plain = entry.trim_start_matches("../").trim_start_matches("./");
    let tries = [found.source.inside(base, entry), found.source.inside(base, plain)];
    tries.into_iter().flatten().find(|p| p.exists())
}

fn word(value: &Yaml) -> Option<String> {
    match value {
        Yaml::String(s) => Some(s.trim().to_owned()),
        Yaml::Integer(i) => Some(i.to_string()),
        Yaml::Boolean(b) => Some(b.to_string()),
        _ => None,
    }
}

/// The label file of an image: beside it, or with the last folder `images` replaced by `labels`.
fn label_file(image: &Path) -> PathBuf {
    let beside = image.with_extension("txt");
    let parts: Vec<_> = beside.components().collect();
    match parts.iter().rposition(|p| p.as_os_str() == "images") {
        Some(k) => {
            parts.iter().enumerate().map(|(i, p)| if i == k { "labels".as_ref() } else { p.as_os_str() }).collect()
        }
        None => beside,
    }
}

fn labels(
    found: &mut Found,
    image: &Path,
    classes: &BTreeMap<usize, String>,
    label: impl Fn(&str) -> String,
) -> Result<(PathBuf, Vec<Object>), ImportError> {
    let file = label_file(image);
    let mut out = Vec::new();
    if !file.is_file() {
        return Ok((image.to_owned(), out));
    }
    for (row, line) in found.source.text(&file)?.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let mut parts = line.split_whitespace();
        let class = parts.next().and_then(|c| c.parse::<f32>().ok()).filter(|c| c.fract() == 0.0 && *c >= 0.0);
        let numbers: Option<Vec<f32>> = parts.map(|p| p.parse().ok()).collect();
        let coords = numbers.as_deref().and_then(|n| match n {
            [x, y, w, h] | [x, y, w, h, _] => Some([x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0]),
            points if points.len() >= 6 && points.len().is_multiple_of(2) => {
                around(points.chunks_exact(2).map(|p| (p[0], p[1])))
            }
            _ => None,
        });
        match (class.map(|c| classes.get(&(c as usize))), coords) {
            (None, _) | (_, None) => found.leave_out(&file, row, line, "the line is no class and box"),
            (Some(None), _) => found.leave_out(&file, row, line, "its class has no name"),
            (Some(Some(name)), Some(c)) => {
                out.push(Object { label: label(name), coords: Coords::Fractions(c) });
            }
        }
    }
    Ok((file, out))
}
