//! What an import says about itself.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// Objects and rows left out that are listed one by one; all are counted.
const LISTED: usize = 1000;

/// What an import did.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ImportReport {
    /// Records written: one per image, or one per question where the data set asks several.
    pub records: usize,
    /// Objects found in the annotations of these records, before any filter.
    pub objects: usize,
    /// Boxes written.
    pub boxes: usize,
    /// Boxes that overhung their image and were clipped to it.
    pub clipped: usize,
    /// Boxes that were scaled from the stated size to the image's.
    pub scaled: usize,
    /// Records by split; the empty name holds images that no list names.
    pub splits: BTreeMap<String, usize>,
    /// Objects by class as annotated, before any filter.
    pub classes: BTreeMap<String, usize>,
    /// How many objects and rows were left out, by rule.
    pub left_out_by_reason: BTreeMap<String, usize>,
    /// The first thousand of them.
    pub left_out: Vec<LeftOut>,
    /// Annotations whose stated size is not the image's (the image's is used).
    pub size_mismatch: Vec<String>,
    /// Images whose pixels are also in another split.
    pub leaks: Vec<Leak>,
    /// Patients with images in more than one split.
    pub split_patients: Vec<String>,
    /// What to look at, in words: images that were taken as "no finding" for want of a label file, file names that say no task.
    pub notes: Vec<String>,
    /// Folder into which the images were linked or copied; absent when they are used where they lie.
    pub images_copied_to: Option<PathBuf>,
}

/// One object or row that was not taken over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeftOut {
    /// Annotation file.
    pub file: String,
    /// Position of the object or row in the file, from 0.
    pub object: usize,
    /// Its class, or what the row is about.
    pub label: String,
    /// The rule.
    pub reason: String,
    /// Coordinates as written, where there are four.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coords: Option<[f32; 4]>,
}

/// Two records of different splits with the same pixels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leak {
    /// The record whose copy would stay.
    pub id: String,
    /// Its split.
    pub split: String,
    /// The other record.
    pub copy: String,
    /// The other one's split.
    pub copy_split: String,
}

impl ImportReport {
    /// Notes what was left out.
    pub(super) fn leave_out(&mut self, left: LeftOut) {
        *self.left_out_by_reason.entry(left.reason.clone()).or_default() += 1;
        if self.left_out.len() < LISTED {
            self.left_out.push(left);
        }
    }

    /// How many objects and rows were left out.
    pub fn left_out_count(&self) -> usize {
        self.left_out_by_reason.values().sum()
    }
}
