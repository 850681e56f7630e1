//! NIH ChestX-ray14 (<https://nihcc.app.box.com/v/ChestXray-NIHCC>; Wang et al., CVPR 2017): `BBox_List_2017.csv` (boxes of eight
//! findings), `Data_Entry_2017.csv` (findings of every image), images anywhere below (`images/`, `images_001/images/` …).
//!
//! The header of the boxes is `Image Index,Finding Label,Bbox [x,y,w,h],,,`: its fields are read by position. `Infiltrate` there is
//! `Infiltration` in the other file. Images labelled `No Finding` become records without a box; images with findings and no box are left
//! out, for an empty list of boxes would say that nothing is there. All boxes are in the published test list, so the lists are not used:
//! splits are by patient.

use std::collections::{BTreeMap, BTreeSet};

use super::ImportError;
use super::item::{Coords, Found, Item, Object};
use super::source::{MISSING, stem, wrong_file};

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    found.question = Some("What is abnormal, and where?");
    let root = found.source.root.clone();
    let file = root.join("BBox_List_2017.csv");
    let table = found.source.csv(&file)?;
    if table.find("Image Index") != Some(0) || table.find("Finding Label") != Some(1) {
        return Err(wrong_file(&file, "the first columns are not \"Image Index\" and \"Finding Label\"".to_owned()));
    }
    let mut boxes: BTreeMap<String, (usize, Vec<Object>)> = BTreeMap::new();
    for (row, r) in table.rows.iter().enumerate() {
        let field = |c: usize| r.get(c).unwrap_or_default();
        let four: Option<Vec<f32>> = (2..6).map(|c| field(c).parse().ok()).collect();
        let Some([x, y, w, h]) = four.as_deref().and_then(|c| <[f32; 4]>::try_from(c).ok()) else {
            found.leave_out(&file, row, field(0), "its box is not four numbers");
            continue;
        };
        let label = if field(1) == "Infiltrate" { "Infiltration" } else { field(1) };
        let object = Object { label: label.to_lowercase(), coords: Coords::corner_and_size([x, y, w, h]) };
        boxes.entry(field(0).to_owned()).or_insert((row, Vec::new())).1.push(object);
    }
    let entries =
        ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
    let mut patients: BTreeMap<String, String> = BTreeMap::new();
    let mut healthy: BTreeSet<(String, usize)> = BTreeSet::new();
    if let Some(file) = &entries {
        let table = found.source.csv(file)?;
        let [name, findings, patient] = ["Image Index", "Finding Labels", "Patient ID"].map(|c| table.column(c));
        let (name, findings, patient) = (name?, findings?, patient?);
        for (row, r) in table.rows.iter().enumerate() {
            let image = r.get(name).unwrap_or_default();
            patients.insert(image.to_owned(), r.get(patient).unwrap_or_default().to_owned());
            if r.get(findings) == Some("No Finding") {
                healthy.insert((image.to_owned(), row));
            } else if !boxes.contains_key(image) {
                found.leave_out(file, row, image, "it has findings but no box");
            }
        }
    }
    let images = found.source.images_by_name();
    let with_boxes = boxes.into_iter().map(|(name, (row, objects))| (file.clone(), row, name, objects));
    let without = healthy.into_iter().map(|(name, row)| (entries.clone().unwrap_or_default(), row, name, Vec::new()));
    for (file, row, name, objects) in with_boxes.chain(without).collect::<Vec<_>>() {
        let Some(image) = images.get(&name) else {
            found.leave_out(&file, row, &name, MISSING);
            continue;
        };
        let id = stem(image);
        // A file is named after patient and follow-up: 00000013_005.png.
        let patient = patients.get(&name).filter(|p| !p.is_empty()).cloned();
        let patient = patient.unwrap_or_else(|| id.split('_').next().unwrap_or(&id).trim_start_matches('0').to_owned());
        found.items.push(Item {
            id,
            image: image.clone(),
            file,
            row,
            objects,
            frame: Some((1024, 1024)),
            modality: "X-ray".to_owned(),
            patient,
            ..Item::default()
        });
    }
    Ok(())
}
