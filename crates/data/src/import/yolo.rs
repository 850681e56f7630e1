//! YOLO folders (<https://docs.ultralytics.com/datasets/detect/>): a text file per image, each line `class x_center y_center width
//! height` as fractions; a YAML file with `names` and `train`, `val`, `test`.
//!
//! That file is `data.yaml`, `dataset.yaml`, or the only one of the folder that has `names`; without, classes come from `classes.txt` or
//! `obj.names`. Labels lie in `labels/` where the image lies in `images/`, or beside the image. An image without a label file has no
//! object; a set without one label is an error. A path of the YAML that leads outside is taken without its leading `../` (exports of
//! Roboflow are written so). A line of a class and a polygon becomes the box around it; with `kpt_shape` (poses), a line's first four
//! numbers are its box; a sixth number (confidence) is ignored. Images with a line that is no class and box, or with a class that has
//! no name, are left out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::item::{Coords, Found, Item, Object, around};
use super::source::{IMAGES, MISSING, has_ending, is_leftover, stem, wrong_file};
use super::split::named;
use super::yaml::{self, Node};
use super::{ImportError, encoding};

const DEPTH: usize = 6;
/// Longest YAML file that is read, in bytes.
const MAX_YAML: u64 = 1 << 20;
/// Longest label file of an image, in bytes.
const MAX_LABELS: u64 = 16 << 20;
const SPLITS: [&str; 3] = ["train", "val", "test"];

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    read_as(found, |name| name.to_owned(), |_| String::new())
}

/// Reads the folder; `label` words a class, `unit` names what an image file must not be parted from.
pub(super) fn read_as(
    found: &mut Found,
    label: impl Fn(&str) -> String,
    unit: impl Fn(&str) -> String,
) -> Result<(), ImportError> {
    let layout = Layout::read(found)?;
    let root = found.source.root.clone();
    let (mut lines, mut unlabelled) = (0, 0);
    for (split, images) in &layout.sets {
        for image in images {
            let id = image.strip_prefix(&root).unwrap_or(image).with_extension("").to_string_lossy().into_owned();
            let (split, patient) = (split.clone(), unit(&stem(image)));
            let mut item = Item { id, image: image.clone(), file: image.clone(), split, patient, ..Item::default() };
            match label_files(&root, image).into_iter().find(|f| f.is_file()) {
                None => unlabelled += 1,
                Some(file) => {
                    item.file = file;
                    lines += layout.labels(found, &mut item, &label)?;
                }
            }
            found.items.push(item);
        }
    }
    if found.items.is_empty() {
        return Err(found.source.wrong("no image: neither in the folders of data.yaml nor below this one"));
    }
    if lines == 0 {
        let what = format!(
            "not one label for {} images ({unlabelled} of them have no label file): labels are looked for beside an image, and in \
             labels/ where it lies in images/ below this folder",
            found.items.len()
        );
        return Err(found.source.wrong(what));
    }
    if unlabelled > 0 {
        let of = found.items.len();
        found.report.notes.push(format!("{unlabelled} of {of} images have no label file and say \"no finding\""));
    }
    Ok(())
}

/// What the folder as a whole says.
struct Layout {
    classes: BTreeMap<usize, String>,
    /// Images by split.
    sets: Vec<(String, Vec<PathBuf>)>,
    /// How many numbers follow the box in a line, where key points do.
    points: Option<usize>,
}

