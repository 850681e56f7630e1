//! Report of an import: counts, and what was left out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// Number of left-out objects and rows that are listed one by one; all are counted.
const MAX_LISTED: usize = 1000;

/// Result of an import.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ImportReport {
    /// Records written: one per image, or one per question if the data set has several.
    pub records: usize,
    /// Objects in the annotations of these records, before any filter.
    pub objects: usize,
    /// Boxes written.
    pub boxes: usize,
    /// Boxes that overhung their image and were clipped to it.
    pub clipped: usize,
    /// Boxes that were scaled from the stated size to the image size.
    pub scaled: usize,
    /// Records by split; images that no list names are under the empty name.
    pub splits: BTreeMap<String, usize>,
    /// Objects by class as annotated, before any filter.
    pub classes: BTreeMap<String, usize>,
    /// Number of objects and rows left out, by reason.
    pub left_out_by_reason: BTreeMap<String, usize>,
    /// The first thousand objects and rows left out.
    pub left_out: Vec<LeftOut>,
    /// Annotation files whose stated size differs from the image size (the image size is used).
    pub size_mismatch: Vec<String>,
    /// Images whose pixels are also in another split.
    pub leaks: Vec<Leak>,
    /// Patients with images in more than one split.
    pub split_patients: Vec<String>,
    /// Warnings: images without a label file that became "no finding", file names without a task.
    pub notes: Vec<String>,
    /// Folder into which the images were linked or copied; absent if they are used in place.
    pub images_copied_to: Option<PathBuf>,
}

/// An object or row that was left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeftOut {
    /// Annotation file.
    pub file: String,
    /// Position of the object or row in the file, from 0.
    pub object: usize,
    /// Class of the object, or name of the row.
    pub label: String,
    /// Why it was left out.
    pub reason: String,
    /// Coordinates as annotated, if there are four.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coords: Option<[f32; 4]>,
}

/// Two records of different splits with the same pixels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leak {
    /// Record whose copy is kept with `drop_leaks`.
    pub id: String,
    /// Split of the kept record.
    pub split: String,
    /// Record with the same image in another split.
    pub copy: String,
    /// Split of the other record.
    pub copy_split: String,
}

impl ImportReport {
    /// Counts an object or row that is left out, and lists it if there is space.
    pub(super) fn leave_out(&mut self, left: LeftOut) {
        *self.left_out_by_reason.entry(left.reason.clone()).or_default() += 1;
        if self.left_out.len() < MAX_LISTED {
            self.left_out.push(left);
        }
    }

    /// Returns the number of objects and rows left out.
    pub fn left_out_count(&self) -> usize {
        self.left_out_by_reason.values().sum()
    }
}
