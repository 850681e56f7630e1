//! YOLO folders (<https://docs.ultralytics.com/datasets/detect/>).
//!
//! Files: a text file per image, in `labels/` if the image is in `images/`, or next to the image; a YAML file with `names` and `train`,
//! `val`, `test`, which is `data.yaml`, `dataset.yaml`, or the only one in the folder with `names`. Without a YAML file, classes come from
//! `classes.txt` or `obj.names`, and the split from the names of the folders. A path of the YAML file that leads outside is used without its
//! leading `../` (Roboflow's exports have such paths).
//!
//! Fields: each line `class x_center y_center width height` (fractions of the image) becomes a box; a sixth number (confidence) is ignored;
//! a class with a polygon becomes the box around it; with `kpt_shape` (poses), the first four numbers of a line are its box. An image
//! without a label file has no object; a data set without any label is an error.
//!
//! Left out: images with a line that is not a class and a box, or with a class without a name.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::draft::{Coords, DraftRecord, Object, ParsedDataset, bounding_box};
use super::source::{IMAGES, MISSING, file_error, has_ending, is_macos_leftover, stem};
use super::split::split_from_name;
use super::yaml::{self, Node};
use super::{ImportError, encoding};

/// Depth to which folders are searched for images.
const MAX_DEPTH: usize = 6;
/// Largest YAML file that is read, in bytes.
const MAX_YAML: u64 = 1 << 20;
/// Largest label file of an image, in bytes.
const MAX_LABELS: u64 = 16 << 20;
const SPLITS: [&str; 3] = ["train", "val", "test"];

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    read_mapped(dataset, |name| name.to_owned(), |_| String::new())
}

/// Parses the folder; `label` maps a class name to a label, `unit` a file stem to the unit that must stay in one split.
pub(super) fn read_mapped(
    dataset: &mut ParsedDataset,
    label: impl Fn(&str) -> String,
    unit: impl Fn(&str) -> String,
) -> Result<(), ImportError> {
    let layout = Layout::read(dataset)?;
    let root = dataset.source.root.clone();
    let mut lines = 0;
    let mut unlabelled = 0;
    for (split, images) in &layout.sets {
        for image in images {
            let id = image.strip_prefix(&root).unwrap_or(image).with_extension("").to_string_lossy().into_owned();
            let split = split.clone();
            let patient = unit(&stem(image));
            let mut item =
                DraftRecord { id, image: image.clone(), file: image.clone(), split, patient, ..DraftRecord::default() };
            match label_files(&root, image).into_iter().find(|f| f.is_file()) {
                None => unlabelled += 1,
                Some(file) => {
                    item.file = file;
                    lines += layout.read_labels(dataset, &mut item, &label)?;
                }
            }
            dataset.items.push(item);
        }
    }
    if dataset.items.is_empty() {
        return Err(dataset.source.dataset_error("no image in the folders of data.yaml or below this folder"));
    }
    if lines == 0 {
        let what = format!(
            "no label for {} images ({unlabelled} of them have no label file): labels are searched next to an image, and in \
             labels/ if the image is in images/ below this folder",
            dataset.items.len()
        );
        return Err(dataset.source.dataset_error(what));
    }
    if unlabelled > 0 {
        let total = dataset.items.len();
        dataset
            .report
            .notes
            .push(format!("{unlabelled} of {total} images have no label file and become \"no finding\""));
    }
    Ok(())
}

/// Classes and images of the folder.
struct Layout {
    classes: BTreeMap<usize, String>,
    /// Images by split.
    sets: Vec<(String, Vec<PathBuf>)>,
    /// Count of numbers for key points that follow the box in a line, if there are key points.
    points: Option<usize>,
}

