//! NIH ChestX-ray14 (<https://nihcc.app.box.com/v/ChestXray-NIHCC>; Wang et al., CVPR 2017).
//!
//! Files: `BBox_List_2017.csv` (boxes of eight findings), `Data_Entry_2017.csv` (findings of every image), and images anywhere below
//! (`images/`, `images_001/images/`, …).
//!
//! Fields: the header of the boxes is `Image Index,Finding Label,Bbox [x,y,w,h],,,`, so its fields are read by position; `Infiltrate` there
//! is `Infiltration` in the other file. Images labelled `No Finding` become records without a box. `Patient ID`, or the prefix of the file
//! name, is the patient. All boxes are in the published test list, so the lists are not used and splits are assigned by patient.
//!
//! Left out: images with findings but no box, because a record without boxes means that there is no finding; images with a box that cannot
//! be read or has no label.

use std::collections::{BTreeMap, BTreeSet};

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{MISSING, file_error, stem};

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("What is abnormal, and where?");
    let root = dataset.source.root.clone();
    let file = root.join("BBox_List_2017.csv");
    let table = dataset.source.read_csv(&file)?;
    if table.find("Image Index") != Some(0) || table.find("Finding Label") != Some(1) {
        return Err(file_error(&file, "the first columns are not \"Image Index\" and \"Finding Label\"".to_owned()));
    }
    let mut boxes: BTreeMap<String, DraftRecord> = BTreeMap::new();
    for (row, r) in table.rows.iter().enumerate() {
        let field = |c: usize| r.get(c).unwrap_or_default();
        let numbers: Option<Vec<f32>> = (2..6).map(|c| field(c).parse().ok()).collect();
        let label = if field(1) == "Infiltrate" { "infiltration".to_owned() } else { field(1).to_lowercase() };
        let item = boxes.entry(field(0).to_owned());
        let item = item.or_insert_with(|| DraftRecord { file: file.clone(), row, ..DraftRecord::default() });
        match numbers.as_deref().and_then(|c| <[f32; 4]>::try_from(c).ok()) {
            Some(c) => item.objects.push(Object { label, coords: Coords::corner_and_size(c) }),
            None => {
                item.unread.push(label);
                dataset.leave_out(&file, row, field(0), "its box is not four numbers");
            }
        }
    }
    let entries =
        ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"].map(|n| root.join(n)).into_iter().find(|p| p.is_file());
    let mut patients: BTreeMap<String, String> = BTreeMap::new();
    let mut healthy: BTreeSet<(String, usize)> = BTreeSet::new();
    if let Some(file) = &entries {
        let table = dataset.source.read_csv(file)?;
        let [name, findings, patient] = ["Image Index", "Finding Labels", "Patient ID"].map(|c| table.column(c));
        let name = name?;
        let findings = findings?;
        let patient = patient?;
        for (row, r) in table.rows.iter().enumerate() {
            let image = r.get(name).unwrap_or_default();
            patients.insert(image.to_owned(), r.get(patient).unwrap_or_default().to_owned());
            let no_finding = r.get(findings) == Some("No Finding");
            if no_finding && boxes.contains_key(image) {
                dataset.leave_out(file, row, image, "it has a box and no finding");
            } else if no_finding {
                healthy.insert((image.to_owned(), row));
            } else if !boxes.contains_key(image) {
                dataset.leave_out(file, row, image, "it has findings but no box");
            }
        }
    }
    let images = dataset.source.images_by_name();
    let entries_file = entries.unwrap_or_default();
    let without_boxes = healthy
        .into_iter()
        .map(|(name, row)| (name, DraftRecord { file: entries_file.clone(), row, ..DraftRecord::default() }));
    for (name, item) in boxes.into_iter().chain(without_boxes).collect::<Vec<_>>() {
        let Some(image) = images.get(&name) else {
            // Images with an unreadable box were reported above.
            if !item.objects.is_empty() || item.unread.is_empty() {
                dataset.leave_out(&item.file, item.row, &name, MISSING);
            }
            continue;
        };
        let id = stem(image);
        // File names consist of patient and follow-up number: 00000013_005.png.
        let patient = patients.get(&name).filter(|p| !p.is_empty()).cloned();
        let patient = patient.unwrap_or_else(|| id.split('_').next().unwrap_or(&id).trim_start_matches('0').to_owned());
        dataset.items.push(DraftRecord {
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