impl Layout {
    fn read(found: &mut Found) -> Result<Self, ImportError> {
        let root = found.source.root.clone();
        let Some((file, doc)) = description(found)? else {
            let names = ["classes.txt", "obj.names"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
            let names = names.ok_or_else(|| {
                found
                    .source
                    .wrong("no data.yaml, dataset.yaml or other YAML file with `names`, no classes.txt or obj.names")
            })?;
            let text = found.source.text(&names)?;
            let classes = text.lines().map(str::trim).map(str::to_owned).enumerate().filter(|(_, n)| !n.is_empty());
            return Ok(Self { classes: classes.collect(), sets: by_folder(found), points: None });
        };
        let classes = match doc.get("names") {
            Node::List(list) => list.iter().enumerate().filter_map(|(k, n)| Some((k, n.word()?.to_owned()))).collect(),
            Node::Map(map) => {
                map.iter().filter_map(|(k, n)| Some((k.trim().parse().ok()?, n.word()?.to_owned()))).collect()
            }
            _ => return Err(wrong_file(&file, "there is no list or map `names`".to_owned())),
        };
        let base = doc.get("path").word().and_then(|p| found.source.inside(&root, p)).filter(|p| p.is_dir());
        let (base, points) = (base.unwrap_or(root), key_points(&file, doc.get("kpt_shape"))?);
        if SPLITS.iter().all(|s| *doc.get(s) == Node::Null) {
            return Ok(Self { classes, sets: by_folder(found), points });
        }
        let mut sets = Vec::new();
        for split in SPLITS {
            let listed: Vec<&str> = match doc.get(split) {
                Node::List(list) => list.iter().filter_map(Node::word).collect(),
                one => one.word().into_iter().collect(),
            };
            let mut images = Vec::new();
            for entry in listed {
                match folder(found, &base, entry) {
                    None => found.leave_out(&file, 0, entry, "its folder is missing or outside"),
                    Some(path) if path.is_dir() => images.extend(found.source.files(&path, &IMAGES, DEPTH)),
                    Some(list) => images.extend(listed_images(found, &base, &list)?),
                }
            }
            sets.push((split.to_owned(), images));
        }
        Ok(Self { classes, sets, points })
    }

    /// Reads an image's label file into its item; how many lines it has.
    fn labels(&self, found: &mut Found, item: &mut Item, label: impl Fn(&str) -> String) -> Result<usize, ImportError> {
        let Ok(text) = encoding::text(found.source.bytes(&item.file, MAX_LABELS)?) else {
            found.leave_out(&item.file, 0, &item.id, "its label file is not UTF-8");
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
                        _ => "the line is no class and box",
                    };
                    found.leave_out(&item.file, row, line, reason);
                    item.unread.push(name.flatten().unwrap_or_default());
                }
            }
        }
        Ok(lines)
    }

    /// The box that the numbers of a line say.
    fn coords(&self, numbers: &[f64]) -> Option<[f64; 4]> {
        match (numbers, self.points) {
            (_, Some(points)) if ![4, 4 + points].contains(&numbers.len()) => None,
            ([x, y, w, h, ..], Some(_)) | ([x, y, w, h] | [x, y, w, h, _], None) => {
                Some([x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0])
            }
            (polygon, None) if polygon.len() >= 6 && polygon.len().is_multiple_of(2) => {
                around(polygon.chunks_exact(2).map(|p| (p[0] as f32, p[1] as f32))).map(|c| c.map(f64::from))
            }
            _ => None,
        }
    }
}

/// The YAML file that describes the set, and what it says; none where no file does.
fn description(found: &Found) -> Result<Option<(PathBuf, Node)>, ImportError> {
    let root = &found.source.root;
    let parsed = |file: &Path| {
        let text = encoding::text(found.source.bytes(file, MAX_YAML)?).map_err(|e| wrong_file(file, e))?;
        yaml::parse(&text).map_err(|e| wrong_file(file, e))
    };
    let usual = ["data.yaml", "data.yml", "dataset.yaml", "dataset.yml"].map(|n| root.join(n));
    if let Some(file) = usual.into_iter().find(|p| p.is_file()) {
        let doc = parsed(&file)?;
        return Ok(Some((file, doc)));
    }
    // Others may be about anything, so that one which cannot be read says nothing.
    let others = found.source.files(root, &["yaml", "yml"], 1).into_iter();
    let mut others = others.filter_map(|f| parsed(&f).ok().filter(|d| *d.get("names") != Node::Null).map(|d| (f, d)));
    match (others.next(), others.next()) {
        (Some((a, _)), Some((b, _))) => {
            let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let what = format!("both {} and {} have `names`: name the one that counts data.yaml", name(&a), name(&b));
            Err(found.source.wrong(what))
        }
        (one, _) => Ok(one),
    }
}