impl Layout {
    fn read(dataset: &mut ParsedDataset) -> Result<Self, ImportError> {
        let root = dataset.source.root.clone();
        let Some((file, doc)) = find_description(dataset)? else {
            let names = ["classes.txt", "obj.names"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
            let names = names.ok_or_else(|| {
                dataset.source.dataset_error(
                    "no data.yaml, dataset.yaml or other YAML file with `names`, no classes.txt or obj.names",
                )
            })?;
            let text = dataset.source.read_text(&names)?;
            let classes = text.lines().map(str::trim).map(str::to_owned).enumerate().filter(|(_, n)| !n.is_empty());
            return Ok(Self { classes: classes.collect(), sets: images_by_folder(dataset), points: None });
        };
        let classes = match doc.get("names") {
            Node::List(list) => list.iter().enumerate().filter_map(|(k, n)| Some((k, n.word()?.to_owned()))).collect(),
            Node::Map(map) => {
                map.iter().filter_map(|(k, n)| Some((k.trim().parse().ok()?, n.word()?.to_owned()))).collect()
            }
            _ => return Err(file_error(&file, "there is no list or map `names`".to_owned())),
        };
        let base = doc.get("path").word().and_then(|p| dataset.source.resolve_inside(&root, p)).filter(|p| p.is_dir());
        let base = base.unwrap_or(root);
        let points = key_points(&file, doc.get("kpt_shape"))?;
        if SPLITS.iter().all(|s| *doc.get(s) == Node::Null) {
            return Ok(Self { classes, sets: images_by_folder(dataset), points });
        }
        let mut sets = Vec::new();
        for split in SPLITS {
            let entries: Vec<&str> = match doc.get(split) {
                Node::List(list) => list.iter().filter_map(Node::word).collect(),
                entry => entry.word().into_iter().collect(),
            };
            let mut images = Vec::new();
            for entry in entries {
                match resolve_path(dataset, &base, entry) {
                    None => dataset.leave_out(&file, 0, entry, "its folder is missing or outside"),
                    Some(path) if path.is_dir() => images.extend(dataset.source.list_files(&path, &IMAGES, MAX_DEPTH)),
                    Some(list) => images.extend(listed_images(dataset, &base, &list)?),
                }
            }
            sets.push((split.to_owned(), images));
        }
        Ok(Self { classes, sets, points })
    }

    /// Parses the label file of an image into its draft; returns the number of lines.
    fn read_labels(
        &self,
        dataset: &mut ParsedDataset,
        item: &mut DraftRecord,
        label: impl Fn(&str) -> String,
    ) -> Result<usize, ImportError> {
        let Ok(text) = encoding::decode_text(dataset.source.read_bytes(&item.file, MAX_LABELS)?) else {
            dataset.leave_out(&item.file, 0, &item.id, "its label file is not UTF-8");
            item.unread.push(String::new());
            return Ok(1);
        };
        let mut lines = 0;
        for (row, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            lines += 1;
            let mut parts = line.split_whitespace();
            let class = parts.next().and_then(|c| c.parse::<f32>().ok()).filter(|c| c.fract() == 0.0 && *c >= 0.0);
            let name = class.map(|c| self.classes.get(&(c as usize)).map(|n| label(n)));
            let numbers: Option<Vec<f64>> = parts.map(|p| p.parse().ok()).collect();
            let coords = numbers.as_deref().and_then(|n| self.coords(n));
            match (name, coords) {
                (Some(Some(label)), Some(c)) => item.objects.push(Object { label, coords: Coords::Fractions(c) }),
                (name, coords) => {
                    let reason = match coords {
                        Some(_) if name.is_some() => "its class has no name",
                        _ => "the line is not a class and a box",
                    };
                    dataset.leave_out(&item.file, row, line, reason);
                    item.unread.push(name.flatten().unwrap_or_default());
                }
            }
        }
        Ok(lines)
    }

    /// Returns the box of a line as fractions, from the numbers after the class.
    fn coords(&self, numbers: &[f64]) -> Option<[f64; 4]> {
        match (numbers, self.points) {
            (_, Some(points)) if ![4, 4 + points].contains(&numbers.len()) => None,
            ([x, y, w, h, ..], Some(_)) | ([x, y, w, h] | [x, y, w, h, _], None) => {
                Some([x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0])
            }
            (polygon, None) if polygon.len() >= 6 && polygon.len().is_multiple_of(2) => {
                bounding_box(polygon.chunks_exact(2).map(|p| (p[0] as f32, p[1] as f32))).map(|c| c.map(f64::from))
            }
            _ => None,
        }
    }
}

/// Finds and parses the YAML file that describes the data set; `None` if there is none.
fn find_description(dataset: &ParsedDataset) -> Result<Option<(PathBuf, Node)>, ImportError> {
    let root = &dataset.source.root;
    let parse = |file: &Path| {
        let text =
            encoding::decode_text(dataset.source.read_bytes(file, MAX_YAML)?).map_err(|e| file_error(file, e))?;
        yaml::parse(&text).map_err(|e| file_error(file, e))
    };
    let usual = ["data.yaml", "data.yml", "dataset.yaml", "dataset.yml"].map(|n| root.join(n));
    if let Some(file) = usual.into_iter().find(|p| p.is_file()) {
        let doc = parse(&file)?;
        return Ok(Some((file, doc)));
    }
    // Other YAML files may be unrelated, so one that cannot be parsed is ignored.
    let others = dataset.source.list_files(root, &["yaml", "yml"], 1).into_iter();
    let mut others = others.filter_map(|f| parse(&f).ok().filter(|d| *d.get("names") != Node::Null).map(|d| (f, d)));
    match (others.next(), others.next()) {
        (Some((a, _)), Some((b, _))) => {
            let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let what = format!("both {} and {} have `names`: rename the right one to data.yaml", name(&a), name(&b));
            Err(dataset.source.dataset_error(what))
        }
        (only, _) => Ok(only),
    }
}

/// Returns the count of numbers for key points in a line: `kpt_shape` is the number of points and of values per point.
fn key_points(file: &Path, shape: &Node) -> Result<Option<usize>, ImportError> {
    let sizes: Option<Vec<usize>> = match shape {
        Node::Null => return Ok(None),
        Node::List(list) => list.iter().map(|n| n.word()?.parse().ok()).collect(),
        _ => None,
    };
    match sizes.as_deref() {
        Some([count, each @ (2 | 3)]) if *count <= 10_000 => Ok(Some(count * each)),
        _ => Err(file_error(file, "`kpt_shape` is not [count, 2] or [count, 3]".to_owned())),
    }
}

/// Returns all images below the root by the split in the name of their folder.
fn images_by_folder(dataset: &ParsedDataset) -> Vec<(String, Vec<PathBuf>)> {
    let root = &dataset.source.root;
    let mut sets: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for image in dataset.source.list_files(root, &IMAGES, MAX_DEPTH) {
        let folder = image.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new(""));
        sets.entry(split_from_name(&folder.to_string_lossy()).to_owned()).or_default().push(image);
    }
    sets.into_iter().collect()
}

