//! Reading a data set's folder: texts, JSON, CSV, images by name. Every path that an annotation names is kept inside the folder, or
//! inside the one that `--images` names. What macOS leaves beside files (`._NAME`, `__MACOSX/`) is no data.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{ImportError, encoding};
use crate::files::open_regular;

/// Longest annotation file that is read, in bytes.
const MAX_TEXT: u64 = 2 << 30;
/// Folders are searched to this depth.
const MAX_DEPTH: usize = 8;

/// Endings of the images that are read.
pub(super) const IMAGES: [&str; 4] = ["jpg", "jpeg", "png", "dcm"];

/// The rule for a path that an annotation should not name.
pub(super) const LEAVES: &str = "its image path leaves the source folder";
/// The rule for an image that is not there.
pub(super) const MISSING: &str = "its image is missing";

/// A data set's folder.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) root: PathBuf,
    /// Where images lie that are not in the folder.
    pub(super) images: Option<PathBuf>,
}

impl Source {
    /// # Errors
    /// One of the folders is not there, or is a file.
    pub(super) fn new(root: &Path, images: Option<&Path>) -> Result<Self, ImportError> {
        for folder in images.into_iter().chain([root]) {
            match std::fs::metadata(folder) {
                Ok(m) if m.is_dir() => {}
                Ok(_) => {
                    return Err(ImportError::NoFolder { path: folder.to_owned(), what: "is a file, not a folder" });
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    return Err(ImportError::NoFolder { path: folder.to_owned(), what: "does not exist" });
                }
                Err(cause) => return Err(ImportError::Io { path: folder.to_owned(), cause }),
            }
        }
        Ok(Self { root: root.to_owned(), images: images.map(Path::to_owned) })
    }

    /// An error about the folder as a whole.
    pub(super) fn wrong(&self, what: impl Into<String>) -> ImportError {
        ImportError::Source { src: self.root.clone(), what: what.into() }
    }

    /// Reads a text file: UTF-8, or UTF-16 with a byte order mark.
    pub(super) fn text(&self, path: &Path) -> Result<String, ImportError> {
        encoding::text(self.bytes(path, MAX_TEXT)?).map_err(|cause| wrong_file(path, cause))
    }

    /// Reads a file of at most this many bytes.
    pub(super) fn bytes(&self, path: &Path, most: u64) -> Result<Vec<u8>, ImportError> {
        let io = |cause| ImportError::Io { path: path.to_owned(), cause };
        let mut bytes = Vec::new();
        let file = open_regular(path).map_err(io)?;
        if file.take(most + 1).read_to_end(&mut bytes).map_err(io)? as u64 > most {
            return Err(wrong_file(path, format!("the file is longer than {most} bytes")));
        }
        Ok(bytes)
    }

    /// Reads a file as one JSON value.
    pub(super) fn json(&self, path: &Path) -> Result<Value, ImportError> {
        serde_json::from_str(&self.text(path)?).map_err(|e| wrong_file(path, format!("not JSON: {e}")))
    }

    /// Reads a JSON array, or JSON lines, as a list of values.
    pub(super) fn json_rows(&self, path: &Path) -> Result<Vec<Value>, ImportError> {
        let text = self.text(path)?;
        if text.trim_start().starts_with('[') {
            return match serde_json::from_str(&text) {
                Ok(Value::Array(rows)) => Ok(rows),
                Ok(_) => Err(wrong_file(path, "not a JSON array".to_owned())),
                Err(e) => Err(wrong_file(path, format!("not JSON: {e}"))),
            };
        }
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        lines
            .map(|(i, l)| {
                serde_json::from_str(l).map_err(|e| wrong_file(path, format!("line {}: not JSON: {e}", i + 1)))
            })
            .collect()
    }

    /// Reads a CSV file by its header.
    pub(super) fn csv(&self, path: &Path) -> Result<Table, ImportError> {
        let text = self.text(path)?;
        let bad = |e: csv::Error| wrong_file(path, format!("not CSV: {e}"));
        let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(text.as_bytes());
        let header = reader.headers().map_err(bad)?.iter().map(str::to_owned).collect();
        let rows = reader.records().collect::<Result<Vec<_>, _>>().map_err(bad)?;
        Ok(Table { file: path.to_owned(), header, rows })
    }

    /// The file that an annotation names, relative to `folder`: a path that stays inside the source folder. Backslashes count as
    /// slashes. An absolute path passes when it lies inside.
    pub(super) fn inside(&self, folder: &Path, named: &str) -> Option<PathBuf> {
        below(&self.root, folder, named)
    }

