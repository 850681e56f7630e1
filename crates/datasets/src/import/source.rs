//! Access to a data set's folder: text, JSON, CSV, images by name. A path named by an annotation must stay inside the folder or inside
//! the one given with `--images`. Files that macOS adds (`._NAME`, `__MACOSX/`) are ignored.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;
use unveil_data::files::open_regular;

use super::{ImportError, encoding};

/// Largest annotation file that is read, in bytes.
const MAX_TEXT: u64 = 2 << 30;
/// Depth to which folders are searched.
const MAX_DEPTH: usize = 8;

/// File name extensions of images.
pub(super) const IMAGES: [&str; 4] = ["jpg", "jpeg", "png", "dcm"];

/// Reason for leaving out an image whose path leaves the source folder.
pub(super) const OUTSIDE: &str = "its image path leaves the source folder";
/// Reason for leaving out an image that does not exist.
pub(super) const MISSING: &str = "its image is missing";

/// A data set's folder.
#[derive(Debug, Clone)]
pub(super) struct SourceFolder {
    pub(super) root: PathBuf,
    /// Additional folder of images (`--images`).
    pub(super) images: Option<PathBuf>,
}

impl SourceFolder {
    /// Creates the folder after checking that it and `images` exist.
    ///
    /// # Errors
    /// Returns [`ImportError::NoFolder`] if one of them does not exist or is a file, [`ImportError::Io`] if it cannot be read.
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

    /// Returns an error about the data set as a whole.
    pub(super) fn dataset_error(&self, what: impl Into<String>) -> ImportError {
        ImportError::Source { src: self.root.clone(), what: what.into() }
    }

    /// Reads a text file: UTF-8, or UTF-16 with a byte order mark.
    pub(super) fn read_text(&self, path: &Path) -> Result<String, ImportError> {
        encoding::decode_text(self.read_bytes(path, MAX_TEXT)?).map_err(|cause| file_error(path, cause))
    }

    /// Reads a file of at most `most` bytes.
    pub(super) fn read_bytes(&self, path: &Path, most: u64) -> Result<Vec<u8>, ImportError> {
        let io = |cause| ImportError::Io { path: path.to_owned(), cause };
        let mut bytes = Vec::new();
        let file = open_regular(path).map_err(io)?;
        if file.take(most + 1).read_to_end(&mut bytes).map_err(io)? as u64 > most {
            return Err(file_error(path, format!("the file is longer than {most} bytes")));
        }
        Ok(bytes)
    }

    /// Reads a file as one JSON value.
    pub(super) fn read_json(&self, path: &Path) -> Result<Value, ImportError> {
        serde_json::from_str(&self.read_text(path)?).map_err(|e| file_error(path, format!("not JSON: {e}")))
    }

    /// Reads a JSON array, or JSON lines, as a list of values.
    pub(super) fn read_json_rows(&self, path: &Path) -> Result<Vec<Value>, ImportError> {
        let text = self.read_text(path)?;
        if text.trim_start().starts_with('[') {
            return match serde_json::from_str(&text) {
                Ok(Value::Array(rows)) => Ok(rows),
                Ok(_) => Err(file_error(path, "not a JSON array".to_owned())),
                Err(e) => Err(file_error(path, format!("not JSON: {e}"))),
            };
        }
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        lines
            .map(|(i, l)| {
                serde_json::from_str(l).map_err(|e| file_error(path, format!("line {}: not JSON: {e}", i + 1)))
            })
            .collect()
    }

    /// Reads a CSV file by its header.
    pub(super) fn read_csv(&self, path: &Path) -> Result<Table, ImportError> {
        let text = self.read_text(path)?;
        let csv_error = |e: csv::Error| file_error(path, format!("not CSV: {e}"));
        let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(text.as_bytes());
        let header = reader.headers().map_err(csv_error)?.iter().map(str::to_owned).collect();
        let rows = reader.records().collect::<Result<Vec<_>, _>>().map_err(csv_error)?;
        Ok(Table { file: path.to_owned(), header, rows })
    }

    /// Resolves a path named by an annotation, relative to `folder`; `None` if it leaves the source folder. Backslashes count as
    /// slashes. An absolute path is accepted if it is inside.
    pub(super) fn resolve_inside(&self, folder: &Path, named: &str) -> Option<PathBuf> {
        resolve_below(&self.root, folder, named)
    }

