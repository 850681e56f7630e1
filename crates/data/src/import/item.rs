//! What an importer finds: images with objects and questions, not yet judged.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::report::{ImportReport, LeftOut};
use super::source::Source;

/// Where an object lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Coords {
    /// `[x1, y1, x2, y2]` in pixels of the stated size, or of the image where none is stated.
    Pixels([f32; 4]),
    /// The same as fractions of the image's sides; in double precision, so that products are the pixels that were meant.
    Fractions([f64; 4]),
}

impl Coords {
    /// From left, top, width, height.
    pub(super) fn corner_and_size([x, y, w, h]: [f32; 4]) -> Self {
        Self::Pixels([x, y, x + w, y + h])
    }

    /// The numbers as they are.
    pub(super) fn numbers(self) -> [f32; 4] {
        match self {
            Self::Pixels(c) => c,
            Self::Fractions(c) => c.map(|v| v as f32),
        }
    }
}

/// The smallest box around points; none without points.
pub(super) fn around(points: impl IntoIterator<Item = (f32, f32)>) -> Option<[f32; 4]> {
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

/// One image with what is said about it; becomes one record.
#[derive(Debug, Clone, Default)]
pub(super) struct Item {
    /// Made unique later.
    pub(super) id: String,
    /// The image file.
    pub(super) image: PathBuf,
    /// The annotation file, and the row in it.
    pub(super) file: PathBuf,
    pub(super) row: usize,
    pub(super) question: Option<String>,
    pub(super) answer: String,
    pub(super) objects: Vec<Object>,
    /// Objects that could not be read or named, by class (empty where it is not known): one of them leaves the image out.
    pub(super) unread: Vec<String>,
    /// Objects that were read and left out by rule, by class: where nothing else is left, the image is left out.
    pub(super) dropped: Vec<String>,
    /// Size of the frame that the boxes are in, where it is stated.
    pub(super) frame: Option<(u32, u32)>,
    pub(super) modality: String,
    /// Published split; empty where there is none.
    pub(super) split: String,
    /// Patient, or another unit that must not be in two splits; empty where it is not known.
    pub(super) patient: String,
    /// Hounsfield units shown as black and white, for 16-bit images that hold them.
    pub(super) window: Option<(f32, f32)>,
    /// A question with an answer in text, not one about where.
    pub(super) text_only: bool,
    /// Which task of a benchmark it belongs to; empty where there is none.
    pub(super) suite_task: String,
    pub(super) extra: Map<String, Value>,
}

impl Item {
    /// Keeps the text that a system turn gives, where there is one.
    pub(super) fn system(&mut self, text: &str) {
        if !text.is_empty() {
            self.extra.insert("system".to_owned(), text.into());
        }
    }
}

/// All that an importer found.
pub(super) struct Found {
    pub(super) source: Source,
    pub(super) items: Vec<Item>,
    pub(super) report: ImportReport,
    /// Asked where neither the item nor the caller has a question; none: `Where is the {classes}?`.
    pub(super) question: Option<&'static str>,
    /// What is missing or corrupt is an error; boxes are neither clipped nor scaled.
    pub(super) strict: bool,
}

impl Found {
    pub(super) fn new(source: Source) -> Self {
        Self { source, items: Vec::new(), report: ImportReport::default(), question: None, strict: false }
    }

    /// Leaves out a row or an object, by rule.
    pub(super) fn leave_out(&mut self, file: &Path, object: usize, label: &str, reason: &str) {
        let (file, label, reason) = (file.display().to_string(), label.to_owned(), reason.to_owned());
        self.report.leave_out(LeftOut { file, object, label, reason, coords: None });
    }
}