    /// The first of these folders (relative to the root, then to the folder of `--images`) that holds the named image; last, the
    /// folder of `--images` itself.
    ///
    /// # Errors
    /// The rule by which the item is left out: no path inside the folder, or no such file.
    pub(super) fn image(&self, folders: &[&str], named: &str) -> Result<PathBuf, &'static str> {
        let own = folders.iter().map(|f| (&self.root, *f));
        let other = self.images.iter().flat_map(|root| folders.iter().copied().chain([""]).map(move |f| (root, f)));
        let mut reason = LEAVES;
        for (root, folder) in own.chain(other) {
            if let Some(path) = below(root, &root.join(folder), named) {
                if path.is_file() {
                    return Ok(path);
                }
                reason = MISSING;
            }
        }
        Err(reason)
    }

    /// Files below `folder` with one of these endings, down to `depth` folders, sorted.
    pub(super) fn files(&self, folder: &Path, endings: &[&str], depth: usize) -> Vec<PathBuf> {
        self.files_to(folder, endings, depth.min(MAX_DEPTH))
    }

    /// The same without a limit of depth but the given one.
    pub(super) fn files_to(&self, folder: &Path, endings: &[&str], depth: usize) -> Vec<PathBuf> {
        let (mut out, mut seen) = (Vec::new(), HashSet::new());
        let mut todo = vec![(folder.to_owned(), 0)];
        while let Some((dir, level)) = todo.pop() {
            // A link to a folder above would otherwise lead round in circles.
            if !dir.canonicalize().is_ok_and(|full| seen.insert(full)) {
                continue;
            }
            for path in std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()) {
                if is_leftover(&path) {
                    continue;
                }
                if path.is_dir() {
                    if level + 1 < depth {
                        todo.push((path, level + 1));
                    }
                } else if has_ending(&path, endings) {
                    out.push(path);
                }
            }
        }
        out.sort();
        out
    }

    /// All images below the root, then below the folder of `--images`, by file name; the first of two with the same name counts.
    pub(super) fn images_by_name(&self) -> BTreeMap<String, PathBuf> {
        let mut out = BTreeMap::new();
        let other = self.images.iter().flat_map(|folder| self.files(folder, &IMAGES, MAX_DEPTH));
        for path in self.files(&self.root, &IMAGES, MAX_DEPTH).into_iter().chain(other) {
            if let Some(name) = path.file_name() {
                out.entry(name.to_string_lossy().into_owned()).or_insert(path);
            }
        }
        out
    }
}

/// The path `named` from `folder`, kept below `root`.
fn below(root: &Path, folder: &Path, named: &str) -> Option<PathBuf> {
    let named = named.replace('\\', "/");
    if named.is_empty() || named.contains('\0') || named.contains("://") {
        return None;
    }
    let full = folder.join(&named);
    let mut out = PathBuf::new();
    for part in full.strip_prefix(root).ok()?.components() {
        match part {
            Component::Normal(p) => out.push(p),
            Component::CurDir => {}
            Component::ParentDir if out.pop() => {}
            _ => return None,
        }
    }
    Some(root.join(out))
}

/// Whether macOS left this beside a file: AppleDouble (`._NAME`), or the folder of such in its archives.
pub(super) fn is_leftover(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n == "__MACOSX" || n.as_encoded_bytes().starts_with(b"._"))
}

/// An error about one annotation file.
pub(super) fn wrong_file(file: &Path, cause: String) -> ImportError {
    ImportError::Annotation { file: file.to_owned(), cause }
}

/// Whether a path ends in one of these endings, in either case.
pub(super) fn has_ending(path: &Path, endings: &[&str]) -> bool {
    path.extension().is_some_and(|e| endings.iter().any(|want| e.eq_ignore_ascii_case(want)))
}

/// The name of a file without folder and ending.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A CSV file in memory. Fields and names are trimmed.
pub(super) struct Table {
    pub(super) file: PathBuf,
    header: Vec<String>,
    pub(super) rows: Vec<csv::StringRecord>,
}

impl Table {
    /// Position of a column.
    ///
    /// # Errors
    /// There is none of this name.
    pub(super) fn column(&self, name: &str) -> Result<usize, ImportError> {
        self.find(name).ok_or_else(|| {
            wrong_file(&self.file, format!("there is no column \"{name}\"; it has {}", self.header.join(", ")))
        })
    }

    /// Position of a column that may be absent.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h == name)
    }
}

/// A JSON value as text: strings trimmed, numbers and booleans written out, anything else empty.
pub(super) fn text_of(value: &Value) -> String {
    match value {
        Value::String(s) => s.trim().to_owned(),
        Value::Number(n) => n.to_string(),
        Value::Bool(b) => b.to_string(),
        _ => String::new(),
    }
}

/// Four numbers of a JSON array, also where they are written as strings.
pub(super) fn four(value: &Value) -> Option<[f32; 4]> {
    let list = value.as_array().filter(|l| l.len() == 4)?;
    let mut out = [0.0; 4];
    for (slot, v) in out.iter_mut().zip(list) {
        *slot = number(v)?;
    }
    Some(out)
}

/// A JSON number, also where it is written as a string.
pub(super) fn number(value: &Value) -> Option<f32> {
    match value {
        Value::Number(n) => n.as_f64().map(|v| v as f32),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    }
}
