//! Record files (JSON lines): reading with file and line in every error, safe image paths, atomic writing.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use unveil_core::{Record, RecordError};

use crate::files::open_regular;
use crate::image_path::PathPolicy;
pub use crate::image_path::{ImageRef, folder_of, path_problem};
use crate::image_root::ImageRoot;
use crate::image_store::{Image, ImageError};

/// Maximum length of a line in bytes.
pub const MAX_LINE_BYTES: u64 = 64 << 20;

/// Why records could not be read or written; each message starts with the file and, if known, the line.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file cannot be read or written.
    #[error("{}: {cause}", file.display())]
    Io {
        /// The record file.
        file: PathBuf,
        /// The I/O error.
        cause: std::io::Error,
    },
    /// A line is not a record.
    #[error("{}:{line}: {cause}", file.display())]
    Line {
        /// The record file.
        file: PathBuf,
        /// Line number from 1.
        line: usize,
        /// Description of the problem.
        cause: RecordError,
    },
    /// Two lines have the same id.
    #[error("{}:{line}: the id \"{id}\" is already on line {first}; give every record its own id", file.display())]
    Duplicate {
        /// The record file.
        file: PathBuf,
        /// Second line with the id.
        line: usize,
        /// First line with it.
        first: usize,
        /// The id.
        id: String,
    },
    /// An image path leaves the folder of its record file.
    #[error("{}:{line}: record \"{id}\": image \"{image}\" {cause}", file.display())]
    ImagePath {
        /// The record file.
        file: PathBuf,
        /// Line number from 1.
        line: usize,
        /// Id of the record.
        id: String,
        /// The path as written.
        image: String,
        /// Description of the problem.
        cause: &'static str,
    },
}

/// A record file in memory.
#[derive(Debug, Clone)]
pub struct RecordFile {
    /// Path with which the file was opened.
    pub path: PathBuf,
    /// Records in file order.
    pub records: Vec<Record>,
    /// Line number (from 1) of each record.
    pub lines: Vec<usize>,
    /// Which image paths its records may use.
    pub path_policy: PathPolicy,
}

impl RecordFile {
    /// Reads a JSON-lines file; blank lines are skipped, unknown keys kept.
    ///
    /// # Errors
    /// Returns [`RecordsError::Io`] if the file cannot be read, [`RecordsError::Line`] for a line that is not a record or has an empty id,
    /// [`RecordsError::Duplicate`] for a repeated id, and [`RecordsError::ImagePath`] for an image path that is absolute or leaves the
    /// folder. Boxes are not checked here: the checks of unveil-datasets do that.
    pub fn load(path: &Path) -> Result<Self, RecordsError> {
        Self::load_with(path, PathPolicy::Folder)
    }

    /// Reads a file as [`RecordFile::load`] does, with image paths limited by `path_policy`.
    ///
    /// # Errors
    /// See [`RecordFile::load`].
    pub fn load_with(path: &Path, path_policy: PathPolicy) -> Result<Self, RecordsError> {
        Self::scan(path, path_policy, Err)
    }

    /// Reads a file as [`RecordFile::load_with`] does, but skips invalid lines and passes their errors to `on_invalid`.
    ///
    /// # Errors
    /// Returns [`RecordsError::Io`] if the file cannot be read.
    pub fn load_lenient(
        path: &Path,
        path_policy: PathPolicy,
        mut on_invalid: impl FnMut(RecordsError),
    ) -> Result<Self, RecordsError> {
        Self::scan(path, path_policy, |e| match e {
            io @ RecordsError::Io { .. } => Err(io),
            invalid => {
                on_invalid(invalid);
                Ok(())
            }
        })
    }

    /// Reads a file as [`RecordFile::load_with`] does, but passes the error of each invalid line to `on_invalid`, which returns `Ok` to
    /// skip the line.
    fn scan(
        path: &Path,
        path_policy: PathPolicy,
        mut on_invalid: impl FnMut(RecordsError) -> Result<(), RecordsError>,
    ) -> Result<Self, RecordsError> {
        let io = |cause| RecordsError::Io { file: path.to_owned(), cause };
        let mut reader = BufReader::new(open_regular(path).map_err(io)?);
        let mut file = Self { path: path.to_owned(), records: Vec::new(), lines: Vec::new(), path_policy };
        let mut line_by_id: HashMap<String, usize> = HashMap::new();
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            if reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes).map_err(io)? == 0 {
                break;
            }
            if bytes.len() as u64 == MAX_LINE_BYTES {
                let what = format!("the line is longer than {MAX_LINE_BYTES} bytes");
                let cause = RecordError { id: String::new(), what };
                return Err(RecordsError::Line { file: path.to_owned(), line, cause });
            }
            match parse_line(path, path_policy, line, &bytes, &line_by_id) {
                Ok(None) => {}
                Ok(Some(record)) => {
                    line_by_id.insert(record.id.clone(), line);
                    file.records.push(record);
                    file.lines.push(line);
                }
                Err(e) => on_invalid(e)?,
            }
        }
        Ok(file)
    }

    /// Keeps only the records of one split.
    pub fn split(mut self, split: &str) -> Self {
        let keep: Vec<bool> = self.records.iter().map(|r| r.split == split).collect();
        let mut flags = keep.iter();
        self.records.retain(|_| flags.next().copied().unwrap_or(false));
        let mut flags = keep.iter();
        self.lines.retain(|_| flags.next().copied().unwrap_or(false));
        self
    }

    /// Returns the folder that image paths are relative to.
    pub fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    /// Returns where the image of `record` is.
    pub fn image_ref(&self, record: &Record) -> ImageRef {
        self.root().image_ref(record)
    }

    /// Returns the folder of the file together with its path policy.
    pub fn root(&self) -> ImageRoot {
        ImageRoot::of(&self.path, self.path_policy)
    }

    /// Reads and decodes the image of `record`; the error names record and path.
    pub fn open_image(&self, record: &Record) -> Result<Image, ImageError> {
        self.root().open(record)
    }

    /// Returns `file:line` of record number `index`, for messages.
    pub fn location(&self, index: usize) -> String {
        match self.lines.get(index) {
            Some(line) => format!("{}:{line}", self.path.display()),
            None => self.path.display().to_string(),
        }
    }
}

