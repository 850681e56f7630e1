//! NIH ChestX-ray14 (<https://nihcc.app.box.com/v/ChestXray-NIHCC>; Wang et al., CVPR 2017): `BBox_List_2017.csv` (boxes of eight
//! findings), `Data_Entry_2017.csv` (findings of every image), images anywhere below (`images/`, `images_001/images/` …).
//!
//! The header of the boxes is `Image Index,Finding Label,Bbox [x,y,w,h],,,`: its fields are read by position. `Infiltrate` there is
//! `Infiltration` in the other file. Images labelled `No Finding` become records without a box; images with findings and no box are left
//! out, for an empty list of boxes would say that nothing is there, and so are images with a box that cannot be read or names no
//! finding. All boxes are in the published test list, so the lists are not used: splits are by patient.

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
    let mut boxes: BTreeMap<String, Item> = BTreeMap::new();
    for (row, r) in table.rows.iter().enumerate() {
        let field = |c: usize| r.get(c).unwrap_or_default();
        let four: Option<Vec<f32>> = (2..6).map(|c| field(c).parse().ok()).collect();
        let label = if field(1) == "Infiltrate" { "infiltration".to_owned() } else { field(1).to_lowercase() };
        let item = boxes.entry(field(0).to_owned());
        let item = item.or_insert_with(|| Item { file: file.clone(), row, ..Item::default() });
        match four.as_deref().and_then(|c| <[f32; 4]>::try_from(c).ok()) {
            Some(c) => item.objects.push(Object { label, coords: Coords::corner_and_size(c) }),
            None => {
                item.unread.push(label);
                found.leave_out(&file, row, field(0), "its box is not four numbers");
            }
        }
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
            let none = r.get(findings) == Some("No Finding");
            if none && boxes.contains_key(image) {
                found.leave_out(file, row, image, "it has a box and no finding");
            } else if none {
                healthy.insert((image.to_owned(), row));
            } else if !boxes.contains_key(image) {
                found.leave_out(file, row, image, "it has findings but no box");
            }
        }
    }
    let images = found.source.images_by_name();
    let of = entries.unwrap_or_default();
    let without = healthy.into_iter().map(|(name, row)| (name, Item { file: of.clone(), row, ..Item::default() }));
    for (name, item) in boxes.into_iter().chain(without).collect::<Vec<_>>() {
        let Some(image) = images.get(&name) else {
            // What was reported above is not reported twice.
            if !item.objects.is_empty() || item.unread.is_empty() {
                found.leave_out(&item.file, item.row, &name, MISSING);
            }
            continue;
        };
        let id = stem(image);
        // A file is named after patient and follow-up: 00000013_005.png.
        let patient = patients.get(&name).filter(|p| !p.is_empty()).cloned();
        let patient = patient.unwrap_or_else(|| id.split('_').next().unwrap_or(&id).trim_start_matches('0').to_owned());
        found.items.push(Item {
            id,
            image: image.clone(),
            frame: Some((1024, 1024)),
            modality: "X-ray".to_owned(),
            patient,
            ..item
        });
    }
    Ok(())
}
