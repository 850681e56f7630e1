//! Tests of the importers on small folders in the layouts that the data sets document.

mod answers;
mod bug_reports;
mod detection;
mod fixtures;
mod hostile;
mod malformed;
mod medical;
mod medvh;
mod questions;
mod rules;
mod voc;

use std::collections::BTreeMap;
use std::path::PathBuf;

use unveil_core::Record;
use unveil_data::image_store::Image;
use unveil_data::records::RecordFile;

use unveil_datasets::check::require_valid;
use unveil_datasets::import::{Format, ImportError, ImportOptions, ImportReport, import};

/// A data set in a temporary directory, and the path of the record file to import into.
pub(super) struct DatasetFixture {
    dir: tempfile::TempDir,
}

impl DatasetFixture {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("set")).unwrap();
        Self { dir }
    }

    pub(super) fn src(&self) -> PathBuf {
        self.dir.path().join("set")
    }

    pub(super) fn out(&self) -> PathBuf {
        self.dir.path().join("out/records.jsonl")
    }

    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.src().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    /// Writes an image of this size; `tone` makes its pixels distinct.
    pub(super) fn image(&self, name: &str, (w, h): (u32, u32), tone: u8) -> &Self {
        let mut image = Image::new(w, h);
        image.rgb_mut().iter_mut().enumerate().for_each(|(i, v)| *v = tone.wrapping_mul(31).wrapping_add(i as u8));
        self.write(name, image.to_png().unwrap())
    }

    pub(super) fn try_import(&self, format: Format, options: &ImportOptions) -> Result<ImportReport, ImportError> {
        import(format, &self.src(), &self.out(), options)
    }

    /// Imports, and checks the records as training does.
    pub(super) fn import(&self, format: Format, options: &ImportOptions) -> (ImportReport, BTreeMap<String, Record>) {
        let report = self.try_import(format, options).unwrap();
        let file = RecordFile::load(&self.out()).unwrap();
        require_valid(&file, None).unwrap();
        assert_eq!(report.records, file.records.len());
        assert_eq!(report.boxes, file.records.iter().map(|r| r.boxes.len()).sum::<usize>());
        (report, file.records.into_iter().map(|r| (r.id.clone(), r)).collect())
    }
}

/// Reason for leaving out an image with an object that could not be read or named.
pub(super) const UNREAD: &str = "one of its objects could not be read or named";

/// Returns the reasons of a report with their counts.
pub(super) fn reasons(report: &ImportReport) -> Vec<(&str, usize)> {
    assert_eq!(report.left_out_count(), report.left_out.len());
    report.left_out_by_reason.iter().map(|(r, n)| (r.as_str(), *n)).collect()
}

/// Returns the coordinates of a record's boxes.
pub(super) fn boxes(record: &Record) -> Vec<[f32; 4]> {
    record.boxes.iter().map(|b| (*b).into()).collect()
}

/// Decodes a record's image.
pub(super) fn pixels(set: &DatasetFixture, record: &Record) -> Image {
    unveil_data::image_root::ImageRoot::of(&set.out(), Default::default()).open(record).unwrap()
}