    /// Finds a named image in the first of `folders` that contains it: relative to the root, then to the folder of `--images`, and last
    /// in the folder of `--images` itself.
    ///
    /// # Errors
    /// Returns the reason for leaving the image out: its path leaves the folder, or there is no such file.
    pub(super) fn find_image(&self, folders: &[&str], named: &str) -> Result<PathBuf, &'static str> {
        let in_root = folders.iter().map(|f| (&self.root, *f));
        let in_images = self.images.iter().flat_map(|root| folders.iter().copied().chain([""]).map(move |f| (root, f)));
        let mut reason = OUTSIDE;
        for (root, folder) in in_root.chain(in_images) {
            if let Some(path) = resolve_below(root, &root.join(folder), named) {
                if path.is_file() {
                    return Ok(path);
                }
                reason = MISSING;
            }
        }
        Err(reason)
    }

    /// Returns the files below `folder` with one of these extensions, sorted; searches `depth` levels, at most eight.
    pub(super) fn list_files(&self, folder: &Path, endings: &[&str], depth: usize) -> Vec<PathBuf> {
        self.list_files_to_depth(folder, endings, depth.min(MAX_DEPTH))
    }

    /// Returns the files below `folder` with one of these extensions, sorted; searches `depth` levels.
    pub(super) fn list_files_to_depth(&self, folder: &Path, endings: &[&str], depth: usize) -> Vec<PathBuf> {
        let mut out = Vec::new();
        let mut seen = HashSet::new();
        let mut todo = vec![(folder.to_owned(), 0)];
        while let Some((dir, level)) = todo.pop() {
            // A link to a parent folder would otherwise loop.
            if !dir.canonicalize().is_ok_and(|full| seen.insert(full)) {
                continue;
            }
            for path in std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()) {
                if is_macos_leftover(&path) {
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

    /// Returns all images below the root and below the folder of `--images` by file name; the first of two with the same name wins.
    pub(super) fn images_by_name(&self) -> BTreeMap<String, PathBuf> {
        let mut out = BTreeMap::new();
        let other = self.images.iter().flat_map(|folder| self.list_files(folder, &IMAGES, MAX_DEPTH));
        for path in self.list_files(&self.root, &IMAGES, MAX_DEPTH).into_iter().chain(other) {
            if let Some(name) = path.file_name() {
                out.entry(name.to_string_lossy().into_owned()).or_insert(path);
            }
        }
        out
    }
}

/// Resolves `named` from `folder`; `None` if the path leaves `root`.
fn resolve_below(root: &Path, folder: &Path, named: &str) -> Option<PathBuf> {
    let named = named.replace('\\', "/");
    if named.is_empty() || named.contains('\0') || named.contains("://") {
        return None;
    }
    let full = folder.join(&named);
    let mut out = PathBuf::new();
    for component in full.strip_prefix(root).ok()?.components() {
        match component {
            Component::Normal(p) => out.push(p),
            Component::CurDir => {}
            Component::ParentDir if out.pop() => {}
            _ => return None,
        }
    }
    Some(root.join(out))
}

/// Returns whether macOS created this entry: an AppleDouble file (`._NAME`) or the `__MACOSX` folder of its archives.
pub(super) fn is_macos_leftover(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n == "__MACOSX" || n.as_encoded_bytes().starts_with(b"._"))
}

/// Returns an error about one annotation file.
pub(super) fn file_error(file: &Path, cause: String) -> ImportError {
    ImportError::Annotation { file: file.to_owned(), cause }
}

/// Returns whether a path has one of these extensions, ignoring case.
pub(super) fn has_ending(path: &Path, endings: &[&str]) -> bool {
    path.extension().is_some_and(|e| endings.iter().any(|want| e.eq_ignore_ascii_case(want)))
}

/// Returns the name of a file without folder and extension.
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
    /// Returns the index of a column.
    ///
    /// # Errors
    /// Returns [`ImportError::Annotation`] if there is no such column.
    pub(super) fn column(&self, name: &str) -> Result<usize, ImportError> {
        self.find(name).ok_or_else(|| {
            file_error(&self.file, format!("there is no column \"{name}\"; it has {}", self.header.join(", ")))
        })
    }

    /// Returns the index of an optional column.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h == name)
    }
}

/// Returns a JSON value as text: strings trimmed, numbers and booleans formatted, anything else empty.
pub(super) fn json_text(value: &Value) -> String {
    match value {
        Value::String(s) => s.trim().to_owned(),
        Value::Number(n) => n.to_string(),
        Value::Bool(b) => b.to_string(),
        _ => String::new(),
    }
}

/// Returns the four numbers of a JSON array; numbers written as strings are accepted.
pub(super) fn four_numbers(value: &Value) -> Option<[f32; 4]> {
    let list = value.as_array().filter(|l| l.len() == 4)?;
    let mut out = [0.0; 4];
    for (slot, v) in out.iter_mut().zip(list) {
        *slot = json_number(v)?;
    }
    Some(out)
}

/// Returns a JSON number; a number written as a string is accepted.
pub(super) fn json_number(value: &Value) -> Option<f32> {
    match value {
        Value::Number(n) => n.as_f64().map(|v| v as f32),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    }
}
