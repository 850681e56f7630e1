//! Record files (JSON lines): reading with file and line in every error, safe image paths, atomic writing.
//!
//! Must not know: what the images show, model families, tch, tonic.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use unveil_core::{Record, RecordError};

use crate::files::open_regular;
use crate::root::{Reach, Root};
use crate::store::{Image, ImageError};

/// Longest line that is read, in bytes.
pub const MAX_LINE: u64 = 64 << 20;

/// Why records could not be read or written; each message starts with the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file cannot be read or written.
    #[error("{}: {cause}", file.display())]
    Io {
        /// The record file.
        file: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A line is not a record.
    #[error("{}:{line}: {cause}", file.display())]
    Line {
        /// The record file.
        file: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong with it.
        cause: RecordError,
    },
    /// Two lines have the same id.
    #[error("{}:{line}: the id \"{id}\" is already on line {first}; give every record an id of its own", file.display())]
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
        /// What is wrong with it.
        cause: &'static str,
    },
}

/// Where the image of a record is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// A file, already joined with the folder of the record file.
    File(PathBuf),
    /// An object URL, to be fetched by whoever has an object store.
    Url(String),
    /// The record has a size only.
    None,
}

/// A record file in memory.
#[derive(Debug, Clone)]
pub struct RecordFile {
    /// The file as it was opened.
    pub path: PathBuf,
    /// Records in the order of the file.
    pub records: Vec<Record>,
    /// Line number (from 1) of each record.
    pub lines: Vec<usize>,
    /// How far the paths of its records may reach.
    pub reach: Reach,
}

impl RecordFile {
    /// Reads a JSON-lines file; blank lines are skipped, unknown keys kept.
    ///
    /// # Errors
    /// A line that is no record, a missing, empty or repeated id, an image path that is absolute or leaves the folder.
    /// Boxes are not judged here: see [`crate::check`].
    pub fn load(path: &Path) -> Result<Self, RecordsError> {
        Self::load_with(path, Reach::Folder)
    }

    /// [`RecordFile::load`] with paths that may reach so far.
    ///
    /// # Errors
    /// As there.
    pub fn load_with(path: &Path, reach: Reach) -> Result<Self, RecordsError> {
        Self::scan(path, reach, Err)
    }

    /// [`RecordFile::load_with`] without the lines that are no records, which `bad_line` hears of.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load_some(path: &Path, reach: Reach, mut bad_line: impl FnMut(RecordsError)) -> Result<Self, RecordsError> {
        Self::scan(path, reach, |e| match e {
            io @ RecordsError::Io { .. } => Err(io),
            bad => {
                bad_line(bad);
                Ok(())
            }
        })
    }

    /// Reads like [`RecordFile::load`], but hands each bad line to `bad_line`, which says whether to go on without it.
    pub(crate) fn scan(
        path: &Path,
        reach: Reach,
        mut bad_line: impl FnMut(RecordsError) -> Result<(), RecordsError>,
    ) -> Result<Self, RecordsError> {
        let io = |cause| RecordsError::Io { file: path.to_owned(), cause };
        let mut reader = BufReader::new(open_regular(path).map_err(io)?);
        let mut out = Self { path: path.to_owned(), records: Vec::new(), lines: Vec::new(), reach };
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes).map_err(io)? == 0 {
                break;
            }
            if bytes.len() as u64 == MAX_LINE {
                let what = format!("the line is longer than {MAX_LINE} bytes");
                let cause = RecordError { id: String::new(), what };
                return Err(RecordsError::Line { file: path.to_owned(), line, cause });
            }
            match parse_line(path, reach, line, &bytes, &seen) {
                Ok(None) => {}
                Ok(Some(record)) => {
                    seen.insert(record.id.clone(), line);
                    out.records.push(record);
                    out.lines.push(line);
                }
                Err(e) => bad_line(e)?,
            }
        }
        Ok(out)
    }

    /// Keeps the records of one split.
    pub fn split(mut self, split: &str) -> Self {
        let keep: Vec<bool> = self.records.iter().map(|r| r.split == split).collect();
        let mut flags = keep.iter();
        self.records.retain(|_| flags.next().copied().unwrap_or(false));
        let mut flags = keep.iter();
        self.lines.retain(|_| flags.next().copied().unwrap_or(false));
        self
    }

    /// Folder that image paths are relative to.
    pub fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    /// Where the image of `record` is.
    pub fn image_ref(&self, record: &Record) -> ImageRef {
        self.root().image_ref(record)
    }

    /// The folder of the file, and how far its records may reach.
    pub fn root(&self) -> Root {
        Root::of(&self.path, self.reach)
    }

    /// Reads and decodes the image of `record`; the error names record and path.
    pub fn open_image(&self, record: &Record) -> Result<Image, ImageError> {
        self.root().open(record)
    }

    /// `file:line` of record number `index`, for messages.
    pub fn place(&self, index: usize) -> String {
        match self.lines.get(index) {
            Some(line) => format!("{}:{line}", self.path.display()),
            None => self.path.display().to_string(),
        }
    }
}

/// Folder that holds a record file.
pub fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What is wrong with an image path of a record as it is written, if anything; links are looked at when the image is read. URLs and
/// empty paths pass.
pub fn path_fault(image: &str, reach: Reach) -> Option<&'static str> {
    if let Some((_, rest)) = image.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        host.contains('@').then_some("is a URL with credentials before the host; take them out")
    } else if image.contains('\0') {
        Some("holds a NUL character")
    } else if reach == Reach::Anywhere {
        None
    } else if Path::new(image).components().any(|c| matches!(c, Component::RootDir | Component::Prefix(_))) {
        Some("is an absolute path; write it relative to the record file, or allow it (data.outside = true)")
    } else if Path::new(image).components().any(|c| c == Component::ParentDir) {
        Some(
            "leaves the folder of the record file with \"..\"; put the images beside or under it, or allow it (data.outside = true)",
        )
    } else {
        None
    }
}

fn parse_line(
    path: &Path,
    reach: Reach,
    line: usize,
    bytes: &[u8],
    seen: &HashMap<String, usize>,
) -> Result<Option<Record>, RecordsError> {
    let bad = |cause| RecordsError::Line { file: path.to_owned(), line, cause };
    let unnamed = |what: &str| bad(RecordError { id: String::new(), what: what.to_owned() });
    let text = std::str::from_utf8(bytes).map_err(|_| unnamed("the line is not UTF-8"))?;
    if text.trim_start_matches('\u{feff}').trim().is_empty() {
        return Ok(None);
    }
    let record = Record::parse(text).map_err(bad)?;
    if record.id.trim().is_empty() {
        return Err(unnamed("the record's `id` is empty; give every record an id"));
    }
    if let Some(&first) = seen.get(&record.id) {
        return Err(RecordsError::Duplicate { file: path.to_owned(), line, first, id: record.id });
    }
    if let Some(cause) = path_fault(&record.image, reach) {
        let (id, image) = (record.id, record.image);
        return Err(RecordsError::ImagePath { file: path.to_owned(), line, id, image, cause });
    }
    Ok(Some(record))
}

/// Writes records as JSON lines: into a temporary file beside `path`, then renamed, so that `path` is whole or untouched.
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
                "record \"a\": `task`: `vga` is no task",
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
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("keep"), "x").unwrap();
        assert!(write(&path, &[]).unwrap_err().to_string().contains("taken"));
        assert!(path.join("keep").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
