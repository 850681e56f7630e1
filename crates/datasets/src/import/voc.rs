//! Pascal VOC folders.
//!
//! Files: `Annotations/*.xml`, images in `JPEGImages/`, and optional lists `ImageSets/Main/{train,val,test}.txt`, which give the split.
//! Annotations are read in the encoding that they declare. A missing or corrupt file is an error.
//!
//! Fields: each annotation becomes a record, each `<object>` a box with `<name>` as label. Coordinates are used as written: the
//! specification counts from 1 and includes the last pixel, but most tools (and BCCD's) write 0-based corners, and `xmax` equal to the width
//! is common; the difference is one pixel.
//!
//! Left out: boxes that are inverted, not finite, without area or outside the image; images with an object without a class or a corner.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{SourceFolder, file_error, has_ending, is_macos_leftover, stem};
use super::xml::{self, Annotation};
use super::{ImportError, ImportOptions, encoding};

/// Largest annotation file, in bytes.
const MAX_XML: u64 = 64 << 20;
const SPLITS: [&str; 3] = ["train", "val", "test"];

pub(super) fn read(dataset: &mut ParsedDataset, options: &ImportOptions) -> Result<(), ImportError> {
    dataset.strict = true;
    let split_of = read_splits(&dataset.source)?;
    for stem in select(&dataset.source, &split_of, options)? {
        let file = dataset.source.root.join("Annotations").join(format!("{stem}.xml"));
        let text = encoding::decode_xml(dataset.source.read_bytes(&file, MAX_XML)?)
            .map_err(|cause| file_error(&file, cause))?;
        let a = xml::parse(&text).map_err(|cause| file_error(&file, cause))?;
        let mut item = DraftRecord {
            image: find_image(&dataset.source.root, &stem, &a)?,
            split: split_of.get(&stem).copied().unwrap_or_default().to_owned(),
            id: stem,
            file,
            frame: a.size(),
            ..DraftRecord::default()
        };
        for (k, o) in a.objects.iter().enumerate() {
            match o.corners() {
                Ok(c) => item.objects.push(Object { label: o.class().to_owned(), coords: Coords::Pixels(c) }),
                Err(reason) => {
                    dataset.leave_out(&item.file, k, o.class(), reason);
                    item.unread.push(o.class().to_owned());
                }
            }
        }
        dataset.items.push(item);
    }
    Ok(())
}

/// Returns the split of each image by the lists; an image in two lists would leak from training into testing and is an error.
fn read_splits(source: &SourceFolder) -> Result<BTreeMap<String, &'static str>, ImportError> {
    let mut out = BTreeMap::new();
    for split in SPLITS {
        let path = source.root.join("ImageSets/Main").join(format!("{split}.txt"));
        if !path.exists() {
            continue;
        }
        let text = source.read_text(&path)?;
        let names = text.lines().filter_map(|l| l.split_whitespace().next());
        for stem in names.filter(|n| !is_macos_leftover(Path::new(n))) {
            if source.resolve_inside(&source.root.join("Annotations"), stem).is_none() {
                return Err(source.dataset_error(format!("\"{stem}\" in ImageSets/Main/{split}.txt leaves the folder")));
            }
            if let Some(other) = out.insert(stem.to_owned(), split).filter(|other| *other != split) {
                return Err(
                    source.dataset_error(format!("{stem} is in both {other}.txt and {split}.txt of ImageSets/Main"))
                );
            }
        }
    }
    Ok(out)
}

/// Returns the names (without extension) of the images to import, sorted.
fn select(
    source: &SourceFolder,
    split_of: &BTreeMap<String, &'static str>,
    options: &ImportOptions,
) -> Result<Vec<String>, ImportError> {
    if let Some(split) = options.split.as_ref().filter(|_| !options.resplit && !options.drop_leaks) {
        let stems: Vec<String> = split_of.iter().filter(|(_, s)| *s == split).map(|(stem, _)| stem.clone()).collect();
        if stems.is_empty() {
            return Err(source.dataset_error(format!(
                "no image in split \"{split}\": ImageSets/Main/{split}.txt is missing or empty (splits are train, val, test)"
            )));
        }
        return Ok(stems);
    }
    let folder = source.root.join("Annotations");
    let io = |cause| ImportError::Io { path: folder.clone(), cause };
    let mut stems: BTreeSet<String> = split_of.keys().cloned().collect();
    for entry in std::fs::read_dir(&folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if has_ending(&path, &["xml"]) && !is_macos_leftover(&path) {
            if path.file_stem().and_then(|s| s.to_str()).is_none() {
                return Err(file_error(&path, "the file name is not UTF-8: rename the file and its image".to_owned()));
            }
            stems.insert(stem(&path));
        }
    }
    if stems.is_empty() {
        return Err(source.dataset_error("no annotation in Annotations/"));
    }
    Ok(stems.into_iter().collect())
}

/// Returns the image of an annotation: by the name of the annotation file, else by its `<filename>`.
fn find_image(root: &Path, stem: &str, a: &Annotation) -> Result<PathBuf, ImportError> {
    let folder = root.join("JPEGImages");
    let named = Path::new(&a.filename).file_name().map(|n| n.to_string_lossy().into_owned());
    let endings = ["jpg", "jpeg", "png", "JPG", "JPEG", "PNG"].map(|e| format!("{stem}.{e}"));
    endings.into_iter().chain(named).map(|n| folder.join(n)).find(|p| p.is_file()).ok_or_else(|| {
        let cause = std::io::Error::new(std::io::ErrorKind::NotFound, "no image for this annotation (jpg, jpeg, png)");
        ImportError::Io { path: folder.join(stem), cause }
    })
}
