//! Pascal VOC folders (`Annotations/*.xml`, `JPEGImages/`, `ImageSets/Main/{train,val,test}.txt`).
//!
//! One record per image. Coordinates are taken as written: by the book they count from 1 and include the last pixel, in
//! practice most tools (and BCCD's) write 0-based corners, and `xmax` equal to the width is common; the difference is one
//! pixel. A box without area, inverted, not finite or outside the image is left out by rule and reported by file; an object without a
//! class or a corner leaves its image out. Files are read in the encoding that they declare. What is missing or corrupt is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::item::{Coords, Found, Item, Object};
use super::source::{Source, has_ending, is_leftover, stem, wrong_file};
use super::xml::{self, Annotation};
use super::{ImportError, ImportOptions, encoding};

/// Longest annotation of an image, in bytes.
const MAX_XML: u64 = 64 << 20;
const SPLITS: [&str; 3] = ["train", "val", "test"];

pub(super) fn read(found: &mut Found, options: &ImportOptions) -> Result<(), ImportError> {
    found.strict = true;
    let split_of = read_splits(&found.source)?;
    for stem in select(&found.source, &split_of, options)? {
        let file = found.source.root.join("Annotations").join(format!("{stem}.xml"));
        let text = encoding::xml(found.source.bytes(&file, MAX_XML)?).map_err(|cause| wrong_file(&file, cause))?;
        let a = xml::parse(&text).map_err(|cause| wrong_file(&file, cause))?;
        let mut item = Item {
            image: find_image(&found.source.root, &stem, &a)?,
            split: split_of.get(&stem).copied().unwrap_or_default().to_owned(),
            id: stem,
            file,
            frame: a.size(),
            ..Item::default()
        };
        for (k, o) in a.objects.iter().enumerate() {
            match o.corners() {
                Ok(c) => item.objects.push(Object { label: o.class().to_owned(), coords: Coords::Pixels(c) }),
                Err(reason) => {
                    found.leave_out(&item.file, k, o.class(), reason);
                    item.unread.push(o.class().to_owned());
                }
            }
        }
        found.items.push(item);
    }
    Ok(())
}

/// Split of each image by the lists; an image in two lists would leak from training into testing and is an error.
fn read_splits(source: &Source) -> Result<BTreeMap<String, &'static str>, ImportError> {
    let mut out = BTreeMap::new();
    for split in SPLITS {
        let path = source.root.join("ImageSets/Main").join(format!("{split}.txt"));
        if !path.exists() {
            continue;
        }
        let text = source.text(&path)?;
        let names = text.lines().filter_map(|l| l.split_whitespace().next());
        for stem in names.filter(|n| !is_leftover(Path::new(n))) {
            if source.inside(&source.root.join("Annotations"), stem).is_none() {
                return Err(source.wrong(format!("\"{stem}\" in ImageSets/Main/{split}.txt leaves the folder")));
            }
            if let Some(other) = out.insert(stem.to_owned(), split).filter(|other| *other != split) {
                return Err(source.wrong(format!("{stem} is in both {other}.txt and {split}.txt of ImageSets/Main")));
            }
        }
    }
    Ok(out)
}

/// Names (without ending) of the images to import, sorted.
fn select(
    source: &Source,
    split_of: &BTreeMap<String, &'static str>,
    options: &ImportOptions,
) -> Result<Vec<String>, ImportError> {
    if let Some(split) = options.split.as_ref().filter(|_| !options.resplit && !options.drop_leaks) {
        let stems: Vec<String> = split_of.iter().filter(|(_, s)| *s == split).map(|(stem, _)| stem.clone()).collect();
        if stems.is_empty() {
            return Err(source.wrong(format!(
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
        if has_ending(&path, &["xml"]) && !is_leftover(&path) {
            if path.file_stem().and_then(|s| s.to_str()).is_none() {
                return Err(wrong_file(&path, "the file's name is not UTF-8: rename it and its image".to_owned()));
            }
            stems.insert(stem(&path));
        }
    }
    if stems.is_empty() {
        return Err(source.wrong("no annotation in Annotations/"));
    }
    Ok(stems.into_iter().collect())
}

fn find_image(root: &Path, stem: &str, a: &Annotation) -> Result<PathBuf, ImportError> {
    let folder = root.join("JPEGImages");
    let named = Path::new(&a.filename).file_name().map(|n| n.to_string_lossy().into_owned());
    let endings = ["jpg", "jpeg", "png", "JPG", "JPEG", "PNG"].map(|e| format!("{stem}.{e}"));
    endings.into_iter().chain(named).map(|n| folder.join(n)).find(|p| p.is_file()).ok_or_else(|| {
        let cause = std::io::Error::new(std::io::ErrorKind::NotFound, "no image for this annotation (jpg, jpeg, png)");
        ImportError::Io { path: folder.join(stem), cause }
    })
}

#[cfg(test)]
#[path = "voc_tests.rs"]
mod tests;
