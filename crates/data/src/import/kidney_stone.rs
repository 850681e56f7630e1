//! Kidney stones in CT: "Kidney Stone Images" (<https://www.kaggle.com/datasets/safurahajiheidari/kidney-stone-images>), a YOLO export
//! of Roboflow with the folders `train`, `valid`, `test`, each of `images/` and `labels/`, and one class, `Tas_Var` (Turkish: stone).
//!
//! Known faults: the export holds augmented copies of one image, `NAME_jpg.rf.HASH.jpg`, also across the published splits: what
//! stands before `.rf.` is taken as the unit that must not be parted, and `split_patients` names those that are. Use `resplit`.

use super::ImportError;
use super::item::Found;
use super::yolo;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    found.question = Some("What is abnormal, and where?");
    yolo::read_as(
        found,
        |class| if class.eq_ignore_ascii_case("tas_var") { "kidney stone".to_owned() } else { class.to_owned() },
        |name| name.split_once(".rf.").map_or(name, |(head, _)| head).to_owned(),
    )?;
    found.items.iter_mut().for_each(|i| i.modality = "CT".to_owned());
    Ok(())
}