fn parse_line(
    path: &Path,
    path_policy: PathPolicy,
    line: usize,
    bytes: &[u8],
    line_by_id: &HashMap<String, usize>,
) -> Result<Option<Record>, RecordsError> {
    let line_error = |cause| RecordsError::Line { file: path.to_owned(), line, cause };
    let anonymous = |what: &str| line_error(RecordError { id: String::new(), what: what.to_owned() });
    let text = std::str::from_utf8(bytes).map_err(|_| anonymous("the line is not UTF-8"))?;
    if text.trim_start_matches('\u{feff}').trim().is_empty() {
        return Ok(None);
    }
    let record = Record::parse(text).map_err(line_error)?;
    if record.id.trim().is_empty() {
        return Err(anonymous("the record's `id` is empty; give every record an id"));
    }
    if let Some(&first) = line_by_id.get(&record.id) {
        return Err(RecordsError::Duplicate { file: path.to_owned(), line, first, id: record.id });
    }
    if let Some(cause) = path_problem(&record.image, path_policy) {
        return Err(RecordsError::ImagePath { file: path.to_owned(), line, id: record.id, image: record.image, cause });
    }
    Ok(Some(record))
}

/// Writes records as JSON lines to a temporary file next to `path` and renames it, so that `path` is either complete or untouched.
pub fn write(path: &Path, records: &[Record]) -> Result<(), RecordsError> {
    let io = |cause| RecordsError::Io { file: path.to_owned(), cause };
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record).map_err(|e| io(e.into()))?;
        bytes.push(b'\n');
    }
    unveil_core::write_atomic(path, &bytes).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<RecordFile, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        std::fs::write(&path, text).unwrap();
        RecordFile::load(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, at, what) in [
            ("{\"id\":\"a\"}\n\n{\"image\":\"x.png\"}\n", "r.jsonl:3:", "missing field `id`"),
            ("{\"id\":\"  \"}\n", "r.jsonl:1:", "`id` is empty"),
            ("{\"id\":\"a\"}\n{\"id\":\"a\"}\n", "r.jsonl:2:", "already on line 1"),
            ("{\"id\":\"a\"\n", "r.jsonl:1:", "not JSON"),
            ("{\"id\":\"a\",\"boxes\":[[1,2,3]]}\n", "r.jsonl:1:", "record \"a\": `boxes`[0] is not of length 4"),
            ("{\"id\":\"a\",\"boxes\":[[1,2,3,NaN]]}\n", "r.jsonl:1:", "record \"a\": not JSON: `boxes` holds NaN"),
            (
                "{\"id\":\"a\",\"category\":\"x\"}\n",
                "r.jsonl:1:",
                "record \"a\": its category is \"x\", but it has no `boxes`",
            ),
            (
                "\u{feff}\n\u{feff}{\"id\":\"a\",\"task\":\"vga\"}\n",
                "r.jsonl:2:",
                "record \"a\": `task`: `vga` is not a task",
            ),
            ("{\"id\":\"a\",\"image\":\"../../etc/x.png\"}\n", "r.jsonl:1:", "leaves the folder"),
            ("{\"id\":\"a\",\"image\":\"b/../../x.png\"}\n", "r.jsonl:1:", "leaves the folder"),
            ("{\"id\":\"a\",\"image\":\"/etc/x.png\"}\n", "r.jsonl:1:", "absolute path"),
        ] {
            let e = load(text).unwrap_err();
            assert!(e.contains(at) && e.contains(what), "{e}");
        }
        assert!(RecordFile::load(Path::new("/nowhere/r.jsonl")).unwrap_err().to_string().contains("/nowhere/r.jsonl"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("r.jsonl"), b"{\"id\":\"\xff\"}\n").unwrap();
        assert!(RecordFile::load(&dir.path().join("r.jsonl")).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn round_trip_keeps_unknown_keys_and_urls() {
        let f = load("{\"id\":\"a\",\"patient\":7,\"split\":\"test\"}\r\n\n{\"id\":\"b\",\"image\":\"s3://b/x.png\",\"split\":\"val\"}")
            .unwrap();
        assert_eq!(f.lines, vec![1, 3]);
        assert_eq!(f.records[0].extra["patient"], 7);
        assert_eq!(f.image_ref(&f.records[1]), ImageRef::Url("s3://b/x.png".into()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/out.jsonl");
        write(&path, &f.records).unwrap();
        assert_eq!(RecordFile::load(&path).unwrap().records, f.records);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
        let v = f.split("val");
        assert_eq!((v.records[0].id.as_str(), v.lines.as_slice()), ("b", &[3][..]));
    }

    #[test]
    fn failed_writes_leave_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("keep"), "x").unwrap();
        assert!(write(&path, &[]).unwrap_err().to_string().contains("taken"));
        assert!(path.join("keep").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
