//! Result of parsing a data set: draft records, one per image or question, whose images and boxes have not been checked yet.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::report::{ImportReport, LeftOut};
use super::source::SourceFolder;

/// Coordinates of an object as annotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Coords {
    /// `[x1, y1, x2, y2]` in pixels of the stated size, or of the image where none is stated.
    Pixels([f32; 4]),
    /// `[x1, y1, x2, y2]` as fractions of the image's sides; in double precision, so that multiplication yields the intended pixels.
    Fractions([f64; 4]),
}

impl Coords {
    /// Creates pixel coordinates from left, top, width and height.
    pub(super) fn corner_and_size([x, y, w, h]: [f32; 4]) -> Self {
        Self::Pixels([x, y, x + w, y + h])
    }

    /// Returns the four numbers as annotated.
    pub(super) fn numbers(self) -> [f32; 4] {
        match self {
            Self::Pixels(c) => c,
            Self::Fractions(c) => c.map(|v| v as f32),
        }
    }
}

/// Returns the smallest `[x1, y1, x2, y2]` around the points; `None` without points.
pub(super) fn bounding_box(points: impl IntoIterator<Item = (f32, f32)>) -> Option<[f32; 4]> {
    points.into_iter().fold(None, |b: Option<[f32; 4]>, (x, y)| {
        let [x1, y1, x2, y2] = b.unwrap_or([x, y, x, y]);
        Some([x1.min(x), y1.min(y), x2.max(x), y2.max(y)])
    })
}

/// One annotated object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Object {
    pub(super) label: String,
    pub(super) coords: Coords,
}

/// An image with its annotations, from which one record is built.
#[derive(Debug, Clone, Default)]
pub(super) struct DraftRecord {
    /// Proposed id; made unique when the record is built.
    pub(super) id: String,
    /// The image file.
    pub(super) image: PathBuf,
    /// The annotation file.
    pub(super) file: PathBuf,
    /// Row of the annotation file, from 0.
    pub(super) row: usize,
    pub(super) question: Option<String>,
    pub(super) answer: String,
    pub(super) objects: Vec<Object>,
    /// Classes (empty if unknown) of the objects that could not be read or named: any of them leaves the image out.
    pub(super) unread: Vec<String>,
    /// Classes of the objects that were read and left out by rule: if no object remains, the image is left out.
    pub(super) dropped: Vec<String>,
    /// Image size that the annotation states and its boxes refer to.
    pub(super) frame: Option<(u32, u32)>,
    pub(super) modality: String,
    /// Published split; empty if there is none.
    pub(super) split: String,
    /// Patient, or another unit that must not be in two splits; empty if unknown.
    pub(super) patient: String,
    /// Hounsfield units mapped to black and white, for 16-bit CT images.
    pub(super) window: Option<(f32, f32)>,
    /// The question is answered in text, not with boxes.
    pub(super) text_only: bool,
    /// Benchmark task of the record; empty if there is none.
    pub(super) suite_task: String,
    pub(super) extra: Map<String, Value>,
}

impl DraftRecord {
    /// Stores the text of a system turn under the key `system`, unless it is empty.
    pub(super) fn set_system(&mut self, text: &str) {
        if !text.is_empty() {
            self.extra.insert("system".to_owned(), text.into());
        }
    }
}

/// A parsed data set: the source folder, its draft records, and the report so far.
pub(super) struct ParsedDataset {
    pub(super) source: SourceFolder,
    pub(super) items: Vec<DraftRecord>,
    pub(super) report: ImportReport,
    /// Default question where neither the draft nor the caller has one; `None`: `Where is the {classes}?`.
    pub(super) question: Option<&'static str>,
    /// Missing or corrupt files are errors; boxes are neither clipped nor scaled.
    pub(super) strict: bool,
}

impl ParsedDataset {
    pub(super) fn new(source: SourceFolder) -> Self {
        Self { source, items: Vec::new(), report: ImportReport::default(), question: None, strict: false }
    }

    /// Reports a row or an object that is left out, and the rule (`reason`).
    pub(super) fn leave_out(&mut self, file: &Path, object: usize, label: &str, reason: &str) {
        let file = file.display().to_string();
        let label = label.to_owned();
        let reason = reason.to_owned();
        self.report.leave_out(LeftOut { file, object, label, reason, coords: None });
    }
}
