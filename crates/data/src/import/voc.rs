//! Pascal VOC folders (`Annotations/*.xml`, `JPEGImages/`, `ImageSets/Main/{train,val,test}.txt`) to records.
//!
//! One record per image. Coordinates are taken as written: by the book they count from 1 and include the last pixel, in
//! practice most tools (and BCCD's) write 0-based corners, and `xmax` equal to the width is common; the difference is one
//! pixel. A box without area, inverted, not finite or outside the image is left out by rule and reported by file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Map;
use unveil_core::{BBox, BoxFault, Record};

use super::xml::{self, Annotation};
use super::{ImportError, ImportReport, LeftOut};
use crate::records;
use crate::store::image_size;

const SPLITS: [&str; 3] = ["train", "val", "test"];

/// What to take over.
#[derive(Debug, Clone, Default)]
pub struct VocOptions {
    /// Only this split; all images otherwise.
    pub split: Option<String>,
    /// Only this class's boxes; images without one become "no finding".
    pub class: Option<ClassFilter>,
    /// Written to every record.
    pub modality: String,
    /// Written to every record; by default `Where is the {classes}?`.
    pub question: Option<String>,
}

/// One class of the data set and the words that it gets.
#[derive(Debug, Clone)]
pub struct ClassFilter {
    /// Name in the annotations.
    pub class: String,
    /// Category and label in the records.
    pub category: String,
}

/// Imports the VOC folder `src` into the record file `out`.
///
/// Images under the folder of `out` are used where they lie; others are hard-linked (copied where that fails) into
/// `<stem of out>_images/` beside it, because an image path may not leave the folder of its record file.
pub fn import(src: &Path, out: &Path, options: &VocOptions) -> Result<ImportReport, ImportError> {
    let split_of = read_splits(src)?;
    let stems = select(src, &split_of, options)?;
    let mut annotations = Vec::with_capacity(stems.len());
    for stem in stems {
        let file = src.join("Annotations").join(format!("{stem}.xml"));
        let text = std::fs::read_to_string(&file).map_err(|cause| ImportError::Io { path: file.clone(), cause })?;
        let a = xml::parse(&text).map_err(|cause| ImportError::Annotation { file: file.clone(), cause })?;
        annotations.push((stem, file, a));
    }
    let mut report = ImportReport::default();
    for o in annotations.iter().flat_map(|(_, _, a)| &a.objects) {
        *report.classes.entry(o.name.clone()).or_default() += 1;
    }
    let words = match &options.class {
        Some(f) if !report.classes.contains_key(&f.class) => {
            let known: Vec<&str> = report.classes.keys().map(String::as_str).collect();
            let what = format!("no object of class \"{}\"; the classes are {}", f.class, known.join(", "));
            return Err(ImportError::Source { src: src.to_owned(), what });
        }
        Some(f) => f.category.clone(),
        None => report.classes.keys().cloned().collect::<Vec<_>>().join(", "),
    };
    let question = options.question.clone().unwrap_or_else(|| format!("Where is the {words}?"));
    let source = src.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let mut images = ImageFolder::new(out)?;
    let mut list = Vec::with_capacity(annotations.len());
    for (stem, file, a) in &annotations {
        let image = find_image(src, stem, a)?;
        let (width, height) = image_size(&image)?;
        if a.size.is_some_and(|s| s != (width, height)) {
            report.size_mismatch.push(file.display().to_string());
        }
        let (boxes, labels) = take_boxes(a, file, (width, height), options, &mut report);
        let category = match &options.class {
            Some(f) => f.category.clone(),
            None => {
                labels.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
            }
        };
        let split = split_of.get(stem).copied().unwrap_or_default();
        *report.splits.entry(split.to_owned()).or_default() += 1;
        report.objects += a.objects.len();
        report.boxes += boxes.len();
        list.push(Record {
            id: stem.clone(),
            image: images.reach(&image)?,
            image_size: Some([width, height]),
            question: question.clone(),
            answer: String::new(),
            category,
            boxes,
            labels,
            modality: options.modality.clone(),
            source: source.clone().unwrap_or_else(|| "voc".to_owned()),
            split: split.to_owned(),
            extra: Map::new(),
        });
    }
    records::write(out, &list)?;
    report.records = list.len();
    report.images_copied_to = images.used.then_some(images.copies);
    Ok(report)
}

/// Split of each image by the lists; an image in two lists would leak from training into testing and is an error.
fn read_splits(src: &Path) -> Result<BTreeMap<String, &'static str>, ImportError> {
    let mut out = BTreeMap::new();
    for split in SPLITS {
        let path = src.join("ImageSets/Main").join(format!("{split}.txt"));
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(cause) => return Err(ImportError::Io { path, cause }),
        };
        for stem in text.lines().filter_map(|l| l.split_whitespace().next()) {
            if let Some(other) = out.insert(stem.to_owned(), split).filter(|other| *other != split) {
                let what = format!("{stem} is in both {other}.txt and {split}.txt of ImageSets/Main");
                return Err(ImportError::Source { src: src.to_owned(), what });
            }
        }
    }
    Ok(out)
}

