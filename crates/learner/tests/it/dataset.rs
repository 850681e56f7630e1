//! Training records: what a data set refuses, and how the error names it.

use std::sync::Arc;

use unveil_data::records::RecordFile;
use unveil_datasets::synth::RECORDS_FILE;
use unveil_learner::{Dataset, LearnerError};
use unveil_preprocess::preprocessor::Preprocessor;

use crate::common::small_run::SmallRun;

/// Returns the error of opening the records of `small` with its configuration.
fn open_error(small: &SmallRun) -> LearnerError {
    let records = RecordFile::load(&small.dir.path().join("data").join(RECORDS_FILE)).unwrap();
    let preprocessor = Arc::new(Preprocessor::load(&small.model()).unwrap());
    Dataset::new(&small.config, records, preprocessor).err().unwrap()
}

#[test]
fn a_split_without_records_is_refused() {
    let mut small = SmallRun::new(2);
    small.config.data.train_split = "trian".into();
    let e = open_error(&small);
    assert!(matches!(&e, LearnerError::EmptySplit { split, .. } if split == "trian"), "{e}");
    for part in [RECORDS_FILE, "`trian`", "data.train_split"] {
        assert!(e.to_string().contains(part), "{part}: {e}");
    }
}

#[test]
fn augmentation_out_of_range_is_refused() {
    for (crop_min, jitter, named) in
        [(0.0, 0.0, "crop_min = 0"), (1.5, 0.0, "crop_min = 1.5"), (1.0, 1.0, "jitter = 1")]
    {
        let mut small = SmallRun::new(2);
        small.config.data.augment.crop_min = crop_min;
        small.config.data.augment.jitter = jitter;
        let e = open_error(&small);
        assert!(matches!(e, LearnerError::Augment(_)) && e.to_string().contains(named), "{named}: {e}");
    }
}

#[test]
fn an_index_beyond_the_records_is_refused() {
    let small = SmallRun::new(2);
    let data = small.data();
    assert!(data.item(1, 0, false).is_ok());
    let e = data.item(2, 0, false).err().unwrap();
    assert!(matches!(e, LearnerError::RecordIndex { index: 2, count: 2 }), "{e}");
}