/// Returns the images that a text file lists, one per line.
fn listed_images(dataset: &mut ParsedDataset, base: &Path, list: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let mut images = Vec::new();
    for (row, line) in dataset.source.read_text(list)?.lines().map(str::trim).enumerate().filter(|(_, l)| !l.is_empty())
    {
        match resolve_path(dataset, base, line).filter(|p| p.is_file()) {
            Some(image) if is_macos_leftover(&image) => {}
            Some(image) if has_ending(&image, &IMAGES) => images.push(image),
            Some(_) => dataset.leave_out(list, row, line, "it is not an image (jpg, png or dcm)"),
            None => dataset.leave_out(list, row, line, MISSING),
        }
    }
    Ok(images)
}

/// Resolves a path of the YAML file; a path that does not exist is also tried without leading `../`, as in Roboflow's `val: ../valid/images`.
fn resolve_path(dataset: &ParsedDataset, base: &Path, entry: &str) -> Option<PathBuf> {
    let without_parent = entry.trim_start_matches("../").trim_start_matches("./");
    let tries = [dataset.source.resolve_inside(base, entry), dataset.source.resolve_inside(base, without_parent)];
    tries.into_iter().flatten().find(|p| p.exists())
}

/// Returns the possible paths of an image's label file: with the last folder `images` below the root replaced by `labels`, or next to it.
fn label_files(root: &Path, image: &Path) -> Vec<PathBuf> {
    let next_to_image = image.with_extension("txt");
    let below = next_to_image.strip_prefix(root).unwrap_or(&next_to_image);
    let folders: Vec<&OsStr> = below.parent().into_iter().flat_map(Path::iter).collect();
    let labels = folders.iter().rposition(|p| *p == "images").map(|k| {
        let folders = folders.iter().enumerate().map(|(i, p)| if i == k { OsStr::new("labels") } else { p });
        folders.chain(next_to_image.file_name()).fold(root.to_owned(), |path, part| path.join(part))
    });
    labels.into_iter().chain([next_to_image]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_files_depend_on_folders_below_the_root() {
        let candidates = |image: &str| label_files(Path::new("/data/images/set"), Path::new(image));
        assert_eq!(candidates("/data/images/set/train/a.jpg"), [Path::new("/data/images/set/train/a.txt")]);
        let both = ["/data/images/set/images/x/labels/a.txt", "/data/images/set/images/x/images/a.txt"];
        assert_eq!(candidates("/data/images/set/images/x/images/a.jpg"), both.map(Path::new));
        assert_eq!(candidates("/data/images/set/images"), [Path::new("/data/images/set/images.txt")]);
    }
}