/// Names (without ending) of the images to import, sorted.
fn select(
    src: &Path,
    split_of: &BTreeMap<String, &'static str>,
    options: &VocOptions,
) -> Result<Vec<String>, ImportError> {
    if let Some(split) = &options.split {
        let stems: Vec<String> = split_of.iter().filter(|(_, s)| *s == split).map(|(stem, _)| stem.clone()).collect();
        if stems.is_empty() {
            let what = format!(
                "no image in split \"{split}\": ImageSets/Main/{split}.txt is missing or empty (splits are train, val, test)"
            );
            return Err(ImportError::Source { src: src.to_owned(), what });
        }
        return Ok(stems);
    }
    let folder = src.join("Annotations");
    let io = |cause| ImportError::Io { path: folder.clone(), cause };
    let mut stems: BTreeSet<String> = split_of.keys().cloned().collect();
    for entry in std::fs::read_dir(&folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("xml")) {
            stems.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
        }
    }
    if stems.is_empty() {
        return Err(ImportError::Source { src: src.to_owned(), what: "no annotation in Annotations/".to_owned() });
    }
    Ok(stems.into_iter().collect())
}

fn find_image(src: &Path, stem: &str, a: &Annotation) -> Result<PathBuf, ImportError> {
    let folder = src.join("JPEGImages");
    let named = Path::new(&a.filename).file_name().map(|n| n.to_string_lossy().into_owned());
    let endings = ["jpg", "jpeg", "png", "JPG", "JPEG", "PNG"].map(|e| format!("{stem}.{e}"));
    endings.into_iter().chain(named).map(|n| folder.join(n)).find(|p| p.is_file()).ok_or_else(|| {
        let cause = std::io::Error::new(std::io::ErrorKind::NotFound, "no image for this annotation (jpg, jpeg, png)");
        ImportError::Io { path: folder.join(stem), cause }
    })
}

fn take_boxes(
    a: &Annotation,
    file: &Path,
    (width, height): (u32, u32),
    options: &VocOptions,
    report: &mut ImportReport,
) -> (Vec<BBox>, Vec<String>) {
    let mut out = (Vec::new(), Vec::new());
    for (object, o) in a.objects.iter().enumerate() {
        let label = match &options.class {
            Some(f) if f.class != o.name => continue,
            Some(f) => f.category.clone(),
            None => o.name.clone(),
        };
        let b = BBox::from(o.coords);
        // Stricter than `BBox::fault`, which grants a model's answer a pixel: an annotation has no reason to overhang.
        let (w, h) = (width as f32, height as f32);
        let overhang = b.x1 < 0.0 || b.y1 < 0.0 || b.x2 > w || b.y2 > h;
        match b.fault(w, h).or(overhang.then_some(BoxFault::Outside)) {
            None => {
                out.0.push(b);
                out.1.push(label);
            }
            Some(fault) => report.left_out.push(LeftOut {
                file: file.display().to_string(),
                object,
                label: o.name.clone(),
                reason: fault.to_string(),
                coords: o.coords,
            }),
        }
    }
    out
}

/// Makes images reachable from the folder of the record file.
struct ImageFolder {
    root: PathBuf,
    copies: PathBuf,
    used: bool,
}

impl ImageFolder {
    fn new(out: &Path) -> Result<Self, ImportError> {
        let io = |cause| ImportError::Io { path: out.to_owned(), cause };
        let folder = records::folder_of(out);
        std::fs::create_dir_all(folder).map_err(io)?;
        let root = folder.canonicalize().map_err(io)?;
        let stem = out.file_stem().ok_or_else(|| io(std::io::Error::other("the path has no file name")))?;
        let copies = root.join(format!("{}_images", stem.to_string_lossy()));
        Ok(Self { root, copies, used: false })
    }

    /// Path of `image` relative to the record file, after linking or copying it where it is not below.
    fn reach(&mut self, image: &Path) -> Result<String, ImportError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |cause| ImportError::Io { path, cause }
        };
        let full = image.canonicalize().map_err(io(image))?;
        let target = match full.strip_prefix(&self.root) {
            Ok(below) => below.to_owned(),
            Err(_) => {
                let name = full.file_name().ok_or_else(|| io(image)(std::io::Error::other("no file name")))?;
                let copy = self.copies.join(name);
                std::fs::create_dir_all(&self.copies).map_err(io(&self.copies))?;
                let _ = std::fs::remove_file(&copy);
                std::fs::hard_link(&full, &copy)
                    .or_else(|_| std::fs::copy(&full, &copy).map(|_| ()))
                    .map_err(io(&copy))?;
                self.used = true;
                copy.strip_prefix(&self.root).unwrap_or(&copy).to_owned()
            }
        };
        Ok(target.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
#[path = "voc_tests.rs"]
mod tests;