/// How many numbers the key points of a line are: `kpt_shape` is their count and the numbers of each.
fn key_points(file: &Path, shape: &Node) -> Result<Option<usize>, ImportError> {
    let sizes: Option<Vec<usize>> = match shape {
        Node::Null => return Ok(None),
        Node::List(list) => list.iter().map(|n| n.word()?.parse().ok()).collect(),
        _ => None,
    };
    match sizes.as_deref() {
        Some([count, each @ (2 | 3)]) if *count <= 10_000 => Ok(Some(count * each)),
        _ => Err(wrong_file(file, "`kpt_shape` is not [count, 2] or [count, 3]".to_owned())),
    }
}

/// All images below the root, by the split that their folder names.
fn by_folder(found: &Found) -> Vec<(String, Vec<PathBuf>)> {
    let root = &found.source.root;
    let mut sets: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for image in found.source.files(root, &IMAGES, DEPTH) {
        let folder = image.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new(""));
        sets.entry(named(&folder.to_string_lossy()).to_owned()).or_default().push(image);
    }
    sets.into_iter().collect()
}

/// The images that a text file lists, one a line.
fn listed_images(found: &mut Found, base: &Path, list: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let mut images = Vec::new();
    for (row, line) in found.source.text(list)?.lines().map(str::trim).enumerate().filter(|(_, l)| !l.is_empty()) {
        match folder(found, base, line).filter(|p| p.is_file()) {
            Some(image) if is_leftover(&image) => {}
            Some(image) if has_ending(&image, &IMAGES) => images.push(image),
            Some(_) => found.leave_out(list, row, line, "it is no image (jpg, png or dcm)"),
            None => found.leave_out(list, row, line, MISSING),
        }
    }
    Ok(images)
}

/// A path of the YAML file; one that is not there is also tried without leading `../`. Roboflow writes `val: ../valid/images`.
fn folder(found: &Found, base: &Path, entry: &str) -> Option<PathBuf> {
    let plain = entry.trim_start_matches("../").trim_start_matches("./");
    let tries = [found.source.inside(base, entry), found.source.inside(base, plain)];
    tries.into_iter().flatten().find(|p| p.exists())
}

/// Where an image's label file may lie: with its last folder `images` below the root replaced by `labels`, or beside it.
fn label_files(root: &Path, image: &Path) -> Vec<PathBuf> {
    let beside = image.with_extension("txt");
    let below = beside.strip_prefix(root).unwrap_or(&beside);
    let folders: Vec<&OsStr> = below.parent().into_iter().flat_map(Path::iter).collect();
    let labels = folders.iter().rposition(|p| *p == "images").map(|k| {
        let folders = folders.iter().enumerate().map(|(i, p)| if i == k { OsStr::new("labels") } else { p });
        folders.chain(beside.file_name()).fold(root.to_owned(), |path, part| path.join(part))
    });
    labels.into_iter().chain([beside]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_below_the_root_count() {
        let of = |image: &str| label_files(Path::new("/data/images/set"), Path::new(image));
        assert_eq!(of("/data/images/set/train/a.jpg"), [Path::new("/data/images/set/train/a.txt")]);
        let both = ["/data/images/set/images/x/labels/a.txt", "/data/images/set/images/x/images/a.txt"];
        assert_eq!(of("/data/images/set/images/x/images/a.jpg"), both.map(Path::new));
        assert_eq!(of("/data/images/set/images"), [Path::new("/data/images/set/images.txt")]);
    }
}
