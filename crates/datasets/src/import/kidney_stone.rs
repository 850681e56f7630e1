//! "Kidney Stone Images" in CT (<https://www.kaggle.com/datasets/safurahajiheidari/kidney-stone-images>), a YOLO export of Roboflow.
//!
//! Files: the folders `train`, `valid` and `test`, each with `images/` and `labels/`; the YOLO layout of [`super::yolo`].
//!
//! Fields: the only class, `Tas_Var` (Turkish: there is a stone), becomes "kidney stone"; every image becomes a CT record.
//!
//! Known problem: the export contains augmented copies of one image, `NAME_jpg.rf.HASH.jpg`, also across the published splits. The part
//! before `.rf.` is used as the patient, so `split_patients` of the report lists the images that are split. Use `resplit`.

use super::ImportError;
use super::draft::ParsedDataset;
use super::yolo;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("What is abnormal, and where?");
    yolo::read_mapped(
        dataset,
        |class| if class.eq_ignore_ascii_case("tas_var") { "kidney stone".to_owned() } else { class.to_owned() },
        |name| name.split_once(".rf.").map_or(name, |(head, _)| head).to_owned(),
    )?;
    dataset.items.iter_mut().for_each(|i| i.modality = "CT".to_owned());
    Ok(())
}
